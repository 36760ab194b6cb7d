//! RetinaFace (Deng et al. 2019) in its published form: MobileNet-V1 backbone, merging pyramid, SSH
//! heads, two square anchors a cell, five landmarks.

use super::anchors::{owned_cells, Anchor};
use super::detector::{face_probability, logit, Detector, Map, Window};
use super::face::Face;
use crate::error::{Error, Result};
use crate::graph::{Builder, Graph};
use crate::layers::{Activation, Conv2d};
use crate::nets::{fpn::fpn_merge, mobilenet::mobilenet_v1, ssh::ssh};
use serde::{Deserialize, Serialize};

/// Settings of the network and its boxes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RetinaFaceConfig {
    /// Channels of MobileNet-V1's first convolution; 8 is x0.25.
    pub width: usize,
    /// Channels of the pyramid.
    pub channels: usize,
    /// Anchor sides in pixels on strides 8, 16, 32.
    pub anchors: [[f32; 2]; 3],
    /// Of centre and size in the box code.
    pub variances: [f32; 2],
}

/// Strides of the three levels.
const STRIDES: [usize; 3] = [8, 16, 32];
/// Anchors a cell.
const ANCHORS: usize = 2;

impl RetinaFaceConfig {
    /// MobileNet-V1 x0.25 as published.
    pub fn mobile025() -> Self {
        Self {
            width: 8,
            channels: 64,
            anchors: [[16.0, 32.0], [64.0, 128.0], [256.0, 512.0]],
            variances: [0.1, 0.2],
        }
    }

    pub(super) fn check(&self) -> Result<()> {
        let sane = |n: usize, most: usize| n > 0 && n <= most;
        let sizes = self.anchors.iter().flatten().chain(&self.variances).all(|v| v.is_finite() && *v > 0.0);
        if !(sane(self.width, 256) && sane(self.channels, 1024) && self.channels.is_multiple_of(4) && sizes) {
            return Err(Error::InvalidModel(
                "detector retinaface: width 1..256, channels a multiple of 4 up to 1024, anchors and variances above 0"
                    .into(),
            ));
        }
        Ok(())
    }
}

impl Detector for RetinaFaceConfig {
    /// Outputs per level: `class{i}` 4 channels (background, face an anchor), `box{i}` 8, `landmark{i}` 20.
    fn graph(&self) -> Graph {
        let w = self.width;
        let mut b = Builder::new();
        let image = b.input("image", 3);
        let features = b.scope("body", |b| mobilenet_v1(b, image, w));
        let pyramid = b.scope("fpn", |b| fpn_merge(b, features, [8 * w, 16 * w, 32 * w], self.channels));
        // The published rule.
        let inside = Activation::LeakyRelu(if self.channels <= 64 { 0.1 } else { 0.0 });
        for (i, p) in pyramid.into_iter().enumerate() {
            let head = ssh(&mut b, &format!("ssh{}", i + 1), p, self.channels, self.channels, inside);
            for (name, output, values) in
                [("ClassHead", "class", 2), ("BboxHead", "box", 4), ("LandmarkHead", "landmark", 10)]
            {
                let conv = Conv2d::new(self.channels, ANCHORS * values, 1).bias();
                let out = b.conv(&format!("{name}.{i}.conv1x1"), head, conv);
                b.output(&format!("{output}{i}"), out);
            }
        }
        b.finish()
    }

    fn decode(&self, maps: &[Map<'_>], window: &Window, threshold: f32, sink: &mut dyn FnMut(Face)) {
        // p(face) = softmax > threshold where the logits differ by more than this.
        let margin = logit(threshold);
        for (level, maps) in maps.chunks_exact(3).enumerate() {
            let [class, boxes, landmarks] = [&maps[0], &maps[1], &maps[2]];
            let stride = STRIDES[level];
            for y in owned_cells(&window.owned_y, stride, class.height()) {
                for x in owned_cells(&window.owned_x, stride, class.width()) {
                    for (a, logits) in class.pixel(y, x).chunks_exact(2).enumerate() {
                        // False for a NaN too.
                        let face = logits[1] - logits[0] > margin;
                        if !face {
                            continue;
                        }
                        let anchor = Anchor::square(y, x, stride, self.anchors[level][a]);
                        let bbox = anchor.decode(&boxes.pixel(y, x)[4 * a..], self.variances);
                        let points = &landmarks.pixel(y, x)[10 * a..10 * a + 10];
                        let point = |i: usize| anchor.point(&points[2 * i..], self.variances[0]);
                        sink(Face {
                            bbox,
                            score: face_probability(logits),
                            landmarks: Some(std::array::from_fn(point)),
                            ellipse: None,
                        });
                    }
                }
            }
        }
    }
}
