//! `farface train`.

use crate::Outcome;
use anyhow::{bail, Context, Result};
use farface::files;
use farface::train::dev::{Dev, DevScore};
use farface::train::trainer::{Resources, StepReport, Trainer};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Train a detector by a recipe
///
/// The run's folder gets: recipe.toml (a copy), log.jsonl (a line of JSON every so many steps and for every evaluation;
/// `farface plot` draws it), last.checkpoint (a run that was stopped, in whatever way, goes on from it), best.safetensors
/// (the model with the best mean AP on the recipe's dev pictures) and, at the end, final.safetensors. On the same machine with
/// as many threads, a run that was stopped ends with the same bits as one that was not.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  farface train recipes/farface-nano.toml
      trains, or goes on where it was stopped; results in runs/farface-nano
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
    /// Threads of the network [default: all cores]
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

/// A line of the log.
#[derive(Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
enum Line<'a> {
    Start {
        version: &'a str,
        step: u64,
        steps: u64,
        pictures: usize,
        faces: usize,
        parameters: usize,
        macs_640x480: u64,
        precision: &'a str,
        threads: usize,
        workers: usize,
    },
    Step {
        step: u64,
        epoch: f64,
        side: usize,
        loss: f64,
        class: f64,
        #[serde(rename = "box")]
        boxes: f64,
        iou: f64,
        faces: f64,
        matched: f64,
        mined: f64,
        gradient_norm: f64,
        lr: f32,
        images_per_second: f64,
    },
    Dev {
        step: u64,
        epoch: f64,
        #[serde(flatten)]
        score: DevScore,
        mean: f64,
        best: bool,
        seconds: f64,
    },
    End {
        step: u64,
        best_mean: Option<f64>,
        best_step: Option<u64>,
    },
}

struct Log(File);

impl Log {
    /// Goes on with a log: lines of later steps than `step` (of a run that was killed behind its last checkpoint) are dropped.
    fn open(path: &Path, step: u64) -> Result<Self> {
        if path.exists() {
            let mut kept = Vec::new();
            for line in BufReader::new(File::open(path)?).lines() {
                let line = line.with_context(|| path.display().to_string())?;
                // A last line may be cut.
                let Ok(value) = serde_json::from_str::<serde_json::Value>(&line) else { continue };
                // The end is written anew by whoever comes to it.
                if value["step"].as_u64().is_some_and(|s| s <= step) && value["kind"] != "end" {
                    kept.extend_from_slice(line.as_bytes());
                    kept.push(b'\n');
                }
            }
            files::write_whole(path, &kept)?;
        }
        let file = OpenOptions::new().create(true).append(true).open(path);
        Ok(Self(file.with_context(|| path.display().to_string())?))
    }

    fn write(&mut self, line: &Line<'_>) -> Result<()> {
        writeln!(self.0, "{}", serde_json::to_string(line)?).context("writing the log")
    }
}

/// Means over the steps between two lines of the log.
#[derive(Default)]
struct Means {
    steps: u64,
    sums: [f64; 8],
}

impl Means {
    fn add(&mut self, r: &StepReport) {
        self.steps += 1;
        let l = &r.losses;
        let values = [
            r.loss,
            l.class,
            l.boxes,
            l.iou,
            l.faces as f64,
            l.matched as f64,
            l.mined as f64,
            r.gradient_norm,
        ];
        self.sums.iter_mut().zip(values).for_each(|(s, v)| *s += v);
    }

    fn take(&mut self) -> [f64; 8] {
        let n = std::mem::take(&mut self.steps).max(1) as f64;
        std::mem::take(&mut self.sums).map(|s| s / n)
    }
}

pub fn run(args: &Args, out: &mut dyn Write) -> Result<Outcome> {
    let text = std::fs::read_to_string(&args.recipe).map_err(|e| farface::Error::io(&args.recipe, e))?;
    let stem = args.recipe.file_stem().unwrap_or_default();
    let dir = args.out.clone().unwrap_or_else(|| Path::new("runs").join(stem));
    let base = args.recipe.parent().unwrap_or(Path::new("."));
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let resources =
        Resources { threads: args.threads.map_or(cores, usize::from), workers: usize::from(args.workers) };
    files::make_dir(&dir)?;
    let _lock = lock(&dir)?;
    sweep(&dir)?;
    let checkpoint = dir.join("last.checkpoint");
    let log_path = dir.join("log.jsonl");
    let models = ["best.safetensors", "final.safetensors"];
    let in_recipe = || format!("recipe {}", args.recipe.display());
    let going_on = checkpoint.exists() && !args.restart;
    let mut trainer = if going_on {
        Trainer::from_checkpoint(&text, base, resources.clone(), &checkpoint)
            .with_context(in_recipe)
            .context("--restart starts anew, --out takes another folder")?
    } else {
        if let Some(old) = models.iter().find(|name| !args.restart && dir.join(name).exists()) {
            bail!(
                "{} holds {old} but no checkpoint to go on from; --restart removes it, --out takes another folder",
                dir.display()
            );
        }
        Trainer::new(&text, base, resources.clone()).with_context(in_recipe)?
    };
    let dev = trainer.dev().context("dev pictures")?;
    // Nothing is removed before all that the recipe names was read.
    if !going_on {
        for old in ["last.checkpoint", "log.jsonl"].into_iter().chain(models).map(|name| dir.join(name)) {
            match std::fs::remove_file(&old) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                    return Err(farface::Error::io(&old, e).into())
                }
                _ => {}
            }
        }
        files::write_whole(&dir.join("recipe.toml"), text.as_bytes())?;
        // From here on there is something to go on from.
        trainer.save(&checkpoint)?;
    }
    let mut log = Log::open(&log_path, trainer.step_count())?;
    let (parameters, macs, precision) = trainer.describe()?;
    say(
        out,
        &format!(
            "{}: {parameters} parameters, {:.3} GMAC at 640x480, {precision}, {} threads and {} workers",
            trainer.recipe().model.detector,
            macs as f64 / 1e9,
            resources.threads,
            resources.workers
        ),
    );
    say(out, &format!("{} pictures, {} faces", trainer.dataset().samples.len(), trainer.dataset().faces()));
    if !trainer.dataset().warnings.is_empty() {
        say(out, &trainer.dataset().warnings.to_string());
    }
    trainer.notes().iter().for_each(|note| say(out, note));
    let (step, total) = (trainer.step_count(), trainer.total_steps());
    say(out, &format!("steps {step} to {total}, in {}", dir.display()));
    log.write(&Line::Start {
        version: env!("CARGO_PKG_VERSION"),
        step: trainer.step_count(),
        steps: trainer.total_steps(),
        pictures: trainer.dataset().samples.len(),
        faces: trainer.dataset().faces(),
        parameters,
        macs_640x480: macs,
        precision,
        threads: resources.threads,
        workers: resources.workers,
    })?;
    // None where it lies beyond what a clock can count.
    let deadline = args
        .minutes
        .and_then(|m| Instant::now().checked_add(Duration::try_from_secs_f64(m.max(0.0) * 60.0).ok()?));
    let complete = work(&mut trainer, dev.as_ref(), &dir, &mut log, deadline, out)?;
    trainer.save(&checkpoint)?;
    if !complete {
        say(out, &format!("stopped at step {}; the same command goes on", trainer.step_count()));
        return Ok(Outcome::Complete);
    }
    let model = dir.join("final.safetensors");
    trainer.model()?.save(&model)?;
    let best = trainer.best();
    log.write(&Line::End {
        step: trainer.step_count(),
        best_mean: best.map(|b| b.0),
        best_step: best.map(|b| b.1),
    })?;
    say(out, &format!("done: {}", model.display()));
    if let Some((mean, step)) = best {
        let path = dir.join("best.safetensors");
        say(out, &format!("best on dev: mean AP {mean:.4} at step {step}: {}", path.display()));
    }
    Ok(Outcome::Complete)
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
    let read = || -> std::io::Result<()> {
        for entry in std::fs::read_dir(dir)? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let ours = [
                ".last.checkpoint.",
                ".best.safetensors.",
                ".final.safetensors.",
                ".log.jsonl.",
                ".recipe.toml.",
            ];
            if name.ends_with(".part") && ours.iter().any(|o| name.starts_with(o)) {
                std::fs::remove_file(&path)?;
            }
        }
        Ok(())
    };
    Ok(read().map_err(|e| farface::Error::io(dir, e))?)
}

/// Steps until the end (true) or the deadline.
fn work(
    trainer: &mut Trainer,
    dev: Option<&Dev>,
    dir: &Path,
    log: &mut Log,
    deadline: Option<Instant>,
    out: &mut dyn Write,
) -> Result<bool> {
    let (checkpoint, best) = (dir.join("last.checkpoint"), dir.join("best.safetensors"));
    let run = trainer.recipe().run.clone();
    let batch = trainer.recipe().batch.size as f64;
    let total = trainer.total_steps();
    let every = trainer.recipe().data.dev.as_ref().map(|d| d.every_epochs * trainer.steps_per_epoch());
    let bar = ProgressBar::new(total).with_style(
        ProgressStyle::with_template("[{bar:30}] {pos}/{len}  {msg}  ETA {eta}")
            .expect("the template is correct")
            .progress_chars("=> "),
    );
    bar.set_position(trainer.step_count());
    bar.reset_eta();
    let mut means = Means::default();
    let mut skipped = trainer.dataset().warnings.total();
    let mut since = Instant::now();
    while trainer.step_count() < total {
        if deadline.is_some_and(|d| Instant::now() >= d) {
            bar.finish_and_clear();
            return Ok(false);
        }
        let report = trainer.step()?;
        means.add(&report);
        let step = report.step;
        bar.set_position(step);
        if step.is_multiple_of(run.log_every) || step == total {
            let speed = means.steps as f64 * batch / since.elapsed().as_secs_f64();
            let [loss, class, boxes, iou, faces, matched, mined, gradient_norm] = means.take();
            since = Instant::now();
            let lr = report.lr;
            bar.set_message(format!(
                "epoch {:.1}  loss {loss:.3} = class {class:.3}, box {boxes:.3} (IoU {iou:.2})  lr {lr:.2e}  {speed:.0} images/s",
                report.epoch
            ));
            log.write(&Line::Step {
                step,
                epoch: report.epoch,
                side: report.side,
                loss,
                class,
                boxes,
                iou,
                faces,
                matched,
                mined,
                gradient_norm,
                lr,
                images_per_second: speed,
            })?;
        }
        // Every so many epochs: where the count of whole periods grows.
        let due = every.is_some_and(|e| (step as f64 / e).floor() > ((step - 1) as f64 / e).floor());
        if let Some(dev) = dev.filter(|_| due || step == total) {
            let started = Instant::now();
            let mut progress =
                |done: usize, all: usize| bar.set_message(format!("dev picture {done} of {all}"));
            let score = trainer.evaluate(dev, &best, &mut progress)?;
            let is_best = trainer.best().is_some_and(|(_, at)| at == step);
            let seconds = started.elapsed().as_secs_f64();
            let mean = score.mean();
            log.write(&Line::Dev { step, epoch: report.epoch, score, mean, best: is_best, seconds })?;
            let ap = |name: &str, v: Option<f64>| v.map(|v| format!("{name} {v:.4}  ")).unwrap_or_default();
            let text = format!(
                "epoch {:.1}, step {step}: dev AP {}{}{}All {:.4}{}",
                report.epoch,
                ap("Easy", score.easy),
                ap("Medium", score.medium),
                ap("Hard", score.hard),
                score.all,
                if is_best { "  (best)" } else { "" }
            );
            bar.suspend(|| say(out, &text));
            // The clock of the steps stands still meanwhile.
            since += started.elapsed();
        }
        // Pictures are decoded when their turn comes.
        let warnings = &trainer.dataset().warnings;
        if warnings.total() > skipped {
            skipped = warnings.total();
            bar.suspend(|| say(out, &warnings.to_string()));
        }
        if step.is_multiple_of(run.checkpoint_every) || step == total {
            trainer.save(&checkpoint)?;
        }
    }
    bar.finish_and_clear();
    Ok(true)
}
