//! One training from recipe to model file.

use super::checkpoint::{Checkpoint, Setting};
use super::data::Dataset;
use super::dev::{Dev, DevScore};
use super::loader::{Batch, Loader, LoaderConfig, Sides};
use super::network::{Engine, Frozen, InputTable, Network};
use super::objective::{Level, Losses, Objective};
use super::optim::{clip_global_norm, first_non_finite, global_norm, Ema, Optimizer, ParamOptions, Schedule};
use super::recipe::{Precision, Recipe};
use crate::cpu::dense::bf16_supported;
use crate::detect::config::{DetectorConfig, METADATA_KEY};
use crate::detect::detector::Detector;
use crate::detect::{Model, ModelConfig};
use crate::error::{Error, Result};
use crate::files::write_durably;
use crate::graph::build::ParamRole;
use crate::graph::init::Rng;
use crate::graph::Weights;
use crate::pixels::ChannelOrder;
use crate::shape::Shape;
use half::bf16;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Probability that new logits say.
const PRIOR: f32 = 0.01;

/// What the machine gives: it does not change the result but for the threads, on which the last bits depend.
#[derive(Clone, Debug)]
pub struct Resources {
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
    objective: Objective,
    optimizer: Optimizer,
    schedule: Schedule,
    ema: Option<Ema>,
    table: InputTable,
    dataset: Arc<Dataset>,
    resources: Resources,
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
        Self::build(text, base, resources, true)
    }

    /// A training of the recipe `text` that goes on from a checkpoint. The recipe's start is not read.
    pub fn from_checkpoint(text: &str, base: &Path, resources: Resources, path: &Path) -> Result<Self> {
        let mut trainer = Self::build(text, base, resources, false)?;
        trainer.resume(path)?;
        Ok(trainer)
    }

    fn build(text: &str, base: &Path, resources: Resources, from_start: bool) -> Result<Self> {
        let recipe = Recipe::parse(text)?;
        let config = ModelConfig::named(&recipe.model.detector).ok_or_else(|| {
            Error::InvalidArgument(format!(
                "model.detector {:?} is not one of {}",
                recipe.model.detector,
                ModelConfig::NAMES.join(", ")
            ))
        })?;
        let DetectorConfig::Pyramid(detector) = &config.detector else {
            return Err(Error::Unsupported(format!(
                "{} cannot be trained: its landmarks have no loss here",
                recipe.model.detector
            )));
        };
        let graph = detector.graph();
        let mut start = Weights::default();
        let mut notes = Vec::new();
        if let Some(path) = recipe.model.start.as_ref().filter(|_| from_start) {
            let file = Weights::load(base.join(path))?;
            for (name, tensor) in file.tensors {
                // A training's checkpoint: its parameters (averages and optimiser buffers are named otherwise).
                let name = name.strip_prefix("param/").unwrap_or(&name);
                start.tensors.insert(format!("{}{name}", recipe.model.start_prefix), tensor);
            }
            if !graph.params.iter().any(|p| start.tensors.contains_key(&p.name)) {
                return Err(Error::InvalidArgument(format!(
                    "model.start {}: no tensor is named as one of the network (with start-prefix {:?})",
                    path.display(),
                    recipe.model.start_prefix
                )));
            }
            let found = graph.params.iter().filter(|p| start.tensors.contains_key(&p.name)).count();
            notes.push(format!("{found} of {} tensors from {}", graph.params.len(), path.display()));
            for p in &graph.params {
                if let Some(t) = start.tensors.get(&p.name).filter(|t| t.shape != p.shape) {
                    return Err(Error::InvalidArgument(format!(
                        "model.start {}: {} has shape {:?}, the network needs {:?}",
                        path.display(),
                        p.name,
                        t.shape,
                        p.shape
                    )));
                }
            }
        }
        let mut weights = start.completed(&graph, recipe.run.seed);
        if !start.tensors.contains_key("predict6.weight") {
            detector.set_prior(&mut weights, PRIOR);
        }
        let frozen = Frozen {
            parameters: recipe.model.freeze.clone(),
            statistics: recipe.model.freeze_statistics.clone(),
        };
        let half = match recipe.run.precision {
            Precision::F32 => false,
            Precision::Auto => bf16_supported(),
            Precision::Bf16 if bf16_supported() => true,
            Precision::Bf16 => {
                return Err(Error::Unsupported(
                    "run.precision bf16: this CPU has no AMX; take f32 or auto".into(),
                ))
            }
        };
        let levels =
            detector.levels().map(|(stride, anchors)| Level { stride, anchors: anchors.to_vec() }).collect();
        let objective = Objective {
            levels,
            variances: detector.variances,
            matching: recipe.matching,
            mining: recipe.mining,
            sampler: recipe.sampler.unwrap_or_default(),
            loss: recipe.loss,
        };
        objective.check()?;
        let threads = resources.threads.max(1);
        let mut engine: Box<dyn Engine> = if half {
            Box::new(Network::<bf16>::new(graph, &weights, &frozen, threads)?)
        } else {
            Box::new(Network::<f32>::new(graph, &weights, &frozen, threads)?)
        };
        for prefix in recipe.model.learning_rate.keys() {
            if !engine.graph().params.iter().any(|p| p.name.starts_with(prefix.as_str())) {
                return Err(Error::InvalidArgument(format!(
                    "model.learning-rate: no parameter's name begins with {prefix:?}"
                )));
            }
        }
        let optimizer = Optimizer::new(recipe.optimizer, options(&recipe, &*engine))?;
        let dataset = Arc::new(Dataset::load(&recipe.data.train, base)?);
        let schedule = recipe.schedule.schedule(dataset.samples.len() as f64 / recipe.batch.size as f64)?;
        let ema = recipe.ema.map(|e| Ema::new(e, engine.params())).transpose()?;
        let table = input_table(&config)?;
        Ok(Self {
            text: text.into(),
            base: base.into(),
            config,
            engine,
            objective,
            optimizer,
            schedule,
            ema,
            table,
            dataset,
            resources,
            loader: None,
            step: 0,
            best: None,
            notes,
            recipe,
        })
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

    /// Trained values, multiply-adds at 640x480, and precision of the maps.
    pub fn describe(&self) -> Result<(usize, u64, &'static str)> {
        let graph = self.engine.graph();
        Ok((graph.param_count(), graph.macs(&[Shape::new(1, 3, 480, 640)])?, self.engine.precision()))
    }

    fn setting(&self) -> Setting {
        let mut data = 0xcbf2_9ce4_8422_2325_u64;
        let mut add = |bytes: &[u8]| {
            bytes.iter().for_each(|&b| data = (data ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
        };
        for sample in &self.dataset.samples {
            add(sample.name.as_bytes());
            for face in &sample.faces {
                let b = face.bbox;
                [b.x1, b.y1, b.x2, b.y2].iter().for_each(|v| add(&v.to_le_bytes()));
                add(&[u8::from(face.ignore)]);
            }
        }
        Setting {
            precision: self.engine.precision().into(),
            threads: self.engine.threads(),
            pictures: self.dataset.samples.len(),
            data,
        }
    }

    /// Goes on from a checkpoint of the same recipe, on the same pictures and in the same precision. On another number of
    /// threads the last bits differ, which [`Trainer::notes`] then tells.
    pub fn resume(&mut self, path: &Path) -> Result<()> {
        let c = Checkpoint::load(self.engine.graph(), path)?;
        if c.recipe != self.text {
            return Err(Error::InvalidArgument(format!(
                "{}: belongs to another recipe; recipe.toml beside it is a copy of its own, whose text the given one must have",
                path.display()
            )));
        }
        let (was, is) = (&c.setting, self.setting());
        let differs = |what: String| Err(Error::InvalidArgument(format!("{}: {what}", path.display())));
        if was.precision != is.precision {
            return differs(format!(
                "trained in {}, this machine would go on in {}",
                was.precision, is.precision
            ));
        }
        if (was.pictures, was.data) != (is.pictures, is.data) {
            return differs(format!(
                "trained on {} pictures, now there are {}, or their names or boxes changed",
                was.pictures, is.pictures
            ));
        }
        if was.threads != is.threads {
            self.notes.push(format!(
                "{} threads before, {} now: the last bits will differ from those of a run that was not stopped",
                was.threads, is.threads
            ));
        }
        self.engine.params().clone_from_slice(&c.params);
        self.optimizer.load(&c.optimizer)?;
        match (&mut self.ema, c.average) {
            (Some(ema), Some((updates, average))) => (ema.updates, ema.average) = (updates, average),
            (None, None) => {}
            _ => return Err(Error::InvalidData(format!("{}: its averages do not fit", path.display()))),
        }
        (self.step, self.best, self.loader) = (c.step, c.best, None);
        Ok(())
    }

    /// Writes a checkpoint.
    pub fn save(&mut self, path: &Path) -> Result<()> {
        self.check_finite()?;
        let checkpoint = Checkpoint {
            setting: self.setting(),
            step: self.step,
            params: self.engine.params().to_vec(),
            average: self.ema.as_ref().map(|e| (e.updates, e.average.clone())),
            optimizer: self.optimizer.save(),
            best: self.best,
            recipe: self.text.clone(),
        };
        checkpoint.save(self.engine.graph(), path)
    }

    /// Errors where a parameter, an average or the optimiser's state is no finite number: such a checkpoint or model could
    /// not be read again, and must not take the place of a sound one.
    fn check_finite(&mut self) -> Result<()> {
        let names: Vec<String> = self.engine.graph().params.iter().map(|p| p.name.clone()).collect();
        let average = self.ema.as_ref().map(|e| &e.average[..]).unwrap_or_default();
        let params = self.engine.params().iter().zip(&names).chain(average.iter().zip(&names));
        let bad = |v: &[f32]| !v.iter().all(|v| v.is_finite());
        let mut broken = params.filter(|(v, _)| bad(v)).map(|(_, name)| name.clone()).next();
        if broken.is_none() {
            broken = self.optimizer.save().buffers.into_iter().find(|(_, v)| bad(v)).map(|(name, _)| name);
        }
        broken.map_or(Ok(()), |name| {
            Err(Error::InvalidData(format!(
                "training stopped at step {}: {name} is no longer finite (a lower learning rate or clip may help). The last checkpoint is sound",
                self.step
            )))
        })
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
                side: Sides::by_step(move |step| recipe.side(step, total)),
                workers: self.resources.workers.max(1),
                queue: 2 + self.resources.workers,
                cache_bytes: (self.recipe.data.cache_gb * 1e9) as usize,
                start_step: self.step,
            };
            self.loader = Some(Loader::new(self.dataset.clone(), self.recipe.augment.clone(), config)?);
        }
        self.loader.as_ref().ok_or_else(|| Error::Internal("no loader".into()))
    }

    fn learn(&mut self, batch: &Batch, lr: f32) -> Result<(Losses, f64)> {
        let shape = Shape::new(batch.faces.len(), 3, batch.side, batch.side);
        let outputs = self.engine.forward(&batch.pixels, shape, &self.table)?;
        let (seed, step) = (self.recipe.run.seed, self.step);
        let rng = |n: usize| Rng::new(Rng::new(seed ^ step.rotate_left(32)).bits() ^ n as u64);
        let (losses, d) = self.objective.judge(&outputs, &batch.faces, rng, self.engine.threads())?;
        let stop = |what: &str| {
            Err(Error::InvalidData(format!(
                "training stopped at step {step}: {what}. Checkpoints made before it are sound. The batch's pictures: {}",
                batch.names.join(", ")
            )))
        };
        if !(losses.class.is_finite() && losses.boxes.is_finite()) {
            return stop("the loss is not a finite number (a lower learning rate or clip may help)");
        }
        self.engine.backward(&d)?;
        let (params, grads) = self.engine.params_and_grads();
        if let Some((p, _)) = first_non_finite(grads) {
            let name = self.engine.graph().params[p].name.clone();
            return stop(&format!("the gradient of {name} is not finite"));
        }
        let mut grads: Vec<&mut [f32]> = grads.iter_mut().map(|g| &mut g[..]).collect();
        let norm = if self.recipe.run.clip > 0.0 {
            clip_global_norm(&mut grads, self.recipe.run.clip)
        } else {
            global_norm(&grads)
        };
        let grads: Vec<&[f32]> = grads.iter().map(|g| &**g).collect();
        let mut values: Vec<&mut [f32]> = params.iter_mut().map(|p| &mut p[..]).collect();
        self.optimizer.step(&mut values, &grads, lr)?;
        if let Some(ema) = &mut self.ema {
            ema.update(self.engine.params())?;
        }
        Ok((losses, norm))
    }

    /// The model as it is now: averaged weights where there are averages, with the configuration.
    pub fn model(&mut self) -> Result<Weights> {
        self.check_finite()?;
        let mut weights = Weights::default();
        let values = match &self.ema {
            Some(ema) => ema.average.clone(),
            None => self.engine.params().to_vec(),
        };
        for (p, v) in self.engine.graph().params.iter().zip(values) {
            weights.insert(&p.name, &p.shape, v);
        }
        let mut config = self.config.clone();
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

/// What the optimiser does with each parameter: statistics and frozen ones stand still; biases and normalisations do
/// not decay.
fn options(recipe: &Recipe, engine: &dyn Engine) -> Vec<ParamOptions> {
    let graph = engine.graph();
    let trainable = engine.trainable();
    graph
        .params
        .iter()
        .zip(trainable)
        .map(|(p, &trainable)| {
            let fits = |(prefix, _): &(&String, &f32)| p.name.starts_with(prefix.as_str());
            let longest =
                recipe.model.learning_rate.iter().filter(fits).max_by_key(|(prefix, _)| prefix.len());
            ParamOptions {
                lr_multiplier: longest.map_or(1.0, |(_, m)| *m),
                decay: matches!(p.role, ParamRole::Weight { .. }),
                frozen: !trainable,
                ..ParamOptions::new(p.name.clone(), p.len())
            }
        })
        .collect()
}

fn input_table(config: &ModelConfig) -> Result<InputTable> {
    let n = config.input.normalization()?;
    let channel = match n.order {
        ChannelOrder::Rgb => [0, 1, 2],
        ChannelOrder::Bgr => [2, 1, 0],
    };
    let value = std::array::from_fn(|i| (0..256).map(|v| (v as f32 - n.mean[i]) * n.scale[i]).collect());
    Ok(InputTable { channel, value })
}
