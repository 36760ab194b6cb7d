//! Lowering of pooling to a device.

use super::MaxPool;
use crate::error::Result;
use crate::gpu::ops::{AverageOp, Device, DeviceOp, PoolOp};

/// Max pooling.
pub(crate) fn lower_max(pool: &MaxPool, device: &Device) -> Result<DeviceOp> {
    let [top, left, ..] = pool.padding;
    Ok(DeviceOp::MaxPool(PoolOp::new(device, pool.kernel, pool.stride, [top, left])?))
}

/// Global average pooling.
pub(crate) fn lower_global_avg(device: &Device) -> Result<DeviceOp> {
    Ok(DeviceOp::Average(AverageOp::new(device)?))
}
