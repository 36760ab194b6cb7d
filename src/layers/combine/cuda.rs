//! Lowering of sums, copies and crops to a device.

use super::Crop;
use crate::error::Result;
use crate::gpu::ops::{AddOp, Device, DeviceOp};

/// max(v, slope * v), v = a + b.
pub(crate) fn add(device: &Device, slope: f32) -> Result<DeviceOp> {
    Ok(DeviceOp::Add(AddOp::sum(device, slope)?))
}

/// A copy, from any type to any.
pub(crate) fn copy(device: &Device) -> Result<DeviceOp> {
    Ok(DeviceOp::Add(AddOp::copy(device, 1.0, [0, 0])?))
}

/// A crop.
pub(crate) fn crop(crop: &Crop, device: &Device) -> Result<DeviceOp> {
    Ok(DeviceOp::Add(AddOp::copy(device, 1.0, [crop.top, crop.left])?))
}
