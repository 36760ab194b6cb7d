//! Lowering of RoIAlign.

use super::RoiAlign;
use crate::cpu::program::Kind;
use crate::cpu::simple::RoiAlignOp;
use crate::cpu::Op;

/// The op.
pub(crate) fn lower(roi: &RoiAlign) -> Op {
    Op(Kind::RoiAlign(op(roi)))
}

/// Its geometry.
pub(crate) fn op(roi: &RoiAlign) -> RoiAlignOp {
    RoiAlignOp {
        output: roi.output,
        spatial_scale: roi.spatial_scale,
        sampling_ratio: roi.sampling_ratio,
        aligned: roi.aligned,
    }
}
