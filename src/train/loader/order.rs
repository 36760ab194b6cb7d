//! Which sample comes when.

use std::sync::{Arc, Mutex, PoisonError};

use crate::graph::init::Rng;

/// Draws of an epoch's order.
const EPOCH: u64 = 1;
/// Draws of an example's augmentation.
pub(super) const EXAMPLE: u64 = 2;

/// The generator of one purpose and number. SplitMix64 states of neighbouring seeds run through the
/// same sequence, so seeds are mixed, not added.
pub(super) fn stream(seed: u64, purpose: u64, number: u64) -> Rng {
    let mixed = Rng::new(seed).bits() ^ purpose;
    Rng::new(Rng::new(Rng::new(mixed).bits() ^ number).bits())
}

/// A shuffle of the samples an epoch.
pub(super) struct Order {
    seed: u64,
    samples: usize,
    /// Those of the latest two epochs asked for: workers straddle a border.
    known: Mutex<Vec<(u64, Arc<Vec<usize>>)>>,
}

impl Order {
    pub(super) fn new(seed: u64, samples: usize) -> Self {
        Self { seed, samples, known: Mutex::default() }
    }

    /// The sample of a number that counts over all epochs.
    pub(super) fn index(&self, number: u64) -> usize {
        let (epoch, at) = (number / self.samples as u64, number % self.samples as u64);
        self.shuffle(epoch)[at as usize]
    }

    fn shuffle(&self, epoch: u64) -> Arc<Vec<usize>> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, order)) = known.iter().find(|(e, _)| *e == epoch) {
            return order.clone();
        }
        let mut rng = stream(self.seed, EPOCH, epoch);
        let mut order: Vec<usize> = (0..self.samples).collect();
        for i in (1..order.len()).rev() {
            order.swap(i, rng.below(i + 1));
        }
        let order = Arc::new(order);
        known.insert(0, (epoch, order.clone()));
        known.truncate(2);
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_epoch_shows_every_sample_once_in_another_order() {
        let order = Order::new(3, 50);
        let epoch = |e: u64| (0..50).map(|i| order.index(e * 50 + i)).collect::<Vec<_>>();
        let first = epoch(0);
        assert_ne!(first, epoch(1));
        assert_ne!(first, (0..50).map(|i| Order::new(4, 50).index(i)).collect::<Vec<_>>());
        epoch(7);
        assert_eq!(first, epoch(0));
        for e in 0..4 {
            let mut all = epoch(e);
            all.sort();
            assert!(all.into_iter().eq(0..50));
        }
    }

    #[test]
    fn streams_of_seeds_purposes_and_numbers_differ() {
        let mut seen = std::collections::HashSet::new();
        for seed in 0..8 {
            for purpose in [EPOCH, EXAMPLE] {
                for number in 0..64 {
                    let mut rng = stream(seed, purpose, number);
                    // Neither the same sequence nor a shifted one.
                    (0..4).for_each(|_| assert!(seen.insert(rng.bits()), "{seed} {purpose} {number}"));
                }
            }
        }
    }
}
