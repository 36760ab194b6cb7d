//! Steps of the optimiser and whole trainings on a device: the CPU's, within rounding; the same bits again, stopped or not.

use crate::drawing;
use crate::emulator::{device, driver, Driver};
use crate::plain_step::{mixed, plain_step, worst};
use crate::train::{on_device, step, table, Batch};
use farface::cpu::dense::bf16_supported;
use farface::detect::config::DetectorConfig;
use farface::detect::ModelConfig;
use farface::gpu::map::Element;
use farface::graph::init::Rng;
use farface::graph::{Builder, Graph, Weights};
use farface::nets::mobilenet::BlockStack;
use farface::nets::nano::{nano, Nano};
use farface::shape::{Shape, Tensor};
use farface::train::checkpoint::Checkpoint;
use farface::train::device::DeviceEngine;
use farface::train::network::{Engine, Frozen, Network, Update, Updated};
use farface::train::optim::{Ema, EmaRecipe, Optimizer, OptimizerRecipe, ParamOptions};
use farface::train::trainer::{Resources, StepReport, Trainer};
use std::path::Path;

/// farface-nano, narrower.
fn small_nano() -> Graph {
    let mut b = Builder::new();
    let image = b.input("image", 3);
    let net = Nano {
        backbone: BlockStack::mobilenet_v1(4),
        channels: 12,
        fine_channels: 8,
        plain_convs: false,
        head_blocks: 1,
        anchors: [1, 2, 2, 1, 1],
    };
    nano(&mut b, image, &net);
    b.finish()
}

fn options(graph: &Graph, trainable: &[bool]) -> Vec<ParamOptions> {
    let option = |(i, (p, &trained)): (usize, (&farface::graph::build::Param, &bool))| ParamOptions {
        frozen: !trained,
        decay: i % 3 != 0,
        lr_multiplier: if i % 5 == 0 { 0.5 } else { 1.0 },
        ..ParamOptions::new(p.name.clone(), p.len())
    };
    graph.params.iter().zip(trainable).enumerate().map(option).collect()
}

pub const RULES: [OptimizerRecipe; 3] = [
    OptimizerRecipe::Sgd { momentum: 0.9, weight_decay: 5e-4, nesterov: false },
    OptimizerRecipe::Sgd { momentum: 0.8, weight_decay: 1e-3, nesterov: true },
    OptimizerRecipe::AdamW { beta1: 0.9, beta2: 0.99, epsilon: 1e-3, weight_decay: 0.01 },
];

/// Pictures of waves with some noise. Of noise alone nothing is left after a few strides, and what a normalisation makes of nothing
/// depends on every rounding.
fn waves(shape: Shape, rng: &mut Rng) -> Vec<u8> {
    let mut pixels = Vec::with_capacity(shape.len());
    for _ in 0..shape.n {
        let of: Vec<[f32; 4]> = (0..12)
            .map(|_| [rng.range(-0.3, 0.3), rng.range(-0.3, 0.3), rng.range(0.0, 6.3), rng.range(5.0, 40.0)])
            .collect();
        for i in 0..shape.h * shape.w {
            let (y, x) = ((i / shape.w) as f32, (i % shape.w) as f32);
            for c in 0..3 {
                let sum: f32 =
                    of[c * 4..][..4].iter().map(|[a, b, p, size]| size * (a * x + b * y + p).sin()).sum();
                pixels.push((128.0 + sum + 5.0 * rng.normal()) as u8);
            }
        }
    }
    pixels
}

/// A training of `small_nano` towards fixed targets: the mean squared distance of its outputs from them.
pub struct Course<E> {
    pub engine: E,
    optimizer: Optimizer,
    average: Ema,
    rng: Rng,
    targets: Option<Vec<Tensor>>,
    side: usize,
}

impl<E: Engine> Course<E> {
    pub fn new(mut engine: E, side: usize, rule: OptimizerRecipe) -> Self {
        let options = options(engine.graph(), engine.trainable());
        let average = Ema::new(EmaRecipe::default(), engine.params().unwrap()).unwrap();
        Self {
            engine,
            optimizer: Optimizer::new(rule, options).unwrap(),
            average,
            rng: Rng::new(4),
            targets: None,
            side,
        }
    }

    /// The loss and the gradient's norm.
    pub fn step(&mut self, clip: f32) -> (f64, f64) {
        let shape = Shape::new(4, 3, self.side, self.side);
        let pixels = waves(shape, &mut self.rng);
        let outputs = self.engine.forward(&pixels, shape, &table()).unwrap();
        let targets = self.targets.get_or_insert_with(|| {
            let mut rng = Rng::new(9);
            let mut random = |s: Shape| Tensor::from_vec(s, (0..s.len()).map(|_| rng.normal()).collect());
            outputs.iter().map(|y| random(y.shape)).collect()
        });
        let mut loss = 0.0;
        let mut gradient = |(y, t): (&Tensor, &Tensor)| {
            let count = y.data.len() as f32;
            loss += y.data.iter().zip(&t.data).map(|(y, t)| f64::from((y - t).powi(2) / count)).sum::<f64>();
            Tensor::from_vec(
                y.shape,
                y.data.iter().zip(&t.data).map(|(y, t)| 2.0 * (y - t) / count).collect(),
            )
        };
        let d: Vec<Tensor> = outputs.iter().zip(&*targets).map(&mut gradient).collect();
        self.engine.backward(&d).unwrap();
        let average = Some(&mut self.average);
        let update = Update { optimizer: &mut self.optimizer, average, clip, lr: 2e-3 };
        match self.engine.update(update).unwrap() {
            Updated::Done { norm } => (loss, norm),
            Updated::NotFinite { param } => panic!("the gradient of {param} is not finite"),
        }
    }

    /// Parameters, averages and the optimiser's buffers.
    pub fn state(&mut self) -> [Vec<f32>; 3] {
        self.engine.settle(&mut self.optimizer, Some(&mut self.average)).unwrap();
        let buffers = self.optimizer.save().buffers.into_values().flatten().collect();
        [self.engine.params().unwrap().concat(), self.average.average.concat(), buffers]
    }
}

/// How far apart two vectors are, relative to the second's length.
pub fn distance(a: &[f32], b: &[f32]) -> f64 {
    let squares = |v: &mut dyn Iterator<Item = f64>| v.map(|v| v * v).sum::<f64>().sqrt();
    assert_eq!(a.len(), b.len());
    squares(&mut a.iter().zip(b).map(|(a, b)| f64::from(a - b)))
        / squares(&mut b.iter().map(|&b| f64::from(b)))
}

/// The most that ten steps may be off the CPU's: losses, then parameters, averages and the optimiser's buffers, as [`distance`]
/// measures it. Buffers are sums of gradients, in which a rectifier that rounding turned is seen at once.
struct Bounds {
    loss: f64,
    state: [f64; 3],
}

fn ten_steps(graph: &Graph, side: usize, still: &Frozen, f32s: &Bounds, bf16s: &Bounds) {
    let Some(device) = device() else { return };
    let weights = Weights::default().completed(graph, 7);
    let course = |element, rule| Course::new(on_device(graph, &weights, still, &device, element), side, rule);
    let clips = |n: usize| if n.is_multiple_of(2) { 1.0 } else { 3.0 };
    for rule in RULES {
        let mut cpu =
            Course::new(Network::<f32>::new(graph.clone(), &weights, still, 2).unwrap(), side, rule);
        let expected: Vec<_> = (1..=10).map(|n| (cpu.step(clips(n)), cpu.state())).collect();
        // The optimiser's parameters and gradients are f32 whatever the maps are: bf16 by one rule is enough.
        let elements = [(Element::F32, f32s), (Element::Bf16, bf16s)];
        for (element, bounds) in elements.into_iter().take(if rule == RULES[0] { 2 } else { 1 }) {
            let mut course = course(element, rule);
            let mut worst = (0.0f64, 0.0f64, [0.0f64; 3]);
            for (n, ((loss, norm), state)) in (1..).zip(&expected) {
                let (got, got_norm) = course.step(clips(n));
                worst.0 = worst.0.max((got - loss).abs() / loss);
                worst.1 = worst.1.max((got_norm - norm).abs() / norm);
                for (worst, (got, e)) in worst.2.iter_mut().zip(course.state().iter().zip(state)) {
                    *worst = worst.max(distance(got, e));
                }
            }
            let (first, last) = (expected[0].0 .0, expected[9].0 .0);
            let state = worst.2.map(|w| format!("{w:.1e}")).join(", ");
            println!(
                "{element:?}, {rule:?}: loss {first:.3} to {last:.3}; losses off by {:.1e}, norms {:.1e}, state {state}",
                worst.0, worst.1
            );
            assert!(last < first, "{rule:?} learns");
            assert!(worst.0 < bounds.loss, "{element:?}, {rule:?}: losses off by {:e}", worst.0);
            let within = worst.2.iter().zip(bounds.state).all(|(&w, most)| w < most);
            assert!(within, "{element:?}, {rule:?}: state off by {state}");
        }
    }
    let Some(Driver::Emulated(emulator)) = driver() else { return };
    let bits = |mut course: Course<DeviceEngine>, look: bool| {
        for n in 1..=4 {
            course.step(clips(n));
            if n == 2 && look {
                // Looked at in between: what is brought to the host and back changes nothing.
                course.state();
                course.engine.replaced();
            }
        }
        course.state().map(|v| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>())
    };
    let once = bits(course(Element::Bf16, RULES[2]), false);
    emulator.backwards(true);
    let again = bits(course(Element::Bf16, RULES[2]), true);
    emulator.backwards(false);
    assert!(once == again, "other bits in another order");
}

#[test]
fn ten_steps_of_a_random_network_on_a_device_are_the_cpus_within_rounding() {
    let graph = mixed(&mut Rng::new(5));
    let f32s = Bounds { loss: 1e-5, state: [1e-5, 1e-5, 1e-3] };
    let bf16s = Bounds { loss: 0.02, state: [0.01, 0.01, 1.0] };
    // What stands still has no part in the norm.
    let still = Frozen { parameters: vec!["pw1".into()], ..Frozen::default() };
    ten_steps(&graph, 40, &still, &f32s, &bf16s);
}

/// A narrow nano multiplies rounding: its normalisations see few values, and of some channels hardly any difference between them. The CPU's
/// own bf16 is as far from the plain loops as the device's.
#[test]
fn a_narrow_nano_on_a_device_is_as_near_to_the_plain_loops_as_the_cpus() {
    let Some(device) = device() else { return };
    let graph = small_nano();
    let weights = Weights::default().completed(&graph, 7);
    let mut rng = Rng::new(4);
    let shape = Shape::new(4, 3, 128, 128);
    let batch = Batch { pixels: waves(shape, &mut rng), ..Batch::random(&graph, shape, &[], &mut rng) };
    let wide = |t: &Tensor| Tensor::from_vec(t.shape, t.data.iter().map(|&v| v.into()).collect());
    let d: Vec<_> = batch.d_outputs.iter().map(wide).collect();
    let plain = plain_step(&graph, &weights, &[batch.input()], &d, false);
    let still = Frozen::default();
    let errors = |engine: &mut dyn Engine| {
        let (outputs, _) = step(engine, &batch);
        let of_outputs = outputs.iter().zip(&plain.outputs).map(|(y, e)| worst(&y.data, &e.data));
        let of_outputs = of_outputs.fold(0.0, f64::max);
        [of_outputs, worst(&engine.params_and_grads().unwrap().1.concat(), &plain.grads.concat())]
    };
    let [f32s, bf16s] =
        [Element::F32, Element::Bf16].map(|e| errors(&mut on_device(&graph, &weights, &still, &device, e)));
    println!("outputs and gradients on the device off by {f32s:?}, in bf16 by {bf16s:?}");
    assert!(f32s[0] < 1e-4 && f32s[1] < 2e-4);
    if bf16_supported() {
        let cpu = errors(&mut Network::<half::bf16>::new(graph.clone(), &weights, &still, 2).unwrap());
        println!("on the CPU in bf16 by {cpu:?}");
        assert!(bf16s[0] < 2.0 * cpu[0] && bf16s[1] < 2.0 * cpu[1]);
    }
}

#[test]
fn a_step_of_the_optimiser_on_a_device_has_the_bits_of_the_hosts() {
    let Some(device) = device() else { return };
    let graph = small_nano();
    let weights = Weights::random(&graph, 3);
    for rule in RULES {
        let mut course =
            Course::new(on_device(&graph, &weights, &Frozen::default(), &device, Element::F32), 64, rule);
        for _ in 0..3 {
            let mut host = (course.optimizer.clone(), course.average.clone());
            if course.optimizer.steps() > 0 {
                course.state();
                host = (course.optimizer.clone(), course.average.clone());
            }
            let mut rng = course.rng.clone();
            let shape = Shape::new(2, 3, 64, 64);
            let pixels: Vec<u8> = (0..shape.len()).map(|_| rng.below(256) as u8).collect();
            let outputs = course.engine.forward(&pixels, shape, &table()).unwrap();
            course.engine.backward(&outputs).unwrap();
            let (params, grads) = course.engine.params_and_grads().unwrap();
            let (mut params, grads) = (params.to_vec(), grads.to_vec());
            let mut values: Vec<&mut [f32]> = params.iter_mut().map(|p| &mut p[..]).collect();
            let gradients: Vec<&[f32]> = grads.iter().map(|g| &g[..]).collect();
            host.0.step(&mut values, &gradients, 0.01).unwrap();
            host.1.update(&params).unwrap();
            let average = Some(&mut course.average);
            let update = Update { optimizer: &mut course.optimizer, average, clip: 0.0, lr: 0.01 };
            course.engine.update(update).unwrap();
            course.state();
            assert!(course.engine.params().unwrap() == params, "{rule:?}: parameters");
            assert!(course.optimizer == host.0 && course.average == host.1, "{rule:?}: what is remembered");
        }
    }
}

#[test]
fn a_gradient_that_is_not_finite_changes_nothing_and_is_named() {
    let Some(device) = device() else { return };
    let graph = small_nano();
    let weights = Weights::random(&graph, 3);
    let mut course =
        Course::new(on_device(&graph, &weights, &Frozen::default(), &device, Element::F32), 64, RULES[0]);
    let shape = Shape::new(2, 3, 64, 64);
    let mut d = course.engine.forward(&vec![9; shape.len()], shape, &table()).unwrap();
    d[0].data[5] = f32::INFINITY;
    course.engine.backward(&d).unwrap();
    let before = course.state();
    let update = Update { optimizer: &mut course.optimizer, average: None, clip: 1.0, lr: 0.01 };
    assert!(matches!(course.engine.update(update).unwrap(), Updated::NotFinite { .. }));
    assert!(course.state() == before && course.optimizer.steps() == 0);
}

/// A narrow farface-nano, three pictures a batch.
pub const RECIPE: &str = r#"
[model]
detector = "farface-nano"
width = 4
channels = 12
[data]
train = [{ kind = "wider", list = "faces.txt", images = "images" }]
[batch]
size = 3
sides = [{ side = 64, share = 0.5 }, { side = 96, share = 0.5 }]
[matching]
kind = "first-step"
[mining]
overlap = 0.5
[loss]
classification = { kind = "regression-aware-focal" }
box = { kind = "neg-ln-iou" }
[optimizer]
kind = "sgd"
[schedule]
lr = 1e-3
unit = "steps"
length = 10
[ema]
decay = 0.9
[run]
clip = 10.0
"#;

fn trainer(text: &str, dir: &Path, device: Option<u32>) -> Trainer {
    Trainer::new(text, dir, Resources { device, threads: 2, workers: 1 }).unwrap()
}

fn steps(trainer: &mut Trainer, count: usize) -> Vec<StepReport> {
    (0..count).map(|_| trainer.step().unwrap()).collect()
}

#[test]
fn a_training_on_a_device_follows_the_cpus_and_goes_on_with_the_same_bits() {
    let Some(driver) = driver() else { return };
    let backwards = |on: bool| {
        if let Driver::Emulated(emulator) = driver {
            emulator.backwards(on);
        }
    };
    let dir = tempfile::tempdir().unwrap();
    drawing::draw(dir.path(), 7, 100, 1);
    let path = dir.path().join("state.checkpoint");
    let state = |trainer: &mut Trainer| {
        trainer.save(&path).unwrap();
        let c = Checkpoint::load(&trainer_graph(), &path).unwrap();
        (std::fs::read(&path).unwrap(), c.params.concat())
    };
    let f32s = format!("{RECIPE}precision = \"f32\"\n");
    let mut cpu = trainer(&f32s, dir.path(), None);
    let expected = steps(&mut cpu, 10);
    let (_, expected_params) = state(&mut cpu);
    // The first loss and norm; losses, and parameters in the end. A rectifier here and there that rounding turns is enough for the latter,
    // where normalisations see four cells.
    for (text, most) in [(&f32s, [1e-5, 0.02, 0.02, 0.05]), (&RECIPE.to_string(), [0.01, 1.0, 0.05, 0.1])] {
        let mut whole = trainer(text, dir.path(), Some(0));
        let precise = text == &f32s;
        assert_eq!(whole.describe().unwrap().2, if precise { "f32" } else { "bf16" });
        let reports = steps(&mut whole, 10);
        let off = |got: f64, expected: f64| (got - expected).abs() / expected;
        let losses = reports.iter().zip(&expected).map(|(got, e)| off(got.loss, e.loss)).fold(0.0, f64::max);
        let (bytes, params) = state(&mut whole);
        let first = off(reports[0].gradient_norm, expected[0].gradient_norm);
        let off =
            [off(reports[0].loss, expected[0].loss), first, losses, distance(&params, &expected_params)];
        println!("precise {precise}: first loss and norm, losses, parameters off by {off:?}");
        assert!(off.iter().zip(most).all(|(&off, most)| off < most), "precise {precise}: {off:?}");

        let cut = dir.path().join("cut.checkpoint");
        let mut first = trainer(text, dir.path(), Some(0));
        assert_eq!(steps(&mut first, 6), reports[..6]);
        first.save(&cut).unwrap();
        backwards(true);
        let mut second = trainer(text, dir.path(), Some(0));
        second.resume(&cut).unwrap();
        assert_eq!(steps(&mut second, 4), reports[6..]);
        backwards(false);
        assert!(state(&mut second).0 == bytes, "stopped and gone on with");
        if precise {
            // On the CPU, too, which it then tells.
            let mut third = trainer(text, dir.path(), None);
            third.resume(&cut).unwrap();
            assert!(third.notes().iter().any(|n| n.contains("last bits")), "{:?}", third.notes());
            let next = steps(&mut third, 1)[0].loss;
            assert!((next - reports[6].loss).abs() < 1e-3 * next, "{next} for {}", reports[6].loss);
        }
    }
}

/// Of the recipe's detector.
fn trainer_graph() -> Graph {
    let mut config = ModelConfig::farface_nano();
    if let DetectorConfig::Pyramid(p) = &mut config.detector {
        (p.width, p.backbone, p.channels) = (4, None, 12);
    }
    config.detector.detector().graph()
}

#[test]
fn a_device_that_is_not_there_is_named() {
    if device().is_none() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    drawing::draw(dir.path(), 2, 100, 1);
    let error = Trainer::new(RECIPE, dir.path(), Resources { device: Some(99), threads: 1, workers: 1 });
    let error = error.err().expect("no such device").to_string();
    assert!(error.contains("no CUDA device 99"), "{error}");
}

pub const HEAD: &str = r#"
[model]
detector = "DETECTOR"
width = 4
channels = 8
[data]
train = [{ kind = "wider", list = "faces.txt", images = "images" }]
[batch]
size = 2
sides = [{ side = 64, share = 1.0 }]
"#;
pub const TAIL: &str = r#"
[optimizer]
kind = "sgd"
[schedule]
lr = 1e-3
unit = "steps"
length = 10
[run]
clip = 10.0
precision = "f32"
"#;
/// HAMBox with its pyramid anchors, whose losses are judged apart.
pub const HAMBOX: &str = r#"
[matching]
kind = "first-step"
[mining]
overlap = 0.5
[loss]
classification = { kind = "regression-aware-focal" }
box = { kind = "smooth-l1" }
[pyramid-anchors]
"#;
/// RefineFace in two steps.
pub const REFINEFACE: &str = r#"
[matching]
kind = "thresholds"
negative = 0.4
positive = 0.5
force-best = true
[first-matching]
kind = "thresholds"
negative = 0.3
positive = 0.5
force-best = true
[mining]
overlap = 0.5
[loss]
classification = { kind = "focal" }
box = { kind = "neg-ln-iou" }
margin = 15.0
"#;

/// With its feature supervision module. Whatever a box overlaps, it is looked at: of anchors that know nothing yet rounding alone says
/// which is better.
pub const SUPERVISED: &str = r#"
[feature-supervision]
nms = 1.0
"#;
/// Group Sampling with its second stage.
pub const GROUP_SAMPLING: &str = r#"
[matching]
kind = "two-pass-scan"
lambda1 = 0.6
lambda2 = 0.4
[loss]
classification = { kind = "softmax" }
box = { kind = "least-square-iou" }
[second-stage]
nms = 1.0
[second-stage.sampler]
miner = { kind = "all" }
"#;

#[test]
fn trainings_of_several_sets_of_outputs_on_a_device_follow_the_cpus() {
    if device().is_none() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    drawing::draw(dir.path(), 4, 100, 1);
    let supervised = format!("{REFINEFACE}{SUPERVISED}");
    for (detector, own) in [
        ("hambox-baseline-r18", HAMBOX),
        ("refineface-r18", REFINEFACE),
        ("refineface-r18", &supervised),
        ("fpn-finest-rcnn-r18", GROUP_SAMPLING),
    ] {
        let text = format!("{}{own}{TAIL}", HEAD.replace("DETECTOR", detector));
        let expected = steps(&mut trainer(&text, dir.path(), None), 3);
        let got = steps(&mut trainer(&text, dir.path(), Some(0)), 3);
        let off = |got: f64, expected: f64| (got - expected).abs() / expected;
        let off: Vec<_> = got.iter().zip(&expected).map(|(got, e)| off(got.loss, e.loss)).collect();
        println!("{detector}: losses {:?} off by {off:?}", got.iter().map(|s| s.loss).collect::<Vec<_>>());
        // Later ones tell more of how rounding grows in narrow normalisations.
        assert!(off[0] < 1e-4 && off.iter().all(|&off| off < 0.05), "{detector}: {off:?}");
    }
}
