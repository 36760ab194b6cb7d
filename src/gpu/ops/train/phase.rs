//! The phases of a stride: pixels of a convolution's input that lie a stride apart, which meet the same taps of the kernel.

use crate::gpu::map::{Element, Map};

/// The taps of an axis that a phase of a stride meets, and the convolution along the axis that they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Phase {
    /// The first of its pixels; they lie a stride apart.
    pub start: usize,
    /// How many there are.
    pub len: usize,
    /// The first tap, from tap to tap, and how many.
    pub first: usize,
    pub step: usize,
    pub count: usize,
    /// Of the convolution of the output's gradient, whose taps run backwards.
    pub dilation: i32,
    pub pad: i32,
}

impl Phase {
    /// Pixel `start + j * stride` of the input lies under tap `k` of the window `(start + j * stride + pad - k * dilation) / stride`
    /// where that is whole. With k = first + m * step it is j + nearest - m * (dilation * step / stride).
    pub fn of(start: usize, size: usize, kernel: usize, stride: usize, dilation: usize, pad: usize) -> Self {
        let (s, d) = (stride as i64, dilation as i64);
        let over = |k: usize| (start + pad) as i64 - k as i64 * d;
        let len = size.saturating_sub(start).div_ceil(stride);
        let Some(first) = (0..kernel).find(|&k| over(k) % s == 0) else {
            return Self { start, len, first: 0, step: 1, count: 0, dilation: 1, pad: 0 };
        };
        let step = (1..=stride).find(|&step| (step as i64 * d) % s == 0).unwrap_or(stride);
        let count = (kernel - first).div_ceil(step);
        let (nearest, apart) = (over(first) / s, d * step as i64 / s);
        let pad = (count as i64 - 1) * apart - nearest;
        Self { start, len, first, step, count, dilation: apart as i32, pad: pad as i32 }
    }
}

/// The pixels of a phase as a map.
pub(super) fn every(m: &Map, element: Element, [down, over]: [Phase; 2], stride: [usize; 2]) -> Map {
    let first = down.start as i64 * m.row + over.start as i64 * m.pixel;
    Map {
        data: m.data + first as u64 * element.bytes() as u64,
        row: m.row * stride[0] as i64,
        pixel: m.pixel * stride[1] as i64,
        h: down.len as i32,
        w: over.len as i32,
        ..*m
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every pixel of the input meets, in its phase, exactly the windows and taps that lie over it.
    #[test]
    fn phases_meet_the_windows_that_lie_over_a_pixel() {
        for (kernel, stride, dilation, pad) in
            [(3, 1, 1, 1), (3, 2, 1, 1), (1, 2, 1, 0), (5, 3, 2, 4), (4, 4, 2, 1), (2, 3, 3, 0), (7, 2, 1, 3)]
        {
            for size in 1..20 {
                let mut seen = 0;
                for phase in (0..stride).map(|s| Phase::of(s, size, kernel, stride, dilation, pad)) {
                    for j in 0..phase.len {
                        let pixel = phase.start + j * stride;
                        seen += 1;
                        let mut met: Vec<(i32, usize)> = (0..phase.count)
                            .map(|t| {
                                let tap = phase.first + phase.step * (phase.count - 1 - t);
                                (j as i32 + t as i32 * phase.dilation - phase.pad, tap)
                            })
                            .collect();
                        met.sort_unstable();
                        let over = |o: i32, k: usize| {
                            o * stride as i32 + (k * dilation) as i32 - pad as i32 == pixel as i32
                        };
                        let mut all: Vec<(i32, usize)> = (-60..60)
                            .flat_map(|o| (0..kernel).map(move |k| (o, k)))
                            .filter(|&(o, k)| over(o, k))
                            .collect();
                        all.sort_unstable();
                        assert_eq!(met, all, "{kernel} {stride} {dilation} {pad}: pixel {pixel} of {size}");
                    }
                }
                assert_eq!(seen, size);
            }
        }
    }
}
