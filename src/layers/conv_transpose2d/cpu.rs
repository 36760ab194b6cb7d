//! Lowering of transposed convolutions.

use super::ConvTranspose2d;
use crate::cpu::program::Kind;
use crate::cpu::simple::ConvTransposeOp;
use crate::cpu::Op;

/// The op for `conv` with folded weights.
pub(crate) fn lower(conv: &ConvTranspose2d, weight: &[f32], bias: &[f32]) -> Op {
    let pad = [conv.padding[0], conv.padding[1]];
    let channels = [conv.in_channels, conv.out_channels];
    Op(Kind::ConvTranspose(ConvTransposeOp::new(
        conv.kernel,
        conv.stride,
        pad,
        conv.groups,
        channels,
        weight,
        bias,
    )))
}
