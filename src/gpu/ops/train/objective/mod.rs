//! From a batch's outputs and faces to losses and the outputs' gradients, on the device: what `train/objective` does, for detectors of one
//! step and of two. Knows arrays and numbers; what they mean to a recipe is said in `train/device`.
//!
//! Anchors are numbered group by group, cell by cell; every picture has the same. A batch's faces, the layout of its anchors and its
//! seeds go up in one copy; a few sums come down. Of a batch that several processes share each judges its part; what losses are divided
//! by is summed up over all ([`Others`]) between the kernels that count and those that divide.

mod check;
mod look;
mod loss;
mod matching;
mod sample;

pub use look::{Choice, LookRules, Looks, Proposed, Score, Turn};
pub use loss::{BoxRule, ClassRule, LossRule};
pub use matching::{MatchRule, MineRule, SecondPass};
pub use sample::{Miner, SampleRule};

use super::{Room, Values};
use crate::error::Result;
use crate::gpu::driver::Stream;
use crate::gpu::memory::DeviceBuffer;
use crate::gpu::ops::Device;
use crate::gpu::upload::Upload;
use bytemuck::{Pod, Zeroable};
use check::{checked, count_of};
use std::ops::Range;
use std::sync::Arc;

/// Threads of every block.
const THREADS: u32 = 256;
/// What losses may be divided by, of [`Places::counts`].
const COUNTS: usize = 2;
/// Of [`Face::flags`]: neither face nor background; corners are numbers and in order.
const FACE_IGNORED: u32 = 1;
const FACE_WHOLE: u32 = 2;

/// `AnchorGroup` of `cuda/common.cuh`: anchors of one size on the cells of a map, and where the outputs have what the network says of them.
/// Places are counted in values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct AnchorGroup {
    /// Number of its first anchor: those of the groups before it.
    pub first: u32,
    /// Cells, in rows of `columns`.
    pub cells: u32,
    /// As above.
    pub columns: u32,
    /// Pixels between cells.
    pub stride: f32,
    /// Of the anchors, pixels.
    pub width: f32,
    /// As above.
    pub height: f32,
    /// From a cell's first logit to the next cell's.
    pub logit_cell: u32,
    /// From a cell's first offset to the next cell's.
    pub box_cell: u32,
    /// From an offset to the next.
    pub box_step: u32,
    /// Which of both there are: [`Self::LOGITS`], [`Self::BOXES`]; only of a first step not both.
    pub parts: u32,
    /// The first picture's first logit.
    pub logits: i64,
    /// From a picture's to the next.
    pub logit_picture: i64,
    /// The first picture's first offset.
    pub boxes: i64,
    /// From a picture's to the next.
    pub box_picture: i64,
}

impl AnchorGroup {
    /// It has logits.
    pub const LOGITS: u32 = 1;
    /// It has offsets.
    pub const BOXES: u32 = 2;
}

/// `Face` of `cuda/common.cuh`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Face {
    corners: [f32; 4],
    flags: u32,
    picture: u32,
}

/// `Anchors` of `cuda/common.cuh`.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Anchors {
    groups: u64,
    /// Four floats an anchor of each picture; 0 where they lie on their cells.
    moved: u64,
    group_count: u32,
    count: u32,
}

/// What comes before, in a detector of two steps: the anchors whose logits pass are those that [`Rules`] are for, moved where there are
/// offsets.
#[derive(Clone, Copy)]
pub struct FirstStep<'a> {
    /// The batch's groups, each with the logits (one an anchor), the offsets or nothing of the first step.
    pub groups: &'a [AnchorGroup],
    /// Which anchor learns which face.
    pub matching: MatchRule,
    /// Least logit, itself not counted, with which an anchor passes.
    pub survives: f32,
}

/// Those who have the other parts of a batch, each as many pictures.
pub trait Others {
    /// How many parts there are, the one at hand counted.
    fn parts(&self) -> usize;
    /// Makes the u32s at bytes `range` of `buffer` their sums over all parts, in the stream's order. Every part asks for the same, in the
    /// same order.
    fn sum(&self, stream: &Stream, buffer: &DeviceBuffer, range: Range<usize>) -> Result<()>;
    /// Waits until the stream has done what it has, these sums too; an error where one of the others is gone.
    fn wait(&self, stream: &Stream) -> Result<()>;
}

/// A batch that is judged, or a part of it: losses and gradients are shares of the whole one's.
pub struct Batch<'a> {
    /// Of every picture.
    pub groups: &'a [AnchorGroup],
    /// Where the detector has two steps. Losses and variances (1) are those of the rules.
    pub first: Option<FirstStep<'a>>,
    /// Faces of each picture: corners x1, y1, x2, y2 in pixels, and whether it is to be ignored.
    pub faces: &'a [Vec<([f32; 4], bool)>],
    /// What each picture fills, where anchors that cross its border shall not count.
    pub inside: Option<&'a [[f32; 4]]>,
    /// Of each picture's generator (SplitMix64), where anchors are sampled.
    pub seeds: &'a [u64],
    /// The outputs, in the places that the groups tell.
    pub outputs: Values<'a>,
    /// Where their gradients go; what is there is overwritten.
    pub gradient: Values<'a>,
    /// Where this is a part.
    pub others: Option<&'a dyn Others>,
}

impl Batch<'_> {
    /// Pictures of the whole one.
    fn whole(&self) -> usize {
        self.faces.len().saturating_mul(self.others.map_or(1, |others| others.parts()))
    }
}

/// How it is judged.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rules {
    /// Of the box code: of centre, of size.
    pub variances: [f32; 2],
    /// Which anchor learns which face.
    pub matching: MatchRule,
    /// Whether faces with few anchors get more by the decoded boxes.
    pub mining: Option<MineRule>,
    /// Which anchors count; all without one.
    pub sampling: Option<SampleRule>,
    /// Losses.
    pub loss: LossRule,
}

/// Sums over a batch.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sums {
    /// Classification losses.
    pub class: f64,
    /// Box losses, before their weight.
    pub boxes: f64,
    /// IoU of the positives' decoded boxes with their faces; of these two, too.
    pub iou: f64,
    /// Anchors that entered the loss as a face's, in the second step where there are two: matched.
    pub matched: usize,
    /// Mined.
    pub mined: usize,
}

/// The kernels of an objective, and their memory.
pub struct Judge {
    device: Arc<Device>,
    matches: matching::Kernels,
    samples: sample::Kernels,
    losses: loss::Kernels,
    upload: Upload,
    room: Room,
}

/// Where the arrays of a batch lie on the device; 0 of what is not there.
#[derive(Clone, Copy, Default)]
struct Places {
    anchors: Anchors,
    /// Of the first step; as `anchors` without one.
    first_anchors: Anchors,
    pictures: u32,
    /// Pictures of the whole batch.
    whole: u32,
    faces: u64,
    face_count: u32,
    starts: u64,
    /// 0 where anchors may lie anywhere.
    inside: u64,
    seeds: u64,
    outputs: u64,
    gradient: u64,
    // A value an anchor of each picture.
    label: u64,
    /// Before the mining: the best face.
    mined: u64,
    overlap: u64,
    hardness: u64,
    list: u64,
    /// Sixteen bytes each: decoded boxes, or three arrays of u32.
    work: u64,
    chosen: u64,
    /// Of two steps alone, as `anchors.moved`: whether the second sees an anchor.
    seen: u64,
    /// Of boxes that are anywhere alone: they themselves.
    boxes: u64,
    // The first byte behind what is zeros at first, and behind everything.
    zeros: u64,
    end: u64,
    // A value a face.
    hit: u64,
    held: u64,
    found: u64,
    claims: u64,
    /// A value a picture.
    listed: u64,
    /// Two: anchors matched; those mined, in a first step those matched by groups of boxes alone.
    counts: u64,
    /// Four words a choice, then two floats a choice.
    choices: u64,
    weights: u64,
    /// Two floats an anchor, where each has weights of its own.
    own: u64,
    partial: u64,
    /// Of the step; the sums of a first step stand behind those of the second.
    total: u64,
}

impl Places {
    /// Blocks for a thread an anchor, a row of them a picture.
    fn grid(&self) -> [u32; 3] {
        [self.anchors.count.div_ceil(THREADS), self.pictures, 1]
    }

    fn values(&self) -> u64 {
        u64::from(self.anchors.count) * u64::from(self.pictures)
    }
}

/// Hands out memory behind an address, each piece at a multiple of 256.
struct Pieces(u64);

impl Pieces {
    fn take(&mut self, values: u64, bytes: u64) -> u64 {
        let at = self.0;
        self.0 = (at + values * bytes).next_multiple_of(256);
        at
    }
}

/// Faces of all pictures one behind the other, and where those of each begin; the end behind them.
fn face_list(pictures: &[Vec<([f32; 4], bool)>]) -> Result<(Vec<Face>, Vec<u32>)> {
    let (mut faces, mut starts) = (Vec::new(), vec![0u32]);
    for (picture, own) in (0..).zip(pictures) {
        faces.extend(own.iter().map(|&(corners, ignored)| {
            let [x1, y1, x2, y2] = corners;
            let whole = corners.iter().all(|v| v.is_finite()) && x2 > x1 && y2 > y1;
            let flags = if ignored { FACE_IGNORED } else { 0 } | if whole { FACE_WHOLE } else { 0 };
            Face { corners, flags, picture }
        }));
        starts.push(count_of(faces.len())?);
    }
    Ok((faces, starts))
}

/// Brings arrays to the device in one copy; the address of each.
fn bring<const N: usize>(upload: &mut Upload, stream: &Stream, parts: [&[u8]; N]) -> Result<[u64; N]> {
    let mut ends = Pieces(0);
    let at = parts.map(|part| ends.take(part.len() as u64, 1));
    let there = upload.upload(stream, ends.0 as usize, |to| {
        for (part, at) in parts.iter().zip(at) {
            to[at as usize..at as usize + part.len()].copy_from_slice(part);
        }
    })?;
    Ok(at.map(|at| there.address() + at))
}

impl Judge {
    /// On a device.
    pub fn new(device: &Arc<Device>) -> Result<Self> {
        Ok(Self {
            device: device.clone(),
            matches: matching::Kernels::new(device)?,
            samples: sample::Kernels::new(device)?,
            losses: loss::Kernels::new(device)?,
            upload: Upload::default(),
            room: Room::default(),
        })
    }

    /// Writes the gradients of a batch's outputs, in the stream's order, which must be the same with every call; the sums of its losses,
    /// once the stream has done that.
    pub fn judge(&mut self, stream: &Stream, batch: &Batch<'_>, rules: &Rules) -> Result<Sums> {
        let gradient = batch.gradient;
        gradient.address(batch.outputs.len)?;
        gradient.buffer.fill(stream, gradient.at..gradient.at + gradient.len * 4, 0)?;
        let count = checked(batch, rules)?;
        if count == 0 || batch.faces.is_empty() {
            return Ok(Sums::default());
        }
        let places = self.places(stream, batch, count)?;
        let buffer = self.room.there()?;
        let clear = || buffer.fill(stream, 0..(places.zeros - buffer.address()) as usize, 0);
        let counts = (places.counts - buffer.address()) as usize;
        let sum_counts =
            || batch.others.map_or(Ok(()), |o| o.sum(stream, buffer, counts..counts + COUNTS * 4));
        clear()?;
        // SAFETY: `checked` found the groups' values in outputs and gradients, which are as long; the other arrays were made as large as
        // `places` says, those that kernels add to or compare are zeros.
        unsafe {
            if let Some(first) = &batch.first {
                let own = Places {
                    anchors: places.first_anchors,
                    seen: 0,
                    total: places.total + loss::SUMS as u64 * 8,
                    ..places
                };
                self.matches.assign(stream, &own, &first.matching)?;
                sum_counts()?;
                self.losses.losses(stream, &own, &Rules { sampling: None, ..*rules })?;
                self.matches.pass_on(stream, &places, first.survives)?;
                clear()?;
            }
            self.matches.assign(stream, &places, &rules.matching)?;
            if let Some(rule) = &rules.mining {
                self.matches.mine(stream, &places, rule, rules.variances)?;
            }
            match &rules.sampling {
                Some(rule) => self.samples.choose(stream, &places, rule, rules.loss.class.logits())?,
                // Without a sampler, too, the second step learns nothing from background whose box found a face.
                None if batch.first.is_some() && rules.mining.is_some() => {
                    self.samples.relabel(stream, &places)?
                }
                None => {}
            }
            // A sampler's choices are divided by themselves, and by the pictures.
            if rules.sampling.is_none() {
                sum_counts()?;
            }
            self.losses.losses(stream, &places, rules)?;
        }
        if let Some(others) = batch.others {
            others.wait(stream)?;
        }
        let at = (places.total - buffer.address()) as usize;
        let steps = if batch.first.is_some() { 2 } else { 1 };
        let sums = buffer.values::<f64>(stream, at, steps * loss::SUMS)?;
        let (matched, mined) = (sums[3] as usize, sums[4] as usize);
        let [class, boxes] = [0, 1].map(|k| sums.iter().skip(k).step_by(loss::SUMS).sum());
        Ok(Sums { class, boxes, iou: sums[2], matched, mined })
    }

    /// Brings what the host knows to the device, and makes room for the rest.
    fn places(&mut self, stream: &Stream, batch: &Batch<'_>, count: u32) -> Result<Places> {
        let (faces, starts) = face_list(batch.faces)?;
        let inside = batch.inside.unwrap_or(&[]);
        let first = batch.first.map_or(&[][..], |first| first.groups);
        let parts: [&[u8]; 6] = [
            bytemuck::cast_slice(batch.groups),
            bytemuck::cast_slice(first),
            bytemuck::cast_slice(batch.seeds),
            bytemuck::cast_slice(&faces),
            bytemuck::cast_slice(&starts),
            bytemuck::cast_slice(inside),
        ];
        let [groups, first_groups, seeds, face_list, start_list, inside_list] =
            bring(&mut self.upload, stream, parts)?;

        let group_count = count_of(batch.groups.len())?;
        let (pictures, face_count) = (count_of(batch.faces.len())?, count_of(faces.len())?);
        let whole = count_of(batch.whole())?;
        let first_anchors = Anchors { groups: first_groups, moved: 0, group_count, count };
        let moves = first.iter().any(|g| g.parts & AnchorGroup::BOXES != 0);
        let steps = if batch.first.is_some() { 2 } else { 1 };
        let blocks = u64::from(count.div_ceil(THREADS)) * u64::from(pictures);
        let place = |base: u64| {
            let mut pieces = Pieces(base);
            let (all, of_faces) = (u64::from(count) * u64::from(pictures), u64::from(face_count));
            let choices = u64::from(group_count) * u64::from(pictures);
            // These are zeros at first.
            let hit = pieces.take(of_faces, 4);
            let held = pieces.take(of_faces, 4);
            let found = pieces.take(of_faces, 4);
            let claims = pieces.take(of_faces, 8);
            let listed = pieces.take(u64::from(pictures), 4);
            let counts = pieces.take(COUNTS as u64, 4);
            let zeros = pieces.0;
            let moved = if moves { pieces.take(all, 16) } else { 0 };
            let seen = if batch.first.is_some() { pieces.take(all, 1) } else { 0 };
            let mut places = Places {
                anchors: Anchors { groups, moved, ..first_anchors },
                first_anchors,
                pictures,
                whole,
                faces: face_list,
                face_count,
                starts: start_list,
                inside: if batch.inside.is_some() { inside_list } else { 0 },
                seeds,
                outputs: batch.outputs.buffer.address() + batch.outputs.at as u64,
                gradient: batch.gradient.buffer.address() + batch.gradient.at as u64,
                label: pieces.take(all, 4),
                mined: pieces.take(all, 4),
                overlap: pieces.take(all, 4),
                hardness: pieces.take(all, 4),
                list: pieces.take(all, 4),
                work: pieces.take(all, 16),
                chosen: pieces.take(all, 1),
                seen,
                boxes: 0,
                zeros,
                end: 0,
                hit,
                held,
                found,
                claims,
                listed,
                counts,
                choices: pieces.take(choices, 16),
                weights: pieces.take(choices, 8),
                own: 0,
                partial: pieces.take(blocks * loss::SUMS as u64, 8),
                total: pieces.take((steps * loss::SUMS) as u64, 8),
            };
            places.end = pieces.0;
            places
        };
        let base = self.room.bytes(&self.device, place(0).end as usize)?;
        Ok(place(base))
    }
}
