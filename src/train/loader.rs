//! Batches, made ahead by worker threads.
//!
//! A batch depends on the seed, its step and the data alone: sample numbers count on over all
//! epochs, each epoch's order is a shuffle seeded by (seed, epoch), each example's augmentation by
//! (seed, sample number). So any number of workers gives the same batches, and training resumes at
//! any step.

mod cache;
mod order;
mod queue;

#[cfg(test)]
mod tests;

use std::ops::Range;
use std::sync::Arc;
use std::thread::JoinHandle;

use crate::detect::BBox;
use crate::train::augment::{Augment, Scratch};
use crate::train::data::{Annotated, Dataset};
use crate::{Error, Result};

use cache::Cache;
use order::Order;
use queue::Queue;

/// Side of the examples at each step, pixels.
#[derive(Clone)]
pub struct Sides(Arc<dyn Fn(u64) -> usize + Send + Sync>);

impl Sides {
    /// From a function of the step; it must always give the same, and more than 0.
    pub fn by_step(side: impl Fn(u64) -> usize + Send + Sync + 'static) -> Self {
        Self(Arc::new(side))
    }
}

impl From<usize> for Sides {
    fn from(side: usize) -> Self {
        Self::by_step(move |_| side)
    }
}

/// How batches are made.
#[derive(Clone)]
pub struct LoaderConfig {
    /// Of order and augmentation.
    pub seed: u64,
    /// Examples a batch.
    pub batch: usize,
    /// Those of every batch that are made, by their number in it: all, or the part of one of several processes.
    pub part: Range<usize>,
    /// Side of the examples.
    pub side: Sides,
    /// Threads that decode and augment.
    pub workers: usize,
    /// Most batches finished or in the making, the one handed out not counted.
    pub queue: usize,
    /// Decoded pictures are kept, three bytes a pixel, until they fill this; the others are decoded
    /// every time. (An epoch shows every picture once, so throwing out the oldest would keep none.)
    pub cache_bytes: usize,
    /// The first batch to make.
    pub start_step: u64,
}

/// Examples of one training step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Batch {
    /// Counts from 0 over all epochs.
    pub step: u64,
    /// Pixels a row, and rows, of every example.
    pub side: usize,
    /// N x side x side x 3, RGB.
    pub pixels: Vec<u8>,
    /// Faces of each example, in its pixels.
    pub faces: Vec<Vec<Annotated>>,
    /// What the picture fills of each example.
    pub inside: Vec<BBox>,
    /// Name of each example's sample.
    pub names: Vec<String>,
}

/// What all workers share.
struct Shared {
    dataset: Arc<Dataset>,
    augment: Augment,
    config: LoaderConfig,
    order: Order,
    cache: Cache,
    queue: Queue,
}

/// Makes batches in the background; see the module. Dropping it stops the workers.
pub struct Loader {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

impl Loader {
    /// Starts the workers. Fails on an empty data set, a recipe out of range, or a count of 0.
    pub fn new(dataset: Arc<Dataset>, augment: Augment, config: LoaderConfig) -> Result<Self> {
        augment.check()?;
        if dataset.samples.is_empty() {
            return Err(Error::InvalidArgument("the data set has no pictures".into()));
        }
        for (name, count) in [("batch", config.batch), ("workers", config.workers), ("queue", config.queue)] {
            if count == 0 {
                return Err(Error::InvalidArgument(format!("{name} is 0; the loader needs at least 1")));
            }
        }
        if config.part.is_empty() || config.part.end > config.batch {
            let (part, batch) = (&config.part, config.batch);
            return Err(Error::InvalidArgument(format!("part {part:?} is none of a batch of {batch}")));
        }
        let order = Order::new(config.seed, dataset.samples.len());
        let cache = Cache::new(dataset.clone(), config.cache_bytes);
        let queue = Queue::new(config.start_step, config.queue);
        let workers = config.workers;
        let mut loader = Self {
            shared: Arc::new(Shared { dataset, augment, config, order, cache, queue }),
            workers: Vec::new(),
        };
        for i in 0..workers {
            let shared = loader.shared.clone();
            let worker = std::thread::Builder::new()
                .name(format!("farface-load-{i}"))
                .spawn(move || shared.work())
                // Dropping the loader stops those that have started.
                .map_err(|e| Error::io("a loader thread could not be started", e))?;
            loader.workers.push(worker);
        }
        Ok(loader)
    }

    /// The batch of the next step; waits until it is made. After an error (no picture can be
    /// decoded, or a worker panicked) every later call fails, too.
    // `&self`: an `Iterator` would end, this goes on for ever.
    pub fn next(&self) -> Result<Batch> {
        self.shared.queue.next()
    }

    /// Gives a batch back, whose memory a later batch then uses.
    pub fn recycle(&self, batch: Batch) {
        self.shared.queue.recycle(batch);
    }

    /// The epoch that the first example of `step` belongs to, from 0.
    pub fn epoch(&self, step: u64) -> u64 {
        step.saturating_mul(self.shared.config.batch as u64) / self.shared.dataset.samples.len() as u64
    }

    /// Bytes of decoded pictures kept.
    pub fn cached_bytes(&self) -> usize {
        self.shared.cache.bytes()
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        self.shared.queue.stop();
        for worker in self.workers.drain(..) {
            // Its panic, if any, was an error in next().
            let _ = worker.join();
        }
    }
}

impl Shared {
    fn work(&self) {
        let mut scratch = Scratch::default();
        while let Some((step, batch)) = self.queue.take() {
            // The scratch is only memory: what a panic left in it is overwritten.
            let made = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                self.make(step, batch, &mut scratch)
            }));
            let made = made.unwrap_or_else(|panic| {
                let text = panic.downcast_ref::<&str>().map(|s| s.to_string());
                let text = text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
                Err(Error::Internal(format!("a loader thread panicked at step {step}: {text}")))
            });
            match made {
                Ok(Some(batch)) => self.queue.put(step, Ok(batch)),
                Ok(None) => return,
                Err(error) => self.queue.put(step, Err(error)),
            }
        }
    }

    /// The batch of a step, in the memory of an old one; None where the loader is stopping.
    fn make(&self, step: u64, mut batch: Batch, scratch: &mut Scratch) -> Result<Option<Batch>> {
        let (side, n, part) = ((self.config.side.0)(step), self.config.batch, &self.config.part);
        if side == 0 {
            return Err(Error::InvalidArgument(format!("the side of step {step} is 0")));
        }
        (batch.step, batch.side) = (step, side);
        batch.pixels.resize(part.len() * side * side * 3, 0);
        batch.faces.clear();
        batch.inside.clear();
        batch.names.clear();
        for (i, pixels) in part.clone().zip(batch.pixels.chunks_exact_mut(side * side * 3)) {
            if self.queue.is_stopped() {
                return Ok(None);
            }
            let number = step.wrapping_mul(n as u64).wrapping_add(i as u64);
            let (index, picture) = self.cache.picture(self.order.index(number))?;
            let sample = &self.dataset.samples[index];
            let mut rng = order::stream(self.config.seed, order::EXAMPLE, number);
            let shown = self.augment.draw(&picture, &sample.faces, side, &mut rng, scratch, pixels)?;
            batch.faces.push(shown.faces);
            batch.inside.push(shown.inside);
            batch.names.push(sample.name.clone());
        }
        Ok(Some(batch))
    }
}
