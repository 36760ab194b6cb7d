//! What a session promises beyond the published boxes: levels, orientation, mirrors, regions, suppression, threads.

mod common;

use farface::cpu::Isa;
use farface::detect::quantize::Quantizer;
use farface::detect::{BBox, Face, Model, Options, Precision, Pyramid, Scales, Session, Suppression};
use farface::graph::Clip;
use farface::pixels::{ImageView, Orientation, PixelFormat, Rect};

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
fn threads_do_not_change_a_bit() {
    for model in [model(), two_stages()] {
        let pixels = picture(333, 257);
        let one = detect(&model, all(&model), &rgb(&pixels, 333, 257));
        for threads in [2, 3, 5] {
            assert_eq!(one, detect(&model, Options { threads, ..all(&model) }, &rgb(&pixels, 333, 257)));
        }
    }
}

/// Numbers other than f32 are used where they are asked for and nowhere else, and find nearly the same.
#[test]
fn precision_is_what_was_asked_for() {
    let (width, height) = (333, 257);
    let pixels = picture(width, height);
    let view = rgb(&pixels, width, height);
    for weights in [common::model::weights(7), common::model::two_stages(7)] {
        let model = Model::from_weights(&weights).unwrap();
        let mut quantizer = Quantizer::new(&weights, 1).unwrap();
        assert!(quantizer.ranges(Clip::Extremes).is_err(), "nothing was seen");
        quantizer.add(&view).unwrap();
        let ranges = quantizer.ranges(Clip::Extremes).unwrap();
        let quantized = Model::from_weights(&quantizer.quantized(&ranges).unwrap()).unwrap();
        let with = |model: &Model, precision| detect(model, Options { precision, ..all(model) }, &view);
        let single = with(&model, Precision::F32);
        assert_eq!(with(&model, Precision::Auto), single);
        assert_eq!(with(&quantized, Precision::F32), single);
        assert_eq!(with(&quantized, Precision::Auto), with(&quantized, quantized.own_precision()));
        assert_eq!(model.own_precision(), Precision::F32);
        let faster = match Isa::supported().last().unwrap().name() {
            "generic" => !cfg!(target_arch = "x86_64"),
            #[cfg(target_arch = "x86_64")]
            "avx512" => is_x86_feature_detected!("avx512vnni"),
            _ => true,
        };
        let own = if faster { Precision::Int8 } else { Precision::F32 };
        // Unless another instruction set was asked for.
        assert!(quantized.own_precision() == own || std::env::var_os("FARFACE_ISA").is_some());
        let asked = Options { precision: Precision::Int8, ..all(&model) };
        let error = Session::with_options(&model, asked).err().unwrap().to_string();
        assert!(error.contains("quantize"), "{error}");
        // Every anchor of a first stage is told, in an order by score: compare the scores.
        let off = |faces: &[Face]| {
            let count = faces.len().abs_diff(single.len());
            assert!(count * 10 <= single.len(), "{} faces instead of {}", faces.len(), single.len());
            let difference = faces.iter().zip(&single).map(|(a, b)| (a.score - b.score).abs());
            difference.sum::<f32>() / single.len() as f32
        };
        for (model, precision, limit) in [
            (&model, Precision::Bf16, 0.01),
            (&model, Precision::F16, 0.0025),
            (&quantized, Precision::Int8, 0.05),
        ] {
            let low = with(model, precision);
            assert!(low != single && off(&low) <= limit, "{precision:?}: {}", off(&low));
            for threads in [2, 3] {
                let options = Options { precision, threads, ..all(model) };
                assert_eq!(detect(model, options, &view), low);
            }
            // In a session of its own as in one that had others before, and with less memory.
            let mut session = Session::with_options(model, all(model)).unwrap();
            session.set_options(Options { precision: Precision::F32, ..all(model) }).unwrap();
            session.detect(&view).unwrap();
            let before = session.workspace_bytes(1200, 1000).unwrap();
            session.set_options(Options { precision, ..all(model) }).unwrap();
            assert_eq!(session.detect(&view).unwrap(), low);
            assert!(session.workspace_bytes(1200, 1000).unwrap() < before);
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
fn a_list_of_scales_is_searched_in_any_order() {
    let model = model();
    let pixels = picture(120, 90);
    let view = rgb(&pixels, 120, 90);
    let with = |pyramid| detect(&model, Options { pyramid, ..all(&model) }, &view);
    let list = |scales: &[f32]| Pyramid::Scales(Scales::new(scales).unwrap());
    let octaves = with(Pyramid::Octaves { min: -1.0, max: 1.0, step: 1.0 });
    assert_eq!(with(list(&[1.0, 0.5, 2.0])), octaves);
    assert_eq!(with(list(&[1.0])), with(Pyramid::Auto));
    let mut apart: Vec<f32> =
        [0.3, 0.7].iter().flat_map(|&s| with(list(&[s]))).map(|face| face.score).collect();
    apart.sort_by(|a, b| b.total_cmp(a));
    let together: Vec<f32> = with(list(&[0.3, 0.7])).iter().map(|face| face.score).collect();
    assert_eq!(together, apart);
    let session = |options| Session::with_options(&model, options).unwrap();
    let levels = |min_face_px, max_face_px| {
        let pyramid = list(&[0.25, 0.5, 1.0, 2.0]);
        let limited = Options { pyramid, min_face_px, max_face_px, ..all(&model) };
        let found = session(limited).levels(640, 480).unwrap();
        found.iter().map(|l| (l.scale, l.size.width)).collect::<Vec<_>>()
    };
    assert_eq!(levels(0.0, 0.0), [(2.0, 1280), (1.0, 640), (0.5, 320), (0.25, 160)]);
    // RetinaFace finds 8 to 700 px.
    assert_eq!(levels(400.0, 0.0), [(1.0, 640), (0.5, 320), (0.25, 160)]);
    assert_eq!(levels(0.0, 10.0), [(2.0, 1280), (1.0, 640)]);
    assert_eq!(levels(10_000.0, 0.0), []);
    let beyond = Options { pyramid: list(&[1.0, 1e9]), ..all(&model) };
    assert!(session(beyond).levels(640, 480).is_err());
}

/// Left and right exchanged.
fn mirror(pixels: &[u8], width: usize) -> Vec<u8> {
    pixels.chunks_exact(3 * width).flat_map(|row| row.rchunks_exact(3)).flatten().copied().collect()
}

#[test]
fn a_flip_session_finds_in_a_mirror_what_it_finds_without() {
    let model = model();
    let (w, h) = (150, 110);
    let pixels = picture(w, h);
    let reflected = mirror(&pixels, w);
    let flip = Options { flip: true, ..all(&model) };
    for options in [
        flip.clone(),
        Options { nms_iou: 0.4, score_threshold: 0.3, ..flip.clone() },
        Options { pyramid: Pyramid::Scales(Scales::new(&[0.75, 1.5]).unwrap()), ..flip },
    ] {
        let found = detect(&model, options.clone(), &rgb(&pixels, w, h));
        let mirrored = detect(&model, options, &rgb(&reflected, w, h));
        assert!(found.len() > 10, "too few to tell: {}", found.len());
        assert_eq!(found.len(), mirrored.len());
        // Faces of one score may stand in another order: by place they do not.
        let mut rest = mirrored;
        for face in &found {
            let [x1, x2] = [w as f32 - face.bbox.x2, w as f32 - face.bbox.x1];
            let points = face.landmarks.unwrap();
            // The right eye of the one is the left eye of the other.
            let points = [1, 0, 2, 4, 3].map(|i| [w as f32 - points[i][0], points[i][1]]);
            let same = |m: &Face| {
                let b = [m.bbox.x1 - x1, m.bbox.y1 - face.bbox.y1, m.bbox.x2 - x2, m.bbox.y2 - face.bbox.y2];
                let p = m.landmarks.unwrap();
                let apart = p.as_flattened().iter().zip(points.as_flattened()).map(|(a, b)| a - b);
                (m.score - face.score).abs() < 1e-4 && b.into_iter().chain(apart).all(|d| d.abs() < 0.01)
            };
            let at = rest.iter().position(same).unwrap_or_else(|| panic!("{face:?} has no mirror image"));
            rest.swap_remove(at);
        }
    }
}

#[test]
fn a_flip_session_finds_what_both_pictures_show() {
    let model = model();
    let (w, h) = (150, 110);
    let pixels = picture(w, h);
    let reflected = mirror(&pixels, w);
    let scores = |faces: &[Face]| faces.iter().map(|f| f.score.to_bits()).collect::<Vec<_>>();
    let plain = detect(&model, all(&model), &rgb(&pixels, w, h));
    let mut session = Session::with_options(&model, Options { flip: true, ..all(&model) }).unwrap();
    let both = scores(session.detect(&rgb(&pixels, w, h)).unwrap());
    let mut expected = scores(&plain);
    expected.extend(scores(&detect(&model, all(&model), &rgb(&reflected, w, h))));
    expected.sort_by(|a, b| b.cmp(a)); // bits of positive floats are ordered as they are
    assert_eq!(both, expected);
    // Off again, it is as if it had never been on.
    session.set_options(all(&model)).unwrap();
    assert_eq!(session.detect(&rgb(&pixels, w, h)).unwrap(), plain);
}

#[test]
fn suppression_may_change_between_calls_and_keeps_its_word() {
    let model = model();
    let pixels = picture(333, 257);
    let view = rgb(&pixels, 333, 257);
    let base = Options { score_threshold: 0.3, ..Options::for_model(model.config()) };
    let mut session = Session::with_options(&model, base.clone()).unwrap();
    let greedy = session.detect(&view).unwrap().to_vec();
    let mut with = |suppression| {
        session.set_options(Options { suppression, ..base.clone() }).unwrap();
        session.detect(&view).unwrap().to_vec()
    };
    let voted = with(Suppression::Voting { iou: 0.5 });
    assert_eq!(voted.len(), greedy.len());
    assert!(voted.iter().zip(&greedy).any(|(v, g)| v.bbox != g.bbox), "nobody voted");
    for (v, g) in voted.iter().zip(&greedy) {
        assert_eq!((v.score, v.landmarks), (g.score, g.landmarks));
        // Overlap as this model counts it, pixels inclusive.
        let inclusive = |f: &Face| BBox::new(f.bbox.x1, f.bbox.y1, f.bbox.x2 + 1.0, f.bbox.y2 + 1.0);
        assert!(inclusive(v).iou(&inclusive(g)) > 0.3, "{v:?} was {g:?}");
    }
    for suppression in [Suppression::SoftLinear, Suppression::SoftGaussian { sigma: 0.5 }] {
        let soft = with(suppression);
        assert_eq!(soft[0], greedy[0], "nothing decays the best");
        assert!(soft.windows(2).all(|w| w[0].score >= w[1].score), "best first");
        assert!(soft.iter().all(|f| f.score > 0.3));
    }
    assert!(with(Suppression::SoftLinear).len() > greedy.len(), "what overlaps loses score, and stays");
    assert_eq!(with(Suppression::Greedy), greedy);
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
