//! Convolutions of one tap, and those whose window is the whole map, by cuBLASLt: one matrix product with bias, residual sum and ReLU.

use super::driver::{Context, Stream};
use super::fused::{FusedConv, Pointers, Side, WORKSPACE};
use super::map::Element;
use super::probe::{functions, Library};
use crate::error::{Error, Result};
use cudarc::cublaslt::sys;
use std::ffi::{c_char, c_int, c_void, CStr};
use std::mem::size_of_val;
use std::ptr::{from_ref, null_mut};
use std::sync::{Arc, Mutex};

type Status = c_int;
type Handle = sys::cublasLtHandle_t;
type Layout = sys::cublasLtMatrixLayout_t;
type Desc = sys::cublasLtMatmulDesc_t;
type Preference = sys::cublasLtMatmulPreference_t;
type DescAttribute = sys::cublasLtMatmulDescAttributes_t;
type PreferenceAttribute = sys::cublasLtMatmulPreferenceAttributes_t;

/// `cublasLtMatmulHeuristicResult_t`, its status a number.
#[derive(Clone, Copy)]
#[repr(C)]
struct Found {
    algorithm: sys::cublasLtMatmulAlgo_t,
    workspace: usize,
    status: Status,
    waves: f32,
    reserved: [c_int; 4],
}

functions! {
    /// What is called of cuBLASLt.
    Api of Library::CublasLt;
    cublasLtGetStatusName(Status) -> *const c_char;
    cublasLtCreate(*mut Handle) -> Status;
    cublasLtDestroy(Handle) -> Status;
    cublasLtMatmulDescCreate(*mut Desc, sys::cublasComputeType_t, sys::cudaDataType_t) -> Status;
    cublasLtMatmulDescSetAttribute(Desc, DescAttribute, *const c_void, usize) -> Status;
    cublasLtMatmulDescDestroy(Desc) -> Status;
    cublasLtMatrixLayoutCreate(*mut Layout, sys::cudaDataType_t, u64, u64, i64) -> Status;
    cublasLtMatrixLayoutDestroy(Layout) -> Status;
    cublasLtMatmulPreferenceCreate(*mut Preference) -> Status;
    cublasLtMatmulPreferenceSetAttribute(Preference, PreferenceAttribute, *const c_void, usize) -> Status;
    cublasLtMatmulPreferenceDestroy(Preference) -> Status;
    cublasLtMatmulAlgoGetHeuristic(
        Handle, Desc, Layout, Layout, Layout, Layout, Preference, c_int, *mut Found, *mut c_int,
    ) -> Status;
    cublasLtMatmul(
        Handle, Desc, *const c_void, *const c_void, Layout, *const c_void, Layout, *const c_void, *const c_void,
        Layout, *mut c_void, Layout, *const sys::cublasLtMatmulAlgo_t, *mut c_void, usize, *mut c_void,
    ) -> Status;
}

impl Api {
    /// An error that names the call, unless it succeeded.
    fn check(&self, call: &str, status: Status) -> Result<()> {
        if status == 0 {
            return Ok(());
        }
        // SAFETY: cuBLASLt returns a string of its own for every number.
        let text = unsafe { CStr::from_ptr((self.cublasLtGetStatusName)(status)) }.to_string_lossy();
        Err(Error::Cuda(format!("{call} failed with {text} ({status})")))
    }
}

/// Calls a function of cuBLASLt and checks its result.
macro_rules! lt {
    ($api:expr, $function:ident($($argument:expr),* $(,)?)) => {
        $api.check(stringify!($function), ($api.$function)($($argument),*))
    };
}

/// CUBLAS_STATUS_NOT_SUPPORTED: it does not compute this, rather than that something failed.
const NOT_SUPPORTED: Status = 15;

/// CUBLAS_OP_T.
const TRANSPOSED: i32 = 1;

/// Most algorithms that the heuristic is asked for; each is timed.
const ALGORITHMS: usize = 8;

/// An algorithm, and the bytes of workspace that it takes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Algorithm {
    raw: sys::cublasLtMatmulAlgo_t,
    pub workspace: usize,
}

/// cuBLASLt on a device. Calls take turns, for layers that share a description have biases of their own in it.
pub(super) struct CublasLt {
    context: Arc<Context>,
    api: Api,
    handle: Mutex<Handle>,
}

// SAFETY: the handle is used under its lock.
unsafe impl Send for CublasLt {}
// SAFETY: as above.
unsafe impl Sync for CublasLt {}

impl CublasLt {
    /// Errors: [`Error::Unsupported`] where there is none.
    pub fn open(context: &Arc<Context>) -> Result<Self> {
        let api = Api::open()?;
        let _current = context.bind()?;
        let mut handle = null_mut();
        // SAFETY: a context is current; cuBLASLt writes the handle.
        unsafe { lt!(api, cublasLtCreate(&mut handle))? };
        Ok(Self { context: context.clone(), api, handle: Mutex::new(handle) })
    }

    /// Descriptors of the product; None where the convolution is not one.
    pub fn describe(&self, conv: &FusedConv) -> Result<Option<LtProduct>> {
        let Some([depth, columns, leading]) = product(conv) else { return Ok(None) };
        let (api, rows) = (&self.api, conv.output.channels);
        // Column by column, as cuBLASLt counts: weights are [depth, rows], transposed; the input [depth, columns].
        let side = |s: &Side| self.layout(s.element, [rows, columns], s.pixel);
        // Sums and factors are f32; of f32, not TF32, unless that was asked for.
        let compute = if conv.tf32 {
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32
        } else {
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F
        };
        let made = LtProduct {
            desc: Owned::new(api, api.cublasLtMatmulDescDestroy, "cublasLtMatmulDescCreate", |desc| {
                // SAFETY: cuBLASLt writes the descriptor.
                unsafe { (api.cublasLtMatmulDescCreate)(desc, compute, sys::cudaDataType_t::CUDA_R_32F) }
            })?,
            weights: self.layout(conv.input.element, [depth, rows], depth)?,
            input: self.layout(conv.input.element, [depth, columns], leading)?,
            add: side(conv.add.as_ref().unwrap_or(&conv.output))?,
            output: side(&conv.output)?,
            adds: conv.add.is_some(),
            aligned: [
                256,
                conv.input.align,
                conv.add.map_or(conv.output.align, |a| a.align),
                conv.output.align,
            ],
        };
        self.set(&made.desc, DescAttribute::CUBLASLT_MATMUL_DESC_TRANSA, &TRANSPOSED)?;
        let epilogue = if conv.relu {
            sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_RELU_BIAS
        } else {
            sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS
        };
        self.set(&made.desc, DescAttribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &(epilogue as u32))?;
        Ok(Some(made))
    }

    /// The algorithms that its heuristic names for the product with this bias, the likely fastest first; none where it has none.
    pub fn algorithms(&self, product: &LtProduct, bias: u64) -> Result<Vec<Algorithm>> {
        let _current = self.context.bind()?;
        let api = &self.api;
        let preference =
            Owned::new(api, api.cublasLtMatmulPreferenceDestroy, "cublasLtMatmulPreferenceCreate", |p| {
                // SAFETY: cuBLASLt writes the descriptor.
                unsafe { (api.cublasLtMatmulPreferenceCreate)(p) }
            })?;
        use PreferenceAttribute as Attribute;
        // Parts of the depth are added up in f32, in a fixed order.
        let schemes = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
        self.prefer(&preference, Attribute::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &schemes)?;
        let most = WORKSPACE as u64;
        self.prefer(&preference, Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &most)?;
        let attributes = [
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
        ];
        for (attribute, aligned) in attributes.into_iter().zip(product.aligned) {
            self.prefer(&preference, attribute, &(aligned as u32))?;
        }
        let none = Found {
            algorithm: sys::cublasLtMatmulAlgo_t { data: [0; 8] },
            workspace: 0,
            status: NOT_SUPPORTED,
            waves: 0.0,
            reserved: [0; 4],
        };
        let (mut found, mut count) = ([none; ALGORITHMS], 0);
        let handle = self.handle.lock().unwrap_or_else(|e| e.into_inner());
        self.set(&product.desc, DescAttribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias)?;
        // SAFETY: the descriptors live; cuBLASLt writes at most so many results.
        let status = unsafe {
            (api.cublasLtMatmulAlgoGetHeuristic)(
                *handle,
                product.desc.raw,
                product.weights.raw,
                product.input.raw,
                product.add.raw,
                product.output.raw,
                preference.raw,
                ALGORITHMS as c_int,
                found.as_mut_ptr(),
                &mut count,
            )
        };
        if status == NOT_SUPPORTED {
            return Ok(Vec::new());
        }
        api.check("cublasLtMatmulAlgoGetHeuristic", status)?;
        let found = found.iter().take(count.max(0) as usize);
        let usable = found.filter(|f| f.status == 0 && f.workspace <= WORKSPACE);
        Ok(usable.map(|f| Algorithm { raw: f.algorithm, workspace: f.workspace }).collect())
    }

    /// Gives the product to the stream. False where cuBLASLt does not compute it by this algorithm: it says so at once, and nothing
    /// was given.
    ///
    /// # Safety
    /// The addresses are of maps as described, and of as many bytes of workspace, in that order of work.
    pub unsafe fn launch(
        &self,
        stream: &Stream,
        product: &LtProduct,
        algorithm: &Algorithm,
        at: &Pointers,
    ) -> Result<bool> {
        let _current = self.context.bind()?;
        let (one, zero) = (1.0f32, 0.0f32);
        let pointer = |address: u64| std::ptr::with_exposed_provenance_mut::<c_void>(address as usize);
        // Where nothing is added, the output stands for it: with a factor of 0 it is not read.
        let (factor, add) = if product.adds { (&one, at.add) } else { (&zero, at.output) };
        let handle = self.handle.lock().unwrap_or_else(|e| e.into_inner());
        self.set(&product.desc, DescAttribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &at.bias)?;
        // SAFETY: the caller's contract; the descriptors live.
        let status = unsafe {
            (self.api.cublasLtMatmul)(
                *handle,
                product.desc.raw,
                from_ref(&one).cast(),
                pointer(at.weights),
                product.weights.raw,
                pointer(at.input),
                product.input.raw,
                from_ref(factor).cast(),
                pointer(add),
                product.add.raw,
                pointer(at.output),
                product.output.raw,
                &algorithm.raw,
                pointer(at.workspace),
                algorithm.workspace,
                stream.raw().cast(),
            )
        };
        if status == NOT_SUPPORTED {
            return Ok(false);
        }
        self.api.check("cublasLtMatmul", status).map(|()| true)
    }

    /// A matrix, column by column, `leading` elements from one to the next.
    fn layout(&self, element: Element, [rows, columns]: [usize; 2], leading: usize) -> Result<Owned<Layout>> {
        let api = &self.api;
        let data = match element {
            Element::F32 => sys::cudaDataType_t::CUDA_R_32F,
            Element::F16 => sys::cudaDataType_t::CUDA_R_16F,
            Element::Bf16 => sys::cudaDataType_t::CUDA_R_16BF,
        };
        Owned::new(api, api.cublasLtMatrixLayoutDestroy, "cublasLtMatrixLayoutCreate", |layout| {
            // SAFETY: cuBLASLt writes the descriptor.
            unsafe {
                (api.cublasLtMatrixLayoutCreate)(layout, data, rows as u64, columns as u64, leading as i64)
            }
        })
    }

    fn set<T: Copy>(&self, desc: &Owned<Desc>, attribute: DescAttribute, value: &T) -> Result<()> {
        let data = from_ref(value).cast();
        // SAFETY: so many bytes lie there, and are copied.
        unsafe {
            lt!(self.api, cublasLtMatmulDescSetAttribute(desc.raw, attribute, data, size_of_val(value)))
        }
    }

    fn prefer<T: Copy>(
        &self,
        p: &Owned<Preference>,
        attribute: PreferenceAttribute,
        value: &T,
    ) -> Result<()> {
        let data = from_ref(value).cast();
        // SAFETY: as in `set`.
        unsafe {
            lt!(self.api, cublasLtMatmulPreferenceSetAttribute(p.raw, attribute, data, size_of_val(value)))
        }
    }
}

impl Drop for CublasLt {
    fn drop(&mut self) {
        // cuBLASLt says no by itself where this fails.
        let _current = self.context.bind();
        let handle = self.handle.get_mut().unwrap_or_else(|e| e.into_inner());
        // SAFETY: made by us, and nobody has it any more.
        unsafe { (self.api.cublasLtDestroy)(*handle) };
    }
}

/// A product's descriptors; of addresses they have the last bias's.
pub(super) struct LtProduct {
    /// Its bias is set and used under the handle's lock.
    desc: Owned<Desc>,
    weights: Owned<Layout>,
    input: Owned<Layout>,
    add: Owned<Layout>,
    output: Owned<Layout>,
    adds: bool,
    /// Bytes that the addresses of weights, input, what is added and output are multiples of.
    aligned: [usize; 4],
}

/// A descriptor that destroys itself.
struct Owned<T: Copy> {
    raw: T,
    destroy: unsafe extern "C" fn(T) -> Status,
}

// SAFETY: memory of the host that is not written once it is described, or under the handle's lock.
unsafe impl<T: Copy> Send for Owned<T> {}
// SAFETY: as above.
unsafe impl<T: Copy> Sync for Owned<T> {}

impl<T> Owned<*mut T> {
    fn new(
        api: &Api,
        destroy: unsafe extern "C" fn(*mut T) -> Status,
        call: &str,
        create: impl FnOnce(&mut *mut T) -> Status,
    ) -> Result<Self> {
        let mut raw = null_mut();
        api.check(call, create(&mut raw))?;
        Ok(Self { raw, destroy })
    }
}

impl<T: Copy> Drop for Owned<T> {
    fn drop(&mut self) {
        // SAFETY: made by cuBLASLt, which stays open, and destroyed once.
        unsafe { (self.destroy)(self.raw) };
    }
}

/// Depth and columns of the product that a convolution is, and the elements from a column of the input to the next: pixels by
/// channels where the window is one pixel, images by a whole map's values where it is that map. None for any other.
fn product(conv: &FusedConv) -> Option<[usize; 3]> {
    let FusedConv { input, output, .. } = conv;
    let [images, rows, columns] = input.size;
    if conv.pad != [0; 2]
        || conv.add.is_some_and(|add| {
            add.size != output.size || add.channels != output.channels || add.element != output.element
        })
    {
        return None;
    }
    if conv.kernel == [1; 2] && conv.stride == [1; 2] && input.size == output.size {
        return Some([input.channels, input.pixels(), input.pixel]);
    }
    let whole = conv.kernel == [rows, columns] && conv.dilation == [1; 2] && output.size == [images, 1, 1];
    let values = rows * columns * input.pixel;
    (whole && input.pixel == input.channels).then_some([values, images, values])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn side(size: [usize; 3], channels: usize) -> Side {
        Side { element: Element::F16, size, channels, pixel: channels, align: 256 }
    }

    fn conv(kernel: [usize; 2], input: Side, output: Side) -> FusedConv {
        FusedConv {
            kernel,
            stride: [1; 2],
            dilation: [1; 2],
            pad: [0; 2],
            input,
            output,
            add: None,
            adds_input: false,
            relu: false,
            tf32: false,
        }
    }

    #[test]
    fn windows_of_one_pixel_or_the_whole_map_are_products() {
        let (map, part) = (side([2, 5, 7], 16), Side { pixel: 40, ..side([2, 5, 7], 16) });
        assert_eq!(product(&conv([1; 2], map, side([2, 5, 7], 8))), Some([16, 70, 16]));
        assert_eq!(product(&conv([1; 2], part, side([2, 5, 7], 8))), Some([16, 70, 40]));
        assert_eq!(product(&conv([5, 7], map, side([2, 1, 1], 8))), Some([560, 2, 560]));
        assert_eq!(product(&conv([5, 7], part, side([2, 1, 1], 8))), None, "pixels apart");
        assert_eq!(product(&conv([3, 3], map, side([2, 3, 5], 8))), None);
        let strided = FusedConv { stride: [2; 2], ..conv([1; 2], map, side([2, 3, 4], 8)) };
        assert_eq!(product(&strided), None);
        let enlarged = FusedConv { add: Some(side([2, 2, 3], 8)), ..conv([1; 2], map, side([2, 5, 7], 8)) };
        assert_eq!(product(&enlarged), None);
    }
}
