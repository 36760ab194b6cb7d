//! Which anchor learns which face: anchors on grids, matching by IoU, online mining.
//!
//! Every function visits only the cells of a group that can reach the threshold with a face, by
//! bounds that are exact: the result is that of comparing all pairs.

mod face_index;
mod grid;
mod mining;
mod proposals;
mod recipe;
mod reference_scale;
mod scan;
#[cfg(test)]
mod support;

pub use grid::{AnchorGrid, AnchorGroup};
pub use mining::{mine_high_quality_anchors, AnchorMining, Mined, MinedAnchor};
pub use recipe::{MatchingRecipe, SecondPass};
pub use reference_scale::reference_scale;
pub use scan::{match_anchors, match_boxes, FaceBox, Matches, BACKGROUND, IGNORED, IGNORE_COVER};
