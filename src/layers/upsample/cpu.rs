//! Lowering of interpolation.

use super::{Interpolation, Upsample};
use crate::cpu::program::Kind;
use crate::cpu::Op;

/// The op; the output's size comes from the plan.
pub(crate) fn lower(upsample: &Upsample) -> Op {
    Op(Kind::Resize { bilinear: upsample.mode == Interpolation::Bilinear })
}
