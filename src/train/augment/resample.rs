//! One window of a picture, drawn at another size.
//!
//! A triangle filter of half width max(1, reduction) in source pixels: bilinear when enlarging, a
//! weighted area average when reducing. Separable: rows first, in 16-bit integers with 8 bits of
//! fraction (which vectorises eightfold even in SSE2), then columns into planes of floats, the
//! colour map on these, and back to bytes. Nothing is computed that the window does not show.

use super::crop::Window;
use super::photometric::Colour;

/// What to draw.
#[derive(Clone, Copy, Debug)]
pub(super) struct Drawing {
    pub(super) window: Window,
    /// Mirror left and right.
    pub(super) flip: bool,
    pub(super) colour: Colour,
    /// RGB outside the picture; not recoloured.
    pub(super) fill: [u8; 3],
}

/// Weights of one sum: an exact 1.
const ONE: u32 = 256;

/// The source pixels along an axis that each output pixel is made of.
#[derive(Debug, Default)]
struct Axis {
    /// Output pixels whose centre lies in the picture.
    inside: std::ops::Range<usize>,
    /// Weights each of these has.
    taps: usize,
    /// First source pixel of each.
    first: Vec<usize>,
    /// `taps` of each, with sum [`ONE`].
    weights: Vec<u16>,
}

impl Axis {
    /// `count` outputs over `size` source pixels from `start`, of `extent` that there are.
    fn set(&mut self, start: f64, size: f64, count: usize, extent: usize, flip: bool) {
        let step = size / count as f64;
        let half = step.max(1.0);
        let centre = |o: usize| start + (if flip { count - 1 - o } else { o } as f64 + 0.5) * step;
        let is_inside = |o: &usize| (0.0..extent as f64).contains(&centre(*o));
        let from = (0..count).find(is_inside).unwrap_or(0);
        let to = (0..count).rev().find(is_inside).map_or(from, |o| o + 1);
        self.inside = from..to;
        // Pixel i has its centre at i + 0.5.
        let reach = |centre: f64| {
            let first = (centre - half - 0.5).ceil().max(0.0) as usize;
            let last = ((centre + half - 0.5).floor() as usize).min(extent - 1);
            (first, last + 1 - first)
        };
        self.taps = (from..to).map(|o| reach(centre(o)).1).max().unwrap_or(1);
        self.first.clear();
        self.weights.clear();
        for o in from..to {
            let centre = centre(o);
            let (reached, _) = reach(centre);
            // All have the same number of taps, so those at the end begin earlier, with zeros.
            let first = reached.min(extent - self.taps);
            let weight = |k: usize| (1.0 - ((first + k) as f64 + 0.5 - centre).abs() / half).max(0.0);
            let total: f64 = (0..self.taps).map(weight).sum();
            // Rounding the running sum keeps the total exact and every weight non-negative.
            let (mut sum, mut given) = (0.0, 0);
            for k in 0..self.taps {
                sum += weight(k);
                let upto = (sum / total * f64::from(ONE)).round() as u32;
                self.weights.push((upto - given) as u16);
                given = upto;
            }
            self.first.push(first);
        }
    }

    fn weights(&self, i: usize) -> &[u16] {
        &self.weights[i * self.taps..(i + 1) * self.taps]
    }
}

/// Draws windows; keeps its buffers.
#[derive(Debug, Default)]
pub(super) struct Resampler {
    columns: Axis,
    rows: Axis,
    /// One row before the columns are summed, 8 bits of fraction.
    row: Vec<u16>,
    /// One output row, planar.
    planes: [Vec<f32>; 3],
    bytes: [Vec<u8>; 3],
}

impl Resampler {
    /// Draws a window of the picture (width, height, RGB pixels) into `out`, side x side x 3.
    pub(super) fn draw(
        &mut self,
        (width, height, pixels): (usize, usize, &[u8]),
        what: &Drawing,
        side: usize,
        out: &mut [u8],
    ) {
        assert!(
            pixels.len() == width * height * 3 && out.len() == side * side * 3,
            "picture or example size"
        );
        let Self { columns, rows, row, planes, bytes } = self;
        let Window { x, y, size } = what.window;
        columns.set(x.into(), size.into(), side, width, what.flip);
        rows.set(y.into(), size.into(), side, height, false);
        let inside = columns.inside.clone();
        let shown = inside.len();
        planes.iter_mut().for_each(|plane| plane.resize(shown, 0.0));
        bytes.iter_mut().for_each(|plane| plane.resize(shown, 0));
        // Columns of the source that are read at all.
        let left = columns.first.iter().min().copied().unwrap_or(0);
        let right = columns.first.iter().max().map_or(0, |first| first + columns.taps);
        columns.first.iter_mut().for_each(|first| *first -= left);

        for (oy, line) in out.chunks_exact_mut(side * 3).enumerate() {
            if !rows.inside.contains(&oy) || shown == 0 {
                fill(line, what.fill);
                continue;
            }
            let at = oy - rows.inside.start;
            let source =
                |k: usize| &pixels[((rows.first[at] + k) * width + left) * 3..][..(right - left) * 3];
            sum_rows(rows.weights(at), source, row);
            let [r, g, b] = planes;
            sum_columns(columns, row, [r, g, b]);
            what.colour.apply([r, g, b]);
            for (plane, bytes) in [&*r, &*g, &*b].into_iter().zip(bytes.iter_mut()) {
                to_bytes(plane, bytes);
            }
            let (before, rest) = line.split_at_mut(inside.start * 3);
            let (middle, after) = rest.split_at_mut(shown * 3);
            fill(before, what.fill);
            interleave(bytes, middle);
            fill(after, what.fill);
        }
    }
}

fn fill(line: &mut [u8], colour: [u8; 3]) {
    line.as_chunks_mut::<3>().0.fill(colour);
}

/// Weighted sum of source rows, at most 255 * 256.
fn sum_rows<'a>(weights: &[u16], source: impl Fn(usize) -> &'a [u8], sum: &mut Vec<u16>) {
    let mut used = weights.iter().enumerate().filter(|(_, w)| **w > 0);
    sum.clear();
    // Weights sum to 1, so there is one.
    if let Some((k, &w)) = used.next() {
        match used.next() {
            Some((k2, &w2)) => sum.extend(
                source(k).iter().zip(source(k2)).map(|(&a, &b)| u16::from(a) * w + u16::from(b) * w2),
            ),
            None => sum.extend(source(k).iter().map(|&v| u16::from(v) * w)),
        }
    }
    for (k, &w) in used {
        for (sum, &v) in sum.iter_mut().zip(source(k)) {
            *sum += u16::from(v) * w;
        }
    }
}

fn sum_columns(axis: &Axis, row: &[u16], planes: [&mut [f32]; 3]) {
    match axis.taps {
        1 => sum_taps::<1>(axis, row, planes),
        2 => sum_taps::<2>(axis, row, planes),
        3 => sum_taps::<3>(axis, row, planes),
        4 => sum_taps::<4>(axis, row, planes),
        5 => sum_taps::<5>(axis, row, planes),
        taps => {
            let [r, g, b] = planes;
            for (i, &first) in axis.first.iter().enumerate() {
                let mut sums = [0u32; 3];
                for (pixel, &w) in row[first * 3..][..taps * 3].chunks_exact(3).zip(axis.weights(i)) {
                    for c in 0..3 {
                        sums[c] += u32::from(pixel[c]) * u32::from(w);
                    }
                }
                (r[i], g[i], b[i]) = (to_value(sums[0]), to_value(sums[1]), to_value(sums[2]));
            }
        }
    }
}

/// [`sum_columns`] with a number of taps that the compiler knows.
fn sum_taps<const N: usize>(axis: &Axis, row: &[u16], [r, g, b]: [&mut [f32]; 3]) {
    let (weights, _) = axis.weights.as_chunks::<N>();
    let outputs = r.iter_mut().zip(g).zip(b);
    for ((&first, weights), ((r, g), b)) in axis.first.iter().zip(weights).zip(outputs) {
        let (pixels, _) = row[first * 3..][..N * 3].as_chunks::<3>();
        let mut sums = [0u32; 3];
        for k in 0..N {
            for c in 0..3 {
                sums[c] += u32::from(pixels[k][c]) * u32::from(weights[k]);
            }
        }
        (*r, *g, *b) = (to_value(sums[0]), to_value(sums[1]), to_value(sums[2]));
    }
}

/// Sums carry 16 bits of fraction and stay below 2^24, which f32 holds exactly.
fn to_value(sum: u32) -> f32 {
    sum as i32 as f32 * (1.0 / (ONE * ONE) as f32)
}

/// Rounds to the nearest byte. Adding 2^23 leaves the rounded value in the lowest bits, which
/// vectorises where a cast would not.
fn to_bytes(values: &[f32], bytes: &mut [u8]) {
    const SHIFT: f32 = (1 << 23) as f32;
    for (byte, &v) in bytes.iter_mut().zip(values) {
        *byte = (v.clamp(0.0, 255.0) + SHIFT).to_bits() as u8;
    }
}

fn interleave([r, g, b]: &[Vec<u8>; 3], out: &mut [u8]) {
    for (((pixel, &r), &g), &b) in out.as_chunks_mut::<3>().0.iter_mut().zip(r).zip(g).zip(b) {
        *pixel = [r, g, b];
    }
}
