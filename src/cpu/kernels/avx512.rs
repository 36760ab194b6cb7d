//! AVX-512 kernels: sixteen lanes, thirty-two registers.

use super::conv::{Product, Single, F16_RUN};
use super::{conv_kernel, isa_kernels, Vector, F16_MOST};
use std::arch::x86_64::*;

/// Sixteen floats in a ZMM register.
#[derive(Clone, Copy)]
pub(crate) struct F32x16(pub(super) __m512);

/// The first `n < 16` lanes.
#[inline(always)]
fn mask(n: usize) -> __mmask16 {
    (1u16 << n) - 1
}

/// `v` within the range of f16; what is no number stays that: the second operand is what comes of it.
#[inline(always)]
unsafe fn within_f16(v: __m512) -> __m512 {
    // SAFETY: register arithmetic.
    unsafe { _mm512_min_ps(_mm512_set1_ps(F16_MOST), _mm512_max_ps(_mm512_set1_ps(-F16_MOST), v)) }
}

/// Sums of f16 within its range; its lower end for what is no number, as opposite infinities of two runs make it.
#[inline(always)]
unsafe fn saturated(sums: __m512) -> __m512 {
    // SAFETY: register arithmetic.
    unsafe { _mm512_min_ps(_mm512_max_ps(sums, _mm512_set1_ps(-F16_MOST)), _mm512_set1_ps(F16_MOST)) }
}

// SAFETY of every block below: the trait's contract (the caller is compiled for AVX-512 F, BW and VL, for
// `store_bf16_nearest` for BF16 too, which its callers check; the
// pointers are good for the lanes named).
impl Vector for F32x16 {
    const LANES: usize = 16;
    const REGISTERS: usize = 32;
    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        // SAFETY: a prefetch may point anywhere.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
    #[inline(always)]
    unsafe fn splat(v: f32) -> Self {
        // SAFETY: trait contract.
        Self(unsafe { _mm512_set1_ps(v) })
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: trait contract.
        Self(unsafe { _mm512_loadu_ps(p) })
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: trait contract.
        unsafe { _mm512_storeu_ps(p, self.0) }
    }
    #[inline(always)]
    unsafe fn load_first(p: *const f32, n: usize) -> Self {
        // SAFETY: trait contract; masked lanes are not touched.
        Self(unsafe { _mm512_maskz_loadu_ps(mask(n), p) })
    }
    #[inline(always)]
    unsafe fn store_first(self, p: *mut f32, n: usize) {
        // SAFETY: trait contract; masked lanes are not touched.
        unsafe { _mm512_mask_storeu_ps(p, mask(n), self.0) }
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        // SAFETY: trait contract.
        Self(unsafe { _mm512_add_ps(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        // SAFETY: trait contract.
        Self(unsafe { _mm512_mul_ps(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn mul_add(self, a: Self, b: Self) -> Self {
        // SAFETY: trait contract.
        Self(unsafe { _mm512_fmadd_ps(a.0, b.0, self.0) })
    }
    #[inline(always)]
    unsafe fn div(self, b: Self) -> Self {
        // SAFETY: trait contract.
        Self(unsafe { _mm512_div_ps(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn power_of_two(self) -> Self {
        // SAFETY: trait contract.
        Self(unsafe { _mm512_scalef_ps(_mm512_set1_ps(1.0), self.0) })
    }
    #[cfg(feature = "train")]
    #[inline(always)]
    unsafe fn where_positive(self, a: Self, b: Self) -> Self {
        // SAFETY: trait contract.
        Self(unsafe {
            let positive = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(self.0, _mm512_setzero_ps());
            _mm512_mask_blend_ps(positive, b.0, a.0)
        })
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16, n: usize) -> Self {
        // SAFETY: trait contract; masked lanes are not touched.
        Self(unsafe {
            let half = if n >= 16 {
                _mm256_loadu_si256(p.cast())
            } else {
                _mm256_maskz_loadu_epi16(mask(n), p.cast())
            };
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(half)))
        })
    }
    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut u16, n: usize) {
        // SAFETY: trait contract; masked lanes are not touched.
        unsafe {
            let bits = _mm512_castps_si512(self.0);
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
            let half = _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(rounded));
            if n >= 16 {
                _mm256_storeu_si256(p.cast(), half);
            } else {
                _mm256_mask_storeu_epi16(p.cast(), mask(n), half);
            }
        }
    }
    #[inline(always)]
    unsafe fn store_bf16_nearest(self, p: *mut u16, n: usize) {
        // SAFETY: trait contract; masked lanes are not touched.
        unsafe {
            // The callers asked for this instruction; it rounds to nearest even.
            let half: __m256i = std::mem::transmute(_mm512_cvtneps_pbh(self.0));
            if n >= 16 {
                _mm256_storeu_si256(p.cast(), half);
            } else {
                _mm256_mask_storeu_epi16(p.cast(), mask(n), half);
            }
        }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16, n: usize) -> Self {
        // SAFETY: trait contract; masked lanes are not touched.
        Self(unsafe {
            _mm512_cvtph_ps(if n >= 16 {
                _mm256_loadu_si256(p.cast())
            } else {
                _mm256_maskz_loadu_epi16(mask(n), p.cast())
            })
        })
    }
    #[inline(always)]
    unsafe fn store_f16(self, p: *mut u16, n: usize) {
        // SAFETY: trait contract; masked lanes are not touched.
        unsafe {
            let half = _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(within_f16(self.0));
            if n >= 16 {
                _mm256_storeu_si256(p.cast(), half);
            } else {
                _mm256_mask_storeu_epi16(p.cast(), mask(n), half);
            }
        }
    }
    #[inline(always)]
    unsafe fn load_pixels(p: *const f32, at: *const u32) -> Self {
        // SAFETY: trait contract.
        Self(unsafe {
            let v = _mm512_castps128_ps512(_mm_loadu_ps(p.add(*at as usize)));
            let v = _mm512_insertf32x4::<1>(v, _mm_loadu_ps(p.add(*at.add(1) as usize)));
            let v = _mm512_insertf32x4::<2>(v, _mm_loadu_ps(p.add(*at.add(2) as usize)));
            _mm512_insertf32x4::<3>(v, _mm_loadu_ps(p.add(*at.add(3) as usize)))
        })
    }
    #[inline(always)]
    unsafe fn spread(p: *const f32) -> Self {
        // SAFETY: trait contract.
        Self(unsafe {
            let quads = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
            _mm512_permutexvar_ps(quads, _mm512_castps128_ps512(_mm_loadu_ps(p)))
        })
    }
    #[inline(always)]
    unsafe fn pack_pixels(self) -> Self {
        // SAFETY: trait contract.
        Self(unsafe {
            let packed = _mm512_setr_epi32(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, 15, 15, 15, 15);
            _mm512_permutexvar_ps(packed, self.0)
        })
    }
    #[inline(always)]
    unsafe fn swap_ends(self) -> Self {
        // SAFETY: trait contract.
        Self(unsafe { _mm512_permute_ps::<0b11_00_01_10>(self.0) })
    }
    #[inline(always)]
    unsafe fn load_u8(p: *const u8, n: usize) -> Self {
        // SAFETY: trait contract; masked lanes are not touched.
        Self(unsafe {
            let bytes =
                if n >= 16 { _mm_loadu_si128(p.cast()) } else { _mm_maskz_loadu_epi8(mask(n), p.cast()) };
            _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes))
        })
    }
    #[inline(always)]
    unsafe fn store_u8(self, p: *mut u8, n: usize) {
        // SAFETY: trait contract; masked lanes are not touched.
        unsafe {
            let inside = _mm512_min_ps(_mm512_max_ps(self.0, _mm512_setzero_ps()), _mm512_set1_ps(255.0));
            let bytes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(inside));
            if n >= 16 {
                _mm_storeu_si128(p.cast(), bytes);
            } else {
                _mm_mask_storeu_epi8(p.cast(), mask(n), bytes);
            }
        }
    }
    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        // SAFETY: trait contract.
        Self(unsafe { _mm512_max_ps(self.0, b.0) })
    }
}

/// Two bf16 by AVX512-BF16's dot product.
pub(crate) struct PairsOfBf16;

// SAFETY of every block below: the trait's contract (the caller is compiled for the instructions used, the
// pointers are good for a register or a word).
impl Product for PairsOfBf16 {
    type Values = F32x16;
    type Words = __m512i;
    type Sums = __m512;
    #[inline(always)]
    unsafe fn splat(p: *const u8) -> __m512i {
        // SAFETY: trait contract.
        unsafe { _mm512_set1_epi32(p.cast::<i32>().read_unaligned()) }
    }
    #[inline(always)]
    unsafe fn multiply(sums: __m512, input: __m512i, weights: __m512i) -> __m512 {
        // SAFETY: trait contract; any bits are bf16.
        unsafe {
            _mm512_dpbf16_ps(
                sums,
                std::mem::transmute::<__m512i, __m512bh>(input),
                std::mem::transmute::<__m512i, __m512bh>(weights),
            )
        }
    }
    #[inline(always)]
    unsafe fn finish(sums: __m512, _: *const f32, _: *const f32) -> F32x16 {
        F32x16(sums)
    }
}

/// Sums in f32 of the first halves of words and of the second ones: lane after lane both, eight lanes a register.
type Halves = [__m512; 2];

/// Sums that start with `bias`.
#[inline(always)]
unsafe fn halves(bias: *const u32) -> Halves {
    // SAFETY: the caller vouches for a register's words.
    unsafe {
        let bias = _mm512_loadu_ps(bias.cast());
        let first = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
        [first, _mm512_add_epi32(first, _mm512_set1_epi32(8))]
            .map(|lanes| _mm512_maskz_permutexvar_ps(0x5555, lanes, bias))
    }
}

/// The sum of each lane's two.
#[inline(always)]
unsafe fn joined([low, high]: Halves) -> __m512 {
    // SAFETY: register arithmetic.
    unsafe {
        let first = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        let second = _mm512_add_epi32(first, _mm512_set1_epi32(1));
        _mm512_add_ps(_mm512_permutex2var_ps(low, first, high), _mm512_permutex2var_ps(low, second, high))
    }
}

/// Two f16 in f32.
#[inline(always)]
unsafe fn singles(words: __m512i) -> Halves {
    // SAFETY: register arithmetic.
    unsafe {
        [_mm512_castsi512_si256(words), _mm512_extracti64x4_epi64::<1>(words)].map(|v| _mm512_cvtph_ps(v))
    }
}

/// `sums + a * b` of f16, by AVX512-FP16; in assembly, since the intrinsic is not stable.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn multiply_add_f16(mut sums: __m512i, a: __m512i, b: __m512i) -> __m512i {
    // SAFETY: register arithmetic, with an instruction that the CPU was asked for.
    unsafe {
        std::arch::asm!("vfmadd231ph {sums}, {a}, {b}", sums = inout(zmm_reg) sums, a = in(zmm_reg) a,
            b = in(zmm_reg) b, options(pure, nomem, nostack));
    }
    sums
}

/// Two f16 by multiply-add.
pub(crate) struct PairsOfF16;

/// Sums of f16, and those in f32 that they are flushed to.
#[derive(Clone, Copy)]
pub(crate) struct SumsOfF16 {
    run: __m512i,
    total: Halves,
}

impl Product for PairsOfF16 {
    type Values = F32x16;
    type Words = __m512i;
    type Sums = SumsOfF16;
    const RUN: usize = F16_RUN;
    #[inline(always)]
    unsafe fn splat(p: *const u8) -> __m512i {
        // SAFETY: trait contract.
        unsafe { _mm512_set1_epi32(p.cast::<i32>().read_unaligned()) }
    }
    #[inline(always)]
    unsafe fn start(p: *const u32) -> SumsOfF16 {
        // SAFETY: trait contract.
        unsafe { SumsOfF16 { run: _mm512_setzero_si512(), total: halves(p) } }
    }
    #[inline(always)]
    unsafe fn multiply(sums: SumsOfF16, input: __m512i, weights: __m512i) -> SumsOfF16 {
        // SAFETY: register arithmetic.
        SumsOfF16 { run: unsafe { multiply_add_f16(sums.run, input, weights) }, ..sums }
    }
    #[inline(always)]
    unsafe fn flush(SumsOfF16 { run, total }: SumsOfF16) -> SumsOfF16 {
        // SAFETY: register arithmetic.
        unsafe {
            let [low, high] = singles(run);
            let total = [_mm512_add_ps(total[0], low), _mm512_add_ps(total[1], high)];
            SumsOfF16 { run: _mm512_setzero_si512(), total }
        }
    }
    #[inline(always)]
    unsafe fn finish(sums: SumsOfF16, _: *const f32, _: *const f32) -> F32x16 {
        // SAFETY: register arithmetic.
        F32x16(unsafe { saturated(joined(Self::flush(sums).total)) })
    }
}

/// Two f16, in f32.
pub(crate) struct SinglesOfF16;

impl Product for SinglesOfF16 {
    type Values = F32x16;
    type Words = Halves;
    type Sums = Halves;
    #[inline(always)]
    unsafe fn splat(p: *const u8) -> Halves {
        // SAFETY: trait contract.
        unsafe { [_mm512_cvtph_ps(_mm256_set1_epi32(p.cast::<i32>().read_unaligned())); 2] }
    }
    #[inline(always)]
    unsafe fn start(p: *const u32) -> Halves {
        // SAFETY: trait contract.
        unsafe { halves(p) }
    }
    #[inline(always)]
    unsafe fn load(p: *const u32) -> Halves {
        // SAFETY: trait contract.
        unsafe { singles(_mm512_loadu_si512(p.cast())) }
    }
    #[inline(always)]
    unsafe fn multiply(sums: Halves, input: Halves, weights: Halves) -> Halves {
        // SAFETY: register arithmetic.
        unsafe {
            [_mm512_fmadd_ps(input[0], weights[0], sums[0]), _mm512_fmadd_ps(input[1], weights[1], sums[1])]
        }
    }
    #[inline(always)]
    unsafe fn finish(sums: Halves, _: *const f32, _: *const f32) -> F32x16 {
        // SAFETY: register arithmetic.
        F32x16(unsafe { joined(sums) })
    }
}

/// Four u8 by i8 by VNNI's dot product.
pub(crate) struct FoursOfU8;

impl Product for FoursOfU8 {
    type Values = F32x16;
    type Words = __m512i;
    type Sums = __m512i;
    #[inline(always)]
    unsafe fn splat(p: *const u8) -> __m512i {
        // SAFETY: trait contract.
        unsafe { _mm512_set1_epi32(p.cast::<i32>().read_unaligned()) }
    }
    #[inline(always)]
    unsafe fn multiply(sums: __m512i, input: __m512i, weights: __m512i) -> __m512i {
        // SAFETY: register arithmetic.
        unsafe { _mm512_dpbusd_epi32(sums, input, weights) }
    }
    #[inline(always)]
    unsafe fn finish(sums: __m512i, scale: *const f32, bias: *const f32) -> F32x16 {
        // SAFETY: trait contract.
        F32x16(unsafe {
            _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums), _mm512_loadu_ps(scale), _mm512_loadu_ps(bias))
        })
    }
}

conv_kernel!(single, Single<F32x16>, [#[target_feature(enable = "avx512f,avx512bw,avx512vl")]],
    wide: [14 13 12 11 10 9 8 7 6 5 4 3 2 1], narrow: [14 13 12 11 10 9 8 7 6 5 4 3 2 1], tall: 28);
conv_kernel!(bf16, PairsOfBf16, [#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]],
    wide: [14 13 12 11 10 9 8 7 6 5 4 3 2 1], narrow: [14 13 12 11 10 9 8 7 6 5 4 3 2 1]);
// Flushing makes tiles of f16 large: eight pixels keep the multipliers busy, and more would be another 60 kB of code.
conv_kernel!(f16, PairsOfF16, [#[target_feature(enable = "avx512f,avx512bw,avx512vl")]],
    wide: [8 7 6 5 4 3 2 1], narrow: [8 7 6 5 4 3 2 1]);
conv_kernel!(f16_plain, SinglesOfF16, [#[target_feature(enable = "avx512f,avx512bw,avx512vl")]],
    wide: [6 5 4 3 2 1], narrow: [6 5 4 3 2 1]);
conv_kernel!(u8, FoursOfU8, [#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]],
    wide: [14 13 12 11 10 9 8 7 6 5 4 3 2 1], narrow: [14 13 12 11 10 9 8 7 6 5 4 3 2 1]);
// Where the CPU has no such dot products.
use super::avx2::{bf16_plain, u8_plain};

isa_kernels!(F32x16, [#[target_feature(enable = "avx512f,avx512bw,avx512vl")]],
    wide: [14 13 12 11 10 9 8 7 6 5 4 3 2 1], narrow: [14 13 12 11 10 9 8 7 6 5 4 3 2 1]);
