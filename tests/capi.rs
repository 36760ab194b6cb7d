//! The C interface keeps its word: arguments, options, faces, batches, threads.
#![cfg(unix)]

mod common;

use common::capi::{self, message, Picture};
use farface::capi::{detect::*, image::*, model::*, options::*, session::*, status::*};
use farface::detect::{Options, Session};
use farface::pixels::{ImageView, Orientation, PixelFormat, Plane, Rect, Rotation};
use std::ffi::CStr;
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicBool, Ordering};

/// Faces and status of a call with room for `capacity`.
fn detect(
    session: &capi::Session,
    image: &farface_image,
    capacity: usize,
) -> (Vec<farface_face>, usize, i32) {
    let mut faces = vec![farface_face { score: -1.0, ..Default::default() }; capacity];
    let mut count = usize::MAX;
    // SAFETY: live handles and places.
    let status = unsafe { farface_detect(session.0, image, faces.as_mut_ptr(), capacity, &mut count) };
    faces.truncate(count);
    (faces, count, status)
}

fn all(session: &capi::Session, image: &farface_image) -> Vec<farface_face> {
    let (faces, count, status) = detect(session, image, 5000);
    assert_eq!((status, faces.len()), (FARFACE_OK, count), "{}", message());
    faces
}

fn lively(model: &capi::Model) -> farface_session_options {
    farface_session_options { score_threshold: 0.3, ..capi::options(model) }
}

#[test]
fn null_is_an_error_that_names_the_argument() {
    let model = capi::model(1);
    let session = capi::session(&model, &capi::options(&model));
    let picture = Picture::rgb(32, 32, 1);
    let image = picture.view();
    let mut face = farface_face::default();
    let (mut count, mut number, mut bytes) = (0usize, 0u32, 0u64);
    let (mut a, mut text) = (0f32, null());
    let mut options = capi::options(&model);
    let size = size_of::<farface_session_options>();
    let (mut model_out, mut session_out) = (null_mut(), null_mut());
    let path = c"x".as_ptr();
    let check = |status, name: &str| {
        assert_eq!(status, FARFACE_ERROR_INVALID_ARGUMENT, "{name}");
        assert_eq!(message(), format!("invalid argument: {name} is NULL"));
    };
    // SAFETY: live places, or NULL, which every function refuses.
    unsafe {
        check(farface_model_load(null(), &mut model_out), "path");
        check(farface_model_load(path, null_mut()), "model");
        check(farface_model_default(null_mut()), "model");
        check(farface_model_load_memory(null(), 5, &mut model_out), "data");
        check(farface_model_load_memory(path.cast(), 1, null_mut()), "model");
        check(farface_model_name(null(), &mut text), "model");
        check(farface_model_name(model.0, null_mut()), "name");
        check(farface_model_licence(null(), &mut text), "model");
        check(farface_model_licence(model.0, null_mut()), "licence");
        check(farface_model_training_data(null(), &mut text), "model");
        check(farface_model_training_data(model.0, null_mut()), "data");
        check(farface_model_detectable_px(null(), &mut a, &mut a), "model");
        check(farface_model_detectable_px(model.0, null_mut(), &mut a), "smallest");
        check(farface_model_detectable_px(model.0, &mut a, null_mut()), "largest");
        check(farface_model_parameter_count(null(), &mut bytes), "model");
        check(farface_model_parameter_count(model.0, null_mut()), "count");
        check(farface_session_options_init(null_mut(), size, model.0), "options");
        check(farface_session_options_init(&mut options, size, null()), "model");
        check(farface_session_create(null(), null(), &mut session_out), "model");
        check(farface_session_create(model.0, null(), null_mut()), "session");
        check(farface_session_get_options(null(), &mut options), "session");
        check(farface_session_get_options(session.0, null_mut()), "options");
        check(farface_session_set_options(null_mut(), &options), "session");
        check(farface_session_set_options(session.0, null()), "options");
        check(farface_session_device(null(), &mut number, &mut number), "session");
        check(farface_session_warmup(null_mut(), 8, 8), "session");
        check(farface_session_workspace_bytes(null(), 8, 8, &mut bytes), "session");
        check(farface_session_workspace_bytes(session.0, 8, 8, null_mut()), "bytes");
        check(farface_detect(null_mut(), &image, &mut face, 1, &mut count), "session");
        check(farface_detect(session.0, null(), &mut face, 1, &mut count), "image");
        check(farface_detect(session.0, &image, null_mut(), 1, &mut count), "faces");
        check(farface_detect(session.0, &image, &mut face, 1, null_mut()), "count");
        let (faces, counts, statuses) = (&raw mut face, &raw mut count, null_mut());
        check(farface_detect_batch(null_mut(), &image, 1, faces, 1, counts, statuses), "session");
        check(farface_detect_batch(session.0, null(), 1, faces, 1, counts, statuses), "images");
        check(farface_detect_batch(session.0, &image, 1, null_mut(), 1, counts, statuses), "faces");
        check(farface_detect_batch(session.0, &image, 1, faces, 1, null_mut(), statuses), "counts");
        check(farface_detect_async(null_mut(), &image, null_mut()), "session");
        check(farface_detect_async(session.0, null(), null_mut()), "image");
        check(farface_session_wait(null_mut(), faces, 1, counts), "session");
        check(farface_session_wait(session.0, null_mut(), 1, counts), "faces");
        check(farface_session_wait(session.0, faces, 1, null_mut()), "count");
        farface_model_destroy(null_mut());
        farface_session_destroy(null_mut());
        // Neither is wanted: fine.
        assert_eq!(farface_session_device(session.0, null_mut(), null_mut()), FARFACE_OK);
        assert!(model_out.is_null() && session_out.is_null());
    }
}

#[test]
fn a_model_tells_about_itself() {
    let model = capi::model(7);
    let (mut text, mut small, mut large, mut count) = (null(), 0.0, 0.0, 0);
    // SAFETY: live handles and places; texts live as long as the model.
    unsafe {
        assert_eq!(farface_model_name(model.0, &mut text), FARFACE_OK);
        assert_eq!(CStr::from_ptr(text), c"random-7");
        assert_eq!(farface_model_licence(model.0, &mut text), FARFACE_OK);
        assert_eq!(CStr::from_ptr(text), c"");
        assert_eq!(farface_model_training_data(model.0, &mut text), FARFACE_OK);
        assert_eq!(farface_model_detectable_px(model.0, &mut small, &mut large), FARFACE_OK);
        assert_eq!(farface_model_parameter_count(model.0, &mut count), FARFACE_OK);
    }
    assert_eq!((small, large), (8.0, 700.0));
    assert!((400_000..500_000).contains(&count), "{count}");
}

#[test]
fn statuses_have_words() {
    let word = |s| {
        // SAFETY: static texts.
        unsafe { CStr::from_ptr(farface_status_string(s)) }.to_str().unwrap()
    };
    assert_eq!(word(FARFACE_OK), "ok");
    let words: std::collections::BTreeSet<_> = (0..=10).map(word).collect();
    assert_eq!(words.len(), 11);
    assert!(!words.contains("unknown status"));
    assert_eq!((word(-1), word(11), word(i32::MIN)), ("unknown status", "unknown status", "unknown status"));
}

#[test]
fn options_of_other_versions_are_understood() {
    let model = capi::model(1);
    let full = size_of::<farface_session_options>();
    let session = capi::session(&model, &capi::options(&model));
    // A later version's struct, longer than ours, and marks behind it.
    #[repr(C)]
    struct Later {
        known: farface_session_options,
        tail: [u32; 8],
    }
    let mut later = Later { known: capi::options(&model), tail: [7; 8] };
    // SAFETY: as many bytes as said are there.
    unsafe {
        assert_eq!(farface_session_options_init((&raw mut later).cast(), full + 16, model.0), FARFACE_OK);
        assert_eq!(later.known.struct_size, full + 16);
        assert_eq!(later.tail, [0, 0, 0, 0, 7, 7, 7, 7], "zeros inside, nothing written behind");
        later.known.nms_iou = 0.25;
        assert_eq!(farface_session_set_options(session.0, (&raw const later).cast()), FARFACE_OK);
        later.tail[3] = 1;
        assert_eq!(
            farface_session_set_options(session.0, (&raw const later).cast()),
            FARFACE_ERROR_UNSUPPORTED
        );
        assert!(message().contains(&format!("at byte {}", full + 12)), "{}", message());

        // An earlier version's struct that ends behind nms_iou, or in the midst of it.
        for (size, threshold, iou) in [(16, 0.125, 0.75), (14, 0.25, 0.75), (8, 0.25, 0.75)] {
            let mut earlier = capi::options(&model);
            (earlier.struct_size, earlier.score_threshold) = (size, threshold);
            (earlier.nms_iou, earlier.max_candidates) = (iou, 0);
            assert_eq!(farface_session_set_options(session.0, &earlier), FARFACE_OK, "{}", message());
            let mut now = capi::options(&model);
            assert_eq!(farface_session_get_options(session.0, &mut now), FARFACE_OK);
            let kept = if size == 8 { 0.25 } else { threshold };
            assert_eq!((now.score_threshold, now.nms_iou), (kept, 0.75), "size {size}");
            assert_eq!(now.max_candidates, 5000);
        }
        for size in [0, 1, 7, 5000, usize::MAX] {
            let mut options = capi::options(&model);
            options.struct_size = size;
            assert_eq!(farface_session_set_options(session.0, &options), FARFACE_ERROR_INVALID_ARGUMENT);
            assert_eq!(farface_session_get_options(session.0, &mut options), FARFACE_ERROR_INVALID_ARGUMENT);
            let status = farface_session_options_init(&mut options, size, model.0);
            assert_eq!(status, FARFACE_ERROR_INVALID_ARGUMENT);
        }
    }
}

#[test]
fn a_program_of_the_first_header_leaves_later_options_alone() {
    let model = capi::model(1);
    let set = farface_session_options {
        suppression: FARFACE_SUPPRESSION_VOTING,
        voting_iou: 0.75,
        flip: 1,
        ..capi::options(&model)
    };
    let session = capi::session(&model, &set);
    let mut first = capi::options(&model);
    // Its struct ended behind the first `reserved`; what lies there now is the program's own.
    first.struct_size = std::mem::offset_of!(farface_session_options, suppression);
    (first.nms_iou, first.suppression, first.flip) = (0.25, 99, 99);
    let mut now = capi::options(&model);
    // SAFETY: live handles and places.
    unsafe {
        assert_eq!(farface_session_set_options(session.0, &first), FARFACE_OK, "{}", message());
        assert_eq!(farface_session_get_options(session.0, &mut now), FARFACE_OK);
        assert_eq!(now, farface_session_options { nms_iou: 0.25, ..set });
        assert_eq!(farface_session_get_options(session.0, &mut first), FARFACE_OK);
        assert_eq!((first.suppression, first.flip), (99, 99), "nothing is written behind its end");
    }
}

#[test]
fn options_come_back_as_they_were_set() {
    let model = capi::model(1);
    let set = farface_session_options {
        score_threshold: 0.125,
        nms_iou: 0.375,
        max_candidates: 77,
        max_faces: 5,
        min_face_px: 9.5,
        max_face_px: 300.0,
        pyramid: FARFACE_PYRAMID_OCTAVES,
        pyramid_min: -1.5,
        pyramid_max: 0.5,
        pyramid_step: 0.25,
        tile_px: 640,
        threads: 3,
        memory_cap: 123_456_789,
        precision: FARFACE_PRECISION_F32,
        device_policy: FARFACE_DEVICE_POLICY_PREFER_CUDA,
        cuda_index: 2,
        suppression: FARFACE_SUPPRESSION_SOFT_GAUSSIAN,
        soft_sigma: 0.75,
        flip: 1,
        ..capi::options(&model)
    };
    let session = capi::session(&model, &set);
    let (mut got, mut device) = (capi::options(&model), 0);
    // SAFETY: live handles and places.
    unsafe {
        assert_eq!(farface_session_get_options(session.0, &mut got), FARFACE_OK);
        assert_eq!(got, set);
        assert_eq!(farface_session_device(session.0, &mut device, null_mut()), FARFACE_OK);
        assert_eq!(device, FARFACE_DEVICE_CPU, "preferred, not there, and said so");
    }
    let base = capi::options(&model);
    let mut scales = [0.0; 16];
    scales[..3].copy_from_slice(&[0.25, 2.0, 1.0]);
    let scales = farface_session_options { pyramid: FARFACE_PYRAMID_SCALES, scales, scale_count: 3, ..base };
    let full = farface_session_options { scales: [0.5; 16], scale_count: 16, ..scales };
    let voting =
        farface_session_options { suppression: FARFACE_SUPPRESSION_VOTING, voting_iou: 0.625, ..base };
    let linear = farface_session_options { suppression: FARFACE_SUPPRESSION_SOFT_LINEAR, ..base };
    for set in [base, scales, full, voting, linear] {
        // SAFETY: live handles and places.
        unsafe {
            assert_eq!(farface_session_set_options(session.0, &set), FARFACE_OK, "{}", message());
            assert_eq!(farface_session_get_options(session.0, &mut got), FARFACE_OK);
        }
        assert_eq!(got, set);
    }
}

#[test]
fn bad_options_are_named_and_change_nothing() {
    let model = capi::model(1);
    let good = capi::options(&model);
    let session = capi::session(&model, &good);
    let octaves = farface_session_options { pyramid: FARFACE_PYRAMID_OCTAVES, ..good };
    let scales = farface_session_options {
        pyramid: FARFACE_PYRAMID_SCALES,
        scales: [1.0; 16],
        scale_count: 1,
        ..good
    };
    let negative = std::array::from_fn(|i| if i == 1 { -1.0 } else { 1.0 });
    let voting = farface_session_options { suppression: FARFACE_SUPPRESSION_VOTING, ..good };
    let gaussian = farface_session_options { suppression: FARFACE_SUPPRESSION_SOFT_GAUSSIAN, ..good };
    let cases: [(&str, farface_session_options); 22] = [
        ("score_threshold", farface_session_options { score_threshold: f32::NAN, ..good }),
        ("nms_iou", farface_session_options { nms_iou: -0.5, ..good }),
        ("max_candidates", farface_session_options { max_candidates: 0, ..good }),
        ("max_candidates", farface_session_options { max_candidates: u32::MAX, ..good }),
        ("min_face_px", farface_session_options { min_face_px: f32::INFINITY, ..good }),
        ("max_face_px", farface_session_options { min_face_px: 9.0, max_face_px: 8.0, ..good }),
        ("pyramid 3", farface_session_options { pyramid: 3, ..good }),
        ("octaves", farface_session_options { pyramid_step: 0.0, ..octaves }),
        ("octaves", farface_session_options { pyramid_min: 1.0, ..octaves }),
        ("levels", farface_session_options { pyramid_min: -9.0, pyramid_step: 1e-9, ..octaves }),
        ("threads", farface_session_options { threads: 65, ..good }),
        ("precision", farface_session_options { precision: 9, ..good }),
        ("device_policy", farface_session_options { device_policy: 4, ..good }),
        ("reserved", farface_session_options { reserved: 1, ..good }),
        ("reserved_too", farface_session_options { reserved_too: 1, ..good }),
        ("suppression 4", farface_session_options { suppression: 4, ..good }),
        ("voting IoU", farface_session_options { voting_iou: 1.5, ..voting }),
        ("sigma", farface_session_options { soft_sigma: 0.0, ..gaussian }),
        ("flip 2", farface_session_options { flip: 2, ..good }),
        ("0 scales", farface_session_options { scale_count: 0, ..scales }),
        ("scale_count 17", farface_session_options { scale_count: 17, ..scales }),
        ("scale -1", farface_session_options { scales: negative, scale_count: 2, ..scales }),
    ];
    for (word, bad) in cases {
        let mut got = good;
        // SAFETY: live handles and places.
        unsafe {
            assert_eq!(
                farface_session_set_options(session.0, &bad),
                FARFACE_ERROR_INVALID_ARGUMENT,
                "{word}"
            );
            assert!(message().contains(word), "{word}: {}", message());
            let mut none = null_mut();
            let status = farface_session_create(model.0, &bad, &mut none);
            assert_eq!((status, none), (FARFACE_ERROR_INVALID_ARGUMENT, null_mut()), "{word}");
            assert_eq!(farface_session_get_options(session.0, &mut got), FARFACE_OK);
            assert_eq!(got, good, "{word}");
        }
    }
    let cuda = farface_session_options { device_policy: FARFACE_DEVICE_POLICY_REQUIRE_CUDA, ..good };
    let mut none = null_mut();
    // SAFETY: live handles and places.
    let status = unsafe { farface_session_create(model.0, &cuda, &mut none) };
    assert_eq!((status, none), (FARFACE_ERROR_UNSUPPORTED, null_mut()));
}

#[test]
fn faces_are_those_of_a_session_whatever_the_view() {
    let folder = tempfile::tempdir().unwrap();
    let path = common::model::file(folder.path(), 1);
    let model = capi::load(&path).unwrap();
    let session = capi::session(&model, &lively(&model));
    let model = farface::detect::Model::load(&path).unwrap();
    let options = Options { score_threshold: 0.3, ..Options::for_model(model.config()) };
    let mut rust = Session::with_options(&model, options).unwrap();

    let (w, h) = (90, 70);
    let data = common::model::picture(200, 200, 9);
    let formats = [
        (FARFACE_FORMAT_GRAY8, PixelFormat::Gray8),
        (FARFACE_FORMAT_RGB8, PixelFormat::Rgb8),
        (FARFACE_FORMAT_BGR8, PixelFormat::Bgr8),
        (FARFACE_FORMAT_RGBA8, PixelFormat::Rgba8),
        (FARFACE_FORMAT_BGRA8, PixelFormat::Bgra8),
        (FARFACE_FORMAT_RGB_PLANAR_F32, PixelFormat::RgbPlanarF32),
        (FARFACE_FORMAT_NV12, PixelFormat::Nv12),
        (FARFACE_FORMAT_NV21, PixelFormat::Nv21),
        (FARFACE_FORMAT_I420, PixelFormat::I420),
        (FARFACE_FORMAT_YUYV, PixelFormat::Yuyv),
    ];
    let mut found = 0;
    for (i, (format, rust_format)) in formats.into_iter().enumerate() {
        for orientation in Orientation::ALL {
            let bottom_up = (i + orientation.exif() as usize).is_multiple_of(2);
            let roi = (orientation.exif() > 3).then_some(Rect::new(3, 5, 80, 61));
            let mut image = Picture::rgb(w, h, 1).image;
            (image.format, image.mirrored) = (format, orientation.mirrored.into());
            image.rotation = match orientation.rotation {
                Rotation::Deg0 => 0,
                Rotation::Deg90 => 90,
                Rotation::Deg180 => 180,
                Rotation::Deg270 => 270,
            };
            image.matrix = FARFACE_MATRIX_BT709;
            image.range = FARFACE_RANGE_FULL;
            let mut planes = Vec::new();
            for (p, plane) in image.planes.iter_mut().enumerate().take(rust_format.planes()) {
                let stride = rust_format.row_bytes(p, w).unwrap() + 3;
                let rows = rust_format.rows(p, h);
                let bytes = &data[p * 11..p * 11 + stride * rows];
                let sign = if bottom_up { -1 } else { 1 };
                // The top row, which in a bottom-up plane lies last in memory.
                plane.data = bytes[if bottom_up { stride * (rows - 1) } else { 0 }..].as_ptr().cast();
                plane.stride = sign * stride as isize;
                planes.push(Plane::new(bytes, sign * stride as isize));
            }
            let mut view = ImageView::new(w, h, rust_format, &planes)
                .unwrap()
                .with_orientation(orientation)
                .with_color(farface::pixels::ColorMatrix::Bt709, farface::pixels::ColorRange::Full);
            if let Some(roi) = roi {
                view = view.with_roi(roi).unwrap();
                image.roi = farface_rect { x: 3, y: 5, width: 80, height: 61 };
            }
            let wanted: Vec<farface_face> = rust.detect(&view).unwrap().iter().map(Into::into).collect();
            assert!(all(&session, &image) == wanted, "{rust_format:?} {orientation:?}");
            found += wanted.len();
        }
    }
    assert!(found > 100, "{found} faces in all: too few to tell");
}

#[test]
fn a_face_carries_what_the_model_found() {
    use farface::detect::{BBox, Ellipse, Face};
    let landmarks = std::array::from_fn(|i| [i as f32, 10.0 + i as f32]);
    let ellipse = Ellipse { center: [1.0, 2.0], half_axes: [4.0, 3.0], angle: 0.5 };
    let face = Face {
        bbox: BBox::new(1.0, 2.0, 4.0, 8.0),
        score: 0.75,
        landmarks: Some(landmarks),
        ellipse: Some(ellipse),
    };
    let c = farface_face::from(&face);
    assert_eq!([c.x, c.y, c.width, c.height, c.score], [1.0, 2.0, 3.0, 6.0, 0.75]);
    assert_eq!((c.flags, c.landmarks), (FARFACE_FACE_LANDMARKS | FARFACE_FACE_ELLIPSE, landmarks));
    let e = c.ellipse;
    assert_eq!([e.center_x, e.center_y, e.major, e.minor, e.angle], [1.0, 2.0, 4.0, 3.0, 0.5]);
    let plain = farface_face::from(&Face { landmarks: None, ellipse: None, ..face });
    assert_eq!((plain.flags, plain.landmarks), (0, Default::default()));
}

#[test]
fn too_small_a_buffer_keeps_the_best_and_the_true_count() {
    let model = capi::model(1);
    let session = capi::session(&model, &lively(&model));
    let picture = Picture::rgb(200, 150, 1);
    let faces = all(&session, &picture.view());
    assert!(faces.len() > 3);
    assert!(faces.windows(2).all(|w| w[0].score >= w[1].score), "best first");
    for capacity in [0, 1, faces.len() - 1] {
        let (best, count, status) = detect(&session, &picture.view(), capacity);
        assert_eq!((status, count), (FARFACE_ERROR_BUFFER_TOO_SMALL, faces.len()));
        assert!(best == faces[..capacity]);
        assert!(message().contains(&format!("{count} needed, room for {capacity}")), "{}", message());
    }
    assert_eq!(detect(&session, &picture.view(), faces.len()).2, FARFACE_OK);
}

#[test]
fn a_batch_is_that_many_pictures_and_a_bad_one_spoils_no_other() {
    let model = capi::model(1);
    let session = capi::session(&model, &lively(&model));
    let pictures = [
        Picture::rgb(200, 150, 1),
        Picture::nv12(97, 61, 2),
        Picture::rgb(64, 64, 3),
        Picture::rgb(31, 200, 4).turned(270),
    ];
    let mut views: Vec<farface_image> = pictures.iter().map(Picture::view).collect();
    views[2].rotation = 45;
    const ROOM: usize = 40;
    let mut faces = vec![farface_face::default(); 4 * ROOM];
    let (mut counts, mut statuses) = ([9; 4], [9; 4]);
    // SAFETY: live handles and places here and below.
    let status = unsafe {
        farface_detect_batch(
            session.0,
            views.as_ptr(),
            4,
            faces.as_mut_ptr(),
            ROOM,
            counts.as_mut_ptr(),
            statuses.as_mut_ptr(),
        )
    };
    let first = statuses.into_iter().find(|&s| s != FARFACE_OK);
    assert_eq!((Some(status), statuses[2], counts[2]), (first, FARFACE_ERROR_INVALID_IMAGE, 0));
    for i in [0, 1, 3] {
        let (alone, count, status) = detect(&session, &views[i], ROOM);
        assert_eq!((counts[i], statuses[i]), (count, status), "picture {i}");
        let kept = count.min(ROOM);
        assert!(faces[i * ROOM..i * ROOM + kept] == alone, "picture {i}");
        assert!(count > 0, "picture {i} shows nothing");
    }
    // Without statuses, without room, without pictures.
    views[2].rotation = 90;
    let (s, v) = (session.0, views.as_ptr());
    // SAFETY: the arrays hold an entry for each picture asked for.
    unsafe {
        let status = farface_detect_batch(s, v, 4, null_mut(), 0, counts.as_mut_ptr(), null_mut());
        assert_eq!(status, FARFACE_ERROR_BUFFER_TOO_SMALL);
        assert!(counts.iter().all(|&n| n > 0), "{counts:?}");
        assert_eq!(farface_detect_batch(s, null(), 0, null_mut(), 9, null_mut(), null_mut()), FARFACE_OK);
        let status =
            farface_detect_batch(s, v, usize::MAX, faces.as_mut_ptr(), 2, counts.as_mut_ptr(), null_mut());
        assert_eq!(status, FARFACE_ERROR_INVALID_ARGUMENT);
    }
}

#[test]
fn boxes_are_the_same_bits_at_any_number_of_threads() {
    let model = capi::model(1);
    let octaves = farface_session_options {
        pyramid: FARFACE_PYRAMID_OCTAVES,
        pyramid_min: -2.0,
        tile_px: 608,
        ..lively(&model)
    };
    for (options, picture) in [
        (lively(&model), Picture::rgb(201, 151, 1)),
        (octaves, Picture::nv12(640, 160, 2)),
        (
            farface_session_options { suppression: FARFACE_SUPPRESSION_VOTING, flip: 1, ..octaves },
            Picture::nv12(640, 160, 2),
        ),
        (
            farface_session_options { suppression: FARFACE_SUPPRESSION_SOFT_LINEAR, ..lively(&model) },
            Picture::rgb(201, 151, 1),
        ),
        (
            farface_session_options { suppression: FARFACE_SUPPRESSION_SOFT_GAUSSIAN, ..lively(&model) },
            Picture::rgb(201, 151, 1),
        ),
        (lively(&model), Picture::rgb(64, 300, 3).turned(90)),
    ] {
        let bits = |threads| {
            let session = capi::session(&model, &farface_session_options { threads, ..options });
            let faces = all(&session, &picture.view());
            let numbers = |f: &farface_face| {
                let box_ = [f.x, f.y, f.width, f.height, f.score].map(f32::to_bits);
                (box_, f.landmarks.map(|p| p.map(f32::to_bits)))
            };
            faces.iter().map(numbers).collect::<Vec<_>>()
        };
        let one = bits(1);
        assert!(one.len() > 3, "too few faces to tell");
        for threads in [2, 3, 4, 0] {
            assert!(bits(threads) == one, "{threads} threads");
        }
    }
}

#[test]
fn many_models_and_sessions_work_side_by_side() {
    let models = [capi::model(1), capi::model(2)];
    let picture = Picture::rgb(160, 120, 1);
    let alone = models.each_ref().map(|m| all(&capi::session(m, &lively(m)), &picture.view()));
    assert!(alone[0] != alone[1] && !alone[0].is_empty() && !alone[1].is_empty());
    let (models, picture, alone) = (&models, &picture, &alone);
    std::thread::scope(|scope| {
        for i in 0..6 {
            scope.spawn(move || {
                let model = &models[i % 2];
                let options = farface_session_options { threads: 1 + i as u32 % 3, ..lively(model) };
                for _ in 0..3 {
                    let session = capi::session(model, &options);
                    assert!(all(&session, &picture.view()) == alone[i % 2], "thread {i}");
                    // Each thread has its own message.
                    let (_, _, status) = detect(&session, &picture.clone().turned(i as u32 + 1).view(), 0);
                    assert_eq!(status, FARFACE_ERROR_INVALID_IMAGE);
                    assert!(message().contains(&format!("{} degrees", i + 1)), "{}", message());
                }
            });
        }
    });
}

#[test]
fn a_session_moves_between_threads_and_outlives_its_model() {
    let model = capi::model(1);
    let mut session = capi::session(&model, &farface_session_options { threads: 2, ..lively(&model) });
    let picture = Picture::rgb(100, 80, 1);
    let before = all(&session, &picture.view());
    drop(model);
    for _ in 0..3 {
        let (moved, faces) = std::thread::scope(|s| {
            let picture = &picture;
            let worker = s.spawn(move || {
                let faces = all(&session, &picture.view());
                (session, faces)
            });
            worker.join().unwrap()
        });
        assert!(faces == before && !faces.is_empty());
        session = moved;
    }
}

#[test]
fn a_second_caller_is_told_that_the_session_is_busy() {
    struct Shared(capi::Session);
    // SAFETY: the library itself refuses the second caller, which is what is tested.
    unsafe impl Sync for Shared {}
    let model = capi::model(1);
    let session = Shared(capi::session(&model, &capi::options(&model)));
    let picture = Picture::rgb(320, 240, 1);
    let done = AtomicBool::new(false);
    let (session, picture, done) = (&session, &picture, &done);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            while !done.load(Ordering::Relaxed) {
                let status = detect(&session.0, &picture.view(), 5000).2;
                assert!(status == FARFACE_OK || status == FARFACE_ERROR_BUSY);
            }
        });
        let started = std::time::Instant::now();
        let mut busy = false;
        while !busy && started.elapsed().as_secs() < 30 {
            // SAFETY: live handles and places.
            busy = unsafe { farface_session_warmup(session.0 .0, 320, 240) } == FARFACE_ERROR_BUSY;
        }
        done.store(true, Ordering::Relaxed);
        assert!(busy && message().contains("one caller at a time"), "{}", message());
    });
    assert_eq!(detect(&session.0, &picture.view(), 5000).2, FARFACE_OK, "free again");
}

#[test]
fn async_needs_cuda_and_says_so() {
    let model = capi::model(1);
    let session = capi::session(&model, &capi::options(&model));
    let picture = Picture::rgb(32, 32, 1);
    let mut count = 5;
    let mut image = picture.view();
    // SAFETY: live handles and places.
    unsafe {
        assert_eq!(farface_detect_async(session.0, &image, null_mut()), FARFACE_ERROR_UNSUPPORTED);
        assert!(message().contains("runs on cpu"), "{}", message());
        assert_eq!(farface_session_wait(session.0, null_mut(), 0, &mut count), FARFACE_ERROR_UNSUPPORTED);
        image.memory = FARFACE_MEMORY_CUDA;
    }
    let (_, count, status) = detect(&session, &image, 1);
    assert_eq!((status, count), (FARFACE_ERROR_UNSUPPORTED, 0));
}

#[test]
fn sizes_beyond_the_caps_are_refused_before_memory_is_taken() {
    let model = capi::model(1);
    let options = farface_session_options { memory_cap: 32 << 20, ..capi::options(&model) };
    let session = capi::session(&model, &options);
    let mut bytes = 0;
    for (w, h, status) in [
        (0, 5, FARFACE_ERROR_INVALID_ARGUMENT),
        (5, 0, FARFACE_ERROR_INVALID_ARGUMENT),
        (u32::MAX, 1, FARFACE_ERROR_LIMIT_EXCEEDED),
        (1 << 24, 1 << 8, FARFACE_ERROR_LIMIT_EXCEEDED),
        (1 << 24, 1, FARFACE_OK),
        (20_000, 20_000, FARFACE_OK),
    ] {
        // SAFETY: live handles and places.
        unsafe {
            assert_eq!(farface_session_workspace_bytes(session.0, w, h, &mut bytes), status, "{w}x{h}");
            if status != FARFACE_OK {
                assert_eq!(farface_session_warmup(session.0, w, h), status, "{w}x{h}");
            }
        }
    }
    assert!(bytes <= 32 << 20, "{bytes}");
    // Enlarging beyond the caps is an error too, not a picture without faces.
    let tiny = farface_session_options { min_face_px: 1e-4, ..options };
    // SAFETY: live handles and places.
    unsafe {
        assert_eq!(farface_session_set_options(session.0, &tiny), FARFACE_OK);
        assert_eq!(farface_session_warmup(session.0, 640, 480), FARFACE_ERROR_LIMIT_EXCEEDED);
    }
    assert!(message().contains("min_face_px"), "{}", message());
}

#[test]
fn the_default_model_detects_or_says_which_feature_it_lacks() {
    let mut model = null_mut();
    // SAFETY: a live place.
    let status = unsafe { farface_model_default(&mut model) };
    if cfg!(feature = "default-model") {
        assert_eq!(status, FARFACE_OK, "{}", message());
        let model = capi::Model(model);
        let session = capi::session(&model, &capi::options(&model));
        all(&session, &Picture::rgb(160, 120, 1).view());
    } else {
        assert_eq!((status, model), (FARFACE_ERROR_UNSUPPORTED, null_mut()));
        assert!(message().contains("default-model"), "{}", message());
    }
}
