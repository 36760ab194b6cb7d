//! From a batch's outputs and faces to losses and the outputs' gradients, on the device: what `train/objective` does for detectors that
//! look once. Knows arrays and numbers; what they mean to a recipe is said in `train/device`.
//!
//! Anchors are numbered group by group, cell by cell; every picture has the same. A batch's faces, the layout of its anchors and its
//! seeds go up in one copy; a few sums come down.

mod loss;
mod matching;
mod sample;

pub use loss::{BoxRule, ClassRule, LossRule};
pub use matching::{MatchRule, MineRule, SecondPass};
pub use sample::{Miner, SampleRule};

use super::{Room, Values};
use crate::error::{Error, Result};
use crate::gpu::driver::Stream;
use crate::gpu::ops::Device;
use crate::gpu::upload::Upload;
use bytemuck::{Pod, Zeroable};
use std::sync::Arc;

/// Threads of every block.
const THREADS: u32 = 256;
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
    /// Of nothing.
    pub unused: u32,
    /// The first picture's first logit.
    pub logits: i64,
    /// From a picture's to the next.
    pub logit_picture: i64,
    /// The first picture's first offset.
    pub boxes: i64,
    /// From a picture's to the next.
    pub box_picture: i64,
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
#[derive(Clone, Copy)]
#[repr(C)]
struct Anchors {
    groups: u64,
    group_count: u32,
    count: u32,
}

/// A batch that is judged.
pub struct Batch<'a> {
    /// Of every picture.
    pub groups: &'a [AnchorGroup],
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
    /// IoU of the positives' decoded boxes with their faces.
    pub iou: f64,
    /// Anchors that entered the loss as a face's: matched.
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

/// Where the arrays of a batch lie on the device.
#[derive(Clone, Copy)]
struct Places {
    anchors: Anchors,
    pictures: u32,
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
    // A value a face.
    hit: u64,
    held: u64,
    found: u64,
    claims: u64,
    /// A value a picture.
    listed: u64,
    /// Two: anchors matched, mined.
    counts: u64,
    /// Four words a choice, then two floats a choice.
    choices: u64,
    weights: u64,
    partial: u64,
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
        // SAFETY: `checked` found the groups' values in outputs and gradients, which are as long; the other arrays were made as large as
        // `places` says, those that kernels add to or compare are zeros.
        unsafe {
            self.matches.assign(stream, &places, &rules.matching)?;
            if let Some(rule) = &rules.mining {
                self.matches.mine(stream, &places, rule, rules.variances)?;
            }
            if let Some(rule) = &rules.sampling {
                self.samples.choose(stream, &places, rule, rules.loss.class.logits())?;
            }
            self.losses.losses(stream, &places, rules)?;
        }
        let buffer = self.room.0.as_ref().ok_or_else(|| Error::Internal("no sums".into()))?;
        let at = (places.total - buffer.address()) as usize;
        let sums = buffer.values::<f64>(stream, at, loss::SUMS)?;
        let (matched, mined) = (sums[3] as usize, sums[4] as usize);
        Ok(Sums { class: sums[0], boxes: sums[1], iou: sums[2], matched, mined })
    }

    /// Brings what the host knows to the device, and makes room for the rest.
    fn places(&mut self, stream: &Stream, batch: &Batch<'_>, count: u32) -> Result<Places> {
        let (mut faces, mut starts) = (Vec::new(), vec![0u32]);
        for (picture, own) in (0..).zip(batch.faces) {
            faces.extend(own.iter().map(|&(corners, ignored)| {
                let [x1, y1, x2, y2] = corners;
                let whole = corners.iter().all(|v| v.is_finite()) && x2 > x1 && y2 > y1;
                let flags = if ignored { FACE_IGNORED } else { 0 } | if whole { FACE_WHOLE } else { 0 };
                Face { corners, flags, picture }
            }));
            starts.push(count_of(faces.len())?);
        }
        let inside = batch.inside.unwrap_or(&[]);
        let parts: [&[u8]; 5] = [
            bytemuck::cast_slice(batch.groups),
            bytemuck::cast_slice(batch.seeds),
            bytemuck::cast_slice(&faces),
            bytemuck::cast_slice(&starts),
            bytemuck::cast_slice(inside),
        ];
        let mut ends = Pieces(0);
        let at = parts.map(|part| ends.take(part.len() as u64, 1));
        let there = self.upload.upload(stream, ends.0 as usize, |to| {
            for (part, at) in parts.iter().zip(at) {
                to[at as usize..at as usize + part.len()].copy_from_slice(part);
            }
        })?;
        let [groups, seeds, face_list, start_list, inside_list] = at.map(|at| there.address() + at);

        let group_count = count_of(batch.groups.len())?;
        let (pictures, face_count) = (count_of(batch.faces.len())?, count_of(faces.len())?);
        let anchors = Anchors { groups, group_count, count };
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
            let counts = pieces.take(2, 4);
            let zeros = pieces.0;
            let places = Places {
                anchors,
                pictures,
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
                hit,
                held,
                found,
                claims,
                listed,
                counts,
                choices: pieces.take(choices, 16),
                weights: pieces.take(choices, 8),
                partial: pieces.take(blocks * loss::SUMS as u64, 8),
                total: pieces.take(loss::SUMS as u64, 8),
            };
            (places, zeros, pieces.0)
        };
        let (_, zeros, bytes) = place(0);
        let base = self.room.bytes(&self.device, bytes as usize)?;
        let buffer = self.room.0.as_ref().ok_or_else(|| Error::Internal("no room".into()))?;
        buffer.fill(stream, 0..zeros as usize, 0)?;
        Ok(place(base).0)
    }
}

fn count_of(values: usize) -> Result<u32> {
    u32::try_from(values).map_err(|_| Error::LimitExceeded("a batch is too large for the device".into()))
}

/// Anchors of a picture, where arrays are as long as they must be and every group's values lie in the outputs.
fn checked(batch: &Batch<'_>, rules: &Rules) -> Result<u32> {
    let bad = |what: &str| Err(Error::Internal(format!("an objective on a device: {what}")));
    let pictures = batch.faces.len();
    batch.outputs.address(batch.outputs.len)?;
    if batch.inside.is_some_and(|inside| inside.len() != pictures) {
        return bad("not a border for each picture");
    }
    if rules.sampling.is_some() && batch.seeds.len() != pictures {
        return bad("not a seed for each picture");
    }
    let mut count = 0u64;
    for g in batch.groups {
        if u64::from(g.first) != count {
            return bad("anchors are not numbered in a row");
        }
        count += u64::from(g.cells);
        if g.cells == 0 {
            continue;
        }
        if g.columns == 0 || !g.cells.is_multiple_of(g.columns) {
            return bad("a group's cells are no rows");
        }
        let last = |first: i64, picture: i64, cell: u32, more: u32| {
            let pictures = i128::from(picture) * (pictures as i128 - 1).max(0);
            i128::from(first) + pictures + i128::from(cell) * i128::from(g.cells - 1) + i128::from(more)
        };
        let ends = [
            last(g.logits, g.logit_picture, g.logit_cell, rules.loss.class.logits() - 1),
            last(g.boxes, g.box_picture, g.box_cell, 3 * g.box_step),
        ];
        let negative = [g.logits, g.logit_picture, g.boxes, g.box_picture].iter().any(|&v| v < 0);
        if negative || ends.iter().any(|&end| end >= batch.outputs.len as i128) {
            return bad("a group's values lie outside the outputs");
        }
    }
    // Kernels count anchors in 31 bits, pictures along a grid's second axis.
    if count * pictures as u64 > i32::MAX as u64 || pictures > 65_535 {
        return Err(Error::LimitExceeded("a batch has too many anchors for the device".into()));
    }
    Ok(count as u32)
}
