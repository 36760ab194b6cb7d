//! What a detector does wrong on WIDER FACE: which false positives it makes and which faces it
//! misses (after Hoiem et al., "Diagnosing Error in Object Detectors", ECCV 2012, as HR Fig. 16-18
//! and RefineFace Fig. 1-2, Tables 3 and 5 report it).
//!
//! Matching is that of [`super::wider`]: IoU 0.5 with the box overlapped most, ignored faces absorb.

use serde::Serialize;

use super::curve::{all_point_ap, curve_points, ApAtIou};
use super::wider::{Attributes, Evaluator, Face, Match, Subset, MATCH_IOU};
use super::Progress;
use crate::Result;

/// IoU below which a false positive has nothing to do with a face (Hoiem et al.).
const BACKGROUND_IOU: f64 = 0.1;

/// Recall levels of the false-positive table (RefineFace Table 3).
const RECALLS: [f64; 6] = [0.1, 0.3, 0.5, 0.8, 0.9, 0.95];

/// IoU thresholds of the localisation table, percent (RefineFace Table 5).
const IOUS: [u32; 7] = [50, 55, 60, 65, 70, 75, 80];

/// Upper ends of the size buckets: face height in pixels.
const HEIGHTS: [f32; 6] = [10.0, 20.0, 30.0, 50.0, 100.0, 300.0];

/// False positives by cause.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Causes {
    /// 0.1 <= IoU < 0.5 with some face, ignored ones included.
    pub localisation: usize,
    /// Further detection on a found face; a kind of localisation error in Hoiem's tables.
    pub duplicate: usize,
    /// IoU below 0.1 with every face.
    pub background: usize,
}

impl Causes {
    /// All of them.
    pub fn total(&self) -> usize {
        self.localisation + self.duplicate + self.background
    }
}

/// False positives at the threshold that just reaches a recall.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct AtRecall {
    /// Recall asked for.
    pub recall: f64,
    /// Score of the detection that reaches it; None where no threshold does, and then the causes
    /// are those of all detections.
    pub threshold: Option<f64>,
    /// Number of false positives.
    pub total: usize,
    /// Their causes.
    pub causes: Causes,
}

/// Causes among the highest-scored false positives.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct TopCauses {
    /// Number of false positives looked at.
    pub top: usize,
    /// Their causes.
    pub causes: Causes,
}

/// How well faces with one label are found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Sensitivity {
    /// `height`, `blur`, `expression`, `illumination`, `occlusion` or `pose`.
    pub attribute: &'static str,
    /// The label, in words; heights in pixels.
    pub value: String,
    /// Faces that have it.
    pub faces: usize,
    /// Share of them found at any score.
    pub recall: f64,
    /// AP with precision normalised to the number of faces of the whole subset, so that rare and
    /// common labels compare (Hoiem et al., eq. 2); detections on other faces are left out.
    pub normalised_ap: f64,
}

/// The whole diagnosis.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Diagnosis {
    /// Which faces count.
    pub subset: Subset,
    /// How many they are.
    pub faces: usize,
    /// AP at IoU 0.50, 0.55 .. 0.80.
    pub ap_by_iou: Vec<ApAtIou>,
    /// At recall 10, 30, 50, 80, 90 and 95 %.
    pub false_positives_at_recall: Vec<AtRecall>,
    /// Among the top 25, 50, 100 .. false positives, and among all.
    pub top_false_positives: Vec<TopCauses>,
    /// By attribute and label; labels without a face are left out.
    pub sensitivity: Vec<Sensitivity>,
}

/// What became of a detection.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Verdict {
    Right,
    Ignored,
    Localisation,
    Duplicate,
    Background,
}

/// A detection's score and verdict; those of the whole set by falling score.
type Ranked = Vec<(f64, Verdict)>;

/// Diagnoses what `evaluator` matched. Fails where its ground truth does not know the subset.
pub fn diagnose(evaluator: &Evaluator, subset: Subset, progress: Progress) -> Result<Diagnosis> {
    evaluator.check(subset)?;
    let buckets = buckets();
    let total = IOUS.len() + 1 + buckets.len();
    let mut done = 0;
    let mut step = || {
        done += 1;
        progress(done, total);
    };

    let mut ap_by_iou = Vec::new();
    for percent in IOUS {
        let iou = percent as f64 / 100.0;
        ap_by_iou.push(ApAtIou { iou, ap: evaluator.curve(subset, iou)?.ap });
        step();
    }
    let (ranked, faces) = rank(evaluator, &|face| face.counts_in(subset));
    let false_positives_at_recall = RECALLS.map(|recall| at_recall(&ranked, faces, recall)).to_vec();
    let top_false_positives = top_causes(&ranked);
    step();
    let mut sensitivity = Vec::new();
    for (attribute, value, has) in buckets {
        let (ranked, with_label) = rank(evaluator, &|face| face.counts_in(subset) && has(face));
        if with_label > 0 {
            let (recall, normalised_ap) = normalised_ap(&ranked, with_label, faces);
            sensitivity.push(Sensitivity { attribute, value, faces: with_label, recall, normalised_ap });
        }
        step();
    }
    Ok(Diagnosis { subset, faces, ap_by_iou, false_positives_at_recall, top_false_positives, sensitivity })
}

/// Verdicts of all detections where only the faces that `counts` holds are asked for, and their number.
fn rank(evaluator: &Evaluator, counts: &dyn Fn(&Face) -> bool) -> (Ranked, usize) {
    let mut ranked = Ranked::new();
    let mut total = 0;
    for (faces, matches) in evaluator.pictures() {
        total += faces.iter().filter(|f| counts(f)).count();
        let mut found = vec![false; faces.len()];
        for m in matches {
            ranked.push((m.score, verdict(m, faces, &mut found, counts)));
        }
    }
    ranked.sort_by(|a, b| b.0.total_cmp(&a.0));
    (ranked, total)
}

fn verdict(m: &Match, faces: &[Face], found: &mut [bool], counts: &dyn Fn(&Face) -> bool) -> Verdict {
    if m.iou < BACKGROUND_IOU {
        Verdict::Background
    } else if m.iou < MATCH_IOU {
        Verdict::Localisation
    } else if !counts(&faces[m.face]) {
        Verdict::Ignored
    } else if std::mem::replace(&mut found[m.face], true) {
        Verdict::Duplicate
    } else {
        Verdict::Right
    }
}

impl Causes {
    /// Counts a verdict; true where it is a false positive.
    fn count(&mut self, verdict: Verdict) -> bool {
        match verdict {
            Verdict::Localisation => self.localisation += 1,
            Verdict::Duplicate => self.duplicate += 1,
            Verdict::Background => self.background += 1,
            Verdict::Right | Verdict::Ignored => return false,
        }
        true
    }
}

fn at_recall(ranked: &Ranked, faces: usize, recall: f64) -> AtRecall {
    // The small allowance keeps 0.1 of 10 faces at 1, not 2.
    let needed = ((recall * faces as f64 - 1e-9).ceil() as usize).max(1);
    let (mut causes, mut right) = (Causes::default(), 0);
    let mut threshold = None;
    for same_score in ranked.chunk_by(|a, b| a.0 == b.0) {
        for &(_, verdict) in same_score {
            causes.count(verdict);
            right += usize::from(verdict == Verdict::Right);
        }
        if right >= needed {
            threshold = Some(same_score[0].0);
            break;
        }
    }
    AtRecall { recall, threshold, total: causes.total(), causes }
}

fn top_causes(ranked: &Ranked) -> Vec<TopCauses> {
    let mut list = Vec::new();
    let mut causes = Causes::default();
    let mut next = 25;
    for &(_, verdict) in ranked {
        if causes.count(verdict) && causes.total() == next {
            list.push(TopCauses { top: next, causes });
            next *= 2;
        }
    }
    let top = causes.total();
    if top > 0 && list.last().is_none_or(|last| last.top < top) {
        list.push(TopCauses { top, causes });
    }
    list
}

/// Recall over all detections, and AP with precision R*N / (R*N + F), where R is the recall, F the
/// number of false positives and N `normal_faces`.
fn normalised_ap(ranked: &Ranked, faces: usize, normal_faces: usize) -> (f64, f64) {
    let counted = ranked.iter().filter(|(_, v)| *v != Verdict::Ignored);
    let mut points = curve_points(counted.map(|&(score, v)| (score, v == Verdict::Right)), faces);
    for (i, p) in points.iter_mut().enumerate() {
        let right = p.recall * faces as f64;
        let wrong = (i + 1) as f64 - right;
        let expected = p.recall * normal_faces as f64;
        p.precision = if expected > 0.0 { expected / (expected + wrong) } else { 0.0 };
    }
    (points.last().map_or(0.0, |p| p.recall), all_point_ap(&points))
}

type Bucket = (&'static str, String, Box<dyn Fn(&Face) -> bool>);

/// Every attribute and label, sizes first.
fn buckets() -> Vec<Bucket> {
    let mut list: Vec<Bucket> = Vec::new();
    for i in 0..=HEIGHTS.len() {
        let from = if i == 0 { 0.0 } else { HEIGHTS[i - 1] };
        let to = HEIGHTS.get(i).copied();
        let name = to.map_or(format!("{from} and more"), |to| format!("{from} to {to}"));
        let has = move |f: &Face| {
            let height = f.bbox.height().max(0.0);
            height >= from && to.is_none_or(|to| height < to)
        };
        list.push(("height", name, Box::new(has)));
    }
    type Label = fn(&Attributes) -> u8;
    let attributes: [(&'static str, Label, &[&str]); 5] = [
        ("blur", |a| a.blur, &["clear", "normal", "heavy"]),
        ("expression", |a| a.expression, &["typical", "exaggerated"]),
        ("illumination", |a| a.illumination, &["normal", "extreme"]),
        ("occlusion", |a| a.occlusion, &["none", "partial", "heavy"]),
        ("pose", |a| a.pose, &["typical", "atypical"]),
    ];
    for (attribute, label, words) in attributes {
        for (value, word) in words.iter().enumerate() {
            let has = move |f: &Face| label(&f.attributes) as usize == value;
            list.push((attribute, word.to_string(), Box::new(has)));
        }
    }
    list
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::detect::{BBox, Detection};
    use crate::eval::wider::{GroundTruth, Image, Predictions};

    fn face(x: f32, side: f32, blur: u8, hard: bool) -> Face {
        let bbox = BBox::from_xywh(x, 0.0, side, side);
        Face { bbox, attributes: Attributes { blur, ..Default::default() }, easy: false, medium: false, hard }
    }

    fn hit(x: f32, side: f32, score: f32) -> Detection {
        Detection { bbox: BBox::from_xywh(x, 0.0, side, side), score }
    }

    fn run(faces: Vec<Face>, hits: Vec<Detection>) -> Diagnosis {
        let image = Image { event: "e".into(), stem: "a".into(), path: String::new(), faces };
        let gt = GroundTruth { images: vec![image], graded: true };
        let mut p = Predictions::new();
        p.insert("e", "a", hits);
        let evaluator = Evaluator::new(&gt, &p, &mut |_, _| {});
        let mut last = (0, 1);
        let d = diagnose(&evaluator, Subset::Hard, &mut |done, total| last = (done, total)).unwrap();
        assert_eq!(last.0, last.1);
        d
    }

    fn scene() -> Diagnosis {
        let faces = vec![
            face(0.0, 19.0, 0, true),
            face(100.0, 39.0, 2, true),
            face(200.0, 19.0, 0, false),
            face(300.0, 5.0, 1, true),
        ];
        run(
            faces,
            vec![
                hit(0.0, 19.0, 0.9),   // right
                hit(1.0, 19.0, 0.8),   // duplicate
                hit(500.0, 19.0, 0.7), // background
                hit(14.0, 19.0, 0.6),  // 6 of 34 columns: localisation
                hit(200.0, 19.0, 0.5), // ignored
                hit(212.0, 19.0, 0.4), // 8 of 32 columns of an ignored face: localisation
                hit(100.0, 39.0, 0.3), // right
            ],
        )
    }

    #[test]
    fn false_positives_are_split_by_cause_at_each_recall() {
        let d = scene();
        assert_eq!(d.faces, 3);
        let at: Vec<(Option<f64>, usize)> = d
            .false_positives_at_recall
            .iter()
            .map(|a| (a.threshold.map(|t| (t * 10.0).round()), a.total))
            .collect();
        // 10 and 30 % of 3 faces need one, 50 % needs two, more is never reached.
        assert_eq!(at, [(Some(9.0), 0), (Some(9.0), 0), (Some(3.0), 4), (None, 4), (None, 4), (None, 4)]);
        let causes = Causes { localisation: 2, duplicate: 1, background: 1 };
        assert_eq!(d.false_positives_at_recall[2].causes, causes);
        assert_eq!(d.top_false_positives, [TopCauses { top: 4, causes }]);
    }

    #[test]
    fn sensitivity_counts_only_the_labelled_faces() {
        let d = scene();
        let find = |attribute: &str, value: &str| {
            d.sensitivity.iter().find(|s| s.attribute == attribute && s.value == value).cloned()
        };
        let clear = find("blur", "clear").unwrap();
        assert_eq!((clear.faces, clear.recall, clear.normalised_ap), (1, 1.0, 1.0));
        // Found last, behind the background and two loose boxes; the duplicate lies on another
        // face and drops out: precision 3 / (3 + 3) with 3 faces in the subset.
        let heavy = find("blur", "heavy").unwrap();
        assert_eq!((heavy.faces, heavy.recall, heavy.normalised_ap), (1, 1.0, 0.5));
        let missed = find("height", "0 to 10").unwrap();
        assert_eq!((missed.faces, missed.recall, missed.normalised_ap), (1, 0.0, 0.0));
        assert_eq!(find("height", "10 to 20").unwrap().faces, 1);
        assert_eq!(find("height", "300 and more"), None);
        assert_eq!(find("pose", "typical").unwrap().faces, 3);
    }

    #[test]
    fn top_lists_double_and_end_with_all() {
        let ranked: Ranked = (0..60).map(|i| (-(i as f64), Verdict::Background)).collect();
        let tops: Vec<usize> = top_causes(&ranked).iter().map(|t| t.top).collect();
        assert_eq!(tops, [25, 50, 60]);
        assert_eq!(top_causes(&ranked[..50].to_vec()).len(), 2);
        assert!(top_causes(&Ranked::new()).is_empty());
    }

    #[test]
    fn looser_detections_lose_ap_as_the_iou_rises() {
        // Sides 20, shifted by 3: 17 of 23 columns, IoU 0.739.
        let d = run(vec![face(0.0, 19.0, 0, true)], vec![hit(3.0, 19.0, 0.5)]);
        let aps: Vec<f64> = d.ap_by_iou.iter().map(|a| a.ap).collect();
        assert_eq!(aps, [1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0]);
    }
}
