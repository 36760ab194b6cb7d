//! The layers: what each computes, its parameters, its shape, and the plain loops that define it.
//!
//! Every folder holds one operation. `mod.rs` is the definition: parameters, output shape, plain
//! forward and (feature `train`) plain backward, generic over [`Real`] so that gradients are
//! checked in f64. `cpu.rs` lowers the layer to the fast kernels of [`crate::cpu`]. The plain loops
//! are the reference that every kernel is tested against; nothing at run time calls them but tests.
//!
//! Tensors are channels-last ([`Tensor`]); weights keep PyTorch's order so that public
//! checkpoints load without a permutation table. Every backward accumulates (`+=`) into the
//! gradients it is given, because a feature map that fans out receives several.
//!
//! The calls have one pattern: `forward(inputs, weight, bias)` returns the output,
//! `backward(what the layer needs of its inputs or output, dy, dx, dw, db)` adds to the gradients.
//! Both check every size first and name what does not fit.
//!
//! ```
//! use farface::layers::{Activation, Conv2d, Layer, MaxPool};
//! use farface::shape::{Shape, Tensor};
//!
//! let x = Tensor::from_nchw(Shape::new(1, 1, 2, 2), &[1.0_f32, -2.0, 3.0, -4.0]);
//! let conv = Conv2d::new(1, 2, 1).bias();
//! let y = conv.forward(&x, &[1.0, -1.0], Some(&[0.0, 0.5]))?; // weight [2, 1, 1, 1], bias [2]
//! let y = Activation::Relu.forward(&y)?;
//! let y = MaxPool::new(2, 2, 0).forward(&y)?;
//! assert_eq!(y.shape, Shape::new(1, 2, 1, 1));
//! assert_eq!(y.data, [3.0, 4.5]);
//!
//! // The same sizes without any values, as the graph finds them.
//! assert_eq!(Layer::Conv2d(conv).out_shape(&[x.shape])?, Shape::new(1, 2, 2, 2));
//! # Ok::<(), farface::Error>(())
//! ```

pub mod activation;
pub mod batchnorm;
pub mod combine;
pub mod conv2d;
pub mod conv_transpose2d;
pub mod linear;
pub mod pool;
pub mod roi_align;
pub mod upsample;
mod window;

use crate::error::{Error, Result};
use crate::shape::Shape;
#[cfg(doc)]
use crate::shape::Tensor;

pub use activation::Activation;
pub use batchnorm::BatchNorm;
#[cfg(feature = "train")]
pub use batchnorm::BatchStats;
pub use combine::{Add, Concat, Crop};
pub use conv2d::Conv2d;
pub use conv_transpose2d::ConvTranspose2d;
pub use linear::Linear;
pub use pool::{GlobalAvgPool, MaxPool};
pub use roi_align::RoiAlign;
pub use upsample::{Interpolation, Upsample, UpsampleTo};

/// Scalar of the reference loops: f32 as the engine runs, f64 for finite differences.
pub trait Real:
    Copy
    + Default
    + PartialOrd
    + std::fmt::Debug
    + std::ops::Add<Output = Self>
    + std::ops::Sub<Output = Self>
    + std::ops::Mul<Output = Self>
    + std::ops::Div<Output = Self>
    + std::ops::Neg<Output = Self>
    + std::ops::AddAssign
    + std::ops::SubAssign
    + std::ops::MulAssign
{
    /// Converts a constant.
    fn of(v: f64) -> Self;
    /// As f64.
    fn to_f64(self) -> f64;
    /// e to the power of self.
    fn exp(self) -> Self;
    /// Square root.
    fn sqrt(self) -> Self;
    /// Natural logarithm.
    fn ln(self) -> Self;
    /// Natural logarithm of 1 + self, exact near 0 too.
    fn ln_1p(self) -> Self;
}

macro_rules! real {
    ($t:ty) => {
        impl Real for $t {
            #[inline]
            fn of(v: f64) -> Self {
                v as $t
            }
            #[inline]
            fn to_f64(self) -> f64 {
                self as f64
            }
            #[inline]
            fn exp(self) -> Self {
                <$t>::exp(self)
            }
            #[inline]
            fn sqrt(self) -> Self {
                <$t>::sqrt(self)
            }
            #[inline]
            fn ln(self) -> Self {
                <$t>::ln(self)
            }
            #[inline]
            fn ln_1p(self) -> Self {
                <$t>::ln_1p(self)
            }
        }
    };
}
real!(f32);
real!(f64);

/// One operation of a network. The graph holds these; parameters live beside it, by name.
#[derive(Clone, Debug, PartialEq)]
pub enum Layer {
    /// Convolution.
    Conv2d(Conv2d),
    /// Transposed convolution.
    ConvTranspose2d(ConvTranspose2d),
    /// Batch normalisation.
    BatchNorm(BatchNorm),
    /// Element-wise activation, or softmax over channels.
    Activation(Activation),
    /// Maximum over a window.
    MaxPool(MaxPool),
    /// Mean over rows and columns.
    GlobalAvgPool(GlobalAvgPool),
    /// Interpolation to a size or by a factor.
    Upsample(Upsample),
    /// Element-wise sum of two maps of equal shape.
    Add(Add),
    /// Concatenation along channels.
    Concat(Concat),
    /// Cut to the size of the second input.
    Crop(Crop),
    /// Region features on a regular grid (second input: boxes).
    RoiAlign(RoiAlign),
    /// Fully connected layer over flattened inputs.
    Linear(Linear),
}

impl Layer {
    /// Output shape from the inputs' shapes; the error says which rule is broken.
    pub fn out_shape(&self, inputs: &[Shape]) -> Result<Shape> {
        match self {
            Layer::Conv2d(l) => l.out_shape(one(inputs)?),
            Layer::ConvTranspose2d(l) => l.out_shape(one(inputs)?),
            Layer::BatchNorm(l) => l.out_shape(one(inputs)?),
            Layer::Activation(l) => l.out_shape(one(inputs)?),
            Layer::MaxPool(l) => l.out_shape(one(inputs)?),
            Layer::GlobalAvgPool(l) => l.out_shape(one(inputs)?),
            Layer::Upsample(l) => l.out_shape(inputs),
            Layer::Add(l) => l.out_shape(inputs),
            Layer::Concat(l) => l.out_shape(inputs),
            Layer::Crop(l) => l.out_shape(inputs),
            Layer::RoiAlign(l) => l.out_shape(inputs),
            Layer::Linear(l) => l.out_shape(one(inputs)?),
        }
    }

    /// Multiply-adds for the given output shape (convolutions and linear layers; the rest count 0,
    /// as the papers count).
    pub fn macs(&self, input: Shape, output: Shape) -> u64 {
        match self {
            Layer::Conv2d(l) => l.macs(output),
            Layer::ConvTranspose2d(l) => l.macs(input),
            Layer::Linear(l) => l.macs(output),
            _ => 0,
        }
    }

    /// Short name for listings.
    pub fn kind(&self) -> &'static str {
        match self {
            Layer::Conv2d(l) if l.is_depthwise() => "depthwise",
            Layer::Conv2d(_) => "conv2d",
            Layer::ConvTranspose2d(_) => "conv_transpose2d",
            Layer::BatchNorm(_) => "batchnorm",
            Layer::Activation(_) => "activation",
            Layer::MaxPool(_) => "max_pool",
            Layer::GlobalAvgPool(_) => "global_avg_pool",
            Layer::Upsample(_) => "upsample",
            Layer::Add(_) => "add",
            Layer::Concat(_) => "concat",
            Layer::Crop(_) => "crop",
            Layer::RoiAlign(_) => "roi_align",
            Layer::Linear(_) => "linear",
        }
    }
}

fn one(inputs: &[Shape]) -> Result<Shape> {
    match inputs {
        [s] => Ok(*s),
        _ => Err(Error::InvalidModel(format!("layer takes one input, got {}", inputs.len()))),
    }
}

/// Errors unless a parameter (or its gradient) holds `expected` values.
fn expect_len<T>(what: &str, values: &[T], expected: usize) -> Result<()> {
    if values.len() == expected {
        return Ok(());
    }
    Err(Error::InvalidArgument(format!("{what} must hold {expected} values, got {}", values.len())))
}

/// Errors unless the bias is there exactly where the layer has one, with a value for each output.
fn expect_bias<T>(layer: &str, has_bias: bool, b: Option<&[T]>, outputs: usize) -> Result<()> {
    match b {
        Some(b) if has_bias => expect_len(&format!("{layer} bias"), b, outputs),
        None if !has_bias => Ok(()),
        _ => Err(Error::InvalidArgument(format!(
            "{layer} {} a bias, got {}",
            if has_bias { "has" } else { "has not" },
            if b.is_some() { "one" } else { "none" }
        ))),
    }
}

/// Errors unless the groups split both channel counts evenly.
fn expect_groups(layer: &str, groups: usize, inputs: usize, outputs: usize) -> Result<()> {
    if groups > 0 && inputs.is_multiple_of(groups) && outputs.is_multiple_of(groups) {
        return Ok(());
    }
    Err(Error::InvalidModel(format!(
        "{layer} cannot split {inputs} -> {outputs} channels into {groups} groups"
    )))
}

/// Errors unless a gradient has the shape of what it is the gradient of.
#[cfg(feature = "train")]
fn expect_shape(what: &str, got: Shape, expected: Shape) -> Result<()> {
    if got == expected {
        return Ok(());
    }
    Err(Error::InvalidArgument(format!("{what} must be {expected}, got {got}")))
}
