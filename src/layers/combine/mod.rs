//! Layers that join or cut maps: add, concat, crop.

pub(crate) mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;

#[cfg(feature = "train")]
use super::expect_shape;
use super::window::indices;
use super::Real;
use crate::error::{Error, Result};
use crate::shape::{Shape, Tensor};

/// Element-wise sum of two maps of equal shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Add;

/// Concatenation of any number of maps along channels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Concat;

/// The first input cut to the second's rows and columns, from this top-left corner.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Crop {
    /// First row kept.
    pub top: usize,
    /// First column kept.
    pub left: usize,
}

impl Add {
    /// Output shape.
    pub fn out_shape(&self, inputs: &[Shape]) -> Result<Shape> {
        match inputs {
            [a, b] if a == b => Ok(*a),
            _ => Err(Error::InvalidModel(format!("add needs two equal shapes, got {inputs:?}"))),
        }
    }

    /// `y = a + b`, all N x C x H x W.
    pub fn forward<T: Real>(&self, a: &Tensor<T>, b: &Tensor<T>) -> Result<Tensor<T>> {
        let out = self.out_shape(&[a.shape, b.shape])?;
        let sum = a.data.iter().zip(&b.data).map(|(&a, &b)| a + b).collect();
        Ok(Tensor::from_vec(out, sum))
    }

    /// Gradients of [`Add::forward`], added to what is there: `da += dy`, `db += dy`.
    ///
    /// All N x C x H x W. None where an input wants no gradient.
    #[cfg(feature = "train")]
    pub fn backward<T: Real>(
        &self,
        dy: &Tensor<T>,
        da: Option<&mut Tensor<T>>,
        db: Option<&mut Tensor<T>>,
    ) -> Result<()> {
        for dx in [&da, &db].into_iter().flatten() {
            expect_shape("add dx", dx.shape, dy.shape)?;
        }
        for dx in [da, db].into_iter().flatten() {
            for (dx, &dy) in dx.data.iter_mut().zip(&dy.data) {
                *dx += dy;
            }
        }
        Ok(())
    }
}

impl Concat {
    /// Output shape.
    pub fn out_shape(&self, inputs: &[Shape]) -> Result<Shape> {
        let first = *inputs.first().ok_or_else(|| Error::InvalidModel("concat of nothing".into()))?;
        if inputs.iter().any(|s| (s.n, s.h, s.w) != (first.n, first.h, first.w)) {
            return Err(Error::InvalidModel(format!("concat needs equal rows and columns, got {inputs:?}")));
        }
        Ok(Shape { c: inputs.iter().map(|s| s.c).sum(), ..first })
    }

    /// The maps one after another along channels.
    ///
    /// `inputs` N x C_i x H x W. Returns N x (sum of C_i) x H x W.
    pub fn forward<T: Real>(&self, inputs: &[&Tensor<T>]) -> Result<Tensor<T>> {
        let shapes: Vec<Shape> = inputs.iter().map(|x| x.shape).collect();
        let mut y = Tensor::zeros(self.out_shape(&shapes)?);
        let mut first = 0; // channel of y where this input begins
        for x in inputs {
            for (n, c, iy, ix) in indices(x.shape) {
                *y.at_mut(n, first + c, iy, ix) = x.at(n, c, iy, ix);
            }
            first += x.shape.c;
        }
        Ok(y)
    }

    /// Gradients of [`Concat::forward`], added to what is there: each input's is its run of channels
    /// of `dy`.
    ///
    /// `dy` N x (sum of C_i) x H x W; `dxs` N x C_i x H x W, in the order of the inputs.
    #[cfg(feature = "train")]
    pub fn backward<T: Real>(&self, dy: &Tensor<T>, dxs: &mut [&mut Tensor<T>]) -> Result<()> {
        let shapes: Vec<Shape> = dxs.iter().map(|dx| dx.shape).collect();
        expect_shape("concat dy", dy.shape, self.out_shape(&shapes)?)?;
        let mut first = 0; // channel of dy where this input begins
        for dx in dxs {
            for (n, c, iy, ix) in indices(dx.shape) {
                *dx.at_mut(n, c, iy, ix) += dy.at(n, first + c, iy, ix);
            }
            first += dx.shape.c;
        }
        Ok(())
    }
}

impl Crop {
    /// Output shape.
    pub fn out_shape(&self, inputs: &[Shape]) -> Result<Shape> {
        match inputs {
            [x, like]
                if self.top.checked_add(like.h).is_some_and(|end| end <= x.h)
                    && self.left.checked_add(like.w).is_some_and(|end| end <= x.w) =>
            {
                Ok(Shape { h: like.h, w: like.w, ..*x })
            }
            _ => Err(Error::InvalidModel(format!(
                "crop at {},{} does not fit {inputs:?}",
                self.top, self.left
            ))),
        }
    }

    /// `y[n,c,oy,ox] = x[n, c, top+oy, left+ox]`.
    ///
    /// `x` N x C x H x W; `like` is the shape of the second input. Returns N x C x like.h x like.w.
    pub fn forward<T: Real>(&self, x: &Tensor<T>, like: Shape) -> Result<Tensor<T>> {
        let out = self.out_shape(&[x.shape, like])?;
        let mut y = Tensor::zeros(out);
        for (n, c, oy, ox) in indices(out) {
            *y.at_mut(n, c, oy, ox) = x.at(n, c, self.top + oy, self.left + ox);
        }
        Ok(y)
    }

    /// Gradient of [`Crop::forward`], added to `dx`: `dx[n, c, top+oy, left+ox] += dy[n,c,oy,ox]`.
    ///
    /// `dy` N x C x OH x OW; `dx` N x C x H x W. The second input gives its size alone and has no
    /// gradient.
    #[cfg(feature = "train")]
    pub fn backward<T: Real>(&self, dy: &Tensor<T>, dx: &mut Tensor<T>) -> Result<()> {
        expect_shape("crop dy", dy.shape, self.out_shape(&[dx.shape, dy.shape])?)?;
        for (n, c, oy, ox) in indices(dy.shape) {
            *dx.at_mut(n, c, self.top + oy, self.left + ox) += dy.at(n, c, oy, ox);
        }
        Ok(())
    }
}
