//! The forward pass of a batch on a device.

use super::DeviceEngine;
use crate::error::{Error, Result};
use crate::gpu::map::{DeviceView, Element};
use crate::gpu::ops::train::{Filter, MapIn, Pool, Room, Taken};
use crate::gpu::ops::{ConvWindow, Device, DeviceOp, MapOp};
use crate::graph::build::ParamId;
use crate::layers::{
    activation, combine, pool, roi_align, Activation, Conv2d, ConvTranspose2d, Layer, Linear,
};
use crate::shape::Shape;
use crate::train::units::{Op, Unit};
use std::ops::Range;

/// The operation that inference has for a unit's, where it has no weights.
pub(super) fn plain_op(unit: &Unit, device: &Device) -> Result<Option<DeviceOp>> {
    Ok(Some(match &unit.op {
        Op::Bilinear => DeviceOp::Map(MapOp::resize(device, true)?),
        Op::RoiAlign { roi, .. } => roi_align::cuda::lower(roi, device)?,
        Op::Plain { layer, .. } => match layer {
            Layer::Activation(a @ (Activation::Sigmoid | Activation::Softmax(_))) => {
                activation::cuda::lower(a, device)?
            }
            Layer::GlobalAvgPool(_) => pool::cuda::lower_global_avg(device)?,
            Layer::Crop(crop) => combine::cuda::crop(crop, device)?,
            Layer::Conv2d(_) | Layer::ConvTranspose2d(_) | Layer::Linear(_) => return Ok(None),
            other => {
                let (name, kind) = (&unit.name, other.kind());
                return Err(Error::Unsupported(format!(
                    "layer {name}: {kind} is not trained on a device here"
                )));
            }
        },
        _ => return Ok(None),
    }))
}

/// A convolution.
pub(super) fn conv_filter(conv: &Conv2d) -> Filter {
    let [top, left, ..] = conv.padding;
    Filter {
        window: ConvWindow {
            kernel: conv.kernel,
            stride: conv.stride,
            dilation: conv.dilation,
            pad: [top, left],
        },
        groups: conv.groups,
        inputs: conv.in_channels,
        outputs: conv.out_channels,
    }
}

/// The convolution whose input's gradient a transposed one is.
pub(super) fn transposed_filter(conv: &ConvTranspose2d) -> Filter {
    let [top, left, ..] = conv.padding;
    let window = ConvWindow { kernel: conv.kernel, stride: conv.stride, dilation: [1; 2], pad: [top, left] };
    Filter { window, groups: conv.groups, inputs: conv.out_channels, outputs: conv.in_channels }
}

/// A linear layer of maps of this size: a convolution whose window is the whole map.
pub(super) fn linear_filter(linear: &Linear, x: Shape) -> Filter {
    let window = ConvWindow { kernel: [x.h, x.w], stride: [1; 2], dilation: [1; 2], pad: [0; 2] };
    Filter { window, groups: 1, inputs: x.c, outputs: linear.out_features }
}

/// Whether what readers of a unit see lies apart from what its operation left: where the backward pass needs both.
pub(super) fn lies_apart(unit: &Unit) -> bool {
    let own = matches!(&unit.op, Op::Plain { layer: Layer::Activation(_), .. });
    unit.norm.is_some() || (own && unit.slope != 1.0)
}

/// The boxes of an input as a map, where those of all inputs, `rows` of each, lie one behind the other.
pub(super) fn boxes_map<'a>(buffer: &'a Room, rows: &[usize], input: usize) -> Result<MapIn<'a>> {
    let (first, own) = (rows.iter().take(input).sum::<usize>(), rows.get(input));
    let own = *own.ok_or_else(|| Error::Internal("boxes that were not chosen".into()))?;
    let view = DeviceView::new(Element::F32, Shape::new(own, 5, 1, 1), 20 * first);
    Ok(MapIn { buffer: buffer.there()?, view })
}

impl DeviceEngine {
    /// Runs units `range` on what is on the device, with the batch's statistics, which move the running ones.
    pub(super) fn run(&mut self, range: Range<usize>) -> Result<()> {
        self.store.device_changes();
        range.into_iter().try_for_each(|u| self.forward_unit(u))
    }

    fn forward_unit(&mut self, u: usize) -> Result<()> {
        let unit = &self.walk.units[u];
        if matches!(unit.op, Op::Boxes(_)) {
            return Ok(());
        }
        let apart = lies_apart(unit);
        self.batch.reserve(u, &self.ops, apart, matches!(unit.op, Op::MaxPool(_)))?;
        let Self { batch, ops, store, plain, .. } = self;
        let to = if apart { batch.left(u)? } else { batch.seen(u)? };
        // What the operation itself applies of the activation.
        let own = if apart { 1.0 } else { unit.slope };
        let x = || batch.seen(unit.inputs[0]);
        let value = |p: &ParamId| store.value(*p);
        let mut activated = false;
        match &unit.op {
            Op::Input(_) => {
                let table = self.table.as_ref().ok_or_else(|| Error::Internal("no table".into()))?;
                ops.network_input(self.pixels.there()?, &table.1, table.0.channel, to)?;
            }
            Op::Conv { conv, weight, bias } | Op::Depthwise { conv, weight, bias } => {
                let bias = bias.as_ref().map(value);
                ops.conv(&conv_filter(conv), store.value(*weight), bias, x()?, to, own)?;
                activated = true;
            }
            Op::Sum { .. } => {
                let inputs = unit.inputs.iter().map(|&i| batch.seen(i)).collect::<Result<Vec<_>>>()?;
                ops.sum(&inputs, to, own)?;
                activated = true;
            }
            Op::Concat => {
                let mut first = 0;
                for &i in &unit.inputs {
                    let from = batch.seen(i)?;
                    let channels = from.view.shape.c;
                    let part = MapIn { view: to.view.channels(first, channels), ..to };
                    ops.taken_back(Taken::From([0; 2]), from, part, false)?;
                    first += channels;
                }
            }
            Op::MaxPool(pool) => {
                let [top, left, ..] = pool.padding;
                let (kernel, stride, pad) = (pool.kernel, pool.stride, [top, left]);
                let pool = Pool { kernel, stride, pad, taps: batch.taps(u)? };
                ops.max_pool(&pool, x()?, to)?;
            }
            Op::RoiAlign { boxes, .. } => {
                let boxes = boxes_map(&self.boxes, &self.box_rows, *boxes)?;
                ops.run(op_of(plain, u)?, &[x()?, boxes], to)?;
            }
            Op::Plain { layer, params } => {
                let bias = params.get(1).map(value);
                match layer {
                    Layer::Conv2d(conv) => {
                        ops.conv(&conv_filter(conv), value(&params[0]), bias, x()?, to, own)?;
                        activated = true;
                    }
                    Layer::Linear(linear) => {
                        let filter = linear_filter(linear, x()?.view.shape);
                        ops.conv(&filter, value(&params[0]), bias, x()?, to, own)?;
                        activated = true;
                    }
                    Layer::ConvTranspose2d(conv) => {
                        ops.conv_back(&transposed_filter(conv), value(&params[0]), bias, x()?, to, false)?;
                    }
                    _ => ops.run(op_of(plain, u)?, &[x()?], to)?,
                }
            }
            Op::Bilinear => ops.run(op_of(plain, u)?, &[x()?], to)?,
            Op::Boxes(_) => {}
        }
        let Some(norm) = &unit.norm else {
            if !activated && unit.slope != 1.0 {
                ops.activate(to, batch.seen(u)?, unit.slope)?;
            }
            return Ok(());
        };
        let (shape, frozen) = (batch.shapes[u], self.walk.frozen_norm[u]);
        if !frozen && shape.n * shape.h * shape.w < 2 {
            return Err(Error::InvalidArgument(format!(
                "{}: a batch normalisation trains on two or more values a channel; use a larger batch or picture",
                unit.name
            )));
        }
        ops.normalise(&store.norm(u, norm, frozen), to, batch.seen(u)?, unit.slope)
    }
}

fn op_of(plain: &[Option<DeviceOp>], u: usize) -> Result<&DeviceOp> {
    plain[u].as_ref().ok_or_else(|| Error::Internal("a unit without an operation".into()))
}
