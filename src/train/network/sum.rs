//! Sums of maps, one of which may be enlarged by nearest neighbours on the way (top-down paths).

use crate::cpu::dense::{flush, maps, Element, Gradient, Source, Target};
use crate::cpu::Isa;
use crate::layers::upsample::nearest_source;
use crate::shape::Shape;

/// Sum of maps, each as it is or enlarged, a row at a time; `totals`, `[2][C]`, gains the sums of its values and of their
/// squares.
pub(super) fn sum_forward<T: Element>(
    isa: Isa,
    out: Shape,
    inputs: &[(Source<'_, T>, Shape, bool)],
    z: &mut [T],
    totals: &mut [f64],
    [sum, one, sums]: &mut [Vec<f32>; 3],
) {
    let (c, row) = (out.c, out.w * out.c);
    let zeros = vec![0.0; c];
    sum.resize(sum.len().max(row), 0.0);
    sums.clear();
    sums.resize(2 * c, 0.0);
    let sum = &mut sum[..row];
    for (at, z) in z.chunks_exact_mut(row).enumerate() {
        let (n, y) = (at / out.h, at % out.h);
        sum.fill(0.0);
        for (source, from, enlarged) in inputs {
            let sy = if *enlarged { nearest_source(y, from.h, out.h) } else { y };
            let first = (n * from.h + sy) * from.w;
            one.resize(one.len().max(from.w * c), 0.0);
            maps::read(isa, source.pixels(first..first + from.w), &mut one[..from.w * c], c);
            if *enlarged {
                for (x, sum) in sum.chunks_exact_mut(c).enumerate() {
                    let sx = nearest_source(x, from.w, out.w);
                    maps::add(isa, &one[sx * c..(sx + 1) * c], sum);
                }
            } else {
                maps::add(isa, &one[..row], sum);
            }
        }
        maps::finish(isa, sum, c, &zeros, z, sums);
        flush(sums, totals);
    }
}

/// Gradient of [`sum_forward`] for one input, whose map is `source` of shape `from`.
pub(super) fn sum_backward<T: Element>(
    isa: Isa,
    out: Shape,
    gradient: Gradient<'_, T>,
    (source, from, enlarged): (Source<'_, T>, Shape, bool),
    mut target: Target<'_, T>,
    [d, sums, _]: &mut [Vec<f32>; 3],
) {
    let (c, row) = (out.c, out.w * out.c);
    d.resize(d.len().max(row), 0.0);
    let d = &mut d[..row];
    let image = from.h * from.w * c;
    sums.resize(sums.len().max(image), 0.0);
    for n in 0..source.z.len() / image {
        let sums = &mut sums[..image];
        sums.fill(0.0);
        for y in 0..out.h {
            let first = (n * out.h + y) * out.w;
            maps::pull_back(isa, gradient.pixels(first..first + out.w), d, c);
            if enlarged {
                let sy = nearest_source(y, from.h, out.h);
                for (x, d) in d.chunks_exact(c).enumerate() {
                    let at = (sy * from.w + nearest_source(x, from.w, out.w)) * c;
                    maps::add(isa, d, &mut sums[at..at + c]);
                }
            } else {
                target.put(isa, source, first..first + out.w, d, c);
            }
        }
        if enlarged {
            target.put(isa, source, n * from.h * from.w..(n + 1) * from.h * from.w, sums, c);
        }
    }
}
