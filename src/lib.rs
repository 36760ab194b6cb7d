//! farface finds faces, the far and tiny ones too: hand-written CNN inference in Rust behind a
//! stable C header.
//!
//! ARCHITECTURE.md draws the whole; each module imports only what stands to its left:
//! `error, shape <- cpu <- layers <- graph <- nets <- detect <- {capi, eval} <- train <- bin`, with
//! `pixels` beside `layers`.

#[forbid(unsafe_code)]
pub mod error;
#[forbid(unsafe_code)]
pub mod shape;

pub mod cpu;
#[cfg(feature = "cuda")]
pub mod gpu;
#[forbid(unsafe_code)]
pub mod layers;

#[forbid(unsafe_code)]
pub mod graph;
#[forbid(unsafe_code)]
pub mod nets;

#[forbid(unsafe_code)]
pub mod pixels;

pub mod capi;
#[forbid(unsafe_code)]
pub mod detect;

#[cfg(feature = "eval")]
#[forbid(unsafe_code)]
pub mod eval;

#[cfg(feature = "train")]
#[forbid(unsafe_code)]
pub mod train;

#[forbid(unsafe_code)]
pub mod files;
#[cfg(any(feature = "cli", feature = "train"))]
#[forbid(unsafe_code)]
pub mod picture;

pub use error::{Error, Result};

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
