//! Batch normalisation over N, H, W for every channel.

use super::window::indices;
use super::{expect_len, Real};
use crate::error::{Error, Result};
use crate::shape::{Shape, Tensor};

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

    /// Inference, with the running statistics:
    /// `y = (x - mean[c]) / sqrt(var[c] + eps) * weight[c] + bias[c]`.
    ///
    /// `x` and the result N x C x H x W; `weight`, `bias`, `mean`, `var` `[C]`.
    pub fn forward<T: Real>(
        &self,
        x: &Tensor<T>,
        weight: &[T],
        bias: &[T],
        mean: &[T],
        var: &[T],
    ) -> Result<Tensor<T>> {
        let out = self.out_shape(x.shape)?;
        expect_len("batchnorm weight", weight, self.channels)?;
        expect_len("batchnorm bias", bias, self.channels)?;
        expect_len("batchnorm running mean", mean, self.channels)?;
        expect_len("batchnorm running variance", var, self.channels)?;
        let inv_std = self.inv_std(var);
        let mut y = Tensor::zeros(out);
        for (n, c, h, w) in indices(out) {
            *y.at_mut(n, c, h, w) = (x.at(n, c, h, w) - mean[c]) * inv_std[c] * weight[c] + bias[c];
        }
        Ok(y)
    }

    /// `1 / sqrt(var + eps)` of every channel.
    fn inv_std<T: Real>(&self, var: &[T]) -> Vec<T> {
        var.iter().map(|&v| T::of(1.0) / (v + T::of(self.eps)).sqrt()).collect()
    }
}
