//! Kernels over whole batches of dense channels-last maps, forward and backward: what training runs.
//!
//! Maps are stored in f32 or bf16 ([`Element`]) and computed in f32; a convolution is a matrix product over
//! pixels, on the f32 tiles of the inference kernels or, for bf16, on AMX or AVX512-BF16. A map stands before its
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
#[cfg(target_arch = "x86_64")]
mod dot;
mod element;
mod gemm;
pub mod maps;
#[cfg(target_arch = "x86_64")]
mod pairs;
pub mod resample;
mod target;

pub(crate) use band::flush;
pub use band::{Geometry, Scratch};
pub use element::Element;
pub use gemm::Packed;
pub use maps::{Gradient, Source};
pub use target::{map_sums, Target};

/// Whether this machine trains in bf16: it multiplies it, on AMX tiles that the operating system lets us use or by
/// AVX512-BF16's dot product, and `FARFACE_ISA` does not keep both from use.
pub fn bf16_supported() -> bool {
    crate::cpu::isa::detected().multiplies_bf16()
}
