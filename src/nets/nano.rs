//! The network of our own small detectors: MobileNet-V1 or another stack of its blocks, a feature pyramid of four levels
//! down to stride 8, or of five down to stride 4, and a head a level.
//!
//! ```text
//! image -> C2 -> C3 -> C4 -> C5 -> C6          strides 4, 8, 16, 32, 64
//!          |     |     |     |     |           1x1 to `channels` (C2: to `fine_channels`)
//!          P2 <- P3 <- P4 <- P5 <- P6          nearest upsampling, sum
//!          |     |     |     |     |           smoothing block, head blocks
//!        predict    ...          predict       1x1
//! ```

use super::conv_bn;
use super::mobilenet::{block_stack, conv_dw, BlockStack};
use crate::graph::{Builder, NodeId};
use crate::layers::{Activation, Conv2d, Interpolation};

/// Finest and coarsest level; level `l` has stride 2^l.
pub const LEVELS: std::ops::RangeInclusive<usize> = 2..=6;

/// Sizes of the network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nano {
    /// The backbone.
    pub backbone: BlockStack,
    /// Channels of levels 3 to 6.
    pub channels: usize,
    /// Channels of level 2, whose cells are most of all; unused where it has no anchors.
    pub fine_channels: usize,
    /// Blocks behind the pyramid are 3x3 convolutions instead of depthwise separable ones.
    pub plain_convs: bool,
    /// Blocks between a level's smoothing and its outputs.
    pub head_blocks: usize,
    /// Anchors a cell on levels 2 to 6. Level 2 is left out where it has none.
    pub anchors: [usize; 5],
}

/// The network on `image` (3 channels). Outputs `predict2` (where that level has anchors) to `predict6`: a logit for each
/// anchor, then four offsets for each.
pub fn nano(b: &mut Builder, image: NodeId, net: &Nano) {
    let (c, fine) = (net.channels, net.fine_channels);
    let leaky = Some(Activation::LeakyRelu(0.1));
    let [c2, c3, c4, c5] = b.scope("body", |b| block_stack(b, image, &net.backbone));

    let pyramid = b.scope("fpn", |b| {
        let [n2, n3, n4, n5] = net.backbone.channels();
        let mut lateral = |level: usize, x: NodeId, channels: usize, to: usize| {
            conv_bn(b, &format!("lateral{level}"), x, Conv2d::new(channels, to, 1), leaky)
        };
        let l2 = (net.anchors[0] > 0).then(|| lateral(2, c2, n2, fine));
        let l3 = lateral(3, c3, n3, c);
        let l4 = lateral(4, c4, n4, c);
        let l5 = lateral(5, c5, n5, c);
        let p6 = conv_dw(b, "down6", c5, [n5, c], 2);
        let p5 = top_down(b, p6, l5);
        let p4 = top_down(b, p5, l4);
        let p3 = top_down(b, p4, l3);
        let p2 = l2.map(|l2| {
            // Narrowed before it is upsampled: a quarter of the cells.
            let narrow = conv_bn(b, "narrow3", p3, Conv2d::new(c, fine, 1), None);
            top_down(b, narrow, l2)
        });
        [p2, Some(p3), Some(p4), Some(p5), Some(p6)]
    });

    for ((level, p), anchors) in LEVELS.zip(pyramid).zip(net.anchors) {
        let Some(p) = p else { continue };
        let channels = if level == 2 { fine } else { c };
        let mut x = block(b, &format!("smooth{level}"), p, channels, net.plain_convs);
        for i in 0..net.head_blocks {
            x = block(b, &format!("head{level}.{i}"), x, channels, net.plain_convs);
        }
        // One convolution for logits and offsets: its input, the largest map of all at level 2, is read once.
        let name = format!("predict{level}");
        let out = b.conv(&name, x, Conv2d::new(channels, anchors * 5, 1).bias());
        b.output(&name, out);
    }
}

/// `fine` and the nearest upsampling of `coarse` summed (Lin et al. 2017, figure 3).
fn top_down(b: &mut Builder, coarse: NodeId, fine: NodeId) -> NodeId {
    let up = b.upsample_to(coarse, Interpolation::Nearest, fine);
    b.add(fine, up)
}

fn block(b: &mut Builder, name: &str, x: NodeId, channels: usize, plain: bool) -> NodeId {
    if plain {
        conv_bn(b, name, x, Conv2d::new(channels, channels, 3), Some(Activation::LeakyRelu(0.1)))
    } else {
        conv_dw(b, name, x, [channels; 2], 1)
    }
}
