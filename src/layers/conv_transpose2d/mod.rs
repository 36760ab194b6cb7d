//! 2-D transposed convolution (the gradient of a convolution with respect to its input).

use crate::error::{Error, Result};
use crate::shape::{conv_transpose_out, Shape};

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
            (Some(h), Some(w)) => Ok(Shape::new(x.n, self.out_channels, h, w)),
            _ => Err(Error::InvalidModel(format!("conv_transpose2d leaves nothing of input {x}"))),
        }
    }

    /// Multiply-adds for this input (every input value meets every weight of its group).
    pub fn macs(&self, input: Shape) -> u64 {
        input.len() as u64 * (self.out_channels / self.groups * self.kernel[0] * self.kernel[1]) as u64
    }
}
