//! Lowering of activations that nothing took in to a device.

use super::Activation;
use crate::error::Result;
use crate::gpu::ops::{AddOp, Device, DeviceOp, MapOp, SoftmaxOp};

/// The op.
pub(crate) fn lower(activation: &Activation, device: &Device) -> Result<DeviceOp> {
    Ok(match *activation {
        Activation::Relu => DeviceOp::Add(AddOp::copy(device, 0.0, [0, 0])?),
        Activation::LeakyRelu(slope) => DeviceOp::Add(AddOp::copy(device, slope, [0, 0])?),
        Activation::Sigmoid => DeviceOp::Map(MapOp::sigmoid(device)?),
        Activation::Softmax(group) => DeviceOp::Softmax(SoftmaxOp::new(device, group)?),
    })
}
