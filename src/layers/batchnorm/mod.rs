//! Batch normalisation over N, H, W for every channel.

pub(crate) mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;

#[cfg(feature = "train")]
use super::expect_shape;
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

    /// Training, with the statistics of the batch: `y = (x - mean) / sqrt(var + eps) * weight + bias`,
    /// mean and (biased) variance over N, H, W. Moves the running statistics by `momentum` towards the
    /// batch's, the variance unbiased there, as PyTorch does.
    ///
    /// `x` and the result N x C x H x W; all else `[C]`. Errors where a channel has fewer than two
    /// values. The returned statistics are for [`BatchNorm::backward_train`].
    #[cfg(feature = "train")]
    pub fn forward_train<T: Real>(
        &self,
        x: &Tensor<T>,
        weight: &[T],
        bias: &[T],
        running_mean: &mut [T],
        running_var: &mut [T],
    ) -> Result<(Tensor<T>, BatchStats<T>)> {
        self.out_shape(x.shape)?;
        expect_len("batchnorm running mean", running_mean, self.channels)?;
        expect_len("batchnorm running variance", running_var, self.channels)?;
        let count = (x.shape.n * x.shape.h * x.shape.w) as f64;
        if count < 2.0 {
            return Err(Error::InvalidArgument(format!(
                "batchnorm trains on two or more values a channel, got {}",
                x.shape
            )));
        }
        let (mean, var) = self.batch_moments(x, count);
        let y = self.forward(x, weight, bias, &mean, &var)?;
        let (kept, new) = (T::of(1.0 - self.momentum), T::of(self.momentum));
        let unbiased = T::of(count / (count - 1.0));
        for c in 0..self.channels {
            running_mean[c] = kept * running_mean[c] + new * mean[c];
            running_var[c] = kept * running_var[c] + new * var[c] * unbiased;
        }
        let inv_std = self.inv_std(&var);
        Ok((y, BatchStats { mean, inv_std }))
    }

    /// Gradients of [`BatchNorm::forward`], whose statistics are constants (frozen batch norm), added
    /// to what is there: `dx += weight / sqrt(var + eps) * dy`, `dw += x_hat * dy`, `db += dy`.
    ///
    /// `x`, `dy`, `dx` N x C x H x W; all else `[C]`.
    #[cfg(feature = "train")]
    pub fn backward<T: Real>(
        &self,
        x: &Tensor<T>,
        weight: &[T],
        mean: &[T],
        var: &[T],
        dy: &Tensor<T>,
        dx: Option<&mut Tensor<T>>,
        dw: &mut [T],
        db: &mut [T],
    ) -> Result<()> {
        self.check_backward(x, weight, dy, dx.as_deref(), dw, db)?;
        expect_len("batchnorm running mean", mean, self.channels)?;
        expect_len("batchnorm running variance", var, self.channels)?;
        let inv_std = self.inv_std(var);
        let (sum_dy, sum_dy_x_hat) = self.gradient_sums(x, mean, &inv_std, dy);
        for c in 0..self.channels {
            dw[c] += T::of(sum_dy_x_hat[c]);
            db[c] += T::of(sum_dy[c]);
        }
        if let Some(dx) = dx {
            for (n, c, h, w) in indices(x.shape) {
                *dx.at_mut(n, c, h, w) += weight[c] * inv_std[c] * dy.at(n, c, h, w);
            }
        }
        Ok(())
    }

    /// Gradients of [`BatchNorm::forward_train`], added to what is there. Mean and variance depend on
    /// x too (Ioffe and Szegedy 2015, section 3), which leaves, with means over N, H, W,
    /// `dx += weight * inv_std * (dy - mean(dy) - x_hat * mean(dy * x_hat))`,
    /// `dw += x_hat * dy`, `db += dy`.
    ///
    /// `x`, `dy`, `dx` N x C x H x W; all else `[C]`; `stats` as the forward pass returned them.
    #[cfg(feature = "train")]
    pub fn backward_train<T: Real>(
        &self,
        x: &Tensor<T>,
        weight: &[T],
        stats: &BatchStats<T>,
        dy: &Tensor<T>,
        dx: Option<&mut Tensor<T>>,
        dw: &mut [T],
        db: &mut [T],
    ) -> Result<()> {
        self.check_backward(x, weight, dy, dx.as_deref(), dw, db)?;
        let BatchStats { mean, inv_std } = stats;
        expect_len("batchnorm batch mean", mean, self.channels)?;
        expect_len("batchnorm batch inv_std", inv_std, self.channels)?;
        let (sum_dy, sum_dy_x_hat) = self.gradient_sums(x, mean, inv_std, dy);
        for c in 0..self.channels {
            dw[c] += T::of(sum_dy_x_hat[c]);
            db[c] += T::of(sum_dy[c]);
        }
        if let Some(dx) = dx {
            let count = (x.shape.n * x.shape.h * x.shape.w) as f64;
            for (n, c, h, w) in indices(x.shape) {
                let x_hat = (x.at(n, c, h, w) - mean[c]) * inv_std[c];
                let (mean_dy, mean_dy_x_hat) = (T::of(sum_dy[c] / count), T::of(sum_dy_x_hat[c] / count));
                *dx.at_mut(n, c, h, w) +=
                    weight[c] * inv_std[c] * (dy.at(n, c, h, w) - mean_dy - x_hat * mean_dy_x_hat);
            }
        }
        Ok(())
    }

    /// `1 / sqrt(var + eps)` of every channel.
    fn inv_std<T: Real>(&self, var: &[T]) -> Vec<T> {
        var.iter().map(|&v| T::of(1.0) / (v + T::of(self.eps)).sqrt()).collect()
    }

    /// Mean and biased variance of every channel, `[C]` each, summed in f64 as PyTorch does on CPU.
    #[cfg(feature = "train")]
    fn batch_moments<T: Real>(&self, x: &Tensor<T>, count: f64) -> (Vec<T>, Vec<T>) {
        let mut mean = vec![0.0; self.channels];
        for (i, v) in x.data.iter().enumerate() {
            mean[i % self.channels] += v.to_f64() / count;
        }
        let mut var = vec![0.0; self.channels];
        for (i, v) in x.data.iter().enumerate() {
            let c = i % self.channels;
            var[c] += (v.to_f64() - mean[c]).powi(2) / count;
        }
        (mean.into_iter().map(T::of).collect(), var.into_iter().map(T::of).collect())
    }

    /// Sums over N, H, W of `dy` and of `dy * x_hat`, `[C]` each, in f64.
    #[cfg(feature = "train")]
    fn gradient_sums<T: Real>(
        &self,
        x: &Tensor<T>,
        mean: &[T],
        inv_std: &[T],
        dy: &Tensor<T>,
    ) -> (Vec<f64>, Vec<f64>) {
        let (mut sum_dy, mut sum_dy_x_hat) = (vec![0.0; self.channels], vec![0.0; self.channels]);
        for (n, c, h, w) in indices(x.shape) {
            let x_hat = (x.at(n, c, h, w) - mean[c]) * inv_std[c];
            let d = dy.at(n, c, h, w);
            sum_dy[c] += d.to_f64();
            sum_dy_x_hat[c] += (d * x_hat).to_f64();
        }
        (sum_dy, sum_dy_x_hat)
    }

    #[cfg(feature = "train")]
    fn check_backward<T: Real>(
        &self,
        x: &Tensor<T>,
        weight: &[T],
        dy: &Tensor<T>,
        dx: Option<&Tensor<T>>,
        dw: &[T],
        db: &[T],
    ) -> Result<()> {
        let out = self.out_shape(x.shape)?;
        expect_len("batchnorm weight", weight, self.channels)?;
        expect_shape("batchnorm dy", dy.shape, out)?;
        if let Some(dx) = dx {
            expect_shape("batchnorm dx", dx.shape, x.shape)?;
        }
        expect_len("batchnorm dw", dw, self.channels)?;
        expect_len("batchnorm db", db, self.channels)
    }
}

/// What the backward pass needs of a batch, `[channels]` each.
#[cfg(feature = "train")]
#[derive(Clone, Debug, PartialEq)]
pub struct BatchStats<T = f32> {
    /// Mean.
    pub mean: Vec<T>,
    /// `1 / sqrt(biased variance + eps)`.
    pub inv_std: Vec<T>,
}
