//! A network with its weights packed for one ISA: every step of the draft (`fuse`) gets its op, for the formats that its
//! tensors have.

use super::build::{Graph, NodeId, ParamId};
use super::fold::{fold_batchnorm, Affine};
use super::formats::{assign, Numbers};
use super::fuse::{channels, root, Chain, Draft, DraftStep, Value, ValueId, Work};
use super::weights::Weights;
use crate::cpu::arena::Format;
use crate::cpu::cascade::{CascadeOp, Stage, MAX_STAGES};
use crate::cpu::conv::Formats;
use crate::cpu::program::Kind;
use crate::cpu::simple::{AddOp, WidenOp};
use crate::cpu::{Isa, Op};
use crate::error::{Error, Result};
use crate::layers::{
    activation, batchnorm, combine, conv2d, conv_transpose2d, linear, pool, roi_align, upsample, Conv2d,
    Layer,
};
use std::collections::HashMap;
use std::sync::Arc;

/// An op and the values it reads and writes.
pub(crate) struct CompiledStep {
    pub op: Arc<Op>,
    pub inputs: Vec<ValueId>,
    pub output: ValueId,
    /// Node that names the step in listings and whose multiply-adds it does.
    pub node: NodeId,
    /// The nodes that are computed with it, of a cascade.
    pub then: Vec<NodeId>,
    /// The other siblings of one of its nodes.
    pub beside: Vec<NodeId>,
}

/// A network with its weights packed for one ISA, independent of input sizes; shared by sessions.
pub struct Compiled {
    pub(crate) graph: Graph,
    pub(crate) values: Vec<Value>,
    /// How each value is stored.
    pub(crate) formats: Vec<Format>,
    pub(crate) steps: Vec<CompiledStep>,
    pub(crate) inputs: Vec<ValueId>,
    pub(crate) outputs: Vec<ValueId>,
    pub(crate) isa: Isa,
}

/// A chain, and its op for these formats and an input of so many channels where that tells.
type Made = (Chain, Formats, Option<usize>, Arc<Op>);

/// Rows and columns of a node where they do not depend on the network's input.
pub(super) fn static_size(graph: &Graph, id: NodeId) -> Option<[usize; 2]> {
    let node = &graph.nodes[id.0];
    match node.layer()? {
        Layer::RoiAlign(r) => Some(r.output),
        Layer::Linear(_) | Layer::GlobalAvgPool(_) => Some([1, 1]),
        Layer::Conv2d(c) => {
            let [h, w] = static_size(graph, node.inputs[0])?;
            let s = c.out_shape(crate::shape::Shape::new(1, c.in_channels, h, w)).ok()?;
            Some([s.h, s.w])
        }
        Layer::MaxPool(p) => {
            let [h, w] = static_size(graph, node.inputs[0])?;
            let s = p.out_shape(crate::shape::Shape::new(1, 1, h, w)).ok()?;
            Some([s.h, s.w])
        }
        Layer::BatchNorm(_) | Layer::Activation(_) | Layer::Add(_) | Layer::Concat(_) => {
            static_size(graph, node.inputs[0])
        }
        _ => None,
    }
}

/// Strides of a map, relative to the network's input, up to which it is large: what lies between two steps there does not stay in a
/// second-level cache.
const LARGE: usize = 2;

/// The stages that an op is made of, if it can be part of a cascade; `format` is that of what it reads or writes.
fn stages(op: &Op, format: Format) -> Option<Vec<Stage>> {
    match &op.0 {
        Kind::Conv(c) if c.groups == 1 => Some(vec![Stage::Conv(c.clone())]),
        Kind::Depthwise(d) => Some(vec![Stage::Depthwise(d.clone())]),
        Kind::MaxPool(p) => Some(vec![Stage::MaxPool(*p, format)]),
        Kind::Cascade(c) => Some(c.stages.clone()),
        _ => None,
    }
}

/// The stride of every node's output relative to the network's first input; of those that are no maps of it something large.
fn strides(graph: &Graph) -> Vec<usize> {
    let mut strides: Vec<usize> = Vec::with_capacity(graph.nodes.len());
    for node in &graph.nodes {
        let of_input = node.inputs.first().map_or(1, |i| strides[i.0]);
        strides.push(match node.layer() {
            Some(Layer::Conv2d(c)) => of_input.saturating_mul(c.stride[0].max(c.stride[1])),
            Some(Layer::MaxPool(p)) => of_input.saturating_mul(p.stride[0].max(p.stride[1])),
            Some(Layer::BatchNorm(_) | Layer::Activation(_) | Layer::Add(_) | Layer::Concat(_)) | None => {
                of_input
            }
            _ => usize::MAX,
        });
    }
    strides
}

impl Compiled {
    /// Folds, fuses and packs `graph` with `weights` for `isa`, in f32.
    pub fn new(graph: &Graph, weights: &Weights, isa: Isa) -> Result<Self> {
        Self::in_numbers(graph, weights, isa, &Numbers::F32)
    }

    /// As [`Compiled::new`], computing in these numbers. Inputs and outputs are f32 all the same.
    pub fn in_numbers(graph: &Graph, weights: &Weights, isa: Isa, numbers: &Numbers) -> Result<Self> {
        let mut compiled = Self::in_steps(graph, weights, isa, numbers)?;
        compiled.resize_in_sums();
        compiled.cascade();
        Ok(compiled)
    }

    /// As [`Compiled::in_numbers`], every step by itself.
    pub(crate) fn in_steps(graph: &Graph, weights: &Weights, isa: Isa, numbers: &Numbers) -> Result<Self> {
        weights.check(graph)?;
        let mut draft = Draft::new(graph);
        let formats = assign(&mut draft, numbers, isa.has_tiles());
        // Chains by the first parameter of their start, with their ops.
        let mut made: HashMap<Option<ParamId>, Vec<Made>> = HashMap::new();
        let Draft { graph, values, steps, inputs, outputs } = draft;
        let lower = |step: DraftStep| {
            let DraftStep { work, inputs, output, node } = step;
            let format = |v: ValueId| formats[v.0];
            let input = format(inputs[0]);
            let add = inputs.get(1).map_or(Format::F32, |&v| format(v));
            let all = Formats { input, add, output: format(output) };
            let beside = match &work {
                Work::Siblings(chains) => chains[1..].iter().map(|c| c.start).collect(),
                _ => Vec::new(),
            };
            let op = match work {
                Work::Siblings(chains) => Arc::new(lower_siblings(&graph, weights, isa, &chains, all)?),
                Work::Copy => Arc::new(combine::cpu::copy([input, all.output])),
                Work::Widen => {
                    let op = WidenOp::new(isa);
                    let op = op.ok_or_else(|| Error::Internal("inputs are widened for AMX alone".into()))?;
                    Arc::new(Op(Kind::Widen(op)))
                }
                Work::Plain(layer, slope) => Arc::new(lower_plain(&layer, slope, all)?),
                Work::Chain(chain) => {
                    let made = made.entry(graph.nodes[node.0].params.first().copied()).or_default();
                    let wide = values[inputs[0].0].channels;
                    let like =
                        |(other, f, w, _): &&Made| (*f, *w) == (all, wide) && chain.is_like(other, &graph);
                    match made.iter().find(like) {
                        Some((_, _, _, op)) => op.clone(),
                        None => {
                            let op = Arc::new(lower_chain(&graph, weights, isa, &chain, wide, all)?);
                            made.push((chain, all, wide, op.clone()));
                            op
                        }
                    }
                }
            };
            Ok(CompiledStep { op, inputs, output, node, then: Vec::new(), beside })
        };
        let steps = steps.into_iter().map(lower).collect::<Result<_>>()?;
        Ok(Self { values, formats, steps, inputs, outputs, isa, graph })
    }

    /// Sums with a map that is resized for them alone, nearest, read the map as it is.
    fn resize_in_sums(&mut self) {
        let mut i = 0;
        while i < self.steps.len() {
            let Some((j, op)) = self.resizing_sum(i) else {
                i += 1;
                continue;
            };
            let (value, source) = (self.steps[i].output, self.steps[i].inputs[0]);
            let sum = &mut self.steps[j];
            sum.op = Arc::new(Op(Kind::Add(op)));
            // What is resized comes second: two terms make the same sum either way.
            sum.inputs.retain(|&v| v != value);
            sum.inputs.push(source);
            self.steps.remove(i);
        }
    }

    /// The sum that alone reads what step `i` resizes, and its op with that in it.
    fn resizing_sum(&self, i: usize) -> Option<(usize, AddOp)> {
        let step = &self.steps[i];
        let j = self.sole_reader(i)?;
        let sum = &self.steps[j];
        let (Kind::Resize { bilinear: false }, Kind::Add(add)) = (&step.op.0, &sum.op.0) else { return None };
        let AddOp { slope, corner, resizes: false, formats: [a, b, to] } = *add else { return None };
        let alike = self.formats[step.inputs[0].0] == self.formats[step.output.0];
        let formats = if sum.inputs[0] == step.output { [b, a, to] } else { [a, b, to] };
        (alike && sum.inputs.len() == 2).then_some((j, AddOp { slope, corner, resizes: true, formats }))
    }

    /// The step that alone reads what step `i` writes, where that is no output of the network nor part of a larger map.
    fn sole_reader(&self, i: usize) -> Option<usize> {
        let value = self.steps[i].output;
        let mut readers = (i + 1..self.steps.len()).filter(|&j| self.steps[j].inputs.contains(&value));
        let (j, None) = (readers.next()?, readers.next()) else { return None };
        let once = self.steps[j].inputs.iter().filter(|&&v| v == value).count() == 1;
        let apart = !self.outputs.contains(&value) && self.values[value.0].parent.is_none();
        (once && apart).then_some(j)
    }

    /// Makes one step of steps one behind the other, where what is between them is better not written whole.
    fn cascade(&mut self) {
        let strides = strides(&self.graph);
        let mut made: Vec<Arc<Op>> = Vec::new();
        let mut i = 0;
        while i < self.steps.len() {
            let Some((j, op)) = self.joined(i, &strides) else {
                i += 1;
                continue;
            };
            // Heads have theirs on every level.
            let same = |other: &&Arc<Op>| matches!(&other.0, Kind::Cascade(c) if c.is(&op));
            let op = made.iter().find(same).cloned().unwrap_or_else(|| {
                made.push(Arc::new(Op(Kind::Cascade(op))));
                made[made.len() - 1].clone()
            });
            let first = self.steps.remove(i);
            let second = &mut self.steps[j - 1];
            second.op = op;
            second.inputs[0] = first.inputs[0];
            let nodes = first.then.into_iter().chain([second.node]);
            second.then = nodes.chain(std::mem::take(&mut second.then)).collect();
            second.node = first.node;
            second.beside.extend(first.beside);
        }
    }

    /// The step that alone reads what step `i` writes, and both as one, where that is better.
    fn joined(&self, i: usize, strides: &[usize]) -> Option<(usize, CascadeOp)> {
        let (first, value) = (&self.steps[i], self.steps[i].output);
        let j = self.sole_reader(i)?;
        let second = &self.steps[j];
        let straight = first.inputs.len() == 1 && second.inputs[0] == value;
        let format = self.formats[value.0];
        let (before, behind) = (stages(&first.op, format)?, stages(&second.op, format)?);
        // A depthwise convolution and the pointwise one or the pooling behind it, wherever they are; else where maps are large.
        let pair = match (&before[..], &behind[0]) {
            ([Stage::Depthwise(_)], Stage::Conv(c)) => c.is_pointwise(),
            ([Stage::Depthwise(_)], Stage::MaxPool(..)) => true,
            _ => false,
        };
        let large = strides[self.values[value.0].node.0] <= LARGE;
        let stages = [before, behind].concat();
        (straight && (pair || large) && stages.len() <= MAX_STAGES).then_some((j, CascadeOp { stages }))
    }

    /// The value whose buffer this one is in, which is itself or the concatenation that it is part of, and its first channel
    /// there.
    pub(crate) fn root(&self, id: ValueId) -> (ValueId, usize) {
        root(&self.values, id)
    }

    /// Every step's layer name and kernel, in the order of `Plan::run_timed`'s times for a plan that wants everything.
    pub fn listing(&self) -> impl Iterator<Item = (&str, &'static str)> {
        self.steps.iter().map(|s| (self.graph.nodes[s.node.0].name.as_str(), s.op.name()))
    }

    /// Bytes of packed weights; those that several steps share count once.
    pub fn weight_bytes(&self) -> usize {
        let ops: HashMap<_, _> = self.steps.iter().map(|s| (Arc::as_ptr(&s.op), s.op.bytes())).collect();
        ops.into_values().sum()
    }

    /// The ISA the weights are packed for.
    pub fn isa(&self) -> Isa {
        self.isa
    }
}

/// Weights and bias of a chain.
pub(super) fn affine(graph: &Graph, weights: &Weights, chain: &Chain) -> Result<Affine> {
    let node = &graph.nodes[chain.start.0];
    let affine = Affine::of(graph, chain.start, weights)?;
    let mut affine = affine.ok_or_else(|| Error::Internal(format!("layer {} starts no chain", node.name)))?;
    for norm in &chain.norms {
        let node = &graph.nodes[norm.0];
        if let Some(Layer::BatchNorm(bn)) = node.layer() {
            fold_batchnorm(&mut affine, graph, node, bn.eps, weights)?;
        }
    }
    Ok(affine)
}

/// The op of siblings: one convolution with the output channels of all.
fn lower_siblings(
    graph: &Graph,
    weights: &Weights,
    isa: Isa,
    chains: &[Chain],
    formats: Formats,
) -> Result<Op> {
    let (mut weight, mut bias) = (Vec::new(), Vec::new());
    for chain in chains {
        let own = affine(graph, weights, chain)?;
        weight.extend(own.weight);
        bias.extend(own.bias);
    }
    let (first, rule) = (&chains[0], (chains[0].slope, chains[0].residual));
    match graph.nodes[first.start.0].layer() {
        Some(Layer::Conv2d(c)) => {
            let all = Conv2d { out_channels: bias.len(), ..*c };
            conv2d::cpu::lower(&all, isa, &weight, &bias, rule, formats)
        }
        _ => Err(Error::Internal("siblings are convolutions".into())),
    }
}

/// The op of a chain, of an input that has so many channels where `wide` tells (those beyond its own hold zeros).
fn lower_chain(
    graph: &Graph,
    weights: &Weights,
    isa: Isa,
    chain: &Chain,
    wide: Option<usize>,
    formats: Formats,
) -> Result<Op> {
    let node = &graph.nodes[chain.start.0];
    let affine = affine(graph, weights, chain)?;
    let Affine { weight, bias, .. } = &affine;
    let rule = (chain.slope, chain.residual);
    match node.layer() {
        Some(Layer::Conv2d(c)) => match wide.filter(|&wide| wide > c.in_channels) {
            Some(wide) => {
                let taps = c.kernel[0] * c.kernel[1];
                let zeros = vec![0.0; (wide - c.in_channels) * taps];
                let of_outputs = weight.chunks_exact(c.in_channels * taps);
                let weight: Vec<f32> = of_outputs.flat_map(|w| w.iter().chain(&zeros).copied()).collect();
                let c = Conv2d { in_channels: wide, ..*c };
                conv2d::cpu::lower(&c, isa, &weight, bias, rule, formats)
            }
            None => conv2d::cpu::lower(c, isa, weight, bias, rule, formats),
        },
        Some(Layer::ConvTranspose2d(c)) => Ok(conv_transpose2d::cpu::lower(c, weight, bias)),
        Some(Layer::BatchNorm(b)) => {
            Ok(batchnorm::cpu::lower(b, isa, weight, bias, chain.slope, [formats.input, formats.output]))
        }
        Some(Layer::Linear(l)) => {
            let size = static_size(graph, node.inputs[0])
                .filter(|[h, w]| channels(graph, node.inputs[0]) * h * w == l.in_features)
                .ok_or_else(|| {
                    let (name, features) = (&node.name, l.in_features);
                    Error::InvalidModel(format!(
                        "layer {name}: linear needs a map of fixed size, {features} values"
                    ))
                })?;
            Ok(linear::cpu::lower(l, isa, size, weight, bias, rule, formats))
        }
        _ => Err(Error::Internal(format!("layer {} starts no chain", node.name))),
    }
}

/// The op of a layer without weights, with an activation of this slope behind it where it is a sum.
fn lower_plain(layer: &Layer, slope: f32, f: Formats) -> Result<Op> {
    Ok(match layer {
        Layer::Activation(a) => activation::cpu::lower(a, [f.input, f.output]),
        Layer::MaxPool(p) => pool::cpu::lower_max(p),
        Layer::GlobalAvgPool(_) => pool::cpu::lower_global_avg(),
        Layer::Upsample(u) => upsample::cpu::lower(u),
        Layer::Crop(c) => combine::cpu::crop(c, [f.input, f.output]),
        Layer::RoiAlign(r) => roi_align::cpu::lower(r),
        Layer::Add(_) => combine::cpu::add(slope, [f.input, f.add, f.output]),
        other => return Err(Error::Internal(format!("{} is not a plain layer", other.kind()))),
    })
}
