//! The papers' detectors, narrow, against PyTorch: names and outputs (tests/golden/detectors.py makes the values; its cases
//! stand here by the same names).

#[path = "common/goldens.rs"]
mod goldens;
#[path = "common/narrow.rs"]
mod narrow;

use farface::cpu::View;
use farface::detect::detector::{Map, Window};
use farface::detect::{Model, ModelConfig};
use farface::graph::{run_reference, Weights};
use farface::shape::{Shape, Tensor};
use goldens::{drawn, goldens, hold_outputs, SEED};
use narrow::narrow;

/// Scores that faces pass.
const THRESHOLD: f32 = 0.3;

#[test]
fn outputs_are_pytorchs_in_the_plain_loops_and_the_engine() {
    let all = goldens("detectors");
    for (name, [h, w]) in [
        ("rpn-r18", [54, 70]),
        ("fpn-r18", [54, 70]),
        ("fpn-finest-r18", [54, 70]),
        ("fpn-finest-stride-r18", [54, 70]),
        ("fpn-p3-r18", [54, 70]),
        ("fpn-p4-r18", [54, 70]),
        ("fpn-finest-dc-r50", [48, 64]),
        ("hambox-baseline-r18", [101, 131]),
        ("hambox-fpn-r18", [101, 131]),
        ("hambox-r50", [128, 160]),
        ("refineface-baseline-r18", [101, 131]),
        ("refineface-str-r18", [101, 131]),
        ("refineface-stc-r18", [101, 131]),
        ("refineface-r18", [101, 131]),
        ("refineface-r50", [128, 160]),
    ] {
        let config = narrow(name);
        let graph = config.detector.detector().graph();
        let weights = Weights::random(&graph, SEED);
        let shape = Shape::new(1, 3, h, w);
        let picture = Tensor::from_nchw(shape, &drawn(&format!("{name}.image"), shape.len()));
        hold_outputs(&all, &format!("{name}/"), &graph, &weights, &picture);
        hold_faces(&all, name, &config, &run_reference(&graph, &weights, &[picture]).unwrap());
        // The configuration survives the file.
        let mut file = weights;
        file.metadata.insert("farface".into(), config.to_json().unwrap());
        let model = Model::from_bytes(&file.to_bytes().unwrap()).unwrap();
        assert_eq!(model.config(), &config, "{name}");
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
            let by =
                if output.starts_with("box") { *scales.next().expect("a scale a box output") } else { 1.0 };
            Tensor { shape: t.shape, data: t.data.iter().map(|v| v * by).collect() }
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

#[test]
fn names_of_no_detector_are_none() {
    for name in [
        "fpn",
        "fpn-r",
        "fpn-r19",
        "fpn-dc-r18",
        "fpn-finest-stride-dc-r50",
        "-r50",
        "fpn-p5-r50",
        "refineface",
        "refineface--r18",
        "refineface-stc-str-r18",
        "refineface-r20",
    ] {
        assert!(ModelConfig::named(name).is_none(), "{name}");
    }
}
