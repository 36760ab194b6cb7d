//! `farface detect`: boxes of the faces in pictures, and pictures with the boxes drawn.

use crate::model::ModelArg;
use crate::picture::{upright_face, Picture};
use crate::settings::Settings;
use crate::{draw, progress, report, report_error, Outcome};
use anyhow::{bail, Context, Result};
use farface::detect::{Detection, Face, Session};
use farface::eval::wider::Predictions;
use farface::files;
use farface::pixels::Size;
use std::collections::HashSet;
use std::io::{Cursor, Write};
use std::path::{Path, PathBuf};

/// Find the faces in pictures
///
/// Prints the faces of every picture, best first. Boxes are in pixels of the upright picture (EXIF
/// orientation applied, as a viewer shows it), with the origin at the top left corner; a box may
/// reach past the border where the face does. With -o, a copy of every picture with the faces
/// drawn goes to a folder.
///
/// Reads PNG, JPEG, WebP and BMP. A picture that cannot be read is reported, the others are done,
/// and the exit code is 1.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  farface detect photo.jpg -o out
      prints the faces and draws them on out/photo.faces.png
  farface detect crowd.png --model m.safetensors --min-face 6 --threshold 0.3
      searches enlarged copies too, for faces from 6 pixels
  farface detect *.jpg --model m.safetensors --json > faces.jsonl
      one JSON object a line and picture
  farface detect images/*/*.jpg --model m.safetensors --wider -o results --threshold 0.02
      WIDER FACE result files results/<event>/<picture>.txt")]
pub struct Args {
    /// Pictures
    #[arg(required = true, value_name = "IMAGE")]
    images: Vec<PathBuf>,
    #[command(flatten)]
    model: ModelArg,
    /// Folder for the pictures with faces drawn (NAME.faces.png), made where it is missing
    #[arg(long, short, value_name = "DIR")]
    output: Option<PathBuf>,
    /// Write the score in percent on every box drawn
    #[arg(long, requires = "output")]
    labels: bool,
    /// Print a JSON object a picture, one a line
    #[arg(long, group = "format")]
    json: bool,
    /// Print CSV with a header, a line a face
    #[arg(long, group = "format")]
    csv: bool,
    /// Write WIDER FACE result files to the output folder, in a folder named after each picture's own
    #[arg(long, group = "format", requires = "output", conflicts_with = "labels")]
    wider: bool,
    #[command(flatten)]
    settings: Settings,
}

pub fn run(args: &Args, out: &mut dyn Write) -> Result<Outcome> {
    let model = args.model.load()?;
    let mut session = Session::with_options(&model, args.settings.options(&model, 0))?;
    let targets = Targets::new(args)?;
    if args.csv {
        report::csv_header(out)?;
    }
    let bar = progress::bar(args.images.len(), "detecting");
    let mut failed = 0;
    for (i, path) in args.images.iter().enumerate() {
        let found = one(&mut session, path, args, targets.0.get(i));
        match found {
            Ok((size, faces)) => bar.suspend(|| print(args, out, path, size, &faces))?,
            Err(e) => {
                failed += 1;
                bar.suspend(|| report_error(&e));
            }
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    if failed > 0 && args.images.len() > 1 {
        eprintln!("{failed} of {} pictures failed", args.images.len());
    }
    Ok(if failed == 0 { Outcome::Complete } else { Outcome::Partial })
}

/// Faces of one picture, drawn or written where asked for.
fn one(
    session: &mut Session,
    path: &Path,
    args: &Args,
    target: Option<&Target>,
) -> Result<(Size, Vec<Face>)> {
    let picture = Picture::open(path)?;
    let view = picture.view().with_context(|| path.display().to_string())?;
    let (size, placement) = (view.upright_size(), view.placement());
    let found = session.detect(&view).with_context(|| path.display().to_string())?;
    let faces: Vec<Face> = found.iter().map(|f| upright_face(f, &placement)).collect();
    match target {
        None => {}
        Some(Target::Drawing(file)) => {
            let mut canvas = picture.into_upright();
            draw::faces(&mut canvas, &faces, args.labels);
            let mut png = Cursor::new(Vec::new());
            canvas.write_to(&mut png, image::ImageFormat::Png).with_context(|| file.display().to_string())?;
            files::write_whole(file, png.get_ref())?;
        }
        Some(Target::Wider { dir, event, stem }) => {
            let mut one = Predictions::new();
            let detection = |f: &Face| Detection { bbox: f.bbox, score: f.score };
            one.insert(event, stem, faces.iter().map(detection).collect());
            one.write(dir, &mut |_, _| {})?;
        }
    }
    Ok((size, faces))
}

fn print(args: &Args, out: &mut dyn Write, path: &Path, size: Size, faces: &[Face]) -> Result<()> {
    match (args.json, args.csv) {
        (true, _) => report::json_line(out, path, size, faces)?,
        (_, true) => report::csv(out, path, faces)?,
        _ if args.wider => {}
        _ => report::text(out, path, size, faces)?,
    }
    // A reader of the pipe sees each picture when it is done.
    Ok(out.flush()?)
}

/// Where the result of a picture goes.
enum Target {
    Drawing(PathBuf),
    Wider { dir: PathBuf, event: String, stem: String },
}

/// One a picture, in order; empty without an output folder.
struct Targets(Vec<Target>);

impl Targets {
    fn new(args: &Args) -> Result<Self> {
        let Some(dir) = &args.output else { return Ok(Self(Vec::new())) };
        files::make_dir(dir)?;
        let mut taken = HashSet::new();
        let target = |path: &PathBuf| -> Result<Target> {
            let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            if args.wider {
                let event = event(path)?;
                if !taken.insert(format!("{event}/{stem}")) {
                    bail!("{}: a second picture for the result file {event}/{stem}.txt", path.display());
                }
                return Ok(Target::Wider { dir: dir.clone(), event, stem });
            }
            // Pictures of one name from several folders are numbered.
            let names = std::iter::once(stem.clone()).chain((2..).map(|n| format!("{stem}-{n}")));
            let name = names.into_iter().find(|n| taken.insert(n.clone())).unwrap_or_default();
            Ok(Target::Drawing(dir.join(format!("{name}.faces.png"))))
        };
        Ok(Self(args.images.iter().map(target).collect::<Result<_>>()?))
    }
}

/// Name of the folder that a picture lies in: its event in WIDER FACE.
fn event(path: &Path) -> Result<String> {
    let absolute = std::path::absolute(path).with_context(|| path.display().to_string())?;
    let folder = absolute.parent().and_then(Path::file_name);
    let folder =
        folder.with_context(|| format!("{}: lies in no folder to name the event", path.display()))?;
    Ok(folder.to_string_lossy().into_owned())
}
