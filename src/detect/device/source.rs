//! A picture to search, wherever it is.

use crate::error::Result;
use crate::gpu::pixels::Picture;
use crate::gpu::stage::Stage;
use crate::pixels::device::copied_picture;
use crate::pixels::{DeviceImage, ImageView, Placement, Size};

/// A picture to search.
#[derive(Clone, Copy)]
pub enum Source<'a> {
    /// In the host's memory.
    Host(ImageView<'a>),
    /// In the device's.
    Device(DeviceImage),
}

impl<'a> Source<'a> {
    pub(super) fn upright_size(&self) -> Size {
        match self {
            Source::Host(view) => view.upright_size(),
            Source::Device(image) => image.upright_size(),
        }
    }

    pub(super) fn placement(&self) -> Placement {
        match self {
            Source::Host(view) => view.placement(),
            Source::Device(image) => image.placement(),
        }
    }

    /// The picture or its mirror image.
    pub(super) fn turned(&self, mirrored: bool) -> Self {
        match self {
            _ if !mirrored => *self,
            Source::Host(view) => Source::Host(view.with_orientation(view.orientation().mirror())),
            Source::Device(image) => Source::Device(image.with_orientation(image.orientation().mirror())),
        }
    }

    /// What has to be brought to the device.
    pub(super) fn planes(&self) -> impl Iterator<Item = &'a [u8]> {
        let planes: [&'a [u8]; 3] = match self {
            Source::Host(view) => std::array::from_fn(|i| view.planes().get(i).map_or(&[][..], |p| p.data)),
            Source::Device(_) => [&[]; 3],
        };
        planes.into_iter().filter(|p| !p.is_empty())
    }

    /// Bytes of the stage that it takes.
    pub(super) fn pixel_bytes(&self) -> usize {
        Stage::pixels_for(self.planes().map(<[u8]>::len))
    }

    /// As the kernels take it, once its planes are at these addresses of the device.
    pub(super) fn picture(&self, copies: &[u64]) -> Result<Picture> {
        match self {
            Source::Host(view) => copied_picture(view, copies),
            Source::Device(image) => image.picture(),
        }
    }
}
