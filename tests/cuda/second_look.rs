//! Boxes that are looked at a second time, on a device against the CPU: the same boxes in the same order, losses and gradients within
//! rounding; the same bits in any order of threads.

use crate::emulator::{device, driver, Driver};
use crate::failures::{alone, fail_at_each};
use crate::objective::{boxes, levels, matching, random_faces, random_offsets, sanitized, FOCAL};
use crate::train::{on_device, table};
use farface::detect::anchors::Anchor;
use farface::detect::group_sampling::GroupSamplingConfig;
use farface::detect::BBox;
use farface::error::Result;
use farface::gpu::driver::Stream;
use farface::gpu::map::Element;
use farface::gpu::memory::DeviceBuffer;
use farface::gpu::ops::train::objective::Looks;
use farface::gpu::ops::train::Room;
use farface::gpu::ops::Device;
use farface::graph::init::Rng;
use farface::graph::{Builder, Graph, Weights};
use farface::layers::{Conv2d, RoiAlign};
use farface::nets::refineface::FirstStep;
use farface::shape::{Shape, Tensor};
use farface::train::data::Annotated;
use farface::train::device::second_look::{choose, judge};
use farface::train::losses::{BoxLoss, ClassLoss, Focal, LossRecipe};
use farface::train::matching::MatchingRecipe;
use farface::train::network::{Engine, Frozen, Judgement, LookAgain};
use farface::train::objective::second_look::{
    FastRcnnRecipe, FeatureSupervision, FeatureSupervisionRecipe, GroupedFastRcnn,
};
use farface::train::objective::{
    DetectorObjective, Layout, Level, Losses, Objective, SecondLook, TwoStep, Whole,
};
use farface::train::sampler::{Miner, Reduction, SamplerRecipe};
use proptest::prelude::*;
use std::sync::Arc;

const GUARD: usize = 64;

/// A batch: what the first phase puts out, what there is to find, and the seeds of the draws.
struct Case {
    look: SecondLook,
    outputs: Vec<Tensor>,
    faces: Vec<Vec<Annotated>>,
    seeds: Vec<u64>,
}

/// What became of a batch: the boxes of each input, losses, gradients.
type Looked = (Vec<Vec<f32>>, Losses, Vec<f32>);

/// A logit, of few values, so that many are equal; now and then none.
fn random_logit(rng: &mut Rng) -> f32 {
    match rng.below(40) {
        0 => f32::NAN,
        1 => f32::NEG_INFINITY,
        2 => 30.0 + rng.below(3) as f32,
        _ => (4.0 * rng.normal()).round() / 2.0,
    }
}

impl Case {
    /// `pictures` of `side` pixels with up to `most` faces each.
    fn new(look: SecondLook, side: usize, pictures: usize, most: usize, seed: u64) -> Self {
        let rng = &mut Rng::new(seed);
        let (levels, logits): (Vec<(Level, Option<FirstStep>)>, usize) = match &look {
            SecondLook::FeatureSupervision(s) => (s.detector.levels.clone(), 1),
            SecondLook::FastRcnn(s) => {
                let level = |(stride, scales): (usize, &[f32])| {
                    let anchors = scales.iter().map(|&s| [s, s]).collect();
                    (Level { stride, anchors, layout: Layout::Apart { logits: 2 } }, None)
                };
                (s.detector.levels().map(level).collect(), 2)
            }
        };
        let plain: Vec<Level> = levels.iter().map(|(level, _)| level.clone()).collect();
        let faces: Vec<_> = (0..pictures).map(|_| random_faces(&plain, side, most, rng)).collect();
        let (mut first, mut second) = (Vec::new(), Vec::new());
        for (level, step) in &levels {
            let (cells, n) = (side.div_ceil(level.stride), level.anchors.len());
            let map = |c: usize| Tensor::zeros(Shape { n: pictures, c: c * n, h: cells, w: cells });
            let mut random = |c: usize| {
                let mut map = map(c);
                map.data.iter_mut().for_each(|v| *v = random_logit(rng));
                map
            };
            let class = random(logits);
            if *step == Some(FirstStep::Classes) {
                first.push(random(1));
            }
            let (mut movers, mut boxes) = (map(4), map(4));
            let values = movers.data.chunks_exact_mut(4).zip(boxes.data.chunks_exact_mut(4));
            for (k, (mover, offsets)) in values.enumerate() {
                let (a, cell) = (k % n, k / n % (cells * cells));
                let faces = &faces[k / n / (cells * cells)];
                let mut anchor = Anchor::on_cell(cell / cells, cell % cells, level.stride, level.anchors[a]);
                if *step == Some(FirstStep::Boxes) {
                    mover.copy_from_slice(&random_offsets(anchor, faces, [1.0; 2], rng));
                    anchor = anchor.moved(mover, [1.0; 2]);
                }
                offsets.copy_from_slice(&match rng.below(20) {
                    0 => [0.0, 0.0, -1e3, 0.0],
                    _ => random_offsets(anchor, faces, [1.0; 2], rng),
                });
            }
            if *step == Some(FirstStep::Boxes) {
                first.push(movers);
            }
            second.extend([class, boxes]);
        }
        first.append(&mut second);
        Self { look, outputs: first, faces, seeds: (0..pictures).map(|_| rng.bits()).collect() }
    }

    /// What a second phase puts out of so many boxes of each input.
    fn second(&self, rows: &[usize]) -> Vec<Tensor> {
        let rng = &mut Rng::new(7);
        let channels: &[usize] = if matches!(self.look, SecondLook::FastRcnn(_)) { &[2, 4] } else { &[1] };
        let shapes = rows.iter().flat_map(|&r| channels.iter().map(move |&c| Shape::new(r, c, 1, 1)));
        shapes.map(|s| Tensor::from_vec(s, (0..s.len()).map(|_| rng.normal()).collect())).collect()
    }

    /// On the host.
    fn expected(&self) -> Looked {
        let rng = |n: usize| Rng::new(self.seeds[n]);
        let whole = Whole::at_hand(self.faces.len());
        let looks = self.look.choose(&self.outputs, &self.faces, rng, 2, whole).unwrap();
        let rows: Vec<usize> = looks.inputs().iter().map(Vec::len).collect();
        let (losses, d) = self.look.judge(&looks, &self.second(&rows)).unwrap();
        let boxes = looks.boxes().into_iter().map(|b| b.data).collect();
        (boxes, losses, d.into_iter().flat_map(|t| t.data).collect())
    }

    /// On the device, and the buffers that it was done in.
    fn looked(
        &self,
        stream: &Stream,
        looks: &mut Looks,
        room: &mut Room,
    ) -> Result<(Vec<usize>, Losses, [DeviceBuffer; 3])> {
        let upload = |outputs: &[Tensor]| {
            DeviceBuffer::of(stream, &outputs.iter().flat_map(|t| t.data.iter().copied()).collect::<Vec<_>>())
        };
        let shapes = |outputs: &[Tensor]| outputs.iter().map(|t| t.shape).collect::<Vec<_>>();
        let first = upload(&self.outputs)?;
        let again = LookAgain { look: &self.look, faces: &self.faces, seeds: self.seeds.clone() };
        let rows = choose(looks, stream, &first, &shapes(&self.outputs), &again, None, room)?;
        let outputs = self.second(&rows);
        let second = upload(&outputs)?;
        let gradient = DeviceBuffer::new(stream.context(), second.len() + GUARD)?;
        gradient.fill(stream, 0..gradient.len(), 0xff)?;
        let losses = judge(looks, stream, [&second, &gradient], &shapes(&outputs), &rows, &self.look)?;
        Ok((rows, losses, [first, second, gradient]))
    }

    fn looked_within(&self, stream: &Stream, looks: &mut Looks, room: &mut Room) -> Looked {
        let (rows, losses, [_, second, gradient]) = self.looked(stream, looks, room).unwrap();
        let behind = gradient.values::<u8>(stream, second.len(), GUARD).unwrap();
        assert!(behind.iter().all(|&b| b == 0xff), "written past the gradients");
        let all = room.there().unwrap().values(stream, 0, 5 * rows.iter().sum::<usize>()).unwrap();
        let mut rest = &all[..];
        let mut take = |&rows: &usize| {
            let (own, others) = rest.split_at(5 * rows);
            rest = others;
            own.to_vec()
        };
        let boxes = rows.iter().map(&mut take).collect();
        (boxes, losses, gradient.values(stream, 0, second.len() / 4).unwrap())
    }

    /// Holds the device to the host; what is found. On another machine's arithmetic boxes differ in their last bits, and with them what
    /// is chosen on the very edge: which boxes there are is compared on the emulator, whose functions are the host's.
    fn check(&self, device: &Arc<Device>) -> Looked {
        let what = format!("{:?}", self.look);
        let stream = Stream::new(device.context()).unwrap();
        let (mut looks, mut room) = (Looks::new(device).unwrap(), Room::default());
        let (boxes, losses, gradient) = self.looked_within(&stream, &mut looks, &mut room);
        let expected = self.expected();
        let Some(Driver::Emulated(emulator)) = driver() else { return expected };
        assert_eq!(boxes, expected.0, "{what}: other boxes");
        let pairs = [(losses.class, expected.1.class), (losses.boxes, expected.1.boxes)];
        let near = |(got, e): (f64, f64)| (got - e).abs() <= 1e-5 * e.abs().max(1e-6);
        assert!(pairs.into_iter().all(near), "{what}: losses {pairs:?}");
        assert_eq!((losses.matched, losses.mined, losses.faces, losses.iou), (0, 0, 0, 0.0));
        let largest = expected.2.iter().fold(0f32, |m, v| m.max(v.abs()));
        for (i, (&g, &e)) in gradient.iter().zip(&expected.2).enumerate() {
            assert!((g - e).abs() <= 1e-5 * largest, "{what}: gradient {i}: {g} for {e}, largest {largest}");
        }
        assert!(gradient.iter().zip(&expected.2).all(|(&g, &e)| (g == 0.0) == (e == 0.0)), "{what}: weights");
        emulator.backwards(true);
        // In memory that holds what the call before left.
        let again = self.looked_within(&stream, &mut looks, &mut room);
        emulator.backwards(false);
        let bits = |v: &[f32]| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        assert!(again.0 == boxes && again.1 == losses, "{what}: another order of threads");
        assert_eq!(bits(&again.2), bits(&gradient), "{what}: other bits in another order");
        expected
    }
}

const STEPS: [Option<FirstStep>; 3] = [None, Some(FirstStep::Classes), Some(FirstStep::Boxes)];

fn supervision(strides: &[usize], anchors: usize, steps: &[Option<FirstStep>]) -> FeatureSupervision {
    let thresholds = MatchingRecipe::Thresholds { negative: 0.4, positive: 0.5, force_best: false };
    let levels = levels(strides, anchors, |_| Layout::Apart { logits: 1 });
    let (alpha, gamma) = FOCAL;
    let detector = TwoStep {
        levels: levels.into_iter().zip(steps.iter().copied()).collect(),
        first: thresholds,
        second: thresholds,
        survives: -1.0,
        mining: None,
        sampler: None,
        loss: LossRecipe {
            classification: ClassLoss::Focal { alpha, gamma },
            margin: 10.0,
            ..LossRecipe::default()
        },
    };
    let recipe = FeatureSupervisionRecipe { weight: 0.7, ..FeatureSupervisionRecipe::default() };
    FeatureSupervision { detector, recipe, focal: Focal { alpha, gamma } }
}

fn fast_rcnn(name: &str, scales: &[f32]) -> GroupedFastRcnn {
    let mut detector = GroupSamplingConfig::named(name).unwrap();
    detector.scales = scales.to_vec();
    let sampler = SamplerRecipe { samples: 6, ..SamplerRecipe::default() };
    GroupedFastRcnn {
        detector,
        recipe: FastRcnnRecipe { sampler, ..FastRcnnRecipe::default() },
        loss: LossRecipe { classification: ClassLoss::Softmax {}, ..LossRecipe::default() },
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if sanitized() { 20 } else { 60 }))]

    #[test]
    fn feature_supervision_on_a_device_looks_at_the_cpus_boxes(
        matching in matching(), nms in prop_oneof![Just(0.7f32), 0.0f32..1.0], proposals in prop_oneof![1usize..12, Just(512usize)],
        steps in [0usize..3, 0..3, 0..3], levels_of in 1usize..4, anchors in 1usize..3, pictures in 1usize..4,
        side in 8usize..48, most in 0usize..8, seed in any::<u64>(),
    ) {
        let Some(device) = device() else { return Ok(()) };
        let mut s = supervision(&[8, 4, 16][..levels_of], anchors, &steps.map(|s| STEPS[s]));
        s.recipe = FeatureSupervisionRecipe { nms, proposals, matching, weight: 0.7 };
        s.recipe.check().unwrap();
        Case::new(SecondLook::FeatureSupervision(s), side, pictures, most, seed).check(&device);
    }

    #[test]
    fn grouped_fast_rcnn_on_a_device_looks_at_the_cpus_boxes(
        matching in matching(), nms in prop_oneof![Just(0.7f32), 0.0f32..1.0], before_nms in prop_oneof![1usize..60, Just(12_000usize)],
        proposals in prop_oneof![1usize..20, Just(2000usize)], all in any::<bool>(), grouped in any::<bool>(),
        samples in 0usize..12, ratio in 1usize..5, sum in any::<bool>(), boxes in boxes(), one_map in any::<bool>(),
        margin in prop_oneof![Just(0.0f32), 1.0f32..20.0], pictures in 1usize..4, side in 8usize..40, most in 0usize..8,
        seed in any::<u64>(),
    ) {
        let Some(device) = device() else { return Ok(()) };
        let mut s = if one_map {
            fast_rcnn("fpn-finest-rcnn-r18", &[5.0, 9.0])
        } else {
            fast_rcnn("fpn-rcnn-r18", &[6.0, 12.0, 24.0, 48.0])
        };
        let sampler = SamplerRecipe {
            miner: if all { Miner::All {} } else { Miner::Random {} },
            grouped,
            samples,
            negatives_per_positive: ratio,
            reduction: if sum { Reduction::Sum } else { Reduction::Mean },
            within_picture: false,
        };
        s.recipe = FastRcnnRecipe { before_nms, nms, proposals, matching, sampler };
        s.recipe.check().unwrap();
        s.loss = LossRecipe { boxes, box_weight: 0.7, margin, ..s.loss };
        Case::new(SecondLook::FastRcnn(s), side, pictures, most, seed).check(&device);
    }
}

/// More candidates than a block has threads, and more than enter the suppression.
#[test]
fn many_boxes_are_the_cpus() {
    let Some(device) = device() else { return };
    let s = supervision(&[4, 8], 2, &[STEPS[1], STEPS[2]]);
    let (boxes, losses, _) = Case::new(SecondLook::FeatureSupervision(s), 120, 1, 20, 1).check(&device);
    let rows: usize = boxes.iter().map(|b| b.len() / 5).sum();
    assert!(rows > 200 && losses.class > 0.0, "{rows} boxes");
    let mut s = fast_rcnn("fpn-finest-rcnn-r18", &[6.0, 12.0]);
    s.recipe = FastRcnnRecipe { before_nms: 1500, ..s.recipe };
    s.recipe.sampler.samples = 64;
    let (boxes, losses, _) = Case::new(SecondLook::FastRcnn(s), 120, 1, 20, 2).check(&device);
    assert!(boxes[0].len() == 5 * 128 && losses.boxes > 0.0, "{} boxes", boxes[0].len() / 5);
}

fn of_each_kind() -> [SecondLook; 2] {
    [
        SecondLook::FeatureSupervision(supervision(&[8, 16], 1, &[STEPS[1], STEPS[2]])),
        SecondLook::FastRcnn(fast_rcnn("fpn-finest-rcnn-r18", &[6.0, 12.0])),
    ]
}

fn face(x1: f32, y1: f32, x2: f32, y2: f32, ignore: bool) -> Annotated {
    Annotated { bbox: BBox::new(x1, y1, x2, y2), ignore }
}

/// Where nothing is proposed faces alone are looked at; where there is none of them either an input has a box that counts for nothing.
#[test]
fn inputs_without_boxes_have_one_that_counts_for_nothing() {
    let Some(device) = device() else { return };
    for look in of_each_kind() {
        for (faces, rows) in [
            (vec![], 0),
            (vec![face(1.0, 1.0, 9.0, 9.0, true)], 0),
            (vec![face(1.0, 1.0, 9.0, 9.0, false)], 2),
        ] {
            let mut case = Case::new(look.clone(), 24, 2, 0, 3);
            for map in &mut case.outputs {
                map.data.fill(f32::NAN);
            }
            case.faces = vec![faces.clone(), faces];
            let (boxes, losses, gradient) = case.check(&device);
            assert!(boxes[1..].iter().all(|b| *b == [0.0, 0.0, 0.0, 1.0, 1.0]), "{boxes:?}");
            if rows == 0 {
                assert_eq!(boxes[0], [0.0, 0.0, 0.0, 1.0, 1.0]);
                assert!(losses == Losses::default() && gradient.iter().all(|&g| g == 0.0));
            } else {
                assert_eq!(boxes[0], [0.0, 1.0, 1.0, 9.0, 9.0, 1.0, 1.0, 1.0, 9.0, 9.0]);
                assert!(losses.class > 0.0);
            }
        }
    }
}

/// Of boxes with one score the first is kept, as the host numbers them: by cells, not by anchors, where the detector decodes so.
#[test]
fn of_equal_scores_the_first_is_kept() {
    let Some(device) = device() else { return };
    for look in of_each_kind() {
        let mut case = Case::new(look, 24, 1, 0, 3);
        case.outputs.iter_mut().for_each(|map| map.data.fill(0.0));
        match &mut case.look {
            SecondLook::FeatureSupervision(s) => s.recipe.proposals = 3,
            SecondLook::FastRcnn(s) => s.recipe.proposals = 3,
        }
        let (boxes, ..) = case.check(&device);
        // Two of the first cell or one, whose centre is half a stride from the corner.
        let first: Vec<f32> = boxes[0].chunks_exact(5).map(|b| (b[1] + b[3]) / 2.0).collect();
        match &case.look {
            SecondLook::FeatureSupervision(_) => assert_eq!(first, [4.0, 12.0, 20.0]),
            SecondLook::FastRcnn(_) => assert_eq!(first, [2.0, 6.0, 2.0]),
        }
    }
}

#[test]
fn a_second_look_at_what_does_not_fit_is_an_error() {
    let Some(device) = device() else { return };
    let stream = Stream::new(device.context()).unwrap();
    for look in of_each_kind() {
        let (mut looks, mut room) = (Looks::new(&device).unwrap(), Room::default());
        let buffer = DeviceBuffer::new(device.context(), 64).unwrap();
        let values = [&buffer, &buffer];
        let each = if matches!(look, SecondLook::FastRcnn(_)) { 2 } else { 1 };
        let shapes: Vec<Shape> = [Shape::new(1, 3 - each, 1, 1); 2].to_vec();
        let early = judge(&mut looks, &stream, values, &shapes, &vec![1; 2 / each], &look);
        assert!(early.is_err(), "nothing was chosen");
        let mut case = Case::new(look, 24, 2, 0, 3);
        let few = judge(&mut looks, &stream, values, &shapes[..1], &vec![1; 2 / each], &case.look);
        assert!(few.is_err(), "an output is missing");
        case.faces[1] = vec![face(1.0, 1.0, f32::INFINITY, 9.0, false)];
        let error = case.looked(&stream, &mut looks, &mut room).err().expect("no box").to_string();
        assert!(error.contains("not finite"), "{error}");
        case.faces.pop();
        assert!(case.looked(&stream, &mut looks, &mut room).is_err(), "a picture is missing");
    }
}

/// A network of a map of stride 4, what a kind of look takes of it, and so many inputs of boxes.
fn two_phases(class: &[(&str, usize)], inputs: usize, second: &[(&str, usize)]) -> Graph {
    let mut b = Builder::new();
    let x = b.input("image", 3);
    let x = b.conv("first", x, Conv2d::new(3, 12, 3).stride(4).bias());
    let x = b.batchnorm("norm", x, 12);
    let x = b.relu(x);
    for &(name, channels) in class {
        let y = b.conv(name, x, Conv2d::new(12, channels, 1).bias());
        b.output(name, y);
    }
    for input in 0..inputs {
        let boxes = b.input(&format!("boxes{input}"), 5);
        let align = RoiAlign { output: [2, 3], spatial_scale: 0.25, sampling_ratio: 2, aligned: true };
        let rois = b.roi_align(x, boxes, align);
        for &(name, channels) in second {
            let y = b.conv(name, rois, Conv2d::rect(12, channels, 2, 3).padding([0; 4]).bias());
            b.output(&format!("{name}{input}"), y);
        }
    }
    b.finish()
}

/// Three steps of which the second look is judged on the device, or by the host.
#[test]
fn steps_that_are_looked_at_again_on_the_device_are_those_judged_on_the_host() {
    let Some(device) = device() else { return };
    let supervised = supervision(&[4, 4], 1, &STEPS[..1].repeat(2));
    let mut rcnn = fast_rcnn("fpn-finest-rcnn-r18", &[8.0, 14.0]);
    rcnn.loss.boxes = BoxLoss::SmoothL1 { beta: 1.0 };
    let one_step = Objective {
        levels: levels(&[4], 2, |_| Layout::Apart { logits: 2 }),
        variances: [1.0; 2],
        matching: MatchingRecipe::FirstStep { positive: 0.35 },
        mining: None,
        sampler: Some(SamplerRecipe::default()),
        loss: rcnn.loss,
    };
    let heads = [("class", 1), ("box", 4), ("class2", 2), ("box2", 8)];
    for (graph, first, look) in [
        (
            two_phases(&heads, 2, &[("again", 1)]),
            DetectorObjective::TwoStep(supervised.detector.clone()),
            SecondLook::FeatureSupervision(supervised),
        ),
        (
            two_phases(&[("class", 4), ("box", 8)], 1, &[("again", 2), ("moved", 4)]),
            DetectorObjective::OneStep(one_step),
            SecondLook::FastRcnn(rcnn),
        ),
    ] {
        let weights = Weights::random(&graph, 3);
        let shape = Shape::new(2, 3, 24, 24);
        for (element, most) in [(Element::F32, 1e-5), (Element::Bf16, 1e-2)] {
            let [mut host, mut engine] =
                [(); 2].map(|()| on_device(&graph, &weights, &Frozen::default(), &device, element));
            let mut rng = Rng::new(8);
            for step in 0..3 {
                let pixels: Vec<u8> = (0..shape.len()).map(|_| rng.below(256) as u8).collect();
                let faces: Vec<Vec<Annotated>> =
                    (0..2).map(|_| vec![square(&mut rng), square(&mut rng)]).collect();
                let seed = |n: usize| 10 * step + n as u64;
                let outputs = host.forward(&pixels, shape, &table()).unwrap();
                let draws = |n: usize| Rng::new(seed(n));
                let whole = Whole::at_hand(2);
                let (one, mut d) = first.judge(&outputs, &faces, &[], draws, 2, whole).unwrap();
                let looks = look.choose(&outputs, &faces, draws, 2, whole).unwrap();
                let outputs = host.forward_boxes(looks.boxes()).unwrap();
                let (two, more) = look.judge(&looks, &outputs).unwrap();
                d.extend(more);
                host.backward(&d).unwrap();

                let seeds = || (0..2).map(seed).collect();
                let judgement = Judgement {
                    objective: (&first).into(),
                    faces: &faces,
                    inside: &[],
                    seeds: seeds(),
                    weight: 1.0,
                };
                let again = LookAgain { look: &look, faces: &faces, seeds: seeds() };
                assert!(engine.look_again(&again).is_err(), "a second look without a first");
                let got = engine.forward_judged(&pixels, shape, &table(), &[judgement]).unwrap().unwrap()[0];
                assert!(engine.backward_judged().is_err(), "the second phase comes first");
                let more = engine.look_again(&again).unwrap();
                assert!(engine.look_again(&again).is_err(), "a third look");
                engine.backward_judged().unwrap();
                let near = |got: f64, e: f64| (got - e).abs() < f64::from(most) * e;
                assert!(
                    near(got.class, one.class) && two.class > 0.0 && near(more.class, two.class),
                    "{more:?} for {two:?}"
                );
                assert!(
                    (more.boxes - two.boxes).abs() <= f64::from(most) * two.boxes,
                    "{more:?} for {two:?}"
                );
                let grads = |engine: &mut dyn Engine| engine.params_and_grads().unwrap().1.concat();
                let (got, expected) = (grads(&mut engine), grads(&mut host));
                let largest = expected.iter().fold(0f32, |m, v| m.max(v.abs()));
                for (g, e) in got.iter().zip(&expected) {
                    assert!((g - e).abs() < most * largest, "{element:?}, step {step}: {g} for {e}");
                }
                for engine in [&mut host, &mut engine] {
                    let (params, grads) = engine.params_and_grads().unwrap();
                    let values = params.iter_mut().flatten().zip(grads.iter().flatten());
                    values.for_each(|(p, g)| *p -= 0.01 * g);
                }
            }
        }
    }
}

fn square(rng: &mut Rng) -> Annotated {
    let (x, y, side) = (rng.range(0.0, 14.0), rng.range(0.0, 14.0), rng.range(6.0, 14.0));
    face(x, y, x + side, y + side, false)
}

#[test]
fn a_second_look_whose_driver_fails_at_any_call_is_an_error() {
    let Some(Driver::Emulated(emulator)) = driver() else { return };
    if !alone("second_look::a_second_look_whose_driver_fails_at_any_call_is_an_error") {
        return;
    }
    for look in of_each_kind() {
        let case = Case::new(look, 24, 2, 4, 1);
        fail_at_each(emulator, "a second look", || {
            let device = Device::new(0)?;
            let stream = Stream::new(device.context())?;
            let (mut looks, mut room) = (Looks::new(&device)?, Room::default());
            let (_, _, buffers) = case.looked(&stream, &mut looks, &mut room)?;
            Ok((buffers, room, looks, stream, device))
        });
    }
}
