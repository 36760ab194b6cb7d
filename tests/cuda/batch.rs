//! Pictures of a batch: those of one size are searched together, and every picture has the faces that it has alone.

use crate::common::capi::{self, Picture};
use crate::emulator::{device, driver, Driver};
use crate::failures::alone;
use crate::sessions::{difference, noise, options, small};
use farface::capi::{detect::*, image::*, options::*, status::*};
use farface::detect::device::Source;
use farface::detect::nms::Suppression;
use farface::detect::options::{Pyramid, Scales};
use farface::detect::{DevicePolicy, Face, Model, Options, Precision, Session};
use farface::gpu::memory::DeviceBuffer;
use farface::pixels::{DeviceImage, ImageView, Orientation, PixelFormat};

const CUDA: DevicePolicy = DevicePolicy::RequireCuda(0);

/// A session that finds something in noise.
fn session(model: &Model, set: impl FnOnce(&mut Options)) -> Session {
    let mut o = Options { score_threshold: 0.5, ..options(model, CUDA, Precision::Auto) };
    set(&mut o);
    Session::with_options(model, o).unwrap()
}

/// Holds a batch to the same pictures one by one; twice, the second time by what was recorded.
fn holds(what: &str, session: &mut Session, views: &[ImageView<'_>]) {
    let expected: Vec<Vec<Face>> = views.iter().map(|view| session.detect(view).unwrap().to_vec()).collect();
    assert!(expected.iter().any(|faces| faces.len() > 2), "{what}: nothing is found");
    for again in 0..2 {
        let mut next = 0;
        session.detect_batch(views, |i, found| {
            assert_eq!(i, next, "{what}: pictures in their order");
            next += 1;
            let off = difference(&expected[i], found.unwrap());
            assert!(off < 1e-3, "{what}: picture {i}, time {again}: {off} off");
        });
        assert_eq!(next, views.len(), "{what}");
    }
}

#[test]
fn a_batch_gives_every_picture_the_faces_it_has_alone() {
    if device().is_none() {
        return;
    }
    let sizes = [(40, 32), (40, 32), (32, 32), (40, 32), (40, 32), (40, 32)];
    let formats = [PixelFormat::Rgb8, PixelFormat::Nv12, PixelFormat::Bgr8, PixelFormat::Gray8];
    let data: Vec<_> = sizes
        .iter()
        .zip(formats.iter().cycle())
        .zip(1..)
        .map(|((&(w, h), &format), seed)| (w, h, format, noise(w, h, format, seed)))
        .collect();
    let mut views: Vec<_> =
        data.iter().map(|(w, h, format, data)| ImageView::packed(*w, *h, *format, data).unwrap()).collect();
    views[3] = views[3].with_orientation(Orientation::ALL[2]);
    let model = small("farface-nano");
    holds("plain", &mut session(&model, |_| {}), &views);
    let set = |o: &mut Options| {
        (o.flip, o.pyramid) = (true, Pyramid::Scales(Scales::new(&[1.0, 1.5]).unwrap()));
        (o.max_candidates, o.suppression) = (40, Suppression::SoftGaussian { sigma: 0.5 });
    };
    holds("mirrored, on two levels", &mut session(&model, set), &views[3..5]);
}

#[test]
fn a_batch_takes_pictures_on_the_device_too() {
    let Some(device) = device() else { return };
    let mut session = session(&small("farface-nano"), |_| {});
    let data = [1, 2].map(|seed| noise(64, 48, PixelFormat::Rgb8, seed));
    let views = data.each_ref().map(|data| ImageView::packed(64, 48, PixelFormat::Rgb8, data).unwrap());
    let expected = views.map(|view| session.detect(&view).unwrap().to_vec());
    let stream = farface::gpu::driver::Stream::new(device.context()).unwrap();
    let copy = DeviceBuffer::of(&stream, &data[0]).unwrap();
    let image = DeviceImage::new(64, 48, PixelFormat::Rgb8, &[(copy.address(), 3 * 64)]).unwrap();
    let mut seen = 0;
    session.detect_sources(&[Source::Device(image), Source::Host(views[1])], |i, found| {
        assert!(difference(&expected[i], found.unwrap()) < 1e-3, "picture {i}");
        seen += 1;
    });
    assert_eq!(seen, 2);
}

#[test]
fn a_batch_by_the_c_interface_has_every_pictures_own_status() {
    if device().is_none() {
        return;
    }
    let model = capi::model(1);
    let o = farface_session_options {
        score_threshold: 0.3,
        device_policy: FARFACE_DEVICE_POLICY_REQUIRE_CUDA,
        ..capi::options(&model)
    };
    let session = capi::session(&model, &o);
    let pictures = [Picture::rgb(40, 32, 1), Picture::rgb(40, 32, 2), Picture::nv12(40, 32, 3)];
    let mut views: Vec<farface_image> = pictures.iter().map(Picture::view).collect();
    views[1].rotation = 45;
    const ROOM: usize = 40;
    let mut faces = vec![farface_face::default(); 3 * ROOM];
    let (mut counts, mut statuses) = ([9; 3], [9; 3]);
    // SAFETY: live handles and places here and below.
    let status = unsafe {
        let (f, c, s) = (faces.as_mut_ptr(), counts.as_mut_ptr(), statuses.as_mut_ptr());
        farface_detect_batch(session.0, views.as_ptr(), 3, f, ROOM, c, s)
    };
    assert_eq!((status, counts[1]), (FARFACE_ERROR_INVALID_IMAGE, 0));
    assert_eq!(statuses, [FARFACE_OK, FARFACE_ERROR_INVALID_IMAGE, FARFACE_OK]);
    for i in [0, 2] {
        let (mut alone, mut count) = (vec![farface_face::default(); ROOM], 0);
        // SAFETY: as above.
        let status = unsafe { farface_detect(session.0, &views[i], alone.as_mut_ptr(), ROOM, &mut count) };
        assert_eq!((status, counts[i]), (FARFACE_OK, count), "picture {i}");
        assert!(count > 0, "picture {i} shows nothing");
        for (a, b) in alone[..count].iter().zip(&faces[i * ROOM..]) {
            assert!((a.x - b.x).abs() < 0.1 && (a.score - b.score).abs() < 1e-3, "picture {i}: {a:?}, {b:?}");
        }
    }
}

#[test]
fn a_batch_stays_within_the_memory_cap() {
    if device().is_none() {
        return;
    }
    let data: Vec<_> = (1..4).map(|seed| noise(40, 32, PixelFormat::Rgb8, seed)).collect();
    let views: Vec<_> =
        data.iter().map(|d| ImageView::packed(40, 32, PixelFormat::Rgb8, d).unwrap()).collect();
    let model = small("farface-nano");
    let one = session(&model, |_| {}).workspace_bytes(40, 32).unwrap();
    // Room for one, and for some: the faces are the same.
    for times in [1, 3] {
        holds(&format!("{times} times"), &mut session(&model, |o| o.memory_cap = one * times), &views);
    }
}

#[test]
fn a_batch_whose_driver_fails_at_any_call_is_searched_one_by_one() {
    let Some(Driver::Emulated(emulator)) = driver() else { return };
    if !alone("batch::a_batch_whose_driver_fails_at_any_call_is_searched_one_by_one") {
        return;
    }
    emulator.idle(true);
    let mut session = session(&small("farface-nano"), |_| {});
    let data = noise(32, 32, PixelFormat::Rgb8, 1);
    let views = [ImageView::packed(32, 32, PixelFormat::Rgb8, &data).unwrap(); 2];
    let mut o = session.options().clone();
    let (mut calls, mut n) = (1, 0);
    while n < calls {
        // Forgets what was prepared.
        o.max_candidates = 1000 + n as usize % 2;
        session.set_options(o.clone()).unwrap();
        emulator.fail_at(n);
        session.detect_batch(&views, |i, found| {
            found.unwrap_or_else(|e| panic!("picture {i}, call {n} of {calls}: {e}"));
        });
        calls = calls.max(emulator.calls());
        emulator.fail_at(0);
        n += 1;
    }
    assert!(calls > 60, "{calls} calls");
}
