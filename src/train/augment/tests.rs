//! Boxes go where the pixels go.

use super::*;
use crate::graph::init::Rng; // proptest has another
use proptest::prelude::*;

const RED: [u8; 3] = [230, 20, 20];
const GREY: [u8; 3] = [90, 90, 90];

/// A grey picture with red rectangles for faces.
fn picture(width: usize, height: usize, boxes: &[[usize; 4]]) -> (Picture, Vec<Annotated>) {
    let mut pixels = GREY.repeat(width * height);
    let mut faces = Vec::new();
    for &[x1, y1, x2, y2] in boxes {
        for y in y1..y2 {
            pixels[(y * width + x1) * 3..(y * width + x2) * 3].copy_from_slice(&RED.repeat(x2 - x1));
        }
        let [x1, y1, x2, y2] = [x1, y1, x2, y2].map(|v| v as f32);
        faces.push(Annotated { bbox: BBox::new(x1, y1, x2, y2), ignore: false });
    }
    (Picture { width, height, pixels }, faces)
}

/// Only the window and the flip; of the four methods only `method`.
fn plain(method: usize, flip: f32) -> Augment {
    let mut a = Augment { flip, grey: 0.0, min_face_px: 0.0, min_visible: 0.0, ..Augment::default() };
    a.photometric.probability = 0.0;
    a.blur.probability = 0.0;
    a.jpeg.probability = 0.0;
    a.low_resolution.probability = 0.0;
    let weight = |i| if i == method { 1.0 } else { 0.0 };
    a.random_square.weight = weight(0);
    a.data_anchor_sampling.weight = weight(1);
    a.scale_jitter.weight = weight(2);
    a.expand.weight = weight(3);
    a
}

/// The red region's corners, to parts of a pixel: a border pixel counts by its redness along the
/// line through the region's middle.
fn red_box(e: &Example) -> Option<[f32; 4]> {
    let redness = |x: usize, y: usize| {
        let p = &e.pixels[(y * e.side + x) * 3..][..3];
        ((f32::from(p[0]) - f32::from(p[1])) / f32::from(RED[0] - RED[1])).clamp(0.0, 1.0)
    };
    let most = |i: usize, by_row: bool| {
        (0..e.side).map(|j| if by_row { redness(j, i) } else { redness(i, j) }).fold(0.0, f32::max)
    };
    let extent = |by_row: bool| {
        let profile: Vec<f32> = (0..e.side).map(|i| most(i, by_row)).collect();
        let first = profile.iter().position(|&v| v > 0.5)?;
        let last = profile.iter().rposition(|&v| v > 0.5)?;
        let at = |i: Option<usize>| i.and_then(|i| profile.get(i)).map_or(0.0, |&v| v.min(1.0));
        Some([
            first as f32 - at(first.checked_sub(1)) + (1.0 - profile[first]),
            last as f32 + 1.0 + at(Some(last + 1)) - (1.0 - profile[last]),
        ])
    };
    let ([x1, x2], [y1, y2]) = (extent(false)?, extent(true)?);
    Some([x1, y1, x2, y2])
}

fn corners(b: &BBox) -> [f32; 4] {
    [b.x1, b.y1, b.x2, b.y2]
}

#[test]
fn boxes_move_with_the_pixels_for_every_method_and_flip() {
    let (picture, faces) = picture(150, 110, &[[40, 30, 77, 74]]);
    for method in 0..4 {
        for flip in [0.0, 1.0] {
            let (recipe, mut scratch) = (plain(method, flip), Scratch::default());
            let mut compared = 0;
            for seed in 0..60 {
                let e = recipe.example(&picture, &faces, 96, &mut Rng::new(seed), &mut scratch).unwrap();
                let Some(face) = e.faces.first() else { continue };
                // Too small a face has no fully red pixel to measure by.
                if face.bbox.width().min(face.bbox.height()) < 4.0 {
                    continue;
                }
                let found = red_box(&e).unwrap();
                for (a, b) in found.iter().zip(corners(&face.bbox)) {
                    // A border enlarged s times is as wide as s pixels.
                    let most = 1.0f32.max(face.bbox.width() / 37.0);
                    assert!(
                        (a - b).abs() <= most,
                        "method {method} flip {flip} seed {seed}: {found:?} {face:?}"
                    );
                }
                compared += 1;
            }
            assert!(compared > 20, "method {method}: {compared} comparable examples");
        }
    }
}

#[test]
fn what_the_picture_fills_of_an_example_is_told() {
    let (picture, _) = picture(70, 40, &[]);
    for method in [0, 2, 3] {
        let mut recipe = Augment { fill: [250, 250, 250], ..plain(method, 0.5) };
        recipe.random_square.factors = vec![0.5, 1.5];
        recipe.scale_jitter.factors = vec![0.5, 1.0, 2.0];
        let (mut widths, side) = (std::collections::BTreeSet::new(), 64);
        for seed in 0..40 {
            let e =
                recipe.example(&picture, &[], side, &mut Rng::new(seed), &mut Scratch::default()).unwrap();
            let shown = |x: usize, y: usize| e.pixels[(y * side + x) * 3] < 200;
            let inside = |x: usize, y: usize| {
                let within = |v: usize, from: f32, to: f32| (from..to).contains(&(v as f32 + 0.5));
                within(x, e.inside.x1, e.inside.x2) && within(y, e.inside.y1, e.inside.y2)
            };
            for (y, x) in (0..side).flat_map(|y| (0..side).map(move |x| (y, x))) {
                assert_eq!(shown(x, y), inside(x, y), "method {method} seed {seed}: {x} {y}, {:?}", e.inside);
            }
            widths.insert(e.inside.height().round() as usize);
        }
        if method == 2 {
            // 40 px at half their size, as they are, and twice.
            assert_eq!(widths.into_iter().collect::<Vec<_>>(), [20, 40, 64]);
        }
    }
}

#[test]
fn a_window_at_the_pictures_scale_copies_its_pixels() {
    let side = 24;
    let pixels: Vec<u8> = (0..40 * 30 * 3).map(|i| (i * 7919 % 256) as u8).collect();
    let mut out = vec![0; side * side * 3];
    let drawing = Drawing {
        window: Window { x: 9.0, y: 3.0, size: side as f32 },
        flip: false,
        colour: Colour::IDENTITY,
        fill: [0; 3],
    };
    for flip in [false, true] {
        Resampler::default().draw((40, 30, &pixels), &Drawing { flip, ..drawing }, side, &mut out);
        for y in 0..side {
            for x in 0..side {
                let from = if flip { side - 1 - x } else { x };
                let source = &pixels[((y + 3) * 40 + from + 9) * 3..][..3];
                assert_eq!(&out[(y * side + x) * 3..][..3], source, "{x} {y}");
            }
        }
    }
}

#[test]
fn reduction_averages_and_the_outside_is_filled() {
    // Stripes a pixel wide: any filter that skips pixels would show them.
    let pixels: Vec<u8> = (0..64 * 64).flat_map(|i| if i % 2 == 0 { [0; 3] } else { [255; 3] }).collect();
    let drawing = Drawing {
        window: Window { x: -64.0, y: -32.0, size: 128.0 },
        flip: false,
        colour: Colour::IDENTITY.shifted(10.0),
        fill: [1, 2, 3],
    };
    let mut out = vec![0; 16 * 16 * 3];
    Resampler::default().draw((64, 64, &pixels), &drawing, 16, &mut out);
    for (i, pixel) in out.chunks_exact(3).enumerate() {
        let (x, y) = (i % 16, i / 16);
        if x < 8 || !(4..12).contains(&y) {
            assert_eq!(pixel, [1, 2, 3], "{x} {y}");
        } else {
            assert!(pixel.iter().all(|&v| v.abs_diff(137) <= 6), "{x} {y}: {pixel:?}");
        }
    }
}

#[test]
fn random_squares_hold_a_face_that_counts() {
    // A single tiny face in a far corner, and an ignored one.
    let (picture, mut faces) = picture(400, 90, &[[393, 82, 398, 88], [10, 10, 60, 60]]);
    faces[1].ignore = true;
    let recipe = plain(0, 0.5);
    for seed in 0..100 {
        let e = recipe.example(&picture, &faces, 32, &mut Rng::new(seed), &mut Scratch::default()).unwrap();
        assert!(e.faces.iter().any(|f| !f.ignore), "seed {seed}");
    }
}

#[test]
fn data_anchor_sampling_hits_its_scales_and_holds_the_face_whole() {
    let (picture, faces) = picture(500, 400, &[[200, 150, 230, 180]]);
    let mut recipe = plain(1, 0.0);
    recipe.data_anchor_sampling.jitter = [1.0, 1.0];
    let mut counts = [0; 3];
    for seed in 0..150 {
        let e = recipe.example(&picture, &faces, 128, &mut Rng::new(seed), &mut Scratch::default()).unwrap();
        let b = e.faces[0].bbox;
        // The nearest scale to 30 is 32, of index 1: targets are 16, 32 and 64.
        let hit = [16.0, 32.0, 64.0]
            .iter()
            .position(|s| (b.width() - s).abs() < 0.1 && (b.height() - s).abs() < 0.1);
        counts[hit.unwrap_or_else(|| panic!("seed {seed}: {b:?}"))] += 1;
    }
    assert!(counts.iter().all(|&n| n > 30), "{counts:?}");
}

#[test]
fn pictures_without_faces_give_examples_by_every_method() {
    let (picture, _) = picture(50, 20, &[]);
    for method in 0..4 {
        let e =
            plain(method, 0.5).example(&picture, &[], 32, &mut Rng::new(1), &mut Scratch::default()).unwrap();
        assert!(e.faces.is_empty() && e.pixels.len() == 32 * 32 * 3);
    }
}

#[test]
fn small_and_cut_faces_are_ignored_and_those_off_centre_dropped() {
    let face = |x1, y1, x2, y2| Annotated { bbox: BBox::new(x1, y1, x2, y2), ignore: false };
    let recipe = Augment { min_face_px: 5.0, min_visible: 0.6, ..Augment::default() };
    let window = Window { x: 100.0, y: 100.0, size: 50.0 };
    let faces = [
        face(110.0, 110.0, 120.0, 120.0), // whole
        face(110.0, 110.0, 114.0, 119.0), // 4.5 px after the scale of 1/2
        face(96.0, 110.0, 106.0, 120.0),  // 60 % visible
        face(96.0, 96.0, 106.0, 106.0),   // 36 % visible
        face(90.0, 110.0, 108.0, 120.0),  // centre outside
    ];
    let kept = |flip| {
        let boxes =
            faces.iter().map(|f| box_in(&window, &f.bbox, 25.0, flip, Rotation::NONE)).collect::<Vec<_>>();
        recipe.kept(&faces, &boxes, 25.0)
    };
    let flipped = kept(true);
    let kept = kept(false);
    assert_eq!(kept.iter().map(|f| f.ignore).collect::<Vec<_>>(), [false, true, false, true]);
    assert_eq!(kept[0].bbox, BBox::new(5.0, 5.0, 10.0, 10.0));
    assert_eq!(kept[2].bbox, BBox::new(0.0, 5.0, 3.0, 10.0));
    assert_eq!(flipped[2].bbox, BBox::new(22.0, 5.0, 25.0, 10.0));
}

#[test]
fn a_turn_moves_the_boxes_of_ellipses_with_their_pixels() {
    let (mut picture, faces) = picture(160, 120, &[[50, 30, 90, 100]]);
    // The ellipse of the box alone stays red.
    for (i, pixel) in picture.pixels.chunks_exact_mut(3).enumerate() {
        let (x, y) = ((i % 160) as f32 + 0.5 - 70.0, (i / 160) as f32 + 0.5 - 65.0);
        if (x / 20.0).powi(2) + (y / 35.0).powi(2) > 1.0 {
            pixel.copy_from_slice(&GREY);
        }
    }
    let mut scratch = Scratch::default();
    for (flip, low_resolution) in [(0.0, 0.0), (1.0, 0.0), (0.5, 1.0)] {
        let mut recipe = plain(2, flip);
        recipe.scale_jitter.range = [0.7, 1.3];
        recipe.turn = Turn { probability: 1.0, degrees: 180.0 };
        recipe.low_resolution = LowResolution { probability: low_resolution, factor: [1.0, 1.5] };
        let (mut compared, mut leaning) = (0, 0);
        for seed in 0..60 {
            let e = recipe.example(&picture, &faces, 128, &mut Rng::new(seed), &mut scratch).unwrap();
            let Some(face) = e.faces.first() else { continue };
            let b = corners(&face.bbox);
            // A clipped ellipse does not fill the clipped box.
            if b.iter().any(|&v| v <= 0.0 || v >= 128.0) {
                continue;
            }
            let found = red_box(&e).unwrap();
            let close = found.iter().zip(b).all(|(a, b)| (a - b).abs() <= 2.0);
            assert!(close, "flip {flip} seed {seed}: {found:?} {face:?}");
            compared += 1;
            leaning += u32::from(face.bbox.width() > face.bbox.height());
        }
        assert!(compared > 20 && leaning > 5, "{compared} compared, {leaning} of them nearly lying");
    }
}

#[test]
fn a_turn_by_nothing_copies_and_one_by_a_right_angle_turns_clockwise() {
    let (wide, side) = (9, 5);
    let from: Vec<u8> = (0..wide * wide * 3).map(|i| (i * 7919 % 256) as u8).collect();
    let source = |x: usize, y: usize| &from[((y + 2) * wide + x + 2) * 3..][..3];
    let mut to = vec![0; side * side * 3];
    for (angle, right) in [(0.0, false), (std::f32::consts::FRAC_PI_2, true)] {
        Rotation::new(angle).draw(&from, wide, side, &mut to);
        for (i, pixel) in to.chunks_exact(3).enumerate() {
            let (x, y) = (i % side, i / side);
            let wanted = if right { source(y, side - 1 - x) } else { source(x, y) };
            let close = pixel.iter().zip(wanted).all(|(a, b)| a.abs_diff(*b) <= 1);
            assert!(close, "angle {angle}, {x} {y}: {pixel:?} {wanted:?}");
        }
    }
}

#[test]
fn covers_hide_a_share_of_a_face_under_what_is_none() {
    // Two that overlap, a small one within the first, and one of which only half is in the crop.
    let boxes = [[20, 30, 60, 80], [50, 35, 90, 75], [24, 34, 32, 42], [40, 0, 80, 8]];
    let (picture, faces) = picture(100, 100, &boxes);
    let recipe = Augment {
        cover: Cover { probability: 1.0, share: [0.2, 0.3] },
        scale_jitter: ScaleJitter { weight: 1.0, range: [1.0, 1.0], factors: Vec::new() },
        ..plain(2, 0.0)
    };
    let in_a_box =
        |x, y| boxes.iter().any(|&[x1, y1, x2, y2]| (x1..x2).contains(&x) && (y1..y2).contains(&y));
    let (mut covered, mut in_full) = (0, 0);
    for seed in 0..60 {
        let e = recipe.example(&picture, &faces, 100, &mut Rng::new(seed), &mut Scratch::default()).unwrap();
        assert_eq!(e.faces, faces);
        for (i, (pixel, old)) in e.pixels.chunks_exact(3).zip(picture.pixels.chunks_exact(3)).enumerate() {
            let (x, y) = (i % 100, i / 100);
            // Only grey is pasted, and only over faces.
            assert!(pixel == old || (pixel == GREY && in_a_box(x, y)), "seed {seed}: {x} {y}");
        }
        for [x1, y1, x2, y2] in boxes {
            let row = |y: usize| e.pixels[(y * 100 + x1) * 3..(y * 100 + x2) * 3].chunks_exact(3);
            let hidden = (y1..y2).flat_map(row).filter(|p| *p == GREY).count();
            let share = hidden as f32 / ((x2 - x1) * (y2 - y1)) as f32;
            assert!(share <= 0.36, "seed {seed}: {share} of a face is hidden");
            covered += u32::from(share > 0.0);
            in_full += u32::from(share > 0.18);
        }
    }
    assert!(covered > 60 && in_full > 40, "{covered} faces covered, {in_full} by what was asked");
}

#[test]
fn covers_take_no_piece_from_a_face_beyond_the_crops_faces() {
    // All but the lower left corner is a face whose centre is not in the crop.
    let face = |x1, y1, x2, y2| Annotated { bbox: BBox::new(x1, y1, x2, y2), ignore: false };
    let faces = [face(2.0, 20.0, 10.0, 30.0)];
    let shown = [faces[0].bbox, BBox::new(12.0, -50.0, 100.0, 40.0)];
    let cover = Cover { probability: 1.0, share: [0.2, 0.3] };
    let side = 40;
    let mut pasted = 0;
    for seed in 0..60 {
        let mut pixels: Vec<u8> = (0..side * side).flat_map(|i| [(i % side) as u8; 3]).collect();
        cover.draw(&faces, &shown, side, &mut Rng::new(seed), &mut pixels);
        for (i, pixel) in pixels.chunks_exact(3).enumerate() {
            let x = i % side;
            // A column's number is its pixels' value.
            assert!(usize::from(pixel[0]) == x || pixel[0] < 12, "seed {seed}: {} at column {x}", pixel[0]);
            pasted += u32::from(usize::from(pixel[0]) != x);
        }
    }
    assert!(pasted > 100, "{pasted} pixels");
}

#[test]
fn recipes_are_read_with_defaults_and_checked() {
    let read = |json: &str| serde_json::from_str::<Augment>(json);
    assert_eq!(read("{}").unwrap(), Augment::default());
    Augment::default().check().unwrap();
    let some = read(r#"{"flip": 0.25, "expand": {"weight": 2}, "jpeg": {"quality": [10, 20]}}"#).unwrap();
    assert_eq!(
        (some.flip, some.expand, some.jpeg.quality),
        (0.25, Expand { weight: 2.0, max: 4.0 }, [10, 20])
    );
    assert!(read(r#"{"flop": 1}"#).is_err() && read(r#"{"blur": {"sigmas": 1}}"#).is_err());
    for (json, field) in [
        (r#"{"flip": 1.5}"#, "flip"),
        (r#"{"random-square": {"factors": []}}"#, "random-square.factors"),
        (r#"{"random-square": {"weight": 0}, "data-anchor-sampling": {"weight": 0}}"#, "weight"),
        (r#"{"data-anchor-sampling": {"scales": [32, 16]}}"#, "data-anchor-sampling.scales"),
        (r#"{"scale-jitter": {"range": [2, 1]}}"#, "scale-jitter.range"),
        (r#"{"jpeg": {"quality": [0, 50]}}"#, "jpeg.quality"),
        (r#"{"low-resolution": {"factor": [0.5, 2]}}"#, "low-resolution.factor"),
        (r#"{"blur": {"sigma": [0.4, 50]}}"#, "blur.sigma"),
        (r#"{"turn": {"degrees": 200}}"#, "turn.degrees"),
        (r#"{"cover": {"share": [0.4, 0.1]}}"#, "cover.share"),
    ] {
        let error = read(json).unwrap().check().unwrap_err().to_string();
        assert!(error.contains(field), "{json}: {error}");
    }
}

proptest! {
    #[test]
    fn faces_lie_in_the_crop_and_the_seed_decides(
        (width, height) in (1usize..90, 1usize..90),
        boxes in proptest::collection::vec((0f32..1.0, 0f32..1.0, 0.001f32..1.0, 0.001f32..1.0, any::<bool>()), 0..6),
        side in 1usize..48,
        method in 0usize..4,
        degrees in 0f32..180.0,
        seed: u64,
    ) {
        let pixels: Vec<u8> = (0..width * height * 3).map(|i| (i % 251) as u8).collect();
        let picture = Picture { width, height, pixels };
        let (w, h) = (width as f32, height as f32);
        let faces: Vec<Annotated> = boxes
            .iter()
            .map(|&(x, y, bw, bh, ignore)| {
                let (x, y) = (x * w, y * h);
                Annotated { bbox: BBox::new(x, y, (x + bw * w).min(w), (y + bh * h).min(h)), ignore }
            })
            .filter(|f| f.bbox.area() > 0.0)
            .collect();
        let recipe = Augment {
            min_visible: 0.5,
            min_face_px: 3.0,
            blur: Blur { probability: 0.5, ..Blur::default() },
            low_resolution: LowResolution { probability: 0.5, ..LowResolution::default() },
            jpeg: Jpeg { probability: 0.2, ..Jpeg::default() },
            // A turn may take the centre of a face near a corner out of the crop.
            turn: Turn { probability: if method == 1 { 0.0 } else { 0.3 }, degrees },
            cover: Cover { probability: 0.3, ..Cover::default() },
            flip: 0.5,
            ..plain(method, 0.5)
        };
        let mut scratch = Scratch::default();
        let e = recipe.example(&picture, &faces, side, &mut Rng::new(seed), &mut scratch).unwrap();
        prop_assert_eq!(e.pixels.len(), side * side * 3);
        let s = side as f32;
        for f in &e.faces {
            let b = f.bbox;
            prop_assert!(0.0 <= b.x1 && b.x1 < b.x2 && b.x2 <= s, "{:?}", b);
            prop_assert!(0.0 <= b.y1 && b.y1 < b.y2 && b.y2 <= s, "{:?}", b);
            prop_assert!(f.ignore || b.width().max(b.height()) >= 3.0);
        }
        prop_assert!(e.faces.len() <= faces.len());
        // Sampling around a face shows it.
        if method == 1 && faces.iter().any(|f| !f.ignore) {
            prop_assert!(!e.faces.is_empty());
        }
        // Used memory changes nothing.
        let again = recipe.example(&picture, &faces, side, &mut Rng::new(seed), &mut scratch).unwrap();
        prop_assert_eq!(e, again);
    }
}

/// Time that this thread has run, which a busy machine does not stretch.
fn cpu_seconds() -> f64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").expect("this measurement needs Linux");
    text.split(' ').next().and_then(|ns| ns.parse::<f64>().ok()).expect("nanoseconds") / 1e9
}

/// `cargo test --release --lib augment::tests::speed -- --ignored --nocapture`
#[test]
#[ignore = "a measurement"]
fn speed() {
    let picture = Picture {
        width: 1024,
        height: 768,
        pixels: (0..1024 * 768 * 3u32).map(|i| (i.wrapping_mul(2654435761) >> 24) as u8).collect(),
    };
    let face = |x: f32, y: f32, s: f32| Annotated { bbox: BBox::new(x, y, x + s, y + s), ignore: false };
    let faces = [face(100.0, 200.0, 12.0), face(700.0, 300.0, 40.0), face(400.0, 100.0, 150.0)];
    let mut pixels = vec![0; 320 * 320 * 3];
    let mut scratch = Scratch::default();
    let mut measure = |name: &str, recipe: &Augment| {
        let start = cpu_seconds();
        for seed in 0..400 {
            let mut rng = Rng::new(seed);
            recipe.draw(&picture, &faces, 320, &mut rng, &mut scratch, &mut pixels).unwrap();
        }
        println!("{name}: {:.0} examples/s on one thread", 400.0 / (cpu_seconds() - start));
    };
    measure("default recipe", &Augment::default());
    for (method, name) in
        ["random square", "data anchor sampling", "scale jitter", "expand"].iter().enumerate()
    {
        measure(&format!("{name}, no colour"), &plain(method, 0.5));
    }
    let with = |set: &dyn Fn(&mut Augment)| {
        let mut recipe = plain(0, 0.5);
        set(&mut recipe);
        recipe
    };
    measure("random square, colour", &with(&|a| a.photometric.probability = 1.0));
    measure("random square, blur", &with(&|a| a.blur.probability = 1.0));
    measure("random square, JPEG", &with(&|a| a.jpeg.probability = 1.0));
    measure("random square, low resolution", &with(&|a| a.low_resolution.probability = 1.0));
    measure("random square, turned", &with(&|a| a.turn.probability = 1.0));
    measure("random square, covered", &with(&|a| a.cover.probability = 1.0));
}
