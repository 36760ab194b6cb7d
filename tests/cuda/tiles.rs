//! What tiles of convolutions promise: parts of a depth, the same bits whatever the tile, and TF32's rounding.

use crate::emulator::{device, driver, Driver};
use crate::failures::alone;
use crate::support::{random_tensor, Parity};
use farface::error::Error;
use farface::gpu::driver::Stream;
use farface::gpu::map::Arithmetic;
use farface::gpu::memory::DeviceBuffer;
use farface::gpu::ops::Device;
use farface::graph::init::Rng;
use farface::graph::{Builder, DeviceNetwork, DevicePlan, Graph, NodeId, Weights};
use farface::layers::{Activation, Conv2d, Interpolation};
use farface::shape::{Shape, Tensor};
use std::sync::Arc;

const ALL: [Arithmetic; 4] = [Arithmetic::F32, Arithmetic::Tf32, Arithmetic::F16, Arithmetic::Bf16];

/// A network of one input.
fn graph(channels: usize, build: impl FnOnce(&mut Builder, NodeId) -> NodeId) -> Graph {
    let mut b = Builder::new();
    let x = b.input("x", channels);
    let y = build(&mut b, x);
    b.output("y", y);
    b.finish()
}

/// The network's output for `input`, and the bytes of its plan.
fn run(
    device: &Arc<Device>,
    graph: &Graph,
    weights: &Weights,
    arithmetic: Arithmetic,
    input: &Tensor,
) -> (Tensor, usize) {
    let network = DeviceNetwork::new(graph, weights, device, arithmetic).unwrap();
    let plan = DevicePlan::new(&network, &[input.shape]).unwrap();
    let stream = Stream::new(device.context()).unwrap();
    let arena = DeviceBuffer::new(device.context(), plan.bytes()).unwrap();
    arena.fill(&stream, 0..arena.len(), 0xff).unwrap();
    let outputs = plan.run_tensors(&stream, &arena, std::slice::from_ref(input)).unwrap();
    (outputs.into_iter().next().unwrap(), plan.bytes())
}

/// The emulated device has four multiprocessors and a map of twenty pixels is, of sixteen channels, one tile: its depth is summed in three or four parts, of
/// 27 or 54 chunks, which do not go evenly.
#[test]
fn a_deep_convolution_of_a_small_map_is_the_sum_of_its_parts() {
    let Some(device) = device() else { return };
    let mut parity = Parity::new();
    let shape = Shape::new(1, 96, 5, 4);
    for out in [16, 13] {
        let deep = Conv2d::new(96, out, 3).bias();
        let g = graph(96, |b, x| {
            let y = b.conv("c", x, deep);
            b.activation(y, Activation::LeakyRelu(0.1))
        });
        parity.check_random(&format!("{out} channels in parts"), &g, &[shape], 1);
        let (weights, input) = (Weights::random(&g, 1), random_tensor(shape, &mut Rng::new(1)));
        for (arithmetic, parts) in
            [(Arithmetic::F16, 3), (Arithmetic::Bf16, 3), (Arithmetic::Tf32, 4), (Arithmetic::F32, 4)]
        {
            let (_, held) = run(&device, &g, &weights, arithmetic, &input);
            let maps = 20 * (96 * arithmetic.element().bytes() + out * 4);
            let all = maps + parts * 20 * out * 4;
            let right = (all..all + 3 * 256).contains(&held);
            assert!(
                right || matches!(driver(), Some(Driver::Own)),
                "{out} in {arithmetic:?}: {held} bytes, not {all}"
            );
        }
    }
    // What follows a sum: a residual of half the size, before and behind an activation.
    for after in [false, true] {
        let g = graph(96, |b, x| {
            let small = b.conv("small", x, Conv2d::new(96, 24, 3).stride(2));
            let large = b.upsample_to(small, Interpolation::Nearest, x);
            let mut y = b.conv("c", x, Conv2d::new(96, 24, 3).bias());
            if after {
                y = b.relu(y);
            }
            y = b.add(y, large);
            if after {
                y
            } else {
                b.relu(y)
            }
        });
        parity.check_random(&format!("parts, a residual, behind: {after}"), &g, &[shape], 2);
    }
    parity.report("parts");
}

/// One, two and eight images are computed by tiles of other sizes.
#[test]
fn tiles_of_all_sizes_give_the_same_bits() {
    let Some(device) = device() else { return };
    let g = graph(8, |b, x| b.conv("c", x, Conv2d::new(8, 120, 3).bias()));
    let (weights, mut rng) = (Weights::random(&g, 1), Rng::new(1));
    let image = random_tensor(Shape::new(1, 8, 8, 8), &mut rng);
    for arithmetic in ALL {
        let of = |count: usize| {
            let many = Tensor::from_vec(Shape { n: count, ..image.shape }, image.data.repeat(count));
            let (output, _) = run(&device, &g, &weights, arithmetic, &many);
            output.data.iter().map(|v| v.to_bits()).collect::<Vec<u32>>()
        };
        let one = of(1);
        for count in [2, 8] {
            let same = of(count).chunks_exact(one.len()).all(|got| got == one);
            assert!(same, "{arithmetic:?}: other bits in a batch of {count}");
        }
    }
}

/// To ten bits behind the point, ties away from zero.
fn rounded(v: f32) -> f32 {
    f32::from_bits((v.to_bits() + 0x1000) & !0x1fff)
}

#[test]
fn tf32_rounds_factors_and_nothing_else() {
    let Some(device) = device() else { return };
    let g = graph(32, |b, x| b.conv("c", x, Conv2d::new(32, 16, 1)));
    let weights = Weights::random(&g, 1);
    let input = random_tensor(Shape::new(1, 32, 6, 6), &mut Rng::new(1));
    let (got, _) = run(&device, &g, &weights, Arithmetic::Tf32, &input);
    let name = g.params.iter().map(|p| p.name.as_str()).next().unwrap();
    let w = weights.get(name, &[16, 32, 1, 1]).unwrap();
    let mut worst = [0.0f64; 2];
    for (pixel, values) in input.data.chunks_exact(32).enumerate() {
        for (c, filter) in w.chunks_exact(32).enumerate() {
            let sum = |round: fn(f32) -> f32| -> f64 {
                values.iter().zip(filter).map(|(&v, &f)| f64::from(round(v)) * f64::from(round(f))).sum()
            };
            let got = f64::from(got.data[pixel * 16 + c]);
            for (worst, expected) in worst.iter_mut().zip([sum(rounded), sum(|v| v)]) {
                *worst = worst.max((got - expected).abs());
            }
        }
    }
    // Against unrounded factors it is a hundred times as far off, or they were not rounded.
    assert!(worst[0] < 5e-6 && worst[1] > 1e-4, "{worst:?}");
}

#[test]
fn tf32_on_a_device_without_it_is_an_error_that_says_what_to_take() {
    let Some(Driver::Emulated(emulator)) = driver() else { return };
    if !alone("tiles::tf32_on_a_device_without_it_is_an_error_that_says_what_to_take") {
        return;
    }
    let g = graph(8, |b, x| b.conv("c", x, Conv2d::new(8, 8, 1)));
    emulator.capability(75);
    let device = Device::new(0).unwrap();
    let error = DeviceNetwork::new(&g, &Weights::random(&g, 1), &device, Arithmetic::Tf32).err();
    let said = matches!(&error, Some(Error::Unsupported(text)) if text.contains("7.5") && text.contains("take f16 or f32"));
    assert!(said, "{error:?}");
}
