//! A picture cut into tiles gives what the whole picture gives, whatever the detector, in the memory it is given.

mod common;

use common::narrow;
use farface::detect::{Face, Model, Options, Pyramid, Session};
use farface::pixels::{ImageView, PixelFormat};
use std::collections::HashMap;

/// Faces of the picture, all that the network says: no suppression, no threshold, room for all.
fn all(model: &Model, tile_px: usize, octave: f32, picture: &ImageView<'_>) -> (Vec<Face>, usize) {
    let options = Options {
        score_threshold: 0.0,
        nms_iou: 1.0,
        max_candidates: 200_000,
        memory_cap: 8 << 30,
        threads: 2,
        tile_px,
        // One level, whatever the model's own are.
        pyramid: Pyramid::Octaves { min: octave, max: octave, step: 1.0 },
        ..Options::for_model(model.config())
    };
    let mut session = Session::with_options(model, options).unwrap();
    let levels = session.levels(picture.upright_size().width, picture.upright_size().height).unwrap();
    let tiles = levels.iter().map(|l| l.tiles).sum();
    (session.detect(picture).unwrap().to_vec(), tiles)
}

/// Holds tiles of the least size that the network's halo allows to the whole picture, a strip of `breadth` px that is longer than
/// a tile by an odd number of pixels, across and down. HAMBox's halo is 1,536 px (P7's stride is 128, and its head sees far), so
/// that its tiles are 3,200 px long.
fn hold(name: &str, model: &Model, breadth: usize) {
    hold_at(name, model, breadth, 0);
}

/// As [`hold`], the picture enlarged by 2^`octave`.
fn hold_at(name: &str, model: &Model, breadth: usize, octave: u8) {
    let reach = model.reach();
    let align = reach.stride[0].max(reach.stride[1]);
    let halo = reach.pixels[0].max(reach.pixels[1]).next_multiple_of(align);
    let tile = 2 * halo + align;
    let length = tile + align + 13;
    let [length, breadth] = [length, breadth].map(|side| side.div_ceil(1 << octave));
    for (width, height) in [(length, breadth), (breadth, length)] {
        let rgb = common::model::picture(width, height, 5);
        let picture = ImageView::packed(width, height, PixelFormat::Rgb8, &rgb).unwrap();
        let (whole, one) = all(model, 0, octave.into(), &picture);
        let (tiled, tiles) = all(model, tile, octave.into(), &picture);
        println!("{name}: {width}x{height}, halo {halo}, {tiles} tiles of {tile} px, {} boxes", whole.len());
        assert_eq!((one, tiles), (1, 3), "{name}");
        assert!(whole.len() > 500, "{name} says something: {}", whole.len());
        assert_eq!(whole.len(), tiled.len(), "{name}");
        same(name, &whole, &tiled);
    }
}

/// Every face has its partner: corners within 1e-4 of its largest coordinate, the score within 1e-4. Tiles come in another order, so
/// partners are found by place.
fn same(name: &str, whole: &[Face], tiled: &[Face]) {
    let cell = |f: &Face, dx: i32, dy: i32| ((f.bbox.x1 / 8.0) as i32 + dx, (f.bbox.y1 / 8.0) as i32 + dy);
    let mut by_place: HashMap<(i32, i32), Vec<Face>> = HashMap::new();
    tiled.iter().for_each(|f| by_place.entry(cell(f, 0, 0)).or_default().push(*f));
    for a in whole {
        let corners = |f: &Face| [f.bbox.x1, f.bbox.y1, f.bbox.x2, f.bbox.y2];
        let largest = corners(a).iter().fold(1.0f32, |m, v| m.max(v.abs()));
        let partner = |b: &Face| {
            let close = corners(a).iter().zip(corners(b)).all(|(p, q)| (p - q).abs() <= 1e-4 * largest);
            close && (a.score - b.score).abs() < 1e-4
        };
        let found = (0..9).any(|i| {
            let Some(near) = by_place.get_mut(&cell(a, i % 3 - 1, i / 3 - 1)) else { return false };
            near.iter().position(partner).map(|i| near.swap_remove(i)).is_some()
        });
        assert!(found, "{name}: no tile has {a:?}");
    }
}

#[test]
fn tiles_of_retinaface_give_what_the_whole_picture_gives() {
    let model = Model::from_weights(&common::model::weights(7)).unwrap();
    hold("retinaface", &model, 101);
}

#[test]
#[cfg(feature = "default-model")]
fn tiles_of_the_default_model_give_what_the_whole_picture_gives() {
    hold("farface-nano", &Model::default_model().unwrap(), 101);
}

#[test]
fn tiles_of_group_sampling_give_what_the_whole_picture_gives() {
    for name in ["fpn-r18", "fpn-finest-r18", "fpn-finest-stride-r18", "fpn-finest-dc-r18"] {
        hold(name, &narrow::model(name, 3), 45);
    }
    // Its cells are few.
    hold("rpn-r18", &narrow::model("rpn-r18", 3), 163);
}

#[test]
fn tiles_of_hambox_give_what_the_whole_picture_gives() {
    hold("hambox-r18", &narrow::model("hambox-r18", 3), 131);
}

#[test]
fn tiles_of_hr_give_what_the_whole_picture_gives() {
    for name in ["hr-r18", "hr-vgg16"] {
        let model = narrow::model(name, 3);
        hold(name, &model, 45);
        // Twice as large, where templates of type B are asked, too.
        hold_at(name, &model, 45, 1);
    }
}

/// A proposal on a tile's last own cell looks as far into what other tiles own as it may reach.
#[test]
fn tiles_of_a_detector_of_two_stages_give_what_the_whole_picture_gives() {
    hold("two stages", &Model::from_weights(&common::model::two_stages(7)).unwrap(), 45);
}

#[test]
fn tiles_of_refineface_give_what_the_whole_picture_gives() {
    for name in ["refineface-r18", "farface-crowd-r18"] {
        hold(name, &narrow::model(name, 3), 131);
    }
}

/// Searches the 2x level of a grey picture of `side` x `side` px in which copies of the sample picture stand at `places`, with this
/// memory cap, and holds what is found of each copy to what is found of the sample alone.
#[cfg(feature = "default-model")]
fn copies_are_found_in_grey(
    side: usize,
    places: &[[usize; 2]],
    memory_cap: u64,
    measure: impl FnOnce(&mut dyn FnMut()),
) {
    let file = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/examples/crowd.jpg")).unwrap();
    let sample = image::load_from_memory(&file).unwrap().to_luma8();
    let (w, h) = (sample.width() as usize, sample.height() as usize);
    let model = Model::default_model().unwrap();
    let options = Options {
        pyramid: farface::detect::Pyramid::Octaves { min: 1.0, max: 1.0, step: 1.0 },
        max_candidates: 50_000,
        memory_cap,
        threads: 2,
        ..Options::for_model(model.config())
    };
    let paste = |grey: &mut [u8], width: usize, [x, y]: [usize; 2]| {
        for (row, pixels) in sample.rows().enumerate() {
            let at = (y + row) * width + x;
            grey[at..at + w].iter_mut().zip(pixels).for_each(|(to, from)| *to = from.0[0]);
        }
    };
    // Alone it stands in grey too, so that its borders look the same.
    let margin = 512;
    let (alone_w, alone_h) = (w + 2 * margin, h + 2 * margin);
    let mut grey = vec![127; alone_w * alone_h];
    paste(&mut grey, alone_w, [margin, margin]);
    let alone = ImageView::packed(alone_w, alone_h, PixelFormat::Gray8, &grey).unwrap();
    let expected = Session::with_options(&model, options.clone()).unwrap().detect(&alone).unwrap().to_vec();
    assert!(expected.len() > 100, "{} faces", expected.len());

    let mut grey = vec![127; side * side];
    places.iter().for_each(|&place| paste(&mut grey, side, place));
    let picture = ImageView::packed(side, side, PixelFormat::Gray8, &grey).unwrap();
    let mut found = Vec::new();
    measure(&mut || {
        let mut session = Session::with_options(&model, options.clone()).unwrap();
        found = session.detect(&picture).unwrap().to_vec();
        let level = session.levels(side, side).unwrap()[0];
        println!("{:?} in {} tiles, {} faces", level.size, level.tiles, found.len());
        assert!(level.tiles > 1 && level.size.width == 2 * side);
    });
    assert_eq!(found.len(), places.len() * expected.len());
    for [x, y] in places.iter().map(|p| p.map(|v| v as f32 - margin as f32)) {
        for e in &expected {
            let b = e.bbox;
            let moved = farface::detect::BBox::new(b.x1 + x, b.y1 + y, b.x2 + x, b.y2 + y);
            let there = found.iter().any(|f| f.bbox.iou(&moved) > 0.9 && (f.score - e.score).abs() < 1e-3);
            assert!(there, "{e:?} is missing at {x}, {y}");
        }
    }
}

// Places are multiples of 32 px, so that the phase of every stride, up to 64 at the 2x level, stays the same.

#[test]
#[cfg(feature = "default-model")]
fn a_large_picture_shows_what_its_parts_show() {
    copies_are_found_in_grey(2400, &[[800, 1_184]], 160 << 20, |detect| detect());
}

/// Bytes of the process's memory: `VmRSS`, now, or `VmHWM`, the most there ever were.
#[cfg(all(feature = "default-model", target_os = "linux"))]
fn resident(what: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix(what)).unwrap();
    line.trim_start_matches(':').trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() * 1024
}

/// 1.6 gigapixels through the network in a cap of 192 MiB, beside the picture's own 400 MB. The cap counts neither the stacks of
/// threads nor what the allocator rounds up: 4 MiB for both.
#[test]
#[ignore = "takes minutes"]
#[cfg(all(feature = "default-model", target_os = "linux"))]
fn a_picture_of_20_000_px_is_doubled_within_the_memory_cap() {
    let places = [[512, 512], [8_992, 1_600], [18_496, 18_880], [4_000, 12_000]];
    copies_are_found_in_grey(20_000, &places, 192 << 20, |detect| {
        let (before, start) = (resident("VmRSS"), std::time::Instant::now());
        detect();
        let (more, seconds) = (resident("VmHWM") - before, start.elapsed().as_secs_f64());
        println!("{seconds:.1} s, {:.1} MiB beside the picture", more as f64 / f64::from(1 << 20));
        assert!(more <= (192 + 4) << 20, "{more} bytes");
    });
}
