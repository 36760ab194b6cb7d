//! AMX kernels: convolutions of bf16 and u8 on tiles of up to 16 pixels x 16 channels; the rest of a network runs on AVX-512.
//!
//! A panel of packed weights is the right operand as it lies there: 16 words of depth are 16 rows of it. The left one is the map
//! itself, a row a pixel. Two tiles of pixels by a panel are in the registers together.

use super::avx512::{F32x16, FoursOfU8, PairsOfBf16};
use super::conv::{panel_registers, ConvArgs, Product};
use super::epilogue::{activate, ask, store_register, Destination, Residual};
use super::simple::WIDENED;
use super::{ConvKernel, Vector};
use crate::cpu::arena::Storage;
use crate::cpu::tiles::{load, multiply_bf16, multiply_u8, store, tile_words, Tiles, SIDE};
use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::ops::Range;

/// A product on tiles, of what AVX-512 has a dot product of.
trait OnTiles: Product<Values = F32x16> {
    unsafe fn multiply_tiles<const C: usize, const A: usize, const B: usize>();
}

impl OnTiles for PairsOfBf16 {
    #[inline(always)]
    unsafe fn multiply_tiles<const C: usize, const A: usize, const B: usize>() {
        // SAFETY: the trait's contract is that function's.
        unsafe { multiply_bf16::<C, A, B>() }
    }
}

impl OnTiles for FoursOfU8 {
    #[inline(always)]
    unsafe fn multiply_tiles<const C: usize, const A: usize, const B: usize>() {
        // SAFETY: the trait's contract is that function's.
        unsafe { multiply_u8::<C, A, B>() }
    }
}

/// The sums of two tiles of pixels, or of one, at `input`, and one panel, stored with so many values from pixel to pixel.
#[inline(always)]
unsafe fn sums<P: OnTiles, const PIXELS: usize, const NR: usize>(
    a: &ConvArgs,
    input: [*const u8; 2],
    (weights, start): (*const u32, *const u32),
    words: usize,
    (to, to_pixel): ([*mut f32; 2], usize),
) {
    let right = NR * SIDE; // words from one row of the right operand to the next
    let to_bytes = to_pixel * size_of::<f32>();
    // SAFETY: the caller's contract: windows and panel are there, and room for the sums.
    unsafe {
        load::<0, u32>(start, 0);
        if NR == 2 {
            load::<1, u32>(start.add(SIDE), 0);
        }
        if PIXELS == 2 {
            load::<2, u32>(start, 0);
            if NR == 2 {
                load::<3, u32>(start.add(SIDE), 0);
            }
        }
        let mut w = weights;
        for &tap in a.taps {
            let mut at = tap;
            for _ in 0..a.run / words {
                load::<4, u8>(input[0].add(at), a.in_pixel);
                load::<6, u32>(w, right * 4);
                P::multiply_tiles::<0, 4, 6>();
                if NR == 2 {
                    load::<7, u32>(w.add(SIDE), right * 4);
                    P::multiply_tiles::<1, 4, 7>();
                }
                if PIXELS == 2 {
                    load::<5, u8>(input[1].add(at), a.in_pixel);
                    P::multiply_tiles::<2, 5, 6>();
                    if NR == 2 {
                        P::multiply_tiles::<3, 5, 7>();
                    }
                }
                w = w.wrapping_add(words * right);
                at += words * 4;
            }
        }
        store::<0>(to[0], to_bytes);
        if NR == 2 {
            store::<1>(to[0].add(SIDE), to_bytes);
        }
        if PIXELS == 2 {
            store::<2>(to[1], to_bytes);
            if NR == 2 {
                store::<3>(to[1].add(SIDE), to_bytes);
            }
        }
    }
}

/// Panels whose sums are finished together, so that a pixel's channels of the output lie one behind the other.
const PANELS: usize = 8;
/// Values from one pixel's sums to the next one's: not a power of two, or all would share a few cache lines.
const PIXEL: usize = (2 * PANELS + 1) * SIDE;

/// Sums of two tiles of pixels and some panels.
#[repr(align(64))]
struct Values(MaybeUninit<[f32; 2 * SIDE * PIXEL]>);

/// Computes output rows `rows` of panels `panels`.
///
/// # Safety
/// As `conv::block`; the CPU has AMX and AVX-512.
#[inline(always)]
unsafe fn block<P: OnTiles>(a: &ConvArgs, rows: Range<usize>, panels: Range<usize>) {
    if rows.is_empty() || a.width == 0 {
        return;
    }
    let words = tile_words(a.run);
    let depth = a.taps.len() * a.run;
    // Rows without anything between them are one.
    let whole = rows.len() > 1
        && a.in_row == a.width * a.in_pixel
        && a.out_row == a.width * a.out_pixel
        && (a.add.is_null() || a.add_row == a.width * a.add_pixel)
        && a.add_rows.is_empty()
        && a.add_columns.is_empty();
    let (rows, width) = if whole {
        let first = rows.start;
        (first..first + 1, rows.len() * a.width)
    } else {
        (rows, a.width)
    };
    // Tiles of one height, since another configuration takes as long as eighteen products; the last one of a row begins earlier
    // where it would not fit, and some pixels are computed twice.
    let tiles = width.div_ceil(SIDE);
    let pixels = width.div_ceil(tiles);
    let units = rows.len() * tiles;
    let place = |unit: usize| (rows.start + unit / tiles, (unit % tiles * pixels).min(width - pixels));
    let window = |(y, x): (usize, usize)| a.input.wrapping_add(y * a.in_row + x * a.in_pixel);
    // Windows of one run: the next tiles' are other lines, far apart, which the CPU does not foresee.
    let single = a.taps.len() == 1 && a.far;
    let mut values = Values(MaybeUninit::uninit());
    let first = values.0.as_mut_ptr().cast::<f32>();
    // SAFETY: the caller's contract.
    unsafe {
        let _tiles = Tiles::configure(pixels, words);
        let mut unit = 0;
        while unit < units {
            let two = unit + 1 < units;
            let count = 1 + usize::from(two);
            let places = [place(unit), place((unit + 1).min(units - 1))];
            let windows = places.map(window);
            let next = [unit + 2, unit + 3].map(|u| place(u.min(units - 1)));
            let values = [first, first.add(pixels * PIXEL)];
            for group in panels.clone().step_by(PANELS) {
                let last = (group + PANELS).min(panels.end);
                let channel = group * 2 * SIDE;
                let registers = 2 * (last - group) - 2 + panel_registers(a.channels, SIDE, last - 1);
                let targets = places.map(|at| a.destination(at, channel, registers * SIDE));
                for p in group..last {
                    // This group's residual and output, and, while the first one is computed, the next tiles' windows.
                    let share = |i: usize| pixels * (i - group) / (last - group);
                    let some = share(p)..share(p + 1);
                    for (target, &at) in targets[..count].iter().zip(&next) {
                        target.ask::<F32x16>(some.clone(), registers * SIDE);
                        if single && group == panels.start {
                            for m in some.clone() {
                                ask::<F32x16>(window(at).wrapping_add(m * a.in_pixel), a.run * 4);
                            }
                        }
                    }
                    let panel = (a.weights.add(p * 2 * SIDE * depth), a.start.add(p * 2 * SIDE));
                    let to = (values.map(|v| v.add((p - group) * 2 * SIDE)), PIXEL);
                    match (two, panel_registers(a.channels, SIDE, p)) {
                        (true, 2) => sums::<P, 2, 2>(a, windows, panel, words, to),
                        (true, _) => sums::<P, 2, 1>(a, windows, panel, words, to),
                        (false, 2) => sums::<P, 1, 2>(a, windows, panel, words, to),
                        (false, _) => sums::<P, 1, 1>(a, windows, panel, words, to),
                    }
                }
                let scales = (a.scale.wrapping_add(channel), a.bias.wrapping_add(channel));
                for (target, values) in targets[..count].iter().zip(values) {
                    finish::<P>(target, values, pixels, registers, scales);
                }
            }
            unit += 2;
        }
    }
}

/// Residual, activation and store of a tile's sums, pixels of so many registers.
#[inline(always)]
unsafe fn finish<P: OnTiles>(
    t: &Destination,
    values: *mut f32,
    pixels: usize,
    registers: usize,
    scales: (*const f32, *const f32),
) {
    use Residual::*;
    let rule = t.rule;
    // By register, not by group: what a register goes through must not depend on the threads' shares of the panels.
    let whole = t.registers(SIDE).min(registers);
    let size = [pixels, whole];
    // SAFETY: the caller's contract.
    unsafe {
        let done = match (rule.residual, rule.add, rule.output) {
            (None, _, Storage::F32) => rows::<P, F32, NONE>(t, values, size, scales),
            (None, _, Storage::Bf16) => rows::<P, BF16, NONE>(t, values, size, scales),
            (None, _, Storage::U8) => rows::<P, U8, NONE>(t, values, size, scales),
            (BeforeActivation, Storage::Bf16, Storage::Bf16) => {
                rows::<P, BF16, BEFORE>(t, values, size, scales)
            }
            (AfterActivation, Storage::Bf16, Storage::Bf16) => {
                rows::<P, BF16, AFTER>(t, values, size, scales)
            }
            (BeforeActivation, Storage::U8, Storage::U8) => rows::<P, U8, BEFORE>(t, values, size, scales),
            (AfterActivation, Storage::U8, Storage::U8) => rows::<P, U8, AFTER>(t, values, size, scales),
            _ => 0,
        };
        for m in 0..pixels {
            for r in done..registers {
                let at = values.add(m * PIXEL + r * SIDE);
                store_register(t, single::<P>(at, scales, r), m, r);
            }
        }
    }
}

// What is known to the compiler of [`rows`]: how output and residual are stored, whether and where that is added.
const F32: usize = 0;
const BF16: usize = 1;
const U8: usize = 2;
const NONE: usize = 0;
const BEFORE: usize = 1;
const AFTER: usize = 2;

/// Register `r` of a pixel's sums, at `p`, in f32.
#[inline(always)]
unsafe fn single<P: OnTiles>(p: *const f32, (scale, bias): (*const f32, *const f32), r: usize) -> F32x16 {
    // SAFETY: the caller vouches for a register's values, and for scales and biases where there are any.
    unsafe { P::finish(P::start(p.cast()), scale.wrapping_add(r * SIDE), bias.wrapping_add(r * SIDE)) }
}

/// As [`finish`], for registers all lanes of which are channels; returns how many.
#[inline(always)]
unsafe fn rows<P: OnTiles, const T: usize, const ADDED: usize>(
    t: &Destination,
    values: *const f32,
    [pixels, registers]: [usize; 2],
    scales: (*const f32, *const f32),
) -> usize {
    let storage = [Storage::F32, Storage::Bf16, Storage::U8][T];
    let rule = t.rule;
    // SAFETY: the caller's contract.
    unsafe {
        let (slope, zero) = (F32x16::splat(rule.slope), F32x16::splat(rule.zero));
        let (add_zero, add_scale) = (F32x16::splat(-rule.add_zero), F32x16::splat(rule.add_scale));
        for m in 0..pixels {
            let (add, out) = t.pixel(m);
            for r in 0..registers {
                let at = r * SIDE * storage.bytes();
                let mut v = single::<P>(values.add(m * PIXEL + r * SIDE), scales, r);
                if ADDED == NONE {
                    v = activate(v, slope);
                } else {
                    let mut other = F32x16::load_as(storage, add.add(at), SIDE);
                    if T == U8 {
                        other = other.add(add_zero).mul(add_scale);
                    }
                    v = if ADDED == BEFORE {
                        activate(v.add(other), slope)
                    } else {
                        activate(v, slope).add(other)
                    };
                }
                let to = out.add(at);
                match T {
                    F32 => v.store(to.cast()),
                    BF16 => v.store_bf16_nearest(to.cast(), SIDE),
                    _ => v.add(zero).store_u8(to, SIDE),
                }
            }
        }
    }
    registers
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn bf16(a: &ConvArgs, rows: Range<usize>, panels: Range<usize>) {
    // SAFETY: the caller keeps the contract of the function called.
    unsafe { block::<PairsOfBf16>(a, rows, panels) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn u8(a: &ConvArgs, rows: Range<usize>, panels: Range<usize>) {
    // SAFETY: the caller keeps the contract of the function called.
    unsafe { block::<FoursOfU8>(a, rows, panels) }
}

/// Copies `pixels` of `channels` f32 each, one behind the other, to as many of [`WIDENED`] bf16, zeros behind their own.
///
/// # Safety
/// The values are there, and room for the copy; the CPU has AMX and AVX-512.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(in crate::cpu) unsafe fn widen(from: *const f32, channels: usize, to: *mut u16, pixels: usize) {
    let together = SIDE / WIDENED;
    let places: [i32; SIDE] = std::array::from_fn(|i| (i / WIDENED * channels + i % WIDENED) as i32);
    let own = (0..SIDE).filter(|i| i % WIDENED < channels).fold(0u16, |mask, i| mask | 1 << i);
    // SAFETY: the caller's contract; masked lanes are not touched.
    unsafe {
        let places = _mm512_loadu_si512(places.as_ptr().cast());
        for first in (0..pixels).step_by(together) {
            let n = together.min(pixels - first);
            let all = |lanes: usize| ((1u32 << lanes) - 1) as __mmask16;
            let v = _mm512_maskz_loadu_ps(all(n * channels), from.add(first * channels));
            let v = _mm512_maskz_permutexvar_ps(own, places, v);
            F32x16(v).store_bf16_nearest(to.add(first * WIDENED), n * WIDENED);
        }
    }
}

/// The convolution of values that are stored so, by windows of runs of `run` words; none where rows of tiles would be half empty.
pub(super) fn kernel(input: Storage, run: usize) -> Option<ConvKernel> {
    let fills = tile_words(run) >= SIDE / 2;
    let run = match input {
        Storage::Bf16 if fills => bf16,
        Storage::U8 if fills => u8,
        _ => return None,
    };
    Some(ConvKernel { lanes: <F32x16 as Vector>::LANES, offset: 0, pairs: false, tiles: true, run })
}
