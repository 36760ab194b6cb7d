//! What every detector gives the session: a network, and the way from its outputs to candidates.

use super::face::Face;
use super::second_stage::SecondStage;
use crate::cpu::View;
use crate::graph::Graph;
use crate::pixels::{Size, Tile};
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
pub(super) fn logit(threshold: f32) -> f32 {
    (threshold.max(f32::MIN_POSITIVE) / (1.0 - threshold).max(f32::MIN_POSITIVE)).ln()
}

pub(super) use crate::cpu::simple::sigmoid;

/// Softmax of two logits, background and face: the face's part.
pub(super) fn face_probability(logits: &[f32]) -> f32 {
    sigmoid(logits[1] - logits[0])
}

/// A detector: a network and what its outputs mean, and maybe a second stage that looks at these boxes again.
pub trait Detector: Send + Sync {
    /// The network.
    fn graph(&self) -> Graph;

    /// Gives `sink` every candidate with a score above `threshold` whose cell is owned, in network
    /// pixels of the window, in a fixed order. `maps` are the graph's outputs in order.
    fn decode(&self, maps: &[Map<'_>], window: &Window, threshold: f32, sink: &mut dyn FnMut(Face));

    /// The second stage, where there is one: then the last output of [`graph`](Self::graph) is the map that it looks at, and what
    /// [`decode`](Self::decode) finds are proposals.
    fn second_stage(&self) -> Option<SecondStage> {
        None
    }
}
