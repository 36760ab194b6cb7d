//! Losses and gradients.

use super::{Anchors, Places, Rules, THREADS};
use crate::error::Result;
use crate::gpu::driver::Stream;
use crate::gpu::ops::train::kernels;

kernels! {
    /// Of `cuda/train_loss.cu`.
    pub(super) Kernels of TrainLoss:
    anchor_losses, total_losses,
}

/// Sums of a batch.
pub(super) const SUMS: usize = 5;
const LOSS_SHARED: u32 = THREADS * SUMS as u32 * 8;

/// Classification loss.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ClassRule {
    /// Cross-entropy of two logits, background and face.
    Softmax,
    /// Logistic loss of one logit.
    Sigmoid,
    /// Focal loss of one logit.
    Focal {
        /// Weight of faces.
        alpha: f32,
        /// Exponent.
        gamma: f32,
    },
    /// Quality focal loss of one logit, over all anchors.
    QualityFocal {
        /// Exponent.
        beta: f32,
    },
    /// HAMBox's, over all anchors.
    RegressionAwareFocal {
        /// Weight of faces.
        alpha: f32,
        /// Exponent.
        gamma: f32,
    },
}

impl ClassRule {
    /// Logits of an anchor.
    pub(super) fn logits(self) -> u32 {
        if self == ClassRule::Softmax {
            2
        } else {
            1
        }
    }
}

/// Box loss. Those of the IoU may add smooth L1 of the offsets where boxes do not overlap.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum BoxRule {
    /// Smooth L1 of the offsets.
    SmoothL1 {
        /// Where the parabola meets the line.
        beta: f32,
    },
    /// -ln IoU.
    NegLnIou {
        /// Whether smooth L1 is added.
        draws: bool,
    },
    /// (1 - IoU)^2.
    LeastSquareIou {
        /// Likewise.
        draws: bool,
    },
}

/// Losses of a batch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LossRule {
    /// Of logits.
    pub class: ClassRule,
    /// Of offsets.
    pub boxes: BoxRule,
    /// What the latter's gradients weigh.
    pub box_weight: f32,
    /// Of the scale-aware margin, pixels; 0 for none.
    pub margin: f32,
    /// What all gradients weigh.
    pub weight: f32,
}

/// `LossArgs` of `cuda/train_loss.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct LossArgs {
    anchors: Anchors,
    faces: u64,
    starts: u64,
    values: u64,
    gradient: u64,
    label: u64,
    mined: u64,
    overlap: u64,
    chosen: u64,
    weights: u64,
    own: u64,
    counts: u64,
    partial: u64,
    variances: [f32; 2],
    share: f32,
    alpha: f32,
    gamma: f32,
    margin: f32,
    beta: f32,
    box_weight: f32,
    weight: f32,
    class_loss: i32,
    box_loss: i32,
    no_overlap: i32,
    grouped: i32,
}

/// `TotalArgs` of `cuda/train_loss.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct TotalArgs {
    partial: u64,
    total: u64,
    blocks: u32,
}

impl Kernels {
    /// Losses behind matching, mining and sampling; their sums in `total`.
    ///
    /// # Safety
    /// The places are those of a batch, as large as they must be.
    pub(super) unsafe fn losses(&self, stream: &Stream, p: &Places, rules: &Rules) -> Result<()> {
        let rule = &rules.loss;
        let (class_loss, alpha, gamma) = match rule.class {
            ClassRule::Softmax => (0, 0.0, 0.0),
            ClassRule::Sigmoid => (1, 0.0, 0.0),
            ClassRule::Focal { alpha, gamma } => (2, alpha, gamma),
            ClassRule::QualityFocal { beta } => (3, 0.0, beta),
            ClassRule::RegressionAwareFocal { alpha, gamma } => (4, alpha, gamma),
        };
        let (box_loss, beta, draws) = match rule.boxes {
            BoxRule::SmoothL1 { beta } => (0, beta, false),
            BoxRule::NegLnIou { draws } => (1, 0.0, draws),
            BoxRule::LeastSquareIou { draws } => (2, 0.0, draws),
        };
        let sampled = rules.sampling.is_some();
        let args = LossArgs {
            anchors: p.anchors,
            faces: p.faces,
            starts: p.starts,
            values: p.outputs,
            gradient: p.gradient,
            label: p.label,
            mined: p.mined,
            overlap: p.overlap,
            chosen: if sampled { p.chosen } else { 0 },
            weights: p.weights,
            own: p.own,
            counts: p.counts,
            partial: p.partial,
            variances: rules.variances,
            share: 1.0 / p.whole as f32,
            alpha,
            gamma,
            margin: rule.margin,
            beta,
            box_weight: rule.box_weight,
            weight: rule.weight,
            class_loss,
            box_loss,
            no_overlap: draws.into(),
            grouped: rules.sampling.is_some_and(|s| s.grouped).into(),
        };
        let grid = p.grid();
        let total = TotalArgs { partial: p.partial, total: p.total, blocks: grid[0] * grid[1] };
        // SAFETY: the caller's contract; the args are the kernels' structs.
        unsafe {
            self.anchor_losses.launch(stream, grid, THREADS, LOSS_SHARED, &args)?;
            self.total_losses.launch(stream, [1, 1, 1], THREADS, LOSS_SHARED, &total)
        }
    }
}
