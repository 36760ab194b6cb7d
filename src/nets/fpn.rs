//! Feature pyramids (Lin et al. 2017): lateral 1x1 convolutions and a top-down path of sums.

use super::conv_bn;
use crate::graph::{Builder, NodeId};
use crate::layers::{Activation, Conv2d, Interpolation};

/// The published RetinaFace's three-level pyramid: `output{1,2,3}` 1x1, nearest top-down sums, then
/// `merge2`, `merge1` 3x3; all with batch normalisation and leaky ReLU of slope 0.1. The top-down
/// path continues from the merged level.
pub fn fpn_merge(
    b: &mut Builder,
    features: [NodeId; 3],
    in_channels: [usize; 3],
    channels: usize,
) -> [NodeId; 3] {
    let leaky = Some(Activation::LeakyRelu(0.1));
    let lateral: Vec<NodeId> = (0..3)
        .map(|i| {
            let conv = Conv2d::new(in_channels[i], channels, 1);
            conv_bn(b, &format!("output{}", i + 1), features[i], conv, leaky)
        })
        .collect();
    let mut top_down = |coarse: NodeId, fine: NodeId, name: &str| {
        let up = b.upsample_to(coarse, Interpolation::Nearest, fine);
        let sum = b.add(fine, up);
        conv_bn(b, name, sum, Conv2d::new(channels, channels, 3), leaky)
    };
    let p5 = lateral[2];
    let p4 = top_down(p5, lateral[1], "merge2");
    let p3 = top_down(p4, lateral[0], "merge1");
    [p3, p4, p5]
}
