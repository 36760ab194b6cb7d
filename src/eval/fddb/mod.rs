//! FDDB (Jain and Learned-Miller, UMass TR 2010-009): ROC curves over elliptical annotations.
//!
//! Annotations and detections are rasterised and clipped to the picture; the overlap is the IoU of
//! the masks. At each threshold, detections and faces of a picture are matched one to one so that
//! the total IoU is largest. A matched pair scores [IoU > 0.5] on the discrete curve and IoU on the
//! continuous one; both are divided by the number of faces. A false positive, on either curve, is a
//! detection whose pair does not exceed 0.5, or that has none.

mod assignment;
mod files;
mod region;

pub use assignment::Assignment;
pub use files::{read_roc, Annotations, Detections, ScoredRegion};
pub use region::{Mask, Region};

use std::collections::BTreeMap;

use serde::Serialize;

use self::files::COORDINATE_LIMIT;
use super::curve::{RocCurve, RocPoint};
use super::Progress;
use crate::{Error, Result};

/// Numbers of false positives at which true-positive rates are reported.
pub const REPORTED_FALSE_POSITIVES: [usize; 5] = [100, 200, 500, 1000, 2000];

/// IoU that a discrete match must exceed.
const MATCH_IOU: f64 = 0.5;

/// Width and height of pictures in pixels, by name.
pub type PictureSizes = BTreeMap<String, (u32, u32)>;

/// True-positive rates at a number of false positives over the whole set.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct RateAt {
    /// Number of false positives.
    pub false_positives: usize,
    /// Of the discrete curve.
    pub discrete: f64,
    /// Of the continuous curve.
    pub continuous: f64,
}

/// Both curves.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// Pictures scored.
    pub images: usize,
    /// Annotated faces.
    pub faces: usize,
    /// Rates at [`REPORTED_FALSE_POSITIVES`].
    pub rates: Vec<RateAt>,
    /// Share of the faces found.
    pub discrete: RocCurve,
    /// Share of the faces' area found.
    pub continuous: RocCurve,
}

/// What one more detection changes.
struct Step {
    score: f64,
    discrete: i64,
    continuous: f64,
}

/// Scores detections. A picture missing from `sizes` is taken to end at the largest right and
/// bottom edge among its detections, and 5 % of their sides beyond, since a detector's boxes stop
/// near the border; rates are then good to about 0.002.
/// Fails where a picture has detections but no annotation.
pub fn evaluate(
    annotations: &Annotations,
    detections: &Detections,
    sizes: &PictureSizes,
    progress: Progress,
) -> Result<Report> {
    if let Some(name) = detections.by_image.keys().find(|name| !annotations.by_image.contains_key(*name)) {
        return Err(Error::InvalidData(format!(
            "{name} has detections but no annotation; give the ellipse lists of all its folds"
        )));
    }
    let images = annotations.by_image.len();
    let mut steps = Vec::new();
    for (done, (name, faces)) in annotations.by_image.iter().enumerate() {
        if let Some(found) = detections.by_image.get(name) {
            let size = sizes.get(name).copied().unwrap_or_else(|| estimated_size(found));
            picture_steps(faces, found, size, &mut steps);
        }
        progress(done + 1, images);
    }
    let faces = annotations.faces();
    let (discrete, continuous) = curves(steps, faces);
    let rates = REPORTED_FALSE_POSITIVES.map(|n| RateAt {
        false_positives: n,
        discrete: discrete.rate_at(n),
        continuous: continuous.rate_at(n),
    });
    Ok(Report { images, faces, rates: rates.to_vec(), discrete, continuous })
}

/// Share of its side by which a detection's edge may fall short of the border it was cut at.
/// Without it a face at the border is cut to its own detection, which overrates the overlap.
/// S3FD's detections at 1,000 false positives score 0.9681 / 0.7402 with it, 0.9685 / 0.7449
/// without; the reference evaluator, which knew the sizes, gave 0.9685 / 0.7389.
const BORDER_SLACK: f64 = 0.05;

fn estimated_size(detections: &[ScoredRegion]) -> (u32, u32) {
    let (mut width, mut height) = (0.0f64, 0.0f64);
    for d in detections {
        let [left, top, right, bottom] = d.region.bounds();
        // The edge is the last pixel, so the picture has one more.
        width = width.max(right + BORDER_SLACK * (right - left) + 1.0);
        height = height.max(bottom + BORDER_SLACK * (bottom - top) + 1.0);
    }
    // Detections that no file brought in are not bound to the files' limit.
    (width.ceil().min(COORDINATE_LIMIT) as u32, height.ceil().min(COORDINATE_LIMIT) as u32)
}

/// Appends a step for each detection of a picture, by falling score.
fn picture_steps(faces: &[Region], found: &[ScoredRegion], (w, h): (u32, u32), steps: &mut Vec<Step>) {
    let faces: Vec<Mask> = faces.iter().map(|f| f.rasterise(w, h)).collect();
    let mut order: Vec<&ScoredRegion> = found.iter().collect();
    order.sort_by(|a, b| b.score.total_cmp(&a.score));
    let mut matching = Assignment::new(faces.len());
    let (mut discrete, mut continuous) = (0i64, 0.0);
    for d in order {
        let mask = d.region.rasterise(w, h);
        let overlaps: Vec<f64> = faces.iter().map(|f| f.iou(&mask)).collect();
        let mut step = Step { score: d.score, discrete: 0, continuous: 0.0 };
        // What touches no face cannot change the matching.
        if overlaps.iter().any(|&iou| iou > 0.0) {
            matching.add_row(&overlaps);
            let now_discrete = matching.matched_weights().filter(|&iou| iou > MATCH_IOU).count() as i64;
            let now_continuous = matching.matched_weights().sum::<f64>();
            step.discrete = now_discrete - discrete;
            step.continuous = now_continuous - continuous;
            (discrete, continuous) = (now_discrete, now_continuous);
        }
        steps.push(step);
    }
}

/// Discrete and continuous curve, a point for each distinct score.
fn curves(mut steps: Vec<Step>, faces: usize) -> (RocCurve, RocCurve) {
    steps.sort_by(|a, b| b.score.total_cmp(&a.score));
    let (mut detections, mut discrete, mut continuous) = (0i64, 0i64, 0.0);
    let mut curves = (RocCurve::default(), RocCurve::default());
    for same_score in steps.chunk_by(|a, b| a.score == b.score) {
        for step in same_score {
            detections += 1;
            discrete += step.discrete;
            continuous += step.continuous;
        }
        let point = |rate: f64| RocPoint {
            false_positives: (detections - discrete) as f64,
            true_positive_rate: rate / faces.max(1) as f64,
            threshold: Some(same_score[0].score),
        };
        curves.0.points.push(point(discrete as f64));
        curves.1.points.push(point(continuous));
    }
    curves
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Covers 10 rows of `columns` pixels.
    fn strip(x: f64, columns: f64) -> Region {
        Region::Rectangle { x, y: 0.0, w: columns - 1.0, h: 9.0 }
    }

    fn set<T>(pictures: Vec<(&str, Vec<T>)>) -> BTreeMap<String, Vec<T>> {
        pictures.into_iter().map(|(name, list)| (name.to_string(), list)).collect()
    }

    fn scored(region: Region, score: f64) -> ScoredRegion {
        ScoredRegion { region, score }
    }

    fn run(faces: Vec<(&str, Vec<Region>)>, found: Vec<(&str, Vec<ScoredRegion>)>) -> Report {
        let sizes = faces.iter().map(|(name, _)| (name.to_string(), (1000, 1000))).collect();
        let (annotations, detections) =
            (Annotations { by_image: set(faces) }, Detections { by_image: set(found) });
        evaluate(&annotations, &detections, &sizes, &mut |_, _| {}).unwrap()
    }

    fn flat(curve: &RocCurve) -> Vec<(f64, f64)> {
        curve.points.iter().map(|p| (p.false_positives, p.true_positive_rate)).collect()
    }

    #[test]
    fn both_curves_of_a_hand_counted_set() {
        // Picture a: 10-wide face; hit of IoU 8/10, then a duplicate and a miss at one score.
        // Picture b: face of IoU exactly 1/2 (no discrete match). Picture c: missed face.
        let report = run(
            vec![("a", vec![strip(0.0, 10.0)]), ("b", vec![strip(0.0, 10.0)]), ("c", vec![strip(0.0, 10.0)])],
            vec![
                (
                    "a",
                    vec![
                        scored(strip(0.0, 7.0), 0.4),
                        scored(strip(0.0, 8.0), 0.9),
                        scored(strip(50.0, 5.0), 0.4),
                    ],
                ),
                ("b", vec![scored(strip(0.0, 5.0), 0.6)]),
            ],
        );
        assert_eq!((report.images, report.faces), (3, 3));
        let third = 1.0 / 3.0;
        assert_eq!(flat(&report.discrete), [(0.0, third), (1.0, third), (3.0, third)]);
        let continuous = flat(&report.continuous);
        for (point, want) in continuous.iter().zip([0.8 / 3.0, 1.3 / 3.0, 1.3 / 3.0]) {
            assert!((point.1 - want).abs() < 1e-12, "{continuous:?}");
        }
        assert_eq!(report.rates[0].discrete, third);
    }

    #[test]
    fn matching_maximises_the_total() {
        // First detection spans both faces and prefers the second one; a later detection takes
        // that one better, and the first moves over to the other face.
        let faces = vec![strip(0.0, 10.0), strip(10.0, 10.0)];
        let found = vec![scored(strip(2.0, 17.0), 0.9), scored(strip(10.0, 10.0), 0.8)];
        let report = run(vec![("a", faces)], vec![("a", found)]);
        let continuous = flat(&report.continuous);
        assert!((continuous[0].1 - 9.0 / 18.0 / 2.0).abs() < 1e-12, "{continuous:?}");
        assert!((continuous[1].1 - (1.0 + 8.0 / 19.0) / 2.0).abs() < 1e-12, "{continuous:?}");
    }

    #[test]
    fn unknown_sizes_end_at_the_outermost_detection() {
        let rectangle = |x, w| scored(Region::Rectangle { x, y: 10.0, w, h: 40.0 }, 0.1);
        // 20 + 60 + 1 and 3 more; 10 + 40 + 1 and 2 more.
        assert_eq!(estimated_size(&[rectangle(20.0, 60.0), rectangle(0.0, 30.0)]), (84, 53));
        assert_eq!(estimated_size(&[rectangle(-90.0, 20.0)]), (0, 53));
    }

    #[test]
    fn detections_without_annotation_are_refused() {
        let detections = Detections { by_image: set(vec![("z", vec![])]) };
        let error =
            evaluate(&Annotations::default(), &detections, &PictureSizes::new(), &mut |_, _| {}).unwrap_err();
        assert!(error.to_string().contains("z has detections but no annotation"));
    }
}
