//! The backward pass of a batch on a device, unit by unit from the last.

use super::forward::{boxes_map, conv_filter, lies_apart, linear_filter, transposed_filter};
use super::DeviceEngine;
use crate::error::{Error, Result};
use crate::gpu::memory::DeviceBuffer;
use crate::gpu::ops::train::{Align, Filter, MapIn, Pool, Taken};
use crate::graph::build::ParamId;
use crate::layers::{Activation, Layer};
use crate::train::units::Op;

impl DeviceEngine {
    /// Adds to the device's gradients what follows from those that the outputs' units have.
    pub(super) fn run_back(&mut self) -> Result<()> {
        for u in (0..self.walk.units.len()).rev() {
            if let Some(dy) = self.batch.take_left_gradient(u) {
                let done = self.backward_unit(u, &dy);
                // Given back only when no sum over ranks waits any more.
                self.batch.give_spare(dy);
                done?;
            }
            self.reduce_after(u)?;
        }
        Ok(())
    }

    /// Takes `dy`, the gradient of what unit `u`'s readers see, back to its inputs and parameters.
    fn backward_unit(&mut self, u: usize, dy: &DeviceBuffer) -> Result<()> {
        let unit = &self.walk.units[u];
        let d = MapIn { buffer: dy, view: self.batch.view(u) };
        // Back to what the operation left, in its place.
        if let Some(norm) = &unit.norm {
            let terms = self.store.norm(u, norm, self.walk.frozen_norm[u]);
            let gradient = self.store.norm_gradient(norm);
            self.ops.normalise_back(&terms, &gradient, self.batch.left(u)?, d, unit.slope)?;
        } else if unit.slope != 1.0 {
            self.ops.activate_back(self.batch.seen(u)?, d, unit.slope)?;
        }
        let x = unit.inputs.first().copied();
        match unit.op.clone() {
            Op::Input(_) | Op::Boxes(_) => Ok(()),
            Op::Conv { conv, weight, bias } | Op::Depthwise { conv, weight, bias } => {
                self.conv_unit_back(u, &conv_filter(&conv), weight, bias, d)
            }
            Op::Plain { layer, params } => {
                let (weight, bias) = (params.first().copied(), params.get(1).copied());
                let weight = || weight.ok_or_else(|| Error::Internal("a layer without weights".into()));
                match layer {
                    Layer::Conv2d(conv) => self.conv_unit_back(u, &conv_filter(&conv), weight()?, bias, d),
                    Layer::Linear(linear) => {
                        let from = self.batch.shapes[unit.inputs[0]];
                        self.conv_unit_back(u, &linear_filter(&linear, from), weight()?, bias, d)
                    }
                    Layer::ConvTranspose2d(conv) => {
                        self.transposed_unit_back(u, &transposed_filter(&conv), weight()?, bias, d)
                    }
                    Layer::GlobalAvgPool(_) => self.taken_unit_back(x, Taken::Mean, d),
                    Layer::Crop(crop) => self.taken_unit_back(x, Taken::From([crop.top, crop.left]), d),
                    Layer::Activation(activation) => {
                        let group = match activation {
                            Activation::Softmax(group) => Some(group),
                            _ => None,
                        };
                        let apart = lies_apart(unit);
                        self.input_back(x, |e, dx, add| {
                            let y = if apart { e.batch.left(u)? } else { e.batch.seen(u)? };
                            e.ops.saturated_back(group, y, d, dx, add)
                        })
                    }
                    other => Err(Error::Internal(format!("{} has no backward pass here", other.kind()))),
                }
            }
            Op::Sum { enlarged } => {
                for (i, enlarged) in unit.inputs.clone().into_iter().zip(enlarged) {
                    let taken = if enlarged { Taken::Nearest } else { Taken::From([0; 2]) };
                    self.taken_unit_back(Some(i), taken, d)?;
                }
                Ok(())
            }
            Op::Concat => {
                let mut first = 0;
                for i in unit.inputs.clone() {
                    let channels = self.batch.shapes[i].c;
                    let part = MapIn { view: d.view.channels(first, channels), ..d };
                    self.taken_unit_back(Some(i), Taken::From([0; 2]), part)?;
                    first += channels;
                }
                Ok(())
            }
            Op::Bilinear => self.taken_unit_back(x, Taken::Bilinear, d),
            Op::MaxPool(pool) => self.input_back(x, |e, dx, add| {
                let [top, left, ..] = pool.padding;
                let (kernel, stride, pad) = (pool.kernel, pool.stride, [top, left]);
                let pool = Pool { kernel, stride, pad, taps: e.batch.taps(u)? };
                e.ops.max_pool_back(&pool, d, dx, add)
            }),
            Op::RoiAlign { roi, boxes } => {
                let align = Align {
                    spatial_scale: roi.spatial_scale,
                    samples: roi.sampling_ratio,
                    aligned: roi.aligned,
                };
                self.input_back(x, |e, dx, add| {
                    let boxes = boxes_map(&e.boxes, &e.box_rows, boxes)?;
                    e.ops.roi_align_back(align, boxes, d, dx, add)
                })
            }
        }
    }

    /// Writes or adds to the gradient of unit `i`, where anything trainable lies at or before it.
    fn input_back(
        &mut self,
        i: Option<usize>,
        back: impl FnOnce(&mut Self, MapIn<'_>, bool) -> Result<()>,
    ) -> Result<()> {
        let Some(i) = i.filter(|&i| self.walk.wanted[i]) else { return Ok(()) };
        let (dx, add) = self.batch.take_gradient(i, &self.ops)?;
        let done = back(self, MapIn { buffer: &dx, view: self.batch.view(i) }, add);
        self.batch.put_gradient(i, dx);
        done
    }

    fn taken_unit_back(&mut self, i: Option<usize>, taken: Taken, d: MapIn<'_>) -> Result<()> {
        self.input_back(i, |e, dx, add| e.ops.taken_back(taken, d, dx, add))
    }

    fn bias_unit_back(&mut self, bias: Option<ParamId>, d: MapIn<'_>) -> Result<()> {
        match bias.filter(|b| self.walk.trainable[b.0]) {
            Some(bias) => self.ops.bias_back(d, self.store.gradient(bias)),
            None => Ok(()),
        }
    }

    fn conv_unit_back(
        &mut self,
        u: usize,
        filter: &Filter,
        weight: ParamId,
        bias: Option<ParamId>,
        d: MapIn<'_>,
    ) -> Result<()> {
        let i = self.walk.units[u].inputs[0];
        if self.walk.trainable[weight.0] {
            self.ops.conv_weights_back(filter, self.batch.seen(i)?, d, self.store.gradient(weight))?;
        }
        self.bias_unit_back(bias, d)?;
        self.input_back(Some(i), |e, dx, add| {
            e.ops.conv_back(filter, e.store.value(weight), None, d, dx, add)
        })
    }

    /// Of a transposed convolution: all that a convolution's backward pass does, the other way round.
    fn transposed_unit_back(
        &mut self,
        u: usize,
        filter: &Filter,
        weight: ParamId,
        bias: Option<ParamId>,
        d: MapIn<'_>,
    ) -> Result<()> {
        let i = self.walk.units[u].inputs[0];
        if self.walk.trainable[weight.0] {
            self.ops.conv_weights_back(filter, d, self.batch.seen(i)?, self.store.gradient(weight))?;
        }
        self.bias_unit_back(bias, d)?;
        self.input_back(Some(i), |e, dx, add| {
            if !add {
                return e.ops.conv(filter, e.store.value(weight), None, d, dx, 1.0);
            }
            let bytes = dx.buffer.len();
            let spare = e.batch.take_spare(bytes, &e.ops)?;
            let own = MapIn { buffer: &spare, view: dx.view };
            let done = e.ops.conv(filter, e.store.value(weight), None, d, own, 1.0);
            let done = done.and_then(|()| e.ops.taken_back(Taken::From([0; 2]), own, dx, true));
            e.batch.give_spare(spare);
            done
        })
    }
}
