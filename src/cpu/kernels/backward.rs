//! What training adds to the forward kernels: weight gradients of convolutions, as sums of outer
//! products over pixels, and of depthwise convolutions.

use super::conv::{panel_registers, panels, unroll};
use super::Vector;
use std::ops::Range;

/// `sums[k][n] += sum over pixels p of a[p][k] * d[p][n]`.
pub(crate) struct OuterArgs {
    /// Pixels x `a_pixel`, of which `inputs` are read.
    pub a: *const f32,
    pub a_pixel: usize,
    pub inputs: usize,
    /// Pixels x `d_pixel`, of which `channels` are read.
    pub d: *const f32,
    pub d_pixel: usize,
    pub channels: usize,
    pub pixels: usize,
    /// `inputs` x `sums_row`.
    pub sums: *mut f32,
    pub sums_row: usize,
}

/// MR inputs x NR registers of channels, over all pixels.
pub(crate) struct OuterTile {
    a: *const f32,
    a_pixel: usize,
    d: *const f32,
    d_pixel: usize,
    /// Channels of the panel that exist.
    channels: usize,
    pixels: usize,
    sums: *mut f32,
    sums_row: usize,
}

/// The outer-product tiles of one ISA; heights as the convolution's.
pub(crate) trait OuterTiles {
    const WIDE: usize;
    const NARROW: usize;
    const LANES: usize;
    unsafe fn run(inputs: usize, wide: bool, t: &OuterTile);
}

/// All of `a`.
///
/// # Safety
/// The pointers and strides of `a` stay inside the caller's buffers; nobody else touches the sums.
#[inline(always)]
pub(crate) unsafe fn outer<T: OuterTiles>(a: &OuterArgs) {
    let lanes = T::LANES;
    for p in 0..panels(a.channels, lanes) {
        let first = p * 2 * lanes;
        let wide = panel_registers(a.channels, lanes, p) == 2;
        let tallest = if wide { T::WIDE } else { T::NARROW };
        let tiles = a.inputs.div_ceil(tallest);
        let (short, longer) = (a.inputs / tiles.max(1), a.inputs % tiles.max(1));
        let mut k = 0;
        for i in 0..tiles {
            let inputs = short + usize::from(i < longer);
            // SAFETY: the caller's contract, for these inputs and channels.
            unsafe {
                let t = OuterTile {
                    a: a.a.add(k),
                    a_pixel: a.a_pixel,
                    d: a.d.add(first),
                    d_pixel: a.d_pixel,
                    channels: (a.channels - first).min(2 * lanes),
                    pixels: a.pixels,
                    sums: a.sums.add(k * a.sums_row + first),
                    sums_row: a.sums_row,
                };
                T::run(inputs, wide, &t);
            }
            k += inputs;
        }
    }
}

/// One tile.
#[inline(always)]
pub(crate) unsafe fn outer_tile<V: Vector, const MR: usize, const NR: usize>(t: &OuterTile) {
    // SAFETY: the contract of `outer`, which made the tile.
    unsafe {
        let lanes = V::LANES;
        let full = t.channels >= NR * lanes;
        let mut acc = [[V::splat(0.0); NR]; MR];
        let (mut a, mut d) = (t.a, t.d);
        for _ in 0..t.pixels {
            let mut dk = [V::splat(0.0); NR];
            for (r, dk) in dk.iter_mut().enumerate() {
                *dk = if full {
                    V::load(d.add(r * lanes))
                } else {
                    V::load_upto(d.wrapping_add(r * lanes), t.channels.saturating_sub(r * lanes))
                };
            }
            unroll!(m < MR, {
                let v = V::splat(*a.add(m));
                for r in 0..NR {
                    acc[m][r] = acc[m][r].mul_add(v, dk[r]);
                }
            });
            a = a.wrapping_add(t.a_pixel);
            d = d.wrapping_add(t.d_pixel);
        }
        unroll!(m < MR, {
            let out = t.sums.add(m * t.sums_row);
            for r in 0..NR {
                let n = t.channels.saturating_sub(r * lanes).min(lanes);
                let p = out.wrapping_add(r * lanes);
                V::load_upto(p, n).add(acc[m][r]).store_upto(p, n);
            }
        });
    }
}

/// `sums[ky * kw + kx][c] += sum over pixels of input(window + tap)[c] * d[c]`.
pub(crate) struct DepthwiseWeightArgs {
    /// First float of the first pixel's window.
    pub input: *const f32,
    /// Floats between windows of consecutive output rows and pixels (stride counted).
    pub in_row: usize,
    pub in_pixel: usize,
    pub kernel: [usize; 2],
    /// Floats between taps (dilation counted).
    pub tap_row: usize,
    pub tap_pixel: usize,
    pub d: *const f32,
    pub d_row: usize,
    pub d_pixel: usize,
    pub height: usize,
    pub width: usize,
    pub channels: usize,
    /// `[kh * kw][channels]`.
    pub sums: *mut f32,
}

/// All of `a`, a kernel row of taps (at most 9) at a time.
///
/// # Safety
/// As [`outer`].
#[inline(always)]
pub(crate) unsafe fn depthwise_weight<V: Vector>(a: &DepthwiseWeightArgs) {
    let mut c = 0;
    while c < a.channels {
        let n = (a.channels - c).min(V::LANES);
        // SAFETY: the caller's contract; channels c .. c + n exist.
        unsafe {
            match (a.kernel, n == V::LANES) {
                ([3, 3], true) => weight_3x3::<V, true>(a, c, n),
                ([3, 3], false) => weight_3x3::<V, false>(a, c, n),
                _ => weight_any::<V>(a, c, n),
            }
        }
        c += n;
    }
}

/// 3x3: nine sums in registers, each input and each gradient loaded once a window.
#[inline(always)]
unsafe fn weight_3x3<V: Vector, const FULL: bool>(a: &DepthwiseWeightArgs, c: usize, n: usize) {
    // SAFETY: the contract of `depthwise_weight`.
    unsafe {
        let mut acc = [V::splat(0.0); 9];
        for y in 0..a.height {
            let (mut p, mut d) = (a.input.add(y * a.in_row + c), a.d.add(y * a.d_row + c));
            for _ in 0..a.width {
                let g = V::load_lanes::<FULL>(d, n);
                unroll!(i < 9, {
                    let v = V::load_lanes::<FULL>(p.add(i / 3 * a.tap_row + i % 3 * a.tap_pixel), n);
                    acc[i] = acc[i].mul_add(v, g);
                });
                p = p.wrapping_add(a.in_pixel);
                d = d.wrapping_add(a.d_pixel);
            }
        }
        for (i, sum) in acc.into_iter().enumerate() {
            let p = a.sums.add(i * a.channels + c);
            V::load_upto(p, n).add(sum).store_upto(p, n);
        }
    }
}

/// Any kernel, a tap at a time.
#[inline(always)]
unsafe fn weight_any<V: Vector>(a: &DepthwiseWeightArgs, c: usize, n: usize) {
    // SAFETY: the contract of `depthwise_weight`.
    unsafe {
        for ky in 0..a.kernel[0] {
            for kx in 0..a.kernel[1] {
                let mut sum = V::splat(0.0);
                for y in 0..a.height {
                    let p = a.input.add(y * a.in_row + ky * a.tap_row + kx * a.tap_pixel + c);
                    let d = a.d.add(y * a.d_row + c);
                    for x in 0..a.width {
                        let v = V::load_upto(p.add(x * a.in_pixel), n);
                        sum = sum.mul_add(v, V::load_upto(d.add(x * a.d_pixel), n));
                    }
                }
                let p = a.sums.add((ky * a.kernel[1] + kx) * a.channels + c);
                V::load_upto(p, n).add(sum).store_upto(p, n);
            }
        }
    }
}

/// Rows `rows` of the data gradient of a depthwise convolution with any stride:
/// `dx(y, x) += sum over taps that read it of d(tap's output) * weight(tap)`, gathered.
pub(crate) struct DepthwiseDataArgs {
    /// Output gradient, first pixel of the image (not padded).
    pub d: *const f32,
    pub d_row: usize,
    pub d_pixel: usize,
    /// Rows and columns of `d`.
    pub out: [usize; 2],
    pub kernel: [usize; 2],
    pub stride: [usize; 2],
    pub dilation: [usize; 2],
    /// Padding above and left.
    pub padding: [usize; 2],
    /// `[kh * kw][channels]`.
    pub weights: *const f32,
    /// First row written is `rows.start`.
    pub dx: *mut f32,
    pub dx_row: usize,
    pub width: usize,
    pub channels: usize,
}

/// # Safety
/// As [`outer`]; `dx` points at row 0's place, rows `rows` of it are written whole. `d` has zeros for a window's width
/// beside its columns.
#[inline(always)]
pub(crate) unsafe fn depthwise_data<V: Vector>(a: &DepthwiseDataArgs, rows: Range<usize>) {
    for y in rows {
        // Columns of one remainder by the stride are read by the same taps, a column of `d` further each.
        for phase in 0..a.stride[1].min(a.width) {
            let mut c = 0;
            while c < a.channels {
                let n = (a.channels - c).min(V::LANES);
                // SAFETY: the caller's contract.
                unsafe { data_columns::<V>(a, y, phase, c, n) };
                c += n;
            }
        }
    }
}

/// Most taps whose weights are held in registers; the rest go in further rounds.
const HELD_TAPS: usize = 8;

#[inline(always)]
unsafe fn data_columns<V: Vector>(a: &DepthwiseDataArgs, y: usize, phase: usize, c: usize, n: usize) {
    // The output whose window has input `i` at tap k: (i + padding - k * dilation) / stride where whole.
    let source = |axis: usize, i: usize, k: usize| {
        let at = (i + a.padding[axis]) as isize - (k * a.dilation[axis]) as isize;
        let stride = a.stride[axis] as isize;
        (at.rem_euclid(stride) == 0).then(|| at.div_euclid(stride))
    };
    // SAFETY: the caller's contract: columns of `d` beside the map are zeros.
    unsafe {
        let mut taps = [(V::splat(0.0), a.d); HELD_TAPS];
        let (mut held, mut add) = (0, false);
        let to = a.dx.wrapping_add(y * a.dx_row + phase * a.channels + c);
        let pixels = (a.width - phase).div_ceil(a.stride[1]);
        for ky in 0..a.kernel[0] {
            let Some(oy) = source(0, y, ky).filter(|&oy| oy >= 0 && oy < a.out[0] as isize) else { continue };
            for kx in 0..a.kernel[1] {
                let Some(ox) = source(1, phase, kx) else { continue };
                if held == HELD_TAPS {
                    tap_sums::<V, HELD_TAPS>(a, &taps, to, pixels, n, add);
                    (held, add) = (0, true);
                }
                let w = V::load_upto(a.weights.add((ky * a.kernel[1] + kx) * a.channels + c), n);
                let at = oy * a.d_row as isize + ox * a.d_pixel as isize + c as isize;
                taps[held] = (w, a.d.wrapping_offset(at));
                held += 1;
            }
        }
        // The rest; taps that are not there have weight 0 and read the first one's place.
        let first = taps[0].1; // not read where none is held: row 0 may lie before what `d` holds
        for tap in &mut taps[held..] {
            *tap = (V::splat(0.0), first);
        }
        match held {
            0 => tap_sums::<V, 0>(a, &taps, to, pixels, n, add),
            1 => tap_sums::<V, 1>(a, &taps, to, pixels, n, add),
            2 => tap_sums::<V, 2>(a, &taps, to, pixels, n, add),
            3 | 4 => tap_sums::<V, 4>(a, &taps, to, pixels, n, add),
            _ => tap_sums::<V, HELD_TAPS>(a, &taps, to, pixels, n, add),
        }
    }
}

/// Every `stride`-th pixel's sum over the first `TAPS` taps.
#[inline(always)]
unsafe fn tap_sums<V: Vector, const TAPS: usize>(
    a: &DepthwiseDataArgs,
    taps: &[(V, *const f32); HELD_TAPS],
    mut to: *mut f32,
    pixels: usize,
    n: usize,
    add: bool,
) {
    // SAFETY: the contract of `depthwise_data`.
    unsafe {
        for i in 0..pixels {
            let mut sum = if add { V::load_upto(to, n) } else { V::splat(0.0) };
            for (w, d) in &taps[..TAPS] {
                sum = sum.mul_add(V::load_upto(d.wrapping_add(i * a.d_pixel), n), *w);
            }
            sum.store_upto(to, n);
            to = to.wrapping_add(a.stride[1] * a.channels);
        }
    }
}
