//! Kernels bound by memory: pooling, interpolation, addition, copies.

use super::epilogue::activate;
use super::Vector;
use crate::cpu::arena::Storage;
use std::ops::Range;

/// Channels of a network's input in bf16: two words a pixel.
pub(crate) const WIDENED: usize = 4;

/// Max pooling of one image. Windows are clipped to the map, so padding never wins.
pub(crate) struct PoolArgs {
    /// How input and output are stored; strides count values.
    pub storage: Storage,
    /// First pixel of the map.
    pub input: *const u8,
    pub in_row: usize,
    pub in_pixel: usize,
    /// Rows and columns of the map.
    pub in_size: [usize; 2],
    pub kernel: [usize; 2],
    pub stride: [usize; 2],
    /// Padding above and to the left.
    pub pad: [usize; 2],
    pub output: *mut u8,
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
                            let p = iy * a.in_row + ix * a.in_pixel + c;
                            // Row 0 need not be there, so that the sum alone points anywhere.
                            let p = a.input.wrapping_add(p * a.storage.bytes());
                            best = best.max(V::load_as(a.storage, p, lanes));
                        }
                    }
                    let to = y * a.out_row + x * a.out_pixel + c;
                    best.store_as(a.storage, a.output.wrapping_add(to * a.storage.bytes()), lanes);
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
    /// How input and output are stored; strides count values.
    pub storage: Storage,
    pub input: *const u8,
    pub in_row: usize,
    pub in_pixel: usize,
    /// One an output row, one an output column.
    pub rows: &'a [Blend],
    pub columns: &'a [Blend],
    pub output: *mut u8,
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
                    let at =
                        |o: usize| V::load_as(a.storage, a.input.add((o + c) * a.storage.bytes()), lanes);
                    let out = a.output.add((y * a.out_row + x * a.out_pixel + c) * a.storage.bytes());
                    if by.t == 0.0 && bx.t == 0.0 {
                        at(top + left).store_as(a.storage, out, lanes);
                    } else {
                        let mix = |p: V, q: V, t: f32| p.mul(V::splat(1.0 - t)).mul_add(q, V::splat(t));
                        let upper = mix(at(top + left), at(top + right), bx.t);
                        let lower = mix(at(bottom + left), at(bottom + right), bx.t);
                        mix(upper, lower, by.t).store_as(a.storage, out, lanes);
                    }
                }
                c += V::LANES;
            }
        }
    }
}

/// What `output = activation(a [+ b])` reads, pixel by pixel.
#[derive(Clone, Copy)]
pub(crate) struct Operand {
    pub storage: Storage,
    /// Its first value; null where it is not there.
    pub values: *const u8,
    /// Values from row to row and pixel to pixel.
    pub row: usize,
    pub pixel: usize,
    /// Stands for `(v - zero) * scale`, in units of the output.
    pub scale: f32,
    pub zero: f32,
}

impl Operand {
    /// Channels `c .. c + lanes` of pixel (y, x).
    #[inline(always)]
    unsafe fn load<V: Vector>(&self, y: usize, x: usize, c: usize, lanes: usize) -> V {
        let at = y * self.row + x * self.pixel + c;
        // SAFETY: the contract of `add_or_copy`.
        unsafe {
            let v = V::load_as(self.storage, self.values.add(at * self.storage.bytes()), lanes);
            if (self.scale, self.zero) == (1.0, 0.0) {
                return v;
            }
            v.add(V::splat(-self.zero)).mul(V::splat(self.scale))
        }
    }
}

/// `output = activation(a [+ b])`, pixel by pixel.
pub(crate) struct RowArgs {
    pub a: Operand,
    pub b: Operand,
    /// How the output is stored; strides count values.
    pub storage: Storage,
    pub output: *mut u8,
    pub out_row: usize,
    pub out_pixel: usize,
    pub width: usize,
    pub channels: usize,
    /// Result = max(x, slope * x).
    pub slope: f32,
    /// The u8 that stands for zero in the output.
    pub zero: f32,
}

/// Computes output rows `rows`.
///
/// # Safety
/// As [`max_pool`].
#[inline(always)]
pub(crate) unsafe fn add_or_copy<V: Vector>(a: &RowArgs, rows: Range<usize>) {
    // SAFETY: the caller's contract.
    unsafe {
        let (slope, zero) = (V::splat(a.slope), V::splat(a.zero));
        for y in rows {
            for x in 0..a.width {
                let mut c = 0;
                while c < a.channels {
                    let lanes = (a.channels - c).min(V::LANES);
                    let mut v = a.a.load::<V>(y, x, c, lanes);
                    if !a.b.values.is_null() {
                        v = v.add(a.b.load::<V>(y, x, c, lanes));
                    }
                    let v = activate(v, slope);
                    let v = if a.storage == Storage::U8 { v.add(zero) } else { v };
                    let to = (y * a.out_row + x * a.out_pixel + c) * a.storage.bytes();
                    v.store_as(a.storage, a.output.add(to), lanes);
                    c += V::LANES;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::kernels::{f16_bits, Kernels, F16_MOST};
    use crate::cpu::Isa;
    use half::f16;

    fn copy<A, B>(isa: Isa, from: &[A], of: Storage, to: &mut [B], storage: Storage) {
        let a =
            Operand { storage: of, values: from.as_ptr().cast(), row: 0, pixel: 0, scale: 1.0, zero: 0.0 };
        let args = RowArgs {
            a,
            b: Operand { values: std::ptr::null(), ..a },
            storage,
            output: to.as_mut_ptr().cast(),
            out_row: 0,
            out_pixel: 0,
            width: 1,
            channels: from.len().min(to.len()),
            slope: 1.0,
            zero: 0.0,
        };
        // SAFETY: one pixel of so many channels on both sides.
        unsafe { (Kernels::of(isa).rows)(&args, 0..1) };
    }

    #[test]
    fn f16_is_rounded_to_even_and_saturates() {
        let tie = 2.0f32.powi(-11);
        let least = 2.0f32.powi(-24);
        let cases = [
            (1.0 + tie, 1.0),
            (1.0 + 3.0 * tie, 1.0 + 4.0 * tie),
            (-1.0 - 1.01 * tie, -1.0 - 2.0 * tie),
            (least, least),
            (0.49 * least, 0.0),
            (-1.5 * least, -2.0 * least),
            (F16_MOST, F16_MOST),
            (65519.0, F16_MOST),
            (65520.0, F16_MOST),
            (-1e30, -F16_MOST),
            (f32::INFINITY, F16_MOST),
            (f32::NEG_INFINITY, -F16_MOST),
        ];
        let values: Vec<f32> = cases.iter().cycle().take(37).map(|c| c.0).collect();
        let expected: Vec<f32> = cases.iter().cycle().take(37).map(|c| c.1).collect();
        assert!(values.iter().zip(&expected).all(|(&v, &e)| f16::from_bits(f16_bits(v)).to_f32() == e));
        for isa in Isa::supported() {
            for n in 1..=values.len() {
                let (mut halves, mut back) = ([0x5555u16; 38], [0.5f32; 38]);
                copy(isa, &values[..n], Storage::F32, &mut halves, Storage::F16);
                copy(isa, &halves[..n], Storage::F16, &mut back, Storage::F32);
                assert_eq!((&back[..n], halves[n]), (&expected[..n], 0x5555), "{isa:?}");
            }
        }
    }
}
