//! The maps of a batch on a device, their gradients, and memory on both sides of a copy.

use crate::error::{Error, Result};
use crate::gpu::map::{DeviceView, Element};
use crate::gpu::memory::{DeviceBuffer, PinnedBuffer};
use crate::gpu::ops::train::{MapIn, TrainOps};
use crate::shape::Shape;
use crate::train::units::Unit;

/// Memory of a unit. It grows as needed and stays from batch to batch.
#[derive(Default)]
struct Held {
    /// The map as its operation left it, where what readers see is another.
    left: Option<DeviceBuffer>,
    /// As readers see it.
    seen: Option<DeviceBuffer>,
    /// Of a max pooling: where each value came from.
    taps: Option<DeviceBuffer>,
    /// Gradient with respect to what readers see, once one has left some.
    gradient: Option<DeviceBuffer>,
}

/// A batch on a device.
pub(super) struct Batch {
    element: Element,
    /// Of every unit's map.
    pub shapes: Vec<Shape>,
    held: Vec<Held>,
    spare: Vec<DeviceBuffer>,
}

/// Makes `slot` hold so many bytes.
pub(super) fn room<'a>(
    slot: &'a mut Option<DeviceBuffer>,
    ops: &TrainOps,
    bytes: usize,
) -> Result<&'a DeviceBuffer> {
    if slot.as_ref().is_none_or(|b| b.len() < bytes) {
        *slot = None;
        *slot = Some(DeviceBuffer::new(ops.device().context(), bytes)?);
    }
    slot.as_ref().ok_or_else(|| Error::Internal("no buffer".into()))
}

impl Batch {
    pub fn new(units: usize, element: Element) -> Self {
        let held = (0..units).map(|_| Held::default()).collect();
        Self { element, shapes: Vec::new(), held, spare: Vec::new() }
    }

    /// For a batch in which the graph's nodes have these shapes.
    pub fn begin(&mut self, nodes: &[Shape], units: &[Unit]) {
        self.shapes = units.iter().map(|u| nodes[u.node]).collect();
    }

    /// How unit `u`'s maps lie in their buffers.
    pub fn view(&self, u: usize) -> DeviceView {
        DeviceView::new(self.element, self.shapes[u], 0)
    }

    fn bytes(&self, u: usize) -> Result<usize> {
        let shape = self.shapes[u];
        self.view(u).bytes().ok_or_else(|| Error::LimitExceeded(format!("a map of {shape} is too large")))
    }

    /// Makes room for what unit `u` has: its map as readers see it, apart from that the one that its operation leaves, a byte a value.
    pub fn reserve(&mut self, u: usize, ops: &TrainOps, apart: bool, taps: bool) -> Result<()> {
        let bytes = self.bytes(u)?;
        let values = self.shapes[u].len();
        let held = &mut self.held[u];
        room(&mut held.seen, ops, bytes)?;
        if apart {
            room(&mut held.left, ops, bytes)?;
        }
        if taps {
            room(&mut held.taps, ops, values)?;
        }
        Ok(())
    }

    fn map<'a>(&self, u: usize, buffer: &'a Option<DeviceBuffer>) -> Result<MapIn<'a>> {
        let buffer = buffer.as_ref().ok_or_else(|| Error::Internal(format!("unit {u} has no such map")))?;
        Ok(MapIn { buffer, view: self.view(u) })
    }

    /// What readers of unit `u` see.
    pub fn seen(&self, u: usize) -> Result<MapIn<'_>> {
        self.map(u, &self.held[u].seen)
    }

    /// What its operation left, where that is apart.
    pub fn left(&self, u: usize) -> Result<MapIn<'_>> {
        self.map(u, &self.held[u].left)
    }

    /// Where each value of its max pooling came from.
    pub fn taps(&self, u: usize) -> Result<&DeviceBuffer> {
        self.held[u].taps.as_ref().ok_or_else(|| Error::Internal("a pooling before its forward pass".into()))
    }

    /// Takes the gradient of unit `u` out, to be written or, where the second value says so, added to.
    pub fn take_gradient(&mut self, u: usize, ops: &TrainOps) -> Result<(DeviceBuffer, bool)> {
        if let Some(gradient) = self.held[u].gradient.take() {
            return Ok((gradient, true));
        }
        Ok((self.take_spare(self.bytes(u)?, ops)?, false))
    }

    /// Takes the gradient of unit `u` out, if there is one.
    pub fn take_left_gradient(&mut self, u: usize) -> Option<DeviceBuffer> {
        self.held[u].gradient.take()
    }

    /// Puts it where it was.
    pub fn put_gradient(&mut self, u: usize, gradient: DeviceBuffer) {
        self.held[u].gradient = Some(gradient);
    }

    /// A buffer of at least so many bytes, the smallest spare one that there is.
    pub fn take_spare(&mut self, bytes: usize, ops: &TrainOps) -> Result<DeviceBuffer> {
        let fits = (0..self.spare.len()).filter(|&i| self.spare[i].len() >= bytes);
        match fits.min_by_key(|&i| self.spare[i].len()) {
            Some(i) => Ok(self.spare.swap_remove(i)),
            None => DeviceBuffer::new(ops.device().context(), bytes),
        }
    }

    /// Gives a buffer back.
    pub fn give_spare(&mut self, buffer: DeviceBuffer) {
        self.spare.push(buffer);
    }

    /// Forgets gradients that an earlier call left that failed.
    pub fn drop_gradients(&mut self) {
        let left: Vec<DeviceBuffer> = self.held.iter_mut().filter_map(|h| h.gradient.take()).collect();
        self.spare.extend(left);
    }
}

/// Memory on both sides of a copy.
#[derive(Default)]
pub(super) struct Staging {
    pinned: Option<PinnedBuffer>,
    device: Option<DeviceBuffer>,
}

impl Staging {
    fn pinned(&mut self, ops: &TrainOps, bytes: usize) -> Result<&mut PinnedBuffer> {
        if self.pinned.as_ref().is_none_or(|b| b.len() < bytes) {
            self.pinned = None;
            self.pinned = Some(PinnedBuffer::new(ops.device().context(), bytes)?);
        }
        self.pinned.as_mut().ok_or_else(|| Error::Internal("no buffer".into()))
    }

    /// The device's side, of at least so many bytes.
    pub fn device(&mut self, ops: &TrainOps, bytes: usize) -> Result<&DeviceBuffer> {
        room(&mut self.device, ops, bytes)
    }

    /// What the device's side holds, if anything was brought there.
    pub fn there(&self) -> Result<&DeviceBuffer> {
        self.device.as_ref().ok_or_else(|| Error::Internal("nothing was uploaded".into()))
    }

    /// Brings what `fill` writes to the device, in the stream's order.
    pub fn upload(
        &mut self,
        ops: &TrainOps,
        bytes: usize,
        fill: impl FnOnce(&mut [u8]),
    ) -> Result<&DeviceBuffer> {
        // What was brought before may be on its way still.
        ops.stream().synchronize()?;
        self.pinned(ops, bytes)?;
        room(&mut self.device, ops, bytes)?;
        match (&mut self.pinned, &self.device) {
            (Some(pinned), Some(device)) => {
                fill(&mut pinned.bytes_mut()[..bytes]);
                device.write(ops.stream(), 0, pinned, bytes)?;
                Ok(device)
            }
            _ => Err(Error::Internal("no buffer".into())),
        }
    }

    /// The first `bytes` of the device's side, once the stream has done what it has.
    pub fn download(&mut self, ops: &TrainOps, bytes: usize) -> Result<&[u8]> {
        self.pinned(ops, bytes)?;
        match (&self.pinned, &self.device) {
            (Some(pinned), Some(device)) => {
                device.read(ops.stream(), 0..bytes, pinned, 0)?;
                ops.stream().synchronize()?;
                Ok(&pinned.bytes()[..bytes])
            }
            _ => Err(Error::Internal("nothing to download".into())),
        }
    }
}
