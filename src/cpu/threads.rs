//! A small pool for one caller at a time: the caller and its workers run the same function side by
//! side and meet at barriers. Work is split statically, so there is no queue and no lock between
//! the steps of a job. Workers spin for a moment between jobs and then sleep until the next.

use super::arena::Arena;
use crate::error::Result;
use std::panic::{catch_unwind, resume_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;

/// Spins before a worker sleeps between jobs: some tens of microseconds.
const SPINS_BEFORE_SLEEP: u32 = 4_000;
/// Stack of a worker in bytes; stated, or the standard library would look for it in the environment.
const STACK: usize = 2 << 20;
/// Spins at a barrier before the thread offers its core to others.
const SPINS_BEFORE_YIELD: u32 = 1_000;
/// Waits for the end of a job before the caller sleeps: with more busy threads than cores, a caller that kept offering its
/// core would take it from the very workers it waits for.
const WAITS_BEFORE_SLEEP: u32 = SPINS_BEFORE_YIELD + 50;

/// The function all threads run, its lifetime erased; valid from the epoch's start until all
/// workers have reported back, for which `Pool::run` waits.
#[derive(Clone, Copy)]
struct Job(*const (dyn Fn(&Team) + Sync));
// SAFETY: the pointee is Sync, and Pool::run keeps it alive while any worker may use it.
unsafe impl Send for Job {}

struct Shared {
    threads: usize,
    /// Counts jobs; workers wait for it to change.
    epoch: AtomicU32,
    job: Mutex<Option<Job>>,
    wake: Condvar,
    /// Told by the last worker of a job where the caller sleeps.
    done: Condvar,
    caller_sleeps: AtomicBool,
    stop: AtomicBool,
    running: AtomicUsize,
    arrived: AtomicUsize,
    phase: AtomicU32,
    panicked: AtomicBool,
}

/// One thread's place in a running job.
pub struct Team<'a> {
    /// This thread's index.
    pub index: usize,
    /// Threads in the job.
    pub threads: usize,
    shared: Option<&'a Shared>,
}

impl Team<'_> {
    /// This thread's share of `0..units`, contiguous and fixed by index alone.
    pub fn share(&self, units: usize) -> std::ops::Range<usize> {
        // In u64: rows times threads may not fit 32 bits.
        let cut = |index: usize| (units as u64 * index as u64 / self.threads as u64) as usize;
        cut(self.index)..cut(self.index + 1)
    }

    /// Waits until every thread of the job is here. Panics where another thread of the job has.
    pub fn barrier(&self) {
        let Some(s) = self.shared else { return };
        let phase = s.phase.load(Ordering::Acquire);
        if s.arrived.fetch_add(1, Ordering::AcqRel) + 1 == s.threads {
            s.arrived.store(0, Ordering::Relaxed);
            s.phase.store(phase.wrapping_add(1), Ordering::Release);
            return;
        }
        let mut spins = 0;
        while s.phase.load(Ordering::Acquire) == phase {
            if s.panicked.load(Ordering::Relaxed) {
                panic!("another thread of this job panicked");
            }
            spins += 1;
            if spins < SPINS_BEFORE_YIELD {
                std::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
        }
    }
}

/// Splits a range of rows counted over all images into (image, rows of it).
pub(crate) fn for_images(
    rows: std::ops::Range<usize>,
    height: usize,
    mut f: impl FnMut(usize, std::ops::Range<usize>),
) {
    let mut y = rows.start;
    while y < rows.end {
        let n = y / height;
        let end = rows.end.min((n + 1) * height);
        f(n, y - n * height..end - n * height);
        y = end;
    }
}

/// Threads of one session. With one thread there are no workers, no locks and no system calls.
pub struct Pool {
    shared: Option<Arc<Shared>>,
    workers: Vec<JoinHandle<()>>,
    /// Memory of the threads' own, one's behind the other's.
    scratch: Arena,
}

impl Pool {
    /// Pool in which jobs run on `threads` threads, the caller's included; at least 1.
    pub fn new(threads: usize) -> std::io::Result<Self> {
        let threads = threads.max(1);
        if threads == 1 {
            return Ok(Self { shared: None, workers: Vec::new(), scratch: Arena::default() });
        }
        let shared = Arc::new(Shared {
            threads,
            epoch: AtomicU32::new(0),
            job: Mutex::new(None),
            wake: Condvar::new(),
            done: Condvar::new(),
            caller_sleeps: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            running: AtomicUsize::new(0),
            arrived: AtomicUsize::new(0),
            phase: AtomicU32::new(0),
            panicked: AtomicBool::new(false),
        });
        let mut pool = Self {
            shared: Some(shared.clone()),
            workers: Vec::with_capacity(threads - 1),
            scratch: Arena::default(),
        };
        for index in 1..threads {
            let shared = shared.clone();
            let builder = std::thread::Builder::new().name(format!("farface-{index}")).stack_size(STACK);
            pool.workers.push(builder.spawn(move || work(&shared, index))?);
        }
        Ok(pool)
    }

    /// Threads a job runs on.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Keeps `floats` of memory for every thread, so that no run of a program that needs as much allocates any.
    pub fn reserve_scratch(&mut self, floats: usize) -> Result<()> {
        self.scratch.reserve(floats.saturating_mul(self.threads()))
    }

    /// Frees what was kept.
    pub fn clear_scratch(&mut self) {
        self.scratch.clear();
    }

    /// Memory with `floats` for every thread; panics where the system has none. To be given back.
    pub(super) fn take_scratch(&mut self, floats: usize) -> Arena {
        self.reserve_scratch(floats).expect("memory for the threads of a run");
        std::mem::take(&mut self.scratch)
    }

    pub(super) fn give_scratch(&mut self, scratch: Arena) {
        self.scratch = scratch;
    }

    /// Runs `job` on every thread and returns when all are done. A panic in any of them is
    /// re-raised here, after all have stopped.
    pub fn run(&mut self, job: &(dyn Fn(&Team) + Sync)) {
        let Some(shared) = self.shared.as_deref() else {
            return job(&Team { index: 0, threads: 1, shared: None });
        };
        shared.panicked.store(false, Ordering::Relaxed);
        shared.arrived.store(0, Ordering::Relaxed);
        shared.running.store(shared.threads - 1, Ordering::Relaxed);
        // SAFETY: only the lifetime changes; this function does not return (nor unwind) before
        // `running` is 0, after which no worker touches the job again.
        let erased: Job = Job(unsafe {
            std::mem::transmute::<*const (dyn Fn(&Team) + Sync + '_), *const (dyn Fn(&Team) + Sync + 'static)>(
                job,
            )
        });
        {
            let mut slot = shared.job.lock().unwrap_or_else(|e| e.into_inner());
            *slot = Some(erased);
            shared.epoch.fetch_add(1, Ordering::Release);
        }
        shared.wake.notify_all();
        let mine = run_guarded(shared, 0, job);
        shared.wait_for_workers();
        if let Err(panic) = mine {
            resume_unwind(panic);
        }
        if shared.panicked.load(Ordering::Relaxed) {
            panic!("a worker thread panicked");
        }
    }
}

impl Shared {
    /// Returns when no worker runs the job any more.
    fn wait_for_workers(&self) {
        let mut waits = 0;
        while self.running.load(Ordering::Acquire) != 0 {
            waits += 1;
            if waits < SPINS_BEFORE_YIELD {
                std::hint::spin_loop();
            } else if waits < WAITS_BEFORE_SLEEP {
                std::thread::yield_now();
            } else {
                let mut slot = self.job.lock().unwrap_or_else(|e| e.into_inner());
                // Either the last worker sees this flag, or this thread sees its count: both are in one order.
                self.caller_sleeps.store(true, Ordering::SeqCst);
                while self.running.load(Ordering::SeqCst) != 0 {
                    slot = self.done.wait(slot).unwrap_or_else(|e| e.into_inner());
                }
                self.caller_sleeps.store(false, Ordering::SeqCst);
            }
        }
    }

    /// A worker has finished its part.
    fn finished(&self) {
        if self.running.fetch_sub(1, Ordering::SeqCst) == 1 && self.caller_sleeps.load(Ordering::SeqCst) {
            drop(self.job.lock().unwrap_or_else(|e| e.into_inner()));
            self.done.notify_one();
        }
    }
}

/// Hands one item to every thread: `items` of at least as many as there are threads.
struct Items<T>(*mut T);
// SAFETY: each thread takes the item of its own index alone, and the items may change threads.
unsafe impl<T: Send> Sync for Items<T> {}

impl Pool {
    /// Runs `job` on every thread with an item of its own.
    pub fn run_each<T: Send>(&mut self, items: &mut [T], job: impl Fn(&Team, &mut T) + Sync) {
        assert!(items.len() >= self.threads(), "an item for every thread");
        let items = Items(items.as_mut_ptr());
        self.run(&|team| {
            let items = &items;
            // SAFETY: there are as many items as threads, an index is one thread's alone, and the
            // borrow of `items` outlives the run.
            job(team, unsafe { &mut *items.0.add(team.index) });
        });
    }
}

fn run_guarded(shared: &Shared, index: usize, job: &(dyn Fn(&Team) + Sync)) -> std::thread::Result<()> {
    let team = Team { index, threads: shared.threads, shared: Some(shared) };
    let result = catch_unwind(AssertUnwindSafe(|| job(&team)));
    if result.is_err() {
        shared.panicked.store(true, Ordering::Relaxed);
    }
    result
}

fn work(shared: &Shared, index: usize) {
    let mut seen = 0;
    loop {
        let mut spins = 0;
        while shared.epoch.load(Ordering::Acquire) == seen && spins < SPINS_BEFORE_SLEEP {
            spins += 1;
            std::hint::spin_loop();
        }
        let job = {
            let mut slot = shared.job.lock().unwrap_or_else(|e| e.into_inner());
            while shared.epoch.load(Ordering::Acquire) == seen && !shared.stop.load(Ordering::Acquire) {
                slot = shared.wake.wait(slot).unwrap_or_else(|e| e.into_inner());
            }
            *slot
        };
        if shared.stop.load(Ordering::Acquire) {
            return;
        }
        seen = shared.epoch.load(Ordering::Acquire);
        if let Some(Job(job)) = job {
            // SAFETY: Pool::run waits for `running` to reach 0 before the job's borrow ends.
            if let Err(panic) = run_guarded(shared, index, unsafe { &*job }) {
                // Its drop could panic again, and then nobody would count this thread down.
                std::mem::forget(panic);
            }
        }
        shared.finished();
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        if let Some(shared) = &self.shared {
            {
                let _slot = shared.job.lock().unwrap_or_else(|e| e.into_inner());
                shared.stop.store(true, Ordering::Release);
            }
            shared.wake.notify_all();
        }
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_thread_runs_once_a_job_and_barriers_order_them() {
        for threads in 1..=4 {
            let mut pool = Pool::new(threads).unwrap();
            for _ in 0..200 {
                let first = AtomicUsize::new(0);
                let second = AtomicUsize::new(0);
                pool.run(&|team| {
                    first.fetch_add(1, Ordering::Relaxed);
                    team.barrier();
                    assert_eq!(first.load(Ordering::Relaxed), team.threads);
                    second.fetch_add(team.share(100).len(), Ordering::Relaxed);
                });
                assert_eq!(second.into_inner(), 100);
            }
        }
    }

    #[test]
    fn shares_are_whole_where_units_times_threads_do_not_fit_32_bits() {
        let (units, threads) = (u32::MAX as usize, 64);
        let mut next = 0;
        for index in 0..threads {
            let share = Team { index, threads, shared: None }.share(units);
            assert_eq!((share.start, share.len().abs_diff(units / threads) <= 1), (next, true));
            next = share.end;
        }
        assert_eq!(next, units);
    }

    #[test]
    fn a_panic_in_any_thread_reaches_the_caller_and_the_pool_survives() {
        let mut pool = Pool::new(3).unwrap();
        for bad in 0..3 {
            let caught = catch_unwind(AssertUnwindSafe(|| {
                pool.run(&|team| {
                    if team.index == bad {
                        panic!("on purpose");
                    }
                    team.barrier();
                });
            }));
            assert!(caught.is_err());
        }
        pool.run(&|team| team.barrier());
    }
}
