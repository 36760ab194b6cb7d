//! The choice of optimiser in a training recipe.

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};

/// Update rule. In TOML: `optimizer = { kind = "sgd", weight-decay = 5e-5 }`. The learning rate comes
/// from the schedule.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum OptimizerRecipe {
    /// Stochastic gradient descent as `torch.optim.SGD`: g += decay p; buffer = momentum buffer + g;
    /// p -= lr buffer (Nesterov: p -= lr (g + momentum buffer)).
    Sgd {
        /// Default 0.9.
        #[serde(default = "momentum")]
        momentum: f32,
        /// Default 5e-4 (HR; Group Sampling and HAMBox 5e-5, RefineFace 1e-4).
        #[serde(default = "sgd_decay", rename = "weight-decay")]
        weight_decay: f32,
        /// Default false.
        #[serde(default)]
        nesterov: bool,
    },
    /// Adam with decoupled weight decay (Loshchilov and Hutter 2019) as `torch.optim.AdamW`:
    /// p -= lr decay p; m, v = running means of g and g^2; p -= lr m^ / (sqrt(v^) + epsilon), where
    /// m^ = m / (1 - beta1^t), v^ = v / (1 - beta2^t).
    #[serde(rename = "adamw")]
    AdamW {
        /// Default 0.9.
        #[serde(default = "beta1")]
        beta1: f32,
        /// Default 0.999.
        #[serde(default = "beta2")]
        beta2: f32,
        /// Default 1e-8.
        #[serde(default = "epsilon")]
        epsilon: f32,
        /// Default 0.01.
        #[serde(default = "adam_decay", rename = "weight-decay")]
        weight_decay: f32,
    },
}

fn momentum() -> f32 {
    0.9
}
fn sgd_decay() -> f32 {
    5e-4
}
fn beta1() -> f32 {
    0.9
}
fn beta2() -> f32 {
    0.999
}
fn epsilon() -> f32 {
    1e-8
}
fn adam_decay() -> f32 {
    0.01
}

impl Default for OptimizerRecipe {
    fn default() -> Self {
        Self::Sgd { momentum: momentum(), weight_decay: sgd_decay(), nesterov: false }
    }
}

impl OptimizerRecipe {
    /// Errors where a setting is outside its range.
    pub fn check(&self) -> Result<()> {
        let fraction = |v: f32| (0.0..1.0).contains(&v);
        let ok = match *self {
            Self::Sgd { momentum, weight_decay, nesterov } => {
                fraction(momentum)
                    && weight_decay >= 0.0
                    && weight_decay.is_finite()
                    && (!nesterov || momentum > 0.0)
            }
            Self::AdamW { beta1, beta2, epsilon, weight_decay } => {
                // Without an epsilon a parameter whose gradient has always been 0 becomes 0 / 0.
                fraction(beta1)
                    && fraction(beta2)
                    && epsilon.is_finite()
                    && epsilon > 0.0
                    && weight_decay.is_finite()
                    && weight_decay >= 0.0
            }
        };
        if ok {
            return Ok(());
        }
        Err(Error::InvalidArgument(
            "optimizer: momentum and betas must lie in 0 to below 1 (nesterov needs a momentum), weight-decay be at least 0, epsilon above 0"
                .into(),
        ))
    }

    /// Names of the buffers a parameter has (PyTorch's).
    pub(super) fn buffers(&self) -> &'static [&'static str] {
        match self {
            Self::Sgd { .. } => &["momentum_buffer"],
            Self::AdamW { .. } => &["exp_avg", "exp_avg_sq"],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recipes_read_with_defaults_and_refuse_what_they_do_not_know() {
        let parse = |t: &str| serde_json::from_str::<OptimizerRecipe>(t);
        assert_eq!(parse(r#"{"kind": "sgd"}"#).unwrap(), OptimizerRecipe::default());
        assert_eq!(
            parse(r#"{"kind": "adamw", "weight-decay": 0.05}"#).unwrap(),
            OptimizerRecipe::AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.05 }
        );
        assert!(parse(r#"{"kind": "sgd", "beta1": 0.9}"#).is_err());
        assert!(parse(r#"{"kind": "adamw", "epsilon": 0.0}"#).unwrap().check().is_err());
    }
}
