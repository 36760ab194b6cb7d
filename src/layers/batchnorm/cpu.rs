//! Batch normalisation that no convolution could take in: a depthwise convolution with a 1x1 window.

use super::BatchNorm;
use crate::cpu::arena::Format;
use crate::cpu::conv::Window;
use crate::cpu::depthwise::DepthwiseOp;
use crate::cpu::program::Kind;
use crate::cpu::{Isa, Op};
use std::sync::Arc;

/// The op for y = max(v, slope * v), v = x * scale + shift.
pub(crate) fn lower(
    bn: &BatchNorm,
    isa: Isa,
    scale: &[f32],
    shift: &[f32],
    slope: f32,
    formats: [Format; 2],
) -> Op {
    let window = Window { kernel: [1; 2], stride: [1; 2], dilation: [1; 2], padding: [0; 4] };
    let op = DepthwiseOp::new(isa, window, bn.channels, scale, shift, slope, formats);
    Op(Kind::Depthwise(Arc::new(op)))
}
