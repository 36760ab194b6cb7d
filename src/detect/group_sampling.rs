//! The detectors of Group Sampling (Ming et al. 2019): the region proposal network's head on a pyramid of a ResNet, four
//! square anchors, softmax scores. What they are about, how anchors are sampled in training, is in `train::sampler`.

use super::anchors::{decode_level, LevelAnchors};
use super::detector::{Detector, Map, Window};
use super::face::Face;
use crate::error::{Error, Result};
use crate::graph::{Builder, Graph};
use crate::nets::group_sampling::{group_sampling, GroupSampling, Tiling};
use crate::nets::resnet::ResNet;
use serde::{Deserialize, Serialize};

/// Settings of the network and its boxes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GroupSamplingConfig {
    /// Backbone.
    pub backbone: ResNet,
    /// Channels of the pyramid and of the head.
    pub channels: usize,
    /// Where the anchors stand.
    pub tiling: Tiling,
    /// Sides of the anchors in pixels, rising.
    pub scales: Vec<f32>,
    /// Dilation of each scale's own branch of the head; without branches where it is empty.
    #[serde(default)]
    pub dilations: Vec<usize>,
}

/// Dilations of the head in figure 5, a scale each.
const DILATIONS: [usize; 4] = [1, 2, 4, 8];

/// Most scales.
const MAX_SCALES: usize = 16;

impl GroupSamplingConfig {
    /// The paper's on a backbone: scales 16 to 128; channels 256, or 128 on ResNet-18 and 34, where the multiply-adds of
    /// table 10 ask for them.
    pub fn new(tiling: Tiling, backbone: ResNet) -> Self {
        let channels = if backbone.channels()[3] > 512 { 256 } else { 128 };
        Self { backbone, channels, tiling, scales: vec![16.0, 32.0, 64.0, 128.0], dilations: vec![] }
    }

    /// With the head of figure 5: a dilated branch a scale ("DC").
    pub fn dilated(self) -> Self {
        Self { dilations: DILATIONS.to_vec(), ..self }
    }

    /// By name: `rpn`, `fpn`, `fpn-finest`, `fpn-finest-stride`, `fpn-p3` or `fpn-p4`, `-dc` for the dilated head, then
    /// `-r18`, `-r34`, `-r50`, `-r101` or `-r152`.
    pub fn named(name: &str) -> Option<Self> {
        let (name, backbone) = ResNet::split_name(name)?;
        let (name, dilated) = name.strip_suffix("-dc").map_or((name, false), |name| (name, true));
        let tiling = match name {
            "rpn" => Tiling::Rpn,
            "fpn" => Tiling::Fpn,
            "fpn-finest" => Tiling::FpnFinest,
            "fpn-finest-stride" => Tiling::FpnFinestStride,
            "fpn-p3" => Tiling::FpnSingle(3),
            "fpn-p4" => Tiling::FpnSingle(4),
            _ => return None,
        };
        let config = Self::new(tiling, backbone);
        let config = if dilated { config.dilated() } else { config };
        config.check().is_ok().then_some(config)
    }

    pub(super) fn check(&self) -> Result<()> {
        let bad = |what: &str| Err(Error::InvalidModel(format!("detector group-sampling: {what}")));
        let sane = |n: usize, most: usize| n > 0 && n <= most;
        if !(sane(self.channels, 1024) && self.backbone.is_sane()) {
            return bad("channels 1..1024, backbone.width 1..256, backbone.blocks 1..100 each");
        }
        if !(sane(self.scales.len(), MAX_SCALES) && self.scales.iter().all(|s| s.is_finite() && *s > 0.0)) {
            return bad("1 to 16 scales above 0");
        }
        let several = matches!(self.tiling, Tiling::Fpn | Tiling::FpnFinestStride);
        if several && self.scales.len() != 4 {
            return bad("this tiling has four scales");
        }
        if matches!(self.tiling, Tiling::FpnSingle(level) if !(2..=5).contains(&level)) {
            return bad("tiling fpn-single is on one of the levels 2 to 5");
        }
        let fits = !several && self.dilations.len() == self.scales.len();
        if !(self.dilations.is_empty() || (fits && self.dilations.iter().all(|&d| sane(d, 64)))) {
            return bad("dilations are for tilings on one map, one of 1 to 64 for each scale");
        }
        Ok(())
    }

    /// Starts the predictions of new weights with a deviation of 0.01 (Faster R-CNN, Ren et al. 2015, section 3.1.3), so that
    /// the first boxes are near their anchors: the IoU losses have no gradient where nothing overlaps. `is_new` tells by
    /// name which tensors do not come from a start.
    #[cfg(feature = "train")]
    pub fn set_prior(&self, weights: &mut crate::graph::Weights, is_new: impl Fn(&str) -> bool) {
        let he = (2.0 / self.channels as f32).sqrt();
        for (name, w) in &mut weights.tensors {
            let predicts = name.ends_with("class.weight") || name.ends_with("box.weight");
            if name.starts_with("head.") && predicts && is_new(name) {
                w.data.iter_mut().for_each(|v| *v *= 0.01 / he);
            }
        }
    }

    /// Stride and anchors of every pair of outputs.
    pub fn levels(&self) -> impl Iterator<Item = (usize, &[f32])> + '_ {
        let (finest, several) = match self.tiling {
            Tiling::Fpn | Tiling::FpnFinestStride => (4, true),
            Tiling::FpnFinest => (4, false),
            Tiling::FpnSingle(level) => (1 << level, false),
            Tiling::Rpn => (16, false),
        };
        let alone = several || !self.dilations.is_empty();
        let together = if alone { 1 } else { self.scales.len() };
        let stride = move |i: usize| if several { finest << i } else { finest };
        self.scales.chunks(together).enumerate().map(move |(i, scales)| (stride(i), scales))
    }
}

impl Detector for GroupSamplingConfig {
    /// For each of [`GroupSamplingConfig::levels`] `class{i}`, two logits an anchor (background, face), and `box{i}`.
    fn graph(&self) -> Graph {
        let mut b = Builder::new();
        let image = b.input("image", 3);
        let net = GroupSampling {
            backbone: self.backbone,
            channels: self.channels,
            tiling: self.tiling,
            scales: self.scales.len(),
            dilations: self.dilations.clone(),
        };
        group_sampling(&mut b, image, &net);
        b.finish()
    }

    fn decode(&self, maps: &[Map<'_>], window: &Window, threshold: f32, sink: &mut dyn FnMut(Face)) {
        for (maps, (stride, scales)) in maps.chunks_exact(2).zip(self.levels()) {
            let mut sizes = [[0.0; 2]; MAX_SCALES];
            sizes.iter_mut().zip(scales).for_each(|(size, &s)| *size = [s, s]);
            let anchors = LevelAnchors { stride, sizes: &sizes[..scales.len()], variances: [1.0; 2] };
            decode_level([&maps[0], &maps[1]], &anchors, window, threshold, sink);
        }
    }
}
