//! Losses of one anchor and their gradients, generic over f32 and f64 ([`crate::layers::Real`]).
//!
//! Every function returns the loss and its derivative with respect to what the network puts out
//! (logits, box offsets); the caller multiplies both by the anchor's weight and sums. Where the
//! papers' equations are:
//!
//! | Equation | Here |
//! |---|---|
//! | Lin et al. 2017, Eq. 5 (focal loss) | [`focal_loss`] |
//! | Li et al. 2020, Eq. 2 (quality focal loss) | [`quality_focal_loss`] |
//! | RefineFace Eq. 1, 2 (losses of the two steps) | [`focal_loss`] and [`smooth_l1`], each summed and divided by the step's positives |
//! | RefineFace Eq. 3, 4 (scale-aware margin) | [`ScaleAwareMargin`] |
//! | HAMBox Eq. 1 (classification) | [`regression_aware_focal_loss`] |
//! | HAMBox Eq. 2 (location) | [`regression_aware_box_weight`] |
//! | Group Sampling Eq. 1 (labels) | [`super::matching::match_anchors`] |
//! | Group Sampling Eq. 2 (sum over groups) | [`super::sampler::GroupSample`] |
//! | Group Sampling Eq. 3 (weighted random sampling) | [`super::sampler::Miner::Wrs`] |
//! | Group Sampling Eq. 4 (reference scale) | [`super::matching::reference_scale`] |
//! | Group Sampling Eq. 5, 6 (least-square IoU) | [`least_square_iou`] |
//! | Group Sampling Eq. 7 (negative logarithm of IoU, UnitBox) | [`negative_ln_iou`] |
//! | Group Sampling Eq. 8 to 12 (derivative of IoU) | [`iou_gradient`] |
//! | Group Sampling Eq. 13 (box code) | [`encode_box`], [`decode_box`] |

mod boxes;
mod classification;
mod recipe;
mod regression_aware;

pub use boxes::{
    decode_box, encode_box, iou_gradient, least_square_iou, negative_ln_iou, smooth_l1, BoxLossValue,
    NoOverlap, IOU_FLOOR, MAX_LOG_SCALE, MAX_SHIFT,
};
pub use classification::{
    focal_loss, quality_focal_loss, sigmoid, sigmoid_cross_entropy, softmax_cross_entropy,
    softmax_cross_entropy2, Focal, ScaleAwareMargin, MIN_FACE_SIDE,
};
pub use recipe::{BoxLoss, ClassLoss, LossRecipe};
pub use regression_aware::{
    regression_aware_box_weight, regression_aware_focal_loss, AnchorRole, BatchCounts, IGNORED_OVERLAP,
};

/// Central finite differences in f64 for the gradient tests.
#[cfg(test)]
mod difference {
    /// Asserts that `gradient` is the derivative of `f` at `x`, to `tolerance` relative to its size.
    pub fn assert_gradient(x: &[f64], gradient: &[f64], tolerance: f64, f: impl Fn(&[f64]) -> f64) {
        let h = 1e-6;
        for i in 0..x.len() {
            let at = |d: f64| {
                let mut moved = x.to_vec();
                moved[i] += d;
                f(&moved)
            };
            let expected = (at(h) - at(-h)) / (2.0 * h);
            let error = (gradient[i] - expected).abs();
            assert!(
                error <= tolerance * expected.abs().max(1.0),
                "value {i} of {x:?}: gradient {}, finite difference {expected}",
                gradient[i]
            );
        }
    }
}
