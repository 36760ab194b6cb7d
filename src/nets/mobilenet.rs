//! MobileNet-V1 (Howard et al. 2017), narrow, as the published RetinaFace uses it.

use super::{conv_bn, conv_bn_at};
use crate::graph::{Builder, NodeId};
use crate::layers::{Activation, Conv2d};

/// Depthwise separable block: depthwise 3x3 (`.0 .1`), pointwise 1x1 (`.3 .4`), each with batch
/// normalisation and leaky ReLU.
pub fn conv_dw(b: &mut Builder, name: &str, x: NodeId, [ci, co]: [usize; 2], stride: usize) -> NodeId {
    let leaky = Some(Activation::LeakyRelu(0.1));
    b.scope(name, |b| {
        let x = conv_bn_at(b, x, Conv2d::depthwise(ci, 3).stride(stride), leaky, ["0", "1"]);
        conv_bn_at(b, x, Conv2d::new(ci, co, 1), leaky, ["3", "4"])
    })
}

/// MobileNet-V1 whose first convolution has `width` channels (8 = x0.25). Returns the outputs of
/// `stage1`, `stage2`, `stage3`: strides 8, 16, 32 with 8, 16 and 32 times `width` channels.
pub fn mobilenet_v1(b: &mut Builder, image: NodeId, width: usize) -> [NodeId; 3] {
    let [_, c3, c4, c5] = mobilenet_v1_stages(b, image, width);
    [c3, c4, c5]
}

/// As [`mobilenet_v1`], with the output of `stage1.3` before them: stride 4, 4 times `width` channels.
pub fn mobilenet_v1_stages(b: &mut Builder, image: NodeId, width: usize) -> [NodeId; 4] {
    let w = width;
    let leaky = Some(Activation::LeakyRelu(0.1));
    let (c2, c3) = b.scope("stage1", |b| {
        let x = conv_bn(b, "0", image, Conv2d::new(3, w, 3).stride(2), leaky);
        let x = conv_dw(b, "1", x, [w, 2 * w], 1);
        let x = conv_dw(b, "2", x, [2 * w, 4 * w], 2);
        let c2 = conv_dw(b, "3", x, [4 * w, 4 * w], 1);
        let x = conv_dw(b, "4", c2, [4 * w, 8 * w], 2);
        (c2, conv_dw(b, "5", x, [8 * w, 8 * w], 1))
    });
    let c4 = b.scope("stage2", |b| {
        let mut x = conv_dw(b, "0", c3, [8 * w, 16 * w], 2);
        for i in 1..6 {
            x = conv_dw(b, &i.to_string(), x, [16 * w, 16 * w], 1);
        }
        x
    });
    let c5 = b.scope("stage3", |b| {
        let x = conv_dw(b, "0", c4, [16 * w, 32 * w], 2);
        conv_dw(b, "1", x, [32 * w, 32 * w], 1)
    });
    [c2, c3, c4, c5]
}
