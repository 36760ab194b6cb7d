//! Precision-recall and ROC curves, and the areas that summarise them.

use serde::Serialize;

/// One operating point.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct PrPoint {
    /// Lowest score kept, in the detector's units; None where the source does not tell.
    pub threshold: Option<f64>,
    /// Share of the faces found.
    pub recall: f64,
    /// Share of the proposals that are right; 0 where nothing is proposed.
    pub precision: f64,
}

/// Precision against recall, strictest threshold first.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct PrCurve {
    /// Average precision of the protocol that made the curve, 0 to 1.
    pub ap: f64,
    /// Faces that count.
    pub faces: usize,
    /// Operating points, recall rising.
    pub points: Vec<PrPoint>,
}

/// AP at one IoU threshold.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct ApAtIou {
    /// Overlap from which a detection finds a face.
    pub iou: f64,
    /// Average precision, 0 to 1.
    pub ap: f64,
}

/// One operating point of a ROC.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct RocPoint {
    /// Detections that match no face, over the whole set.
    pub false_positives: f64,
    /// Share of the faces found (discrete) or of their area matched (continuous).
    pub true_positive_rate: f64,
    /// Lowest score kept; None where the source does not tell.
    pub threshold: Option<f64>,
}

/// True-positive rate against the number of false positives, which rises along the list.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct RocCurve {
    /// Operating points, false positives rising.
    pub points: Vec<RocPoint>,
}

impl RocCurve {
    /// Best true-positive rate with at most this many false positives; 0 where no point is so strict.
    pub fn rate_at(&self, false_positives: usize) -> f64 {
        self.points
            .iter()
            .filter(|p| p.false_positives <= false_positives as f64)
            .map(|p| p.true_positive_rate)
            .fold(0.0, f64::max)
    }
}

/// Points after each detection, of `(score, is right)` by falling score.
pub(super) fn curve_points(ranked: impl Iterator<Item = (f64, bool)>, faces: usize) -> Vec<PrPoint> {
    let (mut right, mut all) = (0usize, 0usize);
    let point = |(score, is_right): (f64, bool)| {
        all += 1;
        right += usize::from(is_right);
        let recall = right as f64 / faces.max(1) as f64;
        PrPoint { threshold: Some(score), recall, precision: right as f64 / all as f64 }
    };
    ranked.map(point).collect()
}

/// Best precision at each point or any later one: the monotone envelope.
fn envelope(points: &[PrPoint]) -> Vec<f64> {
    let mut best = 0.0f64;
    let mut env: Vec<f64> = points
        .iter()
        .rev()
        .map(|p| {
            best = best.max(p.precision);
            best
        })
        .collect();
    env.reverse();
    env
}

/// Area under the monotone envelope through all points (VOC 2010 and later, WIDER FACE).
/// `points` must have recall rising.
pub fn all_point_ap(points: &[PrPoint]) -> f64 {
    let mut last = 0.0;
    let mut area = 0.0;
    for (p, precision) in points.iter().zip(envelope(points)) {
        area += (p.recall - last) * precision;
        last = p.recall;
    }
    area
}

/// Mean over `levels` recall levels, evenly spread from 0 to 1, of the best precision at that
/// recall or beyond. 11 levels: VOC 2007. 101 levels: COCO. `points` must have recall rising.
pub fn interpolated_ap(points: &[PrPoint], levels: usize) -> f64 {
    let env = envelope(points);
    let sum: f64 = (0..levels)
        .map(|i| {
            let level = i as f64 / (levels - 1).max(1) as f64;
            let at = points.partition_point(|p| p.recall < level);
            env.get(at).copied().unwrap_or(0.0)
        })
        .sum();
    sum / levels.max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn points(rp: &[(f64, f64)]) -> Vec<PrPoint> {
        rp.iter().map(|&(recall, precision)| PrPoint { threshold: None, recall, precision }).collect()
    }

    #[test]
    fn areas_of_a_hand_drawn_curve() {
        // Envelope: 1.0 up to recall 0.25, 0.6 up to 0.75, nothing beyond.
        let p = points(&[(0.25, 1.0), (0.25, 0.5), (0.5, 0.4), (0.75, 0.6)]);
        assert!((all_point_ap(&p) - (0.25 + 0.5 * 0.6)).abs() < 1e-12);
        // Levels 0, .1, .2 see 1.0; .3 to .7 see 0.6; .8 to 1 see 0.
        assert!((interpolated_ap(&p, 11) - (3.0 + 5.0 * 0.6) / 11.0).abs() < 1e-12);
        // 0 to .25 are 26 of the 101 levels, .26 to .75 are 50.
        assert!((interpolated_ap(&p, 101) - (26.0 + 50.0 * 0.6) / 101.0).abs() < 1e-12);
    }

    #[test]
    fn no_points_have_no_area() {
        assert_eq!(all_point_ap(&[]), 0.0);
        assert_eq!(interpolated_ap(&[], 11), 0.0);
    }

    #[test]
    fn roc_rate_is_the_best_within_the_budget() {
        let point = |fp, tpr| RocPoint { false_positives: fp, true_positive_rate: tpr, threshold: None };
        let roc = RocCurve { points: vec![point(1.0, 0.2), point(10.0, 0.7), point(11.0, 0.65)] };
        assert_eq!(roc.rate_at(0), 0.0);
        assert_eq!(roc.rate_at(9), 0.2);
        assert_eq!(roc.rate_at(100), 0.7);
    }

    proptest! {
        #[test]
        fn areas_stay_within_unit(mut rp in proptest::collection::vec((0.0f64..=1.0, 0.0f64..=1.0), 0..40)) {
            rp.sort_by(|a, b| a.0.total_cmp(&b.0));
            let p = points(&rp);
            let eps = 1e-9;
            for ap in [all_point_ap(&p), interpolated_ap(&p, 11), interpolated_ap(&p, 101)] {
                prop_assert!((0.0..=1.0 + eps).contains(&ap));
            }
        }
    }
}
