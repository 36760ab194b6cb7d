//! HAMBox's regression-aware focal loss (Section 3.3, Eq. 1 and 2), an anchor at a time.

use super::classification::{focal_loss, Focal};
use crate::layers::Real;

/// A background anchor whose decoded box overlaps a face at least this much has no classification
/// loss (the indicator `F_i < 0.5` of Eq. 1; "high-quality anchors").
pub const IGNORED_OVERLAP: f32 = 0.5;

/// What an anchor is after the first matching step and online mining; made by
/// [`crate::train::matching::Mined::role`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum AnchorRole {
    /// No loss at all: the matching ignored it.
    Ignored,
    /// l* = 0 and not compensated.
    Background {
        /// F_i: best IoU of the decoded box with any face.
        overlap: f32,
    },
    /// l* = 1: matched with a face in the first step.
    Matched {
        /// Index of the face.
        face: usize,
    },
    /// Mined for a face (the set psi).
    Compensated {
        /// Index of the face.
        face: usize,
        /// F_i: IoU of the decoded box with that face.
        overlap: f32,
    },
}

impl AnchorRole {
    /// Target of the quality focal loss: the IoU of the anchor's decoded box with its face (`overlap()`, where it is not
    /// known yet), 0 of background, None where the anchor has no loss.
    pub fn quality(self, overlap: impl FnOnce() -> f32) -> Option<f32> {
        match self {
            AnchorRole::Matched { .. } => Some(overlap()),
            AnchorRole::Compensated { overlap, .. } => Some(overlap),
            AnchorRole::Background { overlap } if overlap < IGNORED_OVERLAP => Some(0.0),
            AnchorRole::Background { .. } | AnchorRole::Ignored => None,
        }
    }
}

/// Anchors of the batch that Eq. 1 and 2 divide by; sums over its pictures.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BatchCounts {
    /// N_norm: matched in the first step. (The paper does not define it; RetinaNet, whose loss this
    /// is, divides by its matched anchors.)
    pub matched: usize,
    /// N_com: compensated.
    pub compensated: usize,
}

impl BatchCounts {
    /// Counts one anchor.
    pub fn add(&mut self, role: AnchorRole) {
        match role {
            AnchorRole::Matched { .. } => self.matched += 1,
            AnchorRole::Compensated { .. } => self.compensated += 1,
            AnchorRole::Background { .. } | AnchorRole::Ignored => {}
        }
    }

    /// 1 / count, where a count of 0 divides as 1.
    fn share<T: Real>(count: usize) -> T {
        T::of(1.0 / count.max(1) as f64)
    }
}

/// One anchor's summand of HAMBox Eq. 1 and its derivative with respect to the logit x:
/// `F_i / N_com * FL(x, face)` of a compensated anchor, `1 / N_norm * FL` of a matched one and of
/// background with F_i < [`IGNORED_OVERLAP`], 0 of any other. F_i is a constant here: no gradient
/// flows through it into the boxes.
pub fn regression_aware_focal_loss<T: Real>(
    x: T,
    role: AnchorRole,
    counts: BatchCounts,
    focal: Focal,
) -> (T, T) {
    let (face, weight) = match role {
        AnchorRole::Compensated { overlap, .. } => {
            (true, T::of(overlap.into()) * BatchCounts::share::<T>(counts.compensated))
        }
        AnchorRole::Matched { .. } => (true, BatchCounts::share(counts.matched)),
        AnchorRole::Background { overlap } if overlap < IGNORED_OVERLAP => {
            (false, BatchCounts::share(counts.matched))
        }
        AnchorRole::Background { .. } | AnchorRole::Ignored => return (T::default(), T::default()),
    };
    let (loss, slope) = focal_loss(x, face, focal);
    (weight * loss, weight * slope)
}

/// The weight of an anchor's box loss in HAMBox Eq. 2: 1 / N_com of a compensated anchor, 1 / N_norm
/// of a matched one, else 0.
pub fn regression_aware_box_weight<T: Real>(role: AnchorRole, counts: BatchCounts) -> T {
    match role {
        AnchorRole::Compensated { .. } => BatchCounts::share(counts.compensated),
        AnchorRole::Matched { .. } => BatchCounts::share(counts.matched),
        AnchorRole::Background { .. } | AnchorRole::Ignored => T::default(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::difference::assert_gradient;
    use super::*;
    use crate::graph::init::Rng;

    #[test]
    fn equation_1_and_2_match_a_batch_worked_by_hand() {
        // Logit 0, alpha 0.5, gamma 0: every focal loss is ln(2) / 2.
        let focal = Focal { alpha: 0.5, gamma: 0.0 };
        let roles = [
            AnchorRole::Matched { face: 0 },
            AnchorRole::Matched { face: 1 },
            AnchorRole::Compensated { face: 1, overlap: 0.9 },
            AnchorRole::Background { overlap: 0.2 },
            AnchorRole::Background { overlap: 0.5 }, // high quality and not compensated: ignored
            AnchorRole::Ignored,
        ];
        let mut counts = BatchCounts::default();
        roles.iter().for_each(|r| counts.add(*r));
        assert_eq!(counts, BatchCounts { matched: 2, compensated: 1 });
        let unit = 0.5 * 2f64.ln();
        let got = roles.map(|r| regression_aware_focal_loss(0.0f64, r, counts, focal).0 / unit);
        for (got, expected) in got.iter().zip([0.5, 0.5, 0.9, 0.5, 0.0, 0.0]) {
            assert!((got - expected).abs() < 1e-7, "{got} {expected}");
        }
        let weights = roles.map(|r| regression_aware_box_weight::<f64>(r, counts));
        assert_eq!(weights, [0.5, 0.5, 1.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn the_gradient_is_a_finite_difference_and_extremes_are_finite() {
        let mut rng = Rng::new(5);
        for _ in 0..300 {
            let overlap = rng.uniform();
            let counts = BatchCounts { matched: rng.below(9), compensated: rng.below(4) };
            let roles = [
                AnchorRole::Matched { face: 0 },
                AnchorRole::Compensated { face: 0, overlap },
                AnchorRole::Background { overlap },
            ];
            for role in roles {
                let x = f64::from(rng.range(-9.0, 9.0));
                let of = |x: f64| regression_aware_focal_loss(x, role, counts, Focal::default());
                assert_gradient(&[x], &[of(x).1], 1e-6, |x| of(x[0]).0);
                for x in [-1e30f32, -100.0, 100.0, 1e30] {
                    let (loss, slope) = regression_aware_focal_loss(x, role, counts, Focal::default());
                    assert!(loss.is_finite() && slope.is_finite());
                }
            }
        }
    }
}
