//! Pictures and windows as the kernels of a CUDA device take them.

use super::convert::{ChannelOrder, Normalization};
use super::placement::Placement;
use super::rect::{Rect, Size};
use super::resize::{Axis, Taps};
use super::view::{ColorMatrix, ColorRange, ImageView, PixelFormat};
use super::yuv::YuvToRgb;
use crate::error::{Error, Result};
use crate::gpu::ops::Device;
use crate::gpu::pixels as gpu;

/// Picture of `size` stored pixels whose planes lie in a device's memory: of each that the format has, the address of its row 0 and
/// the bytes from a row to the next. That they hold all rows is for the caller to know.
///
/// Errors: [`Error::InvalidImage`] or [`Error::LimitExceeded`] as of an [`ImageView`], as far as numbers alone tell.
pub fn stored_picture(
    size: Size,
    format: PixelFormat,
    planes: &[(u64, isize)],
    (matrix, range): (ColorMatrix, ColorRange),
    place: &Placement,
) -> Result<gpu::Picture> {
    size.check("picture")?;
    if planes.len() != format.planes() {
        let (need, got) = (format.planes(), planes.len());
        return Err(Error::InvalidImage(format!("{format:?} needs {need} plane(s), {got} given")));
    }
    let mut held = [gpu::DevicePlane::default(); 3];
    for (index, (held, &(row_0, stride))) in held.iter_mut().zip(planes).enumerate() {
        let bytes = format.row_bytes(index, size.width);
        if bytes.is_none_or(|bytes| stride.unsigned_abs() < bytes) {
            return Err(Error::InvalidImage(format!(
                "plane {index} of {}x{} px {format:?}: stride {stride} is shorter than a row",
                size.width, size.height
            )));
        }
        *held = gpu::DevicePlane { row_0, stride: stride as i64 };
    }
    let roi = place.roi();
    gpu::Picture::new(&gpu::StoredPicture {
        format: device_format(format),
        size: [size.width, size.height],
        planes: held,
        yuv: YuvToRgb::new(matrix, range).factors(),
        region: [roi.x, roi.y, roi.width, roi.height],
        transposed: place.transposed(),
        flip_x: place.flip_x(),
        flip_y: place.flip_y(),
    })
}

/// The view's picture, once the `data` of each of its planes has been copied to these addresses of a device.
pub fn copied_picture(view: &ImageView<'_>, copies: &[u64]) -> Result<gpu::Picture> {
    let (size, format) = (view.size(), view.format());
    let mut planes = Vec::new();
    for (index, (plane, &first)) in view.planes().iter().zip(copies).enumerate() {
        // Of a plane that is stored bottom-up the data begins with the last row.
        let above = if plane.stride < 0 { format.rows(index, size.height) - 1 } else { 0 };
        planes.push((first + (above * plane.stride.unsigned_abs()) as u64, plane.stride));
    }
    stored_picture(size, format, &planes, (view.matrix(), view.range()), &view.placement())
}

/// Window `window` of the level that shows an upright picture of `upright` pixels at `level` pixels, as
/// [`fill`](super::resize::fill) cuts it.
///
/// Errors: a size of 0 or above the caps, an overflowing window, and the device's.
pub fn input_window(device: &Device, upright: Size, level: Size, window: Rect) -> Result<gpu::InputWindow> {
    upright.check("picture")?;
    level.check("level")?;
    let taps = |from: usize, to: usize, first: usize, count: usize| {
        let end = first
            .checked_add(count)
            .ok_or_else(|| Error::InvalidArgument(format!("window {window:?} overflows")))?;
        let axis = Axis::new(from, to);
        Ok((first.min(to)..end.min(to)).map(|i| device_taps(axis.taps(i))).collect::<Vec<_>>())
    };
    let columns = taps(upright.width, level.width, window.x, window.width)?;
    let rows = taps(upright.height, level.height, window.y, window.height)?;
    gpu::InputWindow::new(device, [upright.width, upright.height], &columns, &rows)
}

impl From<&Normalization> for gpu::InputNorm {
    fn from(norm: &Normalization) -> Self {
        Self { blue_first: norm.order == ChannelOrder::Bgr, mean: norm.mean, scale: norm.scale }
    }
}

fn device_taps(Taps { first, len, head, body, tail }: Taps) -> gpu::Taps {
    gpu::Taps { first, len, head, body, tail }
}

fn device_format(format: PixelFormat) -> gpu::Format {
    match format {
        PixelFormat::Gray8 => gpu::Format::Gray8,
        PixelFormat::Rgb8 => gpu::Format::Rgb8,
        PixelFormat::Bgr8 => gpu::Format::Bgr8,
        PixelFormat::Rgba8 => gpu::Format::Rgba8,
        PixelFormat::Bgra8 => gpu::Format::Bgra8,
        PixelFormat::RgbPlanarF32 => gpu::Format::RgbPlanarF32,
        PixelFormat::Nv12 => gpu::Format::Nv12,
        PixelFormat::Nv21 => gpu::Format::Nv21,
        PixelFormat::I420 => gpu::Format::I420,
        PixelFormat::Yuyv => gpu::Format::Yuyv,
    }
}
