//! Convolution as implicit matrix multiplication over channels-last maps.
//!
//! The window of an output pixel is a few runs of consecutive values (taps): a row of the kernel
//! is one run where the input is dense and not dilated, else a kernel position is. A tile holds
//! MR pixels of one output row x one panel of NR registers of output channels in registers and walks all
//! taps; nothing is gathered or copied beforehand, since the input's halo holds the zeros.

use super::epilogue::{activate, residual, Destination, Residual, Rule, StoreRun, LINE};
use super::Vector;
use crate::cpu::arena::Storage;
use std::mem::MaybeUninit;
use std::ops::Range;

/// One image's convolution. Pointers are to its first output pixel, its window and its residual; all strides are bytes.
pub(crate) struct ConvArgs<'a> {
    /// First byte of the first pixel's window (in the halo where padded).
    pub input: *const u8,
    /// Between windows of consecutive output rows and pixels (stride counted).
    pub in_row: usize,
    pub in_pixel: usize,
    /// Offsets of the taps from the window's first byte; each is a run of `run` words of four bytes: one f32, two bf16
    /// or f16, or four u8.
    pub taps: &'a [usize],
    pub run: usize,
    /// The input may be in memory that is far away: it is asked for ahead.
    pub far: bool,
    /// Weights, panel after panel; in each `[tap][run][panel width]` words like the input's, of i8 where that is u8.
    pub weights: *const u32,
    /// What the sums start with, one a lane of every panel: f32, or i32 where the input is u8.
    pub start: *const u32,
    /// By what a whole sum is multiplied and what is added then, one a lane; of u8 alone.
    pub scale: *const f32,
    pub bias: *const f32,
    pub output: *mut u8,
    pub out_row: usize,
    pub out_pixel: usize,
    /// Output pixels a row.
    pub width: usize,
    /// Output channels.
    pub channels: usize,
    pub rule: Rule,
    /// First value added; rows and pixels of it by the tables (nearest upsampling) or strides.
    pub add: *const u8,
    pub add_row: usize,
    pub add_pixel: usize,
    /// Source row of every output row and source column of every output column; empty = the same.
    pub add_rows: &'a [u32],
    pub add_columns: &'a [u32],
}

impl<'a> ConvArgs<'a> {
    /// Where the sums go of the pixels from column `x` of row `y` on and of `width` lanes from channel `first` on.
    #[inline(always)]
    pub fn destination(&self, (y, x): (usize, usize), first: usize, width: usize) -> Destination<'_> {
        let at = |storage: Storage| first * storage.bytes();
        let add_y = self.add_rows.get(y).map_or(y, |&r| r as usize);
        Destination {
            output: self.output.wrapping_add(y * self.out_row + x * self.out_pixel + at(self.rule.output)),
            out_pixel: self.out_pixel,
            channels: (self.channels - first).min(width),
            rule: &self.rule,
            // It may be null: no claims.
            add: self.add.wrapping_add(add_y * self.add_row + at(self.rule.add)),
            add_pixel: self.add_pixel,
            add_columns: if self.add_columns.is_empty() {
                std::ptr::null()
            } else {
                self.add_columns.as_ptr()
            },
            x,
        }
    }

    /// A matrix product of f32: `pixels` rows of `run` values, `in_pixel` apart, by packed weights to `channels` sums each,
    /// `out_pixel` apart. `start` has one value a lane.
    pub fn product(
        (input, in_pixel, run): (*const f32, usize, usize),
        weights: *const f32,
        start: *const f32,
        (output, out_pixel, channels): (*mut f32, usize, usize),
        pixels: usize,
    ) -> Self {
        Self {
            input: input.cast(),
            in_row: 0,
            in_pixel: in_pixel * size_of::<f32>(),
            taps: &[0],
            run,
            far: false,
            weights: weights.cast(),
            start: start.cast(),
            scale: std::ptr::null(),
            bias: std::ptr::null(),
            output: output.cast(),
            out_row: 0,
            out_pixel: out_pixel * size_of::<f32>(),
            width: pixels,
            channels,
            rule: Rule::PLAIN,
            add: std::ptr::null(),
            add_row: 0,
            add_pixel: 0,
            add_rows: &[],
            add_columns: &[],
        }
    }
}

/// `count` times MR pixels, side by side, x one panel.
pub(crate) struct Tile<'a> {
    count: usize,
    input: *const u8,
    in_pixel: usize,
    taps: &'a [usize],
    run: usize,
    weights: *const u32,
    start: *const u32,
    scale: *const f32,
    bias: *const f32,
    to: Destination<'a>,
    /// Bytes from a pixel of the input to the one at the same place of the tile that comes next, to be asked for; 0 for none.
    ahead: usize,
    /// [`store`], compiled for the ISA.
    store: StoreRun,
}

/// What a convolution multiplies: four bytes of input by four of weights, into one sum a lane.
pub(crate) trait Product {
    /// Registers of finished sums.
    type Values: Vector;
    /// A register of words: plain bits.
    type Words: Copy;
    /// A register of sums: plain bits too.
    type Sums: Copy;
    /// Whether input and sums are f32: those go straight to the output.
    const SINGLE: bool = false;
    /// What is taken off every u8 of the input before it is multiplied.
    const OFFSET: i32 = 0;
    /// Whether the products of two neighbouring u8 are added in 16 bits.
    const PAIRS: bool = false;
    /// Words after which sums are flushed, counted over the whole depth so that it depends on nothing but the weights; 0 for never.
    const RUN: usize = 0;
    /// The word at `p` in every lane.
    unsafe fn splat(p: *const u8) -> Self::Words;
    /// Sums that start with the words at `p`.
    #[inline(always)]
    unsafe fn start(p: *const u32) -> Self::Sums {
        // SAFETY: the caller vouches for a register's words.
        unsafe { p.cast::<Self::Sums>().read_unaligned() }
    }
    /// The words at `p`.
    #[inline(always)]
    unsafe fn load(p: *const u32) -> Self::Words {
        // SAFETY: the caller vouches for a register's words.
        unsafe { p.cast::<Self::Words>().read_unaligned() }
    }
    /// `sums + input * weights`.
    unsafe fn multiply(sums: Self::Sums, input: Self::Words, weights: Self::Words) -> Self::Sums;
    /// Sums of few bits added to those in f32 that they are parts of, and zeros in their place.
    #[inline(always)]
    unsafe fn flush(sums: Self::Sums) -> Self::Sums {
        sums
    }
    /// As f32; where they are whole numbers, times those at `scale`, plus those at `bias`.
    unsafe fn finish(sums: Self::Sums, scale: *const f32, bias: *const f32) -> Self::Values;
}

/// f32 in the lanes of `V`.
pub(crate) struct Single<V>(V);

impl<V: Vector> Product for Single<V> {
    const SINGLE: bool = true;
    type Values = V;
    type Words = V;
    type Sums = V;
    #[inline(always)]
    unsafe fn start(p: *const u32) -> V {
        // SAFETY: the caller vouches for a register's words.
        unsafe { V::load(p.cast()) }
    }
    #[inline(always)]
    unsafe fn splat(p: *const u8) -> V {
        // SAFETY: the caller vouches for a word; f32 lie at multiples of four.
        unsafe { V::splat(*p.cast::<f32>()) }
    }
    #[inline(always)]
    unsafe fn load(p: *const u32) -> V {
        // SAFETY: the caller vouches for a register's words.
        unsafe { V::load(p.cast()) }
    }
    #[inline(always)]
    unsafe fn multiply(sums: V, input: V, weights: V) -> V {
        // SAFETY: register arithmetic only; the caller is compiled for V's ISA.
        unsafe { sums.mul_add(input, weights) }
    }
    #[inline(always)]
    unsafe fn finish(sums: V, _: *const f32, _: *const f32) -> V {
        sums
    }
}

/// Words of two f16 whose products an f16 takes, first halves and second halves in sums of their own.
#[allow(dead_code)] // where nothing multiplies f16
pub(crate) const F16_RUN: usize = 32;

/// The tiles of one ISA.
pub(crate) trait Tiles {
    /// Tallest tile of two-register panels.
    const WIDE: usize;
    /// Tallest tile of one-register panels.
    const NARROW: usize;
    /// A taller one of these, for rows that have as many pixels; 0 for none.
    const TALL: usize;
    const LANES: usize;
    const STORE: StoreRun;
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
    let narrow = a.channels <= lanes;
    let tallest = if narrow { T::NARROW } else { T::WIDE };
    let tall = if narrow { a.width.checked_div(T::TALL).unwrap_or(0) } else { 0 };
    // The other tiles of a row differ by one pixel at most: 20 pixels are 10 + 10, not 14 + 6.
    let rest = a.width - tall * T::TALL;
    let tiles = rest.div_ceil(tallest);
    let (short, longer) = (rest.checked_div(tiles).unwrap_or(0), rest.checked_rem(tiles).unwrap_or(0));
    let tiles = tall + tiles;
    // Windows of one run: the next tile's are other lines, far apart, which the CPU does not foresee. The first panel asks for them.
    let single = a.taps.len() == 1 && a.far;
    for y in rows {
        let (mut x, mut i) = (0, 0);
        while i < tiles {
            // Tiles of one height from here on.
            let (pixels, count) = match () {
                _ if i < tall => (T::TALL, tall - i),
                _ if i < tall + longer => (short + 1, tall + longer - i),
                _ => (short, tiles - i),
            };
            // Where there are several panels a tile's input is read by all of them before the next one's.
            let count = if panels.len() > 1 { 1 } else { count };
            // Of a row's last tiles all ask for the pixels to the right: behind the row the next one is not far.
            let ahead = match () {
                _ if !single => 0,
                _ if i + 1 < tiles => pixels * a.in_pixel,
                _ => a.in_row.wrapping_sub(x * a.in_pixel),
            };
            for p in panels.clone() {
                let first = p * 2 * lanes;
                let wide = panel_registers(a.channels, lanes, p) == 2;
                // SAFETY: the caller's contract, for this pixel range and panel.
                unsafe {
                    let t = Tile {
                        count,
                        input: a.input.add(y * a.in_row + x * a.in_pixel),
                        in_pixel: a.in_pixel,
                        taps: a.taps,
                        run: a.run,
                        weights: a.weights.add(first * depth),
                        start: a.start.add(first),
                        // These may be null: no claims.
                        scale: a.scale.wrapping_add(first),
                        bias: a.bias.wrapping_add(first),
                        to: a.destination((y, x), first, 2 * lanes),
                        ahead: if p == panels.start { ahead } else { 0 },
                        store: T::STORE,
                    };
                    T::run(pixels, wide, &t);
                }
            }
            x += pixels * count;
            i += count;
        }
    }
}

/// Repeats `$body` with `$m` = 0, 1, ... below `$count` (at most 28) as straight code: accumulators
/// must be indexed by constants to stay in registers, and loops over them are not always unrolled.
macro_rules! unroll {
    ($m:ident < $count:expr, $body:block) => {
        unroll!(@ $m, $count, $body, 0 1 2 3 4 5 6 7 8 9 10 11 12 13
            14 15 16 17 18 19 20 21 22 23 24 25 26 27)
    };
    (@ $m:ident, $count:expr, $body:block, $($i:literal)+) => {
        $(if $i < $count {
            let $m = $i;
            $body
        })+
    };
}

pub(crate) use unroll;

/// MR pixels x NR registers of channels, all taps, then residual, activation, store; then the pixels beside them.
#[inline(always)]
pub(crate) unsafe fn tile<P: Product, const MR: usize, const NR: usize>(t: &Tile) {
    let (mut input, mut to) = (t.input, t.to);
    for _ in 0..t.count {
        // SAFETY: the contract of `block`, which made the tile.
        unsafe {
            pixels::<P, MR, NR>(t, input, &to);
            input = input.wrapping_add(MR * t.in_pixel);
            to.advance(MR);
        }
    }
}

/// MR pixels of a tile.
#[inline(always)]
unsafe fn pixels<P: Product, const MR: usize, const NR: usize>(t: &Tile, input: *const u8, to: &Destination) {
    // SAFETY: the contract of `block`, which made the tile.
    unsafe {
        let lanes = P::Values::LANES;
        let mut sums = [[P::start(t.start); NR]; MR];
        for r in 1..NR {
            let start = P::start(t.start.add(r * lanes));
            unroll!(m < MR, { sums[m][r] = start });
        }
        // Every third pixel has a pointer, its two neighbours are reached by the index register: more
        // pointers than that would be spilled and reloaded for every value. In a tall tile every fifth.
        let each = if MR > 14 { 5 } else { 3 };
        let stride = t.in_pixel;
        let mut w = t.weights;
        let mut unflushed = 0;
        if to.rule.residual != Residual::None {
            unroll!(m < MR, { P::Values::prefetch(residual(to, m)) });
            if NR * lanes * to.rule.add.bytes() > LINE {
                unroll!(m < MR, { P::Values::prefetch(residual(to, m).wrapping_add(LINE)) });
            }
        }
        for &tap in t.taps {
            let a = input.add(tap);
            let mut p = [a; 6];
            for (i, p) in p.iter_mut().enumerate() {
                *p = a.wrapping_add(each * i * stride);
            }
            let mut left = t.run;
            while left > 0 {
                if t.ahead != 0 {
                    unroll!(m < MR, {
                        P::Values::prefetch(p[m / each].wrapping_add(m % each * stride).wrapping_add(t.ahead))
                    });
                }
                let mut line = left.min(LINE / 4);
                if P::RUN > 0 {
                    line = line.min(P::RUN - unflushed);
                    unflushed += line;
                }
                left -= line;
                for _ in 0..line {
                    let mut wk = [P::load(w); NR];
                    for (r, wk) in wk.iter_mut().enumerate() {
                        *wk = P::load(w.add(r * lanes));
                    }
                    w = w.add(NR * lanes);
                    unroll!(m < MR, {
                        let v = P::splat(p[m / each].add(m % each * stride));
                        for r in 0..NR {
                            sums[m][r] = P::multiply(sums[m][r], v, wk[r]);
                        }
                    });
                    for p in p.iter_mut() {
                        *p = p.wrapping_add(4);
                    }
                }
                if P::RUN > 0 && unflushed == P::RUN {
                    unflushed = 0;
                    unroll!(m < MR, {
                        for r in 0..NR {
                            sums[m][r] = P::flush(sums[m][r]);
                        }
                    });
                }
            }
        }
        let plain = to.rule.residual == Residual::None && to.rule.output == Storage::F32;
        if P::SINGLE && plain && to.registers(lanes) >= NR {
            let slope = P::Values::splat(to.rule.slope);
            unroll!(m < MR, {
                let out = to.output.add(m * to.out_pixel).cast::<f32>();
                for r in 0..NR {
                    activate(finish::<P>(t, sums[m][r], r), slope).store(out.add(r * lanes));
                }
            });
            return;
        }
        // Where lanes are many, a register of them is often not full.
        if P::SINGLE && plain && NR == 1 && lanes >= 8 {
            let slope = P::Values::splat(to.rule.slope);
            unroll!(m < MR, {
                let out = to.output.add(m * to.out_pixel).cast::<f32>();
                activate(finish::<P>(t, sums[m][0], 0), slope).store_first(out, to.channels);
            });
            return;
        }
        // By way of the first-level cache, so that what becomes of the values is compiled once and not for every tile.
        let mut values = [MaybeUninit::<f32>::uninit(); MOST_VALUES];
        let first = values.as_mut_ptr().cast::<f32>();
        unroll!(m < MR, {
            for r in 0..NR {
                finish::<P>(t, sums[m][r], r).store(first.add((m * NR + r) * lanes));
            }
        });
        (t.store)(to, first, MR, NR);
    }
}

/// Values of the largest tile.
const MOST_VALUES: usize = 14 * 2 * 16;

/// Register `r` of a tile's sums in f32.
#[inline(always)]
unsafe fn finish<P: Product>(t: &Tile, sums: P::Sums, r: usize) -> P::Values {
    let at = r * P::Values::LANES;
    // SAFETY: the contract of `block`.
    unsafe { P::finish(sums, t.scale.wrapping_add(at), t.bias.wrapping_add(at)) }
}
