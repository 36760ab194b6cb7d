//! Raw CPU kernels on one arena of floats: instruction sets, threads, convolution, the steps of a
//! plan. Knows nothing of layers.

pub mod arena;
pub(crate) mod cascade;
pub(crate) mod conv;
#[cfg(feature = "train")]
pub mod dense;
pub(crate) mod depthwise;
pub mod isa;
mod kernels;
pub(crate) mod pages;
pub(crate) mod part;
pub(crate) mod program;
pub(crate) mod resample;
pub(crate) mod simple;
pub mod threads;
#[cfg(target_arch = "x86_64")]
mod tiles;
pub(crate) mod winograd;

pub use arena::{Arena, Storage, View};
pub use isa::Isa;
pub(crate) use program::{Op, Program};
pub use threads::Pool;
