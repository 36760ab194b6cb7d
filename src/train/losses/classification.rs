//! Classification losses on logits, stable for logits of any size.

use crate::layers::Real;
use serde::{Deserialize, Serialize};

/// What sigmoid losses need of a logit x, from one exponential.
struct Logistic<T> {
    /// sigmoid(x).
    p: T,
    /// sigmoid(-x) = 1 - p, without the loss of digits where p is near 1.
    q: T,
    /// -ln p = ln(1 + e^-x).
    minus_ln_p: T,
    /// -ln q = ln(1 + e^x).
    minus_ln_q: T,
}

#[inline]
fn logistic<T: Real>(x: T) -> Logistic<T> {
    let (zero, one) = (T::default(), T::of(1.0));
    // e^-|x| never overflows: the larger of p and q is 1 / (1 + e), the smaller e / (1 + e).
    let positive = x >= zero;
    let e = if positive { (-x).exp() } else { x.exp() };
    let (large, small) = (one / (one + e), e / (one + e));
    let l = e.ln_1p();
    if positive {
        Logistic { p: large, q: small, minus_ln_p: l, minus_ln_q: x + l }
    } else {
        Logistic { p: small, q: large, minus_ln_p: l - x, minus_ln_q: l }
    }
}

/// 1 / (1 + e^-x).
#[inline]
pub fn sigmoid<T: Real>(x: T) -> T {
    logistic(x).p
}

/// Softmax cross-entropy of `logits` against class `target`: `-ln softmax(logits)[target]`.
///
/// `gradient` (as long as `logits`) is overwritten with `softmax - one_hot(target)`. Panics where
/// the lengths differ or the class does not exist.
pub fn softmax_cross_entropy<T: Real>(logits: &[T], target: usize, gradient: &mut [T]) -> T {
    assert_eq!(logits.len(), gradient.len(), "one gradient a logit");
    assert!(target < logits.len(), "class {target} of {}", logits.len());
    let max = logits.iter().fold(logits[0], |m, &v| if v > m { v } else { m });
    let mut sum = T::default();
    for (g, &x) in gradient.iter_mut().zip(logits) {
        *g = (x - max).exp();
        sum += *g;
    }
    for g in gradient.iter_mut() {
        *g = *g / sum;
    }
    gradient[target] -= T::of(1.0);
    sum.ln() - (logits[target] - max)
}

/// [`softmax_cross_entropy`] of two classes (background, face): the loss of Group Sampling Eq. 2.
///
/// It is sigmoid cross-entropy of the difference of the two logits.
#[inline]
pub fn softmax_cross_entropy2<T: Real>(logits: [T; 2], face: bool) -> (T, [T; 2]) {
    let (loss, slope) = sigmoid_cross_entropy(logits[1] - logits[0], face);
    (loss, [-slope, slope])
}

/// Logistic loss `-ln sigmoid(x)` of a face, `-ln(1 - sigmoid(x))` of background, and its
/// derivative with respect to the logit x.
#[inline]
pub fn sigmoid_cross_entropy<T: Real>(x: T, face: bool) -> (T, T) {
    let s = logistic(x);
    if face {
        (s.minus_ln_p, -s.q)
    } else {
        (s.minus_ln_q, s.p)
    }
}

/// Settings of the focal loss.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct Focal {
    /// Weight of faces; background weighs 1 - alpha.
    pub alpha: f32,
    /// Exponent of (1 - p_t), at least 0; 0 gives weighted cross-entropy.
    pub gamma: f32,
}

impl Default for Focal {
    /// 0.25 and 2 (Lin et al. 2017, Section 4; RefineFace and HAMBox keep them).
    fn default() -> Self {
        Self { alpha: 0.25, gamma: 2.0 }
    }
}

impl Focal {
    /// The factor before the cross-entropy `loss` = -ln p_t: `alpha_t (1 - p_t)^gamma`. Its sum over
    /// the anchors is what the focal miner of Group Sampling normalises by.
    pub fn factor(&self, loss: f32, face: bool) -> f32 {
        let alpha = if face { self.alpha } else { 1.0 - self.alpha };
        alpha * (-(-loss).exp_m1()).max(0.0).powf(self.gamma)
    }
}

/// Focal loss `-alpha_t (1 - p_t)^gamma ln p_t` (Lin et al. 2017, Eq. 5) on one sigmoid logit, and
/// its derivative with respect to it. p_t is the probability of the anchor's own class.
#[inline]
pub fn focal_loss<T: Real>(x: T, face: bool, focal: Focal) -> (T, T) {
    let (alpha, gamma) = (T::of(focal.alpha.into()), T::of(focal.gamma.into()));
    // z is the logit of the anchor's own class, so p_t = sigmoid(z).
    let (z, alpha_t) = if face { (x, alpha) } else { (-x, T::of(1.0) - alpha) };
    let s = logistic(z);
    // (1 - p_t)^gamma = e^(gamma ln q): one exponential, and 1 where gamma is 0.
    let factor = alpha_t * (-(gamma * s.minus_ln_q)).exp();
    // d/dz of q^gamma * -ln p, with dq/dz = -p q and d(-ln p)/dz = -q.
    let slope = -(factor * (gamma * s.p * s.minus_ln_p + s.q));
    (factor * s.minus_ln_p, if face { slope } else { -slope })
}

/// Quality focal loss `|y - p|^beta * -((1 - y) ln(1 - p) + y ln p)` (Li et al., Generalized Focal Loss, NeurIPS 2020, Eq. 2)
/// on one sigmoid logit, and its derivative with respect to it. The target `quality` y is 0 on background and the IoU of
/// the anchor's decoded box with its face on a face, so that the score says how well the box fits. y is a constant here:
/// no gradient flows through it into the boxes.
#[inline]
pub fn quality_focal_loss<T: Real>(x: T, quality: T, beta: T) -> (T, T) {
    let (zero, one) = (T::default(), T::of(1.0));
    let s = logistic(x);
    let entropy = (one - quality) * s.minus_ln_q + quality * s.minus_ln_p;
    // p - y without the loss of digits where both are near 1.
    let off = (one - quality) * s.p - quality * s.q;
    let size = if off < zero { -off } else { off };
    if size <= zero {
        return (zero, zero);
    }
    let factor = (beta * size.ln()).exp();
    // d|p - y|^beta / dx = beta |p - y|^beta / (p - y) * p q; d entropy / dx = p - y.
    (factor * entropy, factor * (beta * s.p * s.q * entropy / off + off))
}

/// A face is taken as at least this wide and high (pixels, geometric mean) by [`ScaleAwareMargin`],
/// so that the margin stays finite. Ours: the paper's faces are never smaller.
pub const MIN_FACE_SIDE: f64 = 1.0;

/// Scale-aware margin loss of RefineFace, Section 3.3: `y = sigmoid(x - m)` (Eq. 3) with
/// `m = alpha / sqrt(w h)` (Eq. 4), in training only.
///
/// w and h are of the *face* that the anchor is matched with, in pixels of the network's input.
/// The margin is taken off the logit of positives alone: a face must reach a logit higher by m for
/// the same loss, and the smaller it is the higher. Background keeps its logit (it has no face;
/// taking m off would make it easier). At inference nothing is taken off, so small faces score
/// higher than without the margin.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ScaleAwareMargin {
    /// Scale of the margin, pixels; 0 switches it off.
    pub alpha: f32,
}

impl Default for ScaleAwareMargin {
    /// alpha 15 (RefineFace Table 6).
    fn default() -> Self {
        Self { alpha: 15.0 }
    }
}

impl ScaleAwareMargin {
    /// m of a face w x h pixels (Eq. 4).
    #[inline]
    pub fn margin<T: Real>(&self, w: T, h: T) -> T {
        let (side, least) = ((w * h).sqrt(), T::of(MIN_FACE_SIDE));
        T::of(self.alpha.into()) / if side > least { side } else { least }
    }

    /// The logit that enters the loss: x - m where the anchor is matched with a face w x h, else x
    /// (the argument of Eq. 3). Its derivative with respect to x is 1, so a loss's gradient at this
    /// logit is the gradient with respect to x.
    #[inline]
    pub fn logit<T: Real>(&self, x: T, matched: Option<[T; 2]>) -> T {
        match matched {
            Some([w, h]) => x - self.margin(w, h),
            None => x,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::difference::assert_gradient;
    use super::*;
    use crate::graph::init::Rng;

    fn draw(rng: &mut Rng) -> f64 {
        f64::from(rng.range(-12.0, 12.0))
    }

    #[test]
    fn cross_entropies_match_values_worked_by_hand() {
        // Logits ln 1, ln 3: probabilities 1/4, 3/4.
        let (loss, gradient) = softmax_cross_entropy2([0.0, 3f64.ln()], true);
        assert!((loss - (4.0f64 / 3.0).ln()).abs() < 1e-12);
        assert!((gradient[0] - 0.25).abs() < 1e-12 && (gradient[1] + 0.25).abs() < 1e-12);
        let mut gradient = [0.0; 3];
        let loss = softmax_cross_entropy(&[0.0, 2f64.ln(), 5f64.ln()], 1, &mut gradient);
        assert!((loss - 4f64.ln()).abs() < 1e-12);
        for (got, expected) in gradient.iter().zip([0.125, 0.25 - 1.0, 0.625]) {
            assert!((got - expected).abs() < 1e-12, "{gradient:?}");
        }
        let (loss, slope) = sigmoid_cross_entropy(3f64.ln(), false);
        assert!((loss - 4f64.ln()).abs() < 1e-12 && (slope - 0.75).abs() < 1e-12);
    }

    #[test]
    fn focal_loss_matches_values_worked_by_hand() {
        // p = 3/4 of a face: 0.25 * (1/4)^2 * ln(4/3).
        let (loss, _) = focal_loss(3f64.ln(), true, Focal::default());
        assert!((loss - 0.25 / 16.0 * (4.0f64 / 3.0).ln()).abs() < 1e-12);
        // p = 3/4 of background: p_t = 1/4, so 0.75 * (3/4)^2 * ln 4.
        let (loss, _) = focal_loss(3f64.ln(), false, Focal::default());
        assert!((loss - 0.75 * 0.5625 * 4f64.ln()).abs() < 1e-12);
        // gamma 0 is cross-entropy times alpha_t.
        let (loss, slope) = focal_loss(0.7, true, Focal { alpha: 0.25, gamma: 0.0 });
        let (plain, plain_slope) = sigmoid_cross_entropy(0.7f64, true);
        assert!((loss - 0.25 * plain).abs() < 1e-12 && (slope - 0.25 * plain_slope).abs() < 1e-12);
        // The factor alone, from the cross-entropy.
        let factor = Focal::default().factor(4f32.ln(), false);
        assert!((factor - 0.75 * 0.5625).abs() < 1e-6, "{factor}");
    }

    #[test]
    fn quality_focal_loss_matches_values_worked_by_hand() {
        // p = 3/4, y = 1/2: (1/4)^2 * (ln 4 + ln(4/3)) / 2.
        let (loss, _) = quality_focal_loss(3f64.ln(), 0.5, 2.0);
        assert!((loss - (4f64.ln() + (4.0f64 / 3.0).ln()) / 32.0).abs() < 1e-12);
        // At p = y there is nothing to learn, whatever the entropy.
        let (loss, slope) = quality_focal_loss(3f64.ln(), 0.75, 2.0);
        assert!(loss < 1e-12 && slope.abs() < 1e-12);
        // With y of 0 or 1 it is the focal loss without alpha.
        for (x, face) in [(1.3, true), (-0.4, true), (1.3, false), (-0.4, false)] {
            let (loss, slope) = quality_focal_loss(x, f64::from(u8::from(face)), 2.0);
            let (focal, focal_slope) = focal_loss(x, face, Focal { alpha: 0.5, gamma: 2.0 });
            assert!((loss - 2.0 * focal).abs() < 1e-12 && (slope - 2.0 * focal_slope).abs() < 1e-12);
        }
    }

    #[test]
    fn gradients_are_finite_differences() {
        let mut rng = Rng::new(11);
        for _ in 0..400 {
            let (x, quality, beta) =
                (draw(&mut rng), f64::from(rng.uniform()), f64::from(rng.range(1.0, 3.0)));
            let slope = quality_focal_loss(x, quality, beta).1;
            assert_gradient(&[x], &[slope], 1e-6, |x| quality_focal_loss(x[0], quality, beta).0);
            let k = 2 + rng.below(5);
            let logits: Vec<f64> = (0..k).map(|_| draw(&mut rng)).collect();
            let target = rng.below(k);
            let mut gradient = vec![0.0; k];
            softmax_cross_entropy(&logits, target, &mut gradient);
            assert_gradient(&logits, &gradient, 1e-6, |x| {
                softmax_cross_entropy(x, target, &mut vec![0.0; x.len()])
            });
            let (x, face) = (draw(&mut rng), rng.below(2) == 1);
            let pair = [x, draw(&mut rng)];
            let gradient = softmax_cross_entropy2(pair, face).1;
            assert_gradient(&pair, &gradient, 1e-6, |x| softmax_cross_entropy2([x[0], x[1]], face).0);
            let slope = sigmoid_cross_entropy(x, face).1;
            assert_gradient(&[x], &[slope], 1e-6, |x| sigmoid_cross_entropy(x[0], face).0);
            let focal = Focal { alpha: rng.uniform(), gamma: rng.range(0.0, 5.0) };
            assert_gradient(&[x], &[focal_loss(x, face, focal).1], 1e-6, |x| focal_loss(x[0], face, focal).0);
        }
    }

    #[test]
    fn two_class_forms_agree() {
        let mut rng = Rng::new(12);
        for _ in 0..200 {
            let (x, face) = ([draw(&mut rng), draw(&mut rng)], rng.below(2) == 1);
            let (loss, gradient) = softmax_cross_entropy2(x, face);
            let mut general = [0.0; 2];
            let expected = softmax_cross_entropy(&x, usize::from(face), &mut general);
            assert!((loss - expected).abs() < 1e-9, "{x:?}: {loss} {expected}");
            assert!((0..2).all(|i| (gradient[i] - general[i]).abs() < 1e-9), "{x:?}");
        }
    }

    #[test]
    fn extreme_logits_stay_finite_in_f32() {
        for x in [0.0f32, 80.0, 100.0, 1e4, 1e30] {
            for x in [x, -x] {
                for face in [false, true] {
                    for (loss, slope) in [
                        sigmoid_cross_entropy(x, face),
                        focal_loss(x, face, Focal::default()),
                        focal_loss(x, face, Focal { alpha: 0.5, gamma: 0.5 }),
                    ] {
                        assert!(
                            loss.is_finite() && loss >= 0.0 && slope.is_finite(),
                            "{x} {face} {loss} {slope}"
                        );
                        assert_eq!(
                            slope > 0.0,
                            slope != 0.0 && !face,
                            "background is pushed down, a face up"
                        );
                    }
                    let (loss, gradient) = softmax_cross_entropy2([-x / 2.0, x / 2.0], face);
                    assert!(loss.is_finite() && gradient.iter().all(|g| g.is_finite()));
                }
            }
            let mut gradient = [0.0; 3];
            let loss = softmax_cross_entropy(&[x, -x, 0.0], 1, &mut gradient);
            assert!(loss.is_finite() && gradient.iter().all(|g| g.is_finite()), "{x}");
        }
        // Wholly wrong at |x| = 100, the loss is the logit itself and the slope 1.
        assert_eq!(sigmoid_cross_entropy(100.0f32, false), (100.0, 1.0));
        assert_eq!(sigmoid_cross_entropy(-100.0f32, true), (100.0, -1.0));
    }

    #[test]
    fn a_small_face_needs_a_larger_logit_for_the_same_loss() {
        let margin = ScaleAwareMargin::default();
        // Eq. 4: sqrt(20 * 5) = 10, 15 / 10.
        assert_eq!(margin.margin(20.0f64, 5.0), 1.5);
        let focal = Focal::default();
        let loss = |x: f64, side: f64| focal_loss(margin.logit(x, Some([side, side])), true, focal).0;
        assert!(loss(2.0, 8.0) > loss(2.0, 16.0) && loss(2.0, 16.0) > loss(2.0, 300.0));
        // By exactly m: an 8 px face at logit 2 + 15/8 loses what one without margin loses at 2.
        assert!((loss(2.0 + 15.0 / 8.0, 8.0) - focal_loss(2.0, true, focal).0).abs() < 1e-12);
        assert_eq!(margin.logit(2.0, None), 2.0, "background keeps its logit");
        assert_eq!(margin.margin(0.0f32, 3.0), 15.0, "an empty box's margin is finite");
        let slope = focal_loss(margin.logit(0.3, Some([9.0, 7.0])), true, focal).1;
        assert_gradient(&[0.3], &[slope], 1e-6, |x| {
            focal_loss(margin.logit(x[0], Some([9.0, 7.0])), true, focal).0
        });
    }
}
