//! The network of HAMBox (Liu et al. 2020): a ResNet, six pyramid levels of stride 4 to 128, and RetinaNet's heads (Lin et al.
//! 2017), shared by the levels, with one anchor a cell.
//!
//! ```text
//! image -> C2 -> C3 -> C4 -> C5 -> C6 -> C7        C6, C7: 3x3, stride 2, ReLU
//!          |     |     |     |     |     |         1x1 to `channels`
//!          +  <- +  <- +  <- +  (<- +  <- +)       bilinear enlargement, sum; from C7 down with Lin's pyramid alone
//!          |     |     |     |     |     |         3x3
//!          P2    P3    P4    P5    P6    P7        then, where wanted, a context module each
//!          class and box ...                       where deep, four 3x3 each; 3x3 to the outputs
//! ```
//!
//! While it is trained it may have pyramid anchors, too (PyramidBox, Tang et al. 2018; "PA" of table 4): from
//! level 2 + k on, predictions of their own for what is 2^k times as large as a face and around it, head and body.

use super::conv_relu;
use super::fpn::fpn_sums;
use super::resnet::{resnet, ResNet};
use super::ssh::ssh;
use crate::graph::{Builder, NodeId};
use crate::layers::{Activation, Conv2d, Interpolation};
use serde::{Deserialize, Serialize};
use std::ops::RangeInclusive;

/// Levels; level `l` has stride 2^l.
pub const LEVELS: RangeInclusive<usize> = 2..=7;

/// Where the top-down path of the pyramid begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TopDown {
    /// At C5: P6 and P7 stand alone (PyramidBox's low-level pyramid, Tang et al. 2018), since what they see of
    /// large windows disturbs small faces.
    Lfpn,
    /// At C7 (Lin et al. 2017).
    Fpn,
}

impl TopDown {
    fn from(self) -> usize {
        match self {
            TopDown::Lfpn => 5,
            TopDown::Fpn => 7,
        }
    }
}

/// Sizes of the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HamBox {
    /// Backbone.
    pub backbone: ResNet,
    /// Channels of pyramid and heads.
    pub channels: usize,
    /// Where the top-down path begins.
    pub top_down: TopDown,
    /// SSH's context module on every level ("SSH" of table 4).
    pub context: bool,
    /// Four 3x3 convolutions in front of each prediction ("DH").
    pub deep_head: bool,
}

/// Convolutions of a deep head (Lin et al. 2017, "Focal Loss for Dense Object Detection", section 4).
const DEPTH: usize = 4;

/// The network on `image` (3 channels). Outputs, for each of [`LEVELS`]: `class{l}`, a logit a cell, and `box{l}`, four
/// offsets; then, for each of the `pyramid_anchors` k from 1 on and each level from 2 + k on, `class{l}.{k}` and
/// `box{l}.{k}`. The backbone's parameters have torchvision's names; the others begin with `fpn.`, `context{l}.`, `class.`
/// and `box.`, the pyramid anchors' with `class.predict{k}.` and `box.predict{k}.`.
pub fn hambox(b: &mut Builder, image: NodeId, net: &HamBox, pyramid_anchors: usize) {
    let levels = pyramid(b, image, net);
    let c = net.channels;
    let mut around = vec![Vec::new(); pyramid_anchors];
    for (level, mut p) in LEVELS.zip(levels) {
        if net.context {
            p = ssh(b, &format!("context{level}"), p, c, c, Activation::Relu);
        }
        for (output, values) in [("class", 1), ("box", 4)] {
            let predict = |b: &mut Builder, name: &str, x| b.conv(name, x, Conv2d::new(c, values, 3).bias());
            b.scope(output, |b| {
                let x = if net.deep_head { deep_head(b, p, c) } else { p };
                let out = predict(b, "predict", x);
                b.output(&format!("{output}{level}"), out);
                for (k, around) in (1..).zip(&mut around) {
                    if level >= LEVELS.start() + k {
                        around.push((format!("{output}{level}.{k}"), predict(b, &format!("predict{k}"), x)));
                    }
                }
            });
        }
    }
    around.into_iter().flatten().for_each(|(name, out)| b.output(&name, out));
}

/// P2 to P7.
fn pyramid(b: &mut Builder, image: NodeId, net: &HamBox) -> Vec<NodeId> {
    let mut features = resnet(b, image, &net.backbone).to_vec();
    let mut from = net.backbone.channels().to_vec();
    let c = net.channels;
    b.scope("fpn", |b| {
        for level in [6, 7] {
            let down = Conv2d::new(from[from.len() - 1], c, 3).stride(2);
            features.push(conv_relu(b, &format!("down{level}"), features[features.len() - 1], down));
            from.push(c);
        }
        let (finest, top) = (*LEVELS.start(), net.top_down.from());
        let sums = fpn_sums(b, &features, &from, c, Interpolation::Bilinear, [finest, top]);
        let output = |(level, p)| b.conv(&format!("output{level}"), p, Conv2d::new(c, c, 3).bias());
        LEVELS.zip(sums).map(output).collect()
    })
}

/// The convolutions in front of a prediction, which all levels share.
fn deep_head(b: &mut Builder, mut x: NodeId, channels: usize) -> NodeId {
    for i in 0..DEPTH {
        x = conv_relu(b, &format!("conv{i}"), x, Conv2d::new(channels, channels, 3));
    }
    x
}
