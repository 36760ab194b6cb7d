//! From a network to the steps of a plan: batch normalisation folded into convolutions; bias,
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
//! where `other` may be a nearest upsampling that nobody else reads. The chain's step stands where its
//! last node stood, so everything it reads has been computed. What its op is, [`compile`](super::compile) decides.

use super::build::{Graph, Node, NodeId, NodeKind};
use crate::cpu::conv::Residual;
use crate::layers::{Activation, Conv2d, Interpolation, Layer};
use crate::shape::Shape;
use std::collections::HashMap;

/// A tensor that exists at run time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Value {
    /// The node whose output it is; gives its shape.
    pub node: NodeId,
    /// The concatenation that it is written into, and its first channel there.
    pub parent: Option<(ValueId, usize)>,
    /// Its channels, where they are not the node's.
    pub channels: Option<usize>,
}

impl Value {
    /// Its shape, by those of the nodes.
    pub fn shape(&self, shapes: &[Shape]) -> Shape {
        let shape = shapes[self.node.0];
        Shape { c: self.channels.unwrap_or(shape.c), ..shape }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct ValueId(pub usize);

/// What a step computes.
#[derive(Clone, Debug)]
pub(crate) enum Work {
    Chain(Chain),
    /// Pointwise convolutions of the same map, of equal activation: what they write lies side by side.
    Siblings(Vec<Chain>),
    /// A layer without weights; of a sum, the slope of the activation behind it.
    Plain(Layer, f32),
    /// A copy of its input.
    Copy,
    /// A copy of a network's input in bf16, with channels of zeros behind its own.
    Widen,
}

/// A step whose op is not made yet.
#[derive(Clone, Debug)]
pub(crate) struct DraftStep {
    pub work: Work,
    pub inputs: Vec<ValueId>,
    pub output: ValueId,
    /// Node that names the step in listings and whose multiply-adds it does.
    pub node: NodeId,
}

/// A network's steps and the values between them.
pub(crate) struct Draft {
    pub graph: Graph,
    pub values: Vec<Value>,
    pub steps: Vec<DraftStep>,
    pub inputs: Vec<ValueId>,
    pub outputs: Vec<ValueId>,
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
#[derive(Clone, Debug)]
pub(crate) struct Chain {
    pub start: NodeId,
    last: NodeId,
    /// Batch normalisations folded into the start's weights.
    pub norms: Vec<NodeId>,
    pub slope: f32,
    pub residual: Residual,
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
    pub fn is_like(&self, other: &Self, graph: &Graph) -> bool {
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

impl Draft {
    /// Folds and fuses `graph`.
    pub fn new(graph: &Graph) -> Self {
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
        let mut d = Self {
            values: Vec::new(),
            steps: Vec::new(),
            inputs: Vec::new(),
            outputs: Vec::new(),
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
            let value = d.value(id);
            value_of.insert(id, value);
            let read = |id: &NodeId| value_of[id];
            match (&node.kind, chain) {
                (NodeKind::Input { .. }, _) => d.inputs.push(value),
                (_, Some(chain)) => {
                    let start = chain.start;
                    let mut inputs = vec![read(&graph.nodes[start.0].inputs[0])];
                    inputs.extend(chain.add.iter().map(read));
                    d.step(Work::Chain(chain), inputs, value, start);
                }
                (NodeKind::Layer(Layer::Concat(_)), None) => {
                    let parts: Vec<ValueId> = node.inputs.iter().map(read).collect();
                    d.concat(&graph, &uses, id, value, &node.inputs, &parts);
                }
                (NodeKind::Layer(layer), None) => {
                    let inputs = node.value_inputs().iter().map(read).collect();
                    let (slope, last) = activation_behind(&graph, &uses, &mut absorbed, id);
                    if last != id {
                        // The activation after a sum was taken in: the value is the activation's.
                        value_of.insert(last, value);
                        d.values[value.0].node = last;
                    }
                    d.step(Work::Plain(layer.clone(), slope), inputs, value, id);
                }
            }
        }
        d.outputs = graph.outputs.iter().map(|(_, id)| value_of[id]).collect();
        d.graph = graph;
        d.join_siblings();
        d
    }

    /// Pointwise convolutions that read the same map and write no more than a register tile together, as heads have them, become one: the
    /// map is read once. Outputs of the network stay apart, since each may be wanted without the others.
    fn join_siblings(&mut self) {
        let mut i = 0;
        while i < self.steps.len() {
            let Some(first) = self.pointwise(i) else {
                i += 1;
                continue;
            };
            let (mut all, mut count) = (vec![i], first.1.out_channels);
            for j in i + 1..self.steps.len() {
                let Some((chain, conv)) = self.pointwise(j) else { continue };
                let like = self.steps[j].inputs == self.steps[i].inputs && chain.slope == first.0.slope;
                if like && conv.stride == first.1.stride && count + conv.out_channels <= MOST_TOGETHER {
                    count += conv.out_channels;
                    all.push(j);
                }
            }
            if all.len() > 1 {
                self.join(&all, count);
            }
            i += 1;
        }
    }

    /// The chain and the convolution of a step that can have siblings.
    fn pointwise(&self, step: usize) -> Option<(&Chain, &Conv2d)> {
        let s = &self.steps[step];
        let Work::Chain(chain) = &s.work else { return None };
        let Some(Layer::Conv2d(c)) = self.graph.nodes[chain.start.0].layer() else { return None };
        let plain = c.kernel == [1, 1] && c.padding == [0; 4] && c.groups == 1 && s.inputs.len() == 1;
        let apart = self.values[s.output.0].parent.is_none() && !self.outputs.contains(&s.output);
        (plain && apart).then_some((chain, c))
    }

    /// Makes one step of these, the first of which stands before the others.
    fn join(&mut self, all: &[usize], channels: usize) {
        let together = self.value(self.values[self.steps[all[0]].output.0].node);
        self.values[together.0].channels = Some(channels);
        let (mut chains, mut at) = (Vec::new(), 0);
        for &i in all {
            if let Work::Chain(chain) = &self.steps[i].work {
                let Some(Layer::Conv2d(c)) = self.graph.nodes[chain.start.0].layer() else { continue };
                self.values[self.steps[i].output.0].parent = Some((together, at));
                at += c.out_channels;
                chains.push(chain.clone());
            }
        }
        let first = &mut self.steps[all[0]];
        (first.work, first.output) = (Work::Siblings(chains), together);
        all[1..].iter().rev().for_each(|&i| {
            self.steps.remove(i);
        });
    }

    /// A name for every value, the same whenever the same network is drafted: the layer's that its step starts with, numbered from the
    /// second of that name on.
    pub fn names(&self) -> Vec<String> {
        let mut nodes: Vec<NodeId> = self.values.iter().map(|v| v.node).collect();
        self.steps.iter().for_each(|s| nodes[s.output.0] = s.node);
        let mut seen: HashMap<&str, usize> = HashMap::new();
        let name = |node: NodeId| {
            let name = self.graph.nodes[node.0].name.as_str();
            let count = seen.entry(name).or_default();
            *count += 1;
            if *count > 1 {
                format!("{name}#{count}")
            } else {
                name.to_string()
            }
        };
        nodes.into_iter().map(name).collect()
    }

    pub fn value(&mut self, node: NodeId) -> ValueId {
        self.values.push(Value { node, parent: None, channels: None });
        ValueId(self.values.len() - 1)
    }

    fn step(&mut self, work: Work, inputs: Vec<ValueId>, output: ValueId, node: NodeId) {
        self.steps.push(DraftStep { work, inputs, output, node });
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
                self.step(Work::Copy, vec![part], copy, id);
            }
            first += channels(graph, node);
        }
    }
}

/// Most output channels of siblings together: one register of the widest instruction set.
const MOST_TOGETHER: usize = 16;

/// The value whose buffer this one is in, which is itself or the concatenation that it is part of, and its first channel
/// there.
pub(crate) fn root(values: &[Value], mut id: ValueId) -> (ValueId, usize) {
    let mut first = 0;
    while let Some((parent, channel)) = values[id.0].parent {
        first += channel;
        id = parent;
    }
    (id, first)
}

/// The slope of the activation that a sum takes in, where there is one, and the last node that the sum's step stands for.
fn activation_behind(graph: &Graph, uses: &Uses, absorbed: &mut [bool], id: NodeId) -> (f32, NodeId) {
    let is_sum = matches!(graph.nodes[id.0].layer(), Some(Layer::Add(_)));
    let after = uses.sole(id).filter(|a| is_sum && !absorbed[a.0]);
    let slope = after.and_then(|a| slope_of(graph.nodes[a.0].layer()));
    match (after, slope) {
        (Some(after), Some(slope)) => {
            absorbed[after.0] = true;
            (slope, after)
        }
        _ => (1.0, id),
    }
}

/// Channels of a node's output.
pub(crate) fn channels(graph: &Graph, id: NodeId) -> usize {
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
