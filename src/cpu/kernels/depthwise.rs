//! Depthwise convolution over channels-last maps: a register holds consecutive channels of one
//! pixel, every channel has its own window weights.

use super::conv::activate;
use super::Vector;
use crate::cpu::arena::Storage;
use std::ops::Range;

/// One image's depthwise convolution.
#[derive(Clone, Copy)]
pub(crate) struct DepthwiseArgs {
    /// How input and output are stored; strides count values.
    pub storage: Storage,
    /// First value of the first pixel's window (in the halo where padded).
    pub input: *const u8,
    /// Values between windows of consecutive output rows and pixels (stride counted).
    pub in_row: usize,
    pub in_pixel: usize,
    /// Kernel rows and columns.
    pub kernel: [usize; 2],
    /// Values between taps (dilation counted).
    pub tap_row: usize,
    pub tap_pixel: usize,
    /// `[kh * kw][channels]`.
    pub weights: *const f32,
    /// `[channels]`.
    pub bias: *const f32,
    pub output: *mut u8,
    pub out_row: usize,
    pub out_pixel: usize,
    /// Output pixels a row.
    pub width: usize,
    pub channels: usize,
    /// Result = max(x, slope * x).
    pub slope: f32,
    /// The u8 that stands for zero in the output.
    pub zero: f32,
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
    // SAFETY: the same contract.
    unsafe {
        match a.storage {
            Storage::F32 => rows_of::<V, F32>(a, rows),
            Storage::Bf16 => rows_of::<V, BF16>(a, rows),
            Storage::U8 => rows_of::<V, U8>(a, rows),
        }
    }
}

/// [`Storage`] known to the compiler.
const F32: usize = 0;
const BF16: usize = 1;
const U8: usize = 2;
const STORAGE: [Storage; 3] = [Storage::F32, Storage::Bf16, Storage::U8];

#[inline(always)]
unsafe fn rows_of<V: Vector, const T: usize>(a: &DepthwiseArgs, rows: Range<usize>) {
    // Stride in taps, where the window is 3x3 and the stride a whole number of taps.
    let step = if a.kernel == [3, 3] && a.tap_pixel > 0 { a.in_pixel / a.tap_pixel } else { 0 };
    let step = if step * a.tap_pixel == a.in_pixel { step } else { 0 };
    for y in rows {
        let mut c = 0;
        // SAFETY: the caller's contract; channels c .. c + LANES, and the rest at the end, exist.
        unsafe {
            while c + V::LANES <= a.channels {
                match step {
                    1 => row_3x3::<V, T, 1, { RUN + 2 }, true>(a, y, c),
                    2 => row_3x3::<V, T, 2, { 2 * RUN + 1 }, true>(a, y, c),
                    _ => row_any::<V, T>(a, y, c, V::LANES),
                }
                c += V::LANES;
            }
            if c < a.channels {
                match step {
                    1 => row_3x3::<V, T, 1, { RUN + 2 }, false>(a, y, c),
                    2 => row_3x3::<V, T, 2, { 2 * RUN + 1 }, false>(a, y, c),
                    _ => row_any::<V, T>(a, y, c, a.channels - c),
                }
            }
        }
    }
}

/// Activates and stores a register at value `at` of the output.
#[inline(always)]
unsafe fn store<V: Vector, const T: usize>(a: &DepthwiseArgs, v: V, at: usize, lanes: usize) {
    // SAFETY: the contract of `rows`.
    unsafe {
        let to = a.output.add(at * STORAGE[T].bytes());
        let v = activate(v, V::splat(a.slope));
        let v = if T == U8 { v.add(V::splat(a.zero)) } else { v };
        v.store_as(STORAGE[T], to, lanes);
    }
}

/// Loads a register from value `at` of the input.
#[inline(always)]
unsafe fn load<V: Vector, const T: usize>(a: &DepthwiseArgs, at: usize, lanes: usize) -> V {
    // SAFETY: the contract of `rows`.
    unsafe { V::load_as(STORAGE[T], a.input.add(at * STORAGE[T].bytes()), lanes) }
}

/// A row of a 3x3 kernel, taps `S` to the stride; `SPAN` = columns of input under RUN pixels. `FULL`:
/// all lanes are channels, known to the compiler so that no access needs a choice.
#[inline(always)]
unsafe fn row_3x3<V: Vector, const T: usize, const S: usize, const SPAN: usize, const FULL: bool>(
    a: &DepthwiseArgs,
    y: usize,
    c: usize,
) {
    let lanes = if FULL { V::LANES } else { a.channels - c };
    // SAFETY: the contract of `rows`.
    unsafe {
        let (input, output) = (y * a.in_row + c, y * a.out_row + c);
        let mut w = [V::splat(0.0); 9];
        for (i, w) in w.iter_mut().enumerate() {
            *w = V::load_upto(a.weights.add(i * a.channels + c), lanes);
        }
        let bias = V::load_upto(a.bias.add(c), lanes);
        let mut x = 0;
        while x + RUN <= a.width {
            let mut acc = [bias; RUN];
            for ky in 0..3 {
                let p = input + x * a.in_pixel + ky * a.tap_row;
                let mut column = [V::splat(0.0); SPAN];
                for (i, v) in column.iter_mut().enumerate() {
                    *v = load::<V, T>(a, p + i * a.tap_pixel, lanes);
                }
                for kx in 0..3 {
                    for i in 0..RUN {
                        acc[i] = acc[i].mul_add(column[i * S + kx], w[ky * 3 + kx]);
                    }
                }
            }
            for i in 0..RUN {
                store::<V, T>(a, acc[i], output + (x + i) * a.out_pixel, lanes);
            }
            x += RUN;
        }
        while x < a.width {
            let p = input + x * a.in_pixel;
            let mut acc = bias;
            for ky in 0..3 {
                for kx in 0..3 {
                    let v = load::<V, T>(a, p + ky * a.tap_row + kx * a.tap_pixel, lanes);
                    acc = acc.mul_add(v, w[ky * 3 + kx]);
                }
            }
            store::<V, T>(a, acc, output + x * a.out_pixel, lanes);
            x += 1;
        }
    }
}

/// A row of any kernel.
#[inline(always)]
unsafe fn row_any<V: Vector, const T: usize>(a: &DepthwiseArgs, y: usize, c: usize, lanes: usize) {
    // SAFETY: the contract of `rows`.
    unsafe {
        let bias = V::load_upto(a.bias.add(c), lanes);
        for x in 0..a.width {
            let p = y * a.in_row + x * a.in_pixel + c;
            let mut acc = bias;
            for ky in 0..a.kernel[0] {
                for kx in 0..a.kernel[1] {
                    let v = load::<V, T>(a, p + ky * a.tap_row + kx * a.tap_pixel, lanes);
                    let w = V::load_upto(a.weights.add((ky * a.kernel[1] + kx) * a.channels + c), lanes);
                    acc = acc.mul_add(v, w);
                }
            }
            store::<V, T>(a, acc, y * a.out_row + x * a.out_pixel + c, lanes);
        }
    }
}
