//! HR, "Finding Tiny Faces" (Hu and Ramanan 2017): one map of stride 8 on which every cell has a score for every template, and
//! a pyramid whose levels each ask the templates that were made for them. The network is `nets::hr`.

mod ellipse;
mod templates;

#[cfg(feature = "train")]
pub use ellipse::EllipseSample;
pub use ellipse::{AngleForm, EllipseFeatures, EllipseRegressor};
pub use templates::{parse_templates, published_templates, Template, TemplateChoice};

use super::anchors::{owned_cells, Anchor};
use super::boxes::BBox;
#[cfg(feature = "train")]
use super::detector::redraw;
use super::detector::{logit, sigmoid, Detector, Map, Window};
use super::face::{Ellipse, Face};
use super::heads::{Extras, Field, Head};
use super::names::switches;
use crate::error::{Error, Result};
use crate::graph::{Builder, Graph};
use crate::nets::hr::{hr, Backbone, Hr};
use crate::nets::resnet::ResNet;
use crate::nets::vgg::Vgg;
use serde::{Deserialize, Serialize};

/// Pixels between the cells of the scores.
pub const STRIDE: usize = 8;
/// Most templates of a model file.
const MAX_TEMPLATES: usize = 128;

/// Settings of the network and its boxes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HrConfig {
    /// Backbone.
    pub backbone: Backbone,
    /// Whether res2, res3, res4, res5 feed the sum.
    pub layers: [bool; 4],
    /// What a cell has scores for.
    pub templates: Vec<Template>,
    /// Which of them are asked on a level of the pyramid.
    pub choice: TemplateChoice,
    /// Centre of the first cell, pixels (the middle of the picture's first pixel is 0.5). Here cells are centred on their
    /// 8 x 8 pixels, as in training: 4. In the published model they are at pixel 8 x - 1 counted from 1: -1.5.
    pub cell_center: f32,
    /// From boxes to ellipses, where it was fitted.
    #[serde(default)]
    pub ellipse: Option<EllipseRegressor>,
}

impl HrConfig {
    /// The paper's on a backbone: res3 and res4, the published templates, types A and B.
    pub fn new(backbone: Backbone) -> Self {
        Self {
            backbone,
            layers: [false, true, true, false],
            templates: published_templates(),
            choice: TemplateChoice::AAndB,
            cell_center: STRIDE as f32 / 2.0,
            ellipse: None,
        }
    }

    /// By name: `hr`, then `-full` (each template on its own level) or nothing (types A and B), then the layers that feed the
    /// sum, some of `-res2`, `-res3`, `-res4`, `-res5` in this order or nothing (res3 and res4), then `-r50`, `-r101` or
    /// another ResNet, or `-vgg16`.
    pub fn named(name: &str) -> Option<Self> {
        let (name, backbone) = match name.strip_suffix("-vgg16") {
            Some(name) => (name, Backbone::Vgg16(Vgg::VGG16)),
            None => {
                let (name, net) = ResNet::split_name(name)?;
                (name, Backbone::Resnet(net))
            }
        };
        let [full, layers @ ..] =
            switches(name.strip_prefix("hr")?, ["-full", "-res2", "-res3", "-res4", "-res5"])?;
        let mut config = Self::new(backbone);
        if full {
            config.choice = TemplateChoice::Full;
        }
        if layers.contains(&true) {
            config.layers = layers;
        }
        config.check().is_ok().then_some(config)
    }

    pub(super) fn check(&self) -> Result<()> {
        let bad = |what: &str| Err(Error::InvalidModel(format!("detector hr: {what}")));
        let sane = match &self.backbone {
            Backbone::Resnet(net) => net.is_sane(),
            Backbone::Vgg16(net) => net.is_sane(),
        };
        if !sane {
            return bad("backbone.width 1..256, backbone.blocks 1..100 each");
        }
        if !self.layers.contains(&true) || (self.layers[3] && matches!(self.backbone, Backbone::Vgg16(_))) {
            return bad("at least one of the layers res2 to res5 feeds the sum; VGG16 has no res5");
        }
        if !((1..=MAX_TEMPLATES).contains(&self.templates.len())
            && self.templates.iter().all(Template::is_sane))
        {
            return bad("1 to 128 templates, sides from 1 to 10000 pixels, scales from 1/64 to 64");
        }
        if !self.templates.iter().any(|t| self.choice.asks_somewhere(t)) {
            return bad(
                "types A and B ask no template: none is of scale 1, nor of scale 2 for faces under 20 px",
            );
        }
        if !(-64.0..=64.0).contains(&self.cell_center) {
            return bad("cell_center from -64 to 64");
        }
        match &self.ellipse {
            Some(ellipse) => ellipse.check(self.templates.len()),
            None => Ok(()),
        }
    }

    /// Width and height of every template, pixels of its level.
    pub fn anchors(&self) -> Vec<[f32; 2]> {
        self.templates.iter().map(|t| [t.width, t.height]).collect()
    }

    /// Smallest and largest longer side of the templates that are asked on any level, pixels of the level.
    pub fn template_px(&self) -> [f32; 2] {
        let asked = self.templates.iter().filter(|t| self.choice.asks_somewhere(t));
        let sides = asked.map(|t| t.width.max(t.height));
        sides.fold([f32::INFINITY, 0.0], |[least, most], side| [least.min(side), most.max(side)])
    }

    /// Starts new weights: score convolutions with a deviation of 0.01 (as Faster R-CNN, Ren et al. 2015, section 3.1.3, after
    /// which the paper models its losses), the enlarging kernels bilinear whatever they were. `is_new` tells by name which
    /// tensors do not come from a start.
    #[cfg(feature = "train")]
    pub fn start_new(&self, weights: &mut crate::graph::Weights, is_new: impl Fn(&str) -> bool) {
        use crate::nets::hr::{enlarges, BILINEAR};
        for (name, w) in &mut weights.tensors {
            if enlarges(name) {
                let tap = |i: usize| BILINEAR[i % 16 / 4] * BILINEAR[i % 4];
                w.data.iter_mut().enumerate().for_each(|(i, v)| *v = tap(i));
            } else if name.starts_with("score_res") && name.ends_with(".weight") && is_new(name) {
                redraw(&mut w.data, w.shape[1], 0.01);
            }
        }
    }

    /// Calls `found` with every candidate whose cell is owned, in the order row, column, template: its box without the
    /// ellipse, and what the ellipse is computed from.
    pub(crate) fn candidates(
        &self,
        scores: &Map<'_>,
        window: &Window,
        threshold: f32,
        found: &mut dyn FnMut(Face, EllipseFeatures),
    ) {
        let least = logit(threshold);
        let count = self.templates.len();
        // On the stack: decoding allocates nothing.
        let mut asked = [false; MAX_TEMPLATES];
        for (asked, template) in asked.iter_mut().zip(&self.templates) {
            *asked = self.choice.asks(template, window.scale);
        }
        let center = |cell: usize| cell as f32 * STRIDE as f32 + self.cell_center;
        for y in owned_cells(&window.owned_y, STRIDE, scores.height()) {
            for x in owned_cells(&window.owned_x, STRIDE, scores.width()) {
                let cell = scores.pixel(y, x);
                for (k, template) in self.templates.iter().enumerate() {
                    // False for a NaN too.
                    let face = asked[k] && cell[k] > least;
                    if !face {
                        continue;
                    }
                    let anchor =
                        Anchor { center: [center(x), center(y)], size: [template.width, template.height] };
                    let t = [1, 2, 3, 4].map(|i| cell[i * count + k]);
                    let bbox = anchor.decode(&t, [1.0; 2]);
                    let features = EllipseFeatures { template: k, offsets: t, logit: cell[k] };
                    found(Face { bbox, score: sigmoid(cell[k]), ..Face::default() }, features);
                }
            }
        }
    }
}

impl Detector for HrConfig {
    /// `scores`: T logits, then T each of tx, ty, tw, th.
    fn graph(&self) -> Graph {
        let mut b = Builder::new();
        let image = b.input("image", 3);
        hr(
            &mut b,
            image,
            &Hr { backbone: self.backbone, layers: self.layers, templates: self.templates.len() },
        );
        b.finish()
    }

    fn heads(&self, scale: f32) -> Vec<Head> {
        let count = self.templates.len();
        let boxes = Field { output: 0, first: count, anchor: 1, value: count };
        let mut head = Head::new(STRIDE, self.anchors(), Field::whole(0, 1), boxes);
        head.anchors.retain(|&(k, _)| self.choice.asks(&self.templates[k], scale));
        let extras = if self.ellipse.is_some() { Extras::Ellipse } else { Extras::None };
        vec![Head { center: self.cell_center, extras, ..head }]
    }

    fn ellipse(&self, bbox: &BBox, template: usize, offsets: [f32; 4], logit: f32) -> Option<Ellipse> {
        self.ellipse.as_ref().map(|e| e.ellipse(bbox, &EllipseFeatures { template, offsets, logit }))
    }

    fn decode(&self, maps: &[Map<'_>], window: &Window, threshold: f32, sink: &mut dyn FnMut(Face)) {
        self.candidates(&maps[0], window, threshold, &mut |face, features| {
            let ellipse = self.ellipse.as_ref().map(|e| e.ellipse(&face.bbox, &features));
            sink(Face { ellipse, ..face });
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::View;
    use crate::shape::Shape;

    #[test]
    fn names_are_the_settings_they_say() {
        let of = |name: &str| HrConfig::named(name).map(|c| (c.backbone, c.layers, c.choice));
        let r = Backbone::Resnet;
        let (ab, full) = (TemplateChoice::AAndB, TemplateChoice::Full);
        assert_eq!(of("hr-r101"), Some((r(ResNet::R101), [false, true, true, false], ab)));
        assert_eq!(of("hr-full-r50"), Some((r(ResNet::R50), [false, true, true, false], full)));
        assert_eq!(of("hr-res2-res3-res4-r101"), Some((r(ResNet::R101), [true, true, true, false], ab)));
        assert_eq!(of("hr-full-res5-r50"), Some((r(ResNet::R50), [false, false, false, true], full)));
        assert_eq!(of("hr-vgg16"), Some((Backbone::Vgg16(Vgg::VGG16), [false, true, true, false], ab)));
        for none in ["hr", "hr-", "hr-res5-vgg16", "hr-res4-res3-r50", "hr-res6-r50", "hr-vgg19", "hrs-r50"] {
            assert_eq!(of(none), None, "{none}");
        }
    }

    /// Two cells, two templates of types A and B; by hand.
    #[test]
    fn cells_are_decoded_by_the_templates_of_their_level() {
        let template = |width, height, scale| Template { width, height, scale };
        let config = HrConfig {
            templates: vec![template(40.0, 60.0, 1.0), template(20.0, 30.0, 2.0)],
            ..HrConfig::new(Backbone::Vgg16(Vgg::VGG16))
        };
        // Logits of both, then tx, ty, tw, th of both.
        let cells = [
            [1.0, 2.0, 0.5, -0.25, 0.0, 0.1, 2f32.ln(), 0.0, 0.0, 0.0],
            [-9.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.5f32.ln()],
        ];
        let data: Vec<f32> = cells.into_iter().flatten().collect();
        let found = |scale: f32, cell_center: f32| {
            let map = Map::new(&data, View::new(Shape::new(1, 10, 1, 2), 0, [0; 4]));
            let mut faces = Vec::new();
            let window = Window { scale, ..Window::whole() };
            HrConfig { cell_center, ..config.clone() }
                .decode(&[map], &window, 0.5, &mut |f| faces.push(f.bbox));
            faces
        };
        // On the picture itself type A alone: centre 4 + 0.5 * 40, 4; 80 wide, 60 high.
        let close = |b: super::super::BBox, e: [f32; 4]| {
            let got = [b.x1, b.y1, b.x2, b.y2];
            assert!(got.iter().zip(e).all(|(g, e)| (g - e).abs() < 1e-4), "{got:?}, expected {e:?}");
        };
        let one = found(1.0, 4.0);
        assert_eq!(one.len(), 1);
        close(one[0], [-16.0, -26.0, 64.0, 34.0]);
        let two = found(2.0, 4.0);
        assert_eq!(two.len(), 3);
        // B on the first cell: centre 4 - 0.25 * 20, 4 + 0.1 * 30; on the second, centre 12, half as high.
        close(two[1], [-11.0, -8.0, 9.0, 22.0]);
        close(two[2], [2.0, -3.5, 22.0, 11.5]);
        close(found(1.0, -1.5)[0], [-21.5, -31.5, 58.5, 28.5]);
    }
}
