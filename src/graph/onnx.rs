//! Networks as ONNX files, for other runtimes: opset 17, N x C x H x W, f32.
//!
//! The layers go out as built, batch normalisations by themselves; runtimes fold them. Field numbers
//! are those of `onnx.proto` (IR version 8). The wire format is written by hand in `protobuf.rs`: what
//! a writer needs of it is shorter than a generated binding and adds no dependency to the library.

use super::build::{Graph, Node, NodeKind};
use super::protobuf::Message;
use super::weights::Weights;
use crate::error::{Error, Result};
use crate::layers::{Activation, Interpolation, Layer, UpsampleTo};
use crate::shape::Shape;
use std::collections::{BTreeMap, HashMap};

const IR_VERSION: i64 = 8;
const OPSET: i64 = 17;
/// `TensorProto.DataType`.
const FLOAT: i64 = 1;
const INT64: i64 = 7;

/// An ONNX file of `graph` with the values of `weights`.
///
/// The input and the outputs have the graph's names. With `size` (height, width) the input is
/// 1 x C x H x W; without, batch, height and width are free. The network alone is written: the
/// caller normalises the picture before it and decodes the outputs behind it. The entries of
/// `weights.metadata` go along as `metadata_props`.
///
/// Errors: [`Error::Unsupported`] for RoIAlign and for several inputs; [`Error::InvalidModel`] where a
/// tensor is missing or a layer does not take this size (a linear layer without `size`).
pub fn to_onnx(graph: &Graph, weights: &Weights, size: Option<[usize; 2]>) -> Result<Vec<u8>> {
    let [image] = graph.inputs[..] else {
        return Err(Error::Unsupported(format!("ONNX of a network with {} inputs", graph.inputs.len())));
    };
    let NodeKind::Input { channels } = graph.nodes[image.0].kind else {
        return Err(Error::Internal("a network's input is a layer".into()));
    };
    // Free sizes still have known channels, which any picture tells.
    let [h, w] = size.unwrap_or([256, 256]);
    let shapes = graph.shapes(&[Shape::new(1, channels, h, w)]).map_err(|e| match e {
        Error::InvalidModel(m) if size.is_none() => {
            Error::InvalidModel(format!("{m}: the network does not take every size, tell one"))
        }
        other => other,
    })?;

    let mut file = Writer {
        names: names(graph),
        shapes: &shapes,
        fixed: size.is_some(),
        nodes: Vec::new(),
        tensors: Vec::new(),
    };
    for p in &graph.params {
        let values = weights.get(&p.name, &p.shape)?;
        let raw = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        file.tensor(&p.name, &p.shape, FLOAT, raw);
    }
    for (i, node) in graph.nodes.iter().enumerate() {
        if let Some(layer) = node.layer() {
            file.layer(graph, i, node, layer)?;
        }
    }
    let mut outputs = Vec::new();
    for (name, id) in &graph.outputs {
        if file.names[id.0] != *name {
            // A value with two names, or an input that is an output.
            let value = file.names[id.0].clone();
            file.node("Identity", name, &[&value], name, Message::new());
        }
        outputs.push(file.value_info(name, name, shapes[id.0]));
    }
    let input = file.value_info(&file.names[image.0], "", shapes[image.0]);

    let network = Message::new()
        .each(file.nodes, |m, node| m.message(1, node))
        .bytes(2, "farface")
        .each(file.tensors, |m, tensor| m.message(5, tensor))
        .message(11, input)
        .each(outputs, |m, output| m.message(12, output));
    // Sorted, so that a model gives the same bytes every time.
    let metadata: BTreeMap<_, _> = weights.metadata.iter().collect();
    let model = Message::new()
        .int(1, IR_VERSION)
        .bytes(2, "farface")
        .bytes(3, env!("CARGO_PKG_VERSION"))
        .message(7, network)
        .message(8, Message::new().bytes(1, "").int(2, OPSET))
        .each(metadata, |m, (key, value)| m.message(14, Message::new().bytes(1, key).bytes(2, value)));
    Ok(model.into_bytes())
}

/// A name for every node's value: an output's own, an input's own, else the layer's and its number.
fn names(graph: &Graph) -> Vec<String> {
    let mut outputs = HashMap::new();
    for (name, id) in graph.outputs.iter().rev() {
        outputs.insert(id.0, name);
    }
    let name = |(i, node): (usize, &Node)| match (&node.kind, outputs.get(&i)) {
        (NodeKind::Input { .. }, _) => node.name.clone(),
        (NodeKind::Layer(_), Some(output)) => output.to_string(),
        (NodeKind::Layer(_), None) => format!("{}/{i}", node.name),
    };
    graph.nodes.iter().enumerate().map(name).collect()
}

struct Writer<'a> {
    names: Vec<String>,
    /// Of all nodes; without a fixed size their channels alone hold.
    shapes: &'a [Shape],
    /// The input has one size.
    fixed: bool,
    nodes: Vec<Message>,
    tensors: Vec<Message>,
}

impl Writer<'_> {
    /// The ONNX nodes of one layer.
    fn layer(&mut self, graph: &Graph, i: usize, node: &Node, layer: &Layer) -> Result<()> {
        let y = self.names[i].clone();
        // The inputs' values, then the parameters in the layer's order, which is ONNX's.
        let mut x: Vec<String> = node.value_inputs().iter().map(|id| self.names[id.0].clone()).collect();
        x.extend(node.params.iter().map(|p| graph.params[p.0].name.clone()));
        let x: Vec<&str> = x.iter().map(String::as_str).collect();
        let none = Message::new();
        match layer {
            Layer::Conv2d(c) => {
                let a = ints(ints(none, "kernel_shape", c.kernel), "strides", c.stride);
                let a = ints(ints(a, "pads", c.padding), "dilations", c.dilation);
                self.node("Conv", &y, &x, &y, int(a, "group", c.groups));
            }
            Layer::ConvTranspose2d(c) => {
                let a = ints(ints(none, "kernel_shape", c.kernel), "strides", c.stride);
                let a = int(ints(a, "pads", c.padding), "group", c.groups);
                self.node("ConvTranspose", &y, &x, &y, a);
            }
            Layer::BatchNorm(n) => {
                self.node("BatchNormalization", &y, &x, &y, float(none, "epsilon", n.eps as f32));
            }
            Layer::Activation(Activation::Relu) => self.node("Relu", &y, &x, &y, none),
            Layer::Activation(Activation::LeakyRelu(slope)) => {
                self.node("LeakyRelu", &y, &x, &y, float(none, "alpha", *slope));
            }
            Layer::Activation(Activation::Sigmoid) => self.node("Sigmoid", &y, &x, &y, none),
            Layer::Activation(Activation::Softmax(run)) => self.softmax(x[0], &y, self.shapes[i].c, *run),
            Layer::MaxPool(p) => {
                let a = ints(ints(none, "kernel_shape", p.kernel), "strides", p.stride);
                self.node("MaxPool", &y, &x, &y, ints(a, "pads", p.padding));
            }
            Layer::GlobalAvgPool(_) => self.node("GlobalAveragePool", &y, &x, &y, none),
            Layer::Upsample(u) => {
                let (mode, coordinates) = match u.mode {
                    Interpolation::Nearest => ("nearest", "asymmetric"),
                    Interpolation::Bilinear => ("linear", "half_pixel"),
                };
                let a = text(text(none, "mode", mode), "coordinate_transformation_mode", coordinates);
                let a = text(a, "nearest_mode", "floor");
                // Inputs: the map, regions (none), scales or sizes.
                match u.to {
                    UpsampleTo::Factor([fy, fx]) => {
                        let scales = [1.0, 1.0, fy as f32, fx as f32];
                        let name = format!("{y}/scales");
                        let raw = scales.iter().flat_map(|v| v.to_le_bytes()).collect();
                        self.tensor(&name, &[4], FLOAT, raw);
                        self.node("Resize", &y, &[x[0], "", &name], &y, a);
                    }
                    UpsampleTo::SizeOfSecond => {
                        let sizes = self.sizes_of(i, node, x[0], &y);
                        self.node("Resize", &y, &[x[0], "", "", &sizes], &y, a);
                    }
                }
            }
            Layer::Add(_) => self.node("Add", &y, &x, &y, none),
            Layer::Concat(_) => self.node("Concat", &y, &x, &y, int(none, "axis", 1)),
            Layer::Crop(c) => self.crop(i, node, [c.top, c.left], x[0], &y),
            Layer::Linear(_) => {
                // Features in C, H, W order; the result gets its two axes of 1 back.
                let (flat, wide) = (format!("{y}/flat"), format!("{y}/features"));
                self.node("Flatten", &flat, &x[..1], &flat, int(none, "axis", 1));
                let gemm: Vec<&str> = std::iter::once(&flat[..]).chain(x[1..].iter().copied()).collect();
                self.node("Gemm", &wide, &gemm, &wide, int(Message::new(), "transB", 1));
                let shape = self.integers(&format!("{y}/shape"), &[0, -1, 1, 1]);
                self.node("Reshape", &y, &[&wide, &shape], &y, Message::new());
            }
            Layer::RoiAlign(_) => {
                return Err(Error::Unsupported(format!(
                    "ONNX of layer {}: RoIAlign is not exported; export the network up to it",
                    node.name
                )))
            }
        }
        Ok(())
    }

    /// Softmax over runs of `run` channels: they become an axis of their own, and rows and columns
    /// one, until the shape is restored.
    fn softmax(&mut self, x: &str, y: &str, channels: usize, run: usize) {
        let [split, normal, shape] = ["split", "normal", "shape"].map(|part| format!("{y}/{part}"));
        let runs = self.integers(&format!("{y}/runs"), &[0, (channels / run) as i64, run as i64, -1]);
        self.node("Reshape", &split, &[x, &runs], &split, Message::new());
        self.node("Softmax", &normal, &[&split], &normal, int(Message::new(), "axis", 2));
        self.node("Shape", &shape, &[x], &shape, Message::new());
        self.node("Reshape", y, &[&normal, &shape], y, Message::new());
    }

    /// Name of the sizes N, C, H, W of the map `x` resized to the node's second input.
    fn sizes_of(&mut self, i: usize, node: &Node, x: &str, y: &str) -> String {
        let sizes = format!("{y}/sizes");
        if self.fixed {
            let s = self.shapes[i];
            return self.integers(&sizes, &[s.n, s.c, s.h, s.w].map(|v| v as i64));
        }
        let (own, like) = (format!("{y}/own"), format!("{y}/like"));
        let second = self.names[node.inputs[1].0].clone();
        self.node("Shape", &own, &[x], &own, int(int(Message::new(), "start", 0), "end", 2));
        self.node("Shape", &like, &[&second], &like, int(int(Message::new(), "start", 2), "end", 4));
        self.node("Concat", &sizes, &[&own, &like], &sizes, int(Message::new(), "axis", 0));
        sizes
    }

    /// A slice of rows and columns from `corner`, as large as the node's second input.
    fn crop(&mut self, i: usize, node: &Node, corner: [usize; 2], x: &str, y: &str) {
        let corner = corner.map(|v| v as i64);
        let start = self.integers(&format!("{y}/start"), &corner);
        let axes = self.integers(&format!("{y}/axes"), &[2, 3]);
        let end = format!("{y}/end");
        if self.fixed {
            let s = self.shapes[i];
            self.integers(&end, &[corner[0] + s.h as i64, corner[1] + s.w as i64]);
        } else {
            let like = format!("{y}/like");
            let second = self.names[node.inputs[1].0].clone();
            self.node("Shape", &like, &[&second], &like, int(int(Message::new(), "start", 2), "end", 4));
            self.node("Add", &end, &[&like, &start], &end, Message::new());
        }
        self.node("Slice", y, &[x, &start, &end, &axes], y, Message::new());
    }

    /// `NodeProto`.
    fn node(&mut self, op: &str, name: &str, inputs: &[&str], output: &str, attributes: Message) {
        let node = Message::new()
            .each(inputs, |m, input| m.bytes(1, input))
            .bytes(2, output)
            .bytes(3, name)
            .bytes(4, op)
            .append(attributes);
        self.nodes.push(node);
    }

    /// `TensorProto`: an initializer of little-endian values.
    fn tensor(&mut self, name: &str, shape: &[usize], kind: i64, raw: Vec<u8>) {
        let dims = shape.iter().map(|&d| d as i64);
        self.tensors
            .push(Message::new().each(dims, |m, d| m.int(1, d)).int(2, kind).bytes(8, name).bytes(9, raw));
    }

    /// A constant list of integers; gives its name back.
    fn integers(&mut self, name: &str, values: &[i64]) -> String {
        let raw = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.tensor(name, &[values.len()], INT64, raw);
        name.to_string()
    }

    /// `ValueInfoProto` of a float map. Free sizes are called `batch` and, behind `prefix`, `height`
    /// and `width`.
    fn value_info(&self, name: &str, prefix: &str, shape: Shape) -> Message {
        let number = |v: usize| Message::new().int(1, v as i64);
        let free = |axis: &str| {
            let dot = if prefix.is_empty() { "" } else { "." };
            Message::new().bytes(2, format!("{prefix}{dot}{axis}"))
        };
        let dims = if self.fixed {
            [shape.n, shape.c, shape.h, shape.w].map(number)
        } else {
            [Message::new().bytes(2, "batch"), number(shape.c), free("height"), free("width")]
        };
        let tensor =
            Message::new().int(1, FLOAT).message(2, Message::new().each(dims, |m, d| m.message(1, d)));
        Message::new().bytes(1, name).message(2, Message::new().message(1, tensor))
    }
}

/// `AttributeProto` kinds, appended to a node's attributes.
fn int(m: Message, name: &str, value: usize) -> Message {
    m.message(5, Message::new().bytes(1, name).int(3, value as i64).int(20, 2))
}

fn float(m: Message, name: &str, value: f32) -> Message {
    m.message(5, Message::new().bytes(1, name).float(2, value).int(20, 1))
}

fn text(m: Message, name: &str, value: &str) -> Message {
    m.message(5, Message::new().bytes(1, name).bytes(4, value).int(20, 3))
}

fn ints<const N: usize>(m: Message, name: &str, values: [usize; N]) -> Message {
    m.message(5, Message::new().bytes(1, name).each(values, |m, v| m.int(8, v as i64)).int(20, 7))
}

#[cfg(test)]
mod tests {
    use super::super::protobuf::read::{all, fields, ints, texts, Value};
    use super::*;
    use crate::graph::Builder;
    use crate::layers::{Conv2d, ConvTranspose2d, Linear, MaxPool, RoiAlign};

    /// Every layer that is exported, each once or more.
    fn everything(linear: bool) -> Graph {
        let mut b = Builder::new();
        let image = b.input("image", 3);
        let conv = Conv2d { stride: [2, 1], padding: [0, 1, 2, 3], ..Conv2d::rect(3, 8, 3, 5) };
        let x = b.conv("stem", image, conv.bias());
        let x = b.batchnorm("norm", x, 8);
        let x = b.activation(x, Activation::LeakyRelu(0.1));
        let pooled = b.max_pool(x, MaxPool::new(3, 2, 1));
        let deep = b.conv("deep", pooled, Conv2d::new(8, 8, 3).dilation(2).groups(4));
        let deep = b.relu(deep);
        let near = b.upsample_to(deep, Interpolation::Nearest, x);
        let sum = b.add(x, near);
        let smooth = b.upsample_to(deep, Interpolation::Bilinear, sum);
        let twice = b.upsample(deep, Interpolation::Bilinear, 2);
        let transposed = ConvTranspose2d {
            in_channels: 8,
            out_channels: 4,
            kernel: [4, 4],
            stride: [2, 2],
            padding: [1, 0, 1, 0],
            groups: 2,
            bias: true,
        };
        let up = b.conv_transpose("up", pooled, transposed);
        let up = b.crop(up, twice, 0, 1);
        let joined = b.concat(&[sum, smooth]);
        let runs = b.activation(joined, Activation::Softmax(4));
        b.output("runs", runs);
        let squashed = b.activation(up, Activation::Sigmoid);
        b.output("up", squashed);
        b.output("again", squashed);
        b.output("twice", twice);
        if linear {
            let mean = b.global_avg_pool(deep);
            let fc = b.linear("fc", mean, Linear { in_features: 8, out_features: 5, bias: true });
            b.output("fc", fc);
        }
        b.finish()
    }

    /// The graph message of an ONNX file.
    fn network(file: &[u8]) -> &[u8] {
        all(file, 7)[0]
    }

    #[test]
    fn every_node_reads_what_stands_before_it_and_names_are_unique() {
        let graph = everything(true);
        let weights = Weights::random(&graph, 1);
        for size in [None, Some([33, 46])] {
            let file = to_onnx(&graph, &weights, size).unwrap();
            assert_eq!(ints(&file, 1), [IR_VERSION]);
            assert_eq!(ints(all(&file, 8)[0], 2), [OPSET]);
            let network = network(&file);
            let mut known: Vec<&str> = all(network, 5).into_iter().flat_map(|t| texts(t, 8)).collect();
            known.extend(all(network, 11).into_iter().flat_map(|v| texts(v, 1)));
            let mut nodes = Vec::new();
            for node in all(network, 1) {
                for input in texts(node, 1).into_iter().filter(|name| !name.is_empty()) {
                    assert!(known.contains(&input), "{input} is read before it is there");
                }
                known.extend(texts(node, 2));
                nodes.extend(texts(node, 3));
            }
            let count = known.len();
            known.sort_unstable();
            known.dedup();
            assert_eq!(known.len(), count, "a value has two sources");
            let count = nodes.len();
            nodes.sort_unstable();
            nodes.dedup();
            assert_eq!(nodes.len(), count, "two nodes have one name");
            let outputs: Vec<&str> = all(network, 12).into_iter().flat_map(|v| texts(v, 1)).collect();
            assert_eq!(outputs, ["runs", "up", "again", "twice", "fc"]);
            assert!(outputs.iter().all(|name| known.binary_search(name).is_ok()));
        }
    }

    #[test]
    fn convolutions_carry_their_attributes_and_parameters_their_values() {
        let graph = everything(false);
        let weights = Weights::random(&graph, 1);
        let file = to_onnx(&graph, &weights, None).unwrap();
        let network = network(&file);
        let stem = all(network, 1).into_iter().find(|n| texts(n, 4) == ["Conv"]).unwrap();
        assert_eq!(texts(stem, 1), ["image", "stem.weight", "stem.bias"]);
        let attributes: Vec<(&str, Vec<i64>)> =
            all(stem, 5).into_iter().map(|a| (texts(a, 1)[0], [ints(a, 8), ints(a, 3)].concat())).collect();
        let expected = [
            ("kernel_shape", vec![3, 5]),
            ("strides", vec![2, 1]),
            ("pads", vec![0, 1, 2, 3]),
            ("dilations", vec![1, 1]),
            ("group", vec![1]),
        ];
        assert_eq!(attributes, expected);
        for tensor in all(network, 5) {
            let Some(expected) = weights.tensors.get(texts(tensor, 8)[0]) else { continue };
            assert_eq!(ints(tensor, 1), expected.shape.iter().map(|&d| d as i64).collect::<Vec<_>>());
            let raw: Vec<u8> = expected.data.iter().flat_map(|v| v.to_le_bytes()).collect();
            assert!(fields(tensor).contains(&(9, Value::Bytes(&raw))), "{}", texts(tensor, 8)[0]);
        }
    }

    #[test]
    fn the_metadata_goes_along_in_one_order() {
        let graph = everything(false);
        let mut weights = Weights::random(&graph, 1);
        weights.metadata = [("b".into(), "2".into()), ("a".into(), "1".into())].into();
        let file = to_onnx(&graph, &weights, Some([32, 32])).unwrap();
        let entries: Vec<_> = all(&file, 14).into_iter().map(|e| (texts(e, 1)[0], texts(e, 2)[0])).collect();
        assert_eq!(entries, [("a", "1"), ("b", "2")]);
    }

    #[test]
    fn what_cannot_be_exported_is_named() {
        let mut b = Builder::new();
        let image = b.input("image", 5);
        let boxes = b.global_avg_pool(image);
        let roi = RoiAlign { output: [7, 7], spatial_scale: 0.25, sampling_ratio: 2, aligned: true };
        let pooled = b.roi_align(image, boxes, roi);
        b.output("pooled", pooled);
        let error = to_onnx(&b.finish(), &Weights::default(), None).unwrap_err();
        assert!(matches!(&error, Error::Unsupported(m) if m.contains("roi_align")), "{error}");

        let mut b = Builder::new();
        let (x, y) = (b.input("x", 1), b.input("y", 1));
        let sum = b.add(x, y);
        b.output("sum", sum);
        let error = to_onnx(&b.finish(), &Weights::default(), None).unwrap_err();
        assert!(matches!(&error, Error::Unsupported(m) if m.contains("2 inputs")), "{error}");

        let mut b = Builder::new();
        let image = b.input("image", 1);
        let fc = b.linear("fc", image, Linear { in_features: 12, out_features: 2, bias: false });
        b.output("fc", fc);
        let graph = b.finish();
        let weights = Weights::random(&graph, 1);
        assert!(to_onnx(&graph, &weights, Some([3, 4])).is_ok());
        let error = to_onnx(&graph, &weights, None).unwrap_err().to_string();
        assert!(error.contains("layer fc") && error.contains("tell one"), "{error}");

        let graph = everything(false);
        let error = to_onnx(&graph, &Weights::default(), None).unwrap_err();
        assert!(matches!(error, Error::InvalidModel(_)));
    }
}
