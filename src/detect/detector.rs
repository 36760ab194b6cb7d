//! What every detector gives the session: a network, and the way from its outputs to candidates.

use super::boxes::BBox;
use super::face::{Ellipse, Face};
use super::heads::Head;
use crate::cpu::View;
use crate::error::Result;
use crate::graph::{Graph, Want};
use crate::layers::RoiAlign;
use crate::pixels::{Size, Tile};
use crate::shape::Shape;
use std::ops::Range;

/// An output map of one image, channels-last.
pub struct Map<'a> {
    data: &'a [f32],
    view: View,
}

impl<'a> Map<'a> {
    /// The map that `view` shows of an arena's floats.
    pub fn new(data: &'a [f32], view: View) -> Self {
        Self { data, view }
    }

    /// Rows.
    pub fn height(&self) -> usize {
        self.view.shape.h
    }

    /// Columns.
    pub fn width(&self) -> usize {
        self.view.shape.w
    }

    /// Channels of cell (y, x).
    #[inline]
    pub fn pixel(&self, y: usize, x: usize) -> &'a [f32] {
        let at = self.view.at(0, y, x);
        &self.data[at..at + self.view.shape.c]
    }
}

/// One axis of a [`Window`], in its network pixels.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    /// The cells whose centres lie here are this pass's to report; infinite at the picture's border.
    pub owned: Range<f32>,
    /// Where the picture ends: cells that begin behind it show nothing but padding.
    pub end: f32,
}

impl Span {
    /// Everything.
    pub const WHOLE: Self = Self { owned: f32::NEG_INFINITY..f32::INFINITY, end: f32::INFINITY };
}

/// The part of a network input whose cells are this pass's to report.
#[derive(Clone, Debug, PartialEq)]
pub struct Window {
    /// Of the level, network pixels a pixel of the picture.
    pub scale: f32,
    /// Columns.
    pub owned_x: Span,
    /// Rows.
    pub owned_y: Span,
}

impl Window {
    /// The own cells of a tile of a level of `picture` px, `scale` times its picture, that the network sees padded to `padded`
    /// px.
    pub fn of(tile: &Tile, padded: Size, picture: Size, scale: f32) -> Self {
        let Tile { window, owned } = *tile;
        let axis = |from: usize, length: usize, start: usize, padded: usize, picture: usize| {
            let low = if from == 0 { f32::NEG_INFINITY } else { (from - start) as f32 };
            let high = if from + length == padded { f32::INFINITY } else { (from + length - start) as f32 };
            Span { owned: low..high, end: picture as f32 - start as f32 }
        };
        Self {
            scale,
            owned_x: axis(owned.x, owned.width, window.x, padded.width, picture.width),
            owned_y: axis(owned.y, owned.height, window.y, padded.height, picture.height),
        }
    }

    /// Everything, at scale 1.
    pub fn whole() -> Self {
        Self { scale: 1.0, owned_x: Span::WHOLE, owned_y: Span::WHOLE }
    }
}

/// Sigmoid(x) is above `threshold` where x is above this.
pub(crate) fn logit(threshold: f32) -> f32 {
    (threshold.max(f32::MIN_POSITIVE) / (1.0 - threshold).max(f32::MIN_POSITIVE)).ln()
}

/// Gives weights that He's rule drew for `fan_in` inputs this deviation.
#[cfg(feature = "train")]
pub(super) fn redraw(weights: &mut [f32], fan_in: usize, deviation: f32) {
    let he = (2.0 / fan_in as f32).sqrt();
    weights.iter_mut().for_each(|v| *v *= deviation / he);
}

pub(super) use crate::cpu::simple::sigmoid;

/// Softmax of two logits, background and face: the face's part.
pub(super) fn face_probability(logits: &[f32]) -> f32 {
    sigmoid(logits[1] - logits[0])
}

/// What an output of a detector's network speaks of.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Role {
    /// Longer sides of its smallest and largest anchor, network pixels.
    pub anchors: [f32; 2],
    /// Number of the output that says of which cells it is asked, and the value that a cell passes; None: of all cells.
    pub asked_by: Option<(usize, f32)>,
}

impl Role {
    /// For anchors of these widths and heights, asked of all cells.
    pub fn of(anchors: impl IntoIterator<Item = [f32; 2]>) -> Self {
        let sides = anchors.into_iter().map(|[w, h]| w.max(h));
        let anchors = sides.fold([f32::INFINITY, 0.0], |[a, b], side| [a.min(side), b.max(side)]);
        Self { anchors, asked_by: None }
    }
}

/// How many times larger or smaller than an anchor a face may be, by their longer sides, that the anchor's output is still asked
/// for. An IoU of 0.35 is a factor of 1.7 between equal shapes, of 2.9 between a square and a face that is as wide; what a first step
/// moves may go further.
const FACE_PER_ANCHOR: f32 = 4.0;

/// What is asked for of the outputs where faces of these sizes are wanted, network pixels from the least to the greatest.
pub(super) fn wants(detector: &dyn Detector, [least, greatest]: [f32; 2]) -> Vec<Want> {
    let want = |role: &Role| {
        let [smallest, largest] = role.anchors;
        match role.asked_by {
            _ if largest * FACE_PER_ANCHOR < least || smallest > greatest * FACE_PER_ANCHOR => Want::Nothing,
            Some((output, least)) => Want::Where { output, least },
            None => Want::All,
        }
    };
    detector.roles().iter().map(want).collect()
}

/// What a detector says of its second stage.
pub struct SecondStage {
    /// Its network: from R x C x bins to two logits a box (background, face), R x 2 x 1 x 1, and four offsets, R x 4 x 1 x 1.
    pub graph: Graph,
    /// From the first network's last output, C channels, to these bins.
    pub align: RoiAlign,
    /// Of the code of its offsets, whose anchors the proposals are.
    pub variances: [f32; 2],
    /// First-stage score that a box must pass to be a proposal.
    pub proposal_score: f32,
    /// Best so many proposals of a run of the first network that are looked at.
    pub max_proposals: usize,
    /// How far from its cell's centre the features of a proposal may lie, pixels: so much more must tiles overlap.
    pub reach: usize,
}

impl SecondStage {
    /// Shape of its network's input for so many boxes.
    pub(super) fn input(&self, boxes: usize) -> Shape {
        let channels = self.graph.nodes[self.graph.inputs[0].0].channels().unwrap_or(0);
        let [h, w] = self.align.output;
        Shape::new(boxes, channels, h, w)
    }

    /// Multiply-adds of its network for each proposal; RoIAlign's are not counted, as papers do not.
    pub fn macs_a_proposal(&self) -> Result<u64> {
        self.graph.macs(&[self.input(1)])
    }
}

/// A detector: a network and what its outputs mean, and maybe a second stage that looks at these boxes again.
pub trait Detector: Send + Sync {
    /// The network.
    fn graph(&self) -> Graph;

    /// Gives `sink` every candidate with a score above `threshold` whose cell is owned, in network
    /// pixels of the window, in a fixed order. `maps` are the graph's outputs in order.
    fn decode(&self, maps: &[Map<'_>], window: &Window, threshold: f32, sink: &mut dyn FnMut(Face));

    /// What [`decode`](Self::decode) does on a level of this scale, in its order, as data.
    fn heads(&self, scale: f32) -> Vec<Head>;

    /// The ellipse of a box in the network's pixels, for [`Extras::Ellipse`](super::heads::Extras::Ellipse): of the anchor of this
    /// index with these offsets and this logit.
    fn ellipse(&self, _bbox: &BBox, _anchor: usize, _offsets: [f32; 4], _logit: f32) -> Option<Ellipse> {
        None
    }

    /// What the outputs speak of, in the graph's order; those beyond are of use whatever is looked for.
    fn roles(&self) -> Vec<Role> {
        Vec::new()
    }

    /// The second stage, where there is one: then the last output of [`graph`](Self::graph) is the map that it looks at, and what
    /// [`decode`](Self::decode) finds are proposals.
    fn second_stage(&self) -> Option<SecondStage> {
        None
    }
}
