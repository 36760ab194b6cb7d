//! The operations of a training on a device, forward and backward: what each reads and writes is given with every call, since weights
//! change with every step and sizes may.
//!
//! They are safe to call: every map must lie in its buffer, every run of values too, and channels must fit. An output must be apart
//! from the inputs unless it is said that it may be one of them; where it is not, what it holds is of no use, but nothing else is touched.

mod conv;
mod library;
mod maps;
mod norm;
pub mod objective;
mod phase;
mod step;
mod weights;

pub use conv::Filter;
pub use maps::{Align, Pool, Taken};
pub use norm::{Norm, NormGradient};
pub use step::{AdamW, Sgd};

use super::conv::ConvKernels;
use super::{Device, DeviceOp};
use crate::error::{Error, Result};
use crate::gpu::driver::Stream;
use crate::gpu::kernels::{Kernel, Source};
use crate::gpu::map::{DeviceView, Element, Map};
use crate::gpu::memory::DeviceBuffer;
use std::sync::Arc;

/// A map in a buffer.
#[derive(Clone, Copy)]
pub struct MapIn<'a> {
    /// The buffer.
    pub buffer: &'a DeviceBuffer,
    /// Where it lies there.
    pub view: DeviceView,
}

impl MapIn<'_> {
    /// The view as one of all of the device's memory, once it is known to lie in its buffer.
    fn absolute(&self) -> Result<DeviceView> {
        let v = self.view;
        let s = v.shape;
        let values = s.n.checked_mul(s.h).and_then(|n| n.checked_mul(s.w)?.checked_mul(v.pixel));
        // Kernels count values in 32 bits.
        let Some(values) = values.filter(|&n| !s.is_empty() && n <= i32::MAX as usize) else {
            return Err(Error::LimitExceeded(format!("a map of {s} is empty or too large for the device")));
        };
        let end = v.offset + (values - v.pixel + s.c + v.tail) * v.element.bytes();
        if s.c + v.tail > v.pixel || end > self.buffer.len() {
            return Err(Error::Internal(format!("a map of {s} lies outside its buffer")));
        }
        Ok(DeviceView { offset: self.buffer.address() as usize + v.offset, ..v })
    }

    fn map(&self) -> Result<Map> {
        Ok(self.absolute()?.at(0))
    }
}

/// A run of f32 values in a buffer: a parameter, its gradient.
#[derive(Clone, Copy)]
pub struct Values<'a> {
    /// The buffer.
    pub buffer: &'a DeviceBuffer,
    /// Its first byte.
    pub at: usize,
    /// Values.
    pub len: usize,
}

impl Values<'_> {
    /// Its address, where it lies in its buffer and has `len` values.
    fn address(&self, len: usize) -> Result<u64> {
        let end = len.checked_mul(4).and_then(|n| n.checked_add(self.at));
        if self.len != len || !self.at.is_multiple_of(4) || end.is_none_or(|end| end > self.buffer.len()) {
            return Err(Error::Internal(format!("{} values where {len} are read or written", self.len)));
        }
        Ok(self.buffer.address() + self.at as u64)
    }
}

/// Kernels of a file by their names.
macro_rules! kernels {
    ($(#[$doc:meta])* $visible:vis $name:ident of $source:ident: $($kernel:ident),+ $(,)?) => {
        $(#[$doc])*
        $visible struct $name {
            $(pub(super) $kernel: $crate::gpu::kernels::Kernel),+
        }
        impl $name {
            $visible fn new(device: &$crate::gpu::ops::Device) -> $crate::error::Result<Self> {
                let get = |name| device.kernels().get($crate::gpu::kernels::Source::$source, name, 0);
                Ok(Self { $($kernel: get(stringify!($kernel))?),+ })
            }
        }
    };
}
use kernels;

/// Memory that grows as needed, of whatever it holds.
#[derive(Default)]
pub struct Room {
    buffer: Option<DeviceBuffer>,
    /// Buffers that it grew out of, kept for [`TrainOps::give_outgrown_back`] where `keeps`.
    outgrown: Vec<DeviceBuffer>,
    keeps: bool,
}

impl Room {
    /// Takes a buffer that is no longer asked for, to be given back with those that it grew out of.
    fn grow_out_of(&mut self, buffer: DeviceBuffer) {
        if self.keeps {
            self.outgrown.push(buffer);
        }
    }

    /// It, once it was made.
    pub fn there(&self) -> Result<&DeviceBuffer> {
        self.buffer.as_ref().ok_or_else(|| Error::Internal("no room".into()))
    }

    /// The address of so many bytes.
    pub fn bytes(&mut self, device: &Device, bytes: usize) -> Result<u64> {
        match &self.buffer {
            Some(buffer) if buffer.len() >= bytes => Ok(buffer.address()),
            _ => {
                if let Some(buffer) = self.buffer.take() {
                    self.grow_out_of(buffer);
                }
                let buffer = DeviceBuffer::new(device.context(), bytes)?;
                Ok(self.buffer.insert(buffer).address())
            }
        }
    }
}

/// The operations, on maps of one type and on one stream.
pub struct TrainOps {
    device: Arc<Device>,
    stream: Stream,
    element: Element,
    conv: ConvKernels,
    depthwise: Kernel,
    weights: weights::Kernels,
    norms: norm::Kernels,
    maps: maps::Kernels,
    steps: step::Kernels,
    libraries: library::Libraries,
    /// Sums of blocks and ranges, until they are added up.
    partial: Room,
    /// Weights in the order that a convolution reads them in.
    packed: Room,
    /// A bias in the maps' type.
    low_bias: Room,
    /// A bias of nothing.
    zeros: Room,
    zeros_len: usize,
}

impl TrainOps {
    /// On maps of `element`.
    pub fn new(device: &Arc<Device>, element: Element) -> Result<Self> {
        Ok(Self {
            device: device.clone(),
            stream: Stream::new(device.context())?,
            element,
            conv: ConvKernels::new(device, element.into())?,
            depthwise: super::conv::depthwise_kernel(device, element)?,
            weights: weights::Kernels::new(device)?,
            norms: norm::Kernels::new(device)?,
            maps: maps::Kernels::new(device)?,
            steps: step::Kernels::new(device)?,
            libraries: library::Libraries::default(),
            partial: Room::default(),
            packed: Room::default(),
            low_bias: Room::default(),
            zeros: Room::default(),
            zeros_len: 0,
        })
    }

    /// The device.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// Where its work goes.
    pub fn stream(&self) -> &Stream {
        &self.stream
    }

    fn rooms(&mut self) -> [&mut Room; 4] {
        [&mut self.partial, &mut self.packed, &mut self.low_bias, &mut self.zeros]
    }

    /// Memory that is grown out of is from now on given back when [`Self::give_outgrown_back`] says so: the driver waits for all of a
    /// device's work before it takes memory back, so for sums over ranks of which one may be gone.
    pub fn keep_outgrown(&mut self) {
        self.rooms().into_iter().for_each(|room| room.keeps = true);
    }

    /// As it says: to be called where no work of the device waits for anybody.
    pub fn give_outgrown_back(&mut self) {
        self.rooms().into_iter().for_each(|room| room.outgrown.clear());
    }

    /// The type of its maps.
    pub fn element(&self) -> Element {
        self.element
    }

    /// An operation of inference without weights. The caller knows that sizes are those of its layer.
    pub(crate) fn run(&self, op: &DeviceOp, inputs: &[MapIn<'_>], output: MapIn<'_>) -> Result<()> {
        let inputs = inputs.iter().map(MapIn::absolute).collect::<Result<Vec<_>>>()?;
        if inputs.is_empty() {
            return Err(Error::Internal("an operation without input".into()));
        }
        let output = output.absolute()?;
        if op.workspace(&inputs, &output) > 0 {
            return Err(Error::Internal("an operation with a workspace".into()));
        }
        // SAFETY: the views lie in their buffers.
        unsafe { op.launch(&self.stream, 0, &inputs, &output, 0) }
    }

    /// The address of `len` zeros.
    fn zeros(&mut self, len: usize) -> Result<u64> {
        let address = self.zeros.bytes(&self.device, len * 4)?;
        if let Some(buffer) = self.zeros.buffer.as_ref().filter(|_| self.zeros_len < len) {
            buffer.fill(&self.stream, 0..buffer.len(), 0)?;
            self.zeros_len = buffer.len() / 4;
        }
        Ok(address)
    }
}

/// A kernel of a training that is launched with more shared memory than is always there.
fn kernel(device: &Device, name: &'static str, shared: u32) -> Result<Kernel> {
    device.kernels().get(Source::TrainConv, name, shared)
}

/// Errors unless maps have as many images, and channels as the operation wants.
fn fits(what: &str, maps: &[(&MapIn<'_>, usize)]) -> Result<()> {
    let images = maps.first().map_or(0, |(m, _)| m.view.shape.n);
    if maps.iter().all(|(m, c)| m.view.shape.n == images && m.view.shape.c == *c) {
        return Ok(());
    }
    let shapes: Vec<_> = maps.iter().map(|(m, _)| m.view.shape).collect();
    Err(Error::Internal(format!("{what}: maps {shapes:?}")))
}
