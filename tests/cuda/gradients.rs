//! A training whose convolutions cuDNN computes, forward and backward: it is held to the plain loops and to our kernels.

use crate::emulator::{driver, Driver};
use crate::failures::{alone, fail_at_each_but};
use crate::plain_step::mixed;
use crate::train::{behind, check_on, on_device, step, table, Batch, BF16, F32};
use crate::trainer::{distance, Course, RULES};
use farface::gpu::map::Element;
use farface::gpu::ops::{ConvLibraries, Device};
use farface::gpu::probe::Library;
use farface::graph::init::Rng;
use farface::graph::{Graph, Weights};
use farface::layers::{Conv2d, ConvTranspose2d, Linear};
use farface::shape::Shape;
use farface::train::device::DeviceEngine;
use farface::train::network::{Engine, Frozen};
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

/// A device whose convolutions cuDNN computes where it can; None where there is neither.
fn by_cudnn() -> Option<Arc<Device>> {
    driver()?;
    if !Library::Cudnn.is_present() {
        println!("skipped: no cuDNN");
        return None;
    }
    Some(Device::with_convolutions(0, ConvLibraries::Cudnn).unwrap())
}

/// A convolution behind one of one tap, whose gradient is wanted.
fn one(conv: Conv2d) -> Graph {
    behind(conv.in_channels, |b, x| b.conv("conv", x, conv))
}

/// Networks, and how many of their convolutions cuDNN computes: forward, the gradients of inputs and of weights. The first, from the
/// picture, is one of them.
fn networks() -> Vec<(&'static str, Graph, [usize; 3])> {
    let transposed = ConvTranspose2d {
        in_channels: 6,
        out_channels: 5,
        kernel: [4, 3],
        stride: [2, 2],
        padding: [1, 1, 1, 1],
        groups: 1,
        bias: false,
    };
    let pooled = Linear { in_features: 6 * 7 * 6, out_features: 9, bias: true };
    vec![
        ("odd channels", one(Conv2d::new(5, 7, 3).bias()), [2, 1, 2]),
        ("one tap", one(Conv2d::new(16, 8, 1)), [2, 1, 2]),
        ("one tap of a stride", one(Conv2d::new(8, 9, 1).stride(2)), [2, 1, 2]),
        ("a stride", one(Conv2d::new(6, 10, 3).stride(2)), [2, 1, 2]),
        ("strides past the end", one(Conv2d::new(4, 4, 4).dilation(2).stride(4).padding([3; 4])), [2, 1, 2]),
        ("dilation", one(Conv2d::new(9, 10, 3).dilation(2)), [2, 1, 2]),
        ("a row", one(Conv2d::rect(10, 4, 1, 5).bias()), [2, 1, 2]),
        // The gradient of a transposed convolution's input is a convolution.
        ("transposed", behind(6, |b, x| b.conv_transpose("t", x, transposed)), [2, 1, 2]),
        ("linear", behind(6, |b, x| b.linear("l", x, pooled)), [2, 1, 2]),
        (
            "read twice",
            behind(6, |b, x| {
                let [y, z] = [("y", 1), ("z", 3)].map(|(name, k)| b.conv(name, x, Conv2d::new(6, 10, k)));
                b.add(y, z)
            }),
            [3, 2, 3],
        ),
        // What it cannot say.
        ("padded on one side", one(Conv2d::new(6, 6, 3).padding([0, 2, 1, 0])), [1, 0, 1]),
        ("groups", one(Conv2d::new(12, 18, 3).groups(3)), [1, 0, 1]),
        ("depthwise", one(Conv2d::depthwise(9, 3)), [1, 0, 1]),
    ]
}

#[test]
fn convolutions_trained_by_cudnn_are_those_of_the_plain_loops() {
    let Some(device) = by_cudnn() else { return };
    for (i, (what, graph, expected)) in networks().into_iter().enumerate() {
        let mut rng = Rng::new(i as u64);
        let batch = Batch::random(&graph, Shape::new(1 + i % 2, 3, 7, 6), &[], &mut rng);
        for bounds in [F32, BF16] {
            let engine = check_on(&device, what, &graph, &batch, i as u64, false, bounds);
            let got = engine.convolutions_by_cudnn();
            println!("{what} in {:?}: {got:?} of cuDNN", bounds.0);
            // The machine's own may refuse what the emulated one takes.
            if matches!(driver(), Some(Driver::Emulated(_))) {
                assert_eq!(got, expected, "{what} in {:?}", bounds.0);
            }
        }
    }
}

/// Where there is no cuDNN: called by the test that sees to that.
pub fn without_cudnn_our_kernels_train() {
    let device = Device::with_convolutions(0, ConvLibraries::Auto).unwrap();
    let graph = one(Conv2d::new(6, 8, 3));
    let batch = Batch::random(&graph, Shape::new(1, 3, 5, 6), &[], &mut Rng::new(2));
    let engine = check_on(&device, "without cuDNN", &graph, &batch, 2, false, F32);
    assert_eq!(engine.convolutions_by_cudnn(), [0; 3]);
}

#[test]
fn a_training_by_cudnn_is_one_by_our_kernels_within_rounding() {
    let Some(device) = by_cudnn() else { return };
    let own = Device::with_convolutions(0, ConvLibraries::Own).unwrap();
    let graph = mixed(&mut Rng::new(5));
    let weights = Weights::default().completed(&graph, 7);
    for (element, bounds) in
        [(Element::F32, [1e-5, 1e-5, 1e-5, 1e-3]), (Element::Bf16, [0.02, 0.01, 0.01, 0.2])]
    {
        let course = |device: &Arc<Device>| {
            Course::new(on_device(&graph, &weights, &Frozen::default(), device, element), 32, RULES[0])
        };
        let (mut ours, mut theirs) = (course(&own), course(&device));
        for _ in 0..3 {
            let ((expected, _), (got, _)) = (ours.step(3.0), theirs.step(3.0));
            let mut off = vec![(got - expected).abs() / expected];
            off.extend(theirs.state().iter().zip(&ours.state()).map(|(got, e)| distance(got, e)));
            println!("{element:?}: losses, parameters, averages and buffers off by {off:?}");
            assert!(off.iter().zip(bounds).all(|(&off, most)| off < most), "{element:?}: {off:?}");
        }
        let by_cudnn = theirs.engine.convolutions_by_cudnn();
        assert!(by_cudnn.iter().all(|&n| n > 3), "{by_cudnn:?}");
        assert_eq!(ours.engine.convolutions_by_cudnn(), [0; 3]);
    }
}

#[test]
fn what_cudnn_refuses_is_computed_by_our_kernels_bit_for_bit() {
    let Some(Driver::Emulated(emulator)) = driver() else { return };
    if !alone("gradients::what_cudnn_refuses_is_computed_by_our_kernels_bit_for_bit") {
        return;
    }
    let graph = one(Conv2d::new(6, 8, 3));
    let weights = Weights::random(&graph, 1);
    // Asked for its workspace, and only when it is given the work. A refusal is remembered: another size every time.
    for refused in [1, 2] {
        let batch = Batch::random(&graph, Shape::new(2, 3, 6, 4 + refused), &[], &mut Rng::new(3));
        for element in [Element::F32, Element::Bf16] {
            let run = |libraries| {
                let device = Device::with_convolutions(0, libraries).unwrap();
                let mut engine = on_device(&graph, &weights, &Frozen::default(), &device, element);
                let first = step(&mut engine, &batch).1;
                assert!(first == step(&mut engine, &batch).1, "the same again");
                (first, engine.convolutions_by_cudnn())
            };
            emulator.refuse(refused as i32);
            let (refused_all, by_cudnn) = run(ConvLibraries::Cudnn);
            emulator.refuse(0);
            assert_eq!(by_cudnn, [0; 3]);
            assert!(refused_all == run(ConvLibraries::Own).0, "{refused}, {element:?}");
        }
    }
}

#[test]
fn a_cudnn_that_fails_at_any_call_of_a_training_is_an_error_where_it_is_forced() {
    let Some(Driver::Emulated(emulator)) = driver() else { return };
    if !alone("gradients::a_cudnn_that_fails_at_any_call_of_a_training_is_an_error_where_it_is_forced") {
        return;
    }
    let graph = one(Conv2d::new(8, 8, 3));
    let weights = Weights::random(&graph, 1);
    let batch = Batch::random(&graph, Shape::new(1, 3, 4, 4), &[], &mut Rng::new(3));
    let errors = Mutex::new(BTreeSet::new());
    // Given back in between: memory that grew.
    fail_at_each_but(emulator, "a training by cuDNN", 8, || {
        let step = || -> farface::Result<(DeviceEngine, Arc<Device>)> {
            let device = Device::with_convolutions(0, ConvLibraries::Cudnn)?;
            let frozen = Frozen::default();
            let mut engine = DeviceEngine::new(graph.clone(), &weights, &frozen, &device, Element::Bf16, 1)?;
            engine.forward(&batch.pixels, batch.shape, &table())?;
            engine.backward(&batch.d_outputs)?;
            engine.params_and_grads()?;
            Ok((engine, device))
        };
        step().inspect_err(|e| {
            errors.lock().unwrap().insert(e.to_string());
        })
    });
    let errors = errors.into_inner().unwrap();
    for call in [
        "cudnnGetConvolutionForwardWorkspaceSize",
        "cudnnConvolutionBiasActivationForward",
        "cudnnGetConvolutionBackwardDataWorkspaceSize",
        "cudnnConvolutionBackwardData",
        "cudnnGetConvolutionBackwardFilterWorkspaceSize",
        "cudnnConvolutionBackwardFilter",
    ] {
        assert!(errors.iter().any(|e| e.contains(&format!("{call} failed"))), "{call}: {errors:?}");
    }
}

#[test]
fn who_computes_a_training_is_measured_once_and_who_fails_is_no_candidate() {
    let Some(Driver::Emulated(emulator)) = driver() else { return };
    if !alone("gradients::who_computes_a_training_is_measured_once_and_who_fails_is_no_candidate") {
        return;
    }
    let device = Device::with_convolutions(0, ConvLibraries::Auto).unwrap();
    let graph = networks().swap_remove(9).1;
    let batch = |width| Batch::random(&graph, Shape::new(1, 3, 5, width), &[], &mut Rng::new(9));
    // Whoever is chosen, which is chance here.
    for bounds in [F32, BF16] {
        check_on(&device, "measured", &graph, &batch(4), 9, false, bounds);
    }
    let weights = Weights::random(&graph, 1);
    let engine = || on_device(&graph, &weights, &Frozen::default(), &device, Element::F32);
    let calls = || {
        let mut engine = engine();
        emulator.fail_at(0);
        step(&mut engine, &batch(5));
        (emulator.calls(), engine.convolutions_by_cudnn())
    };
    let (first, chosen) = calls();
    let (second, again) = calls();
    assert!(second < first / 2, "{first} calls, then {second}");
    assert_eq!(chosen, again);
    // A backward pass that measures, one of whose calls fails: a library's is forgiven. Other sizes every time.
    emulator.idle(true);
    let back = |width: usize, fails: i64| {
        let batch = batch(width);
        let mut engine = engine();
        engine.forward(&batch.pixels, batch.shape, &table()).unwrap();
        emulator.fail_at(fails);
        let result = engine.backward(&batch.d_outputs);
        let calls = emulator.calls();
        emulator.fail_at(0);
        (result, calls)
    };
    let (mut forgiven, mut tried) = (0, 0);
    let all = back(6, 0).1;
    for n in (1..=all).step_by(5) {
        tried += 1;
        match back(6 + n as usize, n).0 {
            Ok(()) => forgiven += 1,
            // What fails of the driver is no library's matter.
            Err(e) => assert!(e.to_string().contains("CUDA_ERROR"), "call {n}: {e}"),
        }
    }
    println!("{forgiven} of {tried} calls that failed were a library's");
    assert!(forgiven > 2 && forgiven < tried, "{forgiven} of {tried}");
}
