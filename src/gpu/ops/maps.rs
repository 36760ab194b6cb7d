//! What happens to maps between convolutions.

use super::{blocks, blocks_for, maps_kernel, Device, THREADS};
use crate::error::{Error, Result};
use crate::gpu::driver::Stream;
use crate::gpu::kernels::Kernel;
use crate::gpu::map::{DeviceView, Map};
use crate::gpu::memory::DeviceBuffer;
use crate::shape::Shape;

/// `PoolArgs` of `cuda/maps.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct PoolArgs {
    input: Map,
    output: Map,
    kernel: [i32; 2],
    stride: [i32; 2],
    pad: [i32; 2],
}

/// Maximum over windows.
pub struct PoolOp {
    window: [[i32; 2]; 3],
    pub(super) kernel: Kernel,
}

impl PoolOp {
    /// Of windows of this size and stride; `pad` above and to the left.
    pub fn new(device: &Device, kernel: [usize; 2], stride: [usize; 2], pad: [usize; 2]) -> Result<Self> {
        let window = [kernel, stride, pad].map(|v| v.map(|v| v as i32));
        Ok(Self { window, kernel: maps_kernel(device, "max_pool")? })
    }

    /// # Safety
    /// As [`super::DeviceOp::launch`].
    pub(super) unsafe fn launch(
        &self,
        stream: &Stream,
        arena: u64,
        input: &DeviceView,
        output: &DeviceView,
    ) -> Result<()> {
        let [kernel, stride, pad] = self.window;
        let args = PoolArgs { input: input.at(arena), output: output.at(arena), kernel, stride, pad };
        // SAFETY: the caller's contract; the args are the kernel's struct.
        unsafe { self.kernel.launch(stream, blocks_for(output), THREADS, 0, &args) }
    }
}

/// `MapArgs` of `cuda/maps.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct MapArgs {
    input: Map,
    output: Map,
}

/// Mean over rows and columns.
pub struct AverageOp {
    pub(super) kernel: Kernel,
}

impl AverageOp {
    /// The mean.
    pub fn new(device: &Device) -> Result<Self> {
        Ok(Self { kernel: maps_kernel(device, "global_average")? })
    }

    /// # Safety
    /// As [`super::DeviceOp::launch`].
    pub(super) unsafe fn launch(
        &self,
        stream: &Stream,
        arena: u64,
        input: &DeviceView,
        output: &DeviceView,
    ) -> Result<()> {
        let args = MapArgs { input: input.at(arena), output: output.at(arena) };
        let values = output.shape.n * (output.shape.c + output.tail);
        // A block a value, a float of shared memory a thread.
        // SAFETY: the caller's contract; the args are the kernel's struct.
        unsafe { self.kernel.launch(stream, [values as u32, 1, 1], THREADS, THREADS * 4, &args) }
    }
}

/// Interpolation to the output's size.
pub struct ResizeOp {
    pub(super) kernel: Kernel,
}

impl ResizeOp {
    /// Bilinear, or by the nearest pixels.
    pub fn new(device: &Device, bilinear: bool) -> Result<Self> {
        let name = if bilinear { "resize_bilinear" } else { "resize_nearest" };
        Ok(Self { kernel: maps_kernel(device, name)? })
    }

    /// # Safety
    /// As [`super::DeviceOp::launch`].
    pub(super) unsafe fn launch(
        &self,
        stream: &Stream,
        arena: u64,
        input: &DeviceView,
        output: &DeviceView,
    ) -> Result<()> {
        let args = MapArgs { input: input.at(arena), output: output.at(arena) };
        // SAFETY: the caller's contract; the args are the kernel's struct.
        unsafe { self.kernel.launch(stream, blocks_for(output), THREADS, 0, &args) }
    }
}

/// `AddArgs` of `cuda/maps.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct AddArgs {
    left: Map,
    right: Map,
    output: Map,
    both: i32,
    top: i32,
    column: i32,
    slope: f32,
}

/// Sum, copy or crop, with an activation.
pub struct AddOp {
    slope: f32,
    both: bool,
    corner: [usize; 2],
    pub(super) kernel: Kernel,
}

impl AddOp {
    /// max(v, slope * v) of the sum v of two maps.
    pub fn sum(device: &Device, slope: f32) -> Result<Self> {
        Ok(Self { slope, both: true, corner: [0, 0], kernel: maps_kernel(device, "add")? })
    }

    /// max(v, slope * v) of one map from its pixel `corner` (row, column) on; a second input only tells a size.
    pub fn copy(device: &Device, slope: f32, corner: [usize; 2]) -> Result<Self> {
        Ok(Self { slope, both: false, corner, kernel: maps_kernel(device, "add")? })
    }

    /// # Safety
    /// As [`super::DeviceOp::launch`].
    pub(super) unsafe fn launch(
        &self,
        stream: &Stream,
        arena: u64,
        left: &DeviceView,
        right: Option<&DeviceView>,
        output: &DeviceView,
    ) -> Result<()> {
        let args = AddArgs {
            left: left.at(arena),
            right: right.filter(|_| self.both).map_or(Map::default(), |r| r.at(arena)),
            output: output.at(arena),
            both: i32::from(self.both),
            top: self.corner[0] as i32,
            column: self.corner[1] as i32,
            slope: self.slope,
        };
        // SAFETY: the caller's contract; the args are the kernel's struct.
        unsafe { self.kernel.launch(stream, blocks_for(output), THREADS, 0, &args) }
    }
}

/// 1 / (1 + e^-x).
pub struct SigmoidOp {
    pub(super) kernel: Kernel,
}

impl SigmoidOp {
    /// Of every value.
    pub fn new(device: &Device) -> Result<Self> {
        Ok(Self { kernel: maps_kernel(device, "sigmoid")? })
    }

    /// # Safety
    /// As [`super::DeviceOp::launch`].
    pub(super) unsafe fn launch(
        &self,
        stream: &Stream,
        arena: u64,
        input: &DeviceView,
        output: &DeviceView,
    ) -> Result<()> {
        let args = MapArgs { input: input.at(arena), output: output.at(arena) };
        // SAFETY: the caller's contract; the args are the kernel's struct.
        unsafe { self.kernel.launch(stream, blocks_for(output), THREADS, 0, &args) }
    }
}

/// `SoftmaxArgs` of `cuda/maps.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct SoftmaxArgs {
    input: Map,
    output: Map,
    group: i32,
}

/// Softmax over groups of neighbouring channels.
pub struct SoftmaxOp {
    group: usize,
    pub(super) kernel: Kernel,
}

impl SoftmaxOp {
    /// Over groups of so many channels.
    pub fn new(device: &Device, group: usize) -> Result<Self> {
        Ok(Self { group, kernel: maps_kernel(device, "softmax")? })
    }

    /// # Safety
    /// As [`super::DeviceOp::launch`].
    pub(super) unsafe fn launch(
        &self,
        stream: &Stream,
        arena: u64,
        input: &DeviceView,
        output: &DeviceView,
    ) -> Result<()> {
        let args = SoftmaxArgs { input: input.at(arena), output: output.at(arena), group: self.group as i32 };
        let s = output.shape;
        let groups = s.n * s.h * s.w * (s.c / self.group);
        // SAFETY: the caller's contract; the args are the kernel's struct.
        unsafe { self.kernel.launch(stream, blocks(groups), THREADS, 0, &args) }
    }
}

/// `RoiAlignArgs` of `cuda/maps.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct RoiAlignArgs {
    input: Map,
    boxes: Map,
    output: Map,
    spatial_scale: f32,
    samples: i32,
    aligned: i32,
}

/// Features of boxes.
pub struct RoiAlignOp {
    spatial_scale: f32,
    samples: usize,
    aligned: bool,
    pub(super) kernel: Kernel,
}

impl RoiAlignOp {
    /// Gives its work to the stream, each map in a buffer of its own.
    pub fn run(
        &self,
        stream: &Stream,
        (features, input): (&DeviceBuffer, &DeviceView),
        (corners, boxes): (&DeviceBuffer, &DeviceView),
        (bins, output): (&DeviceBuffer, &DeviceView),
    ) -> Result<()> {
        let inside = |buffer: &DeviceBuffer, view: &DeviceView| {
            view.bytes()
                .and_then(|bytes| bytes.checked_add(view.offset))
                .is_some_and(|end| end <= buffer.len())
        };
        let apart = bins.address() != features.address() && bins.address() != corners.address();
        let sizes = boxes.shape == Shape::new(output.shape.n, 5, 1, 1) && input.shape.c == output.shape.c;
        if !(inside(features, input) && inside(corners, boxes) && inside(bins, output) && apart && sizes) {
            return Err(Error::Internal("RoIAlign of other maps".into()));
        }
        let args =
            self.args(input.at(features.address()), boxes.at(corners.address()), output.at(bins.address()));
        // SAFETY: each view was found in its buffer, the output's is another; the args are the kernel's struct.
        unsafe { self.kernel.launch(stream, blocks_for(output), THREADS, 0, &args) }
    }

    fn args(&self, input: Map, boxes: Map, output: Map) -> RoiAlignArgs {
        RoiAlignArgs {
            input,
            boxes,
            output,
            spatial_scale: self.spatial_scale,
            samples: self.samples as i32,
            aligned: i32::from(self.aligned),
        }
    }

    /// Cells a pixel, samples a bin along an axis (0: as many as it has cells), whether boxes are moved by half a cell.
    pub fn new(device: &Device, spatial_scale: f32, samples: usize, aligned: bool) -> Result<Self> {
        Ok(Self { spatial_scale, samples, aligned, kernel: maps_kernel(device, "roi_align")? })
    }

    /// # Safety
    /// As [`super::DeviceOp::launch`].
    pub(super) unsafe fn launch(
        &self,
        stream: &Stream,
        arena: u64,
        input: &DeviceView,
        boxes: Option<&DeviceView>,
        output: &DeviceView,
    ) -> Result<()> {
        let boxes = boxes.ok_or_else(|| Error::Internal("RoIAlign without boxes".into()))?;
        let args = self.args(input.at(arena), boxes.at(arena), output.at(arena));
        // SAFETY: the caller's contract; the args are the kernel's struct.
        unsafe { self.kernel.launch(stream, blocks_for(output), THREADS, 0, &args) }
    }
}
