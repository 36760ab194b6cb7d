//! RoIAlign over a batch: the grids of `layers/roi_align`, whole pixels at a time.

use crate::cpu::dense::{flush, maps, Element, Gradient, Source, Target};
use crate::cpu::Isa;
use crate::layers::RoiAlign;
use crate::shape::Shape;
use std::ops::Range;

/// Features of `boxes` (R x 5) on the maps of shape `from` that `source` shows, written to `z`, R x out_h x out_w x C;
/// `totals`, `[2][C]`, gains the sums of its values and of their squares.
pub(super) fn roi_align_forward<T: Element>(
    isa: Isa,
    roi: &RoiAlign,
    (source, from): (Source<'_, T>, Shape),
    boxes: &[f32],
    z: &mut [T],
    totals: &mut [f64],
    [bins, pixel, sums]: &mut [Vec<f32>; 3],
) {
    let (c, [rows, columns]) = (from.c, roi.output);
    let zeros = vec![0.0; c];
    pixel.resize(c, 0.0);
    sums.clear();
    sums.resize(2 * c, 0.0);
    for (b, z) in boxes.chunks_exact(5).zip(z.chunks_exact_mut(rows * columns * c)) {
        bins.clear();
        bins.resize(rows * columns * c, 0.0);
        let grid = roi.grid(b);
        for (at, bin) in bins.chunks_exact_mut(c).enumerate() {
            for corner in grid.corners(at / columns, at % columns, from) {
                let p = (grid.image * from.h + corner.y) * from.w + corner.x;
                maps::read(isa, source.pixels(p..p + 1), pixel, c);
                bin.iter_mut().zip(&*pixel).for_each(|(sum, v)| *sum += corner.weight * v);
            }
        }
        maps::finish(isa, bins, c, &zeros, z, sums);
        flush(sums, totals);
    }
}

/// Gradient of [`roi_align_forward`] for `images` of the maps, whose part `source` is; `gradient` is that of all boxes.
pub(super) fn roi_align_backward<T: Element>(
    isa: Isa,
    roi: &RoiAlign,
    (gradient, boxes): (Gradient<'_, T>, &[f32]),
    (source, from): (Source<'_, T>, Shape),
    images: &Range<usize>,
    mut target: Target<'_, T>,
    [d, sums, _]: &mut [Vec<f32>; 3],
) {
    let (c, [rows, columns]) = (from.c, roi.output);
    let (bins, pixels) = (rows * columns, from.h * from.w);
    d.resize(bins * c, 0.0);
    for n in images.clone() {
        sums.clear();
        sums.resize(pixels * c, 0.0);
        for (r, b) in boxes.chunks_exact(5).enumerate() {
            let grid = roi.grid(b);
            if grid.image != n {
                continue;
            }
            maps::pull_back(isa, gradient.pixels(r * bins..(r + 1) * bins), &mut d[..bins * c], c);
            for (at, d) in d[..bins * c].chunks_exact(c).enumerate() {
                for corner in grid.corners(at / columns, at % columns, from) {
                    let to = &mut sums[(corner.y * from.w + corner.x) * c..][..c];
                    to.iter_mut().zip(d).for_each(|(sum, v)| *sum += corner.weight * v);
                }
            }
        }
        let first = (n - images.start) * pixels;
        target.put(isa, source, first..first + pixels, sums, c);
    }
}
