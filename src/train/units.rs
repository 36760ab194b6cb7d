//! A network as the trainer runs it: every operation with the batch normalisation and activation behind it is one
//! unit, so that the map between them is all that is stored.

use crate::graph::build::{Node, NodeKind, ParamId};
use crate::graph::{Graph, NodeId};
use crate::layers::{Activation, Conv2d, Interpolation, Layer, MaxPool, RoiAlign};

/// What a unit computes before its normalisation and activation.
#[derive(Clone, Debug)]
pub(super) enum Op {
    /// A network input, by its place among them.
    Input(usize),
    /// A network input that RoIAlign reads its boxes from, by its place among these. It has no map: boxes stay in f32.
    Boxes(usize),
    /// RoIAlign on the boxes of this place.
    RoiAlign { roi: RoiAlign, boxes: usize },
    /// Convolution without groups.
    Conv { conv: Conv2d, weight: ParamId, bias: Option<ParamId> },
    /// One filter a channel.
    Depthwise { conv: Conv2d, weight: ParamId, bias: Option<ParamId> },
    /// Sum of maps; where marked, of a map enlarged to the output's size by nearest neighbours.
    Sum { enlarged: Vec<bool> },
    /// Channels side by side.
    Concat,
    /// Maximum over a window.
    MaxPool(MaxPool),
    /// Bilinear interpolation to the output's size.
    Bilinear,
    /// Any other layer, by its plain loops; `params` as the graph's node lists them.
    Plain { layer: Layer, params: Vec<ParamId> },
}

/// A batch normalisation's parameters.
#[derive(Clone, Copy, Debug)]
pub(super) struct Norm {
    pub scale: ParamId,
    pub shift: ParamId,
    pub mean: ParamId,
    pub variance: ParamId,
    pub eps: f64,
    pub momentum: f64,
}

/// One unit.
#[derive(Clone, Debug)]
pub(super) struct Unit {
    /// Name of the node that gives the operation.
    pub name: String,
    /// Node whose shape the stored map has.
    pub node: usize,
    /// Node whose value readers see.
    pub shown: usize,
    pub op: Op,
    /// Units whose values the operation reads.
    pub inputs: Vec<usize>,
    /// The normalisation behind the operation.
    pub norm: Option<Norm>,
    /// 1 none, 0 ReLU, between leaky.
    pub slope: f32,
}

impl Unit {
    /// Parameters it trains.
    pub(super) fn params(&self) -> Vec<ParamId> {
        let mut all: Vec<ParamId> = match &self.op {
            Op::Conv { weight, bias, .. } | Op::Depthwise { weight, bias, .. } => {
                std::iter::once(*weight).chain(*bias).collect()
            }
            Op::Plain { params, .. } => params.clone(),
            _ => Vec::new(),
        };
        all.extend(self.norm.iter().flat_map(|n: &Norm| [n.scale, n.shift]));
        all
    }
}

/// Units of `graph` in its order, and for every node the unit that shows its value (None where the value exists
/// nowhere: it is between a unit's operation and its activation, or enlarged on the way).
pub(super) fn units(graph: &Graph) -> (Vec<Unit>, Vec<Option<usize>>) {
    let mut readers = vec![0usize; graph.nodes.len()];
    for node in &graph.nodes {
        for input in node.value_inputs() {
            readers[input.0] += 1;
        }
    }
    for (_, id) in &graph.outputs {
        readers[id.0] += 1;
    }
    let mut made: Vec<Unit> = Vec::new();
    let mut unit_of: Vec<Option<usize>> = vec![None; graph.nodes.len()];
    // Enlargements that the sum reading them takes over: the unit they enlarge.
    let mut enlarged: Vec<Option<usize>> = vec![None; graph.nodes.len()];
    let (mut inputs_seen, mut boxes_seen) = (0, 0);
    let are_boxes = |i: usize| {
        let mut readers = graph.nodes.iter().filter(|n| n.inputs.contains(&NodeId(i))).peekable();
        let aligns = |n: &Node| matches!(n.layer(), Some(Layer::RoiAlign(_))) && n.inputs[0].0 != i;
        readers.peek().is_some() && readers.all(aligns)
    };
    for (i, node) in graph.nodes.iter().enumerate() {
        let unit = |id: &NodeId| unit_of[id.0].expect("a value that is read is shown by a unit");
        let new = |op: Op, inputs: Vec<usize>| Unit {
            name: node.name.clone(),
            node: i,
            shown: i,
            op,
            inputs,
            norm: None,
            slope: 1.0,
        };
        let layer = match &node.kind {
            NodeKind::Input { .. } => {
                let (op, seen): (fn(usize) -> Op, _) =
                    if are_boxes(i) { (Op::Boxes, &mut boxes_seen) } else { (Op::Input, &mut inputs_seen) };
                made.push(new(op(*seen), Vec::new()));
                *seen += 1;
                unit_of[i] = Some(made.len() - 1);
                continue;
            }
            NodeKind::Layer(layer) => layer,
        };
        let x = node.inputs[0];
        // The unit that shows the input to this node alone, if it is still open for a normalisation or activation.
        let open = enlarged[x.0]
            .is_none()
            .then(|| unit(&x))
            .filter(|&u| readers[x.0] == 1 && made[u].slope == 1.0 && !matches!(made[u].op, Op::Input(_)));
        let slope = match layer {
            Layer::Activation(Activation::Relu) => Some(0.0),
            Layer::Activation(Activation::LeakyRelu(slope)) => Some(*slope),
            _ => None,
        };
        let made_unit = match layer {
            Layer::BatchNorm(l) => {
                let norm = Norm {
                    scale: node.params[0],
                    shift: node.params[1],
                    mean: node.params[2],
                    variance: node.params[3],
                    eps: l.eps,
                    momentum: l.momentum,
                };
                if let Some(u) = open.filter(|&u| made[u].norm.is_none()) {
                    made[u].norm = Some(norm);
                    made[u].shown = i;
                    unit_of[i] = Some(u);
                    unit_of[x.0] = None;
                    continue;
                }
                Unit { norm: Some(norm), ..new(Op::Sum { enlarged: vec![false] }, vec![unit(&x)]) }
            }
            Layer::Activation(_) if slope.is_some() => {
                let slope = slope.unwrap_or(1.0);
                if let Some(u) = open {
                    made[u].slope = slope;
                    made[u].shown = i;
                    unit_of[i] = Some(u);
                    unit_of[x.0] = None;
                    continue;
                }
                Unit { slope, ..new(Op::Sum { enlarged: vec![false] }, vec![unit(&x)]) }
            }
            Layer::Conv2d(conv) if conv.groups == 1 || conv.is_depthwise() => {
                let (weight, bias) = (node.params[0], node.params.get(1).copied());
                let op = if conv.groups == 1 {
                    Op::Conv { conv: *conv, weight, bias }
                } else {
                    Op::Depthwise { conv: *conv, weight, bias }
                };
                new(op, vec![unit(&x)])
            }
            Layer::Upsample(l) if l.mode == Interpolation::Nearest => {
                let sum_reads = || {
                    graph.nodes.iter().any(|n| {
                        matches!(n.layer(), Some(Layer::Add(_)))
                            && n.inputs.iter().filter(|i2| i2.0 == i).count() == 1
                    })
                };
                if readers[i] == 1 && sum_reads() {
                    enlarged[i] = Some(unit(&x));
                    continue;
                }
                new(Op::Sum { enlarged: vec![true] }, vec![unit(&x)])
            }
            Layer::Add(_) => {
                let enlarge: Vec<bool> = node.inputs.iter().map(|i| enlarged[i.0].is_some()).collect();
                let inputs = node.inputs.iter().map(|i| enlarged[i.0].unwrap_or_else(|| unit(i))).collect();
                new(Op::Sum { enlarged: enlarge }, inputs)
            }
            Layer::Concat(_) => new(Op::Concat, node.inputs.iter().map(unit).collect()),
            Layer::MaxPool(pool) => new(Op::MaxPool(*pool), vec![unit(&x)]),
            Layer::Upsample(_) => new(Op::Bilinear, vec![unit(&x)]),
            Layer::RoiAlign(roi) => match made[unit(&node.inputs[1])].op {
                Op::Boxes(boxes) => new(Op::RoiAlign { roi: *roi, boxes }, vec![unit(&x)]),
                _ => new(
                    Op::Plain { layer: layer.clone(), params: Vec::new() },
                    node.inputs.iter().map(unit).collect(),
                ),
            },
            other => {
                let inputs = match other {
                    // Its second input gives a size alone.
                    Layer::Crop(_) => vec![unit(&x)],
                    _ => node.inputs.iter().map(unit).collect(),
                };
                new(Op::Plain { layer: other.clone(), params: node.params.clone() }, inputs)
            }
        };
        made.push(made_unit);
        unit_of[i] = Some(made.len() - 1);
    }
    (made, unit_of)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::Builder;

    #[test]
    fn an_operation_takes_in_the_normalisation_and_activation_that_alone_read_it() {
        let mut b = Builder::new();
        let x = b.input("x", 3);
        let c = b.conv("c", x, Conv2d::new(3, 4, 3));
        let n = b.batchnorm("n", c, 4);
        let a = b.relu(n);
        let d = b.conv("d", a, Conv2d::new(4, 4, 1).bias());
        // Read twice: the activation cannot be taken in.
        let e = b.relu(d);
        let up = b.upsample(a, Interpolation::Nearest, 1);
        let s = b.add(d, up);
        b.output("e", e);
        b.output("s", s);
        let (units, of) = units(&b.finish());
        assert_eq!(units.len(), 5, "input, c + n + relu, d, relu, sum with its enlargement");
        assert_eq!((of[c.0], of[n.0], of[a.0]), (None, None, Some(1)));
        assert!(units[1].norm.is_some() && units[1].slope == 0.0);
        assert!(
            matches!(&units[3].op, Op::Sum { enlarged } if enlarged == &[false]) && units[3].slope == 0.0
        );
        assert!(matches!(&units[4].op, Op::Sum { enlarged } if enlarged == &[false, true]));
        assert_eq!((units[4].inputs.clone(), of[up.0]), (vec![2, 1], None));
    }
}
