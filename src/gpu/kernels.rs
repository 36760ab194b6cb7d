//! The kernels of `cuda/`, found by name: a file's code is loaded when one of its kernels is first asked for.

#[cfg(not(feature = "cuda-embedded"))]
use super::compiled::Code;
use super::driver::{cuda, Context, Stream};
#[cfg(feature = "cuda-embedded")]
use super::embedded::Code;
use crate::error::{Error, Result};
use cudarc::driver::sys;
use std::collections::HashMap;
use std::ffi::{c_void, CString};
use std::ptr::null_mut;
use std::sync::{Arc, Mutex};

/// A file of kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    /// Convolutions.
    Conv,
    /// Pooling, interpolation, sums and the like.
    Maps,
    /// Pictures to network input.
    Pixels,
    /// From outputs to faces.
    Detect,
    /// Of a training: gradients of convolutions.
    #[cfg(feature = "train")]
    TrainConv,
    /// Of a training: gradients of what happens between convolutions.
    #[cfg(feature = "train")]
    TrainMaps,
    /// Of a training: batch normalisation.
    #[cfg(feature = "train")]
    TrainNorm,
    /// Of a training: the optimiser's step.
    #[cfg(feature = "train")]
    TrainStep,
    /// Of a training: which anchor learns which face.
    #[cfg(feature = "train")]
    TrainMatch,
    /// Of a training: which anchors enter the loss.
    #[cfg(feature = "train")]
    TrainSample,
    /// Of a training: losses and the outputs' gradients.
    #[cfg(feature = "train")]
    TrainLoss,
    /// Of a training: boxes that are looked at a second time.
    #[cfg(feature = "train")]
    TrainLook,
}

impl Source {
    /// All of them.
    pub const ALL: &[Source] = &[
        Source::Conv,
        Source::Maps,
        Source::Pixels,
        Source::Detect,
        #[cfg(feature = "train")]
        Source::TrainConv,
        #[cfg(feature = "train")]
        Source::TrainMaps,
        #[cfg(feature = "train")]
        Source::TrainNorm,
        #[cfg(feature = "train")]
        Source::TrainStep,
        #[cfg(feature = "train")]
        Source::TrainMatch,
        #[cfg(feature = "train")]
        Source::TrainSample,
        #[cfg(feature = "train")]
        Source::TrainLoss,
        #[cfg(feature = "train")]
        Source::TrainLook,
    ];

    /// The file's name and its text.
    pub fn file(self) -> (&'static str, &'static str) {
        match self {
            Source::Conv => ("conv.cu", include_str!("../../cuda/conv.cu")),
            Source::Maps => ("maps.cu", include_str!("../../cuda/maps.cu")),
            Source::Pixels => ("pixels.cu", include_str!("../../cuda/pixels.cu")),
            Source::Detect => ("detect.cu", include_str!("../../cuda/detect.cu")),
            #[cfg(feature = "train")]
            Source::TrainConv => ("train_conv.cu", include_str!("../../cuda/train_conv.cu")),
            #[cfg(feature = "train")]
            Source::TrainMaps => ("train_maps.cu", include_str!("../../cuda/train_maps.cu")),
            #[cfg(feature = "train")]
            Source::TrainNorm => ("train_norm.cu", include_str!("../../cuda/train_norm.cu")),
            #[cfg(feature = "train")]
            Source::TrainStep => ("train_step.cu", include_str!("../../cuda/train_step.cu")),
            #[cfg(feature = "train")]
            Source::TrainMatch => ("train_match.cu", include_str!("../../cuda/train_match.cu")),
            #[cfg(feature = "train")]
            Source::TrainSample => ("train_sample.cu", include_str!("../../cuda/train_sample.cu")),
            #[cfg(feature = "train")]
            Source::TrainLoss => ("train_loss.cu", include_str!("../../cuda/train_loss.cu")),
            #[cfg(feature = "train")]
            Source::TrainLook => ("train_look.cu", include_str!("../../cuda/train_look.cu")),
        }
    }
}

/// Code on a device.
struct Module {
    context: Arc<Context>,
    raw: sys::CUmodule,
}

// SAFETY: as a context.
unsafe impl Send for Module {}
// SAFETY: as a context.
unsafe impl Sync for Module {}

impl Drop for Module {
    fn drop(&mut self) {
        // The driver says no by itself where this fails.
        let _current = self.context.bind();
        // SAFETY: loaded by us; kernels of it keep it.
        unsafe { sys::cuModuleUnload(self.raw) };
    }
}

/// A kernel, ready to be launched.
#[derive(Clone)]
pub struct Kernel {
    module: Arc<Module>,
    name: &'static str,
    raw: sys::CUfunction,
}

// SAFETY: as a context.
unsafe impl Send for Kernel {}
// SAFETY: as a context.
unsafe impl Sync for Kernel {}

impl Kernel {
    /// Its name.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Launches `blocks` of `threads` threads with `shared` bytes of memory each, in the stream's order.
    ///
    /// # Safety
    /// `args` is the kernel's struct, field by field, and whatever it points to is there for the kernel, in that order of work.
    pub unsafe fn launch<A: Copy>(
        &self,
        stream: &Stream,
        blocks: [u32; 3],
        threads: u32,
        shared: u32,
        args: &A,
    ) -> Result<()> {
        if blocks.contains(&0) {
            return Ok(());
        }
        let _current = self.module.context.bind()?;
        let mut bytes = size_of::<A>();
        // CU_LAUNCH_PARAM_BUFFER_POINTER, _SIZE and _END.
        let mut extra: [*mut c_void; 5] = [
            std::ptr::without_provenance_mut(1),
            std::ptr::from_ref(args).cast_mut().cast(),
            std::ptr::without_provenance_mut(2),
            (&raw mut bytes).cast(),
            null_mut(),
        ];
        let [x, y, z] = blocks;
        // SAFETY: the caller's contract; the driver copies the arguments before it returns.
        let launched = unsafe {
            cuda!(cuLaunchKernel(
                self.raw,
                x,
                y,
                z,
                threads,
                1,
                1,
                shared,
                stream.raw(),
                null_mut(),
                extra.as_mut_ptr()
            ))
        };
        launched.map_err(|e| match e {
            Error::Cuda(m) => Error::Cuda(format!("kernel {}: {m}", self.name)),
            other => other,
        })
    }
}

/// The kernels for one context.
pub struct Kernels {
    context: Arc<Context>,
    code: Code,
    modules: Mutex<HashMap<Source, Arc<Module>>>,
}

impl Kernels {
    /// Nothing is loaded yet.
    ///
    /// Code is compiled by NVRTC and kept in the folder `farface` of `XDG_CACHE_HOME` or `~/.cache`, or in the one that
    /// `FARFACE_CUDA_CACHE` names; nowhere where that is `off`. With the feature `cuda-embedded` it is in the library, and the driver
    /// keeps what it makes of it.
    ///
    /// Errors: [`Error::Unsupported`] where NVRTC is not there, or where there is no code for a device as old.
    pub fn new(context: &Arc<Context>) -> Result<Self> {
        let code = Code::new(context.capability())?;
        Ok(Self { context: context.clone(), code, modules: Mutex::default() })
    }

    /// A kernel of a file. `shared` is the most shared memory that it will be launched with.
    pub fn get(&self, source: Source, name: &'static str, shared: u32) -> Result<Kernel> {
        let module = self.module(source)?;
        let c_name = CString::new(name).map_err(|_| Error::Internal("a kernel's name".into()))?;
        let mut raw = null_mut();
        let _current = self.context.bind()?;
        // SAFETY: the module is loaded; the driver writes the function.
        unsafe { cuda!(cuModuleGetFunction(&mut raw, module.raw, c_name.as_ptr())) }
            .map_err(|e| Error::Cuda(format!("kernel {name}: {e}")))?;
        if shared > 48 << 10 {
            let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function was found.
            unsafe { cuda!(cuFuncSetAttribute(raw, attribute, shared as i32))? };
        }
        Ok(Kernel { module, name, raw })
    }

    fn module(&self, source: Source) -> Result<Arc<Module>> {
        // Held while a file is compiled: a second session waits rather than compiling it again.
        let mut modules = self.modules.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(module) = modules.get(&source) {
            return Ok(module.clone());
        }
        let raw = self.code.load(source.file(), |image| self.load(image))?;
        let module = Arc::new(Module { context: self.context.clone(), raw });
        modules.insert(source, module.clone());
        Ok(module)
    }

    fn load(&self, image: &[u8]) -> Result<sys::CUmodule> {
        let mut raw = null_mut();
        let _current = self.context.bind()?;
        // SAFETY: an image that NVRTC has made, PTX with the zero behind it; the driver reads no further than it says.
        unsafe { cuda!(cuModuleLoadData(&mut raw, image.as_ptr().cast())) }.map(|()| raw)
    }
}
