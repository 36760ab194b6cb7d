//! An objective as the device's kernels take it: recipes to rules, levels to places in the outputs, faces to boxes.

use crate::detect::BBox;
use crate::error::{Error, Result};
use crate::gpu::driver::Stream;
use crate::gpu::memory::DeviceBuffer;
use crate::gpu::ops::train::objective::{
    AnchorGroup, Batch, BoxRule, ClassRule, Judge, LossRule, MatchRule, MineRule, Miner, Rules, SampleRule,
    SecondPass,
};
use crate::gpu::ops::train::Values;
use crate::shape::Shape;
use crate::train::losses::{BoxLoss, ClassLoss, LossRecipe, NoOverlap, IGNORED_OVERLAP};
use crate::train::matching::{self, AnchorMining, MatchingRecipe};
use crate::train::network::Judgement;
use crate::train::objective::{GroupChannels, Losses, Objective};
use crate::train::sampler::{self, Reduction, SamplerRecipe};

/// Judges outputs that lie one behind the other, as f32, at the beginning of `outputs`; their gradients go to the same places of
/// `gradient`. Each of the judgements takes as many of the `shapes` as it has outputs.
pub fn judge(
    judge: &mut Judge,
    stream: &Stream,
    [outputs, gradient]: [&DeviceBuffer; 2],
    shapes: &[Shape],
    judgements: &[Judgement<'_>],
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
        all.push(judged(judge, stream, [outputs, gradient], own, j)?);
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
) -> Result<Losses> {
    let Judgement { objective, faces, inside, seeds, weight } = judgement;
    let groups = groups(objective, shapes, faces.len())?;
    let corners = |b: &BBox| [b.x1, b.y1, b.x2, b.y2];
    let boxes: Vec<Vec<_>> =
        faces.iter().map(|own| own.iter().map(|f| (corners(&f.bbox), f.ignore)).collect()).collect();
    let within = objective.sampler.as_ref().is_some_and(|s| s.within_picture);
    let borders: Option<Vec<[f32; 4]>> = within.then(|| inside.iter().map(corners).collect());
    let batch =
        Batch { groups: &groups, faces: &boxes, inside: borders.as_deref(), seeds, outputs, gradient };
    let sums = judge.judge(stream, &batch, &rules(objective, *weight)?)?;
    Ok(Losses {
        class: sums.class * f64::from(*weight),
        boxes: sums.boxes * f64::from(*weight),
        matched: sums.matched,
        mined: sums.mined,
        faces: faces.iter().flatten().filter(|f| !f.ignore).count(),
        iou: sums.iou / (sums.matched + sums.mined).max(1) as f64,
    })
}

/// The anchors of an objective whose outputs have these shapes, one behind the other, and where the outputs have them.
fn groups(objective: &Objective, shapes: &[Shape], pictures: usize) -> Result<Vec<AnchorGroup>> {
    let (grid, channels) = objective.placed(shapes, pictures)?;
    // The first value of every output, then the end.
    let mut starts = vec![0];
    shapes.iter().for_each(|s| starts.push(starts[starts.len() - 1] + s.len()));
    let narrow = |v: usize| {
        u32::try_from(v).map_err(|_| Error::LimitExceeded("a map is too large for the device".into()))
    };
    let group = |(g, c): (&matching::AnchorGroup, &GroupChannels)| {
        let picture = |output: usize| (shapes[output].len() / shapes[output].n.max(1)) as i64;
        Ok(AnchorGroup {
            first: narrow(g.first)?,
            cells: narrow(g.len())?,
            columns: narrow(g.cols)?,
            stride: g.stride as f32,
            width: g.width,
            height: g.height,
            logit_cell: narrow(c.class.per_cell)?,
            box_cell: narrow(c.boxes.per_cell)?,
            box_step: narrow(c.step)?,
            unused: 0,
            logits: (starts[c.class.output] + c.class.first) as i64,
            logit_picture: picture(c.class.output),
            boxes: (starts[c.boxes.output] + c.boxes.first) as i64,
            box_picture: picture(c.boxes.output),
        })
    };
    grid.groups.iter().zip(&channels).map(group).collect()
}

fn rules(objective: &Objective, weight: f32) -> Result<Rules> {
    let Objective { variances, matching, mining, sampler, loss, .. } = objective;
    let class = class_rule(&loss.classification);
    // The losses over all anchors take all, whatever the sampler.
    let sampling = sampler.as_ref().filter(|_| !loss.classification.takes_all()).map(sample_rule);
    Ok(Rules {
        variances: *variances,
        matching: match_rule(matching),
        mining: mining.as_ref().map(mine_rule),
        sampling,
        loss: loss_rule(loss, class, weight),
    })
}

fn match_rule(recipe: &MatchingRecipe) -> MatchRule {
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

fn sample_rule(sampler: &SamplerRecipe) -> SampleRule {
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

fn loss_rule(loss: &LossRecipe, class: ClassRule, weight: f32) -> LossRule {
    let draws = |no_overlap| no_overlap == NoOverlap::SmoothL1;
    let boxes = match loss.boxes {
        BoxLoss::SmoothL1 { beta } => BoxRule::SmoothL1 { beta },
        BoxLoss::NegLnIou { no_overlap } => BoxRule::NegLnIou { draws: draws(no_overlap) },
        BoxLoss::LeastSquareIou { no_overlap } => BoxRule::LeastSquareIou { draws: draws(no_overlap) },
    };
    LossRule { class, boxes, box_weight: loss.box_weight, margin: loss.margin, weight }
}
