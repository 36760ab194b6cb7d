//! Convolutions by cuDNN 9: its fused call for convolution, bias, residual sum and ReLU.

#[cfg(feature = "train")]
mod gradients;

#[cfg(feature = "train")]
pub(in crate::gpu) use gradients::{ConvGradient, CudnnGradient, CudnnGradients, Gradient, GradientPointers};

use super::driver::{Context, Stream};
use super::fused::{FusedConv, Pointers, Side, WORKSPACE};
use super::map::Element;
use super::probe::{functions, Library};
use crate::error::{Error, Result};
use cudarc::cudnn::sys;
use std::ffi::{c_char, c_int, c_void, CStr};
use std::ptr::{from_ref, null_mut};
use std::sync::{Arc, Mutex};

type Status = c_int;
type Handle = sys::cudnnHandle_t;
type Tensor = sys::cudnnTensorDescriptor_t;
type Filter = sys::cudnnFilterDescriptor_t;
type Convolution = sys::cudnnConvolutionDescriptor_t;
type Activation = sys::cudnnActivationDescriptor_t;
/// A way of computing it.
pub(super) type Algorithm = sys::cudnnConvolutionFwdAlgo_t;

functions! {
    /// What is called of cuDNN.
    Api of Library::Cudnn;
    cudnnGetVersion() -> usize;
    cudnnGetErrorString(Status) -> *const c_char;
    cudnnCreate(*mut Handle) -> Status;
    cudnnDestroy(Handle) -> Status;
    cudnnSetStream(Handle, *mut c_void) -> Status;
    cudnnCreateTensorDescriptor(*mut Tensor) -> Status;
    cudnnSetTensorNdDescriptor(Tensor, sys::cudnnDataType_t, c_int, *const c_int, *const c_int) -> Status;
    cudnnDestroyTensorDescriptor(Tensor) -> Status;
    cudnnCreateFilterDescriptor(*mut Filter) -> Status;
    cudnnSetFilter4dDescriptor(
        Filter, sys::cudnnDataType_t, sys::cudnnTensorFormat_t, c_int, c_int, c_int, c_int,
    ) -> Status;
    cudnnDestroyFilterDescriptor(Filter) -> Status;
    cudnnCreateConvolutionDescriptor(*mut Convolution) -> Status;
    cudnnSetConvolution2dDescriptor(
        Convolution, c_int, c_int, c_int, c_int, c_int, c_int, sys::cudnnConvolutionMode_t, sys::cudnnDataType_t,
    ) -> Status;
    cudnnSetConvolutionMathType(Convolution, sys::cudnnMathType_t) -> Status;
    cudnnDestroyConvolutionDescriptor(Convolution) -> Status;
    cudnnCreateActivationDescriptor(*mut Activation) -> Status;
    cudnnSetActivationDescriptor(
        Activation, sys::cudnnActivationMode_t, sys::cudnnNanPropagation_t, f64,
    ) -> Status;
    cudnnDestroyActivationDescriptor(Activation) -> Status;
    cudnnGetConvolutionForwardWorkspaceSize(
        Handle, Tensor, Filter, Convolution, Tensor, Algorithm, *mut usize,
    ) -> Status;
    cudnnConvolutionBiasActivationForward(
        Handle, *const c_void, Tensor, *const c_void, Filter, *const c_void, Convolution, Algorithm,
        *mut c_void, usize, *const c_void, Tensor, *const c_void, Tensor, *const c_void, Activation, Tensor,
        *mut c_void,
    ) -> Status;
}

impl Api {
    /// An error that names the call, unless it succeeded.
    fn check(&self, call: &str, status: Status) -> Result<()> {
        if status == 0 {
            return Ok(());
        }
        // SAFETY: cuDNN returns a string of its own for every number.
        let text = unsafe { CStr::from_ptr((self.cudnnGetErrorString)(status)) }.to_string_lossy();
        Err(Error::Cuda(format!("{call} failed with {text} ({status})")))
    }
}

/// Calls a function of cuDNN and checks its result.
macro_rules! cudnn {
    ($api:expr, $function:ident($($argument:expr),* $(,)?)) => {
        $api.check(stringify!($function), ($api.$function)($($argument),*))
    };
}

/// Whether a status says that cuDNN does not compute this (CUDNN_STATUS_NOT_SUPPORTED and its kinds), rather than that something failed.
fn is_refusal(status: Status) -> bool {
    status / 1000 == 3
}

/// cuDNN on a device. Its handle must not be used by two threads at once: calls take turns, each with its caller's stream.
pub(super) struct Cudnn {
    context: Arc<Context>,
    api: Api,
    handle: Mutex<Handle>,
}

// SAFETY: the handle is used under its lock.
unsafe impl Send for Cudnn {}
// SAFETY: as above.
unsafe impl Sync for Cudnn {}

impl Cudnn {
    /// Errors: [`Error::Unsupported`] where there is none, or an older one than 9.
    pub fn open(context: &Arc<Context>) -> Result<Self> {
        let api = Api::open()?;
        // SAFETY: it takes nothing and returns a number.
        let version = unsafe { (api.cudnnGetVersion)() };
        // Counted as 90300 for 9.3.0; before 9 as 8907 for 8.9.7.
        if version < 90_000 {
            return Err(Error::Unsupported(format!("cuDNN is of version number {version}; 9 is needed")));
        }
        let _current = context.bind()?;
        let mut handle = null_mut();
        // SAFETY: a context is current; cuDNN writes the handle.
        unsafe { cudnn!(api, cudnnCreate(&mut handle))? };
        Ok(Self { context: context.clone(), api, handle: Mutex::new(handle) })
    }

    /// Descriptors of a convolution; None where the fused call has no way to say it.
    pub fn describe(&self, conv: &FusedConv) -> Result<Option<CudnnConv>> {
        if !is_expressible(conv) {
            return Ok(None);
        }
        let api = &self.api;
        let (element, channels) = (conv.input.element, conv.output.channels);
        let one_pixel = Side { size: [1; 3], pixel: channels, ..conv.output };
        let [rows, columns] = conv.kernel;
        let mode = if conv.relu {
            sys::cudnnActivationMode_t::CUDNN_ACTIVATION_RELU
        } else {
            sys::cudnnActivationMode_t::CUDNN_ACTIVATION_IDENTITY
        };
        let (create, destroy) = (api.cudnnCreateActivationDescriptor, api.cudnnDestroyActivationDescriptor);
        let activation = Owned::new(api, "cudnnCreateActivationDescriptor", create, destroy)?;
        let nan = sys::cudnnNanPropagation_t::CUDNN_NOT_PROPAGATE_NAN;
        // SAFETY: the descriptor was made above.
        unsafe { cudnn!(api, cudnnSetActivationDescriptor(activation.raw, mode, nan, 0.0))? };
        Ok(Some(CudnnConv {
            input: self.tensor(&conv.input)?,
            output: self.tensor(&conv.output)?,
            bias: self.tensor(&one_pixel)?,
            filter: self.filter(element, [channels, conv.input.channels, rows, columns])?,
            conv: self.convolution(conv.pad, conv.stride, conv.dilation, math(element, conv.tf32))?,
            activation,
            adds: conv.add.is_some(),
            algorithms: algorithms(conv),
        }))
    }

    /// Bytes of workspace that an algorithm takes; None where cuDNN does not compute this convolution by it, or only with more than
    /// [`WORKSPACE`].
    pub fn workspace(&self, conv: &CudnnConv, algorithm: Algorithm) -> Result<Option<usize>> {
        let _current = self.context.bind()?;
        let handle = self.handle.lock().unwrap_or_else(|e| e.into_inner());
        let mut bytes = 0;
        // SAFETY: the descriptors live and the handle is ours alone as long as it is locked.
        let status = unsafe {
            (self.api.cudnnGetConvolutionForwardWorkspaceSize)(
                *handle,
                conv.input.raw,
                conv.filter.raw,
                conv.conv.raw,
                conv.output.raw,
                algorithm,
                &mut bytes,
            )
        };
        if is_refusal(status) {
            return Ok(None);
        }
        self.api.check("cudnnGetConvolutionForwardWorkspaceSize", status)?;
        Ok((bytes <= WORKSPACE).then_some(bytes))
    }

    /// Gives the convolution to the stream. False where cuDNN does not compute it by this algorithm: it says so at once, and nothing
    /// was given.
    ///
    /// # Safety
    /// The addresses are of maps as described, and of as many bytes of workspace, in that order of work.
    pub unsafe fn launch(
        &self,
        stream: &Stream,
        conv: &CudnnConv,
        (algorithm, workspace): (Algorithm, usize),
        at: &Pointers,
    ) -> Result<bool> {
        let _current = self.context.bind()?;
        let handle = self.handle.lock().unwrap_or_else(|e| e.into_inner());
        let (one, zero) = (1.0f32, 0.0f32);
        let pointer = |address: u64| std::ptr::with_exposed_provenance_mut::<c_void>(address as usize);
        // Where nothing is added, the output stands for it: with a factor of 0 it is not read.
        let (factor, add) = if conv.adds { (&one, at.add) } else { (&zero, at.output) };
        // SAFETY: the caller's contract; the descriptors live and the handle is ours alone as long as it is locked.
        let status = unsafe {
            cudnn!(self.api, cudnnSetStream(*handle, stream.raw().cast()))?;
            (self.api.cudnnConvolutionBiasActivationForward)(
                *handle,
                from_ref(&one).cast(),
                conv.input.raw,
                pointer(at.input),
                conv.filter.raw,
                pointer(at.weights),
                conv.conv.raw,
                algorithm,
                pointer(at.workspace),
                workspace,
                from_ref(factor).cast(),
                conv.output.raw,
                pointer(add),
                conv.bias.raw,
                pointer(at.bias),
                conv.activation.raw,
                conv.output.raw,
                pointer(at.output),
            )
        };
        if is_refusal(status) {
            return Ok(false);
        }
        self.api.check("cudnnConvolutionBiasActivationForward", status).map(|()| true)
    }

    /// N, C, H, W with the strides of channels last.
    fn tensor(&self, side: &Side) -> Result<Owned<Tensor>> {
        let api = &self.api;
        let (create, destroy) = (api.cudnnCreateTensorDescriptor, api.cudnnDestroyTensorDescriptor);
        let tensor = Owned::new(api, "cudnnCreateTensorDescriptor", create, destroy)?;
        let [n, h, w] = side.size;
        let dims = [n, side.channels, h, w].map(|v| v as c_int);
        let strides = [h * w * side.pixel, 1, w * side.pixel, side.pixel].map(|v| v as c_int);
        let data = data_type(side.element);
        // SAFETY: the descriptor was made above; four numbers each.
        unsafe {
            cudnn!(api, cudnnSetTensorNdDescriptor(tensor.raw, data, 4, dims.as_ptr(), strides.as_ptr()))?;
        }
        Ok(tensor)
    }

    /// Output channels, input channels, rows and columns; in memory `[output channel][tap][channel]`.
    fn filter(&self, element: Element, sizes: [usize; 4]) -> Result<Owned<Filter>> {
        let api = &self.api;
        let (create, destroy) = (api.cudnnCreateFilterDescriptor, api.cudnnDestroyFilterDescriptor);
        let filter = Owned::new(api, "cudnnCreateFilterDescriptor", create, destroy)?;
        let (data, format) = (data_type(element), sys::cudnnTensorFormat_t::CUDNN_TENSOR_NHWC);
        let [k, c, h, w] = sizes.map(|v| v as c_int);
        // SAFETY: the descriptor was made above.
        unsafe { cudnn!(api, cudnnSetFilter4dDescriptor(filter.raw, data, format, k, c, h, w))? };
        Ok(filter)
    }

    /// A window as our layers have it, with sums of f32.
    fn convolution(
        &self,
        pad: [usize; 2],
        stride: [usize; 2],
        dilation: [usize; 2],
        math: sys::cudnnMathType_t,
    ) -> Result<Owned<Convolution>> {
        let api = &self.api;
        let (create, destroy) = (api.cudnnCreateConvolutionDescriptor, api.cudnnDestroyConvolutionDescriptor);
        let conv = Owned::new(api, "cudnnCreateConvolutionDescriptor", create, destroy)?;
        let (mode, single) =
            (sys::cudnnConvolutionMode_t::CUDNN_CROSS_CORRELATION, sys::cudnnDataType_t::CUDNN_DATA_FLOAT);
        let [[ph, pw], [sh, sw], [dh, dw]] = [pad, stride, dilation].map(|pair| pair.map(|v| v as c_int));
        // SAFETY: the descriptor was made above.
        unsafe {
            cudnn!(api, cudnnSetConvolution2dDescriptor(conv.raw, ph, pw, sh, sw, dh, dw, mode, single))?;
            cudnn!(api, cudnnSetConvolutionMathType(conv.raw, math))?;
        }
        Ok(conv)
    }
}

impl Drop for Cudnn {
    fn drop(&mut self) {
        // cuDNN says no by itself where this fails.
        let _current = self.context.bind();
        let handle = self.handle.get_mut().unwrap_or_else(|e| e.into_inner());
        // SAFETY: made by us, and nobody has it any more.
        unsafe { (self.api.cudnnDestroy)(*handle) };
    }
}

/// A convolution's descriptors; they say nothing of addresses.
pub(super) struct CudnnConv {
    input: Owned<Tensor>,
    output: Owned<Tensor>,
    bias: Owned<Tensor>,
    filter: Owned<Filter>,
    conv: Owned<Convolution>,
    activation: Owned<Activation>,
    adds: bool,
    algorithms: &'static [Algorithm],
}

impl CudnnConv {
    /// The algorithms that may be asked for.
    pub fn algorithms(&self) -> &'static [Algorithm] {
        self.algorithms
    }
}

/// A descriptor that destroys itself.
struct Owned<T: Copy> {
    raw: T,
    destroy: unsafe extern "C" fn(T) -> Status,
}

// SAFETY: memory of the host that is not written once it is described.
unsafe impl<T: Copy> Send for Owned<T> {}
// SAFETY: as above.
unsafe impl<T: Copy> Sync for Owned<T> {}

impl<T: Copy> Owned<*mut T> {
    fn new(
        api: &Api,
        call: &str,
        create: unsafe extern "C" fn(*mut *mut T) -> Status,
        destroy: unsafe extern "C" fn(*mut T) -> Status,
    ) -> Result<Self> {
        let mut raw = null_mut();
        // SAFETY: cuDNN writes the descriptor.
        api.check(call, unsafe { create(&mut raw) })?;
        Ok(Self { raw, destroy })
    }
}

impl<T: Copy> Drop for Owned<T> {
    fn drop(&mut self) {
        // SAFETY: made by cuDNN, which stays open, and destroyed once.
        unsafe { (self.destroy)(self.raw) };
    }
}

/// Name of an algorithm, as listings have it.
pub(super) fn name(algorithm: Algorithm) -> &'static str {
    match algorithm {
        Algorithm::CUDNN_CONVOLUTION_FWD_ALGO_IMPLICIT_GEMM => "cudnn implicit_gemm",
        Algorithm::CUDNN_CONVOLUTION_FWD_ALGO_IMPLICIT_PRECOMP_GEMM => "cudnn implicit_precomp_gemm",
        Algorithm::CUDNN_CONVOLUTION_FWD_ALGO_WINOGRAD => "cudnn winograd",
        Algorithm::CUDNN_CONVOLUTION_FWD_ALGO_WINOGRAD_NONFUSED => "cudnn winograd_nonfused",
        _ => "cudnn",
    }
}

fn data_type(element: Element) -> sys::cudnnDataType_t {
    match element {
        Element::F32 => sys::cudnnDataType_t::CUDNN_DATA_FLOAT,
        Element::F16 => sys::cudnnDataType_t::CUDNN_DATA_HALF,
        Element::Bf16 => sys::cudnnDataType_t::CUDNN_DATA_BFLOAT16,
    }
}

/// How products are made. The default would round f32 to TF32.
fn math(element: Element, tf32: bool) -> sys::cudnnMathType_t {
    match element {
        Element::F32 if !tf32 => sys::cudnnMathType_t::CUDNN_FMA_MATH,
        _ => sys::cudnnMathType_t::CUDNN_TENSOR_OP_MATH,
    }
}

/// The algorithms that the fused call takes for it: the identity wants IMPLICIT_PRECOMP_GEMM. Winograd's transforms lose what f16 and
/// bf16 have to spare, so that they are for f32 alone, as on the CPU.
fn algorithms(conv: &FusedConv) -> &'static [Algorithm] {
    use sys::cudnnConvolutionFwdAlgo_t::*;
    const ALL: &[Algorithm] = &[
        CUDNN_CONVOLUTION_FWD_ALGO_IMPLICIT_PRECOMP_GEMM,
        CUDNN_CONVOLUTION_FWD_ALGO_IMPLICIT_GEMM,
        CUDNN_CONVOLUTION_FWD_ALGO_WINOGRAD,
        CUDNN_CONVOLUTION_FWD_ALGO_WINOGRAD_NONFUSED,
    ];
    match (conv.relu, conv.input.element) {
        (false, _) => &ALL[..1],
        (true, Element::F32) => ALL,
        (true, Element::F16 | Element::Bf16) => &ALL[..2],
    }
}

/// Whether a window's axis has a padding that is the same on both sides, or does as well as if it were: from `from` pixels with `pad`
/// before them to `to`.
fn is_symmetric(window: [usize; 4], from: usize, to: usize) -> bool {
    let [kernel, stride, dilation, pad] = window;
    let reach = dilation * (kernel - 1) + 1;
    // Outputs whose window sees nothing of the map are no library's usual case.
    pad < reach && from + 2 * pad >= reach && (from + 2 * pad - reach) / stride + 1 == to
}

/// Whether cuDNN counts the elements of a map, and where tensor cores copy it, its pixels begin at multiples of sixteen bytes.
fn is_countable(side: &Side) -> bool {
    let aligned = side.element == Element::F32 || (side.align >= 16 && side.pixel.is_multiple_of(8));
    side.pixels() * side.pixel <= i32::MAX as usize && aligned
}

/// Whether the fused call can say it: one type throughout; a symmetric padding; a map to be added that lies as the output does and is
/// not the input.
fn is_expressible(conv: &FusedConv) -> bool {
    let FusedConv { input, output, kernel, stride, dilation, pad, .. } = conv;
    let axis = |i: usize| {
        let window = [kernel[i], stride[i], dilation[i], pad[i]];
        is_symmetric(window, input.size[i + 1], output.size[i + 1])
    };
    input.element == output.element
        && !conv.adds_input
        && axis(0)
        && axis(1)
        && [input, output].into_iter().all(is_countable)
        && conv.add.is_none_or(|add| add.is_like(output) && is_countable(&add))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn side(size: [usize; 3], channels: usize) -> Side {
        Side { element: Element::F16, size, channels, pixel: channels, align: 256 }
    }

    fn conv(rows: usize, out_rows: usize, stride: usize, pad: usize) -> FusedConv {
        FusedConv {
            kernel: [3; 2],
            stride: [stride; 2],
            dilation: [1; 2],
            pad: [pad; 2],
            input: side([1, rows, rows], 8),
            output: side([1, out_rows, out_rows], 16),
            add: None,
            adds_input: false,
            relu: true,
            tf32: false,
        }
    }

    #[test]
    fn a_padding_that_the_far_side_does_not_see_is_symmetric() {
        // 8 rows, 1 above and none below, stride 2: as with 1 below.
        assert!(is_expressible(&conv(8, 4, 2, 1)));
        // The same with stride 1 makes one row fewer than cuDNN would.
        assert!(!is_expressible(&conv(8, 7, 1, 1)));
        assert!(is_expressible(&conv(8, 8, 1, 1)));
        assert!(!is_expressible(&conv(8, 12, 1, 3)), "windows outside the map");
    }

    #[test]
    fn what_the_fused_call_cannot_say_is_no_candidate() {
        let good = conv(8, 8, 1, 1);
        let output = Side { element: Element::F32, ..good.output };
        assert!(!is_expressible(&FusedConv { output, ..good }), "two types");
        let apart = Side { pixel: 24, ..good.output };
        assert!(!is_expressible(&FusedConv { add: Some(apart), ..good }), "other strides");
        assert!(is_expressible(&FusedConv { add: Some(Side { align: 16, ..good.output }), ..good }));
        let itself = FusedConv { adds_input: true, add: Some(good.output), ..good };
        assert!(!is_expressible(&itself), "the input added to its own convolution");
        assert!(!is_expressible(&FusedConv { input: Side { align: 2, ..good.input }, ..good }), "unaligned");
        assert_eq!(algorithms(&FusedConv { relu: false, ..good }).len(), 1);
    }
}
