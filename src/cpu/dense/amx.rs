//! bf16 matrix products on AMX: tiles of 16 rows of 64 bytes, f32 sums.
//!
//! tmm0..3 hold sums (2 x 2 tiles), tmm4, 5 the left operand, tmm6, 7 the right one.

use super::gemm::{channel_stride, operand_stride};
use super::maps::holds;
use super::Packed;
use crate::cpu::tiles::{load, multiply_bf16 as multiply, store, tile_words, zero, Tiles};
use crate::cpu::{isa, Isa};
use half::bf16;
use std::arch::x86_64::*;

/// Whether the CPU has AMX, the operating system saves its tiles for us, and `FARFACE_ISA` keeps nothing from use.
pub(super) fn available() -> bool {
    isa::detected() == Isa::Amx
}

/// The sums of up to 2 x 2 tiles: `steps` products from `a` (two row blocks, `a_below` apart) and `b` (two
/// column blocks, `b_right` apart).
struct Walk<V> {
    a: *const V,
    a_below: usize,
    a_row_bytes: usize,
    a_step: usize,
    b: *const V,
    b_right: usize,
    b_step: usize,
    steps: usize,
}

#[inline(always)]
unsafe fn walk<V, const ROWS: usize, const COLUMNS: usize>(w: &Walk<V>) {
    let (mut a, mut b) = (w.a, w.b);
    for _ in 0..w.steps {
        // SAFETY: the caller's blocks and steps stay inside its buffers.
        unsafe {
            load::<4, V>(a, w.a_row_bytes);
            load::<6, V>(b, 64);
            multiply::<0, 4, 6>();
            if COLUMNS == 2 {
                load::<7, V>(b.add(w.b_right), 64);
                multiply::<1, 4, 7>();
            }
            if ROWS == 2 {
                load::<5, V>(a.add(w.a_below), w.a_row_bytes);
                multiply::<2, 5, 6>();
                if COLUMNS == 2 {
                    multiply::<3, 5, 7>();
                }
            }
        }
        a = a.wrapping_add(w.a_step);
        b = b.wrapping_add(w.b_step);
    }
}

/// Runs `walk` for the block sizes at hand; `fresh` starts from zero, else from what `c` holds.
#[inline(always)]
unsafe fn block<V>(w: &Walk<V>, rows: usize, columns: usize, c: *mut f32, c_row: usize, fresh: bool) {
    let bytes = 4 * c_row;
    // SAFETY: the caller vouches for 16 * rows x 16 * columns results at `c`.
    unsafe {
        let below = c.wrapping_add(16 * c_row);
        if fresh {
            zero::<0>();
            zero::<1>();
            zero::<2>();
            zero::<3>();
        } else {
            load::<0, f32>(c, bytes);
            if columns == 2 {
                load::<1, f32>(c.add(16), bytes);
            }
            if rows == 2 {
                load::<2, f32>(below, bytes);
                if columns == 2 {
                    load::<3, f32>(below.add(16), bytes);
                }
            }
        }
        match (rows, columns) {
            (2, 2) => walk::<V, 2, 2>(w),
            (2, _) => walk::<V, 2, 1>(w),
            (_, 2) => walk::<V, 1, 2>(w),
            _ => walk::<V, 1, 1>(w),
        }
        store::<0>(c, bytes);
        if columns == 2 {
            store::<1>(c.add(16), bytes);
        }
        if rows == 2 {
            store::<2>(below, bytes);
            if columns == 2 {
                store::<3>(below.add(16), bytes);
            }
        }
    }
}

/// [`Element::product`](super::Element::product).
pub(super) fn product(a: &[bf16], a_pixel: usize, pixels: usize, b: &Packed<bf16>, c: &mut [f32]) {
    assert!(available(), "bf16 products need AMX");
    let depth = operand_stride(b.depth);
    let c_row = channel_stride(b.channels);
    let rows = pixels.next_multiple_of(16);
    assert!(a_pixel >= depth && holds(a.len(), rows, a_pixel), "operand too short");
    assert!(c.len() >= rows * c_row, "result too short");
    let chunk = tile_depth(depth);
    let panel = depth * 16; // values of 16 channels
                            // SAFETY: the lengths were checked; `b` was packed in blocks of 16 channels of `depth` values.
    unsafe {
        let _tiles = Tiles::configure(16, chunk / 2);
        for y in (0..rows).step_by(32) {
            let row_blocks = if rows - y > 16 { 2 } else { 1 };
            for n in (0..c_row).step_by(32) {
                let columns = if c_row - n > 16 { 2 } else { 1 };
                let w = Walk {
                    a: a.as_ptr().add(y * a_pixel),
                    a_below: 16 * a_pixel,
                    a_row_bytes: 2 * a_pixel,
                    a_step: chunk,
                    b: b.values.as_ptr().add(n / 16 * panel),
                    b_right: panel,
                    b_step: chunk * 16,
                    steps: depth / chunk,
                };
                block(&w, row_blocks, columns, c.as_mut_ptr().add(y * c_row + n), c_row, true);
            }
        }
    }
}

/// Values of `depth` that a tile takes at a time: its largest even divisor up to 32.
pub(super) fn tile_depth(depth: usize) -> usize {
    assert!(depth.is_multiple_of(2), "operands are even");
    2 * tile_words(depth / 2)
}

/// [`Element::outer`](super::Element::outer): the left operand is transposed and the right one's pixels are
/// interleaved in pairs, as the tiles want them.
pub(super) fn outer(
    _: Isa,
    (a, a_pixel, inputs): (&[bf16], usize, usize),
    (d, d_pixel, channels): (&[bf16], usize, usize),
    pixels: usize,
    sums: &mut [f32],
    scratch: &mut Vec<bf16>,
) {
    assert!(available(), "bf16 products need AMX");
    if pixels == 0 {
        return;
    }
    let depth = pixels.next_multiple_of(32);
    let (rows, columns) = (channel_stride(inputs), channel_stride(channels));
    // A block of 16 values is read whole, past the last pixel's end.
    assert!(a_pixel >= inputs && holds(a.len().saturating_sub(16), depth, a_pixel), "operand too short");
    assert!(d_pixel >= channels && holds(d.len().saturating_sub(16), depth, d_pixel), "gradient too short");
    assert!(sums.len() >= rows * columns, "sums too short");
    if scratch.len() < depth * (rows + columns) {
        scratch.resize(depth * (rows + columns), bf16::ZERO);
    }
    let (left, right) = scratch.split_at_mut(depth * rows);
    // SAFETY: the lengths were checked, for whole blocks of 32 pixels and 16 values.
    unsafe {
        transpose_pixels(a.as_ptr(), a_pixel, depth, left.as_mut_ptr(), rows);
        interleave_pixels(d.as_ptr(), d_pixel, depth, right.as_mut_ptr(), columns);
        let _tiles = Tiles::configure(16, 16);
        for k in (0..rows).step_by(32) {
            let row_blocks = if rows - k > 16 { 2 } else { 1 };
            for n in (0..columns).step_by(32) {
                let column_blocks = if columns - n > 16 { 2 } else { 1 };
                let w = Walk {
                    a: left.as_ptr().add(k * depth),
                    a_below: 16 * depth,
                    a_row_bytes: 2 * depth,
                    a_step: 32,
                    b: right.as_ptr().add(n * depth),
                    b_right: 16 * depth,
                    b_step: 16 * 32,
                    steps: depth / 32,
                };
                let c = sums.as_mut_ptr().add(k * columns + n);
                block(&w, row_blocks, column_blocks, c, columns, false);
            }
        }
    }
}

/// `to[k][p] = from[p][k]` for `pixels` (a multiple of 32) and `values` (of 16).
#[target_feature(enable = "avx512f")]
unsafe fn transpose_pixels(from: *const bf16, pixel: usize, pixels: usize, to: *mut bf16, values: usize) {
    for k in (0..values).step_by(16) {
        for p in (0..pixels).step_by(32) {
            let mut pairs = [_mm512_setzero_si512(); 16];
            // SAFETY: the caller's lengths.
            unsafe {
                let from = from.add(p * pixel + k);
                for (i, v) in pairs.iter_mut().enumerate() {
                    *v = pair(from.add(2 * i * pixel), pixel);
                }
                transpose(&mut pairs);
                for (i, v) in pairs.into_iter().enumerate() {
                    _mm512_storeu_si512(to.add((k + i) * pixels + p).cast(), v);
                }
            }
        }
    }
}

/// Blocks of 16 values, in each `[pixels / 2][16][2]`.
#[target_feature(enable = "avx512f")]
unsafe fn interleave_pixels(from: *const bf16, pixel: usize, pixels: usize, to: *mut bf16, values: usize) {
    for n in (0..values).step_by(16) {
        for p in (0..pixels).step_by(2) {
            // SAFETY: the caller's lengths.
            unsafe {
                let v = pair(from.add(p * pixel + n), pixel);
                _mm512_storeu_si512(to.add(n * pixels + p * 16).cast(), v);
            }
        }
    }
}

/// Sixteen values of a pixel interleaved with those of the next pixel.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn pair(p: *const bf16, pixel: usize) -> __m512i {
    // SAFETY: the caller vouches for 16 values of both pixels.
    let [low, high] = unsafe { [_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(pixel).cast())] };
    let (low, high) = (_mm512_cvtepu16_epi32(low), _mm512_cvtepu16_epi32(high));
    _mm512_or_si512(low, _mm512_slli_epi32::<16>(high))
}

/// Transposes 16 x 16 words.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose(r: &mut [__m512i; 16]) {
    let mut u = *r;
    for g in (0..16).step_by(4) {
        let t0 = _mm512_unpacklo_epi32(r[g], r[g + 1]);
        let t1 = _mm512_unpackhi_epi32(r[g], r[g + 1]);
        let t2 = _mm512_unpacklo_epi32(r[g + 2], r[g + 3]);
        let t3 = _mm512_unpackhi_epi32(r[g + 2], r[g + 3]);
        u[g] = _mm512_unpacklo_epi64(t0, t2);
        u[g + 1] = _mm512_unpackhi_epi64(t0, t2);
        u[g + 2] = _mm512_unpacklo_epi64(t1, t3);
        u[g + 3] = _mm512_unpackhi_epi64(t1, t3);
    }
    // u[4g + j] holds, in its quarter q, column 4q + j of rows 4g .. 4g + 3.
    for j in 0..4 {
        let even = _mm512_shuffle_i32x4::<0x88>(u[j], u[4 + j]);
        let even2 = _mm512_shuffle_i32x4::<0x88>(u[8 + j], u[12 + j]);
        let odd = _mm512_shuffle_i32x4::<0xdd>(u[j], u[4 + j]);
        let odd2 = _mm512_shuffle_i32x4::<0xdd>(u[8 + j], u[12 + j]);
        r[j] = _mm512_shuffle_i32x4::<0x88>(even, even2);
        r[4 + j] = _mm512_shuffle_i32x4::<0x88>(odd, odd2);
        r[8 + j] = _mm512_shuffle_i32x4::<0xdd>(even, even2);
        r[12 + j] = _mm512_shuffle_i32x4::<0xdd>(odd, odd2);
    }
}
