//! Layers that join or cut maps: add, concat, crop.

use crate::error::{Error, Result};
use crate::shape::Shape;

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
}

impl Crop {
    /// Output shape.
    pub fn out_shape(&self, inputs: &[Shape]) -> Result<Shape> {
        match inputs {
            [x, like] if self.top + like.h <= x.h && self.left + like.w <= x.w => {
                Ok(Shape { h: like.h, w: like.w, ..*x })
            }
            _ => Err(Error::InvalidModel(format!("crop at {},{} does not fit {inputs:?}", self.top, self.left))),
        }
    }
}
