//! The best candidates of a picture, collected over levels and tiles in bounded memory.

use super::face::Face;
use std::cmp::Ordering;
use std::collections::BinaryHeap;

/// A candidate and when it came, which breaks the last ties.
#[derive(Clone, Copy)]
pub(crate) struct Ranked {
    pub face: Face,
    order: u32,
}

// "Greater" is worse, so that the heap's top is the first to go and ascending order is best first.
impl Ord for Ranked {
    fn cmp(&self, other: &Self) -> Ordering {
        // Equal scores by place, which does not depend on how the picture was cut into tiles.
        let place = |r: &Self| [r.face.bbox.y1, r.face.bbox.x1, r.face.bbox.y2, r.face.bbox.x2];
        let (a, b) = (place(self), place(other));
        let places = a.iter().zip(&b).map(|(a, b)| a.total_cmp(b));
        other
            .face
            .score
            .total_cmp(&self.face.score)
            .then_with(|| places.fold(Ordering::Equal, Ordering::then))
            .then(self.order.cmp(&other.order))
    }
}
impl PartialOrd for Ranked {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl PartialEq for Ranked {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}
impl Eq for Ranked {}

/// The best `limit` candidates.
#[derive(Default)]
pub(crate) struct Candidates {
    heap: BinaryHeap<Ranked>,
    sorted: Vec<Ranked>,
    limit: usize,
    seen: u32,
}

impl Candidates {
    /// Sets the limit and makes room for it.
    pub fn reserve(&mut self, limit: usize) {
        if limit != self.limit {
            *self = Self { heap: BinaryHeap::with_capacity(limit), limit, ..Self::default() };
        }
    }

    /// Heap bytes for a limit.
    pub fn bytes_for(limit: usize) -> usize {
        limit * size_of::<Ranked>()
    }

    /// Forgets all candidates, keeps the memory.
    pub fn clear(&mut self) {
        if self.sorted.capacity() > 0 {
            let mut sorted = std::mem::take(&mut self.sorted);
            sorted.clear();
            self.heap = BinaryHeap::from(sorted);
        }
        self.heap.clear();
        self.seen = 0;
    }

    /// Score that a new candidate must pass to be taken.
    pub fn floor(&self) -> f32 {
        match self.heap.peek() {
            Some(worst) if self.heap.len() >= self.limit => worst.face.score,
            _ => f32::NEG_INFINITY,
        }
    }

    /// Takes a candidate, dropping the worst where there are too many.
    pub fn push(&mut self, face: Face) {
        let new = Ranked { face, order: self.seen };
        self.seen = self.seen.wrapping_add(1);
        if self.heap.len() < self.limit {
            self.heap.push(new);
        } else if let Some(mut worst) = self.heap.peek_mut() {
            if new < *worst {
                *worst = new;
            }
        }
    }

    /// The candidates, best first.
    pub fn sorted(&mut self) -> &[Ranked] {
        self.sorted = std::mem::take(&mut self.heap).into_vec();
        self.sorted.sort_unstable();
        &self.sorted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_stay_in_order_and_nothing_is_allocated_twice() {
        let mut c = Candidates::default();
        c.reserve(3);
        for _ in 0..2 {
            c.clear();
            for score in [0.1, 0.9, 0.5, 0.7, 0.9, 0.2] {
                c.push(Face { score, ..Face::default() });
            }
            assert_eq!(c.floor(), 0.7);
            let sorted = c.sorted();
            assert_eq!(
                sorted.iter().map(|r| (r.face.score, r.order)).collect::<Vec<_>>(),
                [(0.9, 1), (0.9, 4), (0.7, 3)]
            );
        }
        assert_eq!(c.sorted.capacity(), 3);
    }
}
