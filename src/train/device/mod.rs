//! A network while it is trained, on a CUDA device: the units that the CPU walks (`train/network`), by the kernels of
//! `gpu/ops/train`.
//!
//! Maps, their gradients, the parameters in f32 and the sums are on the device. A unit has its map as its readers see it, and, where it is
//! normalised, as its operation left it, too: a reader's kernel then copies vectors straight into shared memory, which is worth more
//! than the memory that the CPU saves by applying the normalisation where a map is read. The gradient that a unit's readers left is
//! pulled back in its place.
//!
//! Judging outputs is still the CPU's: they are downloaded and their gradients uploaded, through pinned memory. Everything between is
//! `run` and `run_back`, which know nothing of it, so that losses can move to the device later. The optimiser's
//! buffers and the averages are on the device from the first step on (`update.rs`); all of it is brought to the host when somebody asks.

mod backward;
mod batch;
mod forward;
mod store;
mod update;

use crate::error::{Error, Result};
use crate::gpu::map::{DeviceView, Element};
use crate::gpu::memory::DeviceBuffer;
use crate::gpu::ops::train::{MapIn, Taken, TrainOps};
use crate::gpu::ops::{Device, DeviceOp};
use crate::graph::{Graph, Weights};
use crate::shape::{Shape, Tensor};
use crate::train::network::{Engine, Frozen, InputTable, ParamsAndGrads, Update, Updated};
use crate::train::optim::{Ema, Optimizer};
use crate::train::units::Op;
use crate::train::walk::Walk;
use batch::{Batch, Staging};
use std::sync::Arc;
use store::Store;
use update::Moments;

/// A network on a device, its parameters, their gradients, and the maps of the batch at hand.
pub struct DeviceEngine {
    graph: Graph,
    walk: Walk,
    ops: TrainOps,
    store: Store,
    /// None until the first step.
    moments: Option<Moments>,
    batch: Batch,
    /// For every unit, what inference has an operation for.
    plain: Vec<Option<DeviceOp>>,
    /// What the input's values are, once a batch has told, and `[3][256]` of them on the device.
    table: Option<(InputTable, DeviceBuffer)>,
    /// Pixels and boxes on their way to the device; outputs and their gradients between it and the host.
    pixels: Staging,
    outside: Staging,
    /// Where the boxes of the second phase are, in a buffer for each of the network's inputs of boxes; empty before.
    boxes: Vec<DeviceBuffer>,
    threads: usize,
}

impl DeviceEngine {
    /// A network with the values of `weights` (all of them there), whose maps are of `element`; `threads` are for what its user does on the
    /// CPU.
    pub fn new(
        graph: Graph,
        weights: &Weights,
        frozen: &Frozen,
        device: &Arc<Device>,
        element: Element,
        threads: usize,
    ) -> Result<Self> {
        let walk = Walk::new(&graph, frozen)?;
        let ops = TrainOps::new(device, element)?;
        let store = Store::new(&graph, &walk, weights, &ops)?;
        let plain =
            walk.units.iter().map(|unit| forward::plain_op(unit, device)).collect::<Result<Vec<_>>>()?;
        let batch = Batch::new(walk.units.len(), element);
        Ok(Self {
            graph,
            walk,
            ops,
            store,
            moments: None,
            batch,
            plain,
            table: None,
            pixels: Staging::default(),
            outside: Staging::default(),
            boxes: Vec::new(),
            threads,
        })
    }

    /// Outputs `range` of the graph, as f32 on the host.
    fn download(&mut self, range: std::ops::Range<usize>) -> Result<Vec<Tensor>> {
        let units: Vec<usize> =
            self.graph.outputs[range].iter().map(|(_, node)| self.shown(node.0)).collect();
        let shapes: Vec<Shape> = units.iter().map(|&u| self.batch.shapes[u]).collect();
        let (views, bytes) = side_by_side(&shapes);
        let ops = &self.ops;
        let buffer = self.outside.device(ops, bytes)?;
        for (&u, &view) in units.iter().zip(&views) {
            ops.taken_back(Taken::From([0; 2]), self.batch.seen(u)?, MapIn { buffer, view }, false)?;
        }
        let values = self.outside.download(ops, bytes)?;
        let mut values = bytemuck::cast_slice::<u8, f32>(values);
        let mut take = |shape: Shape| {
            let (own, rest) = values.split_at(shape.len());
            values = rest;
            Tensor::from_vec(shape, own.to_vec())
        };
        Ok(shapes.into_iter().map(&mut take).collect())
    }

    fn shown(&self, node: usize) -> usize {
        self.walk.shown_by[node].expect("an output is shown")
    }
}

/// Maps of f32 one behind the other, and their bytes.
fn side_by_side(shapes: &[Shape]) -> (Vec<DeviceView>, usize) {
    let mut bytes = 0;
    let views = shapes.iter().map(|&shape| {
        let view = DeviceView::new(Element::F32, shape, bytes);
        bytes += shape.len() * 4;
        view
    });
    (views.collect(), bytes)
}

impl Engine for DeviceEngine {
    fn graph(&self) -> &Graph {
        &self.graph
    }

    fn trainable(&self) -> &[bool] {
        &self.walk.trainable
    }

    fn params(&mut self) -> Result<&mut [Vec<f32>]> {
        self.store.params_mut(&self.ops)
    }

    fn params_and_grads(&mut self) -> Result<ParamsAndGrads<'_>> {
        self.store.params_and_grads_mut(&self.ops)
    }

    fn update(&mut self, update: Update<'_>) -> Result<Updated> {
        self.take_step(update)
    }

    fn settle(&mut self, optimizer: &mut Optimizer, average: Option<&mut Ema>) -> Result<()> {
        self.bring_back(optimizer, average)
    }

    fn replaced(&mut self) {
        self.moments = None;
    }

    fn forward(&mut self, pixels: &[u8], shape: Shape, table: &InputTable) -> Result<Vec<Tensor>> {
        let inputs = self.walk.units.iter().filter(|u| matches!(u.op, Op::Input(_))).count();
        if inputs != 1 || shape.c != 3 || pixels.len() != shape.len() {
            return Err(Error::InvalidArgument(format!(
                "a batch of {shape} from {} pixel values, for a network of {inputs} inputs",
                pixels.len()
            )));
        }
        // How many boxes there are is not known yet; nothing of the first phase depends on it.
        let boxes = self.walk.units.iter().filter(|u| matches!(u.op, Op::Boxes(_))).count();
        let all: Vec<Shape> = [shape].into_iter().chain(vec![Shape::new(1, 5, 1, 1); boxes]).collect();
        self.batch.begin(&self.graph.shapes(&all)?, &self.walk.units);
        self.boxes.clear();
        if self.table.as_ref().is_none_or(|(known, _)| known != table) {
            let values = table.value.concat();
            if values.len() != 3 * 256 {
                return Err(Error::Internal("a table of other than 256 values a channel".into()));
            }
            self.table = Some((table.clone(), DeviceBuffer::of(self.ops.stream(), &values)?));
        }
        self.store.upload(&self.ops)?;
        self.pixels.upload(&self.ops, pixels.len(), |to| to.copy_from_slice(pixels))?;
        self.run(0..self.walk.second_phase)?;
        self.download(0..self.walk.first_outputs(&self.graph))
    }

    fn forward_boxes(&mut self, boxes: Vec<Tensor>) -> Result<Vec<Tensor>> {
        let images = self.walk.units.iter().position(|u| matches!(u.op, Op::Input(_)));
        let images = images.and_then(|u| self.batch.shapes.get(u).copied());
        let images = images.ok_or_else(|| Error::Internal("boxes before a batch".into()))?;
        let inputs: Vec<Shape> = [images].into_iter().chain(boxes.iter().map(|b| b.shape)).collect();
        let shapes = self.graph.shapes(&inputs)?;
        for unit in &self.walk.units {
            if let Op::RoiAlign { roi, boxes: place } = &unit.op {
                roi.check(shapes[self.walk.units[unit.inputs[0]].node], &boxes[*place])?;
            }
        }
        self.batch.begin(&shapes, &self.walk.units);
        self.boxes =
            boxes.iter().map(|b| DeviceBuffer::of(self.ops.stream(), &b.data)).collect::<Result<_>>()?;
        self.store.upload(&self.ops)?;
        self.run(self.walk.second_phase..self.walk.units.len())?;
        self.download(self.walk.first_outputs(&self.graph)..self.graph.outputs.len())
    }

    fn backward(&mut self, d_outputs: &[Tensor]) -> Result<()> {
        if self.boxes.is_empty() && self.walk.second_phase < self.walk.units.len() {
            return Err(Error::Internal("a backward pass before the second phase".into()));
        }
        self.batch.drop_gradients();
        self.store.clear_gradients(&self.ops)?;
        let units: Vec<usize> = self.graph.outputs.iter().map(|(_, node)| self.shown(node.0)).collect();
        let shapes: Vec<Shape> = units.iter().map(|&u| self.batch.shapes[u]).collect();
        if let Some(i) = (0..units.len()).find(|&i| d_outputs.get(i).map(|d| d.shape) != Some(shapes[i])) {
            return Err(Error::Internal(format!("gradient of output {i} is not of shape {}", shapes[i])));
        }
        let (views, bytes) = side_by_side(&shapes);
        let buffer = self.outside.upload(&self.ops, bytes, |to| {
            let mut to = bytemuck::cast_slice_mut::<u8, f32>(to);
            for d in d_outputs {
                let (own, rest) = to.split_at_mut(d.data.len());
                own.copy_from_slice(&d.data);
                to = rest;
            }
        })?;
        for (&u, &view) in units.iter().zip(&views) {
            if self.walk.wanted[u] {
                let (dy, add) = self.batch.take_gradient(u, &self.ops)?;
                let to = MapIn { buffer: &dy, view: self.batch.view(u) };
                self.ops.taken_back(Taken::From([0; 2]), MapIn { buffer, view }, to, add)?;
                self.batch.put_gradient(u, dy);
            }
        }
        self.store.upload(&self.ops)?;
        self.run_back()?;
        self.store.clear_untrained(&self.graph, &self.walk.trainable, &self.ops)
    }

    fn threads(&self) -> usize {
        self.threads
    }

    fn precision(&self) -> &'static str {
        match self.ops.element() {
            Element::F32 => "f32",
            Element::F16 => "f16",
            Element::Bf16 => "bf16",
        }
    }

    fn machine(&self) -> String {
        let context = self.ops.device().context();
        let [major, minor] = context.capability();
        format!("{} (sm_{major}{minor})", context.name())
    }
}
