//! Narrow ResNets with feature pyramids against PyTorch: names, outputs, and a training step's gradients
//! (tests/golden/resnet.py makes the values; its cases stand here by the same names).
#![cfg(feature = "train")]

use std::collections::BTreeSet;
use std::path::Path;

use farface::cpu::{Arena, Isa, Pool};
use farface::graph::init::Rng;
use farface::graph::{run_reference, Builder, Compiled, Graph, Plan, Weights};
use farface::layers::Interpolation;
use farface::nets::fpn::fpn;
use farface::nets::resnet::{resnet, ResNet};
use farface::shape::{Shape, Tensor};
use farface::train::network::{Frozen, Network};

const SEED: u64 = 7;

struct Case {
    name: &'static str,
    net: ResNet,
    enlarge: Interpolation,
    size: [usize; 2],
    /// What f32 rounding may change of a training step's outputs, relative to the largest value, where normalisations by
    /// the statistics of a dozen values a channel follow each other. PyTorch's own in f32 changes 3e-6 and 5e-5.
    rounding: f32,
}

const CASES: [Case; 2] = [
    Case {
        name: "resnet18",
        net: ResNet { width: 8, ..ResNet::R18 },
        enlarge: Interpolation::Nearest,
        size: [64, 96],
        rounding: 2e-5,
    },
    Case {
        name: "resnet50",
        net: ResNet { width: 8, ..ResNet::R50 },
        enlarge: Interpolation::Bilinear,
        size: [70, 90],
        rounding: 1e-3,
    },
];

impl Case {
    fn graph(&self) -> Graph {
        let mut b = Builder::new();
        let image = b.input("image", 3);
        let features = b.scope("body", |b| resnet(b, image, &self.net));
        let pyramid = b.scope("fpn", |b| fpn(b, features, self.net.channels(), 16, self.enlarge));
        for (level, p) in (2..).zip(pyramid) {
            b.output(&format!("p{level}"), p);
        }
        b.finish()
    }

    fn pictures(&self) -> Tensor {
        let shape = Shape::new(2, 3, self.size[0], self.size[1]);
        Tensor::from_nchw(shape, &drawn(&format!("{}.image", self.name), shape.len()))
    }
}

/// Normal values from a name, as resnet.py draws them: those of the seed and the name's FNV-1a.
fn drawn(name: &str, count: usize) -> Vec<f32> {
    let hash = name
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325, |h: u64, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    let mut rng = Rng::new(SEED ^ hash);
    (0..count).map(|_| rng.normal()).collect()
}

fn goldens() -> Weights {
    Weights::load(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/resnet.safetensors"))
        .unwrap_or_else(|e| panic!("{e}; tests/golden/resnet.py makes this file"))
}

fn golden(all: &Weights, name: &str) -> Tensor {
    let t = all.tensors.get(name).unwrap_or_else(|| panic!("{name} is not in resnet.safetensors"));
    let [n, c, h, w] = t.shape[..] else { panic!("{name} has shape {:?}", t.shape) };
    Tensor::from_nchw(Shape::new(n, c, h, w), &t.data)
}

/// Within `tolerance` of the largest value.
fn close(what: &str, got: &Tensor, expected: &Tensor, tolerance: f32) {
    assert_eq!(got.shape, expected.shape, "{what}");
    let largest = expected.data.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    for (i, (g, e)) in got.data.iter().zip(&expected.data).enumerate() {
        assert!((g - e).abs() <= tolerance * largest, "{what} at {i}: {g}, PyTorch {e}, largest {largest}");
    }
}

#[test]
fn outputs_are_pytorchs_in_the_plain_loops_and_the_engine() {
    let all = goldens();
    for case in CASES {
        let graph = case.graph();
        let weights = Weights::random(&graph, SEED);
        let two = case.pictures();
        let shape = Shape { n: 1, ..two.shape };
        let picture = [Tensor::from_vec(shape, two.data[..shape.len()].to_vec())];
        let plain = run_reference(&graph, &weights, &picture).unwrap();
        let hold = |by: &str, got: &[Tensor]| {
            for ((name, _), got) in graph.outputs.iter().zip(got) {
                let expected = golden(&all, &format!("{}.eval/{name}", case.name));
                close(&format!("{} {name}, {by}", case.name), got, &expected, 1e-5);
            }
        };
        hold("plain loops", &plain);
        for isa in Isa::supported() {
            let network = Compiled::new(&graph, &weights, isa).unwrap();
            let plan = Plan::new(&network, &[shape]).unwrap();
            let mut arena = Arena::default();
            arena.reserve(plan.floats()).unwrap();
            hold(isa.name(), &plan.run_tensors(&mut arena, &mut Pool::new(2).unwrap(), &picture).unwrap());
        }
    }
}

#[test]
fn a_training_steps_outputs_and_gradients_are_pytorchs() {
    let all = goldens();
    for case in CASES {
        let graph = case.graph();
        let weights = Weights::random(&graph, SEED);
        let pictures = case.pictures();
        let mut net = Network::<f32>::new(graph.clone(), &weights, &Frozen::default(), 2).unwrap();
        let image = pictures.shape.len() / 2;
        net.forward(&[pictures.shape], &|_, n, z: &mut [f32]| {
            z.copy_from_slice(&pictures.data[n * image..(n + 1) * image]);
        })
        .unwrap();
        let mut d_outputs = Vec::new();
        for (i, (name, _)) in graph.outputs.iter().enumerate() {
            let y = net.output(i);
            if name != "p2" {
                let expected = golden(&all, &format!("{}.train/{name}", case.name));
                close(&format!("{} {name}, training", case.name), &y, &expected, case.rounding);
            }
            let d = drawn(&format!("{}.d{}", case.name, i + 2), y.shape.len());
            d_outputs.push(Tensor::from_nchw(y.shape, &d));
        }
        net.backward(&d_outputs).unwrap();

        let prefix = format!("{}.gradient/", case.name);
        let theirs: BTreeSet<&str> = all.tensors.keys().filter_map(|k| k.strip_prefix(&*prefix)).collect();
        let trained = graph.params.iter().filter(|p| p.trained());
        assert_eq!(trained.map(|p| &*p.name).collect::<BTreeSet<_>>(), theirs, "{}", case.name);
        for (p, g) in graph.params.iter().zip(&net.grads).filter(|(p, _)| p.trained()) {
            let (what, values) =
                (format!("{}{}", prefix, p.name), &all.tensors[&format!("{prefix}{}", p.name)].data);
            assert_eq!(p.shape.iter().map(|&n| n as f32).collect::<Vec<_>>(), values[2..], "size of {what}");
            let probe = drawn(&format!("{}.probe", p.name), g.len());
            let norm = g.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
            let product: f64 = g.iter().zip(probe).map(|(&g, v)| f64::from(g) * f64::from(v)).sum();
            let [expected_norm, expected_product] = [values[0], values[1]].map(f64::from);
            let off = (norm - expected_norm).abs().max((product - expected_product).abs()) / expected_norm;
            assert!(
                off < f64::from(10.0 * case.rounding),
                "{what}: norm {norm}, probe {product}; PyTorch {expected_norm}, {expected_product}"
            );
        }
    }
}
