//! The backward pass of one unit, an operation a function.

use super::batch::{Buffer, Part, Thread, Workers};
use super::roi_align::roi_align_backward;
use super::sum::sum_backward;
use super::{geometry, resampling, shown, with_size, FullyConnected, Map};
use crate::cpu::dense::{conv, depthwise, maps, Element, Gradient, Source, Target};
use crate::cpu::Isa;
use crate::error::Result;
use crate::graph::build::ParamId;
use crate::graph::{exec, Graph};
use crate::layers::{Conv2d, Layer, RoiAlign};
use crate::shape::{Shape, Tensor};
use crate::train::units::{Op, Unit};
use std::ops::Range;

/// What the backward pass of a unit reads.
pub(super) struct UnitPass<'a, T> {
    pub unit: &'a Unit,
    /// Its map and the map's shape.
    pub map: &'a Map<T>,
    pub shape: Shape,
    /// Gradient of what its readers see, N x H x W x C.
    pub dy: &'a [T],
    /// a, b, c of [`Gradient`], `[3][C]`.
    pub terms: [Vec<f32>; 3],
    pub isa: Isa,
    /// Of the network, as [`super::Network`] has them.
    pub graph: &'a Graph,
    pub units: &'a [Unit],
    pub maps: &'a [Map<T>],
    pub shapes: &'a [Shape],
    pub boxes: &'a [Tensor],
    pub params: &'a [Vec<f32>],
}

/// What it writes, and who does.
pub(super) struct Written<'a, T> {
    /// An entry an input; None where no gradient is wanted, or where an earlier place has the same map.
    pub inputs: &'a mut [Option<InputGradient<T>>],
    /// Of the network's parameters, added to.
    pub grads: &'a mut [Vec<f32>],
    pub workers: &'a mut Workers<T>,
}

/// The gradient of what a unit reads of another.
pub(super) struct InputGradient<T> {
    /// N x H x W x C.
    pub dx: Buffer<T>,
    /// Whether `dx` holds what other readers left, to be added to.
    pub add: bool,
    /// Whether it is whole after this unit: the sums for the normalisation before it may be taken on the way.
    pub whole: bool,
    /// `[2][C]`, those sums, where they were.
    pub sums: Option<Vec<f64>>,
}

impl<T: Element> UnitPass<'_, T> {
    /// Runs the unit's operation backwards.
    pub(super) fn run(&self, to: &mut Written<'_, T>) -> Result<()> {
        match &self.unit.op {
            Op::Input(_) | Op::Boxes(_) => {}
            Op::Conv { conv, weight, bias } | Op::Depthwise { conv, weight, bias } => {
                self.backward_conv(conv, *weight, *bias, to);
            }
            Op::Sum { enlarged } => self.backward_sum(enlarged, to),
            Op::Concat => self.backward_concat(to),
            Op::MaxPool(_) | Op::Bilinear => self.backward_resampled(to),
            Op::RoiAlign { roi, boxes } => self.backward_roi_align(roi, &self.boxes[*boxes], to),
            Op::Plain { layer, params } => self.backward_plain(layer, params, to)?,
        }
        Ok(())
    }

    fn backward_conv(&self, conv: &Conv2d, weight: ParamId, bias: Option<ParamId>, to: &mut Written<'_, T>) {
        let (isa, x) = (self.isa, self.unit.inputs[0]);
        let (from, c) = (self.size(x), self.shape.c);
        let g = geometry(conv, from, self.shape);
        let connected = FullyConnected::of(&g, &self.units[x], &self.maps[x]);
        let dense = matches!(self.unit.op, Op::Conv { .. });
        let weight_sums = if dense { g.weight_sums() } else { conv.kernel[0] * conv.kernel[1] * c };
        to.workers.clear_sums(from.c);
        // Those of parts that a small batch does not have.
        for part in &mut to.workers.parts {
            part.dw.clear();
            part.db.clear();
        }
        let w = &self.params[weight.0];
        let transposed = dense.then(|| g.pack_transposed::<T>(isa, w));
        let turned = (!dense).then(|| [false, true].map(|t| depthwise::pack(&g, w, t)));
        let mut input = to.inputs[0].as_mut();
        let (add, whole) = input.as_ref().map_or((false, false), |input| (input.add, input.whole));
        let dx = input.as_mut().map(|input| &mut input.dx[..]);
        to.workers.on_maybe_parts(dx, per_image(from), self.shape.n, &|range, dx, part, t| {
            let (mut g, mut x, d) = (&g, self.source(x, range), self.gradient(range));
            if let Some(c) = connected.as_ref().filter(|_| dense) {
                (g, x) = (&c.geometry, c.source(x));
            }
            let (Thread { scratch, .. }, Part { sums, dw, db }) = (t, part);
            dw.resize(weight_sums, 0.0);
            db.resize(c, 0.0);
            let dx = dx.map(|dx| Target::new(dx, add, whole.then_some(&mut sums[..])));
            let db = bias.is_some().then_some(&mut db[..]);
            if let Some(transposed) = &transposed {
                conv::backward(isa, g, x, d, transposed, dx, dw, db, scratch);
            } else if let Some([weights, turned]) = &turned {
                depthwise::backward(isa, g, x, d, [weights, turned], dx, dw, db, scratch);
            }
        });
        if let Some(input) = input {
            input.sums = whole.then(|| to.workers.total(from.c));
        }
        let (first, rest) = to.workers.parts.split_first_mut().expect("at least one part");
        for part in rest {
            first.dw.iter_mut().zip(&part.dw).for_each(|(s, v)| *s += v);
            first.db.iter_mut().zip(&part.db).for_each(|(s, v)| *s += v);
        }
        if dense {
            g.add_weight_gradient(&first.dw, &mut to.grads[weight.0]);
        } else {
            depthwise::add_weight_gradient(&g, &first.dw, &mut to.grads[weight.0]);
        }
        if let Some(bias) = bias {
            to.grads[bias.0].iter_mut().zip(&first.db).for_each(|(s, v)| *s += v);
        }
    }

    fn backward_sum(&self, enlarged: &[bool], to: &mut Written<'_, T>) {
        for (place, (&i, &enlarged)) in self.unit.inputs.iter().zip(enlarged).enumerate() {
            let from = self.size(i);
            let Some(input) = self.input_gradient(to.inputs, place) else { continue };
            let (add, whole) = (input.add, input.whole);
            to.workers.clear_sums(from.c);
            to.workers.on_parts(&mut input.dx, per_image(from), self.shape.n, &|range, dx, part, t| {
                let target = Target::new(dx, add, whole.then_some(&mut part.sums[..]));
                let term = (self.source(i, range), from, enlarged);
                sum_backward(self.isa, self.shape, self.gradient(range), term, target, &mut t.rows);
            });
            input.sums = whole.then(|| to.workers.total(from.c));
            input.add = true;
        }
    }

    fn backward_concat(&self, to: &mut Written<'_, T>) {
        let (isa, c, mut first) = (self.isa, self.shape.c, 0);
        for (place, &i) in self.unit.inputs.iter().enumerate() {
            // Channels of the map that are this input's.
            let taken = self.size(i).c;
            let channels = first..first + taken;
            first += taken;
            let Some(input) = self.input_gradient(to.inputs, place) else { continue };
            let (add, in_image) = (input.add, taken * self.shape.h * self.shape.w);
            to.workers.on_parts(&mut input.dx, in_image, self.shape.n, &|range, dx, _, t| {
                let d = self.gradient(range);
                let [values, ..] = &mut t.rows;
                values.resize(d.dy.len(), 0.0);
                maps::pull_back(isa, d, values, c);
                for (to, v) in dx.chunks_exact_mut(taken).zip(values.chunks_exact(c)) {
                    maps::deposit(isa, &v[channels.clone()], taken, taken, to, add);
                }
            });
            input.add = true;
        }
    }

    /// Of a max pooling or bilinear interpolation.
    fn backward_resampled(&self, to: &mut Written<'_, T>) {
        let Some(input) = &mut to.inputs[0] else { return };
        let (x, add) = (self.unit.inputs[0], input.add);
        let from = self.size(x);
        let r = resampling(&self.unit.op, from, self.shape);
        to.workers.on_parts(&mut input.dx, per_image(from), self.shape.n, &|range, dx, _, t| {
            r.backward(self.isa, self.source(x, range), self.gradient(range), dx, add, &mut t.scratch);
        });
    }

    fn backward_roi_align(&self, roi: &RoiAlign, boxes: &Tensor, to: &mut Written<'_, T>) {
        let Some(input) = &mut to.inputs[0] else { return };
        let (x, add, whole) = (self.unit.inputs[0], input.add, input.whole);
        let from = self.size(x);
        let all = (self.gradient(&(0..self.shape.n)), &boxes.data[..]);
        to.workers.clear_sums(from.c);
        to.workers.on_parts(&mut input.dx, per_image(from), from.n, &|range, dx, part, t| {
            let target = Target::new(dx, add, whole.then_some(&mut part.sums[..]));
            roi_align_backward(self.isa, roi, all, (self.source(x, range), from), range, target, &mut t.rows);
        });
        input.sums = whole.then(|| to.workers.total(from.c));
    }

    /// By the layer's plain loops, in f32, on this thread.
    fn backward_plain(&self, layer: &Layer, ids: &[ParamId], to: &mut Written<'_, T>) -> Result<()> {
        let shown = |&i: &usize| shown(self.isa, &self.maps[i], self.size(i));
        let inputs: Vec<Tensor> = self.unit.inputs.iter().map(shown).collect();
        let inputs = with_size(self.graph, self.unit, inputs, self.shapes);
        let y = Tensor::from_vec(self.shape, self.map.z.iter().map(|v| v.f32()).collect());
        let mut d = Tensor::zeros(self.shape);
        maps::pull_back(self.isa, self.gradient(&(0..self.shape.n)), &mut d.data, self.shape.c);
        let mut dxs = Vec::with_capacity(inputs.len());
        for (place, x) in inputs.iter().enumerate() {
            dxs.push(self.input_gradient(to.inputs, place).map(|_| Tensor::zeros(x.shape)));
        }
        let values: Vec<&[f32]> = ids.iter().map(|p| &self.params[p.0][..]).collect();
        let mut dparams: Vec<Vec<f32>> = ids.iter().map(|p| std::mem::take(&mut to.grads[p.0])).collect();
        let refs: Vec<&Tensor> = inputs.iter().collect();
        let done = exec::backward(layer, &refs, &values, &y, &d, &mut dxs, &mut dparams);
        for (id, g) in ids.iter().zip(dparams) {
            to.grads[id.0] = g;
        }
        done?;
        for (place, dx) in dxs.into_iter().enumerate() {
            if let (Some(input), Some(dx)) = (self.input_gradient(to.inputs, place), dx) {
                maps::deposit(self.isa, &dx.data, dx.shape.c, dx.shape.c, &mut input.dx, input.add);
                input.add = true;
            }
        }
        Ok(())
    }

    fn size(&self, i: usize) -> Shape {
        self.shapes[self.units[i].node]
    }

    /// What unit `i`'s readers see of `images`.
    fn source(&self, i: usize, images: &Range<usize>) -> Source<'_, T> {
        self.maps[i].source(images, per_image(self.size(i)))
    }

    /// The gradient of this unit's map as its operation left it.
    fn gradient(&self, images: &Range<usize>) -> Gradient<'_, T> {
        let (per_image, [a, b, c]) = (per_image(self.shape), &self.terms);
        let dy = &self.dy[images.start * per_image..images.end * per_image];
        Gradient { map: self.map.source(images, per_image), dy, a, b, c }
    }

    /// Where the gradient of the input at `place` goes: that of a map read twice stands at its first place. None where
    /// none is wanted, and beyond the unit's inputs.
    fn input_gradient<'b>(
        &self,
        inputs: &'b mut [Option<InputGradient<T>>],
        place: usize,
    ) -> Option<&'b mut InputGradient<T>> {
        let i = self.unit.inputs.get(place)?;
        let first = self.unit.inputs.iter().position(|j| j == i)?;
        inputs[first].as_mut()
    }
}

/// Values of a map an image.
fn per_image(shape: Shape) -> usize {
    shape.c * shape.h * shape.w
}
