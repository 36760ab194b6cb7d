//! Soft-NMS (Bodla et al. 2017, section 3): what overlaps a kept box loses score instead of going.
//!
//! The paper rescores all candidates whenever a box is kept. Here a candidate is rescored when it
//! comes to the top, by the boxes kept since it was last there: scores only fall, so that what stays on top is the best, and
//! the result is the paper's.

use std::cmp::Ordering;

/// A candidate that is not kept yet. The greatest is the next to look at.
#[derive(Clone, Copy)]
pub(super) struct Pending {
    /// Its score after the first `seen` kept boxes.
    pub score: f32,
    /// Its number, which breaks ties: the smaller first.
    pub index: u32,
    /// Kept boxes that it has been compared with.
    pub seen: u32,
}

impl Ord for Pending {
    fn cmp(&self, other: &Self) -> Ordering {
        self.score.total_cmp(&other.score).then(other.index.cmp(&self.index))
    }
}
impl PartialOrd for Pending {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl PartialEq for Pending {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}
impl Eq for Pending {}

/// What a kept box leaves of the score of one that overlaps it by `iou`.
#[derive(Clone, Copy)]
pub(super) enum Decay {
    /// 1 - iou above `iou`, all of it below.
    Linear {
        /// N_t of the paper.
        iou: f32,
    },
    /// exp(-iou^2 / sigma).
    Gaussian {
        /// Width of the decay.
        sigma: f32,
    },
}

impl Decay {
    /// Overlap up to which nothing is lost.
    pub fn threshold(self) -> f32 {
        match self {
            Decay::Linear { iou } => iou,
            Decay::Gaussian { .. } => 0.0,
        }
    }

    /// The factor at an overlap above the threshold.
    pub fn factor(self, iou: f32) -> f32 {
        match self {
            Decay::Linear { .. } => 1.0 - iou,
            Decay::Gaussian { sigma } => (-iou * iou / sigma).exp(),
        }
    }
}
