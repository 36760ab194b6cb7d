//! Element-wise passes over channels-last maps: normalisation and activation where a map is read, gradients
//! pulled back through them, statistics.
//!
//! Every pass takes a register of channels at a time, over all pixels it is given, with the channels' constants and sums
//! in registers; callers give it bands that stay in cache.

mod pass;
mod read;
mod store;
mod sums;
#[cfg(test)]
mod tests;
mod wide;

use super::Element;

use pass::for_blocks;
pub(super) use pass::{dispatch, for_registers, holds, Pass};
pub use read::{pull_back, read};
pub use store::{add, deposit, deposit_whole};
pub use sums::{column_sums, finish, gradient_sums};

/// A stored map as its readers see it: `y = act(scale[c] * z + shift[c])`, with act(v) = max(v, slope * v).
#[derive(Clone, Copy)]
pub struct Source<'a, T> {
    /// N x H x W x C as stored.
    pub z: &'a [T],
    /// `[C]`.
    pub scale: &'a [f32],
    /// `[C]`.
    pub shift: &'a [f32],
    /// 1 none, 0 ReLU, between leaky.
    pub slope: f32,
}

/// The gradient with respect to a stored map, from the gradient `dy` that its readers left:
/// `dz = a[c] * g + b[c] * z + c[c]`, where `g = dy * act'(scale[c] * z + shift[c])`. With a batch normalisation
/// of batch statistics (Ioffe and Szegedy 2015, section 3), and M values a channel,
/// a = gamma / std, b = -gamma * dgamma / (M * std^2), c = -b * mean - gamma * dbeta / (M * std).
#[derive(Clone, Copy)]
pub struct Gradient<'a, T> {
    /// The map and what its readers apply.
    pub map: Source<'a, T>,
    /// Gradient with respect to what readers see.
    pub dy: &'a [T],
    /// `[C]`.
    pub a: &'a [f32],
    /// `[C]`.
    pub b: &'a [f32],
    /// `[C]`.
    pub c: &'a [f32],
}

impl<'a, T: Element> Source<'a, T> {
    /// Channels.
    pub fn channels(&self) -> usize {
        self.scale.len()
    }

    /// Pixels `range` of it.
    pub fn pixels(&self, range: std::ops::Range<usize>) -> Self {
        let c = self.channels();
        Self { z: &self.z[range.start * c..range.end * c], ..*self }
    }

    /// Pixels, after a check that the constants are of one length.
    fn checked(&self) -> usize {
        let c = self.channels();
        assert!(self.shift.len() == c && self.z.len().is_multiple_of(c.max(1)), "a map's constants");
        self.z.len() / c.max(1)
    }
}

impl<'a, T: Element> Gradient<'a, T> {
    /// Channels.
    pub fn channels(&self) -> usize {
        self.a.len()
    }

    /// Pixels `range` of it.
    pub fn pixels(&self, range: std::ops::Range<usize>) -> Self {
        let c = self.channels();
        let dy = &self.dy[range.start * c..range.end * c];
        Self { map: self.map.pixels(range), dy, ..*self }
    }

    fn checked(&self) -> usize {
        let c = self.channels();
        assert!(self.b.len() == c && self.c.len() == c && self.map.channels() == c, "a gradient's constants");
        assert_eq!(self.dy.len(), self.map.z.len(), "a gradient of its map's size");
        self.map.checked()
    }
}
