//! A batch on the threads: cut by images into parts, which the threads take as they come.

use crate::cpu::dense::{Element, Scratch};
use crate::cpu::pages;
use crate::cpu::Pool;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

/// Parts of a batch (as many as images, where those are fewer). Each has sums of its own, added up in their order, so that
/// nothing depends on how many threads there are or which of them took what. More than threads, so that one that is held up
/// by something else on the machine does not hold up all.
const PARTS: usize = 8;

/// A thread's buffers.
#[derive(Default)]
pub(super) struct Thread<T> {
    pub scratch: Scratch<T>,
    pub rows: [Vec<f32>; 3],
}

/// Sums over a part of the batch.
#[derive(Default)]
pub(super) struct Part {
    pub sums: Vec<f64>,
    pub dw: Vec<f32>,
    pub db: Vec<f32>,
}

/// The threads, and the sums of the parts.
pub(super) struct Workers<T> {
    pool: Pool,
    threads: Vec<Thread<T>>,
    pub parts: Vec<Part>,
}

/// What is done with a part: its images, its share of a map, its sums, a thread's buffers.
pub(super) type Job<'a, T> = dyn Fn(&Range<usize>, &mut [T], &mut Part, &mut Thread<T>) + Sync + 'a;

impl<T: Element> Workers<T> {
    pub fn new(threads: usize) -> std::io::Result<Self> {
        let pool = Pool::new(threads)?;
        let threads = (0..pool.threads()).map(|_| Thread::default()).collect();
        Ok(Self { pool, threads, parts: (0..PARTS).map(|_| Part::default()).collect() })
    }

    pub fn threads(&self) -> usize {
        self.threads.len()
    }

    /// Runs `job` on every part with its share of `data`.
    pub fn on_parts(&mut self, data: &mut [T], per_image: usize, images: usize, job: &Job<T>) {
        self.on_maybe_parts(Some(data), per_image, images, &|range, share, part, thread| {
            job(range, share.expect("data was given"), part, thread);
        });
    }

    /// As [`Self::on_parts`] where there may be nothing to write.
    pub fn on_maybe_parts(
        &mut self,
        mut data: Option<&mut [T]>,
        per_image: usize,
        images: usize,
        job: &(impl Fn(&Range<usize>, Option<&mut [T]>, &mut Part, &mut Thread<T>) + Sync),
    ) {
        let count = PARTS.min(images);
        let mut items = Vec::with_capacity(count);
        for (i, part) in self.parts.iter_mut().take(count).enumerate() {
            let range = images * i / count..images * (i + 1) / count;
            let (share, rest) = data.map(|data| data.split_at_mut(range.len() * per_image)).unzip();
            data = rest;
            items.push((AtomicBool::new(false), Mutex::new((range, share, part))));
        }
        let threads = self.threads.len();
        self.pool.run_each(&mut self.threads, |team, thread| {
            // First those whose images this thread had before and may still have in its cache.
            let first = count * team.index / threads;
            for (taken, item) in items[first..].iter().chain(&items[..first]) {
                if !taken.swap(true, Ordering::Relaxed) {
                    let mut item = item.lock().unwrap_or_else(PoisonError::into_inner);
                    let (range, share, part) = &mut *item;
                    job(range, share.as_deref_mut(), part, thread);
                }
            }
        });
    }

    /// Room for the parts' sums of a map of `c` channels.
    pub fn clear_sums(&mut self, c: usize) {
        for part in &mut self.parts {
            part.sums.clear();
            part.sums.resize(2 * c, 0.0);
        }
    }

    /// The parts' sums, added in their order.
    pub fn total(&self, c: usize) -> Vec<f64> {
        let mut sums = vec![0.0; 2 * c];
        for part in &self.parts {
            sums.iter_mut().zip(&part.sums).for_each(|(s, v)| *s += v);
        }
        sums
    }
}

/// Buffers of gradients that come and go; those not in use.
#[derive(Default)]
pub(super) struct Spare<T>(Vec<Vec<T>>);

/// A buffer of which the first `len` values are in use.
pub(super) struct Buffer<T> {
    values: Vec<T>,
    len: usize,
}

impl<T> std::ops::Deref for Buffer<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        &self.values[..self.len]
    }
}

impl<T> std::ops::DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.values[..self.len]
    }
}

impl<T: Element> Spare<T> {
    /// A buffer of `len` values of no meaning, the smallest spare one that holds them if there is one.
    pub fn take(&mut self, len: usize) -> Buffer<T> {
        let best = (0..self.0.len()).filter(|&i| self.0[i].len() >= len).min_by_key(|&i| self.0[i].len());
        let values = best.map_or_else(|| pages::buffer(len), |i| self.0.swap_remove(i));
        Buffer { values, len }
    }

    pub fn give(&mut self, buffer: Buffer<T>) {
        self.0.push(buffer.values);
    }
}
