//! Activations: ReLU, leaky ReLU, sigmoid, and softmax over groups of channels.

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
    /// Output shape: the input's. Softmax wants channels in whole runs.
    pub fn out_shape(&self, x: Shape) -> Result<Shape> {
        match self {
            Activation::Softmax(k) if *k == 0 || !x.c.is_multiple_of(*k) => {
                Err(Error::InvalidModel(format!("softmax over runs of {k} channels does not divide {x}")))
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
