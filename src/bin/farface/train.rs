//! `farface train`.

mod log;
mod several;

use crate::Outcome;
use anyhow::{bail, Context, Result};
use farface::files;
use farface::train::dev::Dev;
use farface::train::ranks::Ranks;
use farface::train::trainer::{Resources, StepReport, Trainer};
use indicatif::{ProgressBar, ProgressStyle};
use log::{Line, Log, Means};
use std::fs::{File, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Train a detector by a recipe
///
/// The run's folder gets: recipe.toml (a copy), log.jsonl (a line of JSON every so many steps and for every evaluation;
/// `farface plot` draws it), last.checkpoint (a run that was stopped, in whatever way, goes on from it), best.safetensors
/// (the model with the best mean AP on the recipe's dev pictures) and, at the end, final.safetensors. On the same machine a
/// run that was stopped ends with the same bits as one that was not, on any number of threads.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  farface train recipes/farface-nano.toml
      trains, or goes on where it was stopped; results in runs/farface-nano
  farface train my.toml --device cuda
      on the first CUDA device; a run goes on there or on the CPU as wanted
  torchrun --no-python --nproc-per-node 4 farface train my.toml --device cuda
      on four CUDA devices, a process each (mpirun -n 4, or srun, do as well); the recipe's batch is that of all together
  farface train my.toml --out runs/try2 --minutes 60
      stops after an hour with a checkpoint; the same command goes on
  farface plot runs/farface-nano
      draws losses, learning rate and dev AP")]
pub struct Args {
    /// The recipe, TOML; paths in it start at its folder
    #[arg(value_name = "RECIPE.toml")]
    recipe: PathBuf,
    /// Folder of the run [default: runs/<name of the recipe>]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Where the network is: cpu, cuda or cuda:N, the CUDA device of that number; of several processes, cuda gives each its own
    #[arg(long, value_name = "DEVICE", default_value = "cpu", value_parser = device)]
    device: Place,
    /// Threads of the network [default: all cores, shared by the processes that train together]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Threads that decode and augment pictures
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=1024))]
    workers: u16,
    /// Stop after so many minutes, with a checkpoint
    #[arg(long, value_name = "MINUTES")]
    minutes: Option<f64>,
    /// Start anew where the folder holds a run; its log and checkpoints are overwritten
    #[arg(long)]
    restart: bool,
}

/// Where the network is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Cpu,
    /// The first, or that of this process among several.
    Cuda,
    /// That of this number.
    CudaNumber(u32),
}

fn device(text: &str) -> Result<Place, String> {
    match text.split_once(':') {
        None if text == "cpu" => Ok(Place::Cpu),
        None if text == "cuda" => Ok(Place::Cuda),
        Some(("cuda", number)) => number.parse().map(Place::CudaNumber).map_err(|e| format!("cuda:N: {e}")),
        _ => Err("takes cpu, cuda or cuda:N".into()),
    }
}

// Files of a run's folder.
const RECIPE: &str = "recipe.toml";
const LOG: &str = "log.jsonl";
const CHECKPOINT: &str = "last.checkpoint";
const BEST: &str = "best.safetensors";
const FINAL: &str = "final.safetensors";

pub fn run(args: &Args, out: &mut dyn Write) -> Result<Outcome> {
    let ranks = several::meet(args)?;
    if let Some(ranks) = ranks.as_ref().filter(|r| r.rank() != 0) {
        return several::follow(args, ranks).with_context(|| format!("rank {}", ranks.rank()));
    }
    let mut run = Run::open(args, ranks)?;
    run.announce(out)?;
    // None where it lies beyond what a clock can count.
    let deadline = args
        .minutes
        .and_then(|m| Instant::now().checked_add(Duration::try_from_secs_f64(m.max(0.0) * 60.0).ok()?));
    if run.work(deadline, out)? {
        run.finish(out)?;
    } else {
        say(out, &format!("stopped at step {}; the same command goes on", run.trainer.step_count()));
    }
    run.trainer.part()?;
    Ok(Outcome::Complete)
}

/// A training and its folder.
struct Run {
    dir: PathBuf,
    resources: Resources,
    trainer: Trainer,
    /// Pictures to evaluate on, where the recipe names some.
    dev: Option<Dev>,
    log: Log,
    /// Step of the last checkpoint.
    saved: u64,
    /// Held for as long as the others live.
    _lock: Option<File>,
}

impl Run {
    /// Goes on with the run in its folder, or begins one.
    fn open(args: &Args, ranks: Option<Arc<Ranks>>) -> Result<Self> {
        let text = recipe(args)?;
        let stem = args.recipe.file_stem().unwrap_or_default();
        let dir = args.out.clone().unwrap_or_else(|| Path::new("runs").join(stem));
        let base = base(args);
        let resources = several::resources(args, ranks.as_deref())?;
        let begin = |checkpoint: Option<&Path>| match (&ranks, checkpoint) {
            (Some(ranks), path) => Trainer::of_rank(&text, base, resources.clone(), ranks.clone(), path),
            (None, Some(path)) => Trainer::from_checkpoint(&text, base, resources.clone(), path),
            (None, None) => Trainer::new(&text, base, resources.clone()),
        };
        files::make_dir(&dir)?;
        let lock = lock(&dir)?;
        sweep(&dir)?;
        let checkpoint = dir.join(CHECKPOINT);
        let in_recipe = || format!("recipe {}", args.recipe.display());
        let going_on = checkpoint.exists() && !args.restart;
        let mut trainer = if going_on {
            begin(Some(&checkpoint))
                .with_context(in_recipe)
                .context("--restart starts anew, --out takes another folder")?
        } else {
            if let Some(old) = [BEST, FINAL].iter().find(|name| !args.restart && dir.join(name).exists()) {
                bail!(
                    "{} holds {old} but no checkpoint to go on from; --restart removes it, --out takes another folder",
                    dir.display()
                );
            }
            begin(None).with_context(in_recipe)?
        };
        let dev = trainer.dev().context("dev pictures")?;
        // Nothing is removed before all that the recipe names was read.
        if !going_on {
            clear(&dir)?;
            files::write_whole(&dir.join(RECIPE), text.as_bytes())?;
            // From here on there is something to go on from.
            trainer.save(&checkpoint)?;
        }
        let saved = trainer.step_count();
        let log = Log::open(&dir.join(LOG), saved)?;
        Ok(Self { dir, resources, trainer, dev, log, saved, _lock: lock })
    }

    /// Says what is trained on what, and logs it.
    fn announce(&mut self, out: &mut dyn Write) -> Result<()> {
        let trainer = &self.trainer;
        let Resources { threads, workers, .. } = self.resources;
        let (parameters, macs, precision) = trainer.describe()?;
        let (pictures, faces) = (trainer.dataset().samples.len(), trainer.dataset().faces());
        let (step, steps) = (trainer.step_count(), trainer.total_steps());
        say(
            out,
            &format!(
                "{}: {parameters} parameters, {:.3} GMAC at 640x480, {precision} on {}, {threads} threads and {workers} workers",
                trainer.recipe().model.detector,
                macs as f64 / 1e9,
                trainer.machine(),
            ),
        );
        say(out, &format!("{pictures} pictures, {faces} faces"));
        if !trainer.dataset().warnings.is_empty() {
            say(out, &trainer.dataset().warnings.to_string());
        }
        trainer.notes().iter().for_each(|note| say(out, note));
        say(out, &format!("steps {step} to {steps}, in {}", self.dir.display()));
        self.log.write(&Line::Start {
            version: env!("CARGO_PKG_VERSION"),
            step,
            steps,
            pictures,
            faces,
            parameters,
            macs_640x480: macs,
            precision,
            threads,
            workers,
        })
    }

    /// Steps until the end (true) or the deadline; a checkpoint of the last is there in either case.
    fn work(&mut self, deadline: Option<Instant>, out: &mut dyn Write) -> Result<bool> {
        let run = self.trainer.recipe().run.clone();
        let total = self.trainer.total_steps();
        let bar = steps_bar(self.trainer.step_count(), total);
        let mut warned = self.trainer.dataset().warnings.total();
        let mut means = Means::new();
        let late = || deadline.is_some_and(|d| Instant::now() >= d);
        while self.trainer.agree(self.trainer.step_count() < total && !late())? {
            let report = self.trainer.step()?;
            means.add(&report);
            let (step, last) = (report.step, report.step == total);
            bar.set_position(step);
            if last || step.is_multiple_of(run.log_every) {
                self.log_step(&report, &mut means, &bar)?;
            }
            if last || self.period_ends(step) {
                let started = Instant::now();
                self.evaluate_and_log(&report, &bar, out)?;
                means.leave_out(started.elapsed());
            }
            // Pictures are decoded when their turn comes.
            let warnings = &self.trainer.dataset().warnings;
            if warnings.total() > warned {
                warned = warnings.total();
                bar.suspend(|| say(out, &warnings.to_string()));
            }
            if step.is_multiple_of(run.checkpoint_every) {
                self.save()?;
            }
        }
        bar.finish_and_clear();
        self.save()?;
        Ok(self.trainer.step_count() >= total)
    }

    /// Writes a checkpoint, unless there is one of this step.
    fn save(&mut self) -> Result<()> {
        if self.saved != self.trainer.step_count() {
            self.trainer.save(&self.dir.join(CHECKPOINT))?;
            self.saved = self.trainer.step_count();
        }
        Ok(())
    }

    /// Logs and shows the means of the steps up to this one.
    fn log_step(&mut self, report: &StepReport, means: &mut Means, bar: &ProgressBar) -> Result<()> {
        let StepReport { step, epoch, side, lr, .. } = *report;
        let images_per_second = means.speed() * self.trainer.recipe().batch.size as f64;
        let [loss, class, boxes, iou, faces, matched, mined, gradient_norm] = means.take();
        bar.set_message(format!(
            "epoch {epoch:.1}  loss {loss:.3} = class {class:.3}, box {boxes:.3} (IoU {iou:.2})  lr {lr:.2e}  {images_per_second:.0} images/s"
        ));
        self.log.write(&Line::Step {
            step,
            epoch,
            side,
            loss,
            class,
            boxes,
            iou,
            faces,
            matched,
            mined,
            gradient_norm,
            lr,
            images_per_second,
        })
    }

    /// Whether an evaluation is due after `step`: every so many epochs, where the count of whole periods grows.
    fn period_ends(&self, step: u64) -> bool {
        let Some(dev) = &self.trainer.recipe().data.dev else { return false };
        let period = dev.every_epochs * self.trainer.steps_per_epoch();
        (step as f64 / period).floor() > ((step - 1) as f64 / period).floor()
    }

    /// Scores the model as it is on the dev pictures, if there are any, and keeps the best.
    fn evaluate_and_log(
        &mut self,
        report: &StepReport,
        bar: &ProgressBar,
        out: &mut dyn Write,
    ) -> Result<()> {
        let Some(dev) = &self.dev else { return Ok(()) };
        let StepReport { step, epoch, .. } = *report;
        let started = Instant::now();
        let mut progress = |done: usize, all: usize| bar.set_message(format!("dev picture {done} of {all}"));
        let score = self.trainer.evaluate(dev, &self.dir.join(BEST), &mut progress)?;
        let best = self.trainer.best().is_some_and(|(_, at)| at == step);
        let seconds = started.elapsed().as_secs_f64();
        self.log.write(&Line::Dev { step, epoch, score, mean: score.mean(), best, seconds })?;
        let ap = |name: &str, v: Option<f64>| v.map(|v| format!("{name} {v:.4}  ")).unwrap_or_default();
        let text = format!(
            "epoch {epoch:.1}, step {step}: dev AP {}{}{}All {:.4}{}",
            ap("Easy", score.easy),
            ap("Medium", score.medium),
            ap("Hard", score.hard),
            score.all,
            if best { "  (best)" } else { "" }
        );
        bar.suspend(|| say(out, &text));
        Ok(())
    }

    /// Writes the model of a training that is complete.
    fn finish(&mut self, out: &mut dyn Write) -> Result<()> {
        let model = self.dir.join(FINAL);
        self.trainer.model()?.save(&model)?;
        let best = self.trainer.best();
        self.log.write(&Line::End {
            step: self.trainer.step_count(),
            best_mean: best.map(|b| b.0),
            best_step: best.map(|b| b.1),
        })?;
        say(out, &format!("done: {}", model.display()));
        if let Some((mean, step)) = best {
            let path = self.dir.join(BEST);
            say(out, &format!("best on dev: mean AP {mean:.4} at step {step}: {}", path.display()));
        }
        Ok(())
    }
}

/// The recipe's text.
fn recipe(args: &Args) -> Result<String> {
    Ok(std::fs::read_to_string(&args.recipe).map_err(|e| farface::Error::io(&args.recipe, e))?)
}

/// Where the recipe's paths start.
fn base(args: &Args) -> &Path {
    args.recipe.parent().unwrap_or(Path::new("."))
}

/// A line for whoever reads along. A closed pipe must not end hours of training.
fn say(out: &mut dyn Write, text: &str) {
    let _ = writeln!(out, "{text}").and_then(|()| out.flush());
}

/// Keeps a second training out of the folder for as long as the result lives. None where the system has no such locks.
fn lock(dir: &Path) -> Result<Option<File>> {
    let Ok(folder) = File::open(dir) else { return Ok(None) };
    match folder.try_lock() {
        Ok(()) => Ok(Some(folder)),
        Err(TryLockError::WouldBlock) => bail!("{}: another training is at work here", dir.display()),
        Err(TryLockError::Error(_)) => Ok(None),
    }
}

/// Removes the temporary files that a run left behind which was killed in the middle of a write.
fn sweep(dir: &Path) -> Result<()> {
    let ours = [RECIPE, LOG, CHECKPOINT, BEST, FINAL].map(|name| format!(".{name}."));
    let read = || -> std::io::Result<()> {
        for entry in std::fs::read_dir(dir)? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if name.ends_with(".part") && ours.iter().any(|o| name.starts_with(o)) {
                std::fs::remove_file(&path)?;
            }
        }
        Ok(())
    };
    Ok(read().map_err(|e| farface::Error::io(dir, e))?)
}

/// Removes what an earlier run left that is not gone on with, the checkpoint first.
fn clear(dir: &Path) -> Result<()> {
    for old in [CHECKPOINT, LOG, BEST, FINAL].map(|name| dir.join(name)) {
        match std::fs::remove_file(&old) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(farface::Error::io(&old, e).into())
            }
            _ => {}
        }
    }
    Ok(())
}

/// A bar over the steps, at `step`.
fn steps_bar(step: u64, total: u64) -> ProgressBar {
    let bar = ProgressBar::new(total).with_style(
        ProgressStyle::with_template("[{bar:30}] {pos}/{len}  {msg}  ETA {eta}")
            .expect("the template is correct")
            .progress_chars("=> "),
    );
    bar.set_position(step);
    bar.reset_eta();
    bar
}
