//! `farface eval fddb`.

use super::runner::{Found, RunArgs};
use super::{print_json, Output};
use crate::{picture, progress};
use anyhow::Result;
use farface::eval::fddb::{
    evaluate, Annotations, Detections, PictureSizes, RateAt, Region, ScoredRegion, REPORTED_FALSE_POSITIVES,
};
use farface::eval::plot::roc_svg;
use farface::picture::upright_size;
use serde::Serialize;
use std::io::Write;
use std::path::{Path, PathBuf};

/// FDDB: discrete and continuous true-positive rates by number of false positives
///
/// Outlines are clipped to the pictures. With --results, pictures' sizes are read from --images
/// where that is given, and estimated from the detections where it is not.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  farface eval fddb --gt FDDB-folds --results detections.txt
  farface eval fddb --gt FDDB-folds --model m.safetensors --images originalPics --plot roc.svg")]
pub struct Args {
    /// Folder of the ten FDDB-fold-NN-ellipseList.txt
    #[arg(long, value_name = "DIR")]
    gt: PathBuf,
    /// File of detections: name, count, then `x y w h score` or an ellipse and a score a line
    #[arg(long, value_name = "FILE", required_unless_present = "images", conflicts_with = "save_results")]
    results: Option<PathBuf>,
    #[command(flatten)]
    output: Output,
    #[command(flatten)]
    run: RunArgs,
}

#[derive(Serialize)]
struct Figures<'a> {
    images: usize,
    faces: usize,
    rates: &'a [RateAt],
}

pub fn run(args: &Args, out: &mut dyn Write) -> Result<()> {
    let annotations = Annotations::read_folds(&args.gt)?;
    let (detections, sizes) = match (&args.results, &args.run.images) {
        (Some(file), None) => (Detections::read(file)?, PictureSizes::new()),
        (Some(file), Some(dir)) => (Detections::read(file)?, sizes(&annotations, dir)?),
        (None, _) => detect(args, &annotations)?,
    };
    let bar = progress::bar(annotations.by_image.len(), "scoring");
    let report = evaluate(&annotations, &detections, &sizes, &mut progress::follow(&bar));
    bar.finish_and_clear();
    let report = report?;
    args.output.draw(|| {
        let most = REPORTED_FALSE_POSITIVES[REPORTED_FALSE_POSITIVES.len() - 1];
        roc_svg("FDDB", &[("discrete", &report.discrete), ("continuous", &report.continuous)], most)
    })?;
    if args.output.json {
        return print_json(
            out,
            &Figures { images: report.images, faces: report.faces, rates: &report.rates },
        );
    }
    writeln!(out, "FDDB, {} pictures, {} faces", report.images, report.faces)?;
    writeln!(out, "  false positives  discrete  continuous")?;
    for r in &report.rates {
        writeln!(out, "  {:>15}  {:>8.4}  {:>10.4}", r.false_positives, r.discrete, r.continuous)?;
    }
    Ok(())
}

fn sizes(annotations: &Annotations, dir: &Path) -> Result<PictureSizes> {
    let size = |name: &String| Ok((name.clone(), upright_size(&picture::find(&dir.join(name))?)?));
    annotations.by_image.keys().map(size).collect()
}

fn detect(args: &Args, annotations: &Annotations) -> Result<(Detections, PictureSizes)> {
    let names: Vec<&str> = annotations.by_image.keys().map(String::as_str).collect();
    let found = args.run.detect(&names)?;
    let sizes = names.iter().zip(&found).map(|(name, f)| (name.to_string(), f.size)).collect();
    let by_image = names.iter().zip(&found).map(|(name, f)| (name.to_string(), regions(f))).collect();
    let detections = Detections { by_image };
    if let Some(file) = &args.run.save_results {
        detections.write(file)?;
    }
    Ok((detections, sizes))
}

/// Outlines of the faces: ellipses where the model gives them.
fn regions(found: &Found) -> Vec<ScoredRegion> {
    let region = |face: &farface::detect::Face| {
        let region = match face.ellipse {
            Some(e) => Region::Ellipse {
                major: e.half_axes[0].into(),
                minor: e.half_axes[1].into(),
                angle: e.angle.into(),
                cx: e.center[0].into(),
                cy: e.center[1].into(),
            },
            None => Region::Rectangle {
                x: face.bbox.x1.into(),
                y: face.bbox.y1.into(),
                w: face.bbox.width().into(),
                h: face.bbox.height().into(),
            },
        };
        ScoredRegion { region, score: face.score.into() }
    };
    found.faces.iter().map(region).collect()
}
