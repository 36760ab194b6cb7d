//! Convolution as implicit matrix multiplication over channels-last maps.
//!
//! The window of an output pixel is a few runs of consecutive floats (taps): a row of the kernel
//! is one run where the input is dense and not dilated, else a kernel position is. A tile holds
//! MR pixels of one output row x one panel of NR registers of output channels in registers and walks all
//! taps; nothing is gathered or copied beforehand, since the input's halo holds the zeros.

use super::Vector;
use std::ops::Range;

/// What is added to a convolution's result, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Residual {
    /// Nothing.
    None,
    /// Added before the activation (ResNet).
    BeforeActivation,
    /// Added after the activation (top-down sums).
    AfterActivation,
}

/// One image's convolution. Pointers are to its first output pixel, its window and its residual.
pub(crate) struct ConvArgs<'a> {
    /// First float of the first pixel's window (in the halo where padded).
    pub input: *const f32,
    /// Floats between windows of consecutive output rows and pixels (stride counted).
    pub in_row: usize,
    pub in_pixel: usize,
    /// Offsets of the taps from the window's first float; each is a run of `run` floats.
    pub taps: &'a [usize],
    pub run: usize,
    /// Weights, panel after panel; in each `[tap][run][panel width]`.
    pub weights: *const f32,
    /// One a lane of every panel, zeros past the channels.
    pub bias: *const f32,
    pub output: *mut f32,
    pub out_row: usize,
    pub out_pixel: usize,
    /// Output pixels a row.
    pub width: usize,
    /// Output channels.
    pub channels: usize,
    /// Result = max(x, slope * x): 1 none, 0 ReLU, between leaky.
    pub slope: f32,
    pub residual: Residual,
    /// First value added; rows and pixels of it by the tables (nearest upsampling) or strides.
    pub add: *const f32,
    pub add_row: usize,
    pub add_pixel: usize,
    /// Source row of every output row and source column of every output column; empty = the same.
    pub add_rows: &'a [u32],
    pub add_columns: &'a [u32],
}

/// MR pixels x one panel.
pub(crate) struct Tile<'a> {
    input: *const f32,
    in_pixel: usize,
    taps: &'a [usize],
    run: usize,
    weights: *const f32,
    bias: *const f32,
    output: *mut f32,
    out_pixel: usize,
    /// Channels of the panel that exist.
    channels: usize,
    slope: f32,
    residual: Residual,
    /// Row of the residual at the panel's first channel.
    add: *const f32,
    add_pixel: usize,
    add_columns: *const u32,
    x: usize,
}

/// The tiles of one ISA.
pub(crate) trait Tiles {
    /// Tallest tile of two-register panels.
    const WIDE: usize;
    /// Tallest tile of one-register panels.
    const NARROW: usize;
    const LANES: usize;
    unsafe fn run(pixels: usize, wide: bool, t: &Tile);
}

/// Number of panels of `channels` output channels: two registers each, the last one where that does.
pub(crate) fn panels(channels: usize, lanes: usize) -> usize {
    channels.div_ceil(2 * lanes)
}

/// Registers of panel `p`: 2, or 1 where the rest fits one.
pub(crate) fn panel_registers(channels: usize, lanes: usize, p: usize) -> usize {
    if channels - p * 2 * lanes > lanes {
        2
    } else {
        1
    }
}

/// Computes output rows `rows` of panels `panels`.
///
/// # Safety
/// All pointers, strides and taps of `a` stay inside the caller's buffers for every pixel of the
/// rows asked for, and no other thread writes what is read here or touches what is written.
#[inline(always)]
pub(crate) unsafe fn block<T: Tiles>(a: &ConvArgs, rows: Range<usize>, panels: Range<usize>) {
    let lanes = T::LANES;
    let depth = a.taps.len() * a.run; // multiply-adds a value
    let tallest = if a.channels > lanes { T::WIDE } else { T::NARROW };
    // Tiles of a row differ by one pixel at most: 20 pixels are 10 + 10, not 14 + 6.
    let tiles = a.width.div_ceil(tallest);
    let (short, longer) = (a.width / tiles, a.width % tiles);
    for y in rows {
        let mut x = 0;
        for i in 0..tiles {
            let pixels = short + usize::from(i < longer);
            for p in panels.clone() {
                let first = p * 2 * lanes;
                let wide = panel_registers(a.channels, lanes, p) == 2;
                let add_y = a.add_rows.get(y).map_or(y, |&r| r as usize);
                let columns =
                    if a.add_columns.is_empty() { std::ptr::null() } else { a.add_columns.as_ptr() };
                // SAFETY: the caller's contract, for this pixel range and panel. The residual
                // pointer is formed without arithmetic claims (it may be null).
                unsafe {
                    let t = Tile {
                        input: a.input.add(y * a.in_row + x * a.in_pixel),
                        in_pixel: a.in_pixel,
                        taps: a.taps,
                        run: a.run,
                        weights: a.weights.add(first * depth),
                        bias: a.bias.add(first),
                        output: a.output.add(y * a.out_row + x * a.out_pixel + first),
                        out_pixel: a.out_pixel,
                        channels: (a.channels - first).min(2 * lanes),
                        slope: a.slope,
                        residual: a.residual,
                        add: a.add.wrapping_add(add_y * a.add_row + first),
                        add_pixel: a.add_pixel,
                        add_columns: columns,
                        x,
                    };
                    T::run(pixels, wide, &t);
                }
            }
            x += pixels;
        }
    }
}

/// Repeats `$body` with `$m` = 0, 1, ... below `$count` (at most 14) as straight code: accumulators
/// must be indexed by constants to stay in registers, and loops over them are not always unrolled.
macro_rules! unroll {
    ($m:ident < $count:expr, $body:block) => {
        unroll!(@ $m, $count, $body, 0 1 2 3 4 5 6 7 8 9 10 11 12 13)
    };
    (@ $m:ident, $count:expr, $body:block, $($i:literal)+) => {
        $(if $i < $count {
            let $m = $i;
            $body
        })+
    };
}

#[cfg(feature = "train")]
pub(crate) use unroll;

/// MR pixels x NR registers of channels, all taps, then bias, residual, activation, store.
#[inline(always)]
pub(crate) unsafe fn tile<V: Vector, const MR: usize, const NR: usize>(t: &Tile) {
    // SAFETY: the contract of `block`, which made the tile.
    unsafe {
        let lanes = V::LANES;
        let mut acc = [[V::splat(0.0); NR]; MR];
        for r in 0..NR {
            let bias = V::load(t.bias.add(r * lanes));
            unroll!(m < MR, { acc[m][r] = bias });
        }
        // Every third pixel has a pointer, its two neighbours are reached by the index register: more
        // pointers than that would be spilled and reloaded for every value.
        let stride = t.in_pixel;
        let mut w = t.weights;
        for &tap in t.taps {
            let a = t.input.add(tap);
            let mut p = [a; 5];
            for (i, p) in p.iter_mut().enumerate() {
                *p = a.wrapping_add(3 * i * stride);
            }
            for _ in 0..t.run {
                let mut wk = [V::splat(0.0); NR];
                for (r, wk) in wk.iter_mut().enumerate() {
                    *wk = V::load(w.add(r * lanes));
                }
                w = w.add(NR * lanes);
                unroll!(m < MR, {
                    let v = V::splat(*p[m / 3].add(m % 3 * stride));
                    for r in 0..NR {
                        acc[m][r] = acc[m][r].mul_add(v, wk[r]);
                    }
                });
                for p in p.iter_mut() {
                    *p = p.wrapping_add(1);
                }
            }
        }
        let slope = V::splat(t.slope);
        if t.residual == Residual::None && t.channels >= NR * lanes {
            unroll!(m < MR, {
                let out = t.output.add(m * t.out_pixel);
                for r in 0..NR {
                    activate(acc[m][r], slope).store(out.add(r * lanes));
                }
            });
            return;
        }
        unroll!(m < MR, { finish::<V, NR>(t, m, acc[m], slope) });
    }
}

/// Residual, activation and partial store of pixel `m`.
#[inline(always)]
unsafe fn finish<V: Vector, const NR: usize>(t: &Tile, m: usize, acc: [V; NR], slope: V) {
    // SAFETY: the contract of `block`.
    unsafe {
        let lanes = V::LANES;
        let out = t.output.add(m * t.out_pixel);
        let column = if t.add_columns.is_null() { t.x + m } else { *t.add_columns.add(t.x + m) as usize };
        let add = t.add.wrapping_add(column * t.add_pixel);
        for r in 0..NR {
            let n = t.channels.saturating_sub(r * lanes);
            let v = match t.residual {
                Residual::None => activate(acc[r], slope),
                Residual::BeforeActivation => {
                    activate(acc[r].add(V::load_upto(add.wrapping_add(r * lanes), n)), slope)
                }
                Residual::AfterActivation => {
                    activate(acc[r], slope).add(V::load_upto(add.wrapping_add(r * lanes), n))
                }
            };
            v.store_upto(out.wrapping_add(r * lanes), n);
        }
    }
}

/// max(slope * x, x): identity at slope 1, ReLU at 0, leaky between.
#[inline(always)]
pub(crate) unsafe fn activate<V: Vector>(x: V, slope: V) -> V {
    // SAFETY: register arithmetic only; the caller is compiled for V's ISA.
    unsafe { x.mul(slope).max(x) }
}
