use super::*;
use crate::detect::{BBox, Detection};
use proptest::prelude::*;

fn face(x: f32, hard: bool) -> Face {
    let bbox = BBox::from_xywh(x, 0.0, 9.0, 9.0);
    Face { bbox, attributes: Attributes::default(), easy: false, medium: false, hard }
}

fn hit(x: f32, score: f32) -> Detection {
    Detection { bbox: BBox::from_xywh(x, 0.0, 9.0, 9.0), score }
}

fn truth(pictures: &[Vec<Face>]) -> GroundTruth {
    let image = |(i, faces): (usize, &Vec<Face>)| Image {
        event: "e".into(),
        stem: i.to_string(),
        path: String::new(),
        faces: faces.clone(),
    };
    GroundTruth { images: pictures.iter().enumerate().map(image).collect(), graded: true }
}

fn predictions(pictures: &[Vec<Detection>]) -> Predictions {
    let mut p = Predictions::new();
    for (i, detections) in pictures.iter().enumerate() {
        p.insert("e", &i.to_string(), detections.clone());
    }
    p
}

fn curve(gt: &[Vec<Face>], p: &[Vec<Detection>], subset: Subset) -> PrCurve {
    let gt = truth(gt);
    let evaluator = Evaluator::new(&gt, &predictions(p), &mut |_, _| {});
    evaluator.curve(subset, MATCH_IOU).unwrap()
}

/// Operating points without repeats, to compare by hand.
fn steps(curve: &PrCurve) -> Vec<(f64, f64)> {
    let mut all: Vec<(f64, f64)> = curve.points.iter().map(|p| (p.recall, p.precision)).collect();
    all.dedup();
    all
}

#[test]
fn ignored_faces_absorb_and_duplicates_cost_precision() {
    let gt = [vec![face(0.0, true), face(100.0, false), face(200.0, true)]];
    let p = [vec![
        hit(0.0, 1.0),   // finds face 0
        hit(100.0, 0.9), // on the ignored face: no proposal
        hit(0.0, 0.8),   // duplicate: a proposal without recall
        hit(400.0, 0.5), // background
        hit(200.0, 0.0), // finds face 2, at the last threshold
    ]];
    let hard = curve(&gt, &p, Subset::Hard);
    assert_eq!(hard.faces, 2);
    assert_eq!(steps(&hard), [(0.5, 1.0), (0.5, 0.5), (0.5, 1.0 / 3.0), (1.0, 0.5)]);
    assert!((hard.ap - (0.5 + 0.5 * 0.5)).abs() < 1e-12);
    // For All the middle face is one more right answer.
    let all = curve(&gt, &p, Subset::All);
    assert_eq!(
        steps(&all),
        [(1.0 / 3.0, 1.0), (2.0 / 3.0, 1.0), (2.0 / 3.0, 2.0 / 3.0), (2.0 / 3.0, 0.5), (1.0, 0.6)]
    );
}

#[test]
fn the_best_box_decides_even_when_taken() {
    // Both detections overlap face 0 most; the second is a duplicate though face 1 is free and
    // overlaps it by more than half: 10 x 10 boxes shifted by 3 share 7 of 13 columns.
    let gt = [vec![face(0.0, true), face(3.0, true)]];
    let p = [vec![hit(0.0, 1.0), hit(1.0, 0.5)]];
    assert_eq!(steps(&curve(&gt, &p, Subset::Hard)), [(0.5, 1.0), (0.5, 0.5)]);
}

#[test]
fn iou_of_one_half_is_a_match() {
    // 10 x 10 inside 10 x 20 pixels: exactly 0.5.
    let mut tall = face(0.0, true);
    tall.bbox.y2 = 19.0;
    let gt = [vec![tall]];
    assert_eq!(curve(&gt, &[vec![hit(0.0, 1.0)]], Subset::Hard).ap, 1.0);
    let gt = truth(&gt);
    let p = predictions(&[vec![hit(0.0, 1.0)]]);
    let evaluator = Evaluator::new(&gt, &p, &mut |_, _| {});
    assert_eq!(evaluator.curve(Subset::Hard, 0.55).unwrap().ap, 0.0);
}

#[test]
fn pictures_without_boxes_are_skipped_and_without_detections_missed() {
    let gt = [vec![face(0.0, true)], vec![], vec![face(0.0, true)]];
    let p = [vec![hit(0.0, 0.5)], vec![hit(50.0, 1.0)], vec![]];
    let c = curve(&gt, &p, Subset::Hard);
    // The score of the skipped picture still stretches the range: 0.5 falls to 0.
    assert_eq!(steps(&c), [(0.0, 0.0), (0.5, 1.0)]);
    assert_eq!(c.points[998].recall, 0.0);
    // A picture whose boxes are all ignored still yields false positives.
    let gt = [vec![face(0.0, true)], vec![face(0.0, false)]];
    let p = [vec![hit(0.0, 1.0)], vec![hit(50.0, 1.0)]];
    assert_eq!(steps(&curve(&gt, &p, Subset::Hard)), [(1.0, 0.5)]);
}

#[test]
fn thresholds_are_in_the_detectors_units() {
    let c = curve(&[vec![face(0.0, true)]], &[vec![hit(0.0, 6.0), hit(50.0, -4.0)]], Subset::Hard);
    assert!((c.points[0].threshold.unwrap() - 5.99).abs() < 1e-9);
    assert_eq!(c.points[999].threshold, Some(-4.0));
    // Without detections there is no range, and no recall.
    let c = curve(&[vec![face(0.0, true)]], &[vec![]], Subset::Hard);
    assert_eq!((c.ap, c.points[0].threshold), (0.0, None));
}

#[test]
fn ungraded_truth_scores_all_and_refuses_the_rest() {
    let mut gt = truth(&[vec![face(0.0, false)]]);
    gt.graded = false;
    let p = predictions(&[vec![hit(0.0, 1.0)]]);
    let evaluator = Evaluator::new(&gt, &p, &mut |_, _| {});
    assert!(matches!(evaluator.curve(Subset::Easy, MATCH_IOU), Err(Error::InvalidArgument(_))));
    let report = evaluator.report().unwrap();
    assert_eq!((report.easy, report.all.ap), (None, 1.0));
}

/// Faces on a grid, with detections jittered around some and elsewhere.
fn scene() -> impl Strategy<Value = (Vec<Vec<Face>>, Vec<Vec<Detection>>)> {
    let faces = proptest::collection::vec((0u8..40, any::<bool>()), 0..8);
    let hits = proptest::collection::vec((0u8..120, 0u8..=20), 0..12);
    proptest::collection::vec((faces, hits), 1..5).prop_map(|pictures| {
        let split = pictures.into_iter().map(|(faces, hits)| {
            let faces = faces.into_iter().map(|(x, hard)| face(x as f32 * 3.0, hard)).collect();
            let hits = hits.into_iter().map(|(x, s)| hit(x as f32, s as f32 / 20.0)).collect();
            (faces, hits)
        });
        split.unzip()
    })
}

proptest! {
    #[test]
    fn curves_stay_within_unit_and_recall_rises((gt, p) in scene()) {
        for subset in [Subset::Hard, Subset::All] {
            let c = curve(&gt, &p, subset);
            prop_assert!((0.0..=1.0 + 1e-9).contains(&c.ap));
            for pair in c.points.windows(2) {
                prop_assert!(pair[0].recall <= pair[1].recall);
            }
            prop_assert!(c.points.iter().all(|p| p.recall <= 1.0 && p.precision <= 1.0));
        }
    }

    #[test]
    fn a_perfect_detection_never_lowers_recall((gt, mut p) in scene(), picture: usize, which: usize) {
        let before = curve(&gt, &p, Subset::All);
        let picture = picture % gt.len();
        prop_assume!(!gt[picture].is_empty());
        let bbox = gt[picture][which % gt[picture].len()].bbox;
        p[picture].push(Detection { bbox, score: 1.0 });
        let after = curve(&gt, &p, Subset::All);
        prop_assert!(after.points[999].recall >= before.points[999].recall);
    }
}
