//! Pictures
//!
//! A picture is described where it lies: nothing is copied beforehand and nothing is ever written.
//! Start from a zeroed struct (`farface_image image = {0};`), set size, format and planes; zero in
//! the other fields means upright, all of it, BT.601 limited range, in the CPU's memory.
//!
//! Formats of more than 8 bits and compressed pictures are the caller's to decode.

use super::guard::{input, Result};
use crate::error::Error;
#[cfg(feature = "cuda")]
use crate::pixels::DeviceImage;
use crate::pixels::{ColorMatrix, ColorRange, ImageView, Orientation, PixelFormat, Plane, Rect, Rotation};
use std::ffi::c_void;

/// How pixels lie in memory: one of the FARFACE_FORMAT_ values.
#[allow(non_camel_case_types)]
pub type farface_format = u32;

/// One plane, 1 byte a pixel.
pub const FARFACE_FORMAT_GRAY8: farface_format = 1;
/// One plane, 3 bytes a pixel: red, green, blue.
pub const FARFACE_FORMAT_RGB8: farface_format = 2;
/// One plane, 3 bytes a pixel: blue, green, red.
pub const FARFACE_FORMAT_BGR8: farface_format = 3;
/// One plane, 4 bytes a pixel: red, green, blue, alpha, which is ignored.
pub const FARFACE_FORMAT_RGBA8: farface_format = 4;
/// One plane, 4 bytes a pixel: blue, green, red, alpha, which is ignored.
pub const FARFACE_FORMAT_BGRA8: farface_format = 5;
/// Three planes (red, green, blue) of native-endian float in 0 to 255; any alignment will do.
pub const FARFACE_FORMAT_RGB_PLANAR_F32: farface_format = 6;
/// 4:2:0. Plane 0: luma; plane 1: interleaved Cb, Cr at half size, rounded up.
pub const FARFACE_FORMAT_NV12: farface_format = 7;
/// 4:2:0. Plane 0: luma; plane 1: interleaved Cr, Cb at half size, rounded up.
pub const FARFACE_FORMAT_NV21: farface_format = 8;
/// 4:2:0. Planes luma, Cb, Cr; chroma at half size, rounded up.
pub const FARFACE_FORMAT_I420: farface_format = 9;
/// 4:2:2 in one plane: Y0, Cb, Y1, Cr for every two pixels; rows of whole pairs.
pub const FARFACE_FORMAT_YUYV: farface_format = 10;

/// Which standard a YUV picture was made with: one of the FARFACE_MATRIX_ values.
#[allow(non_camel_case_types)]
pub type farface_matrix = u32;

/// ITU-R BT.601: standard definition, JPEG, most webcams.
pub const FARFACE_MATRIX_BT601: farface_matrix = 0;
/// ITU-R BT.709: high definition.
pub const FARFACE_MATRIX_BT709: farface_matrix = 1;

/// Which byte values a YUV picture uses: one of the FARFACE_RANGE_ values.
#[allow(non_camel_case_types)]
pub type farface_range = u32;

/// Luma 16 to 235, chroma 16 to 240: video.
pub const FARFACE_RANGE_LIMITED: farface_range = 0;
/// Both 0 to 255: JPEG.
pub const FARFACE_RANGE_FULL: farface_range = 1;

/// Whose memory the planes are in: one of the FARFACE_MEMORY_ values.
#[allow(non_camel_case_types)]
pub type farface_memory = u32;

/// The CPU's.
pub const FARFACE_MEMORY_HOST: farface_memory = 0;
/// That of the session's CUDA device; FARFACE_ERROR_UNSUPPORTED with a CPU session.
pub const FARFACE_MEMORY_CUDA: farface_memory = 1;

/// One plane of a picture.
#[allow(non_camel_case_types)]
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct farface_plane {
    /// First byte of the top row.
    pub data: *const c_void,
    /// Bytes from one row to the one below it, at least those of a row of pixels. Negative for
    /// bottom-up pictures: the rows below the top one then lie before it in memory.
    pub stride: isize,
}

/// A rectangle of whole pixels.
#[allow(non_camel_case_types)]
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct farface_rect {
    /// First column.
    pub x: u32,
    /// First row.
    pub y: u32,
    /// Columns.
    pub width: u32,
    /// Rows.
    pub height: u32,
}

/// A picture in the caller's memory.
///
/// Of each plane, the bytes from the first row to the last pixel of the last one must be there,
/// gaps between rows included; the last row needs no padding behind it. The caller keeps all of
/// them in place and unchanged during the call.
#[allow(non_camel_case_types)]
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct farface_image {
    /// Columns of the picture as stored; at most 2^24 a side and 2^31 pixels in all.
    pub width: u32,
    /// Rows of the picture as stored.
    pub height: u32,
    /// Pixel format.
    pub format: farface_format,
    /// Degrees by which the stored picture must be turned clockwise to be upright: 0, 90, 180, 270.
    pub rotation: u32,
    /// 1: the stored picture must be mirrored left to right, before it is turned; else 0.
    pub mirrored: u32,
    /// Colour standard of YUV formats.
    pub matrix: farface_matrix,
    /// Value range of YUV formats.
    pub range: farface_range,
    /// Memory of the planes.
    pub memory: farface_memory,
    /// Planes, as many as the format has; the others are not looked at.
    pub planes: [farface_plane; 3],
    /// Region of interest in stored pixels: only it is searched. All zero = the whole picture.
    pub roi: farface_rect,
    /// Zero.
    pub reserved: [u32; 4],
}

fn bad<T>(what: String) -> Result<T> {
    Err(Error::InvalidImage(what).into())
}

/// A picture, where its planes are.
pub(super) enum Picture<'a> {
    Host(ImageView<'a>),
    #[cfg(feature = "cuda")]
    Cuda(DeviceImage),
}

/// The picture at `image`, checked.
///
/// # Safety
/// `image` is NULL, misaligned, or valid; its planes have all bytes that size, format and strides
/// speak of, unchanged during `'a`; those in CUDA memory until the detection is done.
pub(super) unsafe fn picture<'a>(image: *const farface_image) -> Result<Picture<'a>> {
    // SAFETY: the caller's contract.
    let image: &farface_image = unsafe { input(image, "image")? };
    let format = match image.format {
        FARFACE_FORMAT_GRAY8 => PixelFormat::Gray8,
        FARFACE_FORMAT_RGB8 => PixelFormat::Rgb8,
        FARFACE_FORMAT_BGR8 => PixelFormat::Bgr8,
        FARFACE_FORMAT_RGBA8 => PixelFormat::Rgba8,
        FARFACE_FORMAT_BGRA8 => PixelFormat::Bgra8,
        FARFACE_FORMAT_RGB_PLANAR_F32 => PixelFormat::RgbPlanarF32,
        FARFACE_FORMAT_NV12 => PixelFormat::Nv12,
        FARFACE_FORMAT_NV21 => PixelFormat::Nv21,
        FARFACE_FORMAT_I420 => PixelFormat::I420,
        FARFACE_FORMAT_YUYV => PixelFormat::Yuyv,
        other => return bad(format!("format {other} is no FARFACE_FORMAT_ value")),
    };
    let matrix = match image.matrix {
        FARFACE_MATRIX_BT601 => ColorMatrix::Bt601,
        FARFACE_MATRIX_BT709 => ColorMatrix::Bt709,
        other => return bad(format!("matrix {other} is no FARFACE_MATRIX_ value")),
    };
    let range = match image.range {
        FARFACE_RANGE_LIMITED => ColorRange::Limited,
        FARFACE_RANGE_FULL => ColorRange::Full,
        other => return bad(format!("range {other} is no FARFACE_RANGE_ value")),
    };
    if image.mirrored > 1 {
        return bad(format!("mirrored is {}, it must be 0 or 1", image.mirrored));
    }
    if image.reserved != [0; 4] {
        return bad("reserved fields must be 0; start from a zeroed farface_image".into());
    }
    let orientation =
        Orientation { mirrored: image.mirrored == 1, rotation: Rotation::from_degrees(image.rotation)? };
    let (width, height) = (image.width as usize, image.height as usize);
    ImageView::check_size(width, height)?;
    let r = image.roi;
    let roi = (r != farface_rect::default())
        .then(|| Rect::new(r.x as usize, r.y as usize, r.width as usize, r.height as usize));
    match image.memory {
        FARFACE_MEMORY_HOST => {}
        #[cfg(feature = "cuda")]
        FARFACE_MEMORY_CUDA => {
            let plane = |p: &farface_plane| (p.data.addr() as u64, p.stride);
            let planes = image.planes.each_ref().map(plane);
            let picture = DeviceImage::new(width, height, format, &planes[..format.planes()])?
                .with_color(matrix, range)
                .with_orientation(orientation);
            return Ok(Picture::Cuda(match roi {
                Some(roi) => picture.with_roi(roi)?,
                None => picture,
            }));
        }
        #[cfg(not(feature = "cuda"))]
        FARFACE_MEMORY_CUDA => {
            let text =
                "planes in CUDA memory, but this build lacks the feature `cuda`; copy them to the host";
            return Err(Error::Unsupported(text.into()).into());
        }
        other => return bad(format!("memory {other} is no FARFACE_MEMORY_ value")),
    }
    let mut planes = [Plane::new(&[], 0); 3];
    for (i, plane) in planes.iter_mut().enumerate().take(format.planes()) {
        // SAFETY: the caller's contract.
        *plane = unsafe { bytes(i, &image.planes[i], format, width, height)? };
    }
    let view = ImageView::new(width, height, format, &planes[..format.planes()])?
        .with_color(matrix, range)
        .with_orientation(orientation);
    Ok(Picture::Host(match roi {
        Some(roi) => view.with_roi(roi)?,
        None => view,
    }))
}

/// The bytes of plane `index`, from the lowest address to the end of the row that lies last.
///
/// # Safety
/// Unless `plane.data` is NULL, the rows that size, format and stride speak of are readable and
/// unchanged during `'a`.
unsafe fn bytes<'a>(
    index: usize,
    plane: &farface_plane,
    format: PixelFormat,
    width: usize,
    height: usize,
) -> Result<Plane<'a>> {
    let what = || format!("plane {index} of {width}x{height} px {format:?}");
    if plane.data.is_null() {
        return bad(format!("{}: data is NULL", what()));
    }
    let stride = plane.stride.unsigned_abs();
    let Some(row) = format.row_bytes(index, width).filter(|&row| row <= stride) else {
        return bad(format!("{}: stride {} is shorter than a row", what(), plane.stride));
    };
    // Distance from the first row to the last, and from there to the end.
    let span = stride.checked_mul(format.rows(index, height) - 1);
    let length = span.and_then(|s| s.checked_add(row)).filter(|&n| n <= isize::MAX as usize);
    let (Some(span), Some(length)) = (span, length) else {
        return bad(format!("{}: stride {} reaches beyond memory", what(), plane.stride));
    };
    let top = plane.data.cast::<u8>();
    let before = if plane.stride < 0 { span } else { 0 };
    let lowest = top.addr().checked_sub(before).filter(|a| *a != 0);
    if lowest.and_then(|a| a.checked_add(length)).is_none() {
        return bad(format!("{}: rows at stride {} reach beyond memory", what(), plane.stride));
    }
    // SAFETY: `lowest` and its end do not wrap; the caller promises that the rows are there, which
    // begin `before` bytes below the top row and span `length` bytes.
    let data = unsafe { std::slice::from_raw_parts(top.sub(before), length) };
    Ok(Plane::new(data, plane.stride))
}
