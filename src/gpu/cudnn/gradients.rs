//! Gradients of convolutions by cuDNN 9, with respect to the input and to the weights.
//!
//! cudnnConvolutionBackwardData and cudnnConvolutionBackwardFilter take maps and filter of one type and sum in f32 (FLOAT_CONFIG and
//! PSEUDO_BFLOAT16_CONFIG of its documentation): of maps in bf16 the weights' gradient comes in bf16, rounded once. With a filter in NHWC
//! both maps have to be packed: what lies behind a pixel's channels counts as channels of zeros.
//!
//! Of the algorithms only ALGO_1 of both is asked for, which gives the same bits every time. ALGO_0 of both and ALGO_3 of the weights'
//! gradient add by atomics, in whatever order blocks come to it; the transforms (FFT, Winograd) are not for filters in NHWC.

use super::{
    is_countable, is_refusal, is_symmetric, math, sys, Convolution, Cudnn, Filter, Handle, Owned, Status,
    Tensor,
};
use crate::error::Result;
use crate::gpu::driver::Stream;
use crate::gpu::fused::Side;
use crate::gpu::probe::{functions, Library};
use std::ffi::c_void;
use std::ptr::from_ref;
use std::sync::Arc;

const DATA: sys::cudnnConvolutionBwdDataAlgo_t =
    sys::cudnnConvolutionBwdDataAlgo_t::CUDNN_CONVOLUTION_BWD_DATA_ALGO_1;
const FILTER: sys::cudnnConvolutionBwdFilterAlgo_t =
    sys::cudnnConvolutionBwdFilterAlgo_t::CUDNN_CONVOLUTION_BWD_FILTER_ALGO_1;

/// Most bytes of workspace: what our own kernels' sums may take.
const WORKSPACE: usize = 64 << 20;

functions! {
    /// What is called of cuDNN for gradients.
    Api of Library::Cudnn;
    cudnnGetConvolutionBackwardDataWorkspaceSize(
        Handle, Filter, Tensor, Convolution, Tensor, sys::cudnnConvolutionBwdDataAlgo_t, *mut usize,
    ) -> Status;
    cudnnConvolutionBackwardData(
        Handle, *const c_void, Filter, *const c_void, Tensor, *const c_void, Convolution,
        sys::cudnnConvolutionBwdDataAlgo_t, *mut c_void, usize, *const c_void, Tensor, *mut c_void,
    ) -> Status;
    cudnnGetConvolutionBackwardFilterWorkspaceSize(
        Handle, Tensor, Tensor, Convolution, Filter, sys::cudnnConvolutionBwdFilterAlgo_t, *mut usize,
    ) -> Status;
    cudnnConvolutionBackwardFilter(
        Handle, *const c_void, Tensor, *const c_void, Tensor, *const c_void, Convolution,
        sys::cudnnConvolutionBwdFilterAlgo_t, *mut c_void, usize, *const c_void, Filter, *mut c_void,
    ) -> Status;
}

/// With respect to what a gradient is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(in crate::gpu) enum Gradient {
    /// The map that the convolution read.
    Input,
    /// Its weights.
    Weights,
}

/// A gradient of a convolution of one group; everything of it but the addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(in crate::gpu) struct ConvGradient {
    /// With respect to what.
    pub of: Gradient,
    /// Rows and columns of the window.
    pub kernel: [usize; 2],
    /// Vertical and horizontal.
    pub stride: [usize; 2],
    /// Vertical and horizontal.
    pub dilation: [usize; 2],
    /// Above and to the left.
    pub pad: [usize; 2],
    /// What the convolution read, or its gradient.
    pub input: Side,
    /// The gradient of its output.
    pub output: Side,
}

impl ConvGradient {
    /// Weights, `[output channel][tap][input channel]`, those of the zeros behind the maps' channels with them.
    pub fn weights(&self) -> usize {
        self.output.channels * self.kernel[0] * self.kernel[1] * self.input.channels
    }

    /// Whether the calls can say it: one type, packed maps, a symmetric padding.
    fn is_expressible(&self) -> bool {
        let axis = |i: usize| {
            let window = [self.kernel[i], self.stride[i], self.dilation[i], self.pad[i]];
            is_symmetric(window, self.input.size[i + 1], self.output.size[i + 1])
        };
        let packed = |side: &Side| side.pixel == side.channels && is_countable(side);
        self.input.element == self.output.element
            && self.weights() <= i32::MAX as usize
            && [&self.input, &self.output].into_iter().all(packed)
            && axis(0)
            && axis(1)
    }
}

/// Addresses of what a call reads and writes.
#[derive(Clone, Copy)]
pub(in crate::gpu) struct GradientPointers {
    /// First element of what the convolution read, or of its gradient.
    pub input: u64,
    /// First element of the output's gradient.
    pub output: u64,
    /// First weight, or of their gradient.
    pub weights: u64,
    /// As many bytes as are asked for, at a multiple of 256.
    pub workspace: u64,
}

/// The calls for gradients, of a device's cuDNN.
pub(in crate::gpu) struct CudnnGradients {
    library: Arc<Cudnn>,
    api: Api,
}

impl CudnnGradients {
    /// Errors: [`Error::Unsupported`](crate::Error::Unsupported) where it lacks them.
    pub fn open(library: Arc<Cudnn>) -> Result<Self> {
        Ok(Self { library, api: Api::open()? })
    }

    /// Descriptors of a gradient; None where the calls have no way to say it, where cuDNN does not compute it, or only with more than
    /// [`WORKSPACE`].
    pub fn describe(&self, gradient: &ConvGradient) -> Result<Option<CudnnGradient>> {
        if !gradient.is_expressible() {
            return Ok(None);
        }
        let ConvGradient { input, output, kernel: [rows, columns], .. } = *gradient;
        let (pad, stride, dilation) = (gradient.pad, gradient.stride, gradient.dilation);
        let library = &self.library;
        let mut made = CudnnGradient {
            of: gradient.of,
            input: library.tensor(&input)?,
            output: library.tensor(&output)?,
            filter: library.filter(input.element, [output.channels, input.channels, rows, columns])?,
            conv: library.convolution(pad, stride, dilation, math(input.element, false))?,
            workspace: 0,
        };
        let Some(bytes) = self.workspace(&made)? else { return Ok(None) };
        made.workspace = bytes;
        Ok(Some(made))
    }

    /// Bytes of workspace; None where cuDNN does not compute it, or only with more than [`WORKSPACE`].
    fn workspace(&self, g: &CudnnGradient) -> Result<Option<usize>> {
        let _current = self.library.context.bind()?;
        let handle = self.library.handle.lock().unwrap_or_else(|e| e.into_inner());
        let (x, y, w, conv, mut bytes) = (g.input.raw, g.output.raw, g.filter.raw, g.conv.raw, 0);
        // SAFETY: the descriptors live and the handle is ours alone as long as it is locked.
        let (call, status) = unsafe {
            match g.of {
                Gradient::Input => (
                    "cudnnGetConvolutionBackwardDataWorkspaceSize",
                    (self.api.cudnnGetConvolutionBackwardDataWorkspaceSize)(
                        *handle, w, y, conv, x, DATA, &mut bytes,
                    ),
                ),
                Gradient::Weights => (
                    "cudnnGetConvolutionBackwardFilterWorkspaceSize",
                    (self.api.cudnnGetConvolutionBackwardFilterWorkspaceSize)(
                        *handle, x, y, conv, w, FILTER, &mut bytes,
                    ),
                ),
            }
        };
        if is_refusal(status) {
            return Ok(None);
        }
        self.library.api.check(call, status)?;
        Ok((bytes <= WORKSPACE).then_some(bytes))
    }

    /// Gives the gradient to the stream, which writes it or, where `add` says so, adds it to what is there. False where cuDNN does not
    /// compute it: it says so at once, and nothing was given.
    ///
    /// # Safety
    /// The addresses are of maps and weights as described, and of as many bytes of workspace, in that order of work.
    pub unsafe fn launch(
        &self,
        stream: &Stream,
        g: &CudnnGradient,
        at: &GradientPointers,
        add: bool,
    ) -> Result<bool> {
        let _current = self.library.context.bind()?;
        let handle = self.library.handle.lock().unwrap_or_else(|e| e.into_inner());
        let (one, beta) = (1.0f32, if add { 1.0f32 } else { 0.0 });
        let (alpha, beta) = (from_ref(&one).cast(), from_ref(&beta).cast());
        let pointer = |address: u64| std::ptr::with_exposed_provenance_mut::<c_void>(address as usize);
        let [input, output, weights, room] = [at.input, at.output, at.weights, at.workspace].map(pointer);
        let (x, y, w, conv, bytes) = (g.input.raw, g.output.raw, g.filter.raw, g.conv.raw, g.workspace);
        let library = &self.library.api;
        // SAFETY: the caller's contract; the descriptors live and the handle is ours alone as long as it is locked.
        let (call, status) = unsafe {
            library.check("cudnnSetStream", (library.cudnnSetStream)(*handle, stream.raw().cast()))?;
            match g.of {
                Gradient::Input => (
                    "cudnnConvolutionBackwardData",
                    (self.api.cudnnConvolutionBackwardData)(
                        *handle, alpha, w, weights, y, output, conv, DATA, room, bytes, beta, x, input,
                    ),
                ),
                Gradient::Weights => (
                    "cudnnConvolutionBackwardFilter",
                    (self.api.cudnnConvolutionBackwardFilter)(
                        *handle, alpha, x, input, y, output, conv, FILTER, room, bytes, beta, w, weights,
                    ),
                ),
            }
        };
        if is_refusal(status) {
            return Ok(false);
        }
        library.check(call, status).map(|()| true)
    }
}

/// A gradient's descriptors; they say nothing of addresses.
pub(in crate::gpu) struct CudnnGradient {
    of: Gradient,
    input: Owned<Tensor>,
    output: Owned<Tensor>,
    filter: Owned<Filter>,
    conv: Owned<Convolution>,
    workspace: usize,
}

impl CudnnGradient {
    /// Bytes of workspace.
    pub fn workspace(&self) -> usize {
        self.workspace
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::map::Element;

    fn gradient(rows: usize, out_rows: usize, stride: usize, pad: usize) -> ConvGradient {
        let side = |rows: usize, channels: usize| Side {
            element: Element::Bf16,
            size: [2, rows, rows],
            channels,
            pixel: channels,
            align: 256,
        };
        ConvGradient {
            of: Gradient::Weights,
            kernel: [3; 2],
            stride: [stride; 2],
            dilation: [1; 2],
            pad: [pad; 2],
            input: side(rows, 8),
            output: side(out_rows, 16),
        }
    }

    #[test]
    fn gradients_that_the_calls_cannot_say_are_our_kernels() {
        let good = gradient(9, 5, 2, 1);
        assert!(good.is_expressible() && gradient(8, 4, 2, 1).is_expressible());
        assert!(!gradient(8, 7, 1, 1).is_expressible(), "a row of padding on one side alone");
        let parts = Side { pixel: 24, ..good.input };
        assert!(!ConvGradient { input: parts, ..good }.is_expressible(), "channels of a wider map");
        let single = Side { element: Element::F32, ..good.output };
        assert!(!ConvGradient { output: single, ..good }.is_expressible(), "two types");
        let apart = Side { align: 4, ..good.output };
        assert!(!ConvGradient { output: apart, ..good }.is_expressible(), "unaligned");
        assert_eq!(good.weights(), 16 * 9 * 8);
    }
}
