//! What a model file says about itself: JSON in the safetensors metadata under `farface`.
//!
//! Unknown fields are ignored, an unknown format version is refused. A file without that entry is
//! taken where its tensors are those of a public detector that we know.

use super::detector::Detector;
use super::group_sampling::GroupSamplingConfig;
use super::hambox::HamBoxConfig;
use super::hr::{HrConfig, TemplateChoice};
use super::pyramid::PyramidConfig;
use super::refineface::RefineFaceConfig;
use super::retinaface::RetinaFaceConfig;
use crate::error::{Error, Result};
use crate::graph::{Ranges, Weights};
use crate::nets::resnet::ResNet;
use crate::pixels::{ChannelOrder, Normalization};
use serde::{Deserialize, Serialize};

/// Key of the metadata entry.
pub const METADATA_KEY: &str = "farface";
/// Metadata entry of a training's checkpoint, which is no model.
pub const CHECKPOINT_KEY: &str = "farface-checkpoint";
/// The version this library writes, and the newest it reads.
pub const FORMAT_VERSION: u32 = 1;

/// Everything a session needs beside the weights.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelConfig {
    /// Version of this layout.
    pub format_version: u32,
    /// Name to show.
    #[serde(default)]
    pub name: String,
    /// The detector and its settings.
    pub detector: DetectorConfig,
    /// Pixel values to network input.
    pub input: InputConfig,
    /// Score that a face must pass unless the session says otherwise.
    #[serde(default = "default_score")]
    pub score_threshold: f32,
    /// Score from which on the model is evaluated (AP wants the weak ones too).
    #[serde(default = "default_eval_score")]
    pub eval_score_threshold: f32,
    /// Overlap above which the weaker of two boxes goes.
    #[serde(default = "default_nms")]
    pub nms_iou: f32,
    /// Another in evaluations.
    #[serde(default)]
    pub eval_nms_iou: Option<f32>,
    /// Scales searched unless the session says otherwise; scale 1 without.
    #[serde(default)]
    pub pyramid: Option<OwnPyramid>,
    /// Others in evaluations.
    #[serde(default)]
    pub eval_pyramid: Option<Octaves>,
    /// Overlaps count pixels inclusively (width = x2 - x1 + 1), as the detector's authors did.
    #[serde(default)]
    pub nms_plus_one: bool,
    /// Best candidates that reach the suppression.
    #[serde(default = "default_candidates")]
    pub max_candidates: usize,
    /// Sizes of face that the network finds: smallest and largest longer side, pixels of the level that it sees; at scale 1, unless
    /// the model has scales of its own.
    pub detectable_px: [f32; 2],
    /// What its tensors hold, where the model was quantized.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quantization: Option<Ranges>,
    /// Licence of the weights.
    #[serde(default)]
    pub licence: String,
    /// Data the weights were trained on.
    #[serde(default)]
    pub data: String,
    /// Training recipe (TOML text), empty for imported weights.
    #[serde(default)]
    pub recipe: String,
}

fn default_score() -> f32 {
    0.5
}
fn default_eval_score() -> f32 {
    0.02
}
fn default_nms() -> f32 {
    0.4
}
fn default_candidates() -> usize {
    5000
}

/// Scales 2^e, e from `max` down to `min` by `step`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Octaves {
    /// Smallest exponent.
    pub min: f32,
    /// Largest exponent.
    pub max: f32,
    /// Step, above 0.
    pub step: f32,
}

impl Octaves {
    fn is_sane(&self) -> bool {
        let Self { min, max, step } = *self;
        let range = (-8.0..=2.0).contains(&min) && (min..=2.0).contains(&max);
        range && (0.1..=14.0).contains(&step) && (max - min) / step <= 24.0
    }
}

/// The scales that a model was made for.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum OwnPyramid {
    /// Octaves.
    Octaves(Octaves),
    /// HR's of a single picture: scales 2^e with e from 1 by half octaves to 0, then by whole octaves down to the level on which
    /// the largest face found covers the picture's width or height.
    LargestFace {
        /// Width and height of that face on the level, pixels.
        size: [f32; 2],
    },
}

impl OwnPyramid {
    /// The scales for a picture of this width and height, largest first.
    pub fn scales(&self, [width, height]: [f64; 2]) -> Vec<f64> {
        let down = |from: f64, to: f64, step: f64| {
            let count = ((from - to) / step + 1e-9).floor().max(0.0) as usize;
            (0..=count).map(move |i| (from - i as f64 * step).exp2())
        };
        match *self {
            OwnPyramid::Octaves(Octaves { min, max, step }) => {
                down(max.into(), min.into(), step.into()).collect()
            }
            OwnPyramid::LargestFace { size: [w, h] } => {
                let covers = |face: f32, side: f64| (f64::from(face) / side).log2().floor();
                let least = covers(w, width).min(covers(h, height)).min(0.0);
                down(1.0, 0.5, 0.5).chain(down(0.0, least, 1.0)).collect()
            }
        }
    }

    fn is_sane(&self) -> bool {
        match self {
            OwnPyramid::Octaves(octaves) => octaves.is_sane(),
            OwnPyramid::LargestFace { size } => size.iter().all(|s| (1.0..=10_000.0).contains(s)),
        }
    }
}

/// A detector by kind.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
#[non_exhaustive]
pub enum DetectorConfig {
    /// RetinaFace (Deng et al. 2019), single shot with SSH heads and landmarks.
    Retinaface(RetinaFaceConfig),
    /// Our own pyramid, `farface-nano` and `farface-small`.
    Pyramid(PyramidConfig),
    /// Group Sampling (Ming et al. 2019): the proposal network's head on a pyramid of a ResNet, maybe with a second stage.
    GroupSampling(GroupSamplingConfig),
    /// HAMBox (Liu et al. 2020): RetinaNet's heads, one anchor a cell.
    Hambox(HamBoxConfig),
    /// RefineFace (Zhang et al. 2019): RetinaNet in two steps.
    Refineface(RefineFaceConfig),
    /// HR, "Finding Tiny Faces" (Hu and Ramanan 2017): templates on the sum of several layers' scores.
    Hr(HrConfig),
}

impl DetectorConfig {
    /// Errors where a setting is beyond what a network can have.
    pub fn check(&self) -> Result<()> {
        match self {
            DetectorConfig::Retinaface(r) => r.check(),
            DetectorConfig::Pyramid(p) => p.check(),
            DetectorConfig::GroupSampling(g) => g.check(),
            DetectorConfig::Hambox(h) => h.check(),
            DetectorConfig::Refineface(r) => r.check(),
            DetectorConfig::Hr(h) => h.check(),
        }
    }

    /// What a session runs.
    pub fn detector(&self) -> Box<dyn Detector> {
        match self {
            DetectorConfig::Retinaface(r) => Box::new(r.clone()),
            DetectorConfig::Pyramid(p) => Box::new(p.clone()),
            DetectorConfig::GroupSampling(g) => Box::new(g.clone()),
            DetectorConfig::Hambox(h) => Box::new(h.clone()),
            DetectorConfig::Refineface(r) => Box::new(r.clone()),
            DetectorConfig::Hr(h) => Box::new(h.clone()),
        }
    }
}

/// Channel order, mean and scale of the network's input.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct InputConfig {
    /// `rgb` or `bgr`.
    pub order: String,
    /// Subtracted from pixel values 0..255, in that order.
    pub mean: [f32; 3],
    /// Then multiplied, in that order.
    pub scale: [f32; 3],
}

impl InputConfig {
    /// ImageNet's mean and standard deviation, red first: what torchvision's backbones were trained with, and their running
    /// statistics are for.
    pub fn imagenet() -> Self {
        Self {
            order: "rgb".into(),
            mean: [123.675, 116.28, 103.53],
            scale: [1.0 / 58.395, 1.0 / 57.12, 1.0 / 57.375],
        }
    }

    /// HR's: the mean colour of ImageNet taken off, values as they are.
    fn hr() -> Self {
        Self { order: "rgb".into(), mean: [119.30, 110.55, 101.84], scale: [1.0; 3] }
    }

    /// As the pixel code takes it.
    pub fn normalization(&self) -> Result<Normalization> {
        let order = match self.order.as_str() {
            "rgb" => ChannelOrder::Rgb,
            "bgr" => ChannelOrder::Bgr,
            other => {
                return Err(Error::InvalidModel(format!("input.order is {other:?}, not \"rgb\" or \"bgr\"")))
            }
        };
        Ok(Normalization { order, mean: self.mean, scale: self.scale })
    }
}

impl ModelConfig {
    /// The published RetinaFace with MobileNet-V1 x0.25.
    pub fn retinaface_mobile025() -> Self {
        Self {
            format_version: FORMAT_VERSION,
            name: "retinaface-mobile025".into(),
            detector: DetectorConfig::Retinaface(RetinaFaceConfig::mobile025()),
            input: InputConfig { order: "bgr".into(), mean: [104.0, 117.0, 123.0], scale: [1.0; 3] },
            score_threshold: default_score(),
            eval_score_threshold: default_eval_score(),
            nms_iou: default_nms(),
            eval_nms_iou: None,
            pyramid: None,
            eval_pyramid: None,
            nms_plus_one: true,
            max_candidates: default_candidates(),
            detectable_px: [8.0, 700.0],
            quantization: None,
            licence: String::new(),
            data: String::new(),
            recipe: String::new(),
        }
    }

    /// RetinaFace by its name.
    fn retinaface(name: &str, detector: RetinaFaceConfig) -> Self {
        Self {
            name: name.into(),
            detector: DetectorConfig::Retinaface(detector),
            ..Self::retinaface_mobile025()
        }
    }

    /// Our smallest model: 0.31 million parameters, 0.47 billion multiply-adds at 640x480.
    pub fn farface_nano() -> Self {
        Self::pyramid("farface-nano", PyramidConfig::nano())
    }

    /// Our small model: 0.96 million parameters, 1.5 billion multiply-adds at 640x480.
    pub fn farface_small() -> Self {
        Self::pyramid("farface-small", PyramidConfig::small())
    }

    fn pyramid(name: &str, detector: PyramidConfig) -> Self {
        Self {
            name: name.into(),
            detector: DetectorConfig::Pyramid(detector),
            input: InputConfig::imagenet(),
            nms_plus_one: false,
            // Scores tell how well a box fits, so that sure finds lie at 0.6 to 0.9. Nine finds of ten above this overlap a
            // face by an IoU of 0.35 on WIDER FACE.
            score_threshold: 0.4,
            detectable_px: [6.0, 600.0],
            ..Self::retinaface_mobile025()
        }
    }

    /// A detector of Group Sampling, with the suppression of section 5.3.
    fn group_sampling(name: &str, detector: GroupSamplingConfig) -> Self {
        Self {
            name: name.into(),
            // Half the smallest anchor's area to the largest one and a half times as long.
            detectable_px: [detector.scales[0] * 0.7, detector.scales[detector.scales.len() - 1] * 1.5],
            detector: DetectorConfig::GroupSampling(detector),
            input: InputConfig::imagenet(),
            nms_plus_one: false,
            nms_iou: 0.5,
            max_candidates: 50_000,
            ..Self::retinaface_mobile025()
        }
    }

    /// HAMBox.
    fn hambox(name: &str, detector: HamBoxConfig) -> Self {
        Self {
            name: name.into(),
            // As with Group Sampling.
            detectable_px: [detector.scales[0] * 0.7, detector.scales[5] * 1.5],
            detector: DetectorConfig::Hambox(detector),
            input: InputConfig::imagenet(),
            nms_plus_one: false,
            ..Self::retinaface_mobile025()
        }
    }

    /// RefineFace, with the thresholds of section 3.6; its cap of 750 boxes is the session's `max_faces`.
    fn refineface(name: &str, detector: RefineFaceConfig) -> Self {
        let scale = |first: bool| detector.scales[if first { 0 } else { detector.scales.len() - 1 }];
        Self {
            name: name.into(),
            // As with Group Sampling; strides 4 to 128.
            detectable_px: [4.0 * scale(true) * 0.7, 128.0 * scale(false) * 1.5],
            detector: DetectorConfig::Refineface(detector),
            input: InputConfig::imagenet(),
            nms_plus_one: false,
            eval_score_threshold: 0.05,
            ..Self::retinaface_mobile025()
        }
    }

    /// HR, with the thresholds of its authors' demonstration, and in evaluations those of section 4.
    pub(crate) fn hr(name: &str, detector: HrConfig) -> Self {
        let [least, most] = detector.template_px();
        let largest = |side: fn(&[f32; 2]) -> f32| detector.anchors().iter().map(side).fold(0.0, f32::max);
        let (pyramid, evaluated) = match detector.choice {
            TemplateChoice::AAndB => {
                let size = [largest(|a| a[0]), largest(|a| a[1])];
                (OwnPyramid::LargestFace { size }, Octaves { min: -2.0, max: 1.0, step: 1.0 })
            }
            // The levels that templates are made for.
            TemplateChoice::Full => {
                let octaves = Octaves { min: -1.0, max: 1.0, step: 1.0 };
                (OwnPyramid::Octaves(octaves), octaves)
            }
        };
        Self {
            name: name.into(),
            // From a template on, IoU 0.5 with a square.
            detectable_px: [least * 0.7, most * 1.5],
            pyramid: Some(pyramid),
            eval_pyramid: Some(evaluated),
            nms_iou: 0.1,
            eval_nms_iou: Some(0.3),
            eval_score_threshold: 0.03,
            detector: DetectorConfig::Hr(detector),
            input: InputConfig::hr(),
            nms_plus_one: false,
            ..Self::retinaface_mobile025()
        }
    }

    /// What [`ModelConfig::named`] knows, to be read by people.
    pub const NAMES: &'static str = "farface-nano, farface-small, retinaface-mobile025, retinaface and a backbone (retinaface-r50), or one of Group Sampling's: rpn, fpn, \
         fpn-finest, fpn-finest-stride, fpn-p3 or fpn-p4, then -dc for the dilated head or nothing, then -rcnn for a second stage \
         (on fpn, fpn-finest and fpn-finest-stride) or nothing, then -r18, -r34, -r50, -r101 or -r152 (fpn-finest-dc-r50); or hambox, then nothing, -baseline or some of -sms -dh -ssh in this order, then -fpn or nothing, \
         then the backbone as before (hambox-r50); or refineface, then nothing, -baseline or some of -str -stc -rfe in this order, then \
         the backbone (refineface-r50), or farface-crowd and the backbone; or hr, then -full or nothing, then some of -res2 -res3 -res4 -res5 in this order or nothing \
         (res3 and res4), then the backbone or -vgg16 (hr-r101)";

    /// A configuration by its name, for weights that come without one.
    pub fn named(name: &str) -> Option<Self> {
        let known = [Self::farface_nano(), Self::farface_small()];
        let own = known.into_iter().find(|config| config.name == name);
        own.or_else(|| Some(Self::retinaface(name, RetinaFaceConfig::named(name)?)))
            .or_else(|| Some(Self::group_sampling(name, GroupSamplingConfig::named(name)?)))
            .or_else(|| Some(Self::hambox(name, HamBoxConfig::named(name)?)))
            .or_else(|| Some(Self::refineface(name, RefineFaceConfig::named(name)?)))
            .or_else(|| Some(Self::hr(name, HrConfig::named(name)?)))
    }

    /// Reads the configuration of a model file.
    pub fn of(weights: &Weights) -> Result<Self> {
        Self::refuse_checkpoint(weights)?;
        let Some(json) = weights.metadata.get(METADATA_KEY) else {
            return Self::recognise(weights).ok_or_else(|| {
                Error::InvalidModel(format!(
                    "no \"{METADATA_KEY}\" entry in the metadata, and the tensors are of no public detector known here"
                ))
            });
        };
        #[derive(Deserialize)]
        struct Version {
            format_version: u32,
        }
        let bad =
            |e: serde_json::Error| Error::InvalidModel(format!("metadata entry \"{METADATA_KEY}\": {e}"));
        let version: Version = serde_json::from_str(json).map_err(bad)?;
        if version.format_version != FORMAT_VERSION {
            return Err(Error::InvalidModel(format!(
                "format version {} is not the version {FORMAT_VERSION} that this library reads",
                version.format_version
            )));
        }
        let config: Self = serde_json::from_str(json).map_err(bad)?;
        config.check()?;
        Ok(config)
    }

    /// Errors where the file is the checkpoint of a training, whatever configuration it is given.
    pub fn refuse_checkpoint(weights: &Weights) -> Result<()> {
        if weights.metadata.contains_key(CHECKPOINT_KEY) {
            return Err(Error::InvalidModel(
                "this is the checkpoint of a training; best.safetensors and final.safetensors beside it are models".into(),
            ));
        }
        Ok(())
    }

    /// The configuration of public weights, by their tensors' names.
    fn recognise(weights: &Weights) -> Option<Self> {
        let has = |name: &str| weights.tensors.contains_key(name);
        if !(has("ssh1.conv3X3.0.weight") && has("LandmarkHead.0.conv1x1.weight")) {
            return None;
        }
        if has("body.stage1.0.0.weight") {
            return Some(Self::retinaface_mobile025());
        }
        (has("body.conv1.weight") && has("body.layer3.5.conv3.weight"))
            .then(|| Self::retinaface("retinaface-r50", RetinaFaceConfig::on_resnet(ResNet::R50)))
    }

    fn check(&self) -> Result<()> {
        let bad = |what: &str| Err(Error::InvalidModel(format!("metadata entry \"{METADATA_KEY}\": {what}")));
        self.input.normalization()?;
        if !self.input.mean.iter().chain(&self.input.scale).all(|v| v.is_finite()) {
            return bad("input.mean and input.scale must be finite");
        }
        let unit = |v: f32| (0.0..=1.0).contains(&v);
        let overlaps = unit(self.nms_iou) && self.eval_nms_iou.is_none_or(unit);
        if !(unit(self.score_threshold) && unit(self.eval_score_threshold) && overlaps) {
            return bad("thresholds must lie in 0..1");
        }
        let scales =
            self.pyramid.is_none_or(|p| p.is_sane()) && self.eval_pyramid.is_none_or(|p| p.is_sane());
        if !scales {
            return bad("pyramid: exponents from -8 to 2, at most 25 of them, sizes from 1 to 10000");
        }
        // Work grows with their square where all boxes stay: a file must not ask for hours.
        if self.max_candidates == 0 || self.max_candidates > 50_000 {
            return bad("max_candidates must lie in 1..50000");
        }
        let [min, max] = self.detectable_px;
        if !(min > 0.0 && max >= min && max.is_finite()) {
            return bad("detectable_px must be 0 < smallest <= largest");
        }
        self.detector.check()
    }

    /// As the metadata entry.
    pub fn to_json(&self) -> Result<String> {
        serde_json::to_string(self).map_err(|e| Error::Internal(format!("model configuration: {e}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_models_own_scales_follow_the_picture() {
        let octaves = OwnPyramid::Octaves(Octaves { min: -2.0, max: 1.0, step: 1.0 });
        assert_eq!(octaves.scales([640.0, 480.0]), [2.0, 1.0, 0.5, 0.25]);
        // A face of 173 x 227 px on the smallest level is as wide as a picture of 1384 px at 1/8, as high as one of 908 at 1/4.
        let single = OwnPyramid::LargestFace { size: [173.0, 227.0] };
        let root = 2f64.sqrt();
        assert_eq!(single.scales([1384.0, 800.0]), [2.0, root, 1.0, 0.5, 0.25, 0.125]);
        assert_eq!(single.scales([100.0, 100.0]), [2.0, root, 1.0]);
    }

    #[test]
    fn a_pyramid_out_of_range_is_refused() {
        let with = |pyramid| ModelConfig { pyramid: Some(pyramid), ..ModelConfig::farface_nano() }.check();
        with(OwnPyramid::Octaves(Octaves { min: 0.0, max: 1.0, step: 0.5 })).unwrap();
        for [min, max, step] in
            [[-8.0, 2.0, 0.1], [0.0, 9.0, 1.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [f32::NAN, 1.0, 1.0]]
        {
            assert!(with(OwnPyramid::Octaves(Octaves { min, max, step })).is_err(), "{min} {max} {step}");
        }
        assert!(with(OwnPyramid::LargestFace { size: [0.0, 10.0] }).is_err());
    }
}
