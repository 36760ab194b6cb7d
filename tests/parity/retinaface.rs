//! A whole published network: RetinaFace with MobileNet-V1 x0.25, its real weights, and the
//! activations that PyTorch gives for one picture.

use crate::support::Parity;
use farface::graph::{run_reference, Builder, Graph, Weights};
use farface::layers::{Activation, Conv2d};
use farface::nets::{fpn::fpn_merge, mobilenet::mobilenet_v1, ssh::ssh};
use farface::shape::{Shape, Tensor};
use std::path::PathBuf;

/// RetinaFace as its published weights name it.
fn retinaface() -> Graph {
    let mut b = Builder::new();
    let image = b.input("image", 3);
    let features = b.scope("body", |b| mobilenet_v1(b, image, 8));
    let pyramid = b.scope("fpn", |b| fpn_merge(b, features, [64, 128, 256], 64, Activation::LeakyRelu(0.1)));
    for (level, &p) in pyramid.iter().enumerate() {
        let x = ssh(&mut b, &format!("ssh{}", level + 1), p, 64, 64, Activation::LeakyRelu(0.1));
        for (head, channels) in [("ClassHead", 4), ("BboxHead", 8), ("LandmarkHead", 20)] {
            let y = b.conv(&format!("{head}.{level}.conv1x1"), x, Conv2d::new(64, channels, 1).bias());
            b.output(&format!("{head}{level}"), y);
        }
    }
    b.finish()
}

/// Folder of the published weights, or None (said aloud) where it is not there.
fn fixture() -> Option<PathBuf> {
    let folder = crate::common::shared()?.join("fixtures/retinaface-mobile025");
    Some(folder)
}

#[test]
fn published_retinaface_gives_pytorchs_activations() {
    let Some(folder) = fixture() else { return };
    let weights = Weights::load(folder.join("weights.safetensors")).unwrap();
    let golden = Weights::load(folder.join("golden/activations.safetensors")).unwrap();
    let tensor = |name: &str| {
        let t = &golden.tensors[name];
        let [n, c, h, w] = t.shape[..] else { panic!("{name} has shape {:?}", t.shape) };
        Tensor::from_nchw(Shape::new(n, c, h, w), &t.data)
    };
    let graph = retinaface();
    let expected: Vec<Tensor> = graph.outputs.iter().map(|(name, _)| tensor(name)).collect();
    assert_eq!(expected.len(), 9);
    let inputs = [tensor("input")];
    let mut parity = Parity::new();
    parity.check("retinaface", &graph, &weights, &inputs, &expected);
    parity.report("retinaface against PyTorch");
}

/// Sizes that no stride divides, two pictures at once.
#[test]
fn retinaface_compiled_is_retinaface_raw() {
    let graph = retinaface();
    let mut parity = Parity::new();
    for (seed, (n, h, w)) in [(1, 64, 64), (2, 45, 67), (1, 33, 101), (1, 7, 5)].into_iter().enumerate() {
        parity.check_random("retinaface", &graph, &[Shape::new(n, 3, h, w)], seed as u64);
    }
    parity.report("retinaface against the reference");
}

#[test]
fn raw_retinaface_gives_pytorchs_activations() {
    let Some(folder) = fixture() else { return };
    let weights = Weights::load(folder.join("weights.safetensors")).unwrap();
    let golden = Weights::load(folder.join("golden/activations.safetensors")).unwrap();
    let input = &golden.tensors["input"];
    let image = Tensor::from_nchw(Shape::new(1, 3, input.shape[2], input.shape[3]), &input.data);
    let graph = retinaface();
    for ((name, _), got) in graph.outputs.iter().zip(run_reference(&graph, &weights, &[image]).unwrap()) {
        let expected = Tensor::from_nchw(got.shape, &golden.tensors[name].data);
        let error = crate::support::error(&got, &expected);
        assert!(error <= crate::support::TOLERANCE, "{name} is off by {error:e}");
    }
}
