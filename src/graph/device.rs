//! A network on a CUDA device: the draft's steps with their weights there, and its plan for one input shape.
//!
//! Tensors between the steps are of one type; what a network gives out is f32, its pixels close together. A pixel's channels are rounded up to sixteen bytes, the
//! rest zeros, and there is no halo: kernels see where a map ends.

use super::build::{Graph, NodeId, ParamId};
use super::compile::{affine, static_size};
use super::demand::Want;
use super::fold::Affine;
use super::fuse::{channels, root, Chain, Draft, DraftStep, Value, ValueId, Work};
use super::plan::{place, Buffer};
use super::weights::Weights;
use crate::cpu::conv::Residual;
use crate::error::{Error, Result};
use crate::gpu::driver::Stream;
use crate::gpu::map::{Arithmetic, DeviceView, Element};
use crate::gpu::memory::DeviceBuffer;
use crate::gpu::ops::{Device, DeviceOp, Joined};
use crate::gpu::program::{DeviceProgram, DeviceStep};
use crate::layers::{
    activation, batchnorm, combine, conv2d, conv_transpose2d, linear, pool, roi_align, upsample, Conv2d,
    Layer,
};
use crate::shape::{Shape, Tensor};
use std::collections::HashMap;
use std::sync::Arc;

/// An op and the values it reads and writes.
struct Step {
    op: Arc<DeviceOp>,
    inputs: Vec<ValueId>,
    output: ValueId,
    node: NodeId,
}

/// A network with its weights on a device, independent of input sizes; shared by sessions.
pub struct DeviceNetwork {
    graph: Graph,
    values: Vec<Value>,
    /// Type of the tensors between the steps.
    element: Element,
    /// Of every value, whether it or its parent is what others than steps read or write: f32, its pixels close together.
    outside: Vec<bool>,
    steps: Vec<Step>,
    inputs: Vec<ValueId>,
    outputs: Vec<ValueId>,
    device: Arc<Device>,
}

/// Values that must be f32: the network's outputs. One that steps read too, or that is part of a concatenation, is copied.
fn part_outputs(draft: &mut Draft) {
    for i in 0..draft.outputs.len() {
        let value = draft.outputs[i];
        let read = draft.steps.iter().any(|s| s.inputs.contains(&value));
        let joined = draft.values[value.0].parent.is_some()
            || draft.values.iter().any(|v| v.parent.is_some_and(|(parent, _)| parent == value));
        let input = draft.inputs.contains(&value);
        let again = draft.outputs[..i].contains(&value);
        if read || joined || input || again {
            let node = draft.values[value.0].node;
            let copy = draft.value(node);
            draft.values[copy.0].channels = draft.values[value.0].channels;
            draft.steps.push(DraftStep { work: Work::Copy, inputs: vec![value], output: copy, node });
            draft.outputs[i] = copy;
        }
    }
}

impl DeviceNetwork {
    /// Folds, fuses and uploads `graph` with `weights`, to be computed in this arithmetic (that of an [`Element`], or TF32).
    ///
    /// Errors: [`Error::Unsupported`] where the device does not compute it, beside those of the graph and of CUDA.
    pub fn new(
        graph: &Graph,
        weights: &Weights,
        device: &Arc<Device>,
        arithmetic: impl Into<Arithmetic>,
    ) -> Result<Self> {
        let arithmetic = arithmetic.into();
        device.require(arithmetic)?;
        weights.check(graph)?;
        let mut draft = Draft::new(graph);
        part_outputs(&mut draft);
        let Draft { graph, values, steps, inputs, outputs } = draft;
        // Chains by the first parameter of their start: a head on every level of a pyramid has its weights once.
        let mut made: HashMap<Option<ParamId>, Vec<(Chain, Arc<DeviceOp>)>> = HashMap::new();
        let lower = |step: DraftStep| {
            let DraftStep { work, inputs, output, node } = step;
            let op = match work {
                Work::Siblings(chains) => {
                    Arc::new(lower_siblings(&graph, weights, device, arithmetic, &chains)?)
                }
                Work::Copy => Arc::new(combine::cuda::copy(device)?),
                Work::Widen => return Err(Error::Internal("inputs are widened for the CPU alone".into())),
                Work::Plain(layer, slope) => Arc::new(lower_plain(&layer, slope, device)?),
                Work::Chain(chain) => {
                    let made = made.entry(graph.nodes[node.0].params.first().copied()).or_default();
                    match made.iter().find(|(other, _)| chain.is_like(other, &graph)) {
                        Some((_, op)) => op.clone(),
                        None => {
                            let op = Arc::new(lower_chain(&graph, weights, device, arithmetic, &chain)?);
                            made.push((chain, op.clone()));
                            op
                        }
                    }
                }
            };
            Ok(Step { op, inputs, output, node })
        };
        let steps = steps.into_iter().map(lower).collect::<Result<Vec<_>>>()?;
        // Where boxes come from outside, their corners stay what they are.
        let corners = |v: &ValueId| {
            inputs.contains(v)
                && steps
                    .iter()
                    .any(|s: &Step| matches!(*s.op, DeviceOp::RoiAlign(_)) && s.inputs.get(1) == Some(v))
        };
        let single = |v: &ValueId| outputs.contains(v) || corners(v);
        let outside = (0..values.len()).map(|i| single(&root(&values, ValueId(i)).0)).collect();
        let element = arithmetic.element();
        Ok(Self { graph, values, element, outside, steps, inputs, outputs, device: device.clone() })
    }

    /// A value of this shape at this byte.
    fn view(&self, id: ValueId, shape: Shape, offset: usize) -> DeviceView {
        if self.outside[id.0] {
            DeviceView::new(Element::F32, shape, offset)
        } else {
            DeviceView::padded(self.element, shape, offset)
        }
    }

    /// The device that it is on.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// Every step's layer name and kernel.
    pub fn listing(&self) -> impl Iterator<Item = (&str, &'static str)> {
        self.steps.iter().map(|s| (self.graph.nodes[s.node.0].name.as_str(), s.op.name()))
    }
}

/// Where a chain's second input is added.
fn joined(residual: Residual) -> Joined {
    match residual {
        Residual::None => Joined::No,
        Residual::BeforeActivation => Joined::Before,
        Residual::AfterActivation => Joined::After,
    }
}

/// The op of siblings: one convolution with the output channels of all.
fn lower_siblings(
    graph: &Graph,
    weights: &Weights,
    device: &Device,
    arithmetic: Arithmetic,
    chains: &[Chain],
) -> Result<DeviceOp> {
    let (mut weight, mut bias) = (Vec::new(), Vec::new());
    for chain in chains {
        let own = affine(graph, weights, chain)?;
        weight.extend(own.weight);
        bias.extend(own.bias);
    }
    let first = &chains[0];
    match graph.nodes[first.start.0].layer() {
        Some(Layer::Conv2d(c)) => {
            let all = Conv2d { out_channels: bias.len(), ..*c };
            conv2d::cuda::lower(
                &all,
                device,
                arithmetic,
                &weight,
                &bias,
                (first.slope, joined(first.residual)),
            )
        }
        _ => Err(Error::Internal("siblings are convolutions".into())),
    }
}

/// The op of a chain.
fn lower_chain(
    graph: &Graph,
    weights: &Weights,
    device: &Device,
    arithmetic: Arithmetic,
    chain: &Chain,
) -> Result<DeviceOp> {
    let node = &graph.nodes[chain.start.0];
    let affine = affine(graph, weights, chain)?;
    let Affine { weight, bias, .. } = &affine;
    let rule = (chain.slope, joined(chain.residual));
    match node.layer() {
        Some(Layer::Conv2d(c)) => conv2d::cuda::lower(c, device, arithmetic, weight, bias, rule),
        Some(Layer::ConvTranspose2d(c)) => conv_transpose2d::cuda::lower(c, device, weight, bias),
        Some(Layer::BatchNorm(_)) => {
            batchnorm::cuda::lower(device, arithmetic.element(), weight, bias, chain.slope)
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
            linear::cuda::lower(device, arithmetic, size, weight, bias, rule)
        }
        _ => Err(Error::Internal(format!("layer {} starts no chain", node.name))),
    }
}

/// The op of a layer without weights, with an activation of this slope behind it where it is a sum.
fn lower_plain(layer: &Layer, slope: f32, device: &Device) -> Result<DeviceOp> {
    match layer {
        Layer::Activation(a) => activation::cuda::lower(a, device),
        Layer::MaxPool(p) => pool::cuda::lower_max(p, device),
        Layer::GlobalAvgPool(_) => pool::cuda::lower_global_avg(device),
        Layer::Upsample(u) => upsample::cuda::lower(u, device),
        Layer::Crop(c) => combine::cuda::crop(c, device),
        Layer::RoiAlign(r) => roi_align::cuda::lower(r, device),
        Layer::Add(_) => combine::cuda::add(device, slope),
        other => Err(Error::Internal(format!("{} is not a plain layer", other.kind()))),
    }
}

/// A network on a device for one set of input shapes.
pub struct DevicePlan {
    program: DeviceProgram,
    inputs: Vec<DeviceView>,
    /// None where nothing was wanted.
    outputs: Vec<Option<DeviceView>>,
}

/// Bytes of alignment of a map, and the unit in which they are placed.
const ALIGN: usize = 256;

impl DevicePlan {
    /// Plans `network` for these input shapes, every output whole.
    pub fn new(network: &DeviceNetwork, input_shapes: &[Shape]) -> Result<Self> {
        Self::for_wants(network, input_shapes, &[])
    }

    /// As [`DevicePlan::new`], without what only outputs need of which nothing is wanted. Outputs that are wanted at some cells are
    /// computed whole.
    pub fn for_wants(network: &DeviceNetwork, input_shapes: &[Shape], wants: &[Want]) -> Result<Self> {
        let shapes = network.graph.shapes(input_shapes)?;
        let shape = |id: usize| network.values[id].shape(&shapes);
        let root = |id: ValueId| root(&network.values, id);
        let wanted = |i: usize| wants.get(i) != Some(&Want::Nothing);
        let outputs = || network.outputs.iter().enumerate().filter(|(i, _)| wanted(*i));
        let needed = needed(network, outputs().map(|(_, v)| *v));

        let count = network.values.len();
        let mut live = vec![(usize::MAX, 0); count];
        let mut touch = |id: ValueId, step: usize| {
            let (first, last) = &mut live[root(id).0 .0];
            *first = (*first).min(step);
            *last = (*last).max(step);
        };
        network.inputs.iter().for_each(|&v| touch(v, 0));
        outputs().for_each(|(_, &v)| touch(v, network.steps.len() + 1));
        for (i, step) in network.steps.iter().enumerate().filter(|(i, _)| needed[*i]) {
            step.inputs.iter().chain([&step.output]).for_each(|&v| touch(v, i + 1));
        }
        let mut buffers = Vec::new();
        let mut buffer_of = vec![usize::MAX; count];
        for id in 0..count {
            if root(ValueId(id)).0 .0 != id || live[id].0 == usize::MAX {
                continue;
            }
            let too_large = || Error::LimitExceeded(format!("a tensor of {} is too large", shape(id)));
            let view = network.view(ValueId(id), shape(id), 0);
            // Kernels count values in 31 bits.
            let bytes = view
                .bytes()
                .filter(|b| b / view.element.bytes() < i32::MAX as usize)
                .ok_or_else(too_large)?;
            buffer_of[id] = buffers.len();
            buffers.push(Buffer { size: bytes.div_ceil(ALIGN), live: live[id], offset: 0 });
        }
        // What steps need beside the tensors, which depends on how these lie in their buffers, not on where the buffers are.
        let at = |id: ValueId, offset: usize| {
            let (top, first) = root(id);
            let whole = network.view(top, shape(top.0), offset);
            if top == id {
                whole
            } else {
                whole.channels(first, shape(id.0).c)
            }
        };
        let mut room_of = vec![usize::MAX; network.steps.len()];
        for (i, step) in network.steps.iter().enumerate().filter(|(i, _)| needed[*i]) {
            let inputs: Vec<DeviceView> = step.inputs.iter().map(|v| at(*v, 0)).collect();
            let bytes = step.op.workspace(&inputs, &at(step.output, 0));
            if bytes > 0 {
                room_of[i] = buffers.len();
                buffers.push(Buffer { size: bytes.div_ceil(ALIGN), live: (i + 1, i + 1), offset: 0 });
            }
        }
        let units = place(&mut buffers).and_then(|units| units.checked_mul(ALIGN));
        let bytes = units.ok_or_else(|| Error::LimitExceeded("the tensors together are too large".into()))?;
        let view = |id: ValueId| Some(at(id, buffers.get(buffer_of[root(id).0 .0])?.offset * ALIGN));
        let placed =
            |id: &ValueId| view(*id).ok_or_else(|| Error::Internal("a step's tensor has no place".into()));
        let steps = network.steps.iter().enumerate().filter(|(i, _)| needed[*i]).map(|(i, s)| {
            let room = buffers.get(room_of[i]);
            Ok(DeviceStep {
                op: s.op.clone(),
                inputs: s.inputs.iter().map(placed).collect::<Result<_>>()?,
                output: placed(&s.output)?,
                workspace: room.map_or(0..0, |b| b.offset * ALIGN..(b.offset + b.size) * ALIGN),
            })
        });
        let program = DeviceProgram::new(bytes, steps.collect::<Result<_>>()?)?;
        let inputs = network.inputs.iter().map(placed).collect::<Result<_>>()?;
        let outputs =
            network.outputs.iter().enumerate().map(|(i, v)| view(*v).filter(|_| wanted(i))).collect();
        Ok(Self { program, inputs, outputs })
    }

    /// Measures who computes each convolution fastest at this size, our kernels or NVIDIA's libraries, as the device of `network`
    /// is set ([`ConvLibraries`](crate::gpu::ops::ConvLibraries)); what was measured in this process before is not measured again. Without it
    /// our kernels compute all, by their rule. [`DevicePlan::bytes`] grows by the workspace that libraries take; memory for the
    /// largest layer and 32 MiB are held for the moment. Not while a stream is recorded.
    ///
    /// Errors: of the driver; of a library where the setting forces it.
    pub fn choose(&mut self, network: &DeviceNetwork) -> Result<()> {
        self.program.choose(&network.device)
    }

    /// What computes each step: a kernel's name, or a library's and its algorithm's.
    pub fn kernels(&self) -> impl Iterator<Item = &'static str> + '_ {
        self.program.kernels()
    }

    /// Where the inputs are written, in the arena.
    pub fn inputs(&self) -> &[DeviceView] {
        &self.inputs
    }

    /// Where the outputs stand after a run, in the graph's order; None where nothing was wanted.
    pub fn outputs(&self) -> &[Option<DeviceView>] {
        &self.outputs
    }

    /// Bytes of arena.
    pub fn bytes(&self) -> usize {
        self.program.bytes()
    }

    /// Number of steps.
    pub fn steps(&self) -> usize {
        self.program.count()
    }

    /// Gives the network's work to the stream, on inputs that are in the arena by then.
    pub fn launch(&self, stream: &Stream, arena: &DeviceBuffer) -> Result<()> {
        self.program.launch(stream, arena)
    }

    /// As [`DevicePlan::launch`], waiting for each step. Returns their milliseconds.
    pub fn launch_timed(&self, stream: &Stream, arena: &DeviceBuffer) -> Result<Vec<f32>> {
        self.program.launch_timed(stream, arena)
    }

    /// Writes `inputs` into the arena, runs, and reads the outputs, in the graph's order. For tests and tools.
    pub fn run_tensors(
        &self,
        stream: &Stream,
        arena: &DeviceBuffer,
        inputs: &[Tensor],
    ) -> Result<Vec<Tensor>> {
        self.run_by(stream, arena, inputs, || self.launch(stream, arena))
    }

    /// As [`DevicePlan::run_tensors`], the network's work given to the stream by `launch`: as a recording.
    pub fn run_by(
        &self,
        stream: &Stream,
        arena: &DeviceBuffer,
        inputs: &[Tensor],
        launch: impl FnOnce() -> Result<()>,
    ) -> Result<Vec<Tensor>> {
        let shapes: Vec<Shape> = inputs.iter().map(|t| t.shape).collect();
        if self.inputs.iter().map(|v| v.shape).ne(shapes.iter().copied()) {
            return Err(Error::InvalidArgument(format!("planned for other inputs than {shapes:?}")));
        }
        for (view, tensor) in self.inputs.iter().zip(inputs) {
            let c = view.shape.c;
            let pixels = tensor.data.chunks_exact(c);
            let padded =
                pixels.flat_map(|p| p.iter().copied().chain(std::iter::repeat_n(0.0, view.pixel - c)));
            arena.set(stream, view.offset, &view.element.encode(padded))?;
        }
        launch()?;
        let read = |view: &Option<DeviceView>| {
            let Some(v) = view else { return Ok(Tensor::zeros(Shape::new(0, 0, 0, 0))) };
            let bytes = v.bytes().unwrap_or(0);
            let values = v.element.decode(&arena.values::<u8>(stream, v.offset, bytes)?);
            let data = values.chunks_exact(v.pixel).flat_map(|p| p[..v.shape.c].to_vec()).collect();
            Ok(Tensor::from_vec(v.shape, data))
        };
        self.outputs.iter().map(read).collect()
    }
}

/// Which steps are needed for these values.
fn needed(network: &DeviceNetwork, wanted: impl Iterator<Item = ValueId>) -> Vec<bool> {
    let root = |id: ValueId| root(&network.values, id).0;
    let mut read = vec![false; network.values.len()];
    wanted.for_each(|v| read[root(v).0] = true);
    let mut needed = vec![false; network.steps.len()];
    for (i, step) in network.steps.iter().enumerate().rev() {
        needed[i] = read[root(step.output).0];
        if needed[i] {
            step.inputs.iter().for_each(|&v| read[root(v).0] = true);
        }
    }
    needed
}
