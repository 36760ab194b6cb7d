//! The choice of losses in a training recipe.

use super::boxes::NoOverlap;
use super::classification::Focal;
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};

/// Classification loss. In TOML: `classification = { kind = "focal", alpha = 0.25, gamma = 2.0 }`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum ClassLoss {
    /// Cross-entropy of two logits, background and face (Group Sampling Eq. 2).
    Softmax {},
    /// Logistic loss of one logit (HR).
    Sigmoid {},
    /// Focal loss of one logit (RefineFace).
    Focal {
        /// Weight of faces; default 0.25.
        #[serde(default = "alpha")]
        alpha: f32,
        /// Exponent; default 2.
        #[serde(default = "gamma")]
        gamma: f32,
    },
    /// HAMBox Eq. 1; needs online anchor mining.
    RegressionAwareFocal {
        /// Weight of faces; default 0.25.
        #[serde(default = "alpha")]
        alpha: f32,
        /// Exponent; default 2.
        #[serde(default = "gamma")]
        gamma: f32,
    },
}

fn alpha() -> f32 {
    Focal::default().alpha
}

fn gamma() -> f32 {
    Focal::default().gamma
}

impl ClassLoss {
    /// Settings of the focal loss, where this is one.
    pub fn focal(&self) -> Option<Focal> {
        match *self {
            ClassLoss::Softmax {} | ClassLoss::Sigmoid {} => None,
            ClassLoss::Focal { alpha, gamma } | ClassLoss::RegressionAwareFocal { alpha, gamma } => {
                Some(Focal { alpha, gamma })
            }
        }
    }

    /// Logits an anchor has under this loss.
    pub fn logits(&self) -> usize {
        if matches!(self, ClassLoss::Softmax {}) {
            2
        } else {
            1
        }
    }
}

/// Box regression loss.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum BoxLoss {
    /// Smooth L1 summed over the four offsets (RefineFace, HAMBox, HR).
    SmoothL1 {
        /// Where the parabola meets the line; default 1.
        #[serde(default = "beta")]
        beta: f32,
    },
    /// -ln IoU (UnitBox).
    NegLnIou {
        /// Default `zero`.
        #[serde(default, rename = "no-overlap")]
        no_overlap: NoOverlap,
    },
    /// (1 - IoU)^2 (Group Sampling Eq. 5).
    LeastSquareIou {
        /// Default `zero`.
        #[serde(default, rename = "no-overlap")]
        no_overlap: NoOverlap,
    },
}

fn beta() -> f32 {
    1.0
}

/// Losses of a detector.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct LossRecipe {
    /// Default softmax.
    pub classification: ClassLoss,
    /// Default least-square IoU.
    #[serde(rename = "box")]
    pub boxes: BoxLoss,
    /// eta, the weight of the box loss beside the classification loss; default 1.
    pub box_weight: f32,
    /// alpha of the scale-aware margin (RefineFace Eq. 4), pixels; default 0, which is none. The paper
    /// takes 15. Softmax takes it off the difference of the logits, that is off the face's.
    pub margin: f32,
}

impl Default for LossRecipe {
    /// Group Sampling, Section 4.2 and 5.
    fn default() -> Self {
        Self {
            classification: ClassLoss::Softmax {},
            boxes: BoxLoss::LeastSquareIou { no_overlap: NoOverlap::Zero },
            box_weight: 1.0,
            margin: 0.0,
        }
    }
}

impl LossRecipe {
    /// Errors where a setting is outside its range.
    pub fn check(&self) -> Result<()> {
        let bad = |what: &str| Err(Error::InvalidArgument(format!("loss: {what}")));
        if let Some(Focal { alpha, gamma }) = self.classification.focal() {
            if !((0.0..=1.0).contains(&alpha) && gamma.is_finite() && gamma >= 0.0) {
                return bad("alpha must lie in 0 to 1 and gamma be at least 0");
            }
        }
        if let BoxLoss::SmoothL1 { beta } = self.boxes {
            if !(beta.is_finite() && beta >= 0.0) {
                return bad("beta must be at least 0");
            }
        }
        if [self.box_weight, self.margin].iter().any(|v| !(v.is_finite() && *v >= 0.0)) {
            return bad("box-weight and margin must be at least 0");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> std::result::Result<LossRecipe, serde_json::Error> {
        serde_json::from_str(json)
    }

    #[test]
    fn a_recipe_reads_with_defaults_and_refuses_what_it_does_not_know() {
        assert_eq!(parse("{}").unwrap(), LossRecipe::default());
        let recipe = parse(
            r#"{"classification": {"kind": "regression-aware-focal", "gamma": 1.5},
                "box": {"kind": "neg-ln-iou", "no-overlap": "smooth-l1"}, "box-weight": 2.0, "margin": 15.0}"#,
        )
        .unwrap();
        assert_eq!(recipe.classification.focal(), Some(Focal { alpha: 0.25, gamma: 1.5 }));
        assert_eq!(recipe.boxes, BoxLoss::NegLnIou { no_overlap: NoOverlap::SmoothL1 });
        assert_eq!((recipe.box_weight, recipe.margin), (2.0, 15.0));
        assert!(parse(r#"{"boxweight": 1.0}"#).is_err());
        assert!(parse(r#"{"classification": {"kind": "softmax", "alpha": 1.0}}"#).is_err());
        assert!(parse(r#"{"classification": {"kind": "focal", "gama": 1.0}}"#).is_err());
        assert!(parse(r#"{"box": {"kind": "giou"}}"#).is_err());
        let text = serde_json::to_string(&recipe).unwrap();
        assert_eq!(parse(&text).unwrap(), recipe);
    }

    #[test]
    fn settings_outside_their_range_are_refused() {
        let mut recipe = LossRecipe::default();
        recipe.check().unwrap();
        recipe.classification = ClassLoss::Focal { alpha: 1.5, gamma: 2.0 };
        assert!(recipe.check().is_err());
        recipe = LossRecipe { box_weight: f32::NAN, ..Default::default() };
        assert!(recipe.check().is_err());
        recipe = LossRecipe { boxes: BoxLoss::SmoothL1 { beta: -1.0 }, ..Default::default() };
        assert!(recipe.check().is_err());
    }
}
