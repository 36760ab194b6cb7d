//! bf16 matrix products whose operands stand in pairs of consecutive depth, as AMX's tiles and AVX512-BF16's dot product
//! both want them; sums in f32.

use super::gemm::{channel_stride, operand_stride, Matrices};
use super::maps::holds;
use super::{amx, dot, Packed};
use crate::cpu::Isa;
use half::bf16;
use std::arch::x86_64::*;

/// # Safety
/// The pointers hold what the fields say; nobody else touches `c`.
unsafe fn multiply(isa: Isa, m: &Matrices) {
    assert!(isa.multiplies_bf16(), "bf16 products need AVX512-BF16");
    debug_assert!(m.depth.is_multiple_of(2) && m.rows.is_multiple_of(16) && m.columns.is_multiple_of(16));
    // SAFETY: the caller's contract; an `Isa` value is proof that the CPU has it, and the dot product was asked for.
    unsafe {
        if isa.has_tiles() {
            amx::multiply_all(m);
        } else {
            dot::multiply_all(m);
        }
    }
}

/// [`Element::product`](super::Element::product).
pub(super) fn product(isa: Isa, a: &[bf16], a_pixel: usize, pixels: usize, b: &Packed<bf16>, c: &mut [f32]) {
    let depth = operand_stride(b.depth);
    let columns = channel_stride(b.channels);
    let rows = pixels.next_multiple_of(16);
    assert!(a_pixel >= depth && holds(a.len(), rows, a_pixel), "operand too short");
    assert!(c.len() >= rows * columns, "result too short");
    let m = Matrices {
        a: a.as_ptr(),
        a_row: a_pixel,
        b: b.values.as_ptr(),
        depth,
        c: c.as_mut_ptr(),
        rows,
        columns,
        add: false,
    };
    // SAFETY: the lengths were checked; `b` was packed in blocks of 16 channels of `depth` values.
    unsafe { multiply(isa, &m) }
}

/// [`Element::outer`](super::Element::outer): the left operand is transposed and the right one's pixels are
/// interleaved in pairs.
pub(super) fn outer(
    isa: Isa,
    (a, a_pixel, inputs): (&[bf16], usize, usize),
    (d, d_pixel, channels): (&[bf16], usize, usize),
    pixels: usize,
    sums: &mut [f32],
    scratch: &mut Vec<bf16>,
) {
    assert!(isa.multiplies_bf16(), "bf16 products need AVX512-BF16");
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
    // SAFETY: the lengths were checked, for whole blocks of 32 pixels and 16 values; the CPU has AVX-512.
    unsafe {
        transpose_pixels(a.as_ptr(), a_pixel, depth, left.as_mut_ptr(), rows);
        interleave_pixels(d.as_ptr(), d_pixel, depth, right.as_mut_ptr(), columns);
        let m = Matrices {
            a: left.as_ptr(),
            a_row: depth,
            b: right.as_ptr(),
            depth,
            c: sums.as_mut_ptr(),
            rows,
            columns,
            add: true,
        };
        multiply(isa, &m);
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

#[cfg(test)]
mod tests {
    use super::super::Element;
    use super::*;
    use crate::graph::init::Rng;

    /// Both products over random shapes on every instruction set that has one, against plain loops.
    #[test]
    fn products_equal_plain_loops() {
        let isas: Vec<Isa> = Isa::supported().into_iter().filter(|isa| isa.multiplies_bf16()).collect();
        if isas.is_empty() {
            return println!("skipped: no bf16 on this machine");
        }
        let mut rng = Rng::new(5);
        for _ in 0..40 {
            let mut size = |most: f32| 1 + (rng.uniform() * most) as usize;
            let (pixels, inputs, channels) = (size(90.0), size(150.0), size(70.0));
            let mut values = |n: usize| (0..n).map(|_| bf16::of(rng.normal())).collect::<Vec<_>>();
            let (a_pixel, d_pixel) = (operand_stride(inputs), operand_stride(channels));
            let whole = pixels.next_multiple_of(32);
            let mut matrix = |pixel: usize, width: usize| {
                let mut m = values(whole * pixel + 16);
                let padding = |i: &usize| i / pixel >= pixels || i % pixel >= width;
                (0..m.len()).filter(padding).for_each(|i| m[i] = bf16::ZERO);
                m
            };
            let (a, d) = (matrix(a_pixel, inputs), matrix(d_pixel, channels));
            let weights = values(inputs * channels);
            let weight = |k: usize, n: usize| weights[k * channels + n].f32();
            for &isa in &isas {
                let what = format!("{isa:?} {pixels} {inputs} {channels}");
                let mut packed = Packed::<bf16>::new(isa, inputs, channels);
                (0..inputs * channels)
                    .for_each(|i| packed.set(i / channels, i % channels, weight(i / channels, i % channels)));
                let stride = channel_stride(channels);
                let mut c = vec![7.0; pixels.next_multiple_of(16) * stride];
                product(isa, &a, a_pixel, pixels, &packed, &mut c);
                let near = |got: f32, terms: &mut dyn Iterator<Item = (f32, f32)>, from: f32| {
                    let (sum, most) =
                        terms.fold((from, 1.0f32), |(s, m), (x, y)| (s + x * y, m + (x * y).abs()));
                    assert!((got - sum).abs() <= 1e-5 * most, "{what}: {got}, not {sum}");
                };
                for (p, n) in (0..pixels).flat_map(|p| (0..channels).map(move |n| (p, n))) {
                    let terms = (0..inputs).map(|k| (a[p * a_pixel + k].f32(), weight(k, n)));
                    near(c[p * stride + n], &mut terms.into_iter(), 0.0);
                }
                let mut sums = vec![3.0; channel_stride(inputs) * stride];
                outer(
                    isa,
                    (&a, a_pixel, inputs),
                    (&d, d_pixel, channels),
                    pixels,
                    &mut sums,
                    &mut Vec::new(),
                );
                for (k, n) in (0..inputs).flat_map(|k| (0..channels).map(move |n| (k, n))) {
                    let terms = (0..pixels).map(|p| (a[p * a_pixel + k].f32(), d[p * d_pixel + n].f32()));
                    near(sums[k * stride + n], &mut terms.into_iter(), 3.0);
                }
            }
        }
    }
}
