//! 2-D transposed convolution (the gradient of a convolution with respect to its input).

pub(crate) mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;

#[cfg(feature = "train")]
use super::expect_shape;
use super::window::{indices, Window};
use super::{expect_bias, expect_groups, expect_len, Real};
use crate::error::{Error, Result};
use crate::shape::{conv_transpose_out, Shape, Tensor};

/// Parameters. Weight `[in, out/groups, kh, kw]` (PyTorch's order), bias `[out]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ConvTranspose2d {
    /// Input channels.
    pub in_channels: usize,
    /// Output channels.
    pub out_channels: usize,
    /// Kernel height and width.
    pub kernel: [usize; 2],
    /// Vertical and horizontal stride.
    pub stride: [usize; 2],
    /// Padding taken off the output: top, left, bottom, right.
    pub padding: [usize; 4],
    /// Groups; `in_channels` of them with one output each is depthwise (HR's bilinear upsampling).
    pub groups: usize,
    /// Whether a bias is added.
    pub bias: bool,
}

impl ConvTranspose2d {
    /// Weight shape `[in, out/groups, kh, kw]`.
    pub fn weight_shape(&self) -> [usize; 4] {
        [self.in_channels, self.out_channels / self.groups, self.kernel[0], self.kernel[1]]
    }

    /// Output shape.
    pub fn out_shape(&self, x: Shape) -> Result<Shape> {
        expect_groups("conv_transpose2d", self.groups, self.in_channels, self.out_channels)?;
        if x.c != self.in_channels {
            return Err(Error::InvalidModel(format!(
                "conv_transpose2d expects {} channels, got {}",
                self.in_channels, x.c
            )));
        }
        let [t, l, b, r] = self.padding;
        let h = conv_transpose_out(x.h, self.kernel[0], self.stride[0], 1, t, b, 0);
        let w = conv_transpose_out(x.w, self.kernel[1], self.stride[1], 1, l, r, 0);
        match (h, w) {
            _ if self.stride.contains(&0) => Err(Error::InvalidModel("conv_transpose2d of stride 0".into())),
            (Some(h), Some(w)) => Ok(Shape::new(x.n, self.out_channels, h, w)),
            _ => Err(Error::InvalidModel(format!("conv_transpose2d leaves nothing of input {x}"))),
        }
    }

    /// Multiply-adds for this input (every input value meets every weight of its group).
    pub fn macs(&self, input: Shape) -> u64 {
        input.len() as u64 * (self.out_channels / self.groups * self.kernel[0] * self.kernel[1]) as u64
    }

    /// The plain transposed convolution (PyTorch's `conv_transpose2d`): every input value adds its
    /// kernel to the output, `y[n, g*O+o, iy*sy+ky-top, ix*sx+kx-left] += w[i,o,ky,kx] * x[n,i,iy,ix]`
    /// with `O = out/groups` and `g` the group of input channel `i`; what falls into the padding is lost.
    ///
    /// `x` N x in x H x W; `w` `[in, out/groups, kh, kw]`; `b` `[out]`, present exactly where
    /// [`ConvTranspose2d::bias`] is set. Returns N x out x OH x OW.
    pub fn forward<T: Real>(&self, x: &Tensor<T>, w: &[T], b: Option<&[T]>) -> Result<Tensor<T>> {
        let out = self.check(x.shape, w)?;
        expect_bias("conv_transpose2d", self.bias, b, out.c)?;
        let (in_group, out_group) = (self.in_channels / self.groups, self.out_channels / self.groups);
        let taps = self.kernel[0] * self.kernel[1];
        let window = self.sliding_over(out);
        let mut y = Tensor::zeros(out);
        if let Some(b) = b {
            for (n, o, oy, ox) in indices(out) {
                *y.at_mut(n, o, oy, ox) = b[o];
            }
        }
        for (n, i, iy, ix) in indices(x.shape) {
            let group = i / in_group;
            for (tap, oy, ox) in window.taps(iy, ix) {
                for o in 0..out_group {
                    *y.at_mut(n, group * out_group + o, oy, ox) +=
                        w[(i * out_group + o) * taps + tap] * x.at(n, i, iy, ix);
                }
            }
        }
        Ok(y)
    }

    /// Gradients of [`ConvTranspose2d::forward`], each added to what is there:
    /// `dx += w * dy`, `dw += x * dy`, `db += dy` over every product the forward pass makes.
    ///
    /// `x`, `dx` N x in x H x W; `w`, `dw` `[in, out/groups, kh, kw]`; `dy` N x out x OH x OW; `db`
    /// `[out]`, present exactly where [`ConvTranspose2d::bias`] is set.
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
        expect_shape("conv_transpose2d dy", dy.shape, out)?;
        if let Some(dx) = &dx {
            expect_shape("conv_transpose2d dx", dx.shape, x.shape)?;
        }
        expect_len("conv_transpose2d dw", dw, w.len())?;
        expect_bias("conv_transpose2d", self.bias, db.as_deref(), out.c)?;
        let (in_group, out_group) = (self.in_channels / self.groups, self.out_channels / self.groups);
        let taps = self.kernel[0] * self.kernel[1];
        let window = self.sliding_over(out);
        if let Some(db) = db {
            for (n, o, oy, ox) in indices(out) {
                db[o] += dy.at(n, o, oy, ox);
            }
        }
        for (n, i, iy, ix) in indices(x.shape) {
            let group = i / in_group;
            for (tap, oy, ox) in window.taps(iy, ix) {
                for o in 0..out_group {
                    let d = dy.at(n, group * out_group + o, oy, ox);
                    let k = (i * out_group + o) * taps + tap;
                    dw[k] += x.at(n, i, iy, ix) * d;
                    if let Some(dx) = &mut dx {
                        *dx.at_mut(n, i, iy, ix) += w[k] * d;
                    }
                }
            }
        }
        Ok(())
    }

    /// Output shape, where weight, groups and input agree.
    fn check<T>(&self, x: Shape, w: &[T]) -> Result<Shape> {
        expect_groups("conv_transpose2d", self.groups, self.in_channels, self.out_channels)?;
        expect_len("conv_transpose2d weight", w, self.weight_shape().iter().product())?;
        self.out_shape(x)
    }

    /// The kernel slides over the output, one window for every input value.
    fn sliding_over(&self, out: Shape) -> Window {
        let [top, left, ..] = self.padding;
        Window {
            map: [out.h, out.w],
            kernel: self.kernel,
            stride: self.stride,
            dilation: [1, 1],
            pad: [top, left],
        }
    }
}
