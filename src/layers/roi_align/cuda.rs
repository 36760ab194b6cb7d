//! Lowering of RoIAlign to a device.

use super::RoiAlign;
use crate::error::Result;
use crate::gpu::ops::{Device, DeviceOp, RoiAlignOp};

/// The op.
pub(crate) fn lower(roi: &RoiAlign, device: &Device) -> Result<DeviceOp> {
    let op = RoiAlignOp::new(device, roi.spatial_scale, roi.sampling_ratio, roi.aligned)?;
    Ok(DeviceOp::RoiAlign(op))
}
