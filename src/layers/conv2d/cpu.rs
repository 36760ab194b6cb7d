//! Lowering of convolutions to the CPU kernels.

use super::Conv2d;
use crate::cpu::arena::Storage;
use crate::cpu::conv::{multiplies_pairs, ConvOp, Formats, Residual, Window};
use crate::cpu::depthwise::DepthwiseOp;
use crate::cpu::program::Kind;
use crate::cpu::winograd::WinogradOp;
use crate::cpu::{Isa, Op};
use crate::error::Result;
use std::ops::RangeInclusive;
use std::sync::Arc;

/// The op for `conv` with folded `weight` and `bias`; `rule` is the slope of its activation `max(x, slope * x)` and the place
/// where a second input is added.
pub(crate) fn lower(
    conv: &Conv2d,
    isa: Isa,
    weight: &[f32],
    bias: &[f32],
    rule: (f32, Residual),
    formats: Formats,
) -> Result<Op> {
    let Conv2d { kernel, stride, dilation, padding, groups, in_channels, out_channels, .. } = *conv;
    let window = Window { kernel, stride, dilation, padding };
    // A window of one channel is either, and faster so.
    let stored_alike = formats.input.storage == formats.output.storage;
    let plain = kernel != [1, 1] && rule.1 == Residual::None && stored_alike;
    let single = (in_channels, out_channels) == (1, 1) && plain;
    if conv.is_depthwise() || single {
        return Ok(Op(Kind::Depthwise(Arc::new(DepthwiseOp::new(
            isa,
            window,
            in_channels,
            weight,
            bias,
            rule.0,
            [formats.input, formats.output],
        )))));
    }
    let channels = [in_channels, out_channels];
    if winograd_pays(conv, &formats, isa) {
        let op = WinogradOp::new(isa, padding, channels, weight, bias, rule, formats)?;
        return Ok(Op(Kind::Winograd(op)));
    }
    Ok(Op(Kind::Conv(Arc::new(ConvOp::new(isa, window, groups, channels, weight, bias, rule, formats)))))
}

/// Channels, at either side, with which Winograd's algorithm is the faster: with fewer its transforms take longer than they
/// save, with more its weights, four times as large as the kernels, are what it waits for.
const WINOGRAD_CHANNELS: RangeInclusive<usize> = 16..=512;
/// Likewise where the plain sum is of bf16 or f16, with twice the speed of f32.
const WINOGRAD_CHANNELS_HALF: RangeInclusive<usize> = 64..=256;
/// Likewise where it is of pairs of u8: at bf16's rate, by weights that are sixteen times as small as the transformed ones.
const WINOGRAD_CHANNELS_PAIRS: RangeInclusive<usize> = 64..=128;

/// Whether a convolution is computed by Winograd's algorithm, in f32 whatever its tensors are stored as.
fn winograd_pays(conv: &Conv2d, formats: &Formats, isa: Isa) -> bool {
    let channels = match formats.input.storage {
        Storage::U8 if multiplies_pairs(isa) => WINOGRAD_CHANNELS_PAIRS,
        Storage::U8 => return false,
        // Of a layer that stays in f32, whose output alone is u8: never measured.
        _ if formats.output.storage == Storage::U8 => return false,
        Storage::Bf16 if isa.has_tiles() => return false,
        Storage::Bf16 if isa.multiplies_bf16() => WINOGRAD_CHANNELS_HALF,
        Storage::F16 if isa.multiplies_f16() => WINOGRAD_CHANNELS_HALF,
        _ => WINOGRAD_CHANNELS,
    };
    let plain = conv.kernel == [3, 3] && conv.stride == [1, 1] && conv.dilation == [1, 1] && conv.groups == 1;
    plain && [conv.in_channels, conv.out_channels].iter().all(|c| channels.contains(c))
}
