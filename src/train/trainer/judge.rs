//! A batch's losses: on the device where its outputs are, else on the host.

use super::Trainer;
use crate::error::Result;
use crate::graph::init::Rng;
use crate::shape::{Shape, Tensor};
use crate::train::data::Annotated;
use crate::train::loader::Batch;
use crate::train::network::{Judgement, LookAgain};
use crate::train::objective::{Losses, Whole};

impl Trainer {
    /// The seed of what is drawn under number `n` in this step. Pictures of the batch have the first; what has draws of its own, numbers
    /// past the batch's.
    fn draws(&self) -> impl Fn(usize) -> u64 + Sync {
        let (seed, step) = (self.recipe.run.seed, self.step);
        move |n| Rng::new(seed ^ step.rotate_left(32)).bits() ^ n as u64
    }

    /// Runs the network on a batch and judges its outputs where they are, so that they need not come down; None where that cannot be, and
    /// nothing is done then.
    pub(super) fn judge_on_device(&mut self, batch: &Batch, shape: Shape) -> Result<Option<Losses>> {
        // Pictures are counted in the whole batch, of which the ones here may be a part.
        let (draws, images, part) = (self.draws(), self.recipe.batch.size, self.part.start);
        let seeds = |first: usize| (0..batch.faces.len()).map(|n| draws(part + n + first)).collect();
        let around: Vec<Vec<Vec<Annotated>>> =
            self.pyramid_anchors.iter().map(|p| p.all_around(&batch.faces)).collect();
        let own = Judgement {
            objective: (&self.objective).into(),
            faces: &batch.faces,
            inside: &batch.inside,
            seeds: seeds(0),
            weight: 1.0,
        };
        let others = (1..).zip(self.pyramid_anchors.iter().zip(&around)).map(|(k, (p, faces))| Judgement {
            objective: (&p.objective).into(),
            faces,
            inside: &[],
            seeds: seeds((1 << k) * images),
            weight: p.weight,
        });
        let judgements: Vec<Judgement<'_>> = [own].into_iter().chain(others).collect();
        let judged = self.engine.forward_judged(&batch.pixels, shape, &self.table, &judgements)?;
        let Some(losses) = judged.and_then(|losses| losses.into_iter().reduce(with)) else { return Ok(None) };
        let Some(look) = &self.second_look else { return Ok(Some(losses)) };
        let again = LookAgain { look, faces: &batch.faces, seeds: seeds(images) };
        Ok(Some(with(losses, self.engine.look_again(&again)?)))
    }

    /// Runs the network on a batch and judges its outputs on the host: losses, and the outputs' gradients.
    pub(super) fn judge_on_host(&mut self, batch: &Batch, shape: Shape) -> Result<(Losses, Vec<Tensor>)> {
        let outputs = self.engine.forward(&batch.pixels, shape, &self.table)?;
        let draws = self.draws();
        // Pictures are counted in the whole batch, of which the ones here may be a part.
        let (images, first, ranks) = (self.recipe.batch.size, self.part.start, self.ranks.clone());
        let rng = |n: usize| Rng::new(draws(first + n));
        let sum = |counts| ranks.as_ref().map_or(Ok(counts), |r| r.sum(counts));
        let whole = Whole::shared(images, &sum);
        let (own, mut around) = outputs.split_at(self.objective.outputs());
        let threads = self.engine.threads();
        let (mut losses, mut d) =
            self.objective.judge(own, &batch.faces, &batch.inside, rng, threads, whole)?;
        for (k, anchors) in (1..).zip(&self.pyramid_anchors) {
            let (outputs, rest) = around.split_at(anchors.objective.outputs());
            around = rest;
            let rng = |n: usize| rng(n + (1 << k) * images);
            let (more, gradients) = anchors.judge_part(outputs, &batch.faces, rng, threads, whole)?;
            losses = with(losses, more);
            d.extend(gradients);
        }
        if let Some(second) = &self.second_look {
            let rng = |n: usize| rng(n + images);
            let looks = second.choose(own, &batch.faces, rng, threads, whole)?;
            let outputs = self.engine.forward_boxes(looks.boxes())?;
            let (more, gradients) = second.judge(&looks, &outputs)?;
            losses = with(losses, more);
            d.extend(gradients);
        }
        Ok((losses, d))
    }
}

/// A detector's losses with those of training alone, which count nothing.
fn with(losses: Losses, more: Losses) -> Losses {
    Losses { class: losses.class + more.class, boxes: losses.boxes + more.boxes, ..losses }
}
