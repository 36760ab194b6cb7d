//! `farface eval`: the protocols of the published tables, on result files or on a model run here.

mod fddb;
pub mod runner;
mod voc;
pub mod wider;

use crate::Outcome;
use anyhow::Result;
use farface::files;
use serde::Serialize;
use std::io::Write;
use std::path::PathBuf;

/// Score detections as the published tables do
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    protocol: Protocol,
}

#[derive(clap::Subcommand)]
enum Protocol {
    Wider(wider::Args),
    Fddb(fddb::Args),
    Voc(voc::Args),
}

pub fn run(args: &Args, out: &mut dyn Write) -> Result<Outcome> {
    match &args.protocol {
        Protocol::Wider(args) => wider::run(args, out)?,
        Protocol::Fddb(args) => fddb::run(args, out)?,
        Protocol::Voc(args) => voc::run(args, out)?,
    }
    Ok(Outcome::Complete)
}

/// How the figures are given.
#[derive(clap::Args)]
struct Output {
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Draw the curves
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
}

impl Output {
    /// Writes the plot where one is wanted.
    fn draw(&self, svg: impl FnOnce() -> farface::Result<String>) -> Result<()> {
        match &self.plot {
            Some(path) => Ok(files::write_whole(path, svg()?.as_bytes())?),
            None => Ok(()),
        }
    }
}

/// A value as indented JSON.
fn print_json(out: &mut dyn Write, value: &impl Serialize) -> Result<()> {
    serde_json::to_writer_pretty(&mut *out, value).map_err(std::io::Error::from)?;
    Ok(writeln!(out)?)
}
