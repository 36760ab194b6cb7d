//! ResNet (He et al. 2016), in torchvision's form and with its parameter names, so that its ImageNet weights load as
//! they are: a bottleneck's stride is on its 3x3 convolution (the paper's is on the first 1x1), shortcuts that change
//! size are 1x1 projections (the paper's option B).
//!
//! ```text
//!           stride  output    18-layer   34-layer   50-layer     101-layer    152-layer
//! conv1       2               7x7, 64, stride 2
//!             4               3x3 max pooling, stride 2
//! layer1      4       C2      basic x2   basic x3   bottle x3    bottle x3    bottle x3       64
//! layer2      8       C3      basic x2   basic x4   bottle x4    bottle x4    bottle x8      128
//! layer3     16       C4      basic x2   basic x6   bottle x6    bottle x23   bottle x36     256
//! layer4     32       C5      basic x2   basic x3   bottle x3    bottle x3    bottle x3      512
//!
//! basic(w):   3x3, w -> 3x3, w                 + shortcut
//! bottle(w):  1x1, w -> 3x3, w -> 1x1, 4 w     + shortcut
//! ```

use super::conv_bn_at;
use crate::graph::{Builder, NodeId};
use crate::layers::{Activation, Conv2d, MaxPool};
use serde::{Deserialize, Serialize};

/// What a stage is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Block {
    /// Two 3x3 convolutions.
    Basic,
    /// 1x1, 3x3 and 1x1 to four times the channels.
    Bottleneck,
}

/// Sizes of the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResNet {
    /// What the stages are made of.
    pub block: Block,
    /// Blocks of `layer1` to `layer4`.
    pub blocks: [usize; 4],
    /// Channels of `conv1`, and of the 3x3 convolutions of `layer1`; 64 in the paper. They double with every stage.
    pub width: usize,
}

impl ResNet {
    /// ResNet-18.
    pub const R18: Self = Self { block: Block::Basic, blocks: [2, 2, 2, 2], width: 64 };
    /// ResNet-34.
    pub const R34: Self = Self { block: Block::Basic, blocks: [3, 4, 6, 3], width: 64 };
    /// ResNet-50.
    pub const R50: Self = Self { block: Block::Bottleneck, blocks: [3, 4, 6, 3], width: 64 };
    /// ResNet-101.
    pub const R101: Self = Self { block: Block::Bottleneck, blocks: [3, 4, 23, 3], width: 64 };
    /// ResNet-152.
    pub const R152: Self = Self { block: Block::Bottleneck, blocks: [3, 8, 36, 3], width: 64 };

    /// Whether the sizes are such as a model file may ask for: width 1 to 256, 1 to 100 blocks a stage.
    pub fn is_sane(&self) -> bool {
        (1..=256).contains(&self.width) && self.blocks.iter().all(|n| (1..=100).contains(n))
    }

    /// A detector's name without its last part, and the backbone that this says: `r18`, `r34`, `r50`, `r101` or `r152`.
    pub fn split_name(name: &str) -> Option<(&str, Self)> {
        let (rest, depth) = name.rsplit_once("-r")?;
        let net = match depth {
            "18" => Self::R18,
            "34" => Self::R34,
            "50" => Self::R50,
            "101" => Self::R101,
            "152" => Self::R152,
            _ => return None,
        };
        Some((rest, net))
    }

    /// Channels of C2 to C5.
    pub fn channels(&self) -> [usize; 4] {
        [1, 2, 4, 8].map(|times| times * self.width * self.block.expansion())
    }
}

impl Block {
    /// Output channels for each channel of the 3x3 convolution.
    fn expansion(self) -> usize {
        match self {
            Block::Basic => 1,
            Block::Bottleneck => 4,
        }
    }
}

/// The network on `image` (3 channels), without pooling and classifier. Returns C2 to C5, the outputs of `layer1` to
/// `layer4`: strides 4, 8, 16, 32 with [`ResNet::channels`].
pub fn resnet(b: &mut Builder, image: NodeId, net: &ResNet) -> [NodeId; 4] {
    let mut x = stem(b, image, net);
    [0, 1, 2, 3].map(|i| {
        x = stage(b, x, net, i);
        x
    })
}

/// As [`resnet`] up to the `last` of its stages, 1 to 4: nothing behind it is computed. Returns C2 to C(`last` + 1).
pub fn resnet_to(b: &mut Builder, image: NodeId, net: &ResNet, last: usize) -> Vec<NodeId> {
    let mut x = stem(b, image, net);
    let next = |i| {
        x = stage(b, x, net, i);
        x
    };
    (0..last).map(next).collect()
}

fn stem(b: &mut Builder, image: NodeId, net: &ResNet) -> NodeId {
    let conv = Conv2d::new(3, net.width, 7).stride(2);
    let x = conv_bn_at(b, image, conv, Some(Activation::Relu), ["conv1", "bn1"]);
    b.max_pool(x, MaxPool::new(3, 2, 1))
}

/// `layer{i + 1}` on the map before it.
fn stage(b: &mut Builder, mut x: NodeId, net: &ResNet, i: usize) -> NodeId {
    let width = net.width << i;
    let mut channels = if i == 0 { net.width } else { net.channels()[i - 1] };
    b.scope(&format!("layer{}", i + 1), |b| {
        for n in 0..net.blocks[i] {
            let stride = if n == 0 && i > 0 { 2 } else { 1 };
            x = b.scope(&n.to_string(), |b| block(b, x, net.block, [channels, width], stride));
            channels = width * net.block.expansion();
        }
    });
    x
}

/// `relu(shortcut(x) + residual(x))` from `channels` (figures 2 and 5).
fn block(b: &mut Builder, x: NodeId, kind: Block, [channels, width]: [usize; 2], stride: usize) -> NodeId {
    let relu = Some(Activation::Relu);
    let out = width * kind.expansion();
    let residual = match kind {
        Block::Basic => {
            let y = conv_bn_at(b, x, Conv2d::new(channels, width, 3).stride(stride), relu, ["conv1", "bn1"]);
            conv_bn_at(b, y, Conv2d::new(width, width, 3), None, ["conv2", "bn2"])
        }
        Block::Bottleneck => {
            let y = conv_bn_at(b, x, Conv2d::new(channels, width, 1), relu, ["conv1", "bn1"]);
            let y = conv_bn_at(b, y, Conv2d::new(width, width, 3).stride(stride), relu, ["conv2", "bn2"]);
            conv_bn_at(b, y, Conv2d::new(width, out, 1), None, ["conv3", "bn3"])
        }
    };
    let shortcut = if stride == 1 && channels == out {
        x
    } else {
        let projection = Conv2d::new(channels, out, 1).stride(stride);
        conv_bn_at(b, x, projection, None, ["downsample.0", "downsample.1"])
    };
    let sum = b.add(residual, shortcut);
    b.relu(sum)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shape::Shape;

    #[test]
    fn parameters_and_multiply_adds_are_the_published_ones() {
        // torchvision's counts, multiply-adds at 224x224; each with a classifier of 1000 classes, which is not here.
        let published = [
            (ResNet::R18, 11_689_512, 1.814),
            (ResNet::R34, 21_797_672, 3.664),
            (ResNet::R50, 25_557_032, 4.089),
            (ResNet::R101, 44_549_160, 7.801),
            (ResNet::R152, 60_192_808, 11.514),
        ];
        for (net, parameters, gmac) in published {
            let mut b = Builder::new();
            let image = b.input("image", 3);
            let outputs = resnet(&mut b, image, &net);
            let graph = b.finish();
            let features = net.channels()[3];
            assert_eq!(graph.param_count() + features * 1000 + 1000, parameters, "{net:?}");
            let image = Shape::new(1, 3, 224, 224);
            let macs = graph.macs(&[image]).unwrap() + 1000 * features as u64;
            assert!((macs as f64 / 1e9 - gmac).abs() < 0.001, "{net:?}: {macs}, published {gmac} billion");
            let shapes = graph.shapes(&[image]).unwrap();
            for ((node, channels), side) in outputs.iter().zip(net.channels()).zip([56, 28, 14, 7]) {
                assert_eq!(shapes[node.0], Shape::new(1, channels, side, side), "{net:?}");
            }
        }
    }
}
