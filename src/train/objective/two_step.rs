//! The objective of detectors that classify and regress in two steps: RefineFace's selective two-step classification and regression.

use super::head::{box_loss, Channels, GroupChannels, Head, Layout, Level, Place};
#[cfg(feature = "cuda")]
use super::pictures::check_shapes;
use super::pictures::{
    check_outputs, face_boxes, gathered, parallel, picture_maps, wanted, Losses, Proposal, Whole,
};
use super::sampled::Sampled;
use crate::detect::anchors::Anchor;
use crate::detect::BBox;
use crate::error::{Error, Result};
use crate::graph::init::Rng;
use crate::nets::refineface::FirstStep;
use crate::shape::{Shape, Tensor};
use crate::train::data::Annotated;
use crate::train::losses::{LossRecipe, ScaleAwareMargin};
use crate::train::matching::{
    match_anchors, match_boxes, mine_high_quality_anchors, AnchorGrid, AnchorMining, FaceBox, Matches,
    MatchingRecipe, IGNORED,
};
use crate::train::sampler::SamplerRecipe;

/// How a batch is judged in two steps (RefineFace, Zhang et al. 2019, section 3.1 and 3.2, Eq. 1 and 2). Each of the four sums
/// is divided by the positives that it is of; anchors that the first step moved are constants for the second's gradient.
#[derive(Clone, Debug)]
pub struct TwoStep {
    /// The levels' anchors, with outputs apart in the second step, and what the first step says of each. Its
    /// outputs come before those of the second step, in the levels' order.
    pub levels: Vec<(Level, Option<FirstStep>)>,
    /// Of the first step.
    pub first: MatchingRecipe,
    /// Of the second.
    pub second: MatchingRecipe,
    /// Least logit of the first step with which an anchor is seen by the second.
    pub survives: f32,
    /// Online anchor mining in the second step, where wanted: by its decoded boxes, of the anchors that it sees.
    pub mining: Option<AnchorMining>,
    /// Which of its anchors count; without one all that it sees.
    pub sampler: Option<SamplerRecipe>,
    /// Losses; one logit an anchor.
    pub loss: LossRecipe,
}

/// Variances of the box code in both steps.
pub(in crate::train) const VARIANCES: [f32; 2] = [1.0; 2];

/// Positives of each of the four sums.
#[derive(Clone, Copy, Debug, Default)]
struct Positives {
    /// N_s3: first step, classification.
    first_class: usize,
    /// N_s1: first step, regression.
    first_boxes: usize,
    /// N_s2 and N_s4: second step.
    second: usize,
}

fn share(count: usize) -> f32 {
    1.0 / count.max(1) as f32
}

/// What one picture's anchors are in both steps.
struct Assigned {
    faces: Vec<FaceBox>,
    first: Matches,
    /// With the mined anchors among the positives.
    second: Matches,
    /// Of those, the anchors that mining found, rising.
    mined: Vec<usize>,
    /// Anchors of the second step.
    anchors: Vec<Anchor>,
    positives: Positives,
}

/// What the first step makes of a picture's anchors.
struct AfterFirst {
    anchors: Vec<Anchor>,
    /// Whether the second step sees each.
    seen: Vec<bool>,
    /// Whether it moved any.
    moved: bool,
}

/// Where the first step has what it says of an anchor group.
#[derive(Clone, Copy)]
pub(in crate::train) enum FirstChannels {
    None,
    Classes(Channels),
    Boxes(Channels),
}

/// Anchors, and where the outputs have what either step says of every group.
#[cfg(feature = "cuda")]
pub(in crate::train) type Placed = (AnchorGrid, Vec<FirstChannels>, Vec<GroupChannels>);

/// A picture's anchors, and where the outputs of both steps have them.
struct Heads<'a> {
    /// For every anchor group.
    first: &'a [FirstChannels],
    second: Head<'a>,
}

impl TwoStep {
    /// Errors where a part's settings are out of range or do not go together.
    pub fn check(&self) -> Result<()> {
        self.first.check()?;
        self.second.check()?;
        self.loss.check()?;
        if let Some(mining) = &self.mining {
            mining.check()?;
        }
        if let Some(sampler) = &self.sampler {
            sampler.check()?;
            if sampler.within_picture {
                return Err(Error::InvalidArgument(
                    "sampler: within-picture is for detectors that look once; here anchors move".into(),
                ));
            }
        }
        if self.levels.iter().any(|(level, _)| level.layout != (Layout::Apart { logits: 1 })) {
            return Err(Error::Internal(
                "a level of two steps has outputs apart, one logit an anchor".into(),
            ));
        }
        if self.loss.classification.takes_all() || self.loss.classification.logits() != 1 {
            return Err(Error::InvalidArgument(
                "loss: this detector has one logit an anchor and learns from those that its first step leaves: name classification focal or sigmoid"
                    .into(),
            ));
        }
        Ok(())
    }

    /// How many outputs it judges.
    pub fn outputs(&self) -> usize {
        self.first_outputs() + self.levels.iter().map(|(l, _)| l.layout.outputs()).sum::<usize>()
    }

    fn first_outputs(&self) -> usize {
        self.levels.iter().filter_map(|(_, first)| *first).count()
    }

    /// Channels of every output.
    fn channels(&self) -> Vec<usize> {
        let first = self.levels.iter().filter_map(|(level, first)| match first {
            None => None,
            Some(FirstStep::Classes) => Some(level.anchors.len()),
            Some(FirstStep::Boxes) => Some(4 * level.anchors.len()),
        });
        first.chain(self.levels.iter().flat_map(|(level, _)| level.channels())).collect()
    }

    /// The anchors of a picture whose outputs have these shapes, and where every group's channels are in both steps.
    fn grid(&self, outputs: &[Shape]) -> (AnchorGrid, Vec<FirstChannels>, Vec<GroupChannels>) {
        let (mut grid, mut first, mut second) = (AnchorGrid::new(), Vec::new(), Vec::new());
        let (mut before, mut output) = (0, self.first_outputs());
        for (level, step) in &self.levels {
            let (shape, n) = (outputs[output], level.anchors.len());
            for (a, [w, h]) in level.anchors.iter().enumerate() {
                grid.push(level.stride, *w, *h, shape.h, shape.w);
                let of = |values| Channels { output: before, per_cell: values * n, first: values * a };
                first.push(match step {
                    None => FirstChannels::None,
                    Some(FirstStep::Classes) => FirstChannels::Classes(of(1)),
                    Some(FirstStep::Boxes) => FirstChannels::Boxes(of(4)),
                });
                second.push(GroupChannels::new(level, output, a));
            }
            before += usize::from(step.is_some());
            output += level.layout.outputs();
        }
        (grid, first, second)
    }

    /// As [`Self::grid`], for the outputs of so many pictures, which must be those of the levels.
    #[cfg(feature = "cuda")]
    pub(in crate::train) fn placed(&self, outputs: &[Shape], images: usize) -> Result<Placed> {
        check_shapes(outputs, &self.channels(), images)?;
        Ok(self.grid(outputs))
    }

    /// As [`Objective::judge`](super::Objective::judge).
    pub fn judge(
        &self,
        outputs: &[Tensor],
        faces: &[Vec<Annotated>],
        rng: impl Fn(usize) -> Rng + Sync,
        threads: usize,
    ) -> Result<(Losses, Vec<Tensor>)> {
        self.judge_part(outputs, faces, rng, threads, Whole::at_hand(faces.len()))
    }

    /// As [`Objective::judge_part`](super::Objective::judge_part).
    pub fn judge_part(
        &self,
        outputs: &[Tensor],
        faces: &[Vec<Annotated>],
        rng: impl Fn(usize) -> Rng + Sync,
        threads: usize,
        whole: Whole<'_>,
    ) -> Result<(Losses, Vec<Tensor>)> {
        let shapes = check_outputs(outputs, &self.channels(), faces.len())?;
        let (grid, first, second) = self.grid(&shapes);
        let heads = Heads { first: &first, second: Head { grid: &grid, groups: &second } };
        let images = faces.len();
        let assigned: Vec<Assigned> =
            parallel(images, threads, |n| self.assign(&heads, &picture_maps(outputs, n), &faces[n]));
        let mut positives = Positives::default();
        for a in &assigned {
            positives.first_class += a.positives.first_class;
            positives.first_boxes += a.positives.first_boxes;
            positives.second += a.positives.second;
        }
        let Positives { first_class, first_boxes, second } = positives;
        let [first_class, first_boxes, second] = whole.counts([first_class, first_boxes, second])?;
        let positives = Positives { first_class, first_boxes, second };
        let judged = parallel(images, threads, |n| {
            let maps = picture_maps(outputs, n);
            let mut gradient: Vec<Vec<f32>> = maps.iter().map(|m| vec![0.0; m.len()]).collect();
            let mut losses = self.first_losses(&heads, &maps, &assigned[n], positives, &mut gradient);
            let second = match &self.sampler {
                Some(sampler) => {
                    let Assigned { faces, second, mined, anchors, .. } = &assigned[n];
                    let sampled = Sampled {
                        sampler,
                        loss: &self.loss,
                        variances: VARIANCES,
                        head: &heads.second,
                        maps: &maps,
                        faces,
                        matches: second,
                        is_matched: &|i| mined.binary_search(&i).is_err(),
                        anchor: &|i| anchors[i],
                    };
                    sampled.losses(&mut rng(n), whole.images(), &mut gradient)
                }
                None => self.second_losses(&heads.second, &maps, &assigned[n], positives, &mut gradient),
            };
            losses.add(&second);
            // Of the boxes' quality and number that of the second step alone is told.
            (losses.iou, losses.matched, losses.faces) = (second.iou, second.matched, second.faces);
            (losses, gradient)
        });
        Ok(gathered(&shapes, judged))
    }

    /// What the second step finds in picture `n`: the box of every anchor that it sees, its logit and its level's number.
    pub(super) fn found(&self, outputs: &[Tensor], n: usize) -> Vec<Proposal> {
        let shapes: Vec<Shape> = outputs.iter().map(|o| o.shape).collect();
        let (grid, first, second) = self.grid(&shapes);
        let heads = Heads { first: &first, second: Head { grid: &grid, groups: &second } };
        let maps = picture_maps(outputs, n);
        let AfterFirst { anchors, seen, .. } = self.after_first(&heads, &maps);
        let anchors_of = |level: &Level| level.anchors.len();
        let levels = self.levels.iter().enumerate();
        let level_of: Vec<usize> = levels.flat_map(|(i, (l, _))| vec![i; anchors_of(l)]).collect();
        let found = |(i, place): (usize, Place)| Proposal {
            bbox: anchors[i].decode(&place.boxes.read(&maps), VARIANCES),
            score: maps[place.class.0][place.class.1],
            level: level_of[grid.group_of(i)],
        };
        heads.second.places().enumerate().filter(|(i, _)| seen[*i]).map(found).collect()
    }

    /// The anchors as the first step leaves them to the second.
    fn after_first(&self, heads: &Heads<'_>, maps: &[&[f32]]) -> AfterFirst {
        let grid = heads.second.grid;
        let mut anchors = Vec::with_capacity(grid.len);
        let mut seen = vec![true; grid.len];
        let mut moved = false;
        for (group, first) in grid.groups.iter().zip(heads.first) {
            let cells = (0..group.len()).map(|cell| (cell, group.anchor(cell)));
            match first {
                FirstChannels::None => anchors.extend(cells.map(|(_, anchor)| anchor)),
                FirstChannels::Classes(channels) => {
                    for (cell, anchor) in cells {
                        let (output, at) = channels.at(cell);
                        // False for a NaN too.
                        seen[anchors.len()] = maps[output][at] > self.survives;
                        anchors.push(anchor);
                    }
                }
                FirstChannels::Boxes(channels) => {
                    moved = true;
                    anchors.extend(cells.map(|(cell, anchor)| {
                        let (output, at) = channels.at(cell);
                        anchor.moved(&maps[output][at..at + 4], VARIANCES)
                    }));
                }
            }
        }
        AfterFirst { anchors, seen, moved }
    }

    fn assign(&self, heads: &Heads<'_>, maps: &[&[f32]], faces: &[Annotated]) -> Assigned {
        let faces = face_boxes(faces);
        let grid = heads.second.grid;
        let of_grid = match_anchors(grid, &faces, &self.first);
        let AfterFirst { anchors, seen, moved } = self.after_first(heads, maps);
        let mut positives = Positives::default();
        for (group, first) in grid.groups.iter().zip(heads.first) {
            let matched = group.range().filter(|&i| of_grid.face(i).is_some()).count();
            match first {
                FirstChannels::None => {}
                FirstChannels::Classes(_) => positives.first_class += matched,
                FirstChannels::Boxes(_) => positives.first_boxes += matched,
            }
        }
        let mut of_second = if moved {
            match_boxes(&anchors.iter().map(Anchor::bbox).collect::<Vec<_>>(), &faces, &self.second)
        } else {
            match_anchors(grid, &faces, &self.second)
        };
        // What the first step drops the second does not learn from.
        for (label, seen) in of_second.label.iter_mut().zip(&seen) {
            if !seen {
                *label = IGNORED;
            }
        }
        let mut mined = Vec::new();
        if let Some(mining) = &self.mining {
            let places = heads.second.places().zip(&anchors);
            let decoded: Vec<BBox> =
                places.map(|(place, anchor)| anchor.decode(&place.boxes.read(maps), VARIANCES)).collect();
            let found = mine_high_quality_anchors(|i| decoded[i], &faces, &of_second, mining);
            found.relabel(&mut of_second);
            mined.extend(found.compensated.iter().map(|m| m.anchor));
        }
        positives.second = (0..grid.len).filter(|&i| of_second.face(i).is_some()).count();
        Assigned { faces, first: of_grid, second: of_second, mined, anchors, positives }
    }

    /// Over one picture's anchors in the first step, as a share of the batch's.
    fn first_losses(
        &self,
        heads: &Heads<'_>,
        maps: &[&[f32]],
        assigned: &Assigned,
        positives: Positives,
        gradient: &mut [Vec<f32>],
    ) -> Losses {
        let mut losses = Losses::default();
        let bbox = |face: usize| assigned.faces[face].bbox;
        for (group, first) in heads.second.grid.groups.iter().zip(heads.first) {
            for (cell, i) in group.range().enumerate() {
                let face = assigned.first.face(i).map(bbox);
                match first {
                    FirstChannels::Classes(channels) if assigned.first.label[i] != IGNORED => {
                        let share = share(positives.first_class);
                        losses.class += self.class_loss(channels.at(cell), maps, face, share, gradient);
                    }
                    FirstChannels::Boxes(channels) => {
                        if let Some(face) = face {
                            let (at, share) = (channels.at(cell).into(), share(positives.first_boxes));
                            box_loss(
                                &self.loss,
                                group.anchor(cell),
                                at,
                                VARIANCES,
                                maps,
                                &face,
                                share,
                                gradient,
                                &mut losses,
                            );
                        }
                    }
                    _ => {}
                }
            }
        }
        losses
    }

    /// Over all anchors of a picture that the second step sees, as a share of the batch's.
    fn second_losses(
        &self,
        head: &Head<'_>,
        maps: &[&[f32]],
        assigned: &Assigned,
        positives: Positives,
        gradient: &mut [Vec<f32>],
    ) -> Losses {
        let mut losses = Losses { faces: wanted(&assigned.faces), ..Losses::default() };
        let share = share(positives.second);
        let bbox = |face: usize| assigned.faces[face].bbox;
        for (i, place) in head.places().enumerate() {
            if assigned.second.label[i] == IGNORED {
                continue;
            }
            let face = assigned.second.face(i).map(bbox);
            losses.class += self.class_loss(place.class, maps, face, share, gradient);
            if let Some(face) = face {
                match assigned.mined.binary_search(&i) {
                    Ok(_) => losses.mined += 1,
                    Err(_) => losses.matched += 1,
                }
                let anchor = assigned.anchors[i];
                box_loss(
                    &self.loss,
                    anchor,
                    place.boxes,
                    VARIANCES,
                    maps,
                    &face,
                    share,
                    gradient,
                    &mut losses,
                );
            }
        }
        losses
    }

    /// Loss of the logit at `at`, and its gradient.
    fn class_loss(
        &self,
        (output, logit): (usize, usize),
        maps: &[&[f32]],
        face: Option<BBox>,
        share: f32,
        gradient: &mut [Vec<f32>],
    ) -> f64 {
        let margin = ScaleAwareMargin { alpha: self.loss.margin };
        let size = face.map(|b| [b.width(), b.height()]);
        let mut slope = [0.0];
        let loss = self.loss.classification.value(&maps[output][logit..logit + 1], size, margin, &mut slope);
        gradient[output][logit] += slope[0] * share;
        f64::from(loss * share)
    }
}
