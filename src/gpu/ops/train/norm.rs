//! Batch normalisation, activation, and the gradients of both; bias gradients.

use super::{fits, kernels, MapIn, TrainOps, Values};
use crate::error::Result;
use crate::gpu::map::Map;
use crate::gpu::ops::{blocks, THREADS};

kernels! {
    /// Of `cuda/train_norm.cu`.
    pub(super) Kernels of TrainNorm:
    norm_statistics, norm_finish, norm_apply, norm_gradient_sums, norm_gradient_finish, pull_back, bias_sums, bias_finish,
}

/// `SumArgs` of `cuda/train_norm.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct SumArgs {
    map: Map,
    gradient: Map,
    terms: u64,
    partial: u64,
    lanes: i32,
    span: i32,
    slope: f32,
}

/// `NormArgs` of `cuda/train_norm.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct NormArgs {
    eps: f64,
    momentum: f64,
    partial: u64,
    scale: u64,
    shift: u64,
    mean: u64,
    variance: u64,
    terms: u64,
    blocks: i32,
    span: i32,
    pixels: i32,
    channels: i32,
    frozen: i32,
}

/// `NormGradientArgs` of `cuda/train_norm.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct NormGradientArgs {
    partial: u64,
    terms: u64,
    scale: u64,
    d_scale: u64,
    d_shift: u64,
    factors: u64,
    blocks: i32,
    pixels: i32,
    channels: i32,
    frozen: i32,
}

/// `BiasArgs` of `cuda/train_norm.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct BiasArgs {
    partial: u64,
    d_bias: u64,
    blocks: i32,
    channels: i32,
}

/// `ApplyArgs` of `cuda/train_norm.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct ApplyArgs {
    input: Map,
    output: Map,
    terms: u64,
    slope: f32,
}

/// `PullArgs` of `cuda/train_norm.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct PullArgs {
    map: Map,
    gradient: Map,
    terms: u64,
    factors: u64,
    slope: f32,
}

/// A batch normalisation's parameters, `[C]` each.
#[derive(Clone, Copy)]
pub struct Norm<'a> {
    /// Learnt scale.
    pub scale: Values<'a>,
    /// Learnt shift.
    pub shift: Values<'a>,
    /// Running mean.
    pub mean: Values<'a>,
    /// Running variance.
    pub variance: Values<'a>,
    /// Added to the variance.
    pub eps: f64,
    /// Weight of the new batch in the running statistics.
    pub momentum: f64,
    /// Whether the running statistics stand still and are used.
    pub frozen: bool,
    /// `[4][C]`, written by the forward pass for the backward pass: mean, 1 / standard deviation, and the scale and shift that are
    /// applied.
    pub terms: Values<'a>,
}

/// What the backward pass of a normalisation writes.
#[derive(Clone, Copy)]
pub struct NormGradient<'a> {
    /// Gradient of the scale, added to.
    pub scale: Values<'a>,
    /// Gradient of the shift, added to.
    pub shift: Values<'a>,
    /// `[3][C]` of its own.
    pub factors: Values<'a>,
}

/// How the sums over a map's pixels are cut: by sizes alone.
struct Cut {
    lanes: usize,
    span: usize,
    blocks: usize,
    channels: usize,
    pixels: usize,
}

impl Cut {
    fn of(m: &Map) -> Self {
        let (channels, pixels) = (m.c as usize, m.n as usize * m.h as usize * m.w as usize);
        let lanes = channels.next_power_of_two().min(64);
        let rows = THREADS as usize / lanes;
        let span = (pixels / 1024).clamp(rows * 8, 4096.max(rows * 8));
        Self { lanes, span, blocks: pixels.div_ceil(span), channels, pixels }
    }

    fn grid(&self) -> [u32; 3] {
        [self.blocks as u32, self.channels.div_ceil(self.lanes) as u32, 1]
    }

    /// Bytes of the blocks' sums, two a channel.
    fn bytes(&self) -> usize {
        2 * self.blocks * self.channels * 4
    }
}

/// Shared memory of the kernels that sum over a block: two floats a thread, and of those that finish: a double a thread.
const SUM_SHARED: u32 = 2 * THREADS * 4;
const FINISH_THREADS: u32 = 128;
const FINISH_SHARED: u32 = FINISH_THREADS * 8;

impl TrainOps {
    /// Writes act(v), v the normalisation of `z`, to `y`, with the statistics of the batch unless frozen; act(v) = max(v, slope * v).
    pub fn normalise(&mut self, norm: &Norm<'_>, z: MapIn<'_>, y: MapIn<'_>, slope: f32) -> Result<()> {
        let c = z.view.shape.c;
        fits("a normalisation", &[(&z, c), (&y, c)])?;
        let (map, output) = (z.map()?, y.map()?);
        let cut = Cut::of(&map);
        let partial = self.partial.bytes(&self.device, cut.bytes())?;
        let terms = norm.terms.address(4 * c)?;
        let args = NormArgs {
            eps: norm.eps,
            momentum: norm.momentum,
            partial,
            scale: norm.scale.address(c)?,
            shift: norm.shift.address(c)?,
            mean: norm.mean.address(c)?,
            variance: norm.variance.address(c)?,
            terms,
            blocks: cut.blocks as i32,
            span: cut.span as i32,
            pixels: cut.pixels as i32,
            channels: c as i32,
            frozen: norm.frozen.into(),
        };
        let sums = SumArgs {
            map,
            gradient: Map::default(),
            terms: 0,
            partial,
            lanes: cut.lanes as i32,
            span: cut.span as i32,
            slope,
        };
        let apply = ApplyArgs { input: map, output, terms, slope };
        let k = &self.norms;
        // SAFETY: maps and values lie in their buffers and have the channels; the args are the kernels' structs.
        unsafe {
            if !norm.frozen {
                k.norm_statistics.launch(&self.stream, cut.grid(), THREADS, SUM_SHARED, &sums)?;
            }
            k.norm_finish.launch(&self.stream, [c as u32, 1, 1], FINISH_THREADS, FINISH_SHARED, &args)?;
            k.norm_apply.launch(&self.stream, eights(&y), THREADS, 0, &apply)
        }
    }

    /// Turns `d`, the gradient of what [`TrainOps::normalise`] wrote, into that of `z`.
    pub fn normalise_back(
        &mut self,
        norm: &Norm<'_>,
        gradient: &NormGradient<'_>,
        z: MapIn<'_>,
        d: MapIn<'_>,
        slope: f32,
    ) -> Result<()> {
        let c = z.view.shape.c;
        fits("a normalisation's gradient", &[(&z, c), (&d, c)])?;
        let (map, d_map) = (z.map()?, d.map()?);
        let cut = Cut::of(&map);
        let partial = self.partial.bytes(&self.device, cut.bytes())?;
        let (terms, factors) = (norm.terms.address(4 * c)?, gradient.factors.address(3 * c)?);
        let sums = SumArgs {
            map,
            gradient: d_map,
            terms,
            partial,
            lanes: cut.lanes as i32,
            span: cut.span as i32,
            slope,
        };
        let finish = NormGradientArgs {
            partial,
            terms,
            scale: norm.scale.address(c)?,
            d_scale: gradient.scale.address(c)?,
            d_shift: gradient.shift.address(c)?,
            factors,
            blocks: cut.blocks as i32,
            pixels: cut.pixels as i32,
            channels: c as i32,
            frozen: norm.frozen.into(),
        };
        let pull = PullArgs { map, gradient: d_map, terms, factors, slope };
        let k = &self.norms;
        // SAFETY: as above.
        unsafe {
            k.norm_gradient_sums.launch(&self.stream, cut.grid(), THREADS, SUM_SHARED, &sums)?;
            let grid = [c as u32, 1, 1];
            k.norm_gradient_finish.launch(&self.stream, grid, FINISH_THREADS, FINISH_SHARED, &finish)?;
            k.pull_back.launch(&self.stream, eights(&d), THREADS, 0, &pull)
        }
    }

    /// Writes act(x) = max(x, slope * x) to `y`, which may be `x`.
    pub fn activate(&self, x: MapIn<'_>, y: MapIn<'_>, slope: f32) -> Result<()> {
        let c = x.view.shape.c;
        fits("an activation", &[(&x, c), (&y, c)])?;
        let args = ApplyArgs { input: x.map()?, output: y.map()?, terms: 0, slope };
        // SAFETY: as above.
        unsafe { self.norms.norm_apply.launch(&self.stream, eights(&y), THREADS, 0, &args) }
    }

    /// Turns `d`, the gradient of y = max(x, slope * x), into that of x. It is enough to know `y`.
    pub fn activate_back(&self, y: MapIn<'_>, d: MapIn<'_>, slope: f32) -> Result<()> {
        let c = y.view.shape.c;
        fits("an activation's gradient", &[(&y, c), (&d, c)])?;
        let args = PullArgs { map: y.map()?, gradient: d.map()?, terms: 0, factors: 0, slope };
        // SAFETY: as above.
        unsafe { self.norms.pull_back.launch(&self.stream, eights(&d), THREADS, 0, &args) }
    }

    /// Adds the sums of `d` over its pixels to `gradient`.
    pub fn bias_back(&mut self, d: MapIn<'_>, gradient: Values<'_>) -> Result<()> {
        let map = d.map()?;
        let cut = Cut::of(&map);
        let partial = self.partial.bytes(&self.device, cut.bytes())?;
        let sums = SumArgs {
            map: Map::default(),
            gradient: map,
            terms: 0,
            partial,
            lanes: cut.lanes as i32,
            span: cut.span as i32,
            slope: 1.0,
        };
        let d_bias = gradient.address(cut.channels)?;
        let finish = BiasArgs { partial, d_bias, blocks: cut.blocks as i32, channels: cut.channels as i32 };
        // SAFETY: as above.
        unsafe {
            self.norms.bias_sums.launch(&self.stream, cut.grid(), THREADS, SUM_SHARED, &sums)?;
            let grid = [cut.channels as u32, 1, 1];
            self.norms.bias_finish.launch(&self.stream, grid, FINISH_THREADS, FINISH_SHARED, &finish)
        }
    }
}

/// Blocks for a thread an eight of a map's channels.
fn eights(m: &MapIn<'_>) -> [u32; 3] {
    let s = m.view.shape;
    blocks(s.n * s.h * s.w * (s.c + m.view.tail).div_ceil(8))
}
