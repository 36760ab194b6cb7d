//! AMX: eight tile registers of up to 16 rows of 64 bytes, and their products. Inline assembly, since the intrinsics are not
//! stable.

use std::arch::asm;
use std::arch::x86_64::*;

/// Whether the CPU has AMX for bf16 and int8 and the operating system saves its tiles for us. Asks for the permission, which
/// then holds for the process.
pub(super) fn permitted() -> bool {
    in_cpu() && permission()
}

fn in_cpu() -> bool {
    const AMX_BF16: u32 = 1 << 22;
    const AMX_TILE: u32 = 1 << 24;
    const AMX_INT8: u32 = 1 << 25;
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
    let tiles = AMX_BF16 | AMX_TILE | AMX_INT8;
    // SAFETY: OSXSAVE is set where `states` is called.
    leaf7.edx & tiles == tiles && leaf1.ecx & OSXSAVE != 0 && unsafe { states() } & TILE_STATE == TILE_STATE
}

/// Linux hands out the tile registers on request alone.
#[cfg(target_os = "linux")]
fn permission() -> bool {
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
fn permission() -> bool {
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

/// Rows, and words of a row, of a tile.
pub(super) const SIDE: usize = 16;

/// Words of a depth that a tile takes at a time: the largest part up to [`SIDE`] that goes into it.
pub(super) fn tile_words(depth: usize) -> usize {
    (1..=SIDE).rev().find(|&words| depth.is_multiple_of(words)).unwrap_or(1)
}

/// Tiles in use on this thread, released when dropped. tmm0..3 hold sums (2 x 2 tiles), tmm4, 5 the left operand, tmm6, 7 the
/// right one.
pub(super) struct Tiles;

impl Tiles {
    /// Left operands of `rows` rows of `words` words of four bytes (two bf16, four u8), right ones of `words` rows of 16 words.
    ///
    /// # Safety
    /// [`permitted`] said yes; 1 to 16 rows and words.
    pub unsafe fn configure(rows: usize, words: usize) -> Self {
        let mut config =
            TileConfig { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        for tile in 0..8 {
            config.row_bytes[tile] = if matches!(tile, 4 | 5) { 4 * words as u16 } else { 64 };
            config.rows[tile] = if matches!(tile, 6 | 7) { words as u8 } else { rows as u8 };
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

/// Makes zeros of a tile.
#[cfg(feature = "train")]
#[inline(always)]
pub(super) unsafe fn zero<const T: usize>() {
    // SAFETY: the caller has configured the tiles.
    unsafe { asm!("tilezero tmm{t}", t = const T, options(nostack, nomem)) };
}

/// Loads a tile's rows, `row_bytes` apart; 0 fills it with one row.
#[inline(always)]
pub(super) unsafe fn load<const T: usize, V>(p: *const V, row_bytes: usize) {
    // SAFETY: the caller vouches for the tile's rows at `p`.
    unsafe {
        asm!("tileloadd tmm{t}, [{p} + {s}*1]", t = const T, p = in(reg) p, s = in(reg) row_bytes,
            options(nostack, readonly));
    }
}

/// Stores a tile's rows, `row_bytes` apart.
#[inline(always)]
pub(super) unsafe fn store<const T: usize>(p: *mut f32, row_bytes: usize) {
    // SAFETY: the caller vouches for room for the tile's rows at `p`.
    unsafe {
        asm!("tilestored [{p} + {s}*1], tmm{t}", t = const T, p = in(reg) p, s = in(reg) row_bytes,
            options(nostack));
    }
}

/// `C += A * B` of pairs of bf16, in f32.
#[inline(always)]
pub(super) unsafe fn multiply_bf16<const C: usize, const A: usize, const B: usize>() {
    // SAFETY: the caller has configured and loaded the tiles.
    unsafe {
        asm!("tdpbf16ps tmm{c}, tmm{a}, tmm{b}", c = const C, a = const A, b = const B,
            options(nostack, nomem));
    }
}

/// `C += A * B` of fours of u8 and i8, in i32.
#[inline(always)]
pub(super) unsafe fn multiply_u8<const C: usize, const A: usize, const B: usize>() {
    // SAFETY: the caller has configured and loaded the tiles.
    unsafe {
        asm!("tdpbusd tmm{c}, tmm{a}, tmm{b}", c = const C, a = const A, b = const B,
            options(nostack, nomem));
    }
}
