//! Convolutions forward and backward, transposed ones by the same means.
//!
//! The gradient of a convolution's input is a convolution of the output's gradient with the weights turned round. With a stride, the
//! input's pixels fall into phases (of stride 2, four), each of which meets other taps of the kernel and at each of them neighbouring
//! pixels of the gradient: a convolution of stride 1 a phase, which writes every second pixel.

use super::library::{Pass, Task};
use super::phase::{every, Phase};
use super::{fits, kernels, MapIn, TrainOps, Values};
use crate::error::{Error, Result};
use crate::gpu::map::{DeviceView, Element, Map};
use crate::gpu::ops::conv::{pair, ConvArgs, ConvWindow, DepthwiseArgs, Joined};
use crate::gpu::ops::{blocks, THREADS};

kernels! {
    /// Of `cuda/train_conv.cu`, but for the tiles.
    pub(super) Plain of TrainConv:
    pack_weights, conv_weights_any, conv_weights_finish, depthwise_weights, depthwise_data,
}

/// A convolution, whose weights are `[outputs][inputs / groups][rows][columns]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Filter {
    /// Its window.
    pub window: ConvWindow,
    /// Groups.
    pub groups: usize,
    /// Input channels.
    pub inputs: usize,
    /// Output channels.
    pub outputs: usize,
}

impl Filter {
    pub(super) fn taps(&self) -> usize {
        self.window.kernel[0] * self.window.kernel[1]
    }

    pub(super) fn weights(&self) -> usize {
        self.outputs * (self.inputs / self.groups.max(1)) * self.taps()
    }

    /// One filter a channel, of which there are several.
    pub(super) fn is_depthwise(&self) -> bool {
        self.groups > 1 && self.groups == self.inputs && self.groups == self.outputs
    }

    pub(super) fn check(&self, weights: &Values<'_>) -> Result<u64> {
        let w = &self.window;
        let whole = self.groups > 0
            && self.inputs.is_multiple_of(self.groups)
            && self.outputs.is_multiple_of(self.groups)
            && [w.kernel, w.stride, w.dilation].concat().iter().all(|v| (1..1 << 16).contains(v));
        if !whole || self.groups >= 1 << 16 || self.taps() >= 1 << 16 {
            return Err(Error::Internal(format!("a convolution {self:?} on a device")));
        }
        weights.address(self.weights())
    }
}

/// `PackArgs` of `cuda/train_conv.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct PackArgs {
    from: u64,
    to: u64,
    rows: i32,
    channels: i32,
    element: i32,
    outputs: i32,
    inputs: i32,
    groups: i32,
    kernel: [i32; 2],
    turned: i32,
    first: [i32; 2],
    step: [i32; 2],
    count: [i32; 2],
}

/// `DepthwiseDataArgs` of `cuda/train_conv.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct DepthwiseDataArgs {
    gradient: Map,
    input: Map,
    weights: u64,
    kernel: [i32; 2],
    stride: [i32; 2],
    dilation: [i32; 2],
    pad: [i32; 2],
    add: i32,
}

impl TrainOps {
    /// Writes max(v, slope * v) to `y`, v the convolution of `x` with `weights`, and `bias` where there is one.
    pub fn conv(
        &mut self,
        filter: &Filter,
        weights: Values<'_>,
        bias: Option<Values<'_>>,
        x: MapIn<'_>,
        y: MapIn<'_>,
        slope: f32,
    ) -> Result<()> {
        let weights = filter.check(&weights)?;
        fits("a convolution", &[(&x, filter.inputs), (&y, filter.outputs)])?;
        self.by_the_fastest(&Task { pass: Pass::Forward { bias, slope }, filter, x, y, weights })
    }

    /// As [`TrainOps::conv`], by our kernels, of weights at this address.
    pub(super) fn conv_own(
        &mut self,
        filter: &Filter,
        from: u64,
        bias: Option<Values<'_>>,
        x: MapIn<'_>,
        y: MapIn<'_>,
        slope: f32,
    ) -> Result<()> {
        let bias = self.bias(bias, filter.outputs)?;
        let w = &filter.window;
        let (kernel, stride, dilation, pad) = (pair(w.kernel), pair(w.stride), pair(w.dilation), pair(w.pad));
        let (input, output) = (x.map()?, y.map()?);
        if filter.is_depthwise() {
            if x.view.element != self.element {
                return Err(Error::Internal("a depthwise convolution of another type".into()));
            }
            let weights = self.pack_depthwise(filter, from)?;
            let args = DepthwiseArgs { input, output, weights, bias, kernel, stride, dilation, pad, slope };
            let s = y.view.shape;
            let threads = s.n * s.h * s.w * (s.c + y.view.tail).div_ceil(8);
            // SAFETY: maps, weights and bias lie in their buffers and have the sizes; the args are the kernel's struct.
            return unsafe { self.depthwise.launch(&self.stream, blocks(threads), THREADS, 0, &args) };
        }
        let (weights, channels) = self.pack(filter, from)?;
        let args = ConvArgs {
            input,
            output,
            add: Map::default(),
            weights,
            bias,
            kernel,
            stride,
            dilation,
            pad,
            channels: channels as i32,
            groups: filter.groups as i32,
            residual: Joined::No as i32,
            slope,
            split: 1,
            parts: 0,
        };
        // SAFETY: as above.
        unsafe { self.launch_conv(&x.absolute()?, args) }
    }

    /// Launches a convolution, with room for the parts of its depth.
    ///
    /// # Safety
    /// As [`ConvKernels::launch`](crate::gpu::ops::conv::ConvKernels::launch).
    unsafe fn launch_conv(&mut self, input: &DeviceView, args: ConvArgs) -> Result<()> {
        let bytes = self.conv.workspace(input, &args);
        let parts = if bytes > 0 { self.partial.bytes(&self.device, bytes)? } else { 0 };
        // SAFETY: the caller's contract; the parts are read before the stream comes to who writes there next.
        unsafe { self.conv.launch(&self.stream, input, &ConvArgs { parts, ..args }) }
    }

    /// Writes the gradient of the convolution's input to `x`, or adds it, from that of its output, `d`. With a `bias` it is the
    /// transposed convolution of `d`.
    pub fn conv_back(
        &mut self,
        filter: &Filter,
        weights: Values<'_>,
        bias: Option<Values<'_>>,
        d: MapIn<'_>,
        x: MapIn<'_>,
        add: bool,
    ) -> Result<()> {
        let from = filter.check(&weights)?;
        fits("a convolution's gradient", &[(&x, filter.inputs), (&d, filter.outputs)])?;
        match bias {
            None => self.by_the_fastest(&Task { pass: Pass::Input { add }, filter, x, y: d, weights: from }),
            Some(_) => self.conv_back_own(filter, from, bias, d, x, add),
        }
    }

    /// As [`TrainOps::conv_back`], by our kernels, of weights at this address.
    pub(super) fn conv_back_own(
        &mut self,
        filter: &Filter,
        from: u64,
        bias: Option<Values<'_>>,
        d: MapIn<'_>,
        x: MapIn<'_>,
        add: bool,
    ) -> Result<()> {
        let (gradient, input) = (d.map()?, x.map()?);
        let w = &filter.window;
        if filter.is_depthwise() && bias.is_none() {
            let weights = self.pack_depthwise(filter, from)?;
            let (kernel, stride, dilation, pad) =
                (pair(w.kernel), pair(w.stride), pair(w.dilation), pair(w.pad));
            let add = add.into();
            let args = DepthwiseDataArgs { gradient, input, weights, kernel, stride, dilation, pad, add };
            let s = x.view.shape;
            let threads = s.n * s.h * s.w * (s.c + x.view.tail).div_ceil(8);
            // SAFETY: as above.
            return unsafe {
                self.weights.plain.depthwise_data.launch(&self.stream, blocks(threads), THREADS, 0, &args)
            };
        }
        let only_taps = add && bias.is_none();
        let bias = self.bias(bias, filter.inputs)?;
        let size = [x.view.shape.h, x.view.shape.w];
        let phases = |axis: usize| {
            (0..w.stride[axis])
                .map(move |start| {
                    Phase::of(
                        start,
                        size[axis],
                        w.kernel[axis],
                        w.stride[axis],
                        w.dilation[axis],
                        w.pad[axis],
                    )
                })
                .filter(|phase| phase.len > 0)
        };
        for down in phases(0) {
            for over in phases(1) {
                if only_taps && down.count * over.count == 0 {
                    continue;
                }
                let (weights, channels) = self.pack_turned(filter, from, [down, over])?;
                let output = every(&input, x.view.element, [down, over], w.stride);
                let args = ConvArgs {
                    input: gradient,
                    output,
                    add: if add { output } else { Map::default() },
                    weights,
                    bias,
                    kernel: [down.count as i32, over.count as i32],
                    stride: [1, 1],
                    dilation: [down.dilation, over.dilation],
                    pad: [down.pad, over.pad],
                    channels: channels as i32,
                    groups: filter.groups as i32,
                    residual: if add { Joined::Before } else { Joined::No } as i32,
                    slope: 1.0,
                    split: 1,
                    parts: 0,
                };
                // SAFETY: as above; a thread reads of the residual what it writes itself.
                unsafe { self.launch_conv(&d.absolute()?, args)? };
            }
        }
        Ok(())
    }

    /// The address of a bias of `len` values, zeros where there is none.
    fn bias(&mut self, bias: Option<Values<'_>>, len: usize) -> Result<u64> {
        bias.map_or_else(|| self.zeros(len), |b| b.address(len))
    }

    /// The address of a convolution's weights as its kernels read them, and the channels of a tap with the padding.
    fn pack(&mut self, f: &Filter, from: u64) -> Result<(u64, usize)> {
        let channels = (f.inputs / f.groups).next_multiple_of(self.element.vector());
        Ok((self.pack_to(f, from, [f.outputs, channels], self.element)?, channels))
    }

    /// The address of the weights as `[row][tap][channel]`, so many rows and channels of them, zeros where there are more than the
    /// convolution has.
    pub(super) fn pack_to(
        &mut self,
        f: &Filter,
        from: u64,
        [rows, channels]: [usize; 2],
        element: Element,
    ) -> Result<u64> {
        self.launch_pack(PackArgs {
            from,
            to: 0,
            rows: rows as i32,
            channels: channels as i32,
            element: element as i32,
            outputs: f.outputs as i32,
            inputs: (f.inputs / f.groups) as i32,
            groups: f.groups as i32,
            kernel: pair(f.window.kernel),
            turned: 0,
            first: [0; 2],
            step: [1; 2],
            count: pair(f.window.kernel),
        })
    }

    /// As [`TrainOps::pack`], for the gradient of a phase of the input.
    fn pack_turned(&mut self, f: &Filter, from: u64, [down, over]: [Phase; 2]) -> Result<(u64, usize)> {
        let channels = (f.outputs / f.groups).next_multiple_of(self.element.vector());
        let both = |of: fn(&Phase) -> usize| [of(&down) as i32, of(&over) as i32];
        let args = PackArgs {
            from,
            to: 0,
            rows: f.inputs as i32,
            channels: channels as i32,
            element: self.element as i32,
            outputs: f.outputs as i32,
            inputs: (f.inputs / f.groups) as i32,
            groups: f.groups as i32,
            kernel: pair(f.window.kernel),
            turned: 1,
            first: both(|p| p.first),
            step: both(|p| p.step),
            count: both(|p| p.count),
        };
        Ok((self.launch_pack(args)?, channels))
    }

    /// The address of a depthwise convolution's weights as `[tap][channel]`, f32: one row turned round, whose taps run backwards from the
    /// last.
    fn pack_depthwise(&mut self, f: &Filter, from: u64) -> Result<u64> {
        let kernel = pair(f.window.kernel);
        self.launch_pack(PackArgs {
            from,
            to: 0,
            rows: 1,
            channels: f.outputs as i32,
            element: Element::F32 as i32,
            outputs: f.outputs as i32,
            inputs: 1,
            groups: 1,
            kernel,
            turned: 1,
            first: kernel.map(|k| k - 1),
            step: [-1; 2],
            count: kernel,
        })
    }

    /// The address of `bias` in this type, `channels` values of it, zeros where there are more than it has.
    pub(super) fn whole_bias(
        &mut self,
        bias: Option<Values<'_>>,
        len: usize,
        channels: usize,
        element: Element,
    ) -> Result<u64> {
        let Some(bias) = bias else { return self.zeros(channels) };
        let from = bias.address(len)?;
        if element == Element::F32 && len == channels && from.is_multiple_of(16) {
            return Ok(from);
        }
        let to = self.low_bias.bytes(&self.device, channels * 4)?;
        let one = [1; 2];
        let args = PackArgs {
            from,
            to,
            rows: 1,
            channels: channels as i32,
            element: element as i32,
            outputs: 1,
            inputs: len as i32,
            groups: 1,
            kernel: one,
            turned: 0,
            first: [0; 2],
            step: one,
            count: one,
        };
        // SAFETY: a bias is a row of one tap; there is room for it.
        unsafe { self.weights.plain.pack_weights.launch(&self.stream, blocks(channels), THREADS, 0, &args)? };
        Ok(to)
    }

    fn launch_pack(&mut self, args: PackArgs) -> Result<u64> {
        let values = args.rows as usize * args.channels as usize * (args.count[0] * args.count[1]) as usize;
        if values > i32::MAX as usize {
            return Err(Error::LimitExceeded("a convolution's weights are too large for the device".into()));
        }
        let to = self.packed.bytes(&self.device, values * 4)?;
        // SAFETY: the weights are there, as `Filter::check` has seen, and there is room for the packed ones.
        unsafe {
            let kernel = &self.weights.plain.pack_weights;
            kernel.launch(&self.stream, blocks(values), THREADS, 0, &PackArgs { to, ..args })?;
        }
        Ok(to)
    }
}
