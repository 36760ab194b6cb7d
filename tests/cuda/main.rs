//! The CUDA backend: every layer, network and detector against the plain loops and the CPU.
//!
//! Without a GPU the kernels of `cuda/` are compiled as C++ into a driver of their own (`emulator/`), so that the whole way, from the
//! search for libraries to the download of faces, runs on the CPU. With `FARFACE_TEST_CUDA=device` the machine's own driver is used.

mod batch;
#[path = "../common/mod.rs"]
mod common;
#[cfg(feature = "train")]
#[path = "../common/faces.rs"]
mod drawing;
#[cfg(feature = "cuda-embedded")]
mod embedded;
mod emulator;
mod faces;
mod failures;
#[path = "../parity/fusion.rs"]
mod fusion;
#[cfg(feature = "train")]
mod gradients;
#[path = "../parity/kernels.rs"]
mod kernels;
mod libraries;
#[cfg(feature = "train")]
mod objective;
#[path = "../common/pictures.rs"]
mod pictures;
mod pixels;
#[cfg(feature = "train")]
#[path = "../common/plain_step.rs"]
mod plain_step;
#[path = "../parity/random.rs"]
mod random;
#[cfg(feature = "train")]
mod ranks;
#[cfg(feature = "train")]
mod second_look;
mod sessions;
#[cfg(feature = "train")]
mod shared_batches;
mod support;
mod tiles;
#[cfg(feature = "train")]
mod train;
#[cfg(feature = "train")]
mod trainer;
#[cfg(feature = "train")]
mod training_failures;
#[cfg(feature = "train")]
mod two_step;
