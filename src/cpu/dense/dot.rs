//! [Products of pairs](super::pairs) by AVX512-BF16's dot product: blocks of 16 sums of 16 columns in registers.

use super::gemm::Matrices;
use std::arch::x86_64::*;

/// All of `m`, two blocks of 16 columns at a time: they stay in cache while all rows pass.
///
/// # Safety
/// The CPU has AVX512-BF16; the matrices are as they are described.
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) unsafe fn multiply_all(m: &Matrices) {
    for n in (0..m.columns).step_by(32) {
        // SAFETY: the caller's contract: rows and columns are multiples of 16.
        unsafe {
            if m.columns - n > 16 {
                (0..m.rows).step_by(8).for_each(|y| block::<8, 2>(m, y, n));
            } else {
                (0..m.rows).step_by(16).for_each(|y| block::<16, 1>(m, y, n));
            }
        }
    }
}

/// `ROWS` rows from `y` on of `COLUMNS` blocks of columns from `n` on.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn block<const ROWS: usize, const COLUMNS: usize>(m: &Matrices, y: usize, n: usize) {
    // SAFETY: the caller's rows and columns are within the matrices; any bits are bf16.
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); COLUMNS]; ROWS];
        let c = m.c.add(y * m.columns + n);
        if m.add {
            for (i, sums) in sums.iter_mut().enumerate() {
                for (j, sum) in sums.iter_mut().enumerate() {
                    *sum = _mm512_loadu_ps(c.add(i * m.columns + 16 * j));
                }
            }
        }
        let (a, b) = (m.a.add(y * m.a_row), m.b.add(n * m.depth));
        for k in (0..m.depth).step_by(2) {
            let mut right = [_mm512_setzero_si512(); COLUMNS];
            for (j, right) in right.iter_mut().enumerate() {
                *right = _mm512_loadu_si512(b.add(16 * (j * m.depth + k)).cast());
            }
            for (i, sums) in sums.iter_mut().enumerate() {
                let left = _mm512_set1_epi32(a.add(i * m.a_row + k).cast::<i32>().read_unaligned());
                for (sum, right) in sums.iter_mut().zip(right) {
                    *sum = _mm512_dpbf16_ps(*sum, pairs(left), pairs(right));
                }
            }
        }
        for (i, sums) in sums.into_iter().enumerate() {
            for (j, sum) in sums.into_iter().enumerate() {
                _mm512_storeu_ps(c.add(i * m.columns + 16 * j), sum);
            }
        }
    }
}

/// A register of pairs as the dot product takes it.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn pairs(bits: __m512i) -> __m512bh {
    // SAFETY: both are 64 bytes of any bits.
    unsafe { std::mem::transmute::<__m512i, __m512bh>(bits) }
}
