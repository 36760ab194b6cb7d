//! Boxes that a training looks at a second time: chosen by what a network's first phase puts out, judged by what its second phase says of
//! them. What `train/objective/second_look` does, on the device; how many boxes there are is all that comes down in between.

mod plan;

use super::check::{checked_groups, count_of};
use super::{
    bring, face_list, loss, matching, sample, AnchorGroup, Anchors, LossRule, MatchRule, Others, Pieces,
    Places, Room, Rules, SampleRule, SecondPass, Sums, Values, COUNTS, THREADS,
};
use crate::error::{Error, Result};
use crate::gpu::driver::Stream;
use crate::gpu::ops::train::kernels;
use crate::gpu::ops::Device;
use crate::gpu::upload::Upload;
use bytemuck::{Pod, Zeroable};
use plan::{checked, places, propose_args, write_args, Brought, Parts, Sizes};
use std::sync::Arc;

kernels! {
    /// Of `cuda/train_look.cu`.
    Kernels of TrainLook:
    look_decode, look_best, look_rank, look_choose, look_count, look_write,
}

/// Threads of the blocks that work on a picture alone.
const BLOCK: u32 = 1024;
/// Bytes of shared memory: `BestShared` of `cuda/train_look.cu`, keys of a block's threads, `SuppressShared` of `cuda/suppress.cuh`, a word
/// a warp.
const BEST_SHARED: u32 = 4 * (256 + 32 + 2);
const RANK_SHARED: u32 = THREADS * 8;
const CHOOSE_SHARED: u32 = BLOCK * (16 + 4) + 4 * (32 + 32);
const WRITE_SHARED: u32 = BLOCK / 32 * 4;

/// `Turn` of `cuda/train_look.cu`: where the candidates of an anchor group come among a picture's.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Turn {
    /// The first cell's.
    pub first: u32,
    /// From a cell's to the next one's.
    pub step: u32,
    /// Which of the network's inputs of boxes they are for.
    pub input: u32,
}

/// `Found` of `cuda/train_look.cu`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(16))]
struct Found {
    corners: [f32; 4],
    input: u32,
    unused: [u32; 3],
}

/// A batch whose boxes are chosen.
pub struct Proposed<'a> {
    /// Anchors of every picture, each with logits and offsets, which propose with variances of 1.
    pub groups: &'a [AnchorGroup],
    /// What a first step says of the same, and the least logit, itself not counted, with which it leaves an anchor to propose; none where
    /// there is no first step.
    pub first: Option<(&'a [AnchorGroup], f32)>,
    /// Of every group. No two candidates of a picture have one place.
    pub turns: &'a [Turn],
    /// Faces of each picture: corners, and whether it is to be ignored.
    pub faces: &'a [Vec<([f32; 4], bool)>],
    /// For each of these the input that it is for, if it is looked at itself.
    pub face_inputs: &'a [Vec<u32>],
    /// Of each picture's generator, where boxes are sampled.
    pub seeds: &'a [u64],
    /// The outputs, in the places that the groups tell.
    pub outputs: Values<'a>,
    /// Where this is a part of a batch.
    pub others: Option<&'a dyn Others>,
}

/// What boxes are ordered by.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Score {
    /// Their only logit.
    Logit,
    /// The probability that two logits mean, background and face.
    Pair {
        /// What their difference must pass.
        least: f32,
    },
}

/// Which of the proposals are looked at.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Choice<'a> {
    /// All that are a face's or background: a picture's faces first, counted among the proposals. The losses of each are multiplied by
    /// `weight` over those matched in the batch; there are so many inputs.
    All {
        /// As above.
        inputs: usize,
        /// As above.
        weight: f32,
    },
    /// A sample in each reference scale, faces behind the proposals. What it weighs is multiplied by `share`; there is one input.
    Sampled {
        /// Sides, pixels.
        scales: &'a [f32],
        /// How; all or any.
        rule: SampleRule,
        /// As above.
        share: f32,
    },
}

/// How boxes are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LookRules<'a> {
    /// What comes first.
    pub score: Score,
    /// How far a box may reach from its cell's centre along an axis, pixels; it is cut there.
    pub reach: Option<f32>,
    /// The best so many of a picture's boxes enter the suppression.
    pub before: usize,
    /// Overlap of two boxes above which the weaker goes.
    pub overlap: f32,
    /// The best so many of those that are left are proposals.
    pub proposals: usize,
    /// Which of them are faces and which background.
    pub matching: MatchRule,
    /// Which of them count.
    pub choice: Choice<'a>,
}

/// Of the rows that were chosen, by address; and how many each input has.
struct Rows {
    anchors: u64,
    label: u64,
    weight: u64,
    mined: u64,
    overlap: u64,
    faces: u64,
    starts: u64,
    counts: Vec<u32>,
}

/// Rows as anchors of one picture, a group an input, with logits from `logits[input]` on and offsets from `boxes[input]` on.
fn groups_of(rows: &[u32], logits: &[usize], boxes: Option<&[usize]>, logits_a_row: u32) -> Vec<AnchorGroup> {
    let mut first = 0;
    let mut group = |(input, &rows): (usize, &u32)| {
        first += rows;
        AnchorGroup {
            first: first - rows,
            cells: rows,
            columns: rows,
            logit_cell: logits_a_row,
            box_cell: 4,
            box_step: 1,
            parts: AnchorGroup::LOGITS | if boxes.is_some() { AnchorGroup::BOXES } else { 0 },
            logits: logits[input] as i64,
            boxes: boxes.map_or(0, |b| b[input] as i64),
            ..AnchorGroup::default()
        }
    };
    rows.iter().enumerate().map(&mut group).collect()
}

/// The kernels of a second look, and their memory.
pub struct Looks {
    device: Arc<Device>,
    kernels: Kernels,
    matches: matching::Kernels,
    samples: sample::Kernels,
    losses: loss::Kernels,
    /// What a choice is told, what judging is told.
    upload: Upload,
    told: Upload,
    room: Room,
    sums: Room,
    rows: Option<Rows>,
}

impl Looks {
    /// On a device.
    pub fn new(device: &Arc<Device>) -> Result<Self> {
        Ok(Self {
            device: device.clone(),
            kernels: Kernels::new(device)?,
            matches: matching::Kernels::new(device)?,
            samples: sample::Kernels::new(device)?,
            losses: loss::Kernels::new(device)?,
            upload: Upload::default(),
            told: Upload::default(),
            room: Room::default(),
            sums: Room::default(),
            rows: None,
        })
    }

    /// Chooses a batch's boxes and writes them to `boxes`: image and corners x1, y1, x2, y2, those of every input one behind the other. How
    /// many each input has, once the stream has done that; always the same stream. An input without any has one that counts for nothing.
    pub fn choose(
        &mut self,
        stream: &Stream,
        batch: &Proposed<'_>,
        rules: &LookRules<'_>,
        boxes: &mut Room,
    ) -> Result<Vec<usize>> {
        self.rows = None;
        let sizes = checked(batch, rules)?;
        let brought = self.bring(stream, batch, rules, &sizes)?;
        let base = self.room.bytes(&self.device, Parts::new(0, &sizes).end as usize)?;
        let parts = Parts::new(base, &sizes);
        let rows_at = boxes.bytes(&self.device, sizes.rows() as usize * 20)?;
        let buffer = self.room.there()?;
        let fill = |from: u64, to: u64, value| {
            buffer.fill(stream, (from - base) as usize..(to - base) as usize, value)
        };
        fill(base, parts.zeros, 0)?;
        fill(parts.zeros, parts.ones, 0xff)?;
        let places = places(&sizes, &brought, &parts);
        let propose = propose_args(&sizes, &brought, &parts, batch, rules)?;
        let write = write_args(&sizes, &brought, &parts, &rules.choice, rows_at);
        let pictures = [sizes.pictures, 1, 1];
        let over = |values: u32| [values.div_ceil(THREADS), sizes.pictures, 1];
        // SAFETY: `checked` found the groups' values in the outputs and every candidate's place below their count; arrays are as large as
        // `Parts` says, those that kernels add to or compare are zeros; the args are the kernels' structs.
        unsafe {
            let k = &self.kernels;
            k.look_decode.launch(stream, over(sizes.count), THREADS, 0, &propose)?;
            k.look_best.launch(stream, pictures, BLOCK, BEST_SHARED, &propose)?;
            k.look_rank.launch(stream, over(sizes.before), THREADS, RANK_SHARED, &propose)?;
            k.look_choose.launch(stream, pictures, BLOCK, CHOOSE_SHARED, &propose)?;
            self.matches.assign(stream, &places, &rules.matching)?;
            match (&rules.choice, batch.others) {
                (Choice::Sampled { rule, .. }, _) => self.samples.draw(stream, &places, rule, 1)?,
                // What is matched in all parts divides.
                (Choice::All { .. }, Some(others)) => {
                    let counts = (places.counts - base) as usize;
                    others.sum(stream, buffer, counts..counts + COUNTS * 4)?;
                }
                (Choice::All { .. }, None) => {}
            }
            k.look_count.launch(stream, over(sizes.slots()), THREADS, 0, &write)?;
            k.look_write.launch(stream, [sizes.runs, sizes.pictures, 1], BLOCK, WRITE_SHARED, &write)?;
        }
        if let Some(others) = batch.others {
            others.wait(stream)?;
        }
        let totals = buffer.values::<u32>(stream, (parts.totals - base) as usize, sizes.inputs as usize)?;
        let counts: Vec<u32> = totals.into_iter().map(|count| count.max(1)).collect();
        self.rows = Some(Rows {
            anchors: parts.anchors,
            label: parts.row_label,
            weight: parts.row_weight,
            mined: parts.row_mined,
            overlap: parts.row_overlap,
            faces: brought.faces,
            starts: brought.starts,
            counts: counts.clone(),
        });
        Ok(counts.into_iter().map(|count| count as usize).collect())
    }

    /// Judges what the second phase says of the boxes chosen last: of each input so many logits a box from `logits[input]` on, and four
    /// offsets from `boxes[input]` on, where there are any. Their gradients go to the same places of `gradient`.
    pub fn judge(
        &mut self,
        stream: &Stream,
        [outputs, gradient]: [Values<'_>; 2],
        logits: &[usize],
        boxes: Option<&[usize]>,
        loss: LossRule,
        variances: [f32; 2],
    ) -> Result<Sums> {
        gradient.address(outputs.len)?;
        gradient.buffer.fill(stream, gradient.at..gradient.at + gradient.len * 4, 0)?;
        let rows = self.rows.as_ref().ok_or_else(|| Error::Internal("no boxes were chosen".into()))?;
        if logits.len() != rows.counts.len() || boxes.is_some_and(|b| b.len() != logits.len()) {
            return Err(Error::Internal("outputs are not those of the boxes".into()));
        }
        let groups = groups_of(&rows.counts, logits, boxes, loss.class.logits());
        let count = checked_groups(&groups, &[], outputs, loss.class.logits(), 1)?;
        let [groups] = bring(&mut self.told, stream, [bytemuck::cast_slice(&groups)])?;
        let place = |base: u64| {
            let mut pieces = Pieces(base);
            let partial = pieces.take(u64::from(count.div_ceil(THREADS)) * loss::SUMS as u64, 8);
            let total = pieces.take(loss::SUMS as u64, 8);
            (partial, total, pieces.0)
        };
        let base = self.sums.bytes(&self.device, place(0).2 as usize)?;
        let (partial, total, _) = place(base);
        let anchors =
            Anchors { groups, moved: rows.anchors, group_count: count_of(rows.counts.len())?, count };
        let places = Places {
            anchors,
            pictures: 1,
            whole: 1,
            faces: rows.faces,
            starts: rows.starts,
            outputs: outputs.address(outputs.len)?,
            gradient: gradient.address(outputs.len)?,
            label: rows.label,
            mined: rows.mined,
            overlap: rows.overlap,
            own: rows.weight,
            partial,
            total,
            ..Places::default()
        };
        // What is chosen already: neither matching nor sampling has a say.
        let matching = MatchRule { low: 1.0, high: 1.0, second: SecondPass::None };
        let rules = Rules { variances, matching, mining: None, sampling: None, loss };
        // SAFETY: `checked_groups` found the groups' values in outputs and gradients, which are as long; the rows' arrays hold as many rows
        // as `choose` has counted.
        unsafe { self.losses.losses(stream, &places, &rules)? };
        let sums = self.sums.there()?.values::<f64>(stream, (total - base) as usize, loss::SUMS)?;
        Ok(Sums { class: sums[0], boxes: sums[1], ..Sums::default() })
    }

    /// Brings what the host knows to the device.
    fn bring(
        &mut self,
        stream: &Stream,
        batch: &Proposed<'_>,
        rules: &LookRules<'_>,
        sizes: &Sizes,
    ) -> Result<Brought> {
        let (faces, starts) = face_list(batch.faces)?;
        let (mut wanted, mut wanted_starts) = (Vec::new(), vec![0u32]);
        for (own, inputs) in batch.faces.iter().zip(batch.face_inputs) {
            let found = own.iter().zip(inputs).filter(|((_, ignored), _)| !ignored);
            wanted.extend(found.map(|(&(corners, _), &input)| Found { corners, input, unused: [0; 3] }));
            wanted_starts.push(count_of(wanted.len())?);
        }
        let range = |k: u32| AnchorGroup {
            first: k * sizes.capacity,
            cells: sizes.capacity,
            columns: sizes.capacity,
            parts: AnchorGroup::LOGITS | AnchorGroup::BOXES,
            ..AnchorGroup::default()
        };
        let ranges: Vec<AnchorGroup> = (0..sizes.ranges).map(range).collect();
        let scales = match rules.choice {
            Choice::All { .. } => &[][..],
            Choice::Sampled { scales, .. } => scales,
        };
        let [groups, first, turns, ranges, seeds, faces, starts, wanted, wanted_starts, scales] = bring(
            &mut self.upload,
            stream,
            [
                bytemuck::cast_slice(batch.groups),
                bytemuck::cast_slice(batch.first.map_or(&[][..], |(groups, _)| groups)),
                bytemuck::cast_slice(batch.turns),
                bytemuck::cast_slice(&ranges),
                bytemuck::cast_slice(batch.seeds),
                bytemuck::cast_slice(&faces),
                bytemuck::cast_slice(&starts),
                bytemuck::cast_slice(&wanted),
                bytemuck::cast_slice(&wanted_starts),
                bytemuck::cast_slice(scales),
            ],
        )?;
        Ok(Brought { groups, first, turns, ranges, seeds, faces, starts, wanted, wanted_starts, scales })
    }
}
