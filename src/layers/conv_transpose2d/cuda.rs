//! Lowering of transposed convolutions to a device.

use super::ConvTranspose2d;
use crate::error::Result;
use crate::gpu::ops::{ConvTransposeOp, ConvWindow, Device, DeviceOp};

/// The op for `conv` with folded `weight` and `bias`.
pub(crate) fn lower(
    conv: &ConvTranspose2d,
    device: &Device,
    weight: &[f32],
    bias: &[f32],
) -> Result<DeviceOp> {
    let [top, left, ..] = conv.padding;
    let window = ConvWindow { kernel: conv.kernel, stride: conv.stride, dilation: [1, 1], pad: [top, left] };
    Ok(DeviceOp::ConvTranspose(ConvTransposeOp::new(device, window, conv.groups, weight, bias)?))
}
