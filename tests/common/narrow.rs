//! The detectors, narrow enough for tests.
// Not every test uses all of it.
#![allow(dead_code)]

use farface::detect::config::{DetectorConfig, METADATA_KEY};
use farface::detect::group_sampling::{GroupSamplingConfig, SecondStageConfig};
use farface::detect::hambox::HamBoxConfig;
use farface::detect::hr::HrConfig;
use farface::detect::pyramid::PyramidConfig;
use farface::detect::refineface::RefineFaceConfig;
use farface::detect::retinaface::RetinaFaceConfig;
use farface::detect::{Model, ModelConfig};
use farface::graph::init::Rng;
use farface::graph::{run_reference, Weights};
use farface::nets::hr::Backbone;
use farface::nets::mobilenet::BlockStack;
use farface::nets::resnet::ResNet;
use farface::nets::vgg::Vgg;
use farface::shape::{Shape, Tensor};

const WIDTH: usize = 8;
const CHANNELS: usize = 16;
const SECOND_WIDTH: usize = 24;
/// Scores that anchors pass in a first step.
pub const FIRST: f32 = 0.5;

/// The detector of a name, made narrow.
pub fn narrow(name: &str) -> ModelConfig {
    let config = ModelConfig::named(name).unwrap_or_else(|| panic!("{name}"));
    let detector = match config.detector {
        DetectorConfig::GroupSampling(d) => DetectorConfig::GroupSampling(GroupSamplingConfig {
            backbone: ResNet { width: WIDTH, ..d.backbone },
            channels: CHANNELS,
            second_stage: d.second_stage.map(|second| SecondStageConfig { width: SECOND_WIDTH, ..second }),
            ..d
        }),
        DetectorConfig::Hambox(d) => DetectorConfig::Hambox(HamBoxConfig {
            backbone: ResNet { width: WIDTH, ..d.backbone },
            channels: CHANNELS,
            ..d
        }),
        DetectorConfig::Refineface(d) => DetectorConfig::Refineface(RefineFaceConfig {
            backbone: ResNet { width: WIDTH, ..d.backbone },
            channels: CHANNELS,
            first_step_score: FIRST,
            ..d
        }),
        DetectorConfig::Retinaface(d) => DetectorConfig::Retinaface(RetinaFaceConfig {
            backbone: d.backbone.map(|net| ResNet { width: WIDTH, ..net }),
            channels: CHANNELS,
            ..d
        }),
        DetectorConfig::Hr(d) => {
            let backbone = match d.backbone {
                Backbone::Resnet(net) => Backbone::Resnet(ResNet { width: WIDTH, ..net }),
                Backbone::Vgg16(_) => Backbone::Vgg16(Vgg { width: WIDTH }),
            };
            DetectorConfig::Hr(HrConfig { backbone, ..d })
        }
        DetectorConfig::Pyramid(d) => {
            let blocks = [vec![], vec![12, 20], vec![20, 24], vec![28, 28, 32], vec![40]];
            let backbone = Some(BlockStack { first: 6, blocks });
            DetectorConfig::Pyramid(PyramidConfig { backbone, channels: CHANNELS, ..d })
        }
        other => panic!("{other:?}"),
    };
    ModelConfig { detector, ..config }
}

/// It with random weights, the predictions scaled as a trained detector's are: logits of one unit, offsets of a fifth.
pub fn model(name: &str, seed: u64) -> Model {
    let config = narrow(name);
    let graph = config.detector.detector().graph();
    let mut weights = Weights::random(&graph, seed);
    let shape = Shape::new(1, 3, 96, 128);
    let mut rng = Rng::new(seed);
    // As far from the mean as pixels are.
    let spread = 60.0 * config.input.scale[0];
    let picture = Tensor::from_vec(shape, (0..shape.len()).map(|_| spread * rng.normal()).collect());
    let outputs = run_reference(&graph, &weights, &[picture]).unwrap();
    // HR has both in one output.
    for (kind, size) in [("class", 1.0), ("box", 0.2), ("scores", 0.2)] {
        let maps = graph.outputs.iter().zip(&outputs).filter(|((name, _), _)| name.starts_with(kind));
        let rms = |t: &Tensor| (t.data.iter().map(|v| v * v).sum::<f32>() / t.data.len() as f32).sqrt();
        let largest = maps.map(|(_, map)| rms(map)).fold(0.0, f32::max);
        for (name, tensor) in &mut weights.tensors {
            let (layer, _) = name.rsplit_once('.').unwrap();
            let scores = kind == "scores" && layer.starts_with("score_res");
            if scores || layer.ends_with(&format!(".{kind}")) || layer.ends_with(&format!("{kind}.predict")) {
                tensor.data.iter_mut().for_each(|v| *v *= size / largest);
            }
        }
    }
    weights.metadata.insert(METADATA_KEY.into(), config.to_json().unwrap());
    Model::from_weights(&weights).unwrap()
}
