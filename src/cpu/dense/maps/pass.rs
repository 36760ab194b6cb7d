//! How a pass runs over a map: on the registers of an ISA, a register of channels at a time.

use super::Source;
use crate::cpu::kernels::Vector;
use crate::cpu::Isa;

/// Whether `len` values hold `rows` rows of `stride`, which may be beyond any size.
pub(in super::super) fn holds(len: usize, rows: usize, stride: usize) -> bool {
    rows.checked_mul(stride).is_some_and(|n| len >= n)
}

/// One pass, over any registers.
pub(in super::super) trait Pass {
    /// Whether it stores bf16.
    const BF16: bool;
    /// # Safety
    /// The caller is compiled for `V`'s ISA; the lengths of the pass were checked.
    unsafe fn run<V: Vector>(self);
}

/// Runs a pass on the registers of `isa`.
///
/// # Safety
/// The lengths of the pass were checked.
pub(in super::super) unsafe fn dispatch<P: Pass>(isa: Isa, pass: P) {
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn avx2<P: Pass>(pass: P) {
        // SAFETY: compiled for this ISA.
        unsafe { pass.run::<crate::cpu::kernels::avx2::F32x8>() }
    }
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn avx512_bf16<P: Pass>(pass: P) {
        // SAFETY: compiled for this ISA.
        unsafe { pass.run::<crate::cpu::kernels::avx512::F32x16>() }
    }
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn avx512<P: Pass>(pass: P) {
        // SAFETY: compiled for this ISA.
        unsafe { pass.run::<crate::cpu::kernels::avx512::F32x16>() }
    }
    // SAFETY: an `Isa` value is proof that the CPU has it; the caller's contract.
    unsafe {
        match isa {
            Isa::Generic => pass.run::<crate::cpu::kernels::generic::F32x4>(),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => pass.run::<crate::cpu::kernels::neon::F32x4>(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => avx2(pass),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 | Isa::Amx if P::BF16 => {
                assert!(
                    crate::cpu::dense::bf16_supported(),
                    "maps in bf16 are for machines that multiply it"
                );
                avx512_bf16(pass)
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 | Isa::Amx => avx512(pass),
        }
    }
}

/// Runs `$body` for every register of channels: `$at` the first channel, `$n` how many (a constant where all lanes).
macro_rules! for_registers {
    ($vector:ty, $channels:expr, |$at:ident, $n:ident| $body:block) => {{
        let mut $at = 0;
        while $at + <$vector>::LANES <= $channels {
            let $n = <$vector>::LANES;
            $body
            $at += <$vector>::LANES;
        }
        if $at < $channels {
            let $n = $channels - $at;
            $body
        }
    }};
}
pub(in super::super) use for_registers;

/// Values of a map that a pass goes over register by register before it goes on to the next pixels: their lines, of two maps
/// and what is written, are still in the first-level cache when the next register's channels are read from them.
pub(super) const BLOCK: usize = 2048;

/// [`for_registers`] over blocks of pixels: `$pixels` from `$first` on.
macro_rules! for_blocks {
    ($vector:ty, $channels:expr, $all:expr, |$at:ident, $n:ident, $first:ident, $pixels:ident| $body:block) => {{
        let block = ($crate::cpu::dense::maps::pass::BLOCK / $channels.max(1)).max(8);
        let mut $first = 0;
        while $first < $all {
            let $pixels = block.min($all - $first);
            for_registers!($vector, $channels, |$at, $n| $body);
            $first += $pixels;
        }
    }};
}
pub(super) use for_blocks;

/// What readers of a register of channels apply: act(scale * z + shift), act(x) = max(slope * x, x).
pub(super) struct Act<V> {
    scale: V,
    shift: V,
    slope: V,
}

impl<V: Vector> Act<V> {
    /// Of channels `at` to `at + n`.
    ///
    /// # Safety
    /// The caller is compiled for `V`'s ISA; `source` has the channels.
    #[inline(always)]
    pub(super) unsafe fn of<T>(source: &Source<'_, T>, at: usize, n: usize) -> Self {
        // SAFETY: the caller's contract.
        unsafe {
            Self {
                scale: V::load_upto(source.scale.as_ptr().add(at), n),
                shift: V::load_upto(source.shift.as_ptr().add(at), n),
                slope: V::splat(source.slope),
            }
        }
    }

    /// What is seen of a stored `z`.
    ///
    /// # Safety
    /// The caller is compiled for `V`'s ISA.
    #[inline(always)]
    pub(super) unsafe fn seen(&self, z: V) -> V {
        // SAFETY: register arithmetic.
        unsafe {
            let x = self.shift.mul_add(self.scale, z);
            x.mul(self.slope).max(x)
        }
    }

    /// g of [`Gradient`](super::Gradient): `d`, the gradient of what is seen of `z`, pulled back through the activation.
    ///
    /// # Safety
    /// The caller is compiled for `V`'s ISA.
    #[inline(always)]
    pub(super) unsafe fn back(&self, z: V, d: V) -> V {
        // SAFETY: register arithmetic.
        unsafe { self.shift.mul_add(self.scale, z).where_positive(d, d.mul(self.slope)) }
    }
}

/// `to += v`, the first `n` lanes.
///
/// # Safety
/// The caller is compiled for `V`'s ISA; `to` holds `n` values.
#[inline(always)]
pub(super) unsafe fn add_to<V: Vector>(v: V, to: *mut f32, n: usize) {
    // SAFETY: the caller's contract.
    unsafe { V::load_upto(to, n).add(v).store_upto(to, n) }
}
