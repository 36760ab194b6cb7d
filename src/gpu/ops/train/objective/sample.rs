//! Which anchors enter the loss.

use super::{Anchors, Places, THREADS};
use crate::error::Result;
use crate::gpu::driver::Stream;
use crate::gpu::ops::train::kernels;

kernels! {
    /// Of `cuda/train_sample.cu`.
    pub(super) Kernels of TrainSample:
    sample_prepare, sample_list, sample_choose, sample_weigh,
}

/// Bins of a digit, and what is found in them.
const CHOOSE_SHARED: u32 = (256 + 2) * 4;
const LIST_SHARED: u32 = 2 * THREADS / 32 * 4;

/// Which of a choice's anchors are taken.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Miner {
    /// All.
    All,
    /// Any.
    Random,
    /// Those with the highest losses.
    Ohem,
    /// Those with the highest r^(1 / (loss + 1e-6)), r at random.
    Wrs,
    /// Any of those with a loss of `min_loss` or more; over the whole picture `each` of both kinds.
    Balanced {
        /// Positives, and negatives.
        each: u64,
        /// As above.
        min_loss: f32,
    },
    /// Any; the class weight is one over the sum of focal factors.
    Focal {
        /// Of positives; negatives weigh 1 - alpha.
        alpha: f32,
        /// Exponent.
        gamma: f32,
    },
}

/// How anchors are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SampleRule {
    /// Which.
    pub miner: Miner,
    /// By anchor group, or once a picture.
    pub grouped: bool,
    /// Anchors of a choice; 0: all positives and `ratio` times as many negatives.
    pub samples: u64,
    /// Negatives for each positive.
    pub ratio: u64,
    /// Whether losses are summed up rather than averaged.
    pub sum: bool,
}

/// `SampleArgs` of `cuda/train_sample.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct SampleArgs {
    anchors: Anchors,
    seeds: u64,
    values: u64,
    label: u64,
    mined: u64,
    overlap: u64,
    hardness: u64,
    list: u64,
    keys: u64,
    heads: u64,
    nexts: u64,
    chosen: u64,
    choices: u64,
    weights: u64,
    samples: u64,
    ratio: u64,
    each: u64,
    min_loss: f32,
    alpha: f32,
    gamma: f32,
    miner: i32,
    grouped: i32,
    sum: i32,
    two_logits: i32,
}

impl Kernels {
    /// Writes what the mining found into the labels, for losses over all anchors of one logit.
    ///
    /// # Safety
    /// As [`Self::choose`].
    pub(super) unsafe fn relabel(&self, stream: &Stream, p: &Places) -> Result<()> {
        let all = SampleRule { miner: Miner::All, grouped: false, samples: 0, ratio: 1, sum: false };
        // SAFETY: the caller's contract; the args are the kernel's struct.
        unsafe { self.sample_prepare.launch(stream, p.grid(), THREADS, 0, &args_of(p, &all, 1)) }
    }

    /// Chooses anchors by what the matching left.
    ///
    /// # Safety
    /// The places are those of a batch, as large as they must be.
    pub(super) unsafe fn choose(
        &self,
        stream: &Stream,
        p: &Places,
        rule: &SampleRule,
        logits: u32,
    ) -> Result<()> {
        // SAFETY: the caller's contract; the args are the kernels' struct.
        unsafe {
            self.sample_prepare.launch(stream, p.grid(), THREADS, 0, &args_of(p, rule, logits))?;
            self.draw(stream, p, rule, logits)
        }
    }

    /// As [`Self::choose`], where nothing was mined and nothing is chosen yet, by a miner that does not look at losses or behind what it
    /// looks at.
    ///
    /// # Safety
    /// As there.
    pub(super) unsafe fn draw(
        &self,
        stream: &Stream,
        p: &Places,
        rule: &SampleRule,
        logits: u32,
    ) -> Result<()> {
        let args = args_of(p, rule, logits);
        let ranges = if rule.grouped { p.anchors.group_count } else { 1 };
        let grid = [ranges, p.pictures, 1];
        // SAFETY: as above.
        unsafe {
            self.sample_list.launch(stream, grid, THREADS, LIST_SHARED, &args)?;
            let sides = [2 * ranges, p.pictures, 1];
            self.sample_choose.launch(stream, sides, THREADS, CHOOSE_SHARED, &args)?;
            self.sample_weigh.launch(stream, grid, THREADS, THREADS * 8, &args)
        }
    }
}

fn args_of(p: &Places, rule: &SampleRule, logits: u32) -> SampleArgs {
    let (miner, each, min_loss, alpha, gamma) = match rule.miner {
        Miner::All => (0, 0, 0.0, 0.0, 0.0),
        Miner::Random => (1, 0, 0.0, 0.0, 0.0),
        Miner::Ohem => (2, 0, 0.0, 0.0, 0.0),
        Miner::Wrs => (3, 0, 0.0, 0.0, 0.0),
        Miner::Balanced { each, min_loss } => (4, each, min_loss, 0.0, 0.0),
        Miner::Focal { alpha, gamma } => (5, 0, 0.0, alpha, gamma),
    };
    let array = |k: u64| p.work + k * p.values() * 4;
    SampleArgs {
        anchors: p.anchors,
        seeds: p.seeds,
        values: p.outputs,
        label: p.label,
        mined: p.mined,
        overlap: p.overlap,
        hardness: p.hardness,
        list: p.list,
        keys: array(0),
        heads: array(1),
        nexts: array(2),
        chosen: p.chosen,
        choices: p.choices,
        weights: p.weights,
        samples: rule.samples,
        // The kernel adds one.
        ratio: rule.ratio.min(u64::MAX - 1),
        each,
        min_loss,
        alpha,
        gamma,
        miner,
        grouped: rule.grouped.into(),
        sum: rule.sum.into(),
        two_logits: (logits == 2).into(),
    }
}
