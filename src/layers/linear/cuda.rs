//! A linear layer on a device is a convolution whose window is the whole map, as on the CPU.

use crate::error::Result;
use crate::gpu::map::Arithmetic;
use crate::gpu::ops::{ConvOp, ConvWindow, Device, DeviceOp, Joined};

/// The op for inputs of `size` rows and columns, multiplied as `arithmetic` says.
pub(crate) fn lower(
    device: &Device,
    arithmetic: Arithmetic,
    size: [usize; 2],
    weight: &[f32],
    bias: &[f32],
    rule: (f32, Joined),
) -> Result<DeviceOp> {
    let window = ConvWindow { kernel: size, stride: [1; 2], dilation: [1; 2], pad: [0; 2] };
    Ok(DeviceOp::Conv(ConvOp::new(device, arithmetic, window, 1, weight, bias, rule)?))
}
