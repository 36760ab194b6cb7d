//! Where a unit's readers leave the gradient of its map.

use super::band::flush;
use super::maps::{deposit, deposit_whole, gradient_sums};
use super::{Element, Source};
use crate::cpu::Isa;
use std::ops::Range;

/// Values of a band whose sums are taken at once: its map and its gradient stay in a first-level cache.
const BAND: usize = 1 << 13;

/// The gradient with respect to what a map's readers see, and, where it is whole with this write, the sums over it that
/// the map's batch normalisation needs: taken while the gradient is in cache.
pub struct Target<'a, T> {
    /// Images x H x W x C.
    dx: &'a mut [T],
    /// Added to what is there, or written.
    add: bool,
    /// `[2][C]`: the sum of g and of g * z of [`gradient_sums`].
    sums: Option<&'a mut [f64]>,
    band: Vec<f32>,
}

impl<'a, T: Element> Target<'a, T> {
    /// A gradient to write, or to `add` to; where `sums` are given, this write is the last.
    pub fn new(dx: &'a mut [T], add: bool, sums: Option<&'a mut [f64]>) -> Self {
        let band = vec![0.0; sums.as_ref().map_or(0, |s| s.len())];
        Self { dx, add, sums, band }
    }

    /// Whether the gradient is added to what is there.
    pub(super) fn adds(&self) -> bool {
        self.add
    }

    /// Pixels `range` of it, `channels` values each.
    pub(super) fn pixels(&mut self, range: Range<usize>, channels: usize) -> &mut [T] {
        &mut self.dx[range.start * channels..range.end * channels]
    }

    /// Gives pixels `range` the values of `from`, `stride` a pixel. `map` as it is stored, all of it.
    pub fn put(&mut self, isa: Isa, map: Source<'_, T>, range: Range<usize>, from: &[f32], stride: usize) {
        let (c, add) = (map.channels(), self.add);
        let Some(sums) = &mut self.sums else {
            return deposit(isa, from, stride, c, self.pixels(range, c), add);
        };
        let step = (BAND / c).max(1);
        for (i, start) in range.clone().step_by(step).enumerate() {
            let part = start..(start + step).min(range.end);
            let to = &mut self.dx[part.start * c..part.end * c];
            deposit_whole(isa, &from[i * step * stride..], stride, map.pixels(part), to, add, &mut self.band);
            flush(&mut self.band, sums);
        }
    }

    /// Takes the sums of pixels `range`, which are whole now.
    pub fn sum(&mut self, isa: Isa, map: Source<'_, T>, range: Range<usize>) {
        let Some(sums) = &mut self.sums else { return };
        let c = map.channels();
        let dx = &self.dx[range.start * c..range.end * c];
        add_sums(isa, map.pixels(range), dx, &mut self.band, sums);
    }
}

/// Adds to `sums`, `[2][C]`, those of [`gradient_sums`] over the whole of a map and its gradient `dy`.
pub fn map_sums<T: Element>(isa: Isa, map: Source<'_, T>, dy: &[T], sums: &mut [f64]) {
    add_sums(isa, map, dy, &mut vec![0.0; sums.len()], sums);
}

/// In f32 over a band, then in f64; `band` is zero before and after.
fn add_sums<T: Element>(isa: Isa, map: Source<'_, T>, dy: &[T], band: &mut [f32], sums: &mut [f64]) {
    let c = map.channels();
    let (pixels, step) = (dy.len() / c, (BAND / c).max(1));
    for start in (0..pixels).step_by(step) {
        let part = start..(start + step).min(pixels);
        gradient_sums(isa, map.pixels(part.clone()), &dy[part.start * c..part.end * c], band);
        flush(band, sums);
    }
}
