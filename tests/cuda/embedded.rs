//! Kernels that were compiled when the library was built (feature `cuda-embedded`). The emulated driver reads of their PTX what it is
//! for and which kernels it has, then runs its own.

use crate::emulator::{driver, Driver, Emulator};
use crate::failures::alone;
use crate::sessions::{difference, noise, options};
use farface::detect::{DevicePolicy, Model, ModelConfig, Precision, Session};
use farface::gpu::driver::Context;
use farface::gpu::kernels::{Kernels, Source};
use farface::pixels::{ImageView, PixelFormat};

/// The emulated driver, in a process of its own: what capability its device has concerns all.
fn emulator(name: &str) -> Option<&'static Emulator> {
    match driver() {
        Some(Driver::Emulated(emulator)) if alone(name) => Some(emulator),
        _ => None,
    }
}

#[test]
fn devices_get_the_newest_code_that_they_can_take_and_it_has_every_kernel() {
    let Some(emulator) =
        emulator("embedded::devices_get_the_newest_code_that_they_can_take_and_it_has_every_kernel")
    else {
        return;
    };
    let cuda = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/cuda")).unwrap();
    let of_training: Vec<String> = cuda
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("train_"))
        .map(|entry| std::fs::read_to_string(entry.path()).unwrap())
        .collect();
    let mut names = emulator.kernels();
    if cfg!(not(feature = "train")) {
        names.retain(|name| !of_training.iter().any(|text| text.contains(&format!("({name},"))));
    }
    assert!(names.len() > 40, "{} kernels", names.len());
    for (capability, arch) in [(70, 70), (72, 70), (75, 75), (80, 80), (89, 80), (90, 90), (120, 90)] {
        emulator.capability(capability);
        let kernels = Kernels::new(&Context::new(0).unwrap()).unwrap();
        for &source in Source::ALL {
            let Err(error) = kernels.get(source, "no_such_kernel", 0) else { panic!("{source:?}") };
            assert!(error.to_string().contains("NOT_FOUND"), "{error}");
            assert_eq!(emulator.loaded(), arch, "{source:?} for compute capability {capability}");
        }
        for name in &names {
            let having = Source::ALL.iter().filter(|source| kernels.get(**source, name, 0).is_ok());
            assert_eq!(having.count(), 1, "files that have {name} for compute capability {capability}");
        }
    }
}

#[test]
fn a_driver_that_does_not_take_the_code_is_an_error_that_says_which() {
    let Some(emulator) =
        emulator("embedded::a_driver_that_does_not_take_the_code_is_an_error_that_says_which")
    else {
        return;
    };
    emulator.capability(90);
    let kernels = Kernels::new(&Context::new(0).unwrap()).unwrap();
    emulator.capability(86);
    let error = kernels.get(Source::Maps, "add", 0).err().map(|e| e.to_string()).unwrap_or_default();
    for part in ["maps.cu", "compute_90", "a driver for CUDA", "CUDA_ERROR_NO_BINARY_FOR_GPU"] {
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn a_session_runs_without_nvrtc() {
    let Some(emulator) = emulator("embedded::a_session_runs_without_nvrtc") else { return };
    let model = Model::random(&ModelConfig::named("farface-nano").unwrap(), 3).unwrap();
    let data = noise(64, 48, PixelFormat::Rgb8, 1);
    let view = ImageView::packed(64, 48, PixelFormat::Rgb8, &data).unwrap();
    let session =
        |device, precision| Session::with_options(&model, options(&model, device, precision)).unwrap();
    let mut cpu = session(DevicePolicy::Cpu, Precision::F32);
    let expected = cpu.detect(&view).unwrap();
    assert!(!expected.is_empty());
    for capability in [75, 90] {
        emulator.capability(capability);
        let got = session(DevicePolicy::RequireCuda(0), Precision::F32).detect(&view).unwrap().to_vec();
        let off = difference(expected, &got);
        assert!(off < 1e-3, "compute capability {capability}: off by {off}");
        assert_eq!(emulator.loaded(), capability);
    }
    for precision in [Precision::Tf32, Precision::F16, Precision::Bf16] {
        session(DevicePolicy::RequireCuda(0), precision).detect(&view).unwrap();
    }
    // What is mapped into this process, where the system tells: neither the emulated compiler nor one that the machine has.
    let mapped = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    assert!(!mapped.contains("libnvrtc"), "NVRTC is open");
}
