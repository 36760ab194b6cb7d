//! Batch normalisation that no convolution could take in, on a device: a depthwise convolution with a 1x1 window.

use crate::error::Result;
use crate::gpu::map::Element;
use crate::gpu::ops::{ConvWindow, DepthwiseOp, Device, DeviceOp};

/// The op for y = max(v, slope * v), v = x * scale + shift, of inputs of `element`.
pub(crate) fn lower(
    device: &Device,
    element: Element,
    scale: &[f32],
    shift: &[f32],
    slope: f32,
) -> Result<DeviceOp> {
    let window = ConvWindow { kernel: [1; 2], stride: [1; 2], dilation: [1; 2], pad: [0; 2] };
    Ok(DeviceOp::Depthwise(DepthwiseOp::new(device, element, window, scale, shift, slope)?))
}
