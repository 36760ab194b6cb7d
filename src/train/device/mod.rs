//! A network while it is trained, on a CUDA device: the units that the CPU walks (`train/network`), by the kernels of
//! `gpu/ops/train`.
//!
//! Maps, their gradients, the parameters in f32 and the sums are on the device. A unit has its map as its readers see it, and, where it is
//! normalised, as its operation left it, too: a reader's kernel then copies vectors straight into shared memory, which is worth more
//! than the memory that the CPU saves by applying the normalisation where a map is read. The gradient that a unit's readers left is
//! pulled back in its place.
//!
//! Outputs are judged here (`objective.rs`), those of boxes that are looked at a second time, too (`second_look.rs`): faces come up, sums
//! of losses and numbers of boxes go down. Where the caller judges, outputs are downloaded and their gradients uploaded, through pinned
//! memory. `run` and `run_back` know nothing of either. The optimiser's
//! buffers and the averages are on the device from the first step on (`update.rs`); all of it is brought to the host when somebody asks.

mod backward;
mod batch;
mod forward;
pub mod objective;
mod reduce;
pub mod second_look;
mod store;
mod update;

use crate::error::{Error, Result};
use crate::gpu::map::{DeviceView, Element};
use crate::gpu::memory::DeviceBuffer;
use crate::gpu::ops::train::objective::{Judge, Looks, Others};
use crate::gpu::ops::train::{MapIn, Room, Taken, TrainOps};
use crate::gpu::ops::{ConvLibraries, Device, DeviceOp};
use crate::gpu::upload::Upload;
use crate::graph::{Graph, Weights};
use crate::shape::{Shape, Tensor};
use crate::train::network::{
    Engine, Frozen, InputTable, Judgement, LookAgain, ParamsAndGrads, Update, Updated,
};
use crate::train::objective::Losses;
use crate::train::optim::{Ema, Optimizer};
use crate::train::units::Op;
use crate::train::walk::Walk;
use batch::{room, Batch, Staging};
use reduce::Reduction;
use std::sync::Arc;
use store::Store;
use update::Moments;

/// A network on a device, its parameters, their gradients, and the maps of the batch at hand.
pub struct DeviceEngine {
    /// Where several processes train together. The first to go: memory is given back when no sum waits for others any more.
    reduction: Option<Reduction>,
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
    /// Pixels on their way to the device; outputs and their gradients between it and the host.
    pixels: Upload,
    outside: Staging,
    /// None until outputs are judged here.
    judge: Option<Judge>,
    looks: Option<Looks>,
    /// Gradients of the outputs of either phase that were judged here, as they lie in `outside`; how many phases of this batch were.
    slopes: [Option<DeviceBuffer>; 2],
    judged: usize,
    /// The boxes of the second phase, those of each of the network's inputs of boxes one behind the other, and how many each has; none
    /// before.
    boxes: Room,
    box_rows: Vec<usize>,
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
            reduction: None,
            graph,
            walk,
            ops,
            store,
            moments: None,
            batch,
            plain,
            table: None,
            pixels: Upload::default(),
            outside: Staging::default(),
            judge: None,
            looks: None,
            slopes: [None, None],
            judged: 0,
            boxes: Room::default(),
            box_rows: Vec::new(),
            threads,
        })
    }

    /// As [`TrainOps::convolutions_by_cudnn`].
    pub fn convolutions_by_cudnn(&self) -> [usize; 3] {
        self.ops.convolutions_by_cudnn()
    }

    /// Outputs `range` of the graph, as f32 one behind the other in `outside`; their shapes and bytes.
    fn gather(&mut self, range: std::ops::Range<usize>) -> Result<(Vec<Shape>, usize)> {
        let units: Vec<usize> =
            self.graph.outputs[range].iter().map(|(_, node)| self.shown(node.0)).collect();
        let shapes: Vec<Shape> = units.iter().map(|&u| self.batch.shapes[u]).collect();
        let (views, bytes) = side_by_side(&shapes);
        let ops = &self.ops;
        let buffer = self.outside.device(ops, bytes)?;
        for (&u, &view) in units.iter().zip(&views) {
            ops.taken_back(Taken::From([0; 2]), self.batch.seen(u)?, MapIn { buffer, view }, false)?;
        }
        Ok((shapes, bytes))
    }

    /// Outputs `range` of the graph, as f32 on the host.
    fn download(&mut self, range: std::ops::Range<usize>) -> Result<Vec<Tensor>> {
        let (shapes, bytes) = self.gather(range)?;
        let values = self.outside.download(&self.ops, bytes)?;
        let mut values = bytemuck::cast_slice::<u8, f32>(values);
        let mut take = |shape: Shape| {
            let (own, rest) = values.split_at(shape.len());
            values = rest;
            Tensor::from_vec(shape, own.to_vec())
        };
        Ok(shapes.into_iter().map(&mut take).collect())
    }

    /// Brings a batch's pixels to the device and runs the units of the first phase.
    fn run_first(&mut self, pixels: &[u8], shape: Shape, table: &InputTable) -> Result<()> {
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
        self.box_rows.clear();
        self.judged = 0;
        self.finish_reduction()?;
        if self.table.as_ref().is_none_or(|(known, _)| known != table) {
            let values = table.value.concat();
            if values.len() != 3 * 256 {
                return Err(Error::Internal("a table of other than 256 values a channel".into()));
            }
            self.table = Some((table.clone(), DeviceBuffer::of(self.ops.stream(), &values)?));
        }
        self.store.upload(&self.ops)?;
        self.pixels.upload(self.ops.stream(), pixels.len(), |to| to.copy_from_slice(pixels))?;
        self.run(0..self.walk.second_phase)
    }

    /// How many phases the network has.
    fn phases(&self) -> usize {
        1 + usize::from(self.walk.second_phase < self.walk.units.len())
    }

    /// Begins the second phase, on boxes of these shapes for each of the network's inputs of boxes.
    fn begin_second(&mut self, boxes: &[Shape]) -> Result<()> {
        self.box_rows.clear();
        let images = self.walk.units.iter().position(|u| matches!(u.op, Op::Input(_)));
        let images = images.and_then(|u| self.batch.shapes.get(u).copied());
        let images = images.ok_or_else(|| Error::Internal("boxes before a batch".into()))?;
        let inputs: Vec<Shape> = [images].iter().chain(boxes).copied().collect();
        self.batch.begin(&self.graph.shapes(&inputs)?, &self.walk.units);
        Ok(())
    }

    /// Runs the units of the second phase on the boxes, so many for each of the inputs.
    fn run_second(&mut self, rows: Vec<usize>) -> Result<()> {
        self.box_rows = rows;
        self.store.upload(&self.ops)?;
        self.run(self.walk.second_phase..self.walk.units.len())
    }

    /// Judges what the forward pass has put out, where it is; of a batch that is shared, together with the other ranks.
    fn judge_outputs(&mut self, judgements: &[Judgement<'_>]) -> Result<Vec<Losses>> {
        let (shapes, bytes) = self.gather(0..self.walk.first_outputs(&self.graph))?;
        if self.judge.is_none() {
            self.judge = Some(Judge::new(self.ops.device())?);
        }
        let outputs = self.outside.device(&self.ops, bytes)?;
        let slopes = room(&mut self.slopes[0], &self.ops, bytes)?;
        let judge = self.judge.as_mut().ok_or_else(|| Error::Internal("no judge".into()))?;
        let others = self.reduction.as_ref().map(|r| r as &dyn Others);
        let stream = self.ops.stream();
        let losses = objective::judge(judge, stream, [outputs, slopes], &shapes, judgements, others)?;
        self.judged = 1;
        Ok(losses)
    }

    /// Chooses boxes by what was judged, runs the second phase on them and judges it; of a batch that is shared, together with the other
    /// ranks.
    fn judge_boxes(&mut self, again: &LookAgain<'_>) -> Result<Losses> {
        if self.judged != 1 || self.phases() == 1 {
            return Err(Error::Internal("a second look without a first, or at no boxes".into()));
        }
        let (first, own) = (self.walk.first_outputs(&self.graph), again.look.first_outputs());
        let outputs = self.graph.outputs.iter().take(first.min(own));
        let shapes: Vec<Shape> = outputs.map(|(_, node)| self.batch.shapes[self.shown(node.0)]).collect();
        if self.looks.is_none() {
            self.looks = Some(Looks::new(self.ops.device())?);
        }
        let Self { looks, ops, outside, boxes, reduction, .. } = self;
        let others = reduction.as_ref().map(|r| r as &dyn Others);
        let looks = looks.as_mut().ok_or_else(|| Error::Internal("nobody looks".into()))?;
        let rows = second_look::choose(looks, ops.stream(), outside.there()?, &shapes, again, others, boxes)?;
        self.begin_second(&rows.iter().map(|&rows| Shape::new(rows, 5, 1, 1)).collect::<Vec<_>>())?;
        self.run_second(rows)?;
        let (shapes, bytes) = self.gather(first..self.graph.outputs.len())?;
        let Self { looks, ops, outside, slopes, box_rows, .. } = self;
        let looks = looks.as_mut().ok_or_else(|| Error::Internal("nobody looks".into()))?;
        let buffers = [outside.device(ops, bytes)?, room(&mut slopes[1], ops, bytes)?];
        let losses = second_look::judge(looks, ops.stream(), buffers, &shapes, box_rows, again.look)?;
        self.judged = 2;
        Ok(losses)
    }

    /// Forgets the gradients of an earlier batch. The units that the outputs are of, and how their gradients lie one behind the other.
    fn begin_back(&mut self) -> Result<(Vec<usize>, Vec<Shape>)> {
        if self.box_rows.is_empty() && self.phases() == 2 {
            return Err(Error::Internal("a backward pass before the second phase".into()));
        }
        self.finish_reduction()?;
        self.batch.drop_gradients();
        self.store.clear_gradients(&self.ops)?;
        let units: Vec<usize> = self.graph.outputs.iter().map(|(_, node)| self.shown(node.0)).collect();
        let shapes = units.iter().map(|&u| self.batch.shapes[u]).collect();
        Ok((units, shapes))
    }

    /// Takes gradients of the outputs, one behind the other in `from`, back through the network; those of judges phase by phase.
    fn back_from(&mut self, from: From, units: &[usize], views: &[DeviceView]) -> Result<()> {
        let Self { outside, slopes, batch, ops, walk, .. } = self;
        for (&u, &view) in units.iter().zip(views) {
            if walk.wanted[u] {
                let slopes = &slopes[usize::from(u >= walk.second_phase)];
                let buffer = match from {
                    From::Host => outside.there()?,
                    From::Judge => {
                        slopes.as_ref().ok_or_else(|| Error::Internal("nothing was judged".into()))?
                    }
                };
                let (dy, add) = batch.take_gradient(u, ops)?;
                let to = MapIn { buffer: &dy, view: batch.view(u) };
                ops.taken_back(Taken::From([0; 2]), MapIn { buffer, view }, to, add)?;
                batch.put_gradient(u, dy);
            }
        }
        self.store.upload(&self.ops)?;
        self.begin_reduction()?;
        self.run_back()?;
        if self.reduction.is_some() {
            // What stands still is cleared when the sums are there.
            return Ok(());
        }
        self.store.clear_untrained(&self.graph, &self.walk.trainable, &self.ops)
    }

    fn shown(&self, node: usize) -> usize {
        self.walk.shown_by[node].expect("an output is shown")
    }
}

/// Where the gradients of the outputs come from.
enum From {
    Host,
    Judge,
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
        self.finish_reduction()?;
        self.store.params_mut(&self.ops)
    }

    fn params_and_grads(&mut self) -> Result<ParamsAndGrads<'_>> {
        self.finish_reduction()?;
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
        self.run_first(pixels, shape, table)?;
        self.download(0..self.walk.first_outputs(&self.graph))
    }

    fn forward_judged(
        &mut self,
        pixels: &[u8],
        shape: Shape,
        table: &InputTable,
        judgements: &[Judgement<'_>],
    ) -> Result<Option<Vec<Losses>>> {
        self.run_first(pixels, shape, table)?;
        let losses = self.judge_outputs(judgements);
        self.or_end(losses).map(Some)
    }

    fn look_again(&mut self, again: &LookAgain<'_>) -> Result<Losses> {
        let losses = self.judge_boxes(again);
        self.or_end(losses)
    }

    fn backward_judged(&mut self) -> Result<()> {
        if self.judged != self.phases() {
            return Err(Error::Internal("not all was judged here".into()));
        }
        let (units, shapes) = self.begin_back()?;
        let (first, second) = shapes.split_at(self.walk.first_outputs(&self.graph));
        let views = [side_by_side(first).0, side_by_side(second).0].concat();
        let done = self.back_from(From::Judge, &units, &views);
        self.or_end(done)
    }

    fn forward_boxes(&mut self, boxes: Vec<Tensor>) -> Result<Vec<Tensor>> {
        self.judged = 0;
        self.begin_second(&boxes.iter().map(|b| b.shape).collect::<Vec<_>>())?;
        for unit in &self.walk.units {
            if let Op::RoiAlign { roi, boxes: place } = &unit.op {
                roi.check(self.batch.shapes[unit.inputs[0]], &boxes[*place])?;
            }
        }
        let values: Vec<f32> = boxes.iter().flat_map(|b| b.data.iter().copied()).collect();
        self.boxes.bytes(self.ops.device(), values.len() * 4)?;
        self.boxes.there()?.set(self.ops.stream(), 0, &values)?;
        self.run_second(boxes.iter().map(|b| b.shape.n).collect())?;
        self.download(self.walk.first_outputs(&self.graph)..self.graph.outputs.len())
    }

    fn backward(&mut self, d_outputs: &[Tensor]) -> Result<()> {
        let (units, shapes) = self.begin_back()?;
        if let Some(i) = (0..units.len()).find(|&i| d_outputs.get(i).map(|d| d.shape) != Some(shapes[i])) {
            return Err(Error::Internal(format!("gradient of output {i} is not of shape {}", shapes[i])));
        }
        let (views, bytes) = side_by_side(&shapes);
        self.outside.upload(&self.ops, bytes, |to| {
            let mut to = bytemuck::cast_slice_mut::<u8, f32>(to);
            for d in d_outputs {
                let (own, rest) = to.split_at_mut(d.data.len());
                own.copy_from_slice(&d.data);
                to = rest;
            }
        })?;
        let done = self.back_from(From::Host, &units, &views);
        self.or_end(done)
    }

    fn part(&mut self) -> Result<()> {
        self.leave()
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
        let together = match self.world() {
            1 => String::new(),
            world => format!(", one of {world} processes"),
        };
        let by = match self.ops.convolutions() {
            ConvLibraries::Own | ConvLibraries::CublasLt => "",
            ConvLibraries::Cudnn => ", convolutions by cuDNN",
            ConvLibraries::Auto => ", convolutions by whoever is faster",
        };
        format!("{} (sm_{major}{minor}){by}{together}", context.name())
    }
}
