//! Box regression: smooth L1 on offsets, losses on the IoU of the decoded box.

use crate::layers::Real;
use serde::{Deserialize, Serialize};

/// Decoded sizes are cut to e^±10 of the anchor's in training, so that no loss overflows. (A loss's
/// gradient there is that at the cut, so a size beyond it is still pulled back.)
pub const MAX_LOG_SCALE: f64 = 10.0;
/// Decoded centres are cut to this many anchor sizes from the anchor's, likewise.
pub const MAX_SHIFT: f64 = 1e4;
/// -ln IoU is constant, and its gradient 0, at and below this IoU.
pub const IOU_FLOOR: f64 = 1e-6;

/// What an IoU loss does where the two boxes do not overlap (touching edges do not).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NoOverlap {
    /// Gradient 0, as Group Sampling Eq. 10 to 12 have it with the intersection at 0. Harmless while
    /// matched anchors overlap their face, as they do at the start of training.
    #[default]
    Zero,
    /// Ours: smooth L1 (beta 1) of the offsets (variances taken out) is added to the loss, which
    /// draws a box that has strayed back to its face.
    SmoothL1,
}

/// A box loss of one anchor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BoxLossValue<T> {
    /// The loss.
    pub loss: T,
    /// Its derivative with respect to the offsets tx, ty, tw, th.
    pub gradient: [T; 4],
    /// IoU of the decoded box and the target.
    pub iou: T,
}

/// Smooth L1 of a difference: `d^2 / (2 beta)` within ±beta, `|d| - beta / 2` beyond (Girshick 2015;
/// HR's Huber loss); beta 0 is |d|. Returns the loss and its derivative.
#[inline]
pub fn smooth_l1<T: Real>(d: T, beta: T) -> (T, T) {
    let (zero, half) = (T::default(), T::of(0.5));
    let size = if d < zero { -d } else { d };
    if size < beta {
        (half * d * d / beta, d / beta)
    } else if d == zero {
        (zero, zero)
    } else {
        (size - half * beta, if d < zero { T::of(-1.0) } else { T::of(1.0) })
    }
}

fn clamp<T: Real>(v: T, limit: f64) -> T {
    let limit = T::of(limit);
    // Comparisons that NaN fails, so that it shows in the loss.
    if v > limit {
        limit
    } else if v < -limit {
        -limit
    } else {
        v
    }
}

/// Offsets `t` = tx, ty, tw, th that mean box `target` (x1 y1 x2 y2) on an anchor (cx cy w h): Group
/// Sampling Eq. 13 divided by SSD's variances (of centre, of size; 1 and 1 in the papers here).
/// A side of the target below 1e-3 px counts as that.
pub fn encode_box<T: Real>(target: [T; 4], anchor: [T; 4], variances: [T; 2]) -> [T; 4] {
    let half = T::of(0.5);
    std::array::from_fn(|k| {
        let axis = k % 2;
        let (low, high, size) = (target[axis], target[axis + 2], anchor[2 + axis]);
        if k < 2 {
            ((low + high) * half - anchor[axis]) / size / variances[0]
        } else {
            let (side, least) = (high - low, T::of(1e-3));
            ((if side < least { least } else { side }) / size).ln() / variances[1]
        }
    })
}

/// The box (x1 y1 x2 y2) that offsets mean on an anchor: the inverse of [`encode_box`], cut at
/// [`MAX_SHIFT`] and [`MAX_LOG_SCALE`].
pub fn decode_box<T: Real>(t: [T; 4], anchor: [T; 4], variances: [T; 2]) -> [T; 4] {
    let (center, size) = decode_center_size(t, anchor, variances);
    let half = T::of(0.5);
    std::array::from_fn(|k| {
        let (axis, side) = (k % 2, half * size[k % 2]);
        if k < 2 {
            center[axis] - side
        } else {
            center[axis] + side
        }
    })
}

fn decode_center_size<T: Real>(t: [T; 4], anchor: [T; 4], variances: [T; 2]) -> ([T; 2], [T; 2]) {
    let center = |axis: usize| anchor[axis] + clamp(t[axis] * variances[0], MAX_SHIFT) * anchor[2 + axis];
    let size = |axis: usize| anchor[2 + axis] * clamp(t[2 + axis] * variances[1], MAX_LOG_SCALE).exp();
    ([center(0), center(1)], [size(0), size(1)])
}

/// IoU of boxes p and g (x1 y1 x2 y2) and its derivative with respect to p's corners: Group Sampling
/// Eq. 8 to 12. Both are 0 where the boxes do not overlap.
///
/// Eq. 12 prints the height of g, `y2g - y1g`, in its second case. The derivative of Eq. 10 has the
/// height of the intersection, `y2* - y1*`, which is what stands here; the two are equal where g
/// lies within p vertically. Where an edge of p lies on that of g, p's counts as the inner one, as in Eq. 12.
pub fn iou_gradient<T: Real>(p: [T; 4], g: [T; 4]) -> (T, [T; 4]) {
    let zero = T::default();
    let max = |a: T, b: T| if a >= b { a } else { b };
    let min = |a: T, b: T| if a <= b { a } else { b };
    // Eq. 8, 9: the intersection's corners.
    let [x1, y1] = [max(p[0], g[0]), max(p[1], g[1])];
    let [x2, y2] = [min(p[2], g[2]), min(p[3], g[3])];
    let (w, h) = (x2 - x1, y2 - y1);
    if w <= zero || h <= zero {
        return (zero, [zero; 4]);
    }
    let (wp, hp) = (p[2] - p[0], p[3] - p[1]);
    let i = w * h; // Eq. 10
    let u = wp * hp + (g[2] - g[0]) * (g[3] - g[1]) - i; // Eq. 11
    let iou = i / u;
    // Eq. 12 for an edge whose outward move grows p's area by `side`, and the intersection by `cut`
    // where it is the inner of the two edges: dI = cut, dU = side - cut, d(I/U) = (dI U - I dU) / U^2.
    let outward = |side: T, cut: T, inner: bool| {
        let cut = if inner { cut } else { zero };
        (cut - iou * (side - cut)) / u
    };
    (
        iou,
        [
            -outward(hp, h, p[0] >= g[0]),
            -outward(wp, w, p[1] >= g[1]),
            outward(hp, h, p[2] <= g[2]),
            outward(wp, w, p[3] <= g[3]),
        ],
    )
}

/// A loss on the IoU of the decoded box, whose value and slope `of(iou)` gives; by the chain rule over
/// Eq. 12 and 13.
#[inline]
fn iou_loss<T: Real>(
    t: [T; 4],
    anchor: [T; 4],
    variances: [T; 2],
    target: [T; 4],
    no_overlap: NoOverlap,
    of: impl Fn(T) -> (T, T),
) -> BoxLossValue<T> {
    let (zero, half) = (T::default(), T::of(0.5));
    let p = decode_box(t, anchor, variances);
    let (iou, corner) = iou_gradient(p, target);
    let (mut loss, slope) = of(iou);
    if iou <= zero {
        let mut gradient = [zero; 4];
        if no_overlap == NoOverlap::SmoothL1 {
            let goal = encode_box(target, anchor, variances);
            for k in 0..4 {
                let variance = variances[k / 2];
                let (l, s) = smooth_l1((t[k] - goal[k]) * variance, T::of(1.0));
                loss += l;
                gradient[k] = s * variance;
            }
        }
        return BoxLossValue { loss, gradient, iou };
    }
    let (_, size) = decode_center_size(t, anchor, variances);
    // x1, x2 = center -+ size / 2; d center / dt = variance * anchor size, d size / dt = variance * size.
    let gradient = std::array::from_fn(|k| {
        let axis = k % 2;
        let (low, high) = (corner[axis], corner[axis + 2]);
        if k < 2 {
            slope * (low + high) * variances[0] * anchor[2 + axis]
        } else {
            slope * half * (high - low) * variances[1] * size[axis]
        }
    });
    BoxLossValue { loss, gradient, iou }
}

/// Least-square IoU loss `(1 - IoU)^2` (Group Sampling Eq. 5, gradient Eq. 6 and 12 through the box
/// code of Eq. 13). `t` offsets, `anchor` cx cy w h, `target` x1 y1 x2 y2. The gradient is 0 where
/// the boxes agree, and, unless `no_overlap` says otherwise, where they do not overlap.
pub fn least_square_iou<T: Real>(
    t: [T; 4],
    anchor: [T; 4],
    variances: [T; 2],
    target: [T; 4],
    no_overlap: NoOverlap,
) -> BoxLossValue<T> {
    let one = T::of(1.0);
    iou_loss(t, anchor, variances, target, no_overlap, |iou| {
        ((one - iou) * (one - iou), T::of(-2.0) * (one - iou))
    })
}

/// UnitBox's loss `-ln IoU` (Yu et al. 2016; gradient: Group Sampling Eq. 7), arguments as in
/// [`least_square_iou`]. At an IoU up to [`IOU_FLOOR`] the loss is `-ln IOU_FLOOR` and the gradient 0.
pub fn negative_ln_iou<T: Real>(
    t: [T; 4],
    anchor: [T; 4],
    variances: [T; 2],
    target: [T; 4],
    no_overlap: NoOverlap,
) -> BoxLossValue<T> {
    let floor = T::of(IOU_FLOOR);
    iou_loss(t, anchor, variances, target, no_overlap, |iou| {
        if iou <= floor {
            (-floor.ln(), T::default())
        } else {
            (-iou.ln(), T::of(-1.0) / iou)
        }
    })
}

#[cfg(test)]
mod tests {
    use super::super::difference::assert_gradient;
    use super::*;
    use crate::detect::anchors::Anchor;
    use crate::graph::init::Rng;

    type IouLoss = fn([f64; 4], [f64; 4], [f64; 2], [f64; 4], NoOverlap) -> BoxLossValue<f64>;
    const LOSSES: [IouLoss; 2] = [least_square_iou, negative_ln_iou];

    #[test]
    fn smooth_l1_is_a_parabola_then_a_line() {
        assert_eq!(smooth_l1(0.5, 1.0), (0.125, 0.5));
        assert_eq!(smooth_l1(-3.0, 1.0), (2.5, -1.0));
        assert_eq!(smooth_l1(0.25, 0.5), (0.0625, 0.5));
        assert_eq!(smooth_l1(-2.0, 0.0), (2.0, -1.0));
        assert_eq!(smooth_l1(0.0, 0.0), (0.0, 0.0));
        assert_eq!(smooth_l1(1e30f32, 1.0), (1e30, 1.0));
        let mut rng = Rng::new(1);
        for _ in 0..300 {
            let (d, beta) = (f64::from(rng.range(-3.0, 3.0)), f64::from(rng.range(0.1, 2.0)));
            assert_gradient(&[d], &[smooth_l1(d, beta).1], 1e-5, |d| smooth_l1(d[0], beta).0);
        }
    }

    #[test]
    fn iou_and_its_gradient_match_values_worked_by_hand() {
        // p = 4 x 4 at the origin, g = 4 x 4 moved by (2, 0): I = 8, U = 24.
        let (iou, d) = iou_gradient([0.0, 0.0, 4.0, 4.0], [2.0, 0.0, 6.0, 4.0]);
        assert!((iou - 1.0 / 3.0f64).abs() < 1e-12);
        // x1, the outer edge (first case of Eq. 12): I h / U^2 = 8 * 4 / 576.
        assert!((d[0] - 32.0 / 576.0).abs() < 1e-12, "{d:?}");
        // x2, the inner edge: ((U + I) h* - I h) / U^2 = (32 * 4 - 32) / 576.
        assert!((d[2] - 96.0 / 576.0).abs() < 1e-12, "{d:?}");
        let one = [1.0f64; 2];
        let l = least_square_iou([0.0; 4], [2.0, 2.0, 4.0, 4.0], one, [2.0, 0.0, 6.0, 4.0], NoOverlap::Zero);
        assert!((l.loss - 4.0 / 9.0).abs() < 1e-12);
        // d/dtx = -2 (1 - IoU) (d x1 + d x2) w_a = -(4/3) (128/576) 4.
        assert!((l.gradient[0] + 4.0 / 3.0 * 128.0 / 576.0 * 4.0).abs() < 1e-12, "{l:?}");
        let l = negative_ln_iou([0.0; 4], [2.0, 2.0, 4.0, 4.0], one, [2.0, 0.0, 6.0, 4.0], NoOverlap::Zero);
        assert!(
            (l.loss - 3f64.ln()).abs() < 1e-12 && (l.gradient[0] + 3.0 * 128.0 / 576.0 * 4.0).abs() < 1e-12
        );
    }

    fn random_case(rng: &mut Rng) -> ([f64; 4], [f64; 4], [f64; 2], [f64; 4]) {
        let mut r = |a, b| f64::from(rng.range(a, b));
        let anchor = [r(20.0, 80.0), r(20.0, 80.0), r(8.0, 40.0), r(8.0, 40.0)];
        let variances = if r(0.0, 1.0) < 0.5 { [1.0, 1.0] } else { [0.1, 0.2] };
        let t: [f64; 4] = std::array::from_fn(|k| r(-0.6, 0.6) / variances[k / 2]);
        let center: [f64; 2] = std::array::from_fn(|a| anchor[a] + r(-0.6, 0.6) * anchor[2 + a]);
        let half: [f64; 2] = std::array::from_fn(|a| 0.5 * anchor[2 + a] * r(0.6, 1.6));
        (
            t,
            anchor,
            variances,
            [center[0] - half[0], center[1] - half[1], center[0] + half[0], center[1] + half[1]],
        )
    }

    #[test]
    fn iou_losses_gradients_are_finite_differences() {
        let mut rng = Rng::new(2);
        let mut overlapping = 0;
        for _ in 0..600 {
            let (t, anchor, variances, target) = random_case(&mut rng);
            for loss in LOSSES {
                for no_overlap in [NoOverlap::Zero, NoOverlap::SmoothL1] {
                    let got = loss(t, anchor, variances, target, no_overlap);
                    // Away from the kinks of touching edges, where the derivative jumps.
                    if got.iou > 0.0 && got.iou < 0.02 {
                        continue;
                    }
                    overlapping += usize::from(got.iou > 0.0);
                    assert_gradient(&t, &got.gradient, 1e-4, |t| {
                        loss([t[0], t[1], t[2], t[3]], anchor, variances, target, no_overlap).loss
                    });
                }
            }
        }
        assert!(overlapping > 1000, "{overlapping}");
    }

    #[test]
    fn the_least_square_gradient_vanishes_at_the_target_and_the_logarithms_does_not() {
        let (anchor, target) = ([16.0, 16.0, 16.0, 16.0], [8.0, 8.0, 24.0, 24.0]);
        let square = least_square_iou([0.0f64; 4], anchor, [1.0; 2], target, NoOverlap::Zero);
        assert_eq!((square.loss, square.gradient, square.iou), (0.0, [0.0; 4], 1.0));
        let ln = negative_ln_iou([0.0f64; 4], anchor, [1.0; 2], target, NoOverlap::Zero);
        assert!(
            ln.loss == 0.0 && ln.gradient.iter().any(|g| *g != 0.0),
            "Section 5: non-zero at IoU 1: {ln:?}"
        );
    }

    #[test]
    fn boxes_apart_have_the_documented_gradient() {
        let (anchor, target) = ([10.0, 10.0, 8.0, 8.0], [40.0, 6.0, 48.0, 14.0]);
        for loss in LOSSES {
            let zero = loss([0.0; 4], anchor, [1.0; 2], target, NoOverlap::Zero);
            assert_eq!((zero.gradient, zero.iou), ([0.0; 4], 0.0));
            assert!(zero.loss.is_finite());
            let pulled = loss([0.0; 4], anchor, [1.0; 2], target, NoOverlap::SmoothL1);
            assert!(pulled.gradient[0] == -1.0 && pulled.loss > zero.loss, "drawn to the right: {pulled:?}");
        }
        // Touching edges: no overlap, nothing undefined.
        let touch = least_square_iou([0.0; 4], anchor, [1.0; 2], [14.0, 6.0, 22.0, 14.0], NoOverlap::Zero);
        assert_eq!((touch.loss, touch.gradient), (1.0, [0.0; 4]));
    }

    #[test]
    fn extreme_offsets_and_boxes_stay_finite_in_f32_and_nan_shows() {
        let losses = [least_square_iou::<f32>, negative_ln_iou::<f32>];
        let values = [0.0f32, 1e-30, 1.0, 80.0, 1e10, 3e38];
        let mut rng = Rng::new(3);
        for _ in 0..2000 {
            let t = std::array::from_fn(|_| {
                let v = values[rng.below(values.len())];
                if rng.below(2) == 0 {
                    v
                } else {
                    -v
                }
            });
            for target in [[0.0, 0.0, 10.0, 10.0], [5.0, 5.0, 5.0, 5.0], [-1e5, -1e5, 1e5, 1e5]] {
                for loss in losses {
                    for fallback in [NoOverlap::Zero, NoOverlap::SmoothL1] {
                        let got = loss(t, [8.0, 8.0, 16.0, 16.0], [1.0, 1.0], target, fallback);
                        let finite = got.gradient.iter().all(|g| g.is_finite());
                        // Smooth L1 of an offset of 3e38 is that large itself.
                        let sane = got.loss.is_finite() || t.iter().any(|v| v.abs() > 1e38);
                        assert!(finite && sane && !got.loss.is_nan(), "{t:?} {target:?} {got:?}");
                    }
                }
            }
        }
        for k in 0..4 {
            let mut t = [0.0f32; 4];
            t[k] = f32::NAN;
            let got = least_square_iou(
                t,
                [8.0, 8.0, 16.0, 16.0],
                [1.0; 2],
                [0.0, 0.0, 10.0, 10.0],
                NoOverlap::Zero,
            );
            assert!(got.loss.is_nan(), "offset {k}: {got:?}");
        }
    }

    #[test]
    fn the_box_code_is_its_own_inverse_and_the_detectors() {
        let mut rng = Rng::new(4);
        for _ in 0..200 {
            let (t, anchor, variances, target) = random_case(&mut rng);
            let back = decode_box(encode_box(target, anchor, variances), anchor, variances);
            assert!((0..4).all(|k| (back[k] - target[k]).abs() < 1e-9), "{back:?} {target:?}");
            let f = anchor.map(|v| v as f32);
            let detector = Anchor { center: [f[0], f[1]], size: [f[2], f[3]] }
                .decode(&t.map(|v| v as f32), variances.map(|v| v as f32));
            let ours = decode_box(t, anchor, variances);
            let theirs = [detector.x1, detector.y1, detector.x2, detector.y2];
            assert!((0..4).all(|k| (ours[k] - f64::from(theirs[k])).abs() < 1e-3), "{ours:?} {theirs:?}");
        }
    }
}
