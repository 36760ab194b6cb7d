//! A training by several processes, as one of them sees it.

use super::{Losses, Resources, Trainer};
use crate::error::{Error, Result};
use crate::graph::init::{fnv1a, FNV_OFFSET};
use crate::train::checkpoint::Checkpoint;
use crate::train::ranks::{Ranks, What};
use std::path::Path;
use std::sync::Arc;

impl Trainer {
    /// A training of the recipe `text` by several processes on CUDA devices, each of which calls this. Rank 0 begins as [`Trainer::new`]
    /// does or, with `checkpoint`, as [`Trainer::from_checkpoint`]; the others start from its state and read neither.
    ///
    /// The recipe's batch is that of all together: each takes an equal part of its examples, the same as a process alone would see, and
    /// what losses are divided by is counted over all. Gradients are added up, so that a step is that of a process alone up to rounding
    /// but for batch normalisations, which normalise by their own part's statistics; running ones are the mean of the parts'.
    pub fn of_rank(
        text: &str,
        base: &Path,
        resources: Resources,
        ranks: Arc<Ranks>,
        checkpoint: Option<&Path>,
    ) -> Result<Self> {
        let first = ranks.rank() == 0;
        let from_start = first && checkpoint.is_none();
        let mut trainer = Self::build(text, base, resources, from_start, Some(ranks.clone()))?;
        if first {
            if let Some(path) = checkpoint {
                trainer.resume(path)?;
            }
            let state = trainer.state()?.to_bytes(trainer.engine.graph())?;
            ranks.from_first(What::State, &state)?;
        } else {
            let state = ranks.from_first(What::State, &[])?;
            let name = "rank 0's state";
            let state = Checkpoint::from_bytes(trainer.engine.graph(), &state, name)?;
            trainer.take_up(state, name)?;
        }
        Ok(trainer)
    }

    /// Whether all go on with a step: what rank 0 says; `own` for a process alone.
    pub fn agree(&self, own: bool) -> Result<bool> {
        match &self.ranks {
            Some(ranks) => Ok(ranks.from_first(What::GoOn, &[u8::from(own)])? == [1]),
            None => Ok(own),
        }
    }

    /// Ends a training of several: each calls it, after its last step. Nothing for a process alone.
    pub fn part(&mut self) -> Result<()> {
        if let Some(ranks) = &self.ranks {
            ranks.all(What::End, &[])?;
        }
        self.engine.part()
    }

    /// Processes that share this machine.
    pub(super) fn sharers(&self) -> usize {
        self.ranks.as_ref().map_or(1, |r| r.launch().local_world as usize)
    }

    /// A batch's losses from those of this rank's part.
    pub(super) fn of_all_ranks(&self, own: Losses) -> Result<Losses> {
        let Some(ranks) = &self.ranks else { return Ok(own) };
        let Losses { class, boxes, matched, mined, faces, iou } = own;
        let counts = [matched, mined, faces].map(|count| count as u64);
        let [class, boxes, iou] = [class, boxes, iou].map(f64::to_bits);
        let all = ranks.all_numbers(What::Losses, [class, boxes, iou, counts[0], counts[1], counts[2]])?;
        let parts = all.iter().map(|&[class, boxes, iou, matched, mined, faces]| Losses {
            class: f64::from_bits(class),
            boxes: f64::from_bits(boxes),
            iou: f64::from_bits(iou),
            matched: matched as usize,
            mined: mined as usize,
            faces: faces as usize,
        });
        Ok(Losses::of_parts(&parts.collect::<Vec<_>>()))
    }

    /// Errors where the processes' parameters are no longer the same.
    pub(super) fn compare(&mut self) -> Result<()> {
        let Some(ranks) = self.ranks.clone() else { return Ok(()) };
        let params = self.engine.params()?;
        let sum = params.iter().fold(FNV_OFFSET, |sum, values| fnv1a(sum, bytemuck::cast_slice(values)));
        let all = ranks.all_numbers(What::Parameters, [sum])?;
        match all.iter().position(|other| *other != all[0]) {
            None => Ok(()),
            Some(rank) => Err(Error::Internal(format!(
                "training stopped at step {}: the parameters of rank {rank} are not those of rank 0. The last checkpoint is sound",
                self.step
            ))),
        }
    }
}
