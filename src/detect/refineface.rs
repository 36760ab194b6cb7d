//! RefineFace (Zhang et al. 2019): a single shot that looks twice. Its first step drops the anchors of fine levels that are
//! surely background and moves those of coarse levels; what the second step says counts for the anchors as the first left
//! them. The scale-aware margin and the feature supervision module are matters of training.

use super::anchors::{owned_cells, Anchor};
use super::detector::{logit, Detector, Map, Window};
use super::face::Face;
use crate::error::{Error, Result};
use crate::graph::{Builder, Graph};
use crate::nets::refineface::{refineface, RefineFace, LEVELS, STC_LEVELS, STR_LEVELS};
use crate::nets::resnet::ResNet;
use serde::{Deserialize, Serialize};

/// Settings of the network and its boxes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RefineFaceConfig {
    /// Backbone.
    pub backbone: ResNet,
    /// Channels of pyramid and subnets.
    pub channels: usize,
    /// Selective two-step regression.
    pub two_step_regression: bool,
    /// Selective two-step classification.
    pub two_step_classification: bool,
    /// Receptive field enhancement.
    pub receptive_field: bool,
    /// Square roots of the anchors' areas in strides.
    pub scales: Vec<f32>,
    /// Height of an anchor over its width.
    pub aspect: f32,
    /// A face's probability that an anchor must pass in the first step, where that classifies (section 3.2: 1 - theta).
    pub first_step_score: f32,
}

impl RefineFaceConfig {
    /// The baseline of table 1: RetinaNet with the anchors of section 3.6.
    pub fn baseline(backbone: ResNet) -> Self {
        Self {
            backbone,
            channels: 256,
            two_step_regression: false,
            two_step_classification: false,
            receptive_field: false,
            scales: vec![2.0, 8f32.sqrt()],
            aspect: 1.25,
            first_step_score: 0.01,
        }
    }

    /// By name: `refineface`, its switches, then `-r18`, `-r34`, `-r50`, `-r101` or `-r152`. Switches, in this order: `-str`,
    /// `-stc`, `-rfe`. `refineface-r50`, without any, has all three, `refineface-baseline-r50` none.
    pub fn named(name: &str) -> Option<Self> {
        let (name, backbone) = ResNet::split_name(name)?;
        let mut switches = match name.strip_prefix("refineface")? {
            "" => "-str-stc-rfe",
            "-baseline" => return Some(Self::baseline(backbone)),
            "-" => return None,
            some => some,
        };
        let mut take = |switch: &str| match switches.strip_prefix(switch) {
            Some(rest) => {
                switches = rest;
                true
            }
            None => false,
        };
        let [two_step_regression, two_step_classification, receptive_field] =
            ["-str", "-stc", "-rfe"].map(&mut take);
        let config = Self::baseline(backbone);
        switches.is_empty().then_some(Self {
            two_step_regression,
            two_step_classification,
            receptive_field,
            ..config
        })
    }

    pub(super) fn check(&self) -> Result<()> {
        let bad = |what: &str| Err(Error::InvalidModel(format!("detector refineface: {what}")));
        let sane = |n: usize, most: usize| n > 0 && n <= most;
        let backbone = sane(self.backbone.width, 256) && self.backbone.blocks.iter().all(|&n| sane(n, 100));
        if !(sane(self.channels, 1024) && self.channels.is_multiple_of(4) && backbone) {
            return bad(
                "channels a multiple of 4 up to 1024, backbone.width 1..256, backbone.blocks 1..100 each",
            );
        }
        let sizes = self.scales.iter().chain([&self.aspect]).all(|v| v.is_finite() && *v > 0.0);
        if !(sane(self.scales.len(), 16) && sizes && (0.0..=1.0).contains(&self.first_step_score)) {
            return bad("1 to 16 scales above 0, aspect above 0, first_step_score from 0 to 1");
        }
        Ok(())
    }

    /// Width and height of the anchors on a level of this stride, pixels.
    pub fn anchors(&self, stride: usize) -> Vec<[f32; 2]> {
        let root = self.aspect.sqrt();
        self.scales.iter().map(|s| s * stride as f32).map(|side| [side / root, side * root]).collect()
    }

    /// Whether the first step has an output for this level.
    fn asked(&self, level: usize) -> bool {
        self.two_step_classification && STC_LEVELS.contains(&level)
            || self.two_step_regression && STR_LEVELS.contains(&level)
    }
}

impl Detector for RefineFaceConfig {
    /// From level 2 of stride 4 to 7 of stride 128: of the first step `class{l}.1` (two-step classification) or `box{l}.1`
    /// (two-step regression), then `class{l}`, a logit an anchor, and `box{l}`, four offsets.
    fn graph(&self) -> Graph {
        let mut b = Builder::new();
        let image = b.input("image", 3);
        let &Self {
            backbone, channels, two_step_regression, two_step_classification, receptive_field, ..
        } = self;
        let anchors = self.scales.len();
        let net = RefineFace {
            backbone,
            channels,
            anchors,
            two_step_regression,
            two_step_classification,
            receptive_field,
        };
        refineface(&mut b, image, &net);
        b.finish()
    }

    fn decode(&self, maps: &[Map<'_>], window: &Window, threshold: f32, sink: &mut dyn FnMut(Face)) {
        let least = logit(threshold);
        let survives = logit(self.first_step_score);
        let (first, second) = maps.split_at(LEVELS.filter(|&l| self.asked(l)).count());
        let mut first = first.iter();
        for (maps, level) in second.chunks_exact(2).zip(LEVELS) {
            let [class, boxes] = [&maps[0], &maps[1]];
            let before = if self.asked(level) { first.next() } else { None };
            let (filter, mover) = if STC_LEVELS.contains(&level) { (before, None) } else { (None, before) };
            let stride = 1 << level;
            let anchors = self.anchors(stride);
            for y in owned_cells(&window.owned_y, stride, class.height()) {
                for x in owned_cells(&window.owned_x, stride, class.width()) {
                    for (a, (&logit, &size)) in class.pixel(y, x).iter().zip(&anchors).enumerate() {
                        // False for a NaN too.
                        let face = logit > least && filter.is_none_or(|map| map.pixel(y, x)[a] > survives);
                        if !face {
                            continue;
                        }
                        let mut anchor = Anchor::on_cell(y, x, stride, size);
                        if let Some(map) = mover {
                            anchor = anchor.moved(&map.pixel(y, x)[4 * a..], [1.0; 2]);
                        }
                        let bbox = anchor.decode(&boxes.pixel(y, x)[4 * a..], [1.0; 2]);
                        sink(Face { bbox, score: 1.0 / (1.0 + (-logit).exp()), ..Face::default() });
                    }
                }
            }
        }
    }
}
