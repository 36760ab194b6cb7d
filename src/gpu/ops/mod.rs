//! The operations of a network on a device: each has its weights there and launches its kernel on views of an arena.

mod choice;
mod conv;
mod maps;
mod route;
#[cfg(feature = "train")]
pub mod train;

pub(super) use choice::Bench;
pub use choice::ConvLibraries;
pub use conv::{ConvOp, ConvTransposeOp, ConvWindow, DepthwiseOp, Joined};
pub use maps::{AddOp, AverageOp, MapOp, PoolOp, RoiAlignOp, SoftmaxOp};
pub(super) use route::Route;

use super::driver::{Context, Stream};
use super::kernels::{Kernel, Kernels, Source};
use super::map::{Arithmetic, DeviceView, Map};
use crate::error::{Error, Result};
use choice::Choices;
use std::sync::{Arc, Mutex, Weak};

/// A device with its kernels, and a stream for what is brought there once.
pub struct Device {
    context: Arc<Context>,
    kernels: Kernels,
    uploads: Stream,
    choices: Choices,
}

impl Device {
    /// The device of this number, with the convolutions that `FARFACE_CUDA_CONV` names ([`ConvLibraries::from_env`]).
    ///
    /// Errors: [`Error::Unsupported`] naming the library or device that is missing,
    /// [`Error::InvalidArgument`] where the variable names none.
    pub fn new(ordinal: u32) -> Result<Arc<Self>> {
        Self::with_convolutions(ordinal, ConvLibraries::from_env()?)
    }

    /// As [`Device::new`], with these convolutions.
    pub fn with_convolutions(ordinal: u32, libraries: ConvLibraries) -> Result<Arc<Self>> {
        libraries.require()?;
        let context = Context::new(ordinal)?;
        let kernels = Kernels::new(&context)?;
        let uploads = Stream::new(&context)?;
        Ok(Arc::new(Self { context, kernels, uploads, choices: Choices::new(libraries) }))
    }

    /// The device of this number, the same for all who hold it meanwhile: kernels are compiled and loaded once.
    ///
    /// Errors: as [`Device::new`].
    pub fn shared(ordinal: u32) -> Result<Arc<Self>> {
        static DEVICES: Mutex<Vec<(u32, Weak<Device>)>> = Mutex::new(Vec::new());
        // Held while one is opened: a second session waits rather than opening it again.
        let mut devices = DEVICES.lock().unwrap_or_else(|e| e.into_inner());
        devices.retain(|(_, device)| device.strong_count() > 0);
        if let Some(device) = devices.iter().filter(|(n, _)| *n == ordinal).find_map(|(_, d)| d.upgrade()) {
            return Ok(device);
        }
        let device = Self::new(ordinal)?;
        devices.push((ordinal, Arc::downgrade(&device)));
        Ok(device)
    }

    /// Its context.
    pub fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// Its kernels.
    pub fn kernels(&self) -> &Kernels {
        &self.kernels
    }

    /// Who computes its convolutions.
    pub(super) fn choices(&self) -> &Choices {
        &self.choices
    }

    /// For what is brought there once.
    pub(crate) fn uploads(&self) -> &Stream {
        &self.uploads
    }

    /// Whether there are tiles of convolutions in this arithmetic: all but f32 want the instruction of tensor cores that they use.
    pub fn multiplies(&self, arithmetic: impl Into<Arithmetic>) -> bool {
        let capability = self.context.capability();
        match arithmetic.into() {
            Arithmetic::F32 => true,
            Arithmetic::F16 => capability >= [7, 5],
            Arithmetic::Bf16 | Arithmetic::Tf32 => capability >= [8, 0],
        }
    }

    /// Errors: [`Error::Unsupported`] for TF32 where tensor cores do not multiply it; half precision is multiplied in f32 there.
    pub fn require(&self, arithmetic: Arithmetic) -> Result<()> {
        if arithmetic != Arithmetic::Tf32 || self.multiplies(arithmetic) {
            return Ok(());
        }
        let [major, minor] = self.context.capability();
        Err(Error::Unsupported(format!(
            "CUDA device {} ({}) has compute capability {major}.{minor}, TF32 wants 8.0; take f16 or f32",
            self.context.ordinal(),
            self.context.name()
        )))
    }
}

/// An operation.
pub enum DeviceOp {
    /// Convolution.
    Conv(ConvOp),
    /// Convolution of each channel by itself.
    Depthwise(DepthwiseOp),
    /// Transposed convolution.
    ConvTranspose(ConvTransposeOp),
    /// Maximum over windows.
    MaxPool(PoolOp),
    /// Mean over a map.
    Average(AverageOp),
    /// Interpolation, sigmoid.
    Map(MapOp),
    /// Sum, copy, crop.
    Add(AddOp),
    /// Softmax.
    Softmax(SoftmaxOp),
    /// RoIAlign.
    RoiAlign(RoiAlignOp),
}

impl DeviceOp {
    /// Name of its kernel, where it does not depend on sizes.
    pub fn name(&self) -> &'static str {
        match self {
            DeviceOp::Conv(op) => op.name(),
            DeviceOp::Depthwise(op) => op.kernel.name(),
            DeviceOp::ConvTranspose(op) => op.kernel.name(),
            DeviceOp::MaxPool(op) => op.kernel.name(),
            DeviceOp::Average(op) => op.kernel().name(),
            DeviceOp::Map(op) => op.kernel.name(),
            DeviceOp::Add(op) => op.kernel.name(),
            DeviceOp::Softmax(op) => op.kernel().name(),
            DeviceOp::RoiAlign(op) => op.kernel.name(),
        }
    }

    /// What computes it by the route that was chosen, if one was.
    pub(super) fn name_by(&self, route: Option<&Route>) -> &'static str {
        match (self, route) {
            (DeviceOp::Conv(_), Some(route)) => route.name(),
            _ => self.name(),
        }
    }

    /// Bytes of memory that it needs beside these views while it runs, where no route was chosen.
    pub fn workspace(&self, inputs: &[DeviceView], output: &DeviceView) -> usize {
        match self {
            DeviceOp::Conv(op) => op.workspace(inputs, output),
            _ => 0,
        }
    }

    /// Gives its work to the stream, on views of an arena at this address, and a workspace at another.
    ///
    /// # Safety
    /// The views lie in the arena, the output apart from the inputs, and their sizes are those that the layer has; at `workspace`, apart
    /// from all of them, is as much memory as [`DeviceOp::workspace`] says, at a multiple of four.
    #[cfg(feature = "train")]
    pub(super) unsafe fn launch(
        &self,
        stream: &Stream,
        arena: u64,
        inputs: &[DeviceView],
        output: &DeviceView,
        workspace: u64,
    ) -> Result<()> {
        // SAFETY: the caller's contract.
        unsafe { self.launch_by(None, stream, arena, inputs, output, workspace) }
    }

    /// As [`DeviceOp::launch`], a convolution by the route that was chosen for these views.
    ///
    /// # Safety
    /// As [`DeviceOp::launch`]; the workspace is as large as the route says, where there is one.
    pub(super) unsafe fn launch_by(
        &self,
        route: Option<&Route>,
        stream: &Stream,
        arena: u64,
        inputs: &[DeviceView],
        output: &DeviceView,
        workspace: u64,
    ) -> Result<()> {
        let task = Task { stream, arena, inputs, output, route, workspace };
        // SAFETY: the caller's contract is each callee's.
        unsafe {
            match self {
                DeviceOp::Conv(op) => op.launch(&task),
                DeviceOp::Depthwise(op) => op.launch(&task),
                DeviceOp::ConvTranspose(op) => op.launch(&task),
                DeviceOp::MaxPool(op) => op.launch(&task),
                DeviceOp::Average(op) => op.launch(&task),
                DeviceOp::Map(op) => op.launch(&task),
                DeviceOp::Add(op) => op.launch(&task),
                DeviceOp::Softmax(op) => op.launch(&task),
                DeviceOp::RoiAlign(op) => op.launch(&task),
            }
        }
    }
}

/// What an operation works on: views of an arena at an address, in a stream's order.
struct Task<'a> {
    stream: &'a Stream,
    arena: u64,
    inputs: &'a [DeviceView],
    output: &'a DeviceView,
    /// Who computes a convolution; none for our kernels by their rule.
    route: Option<&'a Route>,
    /// Memory for what it needs beside the views.
    workspace: u64,
}

impl Task<'_> {
    fn input(&self) -> Map {
        self.inputs[0].at(self.arena)
    }

    fn second(&self) -> Option<Map> {
        self.inputs.get(1).map(|view| view.at(self.arena))
    }

    fn output(&self) -> Map {
        self.output.at(self.arena)
    }

    /// Launches a kernel with a thread a value of the output.
    ///
    /// # Safety
    /// As [`Kernel::launch`].
    unsafe fn launch<A: Copy>(&self, kernel: &Kernel, args: &A) -> Result<()> {
        // SAFETY: the caller's contract.
        unsafe { kernel.launch(self.stream, blocks_for(self.output), THREADS, 0, args) }
    }
}

/// Threads of a block of the kernels that compute value by value.
const THREADS: u32 = 256;

/// Blocks for so many threads in all.
fn blocks(threads: usize) -> [u32; 3] {
    [threads.div_ceil(THREADS as usize) as u32, 1, 1]
}

/// Blocks for a thread a value of a map, its tail with it.
fn blocks_for(output: &DeviceView) -> [u32; 3] {
    let s = output.shape;
    blocks(s.n * s.h * s.w * (s.c + output.tail))
}

/// A kernel of `maps.cu`.
fn maps_kernel(device: &Device, name: &'static str) -> Result<Kernel> {
    device.kernels.get(Source::Maps, name, 0)
}
