//! A small model of random weights, the same at every run, so that tests need no trained one.

use farface::detect::config::{DetectorConfig, METADATA_KEY};
use farface::detect::group_sampling::{GroupSamplingConfig, SecondStageConfig};
use farface::detect::{detector::Detector, ModelConfig};
use farface::graph::build::{Param, ParamRole};
use farface::graph::weights::{WeightTensor, Weights};
use farface::nets::resnet::ResNet;
use std::path::{Path, PathBuf};

/// Deterministic values in -1..1 (xorshift64*).
pub struct Noise(u64);

impl Noise {
    /// Sequence by number.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    /// Next 32 bits.
    pub fn bits(&mut self) -> u32 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 32) as u32
    }

    /// Next value.
    pub fn value(&mut self) -> f32 {
        self.bits() as f32 / u32::MAX as f32 * 2.0 - 1.0
    }
}

/// RetinaFace x0.25 with random weights: it sees "faces" in any texture, and their number follows
/// the score threshold.
pub fn weights(seed: u64) -> Weights {
    let config = ModelConfig { name: format!("random-{seed}"), ..ModelConfig::retinaface_mobile025() };
    let DetectorConfig::Retinaface(detector) = &config.detector else { unreachable!("built above") };
    let mut noise = Noise::new(seed);
    let mut values = |p: &Param| -> Vec<f32> {
        // Pixels span 255 values, and boxes and points should stay near their anchors.
        let gain = match p.name.as_str() {
            "body.stage1.0.0.weight" => 0.03,
            name if name.starts_with("BboxHead") || name.starts_with("LandmarkHead") => 0.5,
            _ => 1.5,
        };
        (0..p.len())
            .map(|_| match p.role {
                ParamRole::Weight { fan_in } => noise.value() * (3.0 / fan_in as f32).sqrt() * gain,
                ParamRole::NormScale | ParamRole::NormVariance => 1.0 + 0.25 * noise.value(),
                _ => 0.1 * noise.value(),
            })
            .collect()
    };
    let tensors = detector
        .graph()
        .params
        .iter()
        .map(|p| (p.name.clone(), WeightTensor { shape: p.shape.clone(), data: values(p) }))
        .collect();
    let metadata = [(METADATA_KEY.to_string(), config.to_json().unwrap())].into();
    Weights { tensors, metadata }
}

/// A detector of two stages with random weights, narrow, one anchor a cell.
pub fn two_stages(seed: u64) -> Weights {
    let config = ModelConfig::named("fpn-finest-rcnn-r18").unwrap();
    let DetectorConfig::GroupSampling(detector) = config.detector else { unreachable!("named above") };
    let detector = GroupSamplingConfig {
        // Shallow, so that it does not see far.
        backbone: ResNet { width: 4, blocks: [1; 4], ..detector.backbone },
        channels: 8,
        scales: vec![16.0],
        second_stage: Some(SecondStageConfig {
            width: 16,
            max_proposals: 50_000,
            ..SecondStageConfig::default()
        }),
        ..detector
    };
    let mut weights = Weights::random(&detector.graph(), seed);
    weights.tensors.extend(Weights::random(&detector.second_stage().unwrap().graph, seed).tensors);
    // Scores between 0 and 1, boxes near their anchors and proposals.
    let outputs =
        weights.tensors.iter_mut().filter(|(name, _)| name.contains(".class.") || name.contains(".box."));
    outputs.flat_map(|(_, t)| &mut t.data).for_each(|v| *v *= 0.03);
    let config = ModelConfig {
        name: format!("two-stages-{seed}"),
        detector: DetectorConfig::GroupSampling(detector),
        ..config
    };
    weights.metadata.insert(METADATA_KEY.to_string(), config.to_json().unwrap());
    weights
}

/// The model file of [`weights`] in `folder`.
pub fn file(folder: &Path, seed: u64) -> PathBuf {
    saved(folder, &weights(seed), seed)
}

/// A model file of these weights in `folder`.
pub fn saved(folder: &Path, weights: &Weights, seed: u64) -> PathBuf {
    let path = folder.join(format!("random-{seed}.safetensors"));
    weights.save(&path).unwrap();
    path
}

/// A picture of blobs and noise, 3 bytes a pixel.
pub fn picture(width: usize, height: usize, seed: u64) -> Vec<u8> {
    let mut noise = Noise::new(seed);
    let mut rgb = vec![0; width * height * 3];
    let waves: Vec<[f32; 3]> =
        (0..9).map(|_| [noise.value() * 0.3, noise.value() * 0.3, noise.value() * 3.0]).collect();
    for y in 0..height {
        for x in 0..width {
            for c in 0..3 {
                let wave = |w: &[f32; 3]| (w[0] * x as f32 + w[1] * y as f32 + w[2]).sin();
                let sum: f32 = waves[3 * c..3 * c + 3].iter().map(wave).sum();
                rgb[(y * width + x) * 3 + c] = (128.0 + 35.0 * sum + 12.0 * noise.value()) as u8;
            }
        }
    }
    rgb
}
