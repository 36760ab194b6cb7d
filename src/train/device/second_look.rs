//! A second look as the device's kernels take it: which boxes the first phase's outputs propose, and what judges the second phase's.

use super::objective::{
    corners_of, first_groups, loss_rule, match_rule, narrow, sample_rule, second_groups, Outputs,
};
use crate::detect::group_sampling::SECOND_STAGE_VARIANCES;
use crate::error::{Error, Result};
use crate::gpu::driver::Stream;
use crate::gpu::memory::DeviceBuffer;
use crate::gpu::ops::train::objective::{
    AnchorGroup, Choice, LookRules, Looks, Others, Proposed, Score, Turn,
};
use crate::gpu::ops::train::{Room, Values};
use crate::shape::Shape;
use crate::train::data::Annotated;
use crate::train::network::LookAgain;
use crate::train::objective::second_look::{FeatureSupervision, GroupedFastRcnn};
use crate::train::objective::{Losses, SecondLook};

/// Chooses a batch's boxes by the detector's outputs, of these `shapes`, which lie one behind the other, as f32, at the beginning of
/// `outputs`, and writes them to `boxes`: of each input R x 5, image and corners. R of each input. Where `others` have parts of the batch,
/// what its losses are divided by is the whole one's.
pub fn choose(
    looks: &mut Looks,
    stream: &Stream,
    outputs: &DeviceBuffer,
    shapes: &[Shape],
    again: &LookAgain<'_>,
    others: Option<&dyn Others>,
    boxes: &mut Room,
) -> Result<Vec<usize>> {
    let len = shapes.iter().map(|s| s.len()).sum();
    let faces = corners_of(again.faces);
    let LookAgain { look, faces: annotated, seeds } = again;
    let outer = Proposed {
        groups: &[],
        first: None,
        turns: &[],
        faces: &faces,
        face_inputs: &[],
        seeds,
        outputs: Values { buffer: outputs, at: 0, len },
        others,
    };
    match look {
        SecondLook::FeatureSupervision(s) => {
            let (grid, first, second) = s.detector.placed(shapes, faces.len())?;
            let outputs = Outputs::new(shapes);
            let groups = second_groups(&grid, &second, &outputs)?;
            let batch = Proposed {
                first: Some((&first_groups(&grid, &first, &outputs)?, s.detector.survives)),
                turns: &turns_of_levels(s, &groups)?,
                face_inputs: &face_levels(s, again)?,
                groups: &groups,
                ..outer
            };
            looks.choose(stream, &batch, &supervision_rules(s), boxes)
        }
        SecondLook::FastRcnn(s) => {
            let (grid, channels) = s.placed(shapes, faces.len())?;
            let groups = second_groups(&grid, &channels, &Outputs::new(shapes))?;
            let none: Vec<Vec<u32>> = annotated.iter().map(|own| vec![0; own.len()]).collect();
            let turns = turns_of_cells(s, &groups)?;
            let batch = Proposed { turns: &turns, face_inputs: &none, groups: &groups, ..outer };
            let images = faces.len() * others.map_or(1, |others| others.parts());
            looks.choose(stream, &batch, &rcnn_rules(s, images), boxes)
        }
    }
}

/// Judges what the second phase puts out of the boxes chosen last, of these `shapes`, one output behind the other, as f32, at the beginning
/// of `outputs`; the gradients go to the same places of `gradient`. Nothing is counted.
pub fn judge(
    looks: &mut Looks,
    stream: &Stream,
    [outputs, gradient]: [&DeviceBuffer; 2],
    shapes: &[Shape],
    rows: &[usize],
    look: &SecondLook,
) -> Result<Losses> {
    let (loss, refines) = look.loss();
    if loss.classification.takes_all() {
        return Err(Error::Internal("a second look by a loss that takes all anchors".into()));
    }
    let each = if refines { 2 } else { 1 };
    let fits = |(i, o): (usize, &Shape)| {
        let channels = if i % each == 0 { loss.classification.logits() } else { 4 };
        rows.get(i / each).is_some_and(|&rows| *o == Shape::new(rows, channels, 1, 1))
    };
    if shapes.len() != each * rows.len() || !shapes.iter().enumerate().all(fits) {
        return Err(Error::Internal("outputs are not those of the boxes".into()));
    }
    let starts = Outputs::new(shapes).starts;
    let of = |first: usize| starts.iter().copied().skip(first).step_by(each).collect::<Vec<_>>();
    let (logits, boxes) = (of(0), refines.then(|| of(1)));
    let len = shapes.iter().map(|s| s.len()).sum();
    let values = [outputs, gradient].map(|buffer| Values { buffer, at: 0, len });
    let rule = loss_rule(&loss, 1.0);
    let sums = looks.judge(stream, values, &logits, boxes.as_deref(), rule, SECOND_STAGE_VARIANCES)?;
    Ok(Losses { class: sums.class, boxes: sums.boxes, ..Losses::default() })
}

/// Candidates come anchor by anchor as they are numbered; a level is an input.
fn turns_of_levels(s: &FeatureSupervision, groups: &[AnchorGroup]) -> Result<Vec<Turn>> {
    let levels = s.detector.levels.iter().enumerate();
    let inputs = levels.flat_map(|(input, (level, _))| vec![input; level.anchors.len()]);
    let turn =
        |(g, input): (&AnchorGroup, usize)| Ok(Turn { first: g.first, step: 1, input: narrow(input)? });
    groups.iter().zip(inputs).map(turn).collect()
}

/// Candidates come level by level, in each cell by cell, as the detector decodes them.
fn turns_of_cells(s: &GroupedFastRcnn, groups: &[AnchorGroup]) -> Result<Vec<Turn>> {
    let mut turns = Vec::with_capacity(groups.len());
    let mut rest = groups.iter();
    for (_, scales) in s.detector.levels() {
        let step = narrow(scales.len())?;
        let level: Vec<&AnchorGroup> = rest.by_ref().take(scales.len()).collect();
        let first = level.first().map_or(0, |g| g.first);
        turns.extend((0..step).take(level.len()).map(|a| Turn { first: first + a, step, input: 0 }));
    }
    Ok(turns)
}

/// The level that each face comes from.
fn face_levels(s: &FeatureSupervision, again: &LookAgain<'_>) -> Result<Vec<Vec<u32>>> {
    let of_picture = |faces: &Vec<Annotated>| faces.iter().map(|f| narrow(s.level_of(&f.bbox))).collect();
    again.faces.iter().map(of_picture).collect()
}

fn supervision_rules(s: &FeatureSupervision) -> LookRules<'_> {
    LookRules {
        score: Score::Logit,
        reach: None,
        before: FeatureSupervision::BEFORE_NMS,
        overlap: s.recipe.nms,
        proposals: s.recipe.proposals,
        matching: match_rule(&s.recipe.matching),
        choice: Choice::All { inputs: s.detector.levels.len(), weight: s.recipe.weight },
    }
}

fn rcnn_rules(s: &GroupedFastRcnn, images: usize) -> LookRules<'_> {
    LookRules {
        score: Score::Pair { least: GroupedFastRcnn::least_logit() },
        reach: s.detector.proposal_reach(),
        before: s.recipe.before_nms,
        overlap: s.recipe.nms,
        proposals: s.recipe.proposals,
        matching: match_rule(&s.recipe.matching),
        choice: Choice::Sampled {
            scales: &s.detector.scales,
            rule: sample_rule(&s.recipe.sampler),
            share: 1.0 / images as f32,
        },
    }
}
