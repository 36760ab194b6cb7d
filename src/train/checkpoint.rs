//! Checkpoints: everything that a training needs to go on bit for bit, written whole or not at all.

use super::optim::OptimizerState;
use crate::error::{Error, Result};
use crate::graph::{Graph, Weights};
use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
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
}

const KEY: &str = "farface-checkpoint";

#[derive(serde::Serialize, serde::Deserialize)]
struct Header {
    version: u32,
    step: u64,
    updates: Option<u64>,
    optimizer_step: u64,
    best: Option<(f64, u64)>,
    recipe: String,
}

impl Checkpoint {
    /// Writes the checkpoint: temporary file, fsync, rename, fsync of the folder. A kill at any moment leaves the old one or
    /// the new one.
    pub fn save(&self, graph: &Graph, path: &Path) -> Result<()> {
        let mut file = Weights::default();
        for (i, p) in graph.params.iter().enumerate() {
            file.insert(&format!("param/{}", p.name), &p.shape, self.params[i].clone());
            if let Some((_, average)) = &self.average {
                file.insert(&format!("average/{}", p.name), &p.shape, average[i].clone());
            }
        }
        for (name, values) in &self.optimizer.buffers {
            file.insert(&format!("optimizer/{name}"), &[values.len()], values.clone());
        }
        let header = Header {
            version: 1,
            step: self.step,
            updates: self.average.as_ref().map(|a| a.0),
            optimizer_step: self.optimizer.step,
            best: self.best,
            recipe: self.recipe.clone(),
        };
        let json = serde_json::to_string(&header).map_err(|e| Error::Internal(e.to_string()))?;
        file.metadata = HashMap::from([(KEY.to_string(), json)]);
        write_whole(path, &file.to_bytes()?)
    }

    /// Reads a checkpoint of a training of `graph`.
    pub fn load(graph: &Graph, path: &Path) -> Result<Self> {
        let mut file = Weights::load(path)?;
        let bad = |what: String| Error::InvalidData(format!("{}: {what}", path.display()));
        let json = file.metadata.get(KEY).ok_or_else(|| bad("not a checkpoint of a training".into()))?;
        let header: Header = serde_json::from_str(json).map_err(|e| bad(e.to_string()))?;
        if header.version != 1 {
            return Err(bad(format!("checkpoint version {}, this program reads 1", header.version)));
        }
        let mut all = |kind: &str| -> Result<Vec<Vec<f32>>> {
            let named = |p: &crate::graph::build::Param| {
                let name = format!("{kind}/{}", p.name);
                file.get(&name, &p.shape)?;
                Ok(file.tensors.remove(&name).map(|t| t.data).unwrap_or_default())
            };
            graph.params.iter().map(named).collect::<Vec<Result<_>>>().into_iter().collect()
        };
        let params = all("param")?;
        let average = header.updates.map(|n| Ok::<_, Error>((n, all("average")?))).transpose()?;
        let buffers = std::mem::take(&mut file.tensors)
            .into_iter()
            .filter_map(|(name, t)| Some((name.strip_prefix("optimizer/")?.to_string(), t.data)))
            .collect();
        let optimizer = OptimizerState { step: header.optimizer_step, buffers };
        Ok(Self { step: header.step, params, average, optimizer, best: header.best, recipe: header.recipe })
    }
}

/// Writes a file whole or not at all, on the disk when this returns.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(format!(".{}.part", std::process::id()));
    let part = path.with_file_name(name);
    let write = || {
        let mut file = File::create(&part)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        drop(file);
        std::fs::rename(&part, path)?;
        // The rename itself is in the folder.
        match path.parent().filter(|p| !p.as_os_str().is_empty()) {
            #[cfg(unix)]
            Some(folder) => File::open(folder)?.sync_all(),
            _ => Ok(()),
        }
    };
    write().map_err(|e| {
        let _ = std::fs::remove_file(&part);
        Error::io(path, e)
    })
}
