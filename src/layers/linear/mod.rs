//! Fully connected layer.

pub(crate) mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;

#[cfg(feature = "train")]
use super::expect_shape;
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

    /// Gradients of [`Linear::forward`], each added to what is there: `dx += w * dy`, `dw += x * dy`,
    /// `db += dy`.
    ///
    /// `x`, `dx` N x C x H x W; `w`, `dw` `[out, C*H*W]`; `dy` N x out x 1 x 1; `db` `[out]`, present
    /// exactly where [`Linear::bias`] is set.
    #[cfg(feature = "train")]
    pub fn backward<T: Real>(
        &self,
        x: &Tensor<T>,
        w: &[T],
        dy: &Tensor<T>,
        mut dx: Option<&mut Tensor<T>>,
        dw: &mut [T],
        db: Option<&mut [T]>,
    ) -> Result<()> {
        let out = self.check(x.shape, w)?;
        expect_shape("linear dy", dy.shape, out)?;
        if let Some(dx) = &dx {
            expect_shape("linear dx", dx.shape, x.shape)?;
        }
        expect_len("linear dw", dw, w.len())?;
        expect_bias("linear", self.bias, db.as_deref(), out.c)?;
        if let Some(db) = db {
            for (n, o, _, _) in indices(out) {
                db[o] += dy.at(n, o, 0, 0);
            }
        }
        for (n, c, iy, ix) in indices(x.shape) {
            let feature = (c * x.shape.h + iy) * x.shape.w + ix;
            for o in 0..out.c {
                let d = dy.at(n, o, 0, 0);
                let k = o * self.in_features + feature;
                dw[k] += x.at(n, c, iy, ix) * d;
                if let Some(dx) = &mut dx {
                    *dx.at_mut(n, c, iy, ix) += w[k] * d;
                }
            }
        }
        Ok(())
    }

    /// Output shape, where weight and input agree.
    fn check<T>(&self, x: Shape, w: &[T]) -> Result<Shape> {
        expect_len("linear weight", w, self.out_features * self.in_features)?;
        self.out_shape(x)
    }
}
