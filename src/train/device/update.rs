//! The optimiser's step on a device: the rules of `train/optim`, with buffers and averages there.

use super::DeviceEngine;
use crate::error::{Error, Result};
use crate::gpu::memory::DeviceBuffer;
use crate::gpu::ops::train::{AdamW, Sgd, Values};
use crate::graph::build::ParamId;
use crate::train::network::{Update, Updated};
use crate::train::optim::{
    clip_factor, first_non_finite, sgd_weights, AdamFactors, Ema, Optimizer, OptimizerRecipe,
};

/// What the optimiser remembers, and the averages, each laid out as the parameters are.
pub(super) struct Moments {
    buffers: Vec<DeviceBuffer>,
    average: Option<DeviceBuffer>,
    /// Whether the host's copies are of an earlier step.
    ahead: bool,
}

impl DeviceEngine {
    /// One step, as [`Engine::update`](crate::train::network::Engine::update) says.
    pub(super) fn take_step(&mut self, update: Update<'_>) -> Result<Updated> {
        let Update { optimizer, average, clip, lr } = update;
        let params = optimizer.rule().1;
        let fits = params.iter().map(|p| (p.len, p.frozen));
        let own = self.graph.params.iter().zip(&self.walk.trainable).map(|(p, trained)| (p.len(), !trained));
        if !fits.eq(own) {
            return Err(Error::InvalidArgument("an optimizer of other parameters than the network's".into()));
        }
        self.finish_reduction()?;
        let norm = self.ops.norm(self.store.gradients())?;
        if !norm.is_finite() {
            let found = first_non_finite(self.store.params_and_grads_mut(&self.ops)?.1);
            let (param, _) = found.ok_or_else(|| Error::Internal("a norm that is not finite".into()))?;
            return Ok(Updated::NotFinite { param });
        }
        if let Some(factor) = clip_factor(norm, clip).filter(|_| clip > 0.0) {
            self.ops.scale(self.store.gradients(), factor)?;
        }
        self.store.upload(&self.ops)?;
        if self.moments.is_none() {
            self.moments = Some(self.bring_moments(optimizer, average.as_deref())?);
        }
        let (Some(moments), store, ops) = (&mut self.moments, &mut self.store, &self.ops) else {
            return Err(Error::Internal("no moments".into()));
        };
        moments.ahead = true;
        store.device_changes();
        let step = optimizer.count_step();
        let (rule, params) = optimizer.rule();
        for (id, p) in params.iter().enumerate().filter(|(_, p)| !p.frozen) {
            let (id, rate) = (ParamId(id), lr * p.lr_multiplier);
            let (value, gradient) = (store.value(id), store.gradient(id));
            let buffer = |i: usize| store.place_in(&moments.buffers[i], id);
            let decays = |weight_decay| if p.decay { weight_decay } else { 0.0 };
            match rule {
                OptimizerRecipe::Sgd { momentum, weight_decay, nesterov } => {
                    let [of_buffer, of_gradient] = sgd_weights(momentum, nesterov);
                    let decay = decays(weight_decay);
                    let rule = Sgd { rate, momentum, decay, of_buffer, of_gradient };
                    ops.sgd(rule, value, gradient, buffer(0))?;
                }
                OptimizerRecipe::AdamW { beta1, beta2, epsilon, weight_decay } => {
                    let AdamFactors { rate, root, shrink } =
                        AdamFactors::new(step, rate, [beta1, beta2], decays(weight_decay));
                    let rule = AdamW { beta1, beta2, epsilon, rate, root, shrink };
                    ops.adamw(rule, value, gradient, [buffer(0), buffer(1)])?;
                }
            }
        }
        if let (Some(average), Some(buffer)) = (average, &moments.average) {
            let all = Values { buffer, ..store.values() };
            ops.move_average(1.0 - average.decay(), store.values(), all)?;
            average.updates += 1;
        }
        Ok(Updated::Done { norm })
    }

    /// The host's buffers and averages, on the device.
    fn bring_moments(&mut self, optimizer: &Optimizer, average: Option<&Ema>) -> Result<Moments> {
        let all = optimizer.buffers();
        let count = all.iter().map(Vec::len).max().unwrap_or(0);
        let of = |i: usize| all.iter().map(|b| b.get(i).map_or(&[][..], |b| b)).collect::<Vec<_>>();
        let buffers =
            (0..count).map(|i| self.store.buffer_of(&self.ops, &of(i))).collect::<Result<Vec<_>>>()?;
        let average = average.map(|a| {
            let values: Vec<&[f32]> = a.average.iter().map(|v| &v[..]).collect();
            self.store.buffer_of(&self.ops, &values)
        });
        Ok(Moments { buffers, average: average.transpose()?, ahead: false })
    }

    /// Brings buffers and averages to the host, where the device's are of a later step.
    pub(super) fn bring_back(&mut self, optimizer: &mut Optimizer, average: Option<&mut Ema>) -> Result<()> {
        let Some(moments) = self.moments.as_mut().filter(|m| m.ahead) else { return Ok(()) };
        for (i, buffer) in moments.buffers.iter().enumerate() {
            let mut none: Vec<Vec<f32>> = vec![Vec::new(); optimizer.buffers().len()];
            let to = optimizer
                .buffers_mut()
                .iter_mut()
                .zip(&mut none)
                .map(|(b, none)| b.get_mut(i).unwrap_or(none));
            self.store.read_buffer(&self.ops, buffer, to)?;
        }
        if let (Some(average), Some(buffer)) = (average, &moments.average) {
            self.store.read_buffer(&self.ops, buffer, average.average.iter_mut())?;
        }
        moments.ahead = false;
        Ok(())
    }
}
