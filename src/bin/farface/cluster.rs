//! `farface cluster`: templates of the HR detector from annotated faces.

use crate::{progress, Outcome};
use anyhow::{bail, Result};
use farface::detect::hr::TemplateChoice;
use farface::eval::wider::GroundTruth;
use farface::files;
use farface::train::cluster::{k_medoids, template, Clustering};
use serde::Serialize;
use std::fmt::Write as _;
use std::io::Write;
use std::path::PathBuf;

/// Find the templates of an HR detector in annotated faces
///
/// K-medoids of the boxes' widths and heights under the Jaccard distance (Hu and Ramanan 2017, Eq. 1), each on the level of the
/// pyramid where such faces are 40 to 140 px high: scale 2 below, 0.5 above. The table goes into a recipe as `templates = "FILE.csv"`
/// under [model].
#[derive(clap::Args)]
#[command(after_help = "Example:
  farface cluster WIDER_train/wider_face_train_bbx_gt.txt --out templates.csv")]
pub struct Args {
    /// Annotations as WIDER FACE has them: text, also .gz, or .mat
    #[arg(required = true, value_name = "LIST")]
    lists: Vec<PathBuf>,
    /// Templates
    #[arg(long, short = 'k', value_name = "N", default_value_t = 25, value_parser = clap::value_parser!(u32).range(1..=128))]
    templates: u32,
    /// Faces with a shorter side below this are left out, pixels
    #[arg(long, value_name = "PX", default_value_t = 10.0)]
    min_side: f32,
    /// Clusterings tried, of which the best is taken
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=1000))]
    starts: u32,
    /// Of the random starts
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Write the table: row,half_width,half_height,sigma, sides on the template's own level
    #[arg(long, short, value_name = "FILE.csv")]
    out: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// A template as it is printed.
#[derive(Serialize)]
struct Row {
    /// Pixels of the picture.
    width: f32,
    height: f32,
    /// Scale of its level.
    sigma: f32,
    /// A, B, or neither where types A and B leave its faces to other levels.
    kind: Option<&'static str>,
    boxes: usize,
    mean_iou: f64,
}

pub fn run(args: &Args, out: &mut dyn Write) -> Result<Outcome> {
    let sizes = sizes(args)?;
    let bar = progress::bar(args.starts as usize, "clustering");
    let found = k_medoids(
        &sizes,
        args.templates as usize,
        args.seed,
        args.starts as usize,
        &mut progress::follow(&bar),
    );
    bar.finish_and_clear();
    let found = found?;
    if let Some(path) = &args.out {
        files::write_whole(path, table(&found).as_bytes())?;
    }
    let rows: Vec<Row> = found
        .clusters
        .iter()
        .map(|c| {
            let t = template(c.medoid);
            let asked = |scale| TemplateChoice::AAndB.asks(&t, scale);
            let kind = match (asked(1.0), asked(2.0)) {
                (true, _) => Some("A"),
                (false, true) => Some("B"),
                (false, false) => None,
            };
            let [width, height] = c.medoid;
            Row { width, height, sigma: t.scale, kind, boxes: c.boxes, mean_iou: 1.0 - c.distance }
        })
        .collect();
    if args.json {
        serde_json::to_writer_pretty(&mut *out, &rows).map_err(std::io::Error::from)?;
        writeln!(out)?;
        return Ok(Outcome::Complete);
    }
    writeln!(
        out,
        "{:>3}  {:>8}  {:>8}  {:>5}  {:>4}  {:>8}  {:>8}",
        "", "width", "height", "sigma", "type", "boxes", "mean IoU"
    )?;
    for (i, r) in rows.iter().enumerate() {
        let (kind, n) = (r.kind.unwrap_or("-"), i + 1);
        writeln!(
            out,
            "{n:>3}  {:>8.1}  {:>8.1}  {:>5}  {kind:>4}  {:>8}  {:>8.3}",
            r.width, r.height, r.sigma, r.boxes, r.mean_iou
        )?;
    }
    writeln!(
        out,
        "{} boxes, mean IoU with their template {:.4}; {} rounds",
        sizes.len(),
        1.0 - found.distance,
        found.rounds
    )?;
    Ok(Outcome::Complete)
}

/// Widths and heights of the valid faces of all lists.
fn sizes(args: &Args) -> Result<Vec<[f32; 2]>> {
    let mut sizes = Vec::new();
    for list in &args.lists {
        let mat = list.extension().is_some_and(|e| e.eq_ignore_ascii_case("mat"));
        let truth = if mat { GroundTruth::from_mat_boxes(list)? } else { GroundTruth::from_text(list)? };
        let faces = truth.images.iter().flat_map(|image| &image.faces).filter(|f| !f.attributes.invalid);
        let large = |[w, h]: &[f32; 2]| w.min(*h) >= args.min_side && w.min(*h) > 0.0;
        sizes.extend(faces.map(|f| [f.bbox.width(), f.bbox.height()]).filter(large));
    }
    if sizes.is_empty() {
        bail!("no valid face has sides of {} px or more", args.min_side);
    }
    Ok(sizes)
}

fn table(found: &Clustering) -> String {
    let mut text = String::from("row,half_width,half_height,sigma\n");
    for (i, c) in found.clusters.iter().enumerate() {
        let t = template(c.medoid);
        let row = writeln!(text, "{},{:.4},{:.4},{}", i + 1, t.width / 2.0, t.height / 2.0, t.scale);
        row.expect("a string takes all");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use farface::detect::hr::parse_templates;

    #[test]
    fn the_table_is_what_a_recipe_reads() {
        let sizes: Vec<[f32; 2]> = (10..200).map(|h| [h as f32 * 0.8, h as f32]).collect();
        let found = k_medoids(&sizes, 5, 1, 2, &mut |_, _| {}).unwrap();
        let read = parse_templates(&table(&found)).unwrap();
        for (t, c) in read.iter().zip(&found.clusters) {
            assert_eq!(t.scale, template(c.medoid).scale);
            assert!((t.height - c.medoid[1] * t.scale).abs() < 1e-3, "{t:?} {c:?}");
        }
        assert_eq!(read.len(), 5);
    }
}
