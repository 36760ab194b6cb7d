//! The trainer: annotated pictures in, weights out.

pub mod augment;
pub mod data;
pub mod loader;
