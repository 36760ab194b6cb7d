//! Dense convolutions: products of a band's windows (pixels x window values) with the weights.

use super::band::{flush, read_rows, room};
use super::gemm::{channel_stride, operand_stride};
use super::maps::{column_sums, deposit, finish, pull_back, read};
use super::{Element, Geometry, Gradient, Packed, Scratch, Source, Target};
use crate::cpu::Isa;
use std::ops::Range;

/// Pixels multiplied at a time: operands and results of usual widths stay near a first-level cache.
const CHUNK: usize = 256;

impl Geometry {
    /// Values of a window, in the order kernel row, kernel column, input channel.
    pub fn window_values(&self) -> usize {
        self.kernel[0] * self.kernel[1] * self.channels[0]
    }

    /// Length of the weight gradient's sums in [`backward`].
    pub fn weight_sums(&self) -> usize {
        channel_stride(self.window_values()) * channel_stride(self.channels[1])
    }

    /// The weights, PyTorch's `[out, in, kh, kw]`, as [`forward`] multiplies them.
    pub fn pack<T: Element>(&self, isa: Isa, weight: &[f32]) -> Packed<T> {
        let mut packed = Packed::new(isa, self.window_values(), self.channels[1]);
        self.for_weights(|i, k, o| packed.set(k, o, weight[i]));
        packed
    }

    /// The weights as [`backward`] multiplies them.
    pub fn pack_transposed<T: Element>(&self, isa: Isa, weight: &[f32]) -> Packed<T> {
        let mut packed = Packed::new(isa, self.channels[1], self.window_values());
        self.for_weights(|i, k, o| packed.set(o, k, weight[i]));
        packed
    }

    /// Adds the sums of [`backward`] to a weight gradient in PyTorch's order.
    pub fn add_weight_gradient(&self, sums: &[f32], dw: &mut [f32]) {
        let stride = channel_stride(self.channels[1]);
        self.for_weights(|i, k, o| dw[i] += sums[k * stride + o]);
    }

    /// Index in PyTorch's order, window value and output of every weight; outputs in blocks of 16 that share cache lines of
    /// the sums, within a block in memory's order.
    #[inline(always)]
    fn for_weights(&self, mut f: impl FnMut(usize, usize, usize)) {
        let ([ci, co], area) = (self.channels, self.kernel[0] * self.kernel[1]);
        for first in (0..co).step_by(16) {
            for i in 0..ci {
                for tap in 0..area {
                    for o in first..(first + 16).min(co) {
                        f((o * ci + i) * area + tap, tap * ci + i, o);
                    }
                }
            }
        }
    }

    fn bands(&self) -> impl Iterator<Item = Range<usize>> {
        let (rows, height) = ((CHUNK / self.out[1]).clamp(1, self.out[0]), self.out[0]);
        (0..height).step_by(rows).map(move |y| y..(y + rows).min(height))
    }
}

/// `z = conv(source) + bias` for the images of `source`; `sums`, `[2][C]`, gains the sums of the values (before they
/// are rounded to be stored) and of their squares.
pub fn forward<T: Element>(
    isa: Isa,
    g: &Geometry,
    source: Source<'_, T>,
    weights: &Packed<T>,
    bias: &[f32],
    z: &mut [T],
    sums: &mut [f64],
    s: &mut Scratch<T>,
) {
    g.check();
    let [ci, co] = g.channels;
    let stride = channel_stride(co);
    let band_sums = room(&mut s.sums, 2 * co);
    band_sums.fill(0.0);
    let mut emit = |windows: &[T], width: usize, pixels: usize, z: &mut [T]| {
        let products = room(&mut s.products, pixels.next_multiple_of(16) * stride);
        T::product(isa, windows, width, pixels, weights, products);
        finish(isa, &products[..pixels * stride], stride, bias, z, band_sums);
        flush(band_sums, sums);
    };
    if g.is_pointwise() {
        let width = operand_stride(ci);
        let pixels = z.len() / co;
        for start in (0..pixels).step_by(CHUNK) {
            let range = start..(start + CHUNK).min(pixels);
            let n = range.len();
            let windows = room(&mut s.windows, CHUNK.max(n) * width);
            read(isa, source.pixels(range.clone()), windows, width);
            emit(windows, width, n, &mut z[start * co..range.end * co]);
        }
        return;
    }
    let [in_pixels, out_pixels] = g.pixels();
    let width = operand_stride(g.window_values());
    for (n, z) in z.chunks_exact_mut(out_pixels * co).enumerate() {
        let image = source.pixels(n * in_pixels..(n + 1) * in_pixels);
        for band in g.bands() {
            let pixels = band.len() * g.out[1];
            let windows = room(&mut s.windows, pixels.next_multiple_of(32) * width + 16);
            gather(isa, g, image, &band, &mut s.window, windows, width);
            emit(windows, width, pixels, &mut z[band.start * g.out[1] * co..][..pixels * co]);
        }
    }
}

/// Writes the windows of output rows `band`, one a row of `width` values (zeros past the window).
fn gather<T: Element>(
    isa: Isa,
    g: &Geometry,
    image: Source<'_, T>,
    band: &Range<usize>,
    window: &mut Vec<T>,
    to: &mut [T],
    width: usize,
) {
    let ci = g.channels[0];
    let columns = g.window_columns();
    let rows = g.window_rows(band);
    let pixels = rows.len() * columns * ci;
    let input = room(window, pixels + SHORT_RUN);
    read_rows(isa, image, g.input, [g.padding[0], g.padding[1]], rows, columns, &mut input[..pixels]);
    let values = g.window_values();
    let run = g.kernel[1] * ci;
    if run <= SHORT_RUN && g.dilation[1] == 1 {
        return gather_short(g, band.len(), columns, run, input, to, width);
    }
    let mut to = to.chunks_exact_mut(width);
    for y in 0..band.len() {
        for (x, to) in to.by_ref().take(g.out[1]).enumerate() {
            for (ky, to) in to[..values].chunks_exact_mut(run).enumerate() {
                let row = y * g.stride[0] + ky * g.dilation[0];
                let at = (row * columns + x * g.stride[1]) * ci;
                if g.dilation[1] == 1 {
                    to.copy_from_slice(&input[at..at + run]);
                } else {
                    for (kx, to) in to.chunks_exact_mut(ci).enumerate() {
                        to.copy_from_slice(&input[at + kx * g.dilation[1] * ci..][..ci]);
                    }
                }
            }
            to[values..].fill(T::default());
        }
    }
}

/// Longest run (a window's row of values) that is copied as a block of this constant length.
const SHORT_RUN: usize = 16;

/// [`gather`] where a row of the window is short, as in every network's first layer: a copy of constant length is one
/// instruction, what it writes too much is overwritten by the next run or cleared.
fn gather_short<T: Element>(
    g: &Geometry,
    rows: usize,
    columns: usize,
    run: usize,
    input: &[T],
    to: &mut [T],
    width: usize,
) {
    let (ci, values) = (g.channels[0], g.window_values());
    for y in 0..rows {
        for x in 0..g.out[1] {
            let at = (y * g.out[1] + x) * width;
            for ky in 0..g.kernel[0] {
                let from = ((y * g.stride[0] + ky * g.dilation[0]) * columns + x * g.stride[1]) * ci;
                let block: Option<&[T; SHORT_RUN]> = input[from..].first_chunk();
                *to[at + ky * run..].first_chunk_mut().expect("a block fits") =
                    *block.expect("a block is there");
            }
            to[at + values..at + width].fill(T::default());
        }
    }
}

/// Gradients of [`forward`]: adds to `dw` ([`Geometry::weight_sums`] values) and `db` `[C]`, and, where `dx` is wanted,
/// writes (or adds to it) the gradient with respect to what `source` shows. `transposed` from
/// [`Geometry::pack_transposed`].
pub fn backward<T: Element>(
    isa: Isa,
    g: &Geometry,
    source: Source<'_, T>,
    gradient: Gradient<'_, T>,
    transposed: &Packed<T>,
    mut dx: Option<Target<'_, T>>,
    dw: &mut [f32],
    mut db: Option<&mut [f32]>,
    s: &mut Scratch<T>,
) {
    g.check();
    if g.is_pointwise() {
        return backward_pointwise(isa, g, source, gradient, transposed, dx, dw, db, s);
    }
    let [ci, co] = g.channels;
    let [in_pixels, out_pixels] = g.pixels();
    let (width, d_width) = (operand_stride(g.window_values()), operand_stride(co));
    let images = gradient.dy.len() / (out_pixels * co);
    for n in 0..images {
        let image = source.pixels(n * in_pixels..(n + 1) * in_pixels);
        let d_image = gradient.pixels(n * out_pixels..(n + 1) * out_pixels);
        let mut sum = dx.as_mut().map(|target| {
            let add = target.adds();
            RowSums::new(g, target.pixels(n * in_pixels..(n + 1) * in_pixels, ci), add, &mut s.rows)
        });
        for band in g.bands() {
            let pixels = band.len() * g.out[1];
            let whole = pixels.next_multiple_of(32);
            let windows = room(&mut s.windows, whole * width + 16);
            gather(isa, g, image, &band, &mut s.window, windows, width);
            windows[pixels * width..].fill(T::default());
            let d = room(&mut s.gradient, whole * d_width + 16);
            let range = band.start * g.out[1]..band.end * g.out[1];
            pull_back(isa, d_image.pixels(range), &mut d[..pixels * d_width], d_width);
            d[pixels * d_width..].fill(T::default());
            let (a, d_operand) = ((&*windows, width, g.window_values()), (&*d, d_width, co));
            T::outer(isa, a, d_operand, pixels, dw, &mut s.operands);
            if let Some(db) = &mut db {
                column_sums(isa, &d[..pixels * d_width], d_width, db);
            }
            if let Some(sum) = &mut sum {
                let stride = channel_stride(g.window_values());
                let products = room(&mut s.products, pixels.next_multiple_of(16) * stride);
                T::product(isa, d, d_width, pixels, transposed, products);
                sum.scatter(isa, g, &band, products, stride);
            }
        }
        if let Some(sum) = &mut sum {
            sum.finish(isa, g);
        }
        if let Some(target) = &mut dx {
            target.sum(isa, source, n * in_pixels..(n + 1) * in_pixels);
        }
    }
}

/// Input gradients of one image while bands of windows are scattered into them: the padded rows that later bands still
/// touch are kept in f32, finished rows go to the map.
struct RowSums<'a, T> {
    dx: &'a mut [T],
    add: bool,
    /// Padded rows from `first` on.
    rows: &'a mut [f32],
    first: usize,
}

impl<'a, T: Element> RowSums<'a, T> {
    fn new(g: &Geometry, dx: &'a mut [T], add: bool, rows: &'a mut Vec<f32>) -> Self {
        let most = g.bands().map(|b| g.window_rows(&b).len()).max().unwrap_or(0) + g.stride[0];
        let rows = room(rows, most * g.window_columns() * g.channels[0]);
        rows.fill(0.0);
        Self { dx, add, rows, first: 0 }
    }

    fn scatter(&mut self, isa: Isa, g: &Geometry, band: &Range<usize>, products: &[f32], stride: usize) {
        let (ci, columns) = (g.channels[0], g.window_columns());
        self.advance(isa, g, band.start * g.stride[0]);
        let run = g.kernel[1] * ci;
        for (i, from) in products.chunks_exact(stride).take(band.len() * g.out[1]).enumerate() {
            let (y, x) = (i / g.out[1], i % g.out[1]);
            for (ky, from) in from[..g.window_values()].chunks_exact(run).enumerate() {
                let row = y * g.stride[0] + ky * g.dilation[0];
                let at = (row * columns + x * g.stride[1]) * ci;
                for (kx, from) in from.chunks_exact(ci).enumerate() {
                    super::maps::add(isa, from, &mut self.rows[at + kx * g.dilation[1] * ci..][..ci]);
                }
            }
        }
    }

    /// Gives the map all padded rows before `row`.
    fn advance(&mut self, isa: Isa, g: &Geometry, row: usize) {
        let (ci, columns) = (g.channels[0], g.window_columns());
        let done = row - self.first;
        let [height, width] = g.input;
        let inside = width.min(columns.saturating_sub(g.padding[1]));
        for (r, from) in self.rows.chunks_exact(columns * ci).take(done).enumerate() {
            let Some(y) = (self.first + r).checked_sub(g.padding[0]).filter(|&y| y < height) else {
                continue;
            };
            let from = &from[g.padding[1].min(columns) * ci..][..inside * ci];
            deposit(isa, from, ci, ci, &mut self.dx[y * width * ci..][..inside * ci], self.add);
            if !self.add {
                self.dx[(y * width + inside) * ci..(y + 1) * width * ci].fill(T::default());
            }
        }
        let shift = (done * columns * ci).min(self.rows.len());
        self.rows.copy_within(shift.., 0);
        let kept = self.rows.len() - shift;
        self.rows[kept..].fill(0.0);
        self.first = row;
    }

    /// Gives the map the rest; rows that no window reaches have no gradient.
    fn finish(&mut self, isa: Isa, g: &Geometry) {
        let end = g.padding[0] + g.input[0];
        let held = self.rows.len() / (g.window_columns() * g.channels[0]);
        self.advance(isa, g, (self.first + held).min(end).max(self.first));
        if !self.add && self.first < end {
            let y = self.first.saturating_sub(g.padding[0]);
            self.dx[y * g.input[1] * g.channels[0]..].fill(T::default());
        }
    }
}

fn backward_pointwise<T: Element>(
    isa: Isa,
    g: &Geometry,
    source: Source<'_, T>,
    gradient: Gradient<'_, T>,
    transposed: &Packed<T>,
    mut dx: Option<Target<'_, T>>,
    dw: &mut [f32],
    mut db: Option<&mut [f32]>,
    s: &mut Scratch<T>,
) {
    let [ci, co] = g.channels;
    let (width, d_width) = (operand_stride(ci), operand_stride(co));
    let pixels = gradient.dy.len() / co;
    for start in (0..pixels).step_by(CHUNK) {
        let range = start..(start + CHUNK).min(pixels);
        let n = range.len();
        let whole = n.next_multiple_of(32);
        let windows = room(&mut s.windows, whole * width + 16);
        read(isa, source.pixels(range.clone()), &mut windows[..n * width], width);
        windows[n * width..].fill(T::default());
        let d = room(&mut s.gradient, whole * d_width + 16);
        pull_back(isa, gradient.pixels(range.clone()), &mut d[..n * d_width], d_width);
        d[n * d_width..].fill(T::default());
        T::outer(isa, (windows, width, ci), (d, d_width, co), n, dw, &mut s.operands);
        if let Some(db) = &mut db {
            column_sums(isa, &d[..n * d_width], d_width, db);
        }
        if let Some(target) = &mut dx {
            let stride = channel_stride(ci);
            let products = room(&mut s.products, whole * stride);
            T::product(isa, d, d_width, n, transposed, products);
            target.put(isa, source, range, &products[..n * stride], stride);
        }
    }
}
