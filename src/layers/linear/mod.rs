//! Fully connected layer.

use crate::error::{Error, Result};
use crate::shape::Shape;

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
            return Err(Error::InvalidModel(format!("linear expects {} features, got {x}", self.in_features)));
        }
        Ok(Shape::new(x.n, self.out_features, 1, 1))
    }

    /// Multiply-adds for this output.
    pub fn macs(&self, out: Shape) -> u64 {
        out.len() as u64 * self.in_features as u64
    }
}
