//! Convolutions forward and backward, transposed ones by the same means.
//!
//! The gradient of a convolution's input is a convolution of the output's gradient with the weights turned round. With a stride, the
//! input's pixels fall into phases (of stride 2, four), each of which meets other taps of the kernel and at each of them neighbouring
//! pixels of the gradient: a convolution of stride 1 a phase, which writes every second pixel.

use super::{fits, kernel, kernels, MapIn, TrainOps, Values};
use crate::error::{Error, Result};
use crate::gpu::kernels::Kernel;
use crate::gpu::map::{Element, Map};
use crate::gpu::ops::conv::{pair, ConvArgs, ConvWindow, DepthwiseArgs, Joined};
use crate::gpu::ops::{blocks, Device, THREADS};

kernels! {
    /// Of `cuda/train_conv.cu`, but for the tiles.
    Plain of TrainConv:
    pack_weights, conv_weights_any, conv_weights_finish, depthwise_weights, depthwise_data,
}

/// A tile of the tensor core kernels for weight gradients.
struct Tile {
    outputs: usize,
    columns: usize,
    threads: u32,
    kernel: Kernel,
}

impl Tile {
    /// Three stages of 32 pixels, two bytes a value: `conv_weights_tiles` of `cuda/train_conv.cu`.
    fn shared(outputs: usize, columns: usize) -> u32 {
        (3 * 32 * (outputs + columns) * 2) as u32
    }
}

/// Output channels, columns and threads of the tiles.
const TILES: [(usize, usize, u32, &str); 3] = [
    (128, 128, 256, "conv_weights_bf16_128x128"),
    (64, 64, 128, "conv_weights_bf16_64x64"),
    (32, 64, 64, "conv_weights_bf16_32x64"),
];

/// Output channels and columns of a block of `conv_weights_any`, and its shared memory.
const ANY_SIDE: usize = 64;
const ANY_SHARED: u32 = 2 * 16 * (64 + 4) * 4;

/// Blocks that a weight gradient is cut into, as far as there are pixels for them: a few for each multiprocessor of any device.
const BLOCKS: usize = 512;
/// Fewest pixels of a range, and most bytes of all ranges' sums.
const LEAST_SPAN: usize = 256;
const MOST_PARTIAL: usize = 64 << 20;

/// The kernels of this file.
pub(super) struct Kernels {
    plain: Plain,
    /// Largest first; none where tensor cores do not multiply bf16.
    tiles: Vec<Tile>,
}

impl Kernels {
    pub(super) fn new(device: &Device) -> Result<Self> {
        let tile = |&(outputs, columns, threads, name): &(usize, usize, u32, &'static str)| {
            let kernel = kernel(device, name, Tile::shared(outputs, columns))?;
            Ok(Tile { outputs, columns, threads, kernel })
        };
        let tiles = if device.multiplies(Element::Bf16) {
            TILES.iter().map(tile).collect::<Result<_>>()?
        } else {
            Vec::new()
        };
        Ok(Self { plain: Plain::new(device)?, tiles })
    }
}

/// A convolution, whose weights are `[outputs][inputs / groups][rows][columns]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Filter {
    /// Its window.
    pub window: ConvWindow,
    /// Groups.
    pub groups: usize,
    /// Input channels.
    pub inputs: usize,
    /// Output channels.
    pub outputs: usize,
}

impl Filter {
    fn taps(&self) -> usize {
        self.window.kernel[0] * self.window.kernel[1]
    }

    fn weights(&self) -> usize {
        self.outputs * (self.inputs / self.groups.max(1)) * self.taps()
    }

    /// One filter a channel, of which there are several.
    fn is_depthwise(&self) -> bool {
        self.groups > 1 && self.groups == self.inputs && self.groups == self.outputs
    }

    fn check(&self, weights: &Values<'_>) -> Result<u64> {
        let w = &self.window;
        let whole = self.groups > 0
            && self.inputs.is_multiple_of(self.groups)
            && self.outputs.is_multiple_of(self.groups)
            && [w.kernel, w.stride, w.dilation].concat().iter().all(|v| (1..1 << 16).contains(v));
        if !whole || self.groups >= 1 << 16 || self.taps() >= 1 << 16 {
            return Err(Error::Internal(format!("a convolution {self:?} on a device")));
        }
        weights.address(self.weights())
    }
}

/// The taps of an axis that a phase of a stride meets, and the convolution along the axis that they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Phase {
    /// The first of its pixels; they lie a stride apart.
    start: usize,
    /// How many there are.
    len: usize,
    /// The first tap, from tap to tap, and how many.
    first: usize,
    step: usize,
    count: usize,
    /// Of the convolution of the output's gradient, whose taps run backwards.
    dilation: i32,
    pad: i32,
}

impl Phase {
    /// Pixel `start + j * stride` of the input lies under tap `k` of the window `(start + j * stride + pad - k * dilation) / stride`
    /// where that is whole. With k = first + m * step it is j + nearest - m * (dilation * step / stride).
    fn of(start: usize, size: usize, kernel: usize, stride: usize, dilation: usize, pad: usize) -> Self {
        let (s, d) = (stride as i64, dilation as i64);
        let over = |k: usize| (start + pad) as i64 - k as i64 * d;
        let len = size.saturating_sub(start).div_ceil(stride);
        let Some(first) = (0..kernel).find(|&k| over(k) % s == 0) else {
            return Self { start, len, first: 0, step: 1, count: 0, dilation: 1, pad: 0 };
        };
        let step = (1..=stride).find(|&step| (step as i64 * d) % s == 0).unwrap_or(stride);
        let count = (kernel - first).div_ceil(step);
        let (nearest, apart) = (over(first) / s, d * step as i64 / s);
        let pad = (count as i64 - 1) * apart - nearest;
        Self { start, len, first, step, count, dilation: apart as i32, pad: pad as i32 }
    }
}

/// `PackArgs` of `cuda/train_conv.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct PackArgs {
    from: u64,
    to: u64,
    rows: i32,
    channels: i32,
    element: i32,
    outputs: i32,
    inputs: i32,
    groups: i32,
    kernel: [i32; 2],
    turned: i32,
    first: [i32; 2],
    step: [i32; 2],
    count: [i32; 2],
}

/// `WeightArgs` of `cuda/train_conv.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct WeightArgs {
    input: Map,
    gradient: Map,
    partial: u64,
    kernel: [i32; 2],
    stride: [i32; 2],
    dilation: [i32; 2],
    pad: [i32; 2],
    channels: i32,
    groups: i32,
    span: i32,
}

/// `DepthwiseWeightArgs` of `cuda/train_conv.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct DepthwiseWeightArgs {
    args: WeightArgs,
    lanes: i32,
}

/// `WeightSumArgs` of `cuda/train_conv.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct WeightSumArgs {
    partial: u64,
    d_weights: u64,
    ranges: i32,
    outputs: i32,
    taps: i32,
    channels: i32,
    inputs: i32,
}

/// `DepthwiseDataArgs` of `cuda/train_conv.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct DepthwiseDataArgs {
    gradient: Map,
    input: Map,
    weights: u64,
    kernel: [i32; 2],
    stride: [i32; 2],
    dilation: [i32; 2],
    pad: [i32; 2],
    add: i32,
}

impl TrainOps {
    /// Writes max(v, slope * v) to `y`, v the convolution of `x` with `weights`, and `bias` where there is one.
    pub fn conv(
        &mut self,
        filter: &Filter,
        weights: Values<'_>,
        bias: Option<Values<'_>>,
        x: MapIn<'_>,
        y: MapIn<'_>,
        slope: f32,
    ) -> Result<()> {
        let from = filter.check(&weights)?;
        fits("a convolution", &[(&x, filter.inputs), (&y, filter.outputs)])?;
        let bias = self.bias(bias, filter.outputs)?;
        let w = &filter.window;
        let (kernel, stride, dilation, pad) = (pair(w.kernel), pair(w.stride), pair(w.dilation), pair(w.pad));
        let (input, output) = (x.map()?, y.map()?);
        if filter.is_depthwise() {
            if x.view.element != self.element {
                return Err(Error::Internal("a depthwise convolution of another type".into()));
            }
            let weights = self.pack_depthwise(filter, from)?;
            let args = DepthwiseArgs { input, output, weights, bias, kernel, stride, dilation, pad, slope };
            let s = y.view.shape;
            let threads = s.n * s.h * s.w * (s.c + y.view.tail).div_ceil(8);
            // SAFETY: maps, weights and bias lie in their buffers and have the sizes; the args are the kernel's struct.
            return unsafe { self.depthwise.launch(&self.stream, blocks(threads), THREADS, 0, &args) };
        }
        let (weights, channels) = self.pack(filter, from)?;
        let args = ConvArgs {
            input,
            output,
            add: Map::default(),
            weights,
            bias,
            kernel,
            stride,
            dilation,
            pad,
            channels: channels as i32,
            groups: filter.groups as i32,
            residual: Joined::No as i32,
            slope,
        };
        // SAFETY: as above.
        unsafe { self.conv.launch(&self.stream, &x.absolute()?, &args) }
    }

    /// Writes the gradient of the convolution's input to `x`, or adds it, from that of its output, `d`. With a `bias` it is the
    /// transposed convolution of `d`.
    pub fn conv_back(
        &mut self,
        filter: &Filter,
        weights: Values<'_>,
        bias: Option<Values<'_>>,
        d: MapIn<'_>,
        x: MapIn<'_>,
        add: bool,
    ) -> Result<()> {
        let from = filter.check(&weights)?;
        fits("a convolution's gradient", &[(&x, filter.inputs), (&d, filter.outputs)])?;
        let (gradient, input) = (d.map()?, x.map()?);
        let w = &filter.window;
        if filter.is_depthwise() && bias.is_none() {
            let weights = self.pack_depthwise(filter, from)?;
            let (kernel, stride, dilation, pad) =
                (pair(w.kernel), pair(w.stride), pair(w.dilation), pair(w.pad));
            let add = add.into();
            let args = DepthwiseDataArgs { gradient, input, weights, kernel, stride, dilation, pad, add };
            let s = x.view.shape;
            let threads = s.n * s.h * s.w * (s.c + x.view.tail).div_ceil(8);
            // SAFETY: as above.
            return unsafe {
                self.weights.plain.depthwise_data.launch(&self.stream, blocks(threads), THREADS, 0, &args)
            };
        }
        let only_taps = add && bias.is_none();
        let bias = self.bias(bias, filter.inputs)?;
        let size = [x.view.shape.h, x.view.shape.w];
        let phases = |axis: usize| {
            (0..w.stride[axis])
                .map(move |start| {
                    Phase::of(
                        start,
                        size[axis],
                        w.kernel[axis],
                        w.stride[axis],
                        w.dilation[axis],
                        w.pad[axis],
                    )
                })
                .filter(|phase| phase.len > 0)
        };
        for down in phases(0) {
            for over in phases(1) {
                if only_taps && down.count * over.count == 0 {
                    continue;
                }
                let (weights, channels) = self.pack_turned(filter, from, [down, over])?;
                let output = every(&input, x.view.element, [down, over], w.stride);
                let args = ConvArgs {
                    input: gradient,
                    output,
                    add: if add { output } else { Map::default() },
                    weights,
                    bias,
                    kernel: [down.count as i32, over.count as i32],
                    stride: [1, 1],
                    dilation: [down.dilation, over.dilation],
                    pad: [down.pad, over.pad],
                    channels: channels as i32,
                    groups: filter.groups as i32,
                    residual: if add { Joined::Before } else { Joined::No } as i32,
                    slope: 1.0,
                };
                // SAFETY: as above; a thread reads of the residual what it writes itself.
                unsafe { self.conv.launch(&self.stream, &d.absolute()?, &args)? };
            }
        }
        Ok(())
    }

    /// Adds the gradient of the convolution's weights to `gradient`, from what it read, `x`, and the gradient of its output, `d`.
    pub fn conv_weights_back(
        &mut self,
        filter: &Filter,
        x: MapIn<'_>,
        d: MapIn<'_>,
        gradient: Values<'_>,
    ) -> Result<()> {
        let d_weights = filter.check(&gradient)?;
        fits("a convolution's weight gradient", &[(&x, filter.inputs), (&d, filter.outputs)])?;
        let w = &filter.window;
        let (taps, s) = (filter.taps(), d.view.shape);
        let pixels = s.n * s.h * s.w;
        let inputs = filter.inputs / filter.groups;
        let mut args = WeightArgs {
            input: x.map()?,
            gradient: d.map()?,
            partial: 0,
            kernel: pair(w.kernel),
            stride: pair(w.stride),
            dilation: pair(w.dilation),
            pad: pair(w.pad),
            channels: inputs as i32,
            groups: filter.groups as i32,
            span: 0,
        };
        let ranges;
        if filter.is_depthwise() {
            let lanes = filter.outputs.next_power_of_two().min(64);
            let across = filter.outputs.div_ceil(lanes);
            let span;
            (ranges, span) = cut(pixels, across * taps, filter.weights() * 4);
            args.partial = self.partial.bytes(&self.device, ranges * filter.weights() * 4)?;
            args.span = span as i32;
            let args = DepthwiseWeightArgs { args, lanes: lanes as i32 };
            let grid = [ranges as u32, across as u32, taps as u32];
            // SAFETY: as above.
            unsafe {
                let kernel = &self.weights.plain.depthwise_weights;
                kernel.launch(&self.stream, grid, THREADS, THREADS * 4, &args)?;
            }
        } else {
            let whole = |m: &MapIn<'_>| m.view.is_whole_vectors() && m.view.element == Element::Bf16;
            let tiled = filter.groups == 1 && whole(&x) && whole(&d) && !self.weights.tiles.is_empty();
            let channels = if tiled { inputs.next_multiple_of(8) } else { inputs };
            let depth = taps * channels;
            let each = filter.outputs / filter.groups;
            let (outputs, columns) = if tiled {
                let fits = |t: &&Tile| t.outputs < 2 * each && (t.columns < 128 || depth >= 128);
                let tile = self.weights.tiles.iter().find(fits).or(self.weights.tiles.last());
                let tile = tile.ok_or_else(|| Error::Internal("no tile".into()))?;
                (tile.outputs, tile.columns)
            } else {
                (ANY_SIDE, ANY_SIDE)
            };
            let tiles = each.div_ceil(outputs) * depth.div_ceil(columns);
            let span;
            (ranges, span) = cut(pixels, tiles * filter.groups, filter.outputs * depth * 4);
            args.channels = channels as i32;
            args.span = span as i32;
            args.partial = self.partial.bytes(&self.device, ranges * filter.outputs * depth * 4)?;
            let grid = [tiles as u32, filter.groups as u32, ranges as u32];
            let tile =
                self.weights.tiles.iter().find(|t| tiled && (t.outputs, t.columns) == (outputs, columns));
            // SAFETY: as above.
            unsafe {
                match tile {
                    Some(t) => {
                        t.kernel.launch(
                            &self.stream,
                            grid,
                            t.threads,
                            Tile::shared(outputs, columns),
                            &args,
                        )?;
                    }
                    None => {
                        let kernel = &self.weights.plain.conv_weights_any;
                        kernel.launch(&self.stream, grid, THREADS, ANY_SHARED, &args)?;
                    }
                }
            }
        }
        let finish = WeightSumArgs {
            partial: args.partial,
            d_weights,
            ranges: ranges as i32,
            outputs: filter.outputs as i32,
            taps: taps as i32,
            channels: args.channels,
            inputs: inputs as i32,
        };
        let threads = filter.outputs * taps * args.channels as usize;
        // SAFETY: as above.
        unsafe {
            self.weights.plain.conv_weights_finish.launch(&self.stream, blocks(threads), THREADS, 0, &finish)
        }
    }

    /// The address of a bias of `len` values, zeros where there is none.
    fn bias(&mut self, bias: Option<Values<'_>>, len: usize) -> Result<u64> {
        bias.map_or_else(|| self.zeros(len), |b| b.address(len))
    }

    /// The address of a convolution's weights as its kernels read them, and the channels of a tap with the padding.
    fn pack(&mut self, f: &Filter, from: u64) -> Result<(u64, usize)> {
        let inputs = f.inputs / f.groups;
        let channels = inputs.next_multiple_of(self.element.channel_step());
        let args = PackArgs {
            from,
            to: 0,
            rows: f.outputs as i32,
            channels: channels as i32,
            element: self.element as i32,
            outputs: f.outputs as i32,
            inputs: inputs as i32,
            groups: f.groups as i32,
            kernel: pair(f.window.kernel),
            turned: 0,
            first: [0; 2],
            step: [1; 2],
            count: pair(f.window.kernel),
        };
        Ok((self.launch_pack(args)?, channels))
    }

    /// As [`TrainOps::pack`], for the gradient of a phase of the input.
    fn pack_turned(&mut self, f: &Filter, from: u64, [down, over]: [Phase; 2]) -> Result<(u64, usize)> {
        let channels = (f.outputs / f.groups).next_multiple_of(self.element.channel_step());
        let both = |of: fn(&Phase) -> usize| [of(&down) as i32, of(&over) as i32];
        let args = PackArgs {
            from,
            to: 0,
            rows: f.inputs as i32,
            channels: channels as i32,
            element: self.element as i32,
            outputs: f.outputs as i32,
            inputs: (f.inputs / f.groups) as i32,
            groups: f.groups as i32,
            kernel: pair(f.window.kernel),
            turned: 1,
            first: both(|p| p.first),
            step: both(|p| p.step),
            count: both(|p| p.count),
        };
        Ok((self.launch_pack(args)?, channels))
    }

    /// The address of a depthwise convolution's weights as `[tap][channel]`, f32: one row turned round, whose taps run backwards from the
    /// last.
    fn pack_depthwise(&mut self, f: &Filter, from: u64) -> Result<u64> {
        let kernel = pair(f.window.kernel);
        self.launch_pack(PackArgs {
            from,
            to: 0,
            rows: 1,
            channels: f.outputs as i32,
            element: Element::F32 as i32,
            outputs: f.outputs as i32,
            inputs: 1,
            groups: 1,
            kernel,
            turned: 1,
            first: kernel.map(|k| k - 1),
            step: [-1; 2],
            count: kernel,
        })
    }

    fn launch_pack(&mut self, args: PackArgs) -> Result<u64> {
        let values = args.rows as usize * args.channels as usize * (args.count[0] * args.count[1]) as usize;
        if values > i32::MAX as usize {
            return Err(Error::LimitExceeded("a convolution's weights are too large for the device".into()));
        }
        let to = self.packed.bytes(&self.device, values * 4)?;
        // SAFETY: the weights are there, as `Filter::check` has seen, and there is room for the packed ones.
        unsafe {
            let kernel = &self.weights.plain.pack_weights;
            kernel.launch(&self.stream, blocks(values), THREADS, 0, &PackArgs { to, ..args })?;
        }
        Ok(to)
    }
}

/// The pixels of a phase as a map.
fn every(m: &Map, element: Element, [down, over]: [Phase; 2], stride: [usize; 2]) -> Map {
    let first = down.start as i64 * m.row + over.start as i64 * m.pixel;
    Map {
        data: m.data + first as u64 * element.bytes() as u64,
        row: m.row * stride[0] as i64,
        pixel: m.pixel * stride[1] as i64,
        h: down.len as i32,
        w: over.len as i32,
        ..*m
    }
}

/// How many ranges of how many pixels a sum over `pixels` is cut into, where each has this many blocks and bytes of sums: by sizes alone.
fn cut(pixels: usize, blocks: usize, bytes: usize) -> (usize, usize) {
    let most = (MOST_PARTIAL / bytes.max(1)).clamp(1, 1 << 15);
    let wanted = BLOCKS.div_ceil(blocks.max(1)).min(pixels.div_ceil(LEAST_SPAN)).clamp(1, most);
    let span = pixels.div_ceil(wanted).next_multiple_of(32);
    (pixels.div_ceil(span), span)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every pixel of the input meets, in its phase, exactly the windows and taps that lie over it.
    #[test]
    fn phases_meet_the_windows_that_lie_over_a_pixel() {
        for (kernel, stride, dilation, pad) in
            [(3, 1, 1, 1), (3, 2, 1, 1), (1, 2, 1, 0), (5, 3, 2, 4), (4, 4, 2, 1), (2, 3, 3, 0), (7, 2, 1, 3)]
        {
            for size in 1..20 {
                let mut seen = 0;
                for phase in (0..stride).map(|s| Phase::of(s, size, kernel, stride, dilation, pad)) {
                    for j in 0..phase.len {
                        let pixel = phase.start + j * stride;
                        seen += 1;
                        let mut met: Vec<(i32, usize)> = (0..phase.count)
                            .map(|t| {
                                let tap = phase.first + phase.step * (phase.count - 1 - t);
                                (j as i32 + t as i32 * phase.dilation - phase.pad, tap)
                            })
                            .collect();
                        met.sort_unstable();
                        let over = |o: i32, k: usize| {
                            o * stride as i32 + (k * dilation) as i32 - pad as i32 == pixel as i32
                        };
                        let mut all: Vec<(i32, usize)> = (-60..60)
                            .flat_map(|o| (0..kernel).map(move |k| (o, k)))
                            .filter(|&(o, k)| over(o, k))
                            .collect();
                        all.sort_unstable();
                        assert_eq!(met, all, "{kernel} {stride} {dilation} {pad}: pixel {pixel} of {size}");
                    }
                }
                assert_eq!(seen, size);
            }
        }
    }

    #[test]
    fn ranges_cover_all_pixels_and_fit_in_memory() {
        for pixels in [1, 255, 4096, 3_276_800] {
            for blocks in [1, 9, 700] {
                for bytes in [64, 9 << 20, 100 << 20] {
                    let (ranges, span) = cut(pixels, blocks, bytes);
                    assert!(ranges * span >= pixels && (ranges - 1) * span < pixels);
                    assert!(ranges == 1 || ranges * bytes <= MOST_PARTIAL);
                }
            }
        }
    }
}
