//! Which pixels of its output a step computes: all of them, shared between the threads by rows, or those that a mask asks
//! for, shared by their number.

use super::arena::View;
use super::threads::{for_images, Team};
use std::ops::Range;

/// Pixels between two runs of a row that are computed with them: fewer than a kernel's tile has.
const GAP: usize = 6;

/// A bit a pixel of one map, in the arena: rows of whole words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mask {
    /// First word, in floats of the arena.
    pub offset: usize,
    pub height: usize,
    pub width: usize,
}

impl Mask {
    /// Words a row.
    fn words(&self) -> usize {
        self.width.div_ceil(32)
    }

    /// Floats of the arena that it takes.
    pub fn footprint(height: usize, width: usize) -> usize {
        height * width.div_ceil(32)
    }

    /// One past its last float.
    pub fn end(&self) -> usize {
        self.offset + Self::footprint(self.height, self.width)
    }

    /// Row `y`.
    ///
    /// # Safety
    /// `base` is an arena in which the mask lies, and no thread writes this row meanwhile.
    unsafe fn row<'a>(&self, base: *mut f32, y: usize) -> &'a [u32] {
        // SAFETY: the caller's contract; floats and words have one size and alignment, and all bits are a word.
        unsafe {
            let first = base.add(self.offset + y * self.words()).cast::<u32>().cast_const();
            std::slice::from_raw_parts(first, self.words())
        }
    }

    /// Row `y`, writable.
    ///
    /// # Safety
    /// As [`Mask::row`], and no other thread reads it either.
    #[allow(clippy::mut_from_ref)] // of the arena, not of the mask
    unsafe fn row_mut<'a>(&self, base: *mut f32, y: usize) -> &'a mut [u32] {
        // SAFETY: as in `row`, and the caller's contract.
        unsafe {
            let first = base.add(self.offset + y * self.words()).cast::<u32>();
            std::slice::from_raw_parts_mut(first, self.words())
        }
    }

    /// Sets the pixels of this thread's share of the rows where any channel of `values` is above `least`, clears the others.
    ///
    /// # Safety
    /// `base` is an arena in which both lie apart; the map has the mask's size; all threads of the team call this together
    /// and none uses the mask otherwise.
    pub unsafe fn set_above(&self, base: *mut f32, values: &View, least: f32, team: &Team) {
        for y in team.share(self.height) {
            // SAFETY: the caller's contract; each row is one thread's.
            let row = unsafe { self.row_mut(base, y) };
            row.fill(0);
            for x in 0..self.width {
                // SAFETY: the caller's contract: a pixel of the map.
                let pixel =
                    unsafe { std::slice::from_raw_parts(base.add(values.at(0, y, x)), values.shape.c) };
                if pixel.iter().any(|&v| v > least) {
                    row[x / 32] |= 1 << (x % 32);
                }
            }
        }
    }

    /// Makes this thread's share of the rows `of` grown by so many pixels to the top, left, bottom and right.
    ///
    /// # Safety
    /// As [`Mask::set_above`], for two masks of one size.
    pub unsafe fn set_grown(
        &self,
        base: *mut f32,
        of: &Mask,
        [top, left, bottom, right]: [usize; 4],
        team: &Team,
    ) {
        for y in team.share(self.height) {
            // SAFETY: the caller's contract; each row is one thread's.
            let row = unsafe { self.row_mut(base, y) };
            row.fill(0);
            for from in y.saturating_sub(bottom)..(y + top + 1).min(self.height) {
                // SAFETY: the caller's contract: `of` is only read.
                let source = unsafe { of.row(base, from) };
                row.iter_mut().zip(source).for_each(|(r, s)| *r |= s);
            }
            (0..right).for_each(|_| smear_up(row));
            (0..left).for_each(|_| smear_down(row));
            // What grew beyond the last column.
            if let (Some(last), rest @ 1..) = (row.last_mut(), self.width % 32) {
                *last &= (1 << rest) - 1;
            }
        }
    }
}

/// Sets every pixel whose neighbour before it is set.
fn smear_up(row: &mut [u32]) {
    let mut carry = 0;
    for word in row {
        let next = *word >> 31;
        *word |= *word << 1 | carry;
        carry = next;
    }
}

/// Sets every pixel whose neighbour behind it is set.
fn smear_down(row: &mut [u32]) {
    let mut carry = 0;
    for word in row.iter_mut().rev() {
        let next = *word << 31;
        *word |= *word >> 1 | carry;
        carry = next;
    }
}

/// First pixel from `x` on of which `set` tells; `width` where there is none.
fn next(row: &[u32], x: usize, width: usize, set: bool) -> usize {
    let flip = if set { 0 } else { u32::MAX };
    let mut at = x;
    while at < width {
        let word = (row[at / 32] ^ flip) >> (at % 32);
        if word != 0 {
            return (at + word.trailing_zeros() as usize).min(width);
        }
        at = (at / 32 + 1) * 32;
    }
    width
}

/// Runs of a row's pixels, those with a small gap between them as one.
fn runs(row: &[u32], width: usize) -> impl Iterator<Item = Range<usize>> + '_ {
    let mut x = 0;
    std::iter::from_fn(move || {
        let start = next(row, x, width, true);
        if start == width {
            return None;
        }
        let mut end = next(row, start, width, false);
        loop {
            let following = next(row, end, width, true);
            if following == width || following - end > GAP {
                break;
            }
            end = next(row, following, width, false);
        }
        x = end;
        Some(start..end)
    })
}

/// The pixels of a step's output that are one thread's.
pub(crate) enum Part<'a> {
    /// These rows, counted over all images.
    Rows(Range<usize>),
    /// Of the pixels of a mask's runs, in their order, those of these numbers.
    Runs { mask: &'a Mask, base: *mut f32, mine: Range<usize> },
}

impl<'a> Part<'a> {
    /// This thread's share of a map of so many images and rows.
    pub fn rows(images: usize, height: usize, team: &Team) -> Self {
        Self::Rows(team.share(images * height))
    }

    /// This thread's share of what a mask asks for: of its rows where that is hardly less than everything.
    ///
    /// # Safety
    /// `base` is an arena in which the mask lies, and nobody writes it as long as the part is used.
    pub unsafe fn of_mask(mask: &'a Mask, base: *mut f32, team: &Team) -> Self {
        // SAFETY: the caller's contract.
        let row = |y| unsafe { mask.row(base, y) };
        let pixels: usize =
            (0..mask.height).flat_map(|y| runs(row(y), mask.width)).map(|run| run.len()).sum();
        // A tenth is about what a row cut in pieces costs more.
        if pixels * 10 > mask.height * mask.width * 9 {
            return Self::rows(1, mask.height, team);
        }
        Self::Runs { mask, base, mine: team.share(pixels) }
    }

    /// Whether any pixel of the tile of 4x4 in this row and column of tiles is asked for; of rows all are.
    pub fn wants_tile(&self, row: usize, column: usize) -> bool {
        let Self::Runs { mask, base, .. } = self else { return true };
        let x = 4 * column;
        // SAFETY: the contract of `of_mask`.
        (4 * row..(4 * row + 4).min(mask.height))
            .any(|y| unsafe { mask.row(*base, y) }[x / 32] >> (x % 32) & 15 != 0)
    }

    /// Whether this pixel or one of the eight around it is asked for; of rows all are.
    pub fn wants_near(&self, y: usize, x: usize) -> bool {
        let Self::Runs { mask, base, .. } = self else { return true };
        (y.saturating_sub(1)..(y + 2).min(mask.height)).any(|y| {
            // SAFETY: the contract of `of_mask`.
            let row = unsafe { mask.row(*base, y) };
            (x.saturating_sub(1)..(x + 2).min(mask.width)).any(|x| row[x / 32] >> (x % 32) & 1 != 0)
        })
    }

    /// Gives `f` an image, rows and columns at a time, of a map of so many rows and columns.
    pub fn each(&self, [height, width]: [usize; 2], mut f: impl FnMut(usize, Range<usize>, Range<usize>)) {
        match self {
            Self::Rows(rows) => for_images(rows.clone(), height, |n, rows| f(n, rows, 0..width)),
            Self::Runs { mask, base, mine } => {
                let mut count = 0;
                for y in 0..mask.height {
                    if count >= mine.end {
                        break;
                    }
                    // SAFETY: the contract of `of_mask`.
                    for run in runs(unsafe { mask.row(*base, y) }, mask.width) {
                        let cut = |at: usize| run.start + at.saturating_sub(count).min(run.len());
                        let own = cut(mine.start)..cut(mine.end);
                        if !own.is_empty() {
                            f(0, y..y + 1, own);
                        }
                        count += run.len();
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::{Arena, Pool};
    use crate::shape::Shape;
    use proptest::prelude::*;
    use std::sync::Mutex;

    /// Pixels that all threads together visit, each with how often, for the mask of the cells above 0 in `values`.
    fn visited(size: [usize; 2], values: &[f32], grow: [usize; 4], threads: usize) -> (Vec<u32>, usize) {
        let [h, w] = size;
        let map = View::new(Shape::new(1, 1, h, w), 0, [0; 4]);
        let words = Mask::footprint(h, w);
        let raw = Mask { offset: h * w, height: h, width: w };
        let grown = Mask { offset: h * w + words, ..raw };
        let mut arena = Arena::default();
        arena.reserve(grown.end()).unwrap();
        arena.floats_mut().fill(f32::NAN);
        arena.floats_mut()[..h * w].copy_from_slice(values);
        let base = arena.base();
        let seen = Mutex::new(vec![0; h * w]);
        let most = Mutex::new(0);
        Pool::new(threads).unwrap().run(&|team| {
            let base = base.get().cast();
            // SAFETY: map and masks lie in the arena, apart; threads write rows of their own, with barriers between.
            let part = unsafe {
                raw.set_above(base, &map, 0.0, team);
                team.barrier();
                grown.set_grown(base, &raw, grow, team);
                team.barrier();
                Part::of_mask(&grown, base, team)
            };
            let mut own = 0;
            part.each(size, |n, rows, columns| {
                assert_eq!(n, 0);
                own += rows.len() * columns.len();
                let mut seen = seen.lock().unwrap();
                rows.for_each(|y| columns.clone().for_each(|x| seen[y * w + x] += 1));
            });
            let mut most = most.lock().unwrap();
            *most = own.max(*most);
        });
        (seen.into_inner().unwrap(), most.into_inner().unwrap())
    }

    proptest! {
        #[test]
        fn every_pixel_near_a_survivor_is_one_threads(
            (h, w) in (1usize..20, 1usize..80),
            grow in prop::array::uniform4(0usize..5),
            chance in 0.0f64..0.2,
            threads in 1usize..4,
            seed in any::<u64>(),
        ) {
            let mut state = seed;
            let mut random = || {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                (state >> 33) as f64 / (1u64 << 31) as f64
            };
            let values: Vec<f32> = (0..h * w).map(|_| if random() < chance { 1.0 } else { -1.0 }).collect();
            let [top, left, bottom, right] = grow;
            let wanted = |y: usize, x: usize| {
                (y.saturating_sub(bottom)..(y + top + 1).min(h))
                    .any(|a| (x.saturating_sub(right)..(x + left + 1).min(w)).any(|b| values[a * w + b] > 0.0))
            };
            let (seen, most) = visited([h, w], &values, grow, threads);
            for y in 0..h {
                for x in 0..w {
                    let times = seen[y * w + x];
                    prop_assert!(times <= 1 && (times == 1 || !wanted(y, x)), "{times} times ({y}, {x})");
                }
            }
            let total: u32 = seen.iter().sum();
            let dense = total as usize == h * w;
            prop_assert!(dense || most <= (total as usize).div_ceil(threads), "{most} of {total}");
        }
    }

    #[test]
    fn far_pixels_are_left_out_and_small_gaps_are_not() {
        let mut values = vec![-1.0; 100];
        [3, 8, 40, 64, 99].into_iter().for_each(|x| values[x] = 1.0);
        values[50] = f32::NAN;
        let (seen, _) = visited([1, 100], &values, [0, 1, 0, 2], 2);
        let columns: Vec<usize> = (0..100).filter(|&x| seen[x] == 1).collect();
        let expected: Vec<usize> = (2..11).chain(39..43).chain(63..67).chain(98..100).collect();
        assert_eq!(columns, expected);
        assert_eq!(visited([2, 50], &[-1.0; 100], [9; 4], 3), (vec![0; 100], 0));
    }
}
