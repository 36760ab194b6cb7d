//! Pictures in a device's memory, and the kernels that make network input of them in one pass.
//!
//! What a picture is (addresses, strides, format, orientation, region) lies in a [`Picture`] on the device, so that a captured graph
//! goes on with the next picture once that is overwritten. What a plan fixes (the upright size, the window of the level, the
//! normalisation, the output) goes with the launch.

use super::driver::Stream;
use super::kernels::{Kernel, Source};
use super::map::{DeviceView, Element, Map};
use super::memory::DeviceBuffer;
use super::ops::Device;
use crate::error::{Error, Result};
use bytemuck::{Pod, Zeroable};

/// Longest side of a picture, in pixels: kernels reckon with bytes of a row in 32 bits.
const MOST_SIDE: usize = 1 << 24;

/// How pixels lie in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// A byte a pixel.
    Gray8,
    /// Red, green, blue.
    Rgb8,
    /// Blue, green, red.
    Bgr8,
    /// Red, green, blue and a byte that is ignored.
    Rgba8,
    /// Blue, green, red and a byte that is ignored.
    Bgra8,
    /// Planes of f32: red, green, blue.
    RgbPlanarF32,
    /// Luma; Cb, Cr side by side, one pair for 2x2 pixels.
    Nv12,
    /// Luma; Cr, Cb side by side, one pair for 2x2 pixels.
    Nv21,
    /// Luma; Cb; Cr, one of each for 2x2 pixels.
    I420,
    /// Y0, Cb, Y1, Cr for two pixels of a row.
    Yuyv,
}

impl Format {
    /// `Layout` of `cuda/pixels.cu`, whether its colours are swapped there, its planes, and where each plane has to begin for what
    /// belongs together to be read at once.
    fn kernel(self) -> (i32, bool, usize, [u64; 3]) {
        match self {
            Self::Gray8 => (0, false, 1, [1; 3]),
            Self::Rgb8 => (1, false, 1, [1; 3]),
            Self::Bgr8 => (1, true, 1, [1; 3]),
            Self::Rgba8 => (2, false, 1, [4; 3]),
            Self::Bgra8 => (2, true, 1, [4; 3]),
            Self::RgbPlanarF32 => (3, false, 3, [4; 3]),
            Self::Nv12 => (4, false, 2, [1, 2, 1]),
            Self::Nv21 => (4, true, 2, [1, 2, 1]),
            Self::I420 => (5, false, 3, [1; 3]),
            Self::Yuyv => (6, false, 1, [4; 3]),
        }
    }
}

/// A plane's rows: part of a [`Picture`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct DevicePlane {
    /// Address of row 0.
    pub row_0: u64,
    /// Bytes from a row to the next; negative where row 0 is the last one in memory.
    pub stride: i64,
}

/// YUV to RGB: `y = (luma - luma_offset) * luma_gain` plus what chroma adds, 128 taken from Cb and Cr before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct YuvFactors {
    /// Luma of black.
    pub luma_offset: f32,
    /// Per luma.
    pub luma_gain: f32,
    /// Red gained per Cr.
    pub red: f32,
    /// Green gained per Cb and per Cr.
    pub green: [f32; 2],
    /// Blue gained per Cb.
    pub blue: f32,
}

/// A picture as it is stored in a device's memory, and how it becomes upright.
#[derive(Clone, Copy, Debug)]
pub struct StoredPicture {
    /// How pixels lie.
    pub format: Format,
    /// Width and height.
    pub size: [usize; 2],
    /// The planes that the format has; what follows them is ignored.
    pub planes: [DevicePlane; 3],
    /// Heeded by YUV formats alone.
    pub yuv: YuvFactors,
    /// Left, top, width, height of what is looked at.
    pub region: [usize; 4],
    /// An upright row is a stored column.
    pub transposed: bool,
    /// Stored x runs against the upright axis that it lies along.
    pub flip_x: bool,
    /// Stored y runs against the upright axis that it lies along.
    pub flip_y: bool,
}

/// `Picture` of `cuda/pixels.cu`: lies in the device's memory, where the kernels read it.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Picture {
    planes: [DevicePlane; 3],
    /// Stored (x, y) of upright pixel (0, 0), and the steps to the next upright column and row.
    origin: [i32; 2],
    right: [i32; 2],
    down: [i32; 2],
    /// Upright width and height.
    size: [i32; 2],
    layout: i32,
    swapped: i32,
    aligned: i32,
    yuv: YuvFactors,
    /// Nothing: the struct's size is a multiple of eight.
    unused: i32,
}

impl Picture {
    /// Of what is stored. That its planes hold all of its rows is for the caller to know.
    ///
    /// Errors: [`Error::LimitExceeded`] for sides above 2^24, [`Error::InvalidImage`] for a region that is empty or reaches out and
    /// for a plane without an address.
    pub fn new(stored: &StoredPicture) -> Result<Self> {
        let StoredPicture { size: [width, height], region, transposed, flip_x, flip_y, .. } = *stored;
        let [left, top, w, h] = region;
        if width > MOST_SIDE || height > MOST_SIDE {
            return Err(Error::LimitExceeded(format!(
                "picture is {width}x{height} px; at most {MOST_SIDE} px a side"
            )));
        }
        let inside = |from: usize, len: usize, of: usize| len > 0 && from <= of && len <= of - from;
        if !inside(left, w, width) || !inside(top, h, height) {
            return Err(Error::InvalidImage(format!(
                "region of interest {w}x{h} px at ({left}, {top}) is not inside the picture of {width}x{height} px"
            )));
        }
        let (layout, swapped, count, units) = stored.format.kernel();
        let mut planes = [DevicePlane::default(); 3];
        planes[..count].copy_from_slice(&stored.planes[..count]);
        if let Some(index) = planes[..count].iter().position(|p| p.row_0 == 0) {
            return Err(Error::InvalidImage(format!("plane {index} has no address")));
        }
        let aligned = planes
            .iter()
            .zip(units)
            .all(|(p, unit)| p.row_0.is_multiple_of(unit) && p.stride.unsigned_abs().is_multiple_of(unit));
        let side = |flip: bool, from: usize, len: usize| {
            if flip {
                ((from + len - 1) as i32, -1)
            } else {
                (from as i32, 1)
            }
        };
        let ((x, dx), (y, dy)) = (side(flip_x, left, w), side(flip_y, top, h));
        let (along_x, along_y) = ([dx, 0], [0, dy]);
        let (right, down) = if transposed { (along_y, along_x) } else { (along_x, along_y) };
        let [w, h] = [w as i32, h as i32];
        Ok(Self {
            planes,
            origin: [x, y],
            right,
            down,
            size: if transposed { [h, w] } else { [w, h] },
            layout,
            swapped: i32::from(swapped),
            aligned: i32::from(aligned),
            yuv: stored.yuv,
            unused: 0,
        })
    }

    /// Width and height of the region once upright.
    pub fn upright_size(&self) -> [usize; 2] {
        self.size.map(|side| side as usize)
    }
}

/// Upright pixels behind one pixel of a level along one axis: `first .. first + len`, weighted with `head` (the first), `body` (each
/// between) and `tail` (the last, where `len` > 1).
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Taps {
    /// First pixel.
    pub first: u32,
    /// Pixels, at least one.
    pub len: u32,
    /// Weight of the first.
    pub head: f32,
    /// Weight of each between.
    pub body: f32,
    /// Weight of the last.
    pub tail: f32,
}

/// A window of a level: the taps of its columns and rows, on the device unless each pixel is taken as it is.
pub struct InputWindow {
    source: [i32; 2],
    inside: [i32; 2],
    corner: [i32; 2],
    /// Columns, then rows.
    taps: Option<DeviceBuffer>,
}

impl InputWindow {
    /// Of an upright picture of `source` pixels (width, height), with the taps of the window's columns and rows as far as they lie in
    /// the level; a window may be larger, and has zeros there.
    ///
    /// Errors: [`Error::Internal`] for taps outside the picture, and the device's.
    pub fn new(device: &Device, source: [usize; 2], columns: &[Taps], rows: &[Taps]) -> Result<Self> {
        let axes = [(source[0], columns), (source[1], rows)];
        for (side, taps) in axes {
            let good = |t: &Taps| t.len > 0 && u64::from(t.first) + u64::from(t.len) <= side as u64;
            if side > MOST_SIDE || taps.len() > MOST_SIDE || !taps.iter().all(good) {
                return Err(Error::Internal("taps outside the picture".into()));
            }
        }
        let first = |taps: &[Taps]| taps.first().map_or(0, |t| t.first);
        let as_it_is = axes.iter().all(|(_, taps)| {
            let mut at = (first(taps)..).zip(taps.iter());
            at.all(|(at, t)| t.first == at && t.len == 1 && t.head == 1.0)
        });
        let taps = if as_it_is {
            None
        } else {
            Some(DeviceBuffer::of(device.uploads(), &[columns, rows].concat())?)
        };
        Ok(Self {
            source: source.map(|side| side as i32),
            inside: [columns.len() as i32, rows.len() as i32],
            corner: [first(columns) as i32, first(rows) as i32],
            taps,
        })
    }

    /// Bytes of the device's memory that it holds.
    pub fn bytes(&self) -> usize {
        self.taps.as_ref().map_or(0, DeviceBuffer::len)
    }
}

/// Network input from values 0 to 255: `(value - mean) * scale`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct InputNorm {
    /// Channels are blue, green, red; else red, green, blue.
    pub blue_first: bool,
    /// In that order.
    pub mean: [f32; 3],
    /// In that order.
    pub scale: [f32; 3],
}

/// `PixelsArgs` of `cuda/pixels.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct PixelsArgs {
    picture: u64,
    columns: u64,
    rows: u64,
    inside: [i32; 2],
    source: [i32; 2],
    corner: [i32; 2],
    reversed: i32,
    mean: [f32; 3],
    scale: [f32; 3],
    wide: i32,
    step: i32,
    output: Map,
}

/// Side of the square of pixels that a block of threads writes.
const BLOCK_SIDE: usize = 16;

/// A picture's window as network input.
pub struct InputOp {
    same: Kernel,
    resized: Kernel,
}

impl InputOp {
    /// Its kernels.
    pub fn new(device: &Device) -> Result<Self> {
        let kernel = |name| device.kernels().get(Source::Pixels, name, 0);
        Ok(Self { same: kernel("pixels_same")?, resized: kernel("pixels_resized")? })
    }

    /// Writes all of `output`, a map with three channels in the arena at this address, its tail as zeros: the window of the pictures
    /// whose [`Picture`]s lie at address `picture`, and for each further image `step` bytes behind it, when the stream comes here. Zeros
    /// beyond the level, and where a picture has not the window's upright size.
    ///
    /// Errors: [`Error::Internal`] for an output of another kind or smaller than the window in the level.
    ///
    /// # Safety
    /// Whenever the work is done, at once or as part of a graph: `picture` is the address of a [`Picture`] for every image, at
    /// multiples of eight, whose planes hold, in memory that the device reads, all rows of a picture of the size that it was made with; the window's
    /// taps are still there; `output` lies in the arena and apart from all of these.
    pub unsafe fn launch(
        &self,
        stream: &Stream,
        (picture, step): (u64, usize),
        window: &InputWindow,
        norm: &InputNorm,
        arena: u64,
        output: &DeviceView,
    ) -> Result<()> {
        let [columns, rows] = window.inside.map(|n| n as usize);
        let s = output.shape;
        let blocks = [s.w, s.h].map(|side| side.div_ceil(BLOCK_SIDE));
        if s.c != 3 || columns > s.w || rows > s.h || s.w > MOST_SIDE || blocks[1].max(s.n) > 0xffff {
            return Err(Error::Internal(format!("input {s} of a window of {columns}x{rows} pixels")));
        }
        let taps = window.taps.as_ref().map_or(0, DeviceBuffer::address);
        let whole = output.element != Element::F32 && s.c + output.tail == 8;
        let args = PixelsArgs {
            picture,
            columns: taps,
            rows: taps + (columns * size_of::<Taps>()) as u64,
            inside: window.inside,
            source: window.source,
            corner: window.corner,
            reversed: i32::from(norm.blue_first),
            mean: norm.mean,
            scale: norm.scale,
            wide: i32::from(whole && output.is_aligned() && arena.is_multiple_of(16)),
            step: step as i32,
            output: output.at(arena),
        };
        let kernel = if window.taps.is_some() { &self.resized } else { &self.same };
        let blocks = [blocks[0], blocks[1], s.n].map(|n| n as u32);
        // SAFETY: the caller's contract; taps lie inside a picture of the size that the kernel checks; the args are the kernel's
        // struct.
        unsafe { kernel.launch(stream, blocks, (BLOCK_SIDE * BLOCK_SIDE) as u32, 0, &args) }
    }
}
