//! Greedy non-maximum suppression that stays fast with tens of thousands of candidates.
//!
//! Two boxes can only overlap by more than `t` where their sides differ by less than a factor 1/t and
//! their centres by less than the longer side. Kept boxes are therefore hashed by size octave and
//! position, and a candidate is compared with its neighbours alone; the result is that of comparing all pairs.

use super::boxes::BBox;

/// Intersection over union as the detector's authors computed it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Convention {
    /// Width = x2 - x1.
    Continuous,
    /// Width = x2 - x1 + 1 (inclusive pixel corners), in areas and overlaps.
    PlusOne,
}

impl Convention {
    fn extra(self) -> f32 {
        match self {
            Convention::Continuous => 0.0,
            Convention::PlusOne => 1.0,
        }
    }

    /// Whether two boxes overlap by more than `threshold`.
    fn exceeds(self, a: &BBox, b: &BBox, threshold: f32) -> bool {
        let e = self.extra();
        let w = (a.x2.min(b.x2) - a.x1.max(b.x1) + e).max(0.0);
        let h = (a.y2.min(b.y2) - a.y1.max(b.y1) + e).max(0.0);
        let area = |r: &BBox| (r.width() + e) * (r.height() + e);
        let inter = w * h;
        inter > threshold * (area(a) + area(b) - inter)
    }
}

/// End of a bucket's list.
const NONE: u32 = u32::MAX;
/// Up to this many candidates, comparing with all kept boxes is quicker than hashing.
const FEW: usize = 64;

/// Reusable buffers.
#[derive(Default)]
pub struct Nms {
    heads: Vec<u32>,
    next: Vec<u32>,
    kept: Vec<u32>,
}

impl Nms {
    /// Makes room for this many candidates; later calls with no more of them allocate nothing.
    pub fn reserve(&mut self, candidates: usize) {
        let buckets = (candidates * 2).next_power_of_two();
        if self.heads.len() < buckets {
            self.heads = vec![NONE; buckets];
        }
        if self.next.len() < candidates {
            self.next = vec![NONE; candidates];
            self.kept = Vec::with_capacity(candidates);
        }
    }

    /// Heap bytes held.
    pub fn bytes(&self) -> usize {
        (self.heads.capacity() + self.next.capacity() + self.kept.capacity()) * size_of::<u32>()
    }

    /// Heap bytes after `reserve(candidates)` on a fresh one.
    pub fn bytes_for(candidates: usize) -> usize {
        ((candidates * 2).next_power_of_two() + 2 * candidates) * size_of::<u32>()
    }

    /// Indices of the boxes that survive, in order. `boxes` stand in descending score; a box goes
    /// where it overlaps a kept one by more than `threshold` (0 to 1). At most `limit` are kept.
    pub fn run(
        &mut self,
        count: usize,
        bbox: impl Fn(usize) -> BBox,
        threshold: f32,
        convention: Convention,
        limit: usize,
    ) -> &[u32] {
        self.reserve(count);
        self.kept.clear();
        // Below a tenth, neighbourhoods grow so large that the hash does not pay.
        let hashed = count > FEW && threshold >= 0.1;
        if hashed {
            self.heads.fill(NONE);
        }
        let mut octaves = (i32::MAX, i32::MIN);
        for i in 0..count {
            if self.kept.len() >= limit {
                break;
            }
            let b = bbox(i);
            let cell = Cell::of(&b, convention);
            let suppressed = if hashed && cell.is_some() {
                self.near(&b, cell, octaves, &bbox, threshold, convention)
            } else {
                self.kept.iter().any(|&k| convention.exceeds(&b, &bbox(k as usize), threshold))
            };
            if suppressed {
                continue;
            }
            self.kept.push(i as u32);
            if let (true, Some(c)) = (hashed, cell) {
                octaves = (octaves.0.min(c.octave), octaves.1.max(c.octave));
                let slot = c.bucket(self.heads.len(), 0, 0);
                self.next[i] = self.heads[slot];
                self.heads[slot] = i as u32;
            }
        }
        &self.kept
    }

    /// Whether a kept box near `b` suppresses it.
    fn near(
        &self,
        b: &BBox,
        cell: Option<Cell>,
        octaves: (i32, i32),
        bbox: &impl Fn(usize) -> BBox,
        threshold: f32,
        convention: Convention,
    ) -> bool {
        let Some(own) = cell else { return false };
        // log2 of the largest ratio of sides, rounded up, and one for the two sides' own rounding.
        let apart = (1.0 / threshold).log2().ceil() as i32 + 1;
        for octave in (own.octave - apart).max(octaves.0)..=(own.octave + apart).min(octaves.1) {
            let there = Cell::at(own.center, octave);
            // Centres are less than the longer of the two sides apart.
            let side = Cell::side(octave);
            let reach = (Cell::side(own.octave.max(octave)) / side).ceil() as i64;
            for dy in -reach..=reach {
                for dx in -reach..=reach {
                    let mut k = self.heads[there.bucket(self.heads.len(), dx, dy)];
                    while k != NONE {
                        if convention.exceeds(b, &bbox(k as usize), threshold) {
                            return true;
                        }
                        k = self.next[k as usize];
                    }
                }
            }
        }
        false
    }
}

/// Where a box is hashed: its size octave and the grid cell of its centre, cells as wide as the
/// octave's largest side.
#[derive(Clone, Copy)]
struct Cell {
    octave: i32,
    x: i64,
    y: i64,
    center: [f32; 2],
}

impl Cell {
    fn side(octave: i32) -> f32 {
        2f32.powi(octave + 1)
    }

    /// None for boxes without a usable size (empty, NaN, infinite): nothing overlaps them by more
    /// than a threshold but what the plain comparison finds.
    fn of(b: &BBox, convention: Convention) -> Option<Self> {
        let side = b.width().max(b.height()) + convention.extra();
        let center = [(b.x1 + b.x2) / 2.0, (b.y1 + b.y2) / 2.0];
        let usable = side > 1e-20 && side < 1e20 && center.iter().all(|c| c.abs() < 1e20);
        let positive = b.width() + convention.extra() > 0.0 && b.height() + convention.extra() > 0.0;
        (usable && positive).then(|| Self::at(center, side.log2().floor() as i32))
    }

    fn at(center: [f32; 2], octave: i32) -> Self {
        let side = Self::side(octave);
        let [x, y] = center.map(|c| (c / side).floor() as i64);
        Self { octave, x, y, center }
    }

    fn bucket(&self, buckets: usize, dx: i64, dy: i64) -> usize {
        let mut h = self.octave as u64;
        for v in [self.x.wrapping_add(dx), self.y.wrapping_add(dy)] {
            h = (h ^ v as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            h ^= h >> 29;
        }
        h as usize & (buckets - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn plain(boxes: &[BBox], t: f32, c: Convention) -> Vec<u32> {
        let mut kept: Vec<u32> = Vec::new();
        for (i, b) in boxes.iter().enumerate() {
            if !kept.iter().any(|&k| c.exceeds(b, &boxes[k as usize], t)) {
                kept.push(i as u32);
            }
        }
        kept
    }

    fn boxes(n: usize) -> impl Strategy<Value = Vec<BBox>> {
        let one = (-50f32..400.0, -50f32..300.0, -1f32..7.5, 0.4f32..2.5)
            .prop_map(|(x, y, log, ratio)| BBox::from_xywh(x, y, log.exp2(), log.exp2() * ratio));
        prop::collection::vec(one, 0..n)
    }

    proptest! {
        #[test]
        fn hashing_keeps_exactly_what_comparing_all_pairs_keeps(
            b in boxes(600),
            t in prop::sample::select(vec![0.1f32, 0.3, 0.4, 0.5, 0.7, 0.95]),
            plus in any::<bool>(),
        ) {
            let c = if plus { Convention::PlusOne } else { Convention::Continuous };
            let mut nms = Nms::default();
            prop_assert_eq!(nms.run(b.len(), |i| b[i], t, c, usize::MAX), plain(&b, t, c));
        }
    }

    #[test]
    fn broken_boxes_neither_panic_nor_hide_others() {
        let nan = f32::NAN;
        let mut b = vec![BBox::new(nan, nan, nan, nan), BBox::new(5.0, 5.0, 1.0, 1.0)];
        b.extend((0..100).map(|i| BBox::from_xywh(i as f32 * 20.0, 0.0, 10.0, 10.0)));
        b.push(BBox::new(f32::NEG_INFINITY, 0.0, f32::INFINITY, 1.0));
        let mut nms = Nms::default();
        assert_eq!(nms.run(b.len(), |i| b[i], 0.5, Convention::Continuous, usize::MAX).len(), b.len());
    }

    #[test]
    fn the_limit_keeps_the_best() {
        let b: Vec<BBox> = (0..200).map(|i| BBox::from_xywh(i as f32 * 20.0, 0.0, 10.0, 10.0)).collect();
        assert_eq!(Nms::default().run(200, |i| b[i], 0.5, Convention::Continuous, 3), [0, 1, 2]);
    }
}
