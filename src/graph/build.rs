//! The layer list of a network and the builder that makes it.
//!
//! Nodes stand in the order they were made, which is a topological order. Parameters are named by
//! a prefix and the layer's own names (`layer1.0.conv1` + `.weight`), as in a PyTorch `state_dict`;
//! asking twice for the same name shares the parameter.

use crate::error::{Error, Result};
use crate::layers::{
    Activation, Add, BatchNorm, Concat, Conv2d, ConvTranspose2d, Crop, GlobalAvgPool, Interpolation, Layer,
    Linear, MaxPool, RoiAlign, Upsample, UpsampleTo,
};
use crate::shape::Shape;

/// A node's index.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub usize);

/// A parameter's index.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ParamId(pub usize);

/// What a parameter is, which decides how it starts and whether it is trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParamRole {
    /// Weight of a convolution or linear layer with this many inputs a value (fan-in).
    Weight {
        /// Inputs that meet in one output value.
        fan_in: usize,
    },
    /// Bias of a convolution or linear layer.
    Bias,
    /// Batch normalisation's scale, shift, running mean and running variance.
    NormScale,
    /// Shift of a batch normalisation.
    NormShift,
    /// Running mean: statistic, not trained.
    NormMean,
    /// Running variance: statistic, not trained.
    NormVariance,
}

/// A named parameter.
#[derive(Clone, Debug, PartialEq)]
pub struct Param {
    /// Full name.
    pub name: String,
    /// Size in PyTorch's order.
    pub shape: Vec<usize>,
    /// Role.
    pub role: ParamRole,
}

impl Param {
    /// Number of values.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// True for a parameter without values.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether an optimiser changes it (running statistics are not trained).
    pub fn trained(&self) -> bool {
        !matches!(self.role, ParamRole::NormMean | ParamRole::NormVariance)
    }
}

/// What a node does.
#[derive(Clone, Debug, PartialEq)]
pub enum NodeKind {
    /// A network input with this many channels.
    Input {
        /// Channels.
        channels: usize,
    },
    /// A layer.
    Layer(Layer),
}

/// One node.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    /// Name: the layer's weight prefix, or what it does.
    pub name: String,
    /// Kind.
    pub kind: NodeKind,
    /// Inputs, earlier nodes.
    pub inputs: Vec<NodeId>,
    /// Parameters in the layer's order (weight, bias; or scale, shift, mean, variance).
    pub params: Vec<ParamId>,
}

impl Node {
    /// The layer, unless this is an input.
    pub fn layer(&self) -> Option<&Layer> {
        match &self.kind {
            NodeKind::Layer(l) => Some(l),
            NodeKind::Input { .. } => None,
        }
    }

    /// Channels of a network input; None for a layer.
    pub fn channels(&self) -> Option<usize> {
        match self.kind {
            NodeKind::Input { channels } => Some(channels),
            NodeKind::Layer(_) => None,
        }
    }

    /// Inputs whose values are read; the size reference of an upsampling or crop is not.
    pub fn value_inputs(&self) -> &[NodeId] {
        match self.layer() {
            Some(Layer::Upsample(_) | Layer::Crop(_)) => &self.inputs[..1],
            _ => &self.inputs,
        }
    }
}

/// A network: nodes, parameters, named outputs.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Graph {
    /// Nodes in topological order.
    pub nodes: Vec<Node>,
    /// Parameters.
    pub params: Vec<Param>,
    /// Inputs in the order they are fed.
    pub inputs: Vec<NodeId>,
    /// Named outputs.
    pub outputs: Vec<(String, NodeId)>,
}

impl Graph {
    /// Shapes of all nodes for these input shapes.
    pub fn shapes(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        if inputs.len() != self.inputs.len() {
            return Err(Error::InvalidArgument(format!(
                "network takes {} inputs, got {}",
                self.inputs.len(),
                inputs.len()
            )));
        }
        let mut shapes: Vec<Shape> = Vec::with_capacity(self.nodes.len());
        let mut fed = inputs.iter();
        for node in &self.nodes {
            let shape = match &node.kind {
                NodeKind::Input { channels } => {
                    let s = *fed.next().ok_or_else(|| Error::Internal("more inputs than declared".into()))?;
                    if s.c != *channels || s.is_empty() {
                        return Err(Error::InvalidArgument(format!(
                            "network input {} takes {channels} channels, got {s}",
                            node.name
                        )));
                    }
                    s
                }
                NodeKind::Layer(layer) => {
                    let ins: Vec<Shape> = node.inputs.iter().map(|i| shapes[i.0]).collect();
                    layer.out_shape(&ins).map_err(|e| match e {
                        Error::InvalidModel(m) => Error::InvalidModel(format!("layer {}: {m}", node.name)),
                        other => other,
                    })?
                }
            };
            if shape.checked_len().is_none_or(|n| n > isize::MAX as usize / 8) {
                return Err(Error::LimitExceeded(format!("layer {}: {shape} is too large", node.name)));
            }
            shapes.push(shape);
        }
        Ok(shapes)
    }

    /// Multiply-adds for these input shapes.
    pub fn macs(&self, inputs: &[Shape]) -> Result<u64> {
        let shapes = self.shapes(inputs)?;
        Ok(self
            .nodes
            .iter()
            .zip(&shapes)
            .filter_map(|(n, &out)| Some(n.layer()?.macs(shapes[n.inputs[0].0], out)))
            .sum())
    }

    /// Trained values (running statistics are not counted, as in the papers).
    pub fn param_count(&self) -> usize {
        self.params.iter().filter(|p| p.trained()).map(Param::len).sum()
    }
}

/// Builds a graph; carries the prefix of parameter names.
#[derive(Default)]
pub struct Builder {
    graph: Graph,
    prefix: String,
}

impl Builder {
    /// Empty network.
    pub fn new() -> Self {
        Self::default()
    }

    /// Runs `body` with `name` appended to the prefix.
    pub fn scope<R>(&mut self, name: &str, body: impl FnOnce(&mut Self) -> R) -> R {
        let outer = self.prefix.clone();
        self.prefix = self.full(name);
        let result = body(self);
        self.prefix = outer;
        result
    }

    fn full(&self, name: &str) -> String {
        match (self.prefix.is_empty(), name.is_empty()) {
            (true, _) => name.to_string(),
            (false, true) => self.prefix.clone(),
            (false, false) => format!("{}.{name}", self.prefix),
        }
    }

    fn push(&mut self, name: &str, kind: NodeKind, inputs: &[NodeId], params: Vec<ParamId>) -> NodeId {
        let name = self.full(name);
        self.graph.nodes.push(Node { name, kind, inputs: inputs.to_vec(), params });
        NodeId(self.graph.nodes.len() - 1)
    }

    fn layer(&mut self, name: &str, layer: Layer, inputs: &[NodeId], params: Vec<ParamId>) -> NodeId {
        self.push(name, NodeKind::Layer(layer), inputs, params)
    }

    fn param(&mut self, name: &str, suffix: &str, shape: &[usize], role: ParamRole) -> ParamId {
        let name = format!("{}.{suffix}", self.full(name));
        if let Some(i) = self.graph.params.iter().position(|p| p.name == name) {
            assert_eq!(self.graph.params[i].shape, shape, "parameter {name} asked for with two shapes");
            return ParamId(i);
        }
        self.graph.params.push(Param { name, shape: shape.to_vec(), role });
        ParamId(self.graph.params.len() - 1)
    }

    /// A network input.
    pub fn input(&mut self, name: &str, channels: usize) -> NodeId {
        let id = self.push(name, NodeKind::Input { channels }, &[], Vec::new());
        self.graph.inputs.push(id);
        id
    }

    /// Convolution with parameters `name.weight` and, with a bias, `name.bias`.
    pub fn conv(&mut self, name: &str, x: NodeId, conv: Conv2d) -> NodeId {
        let shape = conv.weight_shape();
        let fan_in = shape[1..].iter().product();
        let mut params = vec![self.param(name, "weight", &shape, ParamRole::Weight { fan_in })];
        if conv.bias {
            params.push(self.param(name, "bias", &[conv.out_channels], ParamRole::Bias));
        }
        self.layer(name, Layer::Conv2d(conv), &[x], params)
    }

    /// Transposed convolution.
    pub fn conv_transpose(&mut self, name: &str, x: NodeId, conv: ConvTranspose2d) -> NodeId {
        let shape = conv.weight_shape();
        let fan_in = conv.in_channels / conv.groups * conv.kernel[0] * conv.kernel[1];
        let mut params = vec![self.param(name, "weight", &shape, ParamRole::Weight { fan_in })];
        if conv.bias {
            params.push(self.param(name, "bias", &[conv.out_channels], ParamRole::Bias));
        }
        self.layer(name, Layer::ConvTranspose2d(conv), &[x], params)
    }

    /// Batch normalisation with `name.weight`, `.bias`, `.running_mean`, `.running_var`.
    pub fn batchnorm(&mut self, name: &str, x: NodeId, channels: usize) -> NodeId {
        let c = [channels];
        let params = vec![
            self.param(name, "weight", &c, ParamRole::NormScale),
            self.param(name, "bias", &c, ParamRole::NormShift),
            self.param(name, "running_mean", &c, ParamRole::NormMean),
            self.param(name, "running_var", &c, ParamRole::NormVariance),
        ];
        self.layer(name, Layer::BatchNorm(BatchNorm::new(channels)), &[x], params)
    }

    /// Linear layer.
    pub fn linear(&mut self, name: &str, x: NodeId, linear: Linear) -> NodeId {
        let (i, o) = (linear.in_features, linear.out_features);
        let mut params = vec![self.param(name, "weight", &[o, i], ParamRole::Weight { fan_in: i })];
        if linear.bias {
            params.push(self.param(name, "bias", &[o], ParamRole::Bias));
        }
        self.layer(name, Layer::Linear(linear), &[x], params)
    }

    /// Activation.
    pub fn activation(&mut self, x: NodeId, activation: Activation) -> NodeId {
        let name = match activation {
            Activation::Relu => "relu",
            Activation::LeakyRelu(_) => "leaky_relu",
            Activation::Sigmoid => "sigmoid",
            Activation::Softmax(_) => "softmax",
        };
        self.layer(name, Layer::Activation(activation), &[x], Vec::new())
    }

    /// ReLU.
    pub fn relu(&mut self, x: NodeId) -> NodeId {
        self.activation(x, Activation::Relu)
    }

    /// Max pooling.
    pub fn max_pool(&mut self, x: NodeId, pool: MaxPool) -> NodeId {
        self.layer("max_pool", Layer::MaxPool(pool), &[x], Vec::new())
    }

    /// Mean over rows and columns.
    pub fn global_avg_pool(&mut self, x: NodeId) -> NodeId {
        self.layer("global_avg_pool", Layer::GlobalAvgPool(GlobalAvgPool), &[x], Vec::new())
    }

    /// Upsampling by a factor.
    pub fn upsample(&mut self, x: NodeId, mode: Interpolation, factor: usize) -> NodeId {
        let to = UpsampleTo::Factor([factor; 2]);
        self.layer("upsample", Layer::Upsample(Upsample { mode, to }), &[x], Vec::new())
    }

    /// Upsampling to the rows and columns of `like`.
    pub fn upsample_to(&mut self, x: NodeId, mode: Interpolation, like: NodeId) -> NodeId {
        let to = UpsampleTo::SizeOfSecond;
        self.layer("upsample", Layer::Upsample(Upsample { mode, to }), &[x, like], Vec::new())
    }

    /// Element-wise sum.
    pub fn add(&mut self, a: NodeId, b: NodeId) -> NodeId {
        self.layer("add", Layer::Add(Add), &[a, b], Vec::new())
    }

    /// Concatenation along channels.
    pub fn concat(&mut self, inputs: &[NodeId]) -> NodeId {
        self.layer("concat", Layer::Concat(Concat), inputs, Vec::new())
    }

    /// `x` cut to the size of `like` from a corner.
    pub fn crop(&mut self, x: NodeId, like: NodeId, top: usize, left: usize) -> NodeId {
        self.layer("crop", Layer::Crop(Crop { top, left }), &[x, like], Vec::new())
    }

    /// RoIAlign of `boxes` (R x 5) on `x`.
    pub fn roi_align(&mut self, x: NodeId, boxes: NodeId, roi: RoiAlign) -> NodeId {
        self.layer("roi_align", Layer::RoiAlign(roi), &[x, boxes], Vec::new())
    }

    /// Marks an output.
    pub fn output(&mut self, name: &str, x: NodeId) {
        self.graph.outputs.push((name.to_string(), x));
    }

    /// The finished network.
    pub fn finish(self) -> Graph {
        self.graph
    }
}
