//! Heads say what decoding does: interpreted one by one, they give the same faces, bit for bit and in the same order.

use super::{Extras, Field, Head};
use crate::cpu::View;
use crate::detect::anchors::{owned_cells, Anchor};
use crate::detect::config::{DetectorConfig, ModelConfig};
use crate::detect::detector::{logit, sigmoid, Detector, Map, Span, Window};
use crate::detect::face::Face;
use crate::detect::hr::{AngleForm, EllipseRegressor};
use crate::detect::pyramid::PyramidConfig;
use crate::graph::init::Rng;
use crate::shape::Shape;

/// What a head says, in so many words.
fn interpret(
    detector: &dyn Detector,
    head: &Head,
    maps: &[Map<'_>],
    window: &Window,
    threshold: f32,
    sink: &mut dyn FnMut(Face),
) {
    let map = &maps[head.logits.output];
    for y in owned_cells(&window.owned_y, head.stride, map.height()) {
        for x in owned_cells(&window.owned_x, head.stride, map.width()) {
            for &(index, size) in &head.anchors {
                let value =
                    |f: Field, i: usize| maps[f.output].pixel(y, x)[f.first + index * f.anchor + i * f.value];
                let four = |f: Field| [0, 1, 2, 3].map(|i| value(f, i));
                let face = value(head.logits, usize::from(head.pair));
                let face = if head.pair { face - value(head.logits, 0) } else { face };
                let passes =
                    face > logit(threshold) && head.filter.is_none_or(|(f, least)| value(f, 0) > least);
                if !passes {
                    continue;
                }
                let center = [x, y].map(|i| (i * head.stride) as f32 + head.center);
                let mut anchor = Anchor { center, size };
                if let Some(mover) = head.mover {
                    anchor = anchor.moved(&four(mover), [1.0; 2]);
                }
                let offsets = four(head.boxes);
                let mut bbox = anchor.decode(&offsets, head.variances);
                let usable = bbox.width().is_finite() && bbox.height().is_finite();
                if let Some(reach) = head.reach.filter(|_| usable) {
                    bbox = bbox.within(&Anchor { size: [2.0 * reach; 2], ..anchor }.bbox());
                }
                let mut found = Face { bbox, score: sigmoid(face), ..Face::default() };
                match head.extras {
                    Extras::None => {}
                    Extras::Landmarks(f) => {
                        let point = |i: usize| {
                            anchor.point(&[value(f, 2 * i), value(f, 2 * i + 1)], head.variances[0])
                        };
                        found.landmarks = Some(std::array::from_fn(point));
                    }
                    Extras::Ellipse => found.ellipse = detector.ellipse(&bbox, index, offsets, face),
                }
                sink(found);
            }
        }
    }
}

/// Every detector, by names that ask for every way of decoding.
fn detectors() -> Vec<(String, DetectorConfig)> {
    let names = [
        "retinaface-mobile025",
        "farface-nano",
        "fpn-r18",
        "fpn-finest-r18",
        "fpn-finest-dc-r18",
        "fpn-finest-rcnn-r18",
        "rpn-r18",
        "hambox-r18",
        "refineface-r18",
        "refineface-baseline-r18",
        "farface-crowd-r18",
        "hr-r50",
        "hr-full-r50",
    ];
    let mut all: Vec<(String, DetectorConfig)> =
        names.map(|n| (n.to_string(), ModelConfig::named(n).unwrap().detector)).into();
    if let DetectorConfig::Retinaface(retinaface) = &mut all[0].1.clone() {
        retinaface.landmarks = false;
        all.push(("retinaface without landmarks".into(), DetectorConfig::Retinaface(retinaface.clone())));
    }
    let finest = PyramidConfig { anchors: vec![vec![[8.0, 10.0]; 3]; 5], ..PyramidConfig::nano() };
    all.push(("pyramid with a finest level".into(), DetectorConfig::Pyramid(finest)));
    if let Some(DetectorConfig::Hr(mut hr)) = ModelConfig::named("hr-r50").map(|c| c.detector) {
        let mut rng = Rng::new(7);
        let mut row = || std::array::from_fn(|_| 0.1 * rng.normal());
        hr.ellipse = Some(EllipseRegressor {
            angle: AngleForm::DoubleAngle,
            weights: (0..6).map(|_| row()).collect(),
            biases: (0..hr.templates.len()).map(|k| vec![0.01 * k as f32; 6]).collect(),
        });
        hr.cell_center = -1.5;
        all.push(("hr with ellipses".into(), DetectorConfig::Hr(hr)));
    }
    all
}

#[test]
fn heads_mean_what_decoding_does() {
    let windows = [
        Window::whole(),
        Window { scale: 2.0, ..Window::whole() },
        Window {
            scale: 0.5,
            owned_x: Span { owned: 32.0..96.0, end: 121.0 },
            owned_y: Span { owned: f32::NEG_INFINITY..64.0, end: 75.0 },
        },
    ];
    for (name, config) in detectors() {
        let detector = config.detector();
        let graph = detector.graph();
        let shapes = graph.shapes(&[Shape::new(1, 3, 96, 160)]).unwrap();
        let mut rng = Rng::new(3);
        let (mut floats, mut views) = (Vec::new(), Vec::new());
        for (_, id) in &graph.outputs {
            let shape = shapes[id.0];
            views.push(View::new(shape, floats.len(), [0; 4]));
            floats.extend((0..shape.len()).map(|i| match i % 97 {
                13 => f32::NAN,
                57 => f32::INFINITY,
                _ => rng.normal(),
            }));
        }
        let maps: Vec<Map<'_>> = views.into_iter().map(|view| Map::new(&floats, view)).collect();
        let mut any = 0;
        for (window, threshold) in windows.iter().zip([0.5, 0.3, 0.0]) {
            let (mut expected, mut found) = (Vec::new(), Vec::new());
            detector.decode(&maps, window, threshold, &mut |face| expected.push(face));
            for head in detector.heads(window.scale) {
                interpret(&*detector, &head, &maps, window, threshold, &mut |face| found.push(face));
            }
            assert_eq!(expected.len(), found.len(), "{name} at {}", window.scale);
            // Texts, since a NaN is not equal to itself; they tell floats exactly.
            for (e, f) in expected.iter().zip(&found) {
                assert_eq!(format!("{e:?}"), format!("{f:?}"), "{name} at {}", window.scale);
            }
            any += found.len();
        }
        assert!(any > 100, "{name}: {any}");
    }
}
