//! Lowering of convolutions to the CPU kernels.

use super::Conv2d;
use crate::cpu::conv::{ConvOp, DepthwiseOp, Residual, Window};
use crate::cpu::program::Kind;
use crate::cpu::{Isa, Op};

/// The op for `conv` with folded `weight` and `bias`, activation `max(x, slope * x)` and the place
/// where a second input is added.
pub(crate) fn lower(
    conv: &Conv2d,
    isa: Isa,
    weight: &[f32],
    bias: &[f32],
    slope: f32,
    residual: Residual,
) -> Op {
    let Conv2d { kernel, stride, dilation, padding, groups, in_channels, out_channels, .. } = *conv;
    let window = Window { kernel, stride, dilation, padding };
    if conv.is_depthwise() {
        return Op(Kind::Depthwise(DepthwiseOp::new(isa, window, in_channels, weight, bias, slope)));
    }
    let channels = [in_channels, out_channels];
    Op(Kind::Conv(ConvOp::new(isa, window, groups, channels, weight, bias, slope, residual)))
}
