//! Which model a command uses.

use anyhow::{Context, Result};
use farface::detect::Model;
use std::path::{Path, PathBuf};

#[derive(clap::Args)]
pub struct ModelArg {
    /// Model file (safetensors); without, the one built in
    #[arg(long, short, value_name = "FILE")]
    model: Option<PathBuf>,
}

impl ModelArg {
    /// The model named, or the one built in.
    pub fn load(&self) -> Result<Model> {
        load(self.model.as_deref())
    }
}

/// The model of this file, or the one built in.
pub fn load(path: Option<&Path>) -> Result<Model> {
    match path {
        Some(path) => Ok(Model::load(path)?),
        None => Model::default_model()
            .context("name a model with --model FILE (`farface convert` makes one of public weights)"),
    }
}
