//! How values of maps are stored while training.

use super::Packed;
use crate::cpu::kernels::{bf16_bits, Vector};
use crate::cpu::Isa;
use half::bf16;

/// Loads and stores in registers.
pub(crate) trait Stored: Copy {
    /// A register of `n` values at `p`, zeros in the other lanes.
    ///
    /// # Safety
    /// As [`Vector`]'s loads.
    unsafe fn load<V: Vector>(p: *const Self, n: usize) -> V;
    /// Stores `n` lanes.
    ///
    /// # Safety
    /// As [`Vector`]'s stores.
    unsafe fn store<V: Vector>(v: V, p: *mut Self, n: usize);
}

/// f32, or bf16 where the CPU multiplies it; no other type can be one.
#[allow(private_bounds)] // which is what seals it
pub trait Element: Stored + Default + Send + Sync + std::fmt::Debug + PartialEq + 'static {
    /// Name in recipes and logs.
    const NAME: &'static str;
    #[doc(hidden)]
    const BF16: bool;
    /// To f32.
    fn f32(self) -> f32;
    /// Nearest value; ties to even.
    fn of(v: f32) -> Self;
    /// `c[p][n] = sum over k of a[p][k] * b[k][n]`: `a` is `pixels` x `a_pixel` values, `c`
    /// `pixels` x `channel_stride` (whole blocks of 16). Rows past `pixels` up to the next 16 may be read
    /// and written: both buffers have them.
    fn product(isa: Isa, a: &[Self], a_pixel: usize, pixels: usize, b: &Packed<Self>, c: &mut [f32]);
    /// `sums[k][n] += sum over p of a[p][k] * d[p][n]` for operands (values, stride, width); `sums` has
    /// `channel_stride` of both widths. Rows past `pixels` up to the next 32 are zeros in both, with 16 values
    /// more behind them.
    fn outer(
        isa: Isa,
        a: (&[Self], usize, usize),
        d: (&[Self], usize, usize),
        pixels: usize,
        sums: &mut [f32],
        scratch: &mut Vec<Self>,
    );
}

impl Stored for f32 {
    #[inline(always)]
    unsafe fn load<V: Vector>(p: *const Self, n: usize) -> V {
        // SAFETY: the same contract.
        unsafe { V::load_upto(p, n) }
    }
    #[inline(always)]
    unsafe fn store<V: Vector>(v: V, p: *mut Self, n: usize) {
        // SAFETY: the same contract.
        unsafe { v.store_upto(p, n) }
    }
}

impl Element for f32 {
    const NAME: &'static str = "f32";
    const BF16: bool = false;
    #[inline(always)]
    fn f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn of(v: f32) -> Self {
        v
    }
    fn product(isa: Isa, a: &[Self], a_pixel: usize, pixels: usize, b: &Packed<Self>, c: &mut [f32]) {
        super::gemm::product_f32(isa, a, a_pixel, pixels, b, c);
    }
    fn outer(
        isa: Isa,
        a: (&[Self], usize, usize),
        d: (&[Self], usize, usize),
        pixels: usize,
        sums: &mut [f32],
        _: &mut Vec<Self>,
    ) {
        super::gemm::outer_f32(isa, a, d, pixels, sums);
    }
}

impl Stored for bf16 {
    #[inline(always)]
    unsafe fn load<V: Vector>(p: *const Self, n: usize) -> V {
        // SAFETY: the same contract; bf16 is its bits.
        unsafe { V::load_bf16(p.cast(), n) }
    }
    #[inline(always)]
    unsafe fn store<V: Vector>(v: V, p: *mut Self, n: usize) {
        // SAFETY: the same contract; bf16 is its bits.
        unsafe { v.store_bf16_nearest(p.cast(), n) }
    }
}

impl Element for bf16 {
    const NAME: &'static str = "bf16";
    const BF16: bool = true;
    #[inline(always)]
    fn f32(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    #[inline(always)]
    fn of(v: f32) -> Self {
        Self::from_bits(bf16_bits(v))
    }
    #[cfg(target_arch = "x86_64")]
    fn product(isa: Isa, a: &[Self], a_pixel: usize, pixels: usize, b: &Packed<Self>, c: &mut [f32]) {
        super::pairs::product(isa, a, a_pixel, pixels, b, c);
    }
    #[cfg(target_arch = "x86_64")]
    fn outer(
        isa: Isa,
        a: (&[Self], usize, usize),
        d: (&[Self], usize, usize),
        pixels: usize,
        sums: &mut [f32],
        scratch: &mut Vec<Self>,
    ) {
        super::pairs::outer(isa, a, d, pixels, sums, scratch);
    }
    #[cfg(not(target_arch = "x86_64"))]
    fn product(_: Isa, _: &[Self], _: usize, _: usize, _: &Packed<Self>, _: &mut [f32]) {
        unreachable!("bf16_supported() is false here")
    }
    #[cfg(not(target_arch = "x86_64"))]
    fn outer(
        _: Isa,
        _: (&[Self], usize, usize),
        _: (&[Self], usize, usize),
        _: usize,
        _: &mut [f32],
        _: &mut Vec<Self>,
    ) {
        unreachable!("bf16_supported() is false here")
    }
}
