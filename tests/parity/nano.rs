//! The networks of our own detectors, on pictures whose sides are no multiple of a stride.

use crate::support::Parity;
use farface::detect::config::DetectorConfig;
use farface::detect::pyramid::PyramidConfig;
use farface::detect::{detector::Detector, ModelConfig};
use farface::graph::{Graph, Weights};
use farface::shape::Shape;

fn network(config: &ModelConfig) -> Graph {
    match &config.detector {
        DetectorConfig::Pyramid(p) => p.graph(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn compiled_pyramids_agree_with_the_reference() {
    let mut parity = Parity::new();
    for config in [ModelConfig::farface_nano(), ModelConfig::farface_small()] {
        let shapes = [Shape::new(1, 3, 75, 101)];
        parity.check_random(&config.name, &network(&config), &shapes, 3);
    }
    parity.report("pyramids");
}

#[test]
fn the_published_imagenet_backbone_fits() {
    let Some(shared) = crate::common::shared() else { return };
    let file = shared.join("fixtures/backbones/mobilenet-v1-x0.25-imagenet.safetensors");
    let weights = Weights::load(file).unwrap();
    let graph = PyramidConfig { backbone: None, ..PyramidConfig::small() }.graph();
    let body: Vec<_> = graph.params.iter().filter(|p| p.name.starts_with("body.")).collect();
    // Every tensor but the classifier's two is used.
    assert_eq!(body.len(), weights.tensors.len() - 2);
    for p in body {
        weights.get(&p.name["body.".len()..], &p.shape).unwrap();
    }
}
