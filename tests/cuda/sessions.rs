//! Sessions on a device against sessions on the CPU: the same faces, whatever the format, the place and the way they are asked for.

use crate::emulator::{device, driver, Driver};
use crate::failures::{alone, fail_at_each};
use crate::support::repository;
use farface::detect::device::Source;
use farface::detect::nms::Suppression;
use farface::detect::{DevicePolicy, Face, Model, ModelConfig, Options, Precision, Session};
use farface::error::{Error, Result};
use farface::gpu::memory::DeviceBuffer;
use farface::graph::init::Rng;
use farface::pixels::{DeviceImage, ImageView, Orientation, PixelFormat, Rect};

/// A picture in which a network of random weights finds something everywhere.
pub fn noise(width: usize, height: usize, format: PixelFormat, seed: u64) -> Vec<u8> {
    let bytes: usize =
        (0..format.planes()).map(|p| format.row_bytes(p, width).unwrap() * format.rows(p, height)).sum();
    let mut rng = Rng::new(seed);
    (0..bytes).map(|_| rng.below(256) as u8).collect()
}

pub fn options(model: &Model, device: DevicePolicy, precision: Precision) -> Options {
    Options { device, precision, ..Options::for_model(model.config()) }
}

/// The largest difference of a coordinate, relative to the face's size, or of a score, of each face of `a` to the one of `b` that is
/// nearest to it: where scores are nearly equal their order may be another. Infinite where there are not as many.
pub fn difference(a: &[Face], b: &[Face]) -> f32 {
    if a.len() != b.len() {
        return f32::INFINITY;
    }
    let numbers = |f: &Face| {
        let mut all = vec![f.bbox.x1, f.bbox.y1, f.bbox.x2, f.bbox.y2];
        all.extend(f.landmarks.iter().flatten().flatten());
        all.extend(f.ellipse.iter().flat_map(|e| [e.center[0], e.center[1], e.half_axes[0], e.half_axes[1]]));
        all
    };
    let of = |(a, b): (&Face, &Face)| {
        let size = a.size().max(1.0);
        let places = numbers(a).into_iter().zip(numbers(b)).map(|(a, b)| (a - b).abs() / size);
        places.fold((a.score - b.score).abs(), f32::max)
    };
    let nearest = |a| b.iter().map(|b| of((a, b))).fold(f32::INFINITY, f32::min);
    a.iter().map(nearest).fold(0.0, f32::max)
}

/// Holds a session on the device to one on the CPU in f32, both with these settings.
fn holds(what: &str, model: &Model, set: impl Fn(&mut Options), views: &[ImageView<'_>]) {
    let session = |device| {
        let mut o = options(model, device, Precision::F32);
        set(&mut o);
        Session::with_options(model, o).unwrap()
    };
    let (mut cpu, mut cuda) = (session(DevicePolicy::Cpu), session(DevicePolicy::RequireCuda(0)));
    assert_eq!((cpu.device(), cuda.device()), ("cpu", "cuda:0"));
    let mut found = 0;
    for (i, view) in views.iter().enumerate() {
        let expected = cpu.detect(view).unwrap().to_vec();
        for again in 0..2 {
            let got = cuda.detect(view).unwrap_or_else(|e| panic!("{what}, picture {i}: {e}"));
            let off = difference(&expected, got);
            assert!(
                off <= 5e-3, // random weights blow the rounding of f32 up: boxes are a hundred times their anchors
                "{what}, picture {i}, call {again}: {off}, {} and {} faces",
                expected.len(),
                got.len()
            );
        }
        found += expected.len();
    }
    assert!(found > 0, "{what}: nothing was found");
    println!("{what}: {found} faces");
}

/// A detector by name with random weights, of less width.
pub fn small(name: &str) -> Model {
    Model::random(&ModelConfig::named(name).unwrap(), 3).unwrap()
}

#[test]
fn every_format_and_orientation_gives_the_faces_of_the_cpu() {
    if device().is_none() {
        return;
    }
    let model = small("farface-nano");
    use PixelFormat::*;
    for (i, format) in [Gray8, Rgb8, Bgr8, Rgba8, Bgra8, Nv12, Nv21, I420, Yuyv].into_iter().enumerate() {
        let data = noise(90, 70, format, i as u64);
        let view = ImageView::packed(90, 70, format, &data).unwrap();
        let turned = view.with_orientation(Orientation::ALL[i % 8]);
        let part = turned.with_roi(Rect::new(11, 7, 64, 48)).unwrap();
        holds(&format!("{format:?}"), &model, |o| o.score_threshold = 0.55, &[view, turned, part]);
    }
}

#[test]
fn levels_tiles_mirrors_and_suppressions_give_the_faces_of_the_cpu() {
    if device().is_none() {
        return;
    }
    let model = small("farface-nano");
    let data = noise(900, 64, PixelFormat::Rgb8, 7);
    let view = [ImageView::packed(900, 64, PixelFormat::Rgb8, &data).unwrap()];
    holds("tiles", &model, |o| (o.score_threshold, o.tile_px) = (0.6, 704), &view);
    let data = noise(120, 90, PixelFormat::Rgb8, 7);
    let view = [ImageView::packed(120, 90, PixelFormat::Rgb8, &data).unwrap()];
    holds("mirrored", &model, |o| (o.score_threshold, o.flip) = (0.6, true), &view);
    holds("sizes", &model, |o| (o.score_threshold, o.min_face_px, o.max_face_px) = (0.6, 12.0, 60.0), &view);
    holds("few", &model, |o| (o.score_threshold, o.max_faces, o.max_candidates) = (0.5, 7, 40), &view);
    for suppression in [Suppression::Voting { iou: 0.5 }, Suppression::SoftLinear] {
        let set = |o: &mut Options| (o.score_threshold, o.suppression) = (0.6, suppression);
        holds(&format!("{suppression:?}"), &model, set, &view);
    }
}

/// Those that find something with random weights; how the outputs of all are read, `faces` tells.
#[test]
fn detectors_of_one_and_of_two_stages_give_the_faces_of_the_cpu() {
    if device().is_none() {
        return;
    }
    let data = noise(64, 48, PixelFormat::Nv12, 9);
    let view = [ImageView::packed(64, 48, PixelFormat::Nv12, &data).unwrap()];
    for name in [
        "farface-nano",
        "farface-small",
        "retinaface-mobile025",
        "fpn-finest-r18",
        "fpn-finest-rcnn-r18",
        "hambox-r18",
    ] {
        holds(name, &small(name), |o| (o.score_threshold, o.max_candidates) = (0.001, 1000), &view);
    }
}

/// Half precision rounds what the CPU computes in f32: nearly all faces of a trained model are the same.
#[test]
fn half_precision_and_tf32_find_the_faces_of_the_cpu() {
    if device().is_none() {
        return;
    }
    let model = Model::load(repository("models/farface-nano.safetensors")).unwrap();
    let picture = image::open(repository("examples/crowd.jpg")).unwrap();
    let rgb = picture.crop_imm(0, 0, 480, 320).to_rgb8();
    let view = ImageView::packed(480, 320, PixelFormat::Rgb8, rgb.as_raw()).unwrap();
    let find = |device, precision| {
        let mut session = Session::with_options(&model, options(&model, device, precision)).unwrap();
        session.detect(&view).unwrap().to_vec()
    };
    let expected = find(DevicePolicy::Cpu, Precision::F32);
    assert!(expected.len() > 5, "{} faces", expected.len());
    for (precision, most) in
        [(Precision::Auto, 0.02), (Precision::F16, 0.02), (Precision::Tf32, 0.02), (Precision::Bf16, 0.1)]
    {
        let found = find(DevicePolicy::RequireCuda(0), precision);
        let same = |a: &&Face| found.iter().any(|b| difference(&[**a], std::slice::from_ref(b)) < most);
        let count = expected.iter().filter(same).count();
        println!("{precision:?}: {count} of {} faces, {} found", expected.len(), found.len());
        assert!(
            count * 10 >= expected.len() * 9 && found.len() * 10 <= expected.len() * 11,
            "{precision:?}: {count}"
        );
    }
}

#[test]
fn a_picture_on_the_device_and_one_that_is_waited_for_give_the_same_faces() {
    let Some(device) = device() else { return };
    let model = small("farface-nano");
    let o =
        Options { score_threshold: 0.5, ..options(&model, DevicePolicy::RequireCuda(0), Precision::Auto) };
    let mut session = Session::with_options(&model, o).unwrap();
    let data = noise(120, 90, PixelFormat::Nv12, 4);
    let view = ImageView::packed(120, 90, PixelFormat::Nv12, &data).unwrap();
    let expected = session.detect(&view).unwrap().to_vec();
    assert!(!expected.is_empty());

    session.detect_async(Source::Host(view), None).unwrap();
    assert_eq!(session.wait().unwrap(), expected);
    assert!(session.wait().is_err(), "waited for twice");

    let stream = farface::gpu::driver::Stream::new(device.context()).unwrap();
    let copy = DeviceBuffer::of(&stream, &data).unwrap();
    let planes = [(copy.address(), 120), (copy.address() + 120 * 90, 120)];
    let image = DeviceImage::new(120, 90, PixelFormat::Nv12, &planes).unwrap();
    assert_eq!(session.detect_on_device(&image).unwrap(), expected);
    session.detect_async(Source::Device(image), Some(&stream)).unwrap();
    assert_eq!(session.wait().unwrap(), expected);
    // One that nobody waits for.
    session.detect_async(Source::Device(image), None).unwrap();
    assert_eq!(session.detect(&view).unwrap(), expected);
}

#[test]
fn sessions_on_several_threads_share_a_model() {
    if device().is_none() {
        return;
    }
    let model = small("farface-nano");
    let data = noise(64, 64, PixelFormat::Rgb8, 1);
    let run = || {
        let o = Options {
            score_threshold: 0.5,
            ..options(&model, DevicePolicy::RequireCuda(0), Precision::Auto)
        };
        let mut session = Session::with_options(&model, o).unwrap();
        let view = ImageView::packed(64, 64, PixelFormat::Rgb8, &data).unwrap();
        (0..3).map(|_| session.detect(&view).unwrap().to_vec()).collect::<Vec<_>>()
    };
    let all: Vec<_> = std::thread::scope(|s| {
        let threads: Vec<_> = (0..3).map(|_| s.spawn(run)).collect();
        threads.into_iter().flat_map(|t| t.join().unwrap()).collect()
    });
    assert!(all.iter().all(|faces| *faces == all[0]) && !all[0].is_empty());
}

#[test]
fn what_a_device_cannot_do_is_said() {
    if device().is_none() {
        return;
    }
    let model = small("farface-nano");
    let none = Session::with_options(&model, options(&model, DevicePolicy::RequireCuda(9), Precision::Auto));
    let error = none.err().expect("there is no tenth device").to_string();
    assert!(error.contains("no CUDA device 9"), "{error}");
    let other = Session::with_options(&model, options(&model, DevicePolicy::PreferCuda(9), Precision::Auto));
    assert_eq!(other.unwrap().device(), "cpu");
    let int8 = Session::with_options(&model, options(&model, DevicePolicy::RequireCuda(0), Precision::Int8));
    assert!(int8.is_err());
    // Nor is TF32 replaced by another arithmetic where there is no device for it.
    for device in [DevicePolicy::Cpu, DevicePolicy::PreferCuda(9)] {
        let error = Session::with_options(&model, options(&model, device, Precision::Tf32)).err();
        assert!(
            matches!(&error, Some(Error::Unsupported(text)) if text.contains("take auto, f32")),
            "{error:?}"
        );
    }
    let mut session =
        Session::with_options(&model, options(&model, DevicePolicy::RequireCuda(0), Precision::Tf32))
            .unwrap();
    assert!(session.set_options(options(&model, DevicePolicy::Cpu, Precision::Tf32)).is_err());
    assert_eq!((session.device(), session.options().precision), ("cuda:0", Precision::Tf32));
}

#[test]
fn a_detection_whose_driver_fails_at_any_call_is_an_error() {
    let Some(Driver::Emulated(emulator)) = driver() else { return };
    if !alone("sessions::a_detection_whose_driver_fails_at_any_call_is_an_error") {
        return;
    }
    let model = small("farface-nano");
    let data = noise(32, 32, PixelFormat::Rgb8, 1);
    let view = ImageView::packed(32, 32, PixelFormat::Rgb8, &data).unwrap();
    let detect = || -> Result<Session> {
        let o = options(&model, DevicePolicy::RequireCuda(0), Precision::Auto);
        let mut session = Session::with_options(&model, o)?;
        session.detect(&view)?;
        Ok(session)
    };
    fail_at_each(emulator, "a detection", detect);
}

#[test]
fn a_session_goes_on_after_a_call_that_failed() {
    let Some(Driver::Emulated(emulator)) = driver() else { return };
    if !alone("sessions::a_session_goes_on_after_a_call_that_failed") {
        return;
    }
    emulator.idle(true);
    let model = small("farface-nano");
    let data = noise(64, 64, PixelFormat::Rgb8, 1);
    let views = [[32, 32], [64, 48]].map(|[w, h]| ImageView::packed(w, h, PixelFormat::Rgb8, &data).unwrap());
    let mut o = options(&model, DevicePolicy::RequireCuda(0), Precision::Auto);
    let mut session = Session::with_options(&model, o.clone()).unwrap();
    let (mut calls, mut n, mut failures) = (1, 0, 0);
    while n < calls {
        // Forgets what was prepared.
        o.max_candidates = 1000 + n as usize % 2;
        session.set_options(o.clone()).unwrap();
        session.detect(&views[0]).unwrap();
        emulator.fail_at(n);
        // Those that give memory back fail unnoticed.
        failures += i64::from(session.detect(&views[1]).is_err());
        calls = calls.max(emulator.calls());
        emulator.fail_at(0);
        for view in &views {
            session.detect(view).unwrap_or_else(|e| panic!("after call {n} of {calls} failed: {e}"));
        }
        n += 1;
    }
    assert!(calls > 50 && failures > calls / 2, "{failures} of {calls} calls failed");
}
