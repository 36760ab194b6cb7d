//! bf16 matrix products on AMX: tiles of 16 rows of 64 bytes, f32 sums. Inline assembly, since the
//! intrinsics are not stable.
//!
//! tmm0..3 hold sums (2 x 2 tiles), tmm4, 5 the left operand, tmm6, 7 the right one.

use super::gemm::{channel_stride, operand_stride};
use super::maps::holds;
use super::Packed;
use crate::cpu::{isa, Isa};
use half::bf16;
use std::arch::asm;
use std::arch::x86_64::*;
use std::sync::OnceLock;

/// Whether the CPU has AMX-BF16 and the operating system saves its tiles for us (and `FARFACE_ISA` keeps nothing from use). Asks for the permission once;
/// it holds for the process.
pub(super) fn available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| {
        isa::detected() == Isa::Avx512
            && is_x86_feature_detected!("avx512bf16")
            && has_amx_bf16()
            && permitted()
    })
}

fn has_amx_bf16() -> bool {
    const AMX_BF16: u32 = 1 << 22;
    const AMX_TILE: u32 = 1 << 24;
    const OSXSAVE: u32 = 1 << 27;
    const TILE_STATE: u64 = 3 << 17;
    #[target_feature(enable = "xsave")]
    fn states() -> u64 {
        // SAFETY: called where the operating system has turned XSAVE on.
        unsafe { _xgetbv(0) }
    }
    // The intrinsic became safe between the Rust versions that this crate builds with.
    #[allow(unused_unsafe)]
    // SAFETY: every x86-64 CPU has CPUID; leaf 7 is asked for where leaf 0 reports it.
    let (leaf1, leaf7) = unsafe {
        if __cpuid(0).eax < 7 {
            return false;
        }
        (__cpuid(1), __cpuid_count(7, 0))
    };
    let tiles = AMX_BF16 | AMX_TILE;
    // SAFETY: OSXSAVE is set where `states` is called.
    leaf7.edx & tiles == tiles && leaf1.ecx & OSXSAVE != 0 && unsafe { states() } & TILE_STATE == TILE_STATE
}

/// Linux hands out the tile registers on request alone.
#[cfg(target_os = "linux")]
fn permitted() -> bool {
    const SYS_ARCH_PRCTL: i64 = 158;
    const ARCH_REQ_XCOMP_PERM: i64 = 0x1023;
    const XFEATURE_XTILEDATA: i64 = 18;
    let result: i64;
    // SAFETY: arch_prctl(ARCH_REQ_XCOMP_PERM) touches no memory of ours; the kernel clobbers rcx and r11.
    unsafe {
        asm!("syscall", inlateout("rax") SYS_ARCH_PRCTL => result, in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XFEATURE_XTILEDATA, lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    result == 0
}

#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}

/// The tile configuration as the CPU reads it.
#[repr(C, align(64))]
struct TileConfig {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// Tiles in use on this thread, released when dropped.
struct Tiles;

impl Tiles {
    /// Left operands of `depth` values a row, right ones of `depth / 2` rows of pairs.
    unsafe fn configure(depth: usize) -> Self {
        let mut config =
            TileConfig { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        for tile in 0..8 {
            config.row_bytes[tile] = if matches!(tile, 4 | 5) { 2 * depth as u16 } else { 64 };
            config.rows[tile] = if matches!(tile, 6 | 7) { depth as u8 / 2 } else { 16 };
        }
        // SAFETY: a valid configuration: 8 tiles of at most 16 rows of 64 bytes.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &config, options(nostack, readonly)) };
        Self
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: always allowed where AMX is.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}

#[inline(always)]
unsafe fn zero<const T: usize>() {
    // SAFETY: the caller has configured the tiles.
    unsafe { asm!("tilezero tmm{t}", t = const T, options(nostack, nomem)) };
}
#[inline(always)]
unsafe fn load<const T: usize, V>(p: *const V, row_bytes: usize) {
    // SAFETY: the caller vouches for the tile's rows at `p`.
    unsafe {
        asm!("tileloadd tmm{t}, [{p} + {s}*1]", t = const T, p = in(reg) p, s = in(reg) row_bytes,
            options(nostack, readonly));
    }
}
#[inline(always)]
unsafe fn store<const T: usize>(p: *mut f32, row_bytes: usize) {
    // SAFETY: the caller vouches for room for the tile's rows at `p`.
    unsafe {
        asm!("tilestored [{p} + {s}*1], tmm{t}", t = const T, p = in(reg) p, s = in(reg) row_bytes,
            options(nostack));
    }
}
#[inline(always)]
unsafe fn multiply<const C: usize, const A: usize, const B: usize>() {
    // SAFETY: the caller has configured and loaded the tiles.
    unsafe {
        asm!("tdpbf16ps tmm{c}, tmm{a}, tmm{b}", c = const C, a = const A, b = const B,
            options(nostack, nomem));
    }
}

/// The sums of up to 2 x 2 tiles: `steps` products from `a` (two row blocks, `a_below` apart) and `b` (two
/// column blocks, `b_right` apart).
struct Walk<V> {
    a: *const V,
    a_below: usize,
    a_row_bytes: usize,
    a_step: usize,
    b: *const V,
    b_right: usize,
    b_step: usize,
    steps: usize,
}

#[inline(always)]
unsafe fn walk<V, const ROWS: usize, const COLUMNS: usize>(w: &Walk<V>) {
    let (mut a, mut b) = (w.a, w.b);
    for _ in 0..w.steps {
        // SAFETY: the caller's blocks and steps stay inside its buffers.
        unsafe {
            load::<4, V>(a, w.a_row_bytes);
            load::<6, V>(b, 64);
            multiply::<0, 4, 6>();
            if COLUMNS == 2 {
                load::<7, V>(b.add(w.b_right), 64);
                multiply::<1, 4, 7>();
            }
            if ROWS == 2 {
                load::<5, V>(a.add(w.a_below), w.a_row_bytes);
                multiply::<2, 5, 6>();
                if COLUMNS == 2 {
                    multiply::<3, 5, 7>();
                }
            }
        }
        a = a.wrapping_add(w.a_step);
        b = b.wrapping_add(w.b_step);
    }
}

/// Runs `walk` for the block sizes at hand; `fresh` starts from zero, else from what `c` holds.
#[inline(always)]
unsafe fn block<V>(w: &Walk<V>, rows: usize, columns: usize, c: *mut f32, c_row: usize, fresh: bool) {
    let bytes = 4 * c_row;
    // SAFETY: the caller vouches for 16 * rows x 16 * columns results at `c`.
    unsafe {
        let below = c.wrapping_add(16 * c_row);
        if fresh {
            zero::<0>();
            zero::<1>();
            zero::<2>();
            zero::<3>();
        } else {
            load::<0, f32>(c, bytes);
            if columns == 2 {
                load::<1, f32>(c.add(16), bytes);
            }
            if rows == 2 {
                load::<2, f32>(below, bytes);
                if columns == 2 {
                    load::<3, f32>(below.add(16), bytes);
                }
            }
        }
        match (rows, columns) {
            (2, 2) => walk::<V, 2, 2>(w),
            (2, _) => walk::<V, 2, 1>(w),
            (_, 2) => walk::<V, 1, 2>(w),
            _ => walk::<V, 1, 1>(w),
        }
        store::<0>(c, bytes);
        if columns == 2 {
            store::<1>(c.add(16), bytes);
        }
        if rows == 2 {
            store::<2>(below, bytes);
            if columns == 2 {
                store::<3>(below.add(16), bytes);
            }
        }
    }
}

/// [`Element::product`](super::Element::product).
pub(super) fn product(a: &[bf16], a_pixel: usize, pixels: usize, b: &Packed<bf16>, c: &mut [f32]) {
    assert!(available(), "bf16 products need AMX");
    let depth = operand_stride(b.depth);
    let c_row = channel_stride(b.channels);
    let rows = pixels.next_multiple_of(16);
    assert!(a_pixel >= depth && holds(a.len(), rows, a_pixel), "operand too short");
    assert!(c.len() >= rows * c_row, "result too short");
    let chunk = tile_depth(depth);
    let panel = depth * 16; // values of 16 channels
                            // SAFETY: the lengths were checked; `b` was packed in blocks of 16 channels of `depth` values.
    unsafe {
        let _tiles = Tiles::configure(chunk);
        for y in (0..rows).step_by(32) {
            let row_blocks = if rows - y > 16 { 2 } else { 1 };
            for n in (0..c_row).step_by(32) {
                let columns = if c_row - n > 16 { 2 } else { 1 };
                let w = Walk {
                    a: a.as_ptr().add(y * a_pixel),
                    a_below: 16 * a_pixel,
                    a_row_bytes: 2 * a_pixel,
                    a_step: chunk,
                    b: b.values.as_ptr().add(n / 16 * panel),
                    b_right: panel,
                    b_step: chunk * 16,
                    steps: depth / chunk,
                };
                block(&w, row_blocks, columns, c.as_mut_ptr().add(y * c_row + n), c_row, true);
            }
        }
    }
}

/// Values of `depth` that a tile takes at a time: its largest even divisor up to 32.
pub(super) fn tile_depth(depth: usize) -> usize {
    (1..=16).rev().map(|half| 2 * half).find(|&d| depth.is_multiple_of(d)).expect("operands are even")
}

/// [`Element::outer`](super::Element::outer): the left operand is transposed and the right one's pixels are
/// interleaved in pairs, as the tiles want them.
pub(super) fn outer(
    _: Isa,
    (a, a_pixel, inputs): (&[bf16], usize, usize),
    (d, d_pixel, channels): (&[bf16], usize, usize),
    pixels: usize,
    sums: &mut [f32],
    scratch: &mut Vec<bf16>,
) {
    assert!(available(), "bf16 products need AMX");
    if pixels == 0 {
        return;
    }
    let depth = pixels.next_multiple_of(32);
    let (rows, columns) = (channel_stride(inputs), channel_stride(channels));
    // A block of 16 values is read whole, past the last pixel's end.
    assert!(a_pixel >= inputs && holds(a.len().saturating_sub(16), depth, a_pixel), "operand too short");
    assert!(d_pixel >= channels && holds(d.len().saturating_sub(16), depth, d_pixel), "gradient too short");
    assert!(sums.len() >= rows * columns, "sums too short");
    if scratch.len() < depth * (rows + columns) {
        scratch.resize(depth * (rows + columns), bf16::ZERO);
    }
    let (left, right) = scratch.split_at_mut(depth * rows);
    // SAFETY: the lengths were checked, for whole blocks of 32 pixels and 16 values.
    unsafe {
        transpose_pixels(a.as_ptr(), a_pixel, depth, left.as_mut_ptr(), rows);
        interleave_pixels(d.as_ptr(), d_pixel, depth, right.as_mut_ptr(), columns);
        let _tiles = Tiles::configure(32);
        for k in (0..rows).step_by(32) {
            let row_blocks = if rows - k > 16 { 2 } else { 1 };
            for n in (0..columns).step_by(32) {
                let column_blocks = if columns - n > 16 { 2 } else { 1 };
                let w = Walk {
                    a: left.as_ptr().add(k * depth),
                    a_below: 16 * depth,
                    a_row_bytes: 2 * depth,
                    a_step: 32,
                    b: right.as_ptr().add(n * depth),
                    b_right: 16 * depth,
                    b_step: 16 * 32,
                    steps: depth / 32,
                };
                let c = sums.as_mut_ptr().add(k * columns + n);
                block(&w, row_blocks, column_blocks, c, columns, false);
            }
        }
    }
}

/// `to[k][p] = from[p][k]` for `pixels` (a multiple of 32) and `values` (of 16).
#[target_feature(enable = "avx512f")]
unsafe fn transpose_pixels(from: *const bf16, pixel: usize, pixels: usize, to: *mut bf16, values: usize) {
    for k in (0..values).step_by(16) {
        for p in (0..pixels).step_by(32) {
            let mut pairs = [_mm512_setzero_si512(); 16];
            // SAFETY: the caller's lengths.
            unsafe {
                let from = from.add(p * pixel + k);
                for (i, v) in pairs.iter_mut().enumerate() {
                    *v = pair(from.add(2 * i * pixel), pixel);
                }
                transpose(&mut pairs);
                for (i, v) in pairs.into_iter().enumerate() {
                    _mm512_storeu_si512(to.add((k + i) * pixels + p).cast(), v);
                }
            }
        }
    }
}

/// Blocks of 16 values, in each `[pixels / 2][16][2]`.
#[target_feature(enable = "avx512f")]
unsafe fn interleave_pixels(from: *const bf16, pixel: usize, pixels: usize, to: *mut bf16, values: usize) {
    for n in (0..values).step_by(16) {
        for p in (0..pixels).step_by(2) {
            // SAFETY: the caller's lengths.
            unsafe {
                let v = pair(from.add(p * pixel + n), pixel);
                _mm512_storeu_si512(to.add(n * pixels + p * 16).cast(), v);
            }
        }
    }
}

/// Sixteen values of a pixel interleaved with those of the next pixel.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn pair(p: *const bf16, pixel: usize) -> __m512i {
    // SAFETY: the caller vouches for 16 values of both pixels.
    let [low, high] = unsafe { [_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(pixel).cast())] };
    let (low, high) = (_mm512_cvtepu16_epi32(low), _mm512_cvtepu16_epi32(high));
    _mm512_or_si512(low, _mm512_slli_epi32::<16>(high))
}

/// Transposes 16 x 16 words.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose(r: &mut [__m512i; 16]) {
    let mut u = *r;
    for g in (0..16).step_by(4) {
        let t0 = _mm512_unpacklo_epi32(r[g], r[g + 1]);
        let t1 = _mm512_unpackhi_epi32(r[g], r[g + 1]);
        let t2 = _mm512_unpacklo_epi32(r[g + 2], r[g + 3]);
        let t3 = _mm512_unpackhi_epi32(r[g + 2], r[g + 3]);
        u[g] = _mm512_unpacklo_epi64(t0, t2);
        u[g + 1] = _mm512_unpackhi_epi64(t0, t2);
        u[g + 2] = _mm512_unpacklo_epi64(t1, t3);
        u[g + 3] = _mm512_unpackhi_epi64(t1, t3);
    }
    // u[4g + j] holds, in its quarter q, column 4q + j of rows 4g .. 4g + 3.
    for j in 0..4 {
        let even = _mm512_shuffle_i32x4::<0x88>(u[j], u[4 + j]);
        let even2 = _mm512_shuffle_i32x4::<0x88>(u[8 + j], u[12 + j]);
        let odd = _mm512_shuffle_i32x4::<0xdd>(u[j], u[4 + j]);
        let odd2 = _mm512_shuffle_i32x4::<0xdd>(u[8 + j], u[12 + j]);
        r[j] = _mm512_shuffle_i32x4::<0x88>(even, even2);
        r[4 + j] = _mm512_shuffle_i32x4::<0x88>(odd, odd2);
        r[8 + j] = _mm512_shuffle_i32x4::<0xdd>(even, even2);
        r[12 + j] = _mm512_shuffle_i32x4::<0xdd>(odd, odd2);
    }
}
