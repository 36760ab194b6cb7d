//! Convolutions by cuDNN and cuBLASLt, and who is chosen.

use crate::emulator::{driver, Driver, WITHOUT_LIBRARIES};
use crate::failures::{alone, fail_at_each_but};
use crate::sessions::{difference, noise, options, small};
use crate::support::random_tensor;
use farface::detect::{DevicePolicy, Options, Precision, Session};
use farface::gpu::driver::Stream;
use farface::gpu::map::Element;
use farface::gpu::memory::DeviceBuffer;
use farface::gpu::ops::{ConvLibraries, Device};
use farface::gpu::probe::Library;
use farface::graph::init::Rng;
use farface::graph::{run_reference, Builder, DeviceNetwork, DevicePlan, Graph, Weights};
use farface::layers::{Activation, Conv2d, Interpolation};
use farface::pixels::{ImageView, PixelFormat};
use farface::shape::{Shape, Tensor};
use farface::Result;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;

/// What convolutions pass of the suite that the CPU's kernels pass too.
const SUITE: [&str; 2] = ["kernels::dense_convolution", "kernels::roi_align_and_its_head"];

/// Runs tests of this program in a process that has this setting, and returns what they print.
fn run_with(setting: &str, tests: &[&str]) -> String {
    let me = std::env::current_exe().unwrap();
    let mut command = Command::new(me);
    command
        .args(tests)
        .args(["--exact", "--nocapture", "--test-threads=2"])
        .env("FARFACE_CUDA_CONV", setting);
    let out = command.output().unwrap();
    let text = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success(), "{setting}: {text}");
    text
}

/// The suite of convolutions with a library forced, each test of it with layers that the library computes.
fn suite_by(setting: &str) {
    if !matches!(driver(), Some(Driver::Emulated(_))) {
        return;
    }
    let text = run_with(setting, &SUITE);
    let reports: Vec<&str> = text.lines().filter(|l| l.contains("steps by libraries")).collect();
    assert_eq!(reports.len(), SUITE.len(), "{text}");
    assert!(reports.iter().all(|l| !l.contains(": 0 of")), "{reports:?}");
    reports.iter().for_each(|line| println!("{setting}: {line}"));
}

#[test]
fn convolutions_by_cudnn_are_those_of_the_plain_loops() {
    suite_by("cudnn");
}

#[test]
fn convolutions_by_cublaslt_are_those_of_the_plain_loops() {
    suite_by("cublaslt");
}

/// One layer of each kind, named after who can compute it.
fn layers() -> Graph {
    let mut b = Builder::new();
    let x = b.input("x", 16);
    let any = b.conv("window", x, Conv2d::new(16, 24, 3).bias());
    let any = b.relu(any);
    let point = b.conv("point", any, Conv2d::new(24, 17, 1).bias());
    let point = b.relu(point);
    let sum = b.conv("sum", point, Conv2d::new(17, 24, 1).bias());
    let sum = b.add(sum, any);
    let sum = b.relu(sum);
    let itself = b.conv("itself", sum, Conv2d::new(24, 24, 1));
    let sum = b.add(itself, sum);
    let leaky = b.conv("leaky", sum, Conv2d::new(24, 16, 3));
    let leaky = b.activation(leaky, Activation::LeakyRelu(0.1));
    let groups = b.conv("groups", leaky, Conv2d::new(16, 16, 1).groups(2));
    let small = b.conv("small", groups, Conv2d::new(16, 16, 3).stride(2));
    let wide = b.conv("wide", groups, Conv2d::new(16, 16, 1));
    let up = b.upsample_to(small, Interpolation::Nearest, wide);
    let enlarged = b.add(wide, up);
    let y = b.conv("out", enlarged, Conv2d::new(16, 4, 1).bias());
    b.output("y", y);
    b.finish()
}

/// The kernels of [`layers`] by name.
fn kernels(libraries: ConvLibraries, element: Element) -> Vec<(String, &'static str)> {
    let device = Device::with_convolutions(0, libraries).unwrap();
    let graph = layers();
    let network = DeviceNetwork::new(&graph, &Weights::random(&graph, 1), &device, element).unwrap();
    let mut plan = DevicePlan::new(&network, &[Shape::new(1, 16, 9, 11)]).unwrap();
    plan.choose(&network).unwrap();
    network.listing().zip(plan.kernels()).map(|((layer, _), kernel)| (layer.to_string(), kernel)).collect()
}

#[test]
fn each_layer_goes_to_the_library_where_it_can_compute_it() {
    if !matches!(driver(), Some(Driver::Emulated(_))) {
        return;
    }
    let by = |libraries, element, mark: &str| -> Vec<String> {
        let all = kernels(libraries, element);
        assert!(all.iter().all(|(_, k)| !k.starts_with("cu") || k.starts_with(mark)), "{all:?}");
        all.into_iter().filter(|(_, kernel)| kernel.starts_with(mark)).map(|(layer, _)| layer).collect()
    };
    // What f16 goes in and f32 comes out of is no call of cuDNN's, nor the sum of a convolution and its own input.
    let low = ["window", "point", "sum", "small"];
    assert_eq!(by(ConvLibraries::Cudnn, Element::F16, "cudnn"), low);
    assert_eq!(by(ConvLibraries::Cudnn, Element::Bf16, "cudnn"), low);
    assert_eq!(by(ConvLibraries::Cudnn, Element::F32, "cudnn"), ["window", "point", "sum", "small", "out"]);
    for element in [Element::F32, Element::F16, Element::Bf16] {
        assert_eq!(by(ConvLibraries::CublasLt, element, "cublasLt"), ["point", "sum", "itself", "out"]);
        assert_eq!(by(ConvLibraries::Own, element, "cu"), [""; 0]);
    }
}

#[test]
fn what_was_measured_once_is_chosen_again() {
    let Some(Driver::Emulated(emulator)) = driver() else { return };
    if !alone("libraries::what_was_measured_once_is_chosen_again") {
        return;
    }
    let counted = || {
        emulator.fail_at(0);
        let kernels = kernels(ConvLibraries::Auto, Element::F16);
        (kernels, emulator.calls())
    };
    let (first, measured) = counted();
    // Another device object, whose libraries are opened anew: each choice runs once, for its code to be there.
    let (second, known) = counted();
    assert_eq!(first, second);
    assert!(known < measured / 3, "{known} calls, then {measured}");
    println!("{measured} calls, then {known}: {first:?}");
}

#[test]
fn a_library_that_fails_at_any_call_is_an_error_where_it_is_forced() {
    let Some(Driver::Emulated(emulator)) = driver() else { return };
    if !alone("libraries::a_library_that_fails_at_any_call_is_an_error_where_it_is_forced") {
        return;
    }
    let mut b = Builder::new();
    let x = b.input("x", 8);
    let added = b.input("added", 8);
    let y = b.conv("conv", x, Conv2d::new(8, 8, 1).bias());
    let y = b.add(y, added);
    let y = b.relu(y);
    b.output("y", y);
    let graph = b.finish();
    let weights = Weights::random(&graph, 1);
    // What was measured is not measured again: another size every time.
    let width = AtomicUsize::new(1);
    for (libraries, what) in [(ConvLibraries::Cudnn, "cuDNN"), (ConvLibraries::CublasLt, "cuBLASLt")] {
        // What it was measured with is given back before there is a plan: a stream, two events, memory that grew.
        fail_at_each_but(emulator, what, 6, || {
            let shape = Shape::new(1, 8, 1, width.fetch_add(1, Ordering::Relaxed));
            let input = [Tensor::zeros(shape), Tensor::zeros(shape)];
            let device = Device::with_convolutions(0, libraries)?;
            let stream = Stream::new(device.context())?;
            let network = DeviceNetwork::new(&graph, &weights, &device, Element::F32)?;
            let mut plan = DevicePlan::new(&network, &[shape; 2])?;
            plan.choose(&network)?;
            let arena = DeviceBuffer::new(device.context(), plan.bytes())?;
            plan.run_tensors(&stream, &arena, &input)?;
            let recorded = stream.capture(|| plan.launch(&stream, &arena))?;
            recorded.launch(&stream)?;
            stream.synchronize()?;
            Ok((recorded, arena, plan, network, stream, device))
        });
    }
}

#[test]
fn a_library_that_fails_is_no_candidate_where_it_is_not_forced() {
    let Some(Driver::Emulated(emulator)) = driver() else { return };
    if !alone("libraries::a_library_that_fails_is_no_candidate_where_it_is_not_forced") {
        return;
    }
    let graph = layers();
    let weights = Weights::random(&graph, 1);
    let device = |size: usize| -> Result<(Arc<Device>, DeviceNetwork, DevicePlan)> {
        let device = Device::with_convolutions(0, ConvLibraries::Auto)?;
        let network = DeviceNetwork::new(&graph, &weights, &device, Element::F16)?;
        let plan = DevicePlan::new(&network, &[Shape::new(1, 16, 4, size)])?;
        Ok((device, network, plan))
    };
    emulator.idle(true);
    let held = emulator.live();
    let mut forgiven = 0;
    let calls = || (1..400).step_by(3);
    for n in calls() {
        let (device, network, mut plan) = device(n).unwrap();
        emulator.fail_at(n as i64);
        match plan.choose(&network) {
            Ok(()) => forgiven += 1,
            // What fails of the driver is no library's matter.
            Err(e) => assert!(e.to_string().contains("CUDA_ERROR"), "call {n}: {e}"),
        }
        emulator.fail_at(0);
        drop((plan, network, device));
        assert_eq!(emulator.live(), held, "call {n}: something is kept");
    }
    let all = calls().count();
    assert!((10..all).contains(&forgiven), "{forgiven} of {all} calls that failed were a library's");
}

#[test]
fn without_the_libraries_our_kernels_compute_all_unless_one_is_forced() {
    const NAME: &str = "libraries::without_the_libraries_our_kernels_compute_all_unless_one_is_forced";
    if std::env::var_os(WITHOUT_LIBRARIES).is_none() {
        if !matches!(driver(), Some(Driver::Emulated(_))) {
            return;
        }
        let mut command = Command::new(std::env::current_exe().unwrap());
        for elsewhere in
            ["LD_LIBRARY_PATH", "FARFACE_CUDA_PATH", "CUDA_HOME", "CUDA_PATH", "VIRTUAL_ENV", "CONDA_PREFIX"]
        {
            command.env_remove(elsewhere);
        }
        command.args([NAME, "--exact", "--nocapture"]).env(WITHOUT_LIBRARIES, "1");
        let out = command.output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        return;
    }
    driver();
    for (libraries, library, name) in [
        (ConvLibraries::Cudnn, Library::Cudnn, "libcudnn.so.9"),
        (ConvLibraries::CublasLt, Library::CublasLt, "libcublasLt.so"),
    ] {
        if library.is_present() {
            println!("skipped: this machine has {name}");
            return;
        }
        let error = Device::with_convolutions(0, libraries).err().expect("it is not there").to_string();
        assert!(error.contains(name) && error.contains("install"), "{error}");
    }
    let kernels = kernels(ConvLibraries::Auto, Element::F16);
    assert!(kernels.iter().all(|(_, kernel)| !kernel.starts_with("cu")), "{kernels:?}");
    assert!(kernels.iter().any(|(_, kernel)| kernel.contains('x')), "no tile was chosen: {kernels:?}");
    #[cfg(feature = "train")]
    crate::gradients::without_cudnn_our_kernels_train();
}

#[test]
fn a_session_by_measured_choice_finds_the_faces_of_the_cpu() {
    const NAME: &str = "libraries::a_session_by_measured_choice_finds_the_faces_of_the_cpu";
    let Some(Driver::Emulated(emulator)) = driver() else { return };
    if std::env::var("FARFACE_CUDA_CONV").as_deref() != Ok("auto") {
        return drop(run_with("auto", &[NAME]));
    }
    let model = small("farface-nano");
    let data = noise(40, 32, PixelFormat::Rgb8, 1);
    let view = ImageView::packed(40, 32, PixelFormat::Rgb8, &data).unwrap();
    let session = |device| {
        let o = Options { score_threshold: 0.5, ..options(&model, device, Precision::F32) };
        Session::with_options(&model, o).unwrap()
    };
    let expected = session(DevicePolicy::Cpu).detect(&view).unwrap().to_vec();
    assert!(expected.len() > 2, "{} faces", expected.len());
    let mut cuda = session(DevicePolicy::RequireCuda(0));
    // Who is chosen is chance here: whoever it is, the faces are the same.
    emulator.idle(true);
    cuda.warmup(40, 32).unwrap();
    emulator.idle(false);
    for _ in 0..2 {
        let off = difference(&expected, cuda.detect(&view).unwrap());
        assert!(off < 1e-3, "{off} off");
    }
}

#[test]
fn sessions_on_several_threads_take_turns_at_a_library() {
    if !matches!(driver(), Some(Driver::Emulated(_))) {
        return;
    }
    let graph = layers();
    let weights = Weights::random(&graph, 3);
    let shape = Shape::new(1, 16, 6, 10);
    let input = random_tensor(shape, &mut Rng::new(3));
    let expected = &run_reference(&graph, &weights, std::slice::from_ref(&input)).unwrap()[0];
    for libraries in [ConvLibraries::Auto, ConvLibraries::Cudnn, ConvLibraries::CublasLt] {
        let device = Device::with_convolutions(0, libraries).unwrap();
        let network = DeviceNetwork::new(&graph, &weights, &device, Element::F32).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let stream = Stream::new(device.context()).unwrap();
                    let mut plan = DevicePlan::new(&network, &[shape]).unwrap();
                    plan.choose(&network).unwrap();
                    let arena = DeviceBuffer::new(device.context(), plan.bytes()).unwrap();
                    for _ in 0..5 {
                        let got = plan.run_tensors(&stream, &arena, std::slice::from_ref(&input)).unwrap();
                        let most = expected.data.iter().fold(0.0f32, |m, v| m.max(v.abs()));
                        let pairs = got[0].data.iter().zip(&expected.data);
                        assert!(pairs.into_iter().all(|(g, e)| (g - e).abs() < 1e-4 * most), "{libraries:?}");
                    }
                });
            }
        });
    }
}
