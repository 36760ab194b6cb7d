//! COCO-style mean AP on WIDER FACE ground truth, as the WIDER Challenge 2019 ranked detectors.
//!
//! Per IoU threshold 0.50:0.05:0.95, detections of a picture, by falling score, each take the free
//! face they overlap most; AP is the mean of the envelope at 101 recall levels; mAP is the mean
//! over thresholds. Two departures from pycocotools, which both suit crowds of faces: all
//! detections of a picture are kept instead of the best 100, and an ignored face absorbs any number
//! of detections.

use serde::Serialize;

use super::curve::{curve_points, interpolated_ap, ApAtIou};
use super::overlap::iou_continuous;
use super::wider::{check_graded, GroundTruth, Predictions, Subset};
use super::Progress;
use crate::Result;

/// IoU thresholds, in percent so that they are exact.
const THRESHOLDS: [u32; 10] = [50, 55, 60, 65, 70, 75, 80, 85, 90, 95];

/// Mean AP and its parts.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CocoReport {
    /// Faces that count.
    pub faces: usize,
    /// Mean of `by_iou`.
    pub map: f64,
    /// AP at 0.50, 0.55 .. 0.95.
    pub by_iou: Vec<ApAtIou>,
}

/// What a detection is at one threshold.
#[derive(Clone, Copy, PartialEq)]
enum Verdict {
    True,
    False,
    Ignored,
}

/// Scores the detections of the pictures in `gt`. Fails where `gt` does not know the subset.
pub fn evaluate(
    gt: &GroundTruth,
    predictions: &Predictions,
    subset: Subset,
    progress: Progress,
) -> Result<CocoReport> {
    check_graded(gt, subset)?;
    let mut scores: Vec<f32> = Vec::new();
    let mut verdicts: Vec<[Verdict; THRESHOLDS.len()]> = Vec::new();
    for (done, image) in gt.images.iter().enumerate() {
        let mut detections = predictions.get(&image.event, &image.stem).to_vec();
        detections.sort_by(|a, b| b.score.total_cmp(&a.score));
        let mut taken = vec![[false; THRESHOLDS.len()]; image.faces.len()];
        for d in &detections {
            let overlaps: Vec<f64> = image.faces.iter().map(|f| iou_continuous(&d.bbox, &f.bbox)).collect();
            let mut verdict = [Verdict::False; THRESHOLDS.len()];
            for (k, &percent) in THRESHOLDS.iter().enumerate() {
                let min_iou = percent as f64 / 100.0;
                // A free face that counts goes before any ignored one, however well that fits.
                let mut best: Option<(usize, f64)> = None;
                let mut on_ignored = false;
                for (i, face) in image.faces.iter().enumerate().filter(|(i, _)| overlaps[*i] >= min_iou) {
                    if !face.counts_in(subset) {
                        on_ignored = true;
                    } else if !taken[i][k] && best.is_none_or(|(_, iou)| overlaps[i] > iou) {
                        best = Some((i, overlaps[i]));
                    }
                }
                if let Some((i, _)) = best {
                    taken[i][k] = true;
                    verdict[k] = Verdict::True;
                } else if on_ignored {
                    verdict[k] = Verdict::Ignored;
                }
            }
            scores.push(d.score);
            verdicts.push(verdict);
        }
        progress(done + 1, gt.images.len());
    }

    let faces = gt.faces_in(subset);
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
    let by_iou: Vec<ApAtIou> = THRESHOLDS
        .iter()
        .enumerate()
        .map(|(k, &percent)| {
            let counted = order.iter().map(|&i| (scores[i], verdicts[i][k]));
            let counted = counted.filter(|&(_, v)| v != Verdict::Ignored);
            let points = curve_points(counted.map(|(s, v)| (s as f64, v == Verdict::True)), faces);
            ApAtIou { iou: percent as f64 / 100.0, ap: interpolated_ap(&points, 101) }
        })
        .collect();
    let map = by_iou.iter().map(|a| a.ap).sum::<f64>() / by_iou.len() as f64;
    Ok(CocoReport { faces, map, by_iou })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::detect::{BBox, Detection};
    use crate::eval::wider::{Attributes, Face, Image};

    fn face(x: f32, hard: bool) -> Face {
        let bbox = BBox::from_xywh(x, 0.0, 10.0, 10.0);
        Face { bbox, attributes: Attributes::default(), easy: false, medium: false, hard }
    }

    fn hit(x: f32, score: f32) -> Detection {
        Detection { bbox: BBox::from_xywh(x, 0.0, 10.0, 10.0), score }
    }

    fn run(faces: Vec<Face>, hits: Vec<Detection>, subset: Subset) -> CocoReport {
        let image = Image { event: "e".into(), stem: "a".into(), path: String::new(), faces };
        let gt = GroundTruth { images: vec![image], graded: true };
        let mut p = Predictions::new();
        p.insert("e", "a", hits);
        evaluate(&gt, &p, subset, &mut |_, _| {}).unwrap()
    }

    #[test]
    fn looser_boxes_drop_out_at_tighter_thresholds() {
        // Shifted by 2 of 10: IoU 8/12 = 0.667, right at 0.50 to 0.65.
        let report = run(vec![face(0.0, true)], vec![hit(2.0, 0.9)], Subset::Hard);
        let aps: Vec<f64> = report.by_iou.iter().map(|a| a.ap).collect();
        assert_eq!(aps, [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
        assert!((report.map - 0.4).abs() < 1e-12);
    }

    #[test]
    fn a_second_detection_takes_the_next_free_face() {
        // Unlike the WIDER protocol: the second one overlaps face 0 more, and finds face 3.0.
        let report =
            run(vec![face(0.0, true), face(3.0, true)], vec![hit(0.0, 0.9), hit(1.0, 0.8)], Subset::Hard);
        assert_eq!(report.by_iou[0].ap, 1.0);
        // IoU 8/12 with it: at 0.70 one of two is found, 51 of 101 levels.
        assert!((report.by_iou[4].ap - 51.0 / 101.0).abs() < 1e-12);
    }

    #[test]
    fn ignored_faces_absorb_and_duplicates_are_false() {
        let faces = vec![face(0.0, true), face(50.0, false)];
        let hits = vec![hit(50.0, 0.9), hit(50.0, 0.8), hit(0.0, 0.5)];
        assert_eq!(run(faces.clone(), hits.clone(), Subset::Hard).map, 1.0);
        // For All: right, duplicate, right. Envelope 1 up to recall 1/2 and 2/3 beyond.
        let all = run(faces, hits, Subset::All);
        assert!((all.map - (51.0 + 50.0 * 2.0 / 3.0) / 101.0).abs() < 1e-12);
    }
}
