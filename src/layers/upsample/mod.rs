//! Nearest and bilinear interpolation, by a factor or to another map's size.

pub(crate) mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;

#[cfg(feature = "train")]
use super::expect_shape;
use super::window::indices;
use super::Real;
use crate::error::{Error, Result};
use crate::shape::{Shape, Tensor};

/// How values between pixels are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Interpolation {
    /// Source index floor(dst * in/out) (PyTorch's `nearest`).
    Nearest,
    /// Half-pixel centres, edges clamped (PyTorch's `bilinear`, `align_corners=False`).
    Bilinear,
}

/// The target size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum UpsampleTo {
    /// Rows and columns times these.
    Factor([usize; 2]),
    /// The rows and columns of the second input.
    SizeOfSecond,
}

/// Interpolation of the first input.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Upsample {
    /// Method.
    pub mode: Interpolation,
    /// Target size.
    pub to: UpsampleTo,
}

impl Upsample {
    /// Output shape; `SizeOfSecond` takes two inputs, `Factor` one.
    pub fn out_shape(&self, inputs: &[Shape]) -> Result<Shape> {
        match (self.to, inputs) {
            (UpsampleTo::Factor([fy, fx]), [x]) => {
                // A size beyond usize stays one: too large for whoever allocates it.
                Ok(Shape { h: x.h.saturating_mul(fy), w: x.w.saturating_mul(fx), ..*x })
            }
            (UpsampleTo::SizeOfSecond, [x, like]) => Ok(Shape { h: like.h, w: like.w, ..*x }),
            _ => Err(Error::InvalidModel(format!("upsample {:?} got {} inputs", self.to, inputs.len()))),
        }
    }

    /// The interpolated map (PyTorch's `interpolate`, `align_corners=False`).
    ///
    /// `x` N x C x H x W; `like` is the shape of the second input, present exactly for
    /// [`UpsampleTo::SizeOfSecond`]. Returns N x C x OH x OW.
    pub fn forward<T: Real>(&self, x: &Tensor<T>, like: Option<Shape>) -> Result<Tensor<T>> {
        let out = match like {
            Some(like) => self.check(&[x.shape, like])?,
            None => self.check(&[x.shape])?,
        };
        let mut y = Tensor::zeros(out);
        for (n, c, oy, ox) in indices(out) {
            for (iy, wy) in self.sources::<T>(oy, x.shape.h, out.h) {
                for (ix, wx) in self.sources::<T>(ox, x.shape.w, out.w) {
                    *y.at_mut(n, c, oy, ox) += wy * wx * x.at(n, c, iy, ix);
                }
            }
        }
        Ok(y)
    }

    /// Gradient of [`Upsample::forward`], added to `dx`: every output value's goes back to the sources
    /// it is made of, by their weights.
    ///
    /// `dy` N x C x OH x OW; `dx` N x C x H x W. With [`UpsampleTo::SizeOfSecond`] the second input
    /// gives its size alone and has no gradient.
    #[cfg(feature = "train")]
    pub fn backward<T: Real>(&self, dy: &Tensor<T>, dx: &mut Tensor<T>) -> Result<()> {
        let out = match self.to {
            UpsampleTo::SizeOfSecond => self.check(&[dx.shape, dy.shape])?,
            UpsampleTo::Factor(_) => self.check(&[dx.shape])?,
        };
        expect_shape("upsample dy", dy.shape, out)?;
        let input = dx.shape;
        for (n, c, oy, ox) in indices(out) {
            for (iy, wy) in self.sources::<T>(oy, input.h, out.h) {
                for (ix, wx) in self.sources::<T>(ox, input.w, out.w) {
                    *dx.at_mut(n, c, iy, ix) += wy * wx * dy.at(n, c, oy, ox);
                }
            }
        }
        Ok(())
    }

    /// Output shape, where there is something to interpolate.
    fn check(&self, inputs: &[Shape]) -> Result<Shape> {
        let out = self.out_shape(inputs)?;
        if (inputs[0].h == 0 || inputs[0].w == 0) && !out.is_empty() {
            return Err(Error::InvalidModel(format!("upsample of the empty map {}", inputs[0])));
        }
        Ok(out)
    }

    /// The source indices along one axis that value `dst` of the output is made of, with their weights.
    fn sources<T: Real>(&self, dst: usize, input: usize, output: usize) -> impl Iterator<Item = (usize, T)> {
        let one = T::of(1.0);
        let (near, far) = match self.mode {
            Interpolation::Nearest => ((nearest_source(dst, input, output), one), None),
            Interpolation::Bilinear => {
                let (low, high, fraction) = bilinear_source(dst, input, output);
                ((low, one - fraction), Some((high, fraction)))
            }
        };
        std::iter::once(near).chain(far)
    }
}

/// Source index of `dst` along an axis that goes from `input` to `output` values:
/// `floor(dst * (input / output))`, reckoned in f32 as PyTorch's `nearest` does.
pub fn nearest_source(dst: usize, input: usize, output: usize) -> usize {
    let scale = input as f32 / output as f32;
    ((dst as f32 * scale) as usize).min(input - 1)
}

/// Source indices `low`, `high` of `dst` along an axis that goes from `input` to `output` values, and
/// the weight of `high`: the source position is `(dst + 0.5) * input / output - 0.5`, not below zero
/// (PyTorch's `bilinear`, `align_corners=False`).
pub fn bilinear_source<T: Real>(dst: usize, input: usize, output: usize) -> (usize, usize, T) {
    let scale = T::of(input as f64) / T::of(output as f64);
    let position = (T::of(dst as f64) + T::of(0.5)) * scale - T::of(0.5);
    let position = if position < T::default() { T::default() } else { position };
    let low = (position.to_f64() as usize).min(input - 1);
    (low, (low + 1).min(input - 1), position - T::of(low as f64))
}
