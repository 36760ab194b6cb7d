//! An objective as the device's kernels take it: recipes to rules, levels to places in the outputs, faces to boxes.

use crate::detect::BBox;
use crate::error::{Error, Result};
use crate::gpu::driver::Stream;
use crate::gpu::memory::DeviceBuffer;
use crate::gpu::ops::train::objective::{
    AnchorGroup, Batch, BoxRule, ClassRule, FirstStep, Judge, LossRule, MatchRule, MineRule, Miner, Others,
    Rules, SampleRule, SecondPass,
};
use crate::gpu::ops::train::Values;
use crate::shape::Shape;
use crate::train::data::Annotated;
use crate::train::losses::{BoxLoss, ClassLoss, LossRecipe, NoOverlap, IGNORED_OVERLAP};
use crate::train::matching::{self, AnchorGrid, AnchorMining, MatchingRecipe};
use crate::train::network::{Judgement, ObjectiveRef};
use crate::train::objective::{
    Channels, FirstChannels, GroupChannels, Losses, Objective, TwoStep, VARIANCES,
};
use crate::train::sampler::{self, Reduction, SamplerRecipe};

/// Judges outputs that lie one behind the other, as f32, at the beginning of `outputs`; their gradients go to the same places of
/// `gradient`. Each of the judgements takes as many of the `shapes` as it has outputs. Where `others` have parts of the batch, losses and
/// gradients are shares of the whole one's.
pub fn judge(
    judge: &mut Judge,
    stream: &Stream,
    [outputs, gradient]: [&DeviceBuffer; 2],
    shapes: &[Shape],
    judgements: &[Judgement<'_>],
    others: Option<&dyn Others>,
) -> Result<Vec<Losses>> {
    let wanted: usize = judgements.iter().map(|j| j.objective.outputs()).sum();
    if wanted != shapes.len() {
        return Err(Error::Internal(format!("{wanted} outputs are judged, there are {}", shapes.len())));
    }
    let (mut all, mut shapes, mut first) = (Vec::new(), shapes, 0);
    for j in judgements {
        let (own, rest) = shapes.split_at(j.objective.outputs());
        let len = own.iter().map(|s| s.len()).sum();
        let [outputs, gradient] = [outputs, gradient].map(|buffer| Values { buffer, at: first * 4, len });
        all.push(judged(judge, stream, [outputs, gradient], own, j, others)?);
        (shapes, first) = (rest, first + len);
    }
    Ok(all)
}

fn judged(
    judge: &mut Judge,
    stream: &Stream,
    [outputs, gradient]: [Values<'_>; 2],
    shapes: &[Shape],
    judgement: &Judgement<'_>,
    others: Option<&dyn Others>,
) -> Result<Losses> {
    let Judgement { objective, faces, inside, seeds, weight } = judgement;
    let boxes = corners_of(faces);
    let outer =
        Batch { groups: &[], first: None, faces: &boxes, inside: None, seeds, outputs, gradient, others };
    let sums = match objective {
        ObjectiveRef::OneStep(objective) => {
            let (grid, channels) = objective.placed(shapes, faces.len())?;
            let groups = second_groups(&grid, &channels, &Outputs::new(shapes))?;
            let within = objective.sampler.as_ref().is_some_and(|s| s.within_picture);
            let borders: Option<Vec<[f32; 4]>> = within.then(|| inside.iter().map(corners).collect());
            let batch = Batch { groups: &groups, inside: borders.as_deref(), ..outer };
            judge.judge(stream, &batch, &rules(objective, *weight))?
        }
        ObjectiveRef::TwoStep(objective) => {
            let (grid, first, second) = objective.placed(shapes, faces.len())?;
            let outputs = Outputs::new(shapes);
            let first = FirstStep {
                groups: &first_groups(&grid, &first, &outputs)?,
                matching: match_rule(&objective.first),
                survives: objective.survives,
            };
            let groups = second_groups(&grid, &second, &outputs)?;
            let batch = Batch { groups: &groups, first: Some(first), ..outer };
            judge.judge(stream, &batch, &two_step_rules(objective, *weight))?
        }
    };
    Ok(Losses {
        class: sums.class * f64::from(*weight),
        boxes: sums.boxes * f64::from(*weight),
        matched: sums.matched,
        mined: sums.mined,
        faces: faces.iter().flatten().filter(|f| !f.ignore).count(),
        iou: sums.iou / (sums.matched + sums.mined).max(1) as f64,
    })
}

fn corners(b: &BBox) -> [f32; 4] {
    [b.x1, b.y1, b.x2, b.y2]
}

/// Corners of each picture's faces, and whether they are to be ignored.
pub(super) fn corners_of(faces: &[Vec<Annotated>]) -> Vec<Vec<([f32; 4], bool)>> {
    faces.iter().map(|own| own.iter().map(|f| (corners(&f.bbox), f.ignore)).collect()).collect()
}

/// Where the values of outputs are that lie one behind the other.
pub(super) struct Outputs<'a> {
    shapes: &'a [Shape],
    /// The first of each.
    pub(super) starts: Vec<usize>,
}

impl<'a> Outputs<'a> {
    pub(super) fn new(shapes: &'a [Shape]) -> Self {
        let start = |end: &mut usize, s: &Shape| {
            *end += s.len();
            Some(*end - s.len())
        };
        Self { shapes, starts: shapes.iter().scan(0, start).collect() }
    }

    /// The first value of channels, from a picture to the next, from a cell to the next.
    fn place(&self, c: Channels) -> Result<(i64, i64, u32)> {
        let shape = self.shapes[c.output];
        let picture = shape.len() / shape.n.max(1);
        Ok(((self.starts[c.output] + c.first) as i64, picture as i64, narrow(c.per_cell)?))
    }
}

pub(super) fn narrow(v: usize) -> Result<u32> {
    u32::try_from(v).map_err(|_| Error::LimitExceeded("a map is too large for the device".into()))
}

/// Anchors of a group of which nothing is said.
fn plain_group(g: &matching::AnchorGroup) -> Result<AnchorGroup> {
    Ok(AnchorGroup {
        first: narrow(g.first)?,
        cells: narrow(g.len())?,
        columns: narrow(g.cols)?,
        stride: g.stride as f32,
        width: g.width,
        height: g.height,
        ..AnchorGroup::default()
    })
}

fn with_logits(group: AnchorGroup, (logits, logit_picture, logit_cell): (i64, i64, u32)) -> AnchorGroup {
    AnchorGroup { logits, logit_picture, logit_cell, parts: group.parts | AnchorGroup::LOGITS, ..group }
}

/// With offsets `box_step` values apart.
fn with_boxes(
    group: AnchorGroup,
    (boxes, box_picture, box_cell): (i64, i64, u32),
    box_step: u32,
) -> AnchorGroup {
    AnchorGroup { boxes, box_picture, box_cell, box_step, parts: group.parts | AnchorGroup::BOXES, ..group }
}

/// The groups of the only step or of the second, which says everything of every anchor.
pub(super) fn second_groups(
    grid: &AnchorGrid,
    channels: &[GroupChannels],
    outputs: &Outputs<'_>,
) -> Result<Vec<AnchorGroup>> {
    let group = |(g, c): (&matching::AnchorGroup, &GroupChannels)| {
        let group = with_logits(plain_group(g)?, outputs.place(c.class)?);
        Ok(with_boxes(group, outputs.place(c.boxes)?, narrow(c.step)?))
    };
    grid.groups.iter().zip(channels).map(group).collect()
}

/// The same of the first step.
pub(super) fn first_groups(
    grid: &AnchorGrid,
    channels: &[FirstChannels],
    outputs: &Outputs<'_>,
) -> Result<Vec<AnchorGroup>> {
    let group = |(g, c): (&matching::AnchorGroup, &FirstChannels)| {
        let group = plain_group(g)?;
        Ok(match c {
            FirstChannels::None => group,
            FirstChannels::Classes(c) => with_logits(group, outputs.place(*c)?),
            FirstChannels::Boxes(c) => with_boxes(group, outputs.place(*c)?, 1),
        })
    };
    grid.groups.iter().zip(channels).map(group).collect()
}

fn rules(objective: &Objective, weight: f32) -> Rules {
    let Objective { variances, matching, mining, sampler, loss, .. } = objective;
    // The losses over all anchors take all, whatever the sampler.
    let sampling = sampler.as_ref().filter(|_| !loss.classification.takes_all()).map(sample_rule);
    Rules {
        variances: *variances,
        matching: match_rule(matching),
        mining: mining.as_ref().map(mine_rule),
        sampling,
        loss: loss_rule(loss, weight),
    }
}

/// Of the second step; of the first those of its losses.
fn two_step_rules(objective: &TwoStep, weight: f32) -> Rules {
    let TwoStep { second, mining, sampler, loss, .. } = objective;
    Rules {
        variances: VARIANCES,
        matching: match_rule(second),
        mining: mining.as_ref().map(mine_rule),
        sampling: sampler.as_ref().map(sample_rule),
        loss: loss_rule(loss, weight),
    }
}

pub(super) fn match_rule(recipe: &MatchingRecipe) -> MatchRule {
    let [low, high] = recipe.thresholds();
    let second = match recipe {
        MatchingRecipe::TwoPassScan { second_pass: matching::SecondPass::All, .. } => SecondPass::All,
        MatchingRecipe::TwoPassScan { second_pass: matching::SecondPass::Best, .. } => SecondPass::Best,
        MatchingRecipe::Thresholds { force_best: true, .. } => SecondPass::Force,
        MatchingRecipe::Thresholds { .. } | MatchingRecipe::FirstStep { .. } => SecondPass::None,
    };
    MatchRule { low, high, second }
}

fn mine_rule(mining: &AnchorMining) -> MineRule {
    MineRule {
        // There are fewer anchors than that.
        anchors: mining.anchors.min(i32::MAX as usize) as u32,
        overlap: mining.overlap,
        floor: mining.overlap.min(IGNORED_OVERLAP),
    }
}

pub(super) fn sample_rule(sampler: &SamplerRecipe) -> SampleRule {
    SampleRule {
        miner: match sampler.miner {
            sampler::Miner::All {} => Miner::All,
            sampler::Miner::Random {} => Miner::Random,
            sampler::Miner::Ohem {} => Miner::Ohem,
            sampler::Miner::Wrs {} => Miner::Wrs,
            sampler::Miner::Balanced { each, min_loss } => Miner::Balanced { each: each as u64, min_loss },
            sampler::Miner::Focal { alpha, gamma } => Miner::Focal { alpha, gamma },
        },
        grouped: sampler.grouped,
        samples: sampler.samples as u64,
        ratio: sampler.negatives_per_positive as u64,
        sum: sampler.reduction == Reduction::Sum,
    }
}

fn class_rule(loss: &ClassLoss) -> ClassRule {
    match *loss {
        ClassLoss::Softmax {} => ClassRule::Softmax,
        ClassLoss::Sigmoid {} => ClassRule::Sigmoid,
        ClassLoss::Focal { alpha, gamma } => ClassRule::Focal { alpha, gamma },
        ClassLoss::QualityFocal { beta } => ClassRule::QualityFocal { beta },
        ClassLoss::RegressionAwareFocal { alpha, gamma } => ClassRule::RegressionAwareFocal { alpha, gamma },
    }
}

pub(super) fn loss_rule(loss: &LossRecipe, weight: f32) -> LossRule {
    let class = class_rule(&loss.classification);
    let draws = |no_overlap| no_overlap == NoOverlap::SmoothL1;
    let boxes = match loss.boxes {
        BoxLoss::SmoothL1 { beta } => BoxRule::SmoothL1 { beta },
        BoxLoss::NegLnIou { no_overlap } => BoxRule::NegLnIou { draws: draws(no_overlap) },
        BoxLoss::LeastSquareIou { no_overlap } => BoxRule::LeastSquareIou { draws: draws(no_overlap) },
    };
    LossRule { class, boxes, box_weight: loss.box_weight, margin: loss.margin, weight }
}
