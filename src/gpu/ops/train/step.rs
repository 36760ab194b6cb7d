//! The optimiser's step, averaged weights, the gradient's norm.

use super::{kernels, TrainOps, Values};
use crate::error::{Error, Result};
use crate::gpu::ops::{blocks, THREADS};

kernels! {
    /// Of `cuda/train_step.cu`.
    pub(super) Kernels of TrainStep:
    sgd, adamw, move_average, scale_values, squares, squares_finish,
}

/// `SgdArgs` of `cuda/train_step.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct SgdArgs {
    value: u64,
    buffer: u64,
    gradient: u64,
    count: u32,
    rate: f32,
    momentum: f32,
    decay: f32,
    of_buffer: f32,
    of_gradient: f32,
}

/// `AdamWArgs` of `cuda/train_step.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct AdamWArgs {
    value: u64,
    mean: u64,
    square: u64,
    gradient: u64,
    count: u32,
    beta1: f32,
    beta2: f32,
    epsilon: f32,
    rate: f32,
    root: f32,
    shrink: f32,
}

/// `AverageArgs` of `cuda/train_step.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct AverageArgs {
    average: u64,
    value: u64,
    count: u32,
    share: f32,
}

/// `ScaleArgs` of `cuda/train_step.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct ScaleArgs {
    values: u64,
    count: u32,
    factor: f32,
}

/// `SquaresArgs` of `cuda/train_step.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct SquaresArgs {
    values: u64,
    sums: u64,
    count: u32,
    span: u32,
}

/// Values whose squares a block sums up.
const SPAN: usize = 1 << 14;
const SQUARES_SHARED: u32 = THREADS * 8;

/// A step of gradient descent with momentum: g += decay * p, buffer = momentum * buffer + g,
/// p -= rate * (of_gradient * g + of_buffer * buffer).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sgd {
    /// Learning rate.
    pub rate: f32,
    /// What the buffer keeps.
    pub momentum: f32,
    /// Weight decay.
    pub decay: f32,
    /// What the buffer weighs in the step.
    pub of_buffer: f32,
    /// What the gradient beside it weighs.
    pub of_gradient: f32,
}

/// A step of AdamW: m += (1 - beta1) (g - m), v = beta2 v + (1 - beta2) g g, p = shrink p - rate m / (root sqrt(v) + epsilon).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Of the mean.
    pub beta1: f32,
    /// Of the mean square.
    pub beta2: f32,
    /// Added to the root.
    pub epsilon: f32,
    /// Learning rate over the mean's bias correction.
    pub rate: f32,
    /// One over the root of the mean square's.
    pub root: f32,
    /// What the weight decay leaves.
    pub shrink: f32,
}

/// Values in 32 bits.
fn count(values: &Values<'_>) -> Result<u32> {
    u32::try_from(values.len)
        .map_err(|_| Error::LimitExceeded("a parameter is too large for the device".into()))
}

impl TrainOps {
    /// Moves `value` and `buffer` by a step of gradient descent.
    pub fn sgd(&self, rule: Sgd, value: Values<'_>, gradient: Values<'_>, buffer: Values<'_>) -> Result<()> {
        let Sgd { rate, momentum, decay, of_buffer, of_gradient } = rule;
        let args = SgdArgs {
            value: value.address(value.len)?,
            buffer: buffer.address(value.len)?,
            gradient: gradient.address(value.len)?,
            count: count(&value)?,
            rate,
            momentum,
            decay,
            of_buffer,
            of_gradient,
        };
        // SAFETY: the values lie in their buffers; the args are the kernel's struct.
        unsafe { self.steps.sgd.launch(&self.stream, blocks(value.len), THREADS, 0, &args) }
    }

    /// Moves `value` and the means of gradient and square by a step of AdamW.
    pub fn adamw(
        &self,
        rule: AdamW,
        value: Values<'_>,
        gradient: Values<'_>,
        [mean, square]: [Values<'_>; 2],
    ) -> Result<()> {
        let AdamW { beta1, beta2, epsilon, rate, root, shrink } = rule;
        let args = AdamWArgs {
            value: value.address(value.len)?,
            mean: mean.address(value.len)?,
            square: square.address(value.len)?,
            gradient: gradient.address(value.len)?,
            count: count(&value)?,
            beta1,
            beta2,
            epsilon,
            rate,
            root,
            shrink,
        };
        // SAFETY: as above.
        unsafe { self.steps.adamw.launch(&self.stream, blocks(value.len), THREADS, 0, &args) }
    }

    /// average += share * (value - average).
    pub fn move_average(&self, share: f32, value: Values<'_>, average: Values<'_>) -> Result<()> {
        let (values, average) = (value.address(value.len)?, average.address(value.len)?);
        let args = AverageArgs { average, value: values, count: count(&value)?, share };
        // SAFETY: as above.
        unsafe { self.steps.move_average.launch(&self.stream, blocks(value.len), THREADS, 0, &args) }
    }

    /// values *= factor.
    pub fn scale(&self, values: Values<'_>, factor: f32) -> Result<()> {
        let args = ScaleArgs { values: values.address(values.len)?, count: count(&values)?, factor };
        // SAFETY: as above.
        unsafe { self.steps.scale_values.launch(&self.stream, blocks(values.len), THREADS, 0, &args) }
    }

    /// Euclidean norm of `values`, with sums in f64, once the stream has done what it has: finite unless one of them is not.
    pub fn norm(&mut self, values: Values<'_>) -> Result<f64> {
        let parts = values.len.div_ceil(SPAN).max(1);
        let sums = self.partial.bytes(&self.device, parts * 8)?;
        let address = values.address(values.len)?;
        let (all, span) = (count(&values)?, SPAN as u32);
        let of = |count: u32| SquaresArgs { values: address, sums, count, span };
        // SAFETY: as above.
        unsafe {
            let grid = [parts as u32, 1, 1];
            self.steps.squares.launch(&self.stream, grid, THREADS, SQUARES_SHARED, &of(all))?;
            let one = [1, 1, 1];
            self.steps.squares_finish.launch(
                &self.stream,
                one,
                THREADS,
                SQUARES_SHARED,
                &of(parts as u32),
            )?;
        }
        let sums = self.partial.buffer.as_ref().ok_or_else(|| Error::Internal("no sums".into()))?;
        Ok(sums.values::<f64>(&self.stream, 0, 1)?[0].sqrt())
    }
}
