//! Exponential moving average of the weights, which is what gets evaluated and exported.

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};

/// Settings of the average.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct EmaRecipe {
    /// Share of the average that each update keeps; default 0.999.
    pub decay: f32,
    /// The n-th update (from 0) keeps at most (1 + n) / (10 + n), so that the average soon forgets the
    /// weights it started from; default true.
    pub warm_up: bool,
}

impl Default for EmaRecipe {
    fn default() -> Self {
        Self { decay: 0.999, warm_up: true }
    }
}

impl EmaRecipe {
    /// Errors unless 0 <= decay <= 1.
    pub fn check(&self) -> Result<()> {
        if (0.0..=1.0).contains(&self.decay) {
            return Ok(());
        }
        Err(Error::InvalidArgument(format!("ema: decay must lie in 0 to 1, got {}", self.decay)))
    }
}

/// The averaged weights.
#[derive(Clone, Debug, PartialEq)]
pub struct Ema {
    recipe: EmaRecipe,
    /// Updates so far.
    pub updates: u64,
    /// Averages, a tensor a parameter. Save them and `updates` to go on bit for bit.
    pub average: Vec<Vec<f32>>,
}

impl Ema {
    /// Starts at the given weights. Errors unless 0 <= decay <= 1.
    pub fn new<S: AsRef<[f32]>>(recipe: EmaRecipe, weights: &[S]) -> Result<Self> {
        recipe.check()?;
        Ok(Self { recipe, updates: 0, average: weights.iter().map(|w| w.as_ref().to_vec()).collect() })
    }

    /// What the next update keeps of the average.
    pub fn decay(&self) -> f32 {
        let n = self.updates as f64;
        let ramp = if self.recipe.warm_up { ((1.0 + n) / (10.0 + n)) as f32 } else { 1.0 };
        self.recipe.decay.min(ramp)
    }

    /// average += (1 - decay) (weights - average). Errors, before any change, where tensors do not fit.
    pub fn update<S: AsRef<[f32]>>(&mut self, weights: &[S]) -> Result<()> {
        let fits = weights.len() == self.average.len()
            && weights.iter().zip(&self.average).all(|(w, a)| w.as_ref().len() == a.len());
        if !fits {
            return Err(Error::InvalidArgument("ema: the weights are not those it was started with".into()));
        }
        let share = 1.0 - self.decay();
        for (a, w) in self.average.iter_mut().zip(weights) {
            for (a, &w) in a.iter_mut().zip(w.as_ref()) {
                *a += share * (w - *a);
            }
        }
        self.updates += 1;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_warm_up_it_follows_the_closed_form() {
        // Constant weights 1 from an average of 0: 1 - decay^n.
        let mut ema = Ema::new(EmaRecipe { decay: 0.9, warm_up: false }, &[[0.0f32; 3]]).unwrap();
        for n in 1..30 {
            ema.update(&[[1.0f32; 3]]).unwrap();
            assert!((ema.average[0][2] - (1.0 - 0.9f32.powi(n))).abs() < 1e-5);
        }
    }

    #[test]
    fn with_warm_up_the_first_updates_count_more() {
        let mut ema = Ema::new(EmaRecipe::default(), &[vec![0.0f32]]).unwrap();
        assert_eq!(ema.decay(), 0.1);
        ema.update(&[vec![1.0]]).unwrap();
        assert!((ema.average[0][0] - 0.9).abs() < 1e-6);
        assert!((ema.decay() - 2.0 / 11.0).abs() < 1e-6);
        ema.updates = 1_000_000;
        assert_eq!(ema.decay(), 0.999);
        let before = ema.clone();
        assert!(ema.update(&[vec![1.0, 2.0]]).is_err() && ema.update::<Vec<f32>>(&[]).is_err());
        assert_eq!(ema, before);
        assert!(Ema::new(EmaRecipe { decay: 1.5, warm_up: true }, &[vec![0.0]]).is_err());
    }
}
