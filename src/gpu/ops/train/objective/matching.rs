//! Matching and online mining.

use super::{Anchors, Places, THREADS};
use crate::error::Result;
use crate::gpu::driver::Stream;
use crate::gpu::ops::blocks;
use crate::gpu::ops::train::kernels;

kernels! {
    /// Of `cuda/train_match.cu`.
    pub(super) Kernels of TrainMatch:
    match_anchors, match_second, match_force, match_force_moved, match_take, match_finish, move_anchors, mine_find, mine_take,
}

/// What becomes of faces that no anchor reached the upper threshold of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum SecondPass {
    /// Nothing.
    None = 0,
    /// They get the anchors between the thresholds that overlap no other face more.
    All = 1,
    /// The best of those.
    Best = 2,
    /// The one that overlaps them most of all, unless another face has it.
    Force = 3,
}

/// How anchors are matched.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MatchRule {
    /// IoU below which an anchor is background; above 0.
    pub low: f32,
    /// IoU from which on it is a face's.
    pub high: f32,
    /// What follows.
    pub second: SecondPass,
}

/// How anchors are mined.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MineRule {
    /// Faces with fewer anchors are filled up to this many.
    pub anchors: u32,
    /// Least IoU of a decoded box with its face; above 0.
    pub overlap: f32,
    /// Least IoU that is told of any anchor; above 0, at most `overlap`.
    pub floor: f32,
}

/// `MatchArgs` of `cuda/train_match.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct MatchArgs {
    anchors: Anchors,
    faces: u64,
    starts: u64,
    inside: u64,
    seen: u64,
    boxes: u64,
    label: u64,
    best: u64,
    overlap: u64,
    hit: u64,
    held: u64,
    claims: u64,
    counts: u64,
    face_count: u32,
    low: f32,
    high: f32,
    second: i32,
}

/// `MoveArgs` of `cuda/train_match.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct MoveArgs {
    anchors: Anchors,
    values: u64,
    moved: u64,
    seen: u64,
    survives: f32,
}

/// `MineArgs` of `cuda/train_match.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct MineArgs {
    anchors: Anchors,
    faces: u64,
    starts: u64,
    values: u64,
    label: u64,
    mined: u64,
    overlap: u64,
    held: u64,
    found: u64,
    listed: u64,
    list: u64,
    boxes: u64,
    counts: u64,
    variances: [f32; 2],
    least: f32,
    floor: f32,
    anchors_a_face: u32,
}

impl Kernels {
    /// Labels every anchor.
    ///
    /// # Safety
    /// The places are those of a batch, as large as they must be.
    pub(super) unsafe fn assign(&self, stream: &Stream, p: &Places, rule: &MatchRule) -> Result<()> {
        let args = MatchArgs {
            anchors: p.anchors,
            faces: p.faces,
            starts: p.starts,
            inside: p.inside,
            seen: p.seen,
            boxes: p.boxes,
            label: p.label,
            best: p.mined,
            overlap: p.overlap,
            hit: p.hit,
            held: p.held,
            claims: p.claims,
            counts: p.counts,
            face_count: p.face_count,
            low: rule.low,
            high: rule.high,
            second: rule.second as i32,
        };
        let faces = blocks(p.face_count as usize);
        // SAFETY: the caller's contract; the args are the kernels' struct.
        unsafe {
            self.match_anchors.launch(stream, p.grid(), THREADS, 0, &args)?;
            match rule.second {
                SecondPass::None | SecondPass::All => {}
                SecondPass::Best => self.match_second.launch(stream, p.grid(), THREADS, 0, &args)?,
                SecondPass::Force if p.anchors.moved != 0 || p.boxes != 0 => {
                    self.match_force_moved.launch(stream, p.grid(), THREADS, 0, &args)?
                }
                SecondPass::Force => self.match_force.launch(stream, faces, THREADS, 0, &args)?,
            }
            if matches!(rule.second, SecondPass::Best | SecondPass::Force) {
                self.match_take.launch(stream, faces, THREADS, 0, &args)?;
            }
            self.match_finish.launch(stream, p.grid(), THREADS, 0, &args)
        }
    }

    /// Moves and drops anchors as a first step says.
    ///
    /// # Safety
    /// As there; the places are those of the second step.
    pub(super) unsafe fn pass_on(&self, stream: &Stream, p: &Places, survives: f32) -> Result<()> {
        let args = MoveArgs {
            anchors: p.first_anchors,
            values: p.outputs,
            moved: p.anchors.moved,
            seen: p.seen,
            survives,
        };
        // SAFETY: as above.
        unsafe { self.move_anchors.launch(stream, p.grid(), THREADS, 0, &args) }
    }

    /// Mines anchors behind [`Self::assign`].
    ///
    /// # Safety
    /// As there.
    pub(super) unsafe fn mine(
        &self,
        stream: &Stream,
        p: &Places,
        rule: &MineRule,
        variances: [f32; 2],
    ) -> Result<()> {
        let args = MineArgs {
            anchors: p.anchors,
            faces: p.faces,
            starts: p.starts,
            values: p.outputs,
            label: p.label,
            mined: p.mined,
            overlap: p.overlap,
            held: p.held,
            found: p.found,
            listed: p.listed,
            list: p.list,
            boxes: p.work,
            counts: p.counts,
            variances,
            least: rule.overlap,
            floor: rule.floor,
            anchors_a_face: rule.anchors,
        };
        // SAFETY: as above.
        unsafe {
            self.mine_find.launch(stream, p.grid(), THREADS, 0, &args)?;
            self.mine_take.launch(stream, [p.pictures, 1, 1], THREADS, THREADS * 8, &args)
        }
    }
}
