//! Evaluation protocols: how good a list of detections is, measured as the published tables do.
//!
//! - [`wider`]: WIDER FACE validation, Easy / Medium / Hard and All, files and evaluator.
//! - [`fddb`]: discrete and continuous ROC over ellipses.
//!
//! Everything is deterministic: pictures are walked in a fixed order and equal scores keep their
//! order in the input. Functions that take seconds accept `progress(done, total)`.

pub mod curve;
pub mod fddb;
pub mod overlap;
pub mod wider;

mod lines;
mod mat;

pub use curve::{PrCurve, PrPoint, RocCurve, RocPoint};

/// Called as `progress(done, total)` while a long evaluation runs.
pub type Progress<'a> = &'a mut dyn FnMut(usize, usize);
