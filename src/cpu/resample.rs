//! The safe face of the kernels that resample and normalise rows of pixels: on the registers of the CPU's instruction set,
//! with the same bits on each.

use super::isa::{self, Isa};
use super::kernels::resample::{ColumnsArgs, ResampleKernels};
use super::kernels::Kernels;

pub(crate) use super::kernels::resample::{Constants, Sample};

/// Kernels of one ISA that this CPU has.
#[derive(Clone, Copy)]
pub(crate) struct Resampler(&'static ResampleKernels);

/// Where each column looks, and with what weights.
#[derive(Clone, Copy)]
pub(crate) struct Columns<'a> {
    first: &'a [u32],
    last: &'a [u32],
    head: &'a [f32],
    tail: &'a [f32],
    /// Values that a row needs.
    reach: usize,
}

impl<'a> Columns<'a> {
    /// Column i is `head[i]` times the pixel whose values begin at `first[i]` plus `tail[i]` times the one at `last[i]`.
    pub fn new(first: &'a [u32], last: &'a [u32], head: &'a [f32], tail: &'a [f32]) -> Self {
        let n = first.len();
        assert!(last.len() == n && head.len() == n && tail.len() == n, "columns of several lengths");
        let furthest = first.iter().chain(last).max().map_or(0, |&at| at as usize);
        Self { first, last, head, tail, reach: furthest.saturating_add(4) }
    }

    /// Columns.
    pub fn len(&self) -> usize {
        self.first.len()
    }

    /// Places of the first and of the last pixel of column `i`, and their weights.
    pub fn at(&self, i: usize) -> ([usize; 2], [f32; 2]) {
        ([self.first[i] as usize, self.last[i] as usize], [self.head[i], self.tail[i]])
    }
}

impl Resampler {
    /// Of the instruction set in use.
    pub fn detected() -> Self {
        Self::of(isa::detected())
    }

    /// Of `isa`.
    pub fn of(isa: Isa) -> Self {
        Self(&Kernels::of(isa).resample)
    }

    /// `sum = weight * row`, as many values as both have.
    pub fn weigh<T: Sample>(self, sum: &mut [f32], row: &[T], weight: f32) {
        // SAFETY: an `Isa` value is proof that the CPU has it.
        unsafe { (T::rows(self.0).weigh)(sum, row, weight) }
    }

    /// `sum += weights[0] * rows[0] + weights[1] * rows[1]`, or `=` for the `first` rows, as many values as all have.
    pub fn weigh_pair<T: Sample>(self, sum: &mut [f32], [a, b]: [&[T]; 2], weights: [f32; 2], first: bool) {
        // SAFETY: an `Isa` value is proof that the CPU has it.
        unsafe { (T::rows(self.0).weigh_pair)(sum, a, b, weights, first) }
    }

    /// Normalises the pixels of `src` into `dst`, which must be as long.
    pub fn normalize<T: Sample>(self, src: &[T], dst: &mut [f32], constants: &Constants) {
        // SAFETY: an `Isa` value is proof that the CPU has it.
        unsafe { (T::rows(self.0).normalize)(src, dst, constants) }
    }

    /// Resamples `row` to `columns` and normalises it into `out`. `row` has one value more than the pixels looked at.
    pub fn columns(self, row: &[f32], columns: &Columns<'_>, out: &mut [f32], constants: &Constants) {
        assert!(row.len() >= columns.reach || columns.len() == 0, "row too short");
        assert!(out.len() >= 3 * columns.len(), "result too short");
        let args = ColumnsArgs {
            row: row.as_ptr(),
            first: columns.first.as_ptr(),
            last: columns.last.as_ptr(),
            head: columns.head.as_ptr(),
            tail: columns.tail.as_ptr(),
            columns: columns.len(),
            out: out.as_mut_ptr(),
            constants,
        };
        // SAFETY: an `Isa` value is proof that the CPU has it; the lengths and places were checked.
        unsafe { (self.0.columns)(&args) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::init::Rng;

    #[test]
    fn every_instruction_set_gives_the_bits_of_the_formula() {
        let mut rng = Rng::new(9);
        for round in 0..200 {
            let (pixels, n) = (1 + rng.below(150), rng.below(50));
            let constants = Constants::new([103.9, 116.7, 123.1], [0.017, 0.5, 1.0], round % 2 == 1);
            let bytes: Vec<u8> = (0..3 * pixels).map(|_| rng.below(256) as u8).collect();
            let floats: Vec<f32> = (0..3 * pixels + 1).map(|_| rng.range(0.0, 255.0)).collect();
            let places = |rng: &mut Rng| (0..n).map(|_| 3 * rng.below(pixels) as u32).collect::<Vec<_>>();
            let weights = |rng: &mut Rng| (0..n).map(|_| rng.uniform()).collect::<Vec<_>>();
            let (first, last) = (places(&mut rng), places(&mut rng));
            let (head, tail) = (weights(&mut rng), weights(&mut rng));
            let columns = Columns::new(&first, &last, &head, &tail);
            let norm = |v: &dyn Fn(usize) -> f32, c: usize| {
                (v(if constants.swap { 2 - c } else { c }) - constants.mean[c]) * constants.scale[c]
            };
            let guard = -7.5;
            for isa in Isa::supported() {
                let (r, what) = (Resampler::of(isa), format!("{isa:?} {pixels} {n} {}", constants.swap));
                let mut out = vec![guard; 3 * n + 1];
                r.columns(&floats, &columns, &mut out[..3 * n], &constants);
                for i in 0..n {
                    let ([a, z], [head, tail]) = columns.at(i);
                    let v = |c: usize| head * floats[a + c] + tail * floats[z + c];
                    (0..3)
                        .for_each(|c| assert_eq!(out[3 * i + c].to_bits(), norm(&v, c).to_bits(), "{what}"));
                }
                assert_eq!(out[3 * n], guard, "{what}");
                check_rows(r, &bytes, &constants, &what);
                check_rows(r, &floats[..3 * pixels], &constants, &what);
            }
        }
    }

    fn check_rows<T: Sample>(r: Resampler, row: &[T], c: &Constants, what: &str) {
        let (n, weights) = (row.len(), [0.3f32, 0.6]);
        let other: Vec<T> = row.iter().rev().copied().collect();
        let mut sum = vec![-7.5f32; n + 1];
        r.weigh(&mut sum[..n], row, weights[0]);
        (0..n).for_each(|i| assert_eq!(sum[i].to_bits(), (weights[0] * row[i].value()).to_bits(), "{what}"));
        for first in [true, false] {
            let before = sum.clone();
            r.weigh_pair(&mut sum[..n], [row, &other], weights, first);
            for i in 0..n {
                let pair = weights[0] * row[i].value() + weights[1] * other[i].value();
                let expected = if first { pair } else { before[i] + pair };
                assert_eq!(sum[i].to_bits(), expected.to_bits(), "{what}");
            }
        }
        assert_eq!(sum[n], -7.5, "{what}");
        let mut out = vec![-7.5f32; n + 1];
        r.normalize(row, &mut out, c);
        for i in 0..n {
            let from = if c.swap { i / 3 * 3 + 2 - i % 3 } else { i };
            let expected = (row[from].value() - c.mean[i % 3]) * c.scale[i % 3];
            assert_eq!(out[i].to_bits(), expected.to_bits(), "{what}");
        }
        assert_eq!(out[n], -7.5, "{what}");
    }
}
