//! The choice of losses in a training recipe.

use super::boxes::{
    decode_box, encode_box, iou_gradient, least_square_iou, negative_ln_iou, smooth_l1, BoxLossValue,
    NoOverlap,
};
use super::classification::{
    focal_loss, sigmoid_cross_entropy, softmax_cross_entropy2, Focal, ScaleAwareMargin,
};
use crate::error::{Error, Result};
use crate::layers::Real;
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
    /// Quality focal loss of one logit (Li et al. 2020, Eq. 2) over all anchors, divided by the batch's positives: a face's
    /// target is the IoU of its decoded box, so that of two boxes of a face the better one has the higher score.
    QualityFocal {
        /// Exponent, at least 1; default 2.
        #[serde(default = "gamma")]
        beta: f32,
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
            ClassLoss::Softmax {} | ClassLoss::Sigmoid {} | ClassLoss::QualityFocal { .. } => None,
            ClassLoss::Focal { alpha, gamma } | ClassLoss::RegressionAwareFocal { alpha, gamma } => {
                Some(Focal { alpha, gamma })
            }
        }
    }

    /// Whether it is a loss over all anchors, so that nothing is sampled.
    pub fn takes_all(&self) -> bool {
        matches!(self, ClassLoss::RegressionAwareFocal { .. } | ClassLoss::QualityFocal { .. })
    }

    /// The loss of one anchor's `logits` ([`ClassLoss::logits`] many; two are background, face);
    /// `gradient`, as long, is overwritten. `matched`: width and height of its face in pixels, None for
    /// background. `margin` is taken off a face's logit. Panics where the lengths differ, and for the losses that
    /// [take all anchors](ClassLoss::takes_all), which need more of an anchor than this: see
    /// [`super::regression_aware_focal_loss`] and [`super::quality_focal_loss`].
    pub fn value<T: Real>(
        &self,
        logits: &[T],
        matched: Option<[T; 2]>,
        margin: ScaleAwareMargin,
        gradient: &mut [T],
    ) -> T {
        assert!(logits.len() == self.logits() && gradient.len() == logits.len(), "{} logits", logits.len());
        let face = matched.is_some();
        let logit = margin.logit(logits[logits.len() - 1], matched);
        let (loss, slope) = match self {
            ClassLoss::Softmax {} => {
                let (loss, slopes) = softmax_cross_entropy2([logits[0], logit], face);
                gradient.copy_from_slice(&slopes);
                return loss;
            }
            ClassLoss::Sigmoid {} => sigmoid_cross_entropy(logit, face),
            ClassLoss::Focal { alpha, gamma } => {
                focal_loss(logit, face, Focal { alpha: *alpha, gamma: *gamma })
            }
            ClassLoss::QualityFocal { .. } | ClassLoss::RegressionAwareFocal { .. } => {
                panic!("a loss over all anchors is not one of a single anchor")
            }
        };
        gradient[0] = slope;
        loss
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

impl BoxLoss {
    /// The loss of one positive anchor: offsets `t`, `anchor` cx cy w h, `target` x1 y1 x2 y2.
    pub fn value<T: Real>(
        &self,
        t: [T; 4],
        anchor: [T; 4],
        variances: [T; 2],
        target: [T; 4],
    ) -> BoxLossValue<T> {
        match *self {
            BoxLoss::SmoothL1 { beta } => {
                let goal = encode_box(target, anchor, variances);
                let (mut loss, mut gradient) = (T::default(), [T::default(); 4]);
                for k in 0..4 {
                    let (l, slope) = smooth_l1(t[k] - goal[k], T::of(beta.into()));
                    loss += l;
                    gradient[k] = slope;
                }
                let (iou, _) = iou_gradient(decode_box(t, anchor, variances), target);
                BoxLossValue { loss, gradient, iou }
            }
            BoxLoss::NegLnIou { no_overlap } => negative_ln_iou(t, anchor, variances, target, no_overlap),
            BoxLoss::LeastSquareIou { no_overlap } => {
                least_square_iou(t, anchor, variances, target, no_overlap)
            }
        }
    }
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
        if let ClassLoss::QualityFocal { beta } = self.classification {
            // Below 1 the slope has no bound where the score meets the quality.
            if !(beta.is_finite() && beta >= 1.0) {
                return bad("quality-focal's beta must be at least 1");
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
    fn every_choice_is_the_loss_it_names() {
        let margin = ScaleAwareMargin { alpha: 15.0 };
        let mut g = [0.0f64; 2];
        let loss = ClassLoss::Softmax {}.value(&[0.5, 1.0], Some([10.0, 10.0]), margin, &mut g);
        assert_eq!((loss, g), softmax_cross_entropy2([0.5, 1.0 - 1.5], true));
        let loss = ClassLoss::Sigmoid {}.value(&[0.5], None, margin, &mut g[..1]);
        assert_eq!((loss, g[0]), sigmoid_cross_entropy(0.5, false));
        let focal = ClassLoss::Focal { alpha: 0.3, gamma: 1.0 };
        let loss = focal.value(&[0.5], Some([30.0, 30.0]), margin, &mut g[..1]);
        assert_eq!((loss, g[0]), focal_loss(0.0, true, Focal { alpha: 0.3, gamma: 1.0 }));
        let (t, anchor, target) = ([0.5, 0.0, 0.0, 0.0], [8.0, 8.0, 16.0, 16.0], [0.0, 0.0, 16.0, 16.0]);
        let boxes = |l: BoxLoss| l.value(t, anchor, [1.0f64; 2], target);
        let l1 = boxes(BoxLoss::SmoothL1 { beta: 1.0 });
        assert_eq!((l1.loss, l1.gradient), (0.125, [0.5, 0.0, 0.0, 0.0]));
        assert!((l1.iou - 1.0 / 3.0).abs() < 1e-12);
        let square = boxes(BoxLoss::LeastSquareIou { no_overlap: NoOverlap::Zero });
        assert!((square.loss - 4.0 / 9.0).abs() < 1e-12);
        let ln = boxes(BoxLoss::NegLnIou { no_overlap: NoOverlap::Zero });
        assert!((ln.loss - 3f64.ln()).abs() < 1e-12);
    }

    #[test]
    fn settings_outside_their_range_are_refused() {
        let mut recipe = LossRecipe::default();
        recipe.check().unwrap();
        recipe.classification = ClassLoss::Focal { alpha: 1.5, gamma: 2.0 };
        assert!(recipe.check().is_err());
        recipe.classification = ClassLoss::QualityFocal { beta: 0.5 };
        assert!(recipe.check().is_err());
        recipe = LossRecipe { box_weight: f32::NAN, ..Default::default() };
        assert!(recipe.check().is_err());
        recipe = LossRecipe { boxes: BoxLoss::SmoothL1 { beta: -1.0 }, ..Default::default() };
        assert!(recipe.check().is_err());
    }
}
