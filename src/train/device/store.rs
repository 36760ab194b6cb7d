//! Parameters and gradients, on the host as the trainer sees them and on the device as kernels do.

use crate::error::Result;
use crate::gpu::memory::{DeviceBuffer, PinnedBuffer};
use crate::gpu::ops::train::{Norm, NormGradient, TrainOps, Values};
use crate::graph::build::{ParamId, ParamRole};
use crate::graph::{Graph, Weights};
use crate::train::units::Norm as UnitNorm;
use crate::train::walk::Walk;

/// Bytes at whose multiples parameters begin.
const ALIGN: usize = 16;

/// Parameters and their gradients.
pub(super) struct Store {
    /// In the order of the graph's.
    params: Vec<Vec<f32>>,
    grads: Vec<Vec<f32>>,
    /// Whether the host's parameters may have changed since they were brought to the device.
    stale: bool,
    /// First byte of every parameter on the device; of its gradient too. Running statistics, which have none and which the forward pass
    /// changes, come last.
    places: Vec<usize>,
    learnt_bytes: usize,
    values: DeviceBuffer,
    gradients: DeviceBuffer,
    pinned: PinnedBuffer,
    /// `[4][C]` of every unit's normalisation, by its first byte; and `[3][C]` of the one at hand.
    terms: DeviceBuffer,
    terms_at: Vec<usize>,
    factors: DeviceBuffer,
}

fn is_statistic(role: ParamRole) -> bool {
    matches!(role, ParamRole::NormMean | ParamRole::NormVariance)
}

impl Store {
    /// With the values of `weights`.
    pub fn new(graph: &Graph, walk: &Walk, weights: &Weights, ops: &TrainOps) -> Result<Self> {
        let named = |p: &crate::graph::build::Param| Ok(weights.get(&p.name, &p.shape)?.to_vec());
        let params = graph.params.iter().map(named).collect::<Result<Vec<_>>>()?;
        let mut places = vec![0; params.len()];
        let (mut bytes, mut learnt_bytes) = (0, 0);
        for statistics in [false, true] {
            for (i, p) in graph.params.iter().enumerate().filter(|(_, p)| is_statistic(p.role) == statistics) {
                places[i] = bytes;
                bytes += (p.len() * 4).next_multiple_of(ALIGN);
            }
            if !statistics {
                learnt_bytes = bytes;
            }
        }
        let mut terms_bytes = 0;
        let mut most = 0;
        let terms_at = walk.units.iter().map(|u| {
            let at = terms_bytes;
            let c = u.norm.map_or(0, |n| params[n.scale.0].len());
            terms_bytes += (4 * c * 4).next_multiple_of(ALIGN);
            most = most.max(c);
            at
        });
        let terms_at: Vec<usize> = terms_at.collect();
        let context = ops.device().context();
        Ok(Self {
            grads: params.iter().map(|p| vec![0.0; p.len()]).collect(),
            stale: true,
            values: DeviceBuffer::new(context, bytes)?,
            gradients: DeviceBuffer::new(context, learnt_bytes)?,
            pinned: PinnedBuffer::new(context, bytes)?,
            terms: DeviceBuffer::new(context, terms_bytes)?,
            factors: DeviceBuffer::new(context, 3 * most * 4)?,
            terms_at,
            params,
            places,
            learnt_bytes,
        })
    }

    pub fn params_mut(&mut self) -> &mut [Vec<f32>] {
        self.stale = true;
        &mut self.params
    }

    pub fn params_and_grads_mut(&mut self) -> (&mut [Vec<f32>], &mut [Vec<f32>]) {
        self.stale = true;
        (&mut self.params, &mut self.grads)
    }

    /// Brings the parameters to the device, where the host's may have changed.
    pub fn upload(&mut self, ops: &TrainOps) -> Result<()> {
        if !self.stale {
            return Ok(());
        }
        ops.stream().synchronize()?;
        let bytes = self.pinned.bytes_mut();
        for (p, &at) in self.params.iter().zip(&self.places) {
            bytes[at..at + p.len() * 4].copy_from_slice(bytemuck::cast_slice(p));
        }
        // All of its bytes, of which a network without parameters has one.
        self.values.write(ops.stream(), 0, &self.pinned, self.values.len())?;
        self.stale = false;
        Ok(())
    }

    /// Brings the running statistics to the host.
    pub fn download_statistics(&mut self, ops: &TrainOps) -> Result<()> {
        let first = self.learnt_bytes;
        if first == self.values.len() {
            return Ok(());
        }
        self.values.read(ops.stream(), first..self.values.len(), &self.pinned, first)?;
        ops.stream().synchronize()?;
        let bytes = self.pinned.bytes();
        for (p, &at) in self.params.iter_mut().zip(&self.places).filter(|(_, &at)| at >= first) {
            let end = at + size_of_val(&p[..]);
            p.copy_from_slice(bytemuck::cast_slice(&bytes[at..end]));
        }
        Ok(())
    }

    /// Brings the gradients to the host. What is not trained has none.
    pub fn download_gradients(&mut self, ops: &TrainOps, trainable: &[bool]) -> Result<()> {
        self.gradients.read(ops.stream(), 0..self.learnt_bytes, &self.pinned, 0)?;
        ops.stream().synchronize()?;
        let bytes = self.pinned.bytes();
        for ((g, &at), &trained) in self.grads.iter_mut().zip(&self.places).zip(trainable) {
            if trained {
                let end = at + size_of_val(&g[..]);
                g.copy_from_slice(bytemuck::cast_slice(&bytes[at..end]));
            } else {
                g.fill(0.0);
            }
        }
        Ok(())
    }

    /// Sets the device's gradients to zero.
    pub fn clear_gradients(&self, ops: &TrainOps) -> Result<()> {
        self.gradients.fill(ops.stream(), 0..self.gradients.len(), 0)
    }

    /// A parameter on the device.
    pub fn value(&self, p: ParamId) -> Values<'_> {
        Values { buffer: &self.values, at: self.places[p.0], len: self.params[p.0].len() }
    }

    /// The gradient of one that is learnt.
    pub fn gradient(&self, p: ParamId) -> Values<'_> {
        Values { buffer: &self.gradients, at: self.places[p.0], len: self.params[p.0].len() }
    }

    /// The normalisation of unit `u`.
    pub fn norm(&self, u: usize, norm: &UnitNorm, frozen: bool) -> Norm<'_> {
        let len = 4 * self.params[norm.scale.0].len();
        Norm {
            scale: self.value(norm.scale),
            shift: self.value(norm.shift),
            mean: self.value(norm.mean),
            variance: self.value(norm.variance),
            eps: norm.eps,
            momentum: norm.momentum,
            frozen,
            terms: Values { buffer: &self.terms, at: self.terms_at[u], len },
        }
    }

    /// Where its gradients go.
    pub fn norm_gradient(&self, norm: &UnitNorm) -> NormGradient<'_> {
        NormGradient {
            scale: self.gradient(norm.scale),
            shift: self.gradient(norm.shift),
            factors: Values { buffer: &self.factors, at: 0, len: 3 * self.params[norm.scale.0].len() },
        }
    }
}
