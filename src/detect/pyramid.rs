//! Our own small detectors: a feature pyramid with anchors of the mean face's shape on each level, after RetinaFace
//! (Deng et al. 2019), with a level more at the coarse end and, where wanted, one more at the fine end.
//! `farface-nano` and `farface-small` differ in their settings alone.

use super::anchors::{owned_cells, Anchor};
use super::detector::{logit, Detector, Map, Role, Window};
use super::face::Face;
use super::heads::{Field, Head};
use crate::error::{Error, Result};
use crate::graph::{Builder, Graph};
use crate::nets::mobilenet::BlockStack;
use crate::nets::nano::{nano, Nano};
use serde::{Deserialize, Serialize};

/// Settings of the network and its boxes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PyramidConfig {
    /// Channels of MobileNet-V1's first convolution, 8 is x0.25; of no effect with a [`backbone`](Self::backbone).
    pub width: usize,
    /// The backbone where it is not MobileNet-V1 of that width.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backbone: Option<BlockStack>,
    /// Channels of the levels of stride 8 to 64.
    pub channels: usize,
    /// Channels of the level of stride 4.
    pub fine_channels: usize,
    /// Blocks behind the pyramid are 3x3 convolutions instead of depthwise separable ones.
    pub plain_convs: bool,
    /// Blocks between a level's smoothing and its outputs.
    pub head_blocks: usize,
    /// Width and height of each anchor in pixels, a list for each of the [`STRIDES`]. Where the first list is empty there is
    /// no level of stride 4.
    pub anchors: Vec<Vec<[f32; 2]>>,
    /// Of centre and size in the box code.
    pub variances: [f32; 2],
}

/// Strides of the five levels.
pub const STRIDES: [usize; 5] = [4, 8, 16, 32, 64];
/// Most anchors a cell that a model file may ask for.
const MAX_ANCHORS: usize = 32;
/// Height over width of the mean face of WIDER FACE, and of the anchors of RefineFace
/// (Zhang et al. 2019, section 3.2).
const ASPECT: f32 = 1.25;
/// Square roots of the anchors' areas in pixels: twice and 2.8 times the stride; the finest level also has those of the
/// level below it (which would double the network's maps), the coarsest goes on to the largest faces.
const SIDES: [&[f32]; 5] =
    [&[], &[8.0, 11.3, 16.0, 22.6], &[32.0, 45.3], &[64.0, 90.5], &[128.0, 181.0, 256.0, 362.0]];

impl PyramidConfig {
    /// `farface-nano`: 0.3 million parameters. MobileNet-V1 x0.25 but for twice its channels in the first convolution and at
    /// stride 4, where small faces are told from what looks like them.
    pub fn nano() -> Self {
        let root = ASPECT.sqrt();
        let mut backbone = BlockStack::mobilenet_v1(8);
        backbone.first = 16;
        backbone.blocks[1] = vec![64; 2];
        Self {
            width: 8,
            backbone: Some(backbone),
            channels: 64,
            fine_channels: 32,
            plain_convs: false,
            head_blocks: 1,
            anchors: SIDES.map(|sides| sides.iter().map(|s| [s / root, s * root]).collect()).into(),
            variances: [0.1, 0.2],
        }
    }

    /// `farface-small`: the same backbone, wider levels of plain 3x3 convolutions.
    pub fn small() -> Self {
        Self { channels: 96, fine_channels: 64, plain_convs: true, ..Self::nano() }
    }

    pub(super) fn check(&self) -> Result<()> {
        let sane = |n: usize, most: usize| n > 0 && n <= most;
        let channels = [self.channels, self.fine_channels].iter().all(|&c| sane(c, 1024));
        if !(sane(self.width, 256) && channels && self.head_blocks <= 16) {
            return Err(Error::InvalidModel(
                "detector pyramid: width 1..256, channels and fine_channels 1..1024, head_blocks up to 16"
                    .into(),
            ));
        }
        if !self.backbone.as_ref().is_none_or(BlockStack::is_sane) {
            return Err(Error::InvalidModel(
                "detector pyramid: backbone of 1..1024 channels, with 1..64 blocks at strides 4 to 32 and up to 64 at stride 2".into(),
            ));
        }
        let levels = self.anchors.len() == STRIDES.len();
        let sane_level =
            |(i, level): (usize, &Vec<_>)| sane(level.len(), MAX_ANCHORS) || (i == 0 && level.is_empty());
        if !(levels && self.anchors.iter().enumerate().all(sane_level)) {
            return Err(Error::InvalidModel(format!(
                "detector pyramid: anchors of {} levels, 1..{MAX_ANCHORS} each (the first may have none)",
                STRIDES.len()
            )));
        }
        let sizes = self.anchors.iter().flatten().flatten();
        if !sizes.chain(&self.variances).all(|v| v.is_finite() && *v > 0.0) {
            return Err(Error::InvalidModel(
                "detector pyramid: anchors and variances must be above 0".into(),
            ));
        }
        Ok(())
    }

    /// Starts the predictions of new weights: small weights, and logits that say `probability` (RetinaNet's prior, Lin et
    /// al. 2017, section 4.1), so that the many background anchors do not swamp the first steps. `is_new` tells by name
    /// which tensors do not come from a start.
    #[cfg(feature = "train")]
    pub fn start_new(
        &self,
        weights: &mut crate::graph::Weights,
        probability: f32,
        is_new: impl Fn(&str) -> bool,
    ) {
        for (stride, anchors) in self.levels() {
            let level = stride.ilog2();
            if !is_new(&format!("predict{level}.weight")) {
                continue;
            }
            if let Some(w) = weights.tensors.get_mut(&format!("predict{level}.weight")) {
                // He's deviation, for a fan-in of some tens, becomes about 0.01.
                w.data.iter_mut().for_each(|v| *v *= 0.05);
            }
            if let Some(b) = weights.tensors.get_mut(&format!("predict{level}.bias")) {
                b.data[..anchors.len()].fill(logit(probability));
            }
        }
    }

    /// Stride and anchors of the levels that are there, from fine to coarse: the outputs' order.
    pub fn levels(&self) -> impl Iterator<Item = (usize, &[[f32; 2]])> {
        STRIDES
            .into_iter()
            .zip(self.anchors.iter().map(Vec::as_slice))
            .filter(|(_, anchors)| !anchors.is_empty())
    }

    fn net(&self) -> Nano {
        Nano {
            backbone: self.backbone.clone().unwrap_or_else(|| BlockStack::mobilenet_v1(self.width)),
            channels: self.channels,
            fine_channels: self.fine_channels,
            plain_convs: self.plain_convs,
            head_blocks: self.head_blocks,
            anchors: std::array::from_fn(|level| self.anchors[level].len()),
        }
    }
}

impl Detector for PyramidConfig {
    /// An output a level of stride 2^l, `predict{l}`: a logit for each anchor, then four offsets for each.
    fn graph(&self) -> Graph {
        let mut b = Builder::new();
        let image = b.input("image", 3);
        nano(&mut b, image, &self.net());
        b.finish()
    }

    fn roles(&self) -> Vec<Role> {
        self.levels().map(|(_, anchors)| Role::of(anchors.iter().copied())).collect()
    }

    fn heads(&self, _scale: f32) -> Vec<Head> {
        let head = |(output, (stride, anchors)): (usize, (usize, &[[f32; 2]]))| {
            let logits = Field::whole(output, 1);
            let boxes = Field { first: anchors.len(), ..Field::whole(output, 4) };
            Head { variances: self.variances, ..Head::new(stride, anchors.iter().copied(), logits, boxes) }
        };
        self.levels().enumerate().map(head).collect()
    }

    fn decode(&self, maps: &[Map<'_>], window: &Window, threshold: f32, sink: &mut dyn FnMut(Face)) {
        let least = logit(threshold);
        for (map, (stride, anchors)) in maps.iter().zip(self.levels()) {
            for y in owned_cells(&window.owned_y, stride, map.height()) {
                for x in owned_cells(&window.owned_x, stride, map.width()) {
                    let (logits, offsets) = map.pixel(y, x).split_at(anchors.len());
                    for (a, &logit) in logits.iter().enumerate() {
                        // False for a NaN too.
                        let face = logit > least;
                        if !face {
                            continue;
                        }
                        let anchor = Anchor::on_cell(y, x, stride, anchors[a]);
                        let bbox = anchor.decode(&offsets[4 * a..], self.variances);
                        let score = 1.0 / (1.0 + (-logit).exp());
                        sink(Face { bbox, score, ..Face::default() });
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::detector::Span;
    use super::*;
    use crate::cpu::View;
    use crate::detect::config::{DetectorConfig, METADATA_KEY};
    use crate::detect::{Model, ModelConfig, Session};
    use crate::graph::Weights;
    use crate::pixels::{ImageView, PixelFormat};
    use crate::shape::Shape;

    /// Trained parameters, and multiply-adds at 640x480.
    fn cost(config: &PyramidConfig) -> (usize, u64) {
        let graph = config.graph();
        (graph.param_count(), graph.macs(&[Shape::new(1, 3, 480, 640)]).unwrap())
    }

    #[test]
    fn the_models_stay_within_their_budgets() {
        let nano = cost(&PyramidConfig::nano());
        let small = cost(&PyramidConfig::small());
        println!("parameters and multiply-adds: nano {nano:?}, small {small:?}");
        assert!(nano.0 <= 350_000 && nano.1 <= 500_000_000, "nano: {nano:?}");
        assert!(small.0 <= 1_500_000 && small.1 <= 3_000_000_000, "small: {small:?}");
    }

    /// As recipes and files name it that are older than other backbones.
    #[test]
    fn a_width_alone_is_mobilenet_v1_of_that_width() {
        let params = |backbone| {
            let graph = PyramidConfig { width: 4, backbone, ..PyramidConfig::small() }.graph();
            graph.params.iter().map(|p| (p.name.clone(), p.shape.clone())).collect::<Vec<_>>()
        };
        let by_width = params(None);
        assert_eq!(by_width, params(Some(BlockStack::mobilenet_v1(4))));
        assert_eq!(by_width.iter().find(|(name, _)| name == "body.stage1.0.0.weight").unwrap().1[0], 4);
        assert_ne!(by_width, params(Some(BlockStack::mobilenet_v1(8))));
    }

    #[test]
    fn outputs_are_a_logit_and_four_offsets_an_anchor_from_fine_to_coarse() {
        let graph = PyramidConfig::nano().graph();
        let names: Vec<&str> = graph.outputs.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["predict3", "predict4", "predict5", "predict6"]);
        let with_finest = PyramidConfig { anchors: vec![vec![[8.0, 10.0]; 3]; 5], ..PyramidConfig::nano() };
        for config in [PyramidConfig::nano(), with_finest] {
            // No side is a multiple of a stride: cells cover the picture to its end.
            let graph = config.graph();
            let shapes = graph.shapes(&[Shape::new(1, 3, 101, 131)]).unwrap();
            assert_eq!(graph.outputs.len(), config.levels().count());
            for ((stride, anchors), (name, id)) in config.levels().zip(&graph.outputs) {
                let side = |n: usize| n.div_ceil(stride);
                assert_eq!(shapes[id.0], Shape::new(1, 5 * anchors.len(), side(101), side(131)), "{name}");
                assert_eq!(*name, format!("predict{}", stride.ilog2()));
            }
        }
    }

    /// Candidates of the maps of a 256x192 input where one logit alone is not low.
    fn decoded(level: usize, cell: [usize; 2], anchor: usize, logit: f32, window: &Window) -> Vec<Face> {
        let config = PyramidConfig::nano();
        let mut floats = Vec::new();
        let mut views = Vec::new();
        for (i, (stride, anchors)) in config.levels().enumerate() {
            let anchors = anchors.len();
            let shape = Shape::new(1, 5 * anchors, 192 / stride, 256 / stride);
            let view = View::new(shape, floats.len(), [0; 4]);
            let cells = (0..shape.h * shape.w)
                .flat_map(|_| (0..5 * anchors).map(|v| if v < anchors { -20.0 } else { 0.0 }));
            floats.extend(cells);
            if i == level {
                let at = view.at(0, cell[0], cell[1]);
                floats[at + anchor] = logit;
                floats[at + anchors + 4 * anchor..][..4].copy_from_slice(&[1.0, -1.0, 0.0, 5.0 * 2f32.ln()]);
            }
            views.push(view);
        }
        let maps: Vec<Map<'_>> = views.into_iter().map(|view| Map::new(&floats, view)).collect();
        let mut faces = Vec::new();
        config.decode(&maps, window, 0.5, &mut |face| faces.push(face));
        faces
    }

    #[test]
    fn a_logit_gives_its_anchors_box_moved_and_scaled_by_the_offsets() {
        let nano = PyramidConfig::nano();
        for (level, (stride, anchors)) in nano.levels().enumerate() {
            for (anchor, &[w, h]) in anchors.iter().enumerate() {
                let (y, x) = (192 / stride - 1, 1);
                let faces = decoded(level, [y, x], anchor, 2.0, &Window::whole());
                assert_eq!(faces.len(), 1, "stride {stride} anchor {anchor}");
                let (b, s) = (faces[0].bbox, stride as f32);
                assert!((h / w - 1.25).abs() < 1e-5);
                // Offsets 1, -1 and 5 ln 2 by variances 0.1 and 0.2.
                let [cx, cy] = [(x as f32 + 0.5) * s + 0.1 * w, (y as f32 + 0.5) * s - 0.1 * h];
                let expected = [cx - w / 2.0, cy - h, cx + w / 2.0, cy + h];
                for (got, expected) in [b.x1, b.y1, b.x2, b.y2].into_iter().zip(expected) {
                    assert!((got - expected).abs() < 1e-3, "stride {stride} anchor {anchor}: {b:?}");
                }
                assert!((faces[0].score - 0.880_797).abs() < 1e-5);
            }
        }
    }

    #[test]
    fn what_is_below_the_threshold_or_not_owned_or_no_number_is_passed_over() {
        // Stride 16.
        assert!(decoded(1, [3, 4], 0, -0.01, &Window::whole()).is_empty());
        assert!(decoded(1, [3, 4], 0, f32::NAN, &Window::whole()).is_empty());
        let owned_x = Span { owned: 72.5..f32::INFINITY, ..Span::WHOLE };
        let right = Window { owned_x, ..Window::whole() };
        assert!(decoded(1, [3, 4], 0, 3.0, &right).is_empty());
        assert_eq!(decoded(1, [3, 5], 0, 3.0, &right).len(), 1);
    }

    #[test]
    fn a_model_file_gives_its_configuration_back_and_faces_on_the_anchors_of_its_cells() {
        for config in [ModelConfig::farface_nano(), ModelConfig::farface_small()] {
            let DetectorConfig::Pyramid(detector) = &config.detector else { panic!("{}", config.name) };
            let mut weights = Weights::random(&detector.graph(), 1);
            // Offsets of zero, so that every box is an anchor.
            for (stride, anchors) in detector.levels() {
                let level = stride.ilog2();
                for name in [format!("predict{level}.weight"), format!("predict{level}.bias")] {
                    let t = weights.tensors.get_mut(&name).unwrap();
                    let logits = t.data.len() / 5; // the first fifth, whatever comes behind an output channel
                    assert_eq!(t.shape[0], 5 * anchors.len());
                    t.data[logits..].fill(0.0);
                }
            }
            weights.metadata.insert(METADATA_KEY.into(), config.to_json().unwrap());
            let model = Model::from_weights(&weights).unwrap();
            assert_eq!(model.config(), &config);

            let mut session = Session::new(&model).unwrap();
            let pixels: Vec<u8> = (0..161 * 123 * 3).map(|i| (i * 7919 % 251) as u8).collect();
            let picture = ImageView::packed(161, 123, PixelFormat::Rgb8, &pixels).unwrap();
            let faces = session.detect(&picture).unwrap();
            assert!(faces.len() > 10, "{}: {} faces of random logits", config.name, faces.len());
            for face in faces {
                let b = face.bbox;
                let fits = detector.levels().any(|(stride, anchors)| {
                    let whole =
                        |v: f32| (v / stride as f32 - 0.5 - (v / stride as f32 - 0.5).round()).abs() < 1e-3;
                    let near = |a: f32, b: f32| (a - b).abs() < 1e-2;
                    whole((b.x1 + b.x2) / 2.0)
                        && whole((b.y1 + b.y2) / 2.0)
                        && anchors.iter().any(|a| near(a[0], b.width()) && near(a[1], b.height()))
                });
                assert!(
                    fits && face.score > config.score_threshold && face.landmarks.is_none(),
                    "{}: {face:?}",
                    config.name
                );
            }
        }
    }

    #[test]
    fn settings_that_no_network_can_have_are_refused() {
        fn blocks(c: &mut PyramidConfig, i: usize, to: Vec<usize>) {
            c.backbone.as_mut().unwrap().blocks[i] = to;
        }
        let broken: [fn(&mut PyramidConfig); 12] = [
            |c| c.width = 0,
            |c| c.channels = 1025,
            |c| c.fine_channels = 0,
            |c| c.head_blocks = 1000,
            |c| c.anchors.truncate(4),
            |c| c.anchors[2].clear(),
            |c| c.anchors[0] = vec![[8.0, 10.0]; 1000],
            |c| c.anchors[4][0][1] = -1.0,
            |c| c.variances[1] = f32::INFINITY,
            |c| blocks(c, 2, vec![]),
            |c| blocks(c, 4, vec![64, 1025]),
            |c| blocks(c, 0, vec![8; 65]),
        ];
        assert!(PyramidConfig::nano().check().is_ok());
        for (i, breaks) in broken.into_iter().enumerate() {
            let mut config = PyramidConfig::nano();
            breaks(&mut config);
            let error = config.check().expect_err(&format!("case {i} must be refused")).to_string();
            assert!(error.contains("detector pyramid"), "{error}");
        }
    }
}
