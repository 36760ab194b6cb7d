//! The trainer's network on a device against the plain loops and against the CPU's: outputs, gradients, running statistics, weights
//! after steps; the same bits twice and in any order of threads.

use crate::emulator::{device, driver, Driver};
use crate::plain_step::{boxes, mixed, plain_step, two_phases, worst};
use farface::gpu::map::Element;
use farface::gpu::ops::Device;
use farface::graph::init::Rng;
use farface::graph::{Builder, Graph, Weights};
use farface::layers::{Activation, Conv2d, ConvTranspose2d, Interpolation, Linear, MaxPool, RoiAlign};
use farface::shape::{Shape, Tensor};
use farface::train::device::DeviceEngine;
use farface::train::network::{Engine, Frozen, InputTable};
use std::sync::Arc;

/// Types of maps with the largest error allowed, as [`worst`] measures it.
pub const F32: (Element, f64) = (Element::F32, 2e-5);
pub const BF16: (Element, f64) = (Element::Bf16, 0.03);

/// Values that bf16 has, too, in the order of the pixel's channels turned round.
pub fn table() -> InputTable {
    let value = |scale: f32| (0..256).map(|v| (v as f32 - 128.0) * scale).collect();
    InputTable { channel: [2, 1, 0], value: [value(1.0 / 64.0), value(1.0 / 128.0), value(-1.0 / 64.0)] }
}

/// What a step is made of: pixels and the gradients of the outputs.
pub struct Batch {
    pub shape: Shape,
    pub pixels: Vec<u8>,
    pub boxes: Vec<Tensor>,
    pub d_outputs: Vec<Tensor>,
}

impl Batch {
    pub fn random(graph: &Graph, shape: Shape, boxes: &[Tensor], rng: &mut Rng) -> Self {
        let pixels = (0..shape.len()).map(|_| rng.below(256) as u8).collect();
        let all: Vec<Shape> = [shape].into_iter().chain(boxes.iter().map(|b| b.shape)).collect();
        let shapes = graph.shapes(&all).unwrap();
        let mut gradient =
            |s: Shape| Tensor::from_vec(s, (0..s.len()).map(|_| rng.normal() / s.len() as f32).collect());
        let d_outputs = graph.outputs.iter().map(|(_, id)| gradient(shapes[id.0])).collect();
        Self { shape, pixels, boxes: boxes.to_vec(), d_outputs }
    }

    /// The network's input.
    pub fn input(&self) -> Tensor<f64> {
        let table = table();
        let values = self
            .pixels
            .chunks_exact(3)
            .flat_map(|p| [0, 1, 2].map(|i| f64::from(table.value[i][usize::from(p[table.channel[i]])])));
        Tensor::from_vec(self.shape, values.collect())
    }
}

/// What a step gave.
#[derive(PartialEq)]
pub struct Result {
    outputs: Vec<Vec<u32>>,
    grads: Vec<Vec<u32>>,
    params: Vec<Vec<u32>>,
}

fn bits<'a>(all: impl IntoIterator<Item = &'a Vec<f32>>) -> Vec<Vec<u32>> {
    all.into_iter().map(|v| v.iter().map(|v| v.to_bits()).collect()).collect()
}

pub fn step(engine: &mut dyn Engine, batch: &Batch) -> (Vec<Tensor>, Result) {
    let mut outputs = engine.forward(&batch.pixels, batch.shape, &table()).unwrap();
    if !batch.boxes.is_empty() {
        assert!(engine.backward(&batch.d_outputs).is_err(), "the second phase comes first");
        outputs.extend(engine.forward_boxes(batch.boxes.clone()).unwrap());
    }
    engine.backward(&batch.d_outputs).unwrap();
    let (params, grads) = engine.params_and_grads().unwrap();
    let result = Result {
        outputs: bits(outputs.iter().map(|t| &t.data)),
        grads: bits(grads.iter()),
        params: bits(params.iter()),
    };
    (outputs, result)
}

pub fn on_device(
    graph: &Graph,
    weights: &Weights,
    frozen: &Frozen,
    device: &Arc<Device>,
    element: Element,
) -> DeviceEngine {
    DeviceEngine::new(graph.clone(), weights, frozen, device, element, 2).unwrap()
}

/// One step of `graph` on the device against the plain loops in f64.
fn check(what: &str, graph: &Graph, batch: &Batch, seed: u64, frozen: bool, bounds: (Element, f64)) {
    if let Some(device) = device() {
        check_on(&device, what, graph, batch, seed, frozen, bounds);
    }
}

/// As [`check`], on this device; the engine after the step.
pub fn check_on(
    device: &Arc<Device>,
    what: &str,
    graph: &Graph,
    batch: &Batch,
    seed: u64,
    frozen: bool,
    (element, tolerance): (Element, f64),
) -> DeviceEngine {
    let weights = Weights::random(graph, seed);
    let wide = |t: &Tensor| Tensor::from_vec(t.shape, t.data.iter().map(|&v| v.into()).collect());
    let mut inputs = vec![batch.input()];
    inputs.extend(batch.boxes.iter().map(wide));
    let plain =
        plain_step(graph, &weights, &inputs, &batch.d_outputs.iter().map(wide).collect::<Vec<_>>(), frozen);
    let still = Frozen { statistics: if frozen { vec![String::new()] } else { vec![] }, ..Frozen::default() };
    let mut engine = on_device(graph, &weights, &still, device, element);
    let (outputs, result) = step(&mut engine, batch);
    for (i, want) in plain.outputs.iter().enumerate() {
        let e = worst(&outputs[i].data, &want.data);
        assert!(e < tolerance, "{what}, {element:?}: output {i} off by {e}");
    }
    let (params, grads) = engine.params_and_grads().unwrap();
    // All gradients as one vector; single ones may cancel to less than bf16 resolves.
    let e = worst(&grads.concat(), &plain.grads.concat());
    assert!(e < 3.0 * tolerance, "{what}, {element:?}: gradients off by {e}");
    for (i, p) in graph.params.iter().enumerate() {
        let e = worst(&grads[i], &plain.grads[i]);
        assert!(
            tolerance > 1e-3 || e < 10.0 * tolerance,
            "{what}, {element:?}: gradient of {} off by {e}",
            p.name
        );
        let e = worst(&params[i], &plain.params[i]);
        assert!(e < tolerance, "{what}, {element:?}: {} off by {e} after the step", p.name);
    }
    if let Some(Driver::Emulated(emulator)) = driver() {
        emulator.backwards(true);
        let mut again = on_device(graph, &weights, &still, device, element);
        let (_, again) = step(&mut again, batch);
        emulator.backwards(false);
        assert!(result == again, "{what}, {element:?}: other bits in another order");
    }
    engine
}

/// A graph whose input has `channels` channels that are to be learnt, so that gradients come back to it.
pub fn behind(
    channels: usize,
    body: impl FnOnce(&mut Builder, farface::graph::NodeId) -> farface::graph::NodeId,
) -> Graph {
    let mut b = Builder::new();
    let x = b.input("image", 3);
    let x = b.conv("first", x, Conv2d::new(3, channels, 1).bias());
    let y = body(&mut b, x);
    b.output("y", y);
    b.finish()
}

#[test]
fn convolutions_have_the_gradients_of_the_plain_loops() {
    let convs = [
        Conv2d::new(5, 7, 3).bias(),
        Conv2d::new(16, 24, 1),
        Conv2d::new(3, 40, 3).stride(2).bias(),
        Conv2d::new(33, 70, 3).stride(2),
        Conv2d::new(8, 9, 1).stride(2),
        Conv2d::new(12, 12, 3).stride(3).padding([0, 2, 1, 0]).bias(),
        Conv2d::new(9, 10, 3).dilation(2),
        Conv2d::new(9, 10, 3).dilation(3).stride(2),
        Conv2d::new(6, 6, 4).dilation(2).stride(4).padding([3, 3, 3, 3]),
        Conv2d::rect(10, 4, 1, 5).bias(),
        Conv2d::new(12, 18, 3).groups(3).bias(),
        Conv2d::new(8, 16, 3).groups(4).stride(2),
        Conv2d::new(130, 136, 1),
        Conv2d::depthwise(19, 3),
        Conv2d::depthwise(40, 3).stride(2).bias(),
        Conv2d::depthwise(16, 5).dilation(2).stride(3),
        Conv2d::depthwise(70, 1).stride(2).padding([0; 4]),
    ];
    for (i, conv) in convs.into_iter().enumerate() {
        let mut rng = Rng::new(i as u64);
        let graph = behind(conv.in_channels, |b, x| b.conv("conv", x, conv));
        let shape = Shape::new(1 + i % 3, 3, 15 + i, 17);
        let batch = Batch::random(&graph, shape, &[], &mut rng);
        for element in [F32, BF16] {
            check(&format!("{conv:?}"), &graph, &batch, i as u64, false, element);
        }
    }
}

#[test]
fn other_layers_have_the_gradients_of_the_plain_loops() {
    let transposed = |groups| ConvTranspose2d {
        in_channels: 6,
        out_channels: 6,
        kernel: [4, 3],
        stride: [2, 2],
        padding: [1, 0, 1, 1],
        groups,
        bias: groups != 6,
    };
    let align =
        |sampling_ratio| RoiAlign { output: [3, 2], spatial_scale: 1.0, sampling_ratio, aligned: false };
    type Body = Box<dyn Fn(&mut Builder, farface::graph::NodeId) -> farface::graph::NodeId>;
    let bodies: Vec<(&str, Body)> = vec![
        ("transposed", Box::new(move |b, x| b.conv_transpose("t", x, transposed(1)))),
        ("transposed in groups", Box::new(move |b, x| b.conv_transpose("t", x, transposed(2)))),
        ("transposed by channels", Box::new(move |b, x| b.conv_transpose("t", x, transposed(6)))),
        (
            "transposed, read twice",
            Box::new(move |b, x| {
                let y = b.conv_transpose("t", x, transposed(1));
                let s = b.conv("s", x, Conv2d::new(6, 6, 3).bias());
                let y = b.upsample_to(y, Interpolation::Nearest, s);
                b.add(y, s)
            }),
        ),
        (
            "linear",
            Box::new(|b, x| {
                b.linear("l", x, Linear { in_features: 6 * 12 * 13, out_features: 9, bias: true })
            }),
        ),
        ("mean", Box::new(|b, x| b.global_avg_pool(x))),
        ("pool", Box::new(|b, x| b.max_pool(x, MaxPool::new(3, 2, 1)))),
        (
            "pool that overlaps",
            Box::new(|b, x| b.max_pool(x, MaxPool { kernel: [5, 3], stride: [1, 2], padding: [2, 0, 1, 1] })),
        ),
        ("sigmoid", Box::new(|b, x| b.activation(x, Activation::Sigmoid))),
        ("softmax", Box::new(|b, x| b.activation(x, Activation::Softmax(3)))),
        (
            "sigmoid behind which is a rectifier",
            Box::new(|b, x| {
                let y = b.activation(x, Activation::Softmax(2));
                let y = b.batchnorm("n", y, 6);
                b.activation(y, Activation::LeakyRelu(0.2))
            }),
        ),
        (
            "crop",
            Box::new(|b, x| {
                let like = b.max_pool(x, MaxPool::new(2, 2, 0));
                b.crop(x, like, 2, 5)
            }),
        ),
        (
            "smaller and larger",
            Box::new(|b, x| {
                let half = b.conv("half", x, Conv2d::new(6, 6, 3).stride(2));
                let small = b.upsample_to(x, Interpolation::Bilinear, half);
                let near = b.upsample_to(x, Interpolation::Nearest, half);
                let third = b.max_pool(x, MaxPool::new(3, 3, 0));
                let large = b.upsample_to(third, Interpolation::Bilinear, x);
                let odd = b.upsample_to(large, Interpolation::Nearest, half);
                let y = b.add(small, near);
                let y = b.add(y, odd);
                b.add(y, half)
            }),
        ),
        (
            "twice the same",
            Box::new(|b, x| {
                let y = b.batchnorm("n", x, 6);
                let y = b.relu(y);
                let y = b.add(y, y);
                b.concat(&[y, x, y])
            }),
        ),
        (
            "boxes",
            Box::new(move |b, x| {
                let boxes = b.input("boxes", 5);
                b.roi_align(x, boxes, align(0))
            }),
        ),
    ];
    for (i, (what, body)) in bodies.into_iter().enumerate() {
        let mut rng = Rng::new(100 + i as u64);
        let graph = behind(6, body);
        let shape = Shape::new(2, 3, 12, 13);
        let boxes: Vec<Tensor> =
            (1..graph.inputs.len()).map(|_| crate::plain_step::boxes(2, 9, &mut rng)).collect();
        let batch = Batch::random(&graph, shape, &boxes, &mut rng);
        for element in [F32, BF16] {
            check(what, &graph, &batch, i as u64, false, element);
        }
    }
}

#[test]
fn networks_of_every_unit_have_the_outputs_and_gradients_of_the_plain_loops() {
    for seed in 0..6 {
        let mut rng = Rng::new(seed);
        let graph = mixed(&mut rng);
        let shape = Shape::new([1, 2, 3][seed as usize % 3], 3, 20 + rng.below(30), 20 + rng.below(30));
        let batch = Batch::random(&graph, shape, &[], &mut rng);
        for element in [F32, BF16] {
            check(&format!("mixed {seed}"), &graph, &batch, seed, seed % 4 == 3, element);
        }
    }
}

#[test]
fn a_second_phase_on_a_device_looks_at_boxes_and_its_gradients_reach_the_first() {
    for seed in 0..3 {
        let mut rng = Rng::new(seed);
        let graph = two_phases(&mut rng);
        let images = 1 + rng.below(4);
        let boxes = [2 + rng.below(20), 1].map(|count| boxes(images, count, &mut rng));
        let batch = Batch::random(&graph, Shape::new(images, 3, 40, 36), &boxes, &mut rng);
        for element in [F32, BF16] {
            check(&format!("two phases {seed}"), &graph, &batch, seed, false, element);
        }
    }
}
