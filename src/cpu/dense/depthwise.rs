//! Depthwise convolutions, in f32 over bands of rows.

use super::band::{flush, pull_back_rows, read_rows, room};
use super::maps::{column_sums, finish};
use super::{Element, Geometry, Gradient, Scratch, Source, Target};
use crate::cpu::arena::Storage;
use crate::cpu::kernels::backward::{DepthwiseDataArgs, DepthwiseWeightArgs};
use crate::cpu::kernels::depthwise::DepthwiseArgs;
use crate::cpu::kernels::Kernels;
use crate::cpu::Isa;
use std::ops::Range;

/// Floats of a band's input, 64 KiB: it and the band's results stay in a second-level cache.
const BAND: usize = 1 << 14;

/// Weights `[kh * kw][C]` from PyTorch's `[C, 1, kh, kw]`, as they are or turned by half a circle.
pub fn pack(g: &Geometry, weight: &[f32], turned: bool) -> Vec<f32> {
    let (c, area) = (g.channels[0], g.kernel[0] * g.kernel[1]);
    let tap = |k: usize| if turned { area - 1 - k } else { k };
    (0..area * c).map(|i| weight[i % c * area + tap(i / c)]).collect()
}

/// Adds sums `[kh * kw][C]` to a gradient in PyTorch's order.
pub fn add_weight_gradient(g: &Geometry, sums: &[f32], dw: &mut [f32]) {
    let (c, area) = (g.channels[0], g.kernel[0] * g.kernel[1]);
    for (i, v) in sums.iter().enumerate() {
        dw[i % c * area + i / c] += v;
    }
}

fn bands(g: &Geometry) -> impl Iterator<Item = Range<usize>> {
    let row = g.window_columns() * g.channels[0] * g.stride[0];
    let (rows, height) = ((BAND / row).clamp(4, 64), g.out[0]);
    (0..height).step_by(rows).map(move |y| y..(y + rows).min(height))
}

/// `z = depthwise(source) + bias` for the images of `source`, `weights` from [`pack`]; `sums` as
/// [`conv::forward`](super::conv::forward)'s.
pub fn forward<T: Element>(
    isa: Isa,
    g: &Geometry,
    source: Source<'_, T>,
    weights: &[f32],
    bias: &[f32],
    z: &mut [T],
    sums: &mut [f64],
    s: &mut Scratch<T>,
) {
    g.check();
    let c = g.channels[0];
    assert_eq!([weights.len(), bias.len()], [g.kernel[0] * g.kernel[1] * c, c], "depthwise parameters");
    let [in_pixels, out_pixels] = g.pixels();
    let columns = g.window_columns();
    let band_sums = room(&mut s.sums, 3 * c);
    band_sums.fill(0.0);
    let (band_sums, zeros) = band_sums.split_at_mut(2 * c);
    for (n, z) in z.chunks_exact_mut(out_pixels * c).enumerate() {
        let image = source.pixels(n * in_pixels..(n + 1) * in_pixels);
        for band in bands(g) {
            let rows = g.window_rows(&band);
            let input = room(&mut s.input, rows.len() * columns * c);
            read_rows(isa, image, g.input, [g.padding[0], g.padding[1]], rows, columns, input);
            let out = room(&mut s.output, band.len() * g.out[1] * c);
            let size = [band.len(), g.out[1]];
            run(isa, input, columns, c, g, g.stride, weights, zeros, out, size);
            finish(isa, out, c, bias, &mut z[band.start * g.out[1] * c..band.end * g.out[1] * c], band_sums);
            flush(band_sums, sums);
        }
    }
}

/// The inference kernel over a band whose padding is in `input`.
fn run(
    isa: Isa,
    input: &[f32],
    columns: usize,
    c: usize,
    g: &Geometry,
    stride: [usize; 2],
    weights: &[f32],
    bias: &[f32],
    out: &mut [f32],
    [height, width]: [usize; 2],
) {
    let reach = |axis: usize, n: usize| (n - 1) * stride[axis] + g.dilation[axis] * (g.kernel[axis] - 1);
    assert!(input.len() >= ((reach(0, height)) * columns + reach(1, width) + 1) * c, "input too short");
    assert!(out.len() >= height * width * c && bias.len() >= c, "output or bias too short");
    assert!(weights.len() >= g.kernel[0] * g.kernel[1] * c, "weights too short");
    let args = DepthwiseArgs {
        input: input.as_ptr().cast(),
        in_row: stride[0] * columns * c,
        in_pixel: stride[1] * c,
        kernel: g.kernel,
        tap_row: g.dilation[0] * columns * c,
        tap_pixel: g.dilation[1] * c,
        weights: weights.as_ptr(),
        bias: bias.as_ptr(),
        output: out.as_mut_ptr().cast(),
        out_row: width * c,
        out_pixel: c,
        width,
        channels: c,
        slope: 1.0,
        zero: 0.0,
    };
    // SAFETY: the lengths were checked.
    unsafe { Kernels::of(isa).depthwise(Storage::F32)(&args, 0..height) }
}

/// Gradients of [`forward`]: adds to `dw` `[kh * kw][C]` and `db` `[C]`, writes or adds to `dx`. `weights` and `turned` from
/// [`pack`].
pub fn backward<T: Element>(
    isa: Isa,
    g: &Geometry,
    source: Source<'_, T>,
    gradient: Gradient<'_, T>,
    [weights, turned]: [&[f32]; 2],
    mut dx: Option<Target<'_, T>>,
    dw: &mut [f32],
    mut db: Option<&mut [f32]>,
    s: &mut Scratch<T>,
) {
    g.check();
    let c = g.channels[0];
    assert_eq!(dw.len(), g.kernel[0] * g.kernel[1] * c, "depthwise weight gradient");
    let [in_pixels, out_pixels] = g.pixels();
    let images = gradient.dy.len() / (out_pixels * c);
    // Unit stride: the data gradient is a convolution of the gradient, padded by what the window reaches back, with
    // the turned kernel. Padding beyond the window (rare) is gathered.
    let back = [0, 1].map(|a| (g.dilation[a] * (g.kernel[a] - 1)).checked_sub(g.padding[a]));
    let plain = g.stride == [1, 1] && back.iter().all(Option::is_some);
    let reach = g.dilation[1] * (g.kernel[1] - 1);
    let back = if plain { back.map(|b| b.unwrap_or(0)) } else { [0, reach] };
    let right = (g.input[1] + g.padding[1]).saturating_sub(g.out[1]);
    let zeros = room(&mut s.sums, c);
    zeros.fill(0.0);
    for n in 0..images {
        let image = source.pixels(n * in_pixels..(n + 1) * in_pixels);
        let d_image = gradient.pixels(n * out_pixels..(n + 1) * out_pixels);
        for band in bands(g) {
            let columns = g.window_columns();
            let rows = g.window_rows(&band);
            let input = room(&mut s.input, rows.len() * columns * c);
            read_rows(isa, image, g.input, [g.padding[0], g.padding[1]], rows, columns, input);

            // Input rows that this band writes, and the gradient rows that they and the band's weights need.
            let last = band.end == g.out[0];
            let owned = (band.start * g.stride[0]).min(g.input[0])..if last {
                g.input[0]
            } else {
                (band.end * g.stride[0]).min(g.input[0])
            };
            let reach = (g.dilation[0] * (g.kernel[0] - 1)) as isize;
            let (top, step) = (g.padding[0] as isize, g.stride[0] as isize);
            let first = (owned.start as isize + top - reach).div_euclid(step).min(band.start as isize);
            let end = ((owned.end as isize - 1 + top).div_euclid(step) + 1).max(band.end as isize);
            let d_columns = back[1] + g.out[1] + right;
            let d = room(&mut s.rows, (end - first) as usize * d_columns * c);
            pull_back_rows(isa, d_image, g.out, [back[1], right], first..end, d);

            let at = ((band.start as isize - first) as usize * d_columns + back[1]) * c;
            let args = DepthwiseWeightArgs {
                input: input.as_ptr(),
                in_row: g.stride[0] * columns * c,
                in_pixel: g.stride[1] * c,
                kernel: g.kernel,
                tap_row: g.dilation[0] * columns * c,
                tap_pixel: g.dilation[1] * c,
                d: d[at..].as_ptr(),
                d_row: d_columns * c,
                d_pixel: c,
                height: band.len(),
                width: g.out[1],
                channels: c,
                sums: dw.as_mut_ptr(),
            };
            // SAFETY: `input` holds the windows of the band, `d` its rows, `dw` every tap.
            unsafe { (Kernels::of(isa).depthwise_weight)(&args) };
            if let Some(db) = &mut db {
                for row in 0..band.len() {
                    column_sums(isa, &d[at + row * d_columns * c..][..g.out[1] * c], c, db);
                }
            }

            let Some(target) = &mut dx else { continue };
            let size = [owned.len(), g.input[1]];
            if owned.is_empty() {
                continue;
            }
            let out = room(&mut s.output, size[0] * size[1] * c);
            if plain {
                let from = (owned.start as isize - back[0] as isize - first) as usize * d_columns * c;
                run(isa, &d[from..], d_columns, c, g, [1, 1], turned, zeros, out, size);
            } else {
                let args = DepthwiseDataArgs {
                    d: d.as_ptr()
                        .wrapping_add(back[1] * c)
                        .wrapping_offset(-first * (d_columns * c) as isize),
                    d_row: d_columns * c,
                    d_pixel: c,
                    out: g.out,
                    kernel: g.kernel,
                    stride: g.stride,
                    dilation: g.dilation,
                    padding: [g.padding[0], g.padding[1]],
                    weights: weights.as_ptr(),
                    dx: out.as_mut_ptr().wrapping_sub(owned.start * g.input[1] * c),
                    dx_row: g.input[1] * c,
                    width: g.input[1],
                    channels: c,
                };
                assert!(weights.len() >= dw.len(), "weights too short");
                // SAFETY: rows `owned` read gradient rows first .. end alone; `out` holds them.
                unsafe { (Kernels::of(isa).depthwise_data)(&args, owned.clone()) };
            }
            let row = n * g.input[0] + owned.start;
            target.put(isa, source, row * g.input[1]..(row + size[0]) * g.input[1], out, c);
        }
    }
}
