//! Registers of lanes, as the kernels see them on every instruction set.

use super::{bf16_bits, f16_bits};
use crate::cpu::arena::Storage;
use half::f16;

/// A register of f32 lanes. Kernels call its methods from loops, not closures, which are functions of their own: where one
/// is not inlined, it is not compiled for the ISA and every method in it becomes a call.
///
/// Callers must be compiled for the ISA that the type stands for, which is
/// what makes every method unsafe.
pub(crate) trait Vector: Copy {
    /// Lanes.
    const LANES: usize;
    /// Registers that the ISA has; 0 where nobody knows.
    const REGISTERS: usize;
    /// Asks for the cache line at `p`, wherever that points, ahead of its use.
    #[inline(always)]
    unsafe fn prefetch(_p: *const u8) {}
    unsafe fn splat(v: f32) -> Self;
    unsafe fn load(p: *const f32) -> Self;
    unsafe fn store(self, p: *mut f32);
    /// Loads the first `n < LANES` lanes, zeros in the rest.
    unsafe fn load_first(p: *const f32, n: usize) -> Self;
    /// Stores the first `n < LANES` lanes.
    unsafe fn store_first(self, p: *mut f32, n: usize);
    unsafe fn add(self, b: Self) -> Self;
    unsafe fn mul(self, b: Self) -> Self;
    /// `self + a * b`; fused where the ISA has it.
    unsafe fn mul_add(self, a: Self, b: Self) -> Self;
    /// Lane-wise maximum; `b` where either is NaN. Values that are not finite are outside the kernels'
    /// contract: weights and pixels are finite, and no result depends on which of two NaNs wins.
    unsafe fn max(self, b: Self) -> Self;
    /// Lane-wise quotient.
    unsafe fn div(self, b: Self) -> Self;
    /// Lane-wise 2 to the power of whole numbers from -126 to 127.
    unsafe fn power_of_two(self) -> Self;
    /// Lane-wise e^x, within two units in the last place; of x beyond ±87 as of that.
    #[inline(always)]
    unsafe fn exp(self) -> Self {
        // Added and taken off again, it leaves the nearest whole number.
        const WHOLE: f32 = 12_582_912.0;
        // e^x = 2^n e^r, n whole and |r| <= ln(2) / 2; ln(2) in two parts, the first of few bits, so that n times it is exact.
        const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
        // (e^r - 1 - r) / r^2, by Cephes' expf (Moshier).
        const SERIES: [f32; 6] =
            [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 5e-1];
        // SAFETY: register arithmetic only; the caller is compiled for this ISA.
        unsafe {
            let one = Self::splat(1.0);
            // Bounds first: the second operand is what comes of a NaN.
            let negative = Self::splat(-87.0).max(self).mul(Self::splat(-1.0));
            let x = Self::splat(-87.0).max(negative).mul(Self::splat(-1.0));
            let n = x.mul(Self::splat(std::f32::consts::LOG2_E));
            let n = n.add(Self::splat(WHOLE)).add(Self::splat(-WHOLE));
            let r = x.mul_add(n, Self::splat(-LN_2[0])).mul_add(n, Self::splat(-LN_2[1]));
            let mut series = Self::splat(SERIES[0]);
            for term in &SERIES[1..] {
                series = Self::splat(*term).mul_add(series, r);
            }
            one.add(r).mul_add(series, r.mul(r)).mul(n.power_of_two())
        }
    }
    /// Lane-wise `a` where this is above 0, else `b`.
    #[cfg(feature = "train")]
    unsafe fn where_positive(self, a: Self, b: Self) -> Self;

    /// Loads `n <= LANES` bf16 values (their bits), zeros in the other lanes.
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16, n: usize) -> Self {
        let mut lanes = [0.0f32; 16];
        for (i, lane) in lanes.iter_mut().enumerate().take(n) {
            // SAFETY: the caller vouches for `n` values at `p`.
            *lane = f32::from_bits(u32::from(unsafe { *p.add(i) }) << 16);
        }
        // SAFETY: no ISA has more than 16 lanes.
        unsafe { Self::load(lanes.as_ptr()) }
    }

    /// Stores the first `n <= LANES` lanes as bf16, rounded to nearest even.
    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut u16, n: usize) {
        let mut lanes = [0.0f32; 16];
        // SAFETY: no ISA has more than 16 lanes; the caller vouches for room for `n` values at `p`.
        unsafe {
            self.store(lanes.as_mut_ptr());
            for (i, lane) in lanes.iter().enumerate().take(n) {
                *p.add(i) = bf16_bits(*lane);
            }
        }
    }

    /// Loads `n <= LANES` f16 values (their bits), zeros in the other lanes.
    #[inline(always)]
    unsafe fn load_f16(p: *const u16, n: usize) -> Self {
        let mut lanes = [0.0f32; 16];
        for (i, lane) in lanes.iter_mut().enumerate().take(n) {
            // SAFETY: the caller vouches for `n` values at `p`.
            *lane = f16::from_bits(unsafe { *p.add(i) }).to_f32();
        }
        // SAFETY: no ISA has more than 16 lanes.
        unsafe { Self::load(lanes.as_ptr()) }
    }

    /// Stores the first `n <= LANES` lanes as f16, rounded to nearest even, [`F16_MOST`] where they are beyond it.
    #[inline(always)]
    unsafe fn store_f16(self, p: *mut u16, n: usize) {
        let mut lanes = [0.0f32; 16];
        // SAFETY: no ISA has more than 16 lanes; the caller vouches for room for `n` values at `p`.
        unsafe {
            self.store(lanes.as_mut_ptr());
            for (i, lane) in lanes.iter().enumerate().take(n) {
                *p.add(i) = f16_bits(*lane);
            }
        }
    }

    /// Loads `n <= LANES` values from 0 to 255, zeros in the other lanes.
    #[inline(always)]
    unsafe fn load_u8(p: *const u8, n: usize) -> Self {
        let mut lanes = [0.0f32; 16];
        for (i, lane) in lanes.iter_mut().enumerate().take(n) {
            // SAFETY: the caller vouches for `n` values at `p`.
            *lane = f32::from(unsafe { *p.add(i) });
        }
        // SAFETY: no ISA has more than 16 lanes.
        unsafe { Self::load(lanes.as_ptr()) }
    }

    /// Stores the first `n <= LANES` lanes as the nearest whole numbers from 0 to 255, ties to even.
    #[inline(always)]
    unsafe fn store_u8(self, p: *mut u8, n: usize) {
        let mut lanes = [0.0f32; 16];
        // SAFETY: no ISA has more than 16 lanes; the caller vouches for room for `n` values at `p`.
        unsafe {
            self.store(lanes.as_mut_ptr());
            for (i, lane) in lanes.iter().enumerate().take(n) {
                *p.add(i) = lane.round_ties_even() as u8;
            }
        }
    }

    /// Loads `n <= LANES` values that are stored so, zeros in the other lanes.
    #[inline(always)]
    unsafe fn load_as(storage: Storage, p: *const u8, n: usize) -> Self {
        // SAFETY: the contract is the same, for such values.
        unsafe {
            match storage {
                Storage::F32 => Self::load_upto(p.cast(), n),
                Storage::Bf16 => Self::load_bf16(p.cast(), n),
                Storage::F16 => Self::load_f16(p.cast(), n),
                Storage::U8 => Self::load_u8(p, n),
            }
        }
    }

    /// Stores the first `n <= LANES` lanes so, rounded to the nearest.
    #[inline(always)]
    unsafe fn store_as(self, storage: Storage, p: *mut u8, n: usize) {
        // SAFETY: the contract is the same, for such values.
        unsafe {
            match storage {
                Storage::F32 => self.store_upto(p.cast(), n),
                Storage::Bf16 => self.store_bf16(p.cast(), n),
                Storage::F16 => self.store_f16(p.cast(), n),
                Storage::U8 => self.store_u8(p, n),
            }
        }
    }

    /// Loads `n` lanes, `n <= LANES`.
    #[inline(always)]
    unsafe fn load_upto(p: *const f32, n: usize) -> Self {
        // SAFETY: the contract is the same, for `n` lanes.
        unsafe {
            if n >= Self::LANES {
                Self::load(p)
            } else {
                Self::load_first(p, n)
            }
        }
    }

    /// Loads all lanes (`FULL`, known to the compiler) or the first `n < LANES`.
    #[cfg(feature = "train")]
    #[inline(always)]
    unsafe fn load_lanes<const FULL: bool>(p: *const f32, n: usize) -> Self {
        // SAFETY: the contract is the same.
        unsafe {
            if FULL {
                Self::load(p)
            } else {
                Self::load_first(p, n)
            }
        }
    }

    /// As [`Vector::store_bf16`], on machines that multiply bf16 alone, by their instruction where there is one.
    #[cfg(any(feature = "train", target_arch = "x86_64"))]
    #[inline(always)]
    unsafe fn store_bf16_nearest(self, p: *mut u16, n: usize) {
        // SAFETY: the contract is the same.
        unsafe { self.store_bf16(p, n) }
    }

    /// In quad i of lanes, the four values `at[i]` values from `p` on.
    #[inline(always)]
    unsafe fn load_pixels(p: *const f32, at: *const u32) -> Self {
        const { assert!(Self::LANES == 4, "wider registers have their own") }
        // SAFETY: the caller vouches for the place and the values there.
        unsafe { Self::load(p.add(*at as usize)) }
    }

    /// `p[i]` in each lane of quad i.
    #[inline(always)]
    unsafe fn spread(p: *const f32) -> Self {
        const { assert!(Self::LANES == 4, "wider registers have their own") }
        // SAFETY: the caller vouches for a value a quad.
        unsafe { Self::splat(*p) }
    }

    /// The first three lanes of every quad behind each other, whatever in the rest.
    #[inline(always)]
    unsafe fn pack_pixels(self) -> Self {
        const { assert!(Self::LANES == 4, "wider registers have their own") }
        self
    }

    /// The first and the third lane of every quad exchanged.
    #[inline(always)]
    unsafe fn swap_ends(self) -> Self {
        let mut lanes = [0.0f32; 4];
        const { assert!(Self::LANES == 4, "wider registers have their own") }
        // SAFETY: four lanes.
        unsafe {
            self.store(lanes.as_mut_ptr());
            lanes.swap(0, 2);
            Self::load(lanes.as_ptr())
        }
    }

    /// Stores `n` lanes, `n <= LANES`.
    #[inline(always)]
    unsafe fn store_upto(self, p: *mut f32, n: usize) {
        // SAFETY: the contract is the same, for `n` lanes.
        unsafe {
            if n >= Self::LANES {
                self.store(p)
            } else {
                self.store_first(p, n)
            }
        }
    }
}
