//! Batches on their way from the workers to the trainer, in order and bounded.

use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::Batch;
use crate::{Error, Result};

/// Hands out steps to workers, at most `room` beyond the step that the trainer takes next.
pub(super) struct Queue {
    room: u64,
    state: Mutex<State>,
    /// A step may be taken, or the end has come.
    taken: Condvar,
    /// A batch is ready.
    ready: Condvar,
}

struct State {
    /// The step that a worker takes next.
    next: u64,
    /// The step that the trainer takes next.
    wanted: u64,
    ready: BTreeMap<u64, Result<Batch>>,
    /// Batches given back, for their memory.
    old: Vec<Batch>,
    stopped: bool,
    /// What ended it, for those who ask again.
    failed: Option<String>,
}

impl Queue {
    pub(super) fn new(start: u64, room: usize) -> Self {
        let state = State {
            next: start,
            wanted: start,
            ready: BTreeMap::new(),
            old: Vec::new(),
            stopped: false,
            failed: None,
        };
        Self { room: room as u64, state: Mutex::new(state), taken: Condvar::new(), ready: Condvar::new() }
    }

    /// The next step to make and memory to make it in; waits for room. None: stop working.
    pub(super) fn take(&self) -> Option<(u64, Batch)> {
        let mut state = self.state();
        while !state.stopped && state.next - state.wanted >= self.room {
            state = self.taken.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.stopped {
            return None;
        }
        let step = state.next;
        state.next += 1;
        Some((step, state.old.pop().unwrap_or_default()))
    }

    pub(super) fn put(&self, step: u64, batch: Result<Batch>) {
        self.state().ready.insert(step, batch);
        self.ready.notify_all();
    }

    pub(super) fn next(&self) -> Result<Batch> {
        let mut state = self.state();
        loop {
            if let Some(reason) = &state.failed {
                return Err(Error::Internal(format!("the loader has stopped: {reason}")));
            }
            let wanted = state.wanted;
            if let Some(batch) = state.ready.remove(&wanted) {
                match &batch {
                    Ok(_) => state.wanted += 1,
                    Err(error) => {
                        state.failed = Some(error.to_string());
                        state.stopped = true;
                        // Others that wait for this batch.
                        self.ready.notify_all();
                    }
                }
                self.taken.notify_all();
                return batch;
            }
            state = self.ready.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    pub(super) fn recycle(&self, batch: Batch) {
        let mut state = self.state();
        if (state.old.len() as u64) < self.room {
            state.old.push(batch);
        }
    }

    pub(super) fn stop(&self) {
        self.state().stopped = true;
        self.taken.notify_all();
    }

    pub(super) fn is_stopped(&self) -> bool {
        self.state().stopped
    }

    /// Every change is one statement, so a panicked thread left nothing half done.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(step: u64) -> Result<Batch> {
        Ok(Batch { step, ..Batch::default() })
    }

    #[test]
    fn batches_come_in_order_however_they_were_made() {
        let queue = Queue::new(10, 3);
        let steps: Vec<u64> = (0..3).map(|_| queue.take().unwrap().0).collect();
        assert_eq!(steps, [10, 11, 12]);
        for step in [12, 10, 11] {
            queue.put(step, batch(step));
        }
        assert_eq!((0..3).map(|_| queue.next().unwrap().step).collect::<Vec<_>>(), [10, 11, 12]);
    }

    #[test]
    fn a_worker_waits_while_the_queue_is_full() {
        let queue = Queue::new(0, 2);
        let (a, b) = (queue.take().unwrap().0, queue.take().unwrap().0);
        queue.put(a, batch(a));
        queue.put(b, batch(b));
        let taken = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|s| {
            s.spawn(|| {
                assert_eq!(queue.take().unwrap().0, 2);
                taken.store(true, std::sync::atomic::Ordering::SeqCst);
            });
            std::thread::sleep(std::time::Duration::from_millis(30));
            assert!(!taken.load(std::sync::atomic::Ordering::SeqCst), "a third batch was begun");
            assert_eq!(queue.next().unwrap().step, 0);
        });
        assert!(taken.into_inner());
    }

    #[test]
    fn old_memory_is_used_again_and_bounded() {
        let queue = Queue::new(0, 2);
        for _ in 0..5 {
            queue.recycle(Batch { pixels: vec![0; 7], ..Batch::default() });
        }
        assert_eq!(queue.state().old.len(), 2);
        assert_eq!(queue.take().unwrap().1.pixels.len(), 7);
    }

    #[test]
    fn after_an_error_every_call_fails_with_its_reason_and_workers_stop() {
        let queue = Queue::new(0, 2);
        queue.take();
        queue.put(0, Err(Error::InvalidData("reason".into())));
        for _ in 0..2 {
            assert!(queue.next().unwrap_err().to_string().contains("reason"));
        }
        assert!(queue.take().is_none());
    }
}
