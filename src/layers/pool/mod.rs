//! Max pooling and global average pooling.

pub(crate) mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;

#[cfg(feature = "train")]
use super::expect_shape;
use super::window::{indices, Window};
use super::Real;
use crate::error::{Error, Result};
use crate::shape::{conv_out, Shape, Tensor};

/// Maximum over a window; padding never wins (it counts as minus infinity).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MaxPool {
    /// Window height and width.
    pub kernel: [usize; 2],
    /// Vertical and horizontal stride.
    pub stride: [usize; 2],
    /// Padding: top, left, bottom, right; each less than the kernel.
    pub padding: [usize; 4],
}

impl MaxPool {
    /// Square window.
    pub const fn new(kernel: usize, stride: usize, padding: usize) -> Self {
        Self { kernel: [kernel; 2], stride: [stride; 2], padding: [padding; 4] }
    }

    /// Output shape; every window holds at least one value that is not padding.
    pub fn out_shape(&self, x: Shape) -> Result<Shape> {
        let [t, l, b, r] = self.padding;
        if t.max(b) >= self.kernel[0] || l.max(r) >= self.kernel[1] {
            return Err(Error::InvalidModel(format!(
                "pool padding {:?} must be less than the kernel {:?}",
                self.padding, self.kernel
            )));
        }
        let h = conv_out(x.h, self.kernel[0], self.stride[0], 1, t, b);
        let w = conv_out(x.w, self.kernel[1], self.stride[1], 1, l, r);
        match (h, w) {
            (Some(h), Some(w)) => Ok(Shape::new(x.n, x.c, h, w)),
            _ => Err(Error::InvalidModel(format!("pool window {:?} does not fit input {x}", self.kernel))),
        }
    }

    /// The largest value under each window (PyTorch's `max_pool2d`, `ceil_mode=False`); NaN wins.
    ///
    /// `x` N x C x H x W. Returns N x C x OH x OW.
    pub fn forward<T: Real>(&self, x: &Tensor<T>) -> Result<Tensor<T>> {
        let out = self.out_shape(x.shape)?;
        let window = self.sliding_over(x.shape);
        let mut y = Tensor::zeros(out);
        for (n, c, oy, ox) in indices(out) {
            *y.at_mut(n, c, oy, ox) = match largest(x, window, n, c, oy, ox) {
                Some(i) => x.data[i],
                None => T::of(f64::NEG_INFINITY),
            };
        }
        Ok(y)
    }

    /// Gradient of [`MaxPool::forward`], added to `dx`: each window's goes to its largest value, the
    /// first in scan order among equals.
    ///
    /// `x`, `dx` N x C x H x W; `dy` N x C x OH x OW.
    #[cfg(feature = "train")]
    pub fn backward<T: Real>(&self, x: &Tensor<T>, dy: &Tensor<T>, dx: &mut Tensor<T>) -> Result<()> {
        let out = self.out_shape(x.shape)?;
        expect_shape("max_pool dy", dy.shape, out)?;
        expect_shape("max_pool dx", dx.shape, x.shape)?;
        let window = self.sliding_over(x.shape);
        for (n, c, oy, ox) in indices(out) {
            if let Some(i) = largest(x, window, n, c, oy, ox) {
                dx.data[i] += dy.at(n, c, oy, ox);
            }
        }
        Ok(())
    }

    fn sliding_over(&self, x: Shape) -> Window {
        let [top, left, ..] = self.padding;
        Window {
            map: [x.h, x.w],
            kernel: self.kernel,
            stride: self.stride,
            dilation: [1, 1],
            pad: [top, left],
        }
    }
}

/// Index into `x` of the largest value under window (`oy`, `ox`), the first in scan order among
/// equals as in PyTorch; None where the map is empty.
fn largest<T: Real>(
    x: &Tensor<T>,
    window: Window,
    n: usize,
    c: usize,
    oy: usize,
    ox: usize,
) -> Option<usize> {
    let mut best: Option<usize> = None;
    for (_, iy, ix) in window.taps(oy, ox) {
        let i = x.shape.at(n, c, iy, ix);
        if best.is_none_or(|b| x.data[i] > x.data[b] || x.data[i].to_f64().is_nan()) {
            best = Some(i);
        }
    }
    best
}

/// Mean over the rows and columns of every channel (PyTorch's `adaptive_avg_pool2d` to 1 x 1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GlobalAvgPool;

impl GlobalAvgPool {
    /// Output shape N x C x 1 x 1.
    pub fn out_shape(&self, x: Shape) -> Result<Shape> {
        if x.h == 0 || x.w == 0 {
            return Err(Error::InvalidModel(format!("global average pool of the empty map {x}")));
        }
        Ok(Shape { h: 1, w: 1, ..x })
    }

    /// `y[n,c] = sum over y,x of x[n,c,y,x] / (H*W)`.
    ///
    /// `x` N x C x H x W. Returns N x C x 1 x 1.
    pub fn forward<T: Real>(&self, x: &Tensor<T>) -> Result<Tensor<T>> {
        let mut y = Tensor::zeros(self.out_shape(x.shape)?);
        for (n, c, iy, ix) in indices(x.shape) {
            *y.at_mut(n, c, 0, 0) += x.at(n, c, iy, ix);
        }
        let area = T::of((x.shape.h * x.shape.w) as f64);
        for v in &mut y.data {
            *v = *v / area;
        }
        Ok(y)
    }

    /// Gradient of [`GlobalAvgPool::forward`], added to `dx`: `dx[n,c,y,x] += dy[n,c] / (H*W)`.
    ///
    /// `dy` N x C x 1 x 1; `dx` N x C x H x W.
    #[cfg(feature = "train")]
    pub fn backward<T: Real>(&self, dy: &Tensor<T>, dx: &mut Tensor<T>) -> Result<()> {
        expect_shape("global_avg_pool dy", dy.shape, self.out_shape(dx.shape)?)?;
        let area = T::of((dx.shape.h * dx.shape.w) as f64);
        for (n, c, iy, ix) in indices(dx.shape) {
            *dx.at_mut(n, c, iy, ix) += dy.at(n, c, 0, 0) / area;
        }
        Ok(())
    }
}
