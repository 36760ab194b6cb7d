//! AVX-512 kernels: sixteen lanes, thirty-two registers.

use super::{isa_kernels, Vector};
use std::arch::x86_64::*;

/// Sixteen floats in a ZMM register.
#[derive(Clone, Copy)]
pub(crate) struct F32x16(__m512);

/// The first `n < 16` lanes.
#[inline(always)]
fn mask(n: usize) -> __mmask16 {
    (1u16 << n) - 1
}

// SAFETY of every block below: the trait's contract (the caller is compiled for AVX-512 F, BW and VL, for
// `store_bf16` for BF16 too, which its callers check; the
// pointers are good for the lanes named).
impl Vector for F32x16 {
    const LANES: usize = 16;
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
    #[cfg(feature = "train")]
    #[inline(always)]
    unsafe fn where_positive(self, a: Self, b: Self) -> Self {
        // SAFETY: trait contract.
        Self(unsafe {
            let positive = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(self.0, _mm512_setzero_ps());
            _mm512_mask_blend_ps(positive, b.0, a.0)
        })
    }
    #[cfg(feature = "train")]
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
    #[cfg(feature = "train")]
    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut u16, n: usize) {
        // SAFETY: trait contract; masked lanes are not touched.
        unsafe {
            // Only machines with AMX store bf16 here, and those have this instruction; it rounds to nearest even.
            let half: __m256i = std::mem::transmute(_mm512_cvtneps_pbh(self.0));
            if n >= 16 {
                _mm256_storeu_si256(p.cast(), half);
            } else {
                _mm256_mask_storeu_epi16(p.cast(), mask(n), half);
            }
        }
    }
    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        // SAFETY: trait contract.
        Self(unsafe { _mm512_max_ps(self.0, b.0) })
    }
}

isa_kernels!(F32x16, #[target_feature(enable = "avx512f,avx512bw,avx512vl")],
    wide: [14 13 12 11 10 9 8 7 6 5 4 3 2 1], narrow: [14 13 12 11 10 9 8 7 6 5 4 3 2 1]);
