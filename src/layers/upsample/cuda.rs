//! Lowering of interpolation to a device.

use super::{Interpolation, Upsample};
use crate::error::Result;
use crate::gpu::ops::{Device, DeviceOp, ResizeOp};

/// The op; the output's size comes from the plan.
pub(crate) fn lower(upsample: &Upsample, device: &Device) -> Result<DeviceOp> {
    Ok(DeviceOp::Resize(ResizeOp::new(device, upsample.mode == Interpolation::Bilinear)?))
}
