//! Activations: ReLU, leaky ReLU, sigmoid, and softmax over groups of channels.

pub(crate) mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;

#[cfg(feature = "train")]
use super::expect_shape;
use super::Real;
use crate::error::{Error, Result};
use crate::shape::{Shape, Tensor};

/// An activation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Activation {
    /// max(x, 0).
    Relu,
    /// x where positive, `slope` * x elsewhere; 0 <= slope < 1.
    LeakyRelu(f32),
    /// 1 / (1 + e^-x).
    Sigmoid,
    /// Softmax over each run of this many consecutive channels.
    Softmax(usize),
}

impl Activation {
    /// Output shape: the input's. Softmax wants channels in whole runs, leaky ReLU a slope in 0..1.
    pub fn out_shape(&self, x: Shape) -> Result<Shape> {
        match self {
            Activation::Softmax(k) if *k == 0 || !x.c.is_multiple_of(*k) => {
                Err(Error::InvalidModel(format!("softmax over runs of {k} channels does not divide {x}")))
            }
            Activation::LeakyRelu(slope) if !(0.0..1.0).contains(slope) => {
                Err(Error::InvalidModel(format!("leaky ReLU takes a slope from 0 to below 1, got {slope}")))
            }
            _ => Ok(x),
        }
    }

    /// The activation of every value; NaN stays NaN. `x` and the result N x C x H x W.
    pub fn forward<T: Real>(&self, x: &Tensor<T>) -> Result<Tensor<T>> {
        self.out_shape(x.shape)?;
        let (zero, one) = (T::default(), T::of(1.0));
        let mut y = x.clone();
        match *self {
            Activation::Relu => y.data.iter_mut().filter(|v| **v <= zero).for_each(|v| *v = zero),
            Activation::LeakyRelu(slope) => {
                let slope = T::of(slope.into());
                y.data.iter_mut().filter(|v| **v <= zero).for_each(|v| *v *= slope);
            }
            Activation::Sigmoid => y.data.iter_mut().for_each(|v| *v = one / (one + (-*v).exp())),
            // Channels are fastest in memory, so a run of channels is a run of values.
            Activation::Softmax(k) => y.data.chunks_exact_mut(k).for_each(softmax),
        }
        Ok(y)
    }

    /// Gradient of [`Activation::forward`], added to `dx`. The output alone gives it, so the input
    /// need not be kept: ReLU and leaky ReLU keep the sign, sigmoid's slope is `y * (1 - y)`, and
    /// softmax's is `dx_i += y_i * (dy_i - sum over j of y_j * dy_j)` within a run.
    ///
    /// `y` (the output), `dy`, `dx` N x C x H x W.
    #[cfg(feature = "train")]
    pub fn backward<T: Real>(&self, y: &Tensor<T>, dy: &Tensor<T>, dx: &mut Tensor<T>) -> Result<()> {
        let out = self.out_shape(y.shape)?;
        expect_shape("activation dy", dy.shape, out)?;
        expect_shape("activation dx", dx.shape, out)?;
        let (zero, one) = (T::default(), T::of(1.0));
        let values = dx.data.iter_mut().zip(y.data.iter().zip(&dy.data));
        match *self {
            Activation::Relu => values.filter(|(_, (&y, _))| y > zero).for_each(|(dx, (_, &dy))| *dx += dy),
            Activation::LeakyRelu(slope) => {
                let slope = T::of(slope.into());
                values.for_each(|(dx, (&y, &dy))| *dx += if y > zero { dy } else { slope * dy });
            }
            Activation::Sigmoid => values.for_each(|(dx, (&y, &dy))| *dx += y * (one - y) * dy),
            Activation::Softmax(k) => {
                let runs =
                    dx.data.chunks_exact_mut(k).zip(y.data.chunks_exact(k).zip(dy.data.chunks_exact(k)));
                for (dx, (y, dy)) in runs {
                    let mut dot = zero;
                    for j in 0..k {
                        dot += y[j] * dy[j];
                    }
                    for i in 0..k {
                        dx[i] += y[i] * (dy[i] - dot);
                    }
                }
            }
        }
        Ok(())
    }
}

/// e^x / sum of e^x, with the maximum taken off first so that nothing overflows.
fn softmax<T: Real>(run: &mut [T]) {
    let max = run.iter().fold(run[0], |m, &v| if v > m { v } else { m });
    let mut sum = T::default();
    for v in run.iter_mut() {
        *v = (*v - max).exp();
        sum += *v;
    }
    for v in run.iter_mut() {
        *v = *v / sum;
    }
}
