//! `farface convert`: public weights to a model file.

use crate::{files, Outcome};
use anyhow::{bail, Context, Result};
use farface::detect::config::METADATA_KEY;
use farface::detect::{Model, ModelConfig};
use farface::graph::Weights;
use safetensors::tensor::{Dtype, TensorView};
use std::collections::HashSet;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

/// Make a model file of public weights
///
/// Adds the configuration that a session needs (detector, input, thresholds) to weights in the
/// safetensors format, and keeps the tensors that the network uses. Recognised by their tensors'
/// names: RetinaFace with MobileNet-V1 x0.25 (Pytorch_Retinaface). A model file that has its
/// configuration already keeps it, so that a model can be made smaller with --f16.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  farface convert mobilenet0.25_Final.safetensors retinaface.safetensors --licence MIT --data 'WIDER FACE train'
  farface convert retinaface.safetensors retinaface-f16.safetensors --f16")]
pub struct Args {
    /// Weights (safetensors)
    input: PathBuf,
    /// Model file to write
    output: PathBuf,
    /// Store weights in half precision; biases and normalisations stay in single precision
    #[arg(long)]
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

pub fn run(args: &Args, out: &mut dyn Write) -> Result<Outcome> {
    refuse_checkpoints(&args.input)?;
    let mut weights = Weights::load(&args.input)?;
    let in_file = || args.input.display().to_string();
    let mut config = ModelConfig::of(&weights).map_err(|e| {
        let known = weights.metadata.contains_key(METADATA_KEY);
        let hint = if known { "" } else { "; `farface convert --help` lists the detectors it recognises" };
        anyhow::anyhow!("{}: {e}{hint}", args.input.display())
    })?;
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
    let used: HashSet<&str> = model.graph().params.iter().map(|p| p.name.as_str()).collect();
    weights.tensors.retain(|name, _| used.contains(name.as_str()));

    let bytes = serialise(&weights, args.f16).with_context(in_file)?;
    files::write(&args.output, &bytes)?;
    writeln!(
        out,
        "{}: {}, {} tensors, {} bytes",
        args.output.display(),
        config.name,
        weights.tensors.len(),
        bytes.len()
    )?;
    Ok(Outcome::Complete)
}

/// Says what to do with PyTorch's own format.
fn refuse_checkpoints(path: &Path) -> Result<()> {
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

/// As a safetensors file.
fn serialise(weights: &Weights, half: bool) -> Result<Vec<u8>> {
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
