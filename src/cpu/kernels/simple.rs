//! Kernels bound by memory: pooling, interpolation, addition, copies.

use super::conv::activate;
use super::Vector;
use std::ops::Range;

/// Max pooling of one image. Windows are clipped to the map, so padding never wins.
pub(crate) struct PoolArgs {
    /// First pixel of the map.
    pub input: *const f32,
    pub in_row: usize,
    pub in_pixel: usize,
    /// Rows and columns of the map.
    pub in_size: [usize; 2],
    pub kernel: [usize; 2],
    pub stride: [usize; 2],
    /// Padding above and to the left.
    pub pad: [usize; 2],
    pub output: *mut f32,
    pub out_row: usize,
    pub out_pixel: usize,
    pub width: usize,
    pub channels: usize,
}

/// Computes output rows `rows`.
///
/// # Safety
/// Pointers and strides stay inside the caller's buffers; no other thread writes what is read.
#[inline(always)]
pub(crate) unsafe fn max_pool<V: Vector>(a: &PoolArgs, rows: Range<usize>) {
    let clip = |out: usize, axis: usize| {
        let start = (out * a.stride[axis]) as isize - a.pad[axis] as isize;
        let end = (start + a.kernel[axis] as isize).min(a.in_size[axis] as isize);
        (start.max(0) as usize, end as usize)
    };
    for y in rows {
        let (y0, y1) = clip(y, 0);
        for x in 0..a.width {
            let (x0, x1) = clip(x, 1);
            let mut c = 0;
            while c < a.channels {
                let lanes = (a.channels - c).min(V::LANES);
                // SAFETY: the caller's contract; the window is clipped to the map.
                unsafe {
                    let mut best = V::splat(f32::NEG_INFINITY);
                    for iy in y0..y1 {
                        for ix in x0..x1 {
                            let p = a.input.add(iy * a.in_row + ix * a.in_pixel + c);
                            best = best.max(V::load_upto(p, lanes));
                        }
                    }
                    best.store_upto(a.output.add(y * a.out_row + x * a.out_pixel + c), lanes);
                }
                c += V::LANES;
            }
        }
    }
}

/// Position between two source pixels.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Blend {
    /// The nearer source indices; equal at the edges and for nearest.
    pub low: u32,
    pub high: u32,
    /// Weight of `high`.
    pub t: f32,
}

/// Interpolation of one image.
pub(crate) struct ResizeArgs<'a> {
    pub input: *const f32,
    pub in_row: usize,
    pub in_pixel: usize,
    /// One an output row, one an output column.
    pub rows: &'a [Blend],
    pub columns: &'a [Blend],
    pub output: *mut f32,
    pub out_row: usize,
    pub out_pixel: usize,
    pub channels: usize,
}

/// Computes output rows `rows`.
///
/// # Safety
/// As [`max_pool`].
#[inline(always)]
pub(crate) unsafe fn resize<V: Vector>(a: &ResizeArgs, rows: Range<usize>) {
    for y in rows {
        let by = a.rows[y];
        let (top, bottom) = (by.low as usize * a.in_row, by.high as usize * a.in_row);
        for (x, bx) in a.columns.iter().enumerate() {
            let (left, right) = (bx.low as usize * a.in_pixel, bx.high as usize * a.in_pixel);
            let mut c = 0;
            while c < a.channels {
                let lanes = (a.channels - c).min(V::LANES);
                // SAFETY: the caller's contract; the indices are inside the map.
                unsafe {
                    let at = |o: usize| V::load_upto(a.input.add(o + c), lanes);
                    let out = a.output.add(y * a.out_row + x * a.out_pixel + c);
                    if by.t == 0.0 && bx.t == 0.0 {
                        at(top + left).store_upto(out, lanes);
                    } else {
                        let mix = |p: V, q: V, t: f32| p.mul(V::splat(1.0 - t)).mul_add(q, V::splat(t));
                        let upper = mix(at(top + left), at(top + right), bx.t);
                        let lower = mix(at(bottom + left), at(bottom + right), bx.t);
                        mix(upper, lower, by.t).store_upto(out, lanes);
                    }
                }
                c += V::LANES;
            }
        }
    }
}

/// `output = activation(a [+ b])`, pixel by pixel.
pub(crate) struct RowArgs {
    pub a: *const f32,
    pub a_row: usize,
    pub a_pixel: usize,
    /// Null for a copy.
    pub b: *const f32,
    pub b_row: usize,
    pub b_pixel: usize,
    pub output: *mut f32,
    pub out_row: usize,
    pub out_pixel: usize,
    pub width: usize,
    pub channels: usize,
    /// Result = max(x, slope * x).
    pub slope: f32,
}

/// Computes output rows `rows`.
///
/// # Safety
/// As [`max_pool`].
#[inline(always)]
pub(crate) unsafe fn add_or_copy<V: Vector>(a: &RowArgs, rows: Range<usize>) {
    // SAFETY: the caller's contract.
    unsafe {
        let slope = V::splat(a.slope);
        for y in rows {
            for x in 0..a.width {
                let mut c = 0;
                while c < a.channels {
                    let lanes = (a.channels - c).min(V::LANES);
                    let mut v = V::load_upto(a.a.add(y * a.a_row + x * a.a_pixel + c), lanes);
                    if !a.b.is_null() {
                        v = v.add(V::load_upto(a.b.add(y * a.b_row + x * a.b_pixel + c), lanes));
                    }
                    activate(v, slope).store_upto(a.output.add(y * a.out_row + x * a.out_pixel + c), lanes);
                    c += V::LANES;
                }
            }
        }
    }
}
