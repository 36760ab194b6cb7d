//! `farface eval wider`.

use super::runner::RunArgs;
use super::{print_json, Output};
use crate::progress;
use anyhow::Result;
use farface::detect::{Detection, Face};
use farface::eval::coco::{self, CocoReport};
use farface::eval::diagnose::{diagnose, Diagnosis};
use farface::eval::plot::precision_recall_svg;
use farface::eval::wider::{Evaluator, GroundTruth, Predictions, Report, Subset};
use farface::eval::PrCurve;
use serde::Serialize;
use std::collections::HashSet;
use std::io::Write;
use std::path::{Path, PathBuf};

/// WIDER FACE: AP of Easy, Medium, Hard and All
///
/// The ground truth is the folder of the evaluator's files (wider_face_val.mat and
/// wider_{easy,medium,hard}_val.mat), or text lists such as wider_face_val_bbx_gt.txt, which know
/// no difficulty, so that only All is scored. Pictures are found whatever format they are stored in.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  farface eval wider --gt eval_tools/ground_truth --results results
      scores result files results/<event>/<picture>.txt
  farface eval wider --gt ground_truth --model m.safetensors --images WIDER_val/images --plot pr.svg
      runs a model on the pictures and draws its curves
  farface eval wider --gt ground_truth --list dev.txt --results results --coco
      scores the pictures of a list only, COCO's mean AP too")]
pub struct Args {
    /// Folder of the .mat files, or text lists (several are joined)
    #[arg(long, required = true, num_args = 1.., value_name = "DIR|FILE")]
    gt: Vec<PathBuf>,
    /// Folder of result files: a folder an event, a text file a picture
    #[arg(long, value_name = "DIR", conflicts_with = "images", required_unless_present = "images")]
    results: Option<PathBuf>,
    /// Score only the pictures of this text list; may be given several times
    #[arg(long, value_name = "FILE")]
    list: Vec<PathBuf>,
    /// COCO's mean AP over IoU 0.50:0.05:0.95 too
    #[arg(long)]
    coco: bool,
    /// Causes of false positives, and recall by size and attributes, on one subset
    #[arg(long, value_name = "SUBSET")]
    diagnose: Option<SubsetName>,
    #[command(flatten)]
    output: Output,
    #[command(flatten)]
    run: RunArgs,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum SubsetName {
    Easy,
    Medium,
    Hard,
    All,
}

impl From<SubsetName> for Subset {
    fn from(name: SubsetName) -> Self {
        match name {
            SubsetName::Easy => Subset::Easy,
            SubsetName::Medium => Subset::Medium,
            SubsetName::Hard => Subset::Hard,
            SubsetName::All => Subset::All,
        }
    }
}

/// The figures, as printed in JSON.
#[derive(Serialize)]
struct Figures {
    images: usize,
    subsets: Vec<SubsetFigures>,
    #[serde(skip_serializing_if = "Option::is_none")]
    diagnosis: Option<Diagnosis>,
}

#[derive(Serialize)]
struct SubsetFigures {
    subset: Subset,
    faces: usize,
    ap: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    coco: Option<CocoReport>,
}

pub fn run(args: &Args, out: &mut dyn Write) -> Result<()> {
    let gt = ground_truth(&args.gt, &args.list)?;
    let predictions = predictions(args, &gt)?;
    let bar = progress::bar(gt.images.len(), "scoring");
    let evaluator = Evaluator::new(&gt, &predictions, &mut progress::follow(&bar));
    let report = evaluator.report()?;
    let curves = curves(&report);
    let mut subsets = Vec::new();
    for &(subset, curve) in &curves {
        let coco = |()| coco::evaluate(&gt, &predictions, subset, &mut progress::follow(&bar));
        let coco = args.coco.then_some(()).map(coco).transpose()?;
        subsets.push(SubsetFigures { subset, faces: curve.faces, ap: curve.ap, coco });
    }
    let diagnosis =
        args.diagnose.map(|s| diagnose(&evaluator, s.into(), &mut progress::follow(&bar))).transpose()?;
    bar.finish_and_clear();
    args.output.draw(|| {
        let named: Vec<(&str, &PrCurve)> = curves.iter().map(|&(s, c)| (s.name(), c)).collect();
        precision_recall_svg("WIDER FACE", &named)
    })?;
    let figures = Figures { images: report.images, subsets, diagnosis };
    if args.output.json {
        return print_json(out, &figures);
    }
    figures.print(out)
}

/// Curves of the subsets that the ground truth knows.
fn curves(report: &Report) -> Vec<(Subset, &PrCurve)> {
    let graded =
        [(Subset::Easy, &report.easy), (Subset::Medium, &report.medium), (Subset::Hard, &report.hard)];
    let graded = graded.into_iter().filter_map(|(s, c)| c.as_ref().map(|c| (s, c)));
    graded.chain([(Subset::All, &report.all)]).collect()
}

/// The ground truth of these sources, restricted to the pictures of the lists where there are any.
pub fn ground_truth(sources: &[PathBuf], lists: &[PathBuf]) -> Result<GroundTruth> {
    let gt = match sources {
        [dir] if dir.is_dir() => GroundTruth::from_mat(dir)?,
        files => joined(files)?,
    };
    if lists.is_empty() {
        return Ok(gt);
    }
    Ok(gt.restricted_to(&joined(lists)?)?)
}

/// Text lists as one.
fn joined(files: &[PathBuf]) -> Result<GroundTruth> {
    let mut all = GroundTruth::default();
    let mut seen = HashSet::new();
    for file in files {
        for image in GroundTruth::from_text(file)?.images {
            if !seen.insert(image.key()) {
                anyhow::bail!("{}: {} is in an earlier list too", file.display(), image.key());
            }
            all.images.push(image);
        }
    }
    Ok(all)
}

fn predictions(args: &Args, gt: &GroundTruth) -> Result<Predictions> {
    if let Some(dir) = &args.results {
        let bar = progress::bar(gt.images.len(), "reading");
        let read = Predictions::read(dir, &mut progress::follow(&bar));
        bar.finish_and_clear();
        return Ok(read?);
    }
    let names: Vec<&str> = gt.images.iter().map(|i| i.path.as_str()).collect();
    let found = args.run.detect(&names)?;
    let mut predictions = Predictions::new();
    for (image, found) in gt.images.iter().zip(found) {
        predictions.insert(&image.event, &image.stem, found.faces.iter().map(detection).collect());
    }
    if let Some(dir) = &args.run.save_results {
        save(&predictions, dir)?;
    }
    Ok(predictions)
}

fn save(predictions: &Predictions, dir: &Path) -> Result<()> {
    let bar = progress::bar(predictions.len(), "writing");
    let written = predictions.write(dir, &mut progress::follow(&bar));
    bar.finish_and_clear();
    Ok(written?)
}

pub fn detection(face: &Face) -> Detection {
    Detection { bbox: face.bbox, score: face.score }
}

impl Figures {
    fn print(&self, out: &mut dyn Write) -> Result<()> {
        writeln!(out, "WIDER FACE, {} pictures", self.images)?;
        for s in &self.subsets {
            write!(out, "  {:<7} AP {:.4}  {:>6} faces", s.subset.name(), s.ap, s.faces)?;
            match &s.coco {
                Some(coco) => writeln!(out, "  COCO mAP {:.4}", coco.map)?,
                None => writeln!(out)?,
            }
        }
        if let Some(d) = &self.diagnosis {
            diagnosis(d, out)?;
        }
        Ok(())
    }
}

fn diagnosis(d: &Diagnosis, out: &mut dyn Write) -> Result<()> {
    writeln!(out, "\nDiagnosis of {}, {} faces", d.subset.name(), d.faces)?;
    write!(out, "  AP at IoU")?;
    d.ap_by_iou.iter().try_for_each(|a| write!(out, "  {:.2}: {:.4}", a.iou, a.ap))?;
    writeln!(
        out,
        "\n\n  {:<18} {:>9} {:>13} {:>10} {:>11}",
        "false positives", "total", "localisation", "duplicate", "background"
    )?;
    for at in &d.false_positives_at_recall {
        let name =
            format!("at recall {:.0} %{}", at.recall * 100.0, if at.threshold.is_some() { "" } else { " *" });
        let c = at.causes;
        writeln!(
            out,
            "  {name:<18} {:>9} {:>13} {:>10} {:>11}",
            at.total, c.localisation, c.duplicate, c.background
        )?;
    }
    if d.false_positives_at_recall.iter().any(|at| at.threshold.is_none()) {
        writeln!(out, "  * not reached: all detections")?;
    }
    for top in &d.top_false_positives {
        let (name, c) = (format!("top {}", top.top), top.causes);
        writeln!(
            out,
            "  {name:<18} {:>9} {:>13} {:>10} {:>11}",
            top.top, c.localisation, c.duplicate, c.background
        )?;
    }
    writeln!(
        out,
        "\n  {:<13} {:<14} {:>7} {:>8} {:>14}",
        "attribute", "value", "faces", "recall", "normalised AP"
    )?;
    for s in &d.sensitivity {
        writeln!(
            out,
            "  {:<13} {:<14} {:>7} {:>8.4} {:>14.4}",
            s.attribute, s.value, s.faces, s.recall, s.normalised_ap
        )?;
    }
    Ok(())
}
