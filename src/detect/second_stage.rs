//! The second stage of a detector: the features under every box that the first proposes, pooled to bins, pass a network of their
//! own, which says again how much of a face each is and moves it.

use super::anchors::Anchor;
use super::candidates::{Candidates, Ranked};
use super::detector::{face_probability, Map, SecondStage};
use super::face::Face;
use super::options::MAX_THREADS;
use crate::cpu::{isa, Arena, Pool};
use crate::error::Result;
use crate::graph::{Compiled, Plan, Weights};
use crate::layers::roi_align::cpu;
use crate::layers::RoiAlign;

/// A second stage with its weights packed; belongs to a model.
pub(super) struct CompiledSecondStage {
    stage: SecondStage,
    network: Compiled,
}

/// Proposals that pass the second network together.
const TOGETHER: usize = 32;

impl CompiledSecondStage {
    /// Packs `weights`.
    pub fn new(stage: SecondStage, weights: &Weights) -> Result<Self> {
        let network = Compiled::new(&stage.graph, weights, isa::detected())?;
        Ok(Self { stage, network })
    }

    pub fn stage(&self) -> &SecondStage {
        &self.stage
    }

    /// First-stage score that a box must pass where its final one, the mean of both stages', must pass `threshold`.
    pub fn proposal_threshold(&self, threshold: f32) -> f32 {
        self.stage.proposal_score.max(2.0 * threshold - 1.0)
    }
}

/// The second stage in a session: its plan, its memory, and the proposals of one run of the first network.
pub(super) struct Refiner {
    plan: Plan,
    arena: Arena,
    proposals: Candidates,
    limit: usize,
}

impl Refiner {
    /// Makes room for everything that it will need.
    pub fn new(second: &CompiledSecondStage) -> Result<Self> {
        let limit = second.stage.max_proposals;
        let plan = Plan::new(&second.network, &[second.stage.input(TOGETHER)])?;
        let (mut arena, mut proposals) = (Arena::default(), Candidates::default());
        arena.reserve(plan.floats())?;
        proposals.reserve(limit);
        Ok(Self { plan, arena, proposals, limit })
    }

    /// Heap bytes held.
    pub fn bytes(&self) -> usize {
        self.plan.bytes() + self.arena.bytes() + Candidates::bytes_for(self.limit)
    }

    /// Floats of memory that each thread needs beside the arena.
    pub fn scratch(&self) -> usize {
        self.plan.scratch()
    }

    /// Runs the second network once, on whatever stands there, so that all pages are touched.
    pub fn warmup(&mut self, pool: &mut Pool) {
        self.plan.run(&mut self.arena, pool);
    }

    /// Forgets the proposals.
    pub fn clear(&mut self) {
        self.proposals.clear();
    }

    /// Takes a proposal, in pixels of the first network's input, unless it is empty or there are enough better ones.
    pub fn propose(&mut self, face: Face) {
        if face.score >= self.proposals.floor() && face.bbox.width() > 0.0 && face.bbox.height() > 0.0 {
            self.proposals.push(face);
        }
    }

    /// Looks at the proposals on the map `features` and gives `sink` those whose final score, the mean of both stages', passes
    /// `threshold`, where the second stage moves them.
    pub fn refine(
        &mut self,
        second: &CompiledSecondStage,
        features: &Map<'_>,
        pool: &mut Pool,
        threshold: f32,
        sink: &mut dyn FnMut(Face),
    ) {
        let Self { plan, arena, proposals, .. } = self;
        for proposals in proposals.sorted().chunks(TOGETHER) {
            align(&second.stage.align, features, proposals, plan, arena, pool);
            plan.run(arena, pool);
            let floats = arena.floats();
            let [logits, offsets] = [0, 1].map(|i| plan.outputs()[i]);
            for (i, Ranked { face, .. }) in proposals.iter().enumerate() {
                let [logits, offsets] = [&logits, &offsets].map(|v| &floats[v.at(i, 0, 0)..][..v.shape.c]);
                let score = (face.score + face_probability(logits)) / 2.0;
                // False for a NaN too.
                if score > threshold {
                    let bbox = Anchor::of(&face.bbox).decode(offsets, second.stage.variances);
                    sink(Face { bbox, score, ..*face });
                }
            }
        }
    }
}

/// Writes the proposals' bins into the second network's input, shared between the threads.
fn align(
    roi: &RoiAlign,
    features: &Map<'_>,
    proposals: &[Ranked],
    plan: &Plan,
    arena: &mut Arena,
    pool: &mut Pool,
) {
    let (input, op) = (plan.inputs()[0], cpu::op(roi));
    let ([h, w], map) = (roi.output, [features.height(), features.width()]);
    let (count, threads) = (proposals.len(), pool.threads());
    let mut rest = &mut arena.floats_mut()[input.offset..];
    let mut done = 0;
    // On the stack; the entries past the threads stay empty.
    let mut shares: [(&[Ranked], &mut [f32]); MAX_THREADS] = std::array::from_fn(|i| {
        let end = count * (i + 1).min(threads) / threads;
        let mine = std::mem::replace(&mut done, end)..end;
        let floats = (mine.len() * input.image).min(rest.len());
        let (data, others) = std::mem::take(&mut rest).split_at_mut(floats);
        rest = others;
        (&proposals[mine], data)
    });
    pool.run_each(&mut shares, |_, (proposals, data)| {
        for (Ranked { face, .. }, data) in proposals.iter().zip(data.chunks_exact_mut(input.image)) {
            let b = face.bbox;
            let bins = op.bins([b.x1, b.y1, b.x2, b.y2]);
            for at in 0..h * w {
                let to = at / w * input.row + at % w * input.pixel;
                let out = &mut data[to..to + input.shape.c];
                bins.mean([at / w, at % w], map, |y, x| features.pixel(y, x), out);
            }
        }
    });
}
