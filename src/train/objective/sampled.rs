//! A loss over the anchors that a sampler chooses.

use super::head::{box_loss, Head, Place};
use super::pictures::{wanted, Losses};
use crate::detect::anchors::Anchor;
use crate::graph::init::Rng;
use crate::train::losses::{sigmoid_cross_entropy, softmax_cross_entropy2, LossRecipe, ScaleAwareMargin};
use crate::train::matching::{FaceBox, Matches};
use crate::train::sampler::{GroupSample, SamplerRecipe};

/// One picture's anchors, of which some are chosen.
pub(super) struct Sampled<'a> {
    pub(super) sampler: &'a SamplerRecipe,
    pub(super) loss: &'a LossRecipe,
    pub(super) variances: [f32; 2],
    pub(super) head: &'a Head<'a>,
    pub(super) maps: &'a [&'a [f32]],
    pub(super) faces: &'a [FaceBox],
    /// With the mined anchors among the positives.
    pub(super) matches: &'a Matches,
    /// Whether the matching gave an anchor its face, not the mining.
    pub(super) is_matched: &'a dyn Fn(usize) -> bool,
    /// What an anchor's offsets are relative to.
    pub(super) anchor: &'a dyn Fn(usize) -> Anchor,
}

impl Sampled<'_> {
    /// Group Sampling Eq. 2 (or its like without groups), as a share of `images`.
    pub(super) fn losses(&self, rng: &mut Rng, images: usize, gradient: &mut [Vec<f32>]) -> Losses {
        let chosen =
            self.sampler.sample(&self.matches.label, &self.hardness(), &self.head.grid.ranges(), rng);
        let logits = self.loss.classification.logits();
        let mut losses = Losses { faces: wanted(self.faces), ..Losses::default() };
        let share = 1.0 / images as f32;
        for GroupSample { positives, negatives, class_weight, box_weight } in chosen {
            for &i in positives.iter().chain(&negatives) {
                let (loss, slopes) = self.class_loss(i);
                let Place { class: (output, logit), .. } = self.head.at(i);
                losses.class += f64::from(loss * class_weight * share);
                for (to, slope) in gradient[output][logit..logit + logits].iter_mut().zip(slopes) {
                    *to += slope * class_weight * share;
                }
            }
            for &i in &positives {
                let Some(face) = self.matches.face(i) else { continue };
                if (self.is_matched)(i) {
                    losses.matched += 1;
                } else {
                    losses.mined += 1;
                }
                box_loss(
                    self.loss,
                    (self.anchor)(i),
                    self.head.at(i).boxes,
                    self.variances,
                    self.maps,
                    &self.faces[face].bbox,
                    box_weight * share,
                    gradient,
                    &mut losses,
                );
            }
        }
        losses
    }

    /// What the miners look at, -ln p_t of every anchor, whatever the loss; nothing where they do not.
    fn hardness(&self) -> Vec<f32> {
        if !self.sampler.needs_losses() {
            return Vec::new();
        }
        let loss = |(i, p): (usize, Place)| {
            let (face, x) = (self.matches.face(i).is_some(), &self.maps[p.class.0][p.class.1..]);
            match self.loss.classification.logits() {
                1 => sigmoid_cross_entropy(x[0], face).0,
                _ => softmax_cross_entropy2([x[0], x[1]], face).0,
            }
        };
        self.head.places().enumerate().map(loss).collect()
    }

    /// Loss of an anchor's logits, and its slopes.
    fn class_loss(&self, i: usize) -> (f32, [f32; 2]) {
        let margin = ScaleAwareMargin { alpha: self.loss.margin };
        let logits = self.loss.classification.logits();
        let Place { class: (output, logit), .. } = self.head.at(i);
        let bbox = self.matches.face(i).map(|f| self.faces[f].bbox);
        let size = bbox.map(|b| [b.width(), b.height()]);
        let (x, mut slopes) = (&self.maps[output][logit..logit + logits], [0.0; 2]);
        let loss = self.loss.classification.value(x, size, margin, &mut slopes[..logits]);
        (loss, slopes)
    }
}
