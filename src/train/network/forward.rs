//! The forward pass of a batch, and what readers of each map apply.

use super::batch::Job;
use super::roi_align::roi_align_forward;
use super::sum::sum_forward;
use super::{geometry, resampling, shown, with_size, FullyConnected, Network};
use crate::cpu::dense::{conv, depthwise, maps, Element};
use crate::cpu::pages;
use crate::error::{Error, Result};
use crate::graph::build::ParamId;
use crate::graph::exec;
use crate::shape::{Shape, Tensor};
use crate::train::units::Op;
use std::ops::Range;

impl<T: Element> Network<T> {
    /// Runs the network on a batch with the batch's statistics, which move the running ones. `inputs` in the graph's
    /// order, N x H x W x C; every input's values are written by `fill(input, image, values)`, image by image, on the
    /// threads. Where the network looks at boxes, this is its first phase.
    pub fn forward(
        &mut self,
        inputs: &[Shape],
        fill: &(dyn Fn(usize, usize, &mut [T]) + Sync),
    ) -> Result<()> {
        // How many boxes there are is not known yet; nothing of the first phase depends on it.
        let boxes = self.units.iter().filter(|u| matches!(u.op, Op::Boxes(_))).count();
        let all: Vec<Shape> = inputs.iter().copied().chain(vec![Shape::new(1, 5, 1, 1); boxes]).collect();
        self.shapes = self.graph.shapes(&all)?;
        self.boxes.clear();
        let images = inputs.first().map_or(0, |s| s.n);
        if inputs.iter().any(|s| s.n != images) {
            return Err(Error::InvalidArgument("inputs of different batch sizes".into()));
        }
        (0..self.second_phase).try_for_each(|u| self.forward_unit(u, fill))
    }

    /// Runs the network's second phase on the batch whose first was run last: `boxes`, for each input of boxes, R x 5 x 1 x 1,
    /// image in the batch and corners in pixels, as [`RoiAlign`](crate::layers::RoiAlign) takes them.
    pub fn forward_boxes(&mut self, boxes: Vec<Tensor>) -> Result<()> {
        let images = self.graph.inputs.iter().filter_map(|node| {
            let u = self.shown_by[node.0]?;
            matches!(self.units[u].op, Op::Input(_)).then(|| self.shapes.get(node.0).copied())?
        });
        let inputs: Vec<Shape> = images.chain(boxes.iter().map(|b| b.shape)).collect();
        let shapes = self.graph.shapes(&inputs)?;
        for unit in &self.units {
            if let Op::RoiAlign { roi, boxes: place } = &unit.op {
                roi.check(shapes[self.units[unit.inputs[0]].node], &boxes[*place])?;
            }
        }
        (self.shapes, self.boxes) = (shapes, boxes);
        (self.second_phase..self.units.len()).try_for_each(|u| self.forward_unit(u, &|_, _, _| {}))
    }

    fn forward_unit(&mut self, u: usize, fill: &(dyn Fn(usize, usize, &mut [T]) + Sync)) -> Result<()> {
        let unit = &self.units[u];
        let shape = self.shapes[unit.node];
        let (images, c, per_image) = (shape.n, shape.c, shape.c * shape.h * shape.w);
        let mut z = std::mem::take(&mut self.maps[u].z);
        if z.capacity() < shape.len() {
            z = pages::buffer(shape.len());
        }
        z.resize(shape.len(), T::default());
        self.workers.clear_sums(c);
        let (maps, shapes, isa, params) = (&self.maps, &self.shapes, self.isa, &self.params);
        let size = |i: usize| shapes[self.units[i].node];
        let source = |i: usize, images: &Range<usize>| {
            let s = size(i);
            maps[i].source(images, s.c * s.h * s.w)
        };
        let zeros = vec![0.0; c];
        let bias_of = |bias: Option<ParamId>| bias.map_or(&zeros[..], |b| &params[b.0]);
        let workers = &mut self.workers;
        let mut run = |job: &Job<T>| workers.on_parts(&mut z, per_image, images, job);
        match &unit.op {
            Op::Input(place) => run(&|range, z, _, _| {
                for (n, z) in range.clone().zip(z.chunks_exact_mut(per_image.max(1))) {
                    fill(*place, n, z);
                }
            }),
            Op::Conv { conv, weight, bias } => {
                let g = geometry(conv, size(unit.inputs[0]), shape);
                let packed = g.pack::<T>(isa, &params[weight.0]);
                let bias = bias_of(*bias);
                let x = unit.inputs[0];
                let connected = FullyConnected::of(&g, &self.units[x], &maps[x]);
                run(&|range, z, part, t| {
                    let (mut g, mut x) = (&g, source(x, range));
                    if let Some(c) = &connected {
                        (g, x) = (&c.geometry, c.source(x));
                    }
                    conv::forward(isa, g, x, &packed, bias, z, &mut part.sums, &mut t.scratch);
                });
            }
            Op::Depthwise { conv, weight, bias } => {
                let g = geometry(conv, size(unit.inputs[0]), shape);
                let packed = depthwise::pack(&g, &params[weight.0], false);
                let bias = bias_of(*bias);
                run(&|range, z, part, t| {
                    let x = source(unit.inputs[0], range);
                    depthwise::forward(isa, &g, x, &packed, bias, z, &mut part.sums, &mut t.scratch);
                });
            }
            Op::Sum { enlarged } => run(&|range, z, part, t| {
                let inputs = unit.inputs.iter().zip(enlarged).map(|(&i, &e)| (source(i, range), size(i), e));
                sum_forward(isa, shape, &inputs.collect::<Vec<_>>(), z, &mut part.sums, &mut t.rows);
            }),
            Op::Concat => run(&|range, z, part, t| {
                let mut first = 0;
                for &i in &unit.inputs {
                    let x = source(i, range);
                    let taken = x.channels();
                    let [values, ..] = &mut t.rows;
                    values.resize(x.z.len(), 0.0);
                    maps::read(isa, x, values, taken);
                    for (to, from) in z.chunks_exact_mut(c).zip(values.chunks_exact(taken)) {
                        for (to, from) in to[first..first + taken].iter_mut().zip(from) {
                            *to = T::of(*from);
                        }
                    }
                    first += taken;
                }
                statistics(z, c, &mut part.sums);
            }),
            Op::MaxPool(_) | Op::Bilinear => {
                let r = resampling(&unit.op, size(unit.inputs[0]), shape);
                run(&|range, z, part, t| {
                    r.forward(isa, source(unit.inputs[0], range), z, &mut part.sums, &mut t.scratch);
                });
            }
            Op::RoiAlign { roi, boxes } => {
                let (boxes, x) = (&self.boxes[*boxes].data, unit.inputs[0]);
                let from = size(x);
                let map = source(x, &(0..from.n));
                run(&|range, z, part, t| {
                    let boxes = &boxes[range.start * 5..range.end * 5];
                    roi_align_forward(isa, roi, (map, from), boxes, z, &mut part.sums, &mut t.rows);
                });
            }
            Op::Boxes(_) => return Ok(()),
            Op::Plain { layer, params: ids } => {
                let inputs: Vec<Tensor> =
                    unit.inputs.iter().map(|&i| shown(isa, &maps[i], size(i))).collect();
                let inputs = with_size(&self.graph, unit, inputs, shapes);
                let values: Vec<&[f32]> = ids.iter().map(|p| &params[p.0][..]).collect();
                let y = exec::forward(layer, &inputs.iter().collect::<Vec<_>>(), &values)?;
                z.iter_mut().zip(&y.data).for_each(|(z, &v)| *z = T::of(v));
                statistics(&z, c, &mut self.workers.parts[0].sums);
            }
        }
        let sums = self.workers.total(c);
        self.maps[u].z = z;
        self.normalise(u, &sums, (images * shape.h * shape.w) as f64)
    }

    /// What readers of unit `u` apply, from its sums over `count` values a channel; moves the running statistics.
    fn normalise(&mut self, u: usize, sums: &[f64], count: f64) -> Result<()> {
        let unit = &self.units[u];
        let c = sums.len() / 2;
        let map = &mut self.maps[u];
        map.slope = unit.slope;
        map.scale.clear();
        map.shift.clear();
        let Some(norm) = unit.norm else {
            map.scale.resize(c, 1.0);
            map.shift.resize(c, 0.0);
            return Ok(());
        };
        map.mean.clear();
        map.inv_std.clear();
        if !self.frozen_norm[u] && count < 2.0 {
            return Err(Error::InvalidArgument(format!(
                "{}: a batch normalisation trains on two or more values a channel; use a larger batch or picture",
                unit.name
            )));
        }
        for i in 0..c {
            let (mean, variance) = if self.frozen_norm[u] {
                (f64::from(self.params[norm.mean.0][i]), f64::from(self.params[norm.variance.0][i]))
            } else {
                let mean = sums[i] / count;
                let variance = (sums[c + i] / count - mean * mean).max(0.0);
                let m = norm.momentum;
                let unbiased = variance * count / (count - 1.0);
                let running = &mut self.params[norm.mean.0][i];
                *running = ((1.0 - m) * f64::from(*running) + m * mean) as f32;
                let running = &mut self.params[norm.variance.0][i];
                *running = ((1.0 - m) * f64::from(*running) + m * unbiased) as f32;
                (mean, variance)
            };
            let inv_std = 1.0 / (variance + norm.eps).sqrt();
            let scale = f64::from(self.params[norm.scale.0][i]) * inv_std;
            map.mean.push(mean as f32);
            map.inv_std.push(inv_std as f32);
            map.scale.push(scale as f32);
            map.shift.push((f64::from(self.params[norm.shift.0][i]) - mean * scale) as f32);
        }
        Ok(())
    }
}

/// Adds the sums of values and of their squares.
fn statistics<T: Element>(z: &[T], c: usize, sums: &mut [f64]) {
    for z in z.chunks_exact(c) {
        for (i, v) in z.iter().enumerate() {
            let v = f64::from(v.f32());
            sums[i] += v;
            sums[c + i] += v * v;
        }
    }
}
