//! Single values and small groups of them, as the loops over rows read and write them.

/// To 0..=255, NaN to 0. Written as comparisons because they are one instruction each in vector code.
#[inline(always)]
pub(super) fn clamp(v: f32) -> f32 {
    let v = if v > 0.0 { v } else { 0.0 };
    if v < 255.0 {
        v
    } else {
        255.0
    }
}

/// `N` values from `at` on: one bounds check for all of them.
#[inline(always)]
pub(super) fn array<T, const N: usize>(values: &[T], at: usize) -> &[T; N] {
    values[at..at + N].try_into().expect("N values")
}

/// As [`array()`], to write.
#[inline(always)]
pub(super) fn array_mut<T, const N: usize>(values: &mut [T], at: usize) -> &mut [T; N] {
    (&mut values[at..at + N]).try_into().expect("N values")
}
