//! One training from recipe to model file.

mod build;
mod engine;
mod judge;
mod ranks;
mod resume;

use super::data::Dataset;
use super::dev::{Dev, DevScore};
use super::loader::{Batch, Loader, LoaderConfig, Sides};
use super::losses::ClassLoss;
use super::network::{Engine, InputTable, Update, Updated};
use super::objective::{DetectorObjective, Losses, PyramidAnchors, SecondLook};
use super::optim::{Ema, Optimizer, Schedule};
use super::ranks::Ranks;
use super::recipe::Recipe;
use crate::detect::config::METADATA_KEY;
use crate::detect::{Model, ModelConfig};
use crate::error::{Error, Result};
use crate::files::write_durably;
use crate::graph::Weights;
use crate::shape::Shape;
use std::collections::HashSet;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What the machine gives. Threads and workers do not change the result; a device changes its last bits.
#[derive(Clone, Debug)]
pub struct Resources {
    /// The CUDA device that the network is on, by its number; on the CPU without one.
    pub device: Option<u32>,
    /// Threads of the network; at least 1.
    pub threads: usize,
    /// Threads that decode and augment; at least 1.
    pub workers: usize,
}

/// A training in progress.
pub struct Trainer {
    recipe: Recipe,
    text: String,
    base: PathBuf,
    config: ModelConfig,
    engine: Box<dyn Engine>,
    objective: DetectorObjective,
    pyramid_anchors: Vec<PyramidAnchors>,
    second_look: Option<SecondLook>,
    optimizer: Optimizer,
    schedule: Schedule,
    ema: Option<Ema>,
    table: InputTable,
    dataset: Arc<Dataset>,
    resources: Resources,
    /// The processes that train together, where this is one of several.
    ranks: Option<Arc<Ranks>>,
    /// This one's examples of every batch.
    part: Range<usize>,
    loader: Option<Loader>,
    step: u64,
    best: Option<(f64, u64)>,
    notes: Vec<String>,
}

/// What a step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepReport {
    /// Steps done, this one counted.
    pub step: u64,
    /// Passes over the data so far.
    pub epoch: f64,
    /// Side of the examples.
    pub side: usize,
    /// Losses and counts.
    pub losses: Losses,
    /// Classification plus weighted box loss.
    pub loss: f64,
    /// Norm of the gradient before it was clipped.
    pub gradient_norm: f64,
    /// Learning rate.
    pub lr: f32,
}

impl Trainer {
    /// A training of the recipe `text`, whose relative paths start at `base`.
    pub fn new(text: &str, base: &Path, resources: Resources) -> Result<Self> {
        Self::build(text, base, resources, true, None)
    }

    /// A training of the recipe `text` that goes on from a checkpoint. The recipe's start is not read.
    pub fn from_checkpoint(text: &str, base: &Path, resources: Resources, path: &Path) -> Result<Self> {
        let mut trainer = Self::build(text, base, resources, false, None)?;
        trainer.resume(path)?;
        Ok(trainer)
    }

    /// The recipe.
    pub fn recipe(&self) -> &Recipe {
        &self.recipe
    }

    /// Training pictures and what was wrong with them.
    pub fn dataset(&self) -> &Dataset {
        &self.dataset
    }

    /// What its user should know of how it began.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Steps done.
    pub fn step_count(&self) -> u64 {
        self.step
    }

    /// Steps of the whole training.
    pub fn total_steps(&self) -> u64 {
        self.schedule.total_steps()
    }

    /// Steps an epoch.
    pub fn steps_per_epoch(&self) -> f64 {
        self.dataset.samples.len() as f64 / self.recipe.batch.size as f64
    }

    /// Trained values and multiply-adds at 640x480 of what it makes (those of the first stage), and precision of the maps.
    pub fn describe(&self) -> Result<(usize, u64, &'static str)> {
        let detector = self.config.detector.detector();
        let graph = detector.graph();
        let second = detector.second_stage().map_or(0, |s| s.graph.param_count());
        let macs = graph.macs(&[Shape::new(1, 3, 480, 640)])?;
        Ok((graph.param_count() + second, macs, self.engine.precision()))
    }

    /// Whose kernels it runs on.
    pub fn machine(&self) -> String {
        self.engine.machine()
    }

    /// One step.
    pub fn step(&mut self) -> Result<StepReport> {
        let batch = self.loader()?.next()?;
        let lr = self.schedule.lr(self.step);
        let side = batch.side;
        let (losses, gradient_norm) = self.learn(&batch, lr)?;
        if let Some(loader) = &self.loader {
            loader.recycle(batch);
        }
        self.step += 1;
        if self.step.is_multiple_of(self.recipe.run.checkpoint_every) || self.step == self.total_steps() {
            self.compare()?;
        }
        Ok(StepReport {
            step: self.step,
            epoch: self.step as f64 / self.steps_per_epoch(),
            side,
            losses,
            loss: losses.class + f64::from(self.recipe.loss.box_weight) * losses.boxes,
            gradient_norm,
            lr,
        })
    }

    fn loader(&mut self) -> Result<&Loader> {
        if self.loader.is_none() {
            let (recipe, total) = (self.recipe.clone(), self.total_steps());
            let config = LoaderConfig {
                seed: self.recipe.run.seed,
                batch: self.recipe.batch.size,
                part: self.part.clone(),
                side: Sides::by_step(move |step| recipe.side(step, total)),
                workers: self.resources.workers.max(1),
                queue: 2 + self.resources.workers,
                cache_bytes: (self.recipe.data.cache_gb * 1e9) as usize / self.sharers(),
                start_step: self.step,
            };
            self.loader = Some(Loader::new(self.dataset.clone(), self.recipe.augment.clone(), config)?);
        }
        self.loader.as_ref().ok_or_else(|| Error::Internal("no loader".into()))
    }

    fn learn(&mut self, batch: &Batch, lr: f32) -> Result<(Losses, f64)> {
        let shape = Shape::new(batch.faces.len(), 3, batch.side, batch.side);
        let (losses, d) = match self.judge_on_device(batch, shape)? {
            Some(losses) => (losses, None),
            None => self.judge_on_host(batch, shape).map(|(losses, d)| (losses, Some(d)))?,
        };
        let losses = self.of_all_ranks(losses)?;
        let step = self.step;
        let stop = |what: &str| {
            Err(Error::InvalidData(format!(
                "training stopped at step {step}: {what}. Checkpoints made before it are sound. The batch's pictures: {}",
                batch.names.join(", ")
            )))
        };
        if !(losses.class.is_finite() && losses.boxes.is_finite()) {
            return stop("the loss is not a finite number (a lower learning rate or clip may help)");
        }
        match d {
            Some(d) => self.engine.backward(&d)?,
            None => self.engine.backward_judged()?,
        }
        let update = Update {
            optimizer: &mut self.optimizer,
            average: self.ema.as_mut(),
            clip: self.recipe.run.clip,
            lr,
        };
        match self.engine.update(update)? {
            Updated::Done { norm } => Ok((losses, norm)),
            Updated::NotFinite { param } => {
                let name = &self.engine.graph().params[param].name;
                stop(&format!("the gradient of {name} is not finite"))
            }
        }
    }

    /// The model as it is now: averaged weights where there are averages, with the configuration.
    pub fn model(&mut self) -> Result<Weights> {
        self.check_finite()?;
        let mut weights = Weights::default();
        let values = match &self.ema {
            Some(ema) => ema.average.clone(),
            None => self.engine.params()?.to_vec(),
        };
        // What training alone needs is left out.
        let detector = self.config.detector.detector();
        let graphs = [Some(detector.graph()), detector.second_stage().map(|s| s.graph)];
        let params = graphs.iter().flatten().flat_map(|g| &g.params);
        let kept: HashSet<&str> = params.map(|p| p.name.as_str()).collect();
        for (p, v) in self.engine.graph().params.iter().zip(values) {
            if kept.contains(p.name.as_str()) {
                weights.insert(&p.name, &p.shape, v);
            }
        }
        let mut config = self.config.clone();
        if let Some(threshold) = self.recipe.model.score_threshold {
            config.score_threshold = threshold;
        } else if !matches!(self.recipe.loss.classification, ClassLoss::QualityFocal { .. }) {
            // The detector's own is for scores that tell how well a box fits; these are probabilities.
            config.score_threshold = 0.5;
        }
        config.licence = self.recipe.model.licence.clone();
        config.data = self.recipe.model.data.clone();
        config.recipe = self.text.clone();
        weights.metadata.insert(METADATA_KEY.into(), config.to_json()?);
        Ok(weights)
    }

    /// The dev pictures of the recipe.
    pub fn dev(&self) -> Result<Option<Dev>> {
        self.recipe.data.dev.as_ref().map(|d| Dev::load(d, &self.base)).transpose()
    }

    /// Scores the model as it is; where it is the best so far, writes it to `best`.
    pub fn evaluate(
        &mut self,
        dev: &Dev,
        best: &Path,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<DevScore> {
        let weights = self.model()?;
        let model = Model::from_weights(&weights)?;
        let score = dev.score(&model, self.engine.threads(), progress)?;
        if self.best.is_none_or(|(b, _)| score.mean() > b) {
            self.best = Some((score.mean(), self.step));
            write_durably(best, &weights.to_bytes()?)?;
        }
        Ok(score)
    }

    /// Mean dev score of the best model so far, and its step.
    pub fn best(&self) -> Option<(f64, u64)> {
        self.best
    }
}
