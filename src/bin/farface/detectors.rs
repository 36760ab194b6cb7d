//! `farface detectors`: the detectors by name, and what they cost.

use crate::settings::PictureSize;
use crate::Outcome;
use anyhow::{anyhow, Result};
use farface::cpu::{isa, Arena, Pool};
use farface::detect::ModelConfig;
use farface::graph::{Compiled, Graph, Plan, Weights};
use farface::shape::Shape;
use serde::Serialize;
use std::io::Write;
use std::time::Instant;

/// List the detectors by name, with what they cost
///
/// Parameters, multiply-adds at a picture size and, where asked for, the time of the network with random weights on this
/// machine. A detector of two stages has both stages' parameters; multiply-adds and time are the first network's, and those of
/// the second stage for each proposal stand behind. The names are those of `convert --detector` and of recipes; given names are listed instead of the usual ones.
#[derive(clap::Args)]
#[command(after_help = format!("Names: {}

Examples:
  farface detectors
  farface detectors hambox-sms-r50 fpn-finest-dc-r18 --size 800x800
  farface detectors --time --threads 2", ModelConfig::NAMES))]
pub struct Args {
    /// Detectors; without, each family on several backbones
    names: Vec<String>,
    /// Picture size
    #[arg(long, value_name = "WxH", default_value = "640x480")]
    size: PictureSize,
    /// Also run each network, in f32 with random weights: median of five runs
    #[arg(long)]
    time: bool,
    /// Threads of the runs
    #[arg(long, default_value_t = 1, requires = "time", value_parser = clap::value_parser!(u32).range(1..=64))]
    threads: u32,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Families that stand on a ResNet.
const FAMILIES: [&str; 13] = [
    "rpn",
    "fpn",
    "fpn-finest",
    "fpn-finest-stride",
    "fpn-finest-rcnn",
    "fpn-p3",
    "hambox",
    "hambox-baseline",
    "refineface",
    "refineface-baseline",
    "hr",
    "retinaface",
    "farface-crowd",
];
const OWN: [&str; 3] = ["farface-nano", "farface-small", "retinaface-mobile025"];
const BACKBONES: [&str; 4] = ["r18", "r50", "r101", "r152"];
const RUNS: usize = 5;

#[derive(Serialize)]
struct Detector {
    name: String,
    parameters: usize,
    multiply_adds: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    multiply_adds_a_proposal: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    milliseconds: Option<f64>,
}

pub fn run(args: &Args, out: &mut dyn Write) -> Result<Outcome> {
    let names = if args.names.is_empty() { usual() } else { args.names.clone() };
    // All names first: a wrong one is told before any network runs.
    let configs = names.iter().map(|name| {
        ModelConfig::named(name).ok_or_else(|| anyhow!("{name:?} is not one of {}", ModelConfig::NAMES))
    });
    let configs = configs.collect::<Result<Vec<_>>>()?;
    let shape = Shape::new(1, 3, args.size.height, args.size.width);
    if !args.json {
        let time = if args.time { format!("  {:>10}", "ms") } else { String::new() };
        writeln!(out, "{:<28}  {:>13}  {:>10}{time}", "detector", "parameters, M", "GMAC")?;
    }
    let mut detectors = Vec::new();
    for config in configs {
        let detector = config.detector.detector();
        let (graph, second) = (detector.graph(), detector.second_stage());
        let milliseconds = if args.time { Some(time(&graph, shape, args.threads as usize)?) } else { None };
        let parameters = graph.param_count() + second.as_ref().map_or(0, |s| s.graph.param_count());
        let multiply_adds_a_proposal = second.map(|s| s.macs_a_proposal()).transpose()?;
        let multiply_adds = graph.macs(&[shape])?;
        let d =
            Detector { name: config.name, parameters, multiply_adds, multiply_adds_a_proposal, milliseconds };
        if !args.json {
            let (params, macs) = (d.parameters as f64 / 1e6, d.multiply_adds as f64 / 1e9);
            let time = d.milliseconds.map_or(String::new(), |ms| format!("  {ms:>10.1}"));
            let second = d.multiply_adds_a_proposal;
            let second = second.map_or(String::new(), |n| format!("  + {:.4} a proposal", n as f64 / 1e9));
            writeln!(out, "{:<28}  {params:>13.2}  {macs:>10.2}{time}{second}", d.name)?;
            out.flush()?;
        }
        detectors.push(d);
    }
    if args.json {
        serde_json::to_writer_pretty(&mut *out, &detectors).map_err(std::io::Error::from)?;
        writeln!(out)?;
    }
    Ok(Outcome::Complete)
}

fn usual() -> Vec<String> {
    let on_resnet = FAMILIES.iter().flat_map(|f| BACKBONES.map(|b| format!("{f}-{b}")));
    OWN.map(String::from).into_iter().chain(on_resnet).chain([String::from("hr-vgg16")]).collect()
}

/// Median milliseconds of the network's runs with random weights.
fn time(graph: &Graph, shape: Shape, threads: usize) -> Result<f64> {
    let network = Compiled::new(graph, &Weights::random(graph, 1), isa::detected())?;
    let plan = Plan::new(&network, &[shape])?;
    let mut arena = Arena::default();
    arena.reserve(plan.floats())?;
    let mut pool = Pool::new(threads)?;
    // Once to warm up.
    plan.run(&mut arena, &mut pool);
    let mut times: Vec<f64> = (0..RUNS)
        .map(|_| {
            let start = Instant::now();
            plan.run(&mut arena, &mut pool);
            start.elapsed().as_secs_f64() * 1e3
        })
        .collect();
    times.sort_by(f64::total_cmp);
    Ok(times[RUNS / 2])
}
