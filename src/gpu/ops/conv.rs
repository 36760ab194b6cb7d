//! Convolutions: weights on the device, and the tile that fits the sizes.

use super::{blocks, Device, Task, THREADS};
use crate::error::{Error, Result};
use crate::gpu::driver::Stream;
use crate::gpu::kernels::{Kernel, Source};
use crate::gpu::map::{DeviceView, Element, Map};
use crate::gpu::memory::DeviceBuffer;

/// Geometry of a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ConvWindow {
    /// Rows and columns.
    pub kernel: [usize; 2],
    /// Vertical and horizontal.
    pub stride: [usize; 2],
    /// Vertical and horizontal.
    pub dilation: [usize; 2],
    /// Above and to the left.
    pub pad: [usize; 2],
}

/// Where a second input is added, if at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(i32)]
pub enum Joined {
    /// Nowhere.
    No = 0,
    /// Before the activation.
    Before = 1,
    /// Behind it.
    After = 2,
}

/// As `int[2]`.
pub(super) fn pair([a, b]: [usize; 2]) -> [i32; 2] {
    [a as i32, b as i32]
}

/// `ConvArgs` of `cuda/conv.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct ConvArgs {
    pub(super) input: Map,
    pub(super) output: Map,
    pub(super) add: Map,
    pub(super) weights: u64,
    pub(super) bias: u64,
    pub(super) kernel: [i32; 2],
    pub(super) stride: [i32; 2],
    pub(super) dilation: [i32; 2],
    pub(super) pad: [i32; 2],
    pub(super) channels: i32,
    pub(super) groups: i32,
    pub(super) residual: i32,
    pub(super) slope: f32,
}

/// A tile of the tensor core kernels.
struct Tile {
    pixels: usize,
    channels: usize,
    threads: u32,
    kernel: Kernel,
}

/// Stages of a tile's copies, and values of a stage's depth: `conv_tiles` of `cuda/conv.cu`.
const STAGES: usize = 3;
const STAGE_DEPTH: usize = 32;

impl Tile {
    fn shared(pixels: usize, channels: usize) -> u32 {
        (STAGES * (pixels + channels) * STAGE_DEPTH * 2) as u32
    }
}

/// Pixels, channels and threads of the tiles, and the kernels' names for f16 and bf16.
const TILES: [(usize, usize, u32, [&str; 2]); 5] = [
    (128, 128, 256, ["conv_f16_128x128", "conv_bf16_128x128"]),
    (128, 64, 128, ["conv_f16_128x64", "conv_bf16_128x64"]),
    (64, 64, 128, ["conv_f16_64x64", "conv_bf16_64x64"]),
    (128, 32, 128, ["conv_f16_128x32", "conv_bf16_128x32"]),
    (128, 16, 128, ["conv_f16_128x16", "conv_bf16_128x16"]),
];

/// Pixels and channels of a tile of `conv_any`, and its shared memory.
const ANY_SIDE: usize = 64;
const ANY_SHARED: u32 = 2 * 16 * (64 + 4) * 4;

/// The kernels of convolutions of inputs of one type, and which of them fits the sizes.
pub(super) struct ConvKernels {
    element: Element,
    /// For inputs whose pixels are aligned; none where there is no tensor core for them.
    tiles: Vec<Tile>,
    any: Kernel,
    multiprocessors: usize,
}

impl ConvKernels {
    pub(super) fn new(device: &Device, element: Element) -> Result<Self> {
        let kernels = device.kernels();
        let (any, column) = match element {
            Element::F32 => ("conv_f32", 0),
            Element::F16 => ("conv_f16", 0),
            Element::Bf16 => ("conv_bf16", 1),
        };
        let tile = |&(pixels, wide, threads, names): &(usize, usize, u32, [&'static str; 2])| {
            let kernel = kernels.get(Source::Conv, names[column], Tile::shared(pixels, wide))?;
            Ok(Tile { pixels, channels: wide, threads, kernel })
        };
        let tiles = if device.multiplies(element) {
            TILES.iter().map(tile).collect::<Result<_>>()?
        } else {
            Vec::new()
        };
        Ok(Self {
            element,
            tiles,
            any: kernels.get(Source::Conv, any, ANY_SHARED)?,
            multiprocessors: device.context().multiprocessors() as usize,
        })
    }

    /// Type of the inputs and weights.
    pub(super) fn element(&self) -> Element {
        self.element
    }

    fn name(&self, groups: usize) -> &'static str {
        if self.tiles.is_empty() || groups != 1 {
            self.any.name()
        } else {
            "conv_tiles"
        }
    }

    /// The tile for so many pixels and channels: as wide as the channels, and small enough that every multiprocessor has one.
    fn tile(&self, pixels: usize, channels: usize) -> &Tile {
        let count = |t: &Tile| pixels.div_ceil(t.pixels) * channels.div_ceil(t.channels);
        let mut fitting = self.tiles.iter().filter(|t| t.channels < 2 * channels.next_multiple_of(16));
        let first = fitting.next().unwrap_or(&self.tiles[self.tiles.len() - 1]);
        let mut best = first;
        while count(best) < self.multiprocessors {
            match fitting.next() {
                Some(next) if count(next) > count(best) => best = next,
                Some(_) => {}
                None => break,
            }
        }
        best
    }

    /// Number of tiles that may be asked for, on a map like `input` in so many groups: none where there is but one kernel.
    pub(super) fn choices(&self, input: &DeviceView, groups: usize) -> usize {
        let aligned = input.is_whole_vectors() && input.element == self.element;
        if groups == 1 && aligned {
            self.tiles.len()
        } else {
            0
        }
    }

    /// Name of the kernel of a tile, or of the only one.
    pub(super) fn tile_name(&self, tile: Option<usize>) -> &'static str {
        tile.map_or(&self.any, |i| &self.tiles[i].kernel).name()
    }

    /// Launches the kernel for these arguments, whose input is the map of `input`.
    ///
    /// # Safety
    /// As [`Kernel::launch`]; weights and bias are as long as the arguments' sizes say.
    pub(super) unsafe fn launch(&self, stream: &Stream, input: &DeviceView, args: &ConvArgs) -> Result<()> {
        // SAFETY: the caller's contract.
        unsafe { self.launch_tile(stream, input, args, None) }
    }

    /// As [`Self::launch`], by the tile of this number (below [`Self::choices`]) rather than that of the rule.
    ///
    /// # Safety
    /// As [`Self::launch`].
    pub(super) unsafe fn launch_tile(
        &self,
        stream: &Stream,
        input: &DeviceView,
        args: &ConvArgs,
        tile: Option<usize>,
    ) -> Result<()> {
        let [n, h, w, c, tail] =
            [args.output.n, args.output.h, args.output.w, args.output.c, args.output.tail]
                .map(|v| v as usize);
        let (pixels, groups) = (n * h * w, args.groups as usize);
        // SAFETY: the caller's contract; the args are the kernels' struct.
        unsafe {
            if self.choices(input, groups) == 0 {
                let columns = (c / groups + tail).div_ceil(ANY_SIDE);
                let grid = [(pixels.div_ceil(ANY_SIDE) * columns) as u32, groups as u32, 1];
                return self.any.launch(stream, grid, THREADS, ANY_SHARED, args);
            }
            let t = tile.map_or_else(|| self.tile(pixels, c + tail), |i| &self.tiles[i]);
            let grid = [(pixels.div_ceil(t.pixels) * (c + tail).div_ceil(t.channels)) as u32, 1, 1];
            t.kernel.launch(stream, grid, t.threads, Tile::shared(t.pixels, t.channels), args)
        }
    }
}

/// A convolution with bias, residual sum and activation.
pub struct ConvOp {
    pub(super) window: ConvWindow,
    pub(super) groups: usize,
    /// Channels of a tap, padded.
    pub(super) channels: usize,
    /// With rows of zeros up to a multiple of eight output channels, as biases: libraries write a map's tail by them.
    pub(super) weights: DeviceBuffer,
    pub(super) bias: DeviceBuffer,
    /// The bias in the inputs' type, for libraries, which want it in the output's; none where no library is used.
    pub(super) low_bias: Option<DeviceBuffer>,
    pub(super) slope: f32,
    pub(super) joined: Joined,
    pub(super) kernels: ConvKernels,
}

impl ConvOp {
    /// `weight` in PyTorch's order `[out, in / groups, kh, kw]`, a `bias` an output channel; of inputs of `element`.
    pub fn new(
        device: &Device,
        element: Element,
        window: ConvWindow,
        groups: usize,
        weight: &[f32],
        bias: &[f32],
        (slope, joined): (f32, Joined),
    ) -> Result<Self> {
        let taps = window.kernel[0] * window.kernel[1];
        let inputs = weight.len() / (bias.len() * taps).max(1);
        let channels = inputs.next_multiple_of(element.channel_step());
        let rows = bias.len().next_multiple_of(element.channel_step());
        let packed = (0..rows).flat_map(|o| {
            (0..taps).flat_map(move |tap| {
                let inside = move |c| o < bias.len() && c < inputs;
                (0..channels)
                    .map(move |c| if inside(c) { weight[(o * inputs + c) * taps + tap] } else { 0.0 })
            })
        });
        let mut biases = bias.to_vec();
        biases.resize(rows, 0.0);
        let low = (device.choices().uses_libraries() && element != Element::F32)
            .then(|| DeviceBuffer::of(device.uploads(), &element.encode(biases.iter().copied())));
        Ok(Self {
            window,
            groups,
            channels,
            weights: DeviceBuffer::of(device.uploads(), &element.encode(packed))?,
            bias: DeviceBuffer::of(device.uploads(), &biases)?,
            low_bias: low.transpose()?,
            slope,
            joined,
            kernels: ConvKernels::new(device, element)?,
        })
    }

    pub(super) fn name(&self) -> &'static str {
        self.kernels.name(self.groups)
    }

    /// # Safety
    /// As [`super::DeviceOp::launch`].
    pub(super) unsafe fn launch(&self, task: &Task) -> Result<()> {
        match task.route {
            // SAFETY: the caller's contract; the route was made for these views.
            Some((route, workspace)) => unsafe { route.launch(self, task, workspace) },
            // SAFETY: the caller's contract.
            None => unsafe { self.launch_tile(task, None) },
        }
    }

    /// Launches the kernel of the tile of this number, or of the rule's.
    ///
    /// # Safety
    /// As [`super::DeviceOp::launch`].
    pub(super) unsafe fn launch_tile(&self, task: &Task, tile: Option<usize>) -> Result<()> {
        let add = task.second();
        if add.is_none() != (self.joined == Joined::No) {
            return Err(Error::Internal("a convolution and its residual".into()));
        }
        let args = ConvArgs {
            input: task.input(),
            output: task.output(),
            add: add.unwrap_or_default(),
            weights: self.weights.address(),
            bias: self.bias.address(),
            kernel: pair(self.window.kernel),
            stride: pair(self.window.stride),
            dilation: pair(self.window.dilation),
            pad: pair(self.window.pad),
            channels: self.channels as i32,
            groups: self.groups as i32,
            residual: self.joined as i32,
            slope: self.slope,
        };
        // SAFETY: the caller's contract.
        unsafe { self.kernels.launch_tile(task.stream, &task.inputs[0], &args, tile) }
    }
}

/// `DepthwiseArgs` of `cuda/conv.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct DepthwiseArgs {
    pub(super) input: Map,
    pub(super) output: Map,
    pub(super) weights: u64,
    pub(super) bias: u64,
    pub(super) kernel: [i32; 2],
    pub(super) stride: [i32; 2],
    pub(super) dilation: [i32; 2],
    pub(super) pad: [i32; 2],
    pub(super) slope: f32,
}

/// The kernel for inputs of this type.
pub(super) fn depthwise_kernel(device: &Device, element: Element) -> Result<Kernel> {
    let name = match element {
        Element::F32 => "depthwise_f32",
        Element::F16 => "depthwise_f16",
        Element::Bf16 => "depthwise_bf16",
    };
    device.kernels().get(Source::Conv, name, 0)
}

/// A convolution of each channel by itself, with bias and activation; of one tap, a scale and a shift.
pub struct DepthwiseOp {
    window: ConvWindow,
    weights: DeviceBuffer,
    bias: DeviceBuffer,
    slope: f32,
    pub(super) kernel: Kernel,
}

impl DepthwiseOp {
    /// `weight` `[channel, 1, kh, kw]`, of inputs of `element`.
    pub fn new(
        device: &Device,
        element: Element,
        window: ConvWindow,
        weight: &[f32],
        bias: &[f32],
        slope: f32,
    ) -> Result<Self> {
        let (taps, channels) = (window.kernel[0] * window.kernel[1], bias.len());
        let packed: Vec<f32> =
            (0..taps).flat_map(|tap| (0..channels).map(move |c| weight[c * taps + tap])).collect();
        Ok(Self {
            window,
            weights: DeviceBuffer::of(device.uploads(), &packed)?,
            bias: DeviceBuffer::of(device.uploads(), bias)?,
            slope,
            kernel: depthwise_kernel(device, element)?,
        })
    }

    /// # Safety
    /// As [`super::DeviceOp::launch`].
    pub(super) unsafe fn launch(&self, task: &Task) -> Result<()> {
        let args = DepthwiseArgs {
            input: task.input(),
            output: task.output(),
            weights: self.weights.address(),
            bias: self.bias.address(),
            kernel: pair(self.window.kernel),
            stride: pair(self.window.stride),
            dilation: pair(self.window.dilation),
            pad: pair(self.window.pad),
            slope: self.slope,
        };
        let s = task.output.shape;
        let threads = s.n * s.h * s.w * (s.c + task.output.tail).div_ceil(8);
        // SAFETY: the caller's contract; the args are the kernel's struct.
        unsafe { self.kernel.launch(task.stream, blocks(threads), THREADS, 0, &args) }
    }
}

/// `ConvTransposeArgs` of `cuda/maps.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct ConvTransposeArgs {
    input: Map,
    output: Map,
    weights: u64,
    bias: u64,
    kernel: [i32; 2],
    stride: [i32; 2],
    pad: [i32; 2],
    groups: i32,
}

/// A transposed convolution with bias.
pub struct ConvTransposeOp {
    window: ConvWindow,
    groups: usize,
    weights: DeviceBuffer,
    bias: DeviceBuffer,
    pub(super) kernel: Kernel,
}

impl ConvTransposeOp {
    /// `weight` in PyTorch's order `[in, out / groups, kh, kw]`.
    pub fn new(
        device: &Device,
        window: ConvWindow,
        groups: usize,
        weight: &[f32],
        bias: &[f32],
    ) -> Result<Self> {
        Ok(Self {
            window,
            groups,
            weights: DeviceBuffer::of(device.uploads(), weight)?,
            bias: DeviceBuffer::of(device.uploads(), bias)?,
            kernel: super::maps_kernel(device, "conv_transpose")?,
        })
    }

    /// # Safety
    /// As [`super::DeviceOp::launch`].
    pub(super) unsafe fn launch(&self, task: &Task) -> Result<()> {
        let args = ConvTransposeArgs {
            input: task.input(),
            output: task.output(),
            weights: self.weights.address(),
            bias: self.bias.address(),
            kernel: pair(self.window.kernel),
            stride: pair(self.window.stride),
            pad: pair(self.window.pad),
            groups: self.groups as i32,
        };
        // SAFETY: the caller's contract; the args are the kernel's struct.
        unsafe { task.launch(&self.kernel, &args) }
    }
}
