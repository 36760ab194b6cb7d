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
    /// Red gained per Cr.
    red: f32,
    /// Green gained per Cb and per Cr, both negative.
    green: [f32; 2],
    /// Blue gained per Cb.
    blue: f32,
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
        let red: f64 = 2.0 * (1.0 - kr) * chroma_gain;
        let blue: f64 = 2.0 * (1.0 - kb) * chroma_gain;
        Self {
            luma_offset,
            luma_gain: luma_gain as f32,
            red: red as f32,
            green: [(-blue * kb / kg) as f32, (-red * kr / kg) as f32],
            blue: blue as f32,
        }
    }

    /// What chroma adds to R, G, B.
    #[inline(always)]
    fn chroma(&self, cb: f32, cr: f32) -> [f32; 3] {
        let (u, v) = (cb - 128.0, cr - 128.0);
        [self.red * v, self.green[0] * u + self.green[1] * v, self.blue * u]
    }

    #[inline(always)]
    fn luma(&self, y: f32) -> f32 {
        (y - self.luma_offset) * self.luma_gain
    }

    #[inline(always)]
    fn pixel(&self, y: u8, cb: u8, cr: u8) -> [f32; 3] {
        let y = self.luma(f32::from(y));
        self.chroma(f32::from(cb), f32::from(cr)).map(|c| clamp(y + c))
    }
}

/// Pixels that are decoded together, each step a loop of its own: too many for the compiler to unroll
/// before it vectorises.
const BLOCK: usize = 64;
const PAIRS: usize = BLOCK / 2;

/// The planes' rows behind one row of a YUV picture.
struct YuvRows<'a> {
    format: PixelFormat,
    /// Luma, or everything where the format is packed.
    luma: &'a [u8],
    chroma: [&'a [u8]; 2],
}

impl<'a> YuvRows<'a> {
    #[inline(always)]
    fn new(view: &ImageView<'a>, y: usize) -> Self {
        let format = view.format();
        let chroma = match format {
            PixelFormat::I420 => [view.row(1, y / 2), view.row(2, y / 2)],
            PixelFormat::Nv12 | PixelFormat::Nv21 => [view.row(1, y / 2), &[]],
            _ => [&[][..], &[]],
        };
        Self { format, luma: view.row(0, y), chroma }
    }

    /// Y, Cb, Cr of pixel `x`.
    #[inline(always)]
    fn pixel(&self, x: usize) -> (u8, u8, u8) {
        let [c, cr] = self.chroma;
        let pair = x / 2;
        match self.format {
            PixelFormat::Nv12 => (self.luma[x], c[2 * pair], c[2 * pair + 1]),
            PixelFormat::Nv21 => (self.luma[x], c[2 * pair + 1], c[2 * pair]),
            PixelFormat::I420 => (self.luma[x], c[pair], cr[pair]),
            _ => (self.luma[2 * x], self.luma[4 * pair + 1], self.luma[4 * pair + 3]),
        }
    }

    /// Y of the [`BLOCK`] pixels from the even `x` on. Here and below bytes are widened in memory order
    /// and sorted as floats, for which every machine has the shuffles.
    #[inline(always)]
    fn luma_block(&self, x: usize, y: &mut [f32; BLOCK]) {
        if self.format == PixelFormat::Yuyv {
            let values = widen(array::<u8, { 2 * BLOCK }>(self.luma, 2 * x));
            for i in 0..BLOCK {
                y[i] = values[2 * i];
            }
        } else {
            *y = widen(array(self.luma, x));
        }
    }

    /// Cb and Cr of the [`PAIRS`] pairs from the even pixel `x` on.
    #[inline(always)]
    fn chroma_block(&self, x: usize, cb: &mut [f32; PAIRS], cr: &mut [f32; PAIRS]) {
        match self.format {
            PixelFormat::I420 => {
                *cb = widen(array(self.chroma[0], x / 2));
                *cr = widen(array(self.chroma[1], x / 2));
            }
            PixelFormat::Yuyv => {
                let values = widen(array::<u8, { 2 * BLOCK }>(self.luma, 2 * x));
                for i in 0..PAIRS {
                    (cb[i], cr[i]) = (values[4 * i + 1], values[4 * i + 3]);
                }
            }
            _ => {
                let (first, second) = if self.format == PixelFormat::Nv12 { (cb, cr) } else { (cr, cb) };
                let values = widen(array::<u8, BLOCK>(self.chroma[0], x));
                for i in 0..PAIRS {
                    (first[i], second[i]) = (values[2 * i], values[2 * i + 1]);
                }
            }
        }
    }
}

#[inline(always)]
fn widen<const N: usize>(bytes: &[u8; N]) -> [f32; N] {
    let mut values = [0.0; N];
    for i in 0..N {
        values[i] = f32::from(bytes[i]);
    }
    values
}

/// `N` values from `at` on: one bounds check for all of them.
#[inline(always)]
pub(super) fn array<T, const N: usize>(values: &[T], at: usize) -> &[T; N] {
    values[at..at + N].try_into().expect("N values")
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

/// As [`array`], to write.
#[inline(always)]
pub(super) fn array_mut<T, const N: usize>(values: &mut [T], at: usize) -> &mut [T; N] {
    (&mut values[at..at + N]).try_into().expect("N values")
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
    order: ChannelOrder,
}

impl<'v> RowReader<'v> {
    /// Reader that delivers the channels as `wanted` where that is free; see [`Self::order`].
    pub fn new(view: &'v ImageView<'v>, wanted: ChannelOrder) -> Self {
        let order = match view.format() {
            PixelFormat::Rgb8 | PixelFormat::Rgba8 => ChannelOrder::Rgb,
            PixelFormat::Bgr8 | PixelFormat::Bgra8 => ChannelOrder::Bgr,
            _ => wanted,
        };
        Self { view, place: view.placement(), yuv: YuvToRgb::new(view.matrix(), view.range()), order }
    }

    /// Order in which rows are delivered: packed formats as stored.
    pub fn order(&self) -> ChannelOrder {
        self.order
    }

    /// Where red, green and blue stand in a pixel that is decoded from separate channels.
    fn places(&self) -> [usize; 3] {
        match self.order {
            ChannelOrder::Rgb => [0, 1, 2],
            ChannelOrder::Bgr => [2, 1, 0],
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
        let (pixels, _) = out.as_chunks_mut::<3>();
        match self.view.format() {
            PixelFormat::Gray8 => {
                for (o, &v) in pixels.iter_mut().zip(&row(0)[xs]) {
                    *o = [f32::from(v); 3];
                }
            }
            PixelFormat::Rgb8 | PixelFormat::Bgr8 => {
                let bytes = &row(0)[3 * xs.start..3 * xs.end];
                for (o, &v) in out.iter_mut().zip(bytes) {
                    *o = f32::from(v);
                }
            }
            PixelFormat::Rgba8 | PixelFormat::Bgra8 => {
                let (bytes, _) = row(0)[4 * xs.start..4 * xs.end].as_chunks::<4>();
                // Alpha goes out too: the next pixel, or the buffer's spare value, takes its place.
                for (i, v) in bytes.iter().enumerate() {
                    *array_mut(out, 3 * i) = v.map(f32::from);
                }
            }
            PixelFormat::RgbPlanarF32 => {
                let [r, g, b] = self.places().map(|p| row(p)[4 * xs.start..4 * xs.end].as_chunks::<4>().0);
                for (o, ((r, g), b)) in pixels.iter_mut().zip(r.iter().zip(g).zip(b)) {
                    *o = [float(r), float(g), float(b)];
                }
            }
            _ => self.load_yuv(YuvRows::new(self.view, y), xs, out),
        }
    }

    fn load_yuv(&self, rows: YuvRows<'_>, xs: Range<usize>, out: &mut [f32]) {
        let (mut x, mut out) = (xs.start, &mut out[..3 * xs.len()]);
        while x < xs.end {
            let whole = x % 2 == 0 && x + BLOCK <= xs.end;
            let (now, later) = out.split_at_mut(if whole { 3 * BLOCK } else { 3 });
            if whole {
                self.yuv_block(&rows, x, now);
            } else {
                let (y, cb, cr) = rows.pixel(x);
                let rgb = self.yuv.pixel(y, cb, cr);
                now.copy_from_slice(&self.places().map(|c| rgb[c]));
            }
            (x, out) = (x + now.len() / 3, later);
        }
    }

    /// The [`BLOCK`] pixels from the even `x` on: what [`YuvToRgb::pixel`] gives one by one.
    fn yuv_block(&self, rows: &YuvRows<'_>, x: usize, out: &mut [f32]) {
        let mut y = [0.0; BLOCK];
        rows.luma_block(x, &mut y);
        let (mut cb, mut cr) = ([0.0; PAIRS], [0.0; PAIRS]);
        rows.chroma_block(x, &mut cb, &mut cr);
        let y = y.map(|v| self.yuv.luma(v));
        let mut added = [[0.0; BLOCK]; 3];
        for i in 0..PAIRS {
            let [r, g, b] = self.yuv.chroma(cb[i], cr[i]);
            (added[0][2 * i], added[0][2 * i + 1]) = (r, r);
            (added[1][2 * i], added[1][2 * i + 1]) = (g, g);
            (added[2][2 * i], added[2][2 * i + 1]) = (b, b);
        }
        let [first, second, third] = self.places().map(|c| &added[c]);
        for (i, o) in out.as_chunks_mut::<3>().0.iter_mut().enumerate() {
            *o = [clamp(y[i] + first[i]), clamp(y[i] + second[i]), clamp(y[i] + third[i])];
        }
    }

    /// Upright row `y` where that is a stored column.
    fn load_column(&self, y: usize, xs: Range<usize>, out: &mut [f32]) {
        let roi = self.place.roi();
        let x = roi.x + if self.place.flip_x() { roi.width - 1 - y } else { y };
        let row = |plane, y| self.view.row(plane, y);
        match self.view.format() {
            PixelFormat::Gray8 => self.each(xs, out, |y| [f32::from(row(0, y)[x]); 3]),
            PixelFormat::Rgb8 | PixelFormat::Bgr8 => self.each(xs, out, |y| three(array(row(0, y), 3 * x))),
            PixelFormat::Rgba8 | PixelFormat::Bgra8 => self.each(xs, out, |y| three(array(row(0, y), 4 * x))),
            PixelFormat::RgbPlanarF32 => {
                let places = self.places();
                self.each(xs, out, |y| places.map(|p| float(array(row(p, y), 4 * x))))
            }
            _ => {
                let places = self.places();
                self.each(xs, out, |y| {
                    let (y, cb, cr) = YuvRows::new(self.view, y).pixel(x);
                    let rgb = self.yuv.pixel(y, cb, cr);
                    places.map(|c| rgb[c])
                })
            }
        }
    }

    /// `pixel(stored row)` for the upright columns `xs` of a view whose columns are stored rows.
    #[inline(always)]
    fn each(&self, xs: Range<usize>, out: &mut [f32], pixel: impl Fn(usize) -> [f32; 3]) {
        let roi = self.place.roi();
        for (o, u) in out.chunks_exact_mut(3).zip(xs) {
            let y = roi.y + if self.place.flip_y() { roi.height - 1 - u } else { u };
            o.copy_from_slice(&pixel(y));
        }
    }
}

fn three(bytes: &[u8; 3]) -> [f32; 3] {
    bytes.map(f32::from)
}

/// Native-endian f32 of 4 bytes, of any alignment.
#[inline(always)]
fn float(bytes: &[u8; 4]) -> f32 {
    clamp(f32::from_ne_bytes(*bytes))
}

fn reverse_pixels(row: &mut [f32]) {
    let (pixels, _) = row.as_chunks_mut::<3>();
    pixels.reverse();
}

/// Values that are normalised together: whole pixels and whole vectors of any width, and too many for
/// the compiler to unroll the loop over them, which it then fails to vectorise.
const PERIOD: usize = 192;

/// [`Normalization`] prepared for rows that come in a given order.
#[derive(Clone)]
pub(super) struct Normalizer {
    /// Means and factors of whole pixels, one after another.
    mean: [f32; PERIOD],
    scale: [f32; PERIOD],
    swap: bool,
}

impl Normalizer {
    pub fn new(norm: &Normalization, order: ChannelOrder) -> Self {
        Self {
            mean: std::array::from_fn(|i| norm.mean[i % 3]),
            scale: std::array::from_fn(|i| norm.scale[i % 3]),
            swap: norm.order != order,
        }
    }

    /// One pixel, in the rows' order, as the network wants it; the fourth lane is as good as any.
    #[inline(always)]
    pub fn lanes<const SWAP: bool>(&self, p: Lanes) -> Lanes {
        let p = if SWAP { [p[2], p[1], p[0], p[3]] } else { p };
        std::array::from_fn(|i| (p[i] - self.mean[i]) * self.scale[i])
    }

    #[inline(always)]
    fn pixel<const SWAP: bool>(&self, p: [f32; 3]) -> [f32; 3] {
        let [a, b, c, _] = self.lanes::<SWAP>([p[0], p[1], p[2], 0.0]);
        [a, b, c]
    }

    /// True where pixels come in the other order than the network's.
    pub fn swaps(&self) -> bool {
        self.swap
    }

    /// Normalises the pixels of `src`, three values each, into `dst`, where a pixel begins every
    /// `pixel_stride` floats.
    pub fn row<S: Sample>(&self, src: &[S], dst: &mut [f32], pixel_stride: usize) {
        if pixel_stride != 3 {
            let (pixels, _) = src.as_chunks::<3>();
            // The last pixel may end with the slice, so its chunk is short.
            for (o, p) in dst.chunks_mut(pixel_stride).zip(pixels) {
                let p = p.map(Sample::value);
                o[..3].copy_from_slice(&if self.swap {
                    self.pixel::<true>(p)
                } else {
                    self.pixel::<false>(p)
                });
            }
        } else if self.swap {
            // Bytes are widened on their own: shuffling floats is cheaper than shuffling bytes.
            let dst = &mut dst[..src.len()];
            for (o, v) in dst.iter_mut().zip(src) {
                *o = v.value();
            }
            let (blocks, rest) = dst.as_chunks_mut::<12>();
            for p in blocks {
                *p = std::array::from_fn(|i| (p[i / 3 * 3 + 2 - i % 3] - self.mean[i]) * self.scale[i]);
            }
            for p in rest.as_chunks_mut::<3>().0 {
                *p = self.pixel::<true>(*p);
            }
        } else {
            let whole = src.len() / PERIOD * PERIOD;
            let (blocks, rest) = src.as_chunks::<PERIOD>();
            let (out, out_rest) = dst[..src.len()].split_at_mut(whole);
            for (o, v) in out.as_chunks_mut::<PERIOD>().0.iter_mut().zip(blocks) {
                for i in 0..PERIOD {
                    o[i] = (v[i].value() - self.mean[i]) * self.scale[i];
                }
            }
            for (i, (o, v)) in out_rest.iter_mut().zip(rest).enumerate() {
                *o = (v.value() - self.mean[i]) * self.scale[i];
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn yuv(matrix: ColorMatrix, range: ColorRange, y: u8, cb: u8, cr: u8) -> [i32; 3] {
        let t = YuvToRgb::new(matrix, range);
        t.pixel(y, cb, cr).map(|v| v.round() as i32)
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
