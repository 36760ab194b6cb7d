//! VGG16 (Simonyan and Zisserman 2015, configuration D), in torchvision's form and with its parameter names
//! (`features.28.weight`), so that its ImageNet weights load as they are. Without the last pooling and the classifier.
//!
//! ```text
//! features.   0 2   4      5 7     9      10 12 14   16     17 19 21   23     24 26 28
//!             conv1 max    conv2   max    conv3      max    conv4      max    conv5
//! channels    64           128            256               512               512
//! stride      1            2              4                 8                 16
//! ```

use super::conv_relu;
use crate::graph::{Builder, NodeId};
use crate::layers::{Conv2d, MaxPool};
use serde::{Deserialize, Serialize};

/// Sizes of the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vgg {
    /// Channels of conv1; 64 in the paper. They double up to conv4, which has as many as conv5.
    pub width: usize,
}

/// 3x3 convolutions of conv1 to conv5.
const CONVS: [usize; 5] = [2, 2, 3, 3, 3];

impl Vgg {
    /// VGG16.
    pub const VGG16: Self = Self { width: 64 };

    /// Whether the width is one that a model file may ask for: 1 to 256.
    pub fn is_sane(&self) -> bool {
        (1..=256).contains(&self.width)
    }

    /// Channels of conv1 to conv5.
    fn channels(&self) -> [usize; 5] {
        [1, 2, 4, 8, 8].map(|times| times * self.width)
    }

    /// Channels of what [`vgg`] returns.
    pub fn outputs(&self) -> [usize; 3] {
        let [.., c3, c4, c5] = self.channels();
        [c3, c4, c5]
    }
}

/// The network on `image` (3 channels). Returns conv3_3, conv4_3 and conv5_3, behind their ReLU: strides 4, 8, 16 with
/// [`Vgg::outputs`] channels. Sides are halved rounding up, as ResNet's are (torchvision rounds down; multiples of 16 are
/// the same to both), so that a coarse map enlarged covers the finer one.
pub fn vgg(b: &mut Builder, image: NodeId, net: &Vgg) -> [NodeId; 3] {
    let (mut x, mut from, mut index) = (image, 3, 0);
    let halves = MaxPool { padding: [0, 0, 1, 1], ..MaxPool::new(2, 2, 0) };
    let [.., c3, c4, c5] = std::array::from_fn::<_, 5, _>(|stage| {
        b.scope("features", |b| {
            if stage > 0 {
                x = b.max_pool(x, halves);
                index += 1;
            }
            let channels = net.channels()[stage];
            for _ in 0..CONVS[stage] {
                x = conv_relu(b, &index.to_string(), x, Conv2d::new(from, channels, 3));
                from = channels;
                index += 2;
            }
        });
        x
    });
    [c3, c4, c5]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shape::Shape;

    #[test]
    fn parameters_and_multiply_adds_are_the_published_ones() {
        let mut b = Builder::new();
        let image = b.input("image", 3);
        let outputs = vgg(&mut b, image, &Vgg::VGG16);
        let graph = b.finish();
        // torchvision's 138,357,544 less the three linear layers of 25,088 and 4,096 inputs.
        let classifier = (25_088 + 1) * 4096 + (4096 + 1) * 4096 + (4096 + 1) * 1000;
        assert_eq!(graph.param_count(), 138_357_544 - classifier);
        let image = Shape::new(1, 3, 224, 224);
        let gmac = graph.macs(&[image]).unwrap() as f64 / 1e9;
        assert!((gmac - 15.347).abs() < 0.001, "{gmac} billion");
        let shapes = graph.shapes(&[image]).unwrap();
        for ((node, channels), side) in outputs.iter().zip(Vgg::VGG16.outputs()).zip([56, 28, 14]) {
            assert_eq!(shapes[node.0], Shape::new(1, channels, side, side));
        }
        let last = graph.params.last().unwrap();
        assert_eq!(last.name, "features.28.bias");
        let odd = graph.shapes(&[Shape::new(1, 3, 99, 33)]).unwrap();
        assert_eq!(outputs.map(|o| [odd[o.0].h, odd[o.0].w]), [[25, 9], [13, 5], [7, 3]]);
    }
}
