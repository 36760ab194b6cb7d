//! `farface inspect`: what a model file holds and what it costs.

use crate::settings::{parse_precision, PictureSize};
use crate::Outcome;
use anyhow::Result;
use farface::detect::{Model, ModelConfig, Precision};
use farface::graph::build::NodeKind;
use farface::graph::{Plan, StepInfo};
use farface::shape::Shape;
use serde::Serialize;
use std::io::Write;
use std::path::PathBuf;

/// Show a model: configuration, layers, cost
///
/// Lists the layers as built with their output shapes (N x C x H x W), parameters and multiply-adds
/// at a picture size, then the steps that they are compiled to on this processor.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  farface inspect
  farface inspect model.safetensors
  farface inspect model.safetensors --size 1920x1080 --json")]
pub struct Args {
    /// Model file (safetensors); without, the one built in
    model: Option<PathBuf>,
    /// Picture size that shapes, multiply-adds and memory are told for
    #[arg(long, value_name = "WxH", default_value = "640x480")]
    size: PictureSize,
    /// Arithmetic of the network: `auto` (int8 of a quantized model where the CPU is faster in it, else f32), `f32`, `bf16`, `f16`, `int8`
    #[arg(long, value_name = "NUMBERS", value_parser = parse_precision, default_value = "auto")]
    precision: Precision,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Args {
    /// The file's name; None for the model built in.
    fn file(&self) -> Option<String> {
        self.model.as_ref().map(|path| path.display().to_string())
    }
}

/// A layer as built.
struct LayerInfo {
    name: String,
    kind: &'static str,
    output: Shape,
    parameters: usize,
    macs: u64,
}

pub fn run(args: &Args, out: &mut dyn Write) -> Result<Outcome> {
    let model = crate::model::load(args.model.as_deref())?;
    let input = [Shape::new(1, 3, args.size.height, args.size.width)];
    let layers = layers(&model, &input)?;
    let network = model.network(args.precision)?;
    let steps = Plan::describe(&network, &input)?;
    let arena = Plan::arena_bytes(&network, &input)?;
    if args.json {
        let value = json(args, &model, &layers, &steps, arena);
        serde_json::to_writer_pretty(&mut *out, &value).map_err(std::io::Error::from)?;
        writeln!(out)?;
    } else {
        to_text(args, &model, &layers, &steps, arena, out)?;
    }
    Ok(Outcome::Complete)
}

fn layers(model: &Model, input: &[Shape]) -> Result<Vec<LayerInfo>> {
    let graph = model.graph();
    let shapes = graph.shapes(input)?;
    let mut counted = vec![false; graph.params.len()];
    let mut list = Vec::new();
    for (node, &output) in graph.nodes.iter().zip(&shapes) {
        let (kind, macs) = match &node.kind {
            NodeKind::Input { .. } => ("input", 0),
            NodeKind::Layer(layer) => (layer.kind(), layer.macs(shapes[node.inputs[0].0], output)),
        };
        // A shared parameter belongs to the first layer that uses it.
        let own = node.params.iter().filter(|p| !std::mem::replace(&mut counted[p.0], true));
        let parameters = own.map(|p| &graph.params[p.0]).filter(|p| p.trained()).map(|p| p.len()).sum();
        list.push(LayerInfo { name: node.name.clone(), kind, output, parameters, macs });
    }
    Ok(list)
}

fn to_text(
    args: &Args,
    model: &Model,
    layers: &[LayerInfo],
    steps: &[StepInfo],
    arena: usize,
    out: &mut dyn Write,
) -> Result<()> {
    let config = model.config();
    let known = |text: &str| if text.is_empty() { "not stated".to_string() } else { text.to_string() };
    let reach = model.reach();
    let packed: usize = steps.iter().map(|s| s.weight_bytes).sum();
    let detector = serde_json::to_string(&config.detector)?;
    let facts = [
        ("name", known(&config.name)),
        ("licence", known(&config.licence)),
        ("data", known(&config.data)),
        (
            "recipe",
            if config.recipe.is_empty() {
                "none".into()
            } else {
                format!("{} bytes of TOML", config.recipe.len())
            },
        ),
        ("detector", detector),
        (
            "input",
            format!("{}, mean {:?}, scale {:?}", config.input.order, config.input.mean, config.input.scale),
        ),
        (
            "score threshold",
            format!("{} ({} in evaluations)", config.score_threshold, config.eval_score_threshold),
        ),
        (
            "suppression",
            format!(
                "IoU {}{}{}, best {} candidates",
                config.nms_iou,
                config.eval_nms_iou.map_or(String::new(), |iou| format!(" ({iou} in evaluations)")),
                if config.nms_plus_one { " (sides count the last pixel)" } else { "" },
                config.max_candidates
            ),
        ),
        (
            "face sizes",
            format!(
                "{} to {} px {}",
                config.detectable_px[0],
                config.detectable_px[1],
                if config.pyramid.is_some() { "of a scale searched" } else { "at scale 1" }
            ),
        ),
        (
            "receptive field",
            format!(
                "{} px up and down, {} px left and right of an output cell",
                reach.pixels[0], reach.pixels[1]
            ),
        ),
        ("largest stride", format!("{} rows, {} columns", reach.stride[0], reach.stride[1])),
        ("parameters", group(model.param_count() as u64)),
        (
            "multiply-adds",
            format!(
                "{} at {}{}",
                group(layers.iter().map(|l| l.macs).sum()),
                args.size,
                if config.detector.detector().second_stage().is_some() { ", the first stage's" } else { "" }
            ),
        ),
        ("memory", format!("{} bytes of feature maps at {}", group(arena as u64), args.size)),
        (
            "packed weights",
            format!("{} bytes for {}", group(packed as u64), farface::cpu::isa::detected().name()),
        ),
    ];
    writeln!(out, "{}", args.file().unwrap_or_else(|| "built in".into()))?;
    for (name, value) in facts {
        writeln!(out, "  {name:<16} {value}")?;
    }
    let shape = |s: Shape| s.to_string();
    let wide = |names: &mut dyn Iterator<Item = usize>| names.max().unwrap_or(0).max(5);

    let width = wide(&mut layers.iter().map(|l| l.name.len()));
    writeln!(out, "\nLayers as built")?;
    writeln!(
        out,
        "  {:<width$}  {:<16} {:>18} {:>12} {:>16}",
        "layer", "kind", "output", "parameters", "multiply-adds"
    )?;
    for l in layers {
        let (output, parameters, macs) = (shape(l.output), group(l.parameters as u64), group(l.macs));
        writeln!(out, "  {:<width$}  {:<16} {output:>18} {parameters:>12} {macs:>16}", l.name, l.kind)?;
    }

    let width = wide(&mut steps.iter().map(|s| s.name.len()));
    writeln!(out, "\nCompiled steps")?;
    writeln!(
        out,
        "  {:<width$}  {:<16} {:>18} {:>12} {:>16}",
        "from layer", "kernel", "output", "weight bytes", "multiply-adds"
    )?;
    for s in steps {
        let (output, bytes, macs) = (shape(s.output), group(s.weight_bytes as u64), group(s.macs));
        writeln!(out, "  {:<width$}  {:<16} {output:>18} {bytes:>12} {macs:>16}", s.name, s.kernel)?;
    }
    Ok(())
}

/// The same facts in JSON; sizes are N, C, H, W.
#[derive(Serialize)]
struct Json<'a> {
    /// Null for the model built in.
    file: Option<String>,
    config: &'a ModelConfig,
    width: usize,
    height: usize,
    parameters: usize,
    multiply_adds: u64,
    arena_bytes: usize,
    weight_bytes: usize,
    isa: &'static str,
    /// Pixels to either side of an output cell: rows, columns.
    receptive_field: [usize; 2],
    /// Rows, columns.
    largest_stride: [usize; 2],
    layers: Vec<JsonLayer<'a>>,
    steps: Vec<JsonStep<'a>>,
}

#[derive(Serialize)]
struct JsonLayer<'a> {
    name: &'a str,
    kind: &'static str,
    output: [usize; 4],
    parameters: usize,
    multiply_adds: u64,
}

#[derive(Serialize)]
struct JsonStep<'a> {
    name: &'a str,
    kernel: &'static str,
    output: [usize; 4],
    weight_bytes: usize,
    multiply_adds: u64,
}

fn json<'a>(
    args: &Args,
    model: &'a Model,
    layers: &'a [LayerInfo],
    steps: &'a [StepInfo],
    arena: usize,
) -> Json<'a> {
    let shape = |s: Shape| [s.n, s.c, s.h, s.w];
    let layer = |l: &'a LayerInfo| JsonLayer {
        name: &l.name,
        kind: l.kind,
        output: shape(l.output),
        parameters: l.parameters,
        multiply_adds: l.macs,
    };
    let step = |s: &'a StepInfo| JsonStep {
        name: &s.name,
        kernel: s.kernel,
        output: shape(s.output),
        weight_bytes: s.weight_bytes,
        multiply_adds: s.macs,
    };
    Json {
        file: args.file(),
        config: model.config(),
        width: args.size.width,
        height: args.size.height,
        parameters: model.param_count(),
        multiply_adds: layers.iter().map(|l| l.macs).sum(),
        arena_bytes: arena,
        weight_bytes: steps.iter().map(|s| s.weight_bytes).sum(),
        isa: farface::cpu::isa::detected().name(),
        receptive_field: model.reach().pixels,
        largest_stride: model.reach().stride,
        layers: layers.iter().map(layer).collect(),
        steps: steps.iter().map(step).collect(),
    }
}

/// Thousands set apart: 1,234,567.
fn group(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    #[test]
    fn thousands_are_set_apart() {
        let groups = [0, 999, 1000, 1234567].map(super::group);
        assert_eq!(groups, ["0", "999", "1,000", "1,234,567"]);
    }
}
