//! 2-D convolution: groups, depthwise, dilation, stride, per-axis kernel and asymmetric padding.

pub(crate) mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;

#[cfg(feature = "train")]
use super::expect_shape;
use super::window::{indices, Window};
use super::{expect_bias, expect_groups, expect_len, Real};
use crate::error::{Error, Result};
use crate::shape::{conv_out, Shape, Tensor};

/// Parameters of a convolution. Weight `[out, in/groups, kh, kw]`, bias `[out]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Conv2d {
    /// Input channels.
    pub in_channels: usize,
    /// Output channels.
    pub out_channels: usize,
    /// Kernel height and width.
    pub kernel: [usize; 2],
    /// Vertical and horizontal stride.
    pub stride: [usize; 2],
    /// Vertical and horizontal dilation.
    pub dilation: [usize; 2],
    /// Zero padding: top, left, bottom, right.
    pub padding: [usize; 4],
    /// Groups; `in_channels` of them is a depthwise convolution.
    pub groups: usize,
    /// Whether a bias is added.
    pub bias: bool,
}

impl Conv2d {
    /// Square kernel, stride 1, "same" padding for odd kernels, no bias.
    pub const fn new(in_channels: usize, out_channels: usize, kernel: usize) -> Self {
        let p = kernel / 2;
        Self {
            in_channels,
            out_channels,
            kernel: [kernel, kernel],
            stride: [1, 1],
            dilation: [1, 1],
            padding: [p, p, p, p],
            groups: 1,
            bias: false,
        }
    }

    /// Kernel `kh` x `kw` with "same" padding for odd sizes.
    pub const fn rect(in_channels: usize, out_channels: usize, kh: usize, kw: usize) -> Self {
        let mut c = Self::new(in_channels, out_channels, 1);
        c.kernel = [kh, kw];
        c.padding = [kh / 2, kw / 2, kh / 2, kw / 2];
        c
    }

    /// Depthwise, square kernel, "same" padding.
    pub const fn depthwise(channels: usize, kernel: usize) -> Self {
        Self::new(channels, channels, kernel).groups(channels)
    }

    /// With this stride on both axes.
    pub const fn stride(mut self, s: usize) -> Self {
        self.stride = [s, s];
        self
    }

    /// With this dilation on both axes and the padding that keeps the size at stride 1.
    pub const fn dilation(mut self, d: usize) -> Self {
        self.dilation = [d, d];
        let [ph, pw] = [self.kernel[0] / 2 * d, self.kernel[1] / 2 * d];
        self.padding = [ph, pw, ph, pw];
        self
    }

    /// With this padding: top, left, bottom, right.
    pub const fn padding(mut self, padding: [usize; 4]) -> Self {
        self.padding = padding;
        self
    }

    /// With this many groups.
    pub const fn groups(mut self, groups: usize) -> Self {
        self.groups = groups;
        self
    }

    /// With a bias.
    pub const fn bias(mut self) -> Self {
        self.bias = true;
        self
    }

    /// One filter a channel.
    pub const fn is_depthwise(&self) -> bool {
        self.groups > 1 && self.groups == self.in_channels && self.in_channels == self.out_channels
    }

    /// Weight shape `[out, in/groups, kh, kw]`.
    pub fn weight_shape(&self) -> [usize; 4] {
        [self.out_channels, self.in_channels / self.groups, self.kernel[0], self.kernel[1]]
    }

    /// Rows and columns of the window, dilation counted.
    pub fn window(&self) -> [usize; 2] {
        [0, 1].map(|a| self.dilation[a] * (self.kernel[a] - 1) + 1)
    }

    /// Output shape.
    pub fn out_shape(&self, x: Shape) -> Result<Shape> {
        expect_groups("conv2d", self.groups, self.in_channels, self.out_channels)?;
        if x.c != self.in_channels {
            return Err(Error::InvalidModel(format!(
                "conv2d expects {} channels, got {}",
                self.in_channels, x.c
            )));
        }
        let [t, l, b, r] = self.padding;
        let h = conv_out(x.h, self.kernel[0], self.stride[0], self.dilation[0], t, b);
        let w = conv_out(x.w, self.kernel[1], self.stride[1], self.dilation[1], l, r);
        match (h, w) {
            (Some(h), Some(w)) => Ok(Shape::new(x.n, self.out_channels, h, w)),
            _ => {
                Err(Error::InvalidModel(format!("conv2d window {:?} does not fit input {x}", self.window())))
            }
        }
    }

    /// Multiply-adds for this output.
    pub fn macs(&self, out: Shape) -> u64 {
        let per_value = self.in_channels / self.groups * self.kernel[0] * self.kernel[1];
        out.len() as u64 * per_value as u64
    }

    /// The plain convolution (cross-correlation, as PyTorch's `conv2d`):
    /// `y[n,o,oy,ox] = b[o] + sum over i,ky,kx of w[o,i,ky,kx] * x[n, g*I+i, oy*sy+ky*dy-top, ox*sx+kx*dx-left]`
    /// with `I = in/groups` and `g` the group of output channel `o`; values in the padding are zero.
    ///
    /// `x` N x in x H x W; `w` `[out, in/groups, kh, kw]`; `b` `[out]`, present exactly where
    /// [`Conv2d::bias`] is set. Returns N x out x OH x OW.
    ///
    /// ```
    /// use farface::layers::Conv2d;
    /// use farface::shape::{Shape, Tensor};
    ///
    /// // A vertical edge: 1 where the right neighbour is brighter than the left one.
    /// let x = Tensor::from_nchw(Shape::new(1, 1, 1, 5), &[0.0, 0.0, 1.0, 1.0, 1.0]);
    /// let y = Conv2d::rect(1, 1, 1, 3).padding([0; 4]).forward(&x, &[-1.0, 0.0, 1.0], None)?;
    /// assert_eq!(y.data, [1.0, 1.0, 0.0]);
    /// # Ok::<(), farface::Error>(())
    /// ```
    pub fn forward<T: Real>(&self, x: &Tensor<T>, w: &[T], b: Option<&[T]>) -> Result<Tensor<T>> {
        let out = self.check(x.shape, w)?;
        expect_bias("conv2d", self.bias, b, out.c)?;
        let (in_group, out_group) = (self.in_channels / self.groups, self.out_channels / self.groups);
        let taps = self.kernel[0] * self.kernel[1];
        let window = self.sliding_over(x.shape);
        let mut y = Tensor::zeros(out);
        for (n, o, oy, ox) in indices(out) {
            let group = o / out_group;
            let mut sum = b.map_or(T::default(), |b| b[o]);
            for (tap, iy, ix) in window.taps(oy, ox) {
                for i in 0..in_group {
                    sum += w[(o * in_group + i) * taps + tap] * x.at(n, group * in_group + i, iy, ix);
                }
            }
            *y.at_mut(n, o, oy, ox) = sum;
        }
        Ok(y)
    }

    /// Gradients of [`Conv2d::forward`], each added to what is there:
    /// `dx += w * dy`, `dw += x * dy`, `db += dy` over every product the forward pass makes.
    ///
    /// `x`, `dx` N x in x H x W; `w`, `dw` `[out, in/groups, kh, kw]`; `dy` N x out x OH x OW; `db`
    /// `[out]`, present exactly where [`Conv2d::bias`] is set.
    #[cfg(feature = "train")]
    pub fn backward<T: Real>(
        &self,
        x: &Tensor<T>,
        w: &[T],
        dy: &Tensor<T>,
        mut dx: Option<&mut Tensor<T>>,
        dw: &mut [T],
        mut db: Option<&mut [T]>,
    ) -> Result<()> {
        let out = self.check(x.shape, w)?;
        expect_shape("conv2d dy", dy.shape, out)?;
        if let Some(dx) = &dx {
            expect_shape("conv2d dx", dx.shape, x.shape)?;
        }
        expect_len("conv2d dw", dw, w.len())?;
        expect_bias("conv2d", self.bias, db.as_deref(), out.c)?;
        let (in_group, out_group) = (self.in_channels / self.groups, self.out_channels / self.groups);
        let taps = self.kernel[0] * self.kernel[1];
        let window = self.sliding_over(x.shape);
        for (n, o, oy, ox) in indices(out) {
            let group = o / out_group;
            let d = dy.at(n, o, oy, ox);
            if let Some(db) = &mut db {
                db[o] += d;
            }
            for (tap, iy, ix) in window.taps(oy, ox) {
                for i in 0..in_group {
                    let c = group * in_group + i;
                    let k = (o * in_group + i) * taps + tap;
                    dw[k] += x.at(n, c, iy, ix) * d;
                    if let Some(dx) = &mut dx {
                        *dx.at_mut(n, c, iy, ix) += w[k] * d;
                    }
                }
            }
        }
        Ok(())
    }

    /// Output shape, where weight, groups and input agree.
    fn check<T>(&self, x: Shape, w: &[T]) -> Result<Shape> {
        expect_groups("conv2d", self.groups, self.in_channels, self.out_channels)?;
        expect_len("conv2d weight", w, self.weight_shape().iter().product())?;
        self.out_shape(x)
    }

    fn sliding_over(&self, x: Shape) -> Window {
        let [top, left, ..] = self.padding;
        Window {
            map: [x.h, x.w],
            kernel: self.kernel,
            stride: self.stride,
            dilation: self.dilation,
            pad: [top, left],
        }
    }
}
