//! Steps of the optimiser and whole trainings on a device: the CPU's, within rounding; the same bits again, stopped or not.

use crate::emulator::{device, driver, Driver};
use crate::faces;
use crate::train::{on_device, table};
use farface::gpu::map::Element;
use farface::graph::init::Rng;
use farface::graph::{Builder, Graph, Weights};
use farface::nets::nano::{nano, Nano};
use farface::shape::{Shape, Tensor};
use farface::train::network::{Engine, Frozen, Network, Update, Updated};
use farface::train::optim::{Ema, EmaRecipe, Optimizer, OptimizerRecipe, ParamOptions};
use farface::train::trainer::{Resources, StepReport, Trainer};
use std::path::Path;

/// farface-nano, narrower.
fn small_nano() -> Graph {
    let mut b = Builder::new();
    let image = b.input("image", 3);
    let net = Nano {
        width: 4,
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

const RULES: [OptimizerRecipe; 3] = [
    OptimizerRecipe::Sgd { momentum: 0.9, weight_decay: 5e-4, nesterov: false },
    OptimizerRecipe::Sgd { momentum: 0.8, weight_decay: 1e-3, nesterov: true },
    OptimizerRecipe::AdamW { beta1: 0.9, beta2: 0.99, epsilon: 1e-3, weight_decay: 0.01 },
];

/// A training of `small_nano` towards fixed targets: the mean squared distance of its outputs from them.
struct Course<E> {
    engine: E,
    optimizer: Optimizer,
    average: Ema,
    rng: Rng,
    targets: Option<Vec<Tensor>>,
}

impl<E: Engine> Course<E> {
    fn new(mut engine: E, rule: OptimizerRecipe) -> Self {
        let options = options(engine.graph(), engine.trainable());
        let average = Ema::new(EmaRecipe::default(), engine.params().unwrap()).unwrap();
        Self {
            engine,
            optimizer: Optimizer::new(rule, options).unwrap(),
            average,
            rng: Rng::new(4),
            targets: None,
        }
    }

    /// The loss and the gradient's norm.
    fn step(&mut self, clip: f32) -> (f64, f64) {
        // Eight cells on the coarsest level: fewer have statistics that rounding to bf16 turns round.
        let shape = Shape::new(2, 3, 128, 128);
        let pixels: Vec<u8> = (0..shape.len()).map(|_| self.rng.below(256) as u8).collect();
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
        let update = Update { optimizer: &mut self.optimizer, average, clip, lr: 0.02 };
        match self.engine.update(update).unwrap() {
            Updated::Done { norm } => (loss, norm),
            Updated::NotFinite { param } => panic!("the gradient of {param} is not finite"),
        }
    }

    /// Parameters, averages and the optimiser's buffers.
    fn state(&mut self) -> [Vec<f32>; 3] {
        self.engine.settle(&mut self.optimizer, Some(&mut self.average)).unwrap();
        let buffers = self.optimizer.save().buffers.into_values().flatten().collect();
        [self.engine.params().unwrap().concat(), self.average.average.concat(), buffers]
    }
}

fn distance(a: &[f32], b: &[f32]) -> f64 {
    let squares = |v: &mut dyn Iterator<Item = f64>| v.map(|v| v * v).sum::<f64>().sqrt();
    assert_eq!(a.len(), b.len());
    squares(&mut a.iter().zip(b).map(|(a, b)| f64::from(a - b)))
        / squares(&mut b.iter().map(|&b| f64::from(b)))
}

#[test]
fn ten_steps_on_a_device_are_the_cpus_within_rounding_and_have_the_same_bits_again() {
    let Some(device) = device() else { return };
    let graph = small_nano();
    let weights = Weights::default().completed(&graph, 7);
    let still = Frozen { parameters: vec!["body.stage1.0".into()], ..Frozen::default() };
    for rule in RULES {
        let on_cpu = Network::<f32>::new(graph.clone(), &weights, &still, 2).unwrap();
        let mut cpu = Course::new(on_cpu, rule);
        let mut f32s = Course::new(on_device(&graph, &weights, &still, &device, Element::F32), rule);
        let mut bf16s = Course::new(on_device(&graph, &weights, &still, &device, Element::Bf16), rule);
        for n in 1..=10 {
            let clip = if n % 2 == 0 { 0.5 } else { 0.0 };
            let (expected, got, rough) = (cpu.step(clip), f32s.step(clip), bf16s.step(clip));
            let off = |got: f64, expected: f64| (got - expected).abs() / expected;
            let [state, got_state, rough_state] = [cpu.state(), f32s.state(), bf16s.state()];
            let worst: Vec<f64> = state.iter().zip(&got_state).map(|(e, g)| distance(g, e)).collect();
            let rough_worst: Vec<f64> = state.iter().zip(&rough_state).map(|(e, g)| distance(g, e)).collect();
            let shown = |v: &[f64]| v.iter().map(|v| format!("{v:.1e}")).collect::<Vec<_>>().join(" ");
            println!(
                "{rule:?} step {n}: loss {:.5}; f32 off by {:.1e}, norm {:.1e}, state {}; bf16 {:.1e}, {}",
                expected.0,
                off(got.0, expected.0),
                off(got.1, expected.1),
                shown(&worst),
                off(rough.0, expected.0),
                shown(&rough_worst)
            );
            assert!(off(got.0, expected.0) < 1e-4 && off(got.1, expected.1) < 1e-3, "step {n}");
            assert!(worst.iter().all(|&w| w < 2e-3), "step {n}");
            assert!(
                off(rough.0, expected.0) < 0.05 && rough_worst[0] < 0.05 && rough_worst[1] < 0.05,
                "step {n}"
            );
        }
        if let Some(Driver::Emulated(emulator)) = driver() {
            emulator.backwards(true);
            let mut again = Course::new(on_device(&graph, &weights, &still, &device, Element::Bf16), rule);
            for n in 1..=10 {
                again.step(if n % 2 == 0 { 0.5 } else { 0.0 });
                if n == 5 {
                    // Looked at in between: what is brought to the host and back changes nothing.
                    again.state();
                    again.engine.replaced();
                }
            }
            emulator.backwards(false);
            let bits = |s: [Vec<f32>; 3]| s.map(|v| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>());
            assert!(bits(again.state()) == bits(bf16s.state()), "other bits in another order");
        }
    }
}

#[test]
fn a_step_of_the_optimiser_on_a_device_has_the_bits_of_the_hosts() {
    let Some(device) = device() else { return };
    let graph = small_nano();
    let weights = Weights::random(&graph, 3);
    for rule in RULES {
        let mut course =
            Course::new(on_device(&graph, &weights, &Frozen::default(), &device, Element::F32), rule);
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
        Course::new(on_device(&graph, &weights, &Frozen::default(), &device, Element::F32), RULES[0]);
    let shape = Shape::new(2, 3, 64, 64);
    let mut d = course.engine.forward(&vec![9; shape.len()], shape, &table()).unwrap();
    d[0].data[5] = f32::INFINITY;
    course.engine.backward(&d).unwrap();
    let before = course.state();
    let update = Update { optimizer: &mut course.optimizer, average: None, clip: 1.0, lr: 0.01 };
    assert!(matches!(course.engine.update(update).unwrap(), Updated::NotFinite { .. }));
    assert!(course.state() == before && course.optimizer.steps() == 0);
}

const RECIPE: &str = r#"
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
length = 4
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
    if device().is_none() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    faces::draw(dir.path(), 7, 100, 1);
    let path = dir.path().join("cut.checkpoint");
    let state = |trainer: &mut Trainer| {
        let path = dir.path().join("state.checkpoint");
        trainer.save(&path).unwrap();
        std::fs::read(path).unwrap()
    };
    let f32s = format!("{RECIPE}precision = \"f32\"\n");
    let on_cpu = steps(&mut trainer(&f32s, dir.path(), None), 4);
    for text in [&f32s, &RECIPE.to_string()] {
        let mut whole = trainer(text, dir.path(), Some(0));
        let precise = text == &f32s;
        assert_eq!(whole.describe().unwrap().2, if precise { "f32" } else { "bf16" });
        let reports = steps(&mut whole, 4);
        for (got, expected) in reports.iter().zip(&on_cpu) {
            let off = (got.loss - expected.loss).abs() / expected.loss;
            println!(
                "step {}: loss {:.5} on the device, {:.5} on the CPU",
                got.step, got.loss, expected.loss
            );
            assert!(off < if precise { 1e-3 } else { 0.1 }, "step {}", got.step);
        }
        let expected = state(&mut whole);
        let mut first = trainer(text, dir.path(), Some(0));
        assert_eq!(steps(&mut first, 3), reports[..3]);
        first.save(&path).unwrap();
        let mut second = trainer(text, dir.path(), Some(0));
        second.resume(&path).unwrap();
        assert_eq!(steps(&mut second, 1), reports[3..]);
        assert!(state(&mut second) == expected, "stopped and gone on with");
        if precise {
            // On the CPU, too, which it then tells.
            let mut third = trainer(text, dir.path(), None);
            third.resume(&path).unwrap();
            assert!(third.notes().iter().any(|n| n.contains("last bits")), "{:?}", third.notes());
            let off = (steps(&mut third, 1)[0].loss - reports[3].loss).abs();
            assert!(off < 1e-3 * reports[3].loss);
        }
    }
}

#[test]
fn a_device_that_is_not_there_is_named() {
    if device().is_none() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    faces::draw(dir.path(), 2, 100, 1);
    let error = Trainer::new(RECIPE, dir.path(), Resources { device: Some(99), threads: 1, workers: 1 });
    let error = error.err().expect("no such device").to_string();
    assert!(error.contains("no CUDA device 99"), "{error}");
}
