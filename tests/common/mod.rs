//! What several test files need.
#![allow(dead_code)]

#[cfg(unix)]
pub mod c;
pub mod capi;
pub mod model;
mod shared;

pub use shared::shared;
