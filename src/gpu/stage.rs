//! What a detection brings to the device: its settings, how its pictures lie, their pixels; in pinned memory first, then in one copy.

use super::driver::Stream;
use super::faces::Settings;
use super::map::DeviceView;
use super::memory::{DeviceBuffer, PinnedBuffer};
use super::ops::Device;
use super::pixels::{InputNorm, InputOp, InputWindow, Picture};
use crate::error::{Error, Result};

/// Pictures of an image: it, and its mirror image.
pub const PICTURES: usize = 2;
/// Where the first [`Picture`] lies, behind the [`Settings`].
const PICTURES_AT: usize = 64;
/// Bytes of an image's pictures.
const IMAGE_STEP: usize = PICTURES * size_of::<Picture>();
/// Uploads are multiples of this, or all that there is.
const UPLOAD_STEP: usize = 64 << 10;
/// Planes begin at multiples of this.
const PLANE_ALIGN: usize = 256;

const _: () = assert!(size_of::<Settings>() <= PICTURES_AT);

/// The memory of one session's pictures, here and on the device.
pub struct Stage {
    pinned: PinnedBuffer,
    device: DeviceBuffer,
    input: InputOp,
    images: usize,
}

fn zeros(device: &Device, bytes: usize) -> Result<DeviceBuffer> {
    let buffer = DeviceBuffer::new(device.context(), bytes)?;
    buffer.fill(device.uploads(), 0..bytes, 0)?;
    device.uploads().synchronize()?;
    Ok(buffer)
}

impl Stage {
    /// With room for so many images, and bytes of pixels of all of them.
    pub fn new(device: &Device, images: usize, pixels: usize) -> Result<Self> {
        let bytes = Self::head(images) + pixels;
        Ok(Self {
            images,
            pinned: PinnedBuffer::new(device.context(), bytes)?,
            device: zeros(device, bytes)?,
            input: InputOp::new(device)?,
        })
    }

    /// Images that it has room for.
    pub fn images(&self) -> usize {
        self.images
    }

    /// Bytes of pixels that it has room for.
    pub fn room(&self) -> usize {
        self.pinned.len() - Self::head(self.images)
    }

    /// Bytes of pixels that planes of these lengths take.
    pub fn pixels_for(planes: impl Iterator<Item = usize>) -> usize {
        planes.map(|bytes| bytes.next_multiple_of(PLANE_ALIGN)).sum()
    }

    /// Where the settings lie on the device.
    pub fn settings_address(&self) -> u64 {
        self.device.address()
    }

    /// Copies the planes of all images into the staging memory. Returns where the first byte of each will be on the device, and the
    /// bytes to upload. Only while no stream reads the stage.
    pub fn place<'a>(&mut self, planes: impl Iterator<Item = &'a [u8]>) -> Result<(Vec<u64>, usize)> {
        let (mut at, mut addresses) = (Self::head(self.images), Vec::new());
        let bytes = self.pinned.bytes_mut();
        for plane in planes {
            let to = bytes
                .get_mut(at..at + plane.len())
                .ok_or_else(|| Error::Internal("a stage that is smaller than the picture".into()))?;
            to.copy_from_slice(plane);
            addresses.push(self.device.address() + at as u64);
            at = (at + plane.len()).next_multiple_of(PLANE_ALIGN);
        }
        // In steps: rows of other lengths need no recording of their own.
        Ok((addresses, at.next_multiple_of(UPLOAD_STEP).min(bytes.len())))
    }

    /// Writes settings and the pictures of the first images. Only while no stream reads the stage.
    pub fn describe(&mut self, settings: &Settings, pictures: &[[Picture; PICTURES]]) {
        let bytes = self.pinned.bytes_mut();
        bytes[..size_of::<Settings>()].copy_from_slice(bytemuck::bytes_of(settings));
        let pictures: &[u8] = bytemuck::cast_slice(&pictures[..pictures.len().min(self.images)]);
        bytes[PICTURES_AT..PICTURES_AT + pictures.len()].copy_from_slice(pictures);
    }

    /// Brings the first `bytes` of the staging memory to the device, in the stream's order.
    pub fn upload(&self, stream: &Stream, bytes: usize) -> Result<()> {
        self.device.write(stream, 0, &self.pinned, bytes)
    }

    /// Bytes of what does not depend on the pixels: settings and how the pictures of so many images lie.
    pub fn head(images: usize) -> usize {
        (PICTURES_AT + images * IMAGE_STEP).next_multiple_of(PLANE_ALIGN)
    }

    /// Writes the window of picture `index` of the first images into the network's input, as many as it has, in the stream's order. Where a
    /// picture has another size than the window is for, zeros.
    pub fn input(
        &self,
        stream: &Stream,
        index: usize,
        window: &InputWindow,
        norm: &InputNorm,
        arena: &DeviceBuffer,
        output: &DeviceView,
    ) -> Result<()> {
        let fits = output.bytes().and_then(|bytes| bytes.checked_add(output.offset));
        if index >= PICTURES || output.shape.n > self.images || fits.is_none_or(|end| end > arena.len()) {
            return Err(Error::Internal("a network's input outside its arena".into()));
        }
        let picture = self.device.address() + (PICTURES_AT + index * size_of::<Picture>()) as u64;
        // SAFETY: the stage holds zeros (pictures without a size, of which nothing is read) or what `describe` wrote: pictures whose
        // planes `place` has copied behind them, or that lie where the caller has them on the device. The output was found in
        // the arena, which is another allocation. Window and stage are kept by whoever keeps the graph.
        unsafe { self.input.launch(stream, (picture, IMAGE_STEP), window, norm, arena.address(), output) }
    }
}
