//! Learning-rate schedules: pure functions of the step.

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};

/// What a recipe's lengths count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LengthUnit {
    /// Passes over the data.
    #[default]
    Epochs,
    /// Optimiser steps.
    Steps,
}

/// Course of the learning rate behind the warm-up.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Shape {
    /// The base rate throughout (HR).
    Constant {},
    /// Times gamma at each milestone (Group Sampling: 60 and 80 of 100 epochs; RefineFace: 100 and 120
    /// of 130; HAMBox: 110,000 of 140,000 steps).
    Step {
        /// Where it drops, from the very start of the training, ascending.
        milestones: Vec<f64>,
        /// Default 0.1.
        #[serde(default = "gamma")]
        gamma: f64,
    },
    /// Half a cosine (Loshchilov and Hutter 2017) from the base rate at the end of the warm-up to
    /// `end` at the end of the training.
    Cosine {
        /// Last rate; default 0.
        #[serde(default)]
        end: f64,
    },
}

fn gamma() -> f64 {
    0.1
}

/// Linear warm-up in front of any shape.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Warmup {
    /// Length.
    pub length: f64,
    /// First rate; default 0.
    #[serde(default)]
    pub start: f64,
}

/// A schedule in a training recipe. In TOML:
/// `schedule = { lr = 0.01, length = 130, shape = { kind = "step", milestones = [100, 120] } }`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct ScheduleRecipe {
    /// Base rate; default 0.01.
    pub lr: f64,
    /// Of all lengths; default epochs.
    pub unit: LengthUnit,
    /// Whole training; default 100.
    pub length: f64,
    /// Default constant.
    pub shape: Shape,
    /// Default none.
    pub warm_up: Option<Warmup>,
}

impl Default for ScheduleRecipe {
    fn default() -> Self {
        Self { lr: 0.01, unit: LengthUnit::Epochs, length: 100.0, shape: Shape::Constant {}, warm_up: None }
    }
}

impl ScheduleRecipe {
    /// Resolves all lengths into steps. Errors where a setting is out of range.
    pub fn schedule(&self, steps_per_epoch: f64) -> Result<Schedule> {
        let scale = match self.unit {
            LengthUnit::Epochs => steps_per_epoch,
            LengthUnit::Steps => 1.0,
        };
        let positive = |v: f64| v.is_finite() && v >= 0.0;
        let bad = |what: &str| Err(Error::InvalidArgument(format!("schedule: {what}")));
        if !(positive(self.lr) && positive(self.length * scale) && (self.length * scale).round() >= 1.0) {
            return bad("lr must be at least 0 and the length at least one step");
        }
        let mut shape = self.shape.clone();
        match &mut shape {
            Shape::Constant {} => {}
            Shape::Step { milestones, gamma } => {
                if !(milestones.iter().all(|m| positive(*m)) && milestones.is_sorted() && positive(*gamma)) {
                    return bad("milestones must ascend, gamma be at least 0");
                }
                milestones.iter_mut().for_each(|m| *m = (*m * scale).round());
            }
            Shape::Cosine { end } if !positive(*end) => return bad("cosine's end must be at least 0"),
            Shape::Cosine { .. } => {}
        }
        let warm_up = self.warm_up.unwrap_or(Warmup { length: 0.0, start: 0.0 });
        if !(positive(warm_up.length) && positive(warm_up.start) && warm_up.length <= self.length) {
            return bad("the warm-up must have a length up to the training's and a start of at least 0");
        }
        let [total, warm] = [self.length, warm_up.length].map(|v| (v * scale).round());
        Ok(Schedule { lr: self.lr, total, shape, warm, start: warm_up.start })
    }
}

/// A schedule with all lengths in steps.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    lr: f64,
    total: f64,
    shape: Shape,
    warm: f64,
    start: f64,
}

impl Schedule {
    /// Steps of the whole training.
    pub fn total_steps(&self) -> u64 {
        self.total as u64
    }

    /// Learning rate of step `step`, from 0. The warm-up rises from its start at step 0 to the base rate
    /// at its last step + 1; behind the training's end the last rate stays.
    pub fn lr(&self, step: u64) -> f32 {
        let t = step as f64;
        if t < self.warm {
            return (self.start + (self.lr - self.start) * t / self.warm) as f32;
        }
        let lr = match &self.shape {
            Shape::Constant {} => self.lr,
            Shape::Step { milestones, gamma } => {
                self.lr * gamma.powi(milestones.iter().filter(|m| t >= **m).count() as i32)
            }
            Shape::Cosine { end } => {
                let done = ((t - self.warm) / (self.total - self.warm).max(1.0)).min(1.0);
                end + (self.lr - end) * 0.5 * (1.0 + (std::f64::consts::PI * done).cos())
            }
        };
        lr as f32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> ScheduleRecipe {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn refinefaces_schedule_has_its_corners() {
        let s = parse(
            r#"{"lr": 0.01, "length": 130, "warm-up": {"length": 5, "start": 3.125e-4},
                "shape": {"kind": "step", "milestones": [100, 120]}}"#,
        )
        .schedule(400.0)
        .unwrap();
        assert_eq!(s.total_steps(), 52_000);
        let rates = [0, 1000, 2000, 39_999, 40_000, 47_999, 48_000, 60_000].map(|t| s.lr(t));
        let expected = [3.125e-4, (3.125e-4 + 0.01) / 2.0, 0.01, 0.01, 1e-3, 1e-3, 1e-4, 1e-4];
        for (got, expected) in rates.iter().zip(expected) {
            assert!((f64::from(*got) / expected - 1.0).abs() < 1e-6, "{rates:?}");
        }
        assert!((1..2000).all(|t| s.lr(t) > s.lr(t - 1)), "the warm-up rises");
    }

    #[test]
    fn cosine_starts_at_the_base_rate_and_ends_at_its_end() {
        let s = parse(
            r#"{"lr": 0.2, "unit": "steps", "length": 110, "warm-up": {"length": 10},
                "shape": {"kind": "cosine", "end": 0.1}}"#,
        )
        .schedule(7.0)
        .unwrap();
        for (step, expected) in [(0, 0.0), (5, 0.1), (10, 0.2), (60, 0.15), (110, 0.1), (500, 0.1)] {
            assert!((s.lr(step) - expected).abs() < 1e-6, "step {step}: {}", s.lr(step));
        }
        assert_eq!(ScheduleRecipe::default().schedule(3.0).unwrap().lr(1000), 0.01);
    }

    #[test]
    fn what_is_out_of_range_or_unknown_is_refused() {
        for text in [
            r#"{"lr": -1.0}"#,
            r#"{"length": 0}"#,
            r#"{"shape": {"kind": "step", "milestones": [9, 3]}}"#,
            r#"{"shape": {"kind": "cosine", "end": -0.5}}"#,
            r#"{"warm-up": {"length": 200}}"#,
        ] {
            assert!(parse(text).schedule(10.0).is_err(), "{text}");
        }
        for text in
            [r#"{"rate": 1.0}"#, r#"{"shape": {"kind": "constant", "gamma": 2}}"#, r#"{"warm-up": {}}"#]
        {
            assert!(serde_json::from_str::<ScheduleRecipe>(text).is_err(), "{text}");
        }
    }
}
