//! The backward pass of a batch, unit by unit from the last.

use super::backward_unit::{InputGradient, UnitPass, Written};
use super::Network;
use crate::cpu::dense::{map_sums, maps, Element};
use crate::error::{Error, Result};
use crate::shape::Tensor;
use crate::train::units::Op;

impl<T: Element> Network<T> {
    /// Adds to all gradients what follows from those of the outputs, `d_outputs` in the graph's order (as
    /// [`Network::output`]).
    pub fn backward(&mut self, d_outputs: &[Tensor]) -> Result<()> {
        if self.boxes.is_empty() && self.second_phase < self.units.len() {
            return Err(Error::Internal("a backward pass before the second phase".into()));
        }
        // What an earlier call left that failed.
        self.maps.iter_mut().filter_map(|m| m.dy.take()).for_each(|dy| self.spare.give(dy));
        self.maps.iter_mut().for_each(|m| m.gradient_sums = None);
        for (index, d) in d_outputs.iter().enumerate() {
            let u = self.shown_by[self.graph.outputs[index].1 .0].expect("an output is shown");
            if d.shape != self.shapes[self.units[u].node] {
                return Err(Error::Internal(format!("gradient of output {index} has shape {}", d.shape)));
            }
            if self.wanted[u] {
                let mut dy = self.maps[u].dy.take();
                let add = dy.is_some();
                let to = dy.get_or_insert_with(|| self.spare.take(d.data.len()));
                maps::deposit(self.isa, &d.data, d.shape.c, d.shape.c, to, add);
                self.maps[u].dy = dy;
            }
        }
        for u in (0..self.units.len()).rev() {
            if let Some(dy) = self.maps[u].dy.take() {
                self.backward_unit(u, &dy)?;
                self.spare.give(dy);
            }
        }
        Ok(())
    }

    /// Takes `dy`, the gradient of what unit `u`'s readers see, back to its inputs and parameters.
    fn backward_unit(&mut self, u: usize, dy: &[T]) -> Result<()> {
        let terms = self.gradient_terms(u, dy);
        let mut inputs = self.take_input_gradients(u);
        let unit = &self.units[u];
        let pass = UnitPass {
            unit,
            map: &self.maps[u],
            shape: self.shapes[unit.node],
            dy,
            terms,
            isa: self.isa,
            graph: &self.graph,
            units: &self.units,
            maps: &self.maps,
            shapes: &self.shapes,
            boxes: &self.boxes,
            params: &self.params,
        };
        pass.run(&mut Written { inputs: &mut inputs, grads: &mut self.grads, workers: &mut self.workers })?;
        for (&i, input) in unit.inputs.iter().zip(inputs) {
            if let Some(input) = input {
                self.maps[i].dy = Some(input.dx);
                self.maps[i].gradient_sums = input.sums;
            }
        }
        Ok(())
    }

    /// The gradients of unit `u`'s inputs, taken out of their maps while it writes them; None where nothing trainable
    /// lies before one.
    fn take_input_gradients(&mut self, u: usize) -> Vec<Option<InputGradient<T>>> {
        let inputs = &self.units[u].inputs;
        let mut taken = Vec::with_capacity(inputs.len());
        for (place, &i) in inputs.iter().enumerate() {
            let input = &self.units[i];
            // A map read twice by one unit is written twice, the second time added.
            let repeated = inputs[..place].contains(&i);
            if !self.wanted[i] || matches!(input.op, Op::Input(_)) || repeated {
                taken.push(None);
                continue;
            }
            let (dx, add) = match self.maps[i].dy.take() {
                Some(dy) => (dy, true),
                None => (self.spare.take(self.shapes[input.node].len()), false),
            };
            let single = inputs.iter().filter(|&&j| j == i).count() == 1;
            let whole = input.norm.is_some() && self.first_reader[i] == Some(u) && single;
            taken.push(Some(InputGradient { dx, add, whole, sums: None }));
        }
        taken
    }

    /// Adds to the gradients of unit `u`'s normalisation; returns a, b, c of `Gradient`, `[3][C]`.
    fn gradient_terms(&mut self, u: usize, dy: &[T]) -> [Vec<f32>; 3] {
        let shape = self.shapes[self.units[u].node];
        let c = shape.c;
        let zeros = vec![0.0; c];
        let Some(norm) = self.units[u].norm else { return [vec![1.0; c], zeros.clone(), zeros] };
        let per_image = c * shape.h * shape.w;
        let isa = self.isa;
        let sums = match self.maps[u].gradient_sums.take() {
            Some(sums) => sums,
            None => {
                self.workers.clear_sums(c);
                let map = &self.maps[u];
                self.workers.on_maybe_parts(None, per_image, shape.n, &|range, _, part, _| {
                    let dy = &dy[range.start * per_image..range.end * per_image];
                    map_sums(isa, map.source(range, per_image), dy, &mut part.sums);
                });
                self.workers.total(c)
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
        [a, b, shift]
    }
}
