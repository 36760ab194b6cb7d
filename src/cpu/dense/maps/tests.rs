//! Every pass against plain loops, over random sizes, every instruction set of this machine and both ways to store.

use super::*;
use crate::cpu::dense::{bf16_supported, Element};
use crate::cpu::{isa, Isa};
use crate::graph::init::Rng;
use half::bf16;

/// A map, its constants, a gradient and its constants.
struct Case<T> {
    channels: usize,
    pixels: usize,
    /// Values a pixel of what is not stored: all channels, or more.
    stride: usize,
    slope: f32,
    z: Vec<T>,
    dy: Vec<T>,
    constants: [Vec<f32>; 5],
    wide: Vec<f32>,
}

impl<T: Element> Case<T> {
    fn draw(rng: &mut Rng) -> Self {
        let channels = 1 + rng.below(70);
        // Now and then more than a block of narrow maps.
        let most = if rng.below(6) == 0 { 700 } else { 40 };
        let pixels = rng.below(most);
        let stride = channels + rng.below(2) * rng.below(20);
        let mut values = |n: usize| (0..n).map(|_| rng.range(-2.0, 2.0)).collect::<Vec<f32>>();
        let constants = [(); 5].map(|()| values(channels));
        let wide = values(pixels * stride);
        let stored = |v: Vec<f32>| v.into_iter().map(T::of).collect();
        let (z, dy) = (stored(values(pixels * channels)), stored(values(pixels * channels)));
        Self { channels, pixels, stride, slope: [0.0, 0.1, 1.0][rng.below(3)], z, dy, constants, wide }
    }

    fn source(&self) -> Source<'_, T> {
        Source { z: &self.z, scale: &self.constants[0], shift: &self.constants[1], slope: self.slope }
    }

    fn gradient(&self) -> Gradient<'_, T> {
        let [_, _, a, b, c] = &self.constants;
        Gradient { map: self.source(), dy: &self.dy, a, b, c }
    }

    /// Every value: its place among the stored, its channel, its place among the strided.
    fn places(&self) -> impl Iterator<Item = (usize, usize, usize)> + '_ {
        (0..self.pixels * self.channels).map(|i| {
            let (pixel, channel) = (i / self.channels, i % self.channels);
            (i, channel, pixel * self.stride + channel)
        })
    }

    /// scale * z + shift, and g of [`Gradient`].
    fn before(&self, i: usize, c: usize) -> (f32, f32) {
        let v = self.constants[0][c] * self.z[i].f32() + self.constants[1][c];
        (v, self.dy[i].f32() * if v > 0.0 { 1.0 } else { self.slope })
    }
}

fn near(got: f32, expected: f32, rounding: f32, what: &str) {
    let error = (got - expected).abs();
    assert!(error <= rounding * (1.0 + expected.abs()), "{what}: {got}, expected {expected}");
}

fn check<T: Element>(isa: Isa, seed: u64) {
    let rounding = if T::BF16 { 1.0 / 128.0 } else { 1e-5 };
    let mut rng = Rng::new(seed);
    for _ in 0..200 {
        let case = Case::<T>::draw(&mut rng);
        let (c, n, stride) = (case.channels, case.pixels, case.stride);
        let what = |pass: &str| format!("{pass} of {n} pixels, {c} channels, stride {stride}, {isa:?}");

        let mut seen = vec![7.0f32; n * stride];
        read(isa, case.source(), &mut seen, stride);
        let mut pulled = vec![7.0f32; n * stride];
        pull_back(isa, case.gradient(), &mut pulled, stride);
        let (mut sums, mut expected) = (vec![1.0f32; 2 * c], vec![1.0f64; 2 * c]);
        gradient_sums(isa, case.source(), &case.dy, &mut sums);
        for (i, channel, at) in case.places() {
            let (v, g) = case.before(i, channel);
            // On the fold, either slope is the derivative.
            let fold = v.abs() < 1e-5;
            near(seen[at], v.max(case.slope * v), 1e-5, &what("read"));
            let [_, _, a, b, shift] = &case.constants;
            let dz = a[channel] * g + b[channel] * case.z[i].f32() + shift[channel];
            if !fold {
                near(pulled[at], dz, 1e-5, &what("pull_back"));
            }
            expected[channel] += f64::from(g);
            expected[c + channel] += f64::from(g) * f64::from(case.z[i].f32());
        }
        for (got, expected) in sums.iter().zip(&expected) {
            near(*got, *expected as f32, 1e-4, &what("gradient_sums"));
        }
        for p in 0..n {
            let rest = p * stride + c..(p + 1) * stride;
            assert!(
                seen[rest.clone()].iter().chain(&pulled[rest]).all(|&v| v == 0.0),
                "{}",
                what("the rest")
            );
        }

        let bias = &case.constants[2];
        let mut z = vec![T::of(7.0); n * c];
        let (mut sums, mut expected) = (vec![1.0f32; 2 * c], vec![1.0f64; 2 * c]);
        finish(isa, &case.wide, stride, bias, &mut z, &mut sums);
        for (i, channel, at) in case.places() {
            let v = case.wide[at] + bias[channel];
            near(z[i].f32(), v, rounding, &what("finish"));
            expected[channel] += f64::from(v);
            expected[c + channel] += f64::from(v) * f64::from(v);
        }
        for (got, expected) in sums.iter().zip(&expected) {
            near(*got, *expected as f32, 1e-4, &what("finish's sums"));
        }

        for add in [false, true] {
            let mut to = case.dy.clone();
            deposit(isa, &case.wide, stride, c, &mut to, add);
            for (i, _, at) in case.places() {
                let before = if add { case.dy[i].f32() } else { 0.0 };
                near(to[i].f32(), case.wide[at] + before, rounding, &what("deposit"));
            }
            // The same values, and the sums over them.
            let mut whole = case.dy.clone();
            let (mut sums, mut expected) = (vec![1.0f32; 2 * c], vec![1.0f64; 2 * c]);
            deposit_whole(isa, &case.wide, stride, case.source(), &mut whole, add, &mut sums);
            assert!(whole == to, "{}", what("deposit_whole"));
            for (i, channel, at) in case.places() {
                let d = case.wide[at] + if add { case.dy[i].f32() } else { 0.0 };
                let g = f64::from(d * if case.before(i, channel).0 > 0.0 { 1.0 } else { case.slope });
                expected[channel] += g;
                expected[c + channel] += g * f64::from(case.z[i].f32());
            }
            for (got, expected) in sums.iter().zip(&expected) {
                near(*got, *expected as f32, 1e-4, &what("deposit_whole's sums"));
            }
        }
        let mut sums = vec![1.0f32; c];
        column_sums(isa, &case.wide, stride, &mut sums);
        let mut expected = vec![1.0f64; c];
        case.places().for_each(|(_, channel, at)| expected[channel] += f64::from(case.wide[at]));
        for (got, expected) in sums.iter().zip(&expected) {
            near(*got, *expected as f32, 1e-4, &what("column_sums"));
        }
    }
}

#[test]
fn passes_equal_plain_loops() {
    for isa in Isa::supported() {
        check::<f32>(isa, 3);
    }
    if bf16_supported() {
        check::<bf16>(isa::detected(), 4);
    } else {
        println!("skipped: no bf16 on this machine");
    }
}
