//! Gradients of convolutions' weights: sums over ranges of output pixels, added up in their order.

use super::conv::{Filter, Plain};
use super::library::{Pass, Task};
use super::{fits, kernel, MapIn, TrainOps, Values};
use crate::error::{Error, Result};
use crate::gpu::kernels::Kernel;
use crate::gpu::map::{Element, Map};
use crate::gpu::ops::conv::pair;
use crate::gpu::ops::{blocks, Device, THREADS};

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

/// The kernels of `cuda/train_conv.cu`.
pub(super) struct Kernels {
    pub plain: Plain,
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
    element: i32,
    ranges: i32,
    outputs: i32,
    taps: i32,
    channels: i32,
    inputs: i32,
}

impl TrainOps {
    /// Adds the gradient of the convolution's weights to `gradient`, from what it read, `x`, and the gradient of its output, `d`.
    pub fn conv_weights_back(
        &mut self,
        filter: &Filter,
        x: MapIn<'_>,
        d: MapIn<'_>,
        gradient: Values<'_>,
    ) -> Result<()> {
        let weights = filter.check(&gradient)?;
        fits("a convolution's weight gradient", &[(&x, filter.inputs), (&d, filter.outputs)])?;
        self.by_the_fastest(&Task { pass: Pass::Weights, filter, x, y: d, weights })
    }

    /// As [`TrainOps::conv_weights_back`], by our kernels, to this address.
    pub(super) fn conv_weights_own(
        &mut self,
        filter: &Filter,
        x: MapIn<'_>,
        d: MapIn<'_>,
        d_weights: u64,
    ) -> Result<()> {
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
        let sums = (args.partial, Element::F32, ranges);
        self.add_weights(filter, sums, args.channels as usize, d_weights)
    }

    /// Adds up sums of ranges, as `[range][output channel][tap][channel]` at an address, of a type, in this number, where a tap has
    /// `channels` of which those behind the convolution's are left out; and adds that to the gradient at `d_weights`.
    pub(super) fn add_weights(
        &mut self,
        filter: &Filter,
        (partial, element, ranges): (u64, Element, usize),
        channels: usize,
        d_weights: u64,
    ) -> Result<()> {
        let finish = WeightSumArgs {
            partial,
            d_weights,
            element: element as i32,
            ranges: ranges as i32,
            outputs: filter.outputs as i32,
            taps: filter.taps() as i32,
            channels: channels as i32,
            inputs: (filter.inputs / filter.groups) as i32,
        };
        let threads = filter.outputs * filter.taps() * channels;
        // SAFETY: the sums are as many, and the gradient is there, as `Filter::check` has seen.
        unsafe {
            self.weights.plain.conv_weights_finish.launch(&self.stream, blocks(threads), THREADS, 0, &finish)
        }
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
