//! A graph as the trainer walks it: its units, which of them have anything to learn, and what stands still.

use super::units::{units, Op, Unit};
use crate::error::{Error, Result};
use crate::graph::build::ParamId;
use crate::graph::Graph;

/// Which batch normalisations and parameters stand still.
#[derive(Clone, Debug, Default)]
pub struct Frozen {
    /// Parameters whose names begin so are not trained; a batch normalisation whose running mean is among them keeps its
    /// statistics.
    pub parameters: Vec<String>,
    /// Batch normalisations whose parameters' names begin so keep their statistics; scale and shift are trained.
    pub statistics: Vec<String>,
}

/// A graph as it is walked.
pub(super) struct Walk {
    pub units: Vec<Unit>,
    /// For every node the unit that shows it.
    pub shown_by: Vec<Option<usize>>,
    /// For every parameter.
    pub trainable: Vec<bool>,
    /// For every unit whether anything trainable lies at or before it.
    pub wanted: Vec<bool>,
    /// Batch normalisations that keep their running statistics.
    pub frozen_norm: Vec<bool>,
    /// Where the second phase begins: the first unit that boxes are fed to, or the number of units.
    pub second_phase: usize,
}

impl Walk {
    /// Of `graph`. Errors where nothing is named as `frozen` says.
    pub fn new(graph: &Graph, frozen: &Frozen) -> Result<Self> {
        let begins = |name: &str, with: &[String]| with.iter().any(|w| name.starts_with(w.as_str()));
        for prefix in frozen.parameters.iter().chain(&frozen.statistics) {
            if !graph.params.iter().any(|p| p.name.starts_with(prefix.as_str())) {
                return Err(Error::InvalidArgument(format!("no parameter's name begins with {prefix:?}")));
            }
        }
        let trainable: Vec<bool> =
            graph.params.iter().map(|p| p.trained() && !begins(&p.name, &frozen.parameters)).collect();
        let still = |p: ParamId| {
            let name = &graph.params[p.0].name;
            begins(name, &frozen.parameters) || begins(name, &frozen.statistics)
        };
        let (units, shown_by) = units(graph);
        let frozen_norm = units.iter().map(|u| u.norm.is_some_and(|n| still(n.mean))).collect();
        let mut wanted: Vec<bool> = Vec::with_capacity(units.len());
        for u in &units {
            let own = u.params().iter().any(|p| trainable[p.0]);
            wanted.push(own || u.inputs.iter().any(|&i| wanted[i]));
        }
        let second_phase = units.iter().position(|u| matches!(u.op, Op::Boxes(_))).unwrap_or(units.len());
        if units[second_phase..].iter().any(|u| matches!(u.op, Op::Input(_))) {
            return Err(Error::Internal("a network's boxes come behind its other inputs".into()));
        }
        Ok(Self { units, shown_by, trainable, wanted, frozen_norm, second_phase })
    }

    #[cfg(feature = "cuda")]
    /// How many of the graph's outputs the first phase gives: all of them, but for those behind boxes.
    pub fn first_outputs(&self, graph: &Graph) -> usize {
        let first = |u: Option<usize>| u.is_some_and(|u| u < self.second_phase);
        graph.outputs.iter().filter(|(_, node)| first(self.shown_by[node.0])).count()
    }
}
