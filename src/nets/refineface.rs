//! The network of RefineFace (Zhang et al. 2019, figure 3): RetinaNet on a ResNet's pyramid, asked twice. The first step looks at
//! the backbone's own levels: it drops anchors of the fine ones (selective two-step classification, STC) and moves those of
//! the coarse ones (selective two-step regression, STR); the second looks at the pyramid. The same two subnets serve both.
//!
//! ```text
//! image -> C2   C3   C4   C5   C6   C7     first step: 1x1 each; class of 2 to 4, boxes of 5 to 7
//!          |    |    |    |                C6, C7: 3x3, stride 2, ReLU
//!          P2 <-P3 <-P4 <-P5 -> P6 -> P7   second step: class and boxes of all; P6, P7: 3x3, stride 2
//!
//! subnet:  3x3, ReLU -> RFE -> 3x3, ReLU -> 1x1           (without RFE: two 3x3, ReLU in its place)
//! RFE:     x + 1x1(1x5 | 5x1 | 1x3 | 3x1)                 (section 3.5, each between 1x1, all with ReLU)
//! ```
//!
//! While it is trained it may have the feature supervision module, too (FSM, section 3.4): RoIAlign on the levels of the pyramid,
//! and on each box's features
//!
//! ```text
//! FSM:     3x3, ReLU, three times -> 3x3 -> mean over the bins
//! ```

use super::conv_relu;
use super::fpn::fpn_sums;
use super::resnet::{resnet, Block, ResNet};
use super::ssh::ssh;
use crate::graph::{Builder, NodeId};
use crate::layers::{Activation, Conv2d, Interpolation, RoiAlign};
use std::ops::RangeInclusive;

/// Levels; level `l` has stride 2^l.
pub const LEVELS: RangeInclusive<usize> = 2..=7;
/// What the first step says of a level.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FirstStep {
    /// A logit an anchor, below which the second step does not see it (two-step classification, section 3.2).
    Classes,
    /// Offsets that move each anchor for the second step (two-step regression, section 3.1).
    Boxes,
}

/// What the first step says of `level`, where it says anything, with these modules: STC on the three fine levels, STR on the
/// three coarse ones.
pub fn first_step(
    level: usize,
    two_step_classification: bool,
    two_step_regression: bool,
) -> Option<FirstStep> {
    match level {
        2..=4 if two_step_classification => Some(FirstStep::Classes),
        5..=7 if two_step_regression => Some(FirstStep::Boxes),
        _ => None,
    }
}

/// Sizes and modules of the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RefineFace {
    /// Backbone.
    pub backbone: ResNet,
    /// Channels of pyramid and subnets.
    pub channels: usize,
    /// Anchors a cell.
    pub anchors: usize,
    /// Selective two-step regression.
    pub two_step_regression: bool,
    /// Selective two-step classification.
    pub two_step_classification: bool,
    /// Receptive field enhancement in the subnets.
    pub receptive_field: bool,
    /// SSH context on every level that the second step looks at; not the paper's.
    pub context: bool,
}

/// Bins of the feature supervision module, down and across (section 3.4, table 7).
const SUPERVISED_BINS: usize = 5;
/// Its convolutions in front of the prediction.
const SUPERVISED_DEPTH: usize = 3;

/// The network on `image` (3 channels). Outputs, from level 2 to 7: of the first step `class{l}.1`, a logit an anchor (STC), or
/// `box{l}.1`, four offsets (STR); then of the second `class{l}` and `box{l}` of every level. The backbone's parameters have
/// torchvision's names; those of the others begin with `first.`, `fpn.`, `context{2..7}.`, `class.` and `box.`.
///
/// Returns the pyramid's levels.
pub fn refineface(b: &mut Builder, image: NodeId, net: &RefineFace) -> Vec<NodeId> {
    let features = resnet(b, image, &net.backbone);
    let c = net.channels;
    if net.two_step_classification || net.two_step_regression {
        let maps = b.scope("first", |b| first_maps(b, &features, net));
        for (level, step, x) in maps {
            let (output, values) = match step {
                FirstStep::Classes => ("class", 1),
                FirstStep::Boxes => ("box", 4),
            };
            let out = subnet(b, output, x, net, values);
            b.output(&format!("{output}{level}.1"), out);
        }
    }
    let pyramid = b.scope("fpn", |b| {
        let from = net.backbone.channels();
        let sums = fpn_sums(b, &features, &from, c, Interpolation::Bilinear, [2, 5]);
        let coarsest = sums[3];
        let conv = Conv2d::new(c, c, 3).bias();
        let mut levels: Vec<NodeId> =
            (2..).zip(sums).map(|(level, x)| b.conv(&format!("output{level}"), x, conv)).collect();
        let p6 = b.conv("down6", coarsest, conv.stride(2));
        levels.extend([p6, b.conv("down7", p6, conv.stride(2))]);
        levels
    });
    let with_context = |(level, p)| {
        if net.context {
            ssh(b, &format!("context{level}"), p, c, c, Activation::Relu)
        } else {
            p
        }
    };
    let pyramid: Vec<NodeId> = LEVELS.zip(pyramid).map(with_context).collect();
    for (level, &p) in LEVELS.zip(&pyramid) {
        for (output, values) in [("class", 1), ("box", 4)] {
            let out = subnet(b, output, p, net, values);
            b.output(&format!("{output}{level}"), out);
        }
    }
    pyramid
}

/// The feature supervision module on the levels of the `pyramid`, of so many channels: inputs `boxes{l}`, as RoIAlign takes
/// them, and outputs `supervised{l}`, a logit a box. Its parameters' names begin with `supervised.`; all levels share them. The
/// text counts four 3x3 convolutions in one place and three and a prediction in another: so the prediction is the fourth.
pub fn feature_supervision(b: &mut Builder, pyramid: &[NodeId], channels: usize) {
    for (level, &p) in LEVELS.zip(pyramid) {
        let boxes = b.input(&format!("boxes{level}"), 5);
        let align = RoiAlign {
            output: [SUPERVISED_BINS; 2],
            spatial_scale: 1.0 / (1 << level) as f32,
            sampling_ratio: 2,
            aligned: true,
        };
        let mut x = b.roi_align(p, boxes, align);
        let three = Conv2d::new(channels, channels, 3);
        let logits = b.scope("supervised", |b| {
            for i in 0..SUPERVISED_DEPTH {
                x = conv_relu(b, &format!("conv{i}"), x, three);
            }
            b.conv("predict", x, Conv2d::new(channels, 1, 3).bias())
        });
        let out = b.global_avg_pool(logits);
        b.output(&format!("supervised{level}"), out);
    }
}

/// The levels that the first step looks at, each with its number and what it is asked.
fn first_maps(b: &mut Builder, features: &[NodeId; 4], net: &RefineFace) -> Vec<(usize, FirstStep, NodeId)> {
    let c = net.channels;
    let mut maps: Vec<(NodeId, usize)> = features.iter().copied().zip(net.backbone.channels()).collect();
    if net.two_step_regression {
        // 1,024 channels on bottlenecks, 512 on basic blocks, 256.
        let wide = net.backbone.width * if net.backbone.block == Block::Bottleneck { 16 } else { 8 };
        for (level, channels) in [(6, wide), (7, c)] {
            let (x, from) = maps[maps.len() - 1];
            let down = Conv2d::new(from, channels, 3).stride(2);
            maps.push((conv_relu(b, &format!("down{level}"), x, down), channels));
        }
    }
    let mut asked = Vec::new();
    for (level, (x, from)) in LEVELS.zip(maps) {
        if let Some(step) = first_step(level, net.two_step_classification, net.two_step_regression) {
            let conv = Conv2d::new(from, c, 1).bias();
            asked.push((level, step, b.conv(&format!("lateral{level}"), x, conv)));
        }
    }
    asked
}

/// The subnet `name` on one map, to `values` an anchor. Asked again it has the same parameters.
fn subnet(b: &mut Builder, name: &str, x: NodeId, net: &RefineFace, values: usize) -> NodeId {
    let c = net.channels;
    let three = Conv2d::new(c, c, 3);
    b.scope(name, |b| {
        let mut x = conv_relu(b, "conv0", x, three);
        if net.receptive_field {
            x = b.scope("rfe", |b| receptive_field_enhancement(b, x, c));
        } else {
            x = conv_relu(b, "conv1", x, three);
            x = conv_relu(b, "conv2", x, three);
        }
        x = conv_relu(b, "conv3", x, three);
        b.conv("predict", x, Conv2d::new(c, net.anchors * values, 1).bias())
    })
}

/// RFE (section 3.5, figure 7): windows of four shapes beside the square one.
fn receptive_field_enhancement(b: &mut Builder, x: NodeId, channels: usize) -> NodeId {
    let quarter = channels / 4;
    let branches = [[1, 5], [5, 1], [1, 3], [3, 1]].map(|[kh, kw]| {
        b.scope(&format!("{kh}x{kw}"), |b| {
            let y = conv_relu(b, "reduce", x, Conv2d::new(channels, quarter, 1));
            let y = conv_relu(b, "window", y, Conv2d::rect(quarter, quarter, kh, kw));
            conv_relu(b, "expand", y, Conv2d::new(quarter, quarter, 1))
        })
    });
    let all = b.concat(&branches);
    let y = conv_relu(b, "merge", all, Conv2d::new(channels, channels, 1));
    b.add(x, y)
}
