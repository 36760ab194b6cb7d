//! Optimisers over a list of parameter tensors, with PyTorch's update rules; learning-rate schedules;
//! averaged weights; gradient clipping.

mod average;
mod gradient;
mod recipe;
mod schedule;

pub use average::{Ema, EmaRecipe};
pub use gradient::{clip_factor, clip_global_norm, first_non_finite, global_norm};
pub use recipe::OptimizerRecipe;
pub use schedule::{LengthUnit, Schedule, ScheduleRecipe, Shape, Warmup};

use crate::error::{Error, Result};
use std::collections::BTreeMap;

/// How one parameter is optimised.
#[derive(Clone, Debug, PartialEq)]
pub struct ParamOptions {
    /// Name, for the saved state and errors.
    pub name: String,
    /// Values.
    pub len: usize,
    /// Its learning rate is the schedule's times this.
    pub lr_multiplier: f32,
    /// Takes part in the weight decay (biases and normalisations usually do not).
    pub decay: bool,
    /// Never changes; its gradient is not read.
    pub frozen: bool,
}

impl ParamOptions {
    /// Learning-rate multiplier 1, decaying, not frozen.
    pub fn new(name: impl Into<String>, len: usize) -> Self {
        Self { name: name.into(), len, lr_multiplier: 1.0, decay: true, frozen: false }
    }
}

/// What an optimiser remembers, for a checkpoint: f32 vectors by name, and the steps taken.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct OptimizerState {
    /// Steps taken.
    pub step: u64,
    /// `<parameter>.<buffer>`, for instance `conv1.weight.momentum_buffer`.
    pub buffers: BTreeMap<String, Vec<f32>>,
}

/// An update rule, the parameters' options and the state.
#[derive(Clone, Debug, PartialEq)]
pub struct Optimizer {
    recipe: OptimizerRecipe,
    params: Vec<ParamOptions>,
    step: u64,
    /// Per parameter, then per buffer; none for frozen parameters.
    buffers: Vec<Vec<Vec<f32>>>,
}

impl Optimizer {
    /// Buffers of zeros for the parameters, whose order all later calls keep. Errors where the recipe
    /// or a multiplier is out of range, or a name comes twice.
    pub fn new(recipe: OptimizerRecipe, params: Vec<ParamOptions>) -> Result<Self> {
        recipe.check()?;
        let mut names: Vec<&str> = params.iter().map(|p| p.name.as_str()).collect();
        names.sort_unstable();
        if let Some(twice) = names.windows(2).find(|w| w[0] == w[1]) {
            return Err(Error::InvalidArgument(format!("optimizer: parameter {} is named twice", twice[0])));
        }
        if let Some(p) = params.iter().find(|p| !(p.lr_multiplier.is_finite() && p.lr_multiplier >= 0.0)) {
            let (name, m) = (&p.name, p.lr_multiplier);
            return Err(Error::InvalidArgument(format!(
                "optimizer: {name}: learning-rate multiplier {m} is not at least 0"
            )));
        }
        let count = recipe.buffers().len();
        let buffers = params
            .iter()
            .map(|p| if p.frozen { Vec::new() } else { vec![vec![0.0; p.len]; count] })
            .collect();
        Ok(Self { recipe, params, step: 0, buffers })
    }

    /// Steps taken.
    pub fn steps(&self) -> u64 {
        self.step
    }

    /// The update rule, and what it does with each parameter.
    pub fn rule(&self) -> (OptimizerRecipe, &[ParamOptions]) {
        (self.recipe, &self.params)
    }

    /// What is remembered of each parameter, a vector a buffer of the rule; none of frozen ones.
    pub fn buffers(&self) -> &[Vec<Vec<f32>>] {
        &self.buffers
    }

    /// As [`Optimizer::buffers`], for whoever takes the steps elsewhere and brings back what came of them.
    pub fn buffers_mut(&mut self) -> &mut [Vec<Vec<f32>>] {
        &mut self.buffers
    }

    /// Counts a step that is taken elsewhere, and returns its number, from 1.
    pub fn count_step(&mut self) -> u64 {
        self.step += 1;
        self.step
    }

    /// One update of all parameters at learning rate `lr`. `values` and `gradients` are in the order of
    /// [`Optimizer::new`]; a frozen parameter's gradient may be empty. Errors, before any change, where
    /// the counts or lengths differ.
    pub fn step(&mut self, values: &mut [&mut [f32]], gradients: &[&[f32]], lr: f32) -> Result<()> {
        if values.len() != self.params.len() || gradients.len() != self.params.len() {
            return Err(Error::InvalidArgument(format!(
                "optimizer has {} parameters, got {} and {} gradients",
                self.params.len(),
                values.len(),
                gradients.len()
            )));
        }
        for (p, (v, g)) in self.params.iter().zip(values.iter().zip(gradients)) {
            if v.len() != p.len || (!p.frozen && g.len() != p.len) {
                let (name, len) = (&p.name, p.len);
                return Err(Error::InvalidArgument(format!(
                    "optimizer: {name} has {len} values, got {} and a gradient of {}",
                    v.len(),
                    g.len()
                )));
            }
        }
        self.step += 1;
        let each = self.params.iter().zip(&mut self.buffers).zip(values.iter_mut().zip(gradients));
        for ((p, buffers), (value, gradient)) in each.filter(|((p, _), _)| !p.frozen) {
            let lr = lr * p.lr_multiplier;
            match self.recipe {
                OptimizerRecipe::Sgd { momentum, weight_decay, nesterov } => {
                    let decay = if p.decay { weight_decay } else { 0.0 };
                    sgd(
                        value,
                        gradient,
                        &mut buffers[0],
                        lr,
                        momentum,
                        decay,
                        sgd_weights(momentum, nesterov),
                    );
                }
                OptimizerRecipe::AdamW { beta1, beta2, epsilon, weight_decay } => {
                    let decay = if p.decay { weight_decay } else { 0.0 };
                    let [m, v] = &mut buffers[..] else { unreachable!("AdamW has two buffers") };
                    let factors = AdamFactors::new(self.step, lr, [beta1, beta2], decay);
                    adamw(value, gradient, m, v, [beta1, beta2], epsilon, factors);
                }
            }
        }
        Ok(())
    }

    /// The state, for a checkpoint. Loading it gives the same optimiser bit for bit.
    pub fn save(&self) -> OptimizerState {
        let mut state = OptimizerState { step: self.step, ..Default::default() };
        for (p, buffers) in self.params.iter().zip(&self.buffers) {
            for (kind, buffer) in self.recipe.buffers().iter().zip(buffers) {
                state.buffers.insert(format!("{}.{kind}", p.name), buffer.clone());
            }
        }
        state
    }

    /// The first buffer with a value that is no finite number, as [`save`](Self::save) names it.
    pub fn first_non_finite(&self) -> Option<String> {
        let broken = |v: &Vec<f32>| !v.iter().all(|v| v.is_finite());
        self.params.iter().zip(&self.buffers).find_map(|(p, buffers)| {
            let (kind, _) = self.recipe.buffers().iter().zip(buffers).find(|(_, v)| broken(v))?;
            Some(format!("{}.{kind}", p.name))
        })
    }

    /// Takes the state up again. Errors, before any change, where a buffer is missing, of another
    /// length, or of a parameter that this optimiser does not have.
    pub fn load(&mut self, state: &OptimizerState) -> Result<()> {
        let bad = |text: String| {
            Err(Error::InvalidData(format!("optimizer state: {text}; was it saved with the same recipe?")))
        };
        let mut loaded = self.buffers.clone();
        let mut count = 0;
        for (p, buffers) in self.params.iter().zip(&mut loaded) {
            for (kind, buffer) in self.recipe.buffers().iter().zip(buffers) {
                let name = format!("{}.{kind}", p.name);
                match state.buffers.get(&name) {
                    Some(values) if values.len() == buffer.len() => buffer.copy_from_slice(values),
                    Some(values) => {
                        return bad(format!("{name} has {} values, not {}", values.len(), buffer.len()))
                    }
                    None => return bad(format!("{name} is missing")),
                }
                count += 1;
            }
        }
        if count != state.buffers.len() {
            return bad(format!("{} buffers, the recipe has {count}", state.buffers.len()));
        }
        (self.buffers, self.step) = (loaded, state.step);
        Ok(())
    }
}

/// What the buffer weighs in a step of gradient descent, and the gradient beside it.
pub fn sgd_weights(momentum: f32, nesterov: bool) -> [f32; 2] {
    if nesterov {
        [momentum, 1.0]
    } else {
        [1.0, 0.0]
    }
}

/// The buffer starts at 0, so the first step makes it the gradient, as PyTorch's does.
fn sgd(
    p: &mut [f32],
    g: &[f32],
    buffer: &mut [f32],
    lr: f32,
    momentum: f32,
    decay: f32,
    [of_buffer, of_gradient]: [f32; 2],
) {
    for ((p, &g), b) in p.iter_mut().zip(g).zip(buffer) {
        let g = g + decay * *p;
        *b = momentum * *b + g;
        *p -= lr * (of_gradient * g + of_buffer * *b);
    }
}

/// What AdamW's step number t has in common for all values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamFactors {
    /// lr / (1 - beta1^t).
    pub rate: f32,
    /// 1 / sqrt(1 - beta2^t).
    pub root: f32,
    /// 1 - lr * decay.
    pub shrink: f32,
}

impl AdamFactors {
    /// Of step `step`, counted from 1.
    pub fn new(step: u64, lr: f32, [beta1, beta2]: [f32; 2], decay: f32) -> Self {
        // Bias corrections in f64: 1 - beta2 loses digits in f32 at the first steps.
        let correction = |beta: f32| 1.0 - f64::from(beta).powi(step.min(i32::MAX as u64) as i32);
        Self {
            rate: (f64::from(lr) / correction(beta1)) as f32,
            root: correction(beta2).sqrt().recip() as f32,
            shrink: 1.0 - lr * decay,
        }
    }
}

fn adamw(
    p: &mut [f32],
    g: &[f32],
    m: &mut [f32],
    v: &mut [f32],
    [beta1, beta2]: [f32; 2],
    epsilon: f32,
    AdamFactors { rate, root, shrink }: AdamFactors,
) {
    for (((p, &g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
        *m += (1.0 - beta1) * (g - *m);
        *v = beta2 * *v + (1.0 - beta2) * g * g;
        *p = shrink * *p - rate * *m / (v.sqrt() * root + epsilon);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::init::Rng;

    fn sgd_recipe(momentum: f32, weight_decay: f32, nesterov: bool) -> OptimizerRecipe {
        OptimizerRecipe::Sgd { momentum, weight_decay, nesterov }
    }

    fn one(recipe: OptimizerRecipe, steps: &[(f32, f32)], start: f32) -> f32 {
        let mut o = Optimizer::new(recipe, vec![ParamOptions::new("w", 1)]).unwrap();
        let mut p = [start];
        for &(g, lr) in steps {
            o.step(&mut [&mut p], &[&[g]], lr).unwrap();
        }
        p[0]
    }

    #[test]
    fn sgd_matches_steps_worked_by_hand() {
        // g + 0.5 * 2 = 2; p = 2 - 0.1 * 2 = 1.8. Then g = 1 + 0.9, buffer = 0.5 * 2 + 1.9 = 2.9.
        let steps = [(1.0, 0.1), (1.0, 0.1)];
        assert!((one(sgd_recipe(0.5, 0.5, false), &steps[..1], 2.0) - 1.8).abs() < 1e-6);
        assert!((one(sgd_recipe(0.5, 0.5, false), &steps, 2.0) - (1.8 - 0.29)).abs() < 1e-6);
        // Nesterov: first step g + 0.5 g = 3, p = 1.7; then g = 1.85, buffer 2.85, step 1.85 + 1.425.
        assert!((one(sgd_recipe(0.5, 0.5, true), &steps, 2.0) - (1.7 - 0.3275)).abs() < 1e-6);
    }

    #[test]
    fn momentum_under_a_constant_gradient_follows_its_closed_form() {
        // After n steps: lr g sum over k = 1..n of (1 - mu^k) / (1 - mu).
        let (mu, lr, n) = (0.9f64, 0.01, 25);
        let moved: f64 = (1..=n).map(|k| (1.0 - mu.powi(k)) / (1.0 - mu)).sum::<f64>() * lr * 2.0;
        let got = one(sgd_recipe(0.9, 0.0, false), &vec![(2.0, 0.01); n as usize], 1.0);
        assert!((f64::from(got) - (1.0 - moved)).abs() < 1e-4, "{got} {moved}");
    }

    #[test]
    fn adamw_follows_the_published_rule() {
        // PyTorch's documentation, written out in f64, with a decay and random gradients.
        let (b1, b2, eps, wd) = (0.8f64, 0.95, 1e-6, 0.1);
        let recipe = OptimizerRecipe::AdamW { beta1: 0.8, beta2: 0.95, epsilon: 1e-6, weight_decay: 0.1 };
        let mut rng = Rng::new(5);
        let (mut p, mut m, mut v) = (0.7f64, 0.0, 0.0);
        let mut steps = Vec::new();
        for t in 1..=40 {
            let (g, lr) = (rng.normal(), rng.range(0.001, 0.1));
            steps.push((g, lr));
            let (g, lr) = (f64::from(g), f64::from(lr));
            p -= lr * wd * p;
            m = b1 * m + (1.0 - b1) * g;
            v = b2 * v + (1.0 - b2) * g * g;
            p -= lr * (m / (1.0 - b1.powi(t))) / ((v / (1.0 - b2.powi(t))).sqrt() + eps);
            let got = one(recipe, &steps, 0.7);
            assert!((f64::from(got) - p).abs() < 2e-5, "step {t}: {got}, expected {p}");
        }
        // The very first step moves by lr, whatever the gradient's size.
        let plain = OptimizerRecipe::AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-30, weight_decay: 0.0 };
        assert!((one(plain, &[(1e-3, 0.5)], 0.0) + 0.5).abs() < 1e-5);
    }

    fn three() -> Vec<ParamOptions> {
        let mut params =
            vec![ParamOptions::new("a", 1), ParamOptions::new("b", 1), ParamOptions::new("c", 1)];
        params[0].lr_multiplier = 0.1;
        params[1].decay = false;
        params[2].frozen = true;
        params
    }

    #[test]
    fn multiplier_decay_and_freezing_are_each_parameters_own() {
        for recipe in [
            sgd_recipe(0.0, 0.5, false),
            OptimizerRecipe::AdamW { beta1: 0.0, beta2: 0.0, epsilon: 1e-30, weight_decay: 0.5 },
        ] {
            let mut o = Optimizer::new(recipe, three()).unwrap();
            let (mut a, mut b, mut c) = ([1.0f32], [1.0f32], [1.0f32]);
            o.step(&mut [&mut a, &mut b, &mut c], &[&[1.0], &[1.0], &[]], 0.1).unwrap();
            // Both rules move a parameter at 1 with gradient 1 by lr (1 + decay).
            assert!((a[0] - (1.0 - 0.01 * 1.5)).abs() < 1e-6, "{recipe:?} {a:?}");
            assert!((b[0] - 0.9).abs() < 1e-6, "{recipe:?} {b:?}");
            assert_eq!(c, [1.0]);
        }
    }

    #[test]
    fn a_loaded_state_continues_bit_for_bit() {
        for recipe in [
            sgd_recipe(0.9, 1e-3, true),
            OptimizerRecipe::AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.01 },
        ] {
            let mut rng = Rng::new(9);
            let params = vec![ParamOptions::new("x", 33), ParamOptions::new("y", 5)];
            let mut first = Optimizer::new(recipe, params.clone()).unwrap();
            let mut second = Optimizer::new(recipe, params.clone()).unwrap();
            let mut x: Vec<f32> = (0..33).map(|_| rng.normal()).collect();
            let mut y = vec![0.5f32; 5];
            let gradients: Vec<Vec<f32>> = (0..20).map(|_| (0..38).map(|_| rng.normal()).collect()).collect();
            for g in &gradients[..10] {
                first.step(&mut [&mut x, &mut y], &[&g[..33], &g[33..]], 0.01).unwrap();
            }
            second.load(&first.save()).unwrap();
            let (mut x2, mut y2) = (x.clone(), y.clone());
            for g in &gradients[10..] {
                first.step(&mut [&mut x, &mut y], &[&g[..33], &g[33..]], 0.01).unwrap();
                second.step(&mut [&mut x2, &mut y2], &[&g[..33], &g[33..]], 0.01).unwrap();
            }
            assert_eq!((&x, &y), (&x2, &y2));
            assert_eq!((first.save(), second.steps()), (second.save(), 20));
            let mut other = Optimizer::new(recipe, vec![ParamOptions::new("x", 33)]).unwrap();
            let before = other.clone();
            assert!(other.load(&first.save()).is_err(), "a buffer too many");
            let mut state = first.save();
            state.buffers.pop_first();
            assert!(first.load(&state).unwrap_err().to_string().contains("missing"));
            assert_eq!(other, before, "an error changes nothing");
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_before_anything_changes() {
        let mut o = Optimizer::new(OptimizerRecipe::default(), vec![ParamOptions::new("w", 2)]).unwrap();
        let mut p = [1.0, 2.0];
        assert!(o.step(&mut [&mut p], &[&[1.0]], 0.1).unwrap_err().to_string().contains('w'));
        assert!(o.step(&mut [], &[], 0.1).is_err());
        assert_eq!((p, o.steps()), ([1.0, 2.0], 0));
        let twice = vec![ParamOptions::new("w", 2), ParamOptions::new("w", 2)];
        assert!(Optimizer::new(OptimizerRecipe::default(), twice).is_err());
        assert!(Optimizer::new(sgd_recipe(1.0, 0.0, false), vec![]).is_err());
        assert!(Optimizer::new(sgd_recipe(0.0, 0.0, true), vec![]).is_err());
    }
}
