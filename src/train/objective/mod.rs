//! From a single-shot detector's outputs and a batch's faces to the loss and the outputs' gradients: matching, mining,
//! sampling, losses.

mod head;
mod pictures;
mod pyramid_anchors;
pub mod second_look;
mod two_step;

use super::data::Annotated;
use super::losses::{
    quality_focal_loss, regression_aware_box_weight, regression_aware_focal_loss, sigmoid_cross_entropy,
    softmax_cross_entropy2, AnchorRole, BatchCounts, ClassLoss, Focal, LossRecipe, ScaleAwareMargin,
};
use super::matching::{
    match_anchors, mine_high_quality_anchors, AnchorGrid, AnchorMining, FaceBox, Matches, MatchingRecipe,
    Mined,
};
use super::sampler::{GroupSample, SamplerRecipe};
use crate::detect::anchors::Anchor;
use crate::detect::BBox;
use crate::error::{Error, Result};
use crate::graph::init::Rng;
use crate::shape::{Shape, Tensor};
use head::{GroupChannels, Head, Place};
use pictures::{check_outputs, face_boxes, gathered, parallel, picture_maps, wanted};
pub use pyramid_anchors::PyramidAnchors;
pub use second_look::SecondLook;
pub use two_step::TwoStep;

/// The anchors of a level, on every cell of its maps.
#[derive(Clone, Debug, PartialEq)]
pub struct Level {
    /// Pixels between cells.
    pub stride: usize,
    /// Width and height of each anchor.
    pub anchors: Vec<[f32; 2]>,
    /// Where the detector's outputs have them.
    pub layout: Layout,
}

/// A level's channels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// One output: a logit for each anchor, then four offsets for each.
    Joint,
    /// Two outputs: a logit for each anchor, or two (background, face); four offsets for each.
    Apart {
        /// Of an anchor: 1 or 2.
        logits: usize,
    },
}

impl Layout {
    /// Outputs of a level.
    pub fn outputs(self) -> usize {
        match self {
            Layout::Joint => 1,
            Layout::Apart { .. } => 2,
        }
    }

    /// Logits of an anchor.
    pub fn logits(self) -> usize {
        match self {
            Layout::Joint => 1,
            Layout::Apart { logits } => logits,
        }
    }
}

impl Level {
    /// Channels of each of its outputs.
    fn channels(&self) -> Vec<usize> {
        let n = self.anchors.len();
        match self.layout {
            Layout::Joint => vec![5 * n],
            Layout::Apart { logits } => vec![logits * n, 4 * n],
        }
    }
}

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

/// Losses of a batch, and how many anchors they come from.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Losses {
    /// Classification; in a training with that of pyramid anchors and of a second look.
    pub class: f64,
    /// Boxes, before their weight; likewise.
    pub boxes: f64,
    /// Anchors matched, of those that entered the loss.
    pub matched: usize,
    /// Anchors mined, likewise.
    pub mined: usize,
    /// Faces to find.
    pub faces: usize,
    /// Mean IoU of the positives' decoded boxes with their faces.
    pub iou: f64,
}

impl Losses {
    fn add(&mut self, other: &Self) {
        self.class += other.class;
        self.boxes += other.boxes;
        self.matched += other.matched;
        self.mined += other.mined;
        self.faces += other.faces;
        self.iou += other.iou;
    }
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

    /// As [`Objective::judge`].
    pub fn judge(
        &self,
        outputs: &[Tensor],
        faces: &[Vec<Annotated>],
        rng: impl Fn(usize) -> Rng + Sync,
        threads: usize,
    ) -> Result<(Losses, Vec<Tensor>)> {
        match self {
            DetectorObjective::OneStep(o) => o.judge(outputs, faces, rng, threads),
            DetectorObjective::TwoStep(o) => o.judge(outputs, faces, threads),
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

    /// Losses of a batch, and their gradients with respect to `outputs` (N x H x W x C, C as the levels' layouts say), on `threads` threads. `rng`
    /// gives a generator for each picture. The result does not depend on the number of threads.
    pub fn judge(
        &self,
        outputs: &[Tensor],
        faces: &[Vec<Annotated>],
        rng: impl Fn(usize) -> Rng + Sync,
        threads: usize,
    ) -> Result<(Losses, Vec<Tensor>)> {
        let channels: Vec<usize> = self.levels.iter().flat_map(Level::channels).collect();
        let shapes = check_outputs(outputs, &channels, faces.len())?;
        let (grid, groups) = self.grid(&shapes);
        let head = Head { grid: &grid, groups: &groups };
        let images = faces.len();
        let assigned: Vec<Assigned> =
            parallel(images, threads, |n| self.assign(&head, &picture_maps(outputs, n), &faces[n]));
        let mut counts = BatchCounts::default();
        for a in &assigned {
            counts.matched += a.matches.label.iter().filter(|&&l| l >= 0).count();
            counts.compensated += a.mined.as_ref().map_or(0, |m| m.compensated.len());
        }
        let judged = parallel(images, threads, |n| {
            let maps = picture_maps(outputs, n);
            let mut gradient: Vec<Vec<f32>> = maps.iter().map(|m| vec![0.0; m.len()]).collect();
            let losses = match &self.sampler {
                Some(sampler) if !self.loss.classification.takes_all() => {
                    self.sampled(sampler, &head, &maps, &assigned[n], rng(n), images, &mut gradient)
                }
                _ => self.every_anchor(&head, &maps, &assigned[n], counts, &mut gradient),
            };
            (losses, gradient)
        });
        Ok(gathered(&shapes, judged))
    }

    fn assign(&self, head: &Head<'_>, maps: &[&[f32]], faces: &[Annotated]) -> Assigned {
        let faces = face_boxes(faces);
        let matches = match_anchors(head.grid, &faces, &self.matching);
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
                        |b: &BBox| head.grid.anchor(i).decode(&place.offsets(maps), self.variances).iou(b);
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

    /// Group Sampling Eq. 2 (or its like without groups) over one picture's anchors, as a share of `images`.
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
        let margin = ScaleAwareMargin { alpha: self.loss.margin };
        let mut matches = assigned.matches.clone();
        if let Some(mined) = &assigned.mined {
            mined.relabel(&mut matches);
        }
        let logits = self.loss.classification.logits();
        let value = |i: usize| {
            let Place { class: (output, logit), .. } = head.at(i);
            let size =
                matches.face(i).map(|f| [assigned.faces[f].bbox.width(), assigned.faces[f].bbox.height()]);
            let (x, mut slopes) = (&maps[output][logit..logit + logits], [0.0; 2]);
            let loss = self.loss.classification.value(x, size, margin, &mut slopes[..logits]);
            (loss, slopes)
        };
        let all: Vec<f32> = if sampler.needs_losses() {
            // The miners look at -ln p_t, whatever the loss.
            let loss = |(i, p): (usize, Place)| {
                let (face, x) = (matches.face(i).is_some(), &maps[p.class.0][p.class.1..]);
                match logits {
                    1 => sigmoid_cross_entropy(x[0], face).0,
                    _ => softmax_cross_entropy2([x[0], x[1]], face).0,
                }
            };
            head.places().enumerate().map(loss).collect()
        } else {
            Vec::new()
        };
        let samples = sampler.sample(&matches.label, &all, &head.grid.ranges(), &mut rng);
        let mut losses = Losses { faces: wanted(&assigned.faces), ..Losses::default() };
        let share = 1.0 / images as f32;
        for GroupSample { positives, negatives, class_weight, box_weight } in samples {
            for &i in positives.iter().chain(&negatives) {
                let (loss, slopes) = value(i);
                let Place { class: (output, logit), .. } = head.at(i);
                losses.class += f64::from(loss * class_weight * share);
                for (to, slope) in gradient[output][logit..logit + logits].iter_mut().zip(slopes) {
                    *to += slope * class_weight * share;
                }
            }
            for &i in &positives {
                let Some(face) = matches.face(i) else { continue };
                if assigned.matches.face(i).is_some() {
                    losses.matched += 1;
                } else {
                    losses.mined += 1;
                }
                let bbox = &assigned.faces[face].bbox;
                let (anchor, at, weight) = (head.grid.anchor(i), head.at(i).boxes, box_weight * share);
                box_loss(&self.loss, anchor, at, self.variances, maps, bbox, weight, gradient, &mut losses);
            }
        }
        losses
    }
}

/// Adds the loss of the offsets at `at` (output, place in its map) on an anchor, times `share`, and its gradient.
fn box_loss(
    loss: &LossRecipe,
    Anchor { center, size }: Anchor,
    (output, at): (usize, usize),
    variances: [f32; 2],
    maps: &[&[f32]],
    face: &BBox,
    share: f32,
    gradient: &mut [Vec<f32>],
    losses: &mut Losses,
) {
    let t = &maps[output][at..at + 4];
    let (anchor, target) = ([center[0], center[1], size[0], size[1]], [face.x1, face.y1, face.x2, face.y2]);
    let value = loss.boxes.value([t[0], t[1], t[2], t[3]], anchor, variances, target);
    losses.boxes += f64::from(value.loss * share);
    losses.iou += f64::from(value.iou);
    for (to, slope) in gradient[output][at..at + 4].iter_mut().zip(value.gradient) {
        *to += slope * share * loss.box_weight;
    }
}
