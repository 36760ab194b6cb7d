//! A compiled network placed in an arena for one input shape.

use super::build::NodeId;
use super::compile::{Compiled, CompiledStep};
use super::demand::{Demand, Need, Want};
use super::fuse::ValueId;
use crate::cpu::arena::Format;
use crate::cpu::part::Mask;
use crate::cpu::program::{Gate, Kind, StepSpec};
use crate::cpu::{Arena, Pool, Program, View};
use crate::error::{Error, Result};
use crate::shape::{Shape, Tensor};
use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

/// A compiled network for one set of input shapes.
pub struct Plan {
    program: Program,
    inputs: Vec<View>,
    outputs: Vec<View>,
}

/// A step for listings.
#[derive(Clone, Debug)]
pub struct StepInfo {
    /// The layer that the step starts with.
    pub name: String,
    /// Kernel.
    pub kernel: &'static str,
    /// Output size.
    pub output: Shape,
    /// Multiply-adds.
    pub macs: u64,
    /// Bytes of packed weights; none where an earlier step has the same ones.
    pub weight_bytes: usize,
}

/// A buffer in time and space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Buffer {
    /// Floats.
    pub size: usize,
    /// First step that writes it and last that reads it, both included.
    pub live: (usize, usize),
    /// Offset in the arena, once placed.
    pub offset: usize,
}

/// Places buffers so that no two that live at the same time overlap: largest first, each at the
/// lowest offset that is free during its life. Returns the arena's size, or None where that overflows.
pub(crate) fn place(buffers: &mut [Buffer]) -> Option<usize> {
    let mut order: Vec<usize> = (0..buffers.len()).collect();
    order.sort_by_key(|&i| (std::cmp::Reverse(buffers[i].size), buffers[i].live));
    let mut placed: Vec<usize> = Vec::with_capacity(buffers.len());
    let mut total = 0;
    for i in order {
        let b = buffers[i];
        let mut busy: Vec<(usize, usize)> = placed
            .iter()
            .map(|&j| buffers[j])
            .filter(|o| o.live.0 <= b.live.1 && b.live.0 <= o.live.1)
            .map(|o| (o.offset, o.offset + o.size))
            .collect();
        busy.sort_unstable();
        let mut offset = 0usize;
        for (from, to) in busy {
            if offset.checked_add(b.size)? <= from {
                break;
            }
            offset = offset.max(to);
        }
        buffers[i].offset = offset;
        total = total.max(offset.checked_add(b.size)?);
        placed.push(i);
    }
    Some(total)
}

/// Floats of alignment: a cache line.
const ALIGN: usize = 16;

impl Plan {
    /// Plans `network` for these input shapes.
    pub fn new(network: &Compiled, input_shapes: &[Shape]) -> Result<Self> {
        Self::for_wants(network, input_shapes, &[])
    }

    /// As [`Plan::new`], computing of each output what is wanted of it; those beyond `wants` whole. An output of which nothing is
    /// wanted has no pixels.
    pub fn for_wants(network: &Compiled, input_shapes: &[Shape], wants: &[Want]) -> Result<Self> {
        let Layout { demand, shapes, views, floats } = layout(network, input_shapes, wants)?;
        let view = |id: &ValueId| views[id.0];
        let (gates, floats) = gates(&demand, floats, view);
        let steps = network
            .steps
            .iter()
            .zip(&demand.steps)
            .filter(|(_, need)| **need != Need::Nothing)
            .map(|(s, need)| StepSpec {
                op: s.op.clone(),
                inputs: s.inputs.iter().map(view).collect(),
                output: view(&s.output),
                // All but the last node's; the output is that one's.
                between: [s.node].iter().chain(&s.then).take(s.then.len()).map(|n| shapes[n.0]).collect(),
                near: if let Need::Near(near) = need { Some(*near) } else { None },
            })
            .collect();
        let inputs: Vec<View> = network.inputs.iter().map(view).collect();
        let program = Program::new(network.isa, floats, inputs.clone(), gates, steps)?;
        let output = |(i, id): (usize, &ValueId)| match wants.get(i) {
            Some(Want::Nothing) => no_pixels(view(id).shape),
            _ => view(id),
        };
        Ok(Self { program, inputs, outputs: network.outputs.iter().enumerate().map(output).collect() })
    }

    /// Bytes of arena that a plan for these shapes takes, without making it.
    pub fn arena_bytes(network: &Compiled, input_shapes: &[Shape]) -> Result<usize> {
        Ok(layout(network, input_shapes, &[])?.floats.div_ceil(ALIGN) * ALIGN * size_of::<f32>())
    }

    /// The steps of `network` for these input shapes, in the order they run.
    pub fn describe(network: &Compiled, input_shapes: &[Shape]) -> Result<Vec<StepInfo>> {
        let graph = &network.graph;
        let shapes = graph.shapes(input_shapes)?;
        let mut seen = HashSet::new();
        let info = |step: &CompiledStep| {
            let node = &graph.nodes[step.node.0];
            let macs = |id: NodeId| {
                let node = &graph.nodes[id.0];
                let input = node.inputs.first().map_or(shapes[id.0], |i| shapes[i.0]);
                // A copy stands for a layer that another step computes.
                let computes = !matches!(step.op.0, Kind::Add(_));
                node.layer().filter(|_| computes).map_or(0, |l| l.macs(input, shapes[id.0]))
            };
            StepInfo {
                name: node.name.clone(),
                kernel: step.op.name(),
                output: network.values[step.output.0].shape(&shapes),
                macs: [step.node].iter().chain(&step.then).chain(&step.beside).map(|&node| macs(node)).sum(),
                weight_bytes: if seen.insert(Arc::as_ptr(&step.op)) { step.op.bytes() } else { 0 },
            }
        };
        Ok(network.steps.iter().map(info).collect())
    }

    /// Where the caller writes the inputs (halos are zeroed by the run).
    pub fn inputs(&self) -> &[View] {
        &self.inputs
    }

    /// Where the outputs stand after a run, in the graph's order; without pixels where nothing was wanted.
    pub fn outputs(&self) -> &[View] {
        &self.outputs
    }

    /// Floats of arena needed.
    pub fn floats(&self) -> usize {
        self.program.floats()
    }

    /// Floats of memory that each thread needs beside the arena; [`Pool::reserve_scratch`] keeps it.
    pub fn scratch(&self) -> usize {
        self.program.scratch()
    }

    /// Heap bytes of the plan itself.
    pub fn bytes(&self) -> usize {
        self.program.bytes() + (self.inputs.capacity() + self.outputs.capacity()) * size_of::<View>()
    }

    /// Runs the network on inputs already in the arena.
    pub fn run(&self, arena: &mut Arena, pool: &mut Pool) {
        self.program.run(arena, pool);
    }

    /// Runs, adding every step's wall time.
    pub fn run_timed(&self, arena: &mut Arena, pool: &mut Pool, times: &mut [Duration]) {
        self.program.run_timed(arena, pool, Some(times));
    }

    /// Runs on one thread; after every step `watch` is shown its number, its output and the arena.
    pub(crate) fn run_watched(
        &self,
        arena: &mut Arena,
        pool: &mut Pool,
        watch: &mut dyn FnMut(usize, &View, &[f32]),
    ) {
        self.program.run_watched(arena, pool, watch);
    }

    /// Writes `inputs` into the arena (grown where too small), runs, and copies the outputs out, in the
    /// graph's order. For tests and tools; a session writes its inputs in place.
    pub fn run_tensors(&self, arena: &mut Arena, pool: &mut Pool, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let shapes =
            |it: &mut dyn Iterator<Item = Shape>| it.map(|s| s.to_string()).collect::<Vec<_>>().join(", ");
        let planned = shapes(&mut self.inputs.iter().map(|v| v.shape));
        let given = shapes(&mut inputs.iter().map(|t| t.shape));
        if planned != given {
            return Err(Error::InvalidArgument(format!("planned for inputs {planned}, got {given}")));
        }
        arena.reserve(self.floats())?;
        self.inputs.iter().zip(inputs).for_each(|(view, tensor)| arena.write(view, tensor));
        self.run(arena, pool);
        Ok(self.outputs.iter().map(|view| arena.read(view)).collect())
    }

    /// Number of steps, the length of `run_timed`'s `times`.
    pub fn steps(&self) -> usize {
        self.program.len()
    }
}

/// The view of a tensor that is not computed.
fn no_pixels(shape: Shape) -> View {
    View::new(Shape { h: 0, w: 0, ..shape }, 0, [0; 4])
}

/// Places the masks of the demand's gates behind `floats`: one of answers each, and one that all grow in turn. Returns the gates
/// and the arena's size with them.
fn gates(demand: &Demand, floats: usize, view: impl Fn(&ValueId) -> View) -> (Vec<Gate>, usize) {
    let mask = |shape: Shape, offset| Mask { offset, height: shape.h, width: shape.w };
    let mut end = floats;
    let mut gates = Vec::with_capacity(demand.gates.len());
    for (value, least) in &demand.gates {
        let map = view(value);
        let answers = mask(map.shape, end);
        end = answers.end();
        gates.push(Gate { map, least: *least, masks: [answers; 2] });
    }
    let mut last = end;
    for gate in &mut gates {
        gate.masks[1].offset = end;
        last = last.max(gate.masks[1].end());
    }
    (gates, last)
}

/// Views of all values, the arena's size, and what is asked of the steps.
struct Layout {
    demand: Demand,
    /// Of the network's nodes.
    shapes: Vec<Shape>,
    views: Vec<View>,
    floats: usize,
}

/// Decides halos, lifetimes and offsets.
fn layout(network: &Compiled, input_shapes: &[Shape], wants: &[Want]) -> Result<Layout> {
    let shapes = network.graph.shapes(input_shapes)?;
    let demand = Demand::new(network, &shapes, wants)?;
    let shape = |id: usize| network.values[id].shape(&shapes);
    let root = |id: usize| {
        let (root, first) = network.root(ValueId(id));
        (root.0, first)
    };
    let count = network.values.len();
    let mut halo = vec![[0; 4]; count];
    let mut live = vec![(usize::MAX, 0); count];
    let mut touch = |id: usize, step: usize| {
        let (first, last) = &mut live[root(id).0];
        *first = (*first).min(step);
        *last = (*last).max(step);
    };
    let end = network.steps.len() + 1;
    network.inputs.iter().for_each(|v| touch(v.0, 0));
    let unwanted = |i: usize| wants.get(i) == Some(&Want::Nothing);
    network.outputs.iter().enumerate().filter(|(i, _)| !unwanted(*i)).for_each(|(_, v)| touch(v.0, end));
    // Read when the first step asks, wherever that is.
    demand.gates.iter().for_each(|(v, _)| touch(v.0, end));
    for (i, step) in network.steps.iter().enumerate() {
        if demand.steps[i] == Need::Nothing {
            continue;
        }
        step.inputs.iter().chain([&step.output]).for_each(|v| touch(v.0, i + 1));
        let need = step.op.halo();
        let have = &mut halo[root(step.inputs[0].0).0];
        (0..4).for_each(|side| have[side] = have[side].max(need[side]));
    }
    let mut buffers = Vec::new();
    let mut buffer_of = vec![usize::MAX; count];
    for id in 0..count {
        if root(id).0 != id || live[id].0 == usize::MAX {
            continue;
        }
        let too_large = || Error::LimitExceeded(format!("a tensor of {} does not fit memory", shape(id)));
        let size = View::footprint(shape(id), halo[id])
            .map(|n| n.div_ceil(size_of::<f32>() / network.formats[id].storage.bytes()))
            .and_then(|n| n.checked_next_multiple_of(ALIGN))
            .filter(|&n| n < isize::MAX as usize / 64)
            .ok_or_else(too_large)?;
        buffer_of[id] = buffers.len();
        buffers.push(Buffer { size, live: live[id], offset: 0 });
    }
    // Each tensor fits, all of them together may not: in 32 bits 2 GiB are soon reached.
    let floats = place(&mut buffers)
        .filter(|&n| n <= isize::MAX as usize / size_of::<f32>() - ALIGN)
        .ok_or_else(|| Error::LimitExceeded("the network's tensors together do not fit memory".into()))?;
    let views = (0..count)
        .map(|id| {
            let (top, first) = root(id);
            if buffer_of[top] == usize::MAX {
                return no_pixels(shape(id));
            }
            let Format { storage, zero, .. } = network.formats[top];
            let whole = View::stored(storage, zero, shape(top), buffers[buffer_of[top]].offset, halo[top]);
            if top == id {
                whole
            } else {
                whole.channels(first, shape(id).c)
            }
        })
        .collect();
    Ok(Layout { demand, shapes, views, floats })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::Isa;
    use crate::graph::{Builder, Graph, NodeId, Weights};
    use crate::layers::{Activation, Conv2d, Interpolation, MaxPool};
    use proptest::prelude::*;

    #[test]
    fn an_arena_that_overflows_is_none() {
        let buffer = |live| Buffer { size: usize::MAX / 2, live, offset: 0 };
        assert_eq!(place(&mut [buffer((0, 1)), buffer((2, 3)), buffer((4, 5))]), Some(usize::MAX / 2));
        assert_eq!(place(&mut [buffer((0, 1)), buffer((1, 2)), buffer((1, 3))]), None);
    }

    proptest! {
        #[test]
        fn no_two_live_buffers_overlap(specs in prop::collection::vec((1usize..1000, 0usize..40, 0usize..10), 1..60)) {
            let mut buffers: Vec<Buffer> = specs
                .iter()
                .map(|&(size, from, length)| Buffer { size, live: (from, from + length), offset: 0 })
                .collect();
            let total = place(&mut buffers).unwrap();
            for (i, a) in buffers.iter().enumerate() {
                prop_assert!(a.offset + a.size <= total);
                for b in &buffers[..i] {
                    let meet = a.live.0 <= b.live.1 && b.live.0 <= a.live.1;
                    let apart = a.offset + a.size <= b.offset || b.offset + b.size <= a.offset;
                    prop_assert!(!meet || apart);
                }
            }
        }
    }

    /// Residual blocks, a pyramid whose levels are concatenated in and out of place, two inputs.
    fn residual_pyramid() -> Graph {
        let mut b = Builder::new();
        let (image, prior) = (b.input("image", 3), b.input("prior", 2));
        let conv = |b: &mut Builder, name: &str, x: NodeId, c: Conv2d| {
            let y = b.conv(name, x, c);
            let y = b.batchnorm(&format!("{name}.bn"), y, c.out_channels);
            b.relu(y)
        };
        let mut x = conv(&mut b, "stem", image, Conv2d::new(3, 8, 7).stride(2));
        x = b.max_pool(x, MaxPool::new(3, 2, 1));
        let mut levels = Vec::new();
        for (i, co) in [16, 24, 32].into_iter().enumerate() {
            let ci = [8, 16, 24][i];
            let y = conv(&mut b, &format!("{i}.1"), x, Conv2d::new(ci, co, 3).stride(2));
            let y = b.conv(&format!("{i}.2"), y, Conv2d::new(co, co, 5));
            let short = b.conv(&format!("{i}.down"), x, Conv2d::new(ci, co, 1).stride(2));
            let sum = b.add(y, short);
            x = b.relu(sum);
            levels.push((x, co));
        }
        let mut top = None;
        for (i, &(level, c)) in levels.iter().enumerate().rev() {
            let lateral = b.conv(&format!("lateral{i}"), level, Conv2d::new(c, 12, 1));
            let merged = match top {
                Some(top) => {
                    let up = b.upsample_to(top, Interpolation::Nearest, lateral);
                    b.add(lateral, up)
                }
                None => lateral,
            };
            top = Some(merged);
            let near = conv(&mut b, &format!("near{i}"), merged, Conv2d::new(12, 6, 3));
            let far = conv(&mut b, &format!("far{i}"), near, Conv2d::new(6, 5, 3).dilation(3));
            let prior = b.upsample_to(prior, Interpolation::Bilinear, lateral);
            let all = b.concat(&[near, far, prior, merged]);
            let all = b.activation(all, Activation::LeakyRelu(0.1));
            let y = b.conv(&format!("head{i}"), all, Conv2d::new(25, 4, 3));
            b.output(&format!("head{i}"), y);
        }
        b.output("features", levels[0].0);
        b.finish()
    }

    /// Start of every pixel of a view, those of its halo (as far as `halo`) included.
    fn pixels(view: &View, halo: [usize; 4]) -> Vec<usize> {
        let [t, l, b, r] = halo;
        let (h, w) = (view.shape.h + b, view.shape.w + r);
        let first = view.offset - t * view.row - l * view.pixel;
        let row = |n: usize, y: usize| first + n * view.image + y * view.row;
        (0..view.shape.n)
            .flat_map(|n| (0..h + t).map(move |y| row(n, y)))
            .flat_map(|at| (0..w + l).map(move |x| at + x * view.pixel))
            .collect()
    }

    /// Plays a plan with names instead of numbers: every float remembers the tensor that was last
    /// written there. If two tensors that are live together overlapped, one would read the other.
    #[test]
    fn every_float_that_is_read_was_last_written_by_the_tensor_meant() {
        let graph = residual_pyramid();
        let network = Compiled::new(&graph, &Weights::random(&graph, 1), Isa::Generic).unwrap();
        for (n, h, w) in [(1, 64, 96), (2, 37, 51), (1, 9, 130)] {
            let Layout { views, floats, .. } =
                layout(&network, &[Shape::new(n, 3, h, w), Shape::new(n, 2, 5, 4)], &[]).unwrap();
            let mut owner = vec![usize::MAX; floats];
            let top = |mut id: usize| {
                while let Some((parent, _)) = network.values[id].parent {
                    id = parent.0;
                }
                id
            };
            let write = |owner: &mut [usize], id: usize| {
                for at in pixels(&views[id], views[id].halo) {
                    owner[at..at + views[id].shape.c].fill(top(id));
                }
            };
            let holds = |owner: &[usize], id: usize, halo: [usize; 4]| {
                let c = views[id].shape.c;
                pixels(&views[id], halo).iter().all(|&at| owner[at..at + c].iter().all(|&o| o == top(id)))
            };
            network.inputs.iter().for_each(|v| write(&mut owner, v.0));
            for (i, step) in network.steps.iter().enumerate() {
                let inputs_hold = |owner: &[usize]| {
                    step.inputs
                        .iter()
                        .enumerate()
                        .all(|(k, input)| holds(owner, input.0, if k == 0 { step.op.halo() } else { [0; 4] }))
                };
                assert!(inputs_hold(&owner), "step {i} ({}) reads another tensor", step.op.name());
                write(&mut owner, step.output.0);
                assert!(inputs_hold(&owner), "step {i} ({}) writes over its input", step.op.name());
            }
            for (v, (name, _)) in network.outputs.iter().zip(&graph.outputs) {
                assert!(holds(&owner, v.0, [0; 4]), "output {name} was overwritten");
            }
            // And memory is used again: all tensors side by side would take half as much again.
            let apart: usize = (0..views.len())
                .filter(|&id| network.values[id].parent.is_none())
                .filter_map(|id| View::footprint(views[id].shape, views[id].halo))
                .sum();
            assert!(floats * 3 < apart * 2, "{floats} of {apart} floats");
        }
    }

    #[test]
    fn inputs_of_other_sizes_are_refused() {
        let graph = residual_pyramid();
        let network = Compiled::new(&graph, &Weights::random(&graph, 1), Isa::Generic).unwrap();
        let shapes = [Shape::new(1, 3, 40, 40), Shape::new(1, 2, 2, 2)];
        let plan = Plan::new(&network, &shapes).unwrap();
        assert_eq!(plan.floats() * 4, Plan::arena_bytes(&network, &shapes).unwrap());
        let (mut arena, mut pool) = (Arena::default(), Pool::new(1).unwrap());
        let other = Tensor::zeros(Shape::new(1, 3, 40, 41));
        assert!(plan.run_tensors(&mut arena, &mut pool, &[other]).is_err());
        assert!(Plan::new(&network, &shapes[..1]).is_err());
        assert!(Plan::new(&network, &[Shape::new(1, 4, 40, 40), shapes[1]]).is_err());
        assert!(Plan::new(&network, &[Shape::new(1, 3, 0, 40), shapes[1]]).is_err());
        let huge = Shape::new(1, 3, usize::MAX / 8, 9);
        assert!(Plan::new(&network, &[huge, shapes[1]]).is_err());
    }
}
