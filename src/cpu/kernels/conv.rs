//! Convolution as implicit matrix multiplication over channels-last maps.
//!
//! The window of an output pixel is a few runs of consecutive values (taps): a row of the kernel
//! is one run where the input is dense and not dilated, else a kernel position is. A tile holds
//! MR pixels of one output row x one panel of NR registers of output channels in registers and walks all
//! taps; nothing is gathered or copied beforehand, since the input's halo holds the zeros.

use super::Vector;
use crate::cpu::arena::{Format, Storage};
use std::mem::MaybeUninit;
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

/// What becomes of a convolution's sums before they are stored, all values in units of the output's.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rule {
    /// Result = max(x, slope * x): 1 none, 0 ReLU, between leaky.
    pub slope: f32,
    pub residual: Residual,
    /// How the residual is stored; `(v - add_zero) * add_scale` is added.
    pub add: Storage,
    pub add_scale: f32,
    pub add_zero: f32,
    /// How the output is stored; of u8, what stands for zero.
    pub output: Storage,
    pub zero: f32,
}

/// What a convolution's step reads and writes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Formats {
    pub input: Format,
    /// Of the residual, where there is one.
    pub add: Format,
    pub output: Format,
}

impl Rule {
    /// The rule for sums in units of the output.
    pub fn new(slope: f32, residual: Residual, formats: &Formats) -> Self {
        let Formats { add, output, .. } = formats;
        Self {
            slope,
            residual,
            add: add.storage,
            add_scale: add.scale / output.scale,
            add_zero: add.zero.into(),
            output: output.storage,
            zero: output.zero.into(),
        }
    }

    /// The same without a residual, where there `is_none`.
    pub fn unless(self, is_none: bool) -> Self {
        Self { residual: if is_none { Residual::None } else { self.residual }, ..self }
    }

    /// Sums as they are, in f32.
    pub const PLAIN: Self = Self {
        slope: 1.0,
        residual: Residual::None,
        add: Storage::F32,
        add_scale: 1.0,
        add_zero: 0.0,
        output: Storage::F32,
        zero: 0.0,
    };

    /// Activates `v`, adds the residual at `add` where there is one, and stores the first `n <= LANES` lanes at `to`.
    ///
    /// # Safety
    /// So many values are at `add` (where there is a residual), and there is room for them at `to`.
    #[inline(always)]
    pub unsafe fn finish<V: Vector>(&self, v: V, add: *const u8, to: *mut u8, n: usize) {
        // SAFETY: the caller's contract.
        unsafe {
            let slope = V::splat(self.slope);
            let v = match self.residual {
                Residual::None => activate(v, slope),
                Residual::BeforeActivation => activate(v.add(self.residual::<V>(add, n)), slope),
                Residual::AfterActivation => activate(v, slope).add(self.residual::<V>(add, n)),
            };
            match self.output {
                Storage::U8 => v.add(V::splat(self.zero)).store_u8(to, n),
                other => v.store_as(other, to, n),
            }
        }
    }

    #[inline(always)]
    unsafe fn residual<V: Vector>(&self, add: *const u8, n: usize) -> V {
        // SAFETY: the contract of `finish`.
        unsafe {
            let v = V::load_as(self.add, add, n);
            if (self.add_scale, self.add_zero) == (1.0, 0.0) {
                return v;
            }
            v.add(V::splat(-self.add_zero)).mul(V::splat(self.add_scale))
        }
    }
}

/// One image's convolution. Pointers are to its first output pixel, its window and its residual; all strides are bytes.
pub(crate) struct ConvArgs<'a> {
    /// First byte of the first pixel's window (in the halo where padded).
    pub input: *const u8,
    /// Between windows of consecutive output rows and pixels (stride counted).
    pub in_row: usize,
    pub in_pixel: usize,
    /// Offsets of the taps from the window's first byte; each is a run of `run` words of four bytes: one f32, two bf16
    /// or four u8.
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

/// Where the sums of some pixels of one row and one panel go, and by way of what.
pub(crate) struct Target<'a> {
    output: *mut u8,
    out_pixel: usize,
    /// Channels of the panel that exist.
    channels: usize,
    pub rule: &'a Rule,
    /// Row of the residual at the panel's first channel.
    add: *const u8,
    add_pixel: usize,
    add_columns: *const u32,
    x: usize,
}

impl<'a> Target<'a> {
    /// For the pixels from column `x` of row `y` on and the panel of `width` lanes that begins with channel `first`.
    #[inline(always)]
    pub fn new(a: &'a ConvArgs, (y, x): (usize, usize), first: usize, width: usize) -> Self {
        let at = |storage: Storage| first * storage.bytes();
        let add_y = a.add_rows.get(y).map_or(y, |&r| r as usize);
        Self {
            // No claims: the residual's pointer may be null.
            output: a.output.wrapping_add(y * a.out_row + x * a.out_pixel + at(a.rule.output)),
            out_pixel: a.out_pixel,
            channels: (a.channels - first).min(width),
            rule: &a.rule,
            add: a.add.wrapping_add(add_y * a.add_row + at(a.rule.add)),
            add_pixel: a.add_pixel,
            add_columns: if a.add_columns.is_empty() { std::ptr::null() } else { a.add_columns.as_ptr() },
            x,
        }
    }

    /// Registers of so many lanes all of which are channels.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    pub fn registers(&self, lanes: usize) -> usize {
        self.channels / lanes
    }

    /// Where pixel `m` of the residual, if there is one, and of the output are.
    ///
    /// # Safety
    /// The output has that pixel.
    #[inline(always)]
    pub unsafe fn pixel(&self, m: usize) -> (*const u8, *mut u8) {
        // SAFETY: the caller's contract.
        unsafe { (residual(self, m), self.output.add(m * self.out_pixel)) }
    }

    /// Asks for the lines of some pixels and so many lanes of residual and output, ahead of their use.
    ///
    /// # Safety
    /// The output has these pixels; the caller is compiled for V's ISA.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    pub unsafe fn ask<V: Vector>(&self, pixels: Range<usize>, lanes: usize) {
        // SAFETY: prefetches may point anywhere; residual columns as in `pixel`.
        unsafe {
            for m in pixels {
                ask::<V>(self.output.wrapping_add(m * self.out_pixel), lanes * self.rule.output.bytes());
                if self.rule.residual != Residual::None {
                    ask::<V>(residual(self, m), lanes * self.rule.add.bytes());
                }
            }
        }
    }
}

/// MR pixels x one panel.
pub(crate) struct Tile<'a> {
    input: *const u8,
    in_pixel: usize,
    taps: &'a [usize],
    run: usize,
    weights: *const u32,
    start: *const u32,
    scale: *const f32,
    bias: *const f32,
    to: Target<'a>,
    /// Bytes from a pixel of the input to the one at the same place of the tile that comes next, to be asked for; 0 for none.
    ahead: usize,
    /// [`store`], compiled for the ISA.
    store: StoreRun,
}

/// What becomes of a tile's values: so many pixels of so many registers.
pub(crate) type StoreRun = unsafe fn(&Target, values: *const f32, pixels: usize, registers: usize);

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

/// The tiles of one ISA.
pub(crate) trait Tiles {
    /// Tallest tile of two-register panels.
    const WIDE: usize;
    /// Tallest tile of one-register panels.
    const NARROW: usize;
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
    let tallest = if a.channels > lanes { T::WIDE } else { T::NARROW };
    // Tiles of a row differ by one pixel at most: 20 pixels are 10 + 10, not 14 + 6.
    let tiles = a.width.div_ceil(tallest);
    let (short, longer) = (a.width / tiles, a.width % tiles);
    // Windows of one run: the next tile's are other lines, far apart, which the CPU does not foresee. The first panel asks for them.
    let single = a.taps.len() == 1 && a.far;
    for y in rows {
        let mut x = 0;
        for i in 0..tiles {
            let pixels = short + usize::from(i < longer);
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
                        input: a.input.add(y * a.in_row + x * a.in_pixel),
                        in_pixel: a.in_pixel,
                        taps: a.taps,
                        run: a.run,
                        weights: a.weights.add(first * depth),
                        start: a.start.add(first),
                        // These may be null: no claims.
                        scale: a.scale.wrapping_add(first),
                        bias: a.bias.wrapping_add(first),
                        to: Target::new(a, (y, x), first, 2 * lanes),
                        ahead: if p == panels.start { ahead } else { 0 },
                        store: T::STORE,
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

pub(crate) use unroll;

/// MR pixels x NR registers of channels, all taps, then residual, activation, store.
#[inline(always)]
pub(crate) unsafe fn tile<P: Product, const MR: usize, const NR: usize>(t: &Tile) {
    // SAFETY: the contract of `block`, which made the tile.
    unsafe {
        let lanes = P::Values::LANES;
        let mut sums = [[P::start(t.start); NR]; MR];
        for r in 1..NR {
            let start = P::start(t.start.add(r * lanes));
            unroll!(m < MR, { sums[m][r] = start });
        }
        // Every third pixel has a pointer, its two neighbours are reached by the index register: more
        // pointers than that would be spilled and reloaded for every value.
        let stride = t.in_pixel;
        let mut w = t.weights;
        if t.to.rule.residual != Residual::None {
            unroll!(m < MR, { P::Values::prefetch(residual(&t.to, m)) });
            if NR * lanes * t.to.rule.add.bytes() > LINE {
                unroll!(m < MR, { P::Values::prefetch(residual(&t.to, m).wrapping_add(LINE)) });
            }
        }
        for &tap in t.taps {
            let a = t.input.add(tap);
            let mut p = [a; 5];
            for (i, p) in p.iter_mut().enumerate() {
                *p = a.wrapping_add(3 * i * stride);
            }
            let mut left = t.run;
            while left > 0 {
                if t.ahead != 0 {
                    unroll!(m < MR, {
                        P::Values::prefetch(p[m / 3].wrapping_add(m % 3 * stride).wrapping_add(t.ahead))
                    });
                }
                let line = left.min(LINE / 4);
                left -= line;
                for _ in 0..line {
                    let mut wk = [P::load(w); NR];
                    for (r, wk) in wk.iter_mut().enumerate() {
                        *wk = P::load(w.add(r * lanes));
                    }
                    w = w.add(NR * lanes);
                    unroll!(m < MR, {
                        let v = P::splat(p[m / 3].add(m % 3 * stride));
                        for r in 0..NR {
                            sums[m][r] = P::multiply(sums[m][r], v, wk[r]);
                        }
                    });
                    for p in p.iter_mut() {
                        *p = p.wrapping_add(4);
                    }
                }
            }
        }
        let to = &t.to;
        let plain = to.rule.residual == Residual::None && to.rule.output == Storage::F32;
        if P::SINGLE && plain && to.channels >= NR * lanes {
            let slope = P::Values::splat(to.rule.slope);
            unroll!(m < MR, {
                let out = to.output.add(m * to.out_pixel).cast::<f32>();
                for r in 0..NR {
                    activate(finish::<P>(t, sums[m][r], r), slope).store(out.add(r * lanes));
                }
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

/// Bytes of a cache line, on most CPUs.
const LINE: usize = 64;

/// Asks for the lines of so many bytes from `first` on, wherever that points, ahead of their use.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(crate) unsafe fn ask<V: Vector>(first: *const u8, bytes: usize) {
    for line in (0..bytes).step_by(LINE) {
        // SAFETY: a prefetch may point anywhere; the caller is compiled for V's ISA.
        unsafe { V::prefetch(first.wrapping_add(line)) };
    }
}

/// Where the residual of pixel `m` is.
#[inline(always)]
unsafe fn residual(t: &Target, m: usize) -> *const u8 {
    let x = t.x + m;
    // SAFETY: the contract of `block`: a table has an entry for every column.
    let column = unsafe { t.add_columns.as_ref().map_or(x, |_| *t.add_columns.add(x) as usize) };
    t.add.wrapping_add(column * t.add_pixel)
}

/// Register `r` of a tile's sums in f32.
#[inline(always)]
unsafe fn finish<P: Product>(t: &Tile, sums: P::Sums, r: usize) -> P::Values {
    let at = r * P::Values::LANES;
    // SAFETY: the contract of `block`.
    unsafe { P::finish(sums, t.scale.wrapping_add(at), t.bias.wrapping_add(at)) }
}

/// What becomes of a tile's values, pixels of `registers` registers each: residual, activation, store.
///
/// # Safety
/// The contract of [`block`], for the arguments that the target was made of; `values` are there.
#[inline(always)]
pub(crate) unsafe fn store<V: Vector>(t: &Target, values: *const f32, pixels: usize, registers: usize) {
    let rule = t.rule;
    let full = t.channels >= registers * V::LANES;
    let scaled = (rule.add_scale, rule.add_zero) != (1.0, 0.0);
    // SAFETY: the same contract.
    unsafe {
        match (rule.residual, rule.add, rule.output) {
            (Residual::None, _, Storage::F32) if full => {
                store_full::<V, F32, NONE>(t, values, pixels, registers)
            }
            (Residual::None, _, Storage::Bf16) if full => {
                store_full::<V, BF16, NONE>(t, values, pixels, registers)
            }
            (Residual::None, _, Storage::U8) if full => {
                store_full::<V, U8, NONE>(t, values, pixels, registers)
            }
            (_, Storage::F32, Storage::F32) if full => {
                store_full::<V, F32, ADDED>(t, values, pixels, registers)
            }
            (_, Storage::Bf16, Storage::Bf16) if full && !scaled => {
                store_full::<V, BF16, ADDED>(t, values, pixels, registers)
            }
            _ => {
                for m in 0..pixels {
                    for r in 0..registers {
                        let v = V::load(values.add((m * registers + r) * V::LANES));
                        store_register(t, v, m, r);
                    }
                }
            }
        }
    }
}

/// What becomes of register `r` of pixel `m`, some lanes of which may be no channels.
///
/// # Safety
/// As [`store`].
#[inline(always)]
pub(crate) unsafe fn store_register<V: Vector>(t: &Target, v: V, m: usize, r: usize) {
    let at = r * V::LANES;
    let n = t.channels.saturating_sub(at).min(V::LANES);
    // SAFETY: the caller's contract.
    unsafe {
        let (add, out) = t.pixel(m);
        let to = out.wrapping_add(at * t.rule.output.bytes());
        t.rule.finish(v, add.wrapping_add(at * t.rule.add.bytes()), to, n);
    }
}

// What is known to the compiler of [`store_full`]: how output and residual are stored, whether there is one.
const F32: usize = 0;
const BF16: usize = 1;
const U8: usize = 2;
const NONE: bool = false;
const ADDED: bool = true;

/// As [`store`], where all lanes are channels.
#[inline(always)]
unsafe fn store_full<V: Vector, const T: usize, const RESIDUAL: bool>(
    t: &Target,
    values: *const f32,
    pixels: usize,
    registers: usize,
) {
    let storage = [Storage::F32, Storage::Bf16, Storage::U8][T];
    // SAFETY: the contract of `store`.
    unsafe {
        let (slope, zero) = (V::splat(t.rule.slope), V::splat(t.rule.zero));
        let after = t.rule.residual == Residual::AfterActivation;
        for m in 0..pixels {
            let (add, out) = (residual(t, m), t.output.add(m * t.out_pixel));
            for r in 0..registers {
                let at = r * V::LANES * storage.bytes();
                let v = V::load(values.add((m * registers + r) * V::LANES));
                let v = if RESIDUAL {
                    let other = V::load_as(storage, add.add(at), V::LANES);
                    if after {
                        activate(v, slope).add(other)
                    } else {
                        activate(v.add(other), slope)
                    }
                } else {
                    activate(v, slope)
                };
                let v = if T == U8 { v.add(zero) } else { v };
                v.store_as(storage, out.add(at), V::LANES);
            }
        }
    }
}

/// max(slope * x, x): identity at slope 1, ReLU at 0, leaky between.
#[inline(always)]
pub(crate) unsafe fn activate<V: Vector>(x: V, slope: V) -> V {
    // SAFETY: register arithmetic only; the caller is compiled for V's ISA.
    unsafe { x.mul(slope).max(x) }
}
