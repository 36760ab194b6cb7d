//! Narrow ResNets with feature pyramids against PyTorch: names, outputs, and a training step's gradients
//! (tests/golden/resnet.py makes the values; its cases stand here by the same names).
#![cfg(feature = "train")]

#[path = "common/goldens.rs"]
mod goldens;

use goldens::{close, drawn, golden, goldens, hold_outputs, SEED};
use std::collections::BTreeSet;

use farface::graph::{Builder, Graph, Weights};
use farface::layers::Interpolation;
use farface::nets::fpn::fpn;
use farface::nets::resnet::{resnet, ResNet};
use farface::shape::{Shape, Tensor};
use farface::train::network::{Frozen, Network};

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

#[test]
fn outputs_are_pytorchs_in_the_plain_loops_and_the_engine() {
    let all = goldens("resnet");
    for case in CASES {
        let graph = case.graph();
        let two = case.pictures();
        let shape = Shape { n: 1, ..two.shape };
        let picture = Tensor::from_vec(shape, two.data[..shape.len()].to_vec());
        let weights = Weights::random(&graph, SEED);
        hold_outputs(&all, &format!("{}.eval/", case.name), &graph, &weights, &picture);
    }
}

#[test]
fn a_training_steps_outputs_and_gradients_are_pytorchs() {
    let all = goldens("resnet");
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
