//! One window of one pyramid level, written as network input.
//!
//! Each axis of the upright picture is resampled on its own. Enlarging, and shrinking up to 2x, is
//! bilinear with half-pixel centres (level pixel i looks at upright `(i + 0.5) * W / w - 0.5`, edges
//! replicated); shrinking more is the exact area average over `i * W / w .. (i + 1) * W / w`. Which
//! upright pixels a level pixel takes, and with what weights, follows from whole-number arithmetic on
//! its position in the level, never from the window, so a window equals that part of the level bit
//! for bit. Rows are combined first, then columns: shrinking thus touches each source value once.

use super::convert::{row_floats, Normalization, Normalizer, RowReader};
use super::rect::{Rect, Size};
use super::sample::array;
use super::view::ImageView;
use crate::cpu::resample::{Columns, Resampler};
use crate::error::{Error, Result};
use std::ops::Range;

/// Upright pixels behind one level pixel along one axis: `first .. first + len`, weighted with
/// `head` (the first), `body` (each between) and `tail` (the last, where `len` > 1).
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Taps {
    pub first: u32,
    pub len: u32,
    pub head: f32,
    pub body: f32,
    pub tail: f32,
}

/// How one axis of `from` upright pixels becomes one of `to` level pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Axis {
    from: u64,
    to: u64,
}

impl Axis {
    pub fn new(from: usize, to: usize) -> Self {
        Self { from: from as u64, to: to as u64 }
    }

    fn is_identity(&self) -> bool {
        self.from == self.to
    }

    fn averages(&self) -> bool {
        self.from > 2 * self.to
    }

    /// Taps of level pixel `i`. No overflow: lengths are at most 2^24.
    pub fn taps(&self, i: usize) -> Taps {
        let (i, from, to) = (i as u64, self.from, self.to);
        if self.averages() {
            // In units of 1/to upright pixels the average runs over begin..end, and pixel k over
            // k * to..(k + 1) * to.
            let (begin, end) = (i * from, (i + 1) * from);
            let (first, last) = (begin / to, (end - 1) / to);
            let share = |units: u64| (units as f64 / from as f64) as f32;
            let (head, tail) = ((first + 1) * to - begin, end - last * to);
            let len = (last - first + 1) as u32;
            Taps { first: first as u32, len, head: share(head), body: share(to), tail: share(tail) }
        } else {
            // Position in units of 1/(2 to), half-pixel centres, clamped to the first and last pixel.
            let unit = 2 * to;
            let position = ((2 * i + 1) * from).saturating_sub(to).min((from - 1) * unit);
            let (first, rest) = (position / unit, position % unit);
            if rest == 0 {
                return Taps { first: first as u32, len: 1, head: 1.0, body: 0.0, tail: 0.0 };
            }
            let t = (rest as f64 / unit as f64) as f32;
            Taps { first: first as u32, len: 2, head: 1.0 - t, body: 0.0, tail: t }
        }
    }

    /// Upright pixels behind level pixels `range`, which is not empty.
    fn span(&self, range: Range<usize>) -> Range<usize> {
        let (a, b) = (self.taps(range.start), self.taps(range.end - 1));
        a.first as usize..(b.first + b.len) as usize
    }

    /// Most upright pixels behind any `n` neighbouring level pixels.
    fn most_span(&self, n: usize) -> usize {
        // Exactly n * from / to wide, a bilinear tap beyond on either side, both ends cut pixels.
        let wide = (n as u64 * self.from).div_ceil(self.to) + 3;
        wide.min(self.from) as usize
    }
}

/// Where [`fill`] writes: rows `row_stride` floats apart, pixels `pixel_stride` floats apart, three
/// values a pixel. Floats between pixels and between rows are left as they are.
#[derive(Debug)]
pub struct DstRows<'a> {
    data: &'a mut [f32],
    row_stride: usize,
    pixel_stride: usize,
}

impl<'a> DstRows<'a> {
    /// Destination over `data`; strides in floats, checked by [`fill`].
    pub fn new(data: &'a mut [f32], row_stride: usize, pixel_stride: usize) -> Self {
        Self { data, row_stride, pixel_stride }
    }

    /// Destination of `width` pixels a row without gaps.
    pub fn packed(data: &'a mut [f32], width: usize) -> Self {
        Self::new(data, width.saturating_mul(3), 3)
    }

    /// Error unless `rows` rows of `width` pixels (both above 0) fit.
    fn check(&self, width: usize, rows: usize) -> Result<()> {
        let Self { row_stride, pixel_stride, .. } = *self;
        let row = pixel_stride.checked_mul(width - 1).and_then(|n| n.checked_add(3));
        let needed = row.and_then(|row| row_stride.checked_mul(rows - 1)?.checked_add(row));
        let (Some(row), Some(needed)) = (row, needed) else {
            return Err(Error::InvalidArgument(format!(
                "destination strides {row_stride} and {pixel_stride} floats overflow over {width}x{rows} px"
            )));
        };
        if pixel_stride < 3 || (rows > 1 && row_stride < row) {
            return Err(Error::InvalidArgument(format!(
                "destination of {width} px rows has pixel stride {pixel_stride} (at least 3) and row stride \
                 {row_stride} floats (at least {row})"
            )));
        }
        if self.data.len() < needed {
            return Err(Error::BufferTooSmall { needed, capacity: self.data.len() });
        }
        Ok(())
    }
}

/// Row buffers of [`fill`], kept from call to call. Each thread needs its own. One that was reserved
/// for the largest case is never enlarged again, so that filling does not allocate.
#[derive(Debug, Default)]
pub struct Scratch {
    /// The two upright rows decoded last.
    rows: [Vec<f32>; 2],
    /// Weighted sum of upright rows.
    sum: Vec<f32>,
    columns: ColumnBuffers,
}

/// Where the columns of a window look: the [`Taps`] of each, its places three times the pixels' numbers from the row
/// buffers' start on.
#[derive(Debug, Default)]
struct ColumnBuffers {
    first: Vec<u32>,
    last: Vec<u32>,
    head: Vec<f32>,
    tail: Vec<f32>,
}

/// Heap bytes of a column.
const COLUMN_BYTES: usize = 2 * size_of::<u32>() + 2 * size_of::<f32>();

impl Scratch {
    /// Scratch for windows up to `window_width` of levels `level_width` wide over an upright picture
    /// `upright_width` wide (pixels, each 1 to [`super::rect::MAX_SIDE`]), of any format and height.
    pub fn for_width(upright_width: usize, level_width: usize, window_width: usize) -> Self {
        let mut scratch = Self::default();
        scratch.reserve(upright_width, level_width, window_width);
        scratch
    }

    /// Enlarges the buffers, where they are smaller, to what [`Self::for_width`] would make.
    pub fn reserve(&mut self, upright_width: usize, level_width: usize, window_width: usize) {
        Resampler::detected(); // the first time somebody asks for the CPU's kernels allocates
        let (floats, columns) = Self::lengths(upright_width, level_width, window_width);
        for row in self.rows.iter_mut().chain([&mut self.sum]) {
            if row.len() < floats {
                *row = vec![0.0; floats];
            }
        }
        let ColumnBuffers { first, last, head, tail } = &mut self.columns;
        for places in [first, last] {
            if places.len() < columns {
                *places = vec![0; columns];
            }
        }
        for weights in [head, tail] {
            if weights.len() < columns {
                *weights = vec![0.0; columns];
            }
        }
    }

    /// Heap bytes held.
    pub fn bytes(&self) -> usize {
        let floats = self.rows.iter().map(Vec::capacity).sum::<usize>() + self.sum.capacity();
        floats * size_of::<f32>() + self.columns.first.capacity() * COLUMN_BYTES
    }

    /// Heap bytes that a fresh scratch of [`Self::for_width`] holds.
    pub fn bytes_for_width(upright_width: usize, level_width: usize, window_width: usize) -> usize {
        let (floats, columns) = Self::lengths(upright_width, level_width, window_width);
        3 * floats * size_of::<f32>() + columns * COLUMN_BYTES
    }

    /// Heap bytes that a scratch reserved for all of these (upright, level, window) widths holds.
    pub fn bytes_for_widths(widths: impl Iterator<Item = [usize; 3]>) -> usize {
        let most = |(f, c): (usize, usize), (floats, columns)| (f.max(floats), c.max(columns));
        let (floats, columns) = widths.map(|[u, l, w]| Self::lengths(u, l, w)).fold((0, 0), most);
        3 * floats * size_of::<f32>() + columns * COLUMN_BYTES
    }

    /// (values of a row buffer, columns with taps)
    fn lengths(upright_width: usize, level_width: usize, window_width: usize) -> (usize, usize) {
        let columns = window_width.min(level_width);
        let axis = Axis::new(upright_width, level_width.max(1));
        (row_floats(axis.most_span(columns)), columns)
    }
}

/// Writes rows `rows` of window `window` of the level that shows the view's whole upright region at
/// `level` pixels. Row `rows.start` goes to the first row of `dst`.
///
/// A value is `(pixel - mean) * scale` (see [`Normalization`]) where the window lies in the level,
/// and 0.0 beyond its right and bottom border. The result does not depend on how a level is cut into
/// windows or a window into row ranges, so threads may fill ranges of rows, each with its own
/// `scratch`. Nothing is allocated where `scratch` was reserved for this width.
///
/// Errors: [`Error::InvalidArgument`] for rows outside the window, an overflowing window or wrong
/// strides; [`Error::BufferTooSmall`] (in floats) for a short destination; a level of size 0 or above
/// the caps is refused as a picture would be.
pub fn fill(
    view: &ImageView<'_>,
    level: Size,
    window: Rect,
    rows: Range<usize>,
    norm: &Normalization,
    dst: &mut DstRows<'_>,
    scratch: &mut Scratch,
) -> Result<()> {
    level.check("level")?;
    let end_x = window.x.checked_add(window.width);
    let (Some(end_x), Some(_)) = (end_x, window.y.checked_add(window.height)) else {
        return Err(Error::InvalidArgument(format!("window {window:?} overflows")));
    };
    if rows.start > rows.end || rows.end > window.height {
        return Err(Error::InvalidArgument(format!("rows {rows:?} of a window of {} rows", window.height)));
    }
    if rows.is_empty() || window.width == 0 {
        return Ok(());
    }
    dst.check(window.width, rows.len())?;

    let columns = window.x.min(level.width)..end_x.min(level.width);
    let level_y = |row: usize| Some(window.y + row).filter(|&y| y < level.height && !columns.is_empty());
    let mut pass = level_y(rows.start).map(|_| Pass::new(view, level, columns.clone(), norm, scratch));
    let (pixel_stride, row_stride) = (dst.pixel_stride, dst.row_stride);
    let row_floats = pixel_stride * (window.width - 1) + 3;
    for (nth, row) in rows.enumerate() {
        let out = &mut dst.data[nth * row_stride..][..row_floats];
        let mut filled = 0;
        if let (Some(y), Some(pass)) = (level_y(row), pass.as_mut()) {
            pass.row(y, out, pixel_stride);
            filled = columns.len();
        }
        for pixel in out.chunks_mut(pixel_stride).skip(filled) {
            pixel[..3].fill(0.0);
        }
    }
    Ok(())
}

/// The state of one [`fill`] over the columns that lie in the level.
struct Pass<'a> {
    reader: RowReader<'a>,
    normalizer: Normalizer,
    x: Axis,
    y: Axis,
    /// Upright columns behind the window: what row buffers hold.
    span: Range<usize>,
    cache: RowCache<'a>,
    sum: &'a mut [f32],
    columns: Columns<'a>,
    /// Weight of the pixels between a column's first and its last.
    body: f32,
}

impl<'a> Pass<'a> {
    fn new(
        view: &'a ImageView<'a>,
        level: Size,
        columns: Range<usize>,
        norm: &Normalization,
        scratch: &'a mut Scratch,
    ) -> Self {
        let upright = view.upright_size();
        let x = Axis::new(upright.width, level.width);
        let y = Axis::new(upright.height, level.height);
        scratch.reserve(upright.width, level.width, columns.len());
        let reader = RowReader::new(view, norm.order);
        let normalizer = Normalizer::new(norm, reader.order());
        let span = x.span(columns.clone());
        let floats = row_floats(span.len());
        let Scratch { rows: [a, b], sum, columns: buffers } = scratch;
        let mut body = 0.0;
        let n = if x.is_identity() { 0 } else { columns.len() };
        for (to, i) in columns.take(n).enumerate() {
            let t = x.taps(i);
            let first = t.first - span.start as u32;
            (buffers.first[to], buffers.last[to]) = (3 * first, 3 * (first + t.len - 1));
            (buffers.head[to], buffers.tail[to]) = (t.head, t.tail);
            body = t.body; // of every column the same
        }
        let ColumnBuffers { first, last, head, tail } = buffers;
        let columns = Columns::new(&first[..n], &last[..n], &head[..n], &tail[..n]);
        let cache = RowCache { rows: [&mut a[..floats], &mut b[..floats]], held: [None; 2], last: 0 };
        Self { reader, normalizer, x, y, span, cache, sum: &mut sum[..floats], columns, body }
    }

    /// Level row `y` into `out`.
    fn row(&mut self, y: usize, out: &mut [f32], pixel_stride: usize) {
        let taps = self.y.taps(y);
        let first = taps.first as usize;
        let values = 3 * self.span.len();
        if taps.len == 1 && self.x.is_identity() {
            // No arithmetic between picture and normalisation.
            match self.reader.bytes(first, &self.span) {
                Some(bytes) => self.normalizer.row(bytes, out, pixel_stride),
                None => {
                    let row = self.cache.get(&self.reader, first, &self.span);
                    self.normalizer.row(&row[..values], out, pixel_stride);
                }
            }
            return;
        }
        let row: &[f32] = if taps.len == 1 && !self.reader.holds_rows_of_bytes() {
            self.cache.get(&self.reader, first, &self.span)
        } else {
            self.combine(&taps);
            self.sum
        };
        let normalizer = &self.normalizer;
        if self.x.is_identity() {
            normalizer.row(&row[..values], out, pixel_stride);
        } else if pixel_stride == 3 && !self.x.averages() {
            normalizer.kernels().columns(row, &self.columns, out, normalizer.constants());
        } else {
            columns(row, &self.columns, self.body, normalizer, out, pixel_stride);
        }
    }

    /// Weighted sum of the upright rows of `taps` into `sum`, by pairs, an odd one first.
    fn combine(&mut self, taps: &Taps) {
        let Self { reader, cache, span, sum, normalizer, .. } = self;
        let kernels = normalizer.kernels();
        let sum = &mut sum[..3 * span.len()];
        let weight = |k: u32| match k {
            0 => taps.head,
            k if k + 1 == taps.len => taps.tail,
            _ => taps.body,
        };
        let mut k = 0;
        while k < taps.len {
            let y = (taps.first + k) as usize;
            if k == 0 && taps.len % 2 == 1 {
                match reader.bytes(y, span) {
                    Some(row) => kernels.weigh(sum, row, weight(k)),
                    None => kernels.weigh(sum, cache.get(reader, y, span), weight(k)),
                }
                k += 1;
                continue;
            }
            let weights = [weight(k), weight(k + 1)];
            match (reader.bytes(y, span), reader.bytes(y + 1, span)) {
                (Some(a), Some(b)) => kernels.weigh_pair(sum, [a, b], weights, k == 0),
                _ => {
                    kernels.weigh_pair(sum, cache.pair(reader, y, span), weights, k == 0);
                }
            }
            k += 2;
        }
    }
}

/// The two upright rows decoded last: neighbouring level rows share them.
struct RowCache<'a> {
    rows: [&'a mut [f32]; 2],
    held: [Option<usize>; 2],
    last: usize,
}

impl RowCache<'_> {
    /// Upright row `y`, columns `span`, three values a pixel and the spare one.
    fn get(&mut self, reader: &RowReader<'_>, y: usize, span: &Range<usize>) -> &[f32] {
        let slot = self.slot(reader, y, span);
        self.rows[slot]
    }

    /// Upright rows `y` and `y + 1`.
    fn pair(&mut self, reader: &RowReader<'_>, y: usize, span: &Range<usize>) -> [&[f32]; 2] {
        let a = self.slot(reader, y, span);
        let b = self.slot(reader, y + 1, span);
        [self.rows[a], self.rows[b]]
    }

    /// Where row `y` is held: never where the row asked for before it is.
    fn slot(&mut self, reader: &RowReader<'_>, y: usize, span: &Range<usize>) -> usize {
        let slot = match self.held.iter().position(|&h| h == Some(y)) {
            Some(slot) => slot,
            None => {
                let slot = 1 - self.last;
                reader.load(y, span.clone(), self.rows[slot]);
                self.held[slot] = Some(y);
                slot
            }
        };
        self.last = slot;
        slot
    }
}

/// Resamples a row along x and normalises it into `out`: any number of pixels a column, which weigh `body` between the
/// first and the last, and any distance between the columns.
fn columns(
    row: &[f32],
    columns: &Columns<'_>,
    body: f32,
    normalizer: &Normalizer,
    out: &mut [f32],
    pixel_stride: usize,
) {
    // Four lanes are read for every pixel, a vector; the fourth is the next pixel's or the spare value.
    let at = |place: usize| -> &[f32; 4] { array(row, place) };
    for (i, out) in out.chunks_mut(pixel_stride).take(columns.len()).enumerate() {
        let ([first, last], [head, tail]) = columns.at(i);
        let mut v = weighted(head, at(first));
        let mut middle = first + 3;
        while middle < last {
            v = sum(v, weighted(body, at(middle)));
            middle += 3;
        }
        // A single tap is taken twice, the second time with weight 0.
        let [a, b, c, _] = sum(v, weighted(tail, at(last)));
        out[..3].copy_from_slice(&normalizer.pixel([a, b, c]));
    }
}

#[inline(always)]
fn weighted(w: f32, v: &[f32; 4]) -> [f32; 4] {
    [w * v[0], w * v[1], w * v[2], w * v[3]]
}

#[inline(always)]
fn sum(a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
    [a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3]]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn taps_of_known_ratios() {
        let taps = |from, to, i| Axis::new(from, to).taps(i);
        let t = |first, len, head, body, tail| Taps { first, len, head, body, tail };
        assert_eq!(taps(10, 10, 7), t(7, 1, 1.0, 0.0, 0.0));
        // Twice as large: quarters, edges replicated.
        assert_eq!(taps(4, 8, 0), t(0, 1, 1.0, 0.0, 0.0));
        assert_eq!(taps(4, 8, 1), t(0, 2, 0.75, 0.0, 0.25));
        assert_eq!(taps(4, 8, 7), t(3, 1, 1.0, 0.0, 0.0));
        // Half: the mean of two. Two fifths: area of 2.5.
        assert_eq!(taps(8, 4, 1), t(2, 2, 0.5, 0.0, 0.5));
        assert_eq!(taps(5, 2, 0), t(0, 3, 0.4, 0.4, 0.2));
        assert_eq!(taps(5, 2, 1), t(2, 3, 0.2, 0.4, 0.4));
        assert_eq!(taps(9, 3, 1), t(3, 3, 1.0 / 3.0, 1.0 / 3.0, 1.0 / 3.0));
        assert_eq!(taps(1, 5, 3), t(0, 1, 1.0, 0.0, 0.0));
    }

    proptest! {
        #[test]
        fn taps_stay_inside_sum_to_1_and_fit_the_scratch(
            from in 1usize..1 << 24, to in 1usize..1 << 24, at in 0.0..1f64, n in 1usize..5000,
        ) {
            let axis = Axis::new(from, to);
            let n = n.min(to);
            let start = (at * (to - n) as f64) as usize;
            let span = axis.span(start..start + n);
            prop_assert!(span.end <= from && span.len() <= axis.most_span(n));
            for i in [start, start + n / 2, start + n - 1] {
                let t = axis.taps(i);
                prop_assert!(t.first as usize >= span.start && (t.first + t.len) as usize <= span.end);
                let between = f64::from(t.len.saturating_sub(2)) * f64::from(t.body);
                let sum = f64::from(t.head) + between + if t.len > 1 { f64::from(t.tail) } else { 0.0 };
                prop_assert!((sum - 1.0).abs() < 1e-6, "{t:?} sum {sum}");
                // The weighted position is the level pixel's centre, away from replicated edges.
                if !axis.averages() && t.len == 2 {
                    let x = f64::from(t.first) + f64::from(t.tail);
                    let want = (i as f64 + 0.5) * from as f64 / to as f64 - 0.5;
                    prop_assert!((x - want).abs() < 1e-3, "{x} {want}");
                }
            }
        }
    }
}
