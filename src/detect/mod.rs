//! From feature maps to faces: anchors, decoding, filtering, merging.

pub mod boxes;

pub use boxes::{BBox, Detection};
