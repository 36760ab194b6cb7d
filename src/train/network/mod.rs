//! A network while it is trained: forward and backward over a batch, on the units of `train/units.rs`.
//!
//! The batch is cut by images into parts, which the threads take as they come; sums over a batch (statistics, parameter
//! gradients) are added up in the parts' order, so that a step gives the same bits on any number of threads.
//!
//! A network may look at boxes that are chosen by its outputs (RoIAlign): then its forward pass has two phases, and whoever runs
//! it gives the boxes between them. Its backward pass is one.

mod backward;
mod backward_unit;
mod batch;
mod engine;
mod forward;
mod roi_align;
mod sum;

use super::units::{Op, Unit};
use super::walk::Walk;
use crate::cpu::dense::resample::Resampling;
use crate::cpu::dense::{maps, Element, Geometry, Source};
use crate::cpu::{isa, Isa};
use crate::error::{Error, Result};
use crate::graph::{Graph, Weights};
use crate::layers::{Conv2d, Layer};
use crate::shape::{Shape, Tensor};
use batch::{Buffer, Spare, Workers};
use std::ops::Range;

pub use super::walk::Frozen;
pub use engine::{Engine, InputTable, Judgement, LookAgain, ObjectiveRef, ParamsAndGrads, Update, Updated};

/// A network, its parameters, their gradients, and the maps of the batch at hand, stored as `T`.
pub struct Network<T: Element> {
    graph: Graph,
    units: Vec<Unit>,
    /// For every node the unit that shows it.
    shown_by: Vec<Option<usize>>,
    /// For every unit whether anything trainable lies at or before it.
    wanted: Vec<bool>,
    /// For every parameter.
    trainable: Vec<bool>,
    /// The first unit that reads a unit's map: the last to add to its gradient.
    first_reader: Vec<Option<usize>>,
    /// Batch normalisations that keep their running statistics.
    frozen_norm: Vec<bool>,
    /// Values in the order of [`Graph::params`], PyTorch's layout.
    pub params: Vec<Vec<f32>>,
    /// Gradients, likewise; [`Network::backward`] adds to them.
    pub grads: Vec<Vec<f32>>,
    isa: Isa,
    workers: Workers<T>,
    maps: Vec<Map<T>>,
    spare: Spare<T>,
    shapes: Vec<Shape>,
    /// Where the second phase begins: the first unit that boxes are fed to, or the number of units.
    second_phase: usize,
    /// What it was given for the batch, R x 5 x 1 x 1 for each of these inputs; empty before.
    boxes: Vec<Tensor>,
}

/// A unit's map of the batch.
#[derive(Default)]
struct Map<T> {
    /// As stored.
    z: Vec<T>,
    /// What readers apply.
    scale: Vec<f32>,
    shift: Vec<f32>,
    slope: f32,
    /// Of the batch, where there is a normalisation.
    mean: Vec<f32>,
    inv_std: Vec<f32>,
    /// Gradient with respect to what readers see, once one has left some.
    dy: Option<Buffer<T>>,
    /// `[2][C]`, sums of [`maps::gradient_sums`] over the batch, once the last reader has left its part.
    gradient_sums: Option<Vec<f64>>,
}

impl<T: Element> Map<T> {
    fn source(&self, images: &Range<usize>, per_image: usize) -> Source<'_, T> {
        Source {
            z: &self.z[images.start * per_image..images.end * per_image],
            scale: &self.scale,
            shift: &self.shift,
            slope: self.slope,
        }
    }
}

impl<T: Element> Network<T> {
    /// A network with the values of `weights` (all of them there), on `threads` threads.
    pub fn new(graph: Graph, weights: &Weights, frozen: &Frozen, threads: usize) -> Result<Self> {
        let params = graph
            .params
            .iter()
            .map(|p| Ok(weights.get(&p.name, &p.shape)?.to_vec()))
            .collect::<Result<Vec<_>>>()?;
        let Walk { units, shown_by, trainable, wanted, frozen_norm, second_phase } =
            Walk::new(&graph, frozen)?;
        let first_reader =
            (0..units.len()).map(|i| units.iter().position(|u| u.inputs.contains(&i))).collect();
        let grads = params.iter().map(|p: &Vec<f32>| vec![0.0; p.len()]).collect();
        let workers = Workers::new(threads).map_err(|e| Error::Unsupported(format!("threads: {e}")))?;
        let maps = units.iter().map(|_| Map::default()).collect();
        Ok(Self {
            graph,
            units,
            shown_by,
            wanted,
            trainable,
            first_reader,
            frozen_norm,
            params,
            grads,
            isa: isa::detected(),
            workers,
            maps,
            spare: Spare::default(),
            shapes: Vec::new(),
            second_phase,
            boxes: Vec::new(),
        })
    }

    /// The network as built.
    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// Whether each parameter is trained.
    pub fn trainable(&self) -> &[bool] {
        &self.trainable
    }

    /// The parameters by name.
    pub fn weights(&self) -> Weights {
        let mut weights = Weights::default();
        for (p, v) in self.graph.params.iter().zip(&self.params) {
            weights.insert(&p.name, &p.shape, v.clone());
        }
        weights
    }

    /// Threads it runs on.
    pub fn threads(&self) -> usize {
        self.workers.threads()
    }

    /// Sets all gradients to zero.
    pub fn clear_gradients(&mut self) {
        self.grads.iter_mut().for_each(|g| g.fill(0.0));
    }

    /// Outputs of the first phase: all of them, but for those behind boxes.
    fn first_outputs(&self) -> usize {
        let first = |u: Option<usize>| u.is_some_and(|u| u < self.second_phase);
        self.graph.outputs.iter().filter(|(_, node)| first(self.shown_by[node.0])).count()
    }

    /// The graph's output `index` of the last batch, N x H x W x C.
    pub fn output(&self, index: usize) -> Tensor {
        let node = self.graph.outputs[index].1;
        let u = self.shown_by[node.0].expect("an output is shown");
        shown(self.isa, &self.maps[u], self.shapes[self.units[u].node])
    }
}

fn geometry(conv: &Conv2d, x: Shape, out: Shape) -> Geometry {
    Geometry {
        input: [x.h, x.w],
        out: [out.h, out.w],
        channels: [x.c, out.c],
        kernel: conv.kernel,
        stride: conv.stride,
        dilation: conv.dilation,
        padding: conv.padding,
    }
}

/// A convolution as a product over pixels where its window is the whole map: a fully connected layer. Its windows have the
/// weights' order as they lie in memory, so that images are pixels of one long row.
struct FullyConnected {
    /// The window's values as the channels of a 1x1 convolution.
    geometry: Geometry,
    /// What readers of the map apply, for each of these channels.
    scale: Vec<f32>,
    shift: Vec<f32>,
}

impl FullyConnected {
    /// None for other convolutions, and behind a normalisation, whose sums are taken by its own channels.
    fn of<T>(g: &Geometry, unit: &Unit, map: &Map<T>) -> Option<Self> {
        let whole = g.kernel == g.input && g.out == [1; 2] && g.padding == [0; 4] && g.dilation == [1; 2];
        let area = g.kernel[0] * g.kernel[1];
        let geometry = Geometry {
            input: [1; 2],
            kernel: [1; 2],
            stride: [1; 2],
            channels: [g.window_values(), g.channels[1]],
            ..*g
        };
        (whole && area > 1 && unit.norm.is_none()).then(|| Self {
            geometry,
            scale: map.scale.repeat(area),
            shift: map.shift.repeat(area),
        })
    }

    /// The map as it is read.
    fn source<'a, T>(&'a self, map: Source<'a, T>) -> Source<'a, T> {
        Source { scale: &self.scale, shift: &self.shift, ..map }
    }
}

/// How a max pooling or bilinear interpolation makes `out` of `x`.
fn resampling(op: &Op, x: Shape, out: Shape) -> Resampling {
    let (from, to) = ([x.h, x.w], [out.h, out.w]);
    match op {
        Op::MaxPool(l) => Resampling::max(from, to, l.kernel, l.stride, [l.padding[0], l.padding[1]]),
        _ => Resampling::bilinear(from, to),
    }
}

/// What readers of a map see, in f32.
fn shown<T: Element>(isa: Isa, map: &Map<T>, shape: Shape) -> Tensor {
    let mut t = Tensor::zeros(shape);
    maps::read(isa, map.source(&(0..shape.n), shape.c * shape.h * shape.w), &mut t.data, shape.c);
    t
}

/// The inputs as the layer lists them: one whose second gives a size alone gets zeros of that size.
fn with_size(graph: &Graph, unit: &Unit, mut inputs: Vec<Tensor>, shapes: &[Shape]) -> Vec<Tensor> {
    if let Op::Plain { layer: Layer::Crop(_), .. } = unit.op {
        if let Some(like) = graph.nodes[unit.node].inputs.get(1) {
            inputs.push(Tensor::zeros(shapes[like.0]));
        }
    }
    inputs
}
