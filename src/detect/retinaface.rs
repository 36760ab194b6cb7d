//! RetinaFace (Deng et al. 2019) in its published form: MobileNet-V1 or ResNet backbone, merging pyramid, SSH
//! heads, two square anchors a cell, five landmarks.

use super::anchors::{owned_cells, Anchor};
#[cfg(feature = "train")]
use super::detector::redraw;
use super::detector::{face_probability, logit, Detector, Map, Role, Window};
use super::face::Face;
use super::heads::{Extras, Field, Head};
use crate::error::{Error, Result};
use crate::graph::{Builder, Graph};
use crate::layers::{Activation, Conv2d};
use crate::nets::resnet::{resnet, ResNet};
use crate::nets::{fpn::fpn_merge, mobilenet::mobilenet_v1, ssh::ssh};
use serde::{Deserialize, Serialize};

/// Settings of the network and its boxes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RetinaFaceConfig {
    /// Channels of MobileNet-V1's first convolution; 8 is x0.25. Of no effect with another backbone.
    pub width: usize,
    /// Another backbone.
    #[serde(default)]
    pub backbone: Option<ResNet>,
    /// Channels of the pyramid.
    pub channels: usize,
    /// Anchor sides in pixels on strides 8, 16, 32.
    pub anchors: [[f32; 2]; 3],
    /// Of centre and size in the box code.
    pub variances: [f32; 2],
    /// Whether there are heads for the landmarks; trained here it has none.
    #[serde(default = "yes")]
    pub landmarks: bool,
}

fn yes() -> bool {
    true
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
            backbone: None,
            channels: 64,
            anchors: [[16.0, 32.0], [64.0, 128.0], [256.0, 512.0]],
            variances: [0.1, 0.2],
            landmarks: true,
        }
    }

    /// On a ResNet; that of 50 layers as published.
    pub fn on_resnet(backbone: ResNet) -> Self {
        Self { backbone: Some(backbone), channels: 256, ..Self::mobile025() }
    }

    /// By name: `retinaface-mobile025`, or `retinaface` and `-r50` or another ResNet.
    pub fn named(name: &str) -> Option<Self> {
        match ResNet::split_name(name) {
            Some(("retinaface", net)) => Some(Self::on_resnet(net)),
            _ => (name == "retinaface-mobile025").then(Self::mobile025),
        }
    }

    pub(super) fn check(&self) -> Result<()> {
        let sane = |n: usize, most: usize| n > 0 && n <= most;
        let sizes = self.anchors.iter().flatten().chain(&self.variances).all(|v| v.is_finite() && *v > 0.0);
        let backbone = sane(self.width, 256) && self.backbone.is_none_or(|net| net.is_sane());
        if !(backbone && sane(self.channels, 1024) && self.channels.is_multiple_of(4) && sizes) {
            return Err(Error::InvalidModel(
                "detector retinaface: width 1..256, backbone.blocks 1..100 each, channels a multiple of 4 up to 1024, anchors and variances above 0"
                    .into(),
            ));
        }
        Ok(())
    }

    /// Starts the predictions of new weights with a deviation of 0.01, so that the first boxes are near their anchors. `is_new`
    /// tells by name which tensors do not come from a start.
    #[cfg(feature = "train")]
    pub fn start_new(&self, weights: &mut crate::graph::Weights, is_new: impl Fn(&str) -> bool) {
        for (name, w) in &mut weights.tensors {
            let predicts = name.contains("Head.") && name.ends_with(".weight");
            if predicts && is_new(name) {
                redraw(&mut w.data, self.channels, 0.01);
            }
        }
    }

    /// Stride and anchors of every level.
    pub fn levels(&self) -> impl Iterator<Item = (usize, &[f32; 2])> {
        STRIDES.into_iter().zip(&self.anchors)
    }

    /// Name, output and values an anchor of a level's heads.
    fn outputs(&self) -> impl Iterator<Item = (&'static str, &'static str, usize)> {
        let all = [("ClassHead", "class", 2), ("BboxHead", "box", 4), ("LandmarkHead", "landmark", 10)];
        all.into_iter().take(if self.landmarks { 3 } else { 2 })
    }
}

impl Detector for RetinaFaceConfig {
    /// Outputs per level: `class{i}` 4 channels (background, face an anchor), `box{i}` 8, and with landmarks `landmark{i}` 20.
    fn graph(&self) -> Graph {
        let mut b = Builder::new();
        let image = b.input("image", 3);
        let (features, from) = b.scope("body", |b| match &self.backbone {
            None => (mobilenet_v1(b, image, self.width), [8, 16, 32].map(|times| times * self.width)),
            Some(net) => {
                let [_, c3, c4, c5] = resnet(b, image, net);
                let [_, from @ ..] = net.channels();
                ([c3, c4, c5], from)
            }
        });
        // The published rule.
        let inside = Activation::LeakyRelu(if self.channels <= 64 { 0.1 } else { 0.0 });
        let pyramid = b.scope("fpn", |b| fpn_merge(b, features, from, self.channels, inside));
        for (i, p) in pyramid.into_iter().enumerate() {
            let head = ssh(&mut b, &format!("ssh{}", i + 1), p, self.channels, self.channels, inside);
            for (name, output, values) in self.outputs() {
                let conv = Conv2d::new(self.channels, ANCHORS * values, 1).bias();
                let out = b.conv(&format!("{name}.{i}.conv1x1"), head, conv);
                b.output(&format!("{output}{i}"), out);
            }
        }
        b.finish()
    }

    fn roles(&self) -> Vec<Role> {
        let role = |(_, sides): (usize, &[f32; 2])| Role::of(sides.map(|side| [side; 2]));
        self.levels().flat_map(|level| self.outputs().map(move |_| role(level))).collect()
    }

    fn heads(&self, _scale: f32) -> Vec<Head> {
        let outputs = self.outputs().count();
        let head = |(level, (stride, sides)): (usize, (usize, &[f32; 2]))| {
            let field = |i: usize, values: usize| Field::whole(level * outputs + i, values);
            let landmarks = if self.landmarks { Extras::Landmarks(field(2, 10)) } else { Extras::None };
            Head {
                pair: true,
                variances: self.variances,
                extras: landmarks,
                ..Head::new(stride, sides.map(|side| [side; 2]), field(0, 2), field(1, 4))
            }
        };
        self.levels().enumerate().map(head).collect()
    }

    fn decode(&self, maps: &[Map<'_>], window: &Window, threshold: f32, sink: &mut dyn FnMut(Face)) {
        // p(face) = softmax > threshold where the logits differ by more than this.
        let margin = logit(threshold);
        for (maps, (stride, sides)) in maps.chunks_exact(self.outputs().count()).zip(self.levels()) {
            let (class, boxes, landmarks) = (&maps[0], &maps[1], maps.get(2));
            for y in owned_cells(&window.owned_y, stride, class.height()) {
                for x in owned_cells(&window.owned_x, stride, class.width()) {
                    for (a, logits) in class.pixel(y, x).chunks_exact(2).enumerate() {
                        // False for a NaN too.
                        let face = logits[1] - logits[0] > margin;
                        if !face {
                            continue;
                        }
                        let anchor = Anchor::square(y, x, stride, sides[a]);
                        let bbox = anchor.decode(&boxes.pixel(y, x)[4 * a..], self.variances);
                        let landmarks = landmarks.map(|map| {
                            let points = &map.pixel(y, x)[10 * a..10 * a + 10];
                            std::array::from_fn(|i| anchor.point(&points[2 * i..], self.variances[0]))
                        });
                        sink(Face { bbox, score: face_probability(logits), landmarks, ellipse: None });
                    }
                }
            }
        }
    }
}
