//! Raw CUDA: libraries found at run time, contexts, memory, streams, graphs, and the kernels of `cuda/`. Knows nothing of layers.
//!
//! Nothing here is linked: where a library or a device is missing, that is an error that names it, and the CPU runs on.

#[cfg(not(feature = "cuda-embedded"))]
mod compiled;
mod cublaslt;
mod cudnn;
pub mod driver;
#[cfg(feature = "cuda-embedded")]
mod embedded;
pub mod faces;
mod fused;
pub mod kernels;
pub mod map;
pub mod memory;
#[cfg(feature = "train")]
pub mod nccl;
#[cfg(not(feature = "cuda-embedded"))]
mod nvrtc;
pub mod ops;
pub mod pixels;
pub mod probe;
pub mod program;
pub mod stage;
#[cfg(feature = "train")]
pub mod upload;
