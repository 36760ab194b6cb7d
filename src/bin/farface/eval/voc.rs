//! `farface eval voc`.

use super::runner::RunArgs;
use super::wider::detection;
use super::{print_json, Output};
use crate::progress;
use anyhow::Result;
use farface::eval::plot::precision_recall_svg;
use farface::eval::voc::{evaluate, read_detections, read_faces, Found, MafaSubset, TypedFace};
use farface::eval::PrCurve;
use farface::files;
use serde::Serialize;
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io::Write;
use std::path::PathBuf;

/// AFW, PASCAL Face, MAFA: precision and recall at IoU 0.5, as PASCAL VOC counts
///
/// A model is run on the pictures that the annotations name.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  farface eval voc --gt pascal_faces.txt --results detections.txt
  farface eval voc --gt mafa.txt --mafa --model m.safetensors --images MAFA/test --plot pr.svg")]
pub struct Args {
    /// Annotations, a face a line: `image left top right bottom [type]`, type 3 = ignored
    #[arg(long, value_name = "FILE")]
    gt: PathBuf,
    /// Detections, one a line: `image score left top right bottom`
    #[arg(long, value_name = "FILE", conflicts_with = "images", required_unless_present = "images")]
    results: Option<PathBuf>,
    /// MAFA's three subsets: whole, masked, unignored
    #[arg(long)]
    mafa: bool,
    #[command(flatten)]
    output: Output,
    #[command(flatten)]
    run: RunArgs,
}

#[derive(Serialize)]
struct Figures {
    subset: MafaSubset,
    faces: usize,
    ap_11_point: f64,
    ap_all_point: f64,
    #[serde(skip)]
    curve: PrCurve,
}

pub fn run(args: &Args, out: &mut dyn Write) -> Result<()> {
    let faces = read_faces(&args.gt)?;
    let found = match &args.results {
        Some(file) => read_detections(file)?,
        None => detect(args, &faces)?,
    };
    let subsets: &[MafaSubset] = if args.mafa { &MafaSubset::EACH } else { &[MafaSubset::Unignored] };
    let bar = progress::bar(found.len(), "scoring");
    let figures = |&subset: &MafaSubset| {
        let report = evaluate(&subset.select(&faces), &found, &mut progress::follow(&bar));
        let (faces, curve) = (report.curve.faces, report.curve);
        Figures { subset, faces, ap_11_point: report.ap_11_point, ap_all_point: report.ap_all_point, curve }
    };
    let figures: Vec<Figures> = subsets.iter().map(figures).collect();
    bar.finish_and_clear();
    args.output.draw(|| {
        let curves: Vec<(&str, &PrCurve)> = figures.iter().map(|f| (name(f.subset), &f.curve)).collect();
        precision_recall_svg("VOC, IoU 0.5", &curves)
    })?;
    if args.output.json {
        return print_json(out, &figures);
    }
    writeln!(out, "VOC, IoU 0.5")?;
    for f in &figures {
        let (name, all, eleven) = (name(f.subset), f.ap_all_point, f.ap_11_point);
        writeln!(out, "  {name:<10} AP {all:.4}  11-point {eleven:.4}  {:>6} faces", f.faces)?;
    }
    Ok(())
}

fn name(subset: MafaSubset) -> &'static str {
    match subset {
        MafaSubset::Whole => "whole",
        MafaSubset::Masked => "masked",
        MafaSubset::Unignored => "unignored",
    }
}

fn detect(args: &Args, faces: &[TypedFace]) -> Result<Vec<Found>> {
    let names: BTreeSet<&str> = faces.iter().map(|f| f.image.as_str()).collect();
    let names: Vec<&str> = names.into_iter().collect();
    let mut all = Vec::new();
    for (name, found) in names.iter().zip(args.run.detect(&names)?) {
        let faces = found.faces.iter();
        all.extend(faces.map(|f| Found { image: name.to_string(), detection: detection(f) }));
    }
    if let Some(file) = &args.run.save_results {
        let mut text = String::new();
        for Found { image, detection: d } in &all {
            let b = d.bbox;
            writeln!(text, "{image} {} {} {} {} {}", d.score, b.x1, b.y1, b.x2, b.y2)?;
        }
        files::write_whole(file, text.as_bytes())?;
    }
    Ok(all)
}
