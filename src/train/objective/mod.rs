//! From a single-shot detector's outputs and a batch's faces to the loss and the outputs' gradients: matching, mining,
//! sampling, losses.

mod head;
mod pictures;
mod pyramid_anchors;
mod sampled;
pub mod second_look;
mod two_step;

use super::data::Annotated;
use super::losses::{
    quality_focal_loss, regression_aware_box_weight, regression_aware_focal_loss, AnchorRole, BatchCounts,
    ClassLoss, Focal, LossRecipe, ScaleAwareMargin,
};
use super::matching::{
    match_anchors, mine_high_quality_anchors, AnchorGrid, AnchorMining, FaceBox, Matches, MatchingRecipe,
    Mined,
};
use super::sampler::SamplerRecipe;
use crate::detect::BBox;
use crate::error::{Error, Result};
use crate::graph::init::Rng;
use crate::shape::{Shape, Tensor};
#[cfg(feature = "cuda")]
pub(super) use head::Channels;
pub(super) use head::GroupChannels;
use head::{box_loss, Head, Place};
pub use head::{Layout, Level};
#[cfg(feature = "cuda")]
use pictures::check_shapes;
use pictures::{check_outputs, face_boxes, gathered, parallel, picture_maps, wanted};
pub use pictures::{Losses, Sum, Whole};
pub use pyramid_anchors::PyramidAnchors;
use sampled::Sampled;
pub use second_look::SecondLook;
pub use two_step::TwoStep;
#[cfg(feature = "cuda")]
pub(super) use two_step::{FirstChannels, VARIANCES};

/// How a batch is judged.
#[derive(Clone, Debug)]
pub struct Objective {
    /// The detector's, in the order of its outputs.
    pub levels: Vec<Level>,
    /// Of the box code.
    pub variances: [f32; 2],
    /// First step of matching.
    pub matching: MatchingRecipe,
    /// Online anchor mining, where wanted.
    pub mining: Option<AnchorMining>,
    /// Which anchors count; all of them without one (the focal loss), and for the losses that take all anyway (regression-aware
    /// and quality focal).
    pub sampler: Option<SamplerRecipe>,
    /// Losses.
    pub loss: LossRecipe,
}

/// What one picture's anchors are.
struct Assigned {
    faces: Vec<FaceBox>,
    matches: Matches,
    mined: Option<Mined>,
}

impl Assigned {
    fn role(&self, i: usize) -> AnchorRole {
        match &self.mined {
            Some(mined) => mined.role(&self.matches, i),
            None => match (self.matches.face(i), self.matches.label[i]) {
                (Some(face), _) => AnchorRole::Matched { face },
                (None, super::matching::IGNORED) => AnchorRole::Ignored,
                _ => AnchorRole::Background { overlap: 0.0 },
            },
        }
    }
}

/// A detector's objective.
#[derive(Clone, Debug)]
pub enum DetectorObjective {
    /// It looks once.
    OneStep(Objective),
    /// It looks twice.
    TwoStep(TwoStep),
}

impl DetectorObjective {
    /// How many outputs it judges.
    pub fn outputs(&self) -> usize {
        match self {
            DetectorObjective::OneStep(o) => o.outputs(),
            DetectorObjective::TwoStep(o) => o.outputs(),
        }
    }

    /// As [`Objective::judge_part`].
    pub fn judge(
        &self,
        outputs: &[Tensor],
        faces: &[Vec<Annotated>],
        inside: &[BBox],
        rng: impl Fn(usize) -> Rng + Sync,
        threads: usize,
        whole: Whole<'_>,
    ) -> Result<(Losses, Vec<Tensor>)> {
        match self {
            DetectorObjective::OneStep(o) => o.judge_part(outputs, faces, inside, rng, threads, whole),
            DetectorObjective::TwoStep(o) => o.judge_part(outputs, faces, rng, threads, whole),
        }
    }
}

impl Objective {
    /// Errors where a part's settings are out of range or do not go together.
    pub fn check(&self) -> Result<()> {
        self.matching.check()?;
        self.loss.check()?;
        if let Some(sampler) = &self.sampler {
            sampler.check()?;
        }
        if let Some(mining) = &self.mining {
            mining.check()?;
        }
        let (wanted, there) =
            (self.loss.classification.logits(), self.levels.iter().map(|l| l.layout.logits()));
        if there.clone().any(|n| n != wanted) {
            return Err(Error::InvalidArgument(if wanted == 2 {
                "loss: classification softmax (the default) wants two logits an anchor, this detector has one: name sigmoid, focal, quality-focal or regression-aware-focal".into()
            } else {
                "loss: this detector has two logits an anchor, background and face: classification must be softmax".into()
            }));
        }
        if self.sampler.is_none() && wanted == 2 {
            return Err(Error::InvalidArgument("loss: softmax needs a sampler".into()));
        }
        let aware = matches!(self.loss.classification, ClassLoss::RegressionAwareFocal { .. });
        if aware && self.mining.is_none() {
            return Err(Error::InvalidArgument(
                "loss: regression-aware-focal needs online anchor mining: add a [mining] table".into(),
            ));
        }
        Ok(())
    }

    /// How many outputs it judges.
    pub fn outputs(&self) -> usize {
        self.levels.iter().map(|l| l.layout.outputs()).sum()
    }

    /// The anchors of a picture whose outputs have these shapes, and where every group's channels are.
    fn grid(&self, outputs: &[Shape]) -> (AnchorGrid, Vec<GroupChannels>) {
        let (mut grid, mut groups, mut output) = (AnchorGrid::new(), Vec::new(), 0);
        for level in &self.levels {
            let shape = outputs[output];
            for (a, [w, h]) in level.anchors.iter().enumerate() {
                grid.push(level.stride, *w, *h, shape.h, shape.w);
                groups.push(GroupChannels::new(level, output, a));
            }
            output += level.layout.outputs();
        }
        (grid, groups)
    }

    /// As [`Self::grid`], for the outputs of so many pictures, which must be those of the levels.
    #[cfg(feature = "cuda")]
    pub(super) fn placed(
        &self,
        outputs: &[Shape],
        images: usize,
    ) -> Result<(AnchorGrid, Vec<GroupChannels>)> {
        check_shapes(outputs, &self.channels(), images)?;
        Ok(self.grid(outputs))
    }

    /// Channels of every output.
    fn channels(&self) -> Vec<usize> {
        self.levels.iter().flat_map(Level::channels).collect()
    }

    /// Losses of a batch, and their gradients with respect to `outputs` (N x H x W x C, C as the levels' layouts say), on `threads` threads. `rng`
    /// gives a generator for each picture. The result does not depend on the number of threads.
    pub fn judge(
        &self,
        outputs: &[Tensor],
        faces: &[Vec<Annotated>],
        rng: impl Fn(usize) -> Rng + Sync,
        threads: usize,
    ) -> Result<(Losses, Vec<Tensor>)> {
        self.judge_within(outputs, faces, &[], rng, threads)
    }

    /// As [`Objective::judge`]; `inside` is what each picture fills of its example, pixels, for a sampler that leaves out the
    /// anchors that cross its border.
    pub fn judge_within(
        &self,
        outputs: &[Tensor],
        faces: &[Vec<Annotated>],
        inside: &[BBox],
        rng: impl Fn(usize) -> Rng + Sync,
        threads: usize,
    ) -> Result<(Losses, Vec<Tensor>)> {
        self.judge_part(outputs, faces, inside, rng, threads, Whole::at_hand(faces.len()))
    }

    /// As [`Objective::judge_within`], of pictures that may be a part of a batch: losses and gradients are shares of the whole one's.
    pub fn judge_part(
        &self,
        outputs: &[Tensor],
        faces: &[Vec<Annotated>],
        inside: &[BBox],
        rng: impl Fn(usize) -> Rng + Sync,
        threads: usize,
        whole: Whole<'_>,
    ) -> Result<(Losses, Vec<Tensor>)> {
        let within = self.sampler.as_ref().is_some_and(|s| s.within_picture);
        if within && inside.len() != faces.len() {
            return Err(Error::Internal("a sampler within the pictures wants their borders".into()));
        }
        let shapes = check_outputs(outputs, &self.channels(), faces.len())?;
        let (grid, groups) = self.grid(&shapes);
        let head = Head { grid: &grid, groups: &groups };
        let images = faces.len();
        let assigned: Vec<Assigned> = parallel(images, threads, |n| {
            let inside = within.then(|| &inside[n]);
            self.assign(&head, &picture_maps(outputs, n), &faces[n], inside)
        });
        let mut counts = BatchCounts::default();
        for a in &assigned {
            counts.matched += a.matches.label.iter().filter(|&&l| l >= 0).count();
            counts.compensated += a.mined.as_ref().map_or(0, |m| m.compensated.len());
        }
        let sampler = self.sampler.as_ref().filter(|_| !self.loss.classification.takes_all());
        if sampler.is_none() {
            let [matched, compensated, _] = whole.counts([counts.matched, counts.compensated, 0])?;
            counts = BatchCounts { matched, compensated };
        }
        let judged = parallel(images, threads, |n| {
            let maps = picture_maps(outputs, n);
            let mut gradient: Vec<Vec<f32>> = maps.iter().map(|m| vec![0.0; m.len()]).collect();
            let losses = match sampler {
                Some(sampler) => {
                    self.sampled(sampler, &head, &maps, &assigned[n], rng(n), whole.images(), &mut gradient)
                }
                None => self.every_anchor(&head, &maps, &assigned[n], counts, &mut gradient),
            };
            (losses, gradient)
        });
        Ok(gathered(&shapes, judged))
    }

    fn assign(
        &self,
        head: &Head<'_>,
        maps: &[&[f32]],
        faces: &[Annotated],
        inside: Option<&BBox>,
    ) -> Assigned {
        let faces = face_boxes(faces);
        let mut matches = match_anchors(head.grid, &faces, &self.matching);
        if let Some(inside) = inside {
            matches.ignore_crossing(head.grid, inside);
        }
        let mined = self.mining.as_ref().map(|mining| {
            let decoded = head.decoded(maps, self.variances);
            mine_high_quality_anchors(|i| decoded[i], &faces, &matches, mining)
        });
        Assigned { faces, matches, mined }
    }

    /// Over one picture's anchors, all of them, as a share of the batch's: HAMBox Eq. 1 and 2; or another loss over the number
    /// of the batch's positives, mined ones counted, and the boxes' of its faces.
    fn every_anchor(
        &self,
        head: &Head<'_>,
        maps: &[&[f32]],
        assigned: &Assigned,
        counts: BatchCounts,
        gradient: &mut [Vec<f32>],
    ) -> Losses {
        let margin = ScaleAwareMargin { alpha: self.loss.margin };
        let positives = 1.0 / (counts.matched + counts.compensated).max(1) as f32;
        let mut losses = Losses { faces: wanted(&assigned.faces), ..Losses::default() };
        for (i, place) in head.places().enumerate() {
            let Place { class: (output, logit), .. } = place;
            let role = assigned.role(i);
            let face = match role {
                AnchorRole::Matched { face } | AnchorRole::Compensated { face, .. } => Some(face),
                AnchorRole::Background { .. } | AnchorRole::Ignored => None,
            };
            let bbox = face.map(|f| &assigned.faces[f].bbox);
            let x = margin.logit(maps[output][logit], bbox.map(|b| [b.width(), b.height()]));
            let (loss, slope, box_weight) = match self.loss.classification {
                ClassLoss::QualityFocal { beta } => {
                    let fits =
                        |b: &BBox| head.grid.anchor(i).decode(&place.boxes.read(maps), self.variances).iou(b);
                    let Some(quality) = role.quality(|| bbox.map_or(0.0, fits)) else { continue };
                    let (loss, slope) = quality_focal_loss(x, quality, beta);
                    (loss * positives, slope * positives, positives)
                }
                ClassLoss::RegressionAwareFocal { alpha, gamma } => {
                    let (loss, slope) = regression_aware_focal_loss(x, role, counts, Focal { alpha, gamma });
                    (loss, slope, regression_aware_box_weight(role, counts))
                }
                loss => {
                    if matches!(role, AnchorRole::Ignored) {
                        continue;
                    }
                    let mut slope = [0.0];
                    let size = bbox.map(|b| [b.width(), b.height()]);
                    let logit = &maps[output][logit..logit + 1];
                    let value = loss.value(logit, size, margin, &mut slope);
                    (value * positives, slope[0] * positives, positives)
                }
            };
            losses.class += f64::from(loss);
            gradient[output][logit] = slope;
            let Some(bbox) = bbox else { continue };
            match role {
                AnchorRole::Matched { .. } => losses.matched += 1,
                _ => losses.mined += 1,
            }
            let anchor = head.grid.anchor(i);
            box_loss(
                &self.loss,
                anchor,
                place.boxes,
                self.variances,
                maps,
                bbox,
                box_weight,
                gradient,
                &mut losses,
            );
        }
        losses
    }

    /// Over those of one picture's anchors that the sampler chooses, as a share of `images`.
    fn sampled(
        &self,
        sampler: &SamplerRecipe,
        head: &Head<'_>,
        maps: &[&[f32]],
        assigned: &Assigned,
        mut rng: Rng,
        images: usize,
        gradient: &mut [Vec<f32>],
    ) -> Losses {
        let mut matches = assigned.matches.clone();
        if let Some(mined) = &assigned.mined {
            mined.relabel(&mut matches);
        }
        let sampled = Sampled {
            sampler,
            loss: &self.loss,
            variances: self.variances,
            head,
            maps,
            faces: &assigned.faces,
            matches: &matches,
            is_matched: &|i| assigned.matches.face(i).is_some(),
            anchor: &|i| head.grid.anchor(i),
        };
        sampled.losses(&mut rng, images, gradient)
    }
}
