//! How fast this processor can multiply and add, measured: the bound that kernels are held against.

use pulp::{Arch, Simd, WithSimd};
use std::hint::black_box;
use std::time::{Duration, Instant};

/// Independent sums: enough to cover the latency of two multiply-adds a cycle, and few enough for
/// the sixteen registers of AVX2.
const SUMS: usize = 12;
/// Multiply-adds of each sum in one round.
const STEPS: usize = 4096;
/// Every thread keeps at it this long.
const TIME: Duration = Duration::from_millis(150);

/// Floating-point operations a second (a multiply-add counts two) of `threads` threads together,
/// in f32, with the widest registers this processor has.
pub fn flops(threads: usize) -> f64 {
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads.max(1)).map(|_| scope.spawn(one_thread)).collect();
        workers.into_iter().map(|w| w.join().expect("the measuring loop does not panic")).sum()
    })
}

fn one_thread() -> f64 {
    let arch = Arch::new();
    let (start, mut best) = (Instant::now(), 0.0f64);
    while start.elapsed() < TIME {
        let round = Instant::now();
        let lanes = arch.dispatch(Round);
        let operations = (2 * SUMS * STEPS * lanes) as f64;
        best = best.max(operations / round.elapsed().as_secs_f64());
    }
    best
}

/// One round; its result is the number of lanes of a register.
struct Round;

impl WithSimd for Round {
    type Output = usize;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> usize {
        let lanes = size_of::<S::f32s>() / size_of::<f32>();
        let (factor, term) = (simd.splat_f32s(black_box(0.5)), simd.splat_f32s(black_box(1.0)));
        let mut sums = [simd.splat_f32s(black_box(0.25)); SUMS];
        for _ in 0..STEPS {
            for sum in &mut sums {
                *sum = simd.mul_add_f32s(*sum, factor, term);
            }
        }
        black_box(sums.into_iter().fold(0.0, |total, sum| total + simd.reduce_sum_f32s(sum)));
        lanes
    }
}
