//! What looks at boxes between a network's two phases: its gradients are those of its loss, down to the first convolution.
#![cfg(feature = "train")]

use farface::detect::group_sampling::{GroupSamplingConfig, SecondStageConfig};
use farface::detect::refineface::RefineFaceConfig;
use farface::detect::BBox;
use farface::graph::init::Rng;
use farface::graph::{Graph, Weights};
use farface::nets::refineface::{first_step, LEVELS};
use farface::nets::resnet::ResNet;
use farface::shape::{Shape, Tensor};
use farface::train::data::Annotated;
use farface::train::losses::{BoxLoss, ClassLoss, Focal, LossRecipe};
use farface::train::matching::MatchingRecipe;
use farface::train::network::{Engine, Frozen, InputTable, Network};
use farface::train::objective::second_look::{
    FastRcnnRecipe, FeatureSupervision, FeatureSupervisionRecipe, GroupedFastRcnn, Looks,
};
use farface::train::objective::{Layout, Level, SecondLook, TwoStep, Whole};
use farface::train::sampler::SamplerRecipe;

const SIDE: usize = 96;
const IMAGES: usize = 2;

/// A network at work on two noisy pictures.
struct Bench {
    network: Network<f32>,
    pixels: Vec<u8>,
    table: InputTable,
    faces: Vec<Vec<Annotated>>,
    box_weight: f64,
}

impl Bench {
    fn new(graph: Graph, weights: &Weights, loss: &LossRecipe) -> Self {
        // Fixed statistics: a step changes nothing but what it is asked to.
        let still = Frozen { statistics: vec![String::new()], ..Frozen::default() };
        let mut rng = Rng::new(5);
        let face = |x: f32, y: f32, side: f32| Annotated {
            bbox: BBox::from_xywh(x, y, side, side * 1.1),
            ignore: false,
        };
        Self {
            network: Network::new(graph, weights, &still, 2).unwrap(),
            pixels: (0..IMAGES * SIDE * SIDE * 3).map(|_| rng.below(256) as u8).collect(),
            table: InputTable {
                channel: [0, 1, 2],
                value: [0, 1, 2].map(|_| (0..256).map(|v| (v as f32 - 128.0) / 64.0).collect()),
            },
            faces: vec![vec![face(10.0, 12.0, 14.0), face(40.0, 30.0, 33.0)], vec![face(20.0, 8.0, 60.0)]],
            box_weight: f64::from(loss.box_weight),
        }
    }

    fn first(&mut self) -> Vec<Tensor> {
        let shape = Shape::new(IMAGES, 3, SIDE, SIDE);
        Engine::forward(&mut self.network, &self.pixels, shape, &self.table).unwrap()
    }

    /// Loss of the second look at `looks`, and the gradients of its outputs.
    fn second(&mut self, second: &SecondLook, looks: &Looks) -> (f64, Vec<Tensor>) {
        self.first();
        let outputs = Engine::forward_boxes(&mut self.network, looks.boxes()).unwrap();
        let (losses, gradients) = second.judge(looks, &outputs).unwrap();
        (losses.class + self.box_weight * losses.boxes, gradients)
    }
}

/// Along the gradient of every parameter the loss changes as much as the gradient is long; the parameters whose names begin
/// with one of `parts` have a gradient that differences can show.
fn hold_gradients(mut bench: Bench, second: &SecondLook, looks: &Looks, parts: &[&str]) {
    let first = bench.first();
    let (loss, gradients) = bench.second(second, looks);
    assert!(loss > 0.1, "{loss}");
    let mut d: Vec<Tensor> = first.iter().map(|o| Tensor::zeros(o.shape)).collect();
    d.extend(gradients);
    Engine::backward(&mut bench.network, &d).unwrap();
    let grads = bench.network.grads.clone();
    let names: Vec<String> = bench.network.graph().params.iter().map(|p| p.name.clone()).collect();
    let mut seen = vec![0; parts.len()];
    for (p, (grad, name)) in grads.iter().zip(&names).enumerate() {
        let length = grad.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
        if length < 0.01 {
            continue;
        }
        let start = bench.network.params[p].clone();
        let mut at = |by: f64| {
            let moved = start.iter().zip(grad).map(|(v, g)| v + (by * f64::from(*g) / length) as f32);
            bench.network.params[p] = moved.collect();
            bench.second(second, looks).0
        };
        // Rectifiers fold the loss and f32 rounds it: of three steps one is neither too long nor too short.
        let expected = [4e-3, 1e-3, 2.5e-4].map(|h| {
            let h = h / length.max(1.0);
            (at(h) - at(-h)) / (2.0 * h)
        });
        bench.network.params[p] = start;
        let near = |expected: f64| (length - expected).abs() < 0.03 * expected.abs() + 2e-3;
        assert!(
            expected.into_iter().any(near),
            "{name}: a gradient of {length}, by differences {expected:?}"
        );
        for (seen, part) in seen.iter_mut().zip(parts) {
            *seen += usize::from(name.starts_with(part));
        }
    }
    println!("{seen:?} parameters of {parts:?}");
    assert!(seen.iter().all(|n| *n > 0), "{seen:?} of {parts:?}");
}

fn rng(n: usize) -> Rng {
    Rng::new(70 + n as u64)
}

#[test]
fn feature_supervision_teaches_the_pyramid_and_the_backbone() {
    let config = RefineFaceConfig::named("refineface-r18").unwrap();
    let config = RefineFaceConfig { backbone: ResNet { width: 4, ..config.backbone }, channels: 8, ..config };
    let loss = LossRecipe {
        classification: ClassLoss::Focal { alpha: 0.25, gamma: 2.0 },
        boxes: BoxLoss::SmoothL1 { beta: 1.0 },
        ..LossRecipe::default()
    };
    let thresholds = MatchingRecipe::Thresholds { negative: 0.4, positive: 0.5, force_best: false };
    let level = |level: usize| {
        let (stride, layout) = (1 << level, Layout::Apart { logits: 1 });
        (Level { stride, anchors: config.anchors(stride).collect(), layout }, first_step(level, true, true))
    };
    let levels = LEVELS.map(level).collect();
    let (first, second) = (thresholds, thresholds);
    let detector = TwoStep { levels, first, second, survives: -1.0, mining: None, sampler: None, loss };
    let recipe = FeatureSupervisionRecipe { proposals: 60, ..FeatureSupervisionRecipe::default() };
    let second =
        SecondLook::FeatureSupervision(FeatureSupervision { detector, recipe, focal: Focal::default() });
    let graph = config.training_graph();
    let weights = Weights::random(&graph, 3);
    let mut bench = Bench::new(graph, &weights, &loss);
    let outputs = bench.first();
    let looks = second.choose(&outputs, &bench.faces, rng, 1, Whole::at_hand(bench.faces.len())).unwrap();
    for threads in [2, 3] {
        assert_eq!(
            second.choose(&outputs, &bench.faces, rng, threads, Whole::at_hand(bench.faces.len())).unwrap(),
            looks,
            "{threads} threads"
        );
    }
    let used = |looks: &[_]| {
        looks.iter().any(|l: &farface::train::objective::second_look::Look| l.class_weight > 0.0)
    };
    assert!(looks.inputs().iter().filter(|l| used(l)).count() > 2, "several levels are looked at");
    hold_gradients(
        bench,
        &second,
        &looks,
        &["supervised.conv0", "supervised.predict", "fpn.output", "layer", "conv1"],
    );
}

#[test]
fn both_stages_of_grouped_fast_rcnn_learn_from_the_second() {
    let config = GroupSamplingConfig::named("fpn-finest-rcnn-r18").unwrap();
    let config = GroupSamplingConfig {
        backbone: ResNet { width: 4, ..config.backbone },
        channels: 8,
        second_stage: Some(SecondStageConfig { width: 12, ..SecondStageConfig::default() }),
        ..config
    };
    let loss = LossRecipe { box_weight: 1.5, ..LossRecipe::default() };
    let graph = config.training_graph();
    let mut weights = Weights::random(&graph, 3);
    // Boxes near their anchors and proposals, so that some find the faces.
    config.start_new(&mut weights, |name| name.starts_with("head.") || name.starts_with("second.box"));
    let recipe = FastRcnnRecipe {
        sampler: SamplerRecipe { samples: 16, ..SamplerRecipe::default() },
        ..FastRcnnRecipe::default()
    };
    let second = SecondLook::FastRcnn(GroupedFastRcnn { detector: config, recipe, loss });
    let mut bench = Bench::new(graph, &weights, &loss);
    let outputs = bench.first();
    let looks = second.choose(&outputs, &bench.faces, rng, 1, Whole::at_hand(bench.faces.len())).unwrap();
    for threads in [2, 3] {
        assert_eq!(
            second.choose(&outputs, &bench.faces, rng, threads, Whole::at_hand(bench.faces.len())).unwrap(),
            looks,
            "{threads} threads"
        );
    }
    let [looked] = looks.inputs() else { panic!("one input") };
    assert!(looked.iter().any(|l| l.face.is_some()) && looked.len() > 40, "{} looks", looked.len());
    hold_gradients(
        bench,
        &second,
        &looks,
        &["second.fc1", "second.box", "second.class", "fpn.", "layer", "conv1"],
    );
}
