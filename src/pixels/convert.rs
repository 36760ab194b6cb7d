//! Stored bytes to rows of upright f32 pixels, and such rows to normalised network input.
//!
//! Every conversion is a function of one pixel (and its chroma sample) alone, with one order of
//! operations, so that any window, row range or walking direction gives the same bits.

use super::placement::Placement;
use super::sample::{array, array_mut, clamp};
use super::view::{ImageView, PixelFormat};
use super::yuv::{YuvRows, YuvToRgb};
use crate::cpu::resample::{Constants, Resampler, Sample};
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
            _ => self.yuv.row(&YuvRows::new(self.view, y), xs, self.places(), out),
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

/// [`Normalization`] prepared for rows that come in a given order.
pub(super) struct Normalizer {
    constants: Constants,
    kernels: Resampler,
}

impl Normalizer {
    pub fn new(norm: &Normalization, order: ChannelOrder) -> Self {
        let constants = Constants::new(norm.mean, norm.scale, norm.order != order);
        Self { constants, kernels: Resampler::detected() }
    }

    /// The kernels that rows go through.
    pub fn kernels(&self) -> Resampler {
        self.kernels
    }

    /// What they normalise with.
    pub fn constants(&self) -> &Constants {
        &self.constants
    }

    /// One pixel, in the rows' order, as the network wants it.
    #[inline(always)]
    pub fn pixel(&self, p: [f32; 3]) -> [f32; 3] {
        let Constants { mean, scale, swap, .. } = &self.constants;
        let p = if *swap { [p[2], p[1], p[0]] } else { p };
        [(p[0] - mean[0]) * scale[0], (p[1] - mean[1]) * scale[1], (p[2] - mean[2]) * scale[2]]
    }

    /// Normalises the pixels of `src`, three values each, into `dst`, where a pixel begins every
    /// `pixel_stride` floats.
    pub fn row<S: Sample>(&self, src: &[S], dst: &mut [f32], pixel_stride: usize) {
        if pixel_stride == 3 {
            return self.kernels.normalize(src, dst, &self.constants);
        }
        let (pixels, _) = src.as_chunks::<3>();
        // The last pixel may end with the slice, so its chunk is short.
        for (o, p) in dst.chunks_mut(pixel_stride).zip(pixels) {
            o[..3].copy_from_slice(&self.pixel(p.map(Sample::value)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
