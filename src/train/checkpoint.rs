//! Checkpoints: everything that a training needs to go on bit for bit, written whole or not at all.

use super::optim::OptimizerState;
use crate::detect::config::CHECKPOINT_KEY;
use crate::error::{Error, Result};
use crate::files::write_durably;
use crate::graph::{Graph, Weights};
use std::collections::HashMap;
use std::path::Path;

/// State of a training between two steps.
#[derive(Clone, Debug, PartialEq)]
pub struct Checkpoint {
    /// Steps done.
    pub step: u64,
    /// Parameters in the order of the graph's.
    pub params: Vec<Vec<f32>>,
    /// Averages and their number of updates, likewise.
    pub average: Option<(u64, Vec<Vec<f32>>)>,
    /// Of the optimiser.
    pub optimizer: OptimizerState,
    /// Best dev score so far and its step.
    pub best: Option<(f64, u64)>,
    /// The recipe's text.
    pub recipe: String,
    /// On what it was trained.
    pub setting: Setting,
}

/// What else than the recipe a training's bits depend on, as far as it is checked: the program must be the same, too, and so
/// must the pictures' pixels.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Setting {
    /// Of the maps.
    pub precision: String,
    /// Whose kernels it ran on.
    pub isa: String,
    /// Pictures, in their order.
    pub pictures: usize,
    /// FNV-1a over the pictures' names and boxes.
    pub data: u64,
}

/// What the names of parameters begin with.
const PARAM: &str = "param/";
/// What the names of averaged parameters begin with.
const AVERAGE: &str = "average/";

/// The weights of a model file; of a checkpoint those that its training would export, its averages where it has any.
pub(super) fn exported(path: &Path) -> Result<Weights> {
    let mut file = Weights::load(path)?;
    // Optimiser buffers fit no kind.
    let has = |kind: &&str| file.tensors.keys().any(|name| name.starts_with(*kind));
    if let Some(kind) = [AVERAGE, PARAM].into_iter().find(has) {
        let own = file.tensors.into_iter();
        file.tensors = own.filter_map(|(n, t)| Some((n.strip_prefix(kind)?.to_string(), t))).collect();
    }
    Ok(file)
}

const VERSION: u32 = 3;

#[derive(serde::Serialize, serde::Deserialize)]
struct Header {
    version: u32,
    step: u64,
    updates: Option<u64>,
    optimizer_step: u64,
    best: Option<(f64, u64)>,
    recipe: String,
    setting: Setting,
}

impl Checkpoint {
    /// Writes the checkpoint: temporary file, fsync, rename, fsync of the folder. A kill at any moment leaves the old one or
    /// the new one.
    pub fn save(&self, graph: &Graph, path: &Path) -> Result<()> {
        write_durably(path, &self.to_bytes(graph)?)
    }

    /// What [`Checkpoint::save`] writes.
    pub fn to_bytes(&self, graph: &Graph) -> Result<Vec<u8>> {
        let mut file = Weights::default();
        for (i, p) in graph.params.iter().enumerate() {
            file.insert(&format!("{PARAM}{}", p.name), &p.shape, self.params[i].clone());
            if let Some((_, average)) = &self.average {
                file.insert(&format!("{AVERAGE}{}", p.name), &p.shape, average[i].clone());
            }
        }
        for (name, values) in &self.optimizer.buffers {
            file.insert(&format!("optimizer/{name}"), &[values.len()], values.clone());
        }
        let header = Header {
            version: VERSION,
            step: self.step,
            updates: self.average.as_ref().map(|a| a.0),
            optimizer_step: self.optimizer.step,
            best: self.best,
            recipe: self.recipe.clone(),
            setting: self.setting.clone(),
        };
        let json = serde_json::to_string(&header).map_err(|e| Error::Internal(e.to_string()))?;
        file.metadata = HashMap::from([(CHECKPOINT_KEY.to_string(), json)]);
        file.to_bytes()
    }

    /// Reads a checkpoint of a training of `graph`.
    pub fn load(graph: &Graph, path: &Path) -> Result<Self> {
        Self::read(graph, Weights::load(path)?, &path.display().to_string())
    }

    /// That of [`Checkpoint::to_bytes`]; `name` is what errors call it.
    pub fn from_bytes(graph: &Graph, bytes: &[u8], name: &str) -> Result<Self> {
        Self::read(graph, Weights::from_bytes(bytes)?, name)
    }

    fn read(graph: &Graph, mut file: Weights, name: &str) -> Result<Self> {
        let bad = |what: String| Error::InvalidData(format!("{name}: {what}"));
        let json =
            file.metadata.get(CHECKPOINT_KEY).ok_or_else(|| bad("not a checkpoint of a training".into()))?;
        #[derive(serde::Deserialize)]
        struct Version {
            version: u32,
        }
        let Version { version } = serde_json::from_str(json).map_err(|e| bad(e.to_string()))?;
        if version != VERSION {
            return Err(bad(format!("checkpoint version {version}, this program reads {VERSION}")));
        }
        let header: Header = serde_json::from_str(json).map_err(|e| bad(e.to_string()))?;
        let mut all = |kind: &str| -> Result<Vec<Vec<f32>>> {
            let named = |p: &crate::graph::build::Param| {
                let name = format!("{kind}{}", p.name);
                file.get(&name, &p.shape)?;
                Ok(file.tensors.remove(&name).map(|t| t.data).unwrap_or_default())
            };
            graph.params.iter().map(named).collect::<Vec<Result<_>>>().into_iter().collect()
        };
        let params = all(PARAM)?;
        let average = header.updates.map(|n| Ok::<_, Error>((n, all(AVERAGE)?))).transpose()?;
        let buffers = std::mem::take(&mut file.tensors)
            .into_iter()
            .filter_map(|(name, t)| Some((name.strip_prefix("optimizer/")?.to_string(), t.data)))
            .collect();
        let optimizer = OptimizerState { step: header.optimizer_step, buffers };
        Ok(Self {
            step: header.step,
            params,
            average,
            optimizer,
            best: header.best,
            recipe: header.recipe,
            setting: header.setting,
        })
    }
}
