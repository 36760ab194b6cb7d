//! AVX2 + FMA kernels: eight lanes, sixteen registers.

use super::{isa_kernels, Vector};
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

// SAFETY of every block below: the trait's contract (the caller is compiled for AVX2 and FMA, the
// pointers are good for the lanes named).
impl Vector for F32x8 {
    const LANES: usize = 8;
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

isa_kernels!(F32x8, #[target_feature(enable = "avx2,fma")],
    wide: [6 5 4 3 2 1], narrow: [12 11 10 9 8 7 6 5 4 3 2 1]);
