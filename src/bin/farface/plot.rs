//! `farface plot`.

use crate::Outcome;
use anyhow::{bail, Context, Result};
use farface::eval::plot::page::{linear_ticks, page_svg, Line, Look, Page, Panel};
use farface::files;
use serde::Deserialize;
use std::io::Write;
use std::path::{Path, PathBuf};

/// Draw how trainings went
///
/// One page from the logs of `farface train`: losses, mean IoU of the positives, gradient norm and learning rate over
/// the samples seen, and the AP on the dev pictures with the best model's values. A line is a running (geometric)
/// mean, the pale line behind it what the log has. Runs that are still going may be drawn, too.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  farface plot runs/farface-nano
      draws runs/farface-nano/plot.svg
  farface plot runs/a runs/b --out a-b.svg
      draws both over each other")]
pub struct Args {
    /// Folders of runs, which have a log.jsonl, or logs themselves
    #[arg(value_name = "RUN", required = true)]
    runs: Vec<PathBuf>,
    /// The drawing [default: plot.svg in the run's folder; of several runs, in the current folder]. SVG only: a PNG's
    /// text would need a font file, and this program brings none. Browsers open and convert SVG.
    #[arg(long, value_name = "FILE.svg")]
    out: Option<PathBuf>,
}

/// What of a line of the log is drawn.
#[derive(Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
enum Entry {
    Start {
        steps: u64,
        pictures: f64,
    },
    Step {
        step: u64,
        epoch: f64,
        loss: f64,
        class: f64,
        #[serde(rename = "box")]
        boxes: f64,
        iou: f64,
        gradient_norm: f64,
        lr: f64,
    },
    Dev {
        epoch: f64,
        easy: Option<f64>,
        medium: Option<f64>,
        hard: Option<f64>,
        all: f64,
        mean: f64,
    },
    #[serde(other)]
    Other,
}

/// Quantities of a step, in the order of [`Run::steps`].
const TOTAL: usize = 0;
const CLASS: usize = 1;
const BOXES: usize = 2;
const IOU: usize = 3;
const NORM: usize = 4;
const LR: usize = 5;

/// A log.
#[derive(Default)]
struct Run {
    name: String,
    pictures: f64,
    total_steps: u64,
    last_step: u64,
    /// Epochs and quantities.
    steps: Vec<(f64, [f64; 6])>,
    /// Epochs and AP Easy, Medium, Hard and All.
    dev: Vec<(f64, [Option<f64>; 4])>,
    /// Highest mean AP and its place in `dev`.
    best: Option<(f64, usize)>,
}

impl Run {
    fn read(given: &Path) -> Result<Self> {
        let path = if given.is_file() { given.to_path_buf() } else { given.join("log.jsonl") };
        let text = std::fs::read_to_string(&path)
            .map_err(|e| farface::Error::io(&path, e))
            .context("no log of a training")?;
        let mut run = Self::default();
        let lines: Vec<&str> = text.lines().collect();
        for (i, line) in lines.iter().enumerate().filter(|(_, l)| !l.trim().is_empty()) {
            match serde_json::from_str(line) {
                Ok(entry) => run.add(entry),
                // The last line may be cut: a training is writing it, or was killed while it did.
                Err(_) if i + 1 == lines.len() => {}
                Err(e) => bail!("{}, line {}: not of a training's log: {e}", path.display(), i + 1),
            }
        }
        if run.steps.is_empty() && run.dev.is_empty() {
            bail!(
                "{}: nothing to draw yet; a training logs its first step after run.log-every of them",
                path.display()
            );
        }
        run.pictures = if run.pictures > 0.0 { run.pictures } else { 1.0 };
        Ok(run)
    }

    fn add(&mut self, entry: Entry) {
        match entry {
            Entry::Start { steps, pictures } => (self.total_steps, self.pictures) = (steps, pictures),
            Entry::Step { step, epoch, loss, class, boxes, iou, gradient_norm, lr } => {
                self.last_step = step;
                self.steps.push((epoch, [loss, class, boxes, iou, gradient_norm, lr]));
            }
            Entry::Dev { epoch, easy, medium, hard, all, mean } => {
                if self.best.is_none_or(|(best, _)| mean > best) {
                    self.best = Some((mean, self.dev.len()));
                }
                self.dev.push((epoch, [easy, medium, hard, Some(all)]));
            }
            Entry::Other => {}
        }
    }

    /// Samples seen and a quantity.
    fn quantity(&self, which: usize) -> Vec<(f64, f64)> {
        self.steps.iter().map(|(epoch, q)| (epoch * self.pictures, q[which])).collect()
    }

    /// Samples seen at the end of the log.
    fn end(&self) -> f64 {
        let epoch = |e: Option<f64>| e.unwrap_or(0.0);
        let last = epoch(self.steps.last().map(|s| s.0)).max(epoch(self.dev.last().map(|d| d.0)));
        last * self.pictures
    }
}

/// Geometric mean of each point and its neighbours, a thirtieth of all at most: one outlier does not lift it much. Where
/// values are not above 0, or are few, the points as they are.
fn running_mean(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let n = points.len();
    if n < 60 || points.iter().any(|p| p.1 <= 0.0) {
        return points.to_vec();
    }
    let mean = |i: usize| {
        // As many on the right as on the left, as the start is steep; at the end what there is.
        let left = (n / 60).min(i);
        let part = &points[i - left..=(i + left).min(n - 1)];
        (part.iter().map(|p| p.1.ln()).sum::<f64>() / part.len() as f64).exp()
    };
    (0..n).map(|i| (points[i].0, mean(i))).collect()
}

/// Names of runs: their folders', in full where two are the same.
fn names(paths: &[PathBuf]) -> Vec<String> {
    let short = |path: &PathBuf| {
        let whole = path.canonicalize().unwrap_or_else(|_| path.clone());
        let folder = if whole.is_file() { whole.parent().unwrap_or(&whole).to_path_buf() } else { whole };
        folder.file_name().unwrap_or(folder.as_os_str()).to_string_lossy().into_owned()
    };
    let all: Vec<String> = paths.iter().map(short).collect();
    let twice = |name: &String| all.iter().filter(|n| *n == name).count() > 1;
    let name = |(name, path): (&String, &PathBuf)| {
        if twice(name) {
            path.display().to_string()
        } else {
            name.clone()
        }
    };
    all.iter().zip(paths).map(name).collect()
}

/// Thousands apart.
fn grouped(n: f64) -> String {
    let digits = format!("{n:.0}");
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A number of samples, short.
fn samples(n: f64) -> String {
    match n {
        n if n >= 1e6 => format!("{}M", (n / 1e4).round() / 100.0),
        n if n >= 1e3 => format!("{}k", (n / 10.0).round() / 100.0),
        n => format!("{n}"),
    }
}

const SUBSETS: [&str; 4] = ["Easy", "Medium", "Hard", "All"];

/// Lines of quantities of all runs: of one run in a colour each, of several in a colour a run.
fn lines(runs: &[Run], quantities: &[(usize, &str)]) -> Vec<Line> {
    let mut lines = Vec::new();
    for (r, run) in runs.iter().enumerate() {
        for (i, &(which, name)) in quantities.iter().enumerate() {
            let [colour, dash] = if runs.len() == 1 { [i, 0] } else { [r, i] };
            let raw = run.quantity(which);
            // The learning rate has no noise.
            let mean = if which == LR { raw.clone() } else { running_mean(&raw) };
            if runs.len() == 1 && mean != raw {
                lines.push(Line { colour, look: Look::Faint, points: raw, ..Line::default() });
            }
            let label = match (runs.len(), quantities.len()) {
                (1, 1) => None,
                (1, _) => Some(name.to_string()),
                (_, 1) => Some(run.name.clone()),
                // One name a run, and what the dashes mean once.
                _ if r == 0 => Some(format!("{} {name}", run.name)),
                _ => (i == 0).then(|| format!("{} {name}", run.name)),
            };
            lines.push(Line { label, colour, dash, look: Look::Line, points: mean });
        }
    }
    lines
}

fn dev_lines(runs: &[Run]) -> Vec<Line> {
    let mut lines = Vec::new();
    for (r, run) in runs.iter().enumerate() {
        let Some((_, at)) = run.best else { continue };
        let (epoch, best) = run.dev[at];
        let mut named = false;
        for (i, subset) in SUBSETS.iter().enumerate() {
            let point = |(epoch, ap): &(f64, [Option<f64>; 4])| ap[i].map(|ap| (epoch * run.pictures, ap));
            let points: Vec<(f64, f64)> = run.dev.iter().filter_map(point).collect();
            if points.is_empty() {
                continue;
            }
            let value = best[i].map_or(String::new(), |v| format!("  {v:.4}"));
            let label = if runs.len() == 1 {
                Some(format!("{subset}{value}"))
            } else {
                let values = SUBSETS.iter().zip(best).filter_map(|(s, v)| Some(format!("  {s} {:.3}", v?)));
                (!named).then(|| format!("{}{}", run.name, values.collect::<String>()))
            };
            named = true;
            let [colour, dash] = if runs.len() == 1 { [i, 0] } else { [r, i] };
            let look = Look::Dotted(Some(epoch * run.pictures));
            lines.push(Line { label, colour, dash, look, points });
        }
    }
    lines
}

fn page(runs: &[Run]) -> Page {
    let end = runs.iter().map(Run::end).fold(0.0, f64::max);
    let pictures = runs[0].pictures;
    let same = runs.iter().all(|r| r.pictures == pictures);
    let tick = |n: f64| {
        let epoch = (n / pictures * 10.0).round() / 10.0;
        (n, if same { format!("{} ({epoch})", samples(n)) } else { samples(n) })
    };
    let title = match runs {
        [run] => format!(
            "{}: step {} of {}",
            run.name,
            grouped(run.last_step as f64),
            grouped(run.total_steps as f64)
        ),
        _ => runs.iter().map(|r| r.name.as_str()).collect::<Vec<_>>().join(", "),
    };
    let best = match runs {
        [Run { best: Some((mean, at)), dev, .. }] => {
            format!("AP on the dev pictures; best at epoch {:.1}: mean {mean:.4}", dev[*at].0)
        }
        _ if runs.iter().all(|r| r.best.is_none()) => "AP on the dev pictures: not evaluated yet".into(),
        _ => "AP on the dev pictures; values of the best".into(),
    };
    let panel = |title: &str, height: f64, quantities: &[(usize, &str)]| Panel {
        title: title.into(),
        height,
        log: true,
        legend_below: false,
        lines: lines(runs, quantities),
    };
    let iou = panel("Mean IoU of the positives", 0.28, &[(IOU, "IoU")]);
    let dev = Panel { title: best, height: 0.5, log: false, legend_below: true, lines: dev_lines(runs) };
    Page {
        title,
        x: if same {
            format!("samples seen (epochs of {})", grouped(pictures))
        } else {
            "samples seen".into()
        },
        range: 0.0..end,
        ticks: linear_ticks(&(0.0..end), 6).into_iter().map(tick).collect(),
        columns: vec![
            vec![
                panel("Losses", 0.64, &[(TOTAL, "total"), (CLASS, "class"), (BOXES, "box")]),
                panel("Learning rate", 0.36, &[(LR, "learning rate")]),
            ],
            vec![
                dev,
                Panel { log: false, legend_below: true, ..iou },
                panel("Gradient norm before clipping", 0.28, &[(NORM, "norm")]),
            ],
        ],
    }
}

pub fn run(args: &Args, out: &mut dyn Write) -> Result<Outcome> {
    let path = match (&args.out, &args.runs[..]) {
        (Some(path), _) => path.clone(),
        (None, [run]) if run.is_dir() => run.join("plot.svg"),
        (None, _) => PathBuf::from("plot.svg"),
    };
    if !path.extension().is_some_and(|e| e.eq_ignore_ascii_case("svg")) {
        bail!(
            "{}: the drawing is SVG; take a name that ends with .svg (a browser turns it into a PNG)",
            path.display()
        );
    }
    let mut runs = args.runs.iter().map(|run| Run::read(run)).collect::<Result<Vec<_>>>()?;
    for (run, name) in runs.iter_mut().zip(names(&args.runs)) {
        run.name = name;
    }
    files::write_whole(&path, page_svg(&page(&runs))?.as_bytes())?;
    writeln!(out, "{}", path.display())?;
    Ok(Outcome::Complete)
}
