//! The network of HR, "Finding Tiny Faces" (Hu and Ramanan 2017): a backbone whose layers each vote for every template, and
//! the sum of the votes, which sees fine detail and wide context at once (section 3.1, "foveal descriptor").
//!
//! ```text
//!            layer (VGG16's)    stride   scores, 1x1          to stride 8
//! C2         res2  (conv3_3)      4      5 T, stride 2        as it is
//! C3         res3  (conv4_3)      8      5 T                  as it is
//! C4         res4  (conv5_3)     16      5 T                  x2, cropped to C3
//! C5         res5               32      5 T                  x2, cropped to C4, x2, cropped to C3
//! ```
//!
//! Any subset feeds the sum (figures 4 and 5); the published model takes res3 and res4. Of the 5 T channels the first T are
//! the templates' logits, then T each of tx, ty, tw, th. Enlarging is a fixed bilinear 4x4 transposed convolution.

use super::resnet::{resnet_to, ResNet};
use super::vgg::{vgg, Vgg};
use crate::graph::{Builder, NodeId};
use crate::layers::{Conv2d, ConvTranspose2d};
use serde::{Deserialize, Serialize};

/// What the scores stand on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Backbone {
    /// ResNet; the paper's are of 101 and 50 layers.
    Resnet(ResNet),
    /// VGG16, which has no res5.
    Vgg16(Vgg),
}

/// Sizes of the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hr {
    /// Backbone, cut behind the last layer that has scores.
    pub backbone: Backbone,
    /// Whether res2, res3, res4, res5 have scores; one at least.
    pub layers: [bool; 4],
    /// T, templates.
    pub templates: usize,
}

/// Whether a parameter of this name is the fixed kernel that enlarges scores.
pub fn enlarges(name: &str) -> bool {
    name.ends_with("_upsample.weight")
}

/// Of the 4x4 kernel that enlarges twice, bilinearly, one row or column: its products with itself are the taps.
pub const BILINEAR: [f32; 4] = [0.25, 0.75, 0.75, 0.25];

/// The network on `image` (3 channels): `scores`, N x 5 T x H/8 x W/8, sides rounded up. The backbone's parameters have
/// torchvision's names, those of the others are `score_res{2..5}.*` and `score{4,5}_upsample.weight`.
pub fn hr(b: &mut Builder, image: NodeId, net: &Hr) {
    // At least C3, whose size the scores have.
    let last = net.layers.iter().rposition(|&on| on).unwrap_or(0).max(1);
    let (features, channels): (Vec<NodeId>, Vec<usize>) = match &net.backbone {
        Backbone::Resnet(r) => (resnet_to(b, image, r, last + 1), r.channels().to_vec()),
        Backbone::Vgg16(v) => (vgg(b, image, v).to_vec(), v.outputs().to_vec()),
    };
    let values = 5 * net.templates;
    let mut sum: Option<NodeId> = None;
    let add = |b: &mut Builder, x: NodeId, sum: Option<NodeId>| sum.map_or(x, |sum| b.add(sum, x));
    for i in (0..=last).rev() {
        let scores = net.layers[i].then(|| {
            // C2's every other cell lies on a cell of C3.
            let conv = Conv2d::new(channels[i], values, 1).bias().stride(if i == 0 { 2 } else { 1 });
            let scores = b.conv(&format!("score_res{}", i + 2), features[i], conv);
            if i == 0 {
                b.crop(scores, features[1], 0, 0)
            } else {
                scores
            }
        });
        sum = scores.map(|x| add(b, x, sum)).or(sum);
        if i > 1 {
            sum = sum.map(|x| {
                let up = b.conv_transpose(&format!("score{}_upsample", i + 2), x, enlarging(values));
                b.crop(up, features[i - 1], 0, 0)
            });
        }
    }
    let scores = sum.expect("a layer has scores");
    b.output("scores", scores);
}

/// Cell `o` of the output lies at cell `(o + 0.5) / 2 - 0.5` of the input.
fn enlarging(channels: usize) -> ConvTranspose2d {
    ConvTranspose2d {
        in_channels: channels,
        out_channels: channels,
        kernel: [4; 2],
        stride: [2; 2],
        padding: [1; 4],
        groups: channels,
        bias: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shape::Shape;

    #[test]
    fn scores_have_stride_8_whatever_layers_they_come_from() {
        let resnet = Backbone::Resnet(ResNet { width: 4, ..ResNet::R50 });
        let vgg = Backbone::Vgg16(Vgg { width: 4 });
        for bits in 1..16 {
            let layers = [0, 1, 2, 3].map(|i| bits >> i & 1 == 1);
            for backbone in [resnet, vgg] {
                if layers[3] && backbone == vgg {
                    continue;
                }
                let mut b = Builder::new();
                let image = b.input("image", 3);
                hr(&mut b, image, &Hr { backbone, layers, templates: 3 });
                let graph = b.finish();
                for (side, cells) in [(96, 12), (97, 13), (109, 14), (131, 17)] {
                    let shapes = graph.shapes(&[Shape::new(1, 3, side, 64)]).unwrap();
                    let scores = shapes[graph.outputs[0].1 .0];
                    assert_eq!(scores, Shape::new(1, 15, cells, 8), "{layers:?} {backbone:?} {side}");
                }
                let named = |name: &str| graph.params.iter().any(|p| p.name.starts_with(name));
                let scored = [2, 3, 4, 5].map(|i| named(&format!("score_res{i}.weight")));
                assert_eq!(scored, layers);
                assert_eq!(named("layer4"), layers[3] && backbone == resnet);
            }
        }
    }
}
