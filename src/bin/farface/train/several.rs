//! Training by several processes, which a launcher starts: rank 0 does what a process alone does, the others follow it.

use super::{base, recipe, Args, Place};
use crate::Outcome;
use anyhow::{bail, Context, Result};
use farface::train::ranks::{Launch, Ranks, PATIENCE};
use farface::train::trainer::{Resources, Trainer};
use std::sync::Arc;

/// The other processes, where a launcher has started this one with others.
pub fn meet(args: &Args) -> Result<Option<Arc<Ranks>>> {
    let Some(launch) = Launch::from_environment()? else { return Ok(None) };
    let of = format!("{} has started {} processes", launch.launcher, launch.world);
    match args.device {
        Place::Cuda => {}
        Place::Cpu => bail!("{of}: they train together on CUDA devices alone; add --device cuda"),
        Place::CudaNumber(n) => {
            bail!("{of}: all would be on CUDA device {n}; --device cuda gives each its own")
        }
    }
    // What would fail in the middle of the meeting, for others to wait for, fails here.
    device(&launch)?;
    let ranks = Ranks::meet(&launch, PATIENCE).with_context(|| format!("rank {}", launch.rank))?;
    Ok(Some(Arc::new(ranks)))
}

/// The CUDA device of this process.
#[cfg(feature = "cuda")]
fn device(launch: &Launch) -> Result<u32> {
    farface::gpu::probe::Library::Nccl.require()?;
    Ok(launch.device(farface::gpu::driver::device_count()?)?)
}

#[cfg(not(feature = "cuda"))]
fn device(_: &Launch) -> Result<u32> {
    bail!("this build has no CUDA backend; build with the feature cuda")
}

/// What this process has of the machine.
pub fn resources(args: &Args, ranks: Option<&Ranks>) -> Result<Resources> {
    let device = match (args.device, ranks) {
        (Place::Cpu, _) => None,
        (Place::CudaNumber(n), _) => Some(n),
        (Place::Cuda, None) => Some(0),
        (Place::Cuda, Some(ranks)) => Some(device(ranks.launch())?),
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let own = cores / ranks.map_or(1, |r| r.launch().local_world as usize);
    Ok(Resources {
        device,
        threads: args.threads.map_or(own.max(1), usize::from),
        workers: usize::from(args.workers),
    })
}

/// Trains as rank 0 says, which alone writes and tells of it.
pub fn follow(args: &Args, ranks: &Arc<Ranks>) -> Result<Outcome> {
    let (text, resources) = (recipe(args)?, resources(args, Some(ranks))?);
    let mut trainer = Trainer::of_rank(&text, base(args), resources, ranks.clone(), None)?;
    while trainer.agree(true)? {
        trainer.step()?;
    }
    trainer.part()?;
    Ok(Outcome::Complete)
}
