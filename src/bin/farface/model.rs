//! Which model a command uses.

use anyhow::{bail, Result};
use farface::detect::Model;
use std::path::PathBuf;

#[derive(clap::Args)]
pub struct ModelArg {
    /// Model file (safetensors)
    #[arg(long, short, value_name = "FILE")]
    model: Option<PathBuf>,
}

impl ModelArg {
    /// The model named, or the one built in.
    pub fn load(&self) -> Result<Model> {
        match &self.model {
            Some(path) => Ok(Model::load(path)?),
            None => bail!(
                "no model is built into this program yet; name one with --model FILE (`farface convert` makes one of public weights)"
            ),
        }
    }
}
