//! Nearest and bilinear interpolation, by a factor or to another map's size.

use crate::error::{Error, Result};
use crate::shape::Shape;

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
            (UpsampleTo::Factor([fy, fx]), [x]) => Ok(Shape { h: x.h * fy, w: x.w * fx, ..*x }),
            (UpsampleTo::SizeOfSecond, [x, like]) => Ok(Shape { h: like.h, w: like.w, ..*x }),
            _ => Err(Error::InvalidModel(format!("upsample {:?} got {} inputs", self.to, inputs.len()))),
        }
    }
}
