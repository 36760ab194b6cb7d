//! Narrow maps in whole registers: where a pixel's channels leave lanes empty and pixels follow each other without a gap,
//! several pixels are one with as many times the channels.

use crate::cpu::kernels::Kernels;
use crate::cpu::Isa;

/// Most values of a group of pixels.
pub(super) const MOST: usize = 96;

/// How many pixels make a group (as few as fill whole registers), and how many of `pixels` stand in whole groups: none where
/// there is a gap between pixels (`stride` beyond `channels`), where one fills its registers itself, or where a group would
/// have more than [`MOST`] values.
pub(super) fn groups(isa: Isa, channels: usize, stride: usize, pixels: usize) -> (usize, usize) {
    let lanes = Kernels::of(isa).lanes;
    // The lanes are a power of two.
    let group = lanes >> channels.trailing_zeros().min(lanes.trailing_zeros());
    if stride != channels || group == 1 || group * channels > MOST {
        return (1, 0);
    }
    (group, pixels / group * group)
}

/// A channel's constants for each pixel of a group.
pub(super) fn repeated(values: &[f32], pixels: usize) -> [f32; MOST] {
    let mut all = [0.0; MOST];
    all.chunks_exact_mut(values.len()).take(pixels).for_each(|p| p.copy_from_slice(values));
    all
}

/// Runs a pass that adds to two sums a channel of a group, and adds those of its pixels to `sums`, `[2][C]`.
pub(super) fn fold(group: usize, sums: &mut [f32], pass: impl FnOnce(&mut [f32])) {
    let mut wide = [0.0; 2 * MOST];
    let wide = &mut wide[..group * sums.len()];
    pass(wide);
    let c = sums.len() / 2;
    for (sums, wide) in sums.chunks_exact_mut(c).zip(wide.chunks_exact(group * c)) {
        for pixel in wide.chunks_exact(c) {
            sums.iter_mut().zip(pixel).for_each(|(s, v)| *s += v);
        }
    }
}
