//! Depthwise convolution over channels-last maps: a register holds consecutive channels of one
//! pixel, every channel has its own window weights.

use super::conv::unroll;
use super::epilogue::activate;
use super::stored::{F16, F32, STORAGE, U8};
use super::Vector;
use std::ops::Range;

/// One image's depthwise convolution; strides count values.
#[derive(Clone, Copy)]
pub(crate) struct DepthwiseArgs {
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

/// Computes output rows `rows` of values stored as number `T` of [`STORAGE`].
///
/// # Safety
/// All pointers and strides of `a` stay inside the caller's buffers for every pixel of the rows
/// asked for, and no other thread writes what is read here or touches what is written.
#[inline(always)]
pub(crate) unsafe fn rows<V: Vector, const T: usize>(a: &DepthwiseArgs, rows: Range<usize>) {
    // Stride in taps, where the window is 3x3 and the stride a whole number of taps.
    let step = if a.kernel == [3, 3] && a.tap_pixel > 0 { a.in_pixel / a.tap_pixel } else { 0 };
    let step = if step * a.tap_pixel == a.in_pixel { step } else { 0 };
    // Where registers are not known, conversion takes longer than all else: one small loop.
    let step = if V::REGISTERS == 0 && T != F32 { 0 } else { step };
    // Registers that channels do not fill: a few at the end of a pixel, or where there are many lanes the whole of it.
    let rest = if T == F32 || (V::LANES == 16 && T != F16) { step } else { 0 };
    for y in rows {
        let mut c = 0;
        // SAFETY: the caller's contract; channels c .. c + LANES, and the rest at the end, exist.
        unsafe {
            while c + V::LANES <= a.channels {
                match step {
                    1 | 2 => row_of_3x3::<V, T, true>(a, y, c, step),
                    _ => row_any::<V, T>(a, y, c, V::LANES),
                }
                c += V::LANES;
            }
            if c < a.channels {
                match rest {
                    1 | 2 => row_of_3x3::<V, T, false>(a, y, c, step),
                    _ => row_any::<V, T>(a, y, c, a.channels - c),
                }
            }
        }
    }
}

/// A row of a 3x3 kernel with `step` taps to the stride. So many pixels together are enough independent sums to hide the latency
/// of multiply-add (eight, where there are registers for them), few enough to keep them, the columns under them and the nine weights
/// in registers.
#[inline(always)]
unsafe fn row_of_3x3<V: Vector, const T: usize, const FULL: bool>(
    a: &DepthwiseArgs,
    y: usize,
    c: usize,
    step: usize,
) {
    // SAFETY: the contract of `rows`.
    unsafe {
        match (step, V::REGISTERS >= 32) {
            (1, true) => row_3x3::<V, T, 1, 8, 10, FULL>(a, y, c),
            (1, false) => row_3x3::<V, T, 1, 4, 6, FULL>(a, y, c),
            (_, true) => row_3x3::<V, T, 2, 6, 13, FULL>(a, y, c),
            (_, false) => row_3x3::<V, T, 2, 4, 9, FULL>(a, y, c),
        }
    }
}

/// Activates and stores a register.
#[inline(always)]
unsafe fn store<V: Vector, const T: usize>(a: &DepthwiseArgs, v: V, to: *mut u8, lanes: usize) {
    // SAFETY: the contract of `rows`.
    unsafe {
        let v = activate(v, V::splat(a.slope));
        let v = if T == U8 { v.add(V::splat(a.zero)) } else { v };
        v.store_as(STORAGE[T], to, lanes);
    }
}

/// A row of a 3x3 kernel, taps `S` to the stride, `RUN` pixels at a time; `SPAN` = columns of input under them. `FULL`:
/// all lanes are channels, known to the compiler so that no access needs a choice.
#[inline(always)]
unsafe fn row_3x3<
    V: Vector,
    const T: usize,
    const S: usize,
    const RUN: usize,
    const SPAN: usize,
    const FULL: bool,
>(
    a: &DepthwiseArgs,
    y: usize,
    c: usize,
) {
    let lanes = if FULL { V::LANES } else { a.channels - c };
    let bytes = STORAGE[T].bytes();
    let (tap, out_pixel) = (a.tap_pixel * bytes, a.out_pixel * bytes);
    // SAFETY: the contract of `rows`.
    unsafe {
        let mut input = a.input.add((y * a.in_row + c) * bytes);
        let mut output = a.output.add((y * a.out_row + c) * bytes).cast_const();
        let mut w = [V::splat(0.0); 9];
        for (i, w) in w.iter_mut().enumerate() {
            *w = V::load_upto(a.weights.add(i * a.channels + c), lanes);
        }
        let bias = V::load_upto(a.bias.add(c), lanes);
        let mut left = a.width;
        while left >= RUN {
            let mut acc = [bias; RUN];
            let mut row = input;
            for ky in 0..3 {
                let mut column = [V::splat(0.0); SPAN];
                let mut p = row;
                unroll!(i < SPAN, {
                    if i > 0 && i % 3 == 0 {
                        p = step(p, 3 * tap);
                    }
                    column[i] = V::load_as(STORAGE[T], p.wrapping_add(i % 3 * tap), lanes);
                });
                for kx in 0..3 {
                    unroll!(i < RUN, { acc[i] = acc[i].mul_add(column[i * S + kx], w[ky * 3 + kx]) });
                }
                row = step(row, a.tap_row * bytes);
            }
            unroll!(i < RUN, {
                store::<V, T>(a, acc[i], output.cast_mut(), lanes);
                output = step(output, out_pixel);
            });
            input = step(input, RUN * S * tap);
            left -= RUN;
        }
        while left > 0 {
            let mut acc = bias;
            for ky in 0..3 {
                for kx in 0..3 {
                    let p = input.wrapping_add((ky * a.tap_row + kx * a.tap_pixel) * bytes);
                    acc = acc.mul_add(V::load_as(STORAGE[T], p, lanes), w[ky * 3 + kx]);
                }
            }
            store::<V, T>(a, acc, output.cast_mut(), lanes);
            (input, output) = (step(input, S * tap), step(output, out_pixel));
            left -= 1;
        }
    }
}

/// `p` and so many bytes. The compiler does not see that it is a sum: it would keep a pointer of its own for each of the pixels that are
/// read, more than there are registers.
#[inline(always)]
fn step(p: *const u8, bytes: usize) -> *const u8 {
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64", target_arch = "arm"))]
    let bytes = {
        let mut bytes = bytes;
        // SAFETY: no instruction.
        unsafe {
            std::arch::asm!("/* {0} */", inout(reg) bytes, options(pure, nomem, nostack, preserves_flags))
        };
        bytes
    };
    p.wrapping_add(bytes)
}

/// A row of any kernel.
#[inline(always)]
unsafe fn row_any<V: Vector, const T: usize>(a: &DepthwiseArgs, y: usize, c: usize, lanes: usize) {
    // SAFETY: the contract of `rows`.
    unsafe {
        let bias = V::load_upto(a.bias.add(c), lanes);
        let at = |i: usize| i * STORAGE[T].bytes();
        for x in 0..a.width {
            let p = a.input.add(at(y * a.in_row + x * a.in_pixel + c));
            let mut acc = bias;
            for ky in 0..a.kernel[0] {
                for kx in 0..a.kernel[1] {
                    let v = V::load_as(STORAGE[T], p.add(at(ky * a.tap_row + kx * a.tap_pixel)), lanes);
                    let w = V::load_upto(a.weights.add((ky * a.kernel[1] + kx) * a.channels + c), lanes);
                    acc = acc.mul_add(v, w);
                }
            }
            store::<V, T>(a, acc, a.output.add(at(y * a.out_row + x * a.out_pixel + c)), lanes);
        }
    }
}
