//! What the tensors of a network hold on given inputs: the ranges that int8 needs.

use super::build::Graph;
use super::compile::{Compiled, CompiledStep};
use super::equalize::equalized;
use super::formats::{Numbers, Ranges};
use super::fuse::Draft;
use super::plan::Plan;
use super::weights::Weights;
use crate::cpu::{isa, Arena, Pool, View};
use crate::error::{Error, Result};
use crate::shape::{Shape, Tensor};
use std::collections::BTreeMap;

/// Bins of a tensor's histogram, over the magnitudes up to the largest seen.
const BINS: usize = 2048;

/// Values of one sign by magnitude. When a larger one comes than the bins reach to, pairs of bins become one.
#[derive(Clone)]
struct Histogram {
    /// Magnitude that the last bin ends at.
    reach: f64,
    counts: Vec<u64>,
    largest: f32,
}

impl Histogram {
    fn new() -> Self {
        Self { reach: 1.0 / 1024.0, counts: vec![0; BINS], largest: 0.0 }
    }

    fn add(&mut self, magnitude: f32) {
        while f64::from(magnitude) >= self.reach {
            for i in 0..BINS / 2 {
                self.counts[i] = self.counts[2 * i] + self.counts[2 * i + 1];
            }
            self.counts[BINS / 2..].fill(0);
            self.reach *= 2.0;
        }
        let bin = (f64::from(magnitude) / self.reach * BINS as f64) as usize;
        self.counts[bin.min(BINS - 1)] += 1;
        self.largest = self.largest.max(magnitude);
    }

    /// Sum over the values of the squared error where those beyond `limit` become it and the others are rounded to multiples of `step`.
    fn error(&self, limit: f64, step: f64) -> f64 {
        let width = self.reach / BINS as f64;
        let rounding = step * step / 12.0;
        let bin = |(i, &count): (usize, &u64)| {
            let middle = (i as f64 + 0.5) * width;
            let beyond = (middle - limit).max(0.0);
            count as f64 * (beyond * beyond + if beyond > 0.0 { 0.0 } else { rounding })
        };
        // Exact zeros are stored exactly; they lie in the first bin, whose error is the same for every choice but for the step.
        self.counts.iter().enumerate().filter(|(_, &count)| count > 0).map(bin).sum()
    }
}

/// How the range of a tensor is chosen from what it held.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Clip {
    /// From the least to the greatest value.
    Extremes,
    /// So that this share of the values of either sign is within it.
    Percentile(f64),
    /// So that the mean squared error of the stored values is least.
    Mse,
}

/// Values of one tensor, both signs.
#[derive(Clone)]
struct Values {
    negative: Histogram,
    positive: Histogram,
    /// Largest magnitude of every channel.
    channels: Vec<f32>,
}

impl Values {
    fn new() -> Self {
        Self { negative: Histogram::new(), positive: Histogram::new(), channels: Vec::new() }
    }

    /// A pixel's channels from number `first` on.
    fn add(&mut self, first: usize, pixel: &[f32]) {
        if self.channels.len() < first + pixel.len() {
            self.channels.resize(first + pixel.len(), 0.0);
        }
        for (most, v) in self.channels[first..].iter_mut().zip(pixel) {
            *most = most.max(v.abs());
        }
        pixel.iter().for_each(|&v| self.add_value(v));
    }

    fn add_value(&mut self, v: f32) {
        if v < 0.0 {
            self.negative.add(-v);
        } else if v > 0.0 {
            self.positive.add(v);
        }
    }

    fn range(&self, clip: Clip) -> [f32; 2] {
        let all = [-self.negative.largest, self.positive.largest];
        match clip {
            Clip::Extremes => all,
            Clip::Percentile(share) => {
                let within = |h: &Histogram| {
                    let total: u64 = h.counts.iter().sum();
                    let mut left = (total as f64 * (1.0 - share)) as u64;
                    let mut last = BINS;
                    while last > 0 && h.counts[last - 1] <= left {
                        left -= h.counts[last - 1];
                        last -= 1;
                    }
                    (last as f64 / BINS as f64 * h.reach).min(f64::from(h.largest)) as f32
                };
                [-within(&self.negative), within(&self.positive)]
            }
            Clip::Mse => {
                let error = |share: f64| {
                    let [low, high] = all.map(|v| f64::from(v) * share);
                    let step = (high - low) / 255.0;
                    self.negative.error(-low, step) + self.positive.error(high, step)
                };
                // From all of the range down to a twentieth of it.
                let shares = (1..=100).rev().map(|i| f64::from(i) / 100.0).filter(|&s| s >= 0.05);
                let best = shares.map(|s| (s, error(s))).fold((1.0, f64::INFINITY), |best, new| {
                    if new.1 < best.1 {
                        new
                    } else {
                        best
                    }
                });
                all.map(|v| (f64::from(v) * best.0) as f32)
            }
        }
    }
}

/// Watches a network at work in f32.
pub struct Calibration {
    network: Compiled,
    names: Vec<String>,
    /// By value.
    values: BTreeMap<usize, Values>,
}

impl Calibration {
    /// For this network.
    pub fn new(graph: &Graph, weights: &Weights) -> Result<Self> {
        let network = Compiled::in_steps(graph, weights, isa::detected(), &Numbers::F32)?;
        Ok(Self { network, names: Draft::new(graph).names(), values: BTreeMap::new() })
    }

    /// A plan for inputs of these sizes, to be given to [`Calibration::watch`].
    pub fn plan(&self, inputs: &[Shape]) -> Result<Plan> {
        Plan::new(&self.network, inputs)
    }

    /// Runs the network on the inputs that are in the arena and counts what its tensors hold.
    pub fn watch(&mut self, plan: &Plan, arena: &mut Arena, pool: &mut Pool) {
        let Self { network, values, .. } = self;
        plan.run_watched(arena, pool, &mut |step, view, floats| {
            let output = network.steps[step].output;
            let (root, first) = network.root(output);
            // A part of a concatenation counts for the whole, too.
            for (value, first) in
                [(output, 0), (root, first)].into_iter().take(1 + usize::from(root != output))
            {
                let seen = values.entry(value.0).or_insert_with(Values::new);
                each_pixel(view, floats, |pixel| seen.add(first, pixel));
            }
        });
    }

    /// As [`Calibration::watch`], with these inputs.
    pub fn watch_tensors(&mut self, pool: &mut Pool, inputs: &[Tensor]) -> Result<()> {
        let shapes: Vec<Shape> = inputs.iter().map(|t| t.shape).collect();
        let plan = self.plan(&shapes)?;
        let mut arena = Arena::default();
        arena.reserve(plan.floats())?;
        plan.inputs().iter().zip(inputs).for_each(|(view, tensor)| arena.write(view, tensor));
        self.watch(&plan, &mut arena, pool);
        Ok(())
    }

    /// What was seen. Errors: [`Error::InvalidArgument`] where nothing was.
    pub fn ranges(&self, clip: Clip) -> Result<Ranges> {
        if self.values.is_empty() {
            return Err(Error::InvalidArgument("no inputs to calibrate with".into()));
        }
        let values = self.values.iter().map(|(&i, v)| (self.names[i].clone(), v.range(clip))).collect();
        Ok(Ranges { values, ..Ranges::default() })
    }

    /// Weights of the same network, the ranges of its channels made more alike by what was seen.
    pub fn equalized(&self, graph: &Graph, weights: &Weights) -> Result<Weights> {
        equalized(graph, weights, |value| self.largest(value))
    }

    /// Largest magnitudes of the channels of a value.
    pub(crate) fn largest(&self, value: usize) -> Option<Vec<f32>> {
        self.values.get(&value).map(|v| v.channels.clone())
    }

    /// Names of the layers that could be computed in eight bits, in their order.
    pub fn layers(&self) -> Vec<&str> {
        let dense = |s: &&CompiledStep| s.op.is_dense();
        let mut names: Vec<&str> = Vec::new();
        for step in self.network.steps.iter().filter(dense) {
            let name = self.network.graph.nodes[step.node.0].name.as_str();
            if !names.contains(&name) {
                names.push(name);
            }
        }
        names
    }
}

fn each_pixel(view: &View, floats: &[f32], mut f: impl FnMut(&[f32])) {
    let s = view.shape;
    for n in 0..s.n {
        for y in 0..s.h {
            for x in 0..s.w {
                f(&floats[view.at(n, y, x)..][..s.c]);
            }
        }
    }
}
