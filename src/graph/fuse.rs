//! From a network to the ops of a plan: batch normalisation folded into convolutions; bias,
//! activation, residual sums and nearest upsampling fused into their epilogues; concatenations written in place.
//!
//! A chain starts at a convolution and absorbs what follows as long as each value has one reader:
//!
//! ```text
//! conv -> batchnorm? -> activation?                        (slope)
//! conv -> batchnorm? -> add(other) -> activation?          (residual before activation: ResNet)
//! conv -> batchnorm? -> activation -> add(other)           (residual after activation: top-down sums)
//! ```
//!
//! where `other` may be a nearest upsampling that nobody else reads. The chain's op stands where its
//! last node stood, so everything it reads has been computed.

use super::build::{Graph, Node, NodeId, NodeKind, ParamId};
use super::fold::{fold_batchnorm, Affine};
use super::weights::Weights;
use crate::cpu::conv::Residual;
use crate::cpu::pair::PairOp;
use crate::cpu::program::Kind;
use crate::cpu::{Isa, Op};
use crate::error::{Error, Result};
use crate::layers::{Activation, Interpolation, Layer};
use std::collections::HashMap;
use std::sync::Arc;

/// A tensor that exists at run time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Value {
    /// The node whose output it is; gives its shape.
    pub node: NodeId,
    /// The concatenation that it is written into, and its first channel there.
    pub parent: Option<(ValueId, usize)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct ValueId(pub usize);

/// An op and the values it reads and writes.
pub(crate) struct CompiledStep {
    pub op: Arc<Op>,
    pub inputs: Vec<ValueId>,
    pub output: ValueId,
    /// Node that names the step in listings and whose multiply-adds it does.
    pub node: NodeId,
    /// The node that is computed with it, of a pair.
    pub then: Option<NodeId>,
}

/// A network with its weights packed for one ISA, independent of input sizes; shared by sessions.
pub struct Compiled {
    pub(crate) graph: Graph,
    pub(crate) values: Vec<Value>,
    pub(crate) steps: Vec<CompiledStep>,
    pub(crate) inputs: Vec<ValueId>,
    pub(crate) outputs: Vec<ValueId>,
    pub(crate) isa: Isa,
}

/// Slope of max(x, slope * x), for the activations that are of that form.
fn slope_of(layer: Option<&Layer>) -> Option<f32> {
    match layer {
        Some(Layer::Activation(Activation::Relu)) => Some(0.0),
        Some(Layer::Activation(Activation::LeakyRelu(s))) if (0.0..1.0).contains(s) => Some(*s),
        _ => None,
    }
}

/// Readers of every node, those alone that an output needs; an output is a reader of its own kind.
struct Uses {
    readers: Vec<Vec<NodeId>>,
    is_output: Vec<bool>,
}

impl Uses {
    fn of(graph: &Graph) -> Self {
        let mut readers = vec![Vec::new(); graph.nodes.len()];
        let mut is_output = vec![false; graph.nodes.len()];
        graph.outputs.iter().for_each(|(_, id)| is_output[id.0] = true);
        for (i, node) in graph.nodes.iter().enumerate().rev() {
            if is_output[i] || !readers[i].is_empty() {
                node.value_inputs().iter().for_each(|x| readers[x.0].push(NodeId(i)));
            }
        }
        Self { readers, is_output }
    }

    /// The one node that reads this value, if there is exactly one.
    fn sole(&self, id: NodeId) -> Option<NodeId> {
        match self.readers[id.0][..] {
            [reader] if !self.is_output[id.0] => Some(reader),
            _ => None,
        }
    }

    fn read(&self, id: NodeId) -> bool {
        self.is_output[id.0] || !self.readers[id.0].is_empty()
    }
}

/// Moves an activation that follows a concatenation in front of it, onto every part, so that the
/// convolutions that make the parts can absorb it: relu(concat(a, b)) = concat(relu(a), relu(b)).
fn activate_before_concat(graph: &Graph) -> Graph {
    let uses = Uses::of(graph);
    let mut out = Graph { nodes: Vec::new(), params: graph.params.clone(), ..Graph::default() };
    let mut moved: Vec<NodeId> = Vec::with_capacity(graph.nodes.len());
    let remap = |moved: &[NodeId], ids: &[NodeId]| ids.iter().map(|i| moved[i.0]).collect::<Vec<_>>();
    let mut skip = vec![false; graph.nodes.len()];
    for (i, node) in graph.nodes.iter().enumerate() {
        let mut inputs = remap(&moved, &node.inputs);
        if skip[i] {
            moved.push(inputs[0]);
            continue;
        }
        let after = uses.sole(NodeId(i)).filter(|a| slope_of(graph.nodes[a.0].layer()).is_some());
        if let (Some(Layer::Concat(_)), Some(after)) = (node.layer(), after) {
            let activation = &graph.nodes[after.0];
            for x in inputs.iter_mut() {
                out.nodes.push(Node { inputs: vec![*x], ..activation.clone() });
                *x = NodeId(out.nodes.len() - 1);
            }
            skip[after.0] = true;
        }
        out.nodes.push(Node { inputs, ..node.clone() });
        moved.push(NodeId(out.nodes.len() - 1));
    }
    out.inputs = remap(&moved, &graph.inputs);
    out.outputs = graph.outputs.iter().map(|(n, id)| (n.clone(), moved[id.0])).collect();
    out
}

/// What a chain of nodes becomes.
struct Chain {
    start: NodeId,
    last: NodeId,
    /// Batch normalisations folded into the start's weights.
    norms: Vec<NodeId>,
    slope: f32,
    residual: Residual,
    add: Option<NodeId>,
}

/// Whether a chain can start with this layer: those of which [`Affine::of`] makes weights.
fn starts(layer: Option<&Layer>) -> bool {
    matches!(
        layer,
        Some(Layer::Conv2d(_) | Layer::ConvTranspose2d(_) | Layer::BatchNorm(_) | Layer::Linear(_))
    )
}

/// Follows the chain that starts at `start`, a convolution-like node.
fn follow(graph: &Graph, uses: &Uses, absorbed: &mut [bool], start: NodeId) -> Chain {
    let dense = matches!(graph.nodes[start.0].layer(), Some(Layer::Conv2d(c)) if !c.is_depthwise())
        || matches!(graph.nodes[start.0].layer(), Some(Layer::Linear(_)));
    let can_activate =
        dense || matches!(graph.nodes[start.0].layer(), Some(Layer::Conv2d(_) | Layer::BatchNorm(_)));
    let mut chain =
        Chain { start, last: start, norms: Vec::new(), slope: 1.0, residual: Residual::None, add: None };
    let mut activated = false;
    while let Some(next) = uses.sole(chain.last) {
        let node = &graph.nodes[next.0];
        match node.layer() {
            _ if absorbed[next.0] => break,
            Some(Layer::BatchNorm(_)) if !activated && chain.add.is_none() => chain.norms.push(next),
            Some(layer) if !activated && can_activate && slope_of(Some(layer)).is_some() => {
                chain.slope = slope_of(Some(layer)).expect("checked by the guard");
                activated = true;
            }
            Some(Layer::Add(_)) if dense && chain.add.is_none() => {
                let other = if node.inputs[0] == chain.last { node.inputs[1] } else { node.inputs[0] };
                let nearest = matches!(graph.nodes[other.0].layer(),
                    Some(Layer::Upsample(u)) if u.mode == Interpolation::Nearest);
                if nearest && uses.sole(other).is_some() {
                    absorbed[other.0] = true;
                    chain.add = Some(graph.nodes[other.0].inputs[0]);
                } else {
                    chain.add = Some(other);
                }
                chain.residual =
                    if activated { Residual::AfterActivation } else { Residual::BeforeActivation };
            }
            _ => break,
        }
        // Taken, so that no other chain starts there or takes it too (a sum of two convolutions).
        absorbed[next.0] = true;
        chain.last = next;
        // An activation after a sum ends the chain; so does a sum after an activation.
        if chain.add.is_some() && activated {
            break;
        }
    }
    chain
}

impl Chain {
    /// Whether `other` has the same weights and the same settings, as a head has on every level of a pyramid: one op serves
    /// both.
    fn is_like(&self, other: &Self, graph: &Graph) -> bool {
        let node = |id: NodeId| &graph.nodes[id.0];
        let (a, b) = (node(self.start), node(other.start));
        let norms = self.norms.iter().zip(&other.norms);
        // A fully connected layer also depends on the size of its map.
        a.kind == b.kind
            && !matches!(a.layer(), Some(Layer::Linear(_)))
            && a.params == b.params
            && self.norms.len() == other.norms.len()
            && norms
                .into_iter()
                .all(|(&a, &b)| node(a).kind == node(b).kind && node(a).params == node(b).params)
            && self.slope == other.slope
            && self.residual == other.residual
    }
}

/// Rows and columns of a node where they do not depend on the network's input.
fn static_size(graph: &Graph, id: NodeId) -> Option<[usize; 2]> {
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

impl Compiled {
    /// Folds, fuses and packs `graph` with `weights` for `isa`.
    pub fn new(graph: &Graph, weights: &Weights, isa: Isa) -> Result<Self> {
        weights.check(graph)?;
        let graph = activate_before_concat(graph);
        let uses = Uses::of(&graph);
        let mut absorbed = vec![false; graph.nodes.len()];
        let mut chains: HashMap<NodeId, Chain> = HashMap::new();
        for i in 0..graph.nodes.len() {
            let id = NodeId(i);
            if absorbed[i] || !uses.read(id) || !starts(graph.nodes[i].layer()) {
                continue;
            }
            absorbed[i] = true;
            let chain = follow(&graph, &uses, &mut absorbed, id);
            chains.insert(chain.last, chain);
        }
        // Chains by the first parameter of their start, with their ops.
        let mut made: HashMap<Option<ParamId>, Vec<(Chain, Arc<Op>)>> = HashMap::new();
        let mut c = Self {
            values: Vec::new(),
            steps: Vec::new(),
            inputs: Vec::new(),
            outputs: Vec::new(),
            isa,
            graph: Graph::default(),
        };
        let mut value_of: HashMap<NodeId, ValueId> = HashMap::new();
        for (i, node) in graph.nodes.iter().enumerate() {
            let id = NodeId(i);
            let chain = chains.remove(&id);
            let inside = absorbed[i] && chain.is_none();
            if inside || !(uses.read(id) || matches!(node.kind, NodeKind::Input { .. })) {
                continue;
            }
            let value = c.value(id);
            value_of.insert(id, value);
            let read = |id: &NodeId| value_of[id];
            match (&node.kind, chain) {
                (NodeKind::Input { .. }, _) => c.inputs.push(value),
                (_, Some(chain)) => {
                    let start = &graph.nodes[chain.start.0];
                    let mut inputs = vec![read(&start.inputs[0])];
                    inputs.extend(chain.add.iter().map(read));
                    let made = made.entry(start.params.first().copied()).or_default();
                    let same = made.iter().find(|(other, _)| chain.is_like(other, &graph));
                    let start = chain.start;
                    let op = match same {
                        Some((_, op)) => op.clone(),
                        None => {
                            let op = Arc::new(lower_chain(&graph, weights, isa, &chain)?);
                            made.push((chain, op.clone()));
                            op
                        }
                    };
                    c.step(op, inputs, value, start);
                }
                (NodeKind::Layer(Layer::Concat(_)), None) => {
                    let parts: Vec<ValueId> = node.inputs.iter().map(read).collect();
                    c.concat(&graph, &uses, id, value, &node.inputs, &parts);
                }
                (NodeKind::Layer(layer), None) => {
                    let inputs = node.value_inputs().iter().map(read).collect();
                    let (op, last) = lower_plain(&graph, &uses, &mut absorbed, id, layer)?;
                    if last != id {
                        // The activation after a sum was taken in: the value is the activation's.
                        value_of.insert(last, value);
                        c.values[value.0].node = last;
                    }
                    c.step(Arc::new(op), inputs, value, id);
                }
            }
        }
        c.outputs = graph.outputs.iter().map(|(_, id)| value_of[id]).collect();
        c.graph = graph;
        c.pair();
        Ok(c)
    }

    /// Makes one step of a depthwise convolution and the pointwise one that alone reads it.
    fn pair(&mut self) {
        let mut pairs: Vec<Arc<Op>> = Vec::new();
        let mut i = 0;
        while i < self.steps.len() {
            let value = self.steps[i].output;
            let readers: Vec<usize> =
                (i + 1..self.steps.len()).filter(|&j| self.steps[j].inputs.contains(&value)).collect();
            let alone = !self.outputs.contains(&value) && self.values[value.0].parent.is_none();
            let [j] = readers[..] else {
                i += 1;
                continue;
            };
            let (first, second) = (&self.steps[i], &self.steps[j]);
            let takes = second.inputs[0] == value && !second.inputs[1..].contains(&value);
            let pair = match (&first.op.0, &second.op.0) {
                (Kind::Depthwise(d), Kind::Conv(c)) if alone && takes => PairOp::new(d, c),
                _ => None,
            };
            let Some(pair) = pair else {
                i += 1;
                continue;
            };
            // Heads have theirs on every level.
            let made = pairs.iter().find(|op| matches!(&op.0, Kind::Pair(p) if p.is(&pair))).cloned();
            let op = made.unwrap_or_else(|| {
                pairs.push(Arc::new(Op(Kind::Pair(pair))));
                pairs[pairs.len() - 1].clone()
            });
            let first = self.steps.remove(i);
            let second = &mut self.steps[j - 1];
            second.op = op;
            second.inputs[0] = first.inputs[0];
            second.then = Some(second.node);
            second.node = first.node;
        }
    }

    /// The value whose buffer this one is in, which is itself or the concatenation that it is part of, and its first channel
    /// there.
    pub(crate) fn root(&self, mut id: ValueId) -> (ValueId, usize) {
        let mut first = 0;
        while let Some((parent, channel)) = self.values[id.0].parent {
            first += channel;
            id = parent;
        }
        (id, first)
    }

    fn value(&mut self, node: NodeId) -> ValueId {
        self.values.push(Value { node, parent: None });
        ValueId(self.values.len() - 1)
    }

    fn step(&mut self, op: Arc<Op>, inputs: Vec<ValueId>, output: ValueId, node: NodeId) {
        self.steps.push(CompiledStep { op, inputs, output, node, then: None });
    }

    /// Parts that nobody else reads are written straight into the concatenation; others are copied.
    fn concat(
        &mut self,
        graph: &Graph,
        uses: &Uses,
        id: NodeId,
        value: ValueId,
        nodes: &[NodeId],
        parts: &[ValueId],
    ) {
        let mut first = 0;
        for (&node, &part) in nodes.iter().zip(parts) {
            let elidable = uses.sole(self.values[part.0].node) == Some(id)
                && self.values[part.0].parent.is_none()
                && self.steps.iter().any(|s| s.output == part);
            if elidable {
                self.values[part.0].parent = Some((value, first));
            } else {
                let copy = self.value(self.values[part.0].node);
                self.values[copy.0].parent = Some((value, first));
                self.step(Arc::new(crate::layers::combine::cpu::copy()), vec![part], copy, id);
            }
            first += channels(graph, node);
        }
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

/// Channels of a node's output.
fn channels(graph: &Graph, id: NodeId) -> usize {
    let node = &graph.nodes[id.0];
    let first = || channels(graph, node.inputs[0]);
    match &node.kind {
        NodeKind::Input { channels } => *channels,
        NodeKind::Layer(layer) => match layer {
            Layer::Conv2d(c) => c.out_channels,
            Layer::ConvTranspose2d(c) => c.out_channels,
            Layer::Linear(l) => l.out_features,
            Layer::Concat(_) => node.inputs.iter().map(|i| channels(graph, *i)).sum(),
            _ => first(),
        },
    }
}

/// The op of a chain.
fn lower_chain(graph: &Graph, weights: &Weights, isa: Isa, chain: &Chain) -> Result<Op> {
    use crate::layers::{batchnorm, conv2d, conv_transpose2d, linear};
    let node = &graph.nodes[chain.start.0];
    let affine = Affine::of(graph, chain.start, weights)?;
    let mut affine = affine.ok_or_else(|| Error::Internal(format!("layer {} starts no chain", node.name)))?;
    for norm in &chain.norms {
        let node = &graph.nodes[norm.0];
        if let Some(Layer::BatchNorm(bn)) = node.layer() {
            fold_batchnorm(&mut affine, graph, node, bn.eps, weights)?;
        }
    }
    let Affine { weight, bias, .. } = &affine;
    match node.layer() {
        Some(Layer::Conv2d(c)) => conv2d::cpu::lower(c, isa, weight, bias, chain.slope, chain.residual),
        Some(Layer::ConvTranspose2d(c)) => Ok(conv_transpose2d::cpu::lower(c, weight, bias)),
        Some(Layer::BatchNorm(b)) => Ok(batchnorm::cpu::lower(b, isa, weight, bias, chain.slope)),
        Some(Layer::Linear(l)) => {
            let size = static_size(graph, node.inputs[0])
                .filter(|[h, w]| channels(graph, node.inputs[0]) * h * w == l.in_features)
                .ok_or_else(|| {
                    let (name, features) = (&node.name, l.in_features);
                    Error::InvalidModel(format!(
                        "layer {name}: linear needs a map of fixed size, {features} values"
                    ))
                })?;
            Ok(linear::cpu::lower(l, isa, size, weight, bias, chain.slope, chain.residual))
        }
        _ => Err(Error::Internal(format!("layer {} starts no chain", node.name))),
    }
}

/// The op of a layer without weights, and the last node it stands for (an activation after a sum
/// is taken in).
fn lower_plain(
    graph: &Graph,
    uses: &Uses,
    absorbed: &mut [bool],
    id: NodeId,
    layer: &Layer,
) -> Result<(Op, NodeId)> {
    use crate::layers::{activation, combine, pool, roi_align, upsample};
    let op = match layer {
        Layer::Activation(a) => activation::cpu::lower(a),
        Layer::MaxPool(p) => pool::cpu::lower_max(p),
        Layer::GlobalAvgPool(_) => pool::cpu::lower_global_avg(),
        Layer::Upsample(u) => upsample::cpu::lower(u),
        Layer::Crop(c) => combine::cpu::crop(c),
        Layer::RoiAlign(r) => roi_align::cpu::lower(r),
        Layer::Add(_) => {
            let after = uses.sole(id).filter(|a| !absorbed[a.0]);
            let slope = after.and_then(|a| slope_of(graph.nodes[a.0].layer()));
            if let (Some(a), Some(slope)) = (after, slope) {
                absorbed[a.0] = true;
                return Ok((combine::cpu::add(slope), a));
            }
            combine::cpu::add(1.0)
        }
        other => return Err(Error::Internal(format!("{} is not a plain layer", other.kind()))),
    };
    Ok((op, id))
}
