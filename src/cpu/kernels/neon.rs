//! NEON kernels: four lanes, thirty-two registers.

use super::{isa_kernels, Vector};
use std::arch::aarch64::*;

/// Four floats in a Q register.
#[derive(Clone, Copy)]
pub(crate) struct F32x4(float32x4_t);

// SAFETY of every block below: the trait's contract (NEON is part of AArch64, the
// pointers are good for the lanes named).
impl Vector for F32x4 {
    const LANES: usize = 4;
    #[inline(always)]
    unsafe fn splat(v: f32) -> Self {
        // SAFETY: trait contract.
        Self(unsafe { vdupq_n_f32(v) })
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: trait contract.
        Self(unsafe { vld1q_f32(p) })
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: trait contract.
        unsafe { vst1q_f32(p, self.0) }
    }
    #[inline(always)]
    unsafe fn load_first(p: *const f32, n: usize) -> Self {
        let mut v = [0.0f32; 4];
        // SAFETY: trait contract; n < 4.
        unsafe {
            std::ptr::copy_nonoverlapping(p, v.as_mut_ptr(), n);
            Self::load(v.as_ptr())
        }
    }
    #[inline(always)]
    unsafe fn store_first(self, p: *mut f32, n: usize) {
        let mut v = [0.0f32; 4];
        // SAFETY: trait contract; n < 4.
        unsafe {
            self.store(v.as_mut_ptr());
            std::ptr::copy_nonoverlapping(v.as_ptr(), p, n);
        }
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        // SAFETY: trait contract.
        Self(unsafe { vaddq_f32(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        // SAFETY: trait contract.
        Self(unsafe { vmulq_f32(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn mul_add(self, a: Self, b: Self) -> Self {
        // SAFETY: trait contract.
        Self(unsafe { vfmaq_f32(self.0, a.0, b.0) })
    }
    #[cfg(feature = "train")]
    #[inline(always)]
    unsafe fn where_positive(self, a: Self, b: Self) -> Self {
        // SAFETY: trait contract.
        Self(unsafe { vbslq_f32(vcgtzq_f32(self.0), a.0, b.0) })
    }
    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        // SAFETY: trait contract.
        Self(unsafe { vbslq_f32(vcgtq_f32(self.0, b.0), self.0, b.0) })
    }
}

isa_kernels!(F32x4, #[target_feature(enable = "neon")],
    wide: [12 11 10 9 8 7 6 5 4 3 2 1], narrow: [12 11 10 9 8 7 6 5 4 3 2 1]);
