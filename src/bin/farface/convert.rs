//! `farface convert`: public weights to a model file, models to ONNX.

use crate::settings::PictureSize;
use crate::Outcome;
use anyhow::{bail, Context, Result};
use farface::detect::config::METADATA_KEY;
use farface::detect::{Model, ModelConfig};
use farface::files;
use farface::graph::onnx::to_onnx;
use farface::graph::Weights;
use safetensors::tensor::{Dtype, TensorView};
use std::collections::HashSet;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

/// Make a model file of public weights, or an ONNX file of a model
///
/// Adds the configuration that a session needs (detector, input, thresholds) to weights in the
/// safetensors format, and keeps the tensors that the network uses. Recognised by their tensors'
/// names: RetinaFace with MobileNet-V1 x0.25 or ResNet-50 (Pytorch_Retinaface); other weights need --detector. A
/// prefix "module." that all names share (PyTorch's DataParallel) is taken off. A model file that has
/// its configuration already keeps it, so that a model can be made smaller with --f16.
///
/// ONNX files (opset 17) hold the network alone, N x C x H x W in single precision. The caller brings
/// pixels to the channel order, mean and scale that `farface inspect` tells, and decodes the outputs;
/// the configuration goes along in the file's metadata under "farface".
#[derive(clap::Args)]
#[command(after_help = "Examples:
  farface convert mobilenet0.25_Final.safetensors retinaface.safetensors --licence MIT --data 'WIDER FACE train'
  farface convert retinaface.safetensors retinaface-f16.safetensors --f16
  farface convert retinaface.safetensors --onnx retinaface.onnx
  farface convert retinaface.safetensors --onnx retinaface-vga.onnx --size 640x480")]
pub struct Args {
    /// Weights (safetensors)
    input: PathBuf,
    /// Model file to write
    #[arg(required_unless_present = "onnx")]
    output: Option<PathBuf>,
    /// ONNX file to write
    #[arg(long, value_name = "FILE")]
    onnx: Option<PathBuf>,
    /// Fix the ONNX network's input at one picture of this size; without, any size and number
    #[arg(long, value_name = "WxH", requires = "onnx")]
    size: Option<PictureSize>,
    /// Detector that weights without a configuration are for
    #[arg(long, value_name = "NAME", value_parser = detector_name, long_help = format!("Detector that weights without a configuration are for: {}", ModelConfig::NAMES))]
    detector: Option<String>,
    /// Store the model file's weights in half precision; biases and normalisations stay in single
    #[arg(long, requires = "output")]
    f16: bool,
    /// Name to record
    #[arg(long, value_name = "TEXT")]
    name: Option<String>,
    /// Licence of the weights to record
    #[arg(long, value_name = "TEXT")]
    licence: Option<String>,
    /// Training data to record
    #[arg(long, value_name = "TEXT")]
    data: Option<String>,
}

fn detector_name(name: &str) -> Result<String, String> {
    ModelConfig::named(name).map(|_| name.into()).ok_or_else(|| format!("not one of {}", ModelConfig::NAMES))
}

pub fn run(args: &Args, out: &mut dyn Write) -> Result<Outcome> {
    refuse_pytorch_files(&args.input)?;
    let mut weights = Weights::load(&args.input)?;
    let in_file = || args.input.display().to_string();
    strip_data_parallel(&mut weights);
    ModelConfig::refuse_checkpoint(&weights).with_context(in_file)?;
    let mut config = configuration(args, &weights).with_context(in_file)?;
    let set = |field: &mut String, value: &Option<String>| {
        if let Some(v) = value {
            field.clone_from(v);
        }
    };
    set(&mut config.name, &args.name);
    set(&mut config.licence, &args.licence);
    set(&mut config.data, &args.data);
    weights.metadata.insert(METADATA_KEY.into(), config.to_json()?);
    // A model that cannot run is not written.
    let model = Model::from_weights(&weights).with_context(in_file)?;
    let graphs = [Some(model.graph()), model.second_graph()];
    let params = graphs.into_iter().flatten().flat_map(|g| &g.params);
    let used: HashSet<&str> = params.map(|p| p.name.as_str()).collect();
    weights.tensors.retain(|name, _| used.contains(name.as_str()));

    let mut write = |path: &Path, bytes: &[u8]| -> Result<()> {
        files::write_whole(path, bytes)?;
        let (path, n) = (path.display(), weights.tensors.len());
        writeln!(out, "{path}: {}, {n} tensors, {} bytes", config.name, bytes.len())?;
        Ok(())
    };
    if let Some(path) = &args.output {
        write(path, &serialise(&weights, args.f16).with_context(in_file)?)?;
    }
    if let Some(path) = &args.onnx {
        if model.second_graph().is_some() {
            bail!(
                "{} has two stages, of which ONNX would hold the first alone: no ONNX is written",
                config.name
            );
        }
        let size = args.size.map(|s| [s.height, s.width]);
        write(path, &to_onnx(model.graph(), &weights, size).with_context(in_file)?)?;
    }
    Ok(Outcome::Complete)
}

/// The file's own configuration, or that of the detector it is for.
fn configuration(args: &Args, weights: &Weights) -> Result<ModelConfig> {
    let known = weights.metadata.contains_key(METADATA_KEY);
    match &args.detector {
        Some(_) if known => bail!("the file has its configuration already, leave out --detector"),
        Some(name) => ModelConfig::named(name).with_context(|| format!("no detector {name}")),
        None => ModelConfig::of(weights).map_err(|e| {
            let hint = if known { "" } else { "; name the detector they are for with --detector" };
            anyhow::anyhow!("{e}{hint}")
        }),
    }
}

/// Takes off the prefix that PyTorch's DataParallel puts before every name.
fn strip_data_parallel(weights: &mut Weights) {
    const PREFIX: &str = "module.";
    if weights.tensors.keys().all(|name| name.starts_with(PREFIX)) {
        let tensors = std::mem::take(&mut weights.tensors);
        weights.tensors =
            tensors.into_iter().map(|(name, t)| (name[PREFIX.len()..].to_string(), t)).collect();
    }
}

/// Says what to do with PyTorch's own format.
fn refuse_pytorch_files(path: &Path) -> Result<()> {
    let mut start = [0; 4];
    let mut file = std::fs::File::open(path).with_context(|| path.display().to_string())?;
    let n = file.read(&mut start).with_context(|| path.display().to_string())?;
    // A zip archive, or torch.save's old format; as a header's length either would be above 60 MB.
    if matches!(&start[..n], b"PK\x03\x04" | [0x80, 2, 0x8a, 0x0a]) {
        bail!(
            "{}: this is a PyTorch checkpoint; save its state_dict with safetensors.torch.save_file first",
            path.display()
        );
    }
    Ok(())
}

/// As a safetensors file, tensors of several axes in half precision where asked for.
pub fn serialise(weights: &Weights, half: bool) -> Result<Vec<u8>> {
    let mut stored = Vec::new();
    for (name, tensor) in &weights.tensors {
        // What has one axis is small, and variances do not bear rounding.
        let (dtype, bytes) = if half && tensor.shape.len() > 1 {
            let narrow: Vec<half::f16> = tensor.data.iter().map(|&v| half::f16::from_f32(v)).collect();
            if let Some(i) = narrow.iter().position(|v| !v.is_finite()) {
                bail!("tensor {name}: value {} is too large for half precision", tensor.data[i]);
            }
            (Dtype::F16, narrow.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>())
        } else {
            (Dtype::F32, tensor.data.iter().flat_map(|v| v.to_le_bytes()).collect())
        };
        stored.push((name.as_str(), dtype, &tensor.shape, bytes));
    }
    let views = stored.iter().map(|(name, dtype, shape, bytes)| {
        TensorView::new(*dtype, shape.to_vec(), bytes).map(|view| (*name, view))
    });
    let views = views.collect::<Result<Vec<_>, _>>()?;
    let metadata = weights.metadata.clone().into_iter().collect();
    Ok(safetensors::serialize(views, Some(metadata))?)
}
