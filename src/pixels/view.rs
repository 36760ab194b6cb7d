//! A picture as the caller holds it: borrowed planes, checked once, never copied and never written.
//!
//! Three coordinate systems meet here, all with the origin at the top left corner, x to the right,
//! y down, pixel (i, j) covering the square i..i+1, j..j+1:
//! - *stored*: pixels of the given picture as it lies in memory (row 0 first, whatever the stride's sign);
//! - *upright*: the region of interest alone, mirrored and rotated as [`Orientation`] says;
//! - *level*: the upright region resized to one pyramid level ([`super::pyramid()`]).

use super::placement::{Orientation, Placement};
use super::rect::{Rect, Size};
use crate::error::{Error, Result};
use std::fmt;

/// How pixels lie in memory.
///
/// YUV formats become RGB in f32, clamped to 0..=255 but not rounded. Chroma is replicated, not
/// interpolated: the pixels that share a chroma sample all take it as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PixelFormat {
    /// One plane, 1 byte a pixel; the network gets the value in all three channels.
    Gray8,
    /// One plane, 3 bytes a pixel: red, green, blue.
    Rgb8,
    /// One plane, 3 bytes a pixel: blue, green, red.
    Bgr8,
    /// One plane, 4 bytes a pixel: red, green, blue, alpha. Alpha is ignored.
    Rgba8,
    /// One plane, 4 bytes a pixel: blue, green, red, alpha. Alpha is ignored.
    Bgra8,
    /// Three planes (red, green, blue) of native-endian f32 in 0..=255, of any alignment. Values
    /// outside are clamped and NaN counts as 0, so no picture can put a NaN into the network.
    RgbPlanarF32,
    /// 4:2:0: plane 0 luma, plane 1 interleaved Cb, Cr at half size (rounded up).
    Nv12,
    /// 4:2:0: plane 0 luma, plane 1 interleaved Cr, Cb at half size (rounded up).
    Nv21,
    /// 4:2:0: planes luma, Cb, Cr; chroma at half size (rounded up).
    I420,
    /// 4:2:2 packed in one plane: Y0, Cb, Y1, Cr for every two pixels. With an odd width the last
    /// Y1 is padding, but its bytes must be there.
    Yuyv,
}

impl PixelFormat {
    /// Number of planes.
    pub const fn planes(self) -> usize {
        match self {
            Self::Gray8 | Self::Rgb8 | Self::Bgr8 | Self::Rgba8 | Self::Bgra8 | Self::Yuyv => 1,
            Self::Nv12 | Self::Nv21 => 2,
            Self::RgbPlanarF32 | Self::I420 => 3,
        }
    }

    /// Bytes of one row of plane `plane` (below [`Self::planes`]) in a picture `width` pixels wide,
    /// padding not counted; None where that overflows.
    pub fn row_bytes(self, plane: usize, width: usize) -> Option<usize> {
        match self {
            Self::Gray8 => Some(width),
            Self::Rgb8 | Self::Bgr8 => width.checked_mul(3),
            Self::Rgba8 | Self::Bgra8 | Self::RgbPlanarF32 => width.checked_mul(4),
            Self::Nv12 | Self::Nv21 | Self::I420 if plane == 0 => Some(width),
            Self::Nv12 | Self::Nv21 => width.div_ceil(2).checked_mul(2),
            Self::I420 => Some(width.div_ceil(2)),
            Self::Yuyv => width.div_ceil(2).checked_mul(4),
        }
    }

    /// Rows of plane `plane` in a picture `height` pixels high.
    pub const fn rows(self, plane: usize, height: usize) -> usize {
        match self {
            Self::Nv12 | Self::Nv21 | Self::I420 if plane > 0 => height.div_ceil(2),
            _ => height,
        }
    }
}

/// Which standard's luma weights a YUV picture was made with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum ColorMatrix {
    /// ITU-R BT.601: standard definition, JPEG, most webcams.
    #[default]
    Bt601,
    /// ITU-R BT.709: high definition.
    Bt709,
}

/// Which byte values a YUV picture uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum ColorRange {
    /// Luma 16..=235, chroma 16..=240: video.
    #[default]
    Limited,
    /// Both 0..=255: JPEG.
    Full,
}

/// One plane of a picture.
#[derive(Clone, Copy)]
pub struct Plane<'a> {
    /// All rows in memory order. The last row in memory may lack its padding.
    pub data: &'a [u8],
    /// Bytes from one row to the next. Negative: bottom-up, row 0 is the last row in `data`, which
    /// still begins at the lowest address.
    pub stride: isize,
}

impl<'a> Plane<'a> {
    /// Plane over `data` with `stride` bytes from row to row.
    pub const fn new(data: &'a [u8], stride: isize) -> Self {
        Self { data, stride }
    }
}

impl fmt::Debug for Plane<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Plane {{ {} bytes, stride {} }}", self.data.len(), self.stride)
    }
}

/// A checked picture. Holding one is proof that every row of every plane lies inside its data, that
/// the region of interest lies inside the picture and that sizes are within the caps.
#[derive(Clone, Copy, Debug)]
pub struct ImageView<'a> {
    size: Size,
    format: PixelFormat,
    planes: [Plane<'a>; 3],
    /// Rows of each plane and bytes of one of its rows: reading columns asks for them at every pixel.
    rows: [usize; 3],
    row_bytes: [usize; 3],
    matrix: ColorMatrix,
    range: ColorRange,
    orientation: Orientation,
    roi: Rect,
}

impl<'a> ImageView<'a> {
    /// View of `width` x `height` stored pixels over `planes`, of which there must be
    /// [`PixelFormat::planes`]. Colours default to BT.601 limited range (YUV formats alone heed
    /// them), the orientation to upright, the region of interest to the whole picture.
    ///
    /// Errors: [`Error::LimitExceeded`] above [`super::rect::MAX_SIDE`] or [`super::rect::MAX_PIXELS`], else
    /// [`Error::InvalidImage`] naming the plane and the numbers.
    pub fn new(width: usize, height: usize, format: PixelFormat, planes: &[Plane<'a>]) -> Result<Self> {
        let size = Self::check_size(width, height)?;
        if planes.len() != format.planes() {
            let (need, got) = (format.planes(), planes.len());
            return Err(Error::InvalidImage(format!("{format:?} needs {need} plane(s), {got} given")));
        }
        let mut held = [Plane::new(&[], 0); 3];
        let (mut rows, mut row_bytes) = ([0; 3], [0; 3]);
        for (index, plane) in planes.iter().enumerate() {
            row_bytes[index] = check_plane(index, plane, size, format)?;
            rows[index] = format.rows(index, height);
            held[index] = *plane;
        }
        Ok(Self {
            size,
            format,
            planes: held,
            rows,
            row_bytes,
            matrix: ColorMatrix::default(),
            range: ColorRange::default(),
            orientation: Orientation::UPRIGHT,
            roi: Rect::whole(size),
        })
    }

    /// The size of a picture, where it is within the caps; for those who must know before they have
    /// the planes. Errors as [`Self::new`].
    pub fn check_size(width: usize, height: usize) -> Result<Size> {
        let size = Size::new(width, height);
        size.check("picture").map(|()| size)
    }

    /// View over one buffer that holds all planes one after another without any padding, as video
    /// decoders and image crates often give it. `data` may be longer. Errors as [`Self::new`].
    pub fn packed(width: usize, height: usize, format: PixelFormat, data: &'a [u8]) -> Result<Self> {
        Size::new(width, height).check("picture")?;
        let mut planes = [Plane::new(&[], 0); 3];
        let mut rest = data;
        for index in 0..format.planes() {
            let rows = format.rows(index, height);
            let stride = format.row_bytes(index, width).and_then(|b| isize::try_from(b).ok());
            let bytes = stride.and_then(|s| s.unsigned_abs().checked_mul(rows));
            let (Some(stride), Some(bytes)) = (stride, bytes) else {
                return Err(Error::InvalidImage(format!(
                    "plane {index} of {width}x{height} px overflows memory"
                )));
            };
            let Some((head, tail)) = rest.split_at_checked(bytes) else {
                return Err(Error::InvalidImage(format!(
                    "plane {index} of {width}x{height} px {format:?} needs {bytes} bytes, {} are left of {}",
                    rest.len(),
                    data.len()
                )));
            };
            planes[index] = Plane::new(head, stride);
            rest = tail;
        }
        Self::new(width, height, format, &planes[..format.planes()])
    }

    /// The same view with the YUV standard and range given.
    pub fn with_color(mut self, matrix: ColorMatrix, range: ColorRange) -> Self {
        (self.matrix, self.range) = (matrix, range);
        self
    }

    /// The same view, to be mirrored and rotated as `orientation` says.
    pub fn with_orientation(mut self, orientation: Orientation) -> Self {
        self.orientation = orientation;
        self
    }

    /// The same view, of which only `roi` (stored pixels of the whole picture) is looked at. Any
    /// pixel may be its corner, also in subsampled formats. Error where it is empty or reaches out.
    pub fn with_roi(mut self, roi: Rect) -> Result<Self> {
        if roi.width == 0 || roi.height == 0 || !roi.fits(self.size) {
            return Err(Error::InvalidImage(format!(
                "region of interest {}x{} px at ({}, {}) is not inside the picture of {}x{} px",
                roi.width, roi.height, roi.x, roi.y, self.size.width, self.size.height
            )));
        }
        self.roi = roi;
        Ok(self)
    }

    /// Size of the stored picture, region of interest and orientation not considered.
    pub fn size(&self) -> Size {
        self.size
    }

    /// Pixel format.
    pub fn format(&self) -> PixelFormat {
        self.format
    }

    /// YUV standard.
    pub fn matrix(&self) -> ColorMatrix {
        self.matrix
    }

    /// YUV range.
    pub fn range(&self) -> ColorRange {
        self.range
    }

    /// How the stored picture becomes upright.
    pub fn orientation(&self) -> Orientation {
        self.orientation
    }

    /// Region of interest in stored pixels.
    pub fn roi(&self) -> Rect {
        self.roi
    }

    /// The planes, [`PixelFormat::planes`] of them.
    pub fn planes(&self) -> &[Plane<'a>] {
        &self.planes[..self.format.planes()]
    }

    /// Size of the region of interest once upright: the picture that detection sees.
    pub fn upright_size(&self) -> Size {
        let Rect { width, height, .. } = self.roi;
        if self.orientation.swaps_sides() {
            Size::new(height, width)
        } else {
            Size::new(width, height)
        }
    }

    /// The map between upright coordinates and those of the stored, whole picture.
    pub fn placement(&self) -> Placement {
        Placement::new(self.roi, self.orientation)
    }

    /// Row `y` (0 = top, below [`PixelFormat::rows`]) of plane `plane`, without its padding.
    #[inline]
    pub fn row(&self, plane: usize, y: usize) -> &'a [u8] {
        let (rows, bytes) = (self.rows[plane], self.row_bytes[plane]);
        assert!(y < rows, "row {y} of {rows}");
        let Plane { data, stride } = self.planes[plane];
        let nth = if stride < 0 { rows - 1 - y } else { y };
        let start = nth * stride.unsigned_abs();
        &data[start..start + bytes]
    }
}

/// Bytes of one row of the plane, all of whose rows lie inside its data.
fn check_plane(index: usize, plane: &Plane<'_>, size: Size, format: PixelFormat) -> Result<usize> {
    let Size { width, height } = size;
    let what = || format!("plane {index} of {width}x{height} px {format:?}");
    let overflow = || Error::InvalidImage(format!("{}: stride {} overflows memory", what(), plane.stride));
    let row_bytes = format.row_bytes(index, width).ok_or_else(overflow)?;
    let stride = plane.stride.unsigned_abs();
    if stride < row_bytes {
        return Err(Error::InvalidImage(format!(
            "{}: stride {} is shorter than a row of {row_bytes} bytes",
            what(),
            plane.stride
        )));
    }
    let rows = format.rows(index, height);
    // The last row in memory needs no padding behind it.
    let needed = stride.checked_mul(rows - 1).and_then(|n| n.checked_add(row_bytes)).ok_or_else(overflow)?;
    if plane.data.len() < needed {
        return Err(Error::InvalidImage(format!(
            "{}: {rows} rows at stride {} need {needed} bytes, {} given",
            what(),
            plane.stride,
            plane.data.len()
        )));
    }
    Ok(row_bytes)
}

#[cfg(test)]
mod tests {
    use super::super::rect::MAX_SIDE;
    use super::*;

    fn message(result: Result<ImageView<'_>>) -> String {
        result.expect_err("must be refused").to_string()
    }

    #[test]
    fn malformed_views_are_named_by_plane_and_numbers() {
        let data = [0u8; 100];
        let view = |w, h, format, planes: &[(usize, isize)]| {
            let planes: Vec<_> = planes.iter().map(|&(n, s)| Plane::new(&data[..n], s)).collect();
            message(ImageView::new(w, h, format, &planes))
        };
        assert!(view(0, 5, PixelFormat::Gray8, &[(100, 10)]).contains("0x5"));
        assert!(view(MAX_SIDE + 1, 1, PixelFormat::Gray8, &[(100, 10)]).contains("limit"));
        assert!(view(1 << 16, (1 << 15) + 1, PixelFormat::Gray8, &[(100, 1 << 16)]).contains("limit"));
        assert!(view(4, 4, PixelFormat::Nv12, &[(100, 10)]).contains("needs 2 plane(s), 1 given"));
        assert!(view(4, 4, PixelFormat::Rgb8, &[(100, 11)]).contains("row of 12 bytes"));
        assert!(view(4, 4, PixelFormat::Rgb8, &[(100, -11)]).contains("stride -11"));
        assert!(view(4, 4, PixelFormat::Rgb8, &[(47, 12)]).contains("plane 0"));
        assert!(view(4, 4, PixelFormat::Rgb8, &[(47, 12)]).contains("need 48 bytes, 47 given"));
        assert!(view(5, 5, PixelFormat::Nv12, &[(25, 5), (17, 6)]).contains("plane 1"));
        assert!(view(5, 5, PixelFormat::I420, &[(25, 5), (9, 3), (8, 3)]).contains("plane 2"));
        assert!(view(3, 1, PixelFormat::Yuyv, &[(7, 8)]).contains("need 8 bytes"));
        assert!(view(2, 9, PixelFormat::Gray8, &[(100, isize::MIN)]).contains("overflows"));
        assert!(view(2, 9, PixelFormat::Gray8, &[(100, isize::MAX)]).contains("overflows"));
    }

    #[test]
    fn a_region_outside_the_picture_is_refused() {
        let data = [0u8; 48];
        let view = ImageView::packed(8, 6, PixelFormat::Gray8, &data).unwrap();
        assert!(view.with_roi(Rect::new(7, 5, 1, 1)).is_ok());
        for roi in [(8, 0, 1, 1), (0, 0, 9, 1), (0, 0, 0, 1), (0, 3, 1, 4), (usize::MAX, 0, 2, 1)] {
            assert!(view.with_roi(Rect::new(roi.0, roi.1, roi.2, roi.3)).is_err(), "{roi:?}");
        }
    }

    #[test]
    fn a_negative_stride_makes_the_last_row_in_memory_the_first() {
        let data = [1, 2, 0, 3, 4];
        let view = ImageView::new(2, 2, PixelFormat::Gray8, &[Plane::new(&data, -3)]).unwrap();
        assert_eq!((view.row(0, 0), view.row(0, 1)), (&[3, 4][..], &[1, 2][..]));
    }
}
