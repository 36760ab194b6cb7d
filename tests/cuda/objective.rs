//! Matching, mining, sampling and losses on a device against the CPU's objective: the same anchors, losses and gradients within rounding;
//! the same bits in any order of threads.

use crate::emulator::{device, driver, Driver};
use crate::failures::{alone, fail_at_each};
use crate::train::{on_device, table};
use farface::detect::anchors::Anchor;
use farface::detect::BBox;
use farface::error::Result;
use farface::gpu::driver::Stream;
use farface::gpu::map::Element;
use farface::gpu::memory::DeviceBuffer;
use farface::gpu::ops::train::objective::Judge;
use farface::gpu::ops::Device;
use farface::gpu::upload::Upload;
use farface::graph::init::Rng;
use farface::graph::{Builder, Graph, Weights};
use farface::layers::Conv2d;
use farface::shape::{Shape, Tensor};
use farface::train::data::Annotated;
use farface::train::device::objective::judge;
use farface::train::losses::{encode_box, BoxLoss, ClassLoss, LossRecipe, NoOverlap};
use farface::train::matching::{AnchorMining, MatchingRecipe, SecondPass};
use farface::train::network::{Engine, Frozen, Judgement};
use farface::train::objective::{Layout, Level, Losses, Objective, PyramidAnchors};
use farface::train::sampler::{Miner, Reduction, SamplerRecipe};
use proptest::prelude::*;
use std::sync::Arc;

/// Bytes behind the gradients.
const GUARD: usize = 64;

/// A batch: what the network puts out, what there is to find, and the seeds of the draws.
struct Case {
    objective: Objective,
    outputs: Vec<Tensor>,
    faces: Vec<Vec<Annotated>>,
    inside: Vec<BBox>,
    seeds: Vec<u64>,
    weight: f32,
}

impl Case {
    /// `pictures` of `side` pixels with up to `most` faces each. Some boxes that the outputs mean are near a face.
    fn new(objective: Objective, side: usize, pictures: usize, most: usize, weight: f32, seed: u64) -> Self {
        let rng = &mut Rng::new(seed);
        let faces: Vec<Vec<Annotated>> =
            (0..pictures).map(|_| random_faces(&objective.levels, side, most, rng)).collect();
        let mut outputs = Vec::new();
        for level in &objective.levels {
            let cells = side.div_ceil(level.stride);
            let n = level.anchors.len();
            let of = |c: usize| Shape { n: pictures, c, h: cells, w: cells };
            let (logits, apart) = (level.layout.logits(), level.layout.outputs() == 2);
            let (mut class, mut boxes) = (Tensor::zeros(of(logits * n)), Tensor::zeros(of(4 * n)));
            class.data.iter_mut().for_each(|v| *v = 2.0 * rng.normal());
            for (k, t) in boxes.data.chunks_exact_mut(4).enumerate() {
                let (a, cell) = (k % n, k / n % (cells * cells));
                let faces = &faces[k / n / (cells * cells)];
                let anchor = Anchor::on_cell(cell / cells, cell % cells, level.stride, level.anchors[a]);
                t.copy_from_slice(&random_offsets(anchor, faces, objective.variances, rng));
            }
            if apart {
                outputs.extend([class, boxes]);
                continue;
            }
            let mut both = Tensor::zeros(of(5 * n));
            let cells = both.data.chunks_exact_mut(5 * n);
            for ((to, logits), t) in cells.zip(class.data.chunks_exact(n)).zip(boxes.data.chunks_exact(4 * n))
            {
                to[..n].copy_from_slice(logits);
                for (i, v) in t.iter().enumerate() {
                    let place = if level.layout == Layout::Joint { i } else { i % 4 * n + i / 4 };
                    to[n + place] = *v;
                }
            }
            outputs.push(both);
        }
        let inside = (0..pictures)
            .map(|_| {
                BBox::new(0.0, 0.0, rng.range(0.5, 1.0) * side as f32, rng.range(0.5, 1.0) * side as f32)
            })
            .collect();
        let seeds = (0..pictures).map(|_| rng.bits()).collect();
        Self { objective, outputs, faces, inside, seeds, weight }
    }

    fn judgement(&self) -> Judgement<'_> {
        let Self { objective, faces, inside, seeds, weight, .. } = self;
        Judgement { objective: objective.into(), faces, inside, seeds: seeds.clone(), weight: *weight }
    }

    /// On the host.
    fn expected(&self) -> (Losses, Vec<f32>) {
        let rng = |n: usize| Rng::new(self.seeds[n]);
        let (mut losses, d) =
            self.objective.judge_within(&self.outputs, &self.faces, &self.inside, rng, 2).unwrap();
        losses.class *= f64::from(self.weight);
        losses.boxes *= f64::from(self.weight);
        (losses, d.iter().flat_map(|t| t.data.iter().map(|v| v * self.weight)).collect())
    }
}

/// On the device: losses, and the buffers of the outputs and of their gradients.
pub fn judged(
    outputs: &[Tensor],
    judgement: &Judgement<'_>,
    stream: &Stream,
    kernels: &mut Judge,
) -> Result<(Losses, [DeviceBuffer; 2])> {
    let values: Vec<f32> = outputs.iter().flat_map(|t| t.data.iter().copied()).collect();
    let shapes: Vec<Shape> = outputs.iter().map(|t| t.shape).collect();
    let outputs = DeviceBuffer::of(stream, &values)?;
    let gradient = DeviceBuffer::new(stream.context(), values.len() * 4 + GUARD)?;
    gradient.fill(stream, 0..gradient.len(), 0xff)?;
    let losses =
        judge(kernels, stream, [&outputs, &gradient], &shapes, std::slice::from_ref(judgement), None)?;
    Ok((losses[0], [outputs, gradient]))
}

/// Losses and gradients on the device; nothing is written past them.
fn judged_within(
    outputs: &[Tensor],
    judgement: &Judgement<'_>,
    stream: &Stream,
    kernels: &mut Judge,
) -> (Losses, Vec<f32>) {
    let (losses, [outputs, gradient]) = judged(outputs, judgement, stream, kernels).unwrap();
    let behind = gradient.values::<u8>(stream, outputs.len(), GUARD).unwrap();
    assert!(behind.iter().all(|&b| b == 0xff), "written past the gradients");
    (losses, gradient.values(stream, 0, outputs.len() / 4).unwrap())
}

/// Offsets on an anchor, mostly of a box near one of the faces that it overlaps, if there is one.
pub fn random_offsets(anchor: Anchor, faces: &[Annotated], variances: [f32; 2], rng: &mut Rng) -> [f32; 4] {
    let near = faces.iter().map(|f| f.bbox).find(|b| b.iou(&anchor.bbox()) > 0.05);
    match near {
        Some(b) if rng.below(3) > 0 => {
            let [cx, cy] = anchor.center;
            let anchor = [cx, cy, anchor.size[0], anchor.size[1]];
            let goal = encode_box([b.x1, b.y1, b.x2, b.y2], anchor, variances);
            let noise = rng.range(0.0, 0.3);
            goal.map(|v| v + noise * rng.normal())
        }
        // A box that is no number's, now and then.
        _ if rng.below(100) == 0 => [0.0, 0.0, 1e3, 1e3],
        _ => [(); 4].map(|()| rng.normal()),
    }
}

/// On an anchor exactly, near one, equal to another, partly outside; a few to be ignored, a few that are none.
pub fn random_faces(levels: &[Level], side: usize, most: usize, rng: &mut Rng) -> Vec<Annotated> {
    let mut faces: Vec<Annotated> = Vec::new();
    for _ in 0..rng.below(most + 1) {
        let level = &levels[rng.below(levels.len())];
        let cells = side.div_ceil(level.stride);
        let size = level.anchors[rng.below(level.anchors.len())];
        let anchor = Anchor::on_cell(rng.below(cells), rng.below(cells), level.stride, size).bbox();
        let (w, h) = (anchor.width(), anchor.height());
        let mut moved = |by: f32| {
            let mut off = |side: f32| rng.range(-by * side, by * side);
            BBox::new(anchor.x1 + off(w), anchor.y1 + off(h), anchor.x2 + off(w), anchor.y2 + off(h))
        };
        let (some, much) = (moved(0.3), moved(1.2));
        let bbox = match rng.below(12) {
            0 => anchor,
            1 if !faces.is_empty() => faces[rng.below(faces.len())].bbox,
            2 | 3 => much,
            4 => BBox { x2: anchor.x1, ..anchor },
            _ => some,
        };
        faces.push(Annotated { bbox, ignore: rng.below(7) == 0 });
    }
    faces
}

/// Holds the device to the host's objective; what is found. On another machine's arithmetic an anchor on the very edge of a choice may be
/// another, so that which anchors count is compared on the emulator, whose functions are the host's.
pub fn compare(
    device: &Arc<Device>,
    what: &str,
    outputs: &[Tensor],
    judgement: &Judgement<'_>,
    (losses, expected): (Losses, Vec<f32>),
) -> Losses {
    let stream = Stream::new(device.context()).unwrap();
    let mut kernels = Judge::new(device).unwrap();
    let (got, gradient) = judged_within(outputs, judgement, &stream, &mut kernels);
    let counts = |l: &Losses| (l.matched, l.mined, l.faces);
    assert_eq!(counts(&got), counts(&losses), "{what}");
    let pairs = [(got.class, losses.class), (got.boxes, losses.boxes), (got.iou, losses.iou)];
    for (got, expected) in pairs {
        let off = (got - expected).abs();
        assert!(off <= 1e-5 * expected.abs().max(1e-6), "{what}: losses {pairs:?}");
    }
    let largest = expected.iter().fold(0f32, |m, v| m.max(v.abs()));
    for (i, (&g, &e)) in gradient.iter().zip(&expected).enumerate() {
        assert!((g - e).abs() <= 1e-5 * largest, "{what}: gradient {i}: {g} for {e}, largest {largest}");
    }
    if let Some(Driver::Emulated(emulator)) = driver() {
        let same = gradient.iter().zip(&expected).position(|(&g, &e)| (g == 0.0) != (e == 0.0));
        assert_eq!(same, None, "{what}: another anchor counts");
        emulator.backwards(true);
        // In memory that holds what the call before left.
        let (again, backwards) = judged_within(outputs, judgement, &stream, &mut kernels);
        emulator.backwards(false);
        let bits = |v: &[f32]| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        assert!(again == got && bits(&backwards) == bits(&gradient), "{what}: other bits in another order");
    }
    losses
}

fn check(device: &Arc<Device>, case: &Case) -> Losses {
    let what = format!("{:?}", case.objective);
    compare(device, &what, &case.outputs, &case.judgement(), case.expected())
}

const LAYOUTS: [Layout; 3] = [Layout::Joint, Layout::ByKind, Layout::Apart { logits: 1 }];
pub const FOCAL: (f32, f32) = (0.25, 2.0);

/// Levels of some strides, with anchors of some sizes, not all square.
pub fn levels(strides: &[usize], anchors: usize, layouts: impl Fn(usize) -> Layout) -> Vec<Level> {
    let level = |(i, &stride): (usize, &usize)| {
        let size = |a: usize| {
            let side = stride as f32 * [2.0, 3.1, 1.3][a % 3];
            [side, side * [1.0, 1.25, 0.8][(a + i) % 3]]
        };
        Level { stride, anchors: (0..anchors + i % 2).map(size).collect(), layout: layouts(i) }
    };
    strides.iter().enumerate().map(level).collect()
}

/// Cases take longer under sanitizers.
pub fn sanitized() -> bool {
    std::env::var_os("FARFACE_TEST_SANITIZE").is_some()
}

pub fn matching() -> impl Strategy<Value = MatchingRecipe> {
    (0..5, 0.05f32..0.5, 0.0f32..0.4).prop_map(|(kind, low, more)| {
        let scan =
            |second_pass| MatchingRecipe::TwoPassScan { lambda1: low + more, lambda2: low, second_pass };
        let thresholds =
            |force_best| MatchingRecipe::Thresholds { negative: low, positive: low + more, force_best };
        match kind {
            0 => scan(SecondPass::All),
            1 => scan(SecondPass::Best),
            2 => thresholds(false),
            3 => thresholds(true),
            _ => MatchingRecipe::FirstStep { positive: low + more },
        }
    })
}

pub fn mining() -> impl Strategy<Value = AnchorMining> {
    (1usize..12, prop_oneof![0.2f32..0.5, 0.5f32..0.9])
        .prop_map(|(anchors, overlap)| AnchorMining { anchors, overlap })
}

pub fn sampler() -> impl Strategy<Value = SamplerRecipe> {
    let miner = prop_oneof![
        Just(Miner::All {}),
        Just(Miner::Random {}),
        Just(Miner::Ohem {}),
        Just(Miner::Wrs {}),
        (1usize..200, prop_oneof![Just(0.0f32), 0.0f32..1.0])
            .prop_map(|(each, min_loss)| Miner::Balanced { each, min_loss }),
        (0.1f32..0.9, 0.0f32..3.0).prop_map(|(alpha, gamma)| Miner::Focal { alpha, gamma }),
    ];
    let samples = prop_oneof![Just(0usize), 1usize..40, 40usize..2000];
    (miner, any::<bool>(), samples, 1usize..6, any::<bool>(), any::<bool>()).prop_map(
        |(miner, grouped, samples, negatives_per_positive, sum, within_picture)| SamplerRecipe {
            miner,
            grouped,
            samples,
            negatives_per_positive,
            reduction: if sum { Reduction::Sum } else { Reduction::Mean },
            within_picture,
        },
    )
}

pub fn boxes() -> impl Strategy<Value = BoxLoss> {
    let no_overlap = || prop_oneof![Just(NoOverlap::Zero), Just(NoOverlap::SmoothL1)];
    prop_oneof![
        prop_oneof![Just(0.0f32), 0.01f32..2.0].prop_map(|beta| BoxLoss::SmoothL1 { beta }),
        no_overlap().prop_map(|no_overlap| BoxLoss::NegLnIou { no_overlap }),
        no_overlap().prop_map(|no_overlap| BoxLoss::LeastSquareIou { no_overlap }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if sanitized() { 60 } else { 250 }))]

    #[test]
    fn an_objective_on_a_device_is_the_cpus(
        matching in matching(), mining in proptest::option::of(mining()),
        sampler in proptest::option::weighted(0.7, sampler()), class in 0..5, boxes in boxes(),
        margin in prop_oneof![Just(0.0f32), 1.0f32..20.0], layout in 0usize..3, levels_of in 1usize..4, anchors in 1usize..4,
        variances in prop_oneof![Just([1.0f32; 2]), Just([0.1f32, 0.2])], pictures in 1usize..4, side in 8usize..70,
        weight in prop_oneof![Just(1.0f32), Just(0.25f32)], seed in any::<u64>(),
    ) {
        let Some(device) = device() else { return Ok(()) };
        let (alpha, gamma) = FOCAL;
        let classification = match class {
            0 => ClassLoss::Softmax {},
            1 => ClassLoss::Sigmoid {},
            2 => ClassLoss::Focal { alpha, gamma },
            3 => ClassLoss::QualityFocal { beta: 1.5 },
            _ => ClassLoss::RegressionAwareFocal { alpha, gamma },
        };
        // What goes with what: two logits want softmax and a sampler; HAMBox's loss wants mining.
        let softmax = class == 0;
        let layouts = |i: usize| if softmax { Layout::Apart { logits: 2 } } else { LAYOUTS[(layout + i) % 3] };
        let objective = Objective {
            levels: levels(&[8, 4, 16][..levels_of], anchors, layouts),
            variances,
            matching,
            mining: if class == 4 { mining.or(Some(AnchorMining::default())) } else { mining },
            sampler: if softmax { sampler.or(Some(SamplerRecipe::default())) } else { sampler },
            loss: LossRecipe { classification, boxes, box_weight: 0.7, margin },
        };
        objective.check().unwrap();
        check(&device, &Case::new(objective, side, pictures, 12, weight, seed));
    }
}

fn plain(layout: Layout, classification: ClassLoss) -> Objective {
    Objective {
        levels: levels(&[4, 8, 16], 2, |_| layout),
        variances: [1.0; 2],
        matching: MatchingRecipe::FirstStep { positive: 0.35 },
        mining: None,
        sampler: None,
        loss: LossRecipe { classification, ..LossRecipe::default() },
    }
}

/// More anchors than a block has threads many times over, shuffles of thousands, crowds that choose one after another.
#[test]
fn large_choices_are_the_cpus() {
    let Some(device) = device() else { return };
    let (mut mined, mut matched) = (0, 0);
    for (i, miner) in [
        Miner::Random {},
        Miner::Ohem {},
        Miner::Wrs {},
        Miner::Balanced { each: 700, min_loss: 0.03 },
        Miner::Focal { alpha: 0.25, gamma: 2.0 },
    ]
    .into_iter()
    .enumerate()
    {
        for (grouped, samples) in [(false, 3000), (true, 512), (false, 0)] {
            let objective = Objective {
                matching: MatchingRecipe::Thresholds { negative: 0.2, positive: 0.3, force_best: true },
                mining: Some(AnchorMining { anchors: 40, overlap: 0.4 }),
                sampler: Some(SamplerRecipe {
                    miner,
                    grouped,
                    samples,
                    within_picture: i % 2 == 0,
                    ..SamplerRecipe::default()
                }),
                ..plain(LAYOUTS[i % 3], ClassLoss::Sigmoid {})
            };
            let pictures = if sanitized() { 1 } else { 2 };
            let losses = check(&device, &Case::new(objective, 200, pictures, 150, 1.0, i as u64));
            mined += losses.mined;
            matched += losses.matched;
        }
    }
    println!("{matched} anchors matched, {mined} mined");
    assert!(mined > 1000 && matched > 1000, "{matched} matched, {mined} mined");
}

/// Two faces that overlap one anchor equally, one that overlaps two anchors equally, and two anchors whose boxes fit a face equally.
#[test]
fn ties_go_to_the_first() {
    let Some(device) = device() else { return };
    let face = |x1, y1, x2, y2| Annotated { bbox: BBox::new(x1, y1, x2, y2), ignore: false };
    let faces = [face(9.0, 9.0, 11.0, 11.0), face(13.0, 13.0, 15.0, 15.0), face(12.0, 16.0, 20.0, 24.0)];
    let thresholds = |force_best| MatchingRecipe::Thresholds { negative: 0.4, positive: 0.5, force_best };
    let best = MatchingRecipe::TwoPassScan { lambda1: 0.6, lambda2: 0.05, second_pass: SecondPass::Best };
    // Matched anchors and mined ones.
    for (matching, mining, found) in [
        (MatchingRecipe::FirstStep { positive: 0.06 }, None, (3, 0)),
        (thresholds(true), None, (2, 0)),
        (best, None, (2, 0)),
        (thresholds(false), Some(AnchorMining { anchors: 1, overlap: 0.3 }), (0, 1)),
    ] {
        let objective = Objective {
            levels: vec![Level { stride: 8, anchors: vec![[8.0; 2]], layout: Layout::Joint }],
            matching,
            mining,
            sampler: Some(SamplerRecipe { miner: Miner::All {}, ..SamplerRecipe::default() }),
            ..plain(Layout::Joint, ClassLoss::Sigmoid {})
        };
        let mut case = Case::new(objective, 32, 1, 0, 1.0, 3);
        // Every anchor's box is the anchor; the offsets' losses tell the faces apart.
        case.outputs[0].data.chunks_exact_mut(5).for_each(|cell| cell[1..].fill(0.0));
        case.objective.loss.boxes = BoxLoss::SmoothL1 { beta: 1.0 };
        case.faces = vec![faces.to_vec()];
        let losses = check(&device, &case);
        assert_eq!((losses.matched, losses.mined), found, "{matching:?}");
    }
}

#[test]
fn a_batch_without_faces_learns_background_alone() {
    let Some(device) = device() else { return };
    for sampler in [None, Some(SamplerRecipe::default())] {
        let objective =
            Objective { sampler, ..plain(Layout::Joint, ClassLoss::Focal { alpha: 0.25, gamma: 2.0 }) };
        let losses = check(&device, &Case::new(objective, 40, 2, 0, 1.0, 5));
        assert!(losses.class > 0.0 && losses.boxes == 0.0 && losses.faces == 0);
    }
}

/// A network of two sets of outputs: a detector's, and what is around the faces.
fn two_heads() -> Graph {
    let mut b = Builder::new();
    let x = b.input("image", 3);
    let x = b.conv("first", x, Conv2d::new(3, 12, 3).stride(4).bias());
    let x = b.batchnorm("norm", x, 12);
    let x = b.relu(x);
    for (name, channels) in [("own", 10), ("around", 5)] {
        let y = b.conv(name, x, Conv2d::new(12, channels, 1).bias());
        b.output(name, y);
    }
    b.finish()
}

#[test]
fn a_step_that_is_judged_on_the_device_has_the_gradients_of_one_judged_on_the_host() {
    let Some(device) = device() else { return };
    let graph = two_heads();
    let weights = Weights::random(&graph, 3);
    let of = |anchors: usize| Objective {
        levels: levels(&[4], anchors, |_| Layout::Joint),
        mining: Some(AnchorMining { anchors: 3, overlap: 0.3 }),
        ..plain(Layout::Joint, ClassLoss::RegressionAwareFocal { alpha: 0.25, gamma: 2.0 })
    };
    let own = of(2);
    let around = PyramidAnchors::new(of(1), 1, 0.5);
    let rng = &mut Rng::new(8);
    let shape = Shape::new(3, 3, 32, 32);
    let faces: Vec<Vec<Annotated>> = (0..3).map(|_| random_faces(&own.levels, 32, 6, rng)).collect();
    let pixels: Vec<u8> = (0..shape.len()).map(|_| rng.below(256) as u8).collect();
    let outer = around.all_around(&faces);
    for (element, most) in [(Element::F32, 1e-5), (Element::Bf16, 1e-2)] {
        let mut host = on_device(&graph, &weights, &Frozen::default(), &device, element);
        let outputs = host.forward(&pixels, shape, &table()).unwrap();
        let rng = |n: usize| Rng::new(n as u64);
        let (mut expected, mut d) = own.judge(&outputs[..1], &faces, rng, 2).unwrap();
        let (more, gradients) = around.judge(&outputs[1..], &faces, rng, 2).unwrap();
        d.extend(gradients);
        expected.class += more.class;
        expected.boxes += more.boxes;
        host.backward(&d).unwrap();

        let mut engine = on_device(&graph, &weights, &Frozen::default(), &device, element);
        assert!(engine.backward_judged().is_err(), "nothing was judged");
        let seeds = || (0..3).collect();
        let judgements = [
            Judgement { objective: (&own).into(), faces: &faces, inside: &[], seeds: seeds(), weight: 1.0 },
            Judgement {
                objective: (&around.objective).into(),
                faces: &outer,
                inside: &[],
                seeds: seeds(),
                weight: around.weight,
            },
        ];
        let short = engine.forward_judged(&pixels, shape, &table(), &judgements[..1]);
        assert!(short.is_err(), "an output that nobody judges");
        let losses = engine.forward_judged(&pixels, shape, &table(), &judgements).unwrap().unwrap();
        engine.backward_judged().unwrap();
        let class = losses[0].class + losses[1].class;
        assert!((class - expected.class).abs() < 1e-5 * expected.class, "{class} for {}", expected.class);
        assert!(losses[0].matched > 0 && losses[1].matched > 0 && losses[0].matched == expected.matched);
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
fn an_upload_holds_what_was_written_last() {
    let Some(device) = device() else { return };
    let stream = Stream::new(device.context()).unwrap();
    let mut upload = Upload::default();
    assert!(upload.there().is_err());
    for (i, bytes) in [5usize, 3, 900, 900, 2, 901].into_iter().enumerate() {
        upload.upload(&stream, bytes, |to| to.fill(i as u8 + 1)).unwrap();
        let there = upload.there().unwrap().values::<u8>(&stream, 0, bytes).unwrap();
        assert!(there.iter().all(|&v| v == i as u8 + 1), "{i}");
    }
}

#[test]
fn an_objective_whose_driver_fails_at_any_call_is_an_error() {
    let Some(Driver::Emulated(emulator)) = driver() else { return };
    if !alone("objective::an_objective_whose_driver_fails_at_any_call_is_an_error") {
        return;
    }
    let objective = Objective {
        matching: MatchingRecipe::Thresholds { negative: 0.3, positive: 0.5, force_best: true },
        mining: Some(AnchorMining::default()),
        sampler: Some(SamplerRecipe::default()),
        ..plain(Layout::Joint, ClassLoss::Sigmoid {})
    };
    let case = Case::new(objective, 24, 2, 4, 1.0, 1);
    fail_at_each(emulator, "an objective", || {
        let device = Device::new(0)?;
        let stream = Stream::new(device.context())?;
        let mut kernels = Judge::new(&device)?;
        let (_, buffers) = judged(&case.outputs, &case.judgement(), &stream, &mut kernels)?;
        Ok((buffers, kernels, stream, device))
    });
}
