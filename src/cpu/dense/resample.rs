//! Maps made of another map's neighbouring pixels without weights to learn: max pooling, bilinear interpolation.
//!
//! An output row is made of a few input rows, which are read into f32 once; a gradient is kept in f32 for the input
//! rows that later output rows still touch, then goes to the map.

use super::band::{flush, room};
use super::maps::{deposit, dispatch, finish, for_registers, pull_back, read, Pass};
use super::{Element, Gradient, Scratch, Source};
use crate::cpu::kernels::Vector;
use crate::cpu::simple::blends;
use crate::cpu::Isa;
use std::ops::Range;

/// One axis: for every output the inputs it is made of, ascending, and the weights of the first and the last.
type Axis = Vec<(Range<usize>, [f32; 2])>;

/// Which pixels an output's are made of.
#[derive(Clone, Debug, PartialEq)]
pub struct Resampling {
    input: [usize; 2],
    rows: Axis,
    columns: Axis,
    /// The largest of them; else their sum by weights.
    largest: bool,
}

impl Resampling {
    /// The largest value under a window. `padding` top and left, less than the kernel; windows lie on the input or the
    /// padding around it.
    pub fn max(
        input: [usize; 2],
        out: [usize; 2],
        kernel: [usize; 2],
        stride: [usize; 2],
        padding: [usize; 2],
    ) -> Self {
        let [rows, columns] = [0, 1].map(|axis| {
            let window = |i: usize| {
                let start = (i * stride[axis]).saturating_sub(padding[axis]);
                let end = (i * stride[axis] + kernel[axis]).saturating_sub(padding[axis]).min(input[axis]);
                assert!(start < end, "a pooling window that lies on padding alone");
                (start..end, [1.0; 2])
            };
            (0..out[axis]).map(window).collect()
        });
        Self { input, rows, columns, largest: true }
    }

    /// Interpolation between the four nearest pixels: half-pixel centres, edges clamped.
    pub fn bilinear(input: [usize; 2], out: [usize; 2]) -> Self {
        let [rows, columns] = [0, 1].map(|axis| {
            let between = blends(input[axis], out[axis], true).into_iter();
            between
                .map(|b| {
                    let (low, high) = (b.low as usize, b.high as usize);
                    assert!(low <= high && high <= low + 1 && high < input[axis], "neighbours on the map");
                    (low..high + 1, if low == high { [1.0; 2] } else { [1.0 - b.t, b.t] })
                })
                .collect()
        });
        Self { input, rows, columns, largest: false }
    }

    /// Makes `z` of the images of `source`; `sums`, `[2][C]`, gains the sums of the values and of their squares.
    pub fn forward<T: Element>(
        &self,
        isa: Isa,
        source: Source<'_, T>,
        z: &mut [T],
        sums: &mut [f64],
        s: &mut Scratch<T>,
    ) {
        let c = source.channels();
        let [height, width] = self.input;
        let Scratch { input, output, sums: row_sums, .. } = s;
        let (zeros, row_sums) = (vec![0.0; c], room(row_sums, 2 * c));
        row_sums.fill(0.0);
        for (n, z) in z.chunks_exact_mut(self.pixels() * c).enumerate() {
            let image = source.pixels(n * height * width..(n + 1) * height * width);
            let mut rows = Rows::new(self, c, input);
            for ((at, row_weights), z) in self.rows.iter().zip(z.chunks_exact_mut(self.columns.len() * c)) {
                let from = rows.read(isa, image, width, at);
                let to = room(output, self.columns.len() * c);
                self.check(from, at, to, c);
                let row = Row { columns: &self.columns, row_weights, width, channels: c, rows: at.len() };
                // SAFETY: the lengths were checked.
                unsafe {
                    if self.largest {
                        dispatch(isa, Largest { row, from, to });
                    } else {
                        dispatch(isa, Mean { row, from, to });
                    }
                }
                finish(isa, to, c, &zeros, z, row_sums);
                flush(row_sums, sums);
            }
        }
    }

    /// Gradient of [`Resampling::forward`] with respect to what `source` shows: written to `dx` or, where `add`, added. A
    /// window's goes to its largest value, the first in scan order among equals.
    pub fn backward<T: Element>(
        &self,
        isa: Isa,
        source: Source<'_, T>,
        gradient: Gradient<'_, T>,
        dx: &mut [T],
        add: bool,
        s: &mut Scratch<T>,
    ) {
        let c = source.channels();
        let [height, width] = self.input;
        let (out_width, out_pixels) = (self.columns.len(), self.pixels());
        for (n, dx) in dx.chunks_exact_mut(height * width * c).enumerate() {
            let image = source.pixels(n * height * width..(n + 1) * height * width);
            let d_image = gradient.pixels(n * out_pixels..(n + 1) * out_pixels);
            let mut rows = Rows::new(self, c, &mut s.input);
            let mut open = OpenRows::new(self, c, dx, add, &mut s.rows);
            for (y, (at, row_weights)) in self.rows.iter().enumerate() {
                let d = room(&mut s.output, out_width * c);
                pull_back(isa, d_image.pixels(y * out_width..(y + 1) * out_width), d, c);
                open.advance(isa, at.start);
                let to = &mut open.rows[..at.len() * width * c];
                self.check(to, at, d, c);
                let row = Row { columns: &self.columns, row_weights, width, channels: c, rows: at.len() };
                if self.largest {
                    let from = rows.read(isa, image, width, at);
                    assert_eq!(from.len(), to.len(), "a gradient for every value read");
                    // SAFETY: the lengths were checked.
                    unsafe { dispatch(isa, LargestBackward { row, from, d, to }) };
                } else {
                    // SAFETY: the lengths were checked.
                    unsafe { dispatch(isa, MeanBackward { row, d, to }) };
                }
            }
            open.advance(isa, height);
        }
    }

    fn pixels(&self) -> usize {
        self.rows.len() * self.columns.len()
    }

    /// Most input rows that an output row is made of.
    fn most_rows(&self) -> usize {
        self.rows.iter().map(|(at, _)| at.len()).max().unwrap_or(0)
    }

    /// The lengths that the kernels rely on: input rows `at`, one output row. The columns were held to the input's when
    /// they were made.
    fn check(&self, input: &[f32], at: &Range<usize>, output: &[f32], channels: usize) {
        assert_eq!(input.len(), at.len() * self.input[1] * channels, "input rows");
        assert_eq!(output.len(), self.columns.len() * channels, "an output row");
    }
}

/// The input rows at hand, as readers see them, in f32.
struct Rows<'a> {
    held: Range<usize>,
    values: &'a mut [f32],
}

impl<'a> Rows<'a> {
    fn new(r: &Resampling, channels: usize, buffer: &'a mut Vec<f32>) -> Self {
        Self { held: 0..0, values: room(buffer, r.most_rows() * r.input[1] * channels) }
    }

    /// Rows `at`, which do not begin before those of the last call; rows that stay are not read again.
    fn read<T: Element>(
        &mut self,
        isa: Isa,
        image: Source<'_, T>,
        width: usize,
        at: &Range<usize>,
    ) -> &[f32] {
        let row = width * image.channels();
        let stay = at.start.max(self.held.start)..self.held.end.min(at.end);
        let first_new = if stay.is_empty() {
            at.start
        } else {
            let from = stay.start - self.held.start;
            self.values.copy_within(from * row..(from + stay.len()) * row, 0);
            stay.end
        };
        for y in first_new..at.end {
            let to = &mut self.values[(y - at.start) * row..][..row];
            read(isa, image.pixels(y * width..(y + 1) * width), to, image.channels());
        }
        self.held = at.clone();
        &self.values[..at.len() * row]
    }
}

/// Gradients of the input rows from `first` on that output rows may still add to.
struct OpenRows<'a, T> {
    dx: &'a mut [T],
    add: bool,
    rows: &'a mut [f32],
    first: usize,
    row: usize,
    channels: usize,
}

impl<'a, T: Element> OpenRows<'a, T> {
    fn new(r: &Resampling, channels: usize, dx: &'a mut [T], add: bool, buffer: &'a mut Vec<f32>) -> Self {
        let row = r.input[1] * channels;
        let rows = room(buffer, r.most_rows() * row);
        rows.fill(0.0);
        Self { dx, add, rows, first: 0, row, channels }
    }

    /// Gives the map all rows before `to`.
    fn advance(&mut self, isa: Isa, to: usize) {
        let (row, held) = (self.row, self.rows.len() / self.row);
        for y in self.first..to {
            let dx = &mut self.dx[y * row..(y + 1) * row];
            if y - self.first < held {
                deposit(
                    isa,
                    &self.rows[(y - self.first) * row..][..row],
                    self.channels,
                    self.channels,
                    dx,
                    self.add,
                );
            } else if !self.add {
                dx.fill(T::default());
            }
        }
        let done = (to - self.first).min(held) * row;
        self.rows.copy_within(done.., 0);
        let kept = self.rows.len() - done;
        self.rows[kept..].fill(0.0);
        self.first = to;
    }
}

/// One output row and the input rows it is made of.
#[derive(Clone, Copy)]
struct Row<'a> {
    columns: &'a [(Range<usize>, [f32; 2])],
    row_weights: &'a [f32; 2],
    /// Columns of the input.
    width: usize,
    channels: usize,
    /// Input rows.
    rows: usize,
}

/// Runs `$body` with the offset of every input pixel that output column `$column` is made of, in scan order, and its
/// weight. No closure: it would not be compiled for the registers.
macro_rules! for_pixels {
    ($row:expr, $column:expr, |$pixel:ident, $weight:pat_param| $body:block) => {{
        let (at, weights) = $column;
        for y in 0..$row.rows {
            for x in at.start..at.end {
                let $weight = $row.row_weights[y.min(1)] * weights[(x - at.start).min(1)];
                let $pixel = (y * $row.width + x) * $row.channels;
                $body
            }
        }
    }};
}

struct Largest<'a> {
    row: Row<'a>,
    from: &'a [f32],
    to: &'a mut [f32],
}

impl Pass for Largest<'_> {
    const BF16: bool = false;
    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        let c = self.row.channels;
        // SAFETY: `Resampling::check`.
        unsafe {
            for_registers!(V, c, |at, n| {
                let (from, mut to) = (self.from.as_ptr().add(at), self.to.as_mut_ptr().add(at));
                for column in self.row.columns {
                    let mut largest = V::splat(f32::NEG_INFINITY);
                    for_pixels!(self.row, column, |pixel, _| {
                        largest = V::load_upto(from.add(pixel), n).max(largest);
                    });
                    largest.store_upto(to, n);
                    to = to.wrapping_add(c);
                }
            });
        }
    }
}

struct LargestBackward<'a> {
    row: Row<'a>,
    from: &'a [f32],
    d: &'a [f32],
    to: &'a mut [f32],
}

impl Pass for LargestBackward<'_> {
    const BF16: bool = false;
    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        let c = self.row.channels;
        // SAFETY: `Resampling::check`; `from` is as long as `to`.
        unsafe {
            let (zero, minus) = (V::splat(0.0), V::splat(-1.0));
            for_registers!(V, c, |at, n| {
                let (from, to) = (self.from.as_ptr().add(at), self.to.as_mut_ptr().add(at));
                let mut d = self.d.as_ptr().add(at);
                for column in self.row.columns {
                    let mut largest = V::splat(f32::NEG_INFINITY);
                    for_pixels!(self.row, column, |pixel, _| {
                        largest = V::load_upto(from.add(pixel), n).max(largest);
                    });
                    // The first pixel that reaches it takes the gradient and leaves none.
                    let mut left = V::load_upto(d, n);
                    for_pixels!(self.row, column, |pixel, _| {
                        let below = largest.mul_add(V::load_upto(from.add(pixel), n), minus);
                        let to = to.add(pixel);
                        V::load_upto(to, n).add(below.where_positive(zero, left)).store_upto(to, n);
                        left = below.where_positive(left, zero);
                    });
                    d = d.wrapping_add(c);
                }
            });
        }
    }
}

struct Mean<'a> {
    row: Row<'a>,
    from: &'a [f32],
    to: &'a mut [f32],
}

impl Pass for Mean<'_> {
    const BF16: bool = false;
    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        let c = self.row.channels;
        // SAFETY: `Resampling::check`.
        unsafe {
            for_registers!(V, c, |at, n| {
                let (from, mut to) = (self.from.as_ptr().add(at), self.to.as_mut_ptr().add(at));
                for column in self.row.columns {
                    let mut mean = V::splat(0.0);
                    for_pixels!(self.row, column, |pixel, weight| {
                        mean = mean.mul_add(V::load_upto(from.add(pixel), n), V::splat(weight));
                    });
                    mean.store_upto(to, n);
                    to = to.wrapping_add(c);
                }
            });
        }
    }
}

struct MeanBackward<'a> {
    row: Row<'a>,
    d: &'a [f32],
    to: &'a mut [f32],
}

impl Pass for MeanBackward<'_> {
    const BF16: bool = false;
    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        let c = self.row.channels;
        // SAFETY: `Resampling::check`.
        unsafe {
            for_registers!(V, c, |at, n| {
                let (mut d, to) = (self.d.as_ptr().add(at), self.to.as_mut_ptr().add(at));
                for column in self.row.columns {
                    let value = V::load_upto(d, n);
                    for_pixels!(self.row, column, |pixel, weight| {
                        let to = to.add(pixel);
                        V::load_upto(to, n).mul_add(value, V::splat(weight)).store_upto(to, n);
                    });
                    d = d.wrapping_add(c);
                }
            });
        }
    }
}
