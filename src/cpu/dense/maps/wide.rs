//! Narrow maps in whole registers: where a pixel's channels leave lanes empty and pixels follow each other without a gap,
//! several pixels are one with as many times the channels.

use crate::cpu::kernels::Kernels;
use crate::cpu::Isa;

/// Most values of a group of pixels.
pub(super) const MOST: usize = 96;

/// Pixels of a group: as few as fill whole registers; 1 where they would be more than [`MOST`] values.
pub(super) fn group(isa: Isa, channels: usize) -> usize {
    let lanes = Kernels::of(isa).lanes;
    // The lanes are a power of two.
    let pixels = lanes >> channels.trailing_zeros().min(lanes.trailing_zeros());
    if pixels * channels <= MOST {
        pixels
    } else {
        1
    }
}

/// A channel's constants for each pixel of a group.
pub(super) fn repeated(values: &[f32], pixels: usize) -> [f32; MOST] {
    let mut all = [0.0; MOST];
    all.chunks_exact_mut(values.len()).take(pixels).for_each(|p| p.copy_from_slice(values));
    all
}

/// Adds the sums of a group's pixels to those of the channels.
pub(super) fn fold(wide: &[f32], sums: &mut [f32]) {
    for pixel in wide.chunks_exact(sums.len()) {
        sums.iter_mut().zip(pixel).for_each(|(s, v)| *s += v);
    }
}
