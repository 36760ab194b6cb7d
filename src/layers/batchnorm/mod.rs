//! Batch normalisation over N, H, W for every channel.

use crate::error::{Error, Result};
use crate::shape::Shape;

/// Parameters: `weight`, `bias`, `running_mean`, `running_var`, each `[channels]`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BatchNorm {
    /// Channels.
    pub channels: usize,
    /// Added to the variance.
    pub eps: f64,
    /// Weight of the new batch in the running statistics (training).
    pub momentum: f64,
}

impl BatchNorm {
    /// PyTorch's defaults: eps 1e-5, momentum 0.1.
    pub const fn new(channels: usize) -> Self {
        Self { channels, eps: 1e-5, momentum: 0.1 }
    }

    /// Output shape.
    pub fn out_shape(&self, x: Shape) -> Result<Shape> {
        if x.c == self.channels {
            Ok(x)
        } else {
            Err(Error::InvalidModel(format!("batchnorm expects {} channels, got {}", self.channels, x.c)))
        }
    }
}
