//! What a session promises beyond the published boxes: tiles, levels, orientation, regions, threads.

mod common;

use farface::detect::{Face, Model, Options, Pyramid, Session};
use farface::pixels::{ImageView, Orientation, PixelFormat, Rect};
use std::collections::HashMap;

/// Random weights fire everywhere, which is what comparing whole result lists wants.
fn model() -> Model {
    Model::from_weights(&common::model::weights(7)).unwrap()
}

/// Likewise one that looks twice.
fn two_stages() -> Model {
    Model::from_weights(&common::model::two_stages(7)).unwrap()
}

/// Everything the network says: no suppression, no threshold, room for all.
fn all(model: &Model) -> Options {
    Options {
        score_threshold: 0.0,
        nms_iou: 1.0,
        max_candidates: 200_000,
        ..Options::for_model(model.config())
    }
}

/// A picture of coloured noise blobs.
fn picture(width: usize, height: usize) -> Vec<u8> {
    let mut pixels = vec![0; width * height * 3];
    for (i, p) in pixels.chunks_exact_mut(3).enumerate() {
        let (x, y) = (i % width, i / width);
        let hash = ((x / 5 * 7919) ^ (y / 7 * 104_729)) % 251;
        p.copy_from_slice(&[hash as u8, (hash * 3 + x / 9) as u8, (hash * 7 + y / 4) as u8]);
    }
    pixels
}

fn rgb(pixels: &[u8], width: usize, height: usize) -> ImageView<'_> {
    ImageView::packed(width, height, PixelFormat::Rgb8, pixels).unwrap()
}

fn detect(model: &Model, options: Options, image: &ImageView<'_>) -> Vec<Face> {
    Session::with_options(model, options).unwrap().detect(image).unwrap().to_vec()
}

#[test]
fn tiles_give_what_the_whole_picture_gives() {
    // Neither side a multiple of the stride.
    hold_tiles(&model(), [13, 5]);
}

/// A proposal on a tile's last own cell looks as far into what other tiles own as it may reach. The sides are multiples of the
/// stride: where they are not, a pyramid that is enlarged bilinearly to the finer level's size interpolates the whole picture by
/// another ratio than its tiles, in one stage as in two.
#[test]
fn tiles_of_a_detector_of_two_stages_give_what_the_whole_picture_gives() {
    hold_tiles(&two_stages(), [0, 0]);
}

/// On three tiles across, two down, and so many pixels more.
fn hold_tiles(model: &Model, more: [usize; 2]) {
    let reach = model.reach();
    let align = reach.stride[0].max(reach.stride[1]);
    let halo = reach.pixels[0].max(reach.pixels[1]).next_multiple_of(align);
    let tile = 2 * halo + 3 * align;
    let (width, height) = (tile + 4 * align + more[0], tile + align + more[1]);
    let pixels = picture(width, height);
    let whole = detect(model, all(model), &rgb(&pixels, width, height));
    let tiled = detect(model, Options { tile_px: tile, ..all(model) }, &rgb(&pixels, width, height));
    assert!(whole.len() > 1000, "the network says something: {}", whole.len());
    assert_eq!(whole.len(), tiled.len());
    // Tiles come in another order: find each box's partner by place.
    let cell = |f: &Face, dx: i32, dy: i32| ((f.bbox.x1 / 8.0) as i32 + dx, (f.bbox.y1 / 8.0) as i32 + dy);
    let mut by_place: HashMap<(i32, i32), Vec<Face>> = HashMap::new();
    tiled.iter().for_each(|f| by_place.entry(cell(f, 0, 0)).or_default().push(*f));
    for a in &whole {
        let corners = |f: &Face| [f.bbox.x1, f.bbox.y1, f.bbox.x2, f.bbox.y2];
        let same = |b: &Face| {
            let close =
                corners(a).iter().zip(corners(b)).all(|(p, q)| (p - q).abs() <= 1e-3 + 1e-4 * p.abs());
            close && (a.score - b.score).abs() < 1e-4
        };
        let found = (0..9).any(|i| {
            let Some(near) = by_place.get_mut(&cell(a, i % 3 - 1, i / 3 - 1)) else { return false };
            near.iter().position(same).map(|i| near.swap_remove(i)).is_some()
        });
        assert!(found, "no tile has {a:?}");
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    for model in [model(), two_stages()] {
        let pixels = picture(333, 257);
        let one = detect(&model, all(&model), &rgb(&pixels, 333, 257));
        for threads in [2, 3, 5] {
            assert_eq!(one, detect(&model, Options { threads, ..all(&model) }, &rgb(&pixels, 333, 257)));
        }
    }
}

/// A threshold drops what is below it and nothing else, though proposals need a first-stage score of their own.
#[test]
fn a_threshold_drops_faces_by_their_score_in_the_end() {
    let model = two_stages();
    let pixels = picture(160, 120);
    let every = detect(&model, all(&model), &rgb(&pixels, 160, 120));
    assert!(every.len() > 500, "{}", every.len());
    for score_threshold in [0.3, 0.5, 0.62, 0.9] {
        let options = Options { score_threshold, ..all(&model) };
        let expected: Vec<Face> = every.iter().filter(|f| f.score > score_threshold).copied().collect();
        assert_eq!(detect(&model, options, &rgb(&pixels, 160, 120)), expected, "{score_threshold}");
    }
}

#[test]
fn threads_and_limits_may_change_between_calls() {
    let model = model();
    let pixels = picture(97, 83);
    let view = rgb(&pixels, 97, 83);
    let mut session = Session::with_options(&model, all(&model)).unwrap();
    let one = session.detect(&view).unwrap().to_vec();
    for threads in [2, 1, 3] {
        session.set_options(Options { threads, ..all(&model) }).unwrap();
        assert_eq!(one, session.detect(&view).unwrap(), "{threads} threads");
    }
    session.set_options(Options { max_faces: 5, max_candidates: 40, ..all(&model) }).unwrap();
    assert_eq!(one[..5], *session.detect(&view).unwrap());
}

#[test]
fn levels_that_no_wanted_face_fits_do_not_count_against_the_caps() {
    let model = model();
    let pyramid = Pyramid::Octaves { min: -4.0, max: 2.0, step: 1.0 };
    let options = Options { pyramid, min_face_px: 2000.0, ..Options::for_model(model.config()) };
    let session = Session::with_options(&model, options).unwrap();
    assert!(session.workspace_bytes(20_000, 20_000).is_ok());
}

#[test]
fn a_stored_picture_and_its_orientation_give_the_upright_boxes_back() {
    let model = model();
    let (w, h) = (160, 96);
    let upright = picture(w, h);
    let expected = detect(&model, all(&model), &rgb(&upright, w, h));
    for orientation in Orientation::ALL {
        let (sw, sh) = if orientation.swaps_sides() { (h, w) } else { (w, h) };
        // Store the picture so that `orientation` turns it upright again.
        let mut stored = vec![0; upright.len()];
        let view = rgb(&stored, sw, sh).with_orientation(orientation);
        let placement = view.placement();
        let mut turned = stored.clone();
        for y in 0..h {
            for x in 0..w {
                let [sx, sy] = placement.stored_point([x as f32 + 0.5, y as f32 + 0.5]).map(|v| v as usize);
                let (to, from) = ((sy * sw + sx) * 3, (y * w + x) * 3);
                turned[to..to + 3].copy_from_slice(&upright[from..from + 3]);
            }
        }
        stored.copy_from_slice(&turned);
        let found = detect(&model, all(&model), &rgb(&stored, sw, sh).with_orientation(orientation));
        assert_eq!(found.len(), expected.len());
        for (f, e) in found.iter().zip(&expected) {
            let b = e.bbox;
            let [x, y, w, h] = placement.stored_box([b.x1, b.y1, b.width(), b.height()]);
            let d = [f.bbox.x1 - x, f.bbox.y1 - y, f.bbox.width() - w, f.bbox.height() - h];
            assert!(
                f.score == e.score && d.iter().all(|d| d.abs() < 0.01),
                "{orientation:?}: {f:?}, upright {e:?}"
            );
        }
    }
}

#[test]
fn a_region_is_a_picture_of_its_own_moved_back() {
    let model = model();
    let (w, h) = (200, 150);
    let pixels = picture(w, h);
    let roi = Rect::new(37, 21, 120, 101);
    let mut cut = Vec::new();
    for y in roi.y..roi.y + roi.height {
        cut.extend_from_slice(&pixels[(y * w + roi.x) * 3..][..roi.width * 3]);
    }
    let alone = detect(&model, all(&model), &rgb(&cut, roi.width, roi.height));
    let inside = detect(&model, all(&model), &rgb(&pixels, w, h).with_roi(roi).unwrap());
    assert_eq!(alone.len(), inside.len());
    for (a, b) in alone.iter().zip(&inside) {
        assert_eq!((a.bbox.x1 + 37.0, a.bbox.y1 + 21.0, a.score), (b.bbox.x1, b.bbox.y1, b.score));
    }
}

#[test]
fn who_wants_large_faces_only_pays_for_a_small_picture() {
    let model = model();
    let whole = Session::new(&model).unwrap().workspace_bytes(1280, 960).unwrap();
    let large = Options { min_face_px: 80.0, ..Options::for_model(model.config()) };
    let mut session = Session::with_options(&model, large).unwrap();
    assert!(
        session.workspace_bytes(1280, 960).unwrap() < whole / 4,
        "an eighth of the scale is enough for 80 px"
    );
    let pixels = picture(1280, 960);
    let faces = session.detect(&rgb(&pixels, 1280, 960)).unwrap();
    assert!(faces.iter().all(|f| f.size() >= 80.0));
}

#[test]
fn doubling_the_picture_finds_smaller_boxes() {
    let model = model();
    let pixels = picture(120, 90);
    let smallest = |pyramid| {
        let options = Options { pyramid, ..all(&model) };
        let faces = detect(&model, options, &rgb(&pixels, 120, 90));
        faces.iter().map(Face::size).fold(f32::INFINITY, f32::min)
    };
    let doubled = smallest(Pyramid::Octaves { min: -1.0, max: 1.0, step: 1.0 });
    assert!(doubled < smallest(Pyramid::Auto), "the smallest anchor is half as large at twice the scale");
}

#[test]
fn any_size_runs_even_one_pixel() {
    let model = model();
    for (w, h) in [(1, 1), (1, 200), (2, 3), (31, 33), (7, 1)] {
        let pixels = picture(w, h);
        let faces = detect(&model, all(&model), &rgb(&pixels, w, h));
        assert!(faces.iter().all(|f| f.score.is_finite()), "{w}x{h}");
    }
}

#[test]
fn the_eight_last_sizes_are_kept_and_all_sizes_keep_working() {
    let model = model();
    let mut session = Session::with_options(&model, all(&model)).unwrap();
    let sizes: Vec<usize> = (0..12).map(|i| 40 + 9 * i).collect();
    for _ in 0..2 {
        for &side in &sizes {
            let pixels = picture(side, side);
            let fresh = detect(&model, all(&model), &rgb(&pixels, side, side));
            assert_eq!(session.detect(&rgb(&pixels, side, side)).unwrap(), fresh, "{side} px");
        }
    }
}
