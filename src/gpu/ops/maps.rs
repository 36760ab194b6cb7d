//! What happens to maps between convolutions.

use super::{blocks, blocks_for, maps_kernel, Device, Task, THREADS};
use crate::error::{Error, Result};
use crate::gpu::driver::Stream;
use crate::gpu::kernels::Kernel;
use crate::gpu::map::{DeviceView, Map};
use crate::gpu::memory::DeviceBuffer;
use crate::shape::Shape;

/// The struct of a kernel of `cuda/maps.cu` that reads one map and writes one: both, then what else it takes.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct MapArgs<R> {
    pub(super) input: Map,
    pub(super) output: Map,
    pub(super) rest: R,
}

/// An operation from one map to another, a thread a value of the output.
pub struct MapOp<R = ()> {
    pub(super) kernel: Kernel,
    rest: R,
}

impl<R: Copy> MapOp<R> {
    fn named(device: &Device, name: &'static str, rest: R) -> Result<Self> {
        Ok(Self { kernel: maps_kernel(device, name)?, rest })
    }

    fn args(&self, task: &Task) -> MapArgs<R> {
        MapArgs { input: task.input(), output: task.output(), rest: self.rest }
    }

    /// # Safety
    /// As [`super::DeviceOp::launch`].
    pub(super) unsafe fn launch(&self, task: &Task) -> Result<()> {
        // SAFETY: the caller's contract; the args are the kernel's struct.
        unsafe { task.launch(&self.kernel, &self.args(task)) }
    }
}

impl MapOp {
    /// Interpolation to the output's size: bilinear, or by the nearest pixels.
    pub fn resize(device: &Device, bilinear: bool) -> Result<Self> {
        Self::named(device, if bilinear { "resize_bilinear" } else { "resize_nearest" }, ())
    }

    /// 1 / (1 + e^-x).
    pub fn sigmoid(device: &Device) -> Result<Self> {
        Self::named(device, "sigmoid", ())
    }
}

/// Maximum over windows: kernel, stride, and what is above and to the left.
pub type PoolOp = MapOp<[[i32; 2]; 3]>;

impl PoolOp {
    /// Of windows of this size and stride; `pad` above and to the left.
    pub fn new(device: &Device, kernel: [usize; 2], stride: [usize; 2], pad: [usize; 2]) -> Result<Self> {
        Self::named(device, "max_pool", [kernel, stride, pad].map(|v| v.map(|v| v as i32)))
    }
}

/// Mean over rows and columns, a block a value.
pub struct AverageOp(MapOp);

impl AverageOp {
    /// The mean.
    pub fn new(device: &Device) -> Result<Self> {
        MapOp::named(device, "global_average", ()).map(Self)
    }

    pub(super) fn kernel(&self) -> &Kernel {
        &self.0.kernel
    }

    /// # Safety
    /// As [`super::DeviceOp::launch`].
    pub(super) unsafe fn launch(&self, task: &Task) -> Result<()> {
        let output = task.output;
        let values = output.shape.n * (output.shape.c + output.tail);
        let args = self.0.args(task);
        // SAFETY: the caller's contract; the args are the kernel's struct, and a thread has a float of shared memory.
        unsafe { self.0.kernel.launch(task.stream, [values as u32, 1, 1], THREADS, THREADS * 4, &args) }
    }
}

/// Softmax over groups of so many neighbouring channels, a thread a group.
pub struct SoftmaxOp(MapOp<i32>);

impl SoftmaxOp {
    /// Over groups of so many channels.
    pub fn new(device: &Device, group: usize) -> Result<Self> {
        MapOp::named(device, "softmax", group as i32).map(Self)
    }

    pub(super) fn kernel(&self) -> &Kernel {
        &self.0.kernel
    }

    /// # Safety
    /// As [`super::DeviceOp::launch`].
    pub(super) unsafe fn launch(&self, task: &Task) -> Result<()> {
        let s = task.output.shape;
        let groups = s.n * s.h * s.w * (s.c / self.0.rest as usize);
        // SAFETY: the caller's contract; the args are the kernel's struct.
        unsafe { self.0.kernel.launch(task.stream, blocks(groups), THREADS, 0, &self.0.args(task)) }
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
    pub(super) unsafe fn launch(&self, task: &Task) -> Result<()> {
        let args = AddArgs {
            left: task.input(),
            right: task.second().filter(|_| self.both).unwrap_or_default(),
            output: task.output(),
            both: i32::from(self.both),
            top: self.corner[0] as i32,
            column: self.corner[1] as i32,
            slope: self.slope,
        };
        // SAFETY: the caller's contract; the args are the kernel's struct.
        unsafe { task.launch(&self.kernel, &args) }
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
    /// Cells a pixel, samples a bin along an axis (0: as many as it has cells), whether boxes are moved by half a cell.
    pub fn new(device: &Device, spatial_scale: f32, samples: usize, aligned: bool) -> Result<Self> {
        Ok(Self { spatial_scale, samples, aligned, kernel: maps_kernel(device, "roi_align")? })
    }

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

    /// # Safety
    /// As [`super::DeviceOp::launch`].
    pub(super) unsafe fn launch(&self, task: &Task) -> Result<()> {
        let boxes = task.second().ok_or_else(|| Error::Internal("RoIAlign without boxes".into()))?;
        // SAFETY: the caller's contract; the args are the kernel's struct.
        unsafe { task.launch(&self.kernel, &self.args(task.input(), boxes, task.output())) }
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
}
