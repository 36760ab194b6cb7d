//! MobileNet-V1 (Howard et al. 2017), narrow, as the published RetinaFace uses it, and other stacks of its blocks.

use super::{conv_bn, conv_bn_at};
use crate::graph::{Builder, NodeId};
use crate::layers::{Activation, Conv2d};
use serde::{Deserialize, Serialize};

/// Depthwise separable block: depthwise 3x3 (`.0 .1`), pointwise 1x1 (`.3 .4`), each with batch
/// normalisation and leaky ReLU.
pub fn conv_dw(b: &mut Builder, name: &str, x: NodeId, [ci, co]: [usize; 2], stride: usize) -> NodeId {
    let leaky = Some(Activation::LeakyRelu(0.1));
    b.scope(name, |b| {
        let x = conv_bn_at(b, x, Conv2d::depthwise(ci, 3).stride(stride), leaky, ["0", "1"]);
        conv_bn_at(b, x, Conv2d::new(ci, co, 1), leaky, ["3", "4"])
    })
}

/// A backbone of depthwise separable blocks: its sizes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockStack {
    /// Channels of the first convolution, 3x3 of stride 2.
    pub first: usize,
    /// Channels of each block at strides 2, 4, 8, 16 and 32. The first of a stride halves the map before it (not at stride
    /// 2, where the first convolution has done so and there may be none).
    pub blocks: [Vec<usize>; 5],
}

impl BlockStack {
    /// MobileNet-V1 whose first convolution has `width` channels (8 = x0.25).
    pub fn mobilenet_v1(width: usize) -> Self {
        let blocks = |count: usize, times: usize| vec![times * width; count];
        let blocks = [blocks(1, 2), blocks(2, 4), blocks(2, 8), blocks(6, 16), blocks(2, 32)];
        Self { first: width, blocks }
    }

    /// Whether there is a map at every stride from 4 on, by no more than 64 blocks a stride, each of 1 to 1024 channels.
    pub fn is_sane(&self) -> bool {
        let mut counts = self.blocks.iter().map(Vec::len).enumerate();
        let mut channels = self.blocks.iter().flatten().chain([&self.first]);
        counts.all(|(i, count)| (usize::from(i > 0)..=64).contains(&count))
            && channels.all(|c| (1..=1024).contains(c))
    }

    /// Channels of the maps at strides 4, 8, 16 and 32.
    pub fn channels(&self) -> [usize; 4] {
        std::array::from_fn(|i| self.blocks[i + 1].last().copied().unwrap_or(0))
    }
}

/// MobileNet-V1 whose first convolution has `width` channels (8 = x0.25). Returns the outputs of
/// `stage1`, `stage2`, `stage3`: strides 8, 16, 32 with 8, 16 and 32 times `width` channels.
pub fn mobilenet_v1(b: &mut Builder, image: NodeId, width: usize) -> [NodeId; 3] {
    let [_, c3, c4, c5] = block_stack(b, image, &BlockStack::mobilenet_v1(width));
    [c3, c4, c5]
}

/// The maps of `net` at strides 4, 8, 16 and 32, under the names that the published RetinaFace has for MobileNet-V1's: down
/// to stride 8 all is in `stage1`, which begins with the first convolution; stride 16 is `stage2`, stride 32 `stage3`.
pub fn block_stack(b: &mut Builder, image: NodeId, net: &BlockStack) -> [NodeId; 4] {
    let leaky = Some(Activation::LeakyRelu(0.1));
    let mut x = conv_bn(b, "stage1.0", image, Conv2d::new(3, net.first, 3).stride(2), leaky);
    let mut channels = net.first;
    let mut number = 1; // of the next block within its stage
    let mut maps = [x; 5];
    for (i, stage) in ["stage1", "stage1", "stage1", "stage2", "stage3"].into_iter().enumerate() {
        if i > 2 {
            number = 0;
        }
        for (k, &to) in net.blocks[i].iter().enumerate() {
            let stride = if i > 0 && k == 0 { 2 } else { 1 };
            x = conv_dw(b, &format!("{stage}.{number}"), x, [channels, to], stride);
            (channels, number) = (to, number + 1);
        }
        maps[i] = x;
    }
    let [_, maps @ ..] = maps;
    maps
}
