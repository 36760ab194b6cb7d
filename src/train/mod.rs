//! The trainer's parts. The mathematics are pure functions on slices; every one names the equation
//! of the paper that it is.

pub mod losses;
pub mod matching;
pub mod optim;
pub mod sampler;
