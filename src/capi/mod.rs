//! The C interface: the only `extern "C"` of the crate.
//!
//! Every file but `guard` is one section of `include/farface.h`, in the order of [`SECTIONS`]: its
//! module text is the section's introduction, its comments are the header's. Names are C's.
//!
//! Every entry that can fail goes through `guard::guard`, which catches panics and remembers the message of an
//! error. Pointers are checked for NULL and alignment before use; that they point to what their
//! type says is the caller's promise, which each function's comment states.

// The comments are the header's: what a pointer must be is said there in C's terms.
#![allow(clippy::missing_safety_doc)]

mod guard;

pub mod detect;
pub mod image;
pub mod model;
pub mod options;
pub mod session;
pub mod status;
pub mod version;

/// Sections of the header, top to bottom: files of this folder.
pub const SECTIONS: [&str; 7] = ["version", "status", "model", "options", "session", "image", "detect"];
