//! `farface quantize`.

use crate::convert::serialise;
use crate::eval::runner::detect_all;
use crate::eval::wider::detection;
use crate::picture::{self, Picture};
use crate::{progress, Outcome};
use anyhow::{bail, Context, Result};
use farface::detect::quantize::Quantizer;
use farface::detect::{Detection, Model, Options, Precision};
use farface::eval::voc::{self, Found, Truth};
use farface::eval::wider::{Evaluator, GroundTruth, Image, Predictions};
use farface::files;
use farface::graph::{Clip, Ranges, Weights};
use serde_json::json;
use std::collections::{BTreeSet, HashSet};
use std::io::Write;
use std::path::{Path, PathBuf};

/// Make a model for int8
///
/// Runs the model on pictures, notes what its tensors hold, and writes it with the ranges found, by which sessions compute it
/// in eight bits. It is compared with what the model finds in f32 on the same pictures, and a layer that saves a third or more of
/// what is lost of that stays in f32. Where annotations are given, its AP before and after is measured, and more layers stay in f32
/// where too much of it is lost, those first that add most to the noise of the outputs. All of it as this CPU computes int8: x86
/// CPUs with AVX2 and no dot product of eight bits round weights more coarsely than others.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  farface quantize model.safetensors --data pictures --output model-int8.safetensors
      with the ranges of 64 of the pictures below that folder
  farface quantize model.safetensors --data WIDER_val/images --gt ground_truth --list dev.txt --output model-int8.safetensors
      and AP before and after, on the pictures of the list; ranges come from the others
  farface bench --model model-int8.safetensors --layers")]
pub struct Args {
    /// Model file (safetensors)
    model: PathBuf,
    /// Folder of typical pictures, searched with all below it
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// Model file to write
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    /// Pictures that ranges are taken from, at most
    #[arg(long, value_name = "N", default_value_t = 64)]
    count: usize,
    /// What becomes of rare large values: `extremes` (keep all), `percentile:SHARE` (keep this share, such as 0.9999), `mse` (least
    /// squared error of the values), `auto` (whichever of some loses least AP; without annotations, finds most of what the
    /// model finds in f32)
    #[arg(long, value_name = "HOW", default_value = "auto", value_parser = parse_clips)]
    clip: Clips,
    /// Ground truth of pictures in the folder, as `farface eval wider` takes it
    #[arg(long, num_args = 1.., value_name = "DIR|FILE")]
    gt: Vec<PathBuf>,
    /// Measure AP on the pictures of this text list only; may be given several times
    #[arg(long, value_name = "FILE", requires = "gt")]
    list: Vec<PathBuf>,
    /// AP that may be lost, points of 100 (100: all layers are in int8 but those of --keep)
    #[arg(long, value_name = "POINTS", default_value_t = 0.5)]
    max_loss: f64,
    /// Layers that stay in f32 whatever they lose
    #[arg(long, value_name = "LAYER", num_args = 1..)]
    keep: Vec<String>,
    /// Store weights in half precision
    #[arg(long)]
    f16: bool,
    /// Threads [default: all cores]
    #[arg(long, value_name = "N", default_value_t = 0)]
    threads: usize,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// The choices for the ranges.
#[derive(Clone, Debug, PartialEq)]
struct Clips(Vec<Clip>);

fn parse_clips(text: &str) -> Result<Clips, String> {
    let bad =
        || "expected auto, extremes, mse or percentile:SHARE with a SHARE above 0.5, at most 1".to_string();
    Ok(Clips(match (text, text.strip_prefix("percentile:")) {
        ("auto", _) => {
            vec![
                Clip::Extremes,
                Clip::Percentile(0.99999),
                Clip::Percentile(0.9999),
                Clip::Percentile(0.999),
                Clip::Mse,
            ]
        }
        ("extremes", _) => vec![Clip::Extremes],
        ("mse", _) => vec![Clip::Mse],
        (_, Some(share)) => {
            let share = share.parse().ok().filter(|s| (0.5..=1.0).contains(s) && *s > 0.5);
            vec![Clip::Percentile(share.ok_or_else(bad)?)]
        }
        _ => return Err(bad()),
    }))
}

fn clip_name(clip: Clip) -> String {
    match clip {
        Clip::Extremes => "extremes".into(),
        Clip::Percentile(share) => format!("percentile:{share}"),
        Clip::Mse => "mse".into(),
    }
}

/// Average precision by subset, those that there is ground truth for; without any that of [`OWN`].
type Scores = Vec<(&'static str, f64)>;

/// Lowest score of the faces found in f32 that eight bits are to find, too. What scores less is mostly no face, and so much of it
/// that it would choose ranges that cut off what large and clear faces hold.
const OWN_SCORE: f32 = 0.2;

/// Share of what is lost of its own faces that a layer must save to stay in f32.
const WORTH_KEEPING: f64 = 1.0 / 3.0;

/// Stands for a subset: the faces that the model finds in f32.
const OWN: &str = "own";

/// Pictures, and what is to be found on them.
struct Judge {
    paths: Vec<PathBuf>,
    faces: Faces,
    threads: usize,
    /// Of the model in f32.
    before: Scores,
}

enum Faces {
    Annotated(GroundTruth),
    /// What the model finds in f32.
    Own(Vec<Truth>),
}

impl Judge {
    /// By annotations, where there are any.
    fn annotated(args: &Args, model: &Model, threads: usize) -> Result<Option<Self>> {
        if args.gt.is_empty() {
            return Ok(None);
        }
        let truth = crate::eval::wider::ground_truth(&args.gt, &args.list)?;
        let path = |i: &Image| picture::find(&args.data.join(&i.path));
        let paths = truth.images.iter().map(path).collect::<Result<_>>()?;
        let mut judge = Self { paths, faces: Faces::Annotated(truth), threads, before: Scores::new() };
        judge.before = judge.scores(model, Precision::F32)?;
        Ok(Some(judge))
    }

    /// By what `model` finds on these pictures in f32; none where that is nothing.
    fn own(model: &Model, paths: Vec<PathBuf>, threads: usize) -> Result<Option<Self>> {
        // f32 finds all that it finds.
        let mut judge = Self { paths, faces: Faces::Own(Vec::new()), threads, before: vec![(OWN, 1.0)] };
        let found = judge.found(model, Precision::F32)?;
        let faces = found.into_iter().filter(|f| f.detection.score > OWN_SCORE);
        let faces = faces.map(|f| Truth { image: f.image, bbox: f.detection.bbox, ignored: false });
        let faces: Vec<Truth> = faces.collect();
        let some = !faces.is_empty();
        judge.faces = Faces::Own(faces);
        Ok(some.then_some(judge))
    }

    /// Detections of every picture.
    fn detections(&self, model: &Model, precision: Precision) -> Result<Vec<Vec<Detection>>> {
        let options = Options { precision, threads: self.threads, ..Options::for_evaluation(model.config()) };
        let found = detect_all(model, options, &self.paths)?;
        Ok(found.iter().map(|found| found.faces.iter().map(detection).collect()).collect())
    }

    /// The same, each with its picture.
    fn found(&self, model: &Model, precision: Precision) -> Result<Vec<Found>> {
        let all = self.paths.iter().zip(self.detections(model, precision)?);
        let found = all.flat_map(|(path, detections)| {
            let image = path.display().to_string();
            detections.into_iter().map(move |detection| Found { image: image.clone(), detection })
        });
        Ok(found.collect())
    }

    fn scores(&self, model: &Model, precision: Precision) -> Result<Scores> {
        let truth = match &self.faces {
            Faces::Annotated(truth) => truth,
            Faces::Own(faces) => {
                let report = voc::evaluate(faces, &self.found(model, precision)?, &mut |_, _| {});
                return Ok(vec![(OWN, report.ap_all_point)]);
            }
        };
        let mut predictions = Predictions::new();
        for (image, detections) in truth.images.iter().zip(self.detections(model, precision)?) {
            predictions.insert(&image.event, &image.stem, detections);
        }
        let report = Evaluator::new(truth, &predictions, &mut |_, _| {}).report()?;
        let named = [
            ("easy", report.easy),
            ("medium", report.medium),
            ("hard", report.hard),
            ("all", Some(report.all)),
        ];
        Ok(named.into_iter().filter_map(|(name, curve)| Some((name, curve?.ap))).collect())
    }
}

/// Most points of 100 that a subset loses.
fn loss(before: &Scores, after: &Scores) -> f64 {
    before.iter().zip(after).map(|((_, b), (_, a))| (b - a) * 100.0).fold(f64::NEG_INFINITY, f64::max)
}

pub fn run(args: &Args, out: &mut dyn Write) -> Result<Outcome> {
    if args.count == 0 {
        bail!("--count 0: ranges need at least one picture");
    }
    let threads = match args.threads {
        0 => std::thread::available_parallelism().map_or(1, |n| n.get()),
        n => n,
    };
    let in_file = || args.model.display().to_string();
    let weights = Weights::load(&args.model)?;
    let mut quantizer = Quantizer::new(&weights, threads).with_context(in_file)?;
    if let Some(unknown) = args.keep.iter().find(|k| !quantizer.layers().contains(&k.as_str())) {
        bail!("--keep {unknown}: no convolution of that name; `farface inspect` lists them");
    }
    let model = Model::from_weights(&weights)?;
    let annotated = Judge::annotated(args, &model, threads)?;
    let pictures = typical(args, annotated.as_ref())?;
    watch(&pictures, &mut quantizer, "equalizing")?;
    let mut quantizer = quantizer.equalized()?;
    watch(&pictures, &mut quantizer, "calibrating")?;
    let own = Judge::own(&model, pictures, threads)?;

    let keep: BTreeSet<String> = args.keep.iter().cloned().collect();
    let mut best = by_clip(args, &keep, &mut quantizer, own.as_ref())?;
    if let Some(judge) = &own {
        best = keep_what_is_worth_it(args, best, &mut quantizer, judge)?;
    }
    let judge = annotated.as_ref().or(own.as_ref());
    if annotated.is_some() || best.ranges.keep != keep {
        // To this judge, or without the layers that lost most, other ranges may be better.
        best = by_clip(args, &best.ranges.keep, &mut quantizer, judge)?;
    }
    if let Some(judge) = &annotated {
        best = keep_enough(args, best, &mut quantizer, judge)?;
    }
    let bytes = serialise(&quantizer.quantized(&best.ranges)?, args.f16).with_context(in_file)?;
    files::write_whole(&args.output, &bytes)?;
    report(args, &quantizer, &best, judge, bytes.len(), out)?;
    let too_much = annotated.is_some() && best.loss > args.max_loss;
    Ok(if too_much { Outcome::Partial } else { Outcome::Complete })
}

/// Ranges, and what they do.
struct Trial {
    clip: Clip,
    ranges: Ranges,
    noise: f64,
    /// Empty where nobody judges.
    scores: Scores,
    /// Most points of 100 that a subset loses; without a judge none.
    loss: f64,
}

impl Trial {
    fn new(clip: Clip, ranges: Ranges, quantizer: &mut Quantizer, judge: Option<&Judge>) -> Result<Self> {
        let noise = quantizer.noise(&ranges)?;
        let (mut scores, mut lost) = (Scores::new(), 0.0);
        if let Some(judge) = judge {
            scores = judge.scores(&Model::from_weights(&quantizer.quantized(&ranges)?)?, Precision::Int8)?;
            lost = loss(&judge.before, &scores);
        }
        Ok(Self { clip, ranges, noise, scores, loss: lost })
    }

    /// The same ranges with more layers in f32.
    fn keeping(&self, layers: &[String], quantizer: &mut Quantizer, judge: Option<&Judge>) -> Result<Self> {
        let mut ranges = self.ranges.clone();
        ranges.keep.extend(layers.iter().cloned());
        Self::new(self.clip, ranges, quantizer, judge)
    }

    /// By AP where there is any, else by the noise of the outputs.
    fn is_better(&self, other: &Self) -> bool {
        if self.scores.is_empty() {
            self.noise < other.noise
        } else {
            self.loss < other.loss
        }
    }
}

/// The best of the ways to clip, with these layers in f32.
fn by_clip(
    args: &Args,
    keep: &BTreeSet<String>,
    quantizer: &mut Quantizer,
    judge: Option<&Judge>,
) -> Result<Trial> {
    let clips = &args.clip.0;
    let bar = progress::bar(clips.len(), "clipping");
    let mut best: Option<Trial> = None;
    for &clip in clips {
        let ranges = Ranges { keep: keep.clone(), ..quantizer.ranges(clip)? };
        let trial = Trial::new(clip, ranges, quantizer, judge)?;
        if best.as_ref().is_none_or(|best| trial.is_better(best)) {
            best = Some(trial);
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    best.context("no ranges")
}

/// More layers in f32 as long as each saves [`WORTH_KEEPING`] of what is lost, down to what may be.
fn keep_what_is_worth_it(
    args: &Args,
    mut best: Trial,
    quantizer: &mut Quantizer,
    judge: &Judge,
) -> Result<Trial> {
    if best.loss <= args.max_loss {
        return Ok(best);
    }
    for layer in by_gain(quantizer, &best)? {
        let trial = best.keeping(&[layer], quantizer, Some(judge))?;
        if trial.loss > best.loss * (1.0 - WORTH_KEEPING) {
            break;
        }
        best = trial;
        if best.loss <= args.max_loss {
            break;
        }
    }
    Ok(best)
}

/// More layers in f32 until no more is lost than may be: one, then twice as many each time.
fn keep_enough(args: &Args, mut best: Trial, quantizer: &mut Quantizer, judge: &Judge) -> Result<Trial> {
    if best.loss <= args.max_loss {
        return Ok(best);
    }
    let order = by_gain(quantizer, &best)?;
    let mut count = 1;
    loop {
        let trial = best.keeping(&order[..count.min(order.len())], quantizer, Some(judge))?;
        let enough = trial.loss <= args.max_loss;
        if trial.is_better(&best) {
            best = trial;
        }
        if enough || count >= order.len() {
            return Ok(best);
        }
        count *= 2;
    }
}

/// The pictures that ranges are taken from, spread over all that there are.
fn typical(args: &Args, judge: Option<&Judge>) -> Result<Vec<PathBuf>> {
    let mut all = Vec::new();
    pictures_below(&args.data, &mut all)?;
    all.sort();
    if all.is_empty() {
        bail!("{}: no pictures there ({})", args.data.display(), farface::picture::FORMATS);
    }
    // What annotations judge should not have made the ranges.
    let judged: HashSet<&PathBuf> = judge.iter().flat_map(|j| &j.paths).collect();
    let others: Vec<&PathBuf> = all.iter().filter(|p| !judged.contains(p)).collect();
    let from: Vec<&PathBuf> = if others.is_empty() { all.iter().collect() } else { others };
    let count = args.count.min(from.len());
    Ok((0..count).map(|i| from[i * from.len() / count].clone()).collect())
}

/// Shows the quantizer its pictures.
fn watch(pictures: &[PathBuf], quantizer: &mut Quantizer, what: &'static str) -> Result<()> {
    let bar = progress::bar(pictures.len(), what);
    for path in pictures {
        let picture = Picture::open(path)?;
        quantizer.add(&picture.view()?).with_context(|| path.display().to_string())?;
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(())
}

fn pictures_below(folder: &Path, into: &mut Vec<PathBuf>) -> Result<()> {
    let in_folder = || folder.display().to_string();
    for entry in std::fs::read_dir(folder).with_context(in_folder)? {
        let entry = entry.with_context(in_folder)?;
        let path = entry.path();
        if entry.file_type().with_context(in_folder)?.is_dir() {
            pictures_below(&path, into)?;
        } else if farface::picture::is_picture(&path) {
            into.push(path);
        }
    }
    Ok(())
}

/// The layers by how much less noise the outputs have where one of them alone stays in f32, most first.
fn by_gain(quantizer: &mut Quantizer, of: &Trial) -> Result<Vec<String>> {
    let Trial { ranges, noise, .. } = of;
    let layers: Vec<String> = quantizer.layers().into_iter().map(String::from).collect();
    let bar = progress::bar(layers.len(), "layers");
    let mut gains = Vec::with_capacity(layers.len());
    for layer in layers.into_iter().filter(|l| !ranges.keep.contains(l)) {
        let mut without = ranges.clone();
        without.keep.insert(layer.clone());
        gains.push((noise - quantizer.noise(&without)?, layer));
        bar.inc(1);
    }
    bar.finish_and_clear();
    gains.sort_by(|a, b| b.0.total_cmp(&a.0));
    Ok(gains.into_iter().map(|(_, layer)| layer).collect())
}

fn report(
    args: &Args,
    quantizer: &Quantizer,
    trial: &Trial,
    judge: Option<&Judge>,
    bytes: usize,
    out: &mut dyn Write,
) -> Result<()> {
    let (layers, keep) = (quantizer.layers().len(), &trial.ranges.keep);
    let clip = clip_name(trial.clip);
    if args.json {
        let annotated = judge.filter(|j| matches!(j.faces, Faces::Annotated(_)));
        let ap = |scores: &Scores| {
            scores.iter().map(|(n, v)| (n.to_string(), json!(v))).collect::<serde_json::Map<_, _>>()
        };
        let own = if annotated.is_none() { trial.scores.first() } else { None };
        let value = json!({
            "output": args.output, "bytes": bytes, "pictures": quantizer.pictures(), "clip": clip,
            "output_noise": trial.noise, "convolutions": layers, "kept_in_f32": keep,
            "ap_before": annotated.map(|j| ap(&j.before)), "ap_after": annotated.map(|_| ap(&trial.scores)),
            "ap_of_own_faces": own.map(|(_, ap)| ap),
        });
        serde_json::to_writer_pretty(&mut *out, &value).map_err(std::io::Error::from)?;
        writeln!(out)?;
        return Ok(());
    }
    writeln!(out, "{}: {bytes} bytes", args.output.display())?;
    writeln!(out, "  ranges from {} pictures, {clip}", quantizer.pictures())?;
    let (count, noise) = (layers - keep.len(), trial.noise * 100.0);
    writeln!(out, "  {count} of {layers} convolutions in int8; noise of the outputs {noise:.1} %")?;
    keep.iter().try_for_each(|layer| writeln!(out, "  {layer} stays in f32"))?;
    let Some(judge) = judge else { return Ok(()) };
    if let Faces::Own(faces) = &judge.faces {
        let (n, ap) = (faces.len(), trial.scores[0].1);
        writeln!(out, "  AP {ap:.4} against the {n} faces that f32 finds on them (score above {OWN_SCORE})")?;
        return Ok(());
    }
    writeln!(out, "  {:<8} {:>8} {:>8} {:>8}", "AP", "before", "after", "points")?;
    for ((name, b), (_, a)) in judge.before.iter().zip(&trial.scores) {
        writeln!(out, "  {name:<8} {b:>8.4} {a:>8.4} {:>+8.2}", (a - b) * 100.0)?;
    }
    if trial.loss > args.max_loss {
        writeln!(out, "  more than {} points are lost whatever stays in f32", args.max_loss)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clips_have_names() {
        for name in ["extremes", "mse", "percentile:0.999"] {
            let Clips(clips) = parse_clips(name).unwrap();
            assert_eq!(clips.into_iter().map(clip_name).collect::<Vec<_>>(), [name]);
        }
        assert_eq!(parse_clips("auto").unwrap().0.len(), 5);
        for wrong in ["", "percentile", "percentile:", "percentile:0.5", "percentile:1.1", "percentile:nan"] {
            assert!(parse_clips(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_loss_is_that_of_the_subset_that_loses_most() {
        let before = vec![("hard", 0.8), ("all", 0.7)];
        assert!((loss(&before, &vec![("hard", 0.79), ("all", 0.71)]) - 1.0).abs() < 1e-9);
    }
}
