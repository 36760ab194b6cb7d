//! A batch on the threads: cut by images, a part for each.

use super::Thread;
use crate::cpu::dense::{pages, Element};
use crate::cpu::Pool;
use std::ops::Range;

/// Image ranges, one a thread.
pub(super) fn ranges(images: usize, threads: usize) -> Vec<Range<usize>> {
    (0..threads).map(|t| images * t / threads..images * (t + 1) / threads).collect()
}

/// A batch cut by [`ranges`].
fn split<T>(mut data: &mut [T], per_image: usize, images: usize, threads: usize) -> Vec<&mut [T]> {
    let mut parts = Vec::with_capacity(threads);
    for range in ranges(images, threads) {
        let (part, rest) = data.split_at_mut(range.len() * per_image);
        parts.push(part);
        data = rest;
    }
    parts
}

/// What a thread does: its images, its part of the map, its buffers.
pub(super) type Job<'a, T> = dyn Fn(&Range<usize>, &mut [T], &mut Thread<T>) + Sync + 'a;

/// Runs `job` on every thread with its part of `data`.
pub(super) fn on_parts<T: Element>(
    pool: &mut Pool,
    threads: &mut [Thread<T>],
    data: &mut [T],
    per_image: usize,
    images: usize,
    job: &Job<T>,
) {
    on_maybe_parts(pool, threads, Some(data), per_image, images, &|range, part, thread| {
        job(range, part.expect("data was given"), thread);
    });
}

/// As [`on_parts`] where there may be nothing to write.
pub(super) fn on_maybe_parts<T: Element>(
    pool: &mut Pool,
    threads: &mut [Thread<T>],
    data: Option<&mut [T]>,
    per_image: usize,
    images: usize,
    job: &(impl Fn(&Range<usize>, Option<&mut [T]>, &mut Thread<T>) + Sync),
) {
    let count = threads.len();
    let parts: Vec<Option<&mut [T]>> = match data {
        Some(data) => split(data, per_image, images, count).into_iter().map(Some).collect(),
        None => (0..count).map(|_| None).collect(),
    };
    let mut items: Vec<_> = ranges(images, count).into_iter().zip(parts).zip(threads).collect();
    pool.run_each(&mut items, |_, ((range, part), thread)| job(range, part.as_deref_mut(), thread));
}

/// A buffer of `len` values, one that is spare if there is.
pub(super) fn take<T: Element>(spare: &mut Vec<Vec<T>>, len: usize) -> Vec<T> {
    let fits = |v: &Vec<T>| v.capacity() >= len;
    let best = (0..spare.len()).filter(|&i| fits(&spare[i])).min_by_key(|&i| spare[i].capacity());
    let mut buffer = best.map(|i| spare.swap_remove(i)).unwrap_or_else(|| pages::buffer(len));
    buffer.resize(len, T::default());
    buffer
}
