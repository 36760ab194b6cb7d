//! Boxes hashed by size and place, so that those that may overlap one are found without looking at all.
//!
//! Two boxes can only overlap by more than `t` where their sides differ by less than a factor 1/t and
//! their centres by less than the longer side. Every size octave has a grid of its own, with squares
//! as wide as its longest side.

use crate::detect::boxes::{BBox, Convention};

/// End of a bucket's list.
const NONE: u32 = u32::MAX;

/// Numbered boxes in buckets.
#[derive(Default)]
pub(super) struct Neighbours {
    /// The box added last of each bucket.
    heads: Vec<u32>,
    /// The box added before each in its bucket.
    next: Vec<u32>,
    /// Smallest and largest octave of any box.
    octaves: (i32, i32),
}

impl Neighbours {
    /// Makes room for boxes numbered 0 to `boxes` - 1.
    pub fn reserve(&mut self, boxes: usize) {
        let buckets = Self::buckets(boxes);
        if self.heads.len() < buckets {
            self.heads = vec![NONE; buckets];
        }
        if self.next.len() < boxes {
            self.next = vec![NONE; boxes];
        }
    }

    fn buckets(boxes: usize) -> usize {
        (boxes * 2).next_power_of_two()
    }

    /// Heap bytes held.
    #[cfg(test)]
    pub fn bytes(&self) -> usize {
        (self.heads.capacity() + self.next.capacity()) * size_of::<u32>()
    }

    /// Heap bytes after `reserve(boxes)` on a fresh one.
    pub fn bytes_for(boxes: usize) -> usize {
        (Self::buckets(boxes) + boxes) * size_of::<u32>()
    }

    /// Forgets all boxes.
    pub fn clear(&mut self) {
        self.heads.fill(NONE);
        self.octaves = (i32::MAX, i32::MIN);
    }

    /// Adds box `number`, which stands at `place`. No number twice.
    pub fn add(&mut self, number: u32, place: Place) {
        self.octaves = (self.octaves.0.min(place.octave), self.octaves.1.max(place.octave));
        let slot = self.bucket(place.square());
        self.next[number as usize] = self.heads[slot];
        self.heads[slot] = number;
    }

    /// Whether `test` is true of the number of any box that may overlap the one at `own` by more
    /// than `threshold`; no more are asked then. Others are asked too, along with the square that was
    /// looked at.
    pub fn any(&self, own: Place, threshold: f32, mut test: impl FnMut(u32, Square) -> bool) -> bool {
        // log2 of the largest ratio of sides, rounded up, and one for the two sides' own rounding.
        let apart = (1.0 / threshold).log2().ceil() as i32 + 1;
        let (least, most) = self.octaves;
        for octave in (own.octave - apart).max(least)..=(own.octave + apart).min(most) {
            let there = Place { octave, ..own }.square();
            // Centres are less than the longer of the two sides apart.
            let reach = (width(own.octave.max(octave)) / width(octave)).ceil() as i64;
            for dy in -reach..=reach {
                for dx in -reach..=reach {
                    let square = Square { octave, x: there.x.wrapping_add(dx), y: there.y.wrapping_add(dy) };
                    let mut k = self.heads[self.bucket(square)];
                    while k != NONE {
                        if test(k, square) {
                            return true;
                        }
                        k = self.next[k as usize];
                    }
                }
            }
        }
        false
    }

    /// Calls `visit` with the number of every box that may overlap the one at `own` by more than
    /// `threshold`, and of others. Squares may share a bucket, so that a box may come several times:
    /// it counts where it stands on the square.
    pub fn each(&self, own: Place, threshold: f32, mut visit: impl FnMut(u32, Square)) {
        self.any(own, threshold, |k, square| {
            visit(k, square);
            false
        });
    }

    fn bucket(&self, square: Square) -> usize {
        let mut h = square.octave as u64;
        for v in [square.x, square.y] {
            h = (h ^ v as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            h ^= h >> 29;
        }
        h as usize & (self.heads.len() - 1)
    }
}

/// Width of an octave's squares: more than any of its sides.
fn width(octave: i32) -> f32 {
    2f32.powi(octave + 1)
}

/// Centre and size octave of a box: its longer side is at least 2^octave and less than twice that.
#[derive(Clone, Copy)]
pub(super) struct Place {
    center: [f32; 2],
    octave: i32,
}

impl Place {
    /// None for boxes without a usable size (empty, NaN, infinite): nothing overlaps them by more
    /// than a threshold but what the plain comparison finds.
    pub fn of(b: &BBox, convention: Convention) -> Option<Self> {
        let side = b.width().max(b.height()) + convention.extra();
        let center = [(b.x1 + b.x2) / 2.0, (b.y1 + b.y2) / 2.0];
        let usable = side > 1e-20 && side < 1e20 && center.iter().all(|c| c.abs() < 1e20);
        let positive = b.width() + convention.extra() > 0.0 && b.height() + convention.extra() > 0.0;
        // The exponent of a positive, normal float.
        let octave = (side.to_bits() >> 23) as i32 - 127;
        (usable && positive).then_some(Self { center, octave })
    }

    /// Where it is hashed.
    pub fn square(&self) -> Square {
        let [x, y] = self.center.map(|c| (c / width(self.octave)).floor() as i64);
        Square { octave: self.octave, x, y }
    }
}

/// A square of the grid of a size octave.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Square {
    octave: i32,
    x: i64,
    y: i64,
}
