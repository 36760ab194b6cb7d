//! bf16, f16 and int8 against f32: every kind of step, on every instruction set, within what the rounding of the numbers explains; the
//! same bits on every number of threads, whatever the memory held before.

use crate::support::random_tensor;
use farface::cpu::{Arena, Isa, Pool};
use farface::graph::init::Rng;
use farface::graph::{Builder, Calibration, Clip, Compiled, Graph, NodeId, Numbers, Plan, Weights};
use farface::layers::{Activation, Conv2d, Interpolation, Linear, MaxPool};
use farface::shape::{Shape, Tensor};

/// Root of the mean squared difference, relative to that of the expected values.
fn noise(got: &Tensor, expected: &Tensor) -> f64 {
    assert_eq!(got.shape, expected.shape);
    let square = |v: f32| f64::from(v) * f64::from(v);
    let sum: f64 = expected.data.iter().map(|&v| square(v)).sum();
    let difference: f64 = got.data.iter().zip(&expected.data).map(|(g, e)| square(g - e)).sum();
    if difference.is_finite() {
        (difference / sum.max(1e-30)).sqrt()
    } else {
        f64::INFINITY
    }
}

fn run(graph: &Graph, isa: Isa, numbers: &Numbers, inputs: &[Tensor]) -> Vec<Tensor> {
    run_with(graph, &Weights::random(graph, 3), isa, numbers, inputs)
}

fn run_with(graph: &Graph, weights: &Weights, isa: Isa, numbers: &Numbers, inputs: &[Tensor]) -> Vec<Tensor> {
    let network = Compiled::in_numbers(graph, weights, isa, numbers).unwrap();
    let shapes: Vec<Shape> = inputs.iter().map(|x| x.shape).collect();
    let plan = Plan::new(&network, &shapes).unwrap();
    let mut first: Option<Vec<Tensor>> = None;
    let mut arena = Arena::default();
    arena.reserve(plan.floats() + 64).unwrap();
    for (threads, fill) in [(1, f32::NAN), (2, 3e37), (3, -3e37)] {
        arena.floats_mut().fill(fill);
        let got = plan.run_tensors(&mut arena, &mut Pool::new(threads).unwrap(), inputs).unwrap();
        let tail = &arena.floats()[plan.floats()..];
        assert!(tail.iter().all(|v| v.to_bits() == fill.to_bits()), "wrote past the plan's floats");
        match &first {
            None => first = Some(got),
            Some(first) => {
                let bits = |t: &Tensor| t.data.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
                let same = first.iter().zip(&got).all(|(a, b)| bits(a) == bits(b));
                assert!(same, "{}: {threads} threads give other bits than one", isa.name());
            }
        }
    }
    first.unwrap()
}

/// By how much f16 is held closer than bf16: its values are rounded eight times as finely, its sums of products add twice as much
/// again.
const F16_FINER: f64 = 4.0;

/// Holds a network to itself in f32, in bf16 and in int8 within these limits.
fn holds(what: &str, channels: usize, limits: [f64; 2], layers: impl FnOnce(&mut Builder, NodeId)) {
    let mut b = Builder::new();
    let x = b.input("x", channels);
    layers(&mut b, x);
    let graph = b.finish();
    let inputs = [random_tensor(Shape::new(2, channels, 13, 22), &mut Rng::new(5))];
    let expected = run(&graph, Isa::Generic, &Numbers::F32, &inputs);
    let mut calibration = Calibration::new(&graph, &Weights::random(&graph, 3)).unwrap();
    calibration.watch_tensors(&mut Pool::new(1).unwrap(), &inputs).unwrap();
    let int8 = Numbers::Int8(calibration.ranges(Clip::Extremes).unwrap());
    for (numbers, limit, mark) in [
        (Numbers::Bf16, limits[0], " bf16"),
        (Numbers::F16, limits[0] / F16_FINER, " f16"),
        (int8, limits[1], " int8"),
    ] {
        for isa in Isa::supported() {
            let network = Compiled::in_numbers(&graph, &Weights::random(&graph, 3), isa, &numbers).unwrap();
            let low = network.listing().filter(|(_, kernel)| kernel.contains(mark)).count();
            assert!(low > 0, "{what}: nothing is computed in{mark}");
            if isa.name() == "amx" && numbers != Numbers::F16 && channels_fill_tiles(&graph) {
                let tiles = network.listing().any(|(_, kernel)| kernel.contains("amx"));
                assert!(tiles, "{what}: nothing is computed on tiles");
            }
            let got = run(&graph, isa, &numbers, &inputs);
            for (i, (g, e)) in got.iter().zip(&expected).enumerate() {
                let noise = noise(g, e);
                assert!(noise <= limit, "{what},{mark} on {}: output {i} is off by {noise:.1e}", isa.name());
                println!("{what},{mark} on {}: output {i}: noise {noise:.1e}", isa.name());
            }
        }
    }
}

/// Whether a convolution named "second" reads 64 channels or more.
fn channels_fill_tiles(graph: &Graph) -> bool {
    graph.nodes.iter().any(|n| match n.layer() {
        Some(farface::layers::Layer::Conv2d(c)) => n.name == "second" && c.in_channels >= 64,
        _ => false,
    })
}

fn conv(b: &mut Builder, name: &str, x: NodeId, conv: Conv2d, activation: Option<Activation>) -> NodeId {
    let y = b.conv(name, x, conv.bias());
    activation.map_or(y, |a| b.activation(y, a))
}

const RELU: Option<Activation> = Some(Activation::Relu);
const LEAKY: Option<Activation> = Some(Activation::LeakyRelu(0.1));

#[test]
fn convolutions_of_every_window() {
    for (kernel, stride, dilation) in [(1, 1, 1), (3, 1, 1), (3, 2, 1), (5, 1, 1), (3, 1, 2), (1, 2, 1)] {
        for (middle, out, activation) in [(8, 5, RELU), (24, 40, LEAKY), (36, 17, None)] {
            holds(
                &format!("{kernel}x{kernel}, stride {stride}, {middle} to {out}"),
                6,
                [0.02, 0.05],
                |b, x| {
                    let y = conv(b, "first", x, Conv2d::new(6, middle, 3), activation);
                    let c = Conv2d::new(middle, out, kernel).stride(stride).dilation(dilation);
                    let y = conv(b, "second", y, c, None);
                    b.output("y", y);
                },
            );
        }
    }
}

#[test]
fn residuals_before_and_behind_the_activation_of_the_same_size_and_enlarged() {
    for after in [false, true] {
        for enlarged in [false, true] {
            holds(&format!("residual, after {after}, enlarged {enlarged}"), 3, [0.02, 0.08], |b, x| {
                let x = conv(b, "first", x, Conv2d::new(3, 20, 3), LEAKY);
                let other =
                    if enlarged { conv(b, "small", x, Conv2d::new(20, 20, 3).stride(2), None) } else { x };
                let mut y = b.conv("second", x, Conv2d::new(20, 20, 1).bias());
                if after {
                    y = b.relu(y);
                }
                let other = if enlarged { b.upsample_to(other, Interpolation::Nearest, y) } else { other };
                let sum = b.add(y, other);
                let sum = if after { sum } else { b.relu(sum) };
                let last = conv(b, "last", sum, Conv2d::new(20, 7, 1), None);
                b.output("y", last);
            });
        }
    }
}

/// Maps that fill AMX tiles, with every residual, in whole panels and in a part of one; rows of 22 and 23 pixels, the last tiles of
/// which overlap the ones before.
#[test]
fn residuals_of_maps_that_fill_tiles() {
    // Tiles are AMX's, which is not emulated.
    let all: &[usize] = if cfg!(emulated) { &[64] } else { &[64, 96, 132] };
    for &channels in all {
        for (after, enlarged) in [(false, false), (false, true), (true, false), (true, true)] {
            let what = format!("{channels} channels, after {after}, enlarged {enlarged}");
            holds(&what, 3, [0.02, 0.08], |b, x| {
                let first = Conv2d { padding: [1, 2, 1, 1], ..Conv2d::new(3, channels, 3) };
                let x = conv(b, "first", x, first, LEAKY);
                let small = conv(b, "small", x, Conv2d::new(channels, channels, 3).stride(2), None);
                let mut y = b.conv("second", x, Conv2d::new(channels, channels, 3).bias());
                if after {
                    y = b.relu(y);
                }
                let other = if enlarged { b.upsample_to(small, Interpolation::Nearest, y) } else { x };
                let sum = b.add(y, other);
                let sum = if after { sum } else { b.relu(sum) };
                let last = conv(b, "last", sum, Conv2d::new(channels, channels, 1), RELU);
                let last = conv(b, "plain", last, Conv2d::new(channels, 32, 1), None);
                b.output("y", last);
                b.output("small", small);
            });
        }
    }
}

/// Few rows: threads share the panels, in groups of other sizes for other numbers of threads.
#[test]
fn panels_of_one_pixel_are_shared() {
    holds("one pixel", 3, [0.02, 0.08], |b, x| {
        let x = conv(b, "first", x, Conv2d::new(3, 64, 3), RELU);
        let x = conv(b, "small", x, Conv2d::new(64, 128, 3).stride(2), RELU);
        let pooled = b.max_pool(x, MaxPool::new(7, 7, 0));
        let y = conv(b, "second", pooled, Conv2d::new(128, 584, 1), RELU);
        let y = conv(b, "third", y, Conv2d::new(584, 72, 1), None);
        b.output("y", y);
    });
}

#[test]
fn depthwise_pooling_interpolation_and_concatenation() {
    holds("depthwise and pointwise", 3, [0.02, 0.1], |b, x| {
        let x = conv(b, "first", x, Conv2d::new(3, 24, 3).stride(2), RELU);
        let x = conv(b, "depth", x, Conv2d::depthwise(24, 3), RELU);
        let x = conv(b, "point", x, Conv2d::new(24, 32, 1), LEAKY);
        let x = conv(b, "depth2", x, Conv2d::depthwise(32, 3).stride(2), LEAKY);
        let y = conv(b, "point2", x, Conv2d::new(32, 6, 1), None);
        b.output("y", y);
        let z = conv(b, "depth3", x, Conv2d::depthwise(32, 5), None);
        b.output("z", z);
    });
    holds("pooling and interpolation", 3, [0.02, 0.1], |b, x| {
        let x = conv(b, "first", x, Conv2d::new(3, 16, 3), LEAKY);
        let small = b.max_pool(x, MaxPool::new(3, 2, 1));
        let small = conv(b, "small", small, Conv2d::new(16, 16, 1), None);
        let up = b.upsample_to(small, Interpolation::Bilinear, x);
        let sum = b.add(x, up);
        let y = conv(b, "last", sum, Conv2d::new(16, 5, 3), None);
        b.output("y", y);
        b.output("pooled", small);
    });
    holds("pooling behind depthwise, and a sum with what it made", 3, [0.02, 0.1], |b, x| {
        let x = conv(b, "first", x, Conv2d::new(3, 24, 3), LEAKY);
        let small = conv(b, "depth", x, Conv2d::depthwise(24, 3), RELU);
        let small = b.max_pool(small, MaxPool::new(2, 2, 0));
        let up = b.upsample_to(small, Interpolation::Nearest, x);
        let sum = b.add(up, x);
        let y = conv(b, "last", sum, Conv2d::new(24, 5, 3), None);
        b.output("y", y);
        let z = conv(b, "z", small, Conv2d::new(24, 1, 1), None);
        let z = conv(b, "one", z, Conv2d::new(1, 1, 3), None);
        b.output("z", z);
    });
    holds("parts of a concatenation", 3, [0.02, 0.1], |b, x| {
        let x = conv(b, "first", x, Conv2d::new(3, 16, 3), RELU);
        let a = conv(b, "a", x, Conv2d::new(16, 8, 3), None);
        let c = conv(b, "c", x, Conv2d::depthwise(16, 3), None);
        let pooled = b.max_pool(x, MaxPool::new(3, 1, 1));
        let all = b.concat(&[a, c, x, pooled]);
        let all = b.relu(all);
        let y = conv(b, "last", all, Conv2d::new(56, 9, 1), None);
        b.output("y", y);
        let d = conv(b, "d", all, Conv2d::depthwise(56, 3), None);
        b.output("d", d);
    });
    holds("outputs that others read, and steps that only f32 has", 3, [0.02, 0.1], |b, x| {
        let x = conv(b, "first", x, Conv2d::new(3, 16, 3), RELU);
        let y = conv(b, "y", x, Conv2d::new(16, 8, 1), None);
        b.output("y", y);
        let p = b.activation(y, Activation::Sigmoid);
        b.output("p", p);
        let z = conv(b, "z", y, Conv2d::new(8, 4, 3), None);
        b.output("z", z);
        let mean = b.global_avg_pool(x);
        let mean = b.linear("mean", mean, Linear { in_features: 16, out_features: 4, bias: true });
        b.output("mean", mean);
    });
}

/// On AMX the first convolution reads a copy of the picture in bf16, with a fourth channel of zeros; where f16 is asked for, the
/// picture itself.
#[test]
fn large_first_convolutions() {
    // As above.
    let all: &[usize] = if cfg!(emulated) { &[3] } else { &[1, 3, 4] };
    for &channels in all {
        holds(&format!("first of {channels} channels"), channels, [0.02, 0.08], |b, x| {
            let first = conv(b, "first", x, Conv2d::new(channels, 100, 7).stride(2), RELU);
            let y = conv(b, "y", first, Conv2d::new(100, 3, 3), None);
            b.output("y", y);
            let wide = conv(b, "wide", x, Conv2d::new(channels, 150, 3), LEAKY);
            let z = conv(b, "z", wide, Conv2d::new(150, 300, 1), None);
            b.output("z", z);
        });
    }
    let mut b = Builder::new();
    let x = b.input("x", 3);
    let y = conv(&mut b, "first", x, Conv2d::new(3, 64, 7).stride(2), RELU);
    let y = conv(&mut b, "second", y, Conv2d::new(64, 64, 3).stride(2), RELU);
    let y = conv(&mut b, "y", y, Conv2d::new(64, 64, 1), None);
    b.output("y", y);
    let graph = b.finish();
    for isa in Isa::supported() {
        let weights = Weights::random(&graph, 3);
        let half = Compiled::in_numbers(&graph, &weights, isa, &Numbers::F16).unwrap();
        assert!(half.listing().all(|(_, kernel)| kernel != "widen"), "{}", isa.name());
        let network = Compiled::in_numbers(&graph, &weights, isa, &Numbers::Bf16).unwrap();
        let kernels: Vec<&str> = network.listing().map(|(_, kernel)| kernel).collect();
        let tiles = kernels.iter().any(|k| k.contains("amx"));
        assert_eq!(
            (kernels.contains(&"widen"), tiles),
            (isa.name() == "amx", isa.name() == "amx"),
            "{kernels:?}"
        );
    }
}

#[test]
fn bands_and_siblings() {
    holds("bands and siblings", 3, [0.02, 0.15], |b, x| {
        let x = conv(b, "stem", x, Conv2d::new(3, 16, 3).stride(2), RELU);
        let x = conv(b, "point", x, Conv2d::new(16, 16, 1), LEAKY);
        let x = conv(b, "depth", x, Conv2d::depthwise(16, 3), LEAKY);
        let x = b.max_pool(x, MaxPool::new(2, 2, 0));
        let x = conv(b, "point2", x, Conv2d::new(16, 32, 1), RELU);
        for (i, channels) in [1, 4, 10].into_iter().enumerate() {
            let y = conv(b, &format!("head{i}"), x, Conv2d::new(32, channels, 1), None);
            let y = conv(b, &format!("deep{i}"), y, Conv2d::depthwise(channels, 3), None);
            b.output(&format!("y{i}"), y);
        }
    });
}

#[test]
fn tensors_of_one_name_have_ranges_of_their_own() {
    // Activations and sums are all called the same.
    holds("two scales", 3, [0.02, 0.08], |b, x| {
        let x = conv(b, "first", x, Conv2d::new(3, 16, 3), RELU);
        let y = conv(b, "large", x, Conv2d::new(16, 16, 3), RELU);
        let large = (0..6).fold(y, |y, _| b.add(y, y));
        b.output("large", large);
        let small = conv(b, "small", x, Conv2d::new(16, 8, 1), RELU);
        let small = conv(b, "last", small, Conv2d::new(8, 4, 1), None);
        b.output("small", small);
    });
}

/// What is beyond the range of f16 becomes its largest value, of tensors, weights and sums, and never infinite or no number.
#[test]
fn f16_saturates() {
    const MOST: f32 = 65504.0;
    let mut b = Builder::new();
    let x = b.input("x", 4);
    let first = conv(&mut b, "first", x, Conv2d::new(4, 24, 1), None);
    let window = conv(&mut b, "window", first, Conv2d::new(24, 40, 3).stride(2), None);
    b.output("window", window);
    let deep = conv(&mut b, "deep", first, Conv2d::depthwise(24, 3), LEAKY);
    let pooled = b.max_pool(deep, MaxPool::new(2, 2, 0));
    let sum = b.add(pooled, pooled);
    let last = conv(&mut b, "last", sum, Conv2d::new(24, 5, 1), None);
    b.output("last", last);
    let graph = b.finish();
    let mut weights = Weights::random(&graph, 3);
    // Products of both signs that are beyond the range themselves.
    weights.insert("window.weight", &[40, 24, 3, 3], vec![1e5; 40 * 24 * 9]);
    let mut picture = random_tensor(Shape::new(1, 4, 10, 12), &mut Rng::new(9));
    picture.data.iter_mut().for_each(|v| *v *= 1e6);
    for isa in Isa::supported() {
        for out in run_with(&graph, &weights, isa, &Numbers::F16, std::slice::from_ref(&picture)) {
            let largest = out.data.iter().fold(0.0f32, |m, v| m.max(v.abs()));
            assert!(out.data.iter().all(|v| v.is_finite()), "{}: not finite", isa.name());
            assert!(largest >= MOST, "{}: {largest} does not leave the range", isa.name());
        }
    }
}
