//! What is brought to the device once a step: through two pieces of pinned memory in turn, so that the host writes the next while the one
//! before is copied.

use super::driver::{Event, Stream};
use super::memory::{DeviceBuffer, PinnedBuffer};
use crate::error::{Error, Result};

/// Memory on both sides of such a copy; it grows as needed.
#[derive(Default)]
pub struct Upload {
    turns: [Option<Turn>; 2],
    /// Which of them is next.
    next: usize,
    device: Option<DeviceBuffer>,
}

/// Pinned memory, and the point where its last copy was done.
struct Turn {
    pinned: PinnedBuffer,
    copied: Event,
}

impl Drop for Turn {
    fn drop(&mut self) {
        // The memory is given back next. Where this fails the device is lost, and copies nothing more.
        let _ = self.copied.synchronize();
    }
}

impl Upload {
    /// Brings the `bytes` that `fill` writes to the device, in the stream's order; always the same stream. Waits for no work of the stream
    /// but the copy before the last.
    pub fn upload(
        &mut self,
        stream: &Stream,
        bytes: usize,
        fill: impl FnOnce(&mut [u8]),
    ) -> Result<&DeviceBuffer> {
        let slot = &mut self.turns[self.next];
        if slot.as_ref().is_none_or(|turn| turn.pinned.len() < bytes) {
            *slot = None;
            let pinned = PinnedBuffer::new(stream.context(), bytes)?;
            *slot = Some(Turn { pinned, copied: Event::new(stream.context())? });
        }
        if self.device.as_ref().is_none_or(|b| b.len() < bytes) {
            self.device = None;
            self.device = Some(DeviceBuffer::new(stream.context(), bytes)?);
        }
        let (Some(turn), Some(device)) = (slot, &self.device) else {
            return Err(Error::Internal("no buffer".into()));
        };
        turn.copied.synchronize()?;
        fill(&mut turn.pinned.bytes_mut()[..bytes]);
        device.write(stream, 0, &turn.pinned, bytes)?;
        turn.copied.record(stream)?;
        self.next ^= 1;
        Ok(device)
    }

    /// What the device's side holds, if anything was brought there.
    pub fn there(&self) -> Result<&DeviceBuffer> {
        self.device.as_ref().ok_or_else(|| Error::Internal("nothing was uploaded".into()))
    }
}
