//! A training as its recipe describes it, before the first step.

use super::engine::engine;
use super::{Resources, Trainer};
use crate::detect::config::DetectorConfig;
use crate::detect::group_sampling::GroupSamplingConfig;
use crate::detect::hambox::HamBoxConfig;
use crate::detect::hr::{parse_templates, HrConfig, STRIDE};
use crate::detect::pyramid::PyramidConfig;
use crate::detect::refineface::RefineFaceConfig;
use crate::detect::retinaface::RetinaFaceConfig;
use crate::detect::ModelConfig;
use crate::error::{Error, Result};
use crate::graph::build::ParamRole;
use crate::graph::{Graph, Weights};
use crate::nets::hr::Backbone;
use crate::nets::refineface::{FirstStep, LEVELS};
use crate::pixels::ChannelOrder;
use crate::train::checkpoint::exported;
use crate::train::data::Dataset;
use crate::train::matching::MatchingRecipe;
use crate::train::network::{Engine, InputTable};
use crate::train::objective::second_look::{FeatureSupervision, GroupedFastRcnn};
use crate::train::objective::{
    DetectorObjective, Layout, Level, Objective, PyramidAnchors, SecondLook, TwoStep,
};
use crate::train::optim::{Ema, Optimizer, ParamOptions};
use crate::train::ranks::Ranks;
use crate::train::recipe::{ModelRecipe, Recipe};
use crate::train::sampler::SamplerRecipe;
use std::path::Path;
use std::sync::Arc;

/// Probability that new logits say.
const PRIOR: f32 = 0.01;

impl Trainer {
    /// A training of `text` before its first step; from the recipe's start where `from_start`, else from random weights. `ranks`: the
    /// processes that train together.
    pub(super) fn build(
        text: &str,
        base: &Path,
        resources: Resources,
        from_start: bool,
        ranks: Option<Arc<Ranks>>,
    ) -> Result<Self> {
        let recipe = Recipe::parse(text)?;
        let part = ranks.as_ref().map_or(Ok(0..recipe.batch.size), |r| r.part(recipe.batch.size))?;
        let mut config = ModelConfig::named(&recipe.model.detector).ok_or_else(|| {
            Error::InvalidArgument(format!(
                "model.detector {:?} is not one of {}",
                recipe.model.detector,
                ModelConfig::NAMES
            ))
        })?;
        resize(&mut config.detector, &recipe.model, base)?;
        if let DetectorConfig::Hr(detector) = &config.detector {
            // Scales and sizes follow the templates.
            config = ModelConfig::hr(&config.name, detector.clone());
        }
        let (objective, pyramid_anchors) = objective(&recipe, &config.detector)?;
        let second_look = second_look(&recipe, &config.detector, &objective)?;
        let graph = match &config.detector {
            DetectorConfig::Hambox(d) => d.training_graph(pyramid_anchors.len()),
            DetectorConfig::Refineface(d) if second_look.is_some() => d.training_graph(),
            DetectorConfig::GroupSampling(d) => d.training_graph(),
            detector => detector.detector().graph(),
        };
        let (start, notes) = if from_start {
            start_weights(&recipe, base, &graph, &config.detector)?
        } else {
            Default::default()
        };
        let mut weights = start.completed(&graph, recipe.run.seed);
        let is_new = |name: &str| !start.tensors.contains_key(name);
        match &config.detector {
            DetectorConfig::Pyramid(detector) => detector.start_new(&mut weights, PRIOR, is_new),
            DetectorConfig::GroupSampling(detector) => detector.start_new(&mut weights, is_new),
            DetectorConfig::Hambox(detector) => detector.start_new(&mut weights, PRIOR, is_new),
            DetectorConfig::Refineface(detector) => detector.start_new(&mut weights, PRIOR, is_new),
            DetectorConfig::Hr(detector) => detector.start_new(&mut weights, is_new),
            DetectorConfig::Retinaface(detector) => detector.start_new(&mut weights, is_new),
        }
        let mut engine = engine(&recipe, graph, &weights, &resources, ranks.as_ref())?;
        let optimizer = Optimizer::new(recipe.optimizer, options(&recipe, &*engine)?)?;
        let dataset = Arc::new(Dataset::load(&recipe.data.train, base)?);
        let schedule = recipe.schedule.schedule(dataset.samples.len() as f64 / recipe.batch.size as f64)?;
        let ema = recipe.ema.map(|e| Ema::new(e, engine.params()?)).transpose()?;
        let table = input_table(&config)?;
        Ok(Self {
            text: text.into(),
            base: base.into(),
            config,
            engine,
            objective,
            pyramid_anchors,
            second_look,
            optimizer,
            schedule,
            ema,
            table,
            dataset,
            resources,
            ranks,
            part,
            loader: None,
            step: 0,
            best: None,
            notes,
            recipe,
        })
    }
}

/// The objective of a detector as the recipe wants it, and of its pyramid anchors. Errors where the recipe has what this
/// detector has no use for.
fn objective(recipe: &Recipe, detector: &DetectorConfig) -> Result<(DetectorObjective, Vec<PyramidAnchors>)> {
    let thresholds =
        |negative, positive| MatchingRecipe::Thresholds { negative, positive, force_best: false };
    if recipe.pyramid_anchors.is_some() && !matches!(detector, DetectorConfig::Hambox(_)) {
        return no_use(&recipe.model, "pyramid-anchors", "it is HAMBox's");
    }
    if recipe.first_matching.is_some() && !matches!(detector, DetectorConfig::Refineface(_)) {
        return no_use(&recipe.model, "first-matching", "it looks once; matching is its own");
    }
    let (levels, variances) = match detector {
        DetectorConfig::Pyramid(d) => (pyramid_levels(d), d.variances),
        DetectorConfig::GroupSampling(d) => (group_sampling_levels(d), [1.0; 2]),
        DetectorConfig::Hambox(d) => (hambox_levels(d), [1.0; 2]),
        DetectorConfig::Hr(d) => (hr_levels(d), [1.0; 2]),
        DetectorConfig::Retinaface(d) => (retinaface_levels(d), d.variances),
        DetectorConfig::Refineface(d) => {
            let objective = TwoStep {
                levels: refineface_levels(d),
                first: recipe.first_matching.unwrap_or(thresholds(0.3, 0.7)),
                second: recipe.matching.unwrap_or(thresholds(0.4, 0.5)),
                survives: d.survives(),
                mining: recipe.mining,
                sampler: recipe.sampler,
                loss: recipe.loss,
            };
            objective.check()?;
            return Ok((DetectorObjective::TwoStep(objective), Vec::new()));
        }
    };
    let all = recipe.loss.classification.focal().is_some() || recipe.loss.classification.takes_all();
    let objective = Objective {
        levels,
        variances,
        matching: recipe.matching.unwrap_or_default(),
        mining: recipe.mining,
        sampler: recipe.sampler.or_else(|| (!all).then(SamplerRecipe::default)),
        loss: recipe.loss,
    };
    objective.check()?;
    if recipe.pyramid_anchors.is_some() && objective.sampler.as_ref().is_some_and(|s| s.within_picture) {
        return Err(Error::InvalidArgument(
            "sampler: within-picture does not go with pyramid-anchors, which reach beyond the picture".into(),
        ));
    }
    let pyramid_anchors = recipe.pyramid_anchors.map_or(Vec::new(), |p| {
        let of = |k: usize| {
            let levels = objective.levels[k..].to_vec();
            PyramidAnchors::new(Objective { levels, ..objective.clone() }, k as u32, p.weight)
        };
        (1..=p.count).map(of).collect()
    });
    Ok((DetectorObjective::OneStep(objective), pyramid_anchors))
}

/// Who looks again at boxes of this detector. Errors where the recipe has tables for what it does not do.
fn second_look(
    recipe: &Recipe,
    detector: &DetectorConfig,
    objective: &DetectorObjective,
) -> Result<Option<SecondLook>> {
    let rcnn = match detector {
        DetectorConfig::GroupSampling(d) if d.second_stage.is_some() => Some(d),
        _ => None,
    };
    if recipe.second_stage.is_some() && rcnn.is_none() {
        return no_use(
            &recipe.model,
            "second-stage",
            "it has one stage; detectors with -rcnn in their name have two",
        );
    }
    match (recipe.feature_supervision, objective) {
        (Some(settings), DetectorObjective::TwoStep(detector)) => {
            let focal = recipe.loss.classification.focal().unwrap_or_default();
            let (detector, recipe) = (detector.clone(), settings);
            Ok(Some(SecondLook::FeatureSupervision(FeatureSupervision { detector, recipe, focal })))
        }
        (Some(_), DetectorObjective::OneStep(_)) => {
            no_use(&recipe.model, "feature-supervision", "it is RefineFace's")
        }
        (None, _) => Ok(rcnn.map(|detector| {
            SecondLook::FastRcnn(GroupedFastRcnn {
                detector: detector.clone(),
                recipe: recipe.second_stage.unwrap_or_default(),
                loss: recipe.loss,
            })
        })),
    }
}

/// The error of a recipe's key that means nothing for its detector.
fn no_use<T>(model: &ModelRecipe, key: &str, why: &str) -> Result<T> {
    Err(Error::InvalidArgument(format!("{key}: {} has no use for it: {why}", model.detector)))
}

/// Makes a detector as the recipe's `[model]` says, whose relative paths start at `base`.
fn resize(detector: &mut DetectorConfig, model: &ModelRecipe, base: &Path) -> Result<()> {
    if let DetectorConfig::Hr(d) = detector {
        resize_hr(d, model, base)?;
    } else if model.templates.is_some() {
        return no_use(model, "model.templates", "it is HR's");
    }
    let sizes = match detector {
        DetectorConfig::Pyramid(d) => Some((&mut d.width, &mut d.channels)),
        DetectorConfig::GroupSampling(d) => Some((&mut d.backbone.width, &mut d.channels)),
        DetectorConfig::Hambox(d) => Some((&mut d.backbone.width, &mut d.channels)),
        DetectorConfig::Refineface(d) => Some((&mut d.backbone.width, &mut d.channels)),
        DetectorConfig::Retinaface(d) => {
            // They have no loss here.
            d.landmarks = false;
            let width = d.backbone.as_mut().map_or(&mut d.width, |net| &mut net.width);
            Some((width, &mut d.channels))
        }
        DetectorConfig::Hr(_) => None,
    };
    if let Some((width, channels)) = sizes {
        *width = model.width.unwrap_or(*width);
        *channels = model.channels.unwrap_or(*channels);
    }
    if let DetectorConfig::Pyramid(d) = &mut *detector {
        if model.width.is_some() && model.backbone.is_some() {
            return no_use(model, "model.backbone", "it says all that width would");
        }
        if model.width.is_some() || model.backbone.is_some() {
            // By a width alone MobileNet-V1 of that width.
            d.backbone = model.backbone.clone();
        }
    } else if model.backbone.is_some() {
        return no_use(model, "model.backbone", "its stages follow width");
    } else if model.grow.is_some() {
        // Where maps are joined, or channels have kinds, the first channels are not the smaller network's.
        return no_use(model, "model.grow", "networks of farface-nano's kind alone are grown");
    }
    if let (DetectorConfig::GroupSampling(d), Some(channels)) = (&mut *detector, model.channels) {
        // As in the usual proportion, 1,024 on 256 channels.
        d.second_stage.iter_mut().for_each(|second| second.width = 4 * channels);
    }
    detector.check()
}

fn resize_hr(hr: &mut HrConfig, model: &ModelRecipe, base: &Path) -> Result<()> {
    if model.channels.is_some() {
        return no_use(model, "model.channels", "its head has five channels a template");
    }
    let width = match &mut hr.backbone {
        Backbone::Resnet(net) => &mut net.width,
        Backbone::Vgg16(net) => &mut net.width,
    };
    *width = model.width.unwrap_or(*width);
    if let Some(path) = &model.templates {
        let path = base.join(path);
        let text = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
        hr.templates = parse_templates(&text).map_err(|e| match e {
            Error::InvalidData(m) => Error::InvalidData(format!("{}: {m}", path.display())),
            other => other,
        })?;
    }
    Ok(())
}

fn pyramid_levels(detector: &PyramidConfig) -> Vec<Level> {
    let level = |(stride, anchors): (usize, &[[f32; 2]])| Level {
        stride,
        anchors: anchors.to_vec(),
        layout: Layout::Joint,
    };
    detector.levels().map(level).collect()
}

fn group_sampling_levels(detector: &GroupSamplingConfig) -> Vec<Level> {
    let level = |(stride, scales): (usize, &[f32])| {
        let anchors = scales.iter().map(|&s| [s, s]).collect();
        Level { stride, anchors, layout: Layout::Apart { logits: 2 } }
    };
    detector.levels().map(level).collect()
}

fn hambox_levels(detector: &HamBoxConfig) -> Vec<Level> {
    let level =
        |(stride, side)| Level { stride, anchors: vec![[side, side]], layout: Layout::Apart { logits: 1 } };
    detector.levels().map(level).collect()
}

fn retinaface_levels(detector: &RetinaFaceConfig) -> Vec<Level> {
    let level = |(stride, sides): (usize, &[f32; 2])| Level {
        stride,
        anchors: sides.map(|s| [s, s]).to_vec(),
        layout: Layout::Apart { logits: 2 },
    };
    detector.levels().map(level).collect()
}

fn hr_levels(detector: &HrConfig) -> Vec<Level> {
    vec![Level { stride: STRIDE, anchors: detector.anchors(), layout: Layout::ByKind }]
}

fn refineface_levels(detector: &RefineFaceConfig) -> Vec<(Level, Option<FirstStep>)> {
    let level = |level: usize| {
        let (stride, layout) = (1 << level, Layout::Apart { logits: 1 });
        (Level { stride, anchors: detector.anchors(stride).collect(), layout }, detector.first_step(level))
    };
    LEVELS.map(level).collect()
}

/// The weights of `model.start`, and behind it of `model.start-rest`, that the network has, under its names, those that are
/// smaller grown where the recipe wants that, and a note a file of how many there are; none where the recipe names no start.
fn start_weights(
    recipe: &Recipe,
    base: &Path,
    graph: &Graph,
    detector: &DetectorConfig,
) -> Result<(Weights, Vec<String>)> {
    let model = &recipe.model;
    let mut start = Weights::default();
    let Some(path) = &model.start else { return Ok((start, Vec::new())) };
    let wanted = |name: &String| {
        model.start_only.is_empty() || model.start_only.iter().any(|with| name.starts_with(with.as_str()))
    };
    let prefixed = |(name, t)| (format!("{}{name}", model.start_prefix), t);
    let first = exported(&base.join(path))?.tensors.into_iter().map(prefixed);
    let first = first.filter(|(name, _)| wanted(name)).collect();
    let mut files = vec![("start", path, first)];
    if let Some(path) = &model.start_rest {
        files.push(("start-rest", path, exported(&base.join(path))?.tensors));
    }
    let mut fresh = Weights::default();
    if let (Some(_), DetectorConfig::Pyramid(detector)) = (model.grow, detector) {
        // What smaller tensors grow into: all as it would be without a start.
        fresh = fresh.completed(graph, recipe.run.seed);
        detector.start_new(&mut fresh, PRIOR, |_| true);
    }
    let mut found = Vec::new();
    for (key, path, tensors) in &mut files {
        let bad =
            |what: String| Err(Error::InvalidArgument(format!("model.{key} {}: {what}", path.display())));
        let (before, mut grown) = (start.tensors.len(), 0);
        for p in &graph.params {
            if start.tensors.contains_key(&p.name) {
                continue;
            }
            let Some(mut t) = tensors.remove(&p.name) else { continue };
            if t.shape != p.shape {
                let larger =
                    model.grow.and_then(|share| fresh.tensors.remove(&p.name)?.grown_from(&t, share));
                let Some(larger) = larger else {
                    let why = if model.grow.is_some() { ", which is not larger" } else { "" };
                    return bad(format!(
                        "{} has shape {:?}, the network needs {:?}{why}",
                        p.name, t.shape, p.shape
                    ));
                };
                t = larger;
                grown += 1;
            }
            start.tensors.insert(p.name.clone(), t);
        }
        let count = start.tensors.len() - before;
        if count == 0 && *key == "start" {
            return bad(format!(
                "no tensor is named as one of the network (with start-prefix {:?}, start-only {:?})",
                model.start_prefix, model.start_only
            ));
        } else if count == 0 {
            return bad("it has no tensor of the network that model.start does not give".into());
        }
        let grown = if grown > 0 { format!(", {grown} of them grown") } else { String::new() };
        found.push(format!("{count} of {} tensors from {}{grown}", graph.params.len(), path.display()));
    }
    Ok((start, found))
}

/// What the optimiser does with each parameter: statistics and frozen ones stand still; biases and normalisations do
/// not decay.
fn options(recipe: &Recipe, engine: &dyn Engine) -> Result<Vec<ParamOptions>> {
    let graph = engine.graph();
    for prefix in recipe.model.learning_rate.keys() {
        if !graph.params.iter().any(|p| p.name.starts_with(prefix.as_str())) {
            return Err(Error::InvalidArgument(format!(
                "model.learning-rate: no parameter's name begins with {prefix:?}"
            )));
        }
    }
    let trainable = engine.trainable();
    let options = graph
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
        .collect();
    Ok(options)
}

/// Values of the network's input as [`ModelConfig::input`] says.
fn input_table(config: &ModelConfig) -> Result<InputTable> {
    let n = config.input.normalization()?;
    let channel = match n.order {
        ChannelOrder::Rgb => [0, 1, 2],
        ChannelOrder::Bgr => [2, 1, 0],
    };
    let value = std::array::from_fn(|i| (0..256).map(|v| (v as f32 - n.mean[i]) * n.scale[i]).collect());
    Ok(InputTable { channel, value })
}
