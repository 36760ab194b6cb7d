//! Depthwise convolution over channels-last maps: a register holds consecutive channels of one
//! pixel, every channel has its own window weights.

use super::conv::activate;
use super::Vector;
use std::ops::Range;

/// One image's depthwise convolution.
pub(crate) struct DepthwiseArgs {
    /// First float of the first pixel's window (in the halo where padded).
    pub input: *const f32,
    /// Floats between windows of consecutive output rows and pixels (stride counted).
    pub in_row: usize,
    pub in_pixel: usize,
    /// Kernel rows and columns.
    pub kernel: [usize; 2],
    /// Floats between taps (dilation counted).
    pub tap_row: usize,
    pub tap_pixel: usize,
    /// `[kh * kw][channels]`.
    pub weights: *const f32,
    /// `[channels]`.
    pub bias: *const f32,
    pub output: *mut f32,
    pub out_row: usize,
    pub out_pixel: usize,
    /// Output pixels a row.
    pub width: usize,
    pub channels: usize,
    /// Result = max(x, slope * x).
    pub slope: f32,
}

/// Pixels computed together in the 3x3 kernel: enough independent sums to hide the latency of
/// multiply-add, few enough to keep them and the nine weights in registers.
const RUN: usize = 4;

/// Computes output rows `rows`.
///
/// # Safety
/// All pointers and strides of `a` stay inside the caller's buffers for every pixel of the rows
/// asked for, and no other thread writes what is read here or touches what is written.
#[inline(always)]
pub(crate) unsafe fn rows<V: Vector>(a: &DepthwiseArgs, rows: Range<usize>) {
    // Stride in taps, where the window is 3x3 and the stride a whole number of taps.
    let step = if a.kernel == [3, 3] && a.tap_pixel > 0 { a.in_pixel / a.tap_pixel } else { 0 };
    let step = if step * a.tap_pixel == a.in_pixel { step } else { 0 };
    for y in rows {
        let mut c = 0;
        // SAFETY: the caller's contract; channels c .. c + LANES, and the rest at the end, exist.
        unsafe {
            while c + V::LANES <= a.channels {
                match step {
                    1 => row_3x3::<V, 1, { RUN + 2 }, true>(a, y, c),
                    2 => row_3x3::<V, 2, { 2 * RUN + 1 }, true>(a, y, c),
                    _ => row_any::<V>(a, y, c, V::LANES),
                }
                c += V::LANES;
            }
            if c < a.channels {
                match step {
                    1 => row_3x3::<V, 1, { RUN + 2 }, false>(a, y, c),
                    2 => row_3x3::<V, 2, { 2 * RUN + 1 }, false>(a, y, c),
                    _ => row_any::<V>(a, y, c, a.channels - c),
                }
            }
        }
    }
}

/// A row of a 3x3 kernel, taps `S` to the stride; `SPAN` = columns of input under RUN pixels. `FULL`:
/// all lanes are channels, known to the compiler so that no access needs a choice.
#[inline(always)]
unsafe fn row_3x3<V: Vector, const S: usize, const SPAN: usize, const FULL: bool>(
    a: &DepthwiseArgs,
    y: usize,
    c: usize,
) {
    let lanes = a.channels - c;
    // SAFETY: the contract of `rows`.
    unsafe {
        let input = a.input.add(y * a.in_row + c);
        let output = a.output.add(y * a.out_row + c);
        let mut w = [V::splat(0.0); 9];
        for (i, w) in w.iter_mut().enumerate() {
            *w = V::load_lanes::<FULL>(a.weights.add(i * a.channels + c), lanes);
        }
        let bias = V::load_lanes::<FULL>(a.bias.add(c), lanes);
        let slope = V::splat(a.slope);
        let mut x = 0;
        while x + RUN <= a.width {
            let mut acc = [bias; RUN];
            for ky in 0..3 {
                let p = input.add(x * a.in_pixel + ky * a.tap_row);
                let mut column = [V::splat(0.0); SPAN];
                for (i, v) in column.iter_mut().enumerate() {
                    *v = V::load_lanes::<FULL>(p.add(i * a.tap_pixel), lanes);
                }
                for kx in 0..3 {
                    for i in 0..RUN {
                        acc[i] = acc[i].mul_add(column[i * S + kx], w[ky * 3 + kx]);
                    }
                }
            }
            for i in 0..RUN {
                activate(acc[i], slope).store_lanes::<FULL>(output.add((x + i) * a.out_pixel), lanes);
            }
            x += RUN;
        }
        while x < a.width {
            let p = input.add(x * a.in_pixel);
            let mut acc = bias;
            for ky in 0..3 {
                for kx in 0..3 {
                    let v = V::load_lanes::<FULL>(p.add(ky * a.tap_row + kx * a.tap_pixel), lanes);
                    acc = acc.mul_add(v, w[ky * 3 + kx]);
                }
            }
            activate(acc, slope).store_lanes::<FULL>(output.add(x * a.out_pixel), lanes);
            x += 1;
        }
    }
}

/// A row of any kernel.
#[inline(always)]
unsafe fn row_any<V: Vector>(a: &DepthwiseArgs, y: usize, c: usize, lanes: usize) {
    // SAFETY: the contract of `rows`.
    unsafe {
        let bias = V::load_upto(a.bias.add(c), lanes);
        let slope = V::splat(a.slope);
        for x in 0..a.width {
            let p = a.input.add(y * a.in_row + x * a.in_pixel + c);
            let mut acc = bias;
            for ky in 0..a.kernel[0] {
                for kx in 0..a.kernel[1] {
                    let v = V::load_upto(p.add(ky * a.tap_row + kx * a.tap_pixel), lanes);
                    let w = V::load_upto(a.weights.add((ky * a.kernel[1] + kx) * a.channels + c), lanes);
                    acc = acc.mul_add(v, w);
                }
            }
            activate(acc, slope).store_upto(a.output.add(y * a.out_row + x * a.out_pixel + c), lanes);
        }
    }
}
