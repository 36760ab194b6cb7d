//! What several test files need.
#![allow(dead_code, unused_imports)] // no test file needs all of it

#[cfg(unix)]
pub mod c;
pub mod capi;
pub mod model;
pub mod narrow;
mod shared;

pub use shared::shared;
