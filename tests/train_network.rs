//! The trainer's network against the plain loops: every output and every gradient, on every kind of unit.
#![cfg(feature = "train")]

#[path = "common/plain_step.rs"]
mod plain_step;

use farface::cpu::dense::{bf16_supported, Element};
use farface::graph::init::Rng;
use farface::graph::{Builder, Graph, Weights};
use farface::layers::Conv2d;
use farface::shape::{Shape, Tensor};
use farface::train::network::{Frozen, Network};
use plain_step::{boxes, mixed, plain_step, two_phases, worst};

fn check<T: Element>(seed: u64, threads: usize, frozen: bool, tolerance: f64) -> Vec<Vec<f32>> {
    let mut rng = Rng::new(seed);
    let graph = mixed(&mut rng);
    // Fewer images than parts of a batch, and more.
    let images = [1, 2, 3, 10][rng.below(4)];
    let shape = Shape::new(images, 3, 20 + rng.below(30), 20 + rng.below(30));
    check_graph::<T>(graph, shape, &[], rng, seed, threads, frozen, tolerance)
}

/// One step of `graph` on random values of `shape`, and on `boxes` in its second phase, against the plain loops.
fn check_graph<T: Element>(
    graph: Graph,
    shape: Shape,
    boxes: &[Tensor],
    mut rng: Rng,
    seed: u64,
    threads: usize,
    frozen: bool,
    tolerance: f64,
) -> Vec<Vec<f32>> {
    let weights = Weights::random(&graph, seed);
    let values: Vec<f32> = (0..shape.len()).map(|_| half::bf16::from_f32(rng.normal()).to_f32()).collect();
    let all: Vec<Shape> = [shape].into_iter().chain(boxes.iter().map(|b| b.shape)).collect();
    let shapes = graph.shapes(&all).unwrap();
    let d_outputs: Vec<Tensor> = graph
        .outputs
        .iter()
        .map(|(_, id)| {
            let s = shapes[id.0];
            Tensor::from_vec(s, (0..s.len()).map(|_| rng.normal() / s.len() as f32).collect())
        })
        .collect();
    let wide = |t: &Tensor| Tensor::from_vec(t.shape, t.data.iter().map(|&v| v.into()).collect());
    let mut inputs = vec![Tensor::from_vec(shape, values.iter().map(|&v| f64::from(v)).collect())];
    inputs.extend(boxes.iter().map(wide));
    let plain =
        plain_step(&graph, &weights, &inputs, &d_outputs.iter().map(wide).collect::<Vec<_>>(), frozen);

    let still = Frozen { statistics: if frozen { vec![String::new()] } else { vec![] }, ..Frozen::default() };
    let mut net = Network::<T>::new(graph.clone(), &weights, &still, threads).unwrap();
    let image = shape.len() / shape.n;
    net.forward(&[shape], &|_, n, z: &mut [T]| {
        z.iter_mut().zip(&values[n * image..]).for_each(|(z, &v)| *z = T::of(v));
    })
    .unwrap();
    if !boxes.is_empty() {
        assert!(net.backward(&d_outputs).is_err(), "the second phase comes first");
        net.forward_boxes(boxes.to_vec()).unwrap();
    }
    for (i, want) in plain.outputs.iter().enumerate() {
        let e = worst(&net.output(i).data, &want.data);
        assert!(e < tolerance, "seed {seed}, {}: output {i} off by {e}", T::NAME);
    }
    net.backward(&d_outputs).unwrap();
    // All gradients as one vector; single ones may cancel to less than bf16 resolves.
    let (all, want) = (net.grads.concat(), plain.grads.concat());
    let e = worst(&all, &want);
    assert!(e < 3.0 * tolerance, "seed {seed}, {}: gradients off by {e}", T::NAME);
    for (i, p) in graph.params.iter().enumerate() {
        let e = worst(&net.grads[i], &plain.grads[i]);
        assert!(
            tolerance > 1e-3 || e < 10.0 * tolerance,
            "seed {seed}, {}: gradient of {} off by {e}",
            T::NAME,
            p.name
        );
        let e = worst(&net.params[i], &plain.params[i]);
        assert!(e < tolerance, "seed {seed}, {}: {} off by {e} after the step", T::NAME, p.name);
    }
    net.grads
}

#[test]
fn outputs_and_gradients_equal_the_plain_loops() {
    for seed in 0..12 {
        check::<f32>(seed, 1 + seed as usize % 3, seed % 4 == 3, 2e-5);
    }
}

#[test]
fn bf16_follows_the_plain_loops_within_its_precision() {
    if !bf16_supported() {
        println!("skipped: this CPU multiplies no bf16");
        return;
    }
    for seed in 0..12 {
        check::<half::bf16>(seed, 1 + seed as usize % 3, seed % 4 == 3, 0.03);
    }
}

/// Inputs that no window reads, in bands behind the first; kernels smaller and larger than their stride.
#[test]
fn strided_depthwise_convolutions_leave_what_they_skip_without_gradient() {
    for (i, (conv, side)) in [
        (Conv2d::depthwise(256, 1).stride(2), 16),
        (Conv2d::depthwise(256, 3).stride(2).padding([0; 4]), 12),
        (Conv2d::depthwise(40, 3).stride(3), 40),
        (Conv2d::depthwise(24, 5).stride(2).padding([4, 4, 4, 4]), 33),
        (Conv2d::depthwise(17, 3).dilation(2).stride(2), 29),
    ]
    .into_iter()
    .enumerate()
    {
        let mut b = Builder::new();
        let x = b.input("x", 3);
        let y = b.conv("first", x, Conv2d::new(3, conv.in_channels, 1));
        let y = b.conv("depthwise", y, conv);
        b.output("y", y);
        let shape = Shape::new(2, 3, side, side + 1);
        check_graph::<f32>(b.finish(), shape, &[], Rng::new(i as u64), i as u64, 2, false, 2e-5);
    }
}

fn check_two_phases<T: Element>(seed: u64, threads: usize, tolerance: f64) -> Vec<Vec<f32>> {
    let mut rng = Rng::new(seed);
    let graph = two_phases(&mut rng);
    let images = 1 + rng.below(9);
    // Fewer than parts of a batch, and more.
    let boxes = [2 + rng.below(40), 1].map(|count| boxes(images, count, &mut rng));
    let shape = Shape::new(images, 3, 40, 36);
    check_graph::<T>(graph, shape, &boxes, rng, seed, threads, false, tolerance)
}

#[test]
fn a_second_phase_looks_at_boxes_and_its_gradients_reach_the_first() {
    for seed in 0..8 {
        let grads = check_two_phases::<f32>(seed, 1 + seed as usize % 3, 2e-5);
        if seed == 3 {
            for threads in [2, 3, 7] {
                assert_eq!(check_two_phases::<f32>(seed, threads, 2e-5), grads, "{threads} threads");
            }
        }
        if bf16_supported() {
            check_two_phases::<half::bf16>(seed, 2, 0.03);
        }
    }
}

#[test]
fn boxes_that_name_no_picture_or_are_no_numbers_are_refused() {
    let mut rng = Rng::new(1);
    let graph = two_phases(&mut rng);
    let weights = Weights::random(&graph, 1);
    let mut net = Network::<f32>::new(graph, &weights, &Frozen::default(), 1).unwrap();
    net.forward(&[Shape::new(2, 3, 40, 36)], &|_, _, z| z.fill(0.5)).unwrap();
    let good = boxes(2, 3, &mut rng);
    for (at, value) in [(5, 2.0), (0, 0.5), (5, -1.0), (7, f32::NAN), (13, f32::INFINITY)] {
        let mut bad = good.clone();
        bad.data[at] = value;
        let error = net.forward_boxes(vec![good.clone(), bad]).unwrap_err().to_string();
        assert!(error.contains("roi_align box"), "{error}");
    }
    assert!(net.forward_boxes(vec![good.clone()]).is_err(), "one input of two");
    assert!(net.forward_boxes(vec![good.clone(), good]).is_ok());
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    let expected = check::<f32>(5, 1, false, 1e-4);
    for threads in [1, 2, 3, 7] {
        assert_eq!(check::<f32>(5, threads, false, 1e-4), expected, "{threads} threads");
    }
}

#[test]
fn a_batch_of_one_value_a_channel_is_refused() {
    let mut b = Builder::new();
    let x = b.input("x", 1);
    let y = b.conv("c", x, Conv2d::new(1, 1, 1));
    let y = b.batchnorm("n", y, 1);
    b.output("y", y);
    let graph = b.finish();
    let weights = Weights::random(&graph, 1);
    let mut net = Network::<f32>::new(graph, &weights, &Frozen::default(), 1).unwrap();
    let error = net.forward(&[Shape::new(1, 1, 1, 1)], &|_, _, _| {}).unwrap_err();
    assert!(error.to_string().contains("larger batch"), "{error}");
}
