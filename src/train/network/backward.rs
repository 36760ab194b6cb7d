//! The backward pass of a batch, unit by unit from the last.

use super::batch::{on_maybe_parts, on_parts, ranges, take};
use super::sum::sum_backward;
use super::{geometry, resampling, shown, with_size, Network, Thread};
use crate::cpu::dense::{conv, depthwise, map_sums, maps, Element, Gradient, Target};
use crate::error::{Error, Result};
use crate::graph::exec;
use crate::shape::Tensor;
use crate::train::units::Op;
use std::ops::Range;

impl<T: Element> Network<T> {
    /// Adds to all gradients what follows from those of the outputs, `d_outputs` in the graph's order (as
    /// [`Network::output`]).
    pub fn backward(&mut self, d_outputs: &[Tensor]) -> Result<()> {
        // What an earlier call left that failed.
        self.spare.extend(self.maps.iter_mut().filter_map(|m| m.dy.take()));
        self.maps.iter_mut().for_each(|m| m.gradient_sums = None);
        for (index, d) in d_outputs.iter().enumerate() {
            let u = self.shown_by[self.graph.outputs[index].1 .0].expect("an output is shown");
            if d.shape != self.shapes[self.units[u].node] {
                return Err(Error::Internal(format!("gradient of output {index} has shape {}", d.shape)));
            }
            if self.wanted[u] {
                let mut dy = self.maps[u].dy.take();
                let add = dy.is_some();
                let to = dy.get_or_insert_with(|| take(&mut self.spare, d.data.len()));
                maps::deposit(self.isa, &d.data, d.shape.c, d.shape.c, to, add);
                self.maps[u].dy = dy;
            }
        }
        for u in (0..self.units.len()).rev() {
            if let Some(dy) = self.maps[u].dy.take() {
                self.backward_unit(u, &dy)?;
                self.spare.push(dy);
            }
        }
        Ok(())
    }

    fn backward_unit(&mut self, u: usize, dy: &[T]) -> Result<()> {
        let unit = self.units[u].clone();
        let shape = self.shapes[unit.node];
        let (c, per_image, images) = (shape.c, shape.c * shape.h * shape.w, shape.n);
        let (a, b, shift) = self.gradient_terms(u, dy);
        // Gradients of the inputs: taken out of their maps while this unit writes them.
        let mut dxs: Vec<Option<(Vec<T>, bool)>> = Vec::new();
        for (place, &i) in unit.inputs.iter().enumerate() {
            // A map read twice by one unit is written twice, the second time added.
            let repeated = unit.inputs[..place].contains(&i);
            let wanted = self.wanted[i] && !matches!(self.units[i].op, Op::Input(_)) && !repeated;
            dxs.push(wanted.then(|| match self.maps[i].dy.take() {
                Some(dy) => (dy, true),
                None => (take(&mut self.spare, self.shapes[self.units[i].node].len()), false),
            }));
        }
        // Maps whose gradient is whole after this unit: their sums are taken while it is written.
        let whole = |(place, &i): (usize, &usize)| {
            let single = unit.inputs.iter().filter(|&&j| j == i).count() == 1;
            self.units[i].norm.is_some() && self.first_reader[i] == Some(u) && single && dxs[place].is_some()
        };
        let whole: Vec<bool> = unit.inputs.iter().enumerate().map(whole).collect();
        let mut whole_sums: Vec<Option<Vec<f64>>> = vec![None; unit.inputs.len()];
        let (maps, shapes, isa, params, units) =
            (&self.maps, &self.shapes, self.isa, &self.params, &self.units);
        let size = |i: usize| shapes[units[i].node];
        let source = |i: usize, images: &Range<usize>| {
            let s = size(i);
            maps[i].source(images, s.c * s.h * s.w)
        };
        let gradient = |images: &Range<usize>| Gradient {
            map: maps[u].source(images, per_image),
            dy: &dy[images.start * per_image..images.end * per_image],
            a: &a,
            b: &b,
            c: &shift,
        };
        let (pool, threads, grads) = (&mut self.pool, &mut self.threads, &mut self.grads);
        match &unit.op {
            Op::Input(_) => {}
            Op::Conv { conv, weight, bias } | Op::Depthwise { conv, weight, bias } => {
                let g = geometry(conv, size(unit.inputs[0]), shape);
                let dense = matches!(unit.op, Op::Conv { .. });
                let sums = if dense { g.weight_sums() } else { conv.kernel[0] * conv.kernel[1] * c };
                clear_sums(threads, g.channels[0]);
                for t in threads.iter_mut() {
                    t.dw.clear();
                    t.dw.resize(sums, 0.0);
                    t.db.clear();
                    t.db.resize(c, 0.0);
                }
                let w = &params[weight.0];
                let transposed = dense.then(|| g.pack_transposed::<T>(isa, w));
                let turned = (!dense).then(|| [false, true].map(|t| depthwise::pack(&g, w, t)));
                let in_image = {
                    let s = size(unit.inputs[0]);
                    s.c * s.h * s.w
                };
                let add = dxs[0].as_ref().is_some_and(|d| d.1);
                let dx = dxs[0].as_mut().map(|(dx, _)| &mut dx[..]);
                on_maybe_parts(pool, threads, dx, in_image, images, &|range, dx, t| {
                    let (x, d) = (source(unit.inputs[0], range), gradient(range));
                    let Thread { scratch, sums, dw, db, .. } = t;
                    let dx = dx.map(|dx| Target::new(dx, add, whole[0].then_some(&mut sums[..])));
                    let db = bias.is_some().then_some(&mut db[..]);
                    if let Some(transposed) = &transposed {
                        conv::backward(isa, &g, x, d, transposed, dx, dw, db, scratch);
                    } else if let Some([weights, turned]) = &turned {
                        depthwise::backward(isa, &g, x, d, [weights, turned], dx, dw, db, scratch);
                    }
                });
                whole_sums[0] = whole[0].then(|| total(threads, g.channels[0]));
                let (first, rest) = threads.split_first_mut().expect("at least one thread");
                for t in rest {
                    first.dw.iter_mut().zip(&t.dw).for_each(|(s, v)| *s += v);
                    first.db.iter_mut().zip(&t.db).for_each(|(s, v)| *s += v);
                }
                if dense {
                    g.add_weight_gradient(&first.dw, &mut grads[weight.0]);
                } else {
                    depthwise::add_weight_gradient(&g, &first.dw, &mut grads[weight.0]);
                }
                if let Some(bias) = bias {
                    grads[bias.0].iter_mut().zip(&first.db).for_each(|(s, v)| *s += v);
                }
            }
            Op::Sum { enlarged } => {
                for (place, &i) in unit.inputs.iter().enumerate() {
                    let at = unit.inputs.iter().position(|&j| j == i).unwrap_or(place);
                    let from = size(i);
                    let Some((dx, add)) = &mut dxs[at] else { continue };
                    let was = *add;
                    clear_sums(threads, from.c);
                    on_parts(pool, threads, dx, from.c * from.h * from.w, images, &|range, dx, t| {
                        let target = Target::new(dx, was, whole[place].then_some(&mut t.sums[..]));
                        let to = (source(i, range), from, enlarged[place]);
                        sum_backward(isa, shape, gradient(range), to, target, &mut t.rows);
                    });
                    whole_sums[place] = whole[place].then(|| total(threads, from.c));
                    *add = true;
                }
            }
            Op::Concat => {
                let mut first = 0;
                for (place, &i) in unit.inputs.iter().enumerate() {
                    let part = size(i).c;
                    let at = unit.inputs.iter().position(|&j| j == i).unwrap_or(place);
                    if let Some((dx, add)) = &mut dxs[at] {
                        let (was, from) = (*add, first);
                        on_parts(pool, threads, dx, part * shape.h * shape.w, images, &|range, dx, t| {
                            let d = gradient(range);
                            let [values, ..] = &mut t.rows;
                            values.resize(d.dy.len(), 0.0);
                            maps::pull_back(isa, d, values, c);
                            for (to, v) in dx.chunks_exact_mut(part).zip(values.chunks_exact(c)) {
                                maps::deposit(isa, &v[from..from + part], part, part, to, was);
                            }
                        });
                        *add = true;
                    }
                    first += part;
                }
            }
            Op::MaxPool(_) | Op::Bilinear => {
                let from = size(unit.inputs[0]);
                let r = resampling(&unit.op, from, shape);
                if let Some((dx, add)) = &mut dxs[0] {
                    on_parts(pool, threads, dx, from.c * from.h * from.w, images, &|range, dx, t| {
                        let (x, d) = (source(unit.inputs[0], range), gradient(range));
                        r.backward(isa, x, d, dx, *add, &mut t.scratch);
                    });
                }
            }
            Op::Plain { layer, params: ids } => {
                let inputs: Vec<Tensor> =
                    unit.inputs.iter().map(|&i| shown(isa, &maps[i], size(i))).collect();
                let inputs = with_size(&self.graph, &unit, inputs, shapes);
                let y = Tensor::from_vec(shape, maps[u].z.iter().map(|v| v.f32()).collect());
                let mut d = Tensor::zeros(shape);
                maps::pull_back(isa, gradient(&(0..images)), &mut d.data, c);
                // The buffer of an input that is read twice stands at its first place.
                let at = |place: usize| unit.inputs.iter().position(|i| unit.inputs.get(place) == Some(i));
                let wanted = |place: usize| at(place).is_some_and(|at| dxs[at].is_some());
                let mut plain: Vec<Option<Tensor>> = inputs
                    .iter()
                    .enumerate()
                    .map(|(place, x)| wanted(place).then(|| Tensor::zeros(x.shape)))
                    .collect();
                let values: Vec<&[f32]> = ids.iter().map(|p| &params[p.0][..]).collect();
                let mut dparams: Vec<Vec<f32>> =
                    ids.iter().map(|p| std::mem::take(&mut grads[p.0])).collect();
                let refs: Vec<&Tensor> = inputs.iter().collect();
                let done = exec::backward(layer, &refs, &values, &y, &d, &mut plain, &mut dparams);
                for (id, g) in ids.iter().zip(dparams) {
                    grads[id.0] = g;
                }
                done?;
                for (place, plain) in plain.into_iter().enumerate() {
                    let dx = at(place).and_then(|at| dxs[at].as_mut());
                    if let (Some((dx, add)), Some(plain)) = (dx, plain) {
                        maps::deposit(isa, &plain.data, plain.shape.c, plain.shape.c, dx, *add);
                        *add = true;
                    }
                }
            }
        }
        for ((&i, dx), sums) in unit.inputs.iter().zip(dxs).zip(whole_sums) {
            if let Some((dx, _)) = dx {
                self.maps[i].dy = Some(dx);
                self.maps[i].gradient_sums = sums;
            }
        }
        Ok(())
    }

    /// Adds to the gradients of unit `u`'s normalisation; returns a, b, c of [`Gradient`].
    fn gradient_terms(&mut self, u: usize, dy: &[T]) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
        let shape = self.shapes[self.units[u].node];
        let c = shape.c;
        let zeros = vec![0.0; c];
        let Some(norm) = self.units[u].norm else { return (vec![1.0; c], zeros.clone(), zeros) };
        let per_image = c * shape.h * shape.w;
        let isa = self.isa;
        let sums = match self.maps[u].gradient_sums.take() {
            Some(sums) => sums,
            None => {
                clear_sums(&mut self.threads, c);
                let map = &self.maps[u];
                let ranges = ranges(shape.n, self.threads.len());
                let mut items: Vec<_> = ranges.iter().zip(&mut self.threads).collect();
                self.pool.run_each(&mut items, |_, (range, t)| {
                    let part = &dy[range.start * per_image..range.end * per_image];
                    map_sums(isa, map.source(range, per_image), part, &mut t.sums);
                });
                total(&self.threads, c)
            }
        };
        let map = &self.maps[u];
        let count = (shape.n * shape.h * shape.w) as f64;
        let (mut a, mut b, mut shift) = (Vec::with_capacity(c), Vec::with_capacity(c), Vec::with_capacity(c));
        for i in 0..c {
            let (mean, inv_std) = (f64::from(map.mean[i]), f64::from(map.inv_std[i]));
            let gamma = f64::from(self.params[norm.scale.0][i]);
            let d_shift = sums[i];
            let d_scale = inv_std * (sums[c + i] - mean * sums[i]);
            self.grads[norm.scale.0][i] += d_scale as f32;
            self.grads[norm.shift.0][i] += d_shift as f32;
            a.push((gamma * inv_std) as f32);
            if self.frozen_norm[u] {
                b.push(0.0);
                shift.push(0.0);
            } else {
                let slope = -gamma * d_scale * inv_std * inv_std / count;
                b.push(slope as f32);
                shift.push((-slope * mean - gamma * inv_std * d_shift / count) as f32);
            }
        }
        (a, b, shift)
    }
}

/// Room for the threads' sums of a map of `c` channels.
fn clear_sums<T>(threads: &mut [Thread<T>], c: usize) {
    for t in threads {
        t.sums.clear();
        t.sums.resize(2 * c, 0.0);
    }
}

/// The threads' sums, added in their order.
fn total<T>(threads: &[Thread<T>], c: usize) -> Vec<f64> {
    let mut sums = vec![0.0; 2 * c];
    for t in threads {
        sums.iter_mut().zip(&t.sums).for_each(|(s, v)| *s += v);
    }
    sums
}
