//! Evaluation protocols: how good a list of detections is, measured as the published tables do.
//!
//! - [`wider`]: WIDER FACE validation, Easy / Medium / Hard and All, files and evaluator.
//! - [`coco`]: mean AP over IoU 0.50:0.05:0.95 on the same ground truth.
//! - [`fddb`]: discrete and continuous ROC over ellipses.
//! - [`voc`]: precision and recall of AFW, PASCAL Face and MAFA.
//! - [`diagnose`]: what the false positives are and which faces are missed.
//! - `plot` (feature `cli`): curves as SVG.
//!
//! Everything is deterministic: pictures are walked in a fixed order and equal scores keep their
//! order in the input. Functions that take seconds accept `progress(done, total)`.

pub mod coco;
pub mod curve;
pub mod diagnose;
pub mod fddb;
pub mod overlap;
#[cfg(feature = "cli")]
pub mod plot;
pub mod voc;
pub mod wider;

pub(crate) mod lines;
mod mat;

pub use curve::{PrCurve, PrPoint, RocCurve, RocPoint};

/// Called as `progress(done, total)` while a long evaluation runs.
pub type Progress<'a> = &'a mut dyn FnMut(usize, usize);
