//! From outputs and faces to the loss: its gradients are those of the losses, on any number of threads, whatever the outputs.
#![cfg(feature = "train")]

use farface::detect::BBox;
use farface::graph::init::Rng;
use farface::nets::refineface::FirstStep;
use farface::shape::{Shape, Tensor};
use farface::train::data::Annotated;
use farface::train::losses::{BoxLoss, ClassLoss, LossRecipe, NoOverlap};
use farface::train::matching::{AnchorMining, MatchingRecipe};
use farface::train::objective::{Layout, Level, Losses, Objective, PyramidAnchors, TwoStep, Whole};
use farface::train::sampler::{Miner, Reduction, SamplerRecipe};
use std::ops::Range;
use std::sync::{Barrier, Mutex};

/// Two levels on pictures of 64 x 64 pixels.
fn objective(
    classification: ClassLoss,
    boxes: BoxLoss,
    mining: Option<AnchorMining>,
    sampler: SamplerRecipe,
) -> Objective {
    let layout = if classification.logits() == 2 { Layout::Apart { logits: 2 } } else { Layout::Joint };
    let level =
        |stride, sizes: &[f32]| Level { stride, anchors: sizes.iter().map(|&s| [s, s]).collect(), layout };
    let objective = Objective {
        levels: vec![level(16, &[16.0, 24.0]), level(32, &[40.0])],
        variances: [0.1, 0.2],
        matching: MatchingRecipe::Thresholds { negative: 0.3, positive: 0.4, force_best: true },
        mining,
        sampler: Some(sampler),
        loss: LossRecipe { classification, boxes, box_weight: 1.7, margin: 3.0 },
    };
    objective.check().unwrap();
    objective
}

/// Values of an anchor in each output of a level.
fn channels(layout: Layout) -> Vec<usize> {
    match layout {
        Layout::Joint | Layout::ByKind => vec![5],
        Layout::Apart { logits } => vec![logits, 4],
    }
}

/// Random outputs for `images` pictures, and faces of which some are found by anchors, some by mined ones alone, and one
/// is ignored.
fn batch(objective: &Objective, images: usize, rng: &mut Rng) -> (Vec<Tensor>, Vec<Vec<Annotated>>) {
    let mut outputs = Vec::new();
    for l in &objective.levels {
        for values in channels(l.layout) {
            let shape = Shape::new(images, values * l.anchors.len(), 64 / l.stride, 64 / l.stride);
            let data = (0..shape.len()).map(|_| rng.range(-1.5, 1.5)).collect();
            outputs.push(Tensor { shape, data });
        }
    }
    let face =
        |x: f32, y: f32, w: f32, h: f32, ignore| Annotated { bbox: BBox::from_xywh(x, y, w, h), ignore };
    let faces = (0..images).map(|_| {
        let [x, y] = [rng.range(0.0, 8.0), rng.range(0.0, 8.0)];
        vec![
            face(2.0 + x, 3.0 + y, 19.0, 22.0, false),
            face(30.0 + y, 36.0 - x, 27.0, 25.0, false),
            face(10.0 + x, 44.0 + y, 11.0, 12.0, false),
            face(44.0, 4.0, 18.0, 18.0, true),
        ]
    });
    (outputs, faces.collect())
}

fn generator(n: usize) -> Rng {
    Rng::new(77 + n as u64)
}

fn cases() -> Vec<(&'static str, Objective)> {
    let all = |grouped| SamplerRecipe { miner: Miner::All {}, grouped, ..SamplerRecipe::default() };
    let mining = Some(AnchorMining { anchors: 3, overlap: 0.35 });
    let ln = BoxLoss::NegLnIou { no_overlap: NoOverlap::Zero };
    let smooth = BoxLoss::SmoothL1 { beta: 0.7 };
    let square = BoxLoss::LeastSquareIou { no_overlap: NoOverlap::Zero };
    let focal = ClassLoss::Focal { alpha: 0.25, gamma: 2.0 };
    let aware = ClassLoss::RegressionAwareFocal { alpha: 0.25, gamma: 2.0 };
    let quality = ClassLoss::QualityFocal { beta: 2.0 };
    let everything = |o: Objective| Objective { sampler: None, ..o };
    let apart = |mut o: Objective| {
        o.levels.iter_mut().for_each(|l| l.layout = Layout::Apart { logits: 1 });
        o
    };
    let by_kind = |mut o: Objective| {
        o.levels.iter_mut().for_each(|l| l.layout = Layout::ByKind);
        o
    };
    let sum = SamplerRecipe { reduction: Reduction::Sum, ..all(false) };
    vec![
        ("sigmoid", objective(ClassLoss::Sigmoid {}, smooth, None, all(false))),
        ("sigmoid in groups", objective(ClassLoss::Sigmoid {}, square, None, all(true))),
        ("sigmoid summed up, offsets by kind", by_kind(objective(ClassLoss::Sigmoid {}, smooth, None, sum))),
        ("softmax", objective(ClassLoss::Softmax {}, smooth, None, all(false))),
        ("softmax in groups", objective(ClassLoss::Softmax {}, square, None, all(true))),
        ("focal", objective(focal, ln, None, all(false))),
        ("focal over all", everything(objective(focal, ln, None, all(false)))),
        ("focal over all with mined anchors", everything(objective(focal, ln, mining, all(false)))),
        ("focal with mined anchors", objective(focal, ln, mining, all(false))),
        ("regression-aware focal", objective(aware, ln, mining, SamplerRecipe::default())),
        (
            "regression-aware focal, outputs apart",
            apart(objective(aware, ln, mining, SamplerRecipe::default())),
        ),
        ("quality focal", objective(quality, ln, None, SamplerRecipe::default())),
        ("quality focal with mined anchors", objective(quality, ln, mining, SamplerRecipe::default())),
    ]
}

/// Holds what two judges make of the first picture and of the others, counting together, to what one makes of all.
fn check_parts(
    what: &str,
    (outputs, faces): &(Vec<Tensor>, Vec<Vec<Annotated>>),
    (losses, gradients): (Losses, Vec<Tensor>),
    judge: impl Fn(&[Tensor], &[Vec<Annotated>], usize, Whole<'_>) -> (Losses, Vec<Tensor>) + Sync,
) {
    let (counts, all) = (Mutex::new([0; 3]), Barrier::new(2));
    let sum = |own: [usize; 3]| {
        let add = |counts: &mut [usize; 3]| counts.iter_mut().zip(own).for_each(|(to, own)| *to += own);
        add(&mut counts.lock().unwrap());
        all.wait();
        Ok(*counts.lock().unwrap())
    };
    let part = |range: Range<usize>| {
        let cut = |t: &Tensor| {
            let image = t.data.len() / t.shape.n;
            let shape = Shape { n: range.len(), ..t.shape };
            Tensor { shape, data: t.data[image * range.start..image * range.end].to_vec() }
        };
        let outputs: Vec<Tensor> = outputs.iter().map(cut).collect();
        judge(&outputs, &faces[range.clone()], range.start, Whole::shared(faces.len(), &sum))
    };
    let parts = std::thread::scope(|scope| {
        let first = scope.spawn(|| part(0..1));
        let second = part(1..faces.len());
        [first.join().unwrap(), second]
    });
    for (i, gradient) in gradients.iter().enumerate() {
        let got = [&parts[0].1[i].data[..], &parts[1].1[i].data].concat();
        assert!(got == gradient.data, "{what}: gradient of output {i}");
    }
    let got = Losses::of_parts(&[parts[0].0, parts[1].0]);
    let off = [(got.class, losses.class), (got.boxes, losses.boxes), (got.iou, losses.iou)];
    assert!(off.iter().all(|(got, e)| (got - e).abs() <= 1e-12 * e.abs()), "{what}: {got:?}, {losses:?}");
    let counts = |l: Losses| [l.matched, l.mined, l.faces];
    assert_eq!(counts(got), counts(losses), "{what}");
}

#[test]
fn parts_of_a_batch_that_count_together_are_the_batch() {
    for (what, o) in cases() {
        let (outputs, faces) = batch(&o, 3, &mut Rng::new(5));
        let whole = o.judge(&outputs, &faces, generator, 1).unwrap();
        check_parts(what, &(outputs, faces), whole, |outputs, faces, first, whole| {
            o.judge_part(outputs, faces, &[], |n| generator(first + n), 1, whole).unwrap()
        });
    }
    let thresholds = MatchingRecipe::Thresholds { negative: 0.3, positive: 0.35, force_best: false };
    let sampler = SamplerRecipe { miner: Miner::All {}, ..SamplerRecipe::default() };
    for sampler in [None, Some(sampler)] {
        let o = TwoStep { sampler, ..two_step(thresholds) };
        let (outputs, faces) = two_step_batch(&mut Rng::new(9));
        let whole = o.judge(&outputs, &faces, generator, 1).unwrap();
        check_parts("two steps", &(outputs, faces), whole, |outputs, faces, first, whole| {
            o.judge_part(outputs, faces, |n| generator(first + n), 1, whole).unwrap()
        });
    }
}

/// The loss of classification and the weighted one of the boxes.
fn parts(o: &Objective, outputs: &[Tensor], faces: &[Vec<Annotated>]) -> ([f64; 2], Losses) {
    let losses = o.judge(outputs, faces, generator, 1).unwrap().0;
    ([losses.class, losses.boxes * f64::from(o.loss.box_weight)], losses)
}

/// The roles of anchors, F_i and a face's quality depend on the offsets, but no gradient flows that way (they are constants
/// in the papers' losses). So a logit is compared with the classification, an offset with the boxes, and where mining chooses otherwise on
/// one side of a point there is nothing to compare.
#[test]
fn the_objectives_gradients_are_those_of_its_losses() {
    for (name, o) in cases() {
        let (outputs, faces) = batch(&o, 2, &mut Rng::new(3));
        let (losses, gradients) = o.judge(&outputs, &faces, generator, 1).unwrap();
        assert!(losses.matched > 4 && losses.faces == 6, "{name}: {losses:?}");
        assert_eq!(losses.mined > 0, o.mining.is_some(), "{name}: {losses:?}");
        let h = 4e-3;
        let (mut compared, mut switched, mut folds) = ([0, 0], 0, 0);
        let places =
            o.levels.iter().flat_map(|l| channels(l.layout).into_iter().map(|c| (c, l.anchors.len())));
        for (level, (output, (values, anchors))) in outputs.iter().zip(places).enumerate() {
            for i in 0..output.data.len() {
                let offset = match values {
                    5 => usize::from(i % (5 * anchors) >= anchors),
                    values => usize::from(values == 4),
                };
                let at = |d: f32| {
                    let mut moved = outputs.clone();
                    moved[level].data[i] += d;
                    parts(&o, &moved, &faces)
                };
                let ((above, a), (below, b)) = (at(h), at(-h));
                let counts = |l: &Losses| (l.matched, l.mined);
                if counts(&a) != counts(&losses) || counts(&b) != counts(&losses) {
                    switched += 1;
                    continue;
                }
                let expected = (above[offset] - below[offset]) / f64::from(2.0 * h);
                let gradient = f64::from(gradients[level].data[i]);
                let close = |expected: f64| (gradient - expected).abs() <= 2e-3 * expected.abs() + 1e-4;
                // An IoU has a fold where two edges meet: there either side's slope is the gradient.
                let here = parts(&o, &outputs, &faces).0[offset];
                let sides = [above[offset] - here, here - below[offset]].map(|d| d / f64::from(h));
                let folded = (sides[0] - sides[1]).abs() > 0.02 * sides[0].abs().max(sides[1].abs());
                assert!(
                    close(expected) || (folded && sides.into_iter().any(close)),
                    "{name}, output {level}, value {i}: gradient {gradient}, finite differences {expected}, {sides:?}"
                );
                folds += usize::from(!close(expected));
                compared[offset] += usize::from(gradient != 0.0);
                if offset == 0 {
                    assert_eq!(above[1], below[1], "{name}: a logit moved the boxes' loss");
                } else if o.mining.is_none()
                    && !matches!(o.loss.classification, ClassLoss::QualityFocal { .. })
                {
                    assert_eq!(above[0], below[0], "{name}: an offset moved the classification");
                }
            }
        }
        assert!(
            compared[0] > 50 && compared[1] > 16 && switched < 10 && folds < 4,
            "{name}: {compared:?}, {switched} switched, {folds} folds"
        );
    }
}

/// Worked by hand: anchors of 8 x 8 pixels at (0, 0), (8, 0), (0, 8) and (8, 8), and a face at (2, 0) to (10, 8), which the
/// first one meets with an IoU of 48 / 80 and the second with 16 / 112.
#[test]
fn the_quality_focal_losss_target_is_the_iou_of_the_decoded_box() {
    let mut o = objective(
        ClassLoss::QualityFocal { beta: 2.0 },
        BoxLoss::NegLnIou { no_overlap: NoOverlap::Zero },
        None,
        SamplerRecipe::default(),
    );
    o.levels = vec![Level { stride: 8, anchors: vec![[8.0, 8.0]], layout: Layout::Joint }];
    o.loss.margin = 0.0;
    let face = Annotated { bbox: BBox::new(2.0, 0.0, 10.0, 8.0), ignore: false };
    let background = 1.0 / (1.0 + 1f64.exp());
    // Moved by 0, 1 and 2 pixels to the right: 0.1 * 8 pixels is an offset of 1.
    for (offset, iou) in [(0.0, 48.0 / 80.0), (1.25, 56.0 / 72.0), (2.5, 1.0)] {
        let mut output = Tensor::zeros(Shape::new(1, 5, 2, 2));
        output.data[1] = offset;
        for cell in 1..4 {
            output.data[5 * cell] = -1.0;
        }
        let (losses, _) = o.judge(&[output], &[vec![face]], generator, 1).unwrap();
        // A logit of 0 says 1/2, whose cross-entropy with any target is ln 2.
        let class = (iou - 0.5f64).powi(2) * 2f64.ln() + 3.0 * background.powi(2) * -(1.0 - background).ln();
        assert!((losses.class - class).abs() < 1e-6, "offset {offset}: {} {class}", losses.class);
        assert!((losses.boxes + iou.ln()).abs() < 1e-6 && (losses.iou - iou).abs() < 1e-6, "{losses:?}");
        assert_eq!((losses.matched, losses.mined, losses.faces), (1, 0, 1));
    }
}

/// Worked by hand: four anchors of 8 x 8 pixels on a picture that fills 12 x 16 of its 16 x 16, logits of 0, each ln 2 of loss.
/// The face is on the first anchor. The two on the right reach beyond the picture.
#[test]
fn anchors_that_cross_the_pictures_border_are_left_out_where_the_sampler_says_so() {
    let all = SamplerRecipe { miner: Miner::All {}, grouped: false, ..SamplerRecipe::default() };
    let judged = |sampler: SamplerRecipe, inside: BBox| {
        let mut o = objective(ClassLoss::Sigmoid {}, BoxLoss::SmoothL1 { beta: 1.0 }, None, sampler);
        o.levels = vec![Level { stride: 8, anchors: vec![[8.0, 8.0]], layout: Layout::ByKind }];
        o.loss.margin = 0.0;
        let face = Annotated { bbox: BBox::new(0.0, 0.0, 8.0, 8.0), ignore: false };
        let outputs = [Tensor::zeros(Shape::new(1, 5, 2, 2))];
        o.judge_within(&outputs, &[vec![face]], &[inside], generator, 1).unwrap()
    };
    let (part, whole) = (BBox::new(0.0, 0.0, 12.0, 16.0), BBox::new(0.0, 0.0, 16.0, 16.0));
    let sum = SamplerRecipe { reduction: Reduction::Sum, ..all };
    for (sampler, inside, anchors) in [
        (sum, whole, 4.0),
        (sum, part, 4.0),
        (SamplerRecipe { within_picture: true, ..sum }, whole, 4.0),
        (SamplerRecipe { within_picture: true, ..sum }, part, 2.0),
        (SamplerRecipe { within_picture: true, ..all }, part, 1.0),
    ] {
        let (losses, gradients) = judged(sampler, inside);
        assert!((losses.class - anchors * 2f64.ln()).abs() < 1e-6, "{anchors}: {}", losses.class);
        let moved = gradients[0].data.chunks(5).filter(|cell| cell[0] != 0.0).count();
        assert_eq!(moved, if sampler.within_picture && inside == part { 2 } else { 4 });
        assert_eq!(losses.matched, 1);
    }
    let o = objective(
        ClassLoss::Sigmoid {},
        BoxLoss::SmoothL1 { beta: 1.0 },
        None,
        SamplerRecipe { within_picture: true, ..all },
    );
    let (outputs, faces) = batch(&o, 2, &mut Rng::new(6));
    assert!(o.judge(&outputs, &faces, generator, 1).is_err(), "without borders");
}

#[test]
fn the_objective_does_not_depend_on_the_number_of_threads() {
    for (name, mut o) in cases() {
        if name == "sigmoid in groups" {
            o.sampler = Some(SamplerRecipe { samples: 20, ..SamplerRecipe::default() });
        }
        let (outputs, faces) = batch(&o, 5, &mut Rng::new(4));
        let expected = o.judge(&outputs, &faces, generator, 1).unwrap();
        for threads in [2, 3, 5, 16] {
            assert!(
                o.judge(&outputs, &faces, generator, threads).unwrap() == expected,
                "{name}, {threads} threads"
            );
        }
    }
}

#[test]
fn pictures_without_faces_and_outputs_that_are_not_finite_are_borne() {
    for (name, o) in cases() {
        let (mut outputs, _) = batch(&o, 2, &mut Rng::new(5));
        let none = vec![Vec::new(), Vec::new()];
        let (losses, gradients) = o.judge(&outputs, &none, generator, 2).unwrap();
        assert!(losses.class > 0.0 && losses.boxes == 0.0 && losses.iou == 0.0, "{name}: {losses:?}");
        assert!(gradients.iter().flat_map(|g| &g.data).all(|v| v.is_finite()), "{name}");
        let (_, faces) = batch(&o, 2, &mut Rng::new(5));
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e38, -1e38] {
            outputs.iter_mut().for_each(|t| t.data.fill(value));
            o.judge(&outputs, &faces, generator, 2).unwrap();
        }
    }
}

/// A pyramid anchor looks for what is around a face as the detector looks for a face of that size, and counts for less.
#[test]
fn pyramid_anchors_find_what_is_twice_as_large_and_weigh_half() {
    for (name, o) in cases() {
        let (outputs, faces) = batch(&o, 2, &mut Rng::new(5));
        for (k, times, weight) in [(1, 2.0, 0.5), (2, 4.0, 0.25)] {
            let around: Vec<Vec<Annotated>> = faces
                .iter()
                .map(|faces| {
                    let larger = |f: &Annotated| {
                        let b = f.bbox;
                        let [w, h] = [times * b.width(), times * b.height()];
                        let [x, y] = [(b.x1 + b.x2 - w) / 2.0, (b.y1 + b.y2 - h) / 2.0];
                        Annotated { bbox: BBox::from_xywh(x, y, w, h), ..*f }
                    };
                    faces.iter().map(larger).collect()
                })
                .collect();
            let (expected, gradients) = o.judge(&outputs, &around, generator, 1).unwrap();
            let anchors = PyramidAnchors::new(o.clone(), k, 0.5);
            let (losses, got) = anchors.judge(&outputs, &faces, generator, 2).unwrap();
            assert!(expected.class > 0.0 && expected.matched > 0, "{name}: {expected:?}");
            assert!((losses.class - weight * expected.class).abs() < 1e-4 * expected.class, "{name}");
            assert!((losses.boxes - weight * expected.boxes).abs() <= 1e-4 * expected.boxes, "{name}");
            for (got, expected) in got.iter().zip(&gradients) {
                for (g, e) in got.data.iter().zip(&expected.data) {
                    assert!((g - weight as f32 * e).abs() < 1e-4, "{name}: {g}, {e}");
                }
            }
        }
    }
}

/// Two steps on pictures of 64 x 64 pixels: the fine level is classified twice, the coarse one moved.
fn two_step(second: MatchingRecipe) -> TwoStep {
    let level = |stride, sizes: &[f32]| Level {
        stride,
        anchors: sizes.iter().map(|&s| [s, s]).collect(),
        layout: Layout::Apart { logits: 1 },
    };
    let objective = TwoStep {
        levels: vec![
            (level(16, &[16.0, 24.0]), Some(FirstStep::Classes)),
            (level(32, &[40.0]), Some(FirstStep::Boxes)),
        ],
        first: MatchingRecipe::Thresholds { negative: 0.25, positive: 0.3, force_best: false },
        second,
        survives: -0.4,
        mining: None,
        sampler: None,
        loss: LossRecipe {
            classification: ClassLoss::Focal { alpha: 0.25, gamma: 2.0 },
            boxes: BoxLoss::SmoothL1 { beta: 0.7 },
            box_weight: 1.7,
            margin: 3.0,
        },
    };
    objective.check().unwrap();
    objective
}

/// Outputs of [`two_step`] for two pictures, and their faces: one for the fine level, one for the coarse.
fn two_step_batch(rng: &mut Rng) -> (Vec<Tensor>, Vec<Vec<Annotated>>) {
    let sizes = [(2, 4), (4, 2), (2, 4), (8, 4), (1, 2), (4, 2)];
    let outputs = sizes.map(|(channels, side)| {
        let shape = Shape::new(2, channels, side, side);
        Tensor { shape, data: (0..shape.len()).map(|_| rng.range(-0.5, 0.5)).collect() }
    });
    let face = |x: f32, y: f32, side: f32| Annotated {
        bbox: BBox::from_xywh(x, y, side, side + 2.0),
        ignore: false,
    };
    let faces = (0..2).map(|_| {
        let [x, y] = [rng.range(0.0, 4.0), rng.range(0.0, 4.0)];
        vec![face(2.0 + x, 3.0 + y, 18.0), face(26.0 + x, 25.0 - y, 34.0)]
    });
    (outputs.into(), faces.collect())
}

/// Offsets of the first step move the anchors of the second, for whose gradient these are constants: so those of the first
/// are compared where the second matches nothing.
#[test]
fn the_two_steps_gradients_are_those_of_their_losses() {
    let thresholds = |positive| MatchingRecipe::Thresholds { negative: 0.2, positive, force_best: false };
    let groups = SamplerRecipe { miner: Miner::All {}, ..SamplerRecipe::default() };
    let mining = AnchorMining { anchors: 6, overlap: 0.3 };
    for (positive, compared, sampler, mining) in [
        (0.3, 2..6, None, None),
        (0.999, 0..6, None, None),
        (0.3, 2..6, Some(groups), None),
        (0.45, 2..6, None, Some(mining)),
        (0.45, 2..6, Some(groups), Some(mining)),
    ] {
        let o = TwoStep { sampler, mining, ..two_step(thresholds(positive)) };
        o.check().unwrap();
        let (outputs, faces) = two_step_batch(&mut Rng::new(9));
        let value = |outputs: &[Tensor]| {
            let l = o.judge(outputs, &faces, generator, 1).unwrap().0;
            (l.class + f64::from(o.loss.box_weight) * l.boxes, [l.matched, l.mined])
        };
        let (losses, gradients) = o.judge(&outputs, &faces, generator, 1).unwrap();
        assert_eq!(losses.matched > 0, positive < 0.9, "{losses:?}");
        assert_eq!(losses.mined > 0, mining.is_some(), "{losses:?}");
        assert!(losses.faces == 4 && losses.class > 0.0 && losses.boxes > 0.0, "{losses:?}");
        let h = 2e-3;
        let (mut seen, mut switched) = (0, 0);
        for output in compared {
            for i in 0..outputs[output].data.len() {
                let moved = |by: f32| {
                    let mut outputs = outputs.clone();
                    outputs[output].data[i] += by;
                    value(&outputs)
                };
                let ((above, a), (below, b)) = (moved(h), moved(-h));
                // Mining may choose otherwise on one side: then there is nothing to compare.
                if a != b || a != [losses.matched, losses.mined] {
                    switched += 1;
                    continue;
                }
                let expected = (above - below) / f64::from(2.0 * h);
                let got = f64::from(gradients[output].data[i]);
                assert!(
                    (got - expected).abs() < 2e-3 * expected.abs() + 2e-4,
                    "output {output} at {i}: {got}, by differences {expected}"
                );
                seen += usize::from(got.abs() > 5e-3);
            }
        }
        assert!(seen > 20 && switched < 5, "{seen} gradients are not 0, {switched} switched");
        // On any number of threads.
        for threads in [2, 3] {
            assert_eq!(o.judge(&outputs, &faces, generator, threads).unwrap(), (losses, gradients.clone()));
        }
    }
}

#[test]
fn what_the_first_step_drops_the_second_does_not_learn_from() {
    let o = two_step(MatchingRecipe::Thresholds { negative: 0.2, positive: 0.3, force_best: false });
    let (mut outputs, faces) = two_step_batch(&mut Rng::new(9));
    // Of each four anchors two are dropped: one below the threshold, one that is no number.
    for (i, v) in outputs[0].data.iter_mut().enumerate() {
        *v = [1.0, -0.41, 2.0, f32::NAN][i % 4];
    }
    // A NaN logit is a NaN loss, but not in the second step: look at its gradients alone.
    let (_, gradients) = o.judge(&outputs, &faces, generator, 1).unwrap();
    let mut learnt = 0;
    for (i, first) in outputs[0].data.iter().enumerate() {
        let class = gradients[2].data[i];
        let boxes = &gradients[3].data[4 * i..4 * i + 4];
        if *first > o.survives {
            learnt += usize::from(class != 0.0);
        } else {
            assert!(
                class == 0.0 && boxes.iter().all(|v| *v == 0.0),
                "anchor {i} of {first}: {class}, {boxes:?}"
            );
        }
    }
    assert!(learnt > 8, "{learnt} anchors learnt");
}

/// Eq. 1 on one anchor by hand: the second step's offsets are relative to the anchor as the first moved it.
#[test]
fn the_second_step_starts_where_the_first_ended() {
    let mut o = two_step(MatchingRecipe::Thresholds { negative: 0.2, positive: 0.5, force_best: false });
    o.levels.remove(0);
    // A cell of stride 32 at (16, 16) with an anchor of 40 px; a face of 40 px at (26, 16), which the first step reaches.
    let outputs = |first: f32, second: f32| {
        let map = |data: &[f32]| Tensor { shape: Shape::new(1, data.len(), 1, 1), data: data.to_vec() };
        vec![map(&[first, 0.0, 0.0, 0.0]), map(&[0.0]), map(&[second, 0.0, 0.0, 0.0])]
    };
    let faces = vec![vec![Annotated { bbox: BBox::from_xywh(6.0, -4.0, 40.0, 40.0), ignore: false }]];
    // 10 px are a quarter of the anchor. IoU of anchor and face: 30 / 50.
    let exact = o.judge(&outputs(0.25, 0.0), &faces, generator, 1).unwrap().0;
    assert!(exact.matched == 1 && exact.boxes.abs() < 1e-6 && (exact.iou - 1.0).abs() < 1e-5, "{exact:?}");
    // What is missing after the first step: with beta 0.7 a difference x costs x^2 / 1.4.
    let [first, second] = [0.25f64 - 0.1, 0.25 - 0.1 - 0.05].map(|x| x * x / 1.4);
    let near = o.judge(&outputs(0.1, 0.05), &faces, generator, 1).unwrap().0;
    assert!((near.boxes - first - second).abs() < 1e-6, "{near:?}, expected {}", first + second);
}

#[test]
fn two_steps_take_pictures_without_faces_and_offsets_that_are_no_numbers() {
    let o = two_step(MatchingRecipe::Thresholds { negative: 0.2, positive: 0.3, force_best: false });
    let (mut outputs, mut faces) = two_step_batch(&mut Rng::new(9));
    faces[1].iter_mut().for_each(|f| f.ignore = true);
    let (losses, _) = o.judge(&outputs, &faces, generator, 1).unwrap();
    assert!(losses.faces == 2 && losses.class > 0.0 && losses.class.is_finite(), "{losses:?}");
    faces[0].clear();
    let (losses, gradients) = o.judge(&outputs, &faces, generator, 2).unwrap();
    assert!(
        losses.faces == 0 && losses.matched == 0 && losses.boxes == 0.0 && losses.class > 0.0,
        "{losses:?}"
    );
    assert!(gradients.iter().flat_map(|g| &g.data).all(|v| v.is_finite()));
    // Anchors moved to nowhere are background.
    outputs[1].data.fill(f32::NAN);
    outputs[1].data[0] = f32::INFINITY;
    let (losses, gradients) = o.judge(&outputs, &faces, generator, 1).unwrap();
    assert!(losses.matched == 0 && losses.class.is_finite(), "{losses:?}");
    assert!(gradients.iter().flat_map(|g| &g.data).all(|v| v.is_finite()));
}
