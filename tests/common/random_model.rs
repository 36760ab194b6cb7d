//! A model of random weights, the same every time: enough wherever what it finds does not matter.

use farface::detect::config::METADATA_KEY;
use farface::detect::detector::Detector;
use farface::detect::retinaface::RetinaFaceConfig;
use farface::detect::ModelConfig;
use farface::graph::build::ParamRole;
use farface::graph::weights::WeightTensor;
use farface::graph::Weights;

/// RetinaFace with MobileNet-V1 x0.25 and random weights. It finds "faces" in any textured picture.
pub fn retinaface() -> Weights {
    let config = ModelConfig::retinaface_mobile025();
    let graph = RetinaFaceConfig::mobile025().graph();
    let mut state = 1u32;
    let mut random = |scale: f32| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        ((state >> 8) as f32 / (1 << 23) as f32 - 1.0) * scale
    };
    let mut weights = Weights::default();
    for p in &graph.params {
        let mut value = || match p.role {
            // Keeps the variance of what passes through, roughly.
            ParamRole::Weight { fan_in } => random((4.0 / fan_in as f32).sqrt()),
            ParamRole::NormScale => 1.0 + random(0.2),
            ParamRole::NormVariance => 1.0 + random(0.5),
            ParamRole::Bias | ParamRole::NormShift | ParamRole::NormMean => random(0.1),
        };
        let data = (0..p.len()).map(|_| value()).collect();
        weights.tensors.insert(p.name.clone(), WeightTensor { shape: p.shape.clone(), data });
    }
    weights.metadata.insert(METADATA_KEY.into(), config.to_json().unwrap());
    weights
}
