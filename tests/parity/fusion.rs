//! The patterns that the compiler rewrites, each held to the raw network and to the number of steps
//! that is left of it.

use crate::support::{Parity, BANDS};
use farface::cpu::Isa;
use farface::graph::init::Rng;
use farface::graph::{Builder, Compiled, Graph, NodeId, Plan, Weights};
use farface::layers::{Activation, Conv2d, Interpolation, Linear, MaxPool};
use farface::nets::conv_bn;
use farface::shape::Shape;

const LEAKY: Activation = Activation::LeakyRelu(0.1);

/// Builds on one input of `channels`, holds compiled to raw on an odd size and a batch of two, and
/// expects this many steps.
fn holds(what: &str, channels: usize, steps: usize, layers: impl FnOnce(&mut Builder, NodeId)) {
    let mut b = Builder::new();
    let x = b.input("x", channels);
    layers(&mut b, x);
    let graph = b.finish();
    let shape = Shape::new(2, channels, 11, 13);
    Parity::new().check_random(what, &graph, &[shape], 1);
    assert_eq!(step_count(&graph, &[shape]), steps, "steps of {what}");
}

fn step_count(graph: &Graph, shapes: &[Shape]) -> usize {
    let network = Compiled::new(graph, &Weights::random(graph, 1), Isa::Generic).unwrap();
    Plan::new(&network, shapes).unwrap().steps()
}

fn conv_bn_relu(b: &mut Builder, name: &str, x: NodeId, conv: Conv2d) -> NodeId {
    conv_bn(b, name, x, conv, Some(Activation::Relu))
}

#[test]
fn batchnorm_and_activation_fold_into_every_convolution() {
    holds("conv + bn + relu", 5, 1, |b, x| {
        let y = conv_bn_relu(b, "a", x, Conv2d::new(5, 17, 3));
        b.output("y", y);
    });
    holds("biased conv + bn + leaky", 5, 1, |b, x| {
        let y = conv_bn(b, "a", x, Conv2d::new(5, 17, 3).bias(), Some(LEAKY));
        b.output("y", y);
    });
    holds("depthwise + bn + leaky", 17, 1, |b, x| {
        let y = conv_bn(b, "a", x, Conv2d::depthwise(17, 3), Some(LEAKY));
        b.output("y", y);
    });
    holds("conv + bn + bn", 5, 1, |b, x| {
        let y = conv_bn(b, "a", x, Conv2d::new(5, 9, 3), None);
        let y = b.batchnorm("again", y, 9);
        b.output("y", y);
    });
    // Two stages of a cascade.
    holds("conv + relu + bn", 5, 1, |b, x| {
        let y = b.conv("a", x, Conv2d::new(5, 9, 3));
        let y = b.relu(y);
        let y = b.batchnorm("bn", y, 9);
        b.output("y", y);
    });
    // Both convolutions as one, and the two activations.
    holds("conv + sigmoid, conv + softmax", 5, 3, |b, x| {
        for (name, a) in [("a", Activation::Sigmoid), ("b", Activation::Softmax(2))] {
            let y = b.conv(name, x, Conv2d::new(5, 6, 1).bias());
            let y = b.activation(y, a);
            b.output(name, y);
        }
    });
}

#[test]
fn steps_are_listed_by_layer_and_kernel() {
    let mut b = Builder::new();
    let x = b.input("x", 4);
    let y = conv_bn_relu(&mut b, "stem", x, Conv2d::new(4, 8, 3));
    let y = b.max_pool(y, MaxPool::new(2, 2, 0));
    b.output("y", y);
    let graph = b.finish();
    let network = Compiled::new(&graph, &Weights::random(&graph, 1), Isa::Generic).unwrap();
    assert_eq!(network.listing().collect::<Vec<_>>(), [("stem.0", "two in bands")]);
}

#[test]
fn pooling_behind_a_depthwise_convolution_is_done_with_it() {
    for pool in [MaxPool::new(2, 2, 0), MaxPool::new(3, 2, 1), MaxPool::new(3, 1, 1)] {
        holds("depthwise + pool", 5, 2, |b, x| {
            // Small maps; the first convolution is on its own.
            let y = conv_bn_relu(b, "first", x, Conv2d::new(5, 18, 3).stride(4));
            let y = conv_bn_relu(b, "depthwise", y, Conv2d::depthwise(18, 3));
            let y = b.max_pool(y, pool);
            b.output("y", y);
        });
    }
}

/// Random runs of convolutions, depthwise ones and pooling with one reader each, as cascades, in f32 and in bf16.
#[test]
fn steps_in_bands_are_the_steps_one_after_the_other() {
    let mut parity = Parity::new();
    let mut rng = Rng::new(31);
    for case in 0..BANDS {
        let mut b = Builder::new();
        let x = b.input("x", 3);
        let (mut y, mut c) = (conv_bn(&mut b, "first", x, Conv2d::new(3, 6, 3), Some(LEAKY)), 6);
        for i in 0..1 + rng.below(6) {
            let name = format!("step{i}");
            let activation = [None, Some(LEAKY), Some(Activation::Relu)][rng.below(3)];
            y = match rng.below(5) {
                0 => {
                    let pool =
                        [MaxPool::new(2, 2, 0), MaxPool::new(3, 2, 1), MaxPool::new(3, 1, 1)][rng.below(3)];
                    b.max_pool(y, pool)
                }
                1 => {
                    let d =
                        [Conv2d::depthwise(c, 3), Conv2d::depthwise(c, 5), Conv2d::depthwise(c, 3).stride(2)];
                    conv_bn(&mut b, &name, y, d[rng.below(3)], activation)
                }
                2 => {
                    let to = [4, 10, 14][rng.below(3)];
                    let conv = Conv2d {
                        padding: std::array::from_fn(|_| 1 + rng.below(2)),
                        ..Conv2d::new(c, to, 3)
                    };
                    c = to;
                    conv_bn(&mut b, &name, y, conv.dilation(1 + rng.below(2)), activation)
                }
                _ => {
                    let to = [4, 8, 18][rng.below(3)];
                    let conv = Conv2d::new(c, to, 1);
                    c = to;
                    conv_bn(&mut b, &name, y, conv, activation)
                }
            };
        }
        b.output("y", y);
        let graph = b.finish();
        let shape = Shape::new(1 + rng.below(2), 3, 24 + rng.below(70), 24 + rng.below(60));
        let kernels: Vec<String> = {
            let compiled = Compiled::new(&graph, &Weights::random(&graph, 1), Isa::Generic).unwrap();
            compiled.listing().map(|(_, kernel)| kernel.to_string()).collect()
        };
        assert!(kernels.iter().any(|k| k.contains("in bands")), "{kernels:?}");
        parity.check_random(&format!("case {case}: {kernels:?} on {shape}"), &graph, &[shape], rng.bits());
    }
    parity.report("bands");
}

#[test]
fn pointwise_siblings_are_one_convolution() {
    let heads = |b: &mut Builder, x: NodeId| {
        for (i, (channels, activation)) in
            [(1, None), (4, None), (10, None), (2, Some(LEAKY))].into_iter().enumerate()
        {
            let y = conv_bn(b, &format!("point{i}"), x, Conv2d::new(24, channels, 1).bias(), activation);
            let y = b.conv(&format!("depth{i}"), y, Conv2d::depthwise(channels, 3).bias());
            b.output(&format!("y{i}"), y);
        }
    };
    // The stem, three siblings as one, one of another activation with its depthwise one in bands, three depthwise ones.
    holds("heads", 5, 6, |b, x| {
        let x = conv_bn_relu(b, "stem", x, Conv2d::new(5, 24, 3));
        heads(b, x);
    });
    // Too many channels for one register, and outputs, which may be wanted one without the other.
    holds("wide heads", 5, 3, |b, x| {
        for i in 0..3 {
            let y = conv_bn_relu(b, &format!("point{i}"), x, Conv2d::new(5, 9, 1));
            let y = b.conv(&format!("depth{i}"), y, Conv2d::depthwise(9, 3));
            b.output(&format!("y{i}"), y);
        }
    });
    holds("outputs", 5, 2, |b, x| {
        for i in 0..2 {
            let y = b.conv(&format!("point{i}"), x, Conv2d::new(5, 3, 1));
            b.output(&format!("y{i}"), y);
        }
    });
}

/// ResNet's basic block; `down` where size and channels change.
fn basic(b: &mut Builder, name: &str, x: NodeId, [ci, co]: [usize; 2], stride: usize) -> NodeId {
    b.scope(name, |b| {
        let y = conv_bn_relu(b, "1", x, Conv2d::new(ci, co, 3).stride(stride));
        let y = conv_bn(b, "2", y, Conv2d::new(co, co, 3), None);
        let short = match (stride, ci == co) {
            (1, true) => x,
            _ => conv_bn(b, "down", x, Conv2d::new(ci, co, 1).stride(stride), None),
        };
        let y = b.add(y, short);
        b.relu(y)
    })
}

/// ResNet's bottleneck with a projection.
fn bottleneck(b: &mut Builder, name: &str, x: NodeId, [ci, mid]: [usize; 2], swap: bool) -> NodeId {
    b.scope(name, |b| {
        let y = conv_bn_relu(b, "1", x, Conv2d::new(ci, mid, 1));
        let y = conv_bn_relu(b, "2", y, Conv2d::new(mid, mid, 3).stride(2));
        let y = conv_bn(b, "3", y, Conv2d::new(mid, 4 * mid, 1), None);
        let short = conv_bn(b, "down", x, Conv2d::new(ci, 4 * mid, 1).stride(2), None);
        let y = if swap { b.add(short, y) } else { b.add(y, short) };
        b.relu(y)
    })
}

#[test]
fn residual_blocks_fuse_the_sum_into_the_last_convolution() {
    holds("basic block", 16, 2, |b, x| {
        let y = basic(b, "block", x, [16, 16], 1);
        b.output("y", y);
    });
    holds("basic blocks with downsampling", 9, 5, |b, x| {
        let y = basic(b, "one", x, [9, 20], 2);
        let y = basic(b, "two", y, [20, 20], 1);
        b.output("y", y);
    });
    for swap in [false, true] {
        // The block in bands of rows, and its shortcut.
        holds("bottleneck with downsampling", 8, 2, |b, x| {
            let y = bottleneck(b, "block", x, [8, 6], swap);
            b.output("y", y);
        });
    }
}

#[test]
fn two_convolutions_into_one_sum_are_each_computed_once() {
    holds("conv + conv + relu", 5, 2, |b, x| {
        let (p, q) = (b.conv("p", x, Conv2d::new(5, 9, 3)), b.conv("q", x, Conv2d::new(5, 9, 1)));
        let y = b.add(p, q);
        let y = b.relu(y);
        b.output("y", y);
    });
    holds("sum of four convolutions", 5, 4, |b, x| {
        let mut sum = b.conv("0", x, Conv2d::new(5, 9, 3));
        for name in ["1", "2", "3"] {
            let y = conv_bn(b, name, x, Conv2d::new(5, 9, 3), Some(LEAKY));
            sum = b.add(y, sum);
        }
        b.output("sum", sum);
    });
    // The second convolution is read by the first's sum and by its own: neither may take it in twice.
    holds("sums that share a convolution", 5, 3, |b, x| {
        let (p, q) = (b.conv("p", x, Conv2d::new(5, 9, 3)), b.conv("q", x, Conv2d::new(5, 9, 1)));
        let first = b.add(p, q);
        let r = b.conv("r", first, Conv2d::new(9, 9, 3));
        let second = b.add(q, r);
        b.output("second", second);
    });
    holds("depthwise plus depthwise", 7, 3, |b, x| {
        let (p, q) = (b.conv("p", x, Conv2d::depthwise(7, 3)), b.conv("q", x, Conv2d::depthwise(7, 5)));
        let y = b.add(p, q);
        let y = b.relu(y);
        b.output("y", y);
    });
}

#[test]
fn activation_before_or_after_the_sum_keeps_its_place() {
    holds("leaky, then sum", 8, 1, |b, x| {
        let y = conv_bn(b, "a", x, Conv2d::new(8, 8, 3), Some(LEAKY));
        let y = b.add(x, y);
        b.output("y", y);
    });
    holds("leaky, sum, relu", 8, 2, |b, x| {
        let y = conv_bn(b, "a", x, Conv2d::new(8, 8, 3), Some(LEAKY));
        let y = b.add(y, x);
        let y = b.relu(y);
        b.output("y", y);
    });
    holds("sum, then batchnorm", 8, 2, |b, x| {
        let y = b.conv("a", x, Conv2d::new(8, 8, 3));
        let y = b.add(y, x);
        let y = b.batchnorm("bn", y, 8);
        let y = b.relu(y);
        b.output("y", y);
    });
    holds("linear with a residual", 6, 4, |b, x| {
        let m = b.global_avg_pool(x);
        let linear = Linear { in_features: 6, out_features: 6, bias: true };
        let y = b.linear("a", m, linear);
        let y = b.relu(y);
        let z = b.linear("b", y, linear);
        let z = b.add(z, y);
        let z = b.activation(z, Activation::Softmax(3));
        b.output("z", z);
    });
}

/// A coarse map under the input, by a strided convolution.
fn coarse(b: &mut Builder, x: NodeId, [ci, co]: [usize; 2]) -> NodeId {
    conv_bn_relu(b, "coarse", x, Conv2d::new(ci, co, 3).stride(2))
}

#[test]
fn top_down_sums_read_the_coarse_map_directly() {
    for (mode, steps) in [(Interpolation::Nearest, 2), (Interpolation::Bilinear, 3)] {
        for swap in [false, true] {
            for activation in [None, Some(LEAKY)] {
                holds("lateral + upsampled", 5, steps, |b, x| {
                    let c = coarse(b, x, [5, 18]);
                    let lateral = conv_bn(b, "lateral", x, Conv2d::new(5, 18, 1), activation);
                    let up = b.upsample_to(c, mode, lateral);
                    let y = if swap { b.add(up, lateral) } else { b.add(lateral, up) };
                    b.output("y", y);
                });
            }
        }
    }
    holds("upsampled map read twice", 5, 4, |b, x| {
        let c = coarse(b, x, [5, 5]);
        let up = b.upsample_to(c, Interpolation::Nearest, x);
        let lateral = b.conv("lateral", x, Conv2d::new(5, 5, 1));
        let y = b.add(lateral, up);
        let z = b.activation(up, Activation::Sigmoid);
        b.output("y", y);
        b.output("z", z);
    });
    // One of them as it is, the other resized before.
    holds("sum of two upsampled maps", 5, 4, |b, x| {
        let (p, q) = (coarse(b, x, [5, 5]), b.max_pool(x, MaxPool::new(2, 2, 0)));
        let up = |b: &mut Builder, m| b.upsample_to(m, Interpolation::Nearest, x);
        let (p, q) = (up(b, p), up(b, q));
        let y = b.add(p, q);
        b.output("y", y);
    });
    holds("nearest downsampling into a sum", 5, 2, |b, x| {
        let fine = b.conv("fine", x, Conv2d::new(5, 9, 1));
        let small = b.conv("small", x, Conv2d::new(5, 9, 3).stride(3));
        let down = b.upsample_to(fine, Interpolation::Nearest, small);
        let y = b.add(small, down);
        b.output("y", y);
    });
    holds("upsampled into its own lateral", 5, 2, |b, x| {
        let y = b.conv("y", x, Conv2d::new(5, 9, 3));
        let up = b.upsample_to(y, Interpolation::Nearest, x);
        let z = b.conv("z", x, Conv2d::new(5, 9, 3));
        let z = b.add(z, up);
        b.output("z", z);
    });
    // The size reference is never computed: nobody reads its values.
    holds("a map that only gives its size", 5, 1, |b, x| {
        let like = b.conv("like", x, Conv2d::new(5, 2, 3).stride(2));
        let y = b.upsample_to(x, Interpolation::Bilinear, like);
        b.output("y", y);
    });
}

#[test]
fn sums_that_no_convolution_takes_in_read_the_coarse_map_directly() {
    for (mode, steps) in [(Interpolation::Nearest, 4), (Interpolation::Bilinear, 5)] {
        for swap in [false, true] {
            for activation in [None, Some(LEAKY)] {
                holds("lateral that others read + upsampled", 5, steps, |b, x| {
                    let c = coarse(b, x, [5, 18]);
                    let lateral = conv_bn(b, "lateral", x, Conv2d::new(5, 18, 1), None);
                    let up = b.upsample_to(c, mode, lateral);
                    let y = if swap { b.add(up, lateral) } else { b.add(lateral, up) };
                    let y = activation.map_or(y, |a| b.activation(y, a));
                    b.output("y", y);
                    let other = b.activation(lateral, Activation::Sigmoid);
                    b.output("other", other);
                });
            }
        }
    }
    holds("the input + upsampled", 6, 2, |b, x| {
        let small = b.max_pool(x, MaxPool::new(3, 2, 1));
        let up = b.upsample_to(small, Interpolation::Nearest, x);
        let y = b.add(x, up);
        b.output("y", y);
    });
    holds("upsampled + upsampled of itself", 6, 3, |b, x| {
        let small = b.max_pool(x, MaxPool::new(3, 2, 1));
        let up = b.upsample_to(small, Interpolation::Nearest, x);
        let y = b.add(up, up);
        b.output("y", y);
    });
}

/// Two 3x3 convolutions of the input, `width` channels each.
fn pair(b: &mut Builder, x: NodeId, width: usize) -> [NodeId; 2] {
    ["p", "q"].map(|name| b.conv(name, x, Conv2d::new(5, width, 3).bias()))
}

/// Reads a map through a halo, so that the halo of every part is looked at.
fn read(b: &mut Builder, x: NodeId, channels: usize) {
    let y = b.conv("read", x, Conv2d::new(channels, 6, 3));
    b.output("read", y);
}

#[test]
fn concatenation() {
    holds("parts in place", 5, 3, |b, x| {
        let [p, q] = pair(b, x, 9);
        let y = b.concat(&[p, q]);
        read(b, y, 18);
    });
    holds("relu moves in front", 5, 3, |b, x| {
        let [p, q] = pair(b, x, 9);
        let y = b.concat(&[q, p]);
        let y = b.relu(y);
        read(b, y, 18);
    });
    // p, q, the relus of x, p and q (the copies), the reader, z.
    holds("relu in front of parts that others read", 5, 7, |b, x| {
        let [p, q] = pair(b, x, 9);
        let y = b.concat(&[x, p, q]);
        let y = b.relu(y);
        read(b, y, 23);
        b.output("p", p);
        let z = b.conv("z", q, Conv2d::new(9, 3, 1));
        b.output("z", z);
    });
    holds("a part read twice and the network's input are copied", 5, 6, |b, x| {
        let [p, q] = pair(b, x, 3);
        let y = b.concat(&[p, x, q]);
        read(b, y, 11);
        let z = b.conv("z", q, Conv2d::new(3, 3, 3));
        b.output("z", z);
    });
    holds("one map twice", 5, 4, |b, x| {
        let [p, _] = pair(b, x, 9);
        let y = b.concat(&[p, p]);
        read(b, y, 18);
    });
    holds("a part that is an output", 5, 4, |b, x| {
        let [p, q] = pair(b, x, 9);
        let y = b.concat(&[p, q]);
        read(b, y, 18);
        b.output("p", p);
    });
    holds("nested", 5, 5, |b, x| {
        let [p, q] = pair(b, x, 4);
        let inner = b.concat(&[p, q]);
        let r = b.conv("r", x, Conv2d::new(5, 3, 1));
        let outer = b.concat(&[inner, r]);
        read(b, outer, 11);
    });
    holds("a part made from another part", 5, 4, |b, x| {
        let p = b.conv("p", x, Conv2d::new(5, 9, 3));
        let q = b.conv("q", p, Conv2d::new(9, 4, 3));
        let y = b.concat(&[p, q]);
        read(b, y, 13);
    });
    holds("parts of every make", 5, 9, |b, x| {
        let dw = b.conv("dw", x, Conv2d::depthwise(5, 3));
        let pool = b.max_pool(x, MaxPool::new(3, 1, 1));
        let bn = b.batchnorm("bn", x, 5);
        let sum = b.add(x, x);
        let sigmoid = b.activation(x, Activation::Sigmoid);
        let softmax = b.activation(x, Activation::Softmax(5));
        let half = b.max_pool(x, MaxPool::new(2, 2, 0));
        let up = b.upsample_to(half, Interpolation::Bilinear, x);
        let y = b.concat(&[dw, pool, bn, sum, sigmoid, softmax, up]);
        read(b, y, 35);
    });
    holds("a residual sum as part, concatenation as residual", 6, 4, |b, x| {
        let p = b.conv("p", x, Conv2d::new(6, 6, 3));
        let sum = b.add(p, x);
        let q = b.conv("q", x, Conv2d::new(6, 7, 1));
        let y = b.concat(&[sum, q]);
        let r = b.conv("r", x, Conv2d::new(6, 13, 3));
        let y = b.add(r, y);
        b.output("y", y);
        let z = b.max_pool(y, MaxPool::new(2, 2, 0));
        b.output("z", z);
    });
    holds("of one", 5, 2, |b, x| {
        let p = b.conv("p", x, Conv2d::new(5, 3, 1));
        let y = b.concat(&[p]);
        read(b, y, 3);
    });
}

#[test]
fn outputs_may_be_read_on() {
    holds("conv is an output, its batchnorm and relu too", 5, 3, |b, x| {
        let y = b.conv("y", x, Conv2d::new(5, 9, 3));
        let n = b.batchnorm("n", y, 9);
        let r = b.relu(n);
        for (name, id) in [("y", y), ("n", n), ("r", r)] {
            b.output(name, id);
        }
    });
    holds("sum and its relu", 5, 2, |b, x| {
        let y = b.conv("y", x, Conv2d::new(5, 5, 3));
        let s = b.add(y, x);
        let r = b.relu(s);
        b.output("s", s);
        b.output("r", r);
    });
    holds("the input itself, and one map under two names", 5, 1, |b, x| {
        let y = b.conv("y", x, Conv2d::new(5, 9, 3));
        b.output("x", x);
        b.output("y", y);
        b.output("again", y);
    });
    holds("no step at all", 5, 0, |b, x| b.output("x", x));
    holds("layers that nothing needs", 5, 1, |b, x| {
        let y = b.conv("y", x, Conv2d::new(5, 9, 3));
        b.output("y", y);
        let dead = b.batchnorm("dead", y, 9);
        let dead = b.relu(dead);
        b.concat(&[dead, dead]);
        let dead = b.conv("other", x, Conv2d::new(5, 9, 3));
        b.add(dead, y);
    });
}

#[test]
fn shared_weights_and_values_added_to_themselves() {
    holds("one convolution used twice", 5, 3, |b, x| {
        let first = b.conv("shared", x, Conv2d::new(5, 5, 3).bias());
        let second = b.conv("shared", first, Conv2d::new(5, 5, 3).bias());
        let n = b.batchnorm("n", second, 5);
        let y = b.add(first, n);
        let y = b.conv("shared", y, Conv2d::new(5, 5, 3).bias());
        b.output("y", y);
    });
    holds("x + x", 5, 2, |b, x| {
        let y = b.conv("y", x, Conv2d::new(5, 9, 3));
        let y = b.add(y, y);
        let y = b.relu(y);
        b.output("y", y);
    });
}

#[test]
fn one_weight_in_other_company_is_packed_anew() {
    // The same weights plain, twice; with ReLU, leaky; at stride 2, dilated; with a sum before and behind the activation.
    let kinds = 7;
    let build = |b: &mut Builder, x: NodeId| {
        let conv = Conv2d::new(6, 6, 3);
        let shared = |b: &mut Builder, conv| b.conv("shared", x, conv);
        let mut outputs = vec![shared(b, conv), shared(b, conv)];
        for activation in [Activation::Relu, LEAKY] {
            let y = shared(b, conv);
            outputs.push(b.activation(y, activation));
        }
        outputs.extend([shared(b, conv.stride(2)), shared(b, conv.dilation(2))]);
        let y = shared(b, conv);
        let y = b.add(y, x);
        outputs.push(b.relu(y));
        let y = shared(b, conv);
        let y = b.relu(y);
        outputs.push(b.add(y, x));
        for (i, y) in outputs.into_iter().enumerate() {
            b.output(&i.to_string(), y);
        }
    };
    holds("one weight in several places", 6, kinds + 1, build);
    let mut b = Builder::new();
    let x = b.input("x", 6);
    build(&mut b, x);
    let graph = b.finish();
    let network = Compiled::new(&graph, &Weights::random(&graph, 1), Isa::Generic).unwrap();
    let steps = Plan::describe(&network, &[Shape::new(1, 6, 11, 13)]).unwrap();
    assert_eq!(steps.iter().filter(|s| s.weight_bytes > 0).count(), kinds, "packed");
}

#[test]
fn several_inputs_of_different_sizes_one_of_them_unread() {
    let mut b = Builder::new();
    let (x, unread, z) = (b.input("x", 3), b.input("unread", 2), b.input("z", 4));
    let y = b.conv("y", x, Conv2d::new(3, 4, 3).stride(2));
    let up = b.upsample_to(z, Interpolation::Nearest, y);
    let y = b.add(y, up);
    b.output("y", y);
    let like = b.crop(x, unread, 1, 2);
    b.output("cropped", like);
    let graph = b.finish();
    let shapes = [Shape::new(2, 3, 9, 12), Shape::new(2, 2, 4, 5), Shape::new(2, 4, 2, 3)];
    Parity::new().check_random("several inputs", &graph, &shapes, 3);
    assert_eq!(step_count(&graph, &shapes), 2);
}
