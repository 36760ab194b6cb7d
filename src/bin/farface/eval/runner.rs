//! Running a model over a data set: several sessions of one thread each.

use crate::model::ModelArg;
use crate::picture::{self, upright_face, Picture};
use crate::progress;
use crate::settings::Settings;
use anyhow::{bail, Context, Result};
use farface::detect::{Face, Model, Options, Session};
use farface::pixels::Size;
use indicatif::ProgressBar;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::Mutex;

/// A model run on the pictures of the data set.
#[derive(clap::Args)]
pub struct RunArgs {
    #[command(flatten)]
    model: ModelArg,
    /// Folder of the pictures to run the model on
    #[arg(long, value_name = "DIR")]
    pub images: Option<PathBuf>,
    /// Keep what the model finds, in the format that --results reads
    #[arg(long, value_name = "PATH", requires = "images")]
    pub save_results: Option<PathBuf>,
    #[command(flatten)]
    settings: Settings,
}

/// What a model found in a picture.
#[derive(Clone, Default)]
pub struct Found {
    /// Width and height of the upright picture.
    pub size: (u32, u32),
    /// Faces in its pixels.
    pub faces: Vec<Face>,
}

impl RunArgs {
    /// Faces of every picture, in the order of `names`, which are paths below the folder of
    /// pictures, with any extension or none. The threshold is the model's for evaluations.
    pub fn detect(&self, names: &[&str]) -> Result<Vec<Found>> {
        let Some(dir) = &self.images else { bail!("name the results, or the folder of pictures to run on") };
        let model = self.model.load()?;
        let paths = names.iter().map(|name| picture::find(&dir.join(name))).collect::<Result<Vec<_>>>()?;
        detect_all(&model, self.settings.evaluation_options(&model, 0), &paths)
    }
}

/// Faces of every picture, by as many sessions side by side as the options have threads.
pub fn detect_all(model: &Model, options: Options, paths: &[PathBuf]) -> Result<Vec<Found>> {
    let sessions = options.threads.min(paths.len());
    let options = Options { threads: 1, ..options };
    let bar = progress::bar(paths.len(), "detecting");
    let found = parallel(model, &options, sessions, paths, &bar);
    bar.finish_and_clear();
    found
}

/// Runs sessions side by side; the first error stops all.
fn parallel(
    model: &Model,
    options: &Options,
    sessions: usize,
    paths: &[PathBuf],
    bar: &ProgressBar,
) -> Result<Vec<Found>> {
    let (next, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
    let found = Mutex::new(vec![Found::default(); paths.len()]);
    let work = || -> Result<()> {
        let mut session = Session::with_options(model, options.clone())?;
        while !stop.load(Ordering::Relaxed) {
            let i = next.fetch_add(1, Ordering::Relaxed);
            let Some(path) = paths.get(i) else { break };
            let result = detect(&mut session, path)?;
            found.lock().unwrap_or_else(|e| e.into_inner())[i] = result;
            bar.inc(1);
        }
        Ok(())
    };
    let work = || work().inspect_err(|_| stop.store(true, Ordering::Relaxed));
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..sessions).map(|_| scope.spawn(work)).collect();
        let done = workers.into_iter().map(|w| w.join().unwrap_or_else(|p| std::panic::resume_unwind(p)));
        // Every worker is waited for before the first error counts.
        done.collect::<Vec<Result<()>>>().into_iter().collect::<Result<()>>()
    })?;
    Ok(found.into_inner().unwrap_or_else(|e| e.into_inner()))
}

fn detect(session: &mut Session, path: &Path) -> Result<Found> {
    let picture = Picture::open(path)?;
    let view = picture.view().with_context(|| path.display().to_string())?;
    let placement = view.placement();
    let Size { width, height } = view.upright_size();
    let faces = session.detect(&view).with_context(|| path.display().to_string())?;
    let faces = faces.iter().map(|f| upright_face(f, &placement)).collect();
    Ok(Found { size: (width as u32, height as u32), faces })
}
