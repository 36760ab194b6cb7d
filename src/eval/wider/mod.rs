//! WIDER FACE validation (Yang et al., CVPR 2016), scored as the official evaluator does.
//!
//! The protocol, where it differs from plain VOC:
//! - Every annotated box takes part in the matching. Those outside the subset are ignored: a
//!   detection whose best box is ignored is neither right nor wrong.
//! - IoU counts the last row and column ([`iou_inclusive`]); 0.5 is a match.
//! - A further detection on a found face stays a proposal and adds no recall.
//! - Scores are min-max normalised over all detections of the set; the curve is read at 1,000
//!   thresholds, 0.999 down to 0. AP is the area under the monotone envelope.
//! - A picture without boxes or without detections is skipped; its faces still count as missed.
//!
//! [`Subset::All`] counts every annotated box, those flagged invalid included.

mod ground_truth;
mod results;

pub use ground_truth::{Attributes, Face, GroundTruth, Image};
pub use results::{read_published_curves, Predictions};

use serde::Serialize;

use super::curve::{all_point_ap, PrCurve, PrPoint};
use super::overlap::iou_inclusive;
use super::Progress;
use crate::{Error, Result};

/// IoU from which a detection finds a face.
pub const MATCH_IOU: f64 = 0.5;

/// Number of score thresholds of the official evaluator.
const THRESHOLDS: usize = 1000;

/// Which faces count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Subset {
    /// Faces that EdgeBox proposals find most readily (paper, section 3.2); the next two add those
    /// they find less.
    Easy,
    /// Easy and more.
    Medium,
    /// Medium and more: nearly every face above 10 pixels.
    Hard,
    /// Every annotated box.
    All,
}

impl Subset {
    /// In the order of the published tables.
    pub const EACH: [Subset; 4] = [Subset::Easy, Subset::Medium, Subset::Hard, Subset::All];

    /// `easy`, `medium`, `hard` or `all`.
    pub fn name(self) -> &'static str {
        match self {
            Subset::Easy => "easy",
            Subset::Medium => "medium",
            Subset::Hard => "hard",
            Subset::All => "all",
        }
    }
}

/// A detection and the box it overlaps most.
#[derive(Clone, Copy, Debug)]
pub(super) struct Match {
    pub(super) score: f64,
    /// Index among the picture's faces, the first of equals.
    pub(super) face: usize,
    pub(super) iou: f64,
}

/// Detections matched to the boxes, once for all subsets and IoU thresholds.
pub struct Evaluator<'a> {
    gt: &'a GroundTruth,
    /// A list a picture, score falling; empty where the picture has no boxes.
    matches: Vec<Vec<Match>>,
    /// Lowest and highest score of the set.
    range: (f64, f64),
}

impl<'a> Evaluator<'a> {
    /// Matches the detections of the pictures in `gt`; other pictures' are left out, of the score
    /// range too. The slow part: IoU of every detection with every box of its picture.
    pub fn new(gt: &'a GroundTruth, predictions: &Predictions, progress: Progress) -> Self {
        let mut range = (f64::INFINITY, f64::NEG_INFINITY);
        let mut matches = Vec::with_capacity(gt.images.len());
        for (i, image) in gt.images.iter().enumerate() {
            let detections = predictions.get(&image.event, &image.stem);
            for d in detections {
                range = (range.0.min(d.score as f64), range.1.max(d.score as f64));
            }
            let mut found: Vec<Match> = Vec::new();
            for d in detections.iter().filter(|_| !image.faces.is_empty()) {
                let mut best = Match { score: d.score as f64, face: 0, iou: -1.0 };
                for (face, f) in image.faces.iter().enumerate() {
                    let iou = iou_inclusive(&d.bbox, &f.bbox);
                    if iou > best.iou {
                        (best.face, best.iou) = (face, iou);
                    }
                }
                found.push(best);
            }
            found.sort_by(|a, b| b.score.total_cmp(&a.score));
            matches.push(found);
            progress(i + 1, gt.images.len());
        }
        Self { gt, matches, range }
    }

    /// Precision-recall curve of a subset; `min_iou` is [`MATCH_IOU`] for the published figures.
    pub fn curve(&self, subset: Subset, min_iou: f64) -> Result<PrCurve> {
        self.check(subset)?;
        let levels: Vec<f64> = (1..=THRESHOLDS).map(|k| 1.0 - k as f64 / THRESHOLDS as f64).collect();
        let (low, high) = self.range;
        let span = high - low;
        // Proposals and found faces that each threshold adds to the one before.
        let mut proposals = [0u64; THRESHOLDS];
        let mut recalled = [0u64; THRESHOLDS];
        let mut faces = 0;
        for (image, matches) in self.gt.images.iter().zip(&self.matches) {
            faces += image.faces.iter().filter(|f| f.counts_in(subset)).count();
            let mut found = vec![false; image.faces.len()];
            for m in matches {
                let score = if span > 0.0 { (m.score - low) / span } else { 1.0 };
                let level = levels.partition_point(|&t| t > score).min(THRESHOLDS - 1);
                if m.iou < min_iou {
                    proposals[level] += 1;
                } else if image.faces[m.face].counts_in(subset) {
                    proposals[level] += 1;
                    recalled[level] += u64::from(!found[m.face]);
                    found[m.face] = true;
                }
            }
        }
        let (mut proposed, mut right) = (0, 0);
        let mut points = Vec::with_capacity(THRESHOLDS);
        for k in 0..THRESHOLDS {
            proposed += proposals[k];
            right += recalled[k];
            points.push(PrPoint {
                threshold: span.is_finite().then_some(low + levels[k] * span),
                recall: ratio(right, faces as u64),
                precision: ratio(right, proposed),
            });
        }
        Ok(PrCurve { ap: all_point_ap(&points), faces, points })
    }

    /// The curves of all subsets that the ground truth knows.
    pub fn report(&self) -> Result<Report> {
        let graded = |subset| self.gt.graded.then(|| self.curve(subset, MATCH_IOU)).transpose();
        Ok(Report {
            images: self.gt.images.len(),
            easy: graded(Subset::Easy)?,
            medium: graded(Subset::Medium)?,
            hard: graded(Subset::Hard)?,
            all: self.curve(Subset::All, MATCH_IOU)?,
        })
    }

    /// Each picture's faces and matches.
    pub(super) fn pictures(&self) -> impl Iterator<Item = (&[Face], &[Match])> {
        self.gt.images.iter().zip(&self.matches).map(|(i, m)| (i.faces.as_slice(), m.as_slice()))
    }

    pub(super) fn check(&self, subset: Subset) -> Result<()> {
        check_graded(self.gt, subset)
    }
}

/// Error where `gt` cannot tell which faces count.
pub(super) fn check_graded(gt: &GroundTruth, subset: Subset) -> Result<()> {
    if gt.graded || subset == Subset::All {
        return Ok(());
    }
    Err(Error::InvalidArgument(format!(
        "subset {}: text annotations have no difficulty; read the .mat files, or score `all`",
        subset.name()
    )))
}

fn ratio(part: u64, whole: u64) -> f64 {
    if whole == 0 {
        0.0
    } else {
        part as f64 / whole as f64
    }
}

/// The figures of the published tables.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// Pictures scored.
    pub images: usize,
    /// None where the ground truth has no difficulties; so for the next two.
    pub easy: Option<PrCurve>,
    /// Medium subset.
    pub medium: Option<PrCurve>,
    /// Hard subset.
    pub hard: Option<PrCurve>,
    /// Every annotated box.
    pub all: PrCurve,
}

#[cfg(test)]
mod tests;
