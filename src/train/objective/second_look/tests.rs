use super::*;
use crate::detect::group_sampling::GroupSamplingConfig;
use crate::nets::refineface::FirstStep;
use crate::train::losses::{BoxLoss, ClassLoss, Focal, NoOverlap};
use crate::train::matching::{FaceBox, MatchingRecipe};
use crate::train::objective::{Layout, Level, TwoStep};
use crate::train::sampler::SamplerRecipe;

fn face(x: f32, y: f32, w: f32, h: f32) -> FaceBox {
    FaceBox { bbox: BBox::from_xywh(x, y, w, h), ignore: false }
}

fn proposal(x: f32, y: f32, w: f32, h: f32, score: f32, level: usize) -> Proposal {
    Proposal { bbox: BBox::from_xywh(x, y, w, h), score, level }
}

/// Levels of stride 8 with anchors of 16 px and of stride 16 with anchors of 40 px, asked once.
fn supervision() -> FeatureSupervision {
    let level = |stride, side| {
        (Level { stride, anchors: vec![[side; 2]], layout: Layout::Apart { logits: 1 } }, None::<FirstStep>)
    };
    let thresholds = MatchingRecipe::Thresholds { negative: 0.4, positive: 0.5, force_best: false };
    let detector = TwoStep {
        levels: vec![level(8, 16.0), level(16, 40.0)],
        first: thresholds,
        second: thresholds,
        survives: 0.0,
        mining: None,
        sampler: None,
        loss: LossRecipe {
            classification: ClassLoss::Focal { alpha: 0.25, gamma: 2.0 },
            boxes: BoxLoss::SmoothL1 { beta: 1.0 },
            box_weight: 1.0,
            margin: 15.0,
        },
    };
    FeatureSupervision { detector, recipe: FeatureSupervisionRecipe::default(), focal: Focal::default() }
}

#[test]
fn the_best_boxes_stay_that_overlap_no_better_one() {
    let nan = f32::NAN;
    let all = vec![
        proposal(0.0, 0.0, 10.0, 10.0, 0.5, 0),
        // IoU 9 / 11 with the first, which is better; 0.6 with the one after it.
        proposal(1.0, 0.0, 10.0, 10.0, 0.4, 1),
        proposal(2.5, 0.0, 10.0, 10.0, 0.45, 0),
        proposal(50.0, 0.0, 10.0, 10.0, nan, 0),
        proposal(50.0, 0.0, 0.0, 10.0, 9.0, 0),
        proposal(nan, 0.0, 10.0, 10.0, 9.0, 0),
        proposal(90.0, 0.0, 10.0, 10.0, 0.1, 1),
        proposal(70.0, 0.0, 10.0, 10.0, 0.1, 0),
    ];
    let kept = |before, limit| -> Vec<usize> {
        let kept = suppressed(all.clone(), before, 0.7, limit);
        kept.iter().map(|k| all.iter().position(|p| p == k).unwrap()).collect()
    };
    assert_eq!(kept(100, 100), [0, 2, 6, 7], "equal ones in their order");
    assert_eq!(kept(100, 3), [0, 2, 6]);
    assert_eq!(kept(3, 100), [0, 2], "the fourth best did not enter");
}

#[test]
fn feature_supervision_looks_at_faces_and_at_detections_as_suppression_leaves_them() {
    let s = supervision();
    let crowd = FaceBox { ignore: true, ..face(100.0, 0.0, 40.0, 40.0) };
    let faces = [face(0.0, 0.0, 20.0, 20.0), face(200.0, 0.0, 60.0, 50.0), crowd];
    let found = vec![
        // On the first face, IoU 19 / 21: suppressed by nothing, since the face itself is no detection.
        proposal(1.0, 0.0, 20.0, 20.0, 0.9, 0),
        // IoU 0.6 with it: neither face nor background.
        proposal(0.0, 5.0, 20.0, 20.0, 0.8, 0),
        // IoU 18 / 22 with the best: suppressed.
        proposal(3.0, 0.0, 20.0, 20.0, 0.7, 1),
        // Background, in the crowd, and background that is looked at last.
        proposal(300.0, 0.0, 30.0, 30.0, 0.6, 1),
        proposal(110.0, 10.0, 20.0, 20.0, 0.5, 0),
        proposal(400.0, 0.0, 30.0, 30.0, 0.4, 0),
    ];
    let levels_and_faces = |s: &FeatureSupervision| -> Vec<(f32, usize, bool)> {
        let chosen = s.of_picture(found.clone(), &faces);
        chosen.into_iter().map(|(p, face)| (p.bbox.x1, p.level, face.is_some())).collect()
    };
    // 20 px are nearer to 16 than to 40 in octaves, 55 to 40.
    let expected = [(0.0, 0, true), (200.0, 1, true), (1.0, 0, true), (300.0, 1, false), (400.0, 0, false)];
    assert_eq!(levels_and_faces(&s), expected);
    let mut few = s.clone();
    few.recipe.proposals = 5;
    // Two faces and the three best detections that are left, of which one is neither.
    assert_eq!(levels_and_faces(&few), expected[..4]);
    few.recipe.proposals = 1;
    assert_eq!(levels_and_faces(&few), expected[..1]);
}

#[test]
fn feature_supervisions_loss_is_the_focal_loss_over_the_batchs_positives() {
    let mut s = supervision();
    s.recipe.weight = 0.5;
    let look = |image, face, class_weight| Look {
        image,
        bbox: BBox::new(0.0, 0.0, 8.0, 8.0),
        face,
        class_weight,
        box_weight: 0.0,
    };
    // Outputs that mean nothing but the anchors: of each picture the faces alone are chosen.
    let outputs: Vec<Tensor> = [(1, 4), (4, 4), (1, 2), (4, 2)]
        .iter()
        .map(|&(c, side)| {
            let fill = if c == 1 { f32::NAN } else { 0.0 };
            let shape = Shape::new(2, c, side, side);
            Tensor { shape, data: vec![fill; shape.len()] }
        })
        .collect();
    let annotated = |f: FaceBox| Annotated { bbox: f.bbox, ignore: f.ignore };
    let faces =
        [vec![face(0.0, 0.0, 16.0, 16.0), face(8.0, 8.0, 16.0, 18.0)], vec![face(2.0, 2.0, 9.0, 9.0)]]
            .map(|faces| faces.into_iter().map(annotated).collect::<Vec<_>>());
    let looks = s.choose(&outputs, &faces, 2, Whole::at_hand(2)).unwrap();
    let weights =
        |l: &[Look]| l.iter().map(|l| (l.image, l.face.is_some(), l.class_weight)).collect::<Vec<_>>();
    let share = 0.5 / 3.0;
    assert_eq!(weights(&looks.inputs()[0]), [(0, true, share), (0, true, share), (1, true, share)]);
    // A level without any has one that counts for nothing.
    assert_eq!(weights(&looks.inputs()[1]), [(0, false, 0.0)]);
    assert_eq!(looks.boxes()[0].data[5..10], [0.0, 8.0, 8.0, 24.0, 26.0]);
    // Two positives: a face at logit 0, background at logit ln 3 (p 3/4), each over 2 and halved.
    let looks = Looks::new(vec![
        vec![look(0, Some(BBox::new(0.0, 0.0, 9.0, 9.0)), 0.25), look(0, None, 0.25)],
        vec![look(1, Some(BBox::new(0.0, 0.0, 9.0, 9.0)), 0.25)],
    ]);
    let logits = |data: &[f32]| Tensor { shape: Shape::new(data.len(), 1, 1, 1), data: data.to_vec() };
    let second = SecondLook::FeatureSupervision(s);
    let (losses, gradients) = second.judge(&looks, &[logits(&[0.0, 3f32.ln()]), logits(&[0.0])]).unwrap();
    // No margin, whatever the detector's: -0.25 (1 - 1/2)^2 ln 1/2 twice, -0.75 (3/4)^2 ln 1/4.
    let expected = 0.25 * (2.0 * 0.25 * 0.25 * 2f64.ln() + 0.75 * 0.5625 * 4f64.ln());
    assert!((losses.class - expected).abs() < 1e-6, "{losses:?}, expected {expected}");
    assert_eq!((losses.boxes, losses.matched, losses.faces), (0.0, 0, 0));
    assert!(gradients[0].data[0] < 0.0 && gradients[0].data[1] > 0.0);
    assert!(second.judge(&looks, &[logits(&[0.0])]).is_err(), "an output is missing");
}

fn fast_rcnn(samples: usize) -> GroupedFastRcnn {
    let loss = LossRecipe {
        classification: ClassLoss::Softmax {},
        boxes: BoxLoss::LeastSquareIou { no_overlap: NoOverlap::Zero },
        box_weight: 2.0,
        margin: 0.0,
    };
    let sampler = SamplerRecipe { samples, ..SamplerRecipe::default() };
    let recipe = FastRcnnRecipe { sampler, ..FastRcnnRecipe::default() };
    let detector = GroupSamplingConfig::named("fpn-finest-rcnn-r18").unwrap();
    GroupedFastRcnn { detector, recipe, loss }
}

/// Two scales have boxes, 16 and 64: of each four are drawn, one positive to three negatives as far as there are any.
#[test]
fn proposals_are_sampled_in_equal_numbers_for_each_reference_scale() {
    let s = fast_rcnn(4);
    let faces = [face(0.0, 0.0, 16.0, 16.0), face(0.0, 100.0, 64.0, 64.0)];
    // Small ones far worse than large ones.
    let mut proposed: Vec<Proposal> =
        (0..9).map(|i| proposal(200.0 + 30.0 * i as f32, 0.0, 15.0, 15.0, 0.01, 0)).collect();
    proposed.extend((0..6).map(|i| proposal(200.0 + 90.0 * i as f32, 200.0, 70.0, 60.0, 0.9, 0)));
    // Of the large face: IoU 56 / 72, a positive; 48 / 80, another; 46 / 82, neither (0.56).
    proposed.extend([8.0, 16.0, 18.0].map(|x| proposal(x, 100.0, 64.0, 64.0, 0.95, 0)));
    for seed in 0..20 {
        let looks = s.of_picture(proposed.clone(), &faces, &mut Rng::new(seed));
        let of = |small: bool| looks.iter().filter(|l| (l.bbox.width() < 20.0) == small).collect::<Vec<_>>();
        for (small, face) in [(true, &faces[0]), (false, &faces[1])] {
            let group = of(small);
            let positives: Vec<_> = group.iter().filter(|l| l.face.is_some()).collect();
            assert_eq!((group.len(), positives.len()), (4, 1), "{group:?}");
            assert_eq!(positives[0].face, Some(face.bbox));
            assert!(group.iter().all(|l| l.class_weight == 0.25 && l.box_weight == 1.0), "{group:?}");
            assert!(group.iter().all(|l| l.bbox.x1 != 18.0), "it is neither");
        }
    }
}

/// Eq. 2 on one group of two boxes: mean of the cross-entropies, and the positive's squared distance from an IoU of 1.
#[test]
fn the_second_stage_is_classified_and_moved_from_its_proposal() {
    let s = fast_rcnn(4);
    let target = BBox::new(0.0, 0.0, 20.0, 20.0);
    let look = |bbox, face, box_weight| Look { image: 0, bbox, face, class_weight: 0.5, box_weight };
    let looks = Looks::new(vec![vec![
        look(BBox::new(4.0, 0.0, 24.0, 20.0), Some(target), 1.0),
        look(BBox::new(50.0, 0.0, 70.0, 20.0), None, 1.0),
    ]]);
    let second = SecondLook::FastRcnn(s);
    let judged = |t: f32| {
        let shape = |c| Shape::new(2, c, 1, 1);
        let class = Tensor { shape: shape(2), data: vec![0.0, 3f32.ln(), 0.0, 0.0] };
        let boxes = Tensor { shape: shape(4), data: vec![t, 0.0, 0.0, 0.0, 9.0, 9.0, 9.0, 9.0] };
        second.judge(&looks, &[class, boxes]).unwrap()
    };
    let (losses, gradients) = judged(0.0);
    let class = 0.5 * (-(0.75f64.ln()) + 2f64.ln());
    let missing = 1.0 - 16.0 / 24.0f64;
    assert!((losses.class - class).abs() < 1e-6, "{losses:?}");
    assert!((losses.boxes - missing * missing).abs() < 1e-6, "{losses:?}");
    assert!(gradients[1].data[0] > 0.0 && gradients[1].data[4..].iter().all(|v| *v == 0.0));
    // Two tenths of 20 px: with a variance of 0.1 an offset of -2.
    let (losses, _) = judged(-2.0);
    assert!(losses.boxes.abs() < 1e-9, "{losses:?}");
}

#[test]
fn settings_outside_their_range_are_refused() {
    let fsm = FeatureSupervisionRecipe::default();
    assert!(fsm.check().is_ok() && FastRcnnRecipe::default().check().is_ok());
    for bad in [
        FeatureSupervisionRecipe { nms: 1.5, ..fsm },
        FeatureSupervisionRecipe { proposals: 0, ..fsm },
        FeatureSupervisionRecipe { weight: f32::NAN, ..fsm },
    ] {
        assert!(bad.check().unwrap_err().to_string().contains("feature-supervision"));
    }
    let rcnn = FastRcnnRecipe::default();
    let ohem = SamplerRecipe { miner: crate::train::sampler::Miner::Ohem {}, ..rcnn.sampler };
    for bad in [
        FastRcnnRecipe { nms: -0.1, ..rcnn },
        FastRcnnRecipe { proposals: 0, ..rcnn },
        FastRcnnRecipe { before_nms: 0, ..rcnn },
        FastRcnnRecipe { sampler: ohem, ..rcnn },
    ] {
        assert!(bad.check().unwrap_err().to_string().contains("second-stage"));
    }
}
