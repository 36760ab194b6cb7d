//! Feature pyramids (Lin et al. 2017): lateral 1x1 convolutions and a top-down path of sums.

use super::conv_bn;
use crate::graph::{Builder, NodeId};
use crate::layers::{Activation, Conv2d, Interpolation};

/// The published RetinaFace's three-level pyramid: `output{1,2,3}` 1x1, nearest top-down sums, then
/// `merge2`, `merge1` 3x3; all with batch normalisation and `activation`. The top-down
/// path continues from the merged level.
pub fn fpn_merge(
    b: &mut Builder,
    features: [NodeId; 3],
    in_channels: [usize; 3],
    channels: usize,
    activation: Activation,
) -> [NodeId; 3] {
    let activation = Some(activation);
    let lateral: Vec<NodeId> = (0..3)
        .map(|i| {
            let conv = Conv2d::new(in_channels[i], channels, 1);
            conv_bn(b, &format!("output{}", i + 1), features[i], conv, activation)
        })
        .collect();
    let mut top_down = |coarse: NodeId, fine: NodeId, name: &str| {
        let up = b.upsample_to(coarse, Interpolation::Nearest, fine);
        let sum = b.add(fine, up);
        conv_bn(b, name, sum, Conv2d::new(channels, channels, 3), activation)
    };
    let p5 = lateral[2];
    let p4 = top_down(p5, lateral[1], "merge2");
    let p3 = top_down(p4, lateral[0], "merge1");
    [p3, p4, p5]
}

/// The sums of the paper's pyramid (section 3) on `features`, the levels from 2 on, of `in_channels`: 1x1 convolutions
/// `lateral{l}` with bias to `channels`; from level `top` down to `finest` each summed with the coarser one enlarged to its
/// size. Without normalisation or activation. The paper enlarges to the nearest neighbour, from the last level. Returns the
/// levels from `finest` on.
pub fn fpn_sums(
    b: &mut Builder,
    features: &[NodeId],
    in_channels: &[usize],
    channels: usize,
    enlarge: Interpolation,
    [finest, top]: [usize; 2],
) -> Vec<NodeId> {
    let levels = (2..).zip(features.iter().zip(in_channels)).skip(finest - 2);
    let mut sums: Vec<NodeId> = levels
        .map(|(level, (&x, &from))| {
            b.conv(&format!("lateral{level}"), x, Conv2d::new(from, channels, 1).bias())
        })
        .collect();
    for i in (0..top - finest).rev() {
        let up = b.upsample_to(sums[i + 1], enlarge, sums[i]);
        sums[i] = b.add(sums[i], up);
    }
    sums
}

/// The pyramid of the paper: [`fpn_sums`] down to P2, then 3x3 convolutions `output{2,3,4,5}` with bias against the aliasing
/// of the enlargement. Returns P2 to P5.
pub fn fpn(
    b: &mut Builder,
    features: [NodeId; 4],
    in_channels: [usize; 4],
    channels: usize,
    enlarge: Interpolation,
) -> [NodeId; 4] {
    let sums = fpn_sums(b, &features, &in_channels, channels, enlarge, [2, 5]);
    [0, 1, 2, 3]
        .map(|i| b.conv(&format!("output{}", i + 2), sums[i], Conv2d::new(channels, channels, 3).bias()))
}
