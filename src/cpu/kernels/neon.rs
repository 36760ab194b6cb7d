//! NEON kernels: four lanes, thirty-two registers.

use super::conv::{Product, Single, F16_RUN};
use super::{conv_kernel, isa_kernels, Vector, F16_MOST};
use std::arch::aarch64::*;
use std::arch::asm;

/// Four floats in a Q register.
#[derive(Clone, Copy)]
pub(crate) struct F32x4(float32x4_t);

// SAFETY of every block below: the trait's contract (NEON is part of AArch64, the
// pointers are good for the lanes named).
impl Vector for F32x4 {
    const LANES: usize = 4;
    const REGISTERS: usize = 32;
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
    unsafe fn div(self, b: Self) -> Self {
        // SAFETY: trait contract.
        Self(unsafe { vdivq_f32(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn power_of_two(self) -> Self {
        // SAFETY: trait contract. The exponent's bits.
        Self(unsafe {
            let exponent = vaddq_s32(vcvtnq_s32_f32(self.0), vdupq_n_s32(127));
            vreinterpretq_f32_s32(vshlq_n_s32::<23>(exponent))
        })
    }
    #[inline(always)]
    unsafe fn mul_add(self, a: Self, b: Self) -> Self {
        // SAFETY: trait contract.
        Self(unsafe { vfmaq_f32(self.0, a.0, b.0) })
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16, n: usize) -> Self {
        let mut some = [0u16; 4];
        // SAFETY: trait contract.
        unsafe {
            if n >= 4 {
                return Self(singles(vld1_u16(p)));
            }
            std::ptr::copy_nonoverlapping(p, some.as_mut_ptr(), n);
            Self(singles(vld1_u16(some.as_ptr())))
        }
    }
    #[inline(always)]
    unsafe fn store_f16(self, p: *mut u16, n: usize) {
        let mut some = [0u16; 4];
        let half: uint16x4_t;
        // SAFETY: trait contract; register arithmetic, with an instruction of the base architecture.
        unsafe {
            asm!("fcvtn {half:v}.4h, {v:v}.4s", half = lateout(vreg) half, v = in(vreg) within_f16(self.0),
                options(pure, nomem, nostack));
            if n >= 4 {
                return vst1_u16(p, half);
            }
            vst1_u16(some.as_mut_ptr(), half);
            std::ptr::copy_nonoverlapping(some.as_ptr(), p, n);
        }
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

/// Four f16 in f32; in assembly, as all of f16, since the intrinsics are not stable.
#[inline(always)]
unsafe fn singles(half: uint16x4_t) -> float32x4_t {
    let v: float32x4_t;
    // SAFETY: register arithmetic, with an instruction of the base architecture.
    unsafe {
        asm!("fcvtl {v:v}.4s, {half:v}.4h", v = lateout(vreg) v, half = in(vreg) half,
            options(pure, nomem, nostack));
    }
    v
}

/// `v` within the range of f16; what is no number stays that.
#[inline(always)]
unsafe fn within_f16(v: float32x4_t) -> float32x4_t {
    // SAFETY: register arithmetic.
    unsafe { vminq_f32(vmaxq_f32(v, vdupq_n_f32(-F16_MOST)), vdupq_n_f32(F16_MOST)) }
}

/// Sums of f16 within its range; its lower end for what is no number, as opposite infinities of two runs make it.
#[inline(always)]
unsafe fn saturated(sums: float32x4_t) -> float32x4_t {
    // SAFETY: register arithmetic.
    unsafe { vminq_f32(vmaxnmq_f32(sums, vdupq_n_f32(-F16_MOST)), vdupq_n_f32(F16_MOST)) }
}

/// Two bf16, in f32.
pub(crate) struct PairsApart;

// SAFETY of every block below: the trait's contract (NEON is part of AArch64, the
// pointers are good for a register or a word).
impl Product for PairsApart {
    type Values = F32x4;
    type Words = uint32x4_t;
    type Sums = float32x4_t;
    #[inline(always)]
    unsafe fn splat(p: *const u8) -> uint32x4_t {
        // SAFETY: trait contract.
        unsafe { vdupq_n_u32(p.cast::<u32>().read_unaligned()) }
    }
    #[inline(always)]
    unsafe fn multiply(sums: float32x4_t, input: uint32x4_t, weights: uint32x4_t) -> float32x4_t {
        // SAFETY: register arithmetic.
        unsafe {
            let high_half = vdupq_n_u32(0xffff_0000);
            let [input_low, low] = [input, weights].map(|v| vreinterpretq_f32_u32(vshlq_n_u32::<16>(v)));
            let [input_high, high] = [input, weights].map(|v| vreinterpretq_f32_u32(vandq_u32(v, high_half)));
            vfmaq_f32(vfmaq_f32(sums, input_low, low), input_high, high)
        }
    }
    #[inline(always)]
    unsafe fn finish(sums: float32x4_t, _: *const f32, _: *const f32) -> F32x4 {
        F32x4(sums)
    }
}

/// Two f16 by FEAT_FP16's multiply-add, at twice the rate of f32. (FEAT_FHM's, which adds to f32, has that of f32.)
pub(crate) struct PairsOfF16;

/// Sums of f16, of the first and the second halves of words lane after lane, and those in f32 that they are flushed to.
#[derive(Clone, Copy)]
pub(crate) struct SumsOfF16 {
    run: uint32x4_t,
    total: float32x4_t,
}

impl Product for PairsOfF16 {
    type Values = F32x4;
    type Words = uint32x4_t;
    type Sums = SumsOfF16;
    const RUN: usize = F16_RUN;
    #[inline(always)]
    unsafe fn splat(p: *const u8) -> uint32x4_t {
        // SAFETY: trait contract.
        unsafe { vdupq_n_u32(p.cast::<u32>().read_unaligned()) }
    }
    #[inline(always)]
    unsafe fn start(p: *const u32) -> SumsOfF16 {
        // SAFETY: trait contract.
        unsafe { SumsOfF16 { run: vdupq_n_u32(0), total: vld1q_f32(p.cast()) } }
    }
    #[inline(always)]
    unsafe fn multiply(sums: SumsOfF16, input: uint32x4_t, weights: uint32x4_t) -> SumsOfF16 {
        let mut run = sums.run;
        // SAFETY: register arithmetic, with an instruction that the caller is compiled for.
        unsafe {
            asm!("fmla {run:v}.8h, {weights:v}.8h, {input:v}.8h", run = inout(vreg) run,
                weights = in(vreg) weights, input = in(vreg) input,
                options(pure, nomem, nostack));
        }
        SumsOfF16 { run, ..sums }
    }
    #[inline(always)]
    unsafe fn flush(SumsOfF16 { run, total }: SumsOfF16) -> SumsOfF16 {
        // SAFETY: register arithmetic.
        unsafe {
            let run = vreinterpretq_u16_u32(run);
            let pairs = vpaddq_f32(singles(vget_low_u16(run)), singles(vget_high_u16(run)));
            SumsOfF16 { run: vdupq_n_u32(0), total: vaddq_f32(total, pairs) }
        }
    }
    #[inline(always)]
    unsafe fn finish(sums: SumsOfF16, _: *const f32, _: *const f32) -> F32x4 {
        // SAFETY: register arithmetic.
        F32x4(unsafe { saturated(Self::flush(sums).total) })
    }
}

/// Two f16, in f32; sums of the first halves of words and of the second ones: lane after lane both, two lanes a register.
pub(crate) struct SinglesOfF16;

impl Product for SinglesOfF16 {
    type Values = F32x4;
    type Words = [float32x4_t; 2];
    type Sums = [float32x4_t; 2];
    #[inline(always)]
    unsafe fn splat(p: *const u8) -> [float32x4_t; 2] {
        // SAFETY: trait contract.
        unsafe { [singles(vreinterpret_u16_u32(vdup_n_u32(p.cast::<u32>().read_unaligned()))); 2] }
    }
    #[inline(always)]
    unsafe fn start(p: *const u32) -> [float32x4_t; 2] {
        // SAFETY: trait contract.
        unsafe {
            let bias = [p, p.add(2)].map(|p| vmovl_u32(vld1_u32(p)));
            bias.map(|v| vreinterpretq_f32_u64(v))
        }
    }
    #[inline(always)]
    unsafe fn load(p: *const u32) -> [float32x4_t; 2] {
        // SAFETY: trait contract.
        unsafe { [p, p.add(2)].map(|p| singles(vld1_u16(p.cast()))) }
    }
    #[inline(always)]
    unsafe fn multiply(
        sums: [float32x4_t; 2],
        input: [float32x4_t; 2],
        weights: [float32x4_t; 2],
    ) -> [float32x4_t; 2] {
        // SAFETY: register arithmetic.
        unsafe { [vfmaq_f32(sums[0], input[0], weights[0]), vfmaq_f32(sums[1], input[1], weights[1])] }
    }
    #[inline(always)]
    unsafe fn finish([low, high]: [float32x4_t; 2], _: *const f32, _: *const f32) -> F32x4 {
        // SAFETY: register arithmetic.
        F32x4(unsafe { vpaddq_f32(low, high) })
    }
}

/// Four u8 by i8, by products of 16 bits.
pub(crate) struct FoursOfU8;

impl Product for FoursOfU8 {
    type Values = F32x4;
    type Words = uint32x4_t;
    type Sums = int32x4_t;
    #[inline(always)]
    unsafe fn splat(p: *const u8) -> uint32x4_t {
        // SAFETY: trait contract.
        unsafe { vdupq_n_u32(p.cast::<u32>().read_unaligned()) }
    }
    #[inline(always)]
    unsafe fn multiply(sums: int32x4_t, input: uint32x4_t, weights: uint32x4_t) -> int32x4_t {
        // SAFETY: register arithmetic.
        unsafe {
            let (input, weights) = (vreinterpretq_u8_u32(input), vreinterpretq_s8_u32(weights));
            let low = |v| vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(v)));
            // All lanes of the input are the same word, so its lower half stands for the upper one too.
            let input = low(input);
            let [low, high] = [vmovl_s8(vget_low_s8(weights)), vmovl_s8(vget_high_s8(weights))];
            let products = |w: int16x8_t| {
                let first = vmull_s16(vget_low_s16(input), vget_low_s16(w));
                let second = vmull_s16(vget_high_s16(input), vget_high_s16(w));
                vpaddq_s32(first, second)
            };
            vaddq_s32(sums, vpaddq_s32(products(low), products(high)))
        }
    }
    #[inline(always)]
    unsafe fn finish(sums: int32x4_t, scale: *const f32, bias: *const f32) -> F32x4 {
        // SAFETY: trait contract.
        F32x4(unsafe { vfmaq_f32(vld1q_f32(bias), vcvtq_f32_s32(sums), vld1q_f32(scale)) })
    }
}

/// Four u8 by i8 with the dot product of signed bytes, 128 taken off the input's; in assembly, since the intrinsic is not stable.
pub(crate) struct DotsOfU8;

impl Product for DotsOfU8 {
    type Values = F32x4;
    type Words = uint32x4_t;
    type Sums = int32x4_t;
    const OFFSET: i32 = 128;
    #[inline(always)]
    unsafe fn splat(p: *const u8) -> uint32x4_t {
        // SAFETY: trait contract.
        unsafe { vdupq_n_u32(p.cast::<u32>().read_unaligned() ^ 0x8080_8080) }
    }
    #[inline(always)]
    unsafe fn multiply(sums: int32x4_t, input: uint32x4_t, weights: uint32x4_t) -> int32x4_t {
        let mut sums = sums;
        // SAFETY: register arithmetic, with an instruction that the caller is compiled for.
        unsafe {
            asm!("sdot {sums:v}.4s, {weights:v}.16b, {input:v}.16b", sums = inout(vreg) sums,
                weights = in(vreg) weights, input = in(vreg) input,
                options(pure, nomem, nostack, preserves_flags));
        }
        sums
    }
    #[inline(always)]
    unsafe fn finish(sums: int32x4_t, scale: *const f32, bias: *const f32) -> F32x4 {
        // SAFETY: trait contract.
        F32x4(unsafe { vfmaq_f32(vld1q_f32(bias), vcvtq_f32_s32(sums), vld1q_f32(scale)) })
    }
}

conv_kernel!(single, Single<F32x4>, [#[target_feature(enable = "neon")]],
    wide: [12 11 10 9 8 7 6 5 4 3 2 1], narrow: [12 11 10 9 8 7 6 5 4 3 2 1]);
conv_kernel!(bf16_plain, PairsApart, [#[target_feature(enable = "neon")]],
    wide: [8 7 6 5 4 3 2 1], narrow: [8 7 6 5 4 3 2 1]);
conv_kernel!(f16, PairsOfF16, [#[target_feature(enable = "neon,fp16")]],
    wide: [12 11 10 9 8 7 6 5 4 3 2 1], narrow: [12 11 10 9 8 7 6 5 4 3 2 1]);
conv_kernel!(f16_plain, SinglesOfF16, [#[target_feature(enable = "neon")]],
    wide: [6 5 4 3 2 1], narrow: [12 11 10 9 8 7 6 5 4 3 2 1]);
conv_kernel!(u8, DotsOfU8, [#[target_feature(enable = "neon,dotprod")]],
    wide: [12 11 10 9 8 7 6 5 4 3 2 1], narrow: [12 11 10 9 8 7 6 5 4 3 2 1]);
conv_kernel!(u8_plain, FoursOfU8, [#[target_feature(enable = "neon")]],
    wide: [8 7 6 5 4 3 2 1], narrow: [8 7 6 5 4 3 2 1]);

isa_kernels!(F32x4, [#[target_feature(enable = "neon")]],
    wide: [12 11 10 9 8 7 6 5 4 3 2 1], narrow: [12 11 10 9 8 7 6 5 4 3 2 1]);
