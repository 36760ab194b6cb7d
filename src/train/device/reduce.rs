//! Sums of gradients over the processes that train together, while the backward pass goes on.
//!
//! Gradients lie one behind the other as the graph's parameters do. The backward pass ends with the first of them: they are cut into
//! buckets from the end on, and what a bucket has is added up, in a stream of its own, as soon as the last unit that adds to it has run.
//! Running statistics, which each forward pass moves by its own part of the batch, become the ranks' mean at the same time. Before that,
//! in the forward pass's own stream, the counts are added up that losses are divided by. All ranks have the same graph and the same
//! objective, so that they ask for the same sums in the same order; neither stream has any under way when the other is given one.

use super::store::Store;
use super::DeviceEngine;
use crate::error::Result;
use crate::gpu::driver::{Event, Stream};
use crate::gpu::memory::DeviceBuffer;
use crate::gpu::nccl::{new_id, Communicator, Id, Reduce};
use crate::gpu::ops::train::objective::Others;
use crate::graph::build::ParamId;
use crate::train::ranks::{Ranks, What};
use crate::train::walk::Walk;
use std::ops::Range;
use std::sync::Arc;

/// Gradients that are added up together.
struct Bucket {
    /// The last unit to add to them: the lowest that has a parameter there.
    after: usize,
    bytes: Range<usize>,
    /// When the backward pass has them.
    ready: Event,
}

/// Sums over the ranks.
pub(super) struct Reduction {
    communicator: Communicator,
    ranks: Arc<Ranks>,
    stream: Stream,
    /// In the order in which the backward pass ends with them.
    buckets: Vec<Bucket>,
    /// Where running statistics lie that move.
    statistics: Vec<Range<usize>>,
    /// When the forward pass has moved them.
    forward: Event,
    /// Buckets given to the stream in this backward pass.
    given: usize,
    /// Whether the sums of a backward pass were not yet waited for.
    pending: bool,
}

impl Others for Reduction {
    fn parts(&self) -> usize {
        self.ranks.world()
    }

    fn sum(&self, stream: &Stream, buffer: &DeviceBuffer, range: Range<usize>) -> Result<()> {
        self.communicator.all_reduce(stream, Reduce::Counts, buffer, &[range])
    }

    fn wait(&self, stream: &Stream) -> Result<()> {
        self.communicator.watch(stream, &|| self.ranks.check())
    }
}

/// What is trained of the gradients, in ranges of at least `least` bytes (but for what is left over), each with the last unit that adds
/// to it; in the order in which those run.
fn buckets(walk: &Walk, store: &Store, least: usize) -> Vec<(usize, Range<usize>)> {
    let mut last = vec![None; walk.trainable.len()];
    for (u, unit) in walk.units.iter().enumerate().rev() {
        for p in unit.params() {
            last[p.0] = Some(u);
        }
    }
    let trained = (0..last.len()).filter(|&p| walk.trainable[p]);
    let mut params: Vec<(Range<usize>, usize)> =
        trained.map(|p| (store.bytes(ParamId(p)), last[p].unwrap_or(0))).collect();
    params.sort_by_key(|(bytes, _)| bytes.start);
    let mut buckets: Vec<(usize, Range<usize>)> = Vec::new();
    for (bytes, unit) in params.into_iter().rev() {
        match buckets.last_mut() {
            // What lies between is padding: a parameter that stands still begins another bucket.
            Some((after, range)) if range.len() < least && range.start - bytes.end < Store::ALIGN => {
                *after = unit.min(*after);
                range.start = bytes.start;
            }
            _ => buckets.push((unit, bytes)),
        }
    }
    buckets.sort_by_key(|(after, range)| std::cmp::Reverse((*after, range.start)));
    buckets
}

/// Where running statistics lie that the forward pass moves.
fn statistics(walk: &Walk, store: &Store) -> Vec<Range<usize>> {
    let moving = walk.units.iter().zip(&walk.frozen_norm).filter(|(_, &frozen)| !frozen);
    let norms = moving.filter_map(|(u, _)| u.norm);
    let mut all: Vec<Range<usize>> =
        norms.flat_map(|n| [n.mean, n.variance]).map(|p| store.bytes(p)).collect();
    all.sort_by_key(|r| r.start);
    // A normalisation that several units share is there once.
    all.dedup();
    let mut joined: Vec<Range<usize>> = Vec::new();
    for range in all {
        match joined.last_mut() {
            Some(before) if range.start - before.end < Store::ALIGN => before.end = range.end,
            _ => joined.push(range),
        }
    }
    joined
}

impl DeviceEngine {
    /// Bytes of gradients to be added up together: enough that a sum's fixed costs are little of it.
    pub const BUCKET: usize = 4 << 20;

    /// Makes it one of several: the gradients that a backward pass leaves are from now on the sums of all, made in pieces of `bucket` bytes
    /// or more; the running statistics that a forward pass moves become their mean. Each calls this, and the same passes.
    pub fn join(&mut self, ranks: &Arc<Ranks>, bucket: usize) -> Result<()> {
        let context = self.ops.device().context();
        let own = if ranks.rank() == 0 { new_id()?.to_vec() } else { Vec::new() };
        let id: Id = ranks.from_first(What::Identity, &own)?.try_into().map_err(|bytes: Vec<u8>| {
            crate::Error::Internal(format!("rank 0 sends {} bytes as NCCL's identity", bytes.len()))
        })?;
        let (world, rank) = (ranks.world() as u32, ranks.rank() as u32);
        let communicator = Communicator::join(context, &id, world, rank, &|| ranks.check())?;
        self.ops.keep_outgrown();
        let context = self.ops.device().context();
        let with_event = |(after, bytes)| Ok(Bucket { after, bytes, ready: Event::new(context)? });
        let buckets = buckets(&self.walk, &self.store, bucket);
        self.reduction = Some(Reduction {
            communicator,
            ranks: ranks.clone(),
            stream: Stream::new(context)?,
            buckets: buckets.into_iter().map(with_event).collect::<Result<_>>()?,
            statistics: statistics(&self.walk, &self.store),
            forward: Event::new(context)?,
            given: 0,
            pending: false,
        });
        Ok(())
    }

    /// How many train together.
    pub(super) fn world(&self) -> usize {
        self.reduction.as_ref().map_or(1, |r| r.ranks.world())
    }

    /// To be called before the units run back: gives the means of running statistics to be made.
    pub(super) fn begin_reduction(&mut self) -> Result<()> {
        let Some(r) = &mut self.reduction else { return Ok(()) };
        (r.given, r.pending) = (0, true);
        if r.statistics.is_empty() {
            return Ok(());
        }
        r.forward.record(self.ops.stream())?;
        r.stream.wait_for(&r.forward)?;
        r.communicator.all_reduce(&r.stream, Reduce::Mean, self.store.values().buffer, &r.statistics)
    }

    /// To be called when the units from `unit` on have run back: gives the sums to be made that they were the last to add to.
    pub(super) fn reduce_after(&mut self, unit: usize) -> Result<()> {
        let Some(r) = &mut self.reduction else { return Ok(()) };
        while let Some(bucket) = r.buckets.get(r.given).filter(|b| b.after >= unit) {
            bucket.ready.record(self.ops.stream())?;
            r.stream.wait_for(&bucket.ready)?;
            let (gradients, bytes) = (self.store.gradients().buffer, bucket.bytes.clone());
            r.communicator.all_reduce(&r.stream, Reduce::Sum, gradients, &[bytes])?;
            r.given += 1;
        }
        Ok(())
    }

    /// Waits for the sums of the last backward pass: to be called before gradients or parameters are read or changed. Where a rank has
    /// ended, that is an error.
    pub(super) fn finish_reduction(&mut self) -> Result<()> {
        let Some(r) = self.reduction.as_mut().filter(|r| r.pending) else { return Ok(()) };
        let Reduction { communicator, ranks, stream, .. } = r;
        communicator.wait(stream, &|| ranks.check())?;
        r.pending = false;
        self.ops.give_outgrown_back();
        self.store.clear_untrained(&self.graph, &self.walk.trainable, &self.ops)
    }

    /// Ends all sums where a pass is `done` with an error: others may never come to them, and what is given back waits for them.
    pub(super) fn or_end<T>(&mut self, done: Result<T>) -> Result<T> {
        if let (Err(_), Some(r)) = (&done, &mut self.reduction) {
            r.communicator.abort();
        }
        done
    }

    /// Leaves the others; all do so.
    pub(super) fn leave(&mut self) -> Result<()> {
        self.finish_reduction()?;
        match &mut self.reduction {
            Some(r) => r.communicator.leave(),
            None => Ok(()),
        }
    }
}
