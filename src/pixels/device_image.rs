//! A picture in a device's memory, as the caller holds it.

use super::device::stored_picture;
use super::placement::{Orientation, Placement};
use super::rect::{Rect, Size};
use super::view::{ColorMatrix, ColorRange, PixelFormat};
use crate::error::{Error, Result};
use crate::gpu::pixels::Picture;

/// A picture whose planes lie in the memory of a CUDA device: what an [`ImageView`](super::ImageView) is in the host's. That the planes
/// hold all rows is for the caller to know; nothing here can look.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DeviceImage {
    size: Size,
    format: PixelFormat,
    /// Address of row 0 and bytes from row to row.
    planes: [(u64, isize); 3],
    matrix: ColorMatrix,
    range: ColorRange,
    orientation: Orientation,
    roi: Rect,
}

impl DeviceImage {
    /// Picture of `width` x `height` stored pixels: of each plane that the format has the address of its row 0 and the bytes from a row
    /// to the next (negative: row 0 is the last in memory).
    ///
    /// Errors: as [`ImageView::new`](super::ImageView::new), as far as numbers tell.
    pub fn new(width: usize, height: usize, format: PixelFormat, planes: &[(u64, isize)]) -> Result<Self> {
        let size = Size::new(width, height);
        let mut held = [(0, 0); 3];
        held.iter_mut().zip(planes).for_each(|(held, plane)| *held = *plane);
        let image = Self {
            size,
            format,
            planes: held,
            matrix: ColorMatrix::default(),
            range: ColorRange::default(),
            orientation: Orientation::UPRIGHT,
            roi: Rect::whole(size),
        };
        if planes.len() != format.planes() {
            let (need, got) = (format.planes(), planes.len());
            return Err(Error::InvalidImage(format!("{format:?} needs {need} plane(s), {got} given")));
        }
        image.picture().map(|_| image)
    }

    /// The same picture with other colours; YUV formats alone heed them.
    pub fn with_color(self, matrix: ColorMatrix, range: ColorRange) -> Self {
        Self { matrix, range, ..self }
    }

    /// The same picture, to be turned so to be upright.
    pub fn with_orientation(self, orientation: Orientation) -> Self {
        Self { orientation, ..self }
    }

    /// The same picture, of which a region alone is looked at.
    ///
    /// Errors: [`Error::InvalidImage`] for one that is empty or reaches out.
    pub fn with_roi(self, roi: Rect) -> Result<Self> {
        let image = Self { roi, ..self };
        image.picture().map(|_| image)
    }

    /// How it is to be turned.
    pub fn orientation(&self) -> Orientation {
        self.orientation
    }

    /// Where its region lies once upright.
    pub fn placement(&self) -> Placement {
        Placement::new(self.roi, self.orientation)
    }

    /// Size of its region once upright.
    pub fn upright_size(&self) -> Size {
        let Rect { width, height, .. } = self.roi;
        if self.orientation.swaps_sides() {
            Size::new(height, width)
        } else {
            Size::new(width, height)
        }
    }

    /// As kernels take it.
    pub(crate) fn picture(&self) -> Result<Picture> {
        let planes = &self.planes[..self.format.planes()];
        stored_picture(self.size, self.format, planes, (self.matrix, self.range), &self.placement())
    }
}
