//! Pictures and model files from anywhere: an error with a name, never a crash.
#![cfg(unix)]

mod common;

use common::capi::{self, message, Picture};
use common::model::Noise;
use farface::capi::{detect::*, image::*, model::*, options::*, session::*, status::*};
use farface::detect::config::METADATA_KEY;
use proptest::prelude::*;
use std::cell::RefCell;

/// Bytes that pictures of the property test may claim.
const ROOM: usize = 64 << 10;

/// Extreme numbers beside likely ones.
fn number(likely: std::ops::Range<u32>) -> impl Strategy<Value = u32> {
    prop_oneof![
        12 => likely,
        1 => prop::sample::select(vec![0, 1, 0x7fff_ffff, 0x8000_0000, u32::MAX, 1 << 24, (1 << 24) + 1]),
        1 => any::<u32>(),
    ]
}

fn stride() -> impl Strategy<Value = isize> {
    prop_oneof![
        10 => -300isize..300,
        1 => prop::sample::select(vec![0, isize::MIN, isize::MAX, isize::MIN + 1, isize::MAX / 2]),
        1 => any::<isize>(),
    ]
}

/// A struct of any content whose pointers are still to be set.
fn image() -> impl Strategy<Value = farface_image> {
    let enums = (
        number(1..11),
        prop_oneof![4 => prop::sample::select(vec![0, 90, 180, 270]), 1 => any::<u32>()],
        number(0..2),
        number(0..2),
        number(0..2),
        number(0..1),
    );
    let roi = prop_oneof![
        Just([0; 4]),
        [number(0..30), number(0..30), number(1..30), number(1..30)].prop_map(|r| r),
    ];
    let planes = [stride(), stride(), stride()];
    let reserved = prop_oneof![9 => Just(0), 1 => any::<u32>()];
    (number(1..50), number(1..50), enums, planes, roi, reserved).prop_map(
        |(width, height, (format, rotation, mirrored, matrix, range, memory), strides, roi, reserved)| {
            farface_image {
                width,
                height,
                format,
                rotation,
                mirrored,
                matrix,
                range,
                memory,
                planes: strides.map(|stride| farface_plane { data: std::ptr::null(), stride }),
                roi: farface_rect { x: roi[0], y: roi[1], width: roi[2], height: roi[3] },
                reserved: [0, 0, reserved, 0],
            }
        },
    )
}

/// By the header's words, in wide integers: planes' (rows, bytes of a row), or None for no format.
fn layout(image: &farface_image) -> Option<Vec<(i128, i128)>> {
    let (w, h) = (i128::from(image.width), i128::from(image.height));
    let (half_w, half_h) = ((w + 1) / 2, (h + 1) / 2);
    Some(match image.format {
        FARFACE_FORMAT_GRAY8 => vec![(h, w)],
        FARFACE_FORMAT_RGB8 | FARFACE_FORMAT_BGR8 => vec![(h, 3 * w)],
        FARFACE_FORMAT_RGBA8 | FARFACE_FORMAT_BGRA8 => vec![(h, 4 * w)],
        FARFACE_FORMAT_RGB_PLANAR_F32 => vec![(h, 4 * w); 3],
        FARFACE_FORMAT_NV12 | FARFACE_FORMAT_NV21 => vec![(h, w), (half_h, 2 * half_w)],
        FARFACE_FORMAT_I420 => vec![(h, w), (half_h, half_w), (half_h, half_w)],
        FARFACE_FORMAT_YUYV => vec![(h, 4 * half_w)],
        _ => return None,
    })
}

/// Whether the header allows this picture, its memory not considered.
fn allowed(i: &farface_image) -> bool {
    let Some(planes) = layout(i) else { return false };
    let r = i.roi;
    let inside =
        |from: u32, length: u32, of: u32| length > 0 && u64::from(from) + u64::from(length) <= u64::from(of);
    let roi =
        r == farface_rect::default() || (inside(r.x, r.width, i.width) && inside(r.y, r.height, i.height));
    let most = 1 << 24;
    (1..=most).contains(&i.width)
        && (1..=most).contains(&i.height)
        && u64::from(i.width) * u64::from(i.height) <= 1 << 31
        && planes.iter().zip(&i.planes).all(|((_, row), p)| p.stride.unsigned_abs() as i128 >= *row)
        && [0, 90, 180, 270].contains(&i.rotation)
        && [i.mirrored, i.matrix, i.range].iter().all(|&v| v <= 1)
        && i.memory == FARFACE_MEMORY_HOST
        && i.reserved == [0; 4]
        && roi
}

thread_local! {
    static MODEL: capi::Model = capi::model(1);
    static SESSION: capi::Session = MODEL.with(|model| {
        let options = farface_session_options { score_threshold: 0.3, ..capi::options(model) };
        capi::session(model, &options)
    });
    static DATA: RefCell<Vec<u8>> = RefCell::new(common::model::picture(ROOM / 3, 1, 3));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, ..Default::default() })]

    #[test]
    fn any_picture_is_searched_or_refused(image in image()) {
        let allowed = allowed(&image);
        let mut image = image;
        let mut fits = true;
        let data = DATA.with_borrow(|d| d.as_ptr());
        for (p, (rows, row)) in layout(&image).unwrap_or_default().into_iter().enumerate() {
            let plane = &mut image.planes[p];
            let span = plane.stride.unsigned_abs() as i128 * (rows - 1).max(0);
            fits &= span + row <= (ROOM - 3) as i128;
            // The last byte is at the end of the buffer, so that reading on would leave it.
            let before = if plane.stride < 0 { span } else { 0 };
            let start = (ROOM - 3) as i128 - (span + row) + before;
            // SAFETY: inside the buffer where it fits; else the pointer is not followed, see below.
            plane.data = if fits { unsafe { data.add(start as usize) }.cast() } else { data.cast() };
        }
        // A picture that the header allows must be there in memory: that is the caller's promise.
        prop_assume!(fits || !allowed);
        let (mut count, mut faces) = (77usize, [farface_face::default(); 16]);
        let status = SESSION.with(|s| {
            // SAFETY: live handles and places; the planes are in the buffer.
            unsafe { farface_detect(s.0, &image, faces.as_mut_ptr(), faces.len(), &mut count) }
        });
        if allowed {
            prop_assert!(
                status == FARFACE_OK && count <= 16 || status == FARFACE_ERROR_BUFFER_TOO_SMALL && count > 16,
                "{status} {count}: {}", message()
            );
            for f in &faces[..count.min(16)] {
                prop_assert!([f.x, f.y, f.width, f.height].iter().all(|v| v.is_finite()), "{f:?}");
                prop_assert!(f.width > 0.0 && f.height > 0.0 && (0.3..=1.0).contains(&f.score), "{f:?}");
            }
        } else {
            let refusals = [FARFACE_ERROR_INVALID_IMAGE, FARFACE_ERROR_LIMIT_EXCEEDED, FARFACE_ERROR_UNSUPPORTED];
            prop_assert!(refusals.contains(&status), "{status}: {}", message());
            prop_assert_eq!(count, 0);
            prop_assert!(message().len() > 20);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..Default::default() })]

    #[test]
    fn any_options_are_taken_or_refused(values in prop::collection::vec(any::<u32>(), 18), keep in 0usize..7) {
        // Most fields keep their values, so that not all is refused at the first.
        let mut options = MODEL.with(capi::options);
        for (i, value) in values.into_iter().enumerate().filter(|(i, _)| (keep + i).is_multiple_of(7)) {
            // SAFETY: behind struct_size, the struct is plain numbers of 4 or 8 bytes.
            unsafe { (&raw mut options).byte_add(size_of::<usize>()).cast::<u32>().add(i).write(value) };
        }
        options.threads %= 67;
        let mut session = std::ptr::null_mut();
        // SAFETY: live places.
        let status = MODEL.with(|m| unsafe { farface_session_create(m.0, &options, &mut session) });
        prop_assert_eq!(status == FARFACE_OK, !session.is_null());
        if status == FARFACE_OK {
            let session = capi::Session(session);
            let picture = Picture::rgb(40, 30, 1);
            let (mut count, mut bytes) = (0, 0);
            // SAFETY: live handles and places.
            let status = unsafe {
                // What is beyond these settings' means must be found out without trying.
                match farface_session_workspace_bytes(session.0, 40, 30, &mut bytes) {
                    FARFACE_OK if bytes <= 64 << 20 => {
                        farface_detect(session.0, &picture.view(), std::ptr::null_mut(), 0, &mut count)
                    }
                    status => status,
                }
            };
            prop_assert!(status != FARFACE_ERROR_INTERNAL, "{}", message());
        }
    }
}

#[test]
fn null_planes_and_pointers_at_the_end_of_memory_are_refused() {
    let picture = Picture::nv12(32, 32, 1);
    let end = std::ptr::without_provenance::<std::ffi::c_void>(usize::MAX - 100);
    let start = std::ptr::without_provenance::<std::ffi::c_void>(100);
    let mut count = 0;
    for (plane, data, stride, word) in [
        (0, std::ptr::null(), 32, "plane 0"),
        (1, std::ptr::null(), 32, "plane 1"),
        (0, end, 32, "beyond memory"),
        (1, start, -32, "beyond memory"),
        (1, picture.pixels.as_ptr().cast(), isize::MAX, "beyond memory"),
        (1, picture.pixels.as_ptr().cast(), isize::MIN, "beyond memory"),
    ] {
        let mut image = picture.view();
        image.planes[plane] = farface_plane { data, stride };
        let status = SESSION.with(|s| {
            // SAFETY: these pointers must not be followed.
            unsafe { farface_detect(s.0, &image, std::ptr::null_mut(), 0, &mut count) }
        });
        assert_eq!(status, FARFACE_ERROR_INVALID_IMAGE, "{word}");
        assert!(message().contains(word), "{}", message());
    }
}

/// Loads a file in memory; where it loads, it must also detect.
fn load(bytes: &[u8]) -> farface_status {
    let mut model = std::ptr::null_mut();
    // SAFETY: live places.
    let status = unsafe { farface_model_load_memory(bytes.as_ptr().cast(), bytes.len(), &mut model) };
    assert_eq!(status == FARFACE_OK, !model.is_null());
    if status != FARFACE_OK {
        let bad = [FARFACE_ERROR_INVALID_MODEL, FARFACE_ERROR_LIMIT_EXCEEDED];
        assert!(bad.contains(&status) && message().len() > 20, "{status}: {}", message());
        return status;
    }
    let model = capi::Model(model);
    let session = capi::session(&model, &capi::options(&model));
    let picture = Picture::rgb(40, 30, 1);
    let (mut count, mut faces) = (0, vec![farface_face::default(); 500]);
    // SAFETY: live handles and places.
    let detected =
        unsafe { farface_detect(session.0, &picture.view(), faces.as_mut_ptr(), faces.len(), &mut count) };
    assert!(detected == FARFACE_OK || detected == FARFACE_ERROR_LIMIT_EXCEEDED, "{detected}: {}", message());
    for f in &faces[..count] {
        assert!([f.x, f.y, f.width, f.height].iter().all(|v| v.is_finite()), "{f:?}");
    }
    status
}

fn file_bytes() -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    std::fs::read(common::model::file(folder.path(), 1)).unwrap()
}

#[test]
fn a_model_file_cut_anywhere_is_refused() {
    let whole = file_bytes();
    assert_eq!(load(&whole), FARFACE_OK);
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let near = (0..32).chain(header - 9..header + 9).chain(whole.len() - 9..whole.len());
    for length in near.chain((32..whole.len()).step_by(whole.len() / 50)) {
        assert_eq!(load(&whole[..length]), FARFACE_ERROR_INVALID_MODEL, "{length} bytes");
    }
    assert_eq!(load(&[whole, vec![0]].concat()), FARFACE_ERROR_INVALID_MODEL, "a byte too many");
}

#[test]
fn flipped_bits_in_the_header_never_crash() {
    let whole = file_bytes();
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let mut noise = Noise::new(5);
    let mut refused = 0;
    for i in 0..400 {
        let mut bytes = whole.clone();
        // The length field first, bit by bit, then anywhere.
        let bit = if i < 64 { i } else { noise.bits() as usize % (8 * header) };
        bytes[bit / 8] ^= 1 << (bit % 8);
        refused += usize::from(load(&bytes) != FARFACE_OK);
    }
    assert!(refused > 250, "{refused} of 400: the bits cannot have mattered");
}

#[test]
fn values_that_are_no_numbers_are_named() {
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut weights = common::model::weights(1);
        let name = "body.stage2.3.0.weight";
        weights.tensors.get_mut(name).unwrap().data[5] = value;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("bad.safetensors");
        weights.save(&path).unwrap();
        assert_eq!(capi::load(&path).err(), Some(FARFACE_ERROR_INVALID_MODEL));
        for word in ["bad.safetensors", name, "value 5"] {
            assert!(message().contains(word), "{word}: {}", message());
        }
    }
}

#[test]
fn numbers_that_overflow_give_no_face_and_no_crash() {
    for scale in [1e3, 1e10, 1e30, 3e38] {
        let mut weights = common::model::weights(1);
        for tensor in weights.tensors.values_mut() {
            tensor.data.iter_mut().for_each(|v| *v = (*v * scale).clamp(f32::MIN, f32::MAX));
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("large.safetensors");
        weights.save(&path).unwrap();
        load(&std::fs::read(path).unwrap());
    }
}

#[test]
fn metadata_that_lies_is_refused() {
    let weights = common::model::weights(1);
    let good = weights.metadata[METADATA_KEY].clone();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("lying.safetensors");
    let try_with = |json: String| {
        let mut weights = weights.clone();
        weights.metadata.insert(METADATA_KEY.to_string(), json);
        weights.save(&path).unwrap();
        capi::load(&path).err()
    };
    assert_eq!(try_with(good.clone()), None);
    let lies = [
        (r#""format_version":1"#, r#""format_version":2"#, "format version 2"),
        (r#""format_version":1"#, r#""format_version":-1"#, "metadata"),
        (r#""kind":"retinaface""#, r#""kind":"oracle""#, "oracle"),
        (r#""width":8"#, r#""width":16"#, "shape"),
        (r#""width":8"#, r#""width":0"#, "width"),
        (r#""width":8"#, r#""width":18446744073709551615"#, "width"),
        (r#""channels":64"#, r#""channels":1000000"#, "channels"),
        (r#""order":"bgr""#, r#""order":"grb""#, "order"),
        (r#""max_candidates":5000"#, r#""max_candidates":1000000000000"#, "max_candidates"),
        (r#""score_threshold":0.5"#, r#""score_threshold":7.0"#, "thresholds"),
        (r#""detectable_px":[8.0,700.0]"#, r#""detectable_px":[0.0,700.0]"#, "detectable_px"),
        (r#""detectable_px":[8.0,700.0]"#, r#""detectable_px":[8.0]"#, "metadata"),
    ];
    for (truth, lie, word) in lies {
        assert!(good.contains(truth), "{truth} is not in {good}");
        assert_eq!(try_with(good.replace(truth, lie)), Some(FARFACE_ERROR_INVALID_MODEL), "{lie}");
        assert!(message().contains(word), "{lie}: {}", message());
    }
    assert_eq!(try_with("[".repeat(100_000)), Some(FARFACE_ERROR_INVALID_MODEL), "deep nesting");
    assert_eq!(try_with(String::new()), Some(FARFACE_ERROR_INVALID_MODEL));
}

#[test]
fn a_missing_tensor_is_named_and_special_files_are_not_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("part.safetensors");
    let mut weights = common::model::weights(1);
    weights.tensors.remove("ssh2.conv3X3.0.weight");
    weights.save(&path).unwrap();
    assert_eq!(capi::load(&path).err(), Some(FARFACE_ERROR_INVALID_MODEL));
    assert!(message().contains("ssh2.conv3X3.0.weight"), "{}", message());

    assert_eq!(capi::load(folder.path()).err(), Some(FARFACE_ERROR_INVALID_MODEL));
    assert_eq!(capi::load("/dev/zero".as_ref()).err(), Some(FARFACE_ERROR_INVALID_MODEL));
    assert!(message().contains("not a regular file"), "{}", message());
    assert_eq!(capi::load(&folder.path().join("none")).err(), Some(FARFACE_ERROR_IO));
    // As large as it likes on paper.
    let huge = folder.path().join("huge.safetensors");
    std::fs::File::create(&huge).unwrap().set_len(3 << 30).unwrap();
    assert_eq!(capi::load(&huge).err(), Some(FARFACE_ERROR_LIMIT_EXCEEDED));
}
