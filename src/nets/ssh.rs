//! The SSH context head (Najibi et al. 2017): windows of 3x3, 5x5 and 7x7 by stacked 3x3s.

use super::conv_bn;
use crate::graph::{Builder, NodeId};
use crate::layers::{Activation, Conv2d};

/// SSH from `channels` to `out` channels: out/2 of 3x3, out/4 of 5x5, out/4 of 7x7 context,
/// concatenated, ReLU; `inside` between the stacked ones. Names as in the published RetinaFace (`conv3X3`, `conv5X5_1`, `conv5X5_2`,
/// `conv7X7_2`, `conv7x7_3`).
pub fn ssh(
    b: &mut Builder,
    name: &str,
    x: NodeId,
    channels: usize,
    out: usize,
    inside: Activation,
) -> NodeId {
    let inside = Some(inside);
    let quarter = out / 4;
    b.scope(name, |b| {
        let c3 = conv_bn(b, "conv3X3", x, Conv2d::new(channels, out / 2, 3), None);
        let shared = conv_bn(b, "conv5X5_1", x, Conv2d::new(channels, quarter, 3), inside);
        let c5 = conv_bn(b, "conv5X5_2", shared, Conv2d::new(quarter, quarter, 3), None);
        let c7 = conv_bn(b, "conv7X7_2", shared, Conv2d::new(quarter, quarter, 3), inside);
        let c7 = conv_bn(b, "conv7x7_3", c7, Conv2d::new(quarter, quarter, 3), None);
        let all = b.concat(&[c3, c5, c7]);
        b.relu(all)
    })
}
