//! Kernels bound by memory: pooling, interpolation, addition, copies.

use super::epilogue::activate;
use super::stored::{by_storage, F32, STORAGE};
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
/// Pointers and strides stay inside the caller's buffers; every window has a pixel of the map; no other thread writes what is read.
#[inline(always)]
pub(crate) unsafe fn max_pool<V: Vector>(a: &PoolArgs, rows: Range<usize>) {
    // SAFETY: the caller's contract.
    unsafe { by_storage!(a.storage, pool::<V>(a, rows)) }
}

/// [`max_pool`] of values stored as number `T` of [`STORAGE`]. Whole registers have a loop of their own, here and below, where there
/// are any.
#[inline(always)]
unsafe fn pool<V: Vector, const T: usize>(a: &PoolArgs, rows: Range<usize>) {
    let bytes = STORAGE[T].bytes();
    let clip = |out: usize, axis: usize| {
        let start = (out * a.stride[axis]) as isize - a.pad[axis] as isize;
        let end = (start + a.kernel[axis] as isize).min(a.in_size[axis] as isize);
        start.max(0) as usize..end as usize
    };
    for y in rows {
        let under = clip(y, 0);
        for x in 0..a.width {
            let beside = clip(x, 1);
            let (height, width) = (under.len(), beside.len());
            // Row 0 need not be there, so that the sum alone points anywhere.
            let from = a.input.wrapping_add((under.start * a.in_row + beside.start * a.in_pixel) * bytes);
            let to = a.output.wrapping_add((y * a.out_row + x * a.out_pixel) * bytes);
            let mut c = 0;
            // SAFETY: the caller's contract; the window is clipped to the map.
            unsafe {
                while V::REGISTERS > 0 && c + V::LANES <= a.channels {
                    let at = c * bytes;
                    let largest = largest::<V, T>(a, from.wrapping_add(at), height, width, V::LANES);
                    largest.store_as(STORAGE[T], to.wrapping_add(at), V::LANES);
                    c += V::LANES;
                }
                while c < a.channels {
                    let (at, lanes) = (c * bytes, (a.channels - c).min(V::LANES));
                    let largest = largest::<V, T>(a, from.wrapping_add(at), height, width, lanes);
                    largest.store_as(STORAGE[T], to.wrapping_add(at), lanes);
                    c += V::LANES;
                }
            }
        }
    }
}

/// The largest values of so many rows and columns of pixels from `from` on, lane by lane.
#[inline(always)]
unsafe fn largest<V: Vector, const T: usize>(
    a: &PoolArgs,
    from: *const u8,
    rows: usize,
    columns: usize,
    lanes: usize,
) -> V {
    let (row, pixel) = (a.in_row * STORAGE[T].bytes(), a.in_pixel * STORAGE[T].bytes());
    // SAFETY: the contract of `max_pool`.
    unsafe {
        let mut best = V::load_as(STORAGE[T], from, lanes);
        // Most windows, without loops.
        if V::REGISTERS > 0 && T == F32 && rows == 2 && columns == 2 {
            best = best.max(V::load_as(STORAGE[T], from.add(pixel), lanes));
            best = best.max(V::load_as(STORAGE[T], from.add(row), lanes));
            return best.max(V::load_as(STORAGE[T], from.add(row + pixel), lanes));
        }
        for y in 0..rows {
            for x in 0..columns {
                best = best.max(V::load_as(STORAGE[T], from.add(y * row + x * pixel), lanes));
            }
        }
        best
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
    // SAFETY: the caller's contract.
    unsafe { by_storage!(a.storage, interpolate::<V>(a, rows)) }
}

/// [`resize`] of values stored as number `T` of [`STORAGE`].
#[inline(always)]
unsafe fn interpolate<V: Vector, const T: usize>(a: &ResizeArgs, rows: Range<usize>) {
    let bytes = STORAGE[T].bytes();
    for y in rows {
        let by = a.rows[y];
        for (x, &bx) in a.columns.iter().enumerate() {
            let mut c = 0;
            // SAFETY: the caller's contract; the indices are inside the map.
            unsafe {
                let to = a.output.add((y * a.out_row + x * a.out_pixel) * bytes);
                while V::REGISTERS > 0 && c + V::LANES <= a.channels {
                    blend::<V, T>(a, by, bx, c, V::LANES).store_as(STORAGE[T], to.add(c * bytes), V::LANES);
                    c += V::LANES;
                }
                while c < a.channels {
                    let lanes = (a.channels - c).min(V::LANES);
                    blend::<V, T>(a, by, bx, c, lanes).store_as(STORAGE[T], to.add(c * bytes), lanes);
                    c += V::LANES;
                }
            }
        }
    }
}

/// Channels `c .. c + lanes` between the rows of `by` and the columns of `bx`.
#[inline(always)]
unsafe fn blend<V: Vector, const T: usize>(
    a: &ResizeArgs,
    by: Blend,
    bx: Blend,
    c: usize,
    lanes: usize,
) -> V {
    let at = |row: u32, column: u32| {
        let values = row as usize * a.in_row + column as usize * a.in_pixel + c;
        a.input.wrapping_add(values * STORAGE[T].bytes())
    };
    // SAFETY: the contract of `resize`.
    unsafe {
        let first = V::load_as(STORAGE[T], at(by.low, bx.low), lanes);
        if by.t == 0.0 && bx.t == 0.0 {
            return first;
        }
        let second = V::load_as(STORAGE[T], at(by.low, bx.high), lanes);
        let third = V::load_as(STORAGE[T], at(by.high, bx.low), lanes);
        let fourth = V::load_as(STORAGE[T], at(by.high, bx.high), lanes);
        let (before, behind) = (1.0 - bx.t, 1.0 - by.t);
        let upper = first.mul(V::splat(before)).mul_add(second, V::splat(bx.t));
        let lower = third.mul(V::splat(before)).mul_add(fourth, V::splat(bx.t));
        upper.mul(V::splat(behind)).mul_add(lower, V::splat(by.t))
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
    /// Whether it is f32 that stand for themselves.
    fn is_plain(&self) -> bool {
        self.values.is_null() || (self.storage, self.scale, self.zero) == (Storage::F32, 1.0, 0.0)
    }

    /// Channels `c .. c + lanes` of pixel (y, x). `PLAIN`: of such an operand.
    #[inline(always)]
    unsafe fn load<V: Vector, const PLAIN: bool>(&self, y: usize, x: usize, c: usize, lanes: usize) -> V {
        let at = y * self.row + x * self.pixel + c;
        // SAFETY: the contract of `add_or_copy`.
        unsafe {
            if PLAIN {
                return V::load_upto(self.values.cast::<f32>().add(at), lanes);
            }
            let v = V::load_as(self.storage, self.values.add(at * self.storage.bytes()), lanes);
            if (self.scale, self.zero) == (1.0, 0.0) {
                return v;
            }
            v.add(V::splat(-self.zero)).mul(V::splat(self.scale))
        }
    }
}

/// `output = activation(a [+ b])`, pixel by pixel.
pub(crate) struct RowArgs<'a> {
    pub a: Operand,
    pub b: Operand,
    /// The row of `b` for every output row, its column for every output column; empty = the same.
    pub b_rows: &'a [u32],
    pub b_columns: &'a [u32],
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
/// As [`max_pool`]; the tables index rows and columns of `b`.
#[inline(always)]
pub(crate) unsafe fn add_or_copy<V: Vector>(a: &RowArgs, rows: Range<usize>) {
    // SAFETY: the caller's contract.
    unsafe {
        if V::REGISTERS > 0 && a.storage == Storage::F32 && a.a.is_plain() && a.b.is_plain() {
            sums::<V, true>(a, rows);
        } else {
            sums::<V, false>(a, rows);
        }
    }
}

/// [`add_or_copy`]; `PLAIN`: all are plain f32.
#[inline(always)]
unsafe fn sums<V: Vector, const PLAIN: bool>(a: &RowArgs, rows: Range<usize>) {
    let bytes = if PLAIN { size_of::<f32>() } else { a.storage.bytes() };
    for y in rows {
        let of_b = a.b_rows.get(y).map_or(y, |&row| row as usize);
        for x in 0..a.width {
            let beside = a.b_columns.get(x).map_or(x, |&column| column as usize);
            let mut c = 0;
            // SAFETY: the caller's contract.
            unsafe {
                let to = a.output.add((y * a.out_row + x * a.out_pixel) * bytes);
                while V::REGISTERS > 0 && c + V::LANES <= a.channels {
                    sum::<V, PLAIN>(a, (y, x), (of_b, beside), c, to.add(c * bytes), V::LANES);
                    c += V::LANES;
                }
                while c < a.channels {
                    let lanes = (a.channels - c).min(V::LANES);
                    sum::<V, PLAIN>(a, (y, x), (of_b, beside), c, to.add(c * bytes), lanes);
                    c += V::LANES;
                }
            }
        }
    }
}

/// Channels `c .. c + lanes` of the pixels of `a` and of `b` in these rows and columns, to `to`.
#[inline(always)]
unsafe fn sum<V: Vector, const PLAIN: bool>(
    a: &RowArgs,
    (y, x): (usize, usize),
    (of_b, beside): (usize, usize),
    c: usize,
    to: *mut u8,
    lanes: usize,
) {
    // SAFETY: the contract of `add_or_copy`.
    unsafe {
        let mut v = a.a.load::<V, PLAIN>(y, x, c, lanes);
        if !a.b.values.is_null() {
            v = v.add(a.b.load::<V, PLAIN>(of_b, beside, c, lanes));
        }
        let v = activate(v, V::splat(a.slope));
        if PLAIN {
            return v.store_upto(to.cast(), lanes);
        }
        let v = if a.storage == Storage::U8 { v.add(V::splat(a.zero)) } else { v };
        v.store_as(a.storage, to, lanes);
    }
}

/// 1 / (1 + e^-x) of `n` values.
///
/// # Safety
/// There are so many at `from`, and room for them at `to`, the same place or one apart from it.
#[inline(always)]
pub(crate) unsafe fn sigmoid<V: Vector>(from: *const f32, to: *mut f32, n: usize) {
    let mut i = 0;
    // SAFETY: the caller's contract.
    unsafe {
        while i < n {
            let lanes = (n - i).min(V::LANES);
            let e = V::load_upto(from.add(i), lanes).mul(V::splat(-1.0)).exp();
            V::splat(1.0).div(V::splat(1.0).add(e)).store_upto(to.add(i), lanes);
            i += V::LANES;
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
            b_rows: &[],
            b_columns: &[],
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
    fn sigmoids_are_those_of_f64_wherever_they_stand() {
        let mut values: Vec<f32> = (-2000..=2000).map(|i| i as f32 * 0.047).collect();
        values.extend([0.0, -0.0, 1e-30, 3e38, -3e38, f32::INFINITY, f32::NEG_INFINITY]);
        for isa in Isa::supported() {
            let sigmoid = |v: &[f32]| {
                let mut to = vec![7.0; v.len() + 1];
                // SAFETY: so many values and room for one more.
                unsafe { (Kernels::of(isa).sigmoid)(v.as_ptr(), to.as_mut_ptr(), v.len()) };
                assert_eq!(to.pop(), Some(7.0), "{isa:?}");
                to
            };
            let all = sigmoid(&values);
            for (&v, &got) in values.iter().zip(&all) {
                // Beyond ±87 as of that.
                let expected = 1.0 / (1.0 + f64::from(-v).clamp(-87.0, 87.0).exp());
                let off = (f64::from(got) - expected).abs() / expected;
                assert!(off < 3.0 * f64::from(f32::EPSILON), "{isa:?}: {got:e} of {v:e}, {expected:e}");
            }
            for n in 0..40 {
                assert_eq!(sigmoid(&values[..n]), all[..n], "{isa:?}");
            }
            assert!(sigmoid(&[0.0, f32::NAN, 1.0])[1].is_nan(), "{isa:?}");
        }
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
            let (mut halves, mut back) = ([0u16; 37], [0.0f32; 37]);
            let nan: Vec<f32> = (0..37).map(|i| if i % 5 == 2 { f32::NAN } else { 1.0 }).collect();
            copy(isa, &nan, Storage::F32, &mut halves, Storage::F16);
            copy(isa, &halves, Storage::F16, &mut back, Storage::F32);
            assert!(back.iter().zip(&nan).all(|(b, v)| b.is_nan() == v.is_nan()), "{isa:?}: {back:?}");
        }
    }
}
