//! What every detector gives the session: a network, and the way from its outputs to candidates.

use super::face::Face;
use super::second_stage::SecondStage;
use crate::cpu::View;
use crate::graph::Graph;
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

/// The part of a network input whose cells are this pass's to report: those whose centres lie in
/// the ranges (network pixels of the window; infinite at the picture's border).
#[derive(Clone, Debug, PartialEq)]
pub struct Window {
    /// Columns.
    pub owned_x: Range<f32>,
    /// Rows.
    pub owned_y: Range<f32>,
}

impl Window {
    /// Everything.
    pub fn whole() -> Self {
        Self { owned_x: f32::NEG_INFINITY..f32::INFINITY, owned_y: f32::NEG_INFINITY..f32::INFINITY }
    }
}

/// Sigmoid(x) is above `threshold` where x is above this.
pub(super) fn logit(threshold: f32) -> f32 {
    (threshold.max(f32::MIN_POSITIVE) / (1.0 - threshold).max(f32::MIN_POSITIVE)).ln()
}

/// Softmax of two logits, background and face: the face's part.
pub(super) fn face_probability(logits: &[f32]) -> f32 {
    1.0 / (1.0 + (logits[0] - logits[1]).exp())
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
