//! Depthwise convolution steps: weights in units of the output, and the kernel's call over a share of the rows.

use super::arena::{Arena, Format, View};
use super::conv::Window;
use super::isa::Isa;
use super::kernels::depthwise::DepthwiseArgs;
use super::kernels::Kernels;
use super::part::Part;
use std::ops::Range;

/// A depthwise convolution; batch normalisation that could not be folded is one with a 1x1 window. Its input and output are
/// stored the same way.
pub(crate) struct DepthwiseOp {
    pub window: Window,
    pub channels: usize,
    pub formats: [Format; 2],
    slope: f32,
    kernels: &'static Kernels,
    /// `[kh][kw][channels]`, from units of the input to those of the output.
    weights: Arena,
    bias: Arena,
}

impl DepthwiseOp {
    /// Packs `weight` `[channels, 1, kh, kw]` and `bias` `[channels]`.
    pub fn new(
        isa: Isa,
        window: Window,
        channels: usize,
        weight: &[f32],
        bias: &[f32],
        slope: f32,
        [input, output]: [Format; 2],
    ) -> Self {
        let taps = window.kernel[0] * window.kernel[1];
        assert_eq!(weight.len(), channels * taps);
        assert_eq!(bias.len(), channels);
        assert_eq!(input.storage, output.storage, "a depthwise convolution does not convert");
        let unit = input.scale / output.scale;
        let packed: Vec<f32> =
            (0..taps).flat_map(|t| (0..channels).map(move |c| weight[c * taps + t] * unit)).collect();
        // What a window of zeros sums up to is taken off.
        let zeros = |c: usize| packed[c..].iter().step_by(channels).sum::<f32>() * f32::from(input.zero);
        let bias: Vec<f32> = (0..channels).map(|c| bias[c] / output.scale - zeros(c)).collect();
        Self {
            window,
            channels,
            formats: [input, output],
            slope,
            kernels: Kernels::of(isa),
            weights: Arena::from_slice(&packed),
            bias: Arena::from_slice(&bias),
        }
    }

    /// Bytes of packed weights.
    pub fn bytes(&self) -> usize {
        self.weights.bytes() + self.bias.bytes()
    }

    /// The kernel's arguments but for where input and output are.
    fn args(&self, input: &View) -> DepthwiseArgs {
        let w = &self.window;
        DepthwiseArgs {
            input: std::ptr::null(),
            in_row: w.stride[0] * input.row,
            in_pixel: w.stride[1] * input.pixel,
            kernel: w.kernel,
            tap_row: w.dilation[0] * input.row,
            tap_pixel: w.dilation[1] * input.pixel,
            weights: self.weights.floats().as_ptr(),
            bias: self.bias.floats().as_ptr(),
            output: std::ptr::null_mut(),
            out_row: 0,
            out_pixel: 0,
            width: 0,
            channels: self.channels,
            slope: self.slope,
            zero: self.formats[1].zero.into(),
        }
    }

    /// As [`ConvOp::rows`].
    ///
    /// # Safety
    /// As [`ConvOp::rows`].
    pub unsafe fn rows(&self, [from, to]: [*const u8; 2], [input, output]: [&View; 2], rows: Range<usize>) {
        let args = DepthwiseArgs {
            input: from.wrapping_offset(self.window.start(rows.start, input)),
            output: to.cast_mut().wrapping_add(rows.start * output.row * output.storage.bytes()),
            out_row: output.row,
            out_pixel: output.pixel,
            width: output.shape.w,
            ..self.args(input)
        };
        // SAFETY: the caller's contract.
        unsafe { (self.kernels.depthwise(self.formats[0].storage))(&args, 0..rows.len()) };
    }

    /// Computes this thread's part of the output.
    ///
    /// # Safety
    /// As [`ConvOp::run`].
    pub unsafe fn run(&self, base: *mut u8, input: &View, output: &View, part: &Part) {
        let args = self.args(input);
        part.each([output.shape.h, output.shape.w], |n, rows, columns| {
            let first = self.window.first(input) + n * input.image + columns.start * args.in_pixel;
            // SAFETY: the caller's contract.
            unsafe {
                let args = DepthwiseArgs {
                    input: input.byte(base, first),
                    output: output.byte(base, output.at(n, 0, columns.start)),
                    out_row: output.row,
                    out_pixel: output.pixel,
                    width: columns.len(),
                    ..args
                };
                (self.kernels.depthwise(self.formats[0].storage))(&args, rows);
            }
        });
    }
}
