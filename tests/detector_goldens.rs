//! The detectors, narrow, against PyTorch: names and outputs (tests/golden/detectors.py makes the values; its cases
//! stand here by the same names).

#[path = "common/goldens.rs"]
mod goldens;
#[path = "common/narrow.rs"]
mod narrow;

use farface::cpu::{isa, View};
use farface::detect::config::DetectorConfig;
use farface::detect::config::InputConfig;
use farface::detect::detector::{Map, Window};
use farface::detect::{Model, ModelConfig, Options, Session};
use farface::graph::{run_reference, Graph, Weights};
use farface::pixels::{ImageView, PixelFormat};
use farface::shape::{Shape, Tensor};
use goldens::{compiled_outputs, drawn, golden, goldens, hold, hold_outputs, SEED};
use narrow::{narrow, FIRST};

/// Scores that faces pass.
const THRESHOLD: f32 = 0.3;

/// A detector's graph and weights, and the picture of these rows and columns, as drawn for its name.
fn drawn_case(name: &str, config: &ModelConfig, [h, w]: [usize; 2]) -> (Graph, Weights, Tensor) {
    let graph = config.detector.detector().graph();
    let weights = Weights::random(&graph, SEED);
    let shape = Shape::new(1, 3, h, w);
    (graph, weights, Tensor::from_nchw(shape, &drawn(&format!("{name}.image"), shape.len())))
}

#[test]
fn outputs_are_pytorchs_in_the_plain_loops_and_the_engine() {
    let all = goldens("detectors");
    for (name, size) in [
        ("rpn-r18", [54, 70]),
        ("fpn-r18", [54, 70]),
        ("fpn-finest-r18", [54, 70]),
        ("fpn-finest-stride-r18", [54, 70]),
        ("fpn-p3-r18", [54, 70]),
        ("fpn-p4-r18", [54, 70]),
        ("fpn-finest-dc-r50", [48, 64]),
        ("fpn-finest-rcnn-r18", [64, 96]),
        ("hambox-baseline-r18", [101, 131]),
        ("hambox-fpn-r18", [101, 131]),
        ("hambox-r50", [128, 160]),
        ("refineface-baseline-r18", [101, 131]),
        ("refineface-str-r18", [101, 131]),
        ("refineface-stc-r18", [101, 131]),
        ("refineface-r18", [101, 131]),
        ("refineface-r50", [128, 160]),
        ("hr-r18", [101, 77]),
        ("hr-res2-res3-res4-res5-r50", [70, 83]),
        ("hr-full-vgg16", [53, 85]),
        ("hr-res2-res4-vgg16", [53, 75]),
        ("retinaface-r50", [70, 99]),
        ("farface-crowd-r50", [128, 160]),
        ("farface-nano", [101, 131]),
        ("farface-small", [101, 131]),
    ] {
        let config = narrow(name);
        let (graph, mut weights, picture) = drawn_case(name, &config, size);
        let second = config.detector.detector().second_stage();
        if let Some(second) = &second {
            weights.tensors.extend(Weights::random(&second.graph, SEED).tensors);
        }
        hold_outputs(&all, &format!("{name}/"), &graph, &weights, &picture);
        let pictures = std::slice::from_ref(&picture);
        hold_faces(&all, name, &config, &run_reference(&graph, &weights, pictures).unwrap());
        if let Some(second) = &second {
            let rois = golden(&all, &format!("{name}/rois"));
            hold_outputs(&all, &format!("{name}/"), &second.graph, &weights, &rois);
            hold_refined(&all, name, &config, weights.clone(), &picture);
        }
        // The configuration survives the file.
        let mut file = weights;
        file.metadata.insert("farface".into(), config.to_json().unwrap());
        let model = Model::from_bytes(&file.to_bytes().unwrap()).unwrap();
        assert_eq!(model.config(), &config, "{name}");
    }
}

/// As wide as the papers have them, on every backbone, all switches on; in the engine, as plain loops would take an hour.
#[test]
#[ignore = "wants a file of 1 MB: python tests/golden/detectors.py --full FILE, and its path in FARFACE_FULL_GOLDENS"]
fn at_full_width_outputs_are_pytorchs() {
    let path = std::env::var("FARFACE_FULL_GOLDENS").expect("FARFACE_FULL_GOLDENS names the file");
    let all = Weights::load(path).unwrap();
    let mut names: Vec<&str> = all.tensors.keys().filter_map(|k| k.strip_suffix("/count")).collect();
    names.sort_unstable();
    assert!(names.len() >= 14, "{names:?}");
    for name in names {
        let mut config = ModelConfig::named(name).unwrap_or_else(|| panic!("{name}"));
        if let DetectorConfig::Refineface(d) = &mut config.detector {
            d.first_step_score = FIRST;
        }
        let size = &all.tensors[&format!("{name}/size")].data;
        let (graph, weights, picture) = drawn_case(name, &config, [size[0] as usize, size[1] as usize]);
        let isa = isa::detected();
        let outputs = compiled_outputs(&graph, &weights, &picture, isa);
        hold(&all, &format!("{name}/"), &graph, isa.name(), &outputs, 1e-4);
        hold_faces(&all, name, &config, &outputs);
        println!("{name}: as PyTorch");
    }
}

/// Holds the boxes that the outputs mean to PyTorch's.
fn hold_faces(all: &Weights, name: &str, config: &ModelConfig, outputs: &[Tensor]) {
    let map =
        |t: &'static str| all.tensors.get(&format!("{name}/{t}")).unwrap_or_else(|| panic!("{name}/{t}"));
    let graph = config.detector.detector().graph();
    let mut scales = map("scale").data.iter();
    let scaled: Vec<Tensor> = graph
        .outputs
        .iter()
        .zip(outputs)
        .map(|((output, _), t)| {
            // Channels of offsets: all, none, or those behind the logits.
            let from = match output.as_str() {
                name if name == "scores" || name.starts_with("predict") => t.shape.c / 5,
                name if name.starts_with("box") => 0,
                _ => return t.clone(),
            };
            let by = *scales.next().expect("a scale an output of offsets");
            let scaled = |(i, v): (usize, &f32)| if i % t.shape.c < from { *v } else { v * by };
            Tensor { shape: t.shape, data: t.data.iter().enumerate().map(scaled).collect() }
        })
        .collect();
    assert!(scales.next().is_none(), "{name}: a scale a box output");
    let maps: Vec<Map<'_>> =
        scaled.iter().map(|o| Map::new(&o.data, View::new(o.shape, 0, [0; 4]))).collect();
    let mut faces = Vec::new();
    config.detector.detector().decode(&maps, &Window::whole(), THRESHOLD, &mut |face| {
        faces.push([face.bbox.x1, face.bbox.y1, face.bbox.x2, face.bbox.y2, face.score]);
    });
    assert_eq!(faces.len() as f32, map("count").data[0], "{name}: faces");
    let (rows, expected) = (&map("rows").data, &map("faces").data);
    assert!(rows.len() >= 8 && expected.len() == 5 * rows.len(), "{name}: {} faces to compare", rows.len());
    for (row, expected) in rows.iter().zip(expected.chunks_exact(5)) {
        let (i, got) = (*row as usize, &faces[*row as usize]);
        let size = expected[..4].iter().fold(1.0f32, |m, v| m.max(v.abs()));
        for (g, e) in got.iter().zip(expected) {
            assert!((g - e).abs() < 1e-4 * size, "{name}, face {i}: {got:?}, PyTorch {expected:?}");
        }
    }
}

/// Holds what a session of both stages finds to PyTorch's: proposals, their features, scores and boxes.
fn hold_refined(all: &Weights, name: &str, config: &ModelConfig, mut weights: Weights, picture: &Tensor) {
    let map = |t: &str| &all.tensors.get(&format!("{name}/{t}")).unwrap_or_else(|| panic!("{name}/{t}")).data;
    let config = ModelConfig {
        // The picture's values as pixels, which lie between 0 and 255.
        input: InputConfig { order: "rgb".into(), mean: [128.0; 3], scale: [0.1; 3] },
        ..config.clone()
    };
    weights.metadata.insert("farface".into(), config.to_json().unwrap());
    for (part, scale) in [("head.box.", map("scale")[0]), ("second.box.", map("second_scale")[0])] {
        let tensors = weights.tensors.iter_mut().filter(|(name, _)| name.starts_with(part));
        tensors.flat_map(|(_, t)| &mut t.data).for_each(|v| *v *= scale);
    }
    let model = Model::from_weights(&weights).unwrap();
    let s = picture.shape;
    let planes: Vec<f32> = (0..3)
        .flat_map(|c| (0..s.h * s.w).map(move |i| (c, i)))
        .map(|(c, i)| 128.0 + 10.0 * picture.data[i * 3 + c])
        .collect();
    let bytes: Vec<u8> = planes.iter().flat_map(|v| v.to_ne_bytes()).collect();
    let image = ImageView::packed(s.w, s.h, PixelFormat::RgbPlanarF32, &bytes).unwrap();
    let options =
        Options { score_threshold: THRESHOLD, nms_iou: 1.0, threads: 2, ..Options::for_model(&config) };
    let mut session = Session::with_options(&model, options).unwrap();
    let faces = session.detect(&image).unwrap();
    let [count, proposals] = map("refined_count")[..] else { panic!("{name}: two counts") };
    assert!(count > 30.0 && proposals > count + 20.0, "{name}: {count} faces of {proposals} proposals");
    assert_eq!(faces.len() as f32, count, "{name}: faces");
    for expected in map("refined").chunks_exact(5) {
        let size = expected[..4].iter().fold(1.0f32, |m, v| m.max(v.abs()));
        let near = |f: &&farface::detect::Face| {
            let b = f.bbox;
            let got = [b.x1, b.y1, b.x2, b.y2, f.score];
            got.iter().zip(expected).all(|(g, e)| (g - e).abs() < 1e-4 * size)
        };
        assert!(faces.iter().any(|f| near(&f)), "{name}: {expected:?} of PyTorch is not found");
    }
}

#[test]
fn names_of_no_detector_are_none() {
    for name in [
        "fpn",
        "fpn-r",
        "fpn-r19",
        "fpn-dc-r18",
        "fpn-finest-stride-dc-r50",
        "rpn-rcnn-r18",
        "fpn-p3-rcnn-r18",
        "fpn-finest-rcnn-dc-r18",
        "-r50",
        "fpn-p5-r50",
        "refineface",
        "refineface--r18",
        "refineface-stc-str-r18",
        "refineface-r20",
        "hr",
        "hr-res4-res3-r50",
        "hr-res5-vgg16",
    ] {
        assert!(ModelConfig::named(name).is_none(), "{name}");
    }
}
