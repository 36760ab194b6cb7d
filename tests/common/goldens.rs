//! Values that PyTorch computed from drawn weights (tests/golden/*.py), and ours held to them.
// Not every test uses all of it.
#![allow(dead_code)]

use farface::cpu::{Arena, Isa, Pool};
use farface::graph::init::Rng;
use farface::graph::{run_reference, Compiled, Graph, Plan, Weights};
use farface::shape::{Shape, Tensor};
use std::path::Path;

/// Of all drawn values.
pub const SEED: u64 = 7;

/// Normal values from a name, as the scripts draw them: those of the seed and the name's FNV-1a.
pub fn drawn(name: &str, count: usize) -> Vec<f32> {
    let hash = name
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325, |h: u64, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    let mut rng = Rng::new(SEED ^ hash);
    (0..count).map(|_| rng.normal()).collect()
}

/// What `tests/golden/NAME.py` made.
pub fn goldens(name: &str) -> Weights {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/{name}.safetensors"));
    Weights::load(path).unwrap_or_else(|e| panic!("{e}; tests/golden/{name}.py makes this file"))
}

/// One of its tensors.
pub fn golden(all: &Weights, name: &str) -> Tensor {
    let t = all.tensors.get(name).unwrap_or_else(|| panic!("{name} is not among the goldens"));
    let [n, c, h, w] = t.shape[..] else { panic!("{name} has shape {:?}", t.shape) };
    Tensor::from_nchw(Shape::new(n, c, h, w), &t.data)
}

/// Within `tolerance` of the largest value.
pub fn close(what: &str, got: &Tensor, expected: &Tensor, tolerance: f32) {
    assert_eq!(got.shape, expected.shape, "{what}");
    let largest = expected.data.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    for (i, (g, e)) in got.data.iter().zip(&expected.data).enumerate() {
        assert!((g - e).abs() <= tolerance * largest, "{what} at {i}: {g}, PyTorch {e}, largest {largest}");
    }
}

/// Holds a network's outputs for `picture` to the goldens `PREFIX` + output, in the plain loops and on every ISA.
pub fn hold_outputs(all: &Weights, prefix: &str, graph: &Graph, weights: &Weights, picture: &Tensor) {
    let pictures = std::slice::from_ref(picture);
    hold(all, prefix, graph, "plain loops", &run_reference(graph, weights, pictures).unwrap(), 1e-5);
    // Winograd's algorithm rounds more: 5e-6 a layer (the parity tests print it), where the plain sum has 1e-6.
    for isa in Isa::supported() {
        hold(all, prefix, graph, isa.name(), &compiled_outputs(graph, weights, picture, isa), 3e-5);
    }
}

/// Holds outputs that were computed `by` something to the goldens `PREFIX` + output, within `tolerance` of the largest value.
pub fn hold(all: &Weights, prefix: &str, graph: &Graph, by: &str, outputs: &[Tensor], tolerance: f32) {
    for ((name, _), got) in graph.outputs.iter().zip(outputs) {
        let name = format!("{prefix}{name}");
        close(&format!("{name}, {by}"), got, &golden(all, &name), tolerance);
    }
}

/// A network's outputs for `picture` on an ISA.
pub fn compiled_outputs(graph: &Graph, weights: &Weights, picture: &Tensor, isa: Isa) -> Vec<Tensor> {
    let network = Compiled::new(graph, weights, isa).unwrap();
    let plan = Plan::new(&network, &[picture.shape]).unwrap();
    let mut arena = Arena::default();
    arena.reserve(plan.floats()).unwrap();
    plan.run_tensors(&mut arena, &mut Pool::new(2).unwrap(), std::slice::from_ref(picture)).unwrap()
}
