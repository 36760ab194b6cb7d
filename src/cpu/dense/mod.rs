//! Kernels over whole batches of dense channels-last maps, forward and backward: what training runs.
//!
//! Maps are stored in f32 or bf16 ([`Element`]) and computed in f32; a convolution is a matrix product over
//! pixels, on the f32 tiles of the inference kernels or, for bf16, on AMX. A map stands before its
//! batch normalisation and activation: whoever reads it applies them ([`Source`]), and a gradient is
//! pulled back through them where it is read ([`Gradient`]), a band of rows at a time in cache, so
//! that neither the normalised map nor its gradient is ever written to memory.
//!
//! Functions here are safe: they check lengths, then call the kernels. Each works on one thread's
//! images; the caller splits a batch and adds the threads' sums up in order.

#[cfg(target_arch = "x86_64")]
mod amx;
mod band;
pub mod conv;
pub mod depthwise;
mod element;
mod gemm;
pub mod maps;

pub use band::{Geometry, Scratch};
pub use element::Element;
pub use gemm::Packed;
pub use maps::{Gradient, Source};

/// Whether this machine trains in bf16: AMX tiles that the operating system lets us use.
pub fn bf16_supported() -> bool {
    #[cfg(target_arch = "x86_64")]
    return amx::available();
    #[cfg(not(target_arch = "x86_64"))]
    return false;
}

/// Compiles a loop nest once an ISA and picks at run time: the body is plain code that the compiler vectorises.
macro_rules! per_isa {
    ($(#[$doc:meta])* $vis:vis fn $name:ident<$($g:ident: $bound:ident),*>($($arg:ident: $ty:ty),* $(,)?) $body:block) => {
        $(#[$doc])*
        $vis fn $name<$($g: $bound),*>(isa: $crate::cpu::Isa, $($arg: $ty),*) {
            #[inline(always)]
            fn body<$($g: $bound),*>($($arg: $ty),*) $body
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2<$($g: $bound),*>($($arg: $ty),*) { body($($arg),*) }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,fma")]
            fn avx512<$($g: $bound),*>($($arg: $ty),*) { body($($arg),*) }
            match isa {
                // SAFETY: an `Isa` value is proof that the CPU has it (AVX-512 machines have AVX2 and FMA).
                #[cfg(target_arch = "x86_64")]
                $crate::cpu::Isa::Avx2 => unsafe { avx2($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::cpu::Isa::Avx512 => unsafe { avx512($($arg),*) },
                _ => body($($arg),*),
            }
        }
    };
}
pub(crate) use per_isa;
