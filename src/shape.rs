//! Shapes, output-size formulas and the dense tensor of the reference layers.
//!
//! Sizes are written N x C x H x W as the papers do; memory is channels-last (N, H, W, C, with C
//! fastest) everywhere in this crate. ARCHITECTURE.md gives the reasons.

use std::fmt;

/// Size of a 4-D tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct Shape {
    /// Images.
    pub n: usize,
    /// Channels.
    pub c: usize,
    /// Rows.
    pub h: usize,
    /// Columns.
    pub w: usize,
}

impl Shape {
    /// Shape from N, C, H, W.
    pub const fn new(n: usize, c: usize, h: usize, w: usize) -> Self {
        Self { n, c, h, w }
    }

    /// Number of values. Panics on overflow; sizes from outside are checked with [`Shape::checked_len`] first.
    pub fn len(&self) -> usize {
        self.checked_len().expect("tensor size overflows usize")
    }

    /// Number of values, or None where the product overflows.
    pub fn checked_len(&self) -> Option<usize> {
        self.n.checked_mul(self.c)?.checked_mul(self.h)?.checked_mul(self.w)
    }

    /// True where any side is zero.
    pub fn is_empty(&self) -> bool {
        self.n == 0 || self.c == 0 || self.h == 0 || self.w == 0
    }

    /// Index of (n, c, y, x) in channels-last memory.
    #[inline]
    pub fn at(&self, n: usize, c: usize, y: usize, x: usize) -> usize {
        ((n * self.h + y) * self.w + x) * self.c + c
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}x{}x{}", self.n, self.c, self.h, self.w)
    }
}

/// Output length of a convolution or pooling along one axis:
/// `floor((input + pad_begin + pad_end - dilation*(kernel-1) - 1) / stride) + 1`,
/// or None where the window does not fit.
pub fn conv_out(
    input: usize,
    kernel: usize,
    stride: usize,
    dilation: usize,
    pad_begin: usize,
    pad_end: usize,
) -> Option<usize> {
    let window = dilation.checked_mul(kernel.checked_sub(1)?)?.checked_add(1)?;
    let padded = input.checked_add(pad_begin)?.checked_add(pad_end)?;
    Some(padded.checked_sub(window)?.checked_div(stride)? + 1)
}

/// Output length of a transposed convolution along one axis:
/// `(input-1)*stride - pad_begin - pad_end + dilation*(kernel-1) + output_padding + 1`.
pub fn conv_transpose_out(
    input: usize,
    kernel: usize,
    stride: usize,
    dilation: usize,
    pad_begin: usize,
    pad_end: usize,
    output_padding: usize,
) -> Option<usize> {
    let window = dilation.checked_mul(kernel.checked_sub(1)?)?.checked_add(output_padding)?.checked_add(1)?;
    let full = input.checked_sub(1)?.checked_mul(stride)?.checked_add(window)?;
    full.checked_sub(pad_begin.checked_add(pad_end)?).filter(|&n| n > 0)
}

/// Dense channels-last tensor, owned. The currency of the reference layers and of weights; the
/// compiled engine works on views into one arena instead.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor<T = f32> {
    /// Size.
    pub shape: Shape,
    /// Values, channels-last.
    pub data: Vec<T>,
}

impl<T: Copy + Default> Tensor<T> {
    /// Tensor of zeros.
    pub fn zeros(shape: Shape) -> Self {
        Self { shape, data: vec![T::default(); shape.len()] }
    }

    /// Tensor over `data`, which must hold `shape.len()` values in channels-last order.
    pub fn from_vec(shape: Shape, data: Vec<T>) -> Self {
        assert_eq!(shape.len(), data.len(), "data does not fill shape {shape}");
        Self { shape, data }
    }

    /// Tensor from values in N, C, H, W order (PyTorch's).
    pub fn from_nchw(shape: Shape, nchw: &[T]) -> Self {
        assert_eq!(shape.len(), nchw.len(), "data does not fill shape {shape}");
        let mut t = Self::zeros(shape);
        let mut values = nchw.iter();
        for n in 0..shape.n {
            for c in 0..shape.c {
                for y in 0..shape.h {
                    for x in 0..shape.w {
                        t.data[shape.at(n, c, y, x)] = *values.next().expect("length checked");
                    }
                }
            }
        }
        t
    }

    /// Value at (n, c, y, x).
    #[inline]
    pub fn at(&self, n: usize, c: usize, y: usize, x: usize) -> T {
        self.data[self.shape.at(n, c, y, x)]
    }

    /// Mutable value at (n, c, y, x).
    #[inline]
    pub fn at_mut(&mut self, n: usize, c: usize, y: usize, x: usize) -> &mut T {
        let i = self.shape.at(n, c, y, x);
        &mut self.data[i]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conv_out_follows_the_floor_formula() {
        assert_eq!(conv_out(224, 7, 2, 1, 3, 3), Some(112));
        assert_eq!(conv_out(5, 3, 2, 1, 1, 1), Some(3));
        assert_eq!(conv_out(5, 3, 1, 8, 8, 8), Some(5));
        assert_eq!(conv_out(1, 3, 1, 1, 0, 0), None);
        assert_eq!(conv_transpose_out(10, 4, 2, 1, 1, 1, 0), Some(20));
    }

    #[test]
    fn lengths_that_overflow_are_none() {
        assert_eq!(conv_out(usize::MAX, 3, 1, 1, 1, 1), None);
        assert_eq!(conv_out(9, usize::MAX, 1, 2, 0, 0), None);
        assert_eq!(conv_transpose_out(usize::MAX, 4, 2, 1, 1, 1, 0), None);
        assert_eq!(conv_transpose_out(9, 4, 2, 1, usize::MAX, 1, 0), None);
    }

    #[test]
    fn nchw_values_land_channels_last() {
        let t = Tensor::from_nchw(Shape::new(1, 2, 1, 2), &[1, 2, 3, 4]);
        assert_eq!(t.data, [1, 3, 2, 4]);
    }
}
