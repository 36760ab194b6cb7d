//! What a session takes, that detecting takes nothing, that idle threads sleep.
//!
//! The allocator counts for all threads, so this is a plain program without the test harness, whose
//! own threads would be counted too.

mod common;

use common::capi::{self, Picture};
use farface::capi::{detect::*, model::*, options::*, session::*, status::*};
use farface::detect::Session;
use farface::pixels::{ImageView, PixelFormat};
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

/// The system's allocator, counted.
struct Counted;

static CALLS: AtomicUsize = AtomicUsize::new(0);
static HELD: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counted {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        CALLS.fetch_add(1, SeqCst);
        let held = HELD.fetch_add(layout.size(), SeqCst) + layout.size();
        PEAK.fetch_max(held, SeqCst);
        // SAFETY: the caller's contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        CALLS.fetch_add(1, SeqCst);
        let held = HELD.fetch_add(layout.size(), SeqCst) + layout.size();
        PEAK.fetch_max(held, SeqCst);
        // SAFETY: the caller's contract.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        CALLS.fetch_add(1, SeqCst);
        HELD.fetch_sub(layout.size(), SeqCst);
        // SAFETY: the caller's contract.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counted = Counted;

/// Settings to try: name, options, size of the picture.
fn cases(base: farface_session_options) -> Vec<(&'static str, farface_session_options, usize, usize)> {
    let tiled = farface_session_options { tile_px: 608, ..base };
    let octaves = farface_session_options {
        pyramid: FARFACE_PYRAMID_OCTAVES,
        pyramid_min: -2.0,
        pyramid_max: 1.0,
        pyramid_step: 1.0,
        ..base
    };
    let scales = farface_session_options {
        pyramid: FARFACE_PYRAMID_SCALES,
        scales: std::array::from_fn(|i| 0.25 * (i + 1) as f32),
        scale_count: 6,
        ..base
    };
    let voting = farface_session_options { suppression: FARFACE_SUPPRESSION_VOTING, ..base };
    let linear = farface_session_options { suppression: FARFACE_SUPPRESSION_SOFT_LINEAR, ..base };
    let gaussian = farface_session_options { suppression: FARFACE_SUPPRESSION_SOFT_GAUSSIAN, ..base };
    let sizes = farface_session_options { min_face_px: 4.0, max_face_px: 900.0, max_faces: 40, ..base };
    vec![
        ("whole", base, 320, 240),
        ("whole, odd size", base, 643, 357),
        ("tiles", tiled, 700, 300),
        ("pyramid", octaves, 300, 200),
        (
            "pyramid with tiles",
            farface_session_options { tile_px: 608, pyramid_max: 0.0, ..octaves },
            700,
            300,
        ),
        ("face sizes", sizes, 320, 240),
        ("few candidates", farface_session_options { max_candidates: 100, ..base }, 640, 480),
        ("two threads", farface_session_options { threads: 2, ..base }, 640, 480),
        (
            "two threads, tiles, pyramid",
            farface_session_options { threads: 2, tile_px: 608, ..octaves },
            700,
            500,
        ),
        ("scales", scales, 300, 200),
        ("voting", voting, 320, 240),
        ("soft-NMS, linear", linear, 320, 240),
        ("soft-NMS, Gaussian", gaussian, 320, 240),
        ("mirrored too", farface_session_options { flip: 1, ..base }, 643, 357),
        (
            "mirrored too, tiles, pyramid, voting",
            farface_session_options {
                flip: 1,
                suppression: FARFACE_SUPPRESSION_VOTING,
                tile_px: 608,
                pyramid_max: 0.0,
                ..octaves
            },
            700,
            300,
        ),
        ("a small cap", farface_session_options { memory_cap: 9 << 20, ..base }, 1000, 400),
    ]
}

/// Likewise for a detector of two stages.
fn two_stage_cases(
    base: farface_session_options,
) -> Vec<(&'static str, farface_session_options, usize, usize)> {
    let base = farface_session_options { max_faces: 1000, ..base };
    let octaves = farface_session_options {
        pyramid: FARFACE_PYRAMID_OCTAVES,
        pyramid_min: -1.0,
        pyramid_max: 1.0,
        pyramid_step: 1.0,
        ..base
    };
    vec![
        ("two stages", base, 320, 240),
        ("two stages, pyramid, two threads", farface_session_options { threads: 2, ..octaves }, 131, 90),
    ]
}

fn main() {
    let one = capi::model(3);
    sessions_take_what_they_say_and_detection_takes_nothing(&one, cases);
    let folder = tempfile::tempdir().unwrap();
    let two = common::model::saved(folder.path(), &common::model::two_stages(3), 3);
    let two = capi::load(&two).unwrap_or_else(|status| panic!("{status:?}: {}", capi::message()));
    sessions_take_what_they_say_and_detection_takes_nothing(&two, two_stage_cases);
    drop((one, two, folder));
    every_detector_detects_without_the_allocator();
    everything_is_given_back();
    #[cfg(target_os = "linux")]
    threads_sleep_between_calls();
}

/// Settings by name, for pictures of a size, made from a model's own.
type Cases = fn(farface_session_options) -> Vec<(&'static str, farface_session_options, usize, usize)>;

fn sessions_take_what_they_say_and_detection_takes_nothing(model: &capi::Model, cases: Cases) {
    let mut base = capi::options(model);
    base.score_threshold = 0.3;
    base.memory_cap = 256 << 20;
    let mut worst: f64 = 0.0;
    for (name, options, width, height) in cases(base) {
        let pictures = [
            Picture::rgb(width, height, 1),
            Picture::nv12(width, height, 2),
            Picture::rgb(height, width, 3).turned(90),
        ];
        let views = pictures.each_ref().map(Picture::view);
        let mut faces = vec![farface_face::default(); 5000];

        let before = HELD.load(SeqCst);
        PEAK.store(before, SeqCst);
        let session = capi::session(model, &options);
        let mut stated = 0;
        // SAFETY: live handles and places here and below.
        unsafe {
            let (w, h) = (width as u32, height as u32);
            assert_eq!(farface_session_workspace_bytes(session.0, w, h, &mut stated), FARFACE_OK, "{name}");
            assert_eq!(farface_session_warmup(session.0, w, h), FARFACE_OK, "{name}");
        }
        let (held, peak) = (HELD.load(SeqCst) - before, PEAK.load(SeqCst) - before);
        for (what, bytes) in [("held", held), ("peak", peak)] {
            let off = bytes as f64 / stated as f64 - 1.0;
            println!("{name}: {what} {bytes} of {stated} bytes stated, {:+.3}%", off * 100.0);
            assert!(off.abs() < 0.01, "{name}: {what} {bytes}, stated {stated}");
            worst = worst.max(off.abs());
        }
        assert!(stated <= options.memory_cap, "{name}: {stated} bytes, cap {}", options.memory_cap);

        let mut found = 0;
        for round in 0..2 {
            for view in &views {
                let (mut count, calls) = (0, CALLS.load(SeqCst));
                // SAFETY: as above.
                let status =
                    unsafe { farface_detect(session.0, view, faces.as_mut_ptr(), faces.len(), &mut count) };
                assert_eq!(
                    CALLS.load(SeqCst),
                    calls,
                    "{name}: a detection used the allocator, round {round}"
                );
                assert_eq!(status, FARFACE_OK, "{name}: {}", capi::message());
                found += count;
            }
        }
        assert!(found > 0, "{name}: nothing found, so little was tested");
        // A buffer that is too small is no reason to allocate either.
        let (mut count, calls) = (0, CALLS.load(SeqCst));
        // SAFETY: as above.
        let status = unsafe { farface_detect(session.0, &views[0], std::ptr::null_mut(), 0, &mut count) };
        assert_eq!(CALLS.load(SeqCst), calls, "{name}: too small a buffer");
        assert!(status == FARFACE_OK || status == FARFACE_ERROR_BUFFER_TOO_SMALL);

        drop(session);
        drop((faces, pictures));
    }
    println!("workspace_bytes is off by {:.3}% at most", worst * 100.0);
}

fn every_detector_detects_without_the_allocator() {
    for name in [
        "rpn-r18",
        "fpn-r18",
        "fpn-finest-stride-r18",
        "fpn-finest-dc-r18",
        "hambox-r18",
        "refineface-r18",
        "farface-crowd-r18",
        "hr-r18",
        "hr-vgg16",
    ] {
        let model = common::narrow::model(name, 3);
        let pixels = common::model::picture(130, 97, 1);
        let picture = ImageView::packed(130, 97, PixelFormat::Rgb8, &pixels).unwrap();
        let mut session = Session::new(&model).unwrap();
        session.warmup(130, 97).unwrap();
        let calls = CALLS.load(SeqCst);
        let found = session.detect(&picture).unwrap().len();
        assert_eq!(CALLS.load(SeqCst), calls, "{name}: a detection used the allocator");
        assert!(found > 0, "{name}: nothing found, so little was tested");
    }
}

fn everything_is_given_back() {
    let cycle = || {
        let model = capi::model(4);
        let session = capi::session(&model, &capi::options(&model));
        let picture = Picture::rgb(200, 100, 1);
        let mut count = 0;
        // SAFETY: live handles and places.
        unsafe {
            farface_detect(session.0, &picture.view(), std::ptr::null_mut(), 0, &mut count);
            farface_model_destroy(std::ptr::null_mut());
        }
    };
    cycle(); // what the runtime keeps once
    let held = HELD.load(SeqCst);
    cycle();
    assert_eq!(HELD.load(SeqCst), held, "bytes lost in a cycle of load, detect, destroy");
}

/// Processor time of all threads so far, in the kernel's ticks of 10 ms.
#[cfg(target_os = "linux")]
fn ticks() -> u64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    // Behind the name stand state, ppid, ...: utime and stime are 14 and 15 of proc(5).
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

#[cfg(target_os = "linux")]
fn threads_sleep_between_calls() {
    let model = capi::model(5);
    let mut options = capi::options(&model);
    options.threads = 2;
    let session = capi::session(&model, &options);
    let picture = Picture::rgb(640, 480, 1);
    let (mut count, before) = (0, ticks());
    for _ in 0..3 {
        // SAFETY: live handles and places.
        unsafe { farface_detect(session.0, &picture.view(), std::ptr::null_mut(), 0, &mut count) };
    }
    assert!(ticks() > before, "detecting takes time, or the clock stands still");
    std::thread::sleep(std::time::Duration::from_millis(20));
    let before = ticks();
    std::thread::sleep(std::time::Duration::from_millis(400));
    let used = ticks() - before;
    println!("idle: {used} ticks in 400 ms");
    assert!(used <= 1, "{used} ticks of 10 ms in 400 ms without a call");
}
