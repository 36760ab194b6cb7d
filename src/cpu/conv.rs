//! Convolution steps: weights packed for the kernels, and their call over a share of the rows.

use super::arena::{Arena, View};
use super::isa::Isa;
pub(crate) use super::kernels::conv::Residual;
use super::kernels::conv::{panel_registers, panels, ConvArgs};
use super::kernels::depthwise::DepthwiseArgs;
use super::kernels::Kernels;
use super::part::Part;
use super::simple::blends;
use super::threads::Team;
use std::ops::Range;

/// Weights walked together while a block of rows is computed: half of a 2 MiB second-level cache,
/// in floats.
const PANEL_GROUP: usize = 1 << 18;

/// Geometry of a convolution without its weights: kernel, stride, dilation, padding above and left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Window {
    pub kernel: [usize; 2],
    pub stride: [usize; 2],
    pub dilation: [usize; 2],
    /// Top, left, bottom, right.
    pub padding: [usize; 4],
}

impl Window {
    /// Index of the first float of the first output pixel's window.
    fn first(&self, input: &View) -> usize {
        input.offset - self.padding[0] * input.row - self.padding[1] * input.pixel
    }

    /// Whether every window of `out` rows and columns lies inside `input` and its halo.
    pub fn fits(&self, input: &View, out: [usize; 2]) -> bool {
        let size = [input.shape.h, input.shape.w];
        (0..2).all(|axis| {
            let last = (out[axis] - 1) * self.stride[axis] + self.dilation[axis] * (self.kernel[axis] - 1);
            let (before, after) = (self.padding[axis], input.halo[axis + 2]);
            before <= input.halo[axis] && last < size[axis] + before + after
        })
    }
}

/// A dense (or grouped, not depthwise) convolution with packed weights.
pub(crate) struct ConvOp {
    pub window: Window,
    pub groups: usize,
    pub in_channels: usize,
    pub out_channels: usize,
    /// Result = max(x, slope * x).
    pub slope: f32,
    /// Where the second input is added, if there is one.
    pub residual: Residual,
    kernels: &'static Kernels,
    /// Groups, one after the other; in each panels of `[kh][kw][in][panel width]`.
    weights: Arena,
    bias: Arena,
    group_weights: usize,
    group_bias: usize,
}

impl ConvOp {
    /// Packs `weight` `[out, in/groups, kh, kw]` and `bias` `[out]`.
    pub fn new(
        isa: Isa,
        window: Window,
        groups: usize,
        [in_channels, out_channels]: [usize; 2],
        weight: &[f32],
        bias: &[f32],
        slope: f32,
        residual: Residual,
    ) -> Self {
        let kernels = Kernels::of(isa);
        let lanes = kernels.lanes;
        let [kh, kw] = window.kernel;
        let (ci, co) = (in_channels / groups, out_channels / groups);
        assert_eq!(weight.len(), out_channels * ci * kh * kw);
        assert_eq!(bias.len(), out_channels);
        let (mut packed, mut packed_bias) = (Vec::new(), Vec::new());
        for g in 0..groups {
            for p in 0..panels(co, lanes) {
                let first = p * 2 * lanes;
                let width = panel_registers(co, lanes, p) * lanes;
                let channel = |j: usize| (first + j < co).then_some(g * co + first + j);
                for ky in 0..kh {
                    for kx in 0..kw {
                        for i in 0..ci {
                            let at = |o: usize| weight[((o * ci + i) * kh + ky) * kw + kx];
                            packed.extend((0..width).map(|j| channel(j).map_or(0.0, at)));
                        }
                    }
                }
                packed_bias.extend((0..width).map(|j| channel(j).map_or(0.0, |o| bias[o])));
            }
        }
        Self {
            window,
            groups,
            in_channels,
            out_channels,
            slope,
            residual,
            kernels,
            weights: Arena::from_slice(&packed),
            bias: Arena::from_slice(&packed_bias),
            group_weights: packed.len() / groups,
            group_bias: packed_bias.len() / groups,
        }
    }

    /// Bytes of packed weights.
    pub fn bytes(&self) -> usize {
        self.weights.bytes() + self.bias.bytes()
    }

    /// What a step needs beyond the views, made once a plan.
    pub fn prepare(&self, input: &View, add: Option<&View>, output: &View) -> ConvTables {
        let w = &self.window;
        let ci = self.in_channels / self.groups;
        // A kernel row is one run of floats where pixels are dense and not dilated.
        let merged = w.dilation[1] == 1 && input.pixel == ci;
        let columns = if merged { 1 } else { w.kernel[1] };
        let tap = |ky: usize, kx: usize| ky * w.dilation[0] * input.row + kx * w.dilation[1] * input.pixel;
        let taps = (0..w.kernel[0]).flat_map(|ky| (0..columns).map(move |kx| tap(ky, kx))).collect();
        let [add_rows, add_columns] = residual_tables(add, output);
        ConvTables { taps, run: if merged { ci * w.kernel[1] } else { ci }, add_rows, add_columns }
    }

    /// A 1x1 convolution of one group on rows that lie densely from `from` on, into rows `rows` of image `n`.
    ///
    /// # Safety
    /// As [`ConvOp::run`] for residual and output; `from` has all pixels of as many rows.
    pub unsafe fn rows_from(
        &self,
        from: *const f32,
        base: *mut f32,
        [add_rows, add_columns]: &[Vec<u32>; 2],
        add: Option<&View>,
        output: &View,
        n: usize,
        rows: Range<usize>,
    ) {
        // The residual's rows by their table, where there is one, else as the output's.
        let (add_rows, add_first) = match add_rows.get(rows.clone()) {
            Some(table) => (table, 0),
            None => (&[][..], rows.start),
        };
        // SAFETY: the caller's contract.
        unsafe {
            let args = ConvArgs {
                input: from,
                in_row: output.shape.w * self.in_channels,
                in_pixel: self.in_channels,
                taps: &[0],
                run: self.in_channels,
                weights: self.weights.floats().as_ptr(),
                bias: self.bias.floats().as_ptr(),
                output: base.add(output.at(n, rows.start, 0)),
                out_row: output.row,
                out_pixel: output.pixel,
                width: output.shape.w,
                channels: self.out_channels,
                slope: self.slope,
                residual: if add.is_some() { self.residual } else { Residual::None },
                add: add.map_or(std::ptr::null(), |v| base.add(v.at(n, add_first, 0)).cast_const()),
                add_row: add.map_or(0, |v| v.row),
                add_pixel: add.map_or(0, |v| v.pixel),
                add_rows,
                add_columns,
            };
            (self.kernels.conv)(&args, 0..rows.len(), 0..panels(self.out_channels, self.kernels.lanes));
        }
    }

    /// Computes this thread's share of the output, or of what is `asked` for of it.
    ///
    /// # Safety
    /// `base` is an arena in which the views lie, the input's halo holds zeros and covers the
    /// padding, the output overlaps no input, and all threads of the team call this together.
    pub unsafe fn run(
        &self,
        base: *mut f32,
        tables: &ConvTables,
        [input, output]: [&View; 2],
        add: Option<&View>,
        asked: Option<&Part>,
        team: &Team,
    ) {
        let (ci, co) = (self.in_channels / self.groups, self.out_channels / self.groups);
        let lanes = self.kernels.lanes;
        let all = panels(co, lanes);
        let depth = self.group_weights / (self.group_bias.max(1));
        // Images of one pixel each, as a fully connected layer has them, are the pixels of one row: then the kernel takes
        // several of them at a time through the weights.
        let one = (output.shape.h, output.shape.w) == (1, 1)
            && add.is_none_or(|a| (a.shape.h, a.shape.w) == (1, 1));
        let (images, width) = if one { (1, output.shape.n) } else { (output.shape.n, output.shape.w) };
        let pixel = |v: &View| if one { v.image } else { v.pixel };
        let height = output.shape.h;
        let rows = images * height;
        // Few rows and many channels: share the panels instead of the rows.
        let by_panel = asked.is_none() && rows < 2 * team.threads && all >= team.threads;
        let mine = if by_panel { team.share(all) } else { 0..all };
        let own = if by_panel { Part::Rows(0..rows) } else { Part::rows(images, height, team) };
        let part = asked.unwrap_or(&own);
        let group = (PANEL_GROUP / (depth * 2 * lanes).max(1)).max(1);
        let (in_pixel, out_pixel) =
            (if one { input.image } else { self.window.stride[1] * input.pixel }, pixel(output));
        for g in 0..self.groups {
            part.each([height, width], |n, rows, columns| {
                let first = columns.start;
                // The residual's columns by their table, where there is one, else as the output's.
                let (add_columns, add_first) = match tables.add_columns.get(columns.clone()) {
                    Some(table) => (table, 0),
                    None => (&[][..], first),
                };
                // SAFETY: the caller's contract; channel offsets stay inside the views' pixels.
                unsafe {
                    let add_pixel = add.map_or(0, pixel);
                    let add_from = add.map_or(std::ptr::null(), |v| {
                        base.add(v.at(n, 0, 0) + add_first * add_pixel + g * co).cast_const()
                    });
                    let args = ConvArgs {
                        input: base
                            .add(self.window.first(input) + n * input.image + first * in_pixel + g * ci),
                        in_row: self.window.stride[0] * input.row,
                        in_pixel,
                        taps: &tables.taps,
                        run: tables.run,
                        weights: self.weights.floats().as_ptr().add(g * self.group_weights),
                        bias: self.bias.floats().as_ptr().add(g * self.group_bias),
                        output: base.add(output.at(n, 0, 0) + first * out_pixel + g * co),
                        out_row: output.row,
                        out_pixel,
                        width: columns.len(),
                        channels: co,
                        slope: self.slope,
                        residual: if add.is_some() { self.residual } else { Residual::None },
                        add: add_from,
                        add_row: add.map_or(0, |v| v.row),
                        add_pixel,
                        add_rows: &tables.add_rows,
                        add_columns,
                    };
                    let mut p = mine.start;
                    while p < mine.end {
                        let end = (p + group).min(mine.end);
                        (self.kernels.conv)(&args, rows.clone(), p..end);
                        p = end;
                    }
                }
            });
        }
    }
}

/// Rows and columns of a residual for rows and columns of the output, where its size is another; else nothing.
pub(crate) fn residual_tables(add: Option<&View>, output: &View) -> [Vec<u32>; 2] {
    let Some(add) = add.filter(|a| (a.shape.h, a.shape.w) != (output.shape.h, output.shape.w)) else {
        return [Vec::new(), Vec::new()];
    };
    let low = |from: usize, to: usize| blends(from, to, false).iter().map(|b| b.low).collect();
    [low(add.shape.h, output.shape.h), low(add.shape.w, output.shape.w)]
}

/// A step's tables: offsets of the window's runs, and the source of every residual row and column.
pub(crate) struct ConvTables {
    taps: Vec<usize>,
    run: usize,
    add_rows: Vec<u32>,
    add_columns: Vec<u32>,
}

impl ConvTables {
    /// Heap bytes held.
    pub fn bytes(&self) -> usize {
        self.taps.capacity() * size_of::<usize>()
            + (self.add_rows.capacity() + self.add_columns.capacity()) * 4
    }
}

/// A depthwise convolution; batch normalisation that could not be folded is one with a 1x1 window.
pub(crate) struct DepthwiseOp {
    pub window: Window,
    pub channels: usize,
    /// Result = max(x, slope * x).
    pub slope: f32,
    kernels: &'static Kernels,
    /// `[kh][kw][channels]`.
    weights: Arena,
    bias: Arena,
}

impl DepthwiseOp {
    /// Packs `weight` `[channels, 1, kh, kw]` and `bias` `[channels]`.
    pub fn new(isa: Isa, window: Window, channels: usize, weight: &[f32], bias: &[f32], slope: f32) -> Self {
        let taps = window.kernel[0] * window.kernel[1];
        assert_eq!(weight.len(), channels * taps);
        assert_eq!(bias.len(), channels);
        let packed: Vec<f32> =
            (0..taps).flat_map(|t| (0..channels).map(move |c| weight[c * taps + t])).collect();
        Self {
            window,
            channels,
            slope,
            kernels: Kernels::of(isa),
            weights: Arena::from_slice(&packed),
            bias: Arena::from_slice(bias),
        }
    }

    /// Bytes of packed weights.
    pub fn bytes(&self) -> usize {
        self.weights.bytes() + self.bias.bytes()
    }

    /// Rows `rows` of image `n`, each `width` pixels, densely from `to` on.
    ///
    /// # Safety
    /// As [`ConvOp::run`] for the input; `to` has room for as many pixels.
    pub unsafe fn rows_into(
        &self,
        base: *mut f32,
        input: &View,
        n: usize,
        rows: Range<usize>,
        width: usize,
        to: *mut f32,
    ) {
        let w = &self.window;
        let in_row = w.stride[0] * input.row;
        // SAFETY: the caller's contract.
        unsafe {
            let args = DepthwiseArgs {
                input: base.add(w.first(input) + n * input.image + rows.start * in_row),
                in_row,
                in_pixel: w.stride[1] * input.pixel,
                kernel: w.kernel,
                tap_row: w.dilation[0] * input.row,
                tap_pixel: w.dilation[1] * input.pixel,
                weights: self.weights.floats().as_ptr(),
                bias: self.bias.floats().as_ptr(),
                output: to,
                out_row: width * self.channels,
                out_pixel: self.channels,
                width,
                channels: self.channels,
                slope: self.slope,
            };
            (self.kernels.depthwise)(&args, 0..rows.len());
        }
    }

    /// Computes this thread's part of the output.
    ///
    /// # Safety
    /// As [`ConvOp::run`].
    pub unsafe fn run(&self, base: *mut f32, input: &View, output: &View, part: &Part) {
        let w = &self.window;
        let in_pixel = w.stride[1] * input.pixel;
        part.each([output.shape.h, output.shape.w], |n, rows, columns| {
            // SAFETY: the caller's contract.
            unsafe {
                let args = DepthwiseArgs {
                    input: base.add(w.first(input) + n * input.image + columns.start * in_pixel),
                    in_row: w.stride[0] * input.row,
                    in_pixel,
                    kernel: w.kernel,
                    tap_row: w.dilation[0] * input.row,
                    tap_pixel: w.dilation[1] * input.pixel,
                    weights: self.weights.floats().as_ptr(),
                    bias: self.bias.floats().as_ptr(),
                    output: base.add(output.at(n, 0, columns.start)),
                    out_row: output.row,
                    out_pixel: output.pixel,
                    width: columns.len(),
                    channels: self.channels,
                    slope: self.slope,
                };
                (self.kernels.depthwise)(&args, rows);
            }
        });
    }
}
