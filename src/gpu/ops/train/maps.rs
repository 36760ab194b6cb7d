//! What happens to maps between convolutions, as a training needs it.

use super::{fits, kernels, MapIn, TrainOps};
use crate::error::{Error, Result};
use crate::gpu::map::Map;
use crate::gpu::memory::DeviceBuffer;
use crate::gpu::ops::conv::pair;
use crate::gpu::ops::{blocks, blocks_for, THREADS};

kernels! {
    /// Of `cuda/train_maps.cu`.
    pub(super) Kernels of TrainMaps:
    network_input, sum_maps, crop_back, nearest_back, bilinear_back, average_back, max_pool_taps, max_pool_back, sigmoid_back,
    softmax_back, roi_align_back,
}

/// `PixelsArgs` of `cuda/train_maps.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct PixelsArgs {
    pixels: u64,
    table: u64,
    output: Map,
    channel: [i32; 3],
}

/// `SumMapsArgs` of `cuda/train_maps.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct SumMapsArgs {
    left: Map,
    right: Map,
    output: Map,
    both: i32,
    slope: f32,
}

/// `BackArgs` of `cuda/train_maps.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct BackArgs {
    gradient: Map,
    input: Map,
    add: i32,
    top: i32,
    column: i32,
}

/// `PoolArgs` of `cuda/train_maps.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct PoolArgs {
    input: Map,
    output: Map,
    taps: u64,
    kernel: [i32; 2],
    stride: [i32; 2],
    pad: [i32; 2],
    add: i32,
}

/// `ActivationArgs` of `cuda/train_maps.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct ActivationArgs {
    output: Map,
    gradient: Map,
    input: Map,
    add: i32,
    group: i32,
}

/// `RoiBackArgs` of `cuda/train_maps.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct RoiBackArgs {
    gradient: Map,
    boxes: Map,
    input: Map,
    spatial_scale: f32,
    samples: i32,
    aligned: i32,
    add: i32,
}

/// How an output was made of a map, for its gradient.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Taken {
    /// As it is, or, where the output is smaller, from this pixel (row, column) on.
    From([usize; 2]),
    /// By the nearest pixels.
    Nearest,
    /// By interpolation.
    Bilinear,
    /// By the mean of all its pixels.
    Mean,
}

/// A max pooling.
#[derive(Clone, Copy)]
pub struct Pool<'a> {
    /// Rows and columns.
    pub kernel: [usize; 2],
    /// Vertical and horizontal.
    pub stride: [usize; 2],
    /// Above and to the left.
    pub pad: [usize; 2],
    /// A byte a value of the output: which of its window's values is the largest.
    pub taps: &'a DeviceBuffer,
}

/// A RoIAlign, as `layers/roi_align`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Align {
    /// Cells a pixel.
    pub spatial_scale: f32,
    /// Samples a bin along each axis; 0 for as many as it has cells.
    pub samples: usize,
    /// Whether boxes are shifted by half a cell.
    pub aligned: bool,
}

impl TrainOps {
    /// Writes the values that `table`, `[3][256]`, has for each channel of `pixels`, N x H x W x 3, to `output`; `channel` tells which of
    /// a pixel's channels each of the output's is.
    pub fn network_input(
        &self,
        pixels: &DeviceBuffer,
        table: &DeviceBuffer,
        channel: [usize; 3],
        output: MapIn<'_>,
    ) -> Result<()> {
        let s = output.view.shape;
        let count = s.n * s.h * s.w;
        if s.c != 3 || pixels.len() < count * 3 || table.len() < 3 * 256 * 4 || channel.iter().any(|&c| c > 2)
        {
            return Err(Error::Internal("a network's input of other sizes than its pixels".into()));
        }
        let args = PixelsArgs {
            pixels: pixels.address(),
            table: table.address(),
            output: output.map()?,
            channel: channel.map(|c| c as i32),
        };
        // SAFETY: checked above; the args are the kernel's struct.
        unsafe { self.maps.network_input.launch(&self.stream, blocks(count), THREADS, 0, &args) }
    }

    /// Writes max(v, slope * v) to `output`, v the sum of one or two maps, each enlarged to the nearest pixels of the output's size.
    pub fn sum(&self, inputs: &[MapIn<'_>], output: MapIn<'_>, slope: f32) -> Result<()> {
        let (Some(left), true) = (inputs.first(), inputs.len() <= 2) else {
            return Err(Error::Internal("a sum of other than one or two maps".into()));
        };
        let c = output.view.shape.c;
        inputs.iter().try_for_each(|m| fits("a sum", &[(m, c), (&output, c)]))?;
        let right = inputs.get(1).map(MapIn::map).transpose()?;
        let args = SumMapsArgs {
            left: left.map()?,
            right: right.unwrap_or_default(),
            output: output.map()?,
            both: right.is_some().into(),
            slope,
        };
        // SAFETY: as above.
        unsafe { self.maps.sum_maps.launch(&self.stream, blocks_for(&output.view), THREADS, 0, &args) }
    }

    /// Writes the gradient of a map to `x`, or adds it, from that of what was made of it, `d`; the maps may be of different types.
    pub fn taken_back(&self, taken: Taken, d: MapIn<'_>, x: MapIn<'_>, add: bool) -> Result<()> {
        let c = x.view.shape.c;
        fits("a gradient", &[(&d, c), (&x, c)])?;
        let k = &self.maps;
        let (kernel, [top, column]) = match taken {
            Taken::From(corner) => (&k.crop_back, corner),
            Taken::Nearest => (&k.nearest_back, [0; 2]),
            Taken::Bilinear => (&k.bilinear_back, [0; 2]),
            Taken::Mean => (&k.average_back, [0; 2]),
        };
        let (top, column) = (top as i32, column as i32);
        let args = BackArgs { gradient: d.map()?, input: x.map()?, add: add.into(), top, column };
        // SAFETY: as above.
        unsafe { kernel.launch(&self.stream, blocks_for(&x.view), THREADS, 0, &args) }
    }

    fn pool_args(pool: &Pool<'_>, x: &MapIn<'_>, y: &MapIn<'_>, add: bool) -> Result<PoolArgs> {
        let c = x.view.shape.c;
        fits("a pooling", &[(x, c), (y, c)])?;
        let taps = pool.kernel[0] * pool.kernel[1];
        if !(1..=256).contains(&taps) || pool.taps.len() < y.view.shape.len() || pool.stride.contains(&0) {
            return Err(Error::Unsupported(format!(
                "a max pooling of {taps} values is not trained on a device: a window has at most 256"
            )));
        }
        Ok(PoolArgs {
            input: x.map()?,
            output: y.map()?,
            taps: pool.taps.address(),
            kernel: pair(pool.kernel),
            stride: pair(pool.stride),
            pad: pair(pool.pad),
            add: add.into(),
        })
    }

    /// Writes the largest value under each window to `y`, and which it was to the pool's taps.
    pub fn max_pool(&self, pool: &Pool<'_>, x: MapIn<'_>, y: MapIn<'_>) -> Result<()> {
        let args = Self::pool_args(pool, &x, &y, false)?;
        // SAFETY: as above.
        unsafe { self.maps.max_pool_taps.launch(&self.stream, blocks_for(&y.view), THREADS, 0, &args) }
    }

    /// Writes the gradient of a pooling's input to `x`, or adds it, from that of its output, `d`.
    pub fn max_pool_back(&self, pool: &Pool<'_>, d: MapIn<'_>, x: MapIn<'_>, add: bool) -> Result<()> {
        let args = Self::pool_args(pool, &x, &d, add)?;
        // SAFETY: as above.
        unsafe { self.maps.max_pool_back.launch(&self.stream, blocks_for(&x.view), THREADS, 0, &args) }
    }

    /// Writes the gradient of a sigmoid's input to `x`, or adds it, from its output `y` and that one's gradient; of a softmax where
    /// `group` tells how many channels one has.
    pub fn saturated_back(
        &self,
        group: Option<usize>,
        y: MapIn<'_>,
        d: MapIn<'_>,
        x: MapIn<'_>,
        add: bool,
    ) -> Result<()> {
        let c = x.view.shape.c;
        fits("an activation's gradient", &[(&y, c), (&d, c), (&x, c)])?;
        if group.is_some_and(|g| g == 0 || !c.is_multiple_of(g)) {
            return Err(Error::Internal("a softmax over other than whole groups".into()));
        }
        let args = ActivationArgs {
            output: y.map()?,
            gradient: d.map()?,
            input: x.map()?,
            add: add.into(),
            group: group.unwrap_or(1) as i32,
        };
        let kernel = if group.is_some() { &self.maps.softmax_back } else { &self.maps.sigmoid_back };
        // SAFETY: as above.
        unsafe { kernel.launch(&self.stream, blocks_for(&x.view), THREADS, 0, &args) }
    }

    /// Writes the gradient of the features that `boxes`, f32, were pooled from to `x`, or adds it, from that of the bins, `d`.
    pub fn roi_align_back(
        &self,
        align: Align,
        boxes: MapIn<'_>,
        d: MapIn<'_>,
        x: MapIn<'_>,
        add: bool,
    ) -> Result<()> {
        fits("RoIAlign's boxes", &[(&d, x.view.shape.c), (&boxes, 5)])?;
        let args = RoiBackArgs {
            gradient: d.map()?,
            boxes: boxes.map()?,
            input: x.map()?,
            spatial_scale: align.spatial_scale,
            samples: align.samples as i32,
            aligned: align.aligned.into(),
            add: add.into(),
        };
        let s = x.view.shape;
        let threads = s.n * s.h * s.w * (s.c + x.view.tail).div_ceil(8);
        // SAFETY: as above.
        unsafe { self.maps.roi_align_back.launch(&self.stream, blocks(threads), THREADS, 0, &args) }
    }
}
