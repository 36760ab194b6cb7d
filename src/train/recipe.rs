//! A training recipe: one TOML file that says all there is to say. Unknown keys are errors.

use super::augment::Augment;
use super::data::Source;
use super::losses::LossRecipe;
use super::matching::{AnchorMining, MatchingRecipe};
use super::objective::second_look::{FastRcnnRecipe, FeatureSupervisionRecipe};
use super::optim::{EmaRecipe, OptimizerRecipe, ScheduleRecipe};
use super::sampler::SamplerRecipe;
use crate::error::{Error, Result};
use crate::nets::mobilenet::BlockStack;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// The whole recipe.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Recipe {
    /// What is trained.
    pub model: ModelRecipe,
    /// On what.
    pub data: DataRecipe,
    /// Batches.
    #[serde(default)]
    pub batch: BatchRecipe,
    /// Augmentation.
    #[serde(default)]
    pub augment: Augment,
    /// Anchors to faces; without this table the two-pass scan, for RefineFace thresholds 0.4 and 0.5.
    #[serde(default)]
    pub matching: Option<MatchingRecipe>,
    /// Likewise in the first step of RefineFace, `matching` being its second's; default thresholds 0.3 and 0.7.
    #[serde(default)]
    pub first_matching: Option<MatchingRecipe>,
    /// Online anchor mining; none without this table.
    #[serde(default)]
    pub mining: Option<AnchorMining>,
    /// Which anchors enter the loss; not for the losses that take all. Without this table the focal loss takes all, softmax and
    /// sigmoid those of the sampler's defaults.
    #[serde(default)]
    pub sampler: Option<SamplerRecipe>,
    /// Losses.
    pub loss: LossRecipe,
    /// Pyramid anchors, for HAMBox; none without this table.
    #[serde(default)]
    pub pyramid_anchors: Option<PyramidAnchorsRecipe>,
    /// The feature supervision module, for RefineFace; none without this table.
    #[serde(default)]
    pub feature_supervision: Option<FeatureSupervisionRecipe>,
    /// How the second stage is trained, for detectors that have one; its defaults without this table.
    #[serde(default)]
    pub second_stage: Option<FastRcnnRecipe>,
    /// Update rule.
    #[serde(default)]
    pub optimizer: OptimizerRecipe,
    /// Learning rate and length.
    pub schedule: ScheduleRecipe,
    /// Averaged weights, which are what is evaluated and exported; the last ones without this table.
    #[serde(default)]
    pub ema: Option<EmaRecipe>,
    /// How it runs.
    #[serde(default)]
    pub run: RunRecipe,
}

/// The network, and where its weights start.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct ModelRecipe {
    /// A detector by name, as `farface convert --detector` takes it.
    pub detector: String,
    /// Channels of the backbone's first convolution instead of the detector's; farface-nano's and farface-small's backbone then is
    /// MobileNet-V1 of that width.
    #[serde(default)]
    pub width: Option<usize>,
    /// Of farface-nano and farface-small, the backbone's blocks instead of the detector's:
    /// `backbone = { first = 16, blocks = [[16], [64, 64], [64, 64], [128, 128], [256]] }`.
    #[serde(default)]
    pub backbone: Option<BlockStack>,
    /// Channels of pyramid and head instead of the detector's; a second stage is made four times as wide.
    #[serde(default)]
    pub channels: Option<usize>,
    /// For HR, templates of one's own: a table as `farface cluster` writes it.
    #[serde(default)]
    pub templates: Option<PathBuf>,
    /// Weights to start from, safetensors: a model, or a training's checkpoint, whose averages are taken where it has any.
    /// What it lacks comes from `start-rest` where there is one, else it starts at random.
    #[serde(default)]
    pub start: Option<PathBuf>,
    /// Of farface-nano and farface-small, tensors of the start that are smaller than the network's become the first part of
    /// them; the rest is new. What was there before sees new channels by this share, 0 to 1, of the weights that a new layer
    /// has: by 0 the network begins with the outputs of the smaller one, by more its new channels learn at once. Layers are
    /// found by name, so the start must have as many blocks at each stride. Without this smaller tensors are an error.
    #[serde(default)]
    pub grow: Option<f32>,
    /// Put before the names in the start's file.
    #[serde(default)]
    pub start_prefix: String,
    /// Of that file only the tensors whose names, with the prefix, begin so; all without this.
    #[serde(default)]
    pub start_only: Vec<String>,
    /// A second file, its names as they are, for what the start does not give: a backbone from one model, what follows it
    /// from another. `grow` goes for it, too.
    #[serde(default)]
    pub start_rest: Option<PathBuf>,
    /// Parameters whose names begin so are not trained; a batch normalisation whose running mean is among them keeps its
    /// statistics.
    #[serde(default)]
    pub freeze: Vec<String>,
    /// Batch normalisations whose names begin so keep their statistics.
    #[serde(default)]
    pub freeze_statistics: Vec<String>,
    /// Learning-rate multipliers by the beginning of a parameter's name; the longest that fits counts.
    #[serde(default)]
    pub learning_rate: std::collections::BTreeMap<String, f32>,
    /// Score from which the result reports a face; without it the detector's own after a quality focal loss, 0.5 after
    /// another.
    #[serde(default)]
    pub score_threshold: Option<f32>,
    /// Licence of the result, for its metadata.
    #[serde(default)]
    pub licence: String,
    /// What it was trained on, for its metadata.
    #[serde(default)]
    pub data: String,
}

/// Outputs for what surrounds a face, which training alone has: see [`super::objective::PyramidAnchors`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct PyramidAnchorsRecipe {
    /// How many: 1 for the head, twice a face's size, 2 for the body, too, four times its size, 3 for what is eight times as
    /// large; default 2.
    pub count: usize,
    /// Weight of the first one's losses; its square weighs the second's, its cube the third's; default 0.5.
    pub weight: f32,
}

impl Default for PyramidAnchorsRecipe {
    fn default() -> Self {
        Self { count: 2, weight: 0.5 }
    }
}

/// Pictures to train on and to choose by.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct DataRecipe {
    /// Training pictures.
    pub train: Vec<Source>,
    /// Pictures for choosing the best weights.
    #[serde(default)]
    pub dev: Option<DevRecipe>,
    /// Decoded pictures are kept in memory up to this many gigabytes; default 2.
    #[serde(default = "cache")]
    pub cache_gb: f64,
}

/// A WIDER FACE list to evaluate on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct DevRecipe {
    /// Text list of the pictures.
    pub list: PathBuf,
    /// Folder of the event folders. All pictures stay in memory, decoded, beside `cache-gb`.
    pub images: PathBuf,
    /// Folder of the evaluator's .mat files, for Easy, Medium and Hard; without it the AP over all faces alone.
    #[serde(default)]
    pub ground_truth: Option<PathBuf>,
    /// Evaluated every so many epochs; default 10.
    #[serde(default = "every")]
    pub every_epochs: f64,
}

fn cache() -> f64 {
    2.0
}
fn every() -> f64 {
    10.0
}

/// Batches.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct BatchRecipe {
    /// Examples a step; default 16.
    pub size: usize,
    /// Side of the examples over the training: each for a share of it. Default 320 throughout.
    pub sides: Vec<SideStage>,
}

impl Default for BatchRecipe {
    fn default() -> Self {
        Self { size: 16, sides: vec![SideStage { side: 320, share: 1.0 }] }
    }
}

/// Part of a training with examples of one size.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SideStage {
    /// Pixels, a multiple of 32.
    pub side: usize,
    /// Share of the steps.
    pub share: f64,
}

/// How it runs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct RunRecipe {
    /// Seed of all chance; default 1.
    pub seed: u64,
    /// `f32`, `bf16` (AMX or AVX512-BF16) or `auto`, the default: bf16 where the CPU has it.
    pub precision: Precision,
    /// Gradients are scaled down to this norm; 0 is off. Default 10.
    pub clip: f32,
    /// A checkpoint every so many steps; default 500.
    pub checkpoint_every: u64,
    /// A line in the log every so many steps; default 50.
    pub log_every: u64,
}

impl Default for RunRecipe {
    fn default() -> Self {
        Self { seed: 1, precision: Precision::Auto, clip: 10.0, checkpoint_every: 500, log_every: 50 }
    }
}

/// How maps are stored and multiplied; parameters are f32 always.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Precision {
    /// bf16 where the CPU, or the device, multiplies it, else f32.
    Auto,
    /// f32.
    F32,
    /// bf16 on AMX, AVX512-BF16 or a CUDA device of compute capability 8.0 or later; an error elsewhere.
    Bf16,
}

impl Recipe {
    /// Reads a recipe; errors name the key.
    pub fn parse(text: &str) -> Result<Self> {
        let recipe: Self = toml::from_str(text).map_err(|e| Error::InvalidArgument(e.to_string()))?;
        recipe.check()?;
        Ok(recipe)
    }

    /// Errors where a value is out of range.
    pub fn check(&self) -> Result<()> {
        let bad = |what: &str| Err(Error::InvalidArgument(what.into()));
        if self.batch.size == 0 {
            return bad("batch: size must be at least 1");
        }
        let stages = &self.batch.sides;
        let sides = stages.iter().all(|s| s.side >= 64 && s.side.is_multiple_of(32) && s.share > 0.0);
        if stages.is_empty() || !sides {
            return bad("batch: sides must be multiples of 32 from 64 up, each with a share above 0");
        }
        if self.run.checkpoint_every == 0 || self.run.log_every == 0 {
            return bad("run: checkpoint-every and log-every must be at least 1");
        }
        if !(self.data.cache_gb >= 0.0 && self.run.clip >= 0.0) {
            return bad("data.cache-gb and run.clip must be at least 0");
        }
        if self.data.dev.as_ref().is_some_and(|d| d.every_epochs.is_nan() || d.every_epochs <= 0.0) {
            return bad("data.dev: every-epochs must be above 0");
        }
        if self.model.learning_rate.values().any(|v| !(v.is_finite() && *v >= 0.0)) {
            return bad("model.learning-rate: multipliers must be at least 0");
        }
        if self.model.grow.is_some_and(|share| !(0.0..=1.0).contains(&share)) {
            return bad("model.grow must be from 0 to 1");
        }
        if self.model.grow.is_some() && self.model.start.is_none() {
            return bad("model.grow: there is no model.start to grow from");
        }
        if self.model.start_rest.is_some() && self.model.start.is_none() {
            return bad("model.start-rest: there is no model.start before it");
        }
        if self.model.score_threshold.is_some_and(|t| !(0.0..=1.0).contains(&t)) {
            return bad("model.score-threshold must be from 0 to 1");
        }
        self.augment.check()?;
        for matching in [&self.matching, &self.first_matching].into_iter().flatten() {
            matching.check()?;
        }
        if let Some(mining) = &self.mining {
            mining.check()?;
        }
        self.loss.check()?;
        if self
            .pyramid_anchors
            .is_some_and(|p| !((1..=3).contains(&p.count) && p.weight > 0.0 && p.weight <= 1.0))
        {
            return bad("pyramid-anchors: count must be from 1 to 3, weight above 0 and up to 1");
        }
        if let Some(supervision) = &self.feature_supervision {
            supervision.check()?;
        }
        if let Some(second) = &self.second_stage {
            second.check()?;
        }
        if let Some(sampler) = &self.sampler {
            if self.loss.classification.takes_all() {
                return bad("sampler: this loss takes all anchors; leave the table out");
            }
            sampler.check()?;
        }
        if let Some(ema) = &self.ema {
            ema.check()?;
        }
        // The length in steps is known with the data alone.
        self.schedule.schedule(f64::from(u32::MAX))?;
        self.optimizer.check()
    }

    /// Side of the examples at `step` of `total`.
    pub fn side(&self, step: u64, total: u64) -> usize {
        let whole: f64 = self.batch.sides.iter().map(|s| s.share).sum();
        let mut end = 0.0;
        for stage in &self.batch.sides {
            end += stage.share / whole * total as f64;
            if (step as f64) < end.round() {
                return stage.side;
            }
        }
        self.batch.sides.last().map_or(320, |s| s.side)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEAST: &str = r#"
        [model]
        detector = "farface-nano"
        [data]
        train = [{ kind = "list", list = "faces.txt" }]
        [loss]
        classification = { kind = "sigmoid" }
        [schedule]
        lr = 0.01
        length = 10
    "#;

    #[test]
    fn a_short_recipe_has_the_documented_defaults() {
        let r = Recipe::parse(LEAST).unwrap();
        assert_eq!((r.batch.size, r.run.seed, r.run.precision), (16, 1, Precision::Auto));
        assert!(r.mining.is_none() && r.ema.is_none() && r.data.dev.is_none());
        assert_eq!((r.side(0, 10), r.side(9, 10)), (320, 320));
    }

    #[test]
    fn unknown_keys_and_values_out_of_range_are_errors_that_name_them() {
        for (text, name) in [
            ("[run]\nsede = 1", "sede"),
            ("[batch]\nsize = 0", "size"),
            ("[batch]\nsides = [{ side = 100, share = 1.0 }]", "sides"),
            ("[run]\nlog-every = 0", "log-every"),
            ("[mining]\noverlap = 2.0", "overlap"),
            ("[ema]\ndecay = 2.0", "decay"),
        ] {
            let error = Recipe::parse(&format!("{LEAST}\n{text}")).unwrap_err().to_string();
            assert!(error.contains(name), "{error}");
        }
    }

    #[test]
    fn the_recipes_that_are_shipped_are_read() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes");
        let mut shipped = 0;
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let recipe = Recipe::parse(&std::fs::read_to_string(&path).unwrap());
            let recipe = recipe.unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            assert!(recipe.data.dev.is_some(), "{}", path.display());
            shipped += 1;
        }
        assert!(shipped >= 3, "{shipped} recipes");
        let readme = include_str!("../../README.md");
        let mut read = 0;
        for block in readme.split("```toml\n").skip(1) {
            let text = block.split("```").next().unwrap();
            if text.contains("[model]") {
                Recipe::parse(text).unwrap();
                read += 1;
            }
        }
        assert_eq!(read, 1, "README shows a recipe");
        let sampler = format!("{LEAST}\n[sampler]").replace("sigmoid", "quality-focal");
        assert!(Recipe::parse(&sampler).unwrap_err().to_string().contains("sampler"));
    }

    #[test]
    fn sides_follow_their_shares() {
        let text =
            format!("{LEAST}\n[batch]\nsides = [{{ side = 320, share = 3 }}, {{ side = 640, share = 1 }}]");
        let r = Recipe::parse(&text).unwrap();
        assert_eq!([0, 74, 75, 99].map(|s| r.side(s, 100)), [320, 320, 640, 640]);
    }
}
