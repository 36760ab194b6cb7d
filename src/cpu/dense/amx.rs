//! [Products of pairs](super::pairs) on AMX: tiles of 16 rows of 64 bytes, f32 sums.
//!
//! tmm0..3 hold sums (2 x 2 tiles), tmm4, 5 the left operand, tmm6, 7 the right one.

use super::gemm::Matrices;
use crate::cpu::tiles::{load, multiply_bf16 as multiply, store, tile_words, zero, Tiles};

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

/// All of `m`.
///
/// # Safety
/// The CPU has AMX, and this process may use its tiles; the matrices are as they are described.
pub(super) unsafe fn multiply_all(m: &Matrices) {
    let chunk = tile_depth(m.depth);
    let panel = m.depth * 16; // values of 16 columns
                              // SAFETY: the caller's contract.
    unsafe {
        let _tiles = Tiles::configure(16, chunk / 2);
        for y in (0..m.rows).step_by(32) {
            let row_blocks = if m.rows - y > 16 { 2 } else { 1 };
            for n in (0..m.columns).step_by(32) {
                let column_blocks = if m.columns - n > 16 { 2 } else { 1 };
                let w = Walk {
                    a: m.a.add(y * m.a_row),
                    a_below: 16 * m.a_row,
                    a_row_bytes: 2 * m.a_row,
                    a_step: chunk,
                    b: m.b.add(n / 16 * panel),
                    b_right: panel,
                    b_step: chunk * 16,
                    steps: m.depth / chunk,
                };
                let c = m.c.add(y * m.columns + n);
                block(&w, row_blocks, column_blocks, c, m.columns, !m.add);
            }
        }
    }
}

/// Values of `depth` that a tile takes at a time: its largest even divisor up to 32.
fn tile_depth(depth: usize) -> usize {
    assert!(depth.is_multiple_of(2), "operands are even");
    2 * tile_words(depth / 2)
}
