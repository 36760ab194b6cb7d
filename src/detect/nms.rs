//! Non-maximum suppression that stays fast with tens of thousands of candidates: greedy, with box
//! voting, and soft.
//!
//! Boxes are hashed by size and place, and a candidate is compared with its neighbours alone; the
//! result is that of comparing all pairs. Gaussian soft-NMS does compare all, as do thresholds below 0.1.

mod neighbours;
mod soft;
#[cfg(test)]
mod tests;
mod voting;

use super::boxes::{BBox, Convention, Detection};
use neighbours::{Neighbours, Place};
use soft::{Decay, Pending};
use std::collections::binary_heap::PeekMut;
use std::collections::BinaryHeap;
use voting::Voters;

/// Overlap of the boxes that vote, in the paper.
pub const VOTING_IOU: f32 = 0.5;
/// Width of soft-NMS's Gaussian decay, in the paper.
pub const SOFT_SIGMA: f32 = 0.5;

/// How candidates that overlap become one face.
#[derive(Clone, Copy, Debug, PartialEq, Default)]
pub enum Suppression {
    /// The best box is kept, and what overlaps it by more than the NMS IoU goes; then the next best.
    #[default]
    Greedy,
    /// Greedy; then each box that is left becomes the mean of all candidates that overlap it by more
    /// than `iou`, itself included, weighted with their scores (Gidaris and Komodakis 2015, section 5). Score, landmarks and
    /// ellipse stay its own; a mean may lie a little outside the sizes asked for.
    Voting {
        /// Overlap that the boxes that vote exceed, 0 to 1; [`VOTING_IOU`] in the paper.
        iou: f32,
    },
    /// Soft-NMS (Bodla et al. 2017, section 3), linear: the best box is kept, and the score of what overlaps it by more
    /// than the NMS IoU is multiplied with 1 - IoU; then the next best.
    SoftLinear,
    /// Soft-NMS with Gaussian decay: the factor is exp(-IoU^2 / `sigma`), and the NMS IoU does not matter. Time grows with the
    /// square of the candidates.
    SoftGaussian {
        /// Width of the decay, above 0; [`SOFT_SIGMA`] in the paper.
        sigma: f32,
    },
}

impl Suppression {
    /// Whether scores decay.
    pub fn is_soft(self) -> bool {
        matches!(self, Suppression::SoftLinear | Suppression::SoftGaussian { .. })
    }
}

/// One way from candidates to faces.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rule {
    /// What becomes of boxes that overlap.
    pub suppression: Suppression,
    /// Overlap above which they concern each other, 0 to 1.
    pub iou: f32,
    /// What overlap is.
    pub convention: Convention,
    /// Score that a box must pass after decay.
    pub floor: f32,
    /// Most boxes kept.
    pub limit: usize,
}

/// Up to this many candidates, comparing with all kept boxes is quicker than hashing.
const FEW: usize = 64;

/// Whether to hash: below a tenth, neighbourhoods grow so large that it does not pay.
fn hashes(count: usize, threshold: f32) -> bool {
    count > FEW && threshold >= 0.1
}

/// Reusable buffers.
#[derive(Default)]
pub struct Nms {
    kept: Vec<u32>,
    neighbours: Neighbours,
    /// Empty between calls.
    pending: Vec<Pending>,
}

impl Nms {
    /// Makes room for this many candidates; later calls with no more of them allocate nothing.
    pub fn reserve(&mut self, candidates: usize, suppression: Suppression) {
        self.neighbours.reserve(candidates);
        if self.kept.capacity() < candidates {
            self.kept = Vec::with_capacity(candidates);
        }
        if suppression.is_soft() && self.pending.capacity() < candidates {
            self.pending = Vec::with_capacity(candidates);
        }
    }

    /// Heap bytes after `reserve` on a fresh one.
    pub fn bytes_for(candidates: usize, suppression: Suppression) -> usize {
        let pending = if suppression.is_soft() { size_of::<Pending>() } else { 0 };
        Neighbours::bytes_for(candidates) + candidates * (size_of::<u32>() + pending)
    }

    /// Gives `keep` the boxes that survive, best first: which candidate it is, and its box and score now. The `count`
    /// candidates stand in descending score.
    pub fn run(
        &mut self,
        count: usize,
        candidate: impl Fn(usize) -> Detection,
        rule: &Rule,
        mut keep: impl FnMut(usize, Detection),
    ) {
        self.reserve(count, rule.suppression);
        self.kept.clear();
        match rule.suppression {
            Suppression::Greedy => {
                self.greedy(count, &candidate, rule);
                self.kept.iter().for_each(|&i| keep(i as usize, candidate(i as usize)));
            }
            Suppression::Voting { iou } => {
                self.greedy(count, &candidate, rule);
                let hashed = hashes(count, iou);
                if hashed {
                    self.hash(count, &candidate, rule.convention);
                }
                let hashed = hashed.then_some(&self.neighbours);
                let voters =
                    Voters { hashed, count, candidate: &candidate, iou, convention: rule.convention };
                for &i in &self.kept {
                    let own = candidate(i as usize);
                    keep(i as usize, Detection { bbox: voters.mean(&own.bbox), ..own });
                }
            }
            Suppression::SoftLinear => {
                self.soft(count, &candidate, rule, Decay::Linear { iou: rule.iou }, keep)
            }
            Suppression::SoftGaussian { sigma } => {
                self.soft(count, &candidate, rule, Decay::Gaussian { sigma }, keep)
            }
        }
    }

    /// Keeps the candidates that overlap no kept one by more than the threshold.
    fn greedy(&mut self, count: usize, candidate: &impl Fn(usize) -> Detection, rule: &Rule) {
        let &Rule { iou, convention, .. } = rule;
        let hashed = hashes(count, iou);
        if hashed {
            self.neighbours.clear();
        }
        for i in 0..count {
            if self.kept.len() >= rule.limit {
                break;
            }
            let b = candidate(i).bbox;
            let place = Place::of(&b, convention).filter(|_| hashed);
            let suppresses = |k: u32| convention.exceeds(&b, &candidate(k as usize).bbox, iou);
            let suppressed = match place {
                Some(place) => self.neighbours.any(place, iou, |k, _| suppresses(k)),
                None => self.kept.iter().any(|&k| suppresses(k)),
            };
            if suppressed {
                continue;
            }
            self.kept.push(i as u32);
            if let Some(place) = place {
                self.neighbours.add(i as u32, place);
            }
        }
    }

    /// Hashes all candidates by their numbers.
    fn hash(&mut self, count: usize, candidate: &impl Fn(usize) -> Detection, convention: Convention) {
        self.neighbours.clear();
        for i in 0..count {
            if let Some(place) = Place::of(&candidate(i).bbox, convention) {
                self.neighbours.add(i as u32, place);
            }
        }
    }

    /// Keeps the best candidate, again and again, until none is left above the floor.
    fn soft(
        &mut self,
        count: usize,
        candidate: &impl Fn(usize) -> Detection,
        rule: &Rule,
        decay: Decay,
        mut keep: impl FnMut(usize, Detection),
    ) {
        let hashed = hashes(count, decay.threshold());
        if hashed {
            self.neighbours.clear();
        }
        let mut pending = std::mem::take(&mut self.pending);
        let all = (0..count).map(|i| Pending { score: candidate(i).score, index: i as u32, seen: 0 });
        pending.extend(all);
        let mut pending = BinaryHeap::from(pending);
        while let Some(mut best) = pending.peek_mut() {
            let (index, kept) = (best.index as usize, self.kept.len());
            let bbox = candidate(index).bbox;
            let place = Place::of(&bbox, rule.convention).filter(|_| hashed);
            if (best.seen as usize) < kept {
                let factor = self.decayed(&bbox, place, best.seen, candidate, rule.convention, decay);
                best.score *= factor;
                best.seen = kept as u32;
                // It falls to where it belongs when `best` goes out of scope.
                continue;
            }
            // False for a NaN too.
            let found = best.score > rule.floor;
            if !found || kept >= rule.limit {
                break;
            }
            let score = PeekMut::pop(best).score;
            keep(index, Detection { bbox, score });
            if let Some(place) = place {
                self.neighbours.add(kept as u32, place);
            }
            self.kept.push(index as u32);
        }
        self.pending = pending.into_vec();
        self.pending.clear();
    }

    /// What the kept boxes from the `seen`th on leave of the score of the box `b` at `place`.
    fn decayed(
        &self,
        b: &BBox,
        place: Option<Place>,
        seen: u32,
        candidate: &impl Fn(usize) -> Detection,
        convention: Convention,
        decay: Decay,
    ) -> f32 {
        let threshold = decay.threshold();
        let mut left = 1.0;
        let mut meet = |other: &BBox| {
            let (inter, union) = convention.areas(b, other);
            // Rounding must not raise a score.
            left *= decay.factor((inter / union).clamp(0.0, 1.0));
        };
        let kept = |k: u32| candidate(self.kept[k as usize] as usize).bbox;
        match place {
            Some(place) => {
                self.neighbours.each(place, threshold, |k, square| {
                    let here =
                        |other: &BBox| Place::of(other, convention).is_some_and(|p| p.square() == square);
                    if k >= seen {
                        let other = kept(k);
                        if convention.exceeds(b, &other, threshold) && here(&other) {
                            meet(&other);
                        }
                    }
                });
            }
            None => {
                let later = (seen..self.kept.len() as u32).map(kept);
                later.filter(|o| convention.exceeds(b, o, threshold)).for_each(|o| meet(&o));
            }
        }
        left
    }
}
