//! HAMBox (Liu et al. 2020): RetinaNet's heads on six levels of a ResNet's pyramid, one square anchor a cell, smaller than
//! usual so that more faces overlap one. Its way of training, in `train::matching` and `train::losses`, finds anchors for
//! the faces that have too few.

use super::anchors::{decode_level, LevelAnchors};
#[cfg(feature = "train")]
use super::detector::{logit, redraw};
use super::detector::{Detector, Map, Role, Window};
use super::face::Face;
use super::heads::{Field, Head};
use super::names::switches;
use crate::error::{Error, Result};
use crate::graph::{Builder, Graph};
use crate::nets::hambox::{hambox, HamBox, TopDown, LEVELS};
use crate::nets::resnet::ResNet;
use serde::{Deserialize, Serialize};

/// Settings of the network and its boxes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HamBoxConfig {
    /// Backbone.
    pub backbone: ResNet,
    /// Channels of pyramid and heads.
    pub channels: usize,
    /// Where the top-down path begins.
    pub top_down: TopDown,
    /// SSH's context module on every level.
    pub context: bool,
    /// Four 3x3 convolutions in front of each prediction.
    pub deep_head: bool,
    /// Side of the anchor on strides 4 to 128, pixels.
    pub scales: [f32; 6],
}

/// Sides of RetinaNet's anchors here (section 4.1): four times the stride.
const SCALES: [f32; 6] = [16.0, 32.0, 64.0, 128.0, 256.0, 512.0];
/// By how much the paper's are smaller (section 3.1, footnote 5).
const RATIO: f32 = 0.68;

impl HamBoxConfig {
    /// The baseline of table 4 on a backbone: anchors of four strides, predictions straight from the pyramid.
    pub fn baseline(backbone: ResNet) -> Self {
        let (top_down, scales) = (TopDown::Lfpn, SCALES);
        Self { backbone, channels: 256, top_down, context: false, deep_head: false, scales }
    }

    /// By name: `hambox`, its switches, then `-r18`, `-r34`, `-r50`, `-r101` or `-r152`. Switches, in this order: `-sms`
    /// (anchors of 0.68 times the size), `-dh` (deep head), `-ssh` (context module), `-fpn` (top-down path from C7).
    /// `hambox-r50`, without any, has the first three, `hambox-baseline-r50` none.
    pub fn named(name: &str) -> Option<Self> {
        let (name, backbone) = ResNet::split_name(name)?;
        let text = match name.strip_prefix("hambox")? {
            "" => "-sms-dh-ssh",
            "-fpn" => "-sms-dh-ssh-fpn",
            "-baseline" => "",
            "-baseline-fpn" => "-fpn",
            some => some,
        };
        let [smaller, deep_head, context, fpn] = switches(text, ["-sms", "-dh", "-ssh", "-fpn"])?;
        let config = Self::baseline(backbone);
        Some(Self {
            scales: if smaller { SCALES.map(|s| s * RATIO) } else { SCALES },
            top_down: if fpn { TopDown::Fpn } else { TopDown::Lfpn },
            deep_head,
            context,
            ..config
        })
    }

    pub(super) fn check(&self) -> Result<()> {
        let sane = |n: usize, most: usize| n > 0 && n <= most;
        let context = !self.context || self.channels.is_multiple_of(4);
        if !(sane(self.channels, 1024) && context && self.backbone.is_sane()) {
            return Err(Error::InvalidModel(
                "detector hambox: channels 1..1024 (with a context module a multiple of 4), backbone.width 1..256, backbone.blocks 1..100 each"
                    .into(),
            ));
        }
        if !self.scales.iter().all(|s| s.is_finite() && *s > 0.0) {
            return Err(Error::InvalidModel("detector hambox: scales above 0".into()));
        }
        Ok(())
    }

    /// Starts new predictions as RetinaNet does (Lin et al. 2017, section 4.1): weights with a deviation of 0.01, logits that
    /// say `probability`. The convolutions before them keep He's deviation. `is_new` tells by name which tensors do not come from a start.
    #[cfg(feature = "train")]
    pub fn start_new(
        &self,
        weights: &mut crate::graph::Weights,
        probability: f32,
        is_new: impl Fn(&str) -> bool,
    ) {
        for (name, w) in &mut weights.tensors {
            let (class, boxes) = (name.starts_with("class.predict"), name.starts_with("box.predict"));
            if !((class || boxes) && is_new(name)) {
                continue;
            }
            if name.ends_with(".weight") {
                redraw(&mut w.data, 9 * self.channels, 0.01);
            } else if class {
                w.data.fill(logit(probability));
            }
        }
    }

    /// Stride and side of the anchors of every level, the outputs' order.
    pub fn levels(&self) -> impl Iterator<Item = (usize, f32)> + '_ {
        LEVELS.map(|level| 1 << level).zip(self.scales)
    }

    /// The network as it is trained with so many pyramid anchors: further outputs, behind those of
    /// [`graph`](Detector::graph).
    #[cfg(feature = "train")]
    pub fn training_graph(&self, pyramid_anchors: usize) -> Graph {
        self.network(pyramid_anchors)
    }

    fn network(&self, pyramid_anchors: usize) -> Graph {
        let mut b = Builder::new();
        let image = b.input("image", 3);
        let &Self { backbone, channels, top_down, context, deep_head, .. } = self;
        hambox(&mut b, image, &HamBox { backbone, channels, top_down, context, deep_head }, pyramid_anchors);
        b.finish()
    }
}

impl Detector for HamBoxConfig {
    /// For strides 4 to 128, level l of stride 2^l, `class{l}`, a logit a cell, and `box{l}`.
    fn graph(&self) -> Graph {
        self.network(0)
    }

    fn roles(&self) -> Vec<Role> {
        self.levels().flat_map(|(_, side)| [Role::of([[side; 2]]); 2]).collect()
    }

    fn heads(&self, _scale: f32) -> Vec<Head> {
        let head = |(level, (stride, side)): (usize, (usize, f32))| {
            Head::new(stride, [[side; 2]], Field::whole(2 * level, 1), Field::whole(2 * level + 1, 4))
        };
        self.levels().enumerate().map(head).collect()
    }

    fn decode(&self, maps: &[Map<'_>], window: &Window, threshold: f32, sink: &mut dyn FnMut(Face)) {
        for (maps, (stride, side)) in maps.chunks_exact(2).zip(self.levels()) {
            let anchors = LevelAnchors { stride, sizes: &[[side, side]], variances: [1.0; 2], reach: None };
            decode_level([&maps[0], &maps[1]], &anchors, window, threshold, sink);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::Isa;
    use crate::graph::{Compiled, Plan, Weights};
    use crate::shape::Shape;

    #[test]
    fn names_are_the_rows_of_table_4() {
        let named = |name: &str| HamBoxConfig::named(name);
        let base = HamBoxConfig::baseline(ResNet::R50);
        let sms = HamBoxConfig { scales: SCALES.map(|s| s * 0.68), ..base.clone() };
        let deep = HamBoxConfig { deep_head: true, ..sms.clone() };
        let whole = HamBoxConfig { context: true, ..deep.clone() };
        assert_eq!(named("hambox-baseline-r50"), Some(base.clone()));
        assert_eq!(named("hambox-sms-r50"), Some(sms));
        assert_eq!(named("hambox-sms-dh-r50"), Some(deep));
        assert_eq!(named("hambox-sms-dh-ssh-r50"), Some(whole.clone()));
        assert_eq!(named("hambox-r50"), Some(whole.clone()));
        assert_eq!(named("hambox-fpn-r50"), Some(HamBoxConfig { top_down: TopDown::Fpn, ..whole }));
        let fpn = HamBoxConfig { top_down: TopDown::Fpn, ..base };
        assert_eq!(named("hambox-baseline-fpn-r50"), Some(fpn));
        for wrong in [
            "hambox",
            "hambox-r51",
            "hambox-dh-sms-r50",
            "hambox-baseline-dh-r50",
            "hamboxr50",
            "hambox--r50",
        ] {
            assert_eq!(named(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn every_level_has_its_stride_whatever_the_size() {
        for name in ["hambox-r18", "hambox-fpn-r18", "hambox-baseline-r18"] {
            let config = HamBoxConfig::named(name).unwrap();
            let backbone = ResNet { width: 4, ..config.backbone };
            let config = HamBoxConfig { backbone, channels: 8, ..config };
            let graph = config.graph();
            let shapes = graph.shapes(&[Shape::new(1, 3, 101, 131)]).unwrap();
            assert_eq!(graph.outputs.len(), 12);
            for (pair, (stride, _)) in graph.outputs.chunks_exact(2).zip(config.levels()) {
                let size = |n: usize| n.div_ceil(stride);
                let [class, offsets] = [0, 1].map(|i| shapes[pair[i].1 .0]);
                assert_eq!(class, Shape::new(1, 1, size(101), size(131)), "{name}, stride {stride}");
                assert_eq!(offsets, Shape { c: 4, ..class }, "{name}, stride {stride}");
            }
        }
    }

    #[test]
    fn heads_that_levels_share_are_packed_once() {
        let config = HamBoxConfig::named("hambox-r18").unwrap();
        let config =
            HamBoxConfig { backbone: ResNet { width: 4, ..config.backbone }, channels: 64, ..config };
        let graph = config.graph();
        let network = Compiled::new(&graph, &Weights::random(&graph, 1), Isa::Generic).unwrap();
        let steps = Plan::describe(&network, &[Shape::new(1, 3, 64, 64)]).unwrap();
        let of =
            |name: &str| steps.iter().filter(|s| s.name == name).map(|s| s.weight_bytes).collect::<Vec<_>>();
        let conv = of("box.conv2");
        assert_eq!(conv.len(), 6, "a step a level");
        assert!(conv[0] >= 64 * 64 * 9 * 4 && conv[1..].iter().all(|&b| b == 0), "{conv:?}");
        let sum: usize = steps.iter().map(|s| s.weight_bytes).sum();
        assert_eq!(network.weight_bytes(), sum);
        // What has weights of its own keeps them.
        assert!((2..8).all(|level| of(&format!("fpn.output{level}"))[0] > 0));
    }

    #[cfg(feature = "train")]
    #[test]
    fn pyramid_anchors_add_outputs_and_their_convolutions_alone() {
        let config = HamBoxConfig::named("hambox-r18").unwrap();
        let config = HamBoxConfig { backbone: ResNet { width: 4, ..config.backbone }, channels: 8, ..config };
        let (plain, around) = (config.graph(), config.training_graph(2));
        assert_eq!(
            around.outputs[..12].iter().map(|(n, _)| n).collect::<Vec<_>>(),
            plain.outputs.iter().map(|(n, _)| n).collect::<Vec<_>>()
        );
        let names: Vec<&str> = around.outputs[12..].iter().map(|(n, _)| n.as_str()).collect();
        let expected: Vec<String> = [(1, 3..8), (2, 4..8)]
            .into_iter()
            .flat_map(|(k, levels)| {
                levels.flat_map(move |l| [format!("class{l}.{k}"), format!("box{l}.{k}")])
            })
            .collect();
        assert_eq!(names, expected);
        // 3x3 with bias to 1 + 4 values, twice.
        assert_eq!(around.param_count() - plain.param_count(), 2 * 5 * (9 * 8 + 1));
    }

    #[test]
    fn settings_that_no_network_can_have_are_refused() {
        let broken: [fn(&mut HamBoxConfig); 5] = [
            |c| c.channels = 0,
            |c| c.channels = 66,
            |c| c.backbone.width = 1000,
            |c| c.backbone.blocks[2] = 0,
            |c| c.scales[5] = f32::NAN,
        ];
        let config = HamBoxConfig::named("hambox-r50").unwrap();
        assert!(config.check().is_ok());
        for (i, breaks) in broken.into_iter().enumerate() {
            let mut config = config.clone();
            breaks(&mut config);
            let error = config.check().expect_err(&format!("case {i} must be refused")).to_string();
            assert!(error.contains("detector hambox"), "{error}");
        }
    }
}
