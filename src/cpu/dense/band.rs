//! Convolution geometry, and the bands of rows that one thread works on in cache.

use super::maps::{pull_back, read};
use super::{Element, Gradient, Source};
use crate::cpu::Isa;
use std::ops::Range;

/// A convolution's sizes, one image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Rows and columns of the input.
    pub input: [usize; 2],
    /// Rows and columns of the output.
    pub out: [usize; 2],
    /// Channels of input and output.
    pub channels: [usize; 2],
    /// Height and width.
    pub kernel: [usize; 2],
    /// Vertical and horizontal.
    pub stride: [usize; 2],
    /// Vertical and horizontal.
    pub dilation: [usize; 2],
    /// Top, left, bottom, right.
    pub padding: [usize; 4],
}

impl Geometry {
    /// A matrix product over pixels, whatever the rows.
    pub(super) fn is_pointwise(&self) -> bool {
        self.kernel == [1, 1] && self.stride == [1, 1] && self.padding == [0; 4]
    }

    /// Pixels of an input and of an output image.
    pub(super) fn pixels(&self) -> [usize; 2] {
        [self.input[0] * self.input[1], self.out[0] * self.out[1]]
    }

    /// Columns of the padded input that the windows of a row span.
    pub(super) fn window_columns(&self) -> usize {
        self.span(1, self.out[1])
    }

    /// Padded input rows that the windows of output rows `band` span, counted from the padding's top.
    pub(super) fn window_rows(&self, band: &Range<usize>) -> Range<usize> {
        let start = band.start * self.stride[0];
        start..start + self.span(0, band.len())
    }

    /// Panics where a product of the sizes is beyond any buffer: the kernels' lengths are checked with plain arithmetic.
    pub(super) fn check(&self) {
        let span = |axis: usize| {
            let steps = self.out[axis].checked_sub(1)?.checked_mul(self.stride[axis])?;
            let window = self.kernel[axis].checked_sub(1)?.checked_mul(self.dilation[axis])?;
            let padded =
                self.input[axis].checked_add(self.padding[axis])?.checked_add(self.padding[axis + 2])?;
            Some(steps.checked_add(window)?.checked_add(1)?.max(padded))
        };
        let all = |values: &[usize]| values.iter().try_fold(1usize, |n, &v| n.checked_mul(v.max(1)));
        let [ci, co] = self.channels;
        let sizes = span(0).zip(span(1)).and_then(|(rows, columns)| {
            let [kh, kw] = self.kernel;
            Some([all(&[rows, columns, ci.max(co), 8])?, all(&[kh, kw, ci.max(16), co.max(16), 8])?])
        });
        assert!(sizes.is_some(), "sizes of a convolution: {self:?}");
    }

    fn span(&self, axis: usize, outputs: usize) -> usize {
        (outputs - 1) * self.stride[axis] + self.dilation[axis] * (self.kernel[axis] - 1) + 1
    }
}

/// Writes padded rows `rows` (counted from the padding's top) of one image of `source` to `to`: `columns` pixels a
/// row, the padding zero.
pub(super) fn read_rows<T: Element, O: Element>(
    isa: Isa,
    source: Source<'_, T>,
    [height, width]: [usize; 2],
    [top, left]: [usize; 2],
    rows: Range<usize>,
    columns: usize,
    to: &mut [O],
) {
    let c = source.channels();
    let inside = width.min(columns.saturating_sub(left));
    for (row, to) in rows.zip(to.chunks_exact_mut(columns * c)) {
        let Some(y) = row.checked_sub(top).filter(|&y| y < height) else {
            to.fill(O::default());
            continue;
        };
        let (before, rest) = to.split_at_mut((left * c).min(columns * c));
        let (body, after) = rest.split_at_mut(inside * c);
        before.fill(O::default());
        read(isa, source.pixels(y * width..y * width + inside), body, c);
        after.fill(O::default());
    }
}

/// As [`read_rows`] for the gradient with respect to a stored map: rows `rows` of the image, which may lie outside it
/// on either side, with `left` zero columns before and `right` behind.
pub(super) fn pull_back_rows<T: Element, O: Element>(
    isa: Isa,
    gradient: Gradient<'_, T>,
    [height, width]: [usize; 2],
    [left, right]: [usize; 2],
    rows: Range<isize>,
    to: &mut [O],
) {
    let c = gradient.channels();
    for (row, to) in rows.zip(to.chunks_exact_mut((left + width + right) * c)) {
        let Some(y) = usize::try_from(row).ok().filter(|&y| y < height) else {
            to.fill(O::default());
            continue;
        };
        let (before, rest) = to.split_at_mut(left * c);
        let (body, after) = rest.split_at_mut(width * c);
        before.fill(O::default());
        pull_back(isa, gradient.pixels(y * width..(y + 1) * width), body, c);
        after.fill(O::default());
    }
}

/// The first `len` values of a buffer that grows as needed and never shrinks.
pub(super) fn room<V: Copy + Default>(buffer: &mut Vec<V>, len: usize) -> &mut [V] {
    if buffer.len() < len {
        buffer.resize(len, V::default());
    }
    &mut buffer[..len]
}

/// One thread's buffers.
#[derive(Default)]
pub struct Scratch<T> {
    /// Input rows with their padding.
    pub(super) window: Vec<T>,
    /// Windows, one a row.
    pub(super) windows: Vec<T>,
    /// Gradient of the stored map.
    pub(super) gradient: Vec<T>,
    /// Products.
    pub(super) products: Vec<f32>,
    /// Gradients of input rows.
    pub(super) rows: Vec<f32>,
    /// For the products' own use.
    pub(super) operands: Vec<T>,
    /// Sums of a band.
    pub(super) sums: Vec<f32>,
    /// Depthwise input and gradient.
    pub(super) input: Vec<f32>,
    pub(super) output: Vec<f32>,
}

/// Adds a band's sums to a batch's, and clears them.
pub(crate) fn flush(band: &mut [f32], batch: &mut [f64]) {
    for (total, v) in batch.iter_mut().zip(band) {
        *total += f64::from(std::mem::take(v));
    }
}
