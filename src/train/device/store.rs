//! Parameters and gradients, on the host as the trainer sees them and on the device as kernels do.

use crate::error::Result;
use crate::gpu::memory::{DeviceBuffer, PinnedBuffer};
use crate::gpu::ops::train::{Norm, NormGradient, TrainOps, Values};
use crate::graph::build::{ParamId, ParamRole};
use crate::graph::{Graph, Weights};
use crate::train::network::ParamsAndGrads;
use crate::train::units::Norm as UnitNorm;
use crate::train::walk::Walk;

/// Parameters and their gradients.
pub(super) struct Store {
    /// In the order of the graph's.
    params: Vec<Vec<f32>>,
    grads: Vec<Vec<f32>>,
    /// Whether the host's parameters may have changed since they were brought to the device, or the device's since they were brought to
    /// the host; and the device's gradients.
    host_newer: bool,
    device_newer: bool,
    gradients_newer: bool,
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

/// Copies values to their places.
fn copy_in<V: AsRef<[f32]>>(values: &[V], places: &[usize], bytes: &mut [u8]) {
    for (v, &at) in values.iter().zip(places) {
        let v = bytemuck::cast_slice(v.as_ref());
        bytes[at..at + v.len()].copy_from_slice(v);
    }
}

/// Copies values from those of their places that lie before `end`.
fn copy_out<'a>(to: impl IntoIterator<Item = &'a mut Vec<f32>>, places: &[usize], end: usize, bytes: &[u8]) {
    for (v, &at) in to.into_iter().zip(places).filter(|(_, &at)| at < end) {
        let last = at + v.len() * 4;
        v.copy_from_slice(bytemuck::cast_slice(&bytes[at..last]));
    }
}

impl Store {
    /// Bytes at whose multiples parameters begin.
    pub const ALIGN: usize = 16;

    /// With the values of `weights`.
    pub fn new(graph: &Graph, walk: &Walk, weights: &Weights, ops: &TrainOps) -> Result<Self> {
        let named = |p: &crate::graph::build::Param| Ok(weights.get(&p.name, &p.shape)?.to_vec());
        let params = graph.params.iter().map(named).collect::<Result<Vec<_>>>()?;
        let mut places = vec![0; params.len()];
        let (mut bytes, mut learnt_bytes) = (0, 0);
        for statistics in [false, true] {
            for (i, p) in graph.params.iter().enumerate().filter(|(_, p)| is_statistic(p.role) == statistics)
            {
                places[i] = bytes;
                bytes += (p.len() * 4).next_multiple_of(Self::ALIGN);
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
            terms_bytes += (4 * c * 4).next_multiple_of(Self::ALIGN);
            most = most.max(c);
            at
        });
        let terms_at: Vec<usize> = terms_at.collect();
        let context = ops.device().context();
        Ok(Self {
            grads: params.iter().map(|p| vec![0.0; p.len()]).collect(),
            host_newer: true,
            device_newer: false,
            gradients_newer: false,
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

    /// The parameters on the host, to be changed there.
    pub fn params_mut(&mut self, ops: &TrainOps) -> Result<&mut [Vec<f32>]> {
        self.download(ops)?;
        self.host_newer = true;
        Ok(&mut self.params)
    }

    /// As [`Store::params_mut`], with the gradients. What is not trained has none.
    pub fn params_and_grads_mut(&mut self, ops: &TrainOps) -> Result<ParamsAndGrads<'_>> {
        self.download(ops)?;
        self.host_newer = true;
        if std::mem::take(&mut self.gradients_newer) {
            self.gradients.read(ops.stream(), 0..self.gradients.len(), &self.pinned, 0)?;
            ops.stream().synchronize()?;
            copy_out(&mut self.grads, &self.places, self.learnt_bytes, self.pinned.bytes());
        }
        Ok((&mut self.params, &mut self.grads))
    }

    /// Brings the parameters to the host, where the device's have changed.
    fn download(&mut self, ops: &TrainOps) -> Result<()> {
        if std::mem::take(&mut self.device_newer) {
            self.values.read(ops.stream(), 0..self.values.len(), &self.pinned, 0)?;
            ops.stream().synchronize()?;
            copy_out(&mut self.params, &self.places, usize::MAX, self.pinned.bytes());
        }
        Ok(())
    }

    /// Brings the parameters to the device, where the host's may have changed.
    pub fn upload(&mut self, ops: &TrainOps) -> Result<()> {
        if !std::mem::take(&mut self.host_newer) {
            return Ok(());
        }
        ops.stream().synchronize()?;
        copy_in(&self.params, &self.places, self.pinned.bytes_mut());
        self.values.write(ops.stream(), 0, &self.pinned, self.values.len())
    }

    /// The device's parameters change now: by the forward pass, or by a step.
    pub fn device_changes(&mut self) {
        self.device_newer = true;
    }

    /// Sets the device's gradients to zero, to be added to.
    pub fn clear_gradients(&mut self, ops: &TrainOps) -> Result<()> {
        self.gradients_newer = true;
        self.gradients.fill(ops.stream(), 0..self.gradients.len(), 0)
    }

    /// Sets those of what is not trained to zero: it has no part in the gradient's norm.
    pub fn clear_untrained(&self, graph: &Graph, trainable: &[bool], ops: &TrainOps) -> Result<()> {
        let learnt = graph.params.iter().map(|p| !is_statistic(p.role));
        for ((at, p), _) in
            self.places.iter().zip(&self.params).zip(learnt.zip(trainable)).filter(|(_, (l, t))| *l && !**t)
        {
            self.gradients.fill(ops.stream(), *at..*at + p.len() * 4, 0)?;
        }
        Ok(())
    }

    /// Where a parameter lies among all; its gradient too.
    pub fn bytes(&self, p: ParamId) -> std::ops::Range<usize> {
        self.places[p.0]..self.places[p.0] + self.params[p.0].len() * 4
    }

    /// A parameter on the device.
    pub fn value(&self, p: ParamId) -> Values<'_> {
        Values { buffer: &self.values, at: self.places[p.0], len: self.params[p.0].len() }
    }

    /// The gradient of one that is learnt.
    pub fn gradient(&self, p: ParamId) -> Values<'_> {
        Values { buffer: &self.gradients, at: self.places[p.0], len: self.params[p.0].len() }
    }

    /// All gradients, those of what is not trained 0.
    pub fn gradients(&self) -> Values<'_> {
        Values { buffer: &self.gradients, at: 0, len: self.learnt_bytes / 4 }
    }

    /// All parameters.
    pub fn values(&self) -> Values<'_> {
        Values { buffer: &self.values, at: 0, len: self.values.len() / 4 }
    }

    /// What another buffer that lies as the parameters do has for one.
    pub fn place_in<'a>(&self, buffer: &'a DeviceBuffer, p: ParamId) -> Values<'a> {
        Values { buffer, at: self.places[p.0], len: self.params[p.0].len() }
    }

    /// A buffer of the device that lies as the parameters do, with these values (a parameter without any has zeros).
    pub fn buffer_of(&mut self, ops: &TrainOps, values: &[&[f32]]) -> Result<DeviceBuffer> {
        let buffer = DeviceBuffer::new(ops.device().context(), self.values.len())?;
        ops.stream().synchronize()?;
        self.pinned.bytes_mut().fill(0);
        copy_in(values, &self.places, self.pinned.bytes_mut());
        buffer.write(ops.stream(), 0, &self.pinned, buffer.len())?;
        Ok(buffer)
    }

    /// Brings such a buffer's values to `to`, a vector a parameter, some of which may be empty.
    pub fn read_buffer<'a>(
        &mut self,
        ops: &TrainOps,
        buffer: &DeviceBuffer,
        to: impl Iterator<Item = &'a mut Vec<f32>>,
    ) -> Result<()> {
        buffer.read(ops.stream(), 0..buffer.len(), &self.pinned, 0)?;
        ops.stream().synchronize()?;
        copy_out(to, &self.places, usize::MAX, self.pinned.bytes());
        Ok(())
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
