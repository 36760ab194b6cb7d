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

use super::resnet::{resnet, ResNet};
use super::ssh::ssh;
use crate::graph::{Builder, NodeId};
use crate::layers::{Conv2d, Interpolation};
use serde::{Deserialize, Serialize};
use std::ops::RangeInclusive;

/// Levels; level `l` has stride 2^l.
pub const LEVELS: RangeInclusive<usize> = 2..=7;

/// Where the top-down path of the pyramid begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TopDown {
    /// At C5: P6 and P7 stand alone (PyramidBox's low-level pyramid, Tang et al. 2018, section 3.2), since what they see of
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
/// offsets. The backbone's parameters have torchvision's names; the others begin with `fpn.`, `context{l}.`, `class.` and
/// `box.`.
pub fn hambox(b: &mut Builder, image: NodeId, net: &HamBox) {
    let levels = pyramid(b, image, net);
    let c = net.channels;
    for (level, mut p) in LEVELS.zip(levels) {
        if net.context {
            p = ssh(b, &format!("context{level}"), p, c, c);
        }
        for (output, values) in [("class", 1), ("box", 4)] {
            let out = b.scope(output, |b| head(b, p, c, values, net.deep_head));
            b.output(&format!("{output}{level}"), out);
        }
    }
}

/// P2 to P7.
fn pyramid(b: &mut Builder, image: NodeId, net: &HamBox) -> Vec<NodeId> {
    let mut features = resnet(b, image, &net.backbone).to_vec();
    let mut from = net.backbone.channels().to_vec();
    let c = net.channels;
    b.scope("fpn", |b| {
        for level in [6, 7] {
            let conv = Conv2d::new(from[from.len() - 1], c, 3).stride(2).bias();
            let down = b.conv(&format!("down{level}"), features[features.len() - 1], conv);
            features.push(b.relu(down));
            from.push(c);
        }
        let lateral = |(i, level): (usize, usize)| {
            b.conv(&format!("lateral{level}"), features[i], Conv2d::new(from[i], c, 1).bias())
        };
        let mut sums: Vec<NodeId> = LEVELS.enumerate().map(lateral).collect();
        let first = *LEVELS.start();
        for level in (first..net.top_down.from()).rev() {
            let (fine, coarse) = (sums[level - first], sums[level + 1 - first]);
            let up = b.upsample_to(coarse, Interpolation::Bilinear, fine);
            sums[level - first] = b.add(fine, up);
        }
        let output = |(level, p)| b.conv(&format!("output{level}"), p, Conv2d::new(c, c, 3).bias());
        LEVELS.zip(sums).map(output).collect()
    })
}

/// Convolutions that all levels share, to `values` channels.
fn head(b: &mut Builder, mut x: NodeId, channels: usize, values: usize, deep: bool) -> NodeId {
    for i in 0..if deep { DEPTH } else { 0 } {
        let y = b.conv(&format!("conv{i}"), x, Conv2d::new(channels, channels, 3).bias());
        x = b.relu(y);
    }
    b.conv("predict", x, Conv2d::new(channels, values, 3).bias())
}
