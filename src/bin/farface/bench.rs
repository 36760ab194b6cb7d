//! `farface bench`: how long a detection takes, and where.

use crate::model::ModelArg;
use crate::picture::Picture;
use crate::settings::{PictureSize, Settings};
use crate::{peak, Outcome};
use anyhow::{anyhow, bail, Context, Result};
use farface::cpu::{Arena, Pool};
use farface::detect::{DevicePolicy, LevelCost, Model, ModelConfig, Options, Session};
use farface::graph::Plan;
use farface::pixels::{ImageView, PixelFormat};
use farface::shape::Shape;
use serde_json::{json, Value};
use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Measure the speed of a model on this machine
///
/// Times whole detections and their parts after a warm-up, and tells on which scales the picture is
/// searched, in how many tiles, and how many pixels the network computes on each. The picture is synthetic unless one is
/// given. With --layers, every step of the network is timed at scale 1, and its rate is held
/// against the multiply-adds that this processor was just measured to do.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  farface bench --size 640x480 --size 1920x1080 --threads 2
  farface bench --size 1920x1080 --min-face 40
      what it saves to leave the small faces out
  farface bench --model m.safetensors --image crowd.jpg --layers
  farface bench --detector fpn-finest-r50 --size 800x800 --layers
      a detector without weights: random ones, of which only the network's time says anything")]
pub struct Args {
    #[command(flatten)]
    model: ModelArg,
    /// Time this detector with random weights instead of a model
    #[arg(long, value_name = "NAME", conflicts_with = "model", long_help = format!("Time this detector with random weights instead of a model: {}", ModelConfig::NAMES))]
    detector: Option<String>,
    /// Size of the synthetic picture; may be given several times [default: 640x480]
    #[arg(long, value_name = "WxH")]
    size: Vec<PictureSize>,
    /// The synthetic picture comes as NV12, as cameras give it, rather than RGB
    #[arg(long, conflicts_with = "image")]
    nv12: bool,
    /// Picture to detect on instead
    #[arg(long, value_name = "FILE", conflicts_with = "size")]
    image: Option<PathBuf>,
    /// Detections timed
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    runs: u32,
    /// Time every step of the network too
    #[arg(long)]
    layers: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    settings: Settings,
}

pub fn run(args: &Args, out: &mut dyn Write) -> Result<Outcome> {
    let model = match &args.detector {
        Some(name) => {
            let config = ModelConfig::named(name);
            let config = config.ok_or_else(|| anyhow!("{name:?} is not one of {}", ModelConfig::NAMES))?;
            Model::random(&config, 1)?
        }
        None => args.model.load()?,
    };
    let options = args.settings.options(&model, 1);
    if args.layers && !matches!(options.device, DevicePolicy::Auto | DevicePolicy::Cpu) {
        bail!("--layers times the steps of the CPU; another device was asked for");
    }
    let peak = args.layers.then(|| peak::flops(options.threads));
    let mut results = Vec::new();
    match &args.image {
        Some(path) => {
            let picture = Picture::open(path)?;
            let view = picture.view().with_context(|| path.display().to_string())?;
            results.push(measure(args, &model, &options, &view)?);
        }
        None if args.size.is_empty() => {
            results.push(synthetic(args, &model, &options, PictureSize { width: 640, height: 480 })?)
        }
        None => {
            for &size in &args.size {
                results.push(synthetic(args, &model, &options, size)?);
            }
        }
    }
    let device = results.first().map_or("cpu", |m| m.device.as_str()).to_string();
    let machine = Machine { device, threads: options.threads, peak, peak_rss: peak_rss() };
    if args.json {
        let value = machine.to_json(&model, &results);
        serde_json::to_writer_pretty(&mut *out, &value).map_err(std::io::Error::from)?;
        writeln!(out)?;
    } else {
        machine.to_text(&model, &results, out)?;
    }
    Ok(Outcome::Complete)
}

/// What does not depend on the picture.
struct Machine {
    /// As the session names it.
    device: String,
    threads: usize,
    /// Operations a second; measured for `--layers` only.
    peak: Option<f64>,
    /// Bytes; None where the system does not tell.
    peak_rss: Option<u64>,
}

/// Times of one picture size.
struct Measured {
    /// As the session names it.
    device: String,
    width: usize,
    height: usize,
    faces: usize,
    workspace: u64,
    levels: Vec<LevelCost>,
    /// Whole detection first, then its parts.
    parts: Vec<(&'static str, Spread)>,
    layers: Vec<LayerTime>,
}

struct LayerTime {
    name: String,
    kernel: &'static str,
    output: Shape,
    macs: u64,
    time: Duration,
}

impl LayerTime {
    /// Operations a second; None for steps without multiply-adds.
    fn flops(&self) -> Option<f64> {
        let seconds = self.time.as_secs_f64();
        (self.macs > 0 && seconds > 0.0).then(|| 2.0 * self.macs as f64 / seconds)
    }
}

/// Median, least and ninetieth percentile.
struct Spread {
    median: Duration,
    min: Duration,
    p90: Duration,
}

impl Spread {
    /// Of at least one time.
    fn of(mut times: Vec<Duration>) -> Self {
        times.sort_unstable();
        let at = |share: f64| times[((times.len() - 1) as f64 * share).round() as usize];
        Self { median: at(0.5), min: times[0], p90: at(0.9) }
    }
}

fn synthetic(args: &Args, model: &Model, options: &Options, size: PictureSize) -> Result<Measured> {
    let (w, h) = (size.width, size.height);
    let bytes = w.checked_mul(h).and_then(|n| n.checked_mul(3)).filter(|&n| n <= 6 << 30);
    let bytes = bytes.with_context(|| format!("{size}: the picture is too large"))?;
    // Smooth waves with some grain, the same in every run.
    let mut noise = 1u32;
    let rgb: Vec<u8> = (0..bytes)
        .map(|i| {
            let (x, y) = ((i / 3 % w) as f32, (i / 3 / w) as f32);
            noise = noise.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let wave = (x / 23.0).sin() + (y / 17.0).cos() + (i % 3) as f32 * 0.2;
            (128.0 + 45.0 * wave + (noise >> 27) as f32) as u8
        })
        .collect();
    if args.nv12 {
        // Luma of green; colour of little strength, in pairs.
        let luma = rgb.iter().skip(1).step_by(3).copied();
        let colour = rgb.iter().map(|v| 112 + v / 8).take(2 * w.div_ceil(2) * h.div_ceil(2));
        let nv12: Vec<u8> = luma.chain(colour).collect();
        return measure(args, model, options, &ImageView::packed(w, h, PixelFormat::Nv12, &nv12)?);
    }
    measure(args, model, options, &ImageView::packed(w, h, PixelFormat::Rgb8, &rgb)?)
}

fn measure(args: &Args, model: &Model, options: &Options, view: &ImageView<'_>) -> Result<Measured> {
    let size = view.upright_size();
    let mut session = Session::with_options(model, options.clone())?;
    let workspace = session.workspace_bytes(size.width, size.height)?;
    let levels = session.levels(size.width, size.height)?;
    session.warmup(size.width, size.height)?;
    session.measure(true);
    let faces = session.detect(view)?.len();
    let mut times: [Vec<Duration>; 5] = Default::default();
    for _ in 0..args.runs {
        let start = Instant::now();
        session.detect(view)?;
        let whole = start.elapsed();
        let t = session.timings().unwrap_or_default();
        for (list, time) in times.iter_mut().zip([whole, t.input, t.network, t.decode, t.merge]) {
            list.push(time);
        }
    }
    let names = ["detection", "input", "network", "decode", "merge"];
    let parts = names.into_iter().zip(times.map(Spread::of)).collect();
    let device = session.device().to_string();
    drop(session);
    let layers = if args.layers { layers_of(args, model, options, view)? } else { Vec::new() };
    Ok(Measured { device, width: size.width, height: size.height, faces, workspace, levels, parts, layers })
}

/// Median time of every step of the network on the whole picture at scale 1.
fn layers_of(args: &Args, model: &Model, options: &Options, view: &ImageView<'_>) -> Result<Vec<LayerTime>> {
    let size = view.upright_size();
    let input = [Shape::new(1, 3, size.height, size.width)];
    let network = model.network(options.precision)?;
    let plan = Plan::new(&network, &input)?;
    let mut pool = Pool::new(options.threads)?;
    let mut arena = Arena::default();
    arena.reserve(plan.floats())?;
    // Some values, not zeros: denormal or zero inputs would not be typical.
    arena.floats_mut().iter_mut().enumerate().for_each(|(i, v)| *v = (i % 251) as f32 - 125.0);
    plan.run(&mut arena, &mut pool);
    let mut times = vec![Vec::new(); plan.steps()];
    for _ in 0..args.runs {
        let mut run = vec![Duration::ZERO; plan.steps()];
        plan.run_timed(&mut arena, &mut pool, &mut run);
        times.iter_mut().zip(run).for_each(|(list, time)| list.push(time));
    }
    let steps = Plan::describe(&network, &input)?;
    let layer = |(s, times): (farface::graph::StepInfo, Vec<Duration>)| LayerTime {
        name: s.name,
        kernel: s.kernel,
        output: s.output,
        macs: s.macs,
        time: Spread::of(times).median,
    };
    Ok(steps.into_iter().zip(times).map(layer).collect())
}

impl Machine {
    fn to_text(&self, model: &Model, results: &[Measured], out: &mut dyn Write) -> Result<()> {
        let noun = if self.threads == 1 { "thread" } else { "threads" };
        let name = &model.config().name;
        match self.device.as_str() {
            "cpu" => {
                let isa = farface::cpu::isa::detected().name();
                writeln!(out, "{name}, {isa}, {} {noun}", self.threads)?;
            }
            device => writeln!(out, "{name}, {device}; the network's time is that of all work there")?,
        }
        for m in results {
            let macs = model.graph().macs(&[Shape::new(1, 3, m.height, m.width)])?;
            writeln!(
                out,
                "\n{}x{}: {} faces, {:.1} MiB working memory, {:.3} G multiply-adds at scale 1",
                m.width,
                m.height,
                m.faces,
                m.workspace as f64 / f64::from(1 << 20),
                macs as f64 / 1e9
            )?;
            m.levels_to_text(out)?;
            writeln!(out, "  {:<10} {:>10} {:>10} {:>10}  ms", "", "median", "min", "p90")?;
            for (name, s) in &m.parts {
                let [median, min, p90] = [s.median, s.min, s.p90].map(milliseconds);
                writeln!(out, "  {name:<10} {median:>10.3} {min:>10.3} {p90:>10.3}")?;
            }
            if let Some(peak) = self.peak {
                m.layers_to_text(peak, out)?;
            }
        }
        if let Some(bytes) = self.peak_rss {
            writeln!(out, "\npeak memory of the process: {:.1} MiB", bytes as f64 / f64::from(1 << 20))?;
        }
        Ok(())
    }

    fn to_json(&self, model: &Model, results: &[Measured]) -> Value {
        let result = |m: &Measured| {
            let parts: serde_json::Map<String, Value> = m
                .parts
                .iter()
                .map(|(name, s)| {
                    let [median, min, p90] = [s.median, s.min, s.p90].map(milliseconds);
                    (name.to_string(), json!({ "median_ms": median, "min_ms": min, "p90_ms": p90 }))
                })
                .collect();
            let level = |l: &LevelCost| {
                json!({ "scale": l.scale, "width": l.size.width, "height": l.size.height,
                        "tiles": l.tiles, "network_pixels": l.network_pixels })
            };
            let layer = |l: &LayerTime| {
                let s = l.output;
                json!({ "name": l.name, "kernel": l.kernel, "output": [s.n, s.c, s.h, s.w],
                        "multiply_adds": l.macs, "median_ms": milliseconds(l.time),
                        "gflops": l.flops().map(|f| f / 1e9),
                        "share_of_peak": l.flops().zip(self.peak).map(|(f, peak)| f / peak) })
            };
            json!({ "width": m.width, "height": m.height, "faces": m.faces,
                    "workspace_bytes": m.workspace, "times": parts,
                    "levels": m.levels.iter().map(level).collect::<Vec<_>>(),
                    "layers": m.layers.iter().map(layer).collect::<Vec<_>>() })
        };
        json!({
            "model": model.config().name,
            "device": self.device,
            "isa": farface::cpu::isa::detected().name(),
            "threads": self.threads,
            "peak_gflops": self.peak.map(|p| p / 1e9),
            "peak_rss_bytes": self.peak_rss,
            "results": results.iter().map(result).collect::<Vec<_>>(),
        })
    }
}

impl Measured {
    fn levels_to_text(&self, out: &mut dyn Write) -> Result<()> {
        if self.levels.is_empty() {
            writeln!(out, "  no scale can show a face of the sizes wanted")?;
        }
        for l in &self.levels {
            writeln!(
                out,
                "  scale {:.4}: {}x{} in {} {}, {:.3} M pixels through the network",
                l.scale,
                l.size.width,
                l.size.height,
                l.tiles,
                if l.tiles == 1 { "tile" } else { "tiles" },
                l.network_pixels as f64 / 1e6
            )?;
        }
        Ok(())
    }

    fn layers_to_text(&self, peak: f64, out: &mut dyn Write) -> Result<()> {
        let width = self.layers.iter().map(|l| l.name.len()).max().unwrap_or(0).max(5);
        writeln!(out, "\n  steps at scale 1; measured peak in f32 {:.1} GF/s", peak / 1e9)?;
        writeln!(
            out,
            "  {:<width$}  {:<14} {:>16} {:>9} {:>7} {:>8} {:>6}",
            "step", "kernel", "output", "ms", "time", "GF/s", "peak"
        )?;
        let total: Duration = self.layers.iter().map(|l| l.time).sum();
        for l in &self.layers {
            let (output, ms) = (l.output.to_string(), milliseconds(l.time));
            let share = 100.0 * l.time.as_secs_f64() / total.as_secs_f64().max(f64::MIN_POSITIVE);
            write!(out, "  {:<width$}  {:<14} {output:>16} {ms:>9.4} {share:>6.1}%", l.name, l.kernel)?;
            match l.flops() {
                Some(f) => writeln!(out, " {:>8.1} {:>5.1}%", f / 1e9, 100.0 * f / peak)?,
                None => writeln!(out, " {:>8} {:>6}", "-", "-")?,
            }
        }
        let macs: u64 = self.layers.iter().map(|l| l.macs).sum();
        let rate = 2.0 * macs as f64 / total.as_secs_f64().max(f64::MIN_POSITIVE);
        let (ms, share) = (milliseconds(total), 100.0 * rate / peak);
        let gigaflops = rate / 1e9;
        writeln!(
            out,
            "  {:<width$}  {:<14} {:>16} {ms:>9.4} {:>6.1}% {gigaflops:>8.1} {share:>5.1}%",
            "total", "", "", 100.0
        )?;
        Ok(())
    }
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Most memory that this process ever held, bytes.
fn peak_rss() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}
