//! Fully connected layer.

use super::window::indices;
use super::{expect_bias, expect_len, Real};
use crate::error::{Error, Result};
use crate::shape::{Shape, Tensor};

/// Parameters: weight `[out, in]`, bias `[out]`. The input is flattened in C, H, W order, as
/// PyTorch's `flatten(1)` does, so that public second-stage heads load unchanged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Linear {
    /// Input features: C*H*W.
    pub in_features: usize,
    /// Output features.
    pub out_features: usize,
    /// Whether a bias is added.
    pub bias: bool,
}

impl Linear {
    /// Output shape N x out x 1 x 1.
    pub fn out_shape(&self, x: Shape) -> Result<Shape> {
        if x.c * x.h * x.w != self.in_features {
            return Err(Error::InvalidModel(format!(
                "linear expects {} features, got {x}",
                self.in_features
            )));
        }
        Ok(Shape::new(x.n, self.out_features, 1, 1))
    }

    /// Multiply-adds for this output.
    pub fn macs(&self, out: Shape) -> u64 {
        out.len() as u64 * self.in_features as u64
    }

    /// `y[n,o] = b[o] + sum over c,h,w of w[o, (c*H+h)*W+w] * x[n,c,h,w]` (PyTorch's `flatten(1)` and
    /// `linear`): features count in C, H, W order although memory is channels-last.
    ///
    /// `x` N x C x H x W; `w` `[out, C*H*W]`; `b` `[out]`, present exactly where [`Linear::bias`] is
    /// set. Returns N x out x 1 x 1.
    pub fn forward<T: Real>(&self, x: &Tensor<T>, w: &[T], b: Option<&[T]>) -> Result<Tensor<T>> {
        let out = self.check(x.shape, w)?;
        expect_bias("linear", self.bias, b, out.c)?;
        let mut y = Tensor::zeros(out);
        if let Some(b) = b {
            for (n, o, _, _) in indices(out) {
                *y.at_mut(n, o, 0, 0) = b[o];
            }
        }
        for (n, c, iy, ix) in indices(x.shape) {
            let feature = (c * x.shape.h + iy) * x.shape.w + ix;
            for o in 0..out.c {
                *y.at_mut(n, o, 0, 0) += w[o * self.in_features + feature] * x.at(n, c, iy, ix);
            }
        }
        Ok(y)
    }

    /// Output shape, where weight and input agree.
    fn check<T>(&self, x: Shape, w: &[T]) -> Result<Shape> {
        expect_len("linear weight", w, self.out_features * self.in_features)?;
        self.out_shape(x)
    }
}
