//! The network of a training: where it runs, and in which precision.

use super::Resources;
use crate::cpu::dense::bf16_supported;
use crate::error::{Error, Result};
use crate::graph::{Graph, Weights};
use crate::nets::hr::enlarges;
use crate::train::network::{Engine, Frozen, Network};
use crate::train::ranks::Ranks;
use crate::train::recipe::{Precision, Recipe};
use half::bf16;
use std::sync::Arc;

/// The network in the precision that the recipe asks for, on the device or the CPU.
pub(super) fn engine(
    recipe: &Recipe,
    graph: Graph,
    weights: &Weights,
    resources: &Resources,
    ranks: Option<&Arc<Ranks>>,
) -> Result<Box<dyn Engine>> {
    // HR's enlarging kernels are what they are.
    let fixed = graph.params.iter().map(|p| &p.name).filter(|name| enlarges(name)).cloned();
    let frozen = Frozen {
        parameters: recipe.model.freeze.iter().cloned().chain(fixed).collect(),
        statistics: recipe.model.freeze_statistics.clone(),
    };
    let (precision, threads) = (recipe.run.precision, resources.threads.max(1));
    if let Some(ordinal) = resources.device {
        return on_device(graph, weights, &frozen, ordinal, precision, threads, ranks);
    }
    if let Some(ranks) = ranks {
        return Err(Error::Unsupported(format!(
            "{} processes that train together, on the CPU: they do so on CUDA devices alone (--device cuda)",
            ranks.world()
        )));
    }
    let why = "this CPU has neither AMX nor AVX512-BF16; take f32 or auto";
    Ok(if is_half(precision, bf16_supported(), || why.into())? {
        Box::new(Network::<bf16>::new(graph, weights, &frozen, threads)?)
    } else {
        Box::new(Network::<f32>::new(graph, weights, &frozen, threads)?)
    })
}

/// Whether maps are bf16, where they can be if `supported`; else `why` not.
fn is_half(precision: Precision, supported: bool, why: impl FnOnce() -> String) -> Result<bool> {
    match precision {
        Precision::F32 => Ok(false),
        Precision::Auto => Ok(supported),
        Precision::Bf16 if supported => Ok(true),
        Precision::Bf16 => Err(Error::Unsupported(format!("run.precision bf16: {}", why()))),
    }
}

#[cfg(feature = "cuda")]
fn on_device(
    graph: Graph,
    weights: &Weights,
    frozen: &Frozen,
    ordinal: u32,
    precision: Precision,
    threads: usize,
    ranks: Option<&Arc<Ranks>>,
) -> Result<Box<dyn Engine>> {
    use crate::gpu::map::Element;
    use crate::gpu::ops::Device;
    use crate::train::device::DeviceEngine;
    let device = Device::new(ordinal)?;
    let why = || {
        let [major, minor] = device.context().capability();
        format!(
            "CUDA device {ordinal} ({}) has compute capability {major}.{minor}, bf16 wants 8.0; take f32 or auto",
            device.context().name()
        )
    };
    let half = is_half(precision, device.multiplies(Element::Bf16), why)?;
    let element = if half { Element::Bf16 } else { Element::F32 };
    let mut engine = DeviceEngine::new(graph, weights, frozen, &device, element, threads)?;
    if let Some(ranks) = ranks {
        engine.join(ranks, DeviceEngine::BUCKET)?;
    }
    Ok(Box::new(engine))
}

#[cfg(not(feature = "cuda"))]
fn on_device(
    _: Graph,
    _: &Weights,
    _: &Frozen,
    ordinal: u32,
    _: Precision,
    _: usize,
    _: Option<&Arc<Ranks>>,
) -> Result<Box<dyn Engine>> {
    Err(Error::Unsupported(format!(
        "CUDA device {ordinal}: this build has no CUDA backend; build with the feature cuda"
    )))
}
