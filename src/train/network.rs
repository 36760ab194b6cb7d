//! A network while it is trained: forward and backward over a batch, on the units of `train/units.rs`.
//!
//! The batch is split over the threads by images; sums over a batch (statistics, parameter gradients) are added up in
//! the threads' order, so that a step gives the same bits whenever it is run on as many threads.

use super::units::{units, Norm, Op, Unit};
use crate::cpu::dense::resample::Resampling;
use crate::cpu::dense::{conv, depthwise, maps, pages, Element, Geometry, Gradient, Scratch, Source};
use crate::cpu::{isa, Isa, Pool};
use crate::error::{Error, Result};
use crate::graph::build::{ParamId, ParamRole};
use crate::graph::{exec, Graph, Weights};
use crate::layers::upsample::nearest_source;
use crate::layers::{Conv2d, Layer};
use crate::shape::{Shape, Tensor};
use std::ops::Range;

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
    /// Batch normalisations that keep their running statistics.
    frozen_norm: Vec<bool>,
    /// Values in the order of [`Graph::params`], PyTorch's layout.
    pub params: Vec<Vec<f32>>,
    /// Gradients, likewise; [`Network::backward`] adds to them.
    pub grads: Vec<Vec<f32>>,
    isa: Isa,
    pool: Pool,
    threads: Vec<Thread<T>>,
    maps: Vec<Map<T>>,
    /// Gradient buffers not in use.
    spare: Vec<Vec<T>>,
    shapes: Vec<Shape>,
}

/// A thread's buffers.
#[derive(Default)]
struct Thread<T> {
    scratch: Scratch<T>,
    sums: Vec<f64>,
    dw: Vec<f32>,
    db: Vec<f32>,
    rows: [Vec<f32>; 3],
}

/// What a unit's forward pass does on a thread: its images, its part of the map, its buffers.
type Job<'a, T> = dyn Fn(&Range<usize>, &mut [T], &mut Thread<T>) + Sync + 'a;

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
    dy: Option<Vec<T>>,
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

/// Which batch normalisations and parameters stand still.
#[derive(Clone, Debug, Default)]
pub struct Frozen {
    /// Parameters whose names begin so are not trained; a batch normalisation whose running mean is among them keeps its
    /// statistics.
    pub parameters: Vec<String>,
    /// Batch normalisations whose parameters' names begin so keep their statistics; scale and shift are trained.
    pub statistics: Vec<String>,
}

impl<T: Element> Network<T> {
    /// A network with the values of `weights` (all of them there), on `threads` threads.
    pub fn new(graph: Graph, weights: &Weights, frozen: &Frozen, threads: usize) -> Result<Self> {
        let params = graph
            .params
            .iter()
            .map(|p| Ok(weights.get(&p.name, &p.shape)?.to_vec()))
            .collect::<Result<Vec<_>>>()?;
        let begins = |name: &str, with: &[String]| with.iter().any(|w| name.starts_with(w.as_str()));
        for prefix in frozen.parameters.iter().chain(&frozen.statistics) {
            if !graph.params.iter().any(|p| p.name.starts_with(prefix.as_str())) {
                return Err(Error::InvalidArgument(format!("no parameter's name begins with {prefix:?}")));
            }
        }
        let trainable: Vec<bool> =
            graph.params.iter().map(|p| p.trained() && !begins(&p.name, &frozen.parameters)).collect();
        let still = |p: ParamId| {
            let name = &graph.params[p.0].name;
            begins(name, &frozen.parameters) || begins(name, &frozen.statistics)
        };
        let (units, shown_by) = units(&graph);
        let frozen_norm = units.iter().map(|u| u.norm.is_some_and(|n| still(n.mean))).collect();
        let mut wanted: Vec<bool> = Vec::with_capacity(units.len());
        for u in &units {
            let own = u.params().iter().any(|p| trainable[p.0]);
            wanted.push(own || u.inputs.iter().any(|&i| wanted[i]));
        }
        let grads = params.iter().map(|p: &Vec<f32>| vec![0.0; p.len()]).collect();
        let pool = Pool::new(threads).map_err(|e| Error::Unsupported(format!("threads: {e}")))?;
        let threads = (0..pool.threads()).map(|_| Thread::default()).collect();
        let maps = units.iter().map(|_| Map::default()).collect();
        Ok(Self {
            graph,
            units,
            shown_by,
            wanted,
            trainable,
            frozen_norm,
            params,
            grads,
            isa: isa::detected(),
            pool,
            threads,
            maps,
            spare: Vec::new(),
            shapes: Vec::new(),
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
        self.threads.len()
    }

    /// Sets all gradients to zero.
    pub fn clear_gradients(&mut self) {
        self.grads.iter_mut().for_each(|g| g.fill(0.0));
    }

    /// Runs the network on a batch with the batch's statistics, which move the running ones. `inputs` in the graph's
    /// order, N x H x W x C; every input's values are written by `fill(input, image, values)`, image by image, on the
    /// threads.
    pub fn forward(
        &mut self,
        inputs: &[Shape],
        fill: &(dyn Fn(usize, usize, &mut [T]) + Sync),
    ) -> Result<()> {
        self.shapes = self.graph.shapes(inputs)?;
        let images = inputs.first().map_or(0, |s| s.n);
        if inputs.iter().any(|s| s.n != images) {
            return Err(Error::InvalidArgument("inputs of different batch sizes".into()));
        }
        for u in 0..self.units.len() {
            self.forward_unit(u, images, fill)?;
        }
        Ok(())
    }

    fn forward_unit(
        &mut self,
        u: usize,
        images: usize,
        fill: &(dyn Fn(usize, usize, &mut [T]) + Sync),
    ) -> Result<()> {
        let unit = &self.units[u];
        let shape = self.shapes[unit.node];
        let (c, per_image) = (shape.c, shape.c * shape.h * shape.w);
        let mut z = std::mem::take(&mut self.maps[u].z);
        if z.capacity() < shape.len() {
            z = pages::buffer(shape.len());
        }
        z.resize(shape.len(), T::default());
        for t in &mut self.threads {
            t.sums.clear();
            t.sums.resize(2 * c, 0.0);
        }
        let (maps, shapes, isa, params) = (&self.maps, &self.shapes, self.isa, &self.params);
        let size = |i: usize| shapes[self.units[i].node];
        let source = |i: usize, images: &Range<usize>| {
            let s = size(i);
            maps[i].source(images, s.c * s.h * s.w)
        };
        let zeros = vec![0.0; c];
        let bias_of = |bias: Option<ParamId>| bias.map_or(&zeros[..], |b| &params[b.0]);
        let mut run = |job: &Job<T>| {
            let mut items = share(&mut z, per_image, images, &mut self.threads);
            self.pool.run_each(&mut items, |_, (range, z, thread)| job(range, z, thread));
        };
        match &unit.op {
            Op::Input(place) => run(&|range, z, _| {
                for (n, z) in range.clone().zip(z.chunks_exact_mut(per_image.max(1))) {
                    fill(*place, n, z);
                }
            }),
            Op::Conv { conv, weight, bias } => {
                let g = geometry(conv, size(unit.inputs[0]), shape);
                let packed = g.pack::<T>(isa, &params[weight.0]);
                let bias = bias_of(*bias);
                run(&|range, z, t| {
                    let x = source(unit.inputs[0], range);
                    conv::forward(isa, &g, x, &packed, bias, z, &mut t.sums, &mut t.scratch);
                });
            }
            Op::Depthwise { conv, weight, bias } => {
                let g = geometry(conv, size(unit.inputs[0]), shape);
                let packed = depthwise::pack(&g, &params[weight.0], false);
                let bias = bias_of(*bias);
                run(&|range, z, t| {
                    let x = source(unit.inputs[0], range);
                    depthwise::forward(isa, &g, x, &packed, bias, z, &mut t.sums, &mut t.scratch);
                });
            }
            Op::Sum { enlarged } => run(&|range, z, t| {
                let inputs = unit.inputs.iter().zip(enlarged).map(|(&i, &e)| (source(i, range), size(i), e));
                sum_forward(isa, shape, &inputs.collect::<Vec<_>>(), z, t);
            }),
            Op::Concat => run(&|range, z, t| {
                let mut first = 0;
                for &i in &unit.inputs {
                    let x = source(i, range);
                    let part = x.channels();
                    let [values, ..] = &mut t.rows;
                    values.resize(x.z.len(), 0.0);
                    maps::read(isa, x, values, part);
                    for (to, from) in z.chunks_exact_mut(c).zip(values.chunks_exact(part)) {
                        for (to, from) in to[first..first + part].iter_mut().zip(from) {
                            *to = T::of(*from);
                        }
                    }
                    first += part;
                }
                statistics(z, c, &mut t.sums);
            }),
            Op::MaxPool(_) | Op::Bilinear => {
                let r = resampling(&unit.op, size(unit.inputs[0]), shape);
                run(&|range, z, t| {
                    r.forward(isa, source(unit.inputs[0], range), z, &mut t.sums, &mut t.scratch);
                });
            }
            Op::Plain { layer, params: ids } => {
                let inputs: Vec<Tensor> =
                    unit.inputs.iter().map(|&i| shown(isa, &maps[i], size(i))).collect();
                let inputs = with_size(&self.graph, unit, inputs, shapes);
                let values: Vec<&[f32]> = ids.iter().map(|p| &params[p.0][..]).collect();
                let y = exec::forward(layer, &inputs.iter().collect::<Vec<_>>(), &values)?;
                z.iter_mut().zip(&y.data).for_each(|(z, &v)| *z = T::of(v));
                statistics(&z, c, &mut self.threads[0].sums);
            }
        }
        let mut sums = vec![0.0; 2 * c];
        for t in &self.threads {
            sums.iter_mut().zip(&t.sums).for_each(|(s, v)| *s += v);
        }
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

    /// The graph's output `index` of the last batch, N x H x W x C.
    pub fn output(&self, index: usize) -> Tensor {
        let node = self.graph.outputs[index].1;
        let u = self.shown_by[node.0].expect("an output is shown");
        shown(self.isa, &self.maps[u], self.shapes[self.units[u].node])
    }

    /// Adds to all gradients what follows from those of the outputs, `d_outputs` in the graph's order (as
    /// [`Network::output`]).
    pub fn backward(&mut self, d_outputs: &[Tensor]) -> Result<()> {
        // What an earlier call left that failed.
        self.spare.extend(self.maps.iter_mut().filter_map(|m| m.dy.take()));
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
                let mut parts = match &mut dxs[0] {
                    Some((dx, _)) => {
                        split(dx, in_image, images, threads.len()).into_iter().map(Some).collect()
                    }
                    None => (0..threads.len()).map(|_| None).collect::<Vec<_>>(),
                };
                let ranges = ranges(images, threads.len());
                let mut items: Vec<_> = ranges.iter().zip(threads.iter_mut()).zip(&mut parts).collect();
                pool.run_each(&mut items, |_, ((range, t), dx)| {
                    let (x, d) = (source(unit.inputs[0], range), gradient(range));
                    let dx = dx.as_deref_mut().map(|dx| (dx, add));
                    let db = bias.is_some().then_some(&mut t.db[..]);
                    if let Some(transposed) = &transposed {
                        conv::backward(isa, &g, x, d, transposed, dx, &mut t.dw, db, &mut t.scratch);
                    } else if let Some([weights, turned]) = &turned {
                        depthwise::backward(
                            isa,
                            &g,
                            x,
                            d,
                            [weights, turned],
                            dx,
                            &mut t.dw,
                            db,
                            &mut t.scratch,
                        );
                    }
                });
                drop(items);
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
                    let parts = split(dx, from.c * from.h * from.w, images, threads.len());
                    let ranges = ranges(images, threads.len());
                    let mut items: Vec<_> = ranges.iter().zip(threads.iter_mut()).zip(parts).collect();
                    let (was, enlarged) = (*add, enlarged[place]);
                    pool.run_each(&mut items, |_, ((range, t), dx)| {
                        sum_backward(isa, shape, gradient(range), from, enlarged, dx, was, t);
                    });
                    *add = true;
                }
            }
            Op::Concat => {
                let mut first = 0;
                for (place, &i) in unit.inputs.iter().enumerate() {
                    let part = size(i).c;
                    let at = unit.inputs.iter().position(|&j| j == i).unwrap_or(place);
                    if let Some((dx, add)) = &mut dxs[at] {
                        let parts = split(dx, part * shape.h * shape.w, images, threads.len());
                        let ranges = ranges(images, threads.len());
                        let mut items: Vec<_> = ranges.iter().zip(threads.iter_mut()).zip(parts).collect();
                        let (was, from) = (*add, first);
                        pool.run_each(&mut items, |_, ((range, t), dx)| {
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
                    let parts = split(dx, from.c * from.h * from.w, images, threads.len());
                    let ranges = ranges(images, threads.len());
                    let mut items: Vec<_> = ranges.iter().zip(threads.iter_mut()).zip(parts).collect();
                    pool.run_each(&mut items, |_, ((range, t), dx)| {
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
                let mut plain: Vec<Option<Tensor>> = inputs
                    .iter()
                    .enumerate()
                    .map(|(i, x)| dxs.get(i).and_then(Option::as_ref).map(|_| Tensor::zeros(x.shape)))
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
                for (dx, plain) in dxs.iter_mut().zip(plain) {
                    if let (Some((dx, add)), Some(plain)) = (dx, plain) {
                        maps::deposit(isa, &plain.data, plain.shape.c, plain.shape.c, dx, *add);
                    }
                }
            }
        }
        for (&i, dx) in unit.inputs.iter().zip(dxs) {
            if let Some((dx, _)) = dx {
                self.maps[i].dy = Some(dx);
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
        let (map, isa) = (&self.maps[u], self.isa);
        for t in &mut self.threads {
            t.sums.clear();
            t.sums.resize(2 * c, 0.0);
        }
        let ranges = ranges(shape.n, self.threads.len());
        let mut items: Vec<_> = ranges.iter().zip(&mut self.threads).collect();
        self.pool.run_each(&mut items, |_, (range, t)| {
            // In f32 over some hundred pixels, then in f64.
            const PIXELS: usize = 1024;
            let all = range.start * per_image..range.end * per_image;
            let [sums, ..] = &mut t.rows;
            sums.resize(sums.len().max(2 * c), 0.0);
            let sums = &mut sums[..2 * c];
            for start in all.clone().step_by(PIXELS * c) {
                let part = start..(start + PIXELS * c).min(all.end);
                sums.fill(0.0);
                let (z, dy) = (&map.z[part.clone()], &dy[part]);
                let source = Source { z, scale: &map.scale, shift: &map.shift, slope: map.slope };
                maps::gradient_sums(isa, Gradient { map: source, dy, a: &zeros, b: &zeros, c: &zeros }, sums);
                t.sums.iter_mut().zip(&*sums).for_each(|(s, &v)| *s += f64::from(v));
            }
        });
        let mut sums = vec![0.0; 2 * c];
        for t in &self.threads {
            sums.iter_mut().zip(&t.sums).for_each(|(s, v)| *s += v);
        }
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

impl Unit {
    fn params(&self) -> Vec<ParamId> {
        let mut all: Vec<ParamId> = match &self.op {
            Op::Conv { weight, bias, .. } | Op::Depthwise { weight, bias, .. } => {
                std::iter::once(*weight).chain(*bias).collect()
            }
            Op::Plain { params, .. } => params.clone(),
            _ => Vec::new(),
        };
        all.extend(self.norm.iter().flat_map(|n: &Norm| [n.scale, n.shift]));
        all
    }
}

/// Values for the parameters that `weights` lacks, as a new network starts: He-scaled normal weights (He et al.
/// 2015, equation 10), zero biases, neutral normalisations.
pub fn fresh(graph: &Graph, weights: &Weights, seed: u64) -> Weights {
    let random = Weights::random(graph, seed);
    let mut all = Weights { metadata: weights.metadata.clone(), ..Weights::default() };
    for p in &graph.params {
        let data = match (weights.tensors.get(&p.name), p.role) {
            (Some(t), _) if t.shape == p.shape => t.data.clone(),
            (_, ParamRole::Weight { .. }) => random.tensors[&p.name].data.clone(),
            (_, ParamRole::NormScale | ParamRole::NormVariance) => vec![1.0; p.len()],
            (_, ParamRole::Bias | ParamRole::NormShift | ParamRole::NormMean) => vec![0.0; p.len()],
        };
        all.insert(&p.name, &p.shape, data);
    }
    all
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

/// Image ranges, one a thread.
fn ranges(images: usize, threads: usize) -> Vec<Range<usize>> {
    (0..threads).map(|t| images * t / threads..images * (t + 1) / threads).collect()
}

/// A batch cut by [`ranges`].
fn split<T>(mut data: &mut [T], per_image: usize, images: usize, threads: usize) -> Vec<&mut [T]> {
    let mut parts = Vec::with_capacity(threads);
    for range in ranges(images, threads) {
        let (part, rest) = data.split_at_mut(range.len() * per_image);
        parts.push(part);
        data = rest;
    }
    parts
}

/// Each thread's range, part of the batch and buffers.
fn share<'a, T: Element>(
    data: &'a mut [T],
    per_image: usize,
    images: usize,
    threads: &'a mut [Thread<T>],
) -> Vec<(Range<usize>, &'a mut [T], &'a mut Thread<T>)> {
    let count = threads.len();
    let parts = split(data, per_image, images, count);
    ranges(images, count).into_iter().zip(parts).zip(threads).map(|((r, d), t)| (r, d, t)).collect()
}

/// A buffer of `len` values, one that is spare if there is.
fn take<T: Element>(spare: &mut Vec<Vec<T>>, len: usize) -> Vec<T> {
    let fits = |v: &Vec<T>| v.capacity() >= len;
    let best = (0..spare.len()).filter(|&i| fits(&spare[i])).min_by_key(|&i| spare[i].capacity());
    let mut buffer = best.map(|i| spare.swap_remove(i)).unwrap_or_else(|| pages::buffer(len));
    buffer.resize(len, T::default());
    buffer
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

/// Sum of maps, each as it is or enlarged, a row at a time.
fn sum_forward<T: Element>(
    isa: Isa,
    out: Shape,
    inputs: &[(Source<'_, T>, Shape, bool)],
    z: &mut [T],
    t: &mut Thread<T>,
) {
    let (c, row) = (out.c, out.w * out.c);
    let zeros = vec![0.0; c];
    let [sum, one, sums] = &mut t.rows;
    sum.resize(sum.len().max(row), 0.0);
    sums.clear();
    sums.resize(2 * c, 0.0);
    let sum = &mut sum[..row];
    for (at, z) in z.chunks_exact_mut(row).enumerate() {
        let (n, y) = (at / out.h, at % out.h);
        sum.fill(0.0);
        for (source, from, enlarged) in inputs {
            let sy = if *enlarged { nearest_source(y, from.h, out.h) } else { y };
            let first = (n * from.h + sy) * from.w;
            one.resize(one.len().max(from.w * c), 0.0);
            maps::read(isa, source.pixels(first..first + from.w), &mut one[..from.w * c], c);
            if *enlarged {
                for (x, sum) in sum.chunks_exact_mut(c).enumerate() {
                    let sx = nearest_source(x, from.w, out.w);
                    maps::add(isa, &one[sx * c..(sx + 1) * c], sum);
                }
            } else {
                maps::add(isa, &one[..row], sum);
            }
        }
        maps::finish(isa, sum, c, &zeros, z, sums);
        t.sums.iter_mut().zip(sums.iter_mut()).for_each(|(total, v)| *total += f64::from(std::mem::take(v)));
    }
}

/// Gradient of [`sum_forward`] for one input.
fn sum_backward<T: Element>(
    isa: Isa,
    out: Shape,
    gradient: Gradient<'_, T>,
    from: Shape,
    enlarged: bool,
    dx: &mut [T],
    add: bool,
    t: &mut Thread<T>,
) {
    let (c, row) = (out.c, out.w * out.c);
    let [d, sums, _] = &mut t.rows;
    d.resize(d.len().max(row), 0.0);
    let d = &mut d[..row];
    let image = from.h * from.w * c;
    sums.resize(sums.len().max(image), 0.0);
    for (n, dx) in dx.chunks_exact_mut(image).enumerate() {
        let sums = &mut sums[..image];
        sums.fill(0.0);
        for y in 0..out.h {
            let first = (n * out.h + y) * out.w;
            maps::pull_back(isa, gradient.pixels(first..first + out.w), d, c);
            if enlarged {
                let sy = nearest_source(y, from.h, out.h);
                for (x, d) in d.chunks_exact(c).enumerate() {
                    let at = (sy * from.w + nearest_source(x, from.w, out.w)) * c;
                    maps::add(isa, d, &mut sums[at..at + c]);
                }
            } else {
                maps::deposit(isa, d, c, c, &mut dx[y * row..(y + 1) * row], add);
            }
        }
        if enlarged {
            maps::deposit(isa, sums, c, c, dx, add);
        }
    }
}

/// What the trainer asks of whatever walks the network: this crate's CPU kernels, at either precision.
pub trait Engine: Send {
    /// The network.
    fn graph(&self) -> &Graph;
    /// Whether each parameter is trained.
    fn trainable(&self) -> &[bool];
    /// Parameters in the order of the graph's, PyTorch's layout.
    fn params(&mut self) -> &mut [Vec<f32>];
    /// Parameters to change, and their gradients.
    fn params_and_grads(&mut self) -> (&mut [Vec<f32>], &mut [Vec<f32>]);
    /// Outputs for a batch of `shape`, of pixels N x H x W x 3 in RGB. `table` gives the network's value of each pixel value
    /// by input channel, and which channel of the pixel each is.
    fn forward(&mut self, pixels: &[u8], shape: Shape, table: &InputTable) -> Result<Vec<Tensor>>;
    /// Clears the gradients and sets them from those of the outputs.
    fn backward(&mut self, d_outputs: &[Tensor]) -> Result<()>;
    /// Threads it runs on.
    fn threads(&self) -> usize;
    /// How maps are stored.
    fn precision(&self) -> &'static str;
}

/// Network input by pixel value.
#[derive(Clone, Debug, PartialEq)]
pub struct InputTable {
    /// For every input channel: the pixel's channel it comes from.
    pub channel: [usize; 3],
    /// For every input channel and pixel value.
    pub value: [Vec<f32>; 3],
}

impl<T: Element> Engine for Network<T> {
    fn graph(&self) -> &Graph {
        &self.graph
    }
    fn trainable(&self) -> &[bool] {
        &self.trainable
    }
    fn params(&mut self) -> &mut [Vec<f32>] {
        &mut self.params
    }
    fn params_and_grads(&mut self) -> (&mut [Vec<f32>], &mut [Vec<f32>]) {
        (&mut self.params, &mut self.grads)
    }
    fn forward(&mut self, pixels: &[u8], shape: Shape, table: &InputTable) -> Result<Vec<Tensor>> {
        let values: Vec<Vec<T>> = table.value.iter().map(|v| v.iter().map(|&v| T::of(v)).collect()).collect();
        let image = shape.h * shape.w * 3;
        Network::forward(self, &[shape], &|_, n, z: &mut [T]| {
            let [r, g, b] = table.channel;
            let [v0, v1, v2]: [&[T; 256]; 3] =
                [0, 1, 2].map(|i| values[i][..].try_into().expect("256 values"));
            for (z, p) in z.chunks_exact_mut(3).zip(pixels[n * image..(n + 1) * image].chunks_exact(3)) {
                z[0] = v0[usize::from(p[r])];
                z[1] = v1[usize::from(p[g])];
                z[2] = v2[usize::from(p[b])];
            }
        })?;
        Ok((0..self.graph.outputs.len()).map(|i| self.output(i)).collect())
    }
    fn backward(&mut self, d_outputs: &[Tensor]) -> Result<()> {
        self.clear_gradients();
        Network::backward(self, d_outputs)?;
        // What is frozen has no part in the gradient's norm.
        for (g, _) in self.grads.iter_mut().zip(&self.trainable).filter(|(_, &trained)| !trained) {
            g.fill(0.0);
        }
        Ok(())
    }
    fn threads(&self) -> usize {
        Network::threads(self)
    }
    fn precision(&self) -> &'static str {
        T::NAME
    }
}
