//! Lowering of interpolation to a device.

use super::{Interpolation, Upsample};
use crate::error::Result;
use crate::gpu::ops::{Device, DeviceOp, MapOp};

/// The op; the output's size comes from the plan.
pub(crate) fn lower(upsample: &Upsample, device: &Device) -> Result<DeviceOp> {
    Ok(DeviceOp::Map(MapOp::resize(device, upsample.mode == Interpolation::Bilinear)?))
}
