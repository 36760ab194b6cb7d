//! A driver that fails at each call in turn: errors that name the call, no crash, and nothing kept.

use crate::emulator::{driver, Driver, Emulator};
use farface::error::Result;
use farface::gpu::driver::Stream;
use farface::gpu::map::Element;
use farface::gpu::memory::DeviceBuffer;
use farface::gpu::ops::Device;
use farface::graph::{Builder, DeviceNetwork, DevicePlan, Graph, Weights};
use farface::layers::{Conv2d, MaxPool};
use farface::shape::{Shape, Tensor};
use std::process::Command;

/// Tells the process that it is the one in which calls fail; the other tests must not be hit.
const ALONE: &str = "FARFACE_TEST_FAILURES";

/// Runs the test of this name in a process of its own, unless this is it. True there.
pub fn alone(name: &str) -> bool {
    if std::env::var_os(ALONE).is_some() {
        return true;
    }
    let me = std::env::current_exe().unwrap();
    let out = Command::new(me).args([name, "--exact", "--nocapture"]).env(ALONE, "1").output().unwrap();
    let text = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success(), "{text}");
    println!("{text}");
    false
}

/// Lets every call fail once that `run` makes, or that is made when what it returns goes. Prints how many there were.
pub fn fail_at_each<T>(emulator: &Emulator, what: &str, run: impl Fn() -> Result<T>) {
    fail_at_each_but(emulator, what, 0, run);
}

/// As [`fail_at_each`], where up to `given_back` of the calls that `run` makes give something back, and fail unnoticed.
pub fn fail_at_each_but<T>(emulator: &Emulator, what: &str, given_back: usize, run: impl Fn() -> Result<T>) {
    fail_at_some(emulator, what, 1, given_back, run);
}

/// Of the calls of a run that makes too many, every how manieth fails: `usual`, or as FARFACE_TEST_STRIDE says (1: each).
pub fn stride(usual: usize) -> usize {
    std::env::var("FARFACE_TEST_STRIDE").map_or(usual, |s| s.parse().expect("FARFACE_TEST_STRIDE: a number"))
}

/// As [`fail_at_each_but`], of the first call and every `stride`th after it.
pub fn fail_at_some<T>(
    emulator: &Emulator,
    what: &str,
    stride: usize,
    given_back: usize,
    run: impl Fn() -> Result<T>,
) {
    let mut unnoticed = 0;
    // What kernels compute does not matter here. Once before, for what is made once a process.
    emulator.idle(true);
    drop(run().unwrap());
    emulator.fail_at(0);
    let held = emulator.live();
    let made = run().unwrap();
    let calls = emulator.calls();
    drop(made);
    let all = emulator.calls();
    assert!(calls > 20, "{what}: {calls} calls");
    for n in (1..=all).step_by(stride) {
        emulator.fail_at(n);
        match run() {
            Ok(made) => {
                unnoticed += usize::from(n <= calls);
                assert!(unnoticed <= given_back, "{what}: call {n} of {calls} fails unnoticed");
                drop(made);
            }
            Err(e) => {
                let error = e.to_string();
                assert!(n <= calls, "{what}: call {n}: {error}");
                let named = ["CUDA_ERROR", "CUDNN_STATUS", "CUBLAS_STATUS"].iter().any(|s| error.contains(s));
                assert!(error.contains("cu") && named, "{what}: call {n}: {error}");
            }
        }
        emulator.fail_at(0);
        assert_eq!(emulator.live(), held, "{what}: call {n} of {calls} fails and something is kept");
    }
    drop(run().unwrap());
    let which = if stride == 1 { "each".into() } else { format!("one of {stride}") };
    println!("{what}: {calls} calls and {} of giving back, {which} failed once", all - calls);
}

fn small_network() -> Graph {
    let mut b = Builder::new();
    let x = b.input("x", 3);
    let y = b.conv("conv", x, Conv2d::new(3, 8, 3).bias());
    let y = b.relu(y);
    let d = b.conv("depthwise", y, Conv2d::depthwise(8, 3));
    let p = b.max_pool(d, MaxPool::new(2, 2, 0));
    b.output("y", p);
    b.finish()
}

#[test]
fn a_driver_that_fails_at_any_call_is_an_error() {
    let Some(Driver::Emulated(emulator)) = driver() else { return };
    if !alone("failures::a_driver_that_fails_at_any_call_is_an_error") {
        return;
    }
    let graph = small_network();
    let weights = Weights::random(&graph, 1);
    let input = [Tensor::zeros(Shape::new(1, 3, 8, 8))];
    fail_at_each(emulator, "a network", || {
        let device = Device::new(0)?;
        let stream = Stream::new(device.context())?;
        let network = DeviceNetwork::new(&graph, &weights, &device, Element::F16)?;
        let plan = DevicePlan::new(&network, &[input[0].shape])?;
        let arena = DeviceBuffer::new(device.context(), plan.bytes())?;
        plan.run_tensors(&stream, &arena, &input)?;
        let recorded = stream.capture(|| plan.launch(&stream, &arena))?;
        recorded.launch(&stream)?;
        stream.synchronize()?;
        Ok((recorded, arena, plan, network, stream, device))
    });
}
