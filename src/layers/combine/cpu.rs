//! Lowering of sums, copies and crops.

use super::Crop;
use crate::cpu::arena::Format;
use crate::cpu::program::Kind;
use crate::cpu::simple::AddOp;
use crate::cpu::Op;

/// max(v, slope * v), v = a + b, for the formats of a, b and v.
pub(crate) fn add(slope: f32, formats: [Format; 3]) -> Op {
    Op(Kind::Add(AddOp { slope, corner: [0, 0], resizes: false, formats }))
}

/// A copy: for a concatenation that could not be written in place, or from one format to another.
pub(crate) fn copy([from, to]: [Format; 2]) -> Op {
    add(1.0, [from, from, to])
}

/// A crop.
pub(crate) fn crop(crop: &Crop, [from, to]: [Format; 2]) -> Op {
    let corner = [crop.top, crop.left];
    Op(Kind::Crop(AddOp { slope: 1.0, corner, resizes: false, formats: [from, from, to] }))
}
