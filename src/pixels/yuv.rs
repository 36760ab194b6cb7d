//! YUV rows to RGB rows.

use super::sample::{array, clamp};
use super::view::{ColorMatrix, ColorRange, ImageView, PixelFormat};
use std::ops::Range;

/// Pixels that are decoded together, each step a loop of its own: too many for the compiler to unroll
/// before it vectorises.
const BLOCK: usize = 64;
const PAIRS: usize = BLOCK / 2;

/// YUV to RGB after ITU-R BT.601-7 section 2.5 and BT.709-6 section 3, in f32, clamped to 0..=255 and
/// not rounded. Chroma is replicated: both pixels of a 4:2:2 pair, all four of a 4:2:0 block, take
/// their own sample unfiltered.
#[derive(Clone, Copy)]
pub(super) struct YuvToRgb {
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
    pub fn new(matrix: ColorMatrix, range: ColorRange) -> Self {
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

    /// As a device's kernels take it.
    #[cfg(feature = "cuda")]
    pub fn factors(&self) -> crate::gpu::pixels::YuvFactors {
        let Self { luma_offset, luma_gain, red, green, blue } = *self;
        crate::gpu::pixels::YuvFactors { luma_offset, luma_gain, red, green, blue }
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
    pub fn pixel(&self, y: u8, cb: u8, cr: u8) -> [f32; 3] {
        let y = self.luma(f32::from(y));
        self.chroma(f32::from(cb), f32::from(cr)).map(|c| clamp(y + c))
    }

    /// Columns `xs` of a row, three values a pixel; `places[i]` tells which of R, G, B is value `i`.
    pub fn row(&self, rows: &YuvRows<'_>, xs: Range<usize>, places: [usize; 3], out: &mut [f32]) {
        let (mut x, mut out) = (xs.start, &mut out[..3 * xs.len()]);
        while x < xs.end {
            let whole = x % 2 == 0 && x + BLOCK <= xs.end;
            let (now, later) = out.split_at_mut(if whole { 3 * BLOCK } else { 3 });
            if whole {
                self.block(rows, x, places, now);
            } else {
                let (y, cb, cr) = rows.pixel(x);
                let rgb = self.pixel(y, cb, cr);
                now.copy_from_slice(&places.map(|c| rgb[c]));
            }
            (x, out) = (x + now.len() / 3, later);
        }
    }

    /// The [`BLOCK`] pixels from the even `x` on: what [`Self::pixel`] gives one by one.
    fn block(&self, rows: &YuvRows<'_>, x: usize, places: [usize; 3], out: &mut [f32]) {
        let mut y = [0.0; BLOCK];
        rows.luma_block(x, &mut y);
        let (mut cb, mut cr) = ([0.0; PAIRS], [0.0; PAIRS]);
        rows.chroma_block(x, &mut cb, &mut cr);
        let y = y.map(|v| self.luma(v));
        let mut added = [[0.0; BLOCK]; 3];
        for i in 0..PAIRS {
            let [r, g, b] = self.chroma(cb[i], cr[i]);
            (added[0][2 * i], added[0][2 * i + 1]) = (r, r);
            (added[1][2 * i], added[1][2 * i + 1]) = (g, g);
            (added[2][2 * i], added[2][2 * i + 1]) = (b, b);
        }
        let [first, second, third] = places.map(|c| &added[c]);
        for (i, o) in out.as_chunks_mut::<3>().0.iter_mut().enumerate() {
            *o = [clamp(y[i] + first[i]), clamp(y[i] + second[i]), clamp(y[i] + third[i])];
        }
    }
}

/// The planes' rows behind one row of a YUV picture.
pub(super) struct YuvRows<'a> {
    format: PixelFormat,
    /// Luma, or everything where the format is packed.
    luma: &'a [u8],
    chroma: [&'a [u8]; 2],
}

impl<'a> YuvRows<'a> {
    #[inline(always)]
    pub fn new(view: &ImageView<'a>, y: usize) -> Self {
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
    pub fn pixel(&self, x: usize) -> (u8, u8, u8) {
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
}
