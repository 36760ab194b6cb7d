//! Convolution steps: weights packed for the kernels, and their call over a share of the rows.

use super::arena::{Arena, Storage, View};
use super::isa::Isa;
use super::kernels::conv::{panel_registers, panels, ConvArgs};
use super::kernels::epilogue::Rule;
pub(crate) use super::kernels::epilogue::{Formats, Residual};
use super::kernels::{bf16_bits, f16_bits, ConvKernel};
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
    /// Kernel, stride, dilation and padding above and to the left.
    pub fn sides(&self) -> [[usize; 2]; 4] {
        [self.kernel, self.stride, self.dilation, [self.padding[0], self.padding[1]]]
    }

    /// From a map's row 0 to the first byte of the window of output row `y`, pixel 0; may lie before it.
    pub fn start(&self, y: usize, input: &View) -> isize {
        let row = (y * self.stride[0]) as isize - self.padding[0] as isize;
        let values = row * input.row as isize - (self.padding[1] * input.pixel) as isize;
        values * input.storage.bytes() as isize
    }

    /// Index of the first value of the first output pixel's window.
    pub fn first(&self, input: &View) -> usize {
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
    pub formats: Formats,
    rule: Rule,
    kernel: ConvKernel,
    /// Groups, one after the other; in each panels of `[kh][kw][in][panel width]`, words of as many inputs as four bytes hold.
    weights: Arena,
    /// What sums start with.
    start: Arena,
    /// Of sums of u8: the factor, and what is added then.
    scale: Arena,
    bias: Arena,
    group_weights: usize,
    group_lanes: usize,
}

/// Largest magnitude of a weight as i8; also the largest sum of two of one sign whose products with u8 are added in 16 bits. Rounded,
/// each may be a half more: 128 together, and 128 * 255 is below 2^15.
const MOST: f32 = 127.0;

/// Whether u8 are multiplied by pairs of products in 16 bits (AVX2's, where there is no dot product): at twice the rate of f32 on
/// a Zen 3.
pub(crate) fn multiplies_pairs(isa: Isa) -> bool {
    ConvKernel::of(isa, Storage::U8, 1).pairs
}

/// The largest sum of two weights of one sign of input channels 2k and 2k + 1 at one tap, of `[in, area]`.
fn largest_pair(weight: &[f32], area: usize) -> f32 {
    let mut most = 0.0f32;
    for pair in weight.chunks_exact(2 * area) {
        for (a, b) in pair[..area].iter().zip(&pair[area..]) {
            most = most.max(a.max(0.0) + b.max(0.0)).max(-a.min(0.0) - b.min(0.0));
        }
    }
    most
}

impl ConvOp {
    /// Packs `weight` `[out, in/groups, kh, kw]` and `bias` `[out]`. Where the input is not f32, each group has a multiple of
    /// as many input channels as four bytes hold.
    pub fn new(
        isa: Isa,
        window: Window,
        groups: usize,
        [in_channels, out_channels]: [usize; 2],
        weight: &[f32],
        bias: &[f32],
        rule: (f32, Residual),
        formats: Formats,
    ) -> Self {
        let each = size_of::<f32>() / formats.input.storage.bytes();
        // As long as runs are where the input is dense.
        let columns = if window.dilation[1] == 1 { window.kernel[1] } else { 1 };
        let run = in_channels / groups * columns / each;
        let kernel = ConvKernel::of(isa, formats.input.storage, run);
        Self::with_kernel(kernel, window, groups, [in_channels, out_channels], weight, bias, rule, formats)
    }

    fn with_kernel(
        kernel: ConvKernel,
        window: Window,
        groups: usize,
        [in_channels, out_channels]: [usize; 2],
        weight: &[f32],
        bias: &[f32],
        rule: (f32, Residual),
        formats: Formats,
    ) -> Self {
        let lanes = kernel.lanes;
        let [kh, kw] = window.kernel;
        let (ci, co) = (in_channels / groups, out_channels / groups);
        let each = size_of::<f32>() / formats.input.storage.bytes();
        assert_eq!(weight.len(), out_channels * ci * kh * kw);
        assert_eq!(bias.len(), out_channels);
        assert!(ci.is_multiple_of(each), "input channels in words of four bytes");
        // In units of the output.
        let unit = 1.0 / formats.output.scale;
        let of_channel = |o: usize| &weight[o * ci * kh * kw..][..ci * kh * kw];
        let largest = |o: usize| {
            let one = of_channel(o).iter().fold(0.0, |m: f32, v| m.max(v.abs()));
            if kernel.pairs {
                one.max(largest_pair(of_channel(o), kh * kw))
            } else {
                one
            }
        };
        let step = |o: usize| {
            let largest = largest(o);
            // A smaller channel's step would be subnormal, or 0: its weights count as zeros.
            if largest >= f32::MIN_POSITIVE * MOST {
                largest / MOST
            } else {
                1.0
            }
        };
        let steps: Vec<f32> = (0..out_channels).map(step).collect();
        let to_half = if formats.input.storage == Storage::F16 { f16_bits } else { bf16_bits };
        let (mut packed, mut start, mut scale, mut added) = (vec![], vec![], vec![], vec![]);
        for g in 0..groups {
            for p in 0..panels(co, lanes) {
                let first = p * 2 * lanes;
                let width = panel_registers(co, lanes, p) * lanes;
                let channel = |j: usize| (first + j < co).then_some(g * co + first + j);
                for ky in 0..kh {
                    for kx in 0..kw {
                        for i in (0..ci).step_by(each) {
                            let at = |o: usize, i: usize| of_channel(o)[(i * kh + ky) * kw + kx];
                            packed.extend((0..width).map(|j| {
                                channel(j).map_or(0, |o| match formats.input.storage {
                                    Storage::F32 => (at(o, i) * unit).to_bits(),
                                    Storage::Bf16 | Storage::F16 => {
                                        let half = |i| u32::from(to_half(at(o, i) * unit));
                                        half(i) | half(i + 1) << 16
                                    }
                                    Storage::U8 => {
                                        let byte = |k| (at(o, i + k) / steps[o]).round_ties_even() as i8;
                                        u32::from_le_bytes(std::array::from_fn(|k| byte(k) as u8))
                                    }
                                })
                            }));
                        }
                    }
                }
                for j in 0..width {
                    let bias = channel(j).map_or(0.0, |o| bias[o]) * unit;
                    let sum = |o: usize| -> i32 {
                        of_channel(o).iter().map(|v| (v / steps[o]).round_ties_even() as i32).sum()
                    };
                    let (first, factor) = match formats.input.storage {
                        // What a window of zeros sums up to is taken off.
                        Storage::U8 => {
                            let zero = i32::from(formats.input.zero) - kernel.offset;
                            let all = channel(j).map_or(0, sum) * zero;
                            ((-all).cast_unsigned(), channel(j).map_or(0.0, |o| steps[o]))
                        }
                        _ => (bias.to_bits(), 0.0),
                    };
                    start.push(first);
                    scale.push(factor * formats.input.scale * unit);
                    added.push(bias);
                }
            }
        }
        let words = |w: &[u32]| Arena::from_slice(bytemuck::cast_slice(w));
        let whole = formats.input.storage == Storage::U8;
        let if_whole = |v: &[f32]| if whole { Arena::from_slice(v) } else { Arena::default() };
        Self {
            window,
            groups,
            in_channels,
            out_channels,
            formats,
            rule: Rule::new(rule.0, rule.1, &formats),
            kernel,
            weights: words(&packed),
            start: words(&start),
            scale: if_whole(&scale),
            bias: if_whole(&added),
            group_weights: packed.len() / groups,
            group_lanes: start.len() / groups,
        }
    }

    /// Whether it is 1x1 and every output pixel has its input's place.
    pub fn is_pointwise(&self) -> bool {
        let w = &self.window;
        w.kernel == [1, 1] && w.stride == [1, 1] && w.padding == [0; 4]
    }

    /// Whether it multiplies on AMX tiles.
    pub fn on_tiles(&self) -> bool {
        self.kernel.tiles
    }

    /// Bytes of packed weights.
    pub fn bytes(&self) -> usize {
        [&self.weights, &self.start, &self.scale, &self.bias].map(Arena::bytes).iter().sum()
    }

    /// What a step needs beyond the views, made once a plan.
    pub fn prepare(&self, input: &View, add: Option<&View>, output: &View) -> ConvTables {
        let w = &self.window;
        let ci = self.in_channels / self.groups;
        let bytes = input.storage.bytes();
        // A kernel row is one run of values where pixels are dense and not dilated.
        let merged = w.dilation[1] == 1 && input.pixel == ci;
        let columns = if merged { 1 } else { w.kernel[1] };
        let tap = |ky: usize, kx: usize| {
            (ky * w.dilation[0] * input.row + kx * w.dilation[1] * input.pixel) * bytes
        };
        let taps = (0..w.kernel[0]).flat_map(|ky| (0..columns).map(move |kx| tap(ky, kx))).collect();
        let [add_rows, add_columns] = residual_tables(add, output);
        let run = if merged { ci * w.kernel[1] } else { ci } * bytes / size_of::<f32>();
        ConvTables { taps, run, add_rows, add_columns }
    }

    /// The kernel's arguments for group `g`, all but where its input, output and residual are.
    fn args(&self, g: usize) -> ConvArgs<'_> {
        let lanes = g * self.group_lanes;
        let part = |a: &Arena, first: usize| a.floats()[first.min(a.floats().len())..].as_ptr();
        ConvArgs {
            input: std::ptr::null(),
            in_row: 0,
            in_pixel: 0,
            taps: &[0],
            run: 0,
            far: true,
            weights: part(&self.weights, g * self.group_weights).cast(),
            start: part(&self.start, lanes).cast(),
            scale: part(&self.scale, lanes),
            bias: part(&self.bias, lanes),
            output: std::ptr::null_mut(),
            out_row: 0,
            out_pixel: 0,
            width: 0,
            channels: self.out_channels / self.groups,
            rule: self.rule,
            add: std::ptr::null(),
            add_row: 0,
            add_pixel: 0,
            add_rows: &[],
            add_columns: &[],
        }
    }

    /// Rows `rows` of one image, of one group. `from` and `to` are where row 0 of input and output is, or would be if it were there;
    /// the views tell how rows and pixels lie. `add` is row 0 of the residual. `far`: the input may be far from the processor.
    ///
    /// # Safety
    /// The windows of these rows are there, and the residual's pixels, and room for the rows.
    pub unsafe fn rows(
        &self,
        tables: &ConvTables,
        [from, to]: [*const u8; 2],
        [input, output]: [&View; 2],
        add: Option<(*const u8, &View)>,
        rows: Range<usize>,
        far: bool,
    ) {
        let [in_bytes, out_bytes] = [input, output].map(|v| v.storage.bytes());
        let (out_row, width) = (output.row * out_bytes, output.shape.w);
        // The residual's rows by their table, where there is one, else as the output's.
        let (add_rows, add_first) = match tables.add_rows.get(rows.clone()) {
            Some(table) => (table, 0),
            None => (&[][..], rows.start),
        };
        let add_row = add.map_or(0, |(_, v)| v.row * v.storage.bytes());
        let args = ConvArgs {
            input: from.wrapping_offset(self.window.start(rows.start, input)),
            in_row: self.window.stride[0] * input.row * in_bytes,
            in_pixel: self.window.stride[1] * input.pixel * in_bytes,
            taps: &tables.taps,
            run: tables.run,
            far,
            output: to.cast_mut().wrapping_add(rows.start * out_row),
            out_row,
            out_pixel: output.pixel * out_bytes,
            width,
            rule: self.rule.unless(add.is_none()),
            add: add.map_or(std::ptr::null(), |(first, _)| first.wrapping_add(add_first * add_row)),
            add_row,
            add_pixel: add.map_or(0, |(_, v)| v.pixel * v.storage.bytes()),
            add_rows,
            add_columns: &tables.add_columns,
            ..self.args(0)
        };
        // SAFETY: the caller's contract.
        unsafe { (self.kernel.run)(&args, 0..rows.len(), 0..panels(self.out_channels, self.kernel.lanes)) };
    }

    /// Computes this thread's share of the output, or of what is `asked` for of it.
    ///
    /// # Safety
    /// `base` is an arena in which the views lie, the input's halo holds zeros and covers the
    /// padding, the output overlaps no input, and all threads of the team call this together.
    pub unsafe fn run(
        &self,
        base: *mut u8,
        tables: &ConvTables,
        [input, output]: [&View; 2],
        add: Option<&View>,
        asked: Option<&Part>,
        team: &Team,
    ) {
        let (ci, co) = (self.in_channels / self.groups, self.out_channels / self.groups);
        let lanes = self.kernel.lanes;
        let all = panels(co, lanes);
        let depth = self.group_weights / (self.group_lanes.max(1));
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
                        v.byte(base, v.at(n, 0, 0) + add_first * add_pixel + g * co).cast_const()
                    });
                    let window = self.window.first(input) + n * input.image + first * in_pixel + g * ci;
                    let [in_bytes, out_bytes] = [input, output].map(|v| v.storage.bytes());
                    let add_bytes = add.map_or(0, |v| v.storage.bytes());
                    let args = ConvArgs {
                        input: input.byte(base, window),
                        in_row: self.window.stride[0] * input.row * in_bytes,
                        in_pixel: in_pixel * in_bytes,
                        taps: &tables.taps,
                        run: tables.run,
                        output: output.byte(base, output.at(n, 0, 0) + first * out_pixel + g * co),
                        out_row: output.row * out_bytes,
                        out_pixel: out_pixel * out_bytes,
                        width: columns.len(),
                        rule: self.rule.unless(add.is_none()),
                        add: add_from,
                        add_row: add.map_or(0, |v| v.row * add_bytes),
                        add_pixel: add_pixel * add_bytes,
                        add_rows: &tables.add_rows,
                        add_columns,
                        ..self.args(g)
                    };
                    let mut p = mine.start;
                    while p < mine.end {
                        let end = (p + group).min(mine.end);
                        (self.kernel.run)(&args, rows.clone(), p..end);
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

#[cfg(test)]
mod tests;
