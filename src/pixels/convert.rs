//! Stored bytes to rows of upright f32 pixels, and such rows to normalised network input.
//!
//! Every conversion is a function of one pixel (and its chroma sample) alone, with one order of
//! operations, so that any window, row range or walking direction gives the same bits.

use super::placement::Placement;
use super::view::{ColorMatrix, ColorRange, ImageView, PixelFormat};
use std::ops::Range;

/// Order of the three channels that a network was trained with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ChannelOrder {
    /// Red, green, blue.
    Rgb,
    /// Blue, green, red.
    Bgr,
}

/// Network input from pixel values 0..=255: `(pixel - mean) * scale` for each channel.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Normalization {
    /// Order in which the channels are written.
    pub order: ChannelOrder,
    /// Means in pixel values 0..=255, in `order`.
    pub mean: [f32; 3],
    /// Factors, in `order`.
    pub scale: [f32; 3],
}

/// A pixel in one vector register; the fourth lane carries nothing.
pub(super) type Lanes = [f32; 4];

/// Values of a row: bytes as stored, or floats already decoded.
pub(super) trait Sample: Copy {
    fn value(self) -> f32;
}

impl Sample for u8 {
    #[inline(always)]
    fn value(self) -> f32 {
        f32::from(self)
    }
}

impl Sample for f32 {
    #[inline(always)]
    fn value(self) -> f32 {
        self
    }
}

/// YUV to RGB after ITU-R BT.601-7 section 2.5 and BT.709-6 section 3, in f32, clamped to 0..=255 and
/// not rounded. Chroma is replicated: both pixels of a 4:2:2 pair, all four of a 4:2:0 block, take
/// their own sample unfiltered.
#[derive(Clone, Copy)]
struct YuvToRgb {
    luma_offset: f32,
    luma_gain: f32,
    /// Contribution of (Cb - 128) to R, G, B.
    cb: Lanes,
    /// Contribution of (Cr - 128) to R, G, B.
    cr: Lanes,
}

impl YuvToRgb {
    fn new(matrix: ColorMatrix, range: ColorRange) -> Self {
        let (kr, kb) = match matrix {
            ColorMatrix::Bt601 => (0.299, 0.114),
            ColorMatrix::Bt709 => (0.2126, 0.0722),
        };
        let kg = 1.0 - kr - kb;
        let (luma_offset, luma_gain, chroma_gain) = match range {
            ColorRange::Full => (0.0, 1.0, 1.0),
            ColorRange::Limited => (16.0, 255.0 / 219.0, 255.0 / 224.0),
        };
        // E'R - E'Y = 2 (1 - kr) Cr, E'B - E'Y = 2 (1 - kb) Cb, and green follows from the luma sum.
        let red = 2.0 * (1.0 - kr) * chroma_gain;
        let blue = 2.0 * (1.0 - kb) * chroma_gain;
        let lanes = |v: [f64; 3]| [v[0] as f32, v[1] as f32, v[2] as f32, 0.0];
        Self {
            luma_offset,
            luma_gain: luma_gain as f32,
            cb: lanes([0.0, -blue * kb / kg, blue]),
            cr: lanes([red, -red * kr / kg, 0.0]),
        }
    }

    #[inline(always)]
    fn chroma(&self, cb: u8, cr: u8) -> Lanes {
        let (u, v) = (f32::from(cb) - 128.0, f32::from(cr) - 128.0);
        std::array::from_fn(|i| self.cb[i] * u + self.cr[i] * v)
    }

    #[inline(always)]
    fn pixel(&self, luma: u8, chroma: Lanes) -> Lanes {
        let y = (f32::from(luma) - self.luma_offset) * self.luma_gain;
        std::array::from_fn(|i| clamp(y + chroma[i]))
    }
}

/// To 0..=255, NaN to 0. Written as comparisons because they are one instruction each in vector code.
#[inline(always)]
fn clamp(v: f32) -> f32 {
    let v = if v > 0.0 { v } else { 0.0 };
    if v < 255.0 {
        v
    } else {
        255.0
    }
}

/// Values of a row buffer for `pixels` pixels: three each, and one more that whole-vector reads and
/// writes of the last pixel may touch.
pub(super) const fn row_floats(pixels: usize) -> usize {
    3 * pixels + 1
}

/// Reads upright rows of a view.
pub(super) struct RowReader<'v> {
    view: &'v ImageView<'v>,
    place: Placement,
    yuv: YuvToRgb,
}

impl<'v> RowReader<'v> {
    pub fn new(view: &'v ImageView<'v>) -> Self {
        Self { view, place: view.placement(), yuv: YuvToRgb::new(view.matrix(), view.range()) }
    }

    /// Order in which rows are delivered.
    pub fn order(&self) -> ChannelOrder {
        match self.view.format() {
            PixelFormat::Bgr8 | PixelFormat::Bgra8 => ChannelOrder::Bgr,
            _ => ChannelOrder::Rgb,
        }
    }

    /// Bytes of upright row `y`, columns `xs`, three a pixel in [`Self::order`], where the picture
    /// holds just these.
    #[inline]
    pub fn bytes(&self, y: usize, xs: &Range<usize>) -> Option<&'v [u8]> {
        if !self.holds_rows_of_bytes() {
            return None;
        }
        let (row, xs) = self.straight_range(y, xs);
        Some(&self.view.row(0, row)[3 * xs.start..3 * xs.end])
    }

    /// True where [`Self::bytes`] delivers.
    pub fn holds_rows_of_bytes(&self) -> bool {
        let packed = matches!(self.view.format(), PixelFormat::Rgb8 | PixelFormat::Bgr8);
        packed && !self.place.transposed() && !self.place.flip_x()
    }

    /// Stored row and columns of upright row `y`, columns `xs`, where rows are rows.
    fn straight_range(&self, y: usize, xs: &Range<usize>) -> (usize, Range<usize>) {
        let roi = self.place.roi();
        let row = roi.y + if self.place.flip_y() { roi.height - 1 - y } else { y };
        let xs = if self.place.flip_x() { roi.width - xs.end..roi.width - xs.start } else { xs.clone() };
        (row, roi.x + xs.start..roi.x + xs.end)
    }

    /// Decodes upright row `y`, columns `xs`, into `out` of [`row_floats`] values: three a pixel in
    /// [`Self::order`], 0..=255.
    pub fn load(&self, y: usize, xs: Range<usize>, out: &mut [f32]) {
        if self.place.transposed() {
            self.load_column(y, xs, out);
        } else {
            let (row, stored) = self.straight_range(y, &xs);
            self.load_row(row, stored, out);
            if self.place.flip_x() {
                reverse_pixels(&mut out[..3 * xs.len()]);
            }
        }
    }

    fn load_row(&self, y: usize, xs: Range<usize>, out: &mut [f32]) {
        let row = |plane| self.view.row(plane, y);
        let chroma = |plane| self.view.row(plane, y / 2);
        let pixels = out[..3 * xs.len()].chunks_exact_mut(3);
        match self.view.format() {
            PixelFormat::Gray8 => {
                for (o, &v) in pixels.zip(&row(0)[xs]) {
                    o.fill(f32::from(v));
                }
            }
            PixelFormat::Rgb8 | PixelFormat::Bgr8 => {
                let bytes = &row(0)[3 * xs.start..3 * xs.end];
                for (o, &v) in out.iter_mut().zip(bytes) {
                    *o = f32::from(v);
                }
            }
            PixelFormat::Rgba8 | PixelFormat::Bgra8 => {
                let bytes = row(0)[4 * xs.start..4 * xs.end].chunks_exact(4);
                for (o, v) in pixels.zip(bytes) {
                    o.copy_from_slice(&[f32::from(v[0]), f32::from(v[1]), f32::from(v[2])]);
                }
            }
            PixelFormat::RgbPlanarF32 => {
                let floats = |plane| row(plane)[4 * xs.start..4 * xs.end].chunks_exact(4).map(float);
                let planes = floats(0).zip(floats(1)).zip(floats(2));
                for (o, ((r, g), b)) in pixels.zip(planes) {
                    o.copy_from_slice(&[r, g, b]);
                }
            }
            PixelFormat::Nv12 => {
                let c = chroma(1);
                self.load_yuv(xs, out, row(0), |i| (c[2 * i], c[2 * i + 1]), |y, x| y[x]);
            }
            PixelFormat::Nv21 => {
                let c = chroma(1);
                self.load_yuv(xs, out, row(0), |i| (c[2 * i + 1], c[2 * i]), |y, x| y[x]);
            }
            PixelFormat::I420 => {
                let (cb, cr) = (chroma(1), chroma(2));
                self.load_yuv(xs, out, row(0), |i| (cb[i], cr[i]), |y, x| y[x]);
            }
            PixelFormat::Yuyv => {
                let c = row(0);
                self.load_yuv(xs, out, c, |i| (c[4 * i + 1], c[4 * i + 3]), |y, x| y[2 * x]);
            }
        }
    }

    /// Columns `xs` of a YUV row: `chroma(i)` is (Cb, Cr) of the pair of pixels 2i, 2i + 1.
    #[inline(always)]
    fn load_yuv(
        &self,
        xs: Range<usize>,
        out: &mut [f32],
        luma_row: &[u8],
        chroma: impl Fn(usize) -> (u8, u8),
        luma: impl Fn(&[u8], usize) -> u8,
    ) {
        let pair = |i| {
            let (cb, cr) = chroma(i);
            self.yuv.chroma(cb, cr)
        };
        // Four lanes go out for every pixel; the next pixel, or the buffer's spare value, takes the fourth.
        let mut put = |x: usize, c| {
            let at = 3 * (x - xs.start);
            out[at..at + 4].copy_from_slice(&self.yuv.pixel(luma(luma_row, x), c));
        };
        let mut x = xs.start;
        if x % 2 == 1 && x < xs.end {
            put(x, pair(x / 2));
            x += 1;
        }
        while x + 1 < xs.end {
            let c = pair(x / 2);
            put(x, c);
            put(x + 1, c);
            x += 2;
        }
        if x < xs.end {
            put(x, pair(x / 2));
        }
    }

    /// Upright row `y` where that is a stored column.
    fn load_column(&self, y: usize, xs: Range<usize>, out: &mut [f32]) {
        let roi = self.place.roi();
        let x = roi.x + if self.place.flip_x() { roi.width - 1 - y } else { y };
        let stored_y = |u: usize| roi.y + if self.place.flip_y() { roi.height - 1 - u } else { u };
        let row = |plane, y| self.view.row(plane, y);
        let mut each = |pixel: &dyn Fn(usize) -> [f32; 3]| {
            for (o, u) in out.chunks_exact_mut(3).zip(xs.clone()) {
                o.copy_from_slice(&pixel(stored_y(u)));
            }
        };
        let yuv = |luma: u8, cb: u8, cr: u8| {
            let [r, g, b, _] = self.yuv.pixel(luma, self.yuv.chroma(cb, cr));
            [r, g, b]
        };
        match self.view.format() {
            PixelFormat::Gray8 => each(&|y| [f32::from(row(0, y)[x]); 3]),
            PixelFormat::Rgb8 | PixelFormat::Bgr8 => each(&|y| three(&row(0, y)[3 * x..])),
            PixelFormat::Rgba8 | PixelFormat::Bgra8 => each(&|y| three(&row(0, y)[4 * x..])),
            PixelFormat::RgbPlanarF32 => {
                each(&|y| std::array::from_fn(|p| float(&row(p, y)[4 * x..4 * x + 4])))
            }
            PixelFormat::Nv12 => each(&|y| {
                let c = row(1, y / 2);
                yuv(row(0, y)[x], c[x / 2 * 2], c[x / 2 * 2 + 1])
            }),
            PixelFormat::Nv21 => each(&|y| {
                let c = row(1, y / 2);
                yuv(row(0, y)[x], c[x / 2 * 2 + 1], c[x / 2 * 2])
            }),
            PixelFormat::I420 => each(&|y| yuv(row(0, y)[x], row(1, y / 2)[x / 2], row(2, y / 2)[x / 2])),
            PixelFormat::Yuyv => each(&|y| {
                let r = row(0, y);
                yuv(r[2 * x], r[x / 2 * 4 + 1], r[x / 2 * 4 + 3])
            }),
        }
    }
}

fn three(bytes: &[u8]) -> [f32; 3] {
    std::array::from_fn(|i| f32::from(bytes[i]))
}

/// Native-endian f32 of 4 bytes, of any alignment.
#[inline(always)]
fn float(bytes: &[u8]) -> f32 {
    clamp(f32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
}

fn reverse_pixels(row: &mut [f32]) {
    let (pixels, _) = row.as_chunks_mut::<3>();
    pixels.reverse();
}

/// [`Normalization`] prepared for rows that come in a given order.
#[derive(Clone, Copy)]
pub(super) struct Normalizer {
    mean: Lanes,
    scale: Lanes,
    swap: bool,
}

impl Normalizer {
    pub fn new(norm: &Normalization, order: ChannelOrder) -> Self {
        let lanes = |v: [f32; 3]| [v[0], v[1], v[2], 0.0];
        Self { mean: lanes(norm.mean), scale: lanes(norm.scale), swap: norm.order != order }
    }

    /// One pixel, in the rows' order, as the network wants it.
    #[inline(always)]
    pub fn pixel<const SWAP: bool>(&self, p: Lanes) -> Lanes {
        let p = if SWAP { [p[2], p[1], p[0], p[3]] } else { p };
        std::array::from_fn(|i| (p[i] - self.mean[i]) * self.scale[i])
    }

    /// True where pixels come in the other order than the network's.
    pub fn swaps(&self) -> bool {
        self.swap
    }

    /// Normalises the pixels of `src`, three values each, into `dst`, where a pixel begins every
    /// `pixel_stride` floats.
    pub fn row<S: Sample>(&self, src: &[S], dst: &mut [f32], pixel_stride: usize) {
        if self.swap {
            self.row_as::<S, true>(src, dst, pixel_stride);
        } else {
            self.row_as::<S, false>(src, dst, pixel_stride);
        }
    }

    fn row_as<S: Sample, const SWAP: bool>(&self, src: &[S], dst: &mut [f32], pixel_stride: usize) {
        let one = |p: &[S; 3]| self.pixel::<SWAP>([p[0].value(), p[1].value(), p[2].value(), 0.0]);
        let (src, _) = src.as_chunks::<3>();
        if pixel_stride == 3 {
            // Four pixels are three whole vectors, with the channels' constants at fixed lanes.
            let mean: [f32; 12] = std::array::from_fn(|i| self.mean[i % 3]);
            let scale: [f32; 12] = std::array::from_fn(|i| self.scale[i % 3]);
            let (blocks, rest) = src.as_chunks::<4>();
            let (out_blocks, out_rest) = dst.as_chunks_mut::<12>();
            for (o, block) in out_blocks.iter_mut().zip(blocks) {
                let flat = block.as_flattened();
                let v: [f32; 12] = std::array::from_fn(|i| {
                    let from = if SWAP { i / 3 * 3 + 2 - i % 3 } else { i };
                    flat[from].value()
                });
                *o = std::array::from_fn(|i| (v[i] - mean[i]) * scale[i]);
            }
            let tail = if blocks.len() < out_blocks.len() {
                out_blocks[blocks.len()].as_mut_slice()
            } else {
                out_rest
            };
            for (o, p) in tail.chunks_exact_mut(3).zip(rest) {
                o.copy_from_slice(&one(p)[..3]);
            }
        } else {
            // The last pixel may end with the slice, so its chunk is short.
            for (o, p) in dst.chunks_mut(pixel_stride).zip(src) {
                o[..3].copy_from_slice(&one(p)[..3]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn yuv(matrix: ColorMatrix, range: ColorRange, y: u8, cb: u8, cr: u8) -> [i32; 3] {
        let t = YuvToRgb::new(matrix, range);
        let p = t.pixel(y, t.chroma(cb, cr));
        std::array::from_fn(|i| p[i].round() as i32)
    }

    #[test]
    fn the_colour_bars_of_the_standards_come_back() {
        use ColorMatrix::{Bt601, Bt709};
        use ColorRange::{Full, Limited};
        for m in [Bt601, Bt709] {
            assert_eq!(yuv(m, Limited, 16, 128, 128), [0, 0, 0]);
            assert_eq!(yuv(m, Limited, 235, 128, 128), [255, 255, 255]);
            assert_eq!(yuv(m, Full, 255, 128, 128), [255, 255, 255]);
            assert_eq!(yuv(m, Full, 77, 128, 128), [77, 77, 77]);
        }
        // 100 % bars: BT.601 limited red is (81, 90, 240), blue (41, 240, 110); BT.709 red (63, 102,
        // 240), green (173, 42, 26); JPEG's green (150, 44, 21).
        let near = |got: [i32; 3], want: [i32; 3]| got.iter().zip(want).all(|(g, w)| (g - w).abs() <= 2);
        assert!(near(yuv(Bt601, Limited, 81, 90, 240), [255, 0, 0]));
        assert!(near(yuv(Bt601, Limited, 41, 240, 110), [0, 0, 255]));
        assert!(near(yuv(Bt709, Limited, 63, 102, 240), [255, 0, 0]));
        assert!(near(yuv(Bt709, Limited, 173, 42, 26), [0, 255, 0]));
        assert!(near(yuv(Bt601, Full, 150, 44, 21), [0, 255, 0]));
    }

    #[test]
    fn floats_are_clamped_and_nan_is_black() {
        let got = [-1.0, 0.25, 300.0, f32::NAN, f32::NEG_INFINITY].map(|v: f32| float(&v.to_ne_bytes()));
        assert_eq!(got, [0.0, 0.25, 255.0, 0.0, 0.0]);
    }

    #[test]
    fn the_blocked_row_equals_the_formula_and_leaves_the_gaps() {
        let norm =
            Normalization { order: ChannelOrder::Bgr, mean: [104.0, 117.0, 123.0], scale: [1.0, 0.5, 0.017] };
        let src: Vec<u8> = (0..3 * 21).map(|i| (i * 37 % 256) as u8).collect();
        for order in [ChannelOrder::Rgb, ChannelOrder::Bgr] {
            for pixels in 0..=21 {
                for stride in [3, 4, 7] {
                    let mut dst = vec![-7.5; pixels * stride + 2];
                    Normalizer::new(&norm, order).row(&src[..3 * pixels], &mut dst, stride);
                    for (i, &got) in dst.iter().enumerate() {
                        let (p, c) = (i / stride, i % stride);
                        let from = if order == norm.order { c } else { 2 - c.min(2) };
                        let want = if p < pixels && c < 3 {
                            (f32::from(src[3 * p + from]) - norm.mean[c]) * norm.scale[c]
                        } else {
                            -7.5
                        };
                        assert_eq!(got, want, "{order:?} {pixels} px stride {stride} at {i}");
                    }
                }
            }
        }
    }
}
