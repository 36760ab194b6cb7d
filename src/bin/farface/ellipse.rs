//! `farface ellipse`: fits the ellipse regression of an HR model.

use crate::{picture, progress, Outcome};
use anyhow::{bail, Result};
use farface::detect::config::{DetectorConfig, METADATA_KEY};
use farface::detect::hr::AngleForm;
use farface::detect::{Ellipse, Model, ModelConfig};
use farface::eval::fddb::{Annotations, Region};
use farface::files;
use farface::graph::Weights;
use farface::train::data::Picture;
use farface::train::ellipse::{cross_validated, ellipse_samples, hr_of};
use std::io::Write;
use std::path::PathBuf;

/// Fit an HR model's ellipses to FDDB's annotations
///
/// A linear regression from what the network says at each detection to the ellipse around the face (Hu and Ramanan 2017, Eq. 2 to
/// 6). What it does on pictures that it has not seen is measured over FDDB's ten folds; the written model has the regression
/// over all of them, and returns an ellipse with every face.
#[derive(clap::Args)]
#[command(after_help = "Example:
  farface ellipse --model hr.safetensors --gt FDDB-folds --images originalPics --out hr-ellipse.safetensors")]
pub struct Args {
    /// The model, safetensors
    #[arg(long, value_name = "FILE")]
    model: PathBuf,
    /// Folder of the ten FDDB-fold-NN-ellipseList.txt
    #[arg(long, value_name = "DIR")]
    gt: PathBuf,
    /// Folder of the pictures
    #[arg(long, value_name = "DIR")]
    images: PathBuf,
    /// Where the model with the regression goes
    #[arg(long, short, value_name = "FILE")]
    out: PathBuf,
    /// How the angle is expressed
    #[arg(long, value_enum, default_value_t = Form::DoubleAngle)]
    angle: Form,
    /// Weight of the squared coefficients against the squared errors
    #[arg(long, default_value_t = 1.0)]
    ridge: f64,
    /// Threads
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    threads: u32,
}

/// How the angle is expressed.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Form {
    /// sin and cos of twice the angle, smooth everywhere
    DoubleAngle,
    /// The paper's cot, which has no bound for faces that lie on their side
    Cotangent,
}

pub fn run(args: &Args, out: &mut dyn Write) -> Result<Outcome> {
    if !(args.ridge.is_finite() && args.ridge > 0.0) {
        bail!("--ridge must be above 0");
    }
    let mut weights = Weights::load(&args.model)?;
    let model = Model::from_weights(&weights)?;
    let templates = hr_of(&model)?.templates.len();
    let folds =
        (1..=10).map(|n| Annotations::read(&[args.gt.join(format!("FDDB-fold-{n:02}-ellipseList.txt"))]));
    let folds = folds.collect::<farface::Result<Vec<Annotations>>>()?;
    let bar = progress::bar(folds.iter().map(|f| f.by_image.len()).sum(), "detecting");
    let mut samples = Vec::new();
    for fold in &folds {
        let mut of_fold = Vec::new();
        for (name, regions) in &fold.by_image {
            let shown = Picture::open(&picture::find(&args.images.join(name))?)?;
            let ellipses: Vec<Ellipse> = regions.iter().filter_map(ellipse).collect();
            of_fold.extend(ellipse_samples(&model, &shown, &ellipses, args.threads as usize)?);
            bar.inc(1);
        }
        samples.push(of_fold);
    }
    bar.finish_and_clear();
    let form = match args.angle {
        Form::DoubleAngle => AngleForm::DoubleAngle,
        Form::Cotangent => AngleForm::Cotangent,
    };
    let (fitted, overlaps) = cross_validated(&samples, templates, form, args.ridge)?;
    let mut config: ModelConfig = model.config().clone();
    if let DetectorConfig::Hr(hr) = &mut config.detector {
        hr.ellipse = Some(fitted);
    }
    weights.metadata.insert(METADATA_KEY.into(), config.to_json()?);
    files::write_whole(&args.out, &weights.to_bytes()?)?;
    let faces: usize = folds.iter().map(Annotations::faces).sum();
    let found: usize = samples.iter().map(Vec::len).sum();
    writeln!(out, "{found} of {faces} faces found; mean overlap on folds held back:")?;
    writeln!(out, "  boxes     {:.4}", overlaps.boxes)?;
    writeln!(out, "  ellipses  {:.4}", overlaps.ellipses)?;
    writeln!(out, "{} has the regression over all", args.out.display())?;
    Ok(Outcome::Complete)
}

fn ellipse(region: &Region) -> Option<Ellipse> {
    match *region {
        Region::Ellipse { major, minor, angle, cx, cy } => Some(Ellipse {
            center: [cx as f32, cy as f32],
            half_axes: [major as f32, minor as f32],
            angle: angle as f32,
        }),
        Region::Rectangle { .. } => None,
    }
}
