//! A linear layer is a convolution whose window is the whole map: flattening in C, H, W order
//! makes its weight `[out, C, H, W]`.

use super::Linear;
use crate::cpu::conv::{ConvOp, Formats, Residual, Window};
use crate::cpu::program::Kind;
use crate::cpu::{Isa, Op};
use std::sync::Arc;

/// The op for inputs of `size` rows and columns.
pub(crate) fn lower(
    linear: &Linear,
    isa: Isa,
    size: [usize; 2],
    weight: &[f32],
    bias: &[f32],
    rule: (f32, Residual),
    formats: Formats,
) -> Op {
    let window = Window { kernel: size, stride: [1; 2], dilation: [1; 2], padding: [0; 4] };
    let channels = [linear.in_features / (size[0] * size[1]), linear.out_features];
    Op(Kind::Conv(Arc::new(ConvOp::new(isa, window, 1, channels, weight, bias, rule, formats))))
}
