//! Trainings on a device whose driver fails at each call in turn: errors that name the call, no crash, nothing kept; of two ranks the
//! other ends with an error, too, and waits for nobody.
//!
//! There are thousands of calls: one of many fails, always the same ones. `FARFACE_TEST_STRIDE=1 cargo test --release --test cuda
//! training_failures::` lets each fail.

use crate::drawing;
use crate::emulator::{driver, Driver, Emulator};
use crate::failures::{alone, fail_at_some, stride};
use crate::ranks::{emulator, recipe, resources, two};
use farface::error::Result;
use farface::train::ranks::Ranks;
use farface::train::trainer::Trainer;
use std::path::Path;
use std::sync::mpsc::{channel, RecvTimeoutError, Sender};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a run may take that takes a fraction of a second.
const PATIENCE: Duration = Duration::from_secs(60);

/// Most calls that give back what the first step outgrows, and fail unnoticed.
const OUTGROWN: usize = 18;

/// The smallest network, four pictures a batch.
fn smallest() -> String {
    recipe("")
        .replace("width = 4\nchannels = 12", "width = 1\nchannels = 4")
        .replace(
            "sides = [{ side = 64, share = 0.5 }, { side = 96, share = 0.5 }]",
            "sides = [{ side = 64, share = 1.0 }]",
        )
        .replace("length = 6", "length = 4")
}

#[test]
fn a_training_whose_driver_fails_at_any_call_is_an_error() {
    let Some(Driver::Emulated(emulator)) = driver() else { return };
    if !alone("training_failures::a_training_whose_driver_fails_at_any_call_is_an_error") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    drawing::draw(dir.path(), 4, 40, 1);
    fail_at_some(emulator, "a training", stride(41), OUTGROWN, || {
        let mut trainer = Trainer::new(&smallest(), dir.path(), resources())?;
        trainer.step()?;
        trainer.step()?;
        trainer.save(&dir.path().join("last.checkpoint"))?;
        Ok(trainer)
    });
    assert!(emulator.launches(c"anchor_losses") > 0, "judged on the device");
}

/// What became of a rank.
struct Outcome {
    /// Whether all of its steps were done, and nothing was left but to part.
    trained: bool,
    result: Result<()>,
    /// Calls of the driver until then, and in all.
    calls: [i64; 2],
}

fn train(ranks: Arc<Ranks>, dir: &Path, calls: impl FnOnce()) -> Result<()> {
    let mut trainer = Trainer::of_rank(&smallest(), dir, resources(), ranks, None)?;
    trainer.step()?;
    trainer.step()?;
    calls();
    trainer.part()
}

/// Ends the process where `run` takes too long: a rank that waits for ever would keep the test from failing.
fn in_time<R>(what: &str, run: impl FnOnce() -> R) -> R {
    let (done, waits): (Sender<()>, _) = channel();
    let what = what.to_string();
    std::thread::spawn(move || {
        if waits.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
            println!("{what}: somebody waits for ever");
            std::process::exit(1);
        }
    });
    let result = run();
    drop(done);
    result
}

/// Two ranks, of which `failing`'s call `n` fails; none where that is 0.
fn ranks(emulator: &Emulator, dir: &Path, failing: usize, n: i64) -> [Outcome; 2] {
    in_time(&format!("rank {failing}, call {n}"), || {
        two(|ranks| {
            emulator.fail_here(if ranks.rank() == failing { n } else { 0 });
            let mut before = None;
            let result = train(ranks, dir, || before = Some(emulator.calls_here()));
            let all = emulator.calls_here();
            emulator.fail_here(0);
            Outcome { trained: before.is_some(), result, calls: [before.unwrap_or(all), all] }
        })
    })
}

#[test]
fn of_two_ranks_a_call_that_fails_is_an_error_of_one_and_ends_the_other() {
    let Some(emulator) = emulator() else { return };
    if !alone("training_failures::of_two_ranks_a_call_that_fails_is_an_error_of_one_and_ends_the_other") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    drawing::draw(dir.path(), 4, 40, 1);
    // What kernels compute does not matter here. Once before, for what is made once a process.
    emulator.idle(true);
    ranks(emulator, dir.path(), 0, 0);
    let held = emulator.live();
    let calls = ranks(emulator, dir.path(), 0, 0).map(|o| {
        o.result.unwrap();
        o.calls
    });
    assert!(emulator.launches(c"anchor_losses") > 0, "judged on the device");
    let stride = stride(211);
    let mut failed = 0;
    for (failing, [trained, all]) in calls.into_iter().enumerate() {
        assert!(trained > 500, "{calls:?} calls");
        let mut unnoticed = 0;
        // The ranks' calls fail in between each other's.
        for n in (1 + failing as i64 * stride as i64 / 2..=all).step_by(stride) {
            let what = format!("rank {failing}, call {n} of {calls:?}");
            let outcomes = ranks(emulator, dir.path(), failing, n);
            let [own, other] = if failing == 0 {
                outcomes
            } else {
                let [a, b] = outcomes;
                [b, a]
            };
            match (own.result, other.result) {
                (Err(own_error), other_result) => {
                    let error = own_error.to_string();
                    assert!(error.contains("cu") && error.contains("CUDA_ERROR"), "{what}: {error}");
                    match other_result {
                        Err(e) => {
                            let text = e.to_string();
                            // Who comes to join may find nobody left.
                            let named = text.contains(&format!("rank {failing}"))
                                && text.contains("ended before")
                                || text.contains("ncclCommInitRank failed");
                            assert!(named, "{what}: the other: {text}");
                        }
                        // Who leaves last fails alone.
                        Ok(()) => assert!(own.trained, "{what}: the other goes on after {error}"),
                    }
                    failed += 1;
                }
                // What is given back in the end fails unnoticed; how often a wait looks is chance, so that a late call may not come.
                (Ok(()), other) => {
                    other.unwrap_or_else(|e| panic!("{what}: the other: {e}"));
                    unnoticed += usize::from(n <= own.calls[0]);
                    assert!(unnoticed <= OUTGROWN, "{what}: fails unnoticed");
                }
            }
            // A thread that waits in vain to join holds the context until it gives up.
            let began = Instant::now();
            while emulator.live() != held {
                assert!(began.elapsed() < PATIENCE, "{what}: something is kept");
                std::thread::sleep(Duration::from_millis(2));
            }
        }
    }
    println!("{calls:?} calls of two ranks, {failed} failed");
}
