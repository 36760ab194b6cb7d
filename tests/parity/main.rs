//! The compiled engine against the plain-loop reference: every kernel, on every instruction set that
//! this machine has, on one, two and three threads.

#[path = "../common/shared.rs"]
mod common;
mod fusion;
mod kernels;
mod nano;
mod numbers;
mod random;
mod retinaface;
mod support;
