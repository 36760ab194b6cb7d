//! AVX2 + FMA + F16C kernels: eight lanes, sixteen registers.

use super::conv::{Product, Single};
use super::{conv_kernel, isa_kernels, Vector, F16_MOST};
use std::arch::x86_64::*;

/// Eight floats in a YMM register.
#[derive(Clone, Copy)]
pub(crate) struct F32x8(__m256);

/// Lane masks: `MASK[8 - n ..]` has its first `n` lanes set.
static MASK: [i32; 16] = [-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0];

#[inline(always)]
unsafe fn mask(n: usize) -> __m256i {
    // SAFETY: n < 8, so eight values remain from 8 - n on.
    unsafe { _mm256_loadu_si256(MASK.as_ptr().add(8 - n).cast()) }
}

// SAFETY of every block below: the trait's contract (the caller is compiled for AVX2, FMA and F16C, the
// pointers are good for the lanes named).
impl Vector for F32x8 {
    const LANES: usize = 8;
    const REGISTERS: usize = 16;
    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        // SAFETY: a prefetch may point anywhere.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
    #[inline(always)]
    unsafe fn splat(v: f32) -> Self {
        // SAFETY: trait contract.
        Self(unsafe { _mm256_set1_ps(v) })
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: trait contract.
        Self(unsafe { _mm256_loadu_ps(p) })
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: trait contract.
        unsafe { _mm256_storeu_ps(p, self.0) }
    }
    #[inline(always)]
    unsafe fn load_first(p: *const f32, n: usize) -> Self {
        // SAFETY: trait contract; masked lanes are not touched.
        Self(unsafe { _mm256_maskload_ps(p, mask(n)) })
    }
    #[inline(always)]
    unsafe fn store_first(self, p: *mut f32, n: usize) {
        // SAFETY: trait contract; masked lanes are not touched.
        unsafe { _mm256_maskstore_ps(p, mask(n), self.0) }
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        // SAFETY: trait contract.
        Self(unsafe { _mm256_add_ps(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        // SAFETY: trait contract.
        Self(unsafe { _mm256_mul_ps(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn mul_add(self, a: Self, b: Self) -> Self {
        // SAFETY: trait contract.
        Self(unsafe { _mm256_fmadd_ps(a.0, b.0, self.0) })
    }
    #[inline(always)]
    unsafe fn div(self, b: Self) -> Self {
        // SAFETY: trait contract.
        Self(unsafe { _mm256_div_ps(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn power_of_two(self) -> Self {
        // SAFETY: trait contract. The exponent's bits.
        Self(unsafe {
            let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(self.0), _mm256_set1_epi32(127));
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent))
        })
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16, n: usize) -> Self {
        let mut some = [0u16; 8];
        // SAFETY: trait contract.
        Self(unsafe {
            let p = if n >= 8 {
                p
            } else {
                std::ptr::copy_nonoverlapping(p, some.as_mut_ptr(), n);
                some.as_ptr()
            };
            let half = _mm_loadu_si128(p.cast());
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(half)))
        })
    }
    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut u16, n: usize) {
        let mut some = [0u16; 8];
        // SAFETY: trait contract.
        unsafe {
            let bits = _mm256_castps_si256(self.0);
            let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
            let half = _mm256_srli_epi32::<16>(rounded);
            let half = _mm_packus_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256::<1>(half));
            if n >= 8 {
                _mm_storeu_si128(p.cast(), half);
            } else {
                _mm_storeu_si128(some.as_mut_ptr().cast(), half);
                std::ptr::copy_nonoverlapping(some.as_ptr(), p, n);
            }
        }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16, n: usize) -> Self {
        let mut some = [0u16; 8];
        // SAFETY: trait contract.
        Self(unsafe {
            let p = if n >= 8 {
                p
            } else {
                std::ptr::copy_nonoverlapping(p, some.as_mut_ptr(), n);
                some.as_ptr()
            };
            _mm256_cvtph_ps(_mm_loadu_si128(p.cast()))
        })
    }
    #[inline(always)]
    unsafe fn store_f16(self, p: *mut u16, n: usize) {
        let mut some = [0u16; 8];
        // SAFETY: trait contract.
        unsafe {
            // What is no number stays that: the second operand is what comes of it.
            let inside = _mm256_max_ps(_mm256_set1_ps(-F16_MOST), self.0);
            let inside = _mm256_min_ps(_mm256_set1_ps(F16_MOST), inside);
            let half = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(inside);
            if n >= 8 {
                _mm_storeu_si128(p.cast(), half);
            } else {
                _mm_storeu_si128(some.as_mut_ptr().cast(), half);
                std::ptr::copy_nonoverlapping(some.as_ptr(), p, n);
            }
        }
    }
    #[inline(always)]
    unsafe fn load_pixels(p: *const f32, at: *const u32) -> Self {
        // SAFETY: trait contract.
        Self(unsafe {
            _mm256_set_m128(_mm_loadu_ps(p.add(*at.add(1) as usize)), _mm_loadu_ps(p.add(*at as usize)))
        })
    }
    #[inline(always)]
    unsafe fn spread(p: *const f32) -> Self {
        // SAFETY: trait contract.
        Self(unsafe { _mm256_set_m128(_mm_set1_ps(*p.add(1)), _mm_set1_ps(*p)) })
    }
    #[inline(always)]
    unsafe fn pack_pixels(self) -> Self {
        // SAFETY: trait contract.
        Self(unsafe { _mm256_permutevar8x32_ps(self.0, _mm256_setr_epi32(0, 1, 2, 4, 5, 6, 7, 7)) })
    }
    #[inline(always)]
    unsafe fn swap_ends(self) -> Self {
        // SAFETY: trait contract.
        Self(unsafe { _mm256_permute_ps::<0b11_00_01_10>(self.0) })
    }
    #[inline(always)]
    unsafe fn load_u8(p: *const u8, n: usize) -> Self {
        let mut some = [0u8; 8];
        // SAFETY: trait contract.
        Self(unsafe {
            let p = if n >= 8 {
                p
            } else {
                std::ptr::copy_nonoverlapping(p, some.as_mut_ptr(), n);
                some.as_ptr()
            };
            _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast())))
        })
    }
    #[inline(always)]
    unsafe fn store_u8(self, p: *mut u8, n: usize) {
        let mut some = [0u8; 16];
        // SAFETY: trait contract.
        unsafe {
            // Of what is below 0, or no number, packing makes 0.
            let words = _mm256_cvtps_epi32(_mm256_min_ps(_mm256_set1_ps(255.0), self.0));
            let half = _mm_packs_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
            let bytes = _mm_packus_epi16(half, half);
            if n >= 8 {
                _mm_storel_epi64(p.cast(), bytes);
            } else {
                _mm_storeu_si128(some.as_mut_ptr().cast(), bytes);
                std::ptr::copy_nonoverlapping(some.as_ptr(), p, n);
            }
        }
    }
    #[cfg(feature = "train")]
    #[inline(always)]
    unsafe fn where_positive(self, a: Self, b: Self) -> Self {
        // SAFETY: trait contract.
        Self(unsafe { _mm256_blendv_ps(b.0, a.0, _mm256_cmp_ps::<_CMP_GT_OQ>(self.0, _mm256_setzero_ps())) })
    }
    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        // SAFETY: trait contract.
        Self(unsafe { _mm256_max_ps(self.0, b.0) })
    }
}

/// Two bf16, in f32.
pub(crate) struct PairsApart;

// SAFETY of every block below: the trait's contract (the caller is compiled for AVX2, FMA and F16C, the
// pointers are good for a register or a word).
impl Product for PairsApart {
    type Values = F32x8;
    type Words = __m256i;
    type Sums = __m256;
    #[inline(always)]
    unsafe fn splat(p: *const u8) -> __m256i {
        // SAFETY: trait contract.
        unsafe { _mm256_set1_epi32(p.cast::<i32>().read_unaligned()) }
    }
    #[inline(always)]
    unsafe fn multiply(sums: __m256, input: __m256i, weights: __m256i) -> __m256 {
        // SAFETY: register arithmetic.
        unsafe {
            let high_half = _mm256_set1_epi32(0xffff_0000_u32 as i32);
            let [input_low, low] = [input, weights].map(|v| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(v)));
            let [input_high, high] =
                [input, weights].map(|v| _mm256_castsi256_ps(_mm256_and_si256(v, high_half)));
            _mm256_fmadd_ps(input_high, high, _mm256_fmadd_ps(input_low, low, sums))
        }
    }
    #[inline(always)]
    unsafe fn finish(sums: __m256, _: *const f32, _: *const f32) -> F32x8 {
        F32x8(sums)
    }
}

/// Two f16, in f32; sums of the first halves of words and of the second ones: lane after lane both, four lanes a register.
pub(crate) struct SinglesOfF16;

impl Product for SinglesOfF16 {
    type Values = F32x8;
    type Words = [__m256; 2];
    type Sums = [__m256; 2];
    #[inline(always)]
    unsafe fn splat(p: *const u8) -> [__m256; 2] {
        // SAFETY: trait contract.
        unsafe { [_mm256_cvtph_ps(_mm_set1_epi32(p.cast::<i32>().read_unaligned())); 2] }
    }
    #[inline(always)]
    unsafe fn start(p: *const u32) -> [__m256; 2] {
        // SAFETY: trait contract.
        unsafe {
            let bias = [p, p.add(4)].map(|p| _mm256_cvtepu32_epi64(_mm_loadu_si128(p.cast())));
            bias.map(|v| _mm256_castsi256_ps(v))
        }
    }
    #[inline(always)]
    unsafe fn load(p: *const u32) -> [__m256; 2] {
        // SAFETY: trait contract.
        unsafe { [p, p.add(4)].map(|p| _mm256_cvtph_ps(_mm_loadu_si128(p.cast()))) }
    }
    #[inline(always)]
    unsafe fn multiply(sums: [__m256; 2], input: [__m256; 2], weights: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: register arithmetic.
        unsafe {
            [_mm256_fmadd_ps(input[0], weights[0], sums[0]), _mm256_fmadd_ps(input[1], weights[1], sums[1])]
        }
    }
    #[inline(always)]
    unsafe fn finish([low, high]: [__m256; 2], _: *const f32, _: *const f32) -> F32x8 {
        // SAFETY: register arithmetic.
        F32x8(unsafe {
            // Lanes 0, 1, 4, 5, 2, 3, 6, 7.
            let pairs = _mm256_castps_pd(_mm256_hadd_ps(low, high));
            _mm256_castpd_ps(_mm256_permute4x64_pd::<0b11_01_10_00>(pairs))
        })
    }
}

/// Four u8 by i8: with AVX-VNNI's dot product where `VNNI`, else by sums of two products in 16 bits. Those would saturate; weights
/// are packed so that none can.
pub(crate) struct FoursOfU8<const VNNI: bool>;

impl<const VNNI: bool> Product for FoursOfU8<VNNI> {
    type Values = F32x8;
    type Words = __m256i;
    type Sums = __m256i;
    const PAIRS: bool = !VNNI;
    #[inline(always)]
    unsafe fn splat(p: *const u8) -> __m256i {
        // SAFETY: trait contract.
        unsafe { _mm256_set1_epi32(p.cast::<i32>().read_unaligned()) }
    }
    #[inline(always)]
    unsafe fn multiply(sums: __m256i, input: __m256i, weights: __m256i) -> __m256i {
        // SAFETY: register arithmetic.
        unsafe {
            if VNNI {
                return _mm256_dpbusd_avx_epi32(sums, input, weights);
            }
            let pairs = _mm256_maddubs_epi16(input, weights);
            _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        }
    }
    #[inline(always)]
    unsafe fn finish(sums: __m256i, scale: *const f32, bias: *const f32) -> F32x8 {
        // SAFETY: trait contract.
        F32x8(unsafe {
            _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums), _mm256_loadu_ps(scale), _mm256_loadu_ps(bias))
        })
    }
}

conv_kernel!(single, Single<F32x8>, [#[target_feature(enable = "avx2,fma,f16c")]],
    wide: [6 5 4 3 2 1], narrow: [12 11 10 9 8 7 6 5 4 3 2 1]);
conv_kernel!(bf16_plain, PairsApart, [#[target_feature(enable = "avx2,fma,f16c")]],
    wide: [4 3 2 1], narrow: [8 7 6 5 4 3 2 1]);
conv_kernel!(f16_plain, SinglesOfF16, [#[target_feature(enable = "avx2,fma,f16c")]],
    wide: [2 1], narrow: [6 5 4 3 2 1]);
conv_kernel!(u8, FoursOfU8<true>, [#[target_feature(enable = "avx2,fma,f16c,avxvnni")]],
    wide: [6 5 4 3 2 1], narrow: [12 11 10 9 8 7 6 5 4 3 2 1]);
conv_kernel!(u8_plain, FoursOfU8<false>, [#[target_feature(enable = "avx2,fma,f16c")]],
    wide: [5 4 3 2 1], narrow: [8 7 6 5 4 3 2 1]);

isa_kernels!(F32x8, [#[target_feature(enable = "avx2,fma,f16c")]],
    wide: [6 5 4 3 2 1], narrow: [12 11 10 9 8 7 6 5 4 3 2 1]);
