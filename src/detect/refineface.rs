//! RefineFace (Zhang et al. 2019): a single shot that looks twice. Its first step drops the anchors of fine levels that are
//! surely background and moves those of coarse levels; what the second step says counts for the anchors as the first left
//! them. The scale-aware margin and the feature supervision module are matters of training.

use super::anchors::{owned_cells, Anchor};
use super::detector::{logit, sigmoid, Detector, Map, Role, Window};
use super::face::Face;
use super::heads::{Field, Head};
use super::names::switches;
use crate::error::{Error, Result};
use crate::graph::{Builder, Graph, NodeId};
#[cfg(feature = "train")]
use crate::nets::refineface::feature_supervision;
use crate::nets::refineface::{first_step, refineface, FirstStep, RefineFace, LEVELS};
use crate::nets::resnet::ResNet;
use serde::{Deserialize, Serialize};

/// Settings of the network and its boxes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RefineFaceConfig {
    /// Backbone.
    pub backbone: ResNet,
    /// Channels of pyramid and subnets.
    pub channels: usize,
    /// Selective two-step regression.
    pub two_step_regression: bool,
    /// Selective two-step classification.
    pub two_step_classification: bool,
    /// Receptive field enhancement.
    pub receptive_field: bool,
    /// SSH context on the levels of the second step, which is HAMBox's.
    #[serde(default)]
    pub context: bool,
    /// Square roots of the anchors' areas in strides.
    pub scales: Vec<f32>,
    /// Height of an anchor over its width.
    pub aspect: f32,
    /// A face's probability that an anchor must pass in the first step, where that classifies (section 3.2: 1 - theta).
    pub first_step_score: f32,
}

/// Most anchors a cell.
const MAX_SCALES: usize = 16;

impl RefineFaceConfig {
    /// The baseline of table 1: RetinaNet with the anchors of section 3.6.
    pub fn baseline(backbone: ResNet) -> Self {
        Self {
            backbone,
            channels: 256,
            two_step_regression: false,
            two_step_classification: false,
            receptive_field: false,
            context: false,
            scales: vec![2.0, 8f32.sqrt()],
            aspect: 1.25,
            first_step_score: 0.01,
        }
    }

    /// Ours of what the papers found: HAMBox's anchors, one a cell, square, 0.68 times RetinaNet's, and context on RefineFace's two
    /// steps and receptive fields. Its training (`recipes/farface-crowd-r50.toml`) adds HAMBox's mining, group sampling, the
    /// scale-aware margin, the feature supervision and the least-square IoU.
    pub fn crowd(backbone: ResNet) -> Self {
        Self {
            two_step_regression: true,
            two_step_classification: true,
            receptive_field: true,
            context: true,
            scales: vec![4.0 * 0.68],
            aspect: 1.0,
            ..Self::baseline(backbone)
        }
    }

    /// By name: `farface-crowd` with a backbone; or `refineface`, its switches, then `-r18`, `-r34`, `-r50`, `-r101` or `-r152`. Switches, in this order: `-str`,
    /// `-stc`, `-rfe`. `refineface-r50`, without any, has all three, `refineface-baseline-r50` none.
    pub fn named(name: &str) -> Option<Self> {
        let (name, backbone) = ResNet::split_name(name)?;
        if name == "farface-crowd" {
            return Some(Self::crowd(backbone));
        }
        let text = match name.strip_prefix("refineface")? {
            "" => "-str-stc-rfe",
            "-baseline" => "",
            some => some,
        };
        let [two_step_regression, two_step_classification, receptive_field] =
            switches(text, ["-str", "-stc", "-rfe"])?;
        let config = Self::baseline(backbone);
        Some(Self { two_step_regression, two_step_classification, receptive_field, ..config })
    }

    pub(super) fn check(&self) -> Result<()> {
        let bad = |what: &str| Err(Error::InvalidModel(format!("detector refineface: {what}")));
        let sane = |n: usize, most: usize| n > 0 && n <= most;
        if !(sane(self.channels, 1024) && self.channels.is_multiple_of(4) && self.backbone.is_sane()) {
            return bad(
                "channels a multiple of 4 up to 1024, backbone.width 1..256, backbone.blocks 1..100 each",
            );
        }
        let sizes = self.scales.iter().chain([&self.aspect]).all(|v| v.is_finite() && *v > 0.0);
        if !(sane(self.scales.len(), MAX_SCALES) && sizes && (0.0..=1.0).contains(&self.first_step_score)) {
            return bad("1 to 16 scales above 0, aspect above 0, first_step_score from 0 to 1");
        }
        Ok(())
    }

    /// Width and height of the anchors on a level of this stride, pixels.
    pub fn anchors(&self, stride: usize) -> impl Iterator<Item = [f32; 2]> + '_ {
        let root = self.aspect.sqrt();
        self.scales.iter().map(move |s| s * stride as f32).map(move |side| [side / root, side * root])
    }

    /// Least logit of the first step with which an anchor is seen by the second.
    pub(crate) fn survives(&self) -> f32 {
        logit(self.first_step_score)
    }

    /// Starts new weights as the paper does: those behind the backbone by Xavier's rule (section 3.6; for fan-in f and fan-out g
    /// a deviation of sqrt(2 / (f + g))), and logits that say `probability` (Lin et al. 2017, section 4.1). `is_new` tells by
    /// name which tensors do not come from a start.
    #[cfg(feature = "train")]
    pub fn start_new(
        &self,
        weights: &mut crate::graph::Weights,
        probability: f32,
        is_new: impl Fn(&str) -> bool,
    ) {
        for (name, w) in &mut weights.tensors {
            let own =
                ["first.", "fpn.", "class.", "box.", "supervised."].iter().any(|part| name.starts_with(part));
            if !(own && is_new(name)) {
                continue;
            }
            if let [outputs, inputs, ..] = w.shape[..] {
                // They have He's deviation, sqrt(2 / f).
                let xavier = (inputs as f32 / (inputs + outputs) as f32).sqrt();
                w.data.iter_mut().for_each(|v| *v *= xavier);
            } else if name == "class.predict.bias" || name == "supervised.predict.bias" {
                w.data.fill(logit(probability));
            }
        }
    }

    /// The network as it is trained with the feature supervision module: further inputs and outputs, behind those of
    /// [`graph`](Detector::graph).
    #[cfg(feature = "train")]
    pub fn training_graph(&self) -> Graph {
        let (mut b, pyramid) = self.network();
        feature_supervision(&mut b, &pyramid, self.channels);
        b.finish()
    }

    /// The network, and its pyramid's levels.
    fn network(&self) -> (Builder, Vec<NodeId>) {
        let mut b = Builder::new();
        let image = b.input("image", 3);
        let &Self {
            backbone,
            channels,
            two_step_regression,
            two_step_classification,
            receptive_field,
            context,
            ..
        } = self;
        let anchors = self.scales.len();
        let net = RefineFace {
            backbone,
            channels,
            anchors,
            two_step_regression,
            two_step_classification,
            receptive_field,
            context,
        };
        let pyramid = refineface(&mut b, image, &net);
        (b, pyramid)
    }

    /// What the first step says of a level.
    pub(crate) fn first_step(&self, level: usize) -> Option<FirstStep> {
        first_step(level, self.two_step_classification, self.two_step_regression)
    }
}

impl Detector for RefineFaceConfig {
    /// From level 2 of stride 4 to 7 of stride 128: of the first step `class{l}.1` (two-step classification) or `box{l}.1`
    /// (two-step regression), then `class{l}`, a logit an anchor, and `box{l}`, four offsets.
    fn graph(&self) -> Graph {
        self.network().0.finish()
    }

    /// Where the first step classifies, the second is asked for the cells with an anchor that passes it.
    fn roles(&self) -> Vec<Role> {
        let role = |level: usize| Role::of(self.anchors(1 << level));
        let firsts = LEVELS.filter(|&level| self.first_step(level).is_some());
        let second = |level| {
            let filters = self.first_step(level) == Some(FirstStep::Classes);
            let by = filters.then(|| firsts.clone().position(|l| l == level)).flatten();
            [Role { asked_by: by.map(|output| (output, self.survives())), ..role(level) }; 2]
        };
        firsts.clone().map(role).chain(LEVELS.flat_map(second)).collect()
    }

    fn heads(&self, _scale: f32) -> Vec<Head> {
        let firsts = LEVELS.filter(|&level| self.first_step(level).is_some());
        let head = |(i, level)| {
            let second = firsts.clone().count() + 2 * i;
            let stride = 1usize << level;
            let plain =
                Head::new(stride, self.anchors(stride), Field::whole(second, 1), Field::whole(second + 1, 4));
            let first = firsts.clone().position(|l| l == level).zip(self.first_step(level));
            match first {
                Some((output, FirstStep::Classes)) => {
                    Head { filter: Some((Field::whole(output, 1), self.survives())), ..plain }
                }
                Some((output, FirstStep::Boxes)) => Head { mover: Some(Field::whole(output, 4)), ..plain },
                None => plain,
            }
        };
        LEVELS.enumerate().map(head).collect()
    }

    fn decode(&self, maps: &[Map<'_>], window: &Window, threshold: f32, sink: &mut dyn FnMut(Face)) {
        let least = logit(threshold);
        let survives = self.survives();
        let (first, second) = maps.split_at(LEVELS.filter_map(|l| self.first_step(l)).count());
        let mut first = first.iter();
        for (maps, level) in second.chunks_exact(2).zip(LEVELS) {
            let [class, boxes] = [&maps[0], &maps[1]];
            let step = self.first_step(level);
            let before = step.and_then(|_| first.next());
            let filter = before.filter(|_| step == Some(FirstStep::Classes));
            let mover = before.filter(|_| step == Some(FirstStep::Boxes));
            let stride = 1 << level;
            let mut sizes = [[0.0; 2]; MAX_SCALES];
            sizes.iter_mut().zip(self.anchors(stride)).for_each(|(size, anchor)| *size = anchor);
            for y in owned_cells(&window.owned_y, stride, class.height()) {
                for x in owned_cells(&window.owned_x, stride, class.width()) {
                    for (a, (&logit, &size)) in class.pixel(y, x).iter().zip(&sizes).enumerate() {
                        // False for a NaN too.
                        let face = logit > least && filter.is_none_or(|map| map.pixel(y, x)[a] > survives);
                        if !face {
                            continue;
                        }
                        let mut anchor = Anchor::on_cell(y, x, stride, size);
                        if let Some(map) = mover {
                            anchor = anchor.moved(&map.pixel(y, x)[4 * a..], [1.0; 2]);
                        }
                        let bbox = anchor.decode(&boxes.pixel(y, x)[4 * a..], [1.0; 2]);
                        sink(Face { bbox, score: sigmoid(logit), ..Face::default() });
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::{isa, Arena, Pool, View};
    use crate::detect::detector::wants;
    use crate::detect::BBox;
    use crate::graph::{Compiled, Plan, Want, Weights};
    use crate::shape::{Shape, Tensor};

    #[test]
    fn names_are_the_inference_switches_of_table_1() {
        let of = |name: &str| {
            let c = RefineFaceConfig::named(name)?;
            Some([c.two_step_regression, c.two_step_classification, c.receptive_field])
        };
        assert_eq!(of("refineface-r18"), Some([true; 3]));
        assert_eq!(of("refineface-baseline-r152"), Some([false; 3]));
        assert_eq!(of("refineface-str-r50"), Some([true, false, false]));
        assert_eq!(of("refineface-stc-r50"), Some([false, true, false]));
        assert_eq!(of("refineface-rfe-r50"), Some([false, false, true]));
        assert_eq!(of("refineface-str-stc-r101"), Some([true, true, false]));
        for wrong in
            ["refineface-rfe-str-r50", "refineface-str-str-r50", "refineface--r50", "refinefacestr-r50"]
        {
            assert_eq!(of(wrong), None, "{wrong}");
        }
    }

    /// Faces of the maps of a 256x256 input, where logits of the second step are -20 and all other values 0 but those that
    /// `set` names: output, row, column and channel, value.
    fn decoded(config: &RefineFaceConfig, set: &[(&str, [usize; 3], f32)]) -> Vec<Face> {
        let graph = config.graph();
        let shapes = graph.shapes(&[Shape::new(1, 3, 256, 256)]).unwrap();
        let mut floats = Vec::new();
        let mut views = Vec::new();
        for (name, id) in &graph.outputs {
            let view = View::new(shapes[id.0], floats.len(), [0; 4]);
            let rest = if name.starts_with("class") && !name.ends_with(".1") { -20.0 } else { 0.0 };
            floats.resize(floats.len() + shapes[id.0].len(), rest);
            for (_, [y, x, c], v) in set.iter().filter(|(n, ..)| n == name) {
                floats[view.at(0, *y, *x) + c] = *v;
            }
            views.push(view);
        }
        let maps: Vec<Map<'_>> = views.into_iter().map(|view| Map::new(&floats, view)).collect();
        let mut faces = Vec::new();
        config.decode(&maps, &Window::whole(), 0.5, &mut |face| faces.push(face));
        faces
    }

    #[test]
    fn the_first_step_drops_fine_anchors_and_moves_coarse_ones() {
        let config = RefineFaceConfig::named("refineface-r18").unwrap();
        let config =
            RefineFaceConfig { backbone: ResNet { width: 4, ..config.backbone }, channels: 8, ..config };
        // Stride 8: p = 0.0099 does not pass, 0.0101 does; NaN neither.
        let [under, over] = [0.0099f32, 0.0101].map(|p| (p / (1.0 - p)).ln());
        let face = ("class3", [2, 5, 1], 3.0);
        assert!(decoded(&config, &[face, ("class3.1", [2, 5, 1], under)]).is_empty());
        assert!(decoded(&config, &[face, ("class3.1", [2, 5, 1], f32::NAN)]).is_empty());
        assert!(decoded(&config, &[("class3", [2, 5, 1], f32::NAN)]).is_empty());
        assert_eq!(decoded(&config, &[face, ("class3.1", [2, 5, 1], over)]).len(), 1);

        // Stride 64, first anchor: 128 px in area's root. Moved right by half its width and made twice as high, then up by a
        // quarter of its new height and made half as wide.
        let faces = decoded(
            &config,
            &[
                ("class6", [1, 2, 0], 2.0),
                ("box6.1", [1, 2, 0], 0.5),
                ("box6.1", [1, 2, 3], 2f32.ln()),
                ("box6", [1, 2, 1], -0.25),
                ("box6", [1, 2, 2], -(2f32.ln())),
            ],
        );
        let (w, h) = (128.0 / 1.25f32.sqrt(), 128.0 * 1.25f32.sqrt());
        let (cx, cy) = (160.0 + 0.5 * w, 96.0 - 0.25 * 2.0 * h);
        let expected = BBox::new(cx - w / 4.0, cy - h, cx + w / 4.0, cy + h);
        let [found] = faces[..] else { panic!("{faces:?}") };
        let near = |a: f32, b: f32| (a - b).abs() < 1e-3;
        let b = found.bbox;
        assert!(
            near(b.x1, expected.x1)
                && near(b.y1, expected.y1)
                && near(b.x2, expected.x2)
                && near(b.y2, expected.y2),
            "{b:?}, {expected:?}"
        );
    }

    /// What the session's plan computes and what is found on the network's whole outputs: the same faces. (Winograd's tiles have
    /// zeros where nothing was computed, so that roundings differ.)
    #[test]
    fn the_second_step_is_computed_for_what_the_first_leaves_alone() {
        for name in ["refineface-r18", "farface-crowd-r18", "refineface-stc-r18"] {
            let config = RefineFaceConfig::named(name).unwrap();
            let mut config =
                RefineFaceConfig { backbone: ResNet { width: 4, ..config.backbone }, channels: 16, ..config };
            let graph = config.graph();
            let mut weights = Weights::random(&graph, 5);
            let shape = Shape::new(1, 3, 256, 384);
            let noise = (0..shape.len() as u64).map(|i| ((i * i % 8191) as f32).sin());
            let picture = Tensor::from_vec(shape, noise.collect());
            let run = |weights: &Weights, wants: &[Want]| {
                let network = Compiled::new(&graph, weights, isa::detected()).unwrap();
                let plan = Plan::for_wants(&network, &[shape], wants).unwrap();
                let (mut arena, mut pool) = (Arena::default(), Pool::new(2).unwrap());
                plan.run_tensors(&mut arena, &mut pool, std::slice::from_ref(&picture)).unwrap()
            };
            let faces = |config: &RefineFaceConfig, outputs: &[Tensor]| {
                let views = outputs.iter().map(|t| View::new(t.shape, 0, [0; 4]));
                let maps: Vec<Map<'_>> =
                    outputs.iter().zip(views).map(|(t, view)| Map::new(&t.data, view)).collect();
                let mut faces = Vec::new();
                config.decode(&maps, &Window::whole(), 0.0, &mut |face| faces.push(face));
                faces
            };
            // Logits and offsets up to 2.
            for (kind, outputs) in [("class", ["class2", "class5"]), ("box", ["box2", "box5"])] {
                let wild = run(&weights, &[]);
                let maps = graph.outputs.iter().zip(&wild).filter(|((n, _), _)| outputs.contains(&&**n));
                let values = maps.flat_map(|(_, map)| &map.data);
                let most = values.fold(0.0f32, |most, v| most.max(v.abs()));
                let predict = weights.tensors.get_mut(&format!("{kind}.predict.weight")).unwrap();
                predict.data.iter_mut().for_each(|v| *v *= 2.0 / most);
            }
            let whole = run(&weights, &[]);
            // A hundredth of the finest level's cells survive.
            let mut first: Vec<f32> = whole[0].data.clone();
            first.sort_by(|a, b| b.total_cmp(a));
            config.first_step_score = sigmoid(first[first.len() / 100]);
            let everything = [0.0, f32::INFINITY];
            let asked = run(&weights, &wants(&config, everything));
            let (expected, found) = (faces(&config, &whole), faces(&config, &asked));
            assert!(expected.len() > 100, "{name}: {}", expected.len());
            assert_eq!(expected.len(), found.len(), "{name}");
            let numbers = |f: &Face| [f.bbox.x1, f.bbox.y1, f.bbox.x2, f.bbox.y2, f.score];
            for (a, b) in expected.iter().zip(&found) {
                let largest = numbers(a).iter().fold(1.0f32, |most, v| most.max(v.abs()));
                let close = numbers(a).iter().zip(numbers(b)).all(|(a, b)| (a - b).abs() < 1e-4 * largest);
                assert!(close, "{name}: {a:?}, {b:?}");
            }
            let at = graph.outputs.iter().position(|(n, _)| n == "class2").unwrap();
            let pairs = whole[at].data.iter().zip(&asked[at].data);
            let same = pairs.filter(|(a, b)| (*a - *b).abs() < 1e-4).count();
            assert!(same < whole[at].data.len() / 2, "{name}: {same}");

            // Faces of 20 to 60 px are none of P7's matter, whose anchors have 256 px and more.
            let some = wants(&config, [20.0, 60.0]);
            let of = |output: &str| some[graph.outputs.iter().position(|(n, _)| n == output).unwrap()];
            assert_eq!((of("class7"), of("box7")), (Want::Nothing, Want::Nothing), "{name}");
            assert!(matches!(of("box2"), Want::Where { output: 0, .. }), "{name}");
            let few = run(&weights, &some);
            let small = |f: &&Face| (20.0..60.0).contains(&f.size());
            assert!(faces(&config, &few).iter().all(|f| found.contains(f)));
            assert!(faces(&config, &few).iter().filter(small).count() > 20);
        }
    }

    #[test]
    fn only_the_levels_that_are_asked_twice_have_a_first_output() {
        for (name, expected) in [
            ("refineface-baseline-r18", vec![]),
            ("refineface-stc-r18", vec!["class2.1", "class3.1", "class4.1"]),
            ("refineface-str-r18", vec!["box5.1", "box6.1", "box7.1"]),
        ] {
            let config = RefineFaceConfig::named(name).unwrap();
            let config =
                RefineFaceConfig { backbone: ResNet { width: 4, ..config.backbone }, channels: 8, ..config };
            let graph = config.graph();
            let first: Vec<&str> =
                graph.outputs.iter().map(|(n, _)| n.as_str()).filter(|n| n.ends_with(".1")).collect();
            assert_eq!(first, expected, "{name}");
            assert_eq!(graph.outputs.len(), expected.len() + 12, "{name}");
            // C6 and C7 are made where they are looked at.
            let has = |prefix: &str| graph.params.iter().any(|p| p.name.starts_with(prefix));
            assert_eq!(has("first.down6."), name.contains("-str"), "{name}");
        }
    }

    #[test]
    fn settings_that_no_network_can_have_are_refused() {
        let broken: [fn(&mut RefineFaceConfig); 6] = [
            |c| c.channels = 66,
            |c| c.backbone.width = 0,
            |c| c.scales.clear(),
            |c| c.scales[0] = -1.0,
            |c| c.aspect = f32::INFINITY,
            |c| c.first_step_score = f32::NAN,
        ];
        let config = RefineFaceConfig::named("refineface-r50").unwrap();
        assert!(config.check().is_ok());
        for (i, breaks) in broken.into_iter().enumerate() {
            let mut config = config.clone();
            breaks(&mut config);
            let error = config.check().expect_err(&format!("case {i} must be refused")).to_string();
            assert!(error.contains("detector refineface"), "{error}");
        }
    }
}
