//! The trainer: annotated pictures in, weights out. The very layers that the library runs are walked forward and
//! backward; the mathematics are pure functions on slices, every one named after the equation of the paper that it is.

pub mod augment;
pub mod checkpoint;
pub mod cluster;
pub mod data;
pub mod dev;
#[cfg(feature = "cuda")]
pub mod device;
pub mod ellipse;
pub mod loader;
pub mod losses;
pub mod matching;
pub mod network;
pub mod objective;
pub mod optim;
pub mod ranks;
pub mod recipe;
pub mod sampler;
pub mod trainer;
mod units;
mod walk;
