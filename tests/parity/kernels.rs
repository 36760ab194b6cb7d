//! One layer at a time over random sizes and parameters.

use crate::support::{random_tensor, Parity, MACS};
use farface::cpu::Isa;
use farface::graph::init::Rng;
use farface::graph::{run_reference, Builder, Compiled, Graph, NodeId, Plan, Weights};
use farface::layers::{Activation, Conv2d, ConvTranspose2d, Interpolation, Linear, MaxPool, RoiAlign};
use farface::shape::{Shape, Tensor};

/// Channel counts around every register and panel width: below, at and above 4, 8, 16 and 32 lanes.
const CHANNELS: [usize; 14] = [1, 2, 3, 5, 8, 15, 16, 17, 24, 31, 33, 48, 64, 100];

/// A network of one input and what `layers` puts on it.
fn network(channels: usize, layers: impl FnOnce(&mut Builder, NodeId) -> NodeId) -> Graph {
    let mut b = Builder::new();
    let x = b.input("x", channels);
    let y = layers(&mut b, x);
    b.output("y", y);
    b.finish()
}

fn pick<T: Copy>(rng: &mut Rng, from: &[T]) -> T {
    from[rng.below(from.len())]
}

/// Nothing, ReLU or leaky ReLU.
fn maybe_activate(rng: &mut Rng, b: &mut Builder, x: NodeId) -> NodeId {
    match rng.below(3) {
        0 => x,
        1 => b.relu(x),
        _ => b.activation(x, Activation::LeakyRelu(0.1)),
    }
}

/// A map that the window fits, 1 to `most` a side, few images.
fn map_for(rng: &mut Rng, conv: &Conv2d, most: usize) -> Shape {
    let [t, l, b, r] = conv.padding;
    let [wh, ww] = conv.window();
    let least = |window: usize, pad: usize| window.saturating_sub(pad).max(1);
    let (h, w) = (least(wh, t + b), least(ww, l + r));
    let shape = Shape::new(1 + rng.below(3), conv.in_channels, h + rng.below(most), w + rng.below(most));
    let macs = |s: Shape| conv.out_shape(s).map_or(0, |o| conv.macs(o) as usize);
    let fewer = Shape { n: 1, ..shape };
    [shape, fewer, Shape { h, ..fewer }].into_iter().find(|&s| macs(s) <= MACS).unwrap_or(Shape {
        h,
        w,
        ..fewer
    })
}

fn check_conv(parity: &mut Parity, rng: &mut Rng, mut conv: Conv2d, most: usize) {
    conv.bias = rng.below(2) == 0;
    let shape = map_for(rng, &conv, most);
    let graph = network(conv.in_channels, |b, x| {
        let mut y = b.conv("conv", x, conv);
        if rng.below(2) == 0 {
            y = b.batchnorm("bn", y, conv.out_channels);
        }
        maybe_activate(rng, b, y)
    });
    parity.check_random(&format!("{conv:?} on {shape}"), &graph, &[shape], rng.bits());
}

#[test]
fn dense_convolution() {
    let mut parity = Parity::new();
    let mut rng = Rng::new(1);
    let kernels = [[1, 1], [1, 1], [3, 3], [3, 3], [5, 5], [1, 5], [5, 1], [7, 7], [2, 2], [4, 3]];
    for case in 0..220 {
        let kernel = kernels[case % kernels.len()];
        let mut conv =
            Conv2d::rect(pick(&mut rng, &CHANNELS), pick(&mut rng, &CHANNELS), kernel[0], kernel[1]);
        match rng.below(4) {
            0 => {}
            1 => conv = conv.stride(2),
            2 => conv = conv.dilation(1 + rng.below(3)),
            _ => {
                conv.stride = [1 + rng.below(3), 1 + rng.below(3)];
                conv.dilation = [1 + rng.below(3), 1 + rng.below(2)];
                // Beyond the window too: outputs that see padding alone.
                conv.padding = std::array::from_fn(|_| rng.below(6));
            }
        }
        check_conv(&mut parity, &mut rng, conv, 24);
    }
    parity.report("dense convolution");
}

/// 3x3 with enough channels on both sides, the residual of the same size or enlarged, before or behind the activation, written
/// into a concatenation or not.
#[test]
fn winograd_convolution() {
    let mut parity = Parity::new();
    let mut rng = Rng::new(21);
    for case in 0..60 {
        let channels = || [16, 17, 24, 33, 48, 64, 100];
        let (ci, co) = (pick(&mut rng, &channels()), pick(&mut rng, &channels()));
        let mut conv = Conv2d::new(ci, co, 3).bias();
        if rng.below(3) == 0 {
            conv.padding = std::array::from_fn(|_| rng.below(4));
        }
        let shape = map_for(&mut rng, &conv, 20);
        let of = conv.out_shape(shape).unwrap();
        let graph = network(ci, |b, x| {
            let y = b.conv("conv", x, conv);
            let same = of.h == shape.h && of.w == shape.w;
            match case % 4 {
                0 => maybe_activate(&mut rng, b, y),
                1 if same => {
                    let other = b.conv("other", x, Conv2d::new(ci, co, 1));
                    let sum = b.add(y, other);
                    maybe_activate(&mut rng, b, sum)
                }
                2 => {
                    let small = b.conv("small", x, Conv2d::new(ci, co, 1).stride(2));
                    let up = b.upsample_to(small, Interpolation::Nearest, y);
                    let y = b.relu(y);
                    b.add(y, up)
                }
                _ => {
                    let y = b.relu(y);
                    let again = b.conv("again", y, Conv2d::new(co, 5, 1));
                    let mapped = b.conv("mapped", again, Conv2d::new(5, 16, 1));
                    b.concat(&[mapped, y, again])
                }
            }
        });
        let kernels: Vec<&str> = {
            let compiled = Compiled::new(&graph, &Weights::random(&graph, 1), Isa::Generic).unwrap();
            compiled.listing().map(|(_, kernel)| kernel).collect()
        };
        assert!(kernels.contains(&"winograd 3x3"), "{conv:?}: {kernels:?}");
        parity.check_random(&format!("{conv:?} on {shape}, case {case}"), &graph, &[shape], rng.bits());
    }
    parity.report("winograd convolution");
}

#[test]
fn stem_convolution() {
    let mut parity = Parity::new();
    let mut rng = Rng::new(2);
    for (kernel, out) in [(7, 64), (7, 16), (3, 8), (3, 32), (5, 24)] {
        check_conv(&mut parity, &mut rng, Conv2d::new(3, out, kernel).stride(2), 60);
    }
    parity.report("stem convolution");
}

/// Rows of tiles of every height, and of several of the tallest.
#[test]
fn rows_of_every_width() {
    let mut parity = Parity::new();
    let mut rng = Rng::new(34);
    for width in (1..60).chain([84, 97, 141]) {
        let (ci, co) = (pick(&mut rng, &[1, 3, 8]), pick(&mut rng, &[1, 3, 4, 8, 12, 16]));
        let kernel = pick(&mut rng, &[1, 3]);
        let conv = Conv2d::new(ci, co, kernel);
        let shape = Shape::new(1, ci, 3, width);
        let graph = network(ci, |b, x| {
            let y = b.conv("conv", x, conv);
            let y = maybe_activate(&mut rng, b, y);
            // A residual, enlarged or not, goes another way to the output.
            match width % 3 {
                0 => y,
                1 => {
                    let other = b.conv("other", x, Conv2d::new(ci, co, 1));
                    b.add(y, other)
                }
                _ => {
                    let small = b.conv("small", x, Conv2d::new(ci, co, 1).stride(2));
                    let up = b.upsample_to(small, Interpolation::Nearest, x);
                    b.add(y, up)
                }
            }
        });
        parity.check_random(&format!("{conv:?} on {shape}"), &graph, &[shape], rng.bits());
    }
    parity.report("rows of every width");
}

/// A window of one channel is a depthwise convolution, but where something is added to it.
#[test]
fn one_channel() {
    let mut parity = Parity::new();
    let mut rng = Rng::new(35);
    for case in 0..24 {
        let conv = Conv2d::new(1, 1, [3, 5][case % 2]).stride(1 + rng.below(2)).dilation(1 + rng.below(2));
        let shape = Shape::new(1 + rng.below(2), 1, 4 + rng.below(20), 4 + rng.below(40));
        let added = case % 3 == 0;
        let graph = network(1, |b, x| {
            let y = b.conv("conv", x, conv.bias());
            let y = maybe_activate(&mut rng, b, y);
            if added {
                let other = b.conv("other", x, Conv2d::new(1, 1, 1).stride(conv.stride[0]));
                b.add(y, other)
            } else {
                y
            }
        });
        let compiled = Compiled::new(&graph, &Weights::random(&graph, 1), Isa::Generic).unwrap();
        let depthwise = compiled.listing().filter(|(_, kernel)| kernel.starts_with("depthwise")).count();
        assert_eq!(depthwise, usize::from(!added), "case {case}");
        parity.check_random(&format!("{conv:?} on {shape}, case {case}"), &graph, &[shape], rng.bits());
    }
    parity.report("one channel");
}

#[test]
fn grouped_convolution() {
    let mut parity = Parity::new();
    let mut rng = Rng::new(3);
    for _ in 0..50 {
        let groups = pick(&mut rng, &[2, 3, 4, 8]);
        let (ci, co) = (pick(&mut rng, &[1, 2, 3, 5, 8, 17]), pick(&mut rng, &[1, 2, 3, 4, 7, 16, 20, 33]));
        let kernel = pick(&mut rng, &[1, 3, 5]);
        let conv = Conv2d::new(groups * ci, groups * co, kernel).dilation(1 + rng.below(2));
        let conv = conv.stride(1 + rng.below(2)).groups(groups);
        check_conv(&mut parity, &mut rng, conv, 16);
    }
    parity.report("grouped convolution");
}

#[test]
fn depthwise_convolution() {
    let mut parity = Parity::new();
    let mut rng = Rng::new(4);
    for case in 0..120 {
        let channels = pick(&mut rng, &CHANNELS);
        let mut conv = Conv2d::depthwise(channels, [3, 3, 5, 1, 2][case % 5]);
        conv = conv.dilation(1 + rng.below(3)).stride(1 + rng.below(3));
        if rng.below(3) == 0 {
            conv.stride = [1 + rng.below(2), 1 + rng.below(4)];
            conv.dilation = [1 + rng.below(2), 1 + rng.below(2)];
            conv.padding = std::array::from_fn(|_| rng.below(4));
        }
        check_conv(&mut parity, &mut rng, conv, 20);
    }
    parity.report("depthwise convolution");
}

/// Pairs, with and without a residual on the second; where something else reads the map between, there is none.
#[test]
fn depthwise_and_pointwise_pairs() {
    let mut parity = Parity::new();
    let mut rng = Rng::new(22);
    for case in 0..60 {
        let (ci, co) = (pick(&mut rng, &CHANNELS), pick(&mut rng, &CHANNELS));
        let mut first = Conv2d::depthwise(ci, [3, 3, 5][case % 3]).stride(1 + rng.below(2)).bias();
        first = first.dilation(1 + rng.below(2));
        // Wide enough for several bands of rows.
        let most = if case % 4 == 0 { 200 } else { 24 };
        let shape = map_for(&mut rng, &first, most);
        let graph = network(ci, |b, x| {
            let y = b.conv("depthwise", x, first);
            let y = maybe_activate(&mut rng, b, y);
            let z = b.conv("pointwise", y, Conv2d::new(ci, co, 1).bias());
            match case % 5 {
                0 | 1 => maybe_activate(&mut rng, b, z),
                2 => {
                    let small = b.conv("small", x, Conv2d::new(ci, co, 1).stride(3));
                    let up = b.upsample_to(small, Interpolation::Nearest, z);
                    let sum = b.add(z, up);
                    maybe_activate(&mut rng, b, sum)
                }
                3 => {
                    let other = b.conv("other", x, Conv2d::new(ci, co, 1).stride(first.stride[0]));
                    let other = b.upsample_to(other, Interpolation::Nearest, z);
                    let sum = b.add(other, z);
                    b.concat(&[sum, other])
                }
                _ => b.concat(&[z, y]),
            }
        });
        let compiled = Compiled::new(&graph, &Weights::random(&graph, 1), Isa::Generic).unwrap();
        let pairs = compiled.listing().filter(|(_, kernel)| *kernel == "depthwise, conv 1x1").count();
        assert_eq!(pairs, usize::from(case % 5 != 4), "case {case}");
        parity.check_random(&format!("{first:?} on {shape}, case {case}"), &graph, &[shape], rng.bits());
    }
    parity.report("depthwise and pointwise pairs");
}

#[test]
fn few_rows_and_many_channels_share_panels() {
    let mut parity = Parity::new();
    let mut rng = Rng::new(5);
    for out in [65, 97, 130, 256] {
        let conv = Conv2d::new(33, out, 1);
        let graph = network(33, |b, x| {
            let y = b.conv("conv", x, conv);
            b.relu(y)
        });
        for (n, h) in [(1, 1), (1, 2), (1, 3), (2, 2), (5, 1)] {
            let shape = Shape::new(n, 33, h, 1 + rng.below(20));
            parity.check_random(&format!("{conv:?} on {shape}"), &graph, &[shape], rng.bits());
        }
    }
    parity.report("panel-wise convolution");
}

#[test]
fn transposed_convolution() {
    let mut parity = Parity::new();
    let mut rng = Rng::new(6);
    for _ in 0..50 {
        let groups = pick(&mut rng, &[1, 1, 2, 5]);
        let (ci, co) = (groups * pick(&mut rng, &[1, 3, 8, 17]), groups * pick(&mut rng, &[1, 2, 9, 16]));
        let kernel: [usize; 2] = std::array::from_fn(|_| 1 + rng.below(5));
        let conv = ConvTranspose2d {
            in_channels: ci,
            out_channels: co,
            kernel,
            stride: std::array::from_fn(|_| 1 + rng.below(3)),
            padding: std::array::from_fn(|side| rng.below(kernel[side % 2].div_ceil(2))),
            groups,
            bias: rng.below(2) == 0,
        };
        let graph = network(ci, |b, x| {
            let mut y = b.conv_transpose("up", x, conv);
            if rng.below(2) == 0 {
                y = b.batchnorm("bn", y, co);
            }
            maybe_activate(&mut rng, b, y)
        });
        let shape = Shape::new(1 + rng.below(2), ci, 2 + rng.below(8), 2 + rng.below(8));
        parity.check_random(&format!("{conv:?} on {shape}"), &graph, &[shape], rng.bits());
    }
    parity.report("transposed convolution");
}

#[test]
fn pooling() {
    let mut parity = Parity::new();
    let mut rng = Rng::new(7);
    for _ in 0..60 {
        let kernel: [usize; 2] = std::array::from_fn(|_| 1 + rng.below(4));
        let pool = MaxPool {
            kernel,
            stride: std::array::from_fn(|_| 1 + rng.below(3)),
            padding: std::array::from_fn(|side| rng.below(kernel[side % 2])),
        };
        let c = pick(&mut rng, &CHANNELS);
        let shape = Shape::new(1 + rng.below(3), c, 4 + rng.below(16), 4 + rng.below(16));
        let graph = network(c, |b, x| b.max_pool(x, pool));
        parity.check_random(&format!("{pool:?} on {shape}"), &graph, &[shape], rng.bits());
        let graph = network(c, |b, x| b.global_avg_pool(x));
        parity.check_random(&format!("mean of {shape}"), &graph, &[shape], rng.bits());
    }
    parity.report("pooling");
}

#[test]
fn resizing() {
    let mut parity = Parity::new();
    let mut rng = Rng::new(8);
    for case in 0..80 {
        let mode = [Interpolation::Nearest, Interpolation::Bilinear][case % 2];
        let c = pick(&mut rng, &CHANNELS);
        let size = |rng: &mut Rng, n| Shape::new(n, c, 1 + rng.below(30), 1 + rng.below(30));
        let n = 1 + rng.below(2);
        let (shape, like) = (size(&mut rng, n), size(&mut rng, n));
        let mut b = Builder::new();
        let x = b.input("x", c);
        let other = b.input("like", c);
        let y = b.upsample_to(x, mode, other);
        b.output("y", y);
        let z = b.upsample(x, mode, 2 + case % 3);
        b.output("z", z);
        let what = format!("{mode:?} {shape} to {like}");
        parity.check_random(&what, &b.finish(), &[shape, like], rng.bits());
    }
    parity.report("resizing");
}

#[test]
fn activations_and_sums() {
    let mut parity = Parity::new();
    let mut rng = Rng::new(9);
    for c in CHANNELS {
        let shape = Shape::new(1 + rng.below(3), c, 1 + rng.below(9), 1 + rng.below(9));
        let mut b = Builder::new();
        let (x, y) = (b.input("x", c), b.input("y", c));
        let sum = b.add(x, y);
        b.output("sum", sum);
        let twice = b.add(x, x);
        b.output("twice", twice);
        let runs = (1..=c).filter(|k| c.is_multiple_of(*k)).map(Activation::Softmax);
        for a in runs.chain([Activation::Relu, Activation::LeakyRelu(0.1), Activation::Sigmoid]) {
            let z = b.activation(x, a);
            b.output("activated", z);
            let z = b.add(x, y);
            let z = b.activation(z, a);
            b.output("activated sum", z);
        }
        parity.check_random(&format!("activations of {shape}"), &b.finish(), &[shape, shape], rng.bits());
    }
    parity.report("activations and sums");
}

#[test]
fn batch_normalisation_that_nothing_takes_in() {
    let mut parity = Parity::new();
    let mut rng = Rng::new(10);
    for c in CHANNELS {
        let shape = Shape::new(2, c, 1 + rng.below(9), 1 + rng.below(9));
        let graph = network(c, |b, x| {
            let y = b.batchnorm("first", x, c);
            let y = b.relu(y);
            let y = b.batchnorm("second", y, c);
            b.batchnorm("third", y, c)
        });
        parity.check_random(&format!("batchnorm of {shape}"), &graph, &[shape], rng.bits());
    }
    parity.report("batchnorm");
}

#[test]
fn cropping() {
    let mut parity = Parity::new();
    let mut rng = Rng::new(11);
    for c in CHANNELS {
        let (top, left) = (rng.below(4), rng.below(4));
        let like = Shape::new(2, 3, 1 + rng.below(6), 1 + rng.below(6));
        let shape = Shape::new(2, c, top + like.h + rng.below(3), left + like.w + rng.below(3));
        let mut b = Builder::new();
        let (x, other) = (b.input("x", c), b.input("like", 3));
        let y = b.crop(x, other, top, left);
        b.output("y", y);
        parity.check_random(&format!("crop {shape} to {like}"), &b.finish(), &[shape, like], rng.bits());
    }
    parity.report("crop");
}

/// Boxes on `map` (stride `1 / scale`), some of them partly or wholly outside, some inside out.
fn boxes(rng: &mut Rng, map: Shape, scale: f32, count: usize) -> Tensor {
    let mut rois = Tensor::zeros(Shape::new(count, 5, 1, 1));
    for roi in rois.data.chunks_exact_mut(5) {
        roi[0] = rng.below(map.n) as f32;
        let (w, h) = (map.w as f32 / scale, map.h as f32 / scale);
        let (x, y) = (rng.range(-0.3 * w, w), rng.range(-0.3 * h, h));
        roi[1..].copy_from_slice(&[x, y, x + rng.range(-0.1 * w, w), y + rng.range(-0.1 * h, h)]);
    }
    rois
}

#[test]
fn roi_align_and_its_head() {
    let mut parity = Parity::new();
    let mut rng = Rng::new(12);
    for case in 0..40 {
        let c = pick(&mut rng, &[1, 3, 8, 17, 33]);
        let map = Shape::new(1 + rng.below(2), c, 3 + rng.below(12), 3 + rng.below(12));
        let roi = RoiAlign {
            output: std::array::from_fn(|_| 1 + rng.below(4)),
            spatial_scale: pick(&mut rng, &[1.0, 0.25, 0.0625]),
            sampling_ratio: case % 3,
            aligned: rng.below(2) == 0,
        };
        let count = 1 + rng.below(7);
        let rois = boxes(&mut rng, map, roi.spatial_scale, count);
        let mut b = Builder::new();
        let (x, r) = (b.input("x", c), b.input("boxes", 5));
        let features = b.roi_align(x, r, roi);
        let linear = |i, o| Linear { in_features: i, out_features: o, bias: true };
        let hidden = b.linear("fc1", features, linear(c * roi.output[0] * roi.output[1], 20));
        let hidden = b.relu(hidden);
        let scores = b.linear("fc2", hidden, linear(20, 3));
        b.output("features", features);
        b.output("scores", scores);
        // A head as Faster R-CNN's second stage has it: convolutions and pooling on the region first.
        let y = b.conv("conv", features, Conv2d::new(c, 6, 3));
        let y = b.batchnorm("bn", y, 6);
        let y = b.relu(y);
        let y = b.max_pool(y, MaxPool::new(2, 1, 1));
        let y = b.concat(&[y, y]);
        let y = b.linear("deep", y, linear(12 * (roi.output[0] + 1) * (roi.output[1] + 1), 4));
        b.output("deep", y);
        let graph = b.finish();
        let weights = Weights::random(&graph, case as u64);
        let inputs = [random_tensor(map, &mut rng), rois];
        let expected = run_reference(&graph, &weights, &inputs).unwrap();
        parity.check(&format!("{roi:?} on {map}"), &graph, &weights, &inputs, &expected);
    }
    parity.report("roi align and linear");
}

#[test]
fn what_no_kernel_can_compute_is_an_error() {
    let fails = |layers: &dyn Fn(&mut Builder, NodeId) -> NodeId, why: &str| {
        let graph = network(4, |b, x| layers(b, x));
        let shape = Shape::new(1, 4, 6, 6);
        let plan = Compiled::new(&graph, &Weights::random(&graph, 1), Isa::Generic)
            .and_then(|network| Plan::new(&network, &[shape]));
        let error = plan.err().expect(why).to_string();
        assert!(error.contains(why), "{error}");
    };
    let linear = |features| Linear { in_features: features, out_features: 2, bias: false };
    fails(&|b, x| b.linear("fc", x, linear(4 * 36)), "fixed size");
    fails(
        &|b, x| {
            let m = b.global_avg_pool(x);
            b.linear("fc", m, linear(5))
        },
        "5 values",
    );
    fails(&|b, x| b.activation(x, Activation::LeakyRelu(1.5)), "slope");
    fails(&|b, x| b.activation(x, Activation::LeakyRelu(-0.1)), "slope");
    fails(&|b, x| b.activation(x, Activation::Softmax(3)), "softmax");
    fails(&|b, x| b.conv("c", x, Conv2d::new(3, 3, 1)), "channels");
    fails(&|b, x| b.conv("c", x, Conv2d::new(4, 3, 9).padding([0; 4])), "does not fit");
    fails(&|b, x| b.max_pool(x, MaxPool::new(2, 2, 3)), "pad");
    fails(&|b, x| b.crop(x, x, 1, 0), "crop");
}
