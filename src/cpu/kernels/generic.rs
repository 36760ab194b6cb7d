//! Portable kernels: four lanes of plain arithmetic, which compilers turn into SSE, NEON or scalar code.

use super::conv::{Product, Single};
use super::{conv_kernel, isa_kernels, Vector};
use half::f16;

/// Four floats.
#[derive(Clone, Copy)]
pub(crate) struct F32x4([f32; 4]);

impl Vector for F32x4 {
    const LANES: usize = 4;
    const REGISTERS: usize = 0;
    #[inline(always)]
    unsafe fn splat(v: f32) -> Self {
        Self([v; 4])
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: the caller vouches for four floats at `p`.
        Self(unsafe { p.cast::<[f32; 4]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: the caller vouches for room for four floats at `p`.
        unsafe { p.cast::<[f32; 4]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    unsafe fn load_first(p: *const f32, n: usize) -> Self {
        let mut v = [0.0; 4];
        for (i, lane) in v.iter_mut().enumerate().take(n) {
            // SAFETY: the caller vouches for `n` floats at `p`.
            *lane = unsafe { *p.add(i) };
        }
        Self(v)
    }
    #[inline(always)]
    unsafe fn store_first(self, p: *mut f32, n: usize) {
        for (i, lane) in self.0.iter().enumerate().take(n) {
            // SAFETY: the caller vouches for room for `n` floats at `p`.
            unsafe { *p.add(i) = *lane };
        }
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] + b.0[i]))
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] * b.0[i]))
    }
    #[inline(always)]
    unsafe fn div(self, b: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] / b.0[i]))
    }
    #[inline(always)]
    unsafe fn power_of_two(self) -> Self {
        // The exponent's bits.
        Self(self.0.map(|v| f32::from_bits(((v as i32).wrapping_add(127) as u32) << 23)))
    }
    #[inline(always)]
    unsafe fn mul_add(self, a: Self, b: Self) -> Self {
        // Not f32::mul_add: without an FMA instruction that is a library call a lane.
        Self(std::array::from_fn(|i| self.0[i] + a.0[i] * b.0[i]))
    }
    #[cfg(feature = "train")]
    #[inline(always)]
    unsafe fn where_positive(self, a: Self, b: Self) -> Self {
        Self(std::array::from_fn(|i| if self.0[i] > 0.0 { a.0[i] } else { b.0[i] }))
    }
    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        Self(std::array::from_fn(|i| if self.0[i] > b.0[i] { self.0[i] } else { b.0[i] }))
    }
}

/// Two bf16, in f32.
pub(crate) struct PairsApart;

impl Product for PairsApart {
    type Values = F32x4;
    type Words = [u32; 4];
    type Sums = [f32; 4];
    #[inline(always)]
    unsafe fn splat(p: *const u8) -> [u32; 4] {
        // SAFETY: the caller vouches for four bytes at `p`.
        [unsafe { p.cast::<u32>().read_unaligned() }; 4]
    }
    #[inline(always)]
    unsafe fn multiply(sums: [f32; 4], input: [u32; 4], weights: [u32; 4]) -> [f32; 4] {
        // The half at the lower address is the first, on every machine that this compiles for.
        let (first, second) = (|v: u32| f32::from_bits(v << 16), |v: u32| f32::from_bits(v & 0xffff_0000));
        std::array::from_fn(|i| {
            sums[i] + first(input[i]) * first(weights[i]) + second(input[i]) * second(weights[i])
        })
    }
    #[inline(always)]
    unsafe fn finish(sums: [f32; 4], _: *const f32, _: *const f32) -> F32x4 {
        F32x4(sums)
    }
}

/// Two f16, in f32.
pub(crate) struct SinglesOfF16;

impl Product for SinglesOfF16 {
    type Values = F32x4;
    type Words = [[f32; 4]; 2];
    type Sums = [f32; 4];
    #[inline(always)]
    unsafe fn splat(p: *const u8) -> [[f32; 4]; 2] {
        // SAFETY: the caller vouches for four bytes at `p`.
        let halves = unsafe { p.cast::<[u16; 2]>().read_unaligned() };
        halves.map(|half| [f16::from_bits(half).to_f32(); 4])
    }
    #[inline(always)]
    unsafe fn load(p: *const u32) -> [[f32; 4]; 2] {
        // SAFETY: the caller vouches for a register's words.
        let words = unsafe { p.cast::<[[u16; 2]; 4]>().read_unaligned() };
        std::array::from_fn(|k| std::array::from_fn(|i| f16::from_bits(words[i][k]).to_f32()))
    }
    #[inline(always)]
    unsafe fn multiply(sums: [f32; 4], input: [[f32; 4]; 2], weights: [[f32; 4]; 2]) -> [f32; 4] {
        std::array::from_fn(|i| sums[i] + input[0][i] * weights[0][i] + input[1][i] * weights[1][i])
    }
    #[inline(always)]
    unsafe fn finish(sums: [f32; 4], _: *const f32, _: *const f32) -> F32x4 {
        F32x4(sums)
    }
}

/// Four u8 by i8.
pub(crate) struct FoursOfU8;

impl Product for FoursOfU8 {
    type Values = F32x4;
    type Words = [u32; 4];
    type Sums = [i32; 4];
    #[inline(always)]
    unsafe fn splat(p: *const u8) -> [u32; 4] {
        // SAFETY: the caller vouches for four bytes at `p`.
        [unsafe { p.cast::<u32>().read_unaligned() }; 4]
    }
    #[inline(always)]
    unsafe fn multiply(sums: [i32; 4], input: [u32; 4], weights: [u32; 4]) -> [i32; 4] {
        std::array::from_fn(|i| {
            let (a, w) = (input[i].to_ne_bytes(), weights[i].to_ne_bytes());
            (0..4).fold(sums[i], |sum, k| sum + i32::from(a[k]) * i32::from(w[k] as i8))
        })
    }
    #[inline(always)]
    unsafe fn finish(sums: [i32; 4], scale: *const f32, bias: *const f32) -> F32x4 {
        // SAFETY: the caller vouches for four floats at each.
        let [scale, bias] = [scale, bias].map(|p| unsafe { p.cast::<[f32; 4]>().read_unaligned() });
        F32x4(std::array::from_fn(|i| sums[i] as f32 * scale[i] + bias[i]))
    }
}

conv_kernel!(single, Single<F32x4>, [], wide: [4 3 2 1], narrow: [4 3 2 1]);
conv_kernel!(bf16_plain, PairsApart, [], wide: [2 1], narrow: [2 1]);
conv_kernel!(f16_plain, SinglesOfF16, [], wide: [2 1], narrow: [2 1]);
conv_kernel!(u8_plain, FoursOfU8, [], wide: [2 1], narrow: [2 1]);

isa_kernels!(F32x4, [], wide: [4 3 2 1], narrow: [4 3 2 1]);
