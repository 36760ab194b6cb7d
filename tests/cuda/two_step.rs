//! Objectives of two steps on a device against the CPU's, as `objective` has them for those of one.

use crate::emulator::{device, driver, Driver};
use crate::failures::{alone, fail_at_each};
use crate::objective::{
    boxes, compare, judged, levels, matching, mining, random_faces, random_offsets, sampler, sanitized, FOCAL,
};
use crate::train::{on_device, table};
use farface::detect::anchors::Anchor;
use farface::detect::BBox;
use farface::gpu::driver::Stream;
use farface::gpu::map::Element;
use farface::gpu::ops::train::objective::Judge;
use farface::gpu::ops::Device;
use farface::graph::init::Rng;
use farface::graph::{Builder, Weights};
use farface::layers::Conv2d;
use farface::nets::refineface::FirstStep;
use farface::shape::{Shape, Tensor};
use farface::train::data::Annotated;
use farface::train::losses::{ClassLoss, LossRecipe};
use farface::train::matching::{AnchorMining, MatchingRecipe};
use farface::train::network::{Engine, Frozen, Judgement};
use farface::train::objective::{Layout, Level, Losses, TwoStep};
use farface::train::sampler::{Miner, SamplerRecipe};
use proptest::prelude::*;
use std::sync::Arc;

const ONE: [f32; 2] = [1.0; 2];

/// A batch: what the network puts out, what there is to find, and the seeds of the draws.
struct Case {
    objective: TwoStep,
    outputs: Vec<Tensor>,
    faces: Vec<Vec<Annotated>>,
    seeds: Vec<u64>,
}

impl Case {
    /// `pictures` of `side` pixels with up to `most` faces each. Some boxes that either step means are near a face; some that the first
    /// means are empty or no numbers.
    fn new(objective: TwoStep, side: usize, pictures: usize, most: usize, seed: u64) -> Self {
        let rng = &mut Rng::new(seed);
        let plain: Vec<Level> = objective.levels.iter().map(|(level, _)| level.clone()).collect();
        let faces: Vec<_> = (0..pictures).map(|_| random_faces(&plain, side, most, rng)).collect();
        let (mut first, mut second) = (Vec::new(), Vec::new());
        for (level, step) in &objective.levels {
            let (cells, n) = (side.div_ceil(level.stride), level.anchors.len());
            let map = |c: usize| Tensor::zeros(Shape { n: pictures, c: c * n, h: cells, w: cells });
            let mut logits = || {
                let mut logits = map(1);
                logits.data.iter_mut().for_each(|v| *v = 2.0 * rng.normal());
                logits
            };
            let class = logits();
            if *step == Some(FirstStep::Classes) {
                first.push(logits());
            }
            let (mut movers, mut boxes) = (map(4), map(4));
            let values = movers.data.chunks_exact_mut(4).zip(boxes.data.chunks_exact_mut(4));
            for (k, (mover, offsets)) in values.enumerate() {
                let (a, cell) = (k % n, k / n % (cells * cells));
                let faces = &faces[k / n / (cells * cells)];
                let mut anchor = Anchor::on_cell(cell / cells, cell % cells, level.stride, level.anchors[a]);
                if *step == Some(FirstStep::Boxes) {
                    mover.copy_from_slice(&match rng.below(60) {
                        0 => [0.0, 0.0, -1e3, 0.0],
                        _ => random_offsets(anchor, faces, ONE, rng),
                    });
                    anchor = anchor.moved(mover, ONE);
                }
                offsets.copy_from_slice(&random_offsets(anchor, faces, ONE, rng));
            }
            if *step == Some(FirstStep::Boxes) {
                first.push(movers);
            }
            second.extend([class, boxes]);
        }
        first.append(&mut second);
        Self { objective, outputs: first, faces, seeds: (0..pictures).map(|_| rng.bits()).collect() }
    }

    fn judgement(&self) -> Judgement<'_> {
        let (objective, seeds) = ((&self.objective).into(), self.seeds.clone());
        Judgement { objective, faces: &self.faces, inside: &[], seeds, weight: 1.0 }
    }

    /// On the host.
    fn expected(&self) -> (Losses, Vec<f32>) {
        let rng = |n: usize| Rng::new(self.seeds[n]);
        let (losses, d) = self.objective.judge(&self.outputs, &self.faces, rng, 2).unwrap();
        (losses, d.into_iter().flat_map(|t| t.data).collect())
    }

    /// Holds the device to the host; what is found.
    fn check(&self, device: &Arc<Device>) -> Losses {
        self.objective.check().unwrap();
        let what = format!("{:?}", self.objective);
        compare(device, &what, &self.outputs, &self.judgement(), self.expected())
    }
}

const STEPS: [Option<FirstStep>; 3] = [None, Some(FirstStep::Classes), Some(FirstStep::Boxes)];

fn focal() -> ClassLoss {
    let (alpha, gamma) = FOCAL;
    ClassLoss::Focal { alpha, gamma }
}

/// Levels with their first steps.
fn two_steps(
    strides: &[usize],
    anchors: usize,
    steps: &[Option<FirstStep>],
) -> Vec<(Level, Option<FirstStep>)> {
    levels(strides, anchors, |_| Layout::Apart { logits: 1 }).into_iter().zip(steps.iter().copied()).collect()
}

/// The paper's, of small levels.
fn papers() -> TwoStep {
    TwoStep {
        levels: two_steps(&[4, 8, 16], 2, &[STEPS[1], STEPS[0], STEPS[2]]),
        first: MatchingRecipe::Thresholds { negative: 0.3, positive: 0.5, force_best: false },
        second: MatchingRecipe::Thresholds { negative: 0.4, positive: 0.5, force_best: false },
        survives: -2.0,
        mining: None,
        sampler: None,
        loss: LossRecipe { classification: focal(), ..LossRecipe::default() },
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if sanitized() { 60 } else { 250 }))]

    #[test]
    fn an_objective_of_two_steps_on_a_device_is_the_cpus(
        first in matching(), second in matching(), mining in proptest::option::of(mining()),
        sampler in proptest::option::of(sampler()), sigmoid in any::<bool>(), boxes in boxes(),
        margin in prop_oneof![Just(0.0f32), 1.0f32..20.0], steps in [0usize..3, 0..3, 0..3], levels_of in 1usize..4,
        anchors in 1usize..4, survives in -3.0f32..2.0, pictures in 1usize..4, side in 8usize..70, seed in any::<u64>(),
    ) {
        let Some(device) = device() else { return Ok(()) };
        let classification = if sigmoid { ClassLoss::Sigmoid {} } else { focal() };
        let objective = TwoStep {
            levels: two_steps(&[8, 4, 16][..levels_of], anchors, &steps.map(|s| STEPS[s])),
            first,
            second,
            survives,
            mining,
            sampler: sampler.map(|s| SamplerRecipe { within_picture: false, ..s }),
            loss: LossRecipe { classification, boxes, box_weight: 0.7, margin },
        };
        Case::new(objective, side, pictures, 12, seed).check(&device);
    }
}

/// More anchors than a block has threads many times over, crowds, and all that can follow the first step.
#[test]
fn large_batches_of_two_steps_are_the_cpus() {
    let Some(device) = device() else { return };
    let thresholds = |force_best| MatchingRecipe::Thresholds { negative: 0.2, positive: 0.4, force_best };
    let sampler = SamplerRecipe { miner: Miner::Ohem {}, samples: 512, ..SamplerRecipe::default() };
    let (mut mined, mut matched) = (0, 0);
    for (i, sampler) in [None, Some(sampler)].into_iter().enumerate() {
        let mining = Some(AnchorMining { anchors: 40, overlap: 0.4 });
        let (first, second) = (thresholds(false), thresholds(true));
        let objective = TwoStep { first, second, mining, sampler, ..papers() };
        let pictures = if sanitized() { 1 } else { 2 };
        let losses = Case::new(objective, 200, pictures, 150, i as u64).check(&device);
        mined += losses.mined;
        matched += losses.matched;
    }
    assert!(mined > 300 && matched > 300, "{matched} matched, {mined} mined");
}

fn face(x1: f32, y1: f32, x2: f32, y2: f32) -> Annotated {
    Annotated { bbox: BBox::new(x1, y1, x2, y2), ignore: false }
}

/// Sixteen anchors that tile 32 x 32 pixels, of which the first step moves some to one place.
#[test]
fn of_anchors_moved_to_one_place_the_first_is_taken() {
    let Some(device) = device() else { return };
    let thresholds = |force_best| MatchingRecipe::Thresholds { negative: 0.6, positive: 0.7, force_best };
    for (force_best, matched) in [(true, 1), (false, 0)] {
        let objective = TwoStep {
            levels: vec![(
                Level { stride: 8, anchors: vec![[8.0; 2]], layout: Layout::Apart { logits: 1 } },
                STEPS[2],
            )],
            second: thresholds(force_best),
            ..papers()
        };
        let mut case = Case::new(objective, 32, 1, 0, 3);
        // The anchors of the first row and of the last to the cell in the middle of the picture's left; the box there overlaps the face by 0.5.
        case.outputs[0].data.fill(0.0);
        for i in [0, 1, 2, 3, 12, 13, 14, 15] {
            let (y, x) = ((i / 4) as f32, (i % 4) as f32);
            case.outputs[0].data[4 * i..4 * i + 2].copy_from_slice(&[-x, 2.0 - y]);
        }
        case.faces = vec![vec![face(0.0, 16.0, 4.0, 24.0)]];
        let losses = case.check(&device);
        assert_eq!((losses.matched, losses.mined), (matched, 0));
        if let Some(Driver::Emulated(_)) = driver() {
            // Whose logit has the slope of a face: below 0.
            let (_, gradient) = case.expected();
            let of_faces: Vec<usize> = (0..16).filter(|i| gradient[64 + i] < 0.0).collect();
            assert_eq!(of_faces, if force_best { vec![0] } else { vec![] });
        }
    }
}

#[test]
fn a_batch_without_faces_teaches_both_steps_background_alone() {
    let Some(device) = device() else { return };
    let case = Case::new(papers(), 40, 2, 0, 5);
    let losses = case.check(&device);
    assert!(losses.class > 0.0 && losses.boxes == 0.0 && losses.faces == 0);
}

#[test]
fn anchors_that_the_first_step_drops_teach_the_second_nothing() {
    let Some(device) = device() else { return };
    let mut case = Case::new(TwoStep { survives: 0.0, ..papers() }, 40, 2, 6, 5);
    // Of a logit that is the threshold itself, too, nothing is passed on.
    case.outputs[0].data.iter_mut().enumerate().for_each(|(i, v)| *v = -((i % 2) as f32));
    let (_, gradient) = case.expected();
    case.check(&device);
    let first: usize = case.outputs[..2].iter().map(|t| t.data.len()).sum();
    let dropped = first..first + case.outputs[2].data.len() + case.outputs[3].data.len();
    assert!(gradient[dropped.clone()].iter().all(|&g| g == 0.0), "what was dropped is learnt");
    assert!(gradient[dropped.end..].iter().any(|&g| g != 0.0), "the other levels learn nothing");
}

/// A step of a network whose outputs are judged in two steps.
#[test]
fn a_step_that_is_judged_twice_on_the_device_has_the_gradients_of_one_judged_on_the_host() {
    let Some(device) = device() else { return };
    let objective = TwoStep {
        levels: two_steps(&[4, 4], 1, &[STEPS[1], STEPS[2]]),
        mining: Some(AnchorMining { anchors: 3, overlap: 0.3 }),
        ..papers()
    };
    let mut b = Builder::new();
    let x = b.input("image", 3);
    let x = b.conv("first", x, Conv2d::new(3, 12, 3).stride(4).bias());
    let x = b.batchnorm("norm", x, 12);
    let x = b.relu(x);
    for (name, channels) in [("class", 1), ("box", 8), ("class2", 1), ("box2", 4), ("class3", 2), ("box3", 8)]
    {
        let y = b.conv(name, x, Conv2d::new(12, channels, 1).bias());
        b.output(name, y);
    }
    let graph = b.finish();
    let weights = Weights::random(&graph, 3);
    let rng = &mut Rng::new(8);
    let shape = Shape::new(3, 3, 32, 32);
    let plain: Vec<Level> = objective.levels.iter().map(|(level, _)| level.clone()).collect();
    let faces: Vec<Vec<Annotated>> = (0..3).map(|_| random_faces(&plain, 32, 6, rng)).collect();
    let pixels: Vec<u8> = (0..shape.len()).map(|_| rng.below(256) as u8).collect();
    for (element, most) in [(Element::F32, 1e-5), (Element::Bf16, 1e-2)] {
        let mut host = on_device(&graph, &weights, &Frozen::default(), &device, element);
        let outputs = host.forward(&pixels, shape, &table()).unwrap();
        let (expected, d) = objective.judge(&outputs, &faces, |n| Rng::new(n as u64), 2).unwrap();
        host.backward(&d).unwrap();
        let mut engine = on_device(&graph, &weights, &Frozen::default(), &device, element);
        let judgement = Judgement {
            objective: (&objective).into(),
            faces: &faces,
            inside: &[],
            seeds: (0..3).collect(),
            weight: 1.0,
        };
        let losses = engine.forward_judged(&pixels, shape, &table(), &[judgement]).unwrap().unwrap()[0];
        engine.backward_judged().unwrap();
        assert!((losses.class - expected.class).abs() < 1e-5 * expected.class);
        assert!((losses.boxes - expected.boxes).abs() < 1e-5 * expected.boxes);
        assert!(losses.matched > 0 && losses.matched == expected.matched && losses.mined == expected.mined);
        let grads = |engine: &mut dyn Engine| engine.params_and_grads().unwrap().1.concat();
        let (got, expected) = (grads(&mut engine), grads(&mut host));
        let largest = expected.iter().fold(0f32, |m, v| m.max(v.abs()));
        assert!(largest > 0.0);
        for (g, e) in got.iter().zip(&expected) {
            assert!((g - e).abs() < most * largest, "{element:?}: {g} for {e}");
        }
    }
}

#[test]
fn an_objective_of_two_steps_whose_driver_fails_at_any_call_is_an_error() {
    let Some(Driver::Emulated(emulator)) = driver() else { return };
    if !alone("two_step::an_objective_of_two_steps_whose_driver_fails_at_any_call_is_an_error") {
        return;
    }
    let objective = TwoStep {
        second: MatchingRecipe::Thresholds { negative: 0.3, positive: 0.5, force_best: true },
        mining: Some(AnchorMining::default()),
        ..papers()
    };
    let case = Case::new(objective, 24, 2, 4, 1);
    fail_at_each(emulator, "an objective of two steps", || {
        let device = Device::new(0)?;
        let stream = Stream::new(device.context())?;
        let mut kernels = Judge::new(&device)?;
        let (_, buffers) = judged(&case.outputs, &case.judgement(), &stream, &mut kernels)?;
        Ok((buffers, kernels, stream, device))
    });
}
