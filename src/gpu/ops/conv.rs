//! Convolutions: weights on the device, and the tile that fits the sizes.

use super::{blocks, Device, Task, THREADS};
use crate::error::{Error, Result};
use crate::gpu::driver::Stream;
use crate::gpu::kernels::{Kernel, Source};
use crate::gpu::map::{Arithmetic, DeviceView, Element, Map};
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
    /// For [`ConvKernels::launch`] to say.
    pub(super) split: i32,
    pub(super) parts: u64,
}

/// A kernel of tiles: so many pixels and channels, which so many threads compute.
struct TileKernel {
    pixels: usize,
    channels: usize,
    threads: u32,
    name: &'static str,
}

const fn tile(pixels: usize, channels: usize, threads: u32, name: &'static str) -> TileKernel {
    TileKernel { pixels, channels, threads, name }
}

/// The tiles of every arithmetic, wider ones first.
const F32_TILES: [TileKernel; 5] = [
    tile(128, 128, 256, "conv_f32_128x128"),
    tile(128, 64, 256, "conv_f32_128x64"),
    tile(64, 64, 256, "conv_f32_64x64"),
    tile(128, 32, 256, "conv_f32_128x32"),
    tile(128, 16, 256, "conv_f32_128x16"),
];
const TF32_TILES: [TileKernel; 5] = [
    tile(128, 128, 256, "conv_tf32_128x128"),
    tile(128, 64, 128, "conv_tf32_128x64"),
    tile(64, 64, 128, "conv_tf32_64x64"),
    tile(128, 32, 128, "conv_tf32_128x32"),
    tile(128, 16, 128, "conv_tf32_128x16"),
];
const F16_TILES: [TileKernel; 5] = [
    tile(128, 128, 256, "conv_f16_128x128"),
    tile(128, 64, 128, "conv_f16_128x64"),
    tile(64, 64, 128, "conv_f16_64x64"),
    tile(128, 32, 128, "conv_f16_128x32"),
    tile(128, 16, 128, "conv_f16_128x16"),
];
const BF16_TILES: [TileKernel; 5] = [
    tile(128, 128, 256, "conv_bf16_128x128"),
    tile(128, 64, 128, "conv_bf16_128x64"),
    tile(64, 64, 128, "conv_bf16_64x64"),
    tile(128, 32, 128, "conv_bf16_128x32"),
    tile(128, 16, 128, "conv_bf16_128x16"),
];

fn tiles_of(arithmetic: Arithmetic) -> &'static [TileKernel] {
    match arithmetic {
        Arithmetic::F32 => &F32_TILES,
        Arithmetic::Tf32 => &TF32_TILES,
        Arithmetic::F16 => &F16_TILES,
        Arithmetic::Bf16 => &BF16_TILES,
    }
}

/// Chunks of a tile's depth under way, the vectors of sixteen bytes that a pixel or channel has in one: `for_chunks` of `cuda/conv.cu`.
const STAGES: usize = 3;
const CHUNK: usize = 4;

/// Most parts of a split depth, and chunks that one has at least: fewer take no longer than adding the parts up.
const MOST_PARTS: usize = 16;
const PART_CHUNKS: usize = 8;

/// Pixels and channels of a tile of `conv_any`, and its shared memory.
const ANY_SIDE: usize = 64;
const ANY_SHARED: u32 = 2 * 16 * (64 + 4) * 4;

/// A tile, loaded.
struct Tile {
    pixels: usize,
    channels: usize,
    threads: u32,
    shared: u32,
    kernel: Kernel,
}

impl Tile {
    fn new(device: &Device, of: &TileKernel) -> Result<Self> {
        let &TileKernel { pixels, channels, threads, name } = of;
        let shared = (STAGES * (pixels + channels) * CHUNK * 16) as u32;
        let kernel = device.kernels().get(Source::Conv, name, shared)?;
        Ok(Self { pixels, channels, threads, shared, kernel })
    }

    /// Tiles that a product of this size takes.
    fn count(&self, size: &Product) -> usize {
        size.pixels.div_ceil(self.pixels) * size.channels.div_ceil(self.channels)
    }
}

/// The size of a convolution as a product of matrices.
#[derive(Clone, Copy)]
struct Product {
    pixels: usize,
    /// The tail with them, and without.
    channels: usize,
    sums: usize,
    /// Chunks of the depth.
    chunks: usize,
}

/// How a convolution of a size can be computed: by a tile, its depth in one or several parts.
struct Candidate<'a> {
    tile: &'a Tile,
    parts: usize,
}

impl Candidate<'_> {
    /// Bytes that its parts take until they are added up.
    fn workspace(&self, size: &Product) -> usize {
        if self.parts > 1 {
            self.parts * size.pixels * size.sums * 4
        } else {
            0
        }
    }
}

/// The kernels of convolutions of one arithmetic, and which of them fits the sizes.
pub(super) struct ConvKernels {
    arithmetic: Arithmetic,
    /// For inputs whose pixels are aligned; none where there is no tensor core for them.
    tiles: Vec<Tile>,
    sum: Kernel,
    any: Kernel,
    multiprocessors: usize,
}

impl ConvKernels {
    pub(super) fn new(device: &Device, arithmetic: Arithmetic) -> Result<Self> {
        let kernels = device.kernels();
        let any = match arithmetic {
            Arithmetic::F32 | Arithmetic::Tf32 => "conv_f32",
            Arithmetic::F16 => "conv_f16",
            Arithmetic::Bf16 => "conv_bf16",
        };
        let tiles = if device.multiplies(arithmetic) {
            tiles_of(arithmetic).iter().map(|t| Tile::new(device, t)).collect::<Result<_>>()?
        } else {
            Vec::new()
        };
        Ok(Self {
            arithmetic,
            tiles,
            sum: kernels.get(Source::Conv, "conv_sum", 0)?,
            any: kernels.get(Source::Conv, any, ANY_SHARED)?,
            multiprocessors: device.context().multiprocessors() as usize,
        })
    }

    fn name(&self, groups: usize) -> &'static str {
        if self.tiles.is_empty() || groups != 1 {
            self.any.name()
        } else {
            "conv_tiles"
        }
    }

    /// Parts of the depth for so many tiles: so many that every multiprocessor has a block, where more than half would have none.
    fn parts(&self, tiles: usize, chunks: usize) -> usize {
        (self.multiprocessors / tiles.max(1)).min(chunks / PART_CHUNKS).clamp(1, MOST_PARTS)
    }

    /// What can compute a product of this size, larger tiles first: those that are not twice as wide as its channels, the depth in one
    /// part and, where that gives more multiprocessors work, in several.
    fn candidates<'a>(&'a self, size: &'a Product) -> impl Iterator<Item = Candidate<'a>> {
        let narrowest = self.tiles.last().map_or(0, |t| t.channels);
        let widest = (2 * size.channels.next_multiple_of(16)).max(narrowest + 1);
        self.tiles.iter().filter(move |t| t.channels < widest).flat_map(move |tile| {
            let several = self.parts(tile.count(size), size.chunks);
            [1, several]
                .into_iter()
                .take(if several > 1 { 2 } else { 1 })
                .map(move |parts| Candidate { tile, parts })
        })
    }

    /// The one that is taken, by sizes and multiprocessors alone, so that a device gives the same bits every time: the widest tile that
    /// leaves no multiprocessor without one, else the one of which there are most, and where they are fewer than half, in parts.
    fn choice<'a>(&'a self, size: &'a Product) -> Option<Candidate<'a>> {
        let mut best: Option<Candidate<'a>> = None;
        for candidate in self.candidates(size) {
            let (count, most) = (candidate.tile.count(size), best.as_ref().map_or(0, |b| b.tile.count(size)));
            let same = best.as_ref().is_some_and(|b| std::ptr::eq(b.tile, candidate.tile));
            if most < self.multiprocessors && (count > most || same) {
                best = Some(candidate);
            }
        }
        best
    }

    /// Arithmetic of the products.
    pub(super) fn arithmetic(&self) -> Arithmetic {
        self.arithmetic
    }

    /// The kernel that the rule takes for these arguments, and the bytes of memory that it needs beside the maps.
    fn rule(&self, input: &DeviceView, args: &ConvArgs) -> (&'static str, usize) {
        let ruled = self.product(input, args).and_then(|size| {
            let choice = self.choice(&size)?;
            Some((choice.tile.kernel.name(), choice.workspace(&size)))
        });
        ruled.unwrap_or((self.any.name(), 0))
    }

    /// Bytes of memory that a launch for these arguments needs beside the maps.
    pub(super) fn workspace(&self, input: &DeviceView, args: &ConvArgs) -> usize {
        self.rule(input, args).1
    }

    /// Name and workspace of each way to compute a convolution of these arguments, by number; none where there is but one kernel.
    pub(super) fn choices(&self, input: &DeviceView, args: &ConvArgs) -> Vec<(&'static str, usize)> {
        let Some(size) = self.product(input, args) else { return Vec::new() };
        self.candidates(&size).map(|c| (c.tile.kernel.name(), c.workspace(&size))).collect()
    }

    /// The product that a convolution is, where tiles can compute it.
    fn product(&self, input: &DeviceView, args: &ConvArgs) -> Option<Product> {
        let m = &args.output;
        let [n, h, w, sums, tail, channels] = [m.n, m.h, m.w, m.c, m.tail, args.channels].map(|v| v as usize);
        let [rows, columns] = args.kernel.map(|v| v as usize);
        let element = self.arithmetic.element();
        let vectors = rows * columns * channels / element.vector();
        let aligned = input.is_whole_vectors() && input.element == element;
        (aligned && args.groups == 1).then(|| Product {
            pixels: n * h * w,
            channels: sums + tail,
            sums,
            chunks: vectors.div_ceil(CHUNK),
        })
    }

    /// Launches the kernel for these arguments, whose input is the map of `input`; `args.parts` is the address of as much memory as
    /// [`ConvKernels::workspace`] says.
    ///
    /// # Safety
    /// As [`Kernel::launch`]; weights and bias are as long as the arguments' sizes say.
    #[cfg(feature = "train")]
    pub(super) unsafe fn launch(&self, stream: &Stream, input: &DeviceView, args: &ConvArgs) -> Result<()> {
        // SAFETY: the caller's contract.
        unsafe { self.launch_choice(stream, input, args, None) }
    }

    /// As [`Self::launch`], in the way of this number among [`Self::choices`] rather than that of the rule.
    ///
    /// # Safety
    /// As [`Self::launch`], with as much memory as the way asks for.
    pub(super) unsafe fn launch_choice(
        &self,
        stream: &Stream,
        input: &DeviceView,
        args: &ConvArgs,
        way: Option<usize>,
    ) -> Result<()> {
        let size = self.product(input, args);
        let chosen = size.as_ref().and_then(|size| {
            let candidate = match way {
                Some(number) => self.candidates(size).nth(number),
                None => self.choice(size),
            };
            Some((size, candidate?))
        });
        let Some((size, Candidate { tile, parts })) = chosen else {
            let [n, h, w, c, tail, groups] =
                [args.output.n, args.output.h, args.output.w, args.output.c, args.output.tail, args.groups]
                    .map(|v| v as usize);
            let columns = (c / groups + tail).div_ceil(ANY_SIDE);
            let grid = [((n * h * w).div_ceil(ANY_SIDE) * columns) as u32, groups as u32, 1];
            // SAFETY: the caller's contract; the args are the kernel's struct.
            return unsafe { self.any.launch(stream, grid, THREADS, ANY_SHARED, args) };
        };
        let args = ConvArgs { split: parts as i32, ..*args };
        let grid = [tile.count(size) as u32, parts as u32, 1];
        // SAFETY: as above; where there are parts, there is room for them.
        unsafe {
            tile.kernel.launch(stream, grid, tile.threads, tile.shared, &args)?;
            if parts > 1 {
                let values = blocks(size.pixels * size.channels);
                self.sum.launch(stream, values, THREADS, 0, &args)?;
            }
        }
        Ok(())
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
    /// `weight` in PyTorch's order `[out, in / groups, kh, kw]`, a `bias` an output channel; multiplied as `arithmetic` says.
    pub fn new(
        device: &Device,
        arithmetic: Arithmetic,
        window: ConvWindow,
        groups: usize,
        weight: &[f32],
        bias: &[f32],
        (slope, joined): (f32, Joined),
    ) -> Result<Self> {
        let taps = window.kernel[0] * window.kernel[1];
        let inputs = weight.len() / (bias.len() * taps).max(1);
        let element = arithmetic.element();
        let channels = inputs.next_multiple_of(element.vector());
        let rows = bias.len().next_multiple_of(element.vector());
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
            kernels: ConvKernels::new(device, arithmetic)?,
        })
    }

    pub(super) fn name(&self) -> &'static str {
        self.kernels.name(self.groups)
    }

    /// Bytes of memory that a launch needs beside these views.
    pub(super) fn workspace(&self, inputs: &[DeviceView], output: &DeviceView) -> usize {
        let Some(input) = inputs.first() else { return 0 };
        self.kernels.workspace(input, &self.args(input.at(0), Map::default(), output.at(0), 0))
    }

    /// As [`ConvOp::choices`], of the way that the rule takes.
    pub(super) fn rule(&self, inputs: &[DeviceView], output: &DeviceView) -> (&'static str, usize) {
        self.kernels.rule(&inputs[0], &self.args(inputs[0].at(0), Map::default(), output.at(0), 0))
    }

    /// Name and workspace of each way in which our kernels can compute it on these views, by number; none where there is but one.
    pub(super) fn choices(&self, inputs: &[DeviceView], output: &DeviceView) -> Vec<(&'static str, usize)> {
        let args = self.args(inputs[0].at(0), Map::default(), output.at(0), 0);
        self.kernels.choices(&inputs[0], &args)
    }

    /// # Safety
    /// As [`super::DeviceOp::launch`].
    pub(super) unsafe fn launch(&self, task: &Task) -> Result<()> {
        match task.route {
            // SAFETY: the caller's contract; the route was made for these views.
            Some(route) => unsafe { route.launch(self, task) },
            // SAFETY: the caller's contract.
            None => unsafe { self.launch_choice(task, None) },
        }
    }

    /// Launches our kernel in the way of this number among [`Self::choices`], or the rule's.
    ///
    /// # Safety
    /// As [`super::DeviceOp::launch`], with as much memory as the way asks for.
    pub(super) unsafe fn launch_choice(&self, task: &Task, way: Option<usize>) -> Result<()> {
        let add = task.second();
        if add.is_none() != (self.joined == Joined::No) {
            return Err(Error::Internal("a convolution and its residual".into()));
        }
        let args = self.args(task.input(), add.unwrap_or_default(), task.output(), task.workspace);
        // SAFETY: the caller's contract.
        unsafe { self.kernels.launch_choice(task.stream, &task.inputs[0], &args, way) }
    }

    fn args(&self, input: Map, add: Map, output: Map, parts: u64) -> ConvArgs {
        ConvArgs {
            input,
            output,
            add,
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
            split: 1,
            parts,
        }
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
