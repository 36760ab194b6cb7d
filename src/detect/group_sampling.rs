//! The detectors of Group Sampling (Ming et al. 2019): the region proposal network's head on a pyramid of a ResNet, four
//! square anchors, softmax scores; where wanted with a second stage, Grouped Fast R-CNN, that looks at every box again. What they
//! are about, how anchors and proposals are sampled in training, is in `train::sampler`.

use super::anchors::{decode_level, LevelAnchors};
#[cfg(feature = "train")]
use super::detector::redraw;
use super::detector::{Detector, Map, Role, SecondStage, Window};
use super::face::Face;
use super::heads::{Field, Head};
use crate::error::{Error, Result};
use crate::graph::{Builder, Graph, NodeId};
use crate::nets::group_sampling::{fast_rcnn, group_sampling, GroupSampling, Tiling, SECOND_STAGE_ALIGN};
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
    /// The second stage; none without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub second_stage: Option<SecondStageConfig>,
}

/// Settings of Grouped Fast R-CNN (section 4.2).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct SecondStageConfig {
    /// Width of its two fully connected layers.
    pub width: usize,
    /// First-stage score that a box must pass to be looked at again.
    pub proposal_score: f32,
    /// Best so many boxes of a run of the first network (a picture's level, or a tile of it) that are looked at again.
    pub max_proposals: usize,
}

impl Default for SecondStageConfig {
    /// As wide as usual (Faster R-CNN on a pyramid, Lin et al. 2017). The score and the number are ours: the paper keeps 50,000
    /// boxes of all levels together, which is beyond what a CPU looks at twice.
    fn default() -> Self {
        Self { width: 1024, proposal_score: 0.05, max_proposals: 4000 }
    }
}

/// Variances of the second stage's box code (Faster R-CNN's usual normalisation of its targets).
pub const SECOND_STAGE_VARIANCES: [f32; 2] = [0.1, 0.2];

/// How far a proposal may reach from its cell's centre along an axis, in sides of the largest anchor: it is cut there, so that it
/// lies in every tile that has its cell. A face of one and a half such sides, the largest to be found, may so be off its anchor by
/// half a side.
const PROPOSAL_REACH: f32 = 1.25;

/// Most anchors of a cell.
const MAX_SCALES: usize = 16;
/// Dilations of the head in figure 5, a scale each.
const DILATIONS: [usize; 4] = [1, 2, 4, 8];

impl GroupSamplingConfig {
    /// The paper's on a backbone: scales 16 to 128; channels 256, or 128 on ResNet-18 and 34, where the multiply-adds of
    /// table 10 ask for them.
    pub fn new(tiling: Tiling, backbone: ResNet) -> Self {
        let channels = if backbone.channels()[3] > 512 { 256 } else { 128 };
        Self {
            backbone,
            channels,
            tiling,
            scales: vec![16.0, 32.0, 64.0, 128.0],
            dilations: vec![],
            second_stage: None,
        }
    }

    /// With the head of figure 5: a dilated branch a scale ("DC").
    pub fn dilated(self) -> Self {
        Self { dilations: DILATIONS.to_vec(), ..self }
    }

    /// With a second stage of the usual settings.
    pub fn with_second_stage(self) -> Self {
        Self { second_stage: Some(SecondStageConfig::default()), ..self }
    }

    /// By name: `rpn`, `fpn`, `fpn-finest`, `fpn-finest-stride`, `fpn-p3` or `fpn-p4`, `-dc` for the dilated head, `-rcnn` for a
    /// second stage (with P2 alone: `fpn`, `fpn-finest`, `fpn-finest-stride`), then `-r18`, `-r34`, `-r50`, `-r101` or `-r152`.
    pub fn named(name: &str) -> Option<Self> {
        let (name, backbone) = ResNet::split_name(name)?;
        let (name, second) = name.strip_suffix("-rcnn").map_or((name, false), |name| (name, true));
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
        let config = if second { config.with_second_stage() } else { config };
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
        let Some(second) = &self.second_stage else { return Ok(()) };
        if matches!(self.tiling, Tiling::Rpn | Tiling::FpnSingle(3..)) {
            return bad("a second stage is for tilings with P2: fpn, fpn-finest, fpn-finest-stride");
        }
        if self.scales.iter().any(|s| *s > 4096.0) {
            return bad("with a second stage scales up to 4096: tiles overlap by more than the largest");
        }
        let score = (0.0..1.0).contains(&second.proposal_score);
        if !(sane(second.width, 4096) && score && sane(second.max_proposals, 50_000)) {
            return bad(
                "second_stage: width 1..4096, proposal_score from 0 to below 1, max_proposals 1..50000",
            );
        }
        Ok(())
    }

    /// Starts the predictions of new weights with a deviation of 0.01 (Faster R-CNN, Ren et al. 2015, section 3.1.3), so that
    /// the first boxes are near their anchors: the IoU losses have no gradient where nothing overlaps; likewise the second
    /// stage's, its boxes with 0.001 (Fast R-CNN, Girshick 2015, section 2.3). `is_new` tells by name which tensors do not come
    /// from a start.
    #[cfg(feature = "train")]
    pub fn start_new(&self, weights: &mut crate::graph::Weights, is_new: impl Fn(&str) -> bool) {
        for (name, w) in &mut weights.tensors {
            let (class, boxes) = (name.ends_with("class.weight"), name.ends_with("box.weight"));
            let second = name.starts_with("second.");
            if !((class || boxes) && (second || name.starts_with("head.")) && is_new(name)) {
                continue;
            }
            redraw(&mut w.data, w.shape[1], if second && boxes { 0.001 } else { 0.01 });
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

    /// The first network, and the map that the second stage looks at.
    fn network(&self) -> (Builder, NodeId) {
        let mut b = Builder::new();
        let image = b.input("image", 3);
        let net = GroupSampling {
            backbone: self.backbone,
            channels: self.channels,
            tiling: self.tiling,
            scales: self.scales.len(),
            dilations: self.dilations.clone(),
        };
        let finest = group_sampling(&mut b, image, &net);
        (b, finest)
    }

    /// Both stages in one network, as it is trained: an input `boxes` between them, as RoIAlign takes them, and the second stage's
    /// outputs behind those of the first.
    #[cfg(feature = "train")]
    pub fn training_graph(&self) -> Graph {
        let (mut b, finest) = self.network();
        if let Some(second) = &self.second_stage {
            let boxes = b.input("boxes", 5);
            let rois = b.roi_align(finest, boxes, SECOND_STAGE_ALIGN);
            fast_rcnn(&mut b, rois, self.channels, second.width);
        }
        b.finish()
    }

    /// How far from its cell's centre a proposal reaches, pixels; None without a second stage.
    pub(crate) fn proposal_reach(&self) -> Option<f32> {
        self.second_stage.as_ref()?;
        Some(PROPOSAL_REACH * self.scales.iter().fold(0.0, |most, s| s.max(most)))
    }
}

impl Detector for GroupSamplingConfig {
    /// For each of [`GroupSamplingConfig::levels`] `class{i}`, two logits an anchor (background, face), and `box{i}`; with a
    /// second stage P2 last, `features`.
    fn graph(&self) -> Graph {
        let (mut b, finest) = self.network();
        if self.second_stage.is_some() {
            b.output("features", finest);
        }
        b.finish()
    }

    fn second_stage(&self) -> Option<SecondStage> {
        let config = self.second_stage.as_ref()?;
        let mut b = Builder::new();
        let rois = b.input("rois", self.channels);
        fast_rcnn(&mut b, rois, self.channels, config.width);
        // Samples lie in the box, and the cells around them one away; half a pixel of RoIAlign's, and rounding.
        let reach = self.proposal_reach()?.ceil() as usize + 8;
        Some(SecondStage {
            graph: b.finish(),
            align: SECOND_STAGE_ALIGN,
            variances: SECOND_STAGE_VARIANCES,
            proposal_score: config.proposal_score,
            max_proposals: config.max_proposals,
            reach,
        })
    }

    fn roles(&self) -> Vec<Role> {
        self.levels().flat_map(|(_, sides)| [Role::of(sides.iter().map(|&side| [side; 2])); 2]).collect()
    }

    fn heads(&self, _scale: f32) -> Vec<Head> {
        let head = |(level, (stride, sides)): (usize, (usize, &[f32]))| {
            let (sizes, logits) = (sides.iter().map(|&side| [side; 2]), Field::whole(2 * level, 2));
            let reach = self.proposal_reach();
            Head { pair: true, reach, ..Head::new(stride, sizes, logits, Field::whole(2 * level + 1, 4)) }
        };
        self.levels().enumerate().map(head).collect()
    }

    fn decode(&self, maps: &[Map<'_>], window: &Window, threshold: f32, sink: &mut dyn FnMut(Face)) {
        for (maps, (stride, scales)) in maps.chunks_exact(2).zip(self.levels()) {
            let mut sizes = [[0.0; 2]; MAX_SCALES];
            sizes.iter_mut().zip(scales).for_each(|(size, &s)| *size = [s, s]);
            let (sizes, reach) = (&sizes[..scales.len()], self.proposal_reach());
            let anchors = LevelAnchors { stride, sizes, variances: [1.0; 2], reach };
            decode_level([&maps[0], &maps[1]], &anchors, window, threshold, sink);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::View;
    use crate::detect::BBox;
    use crate::shape::Shape;

    #[test]
    fn a_proposal_reaches_no_further_than_tiles_overlap() {
        let named = |name: &str| GroupSamplingConfig::named(name).unwrap();
        let [one, two] = ["fpn-finest-r18", "fpn-finest-rcnn-r18"].map(named);
        assert_eq!(GroupSamplingConfig { second_stage: None, ..two.clone() }, one);
        let [class, boxes] = [8, 16].map(|c| View::new(Shape::new(1, c, 3, 5), 0, [0; 4]));
        // On cell (1, 2), whose centre is at (10, 6), the largest anchor's face: e^2 times as wide, twice moved by its height.
        let (mut logits, mut offsets) = (vec![0.0; class.shape.len()], vec![0.0; boxes.shape.len()]);
        logits[class.at(0, 1, 2) + 7] = 3.0;
        offsets[boxes.at(0, 1, 2) + 12..][..4].copy_from_slice(&[0.0, 2.0, 2.0, 0.0]);
        let faces = |config: &GroupSamplingConfig| {
            let maps = [Map::new(&logits, class), Map::new(&offsets, boxes)];
            let mut faces = Vec::new();
            config.decode(&maps, &Window::whole(), 0.6, &mut |face| faces.push(face.bbox));
            faces
        };
        let half = 64.0 * 2f32.exp();
        assert_eq!(faces(&one), [BBox::new(10.0 - half, 198.0, 10.0 + half, 326.0)]);
        // Cut at 160 px: what is left of it has no height.
        let [cut] = faces(&two)[..] else { panic!("one proposal") };
        assert_eq!(cut, BBox::new(-150.0, 198.0, 170.0, 166.0));
        let reach = two.second_stage().unwrap().reach;
        // The farthest sample reads the next cell, too.
        assert!(reach as f32 >= 160.0 + 2.0 + 4.0 + 0.5, "{reach}");
    }

    #[test]
    fn second_stages_that_no_detector_can_have_are_refused() {
        let config = GroupSamplingConfig::named("fpn-finest-rcnn-r50").unwrap();
        let usual = SecondStageConfig::default();
        assert!(config.check().is_ok() && config.second_stage == Some(usual));
        for second in [
            SecondStageConfig { width: 0, ..usual },
            SecondStageConfig { proposal_score: 1.0, ..usual },
            SecondStageConfig { proposal_score: f32::NAN, ..usual },
            SecondStageConfig { max_proposals: 0, ..usual },
            SecondStageConfig { max_proposals: 60_000, ..usual },
        ] {
            let error =
                GroupSamplingConfig { second_stage: Some(second), ..config.clone() }.check().unwrap_err();
            assert!(error.to_string().contains("second_stage"), "{error}");
        }
        let error = GroupSamplingConfig { scales: vec![1e30], ..config.clone() }.check().unwrap_err();
        assert!(error.to_string().contains("up to 4096"), "{error}");
        for tiling in [Tiling::Rpn, Tiling::FpnSingle(3)] {
            let error = GroupSamplingConfig { tiling, ..config.clone() }.check().unwrap_err();
            assert!(error.to_string().contains("tilings with P2"), "{error}");
        }
    }
}
