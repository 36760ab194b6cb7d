//! Lowering of sums, copies and crops.

use super::Crop;
use crate::cpu::program::Kind;
use crate::cpu::Op;

/// max(v, slope * v), v = a + b.
pub(crate) fn add(slope: f32) -> Op {
    Op(Kind::Add { slope })
}

/// A copy, for a concatenation that could not be written in place.
pub(crate) fn copy() -> Op {
    Op(Kind::Add { slope: 1.0 })
}

/// A crop.
pub(crate) fn crop(crop: &Crop) -> Op {
    Op(Kind::Crop { corner: [crop.top, crop.left] })
}
