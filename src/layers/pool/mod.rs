//! Max pooling.

use crate::error::{Error, Result};
use crate::shape::{conv_out, Shape};

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

    /// Output shape.
    pub fn out_shape(&self, x: Shape) -> Result<Shape> {
        let [t, l, b, r] = self.padding;
        let h = conv_out(x.h, self.kernel[0], self.stride[0], 1, t, b);
        let w = conv_out(x.w, self.kernel[1], self.stride[1], 1, l, r);
        match (h, w) {
            (Some(h), Some(w)) => Ok(Shape::new(x.n, x.c, h, w)),
            _ => Err(Error::InvalidModel(format!("pool window {:?} does not fit input {x}", self.kernel))),
        }
    }
}
