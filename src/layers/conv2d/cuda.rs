//! Lowering of convolutions to a device.

use super::Conv2d;
use crate::error::Result;
use crate::gpu::map::Arithmetic;
use crate::gpu::ops::{ConvOp, ConvWindow, DepthwiseOp, Device, DeviceOp, Joined};

/// The op for `conv` with folded `weight` and `bias`, multiplied as `arithmetic` says; `rule` is the slope of its activation
/// `max(x, slope * x)` and the place where a second input is added.
pub(crate) fn lower(
    conv: &Conv2d,
    device: &Device,
    arithmetic: Arithmetic,
    weight: &[f32],
    bias: &[f32],
    rule: (f32, Joined),
) -> Result<DeviceOp> {
    let [top, left, ..] = conv.padding;
    let window =
        ConvWindow { kernel: conv.kernel, stride: conv.stride, dilation: conv.dilation, pad: [top, left] };
    if conv.is_depthwise() && rule.1 == Joined::No {
        return Ok(DeviceOp::Depthwise(DepthwiseOp::new(
            device,
            arithmetic.element(),
            window,
            weight,
            bias,
            rule.0,
        )?));
    }
    Ok(DeviceOp::Conv(ConvOp::new(device, arithmetic, window, conv.groups, weight, bias, rule)?))
}
