//! The driver's objects as values that give themselves back: contexts, streams, events, graphs.

use super::probe::Library;
use crate::error::{Error, Result};
use cudarc::driver::sys;
use std::ffi::{c_int, CStr};
use std::ptr::null_mut;
use std::sync::Arc;

/// Oldest driver that has what is called here, as cuDriverGetVersion counts.
const OLDEST_DRIVER: i32 = 11_080;

/// An error that names the call, unless it succeeded.
pub(super) fn check(call: &str, result: sys::CUresult) -> Result<()> {
    if result == sys::CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let text = |get: unsafe fn(sys::CUresult, *mut *const std::ffi::c_char) -> sys::CUresult| {
        let mut text = std::ptr::null();
        // SAFETY: the driver writes a pointer to a string of its own, or none.
        unsafe {
            get(result, &mut text);
            (!text.is_null()).then(|| CStr::from_ptr(text).to_string_lossy().into_owned())
        }
    };
    let name = text(sys::cuGetErrorName).unwrap_or_else(|| format!("error {}", result as u32));
    let meaning = text(sys::cuGetErrorString).map(|t| format!(": {t}")).unwrap_or_default();
    let text = format!("{call} failed with {name}{meaning}");
    Err(if result == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
        Error::LimitExceeded(text)
    } else {
        Error::Cuda(text)
    })
}

/// Calls a function of the driver and checks its result.
macro_rules! cuda {
    ($function:ident($($argument:expr),* $(,)?)) => {
        $crate::gpu::driver::check(
            stringify!($function),
            cudarc::driver::sys::$function($($argument),*),
        )
    };
}
pub(super) use cuda;

/// Devices that there are; an error where there is no driver.
pub fn device_count() -> Result<u32> {
    initialize()?;
    let mut count = 0;
    // SAFETY: the driver writes one number.
    unsafe { cuda!(cuDeviceGetCount(&mut count))? };
    Ok(count.max(0) as u32)
}

/// Opens the driver; may be called again.
fn initialize() -> Result<()> {
    Library::Driver.require()?;
    let mut version = 0;
    // SAFETY: the driver is there.
    unsafe {
        cuda!(cuInit(0))?;
        cuda!(cuDriverGetVersion(&mut version))?;
    }
    if version < OLDEST_DRIVER {
        let (major, minor) = (version / 1000, version % 1000 / 10);
        return Err(Error::Unsupported(format!(
            "the NVIDIA driver is made for CUDA {major}.{minor}; 11.8 or later is needed"
        )));
    }
    Ok(())
}

/// The primary context of a device, which all users of the device in this process share.
pub struct Context {
    ordinal: u32,
    device: sys::CUdevice,
    raw: sys::CUcontext,
    name: String,
    capability: [u32; 2],
    multiprocessors: u32,
    shared_bytes: u32,
}

// SAFETY: the driver's contexts may be used from every thread; each makes it current before it calls.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    /// That of the device of this number.
    ///
    /// Errors: [`Error::Unsupported`] where there is no driver or no such device.
    pub fn new(ordinal: u32) -> Result<Arc<Self>> {
        let count = device_count()?;
        if ordinal >= count {
            return Err(Error::Unsupported(format!(
                "there is no CUDA device {ordinal}: the driver has {count}"
            )));
        }
        let mut device = 0;
        let mut raw = null_mut();
        // SAFETY: the driver is initialised and has a device of this number.
        unsafe {
            cuda!(cuDeviceGet(&mut device, ordinal as c_int))?;
            cuda!(cuDevicePrimaryCtxRetain(&mut raw, device))?;
        }
        // From here on dropping it releases the context.
        let mut context = Self {
            ordinal,
            device,
            raw,
            name: String::new(),
            capability: [0; 2],
            multiprocessors: 0,
            shared_bytes: 0,
        };
        let mut name = [0; 128];
        // SAFETY: the driver writes at most this many bytes, ended by a zero.
        context.name = unsafe {
            cuda!(cuDeviceGetName(name.as_mut_ptr(), name.len() as c_int, device))?;
            CStr::from_ptr(name.as_ptr()).to_string_lossy().into_owned()
        };
        use sys::CUdevice_attribute_enum as Attribute;
        let attribute = |attribute| {
            let mut value = 0;
            // SAFETY: the driver writes one number.
            unsafe { cuda!(cuDeviceGetAttribute(&mut value, attribute, device))? };
            Ok::<u32, Error>(value.max(0) as u32)
        };
        context.capability = [
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ];
        context.multiprocessors = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        context.shared_bytes = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        if context.capability < [7, 0] {
            let [major, minor] = context.capability;
            return Err(Error::Unsupported(format!(
                "CUDA device {ordinal} ({}) has compute capability {major}.{minor}; 7.0 or later is needed",
                context.name
            )));
        }
        Ok(Arc::new(context))
    }

    /// Makes it current on this thread for the calls that follow, as long as what is returned lives; then the one before is again, so that
    /// a program's own choice of device stays what it was.
    pub(super) fn bind(&self) -> Result<Current> {
        // SAFETY: the context is retained.
        unsafe { cuda!(cuCtxPushCurrent_v2(self.raw)) }.map(|()| Current)
    }

    /// The device's number, as the CUDA runtime counts.
    pub fn ordinal(&self) -> u32 {
        self.ordinal
    }

    /// The device's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Compute capability, major and minor.
    pub fn capability(&self) -> [u32; 2] {
        self.capability
    }

    /// Multiprocessors of the device.
    pub fn multiprocessors(&self) -> u32 {
        self.multiprocessors
    }

    /// Most bytes of shared memory that a block may ask for.
    pub fn shared_bytes(&self) -> u32 {
        self.shared_bytes
    }
}

/// That a context is current on this thread.
pub(super) struct Current;

impl Drop for Current {
    fn drop(&mut self) {
        // SAFETY: pushed when this was made, on this thread: it is not sent elsewhere, nor kept beyond a call.
        unsafe { sys::cuCtxPopCurrent_v2(&mut null_mut()) };
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained once when it was made. A failure leaves nothing to be done.
        unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}

/// Work in its order: a stream of ours, or one that the caller has.
pub struct Stream {
    context: Arc<Context>,
    raw: sys::CUstream,
    owned: bool,
}

// SAFETY: as a context.
unsafe impl Send for Stream {}
// SAFETY: as a context.
unsafe impl Sync for Stream {}

impl Stream {
    /// A new one, which does not wait for the default stream.
    pub fn new(context: &Arc<Context>) -> Result<Self> {
        let _current = context.bind()?;
        let mut raw = null_mut();
        let flags = sys::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: a context is current.
        unsafe { cuda!(cuStreamCreate(&mut raw, flags))? };
        Ok(Self { context: context.clone(), raw, owned: true })
    }

    /// The context that it is of.
    pub fn context(&self) -> &Arc<Context> {
        &self.context
    }

    pub(super) fn raw(&self) -> sys::CUstream {
        self.raw
    }

    /// Waits until all of its work is done.
    pub fn synchronize(&self) -> Result<()> {
        let _current = self.context.bind()?;
        // SAFETY: the stream lives.
        unsafe { cuda!(cuStreamSynchronize(self.raw)) }
    }

    /// Whether all of its work is done.
    #[cfg(feature = "train")]
    pub(super) fn is_idle(&self) -> Result<bool> {
        let _current = self.context.bind()?;
        // SAFETY: the stream lives.
        match unsafe { sys::cuStreamQuery(self.raw) } {
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            result => check("cuStreamQuery", result).map(|()| true),
        }
    }

    /// Lets work that is given from now on wait until the stream of `event` has come there.
    #[cfg(feature = "train")]
    pub fn wait_for(&self, event: &Event) -> Result<()> {
        let _current = self.context.bind()?;
        // SAFETY: stream and event live.
        unsafe { cuda!(cuStreamWaitEvent(self.raw, event.raw, 0)) }
    }

    /// What `record` asks of this stream, as a graph, to be launched as often as wanted. Nothing of it is done yet.
    pub fn capture(&self, record: impl FnOnce() -> Result<()>) -> Result<Graph> {
        let _current = self.context.bind()?;
        let mode = sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        let mut graph = null_mut();
        // SAFETY: the stream lives; a capture that was begun is ended whatever happened in between (the second half of `and` is
        // asked for in any case).
        let ended = unsafe {
            cuda!(cuStreamBeginCapture_v2(self.raw, mode))?;
            let recorded = record();
            recorded.and(cuda!(cuStreamEndCapture(self.raw, &mut graph)))
        };
        let mut exec = null_mut();
        let made = ended.and_then(|()| {
            // SAFETY: the capture ended with a graph.
            unsafe { cuda!(cuGraphInstantiateWithFlags(&mut exec, graph, 0)) }
        });
        if !graph.is_null() {
            // SAFETY: made above, and what can be launched has a copy.
            unsafe { sys::cuGraphDestroy(graph) };
        }
        made.map(|()| Graph { context: self.context.clone(), raw: exec })
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.owned {
            let _current = self.context.bind();
            // SAFETY: made by us, and nobody has it any more.
            unsafe { sys::cuStreamDestroy_v2(self.raw) };
        }
    }
}

/// A stream of the caller's. It must live as long as work that is given to it here.
///
/// # Safety
/// `raw` is NULL (the default stream) or a stream of this context.
pub unsafe fn foreign_stream(context: &Arc<Context>, raw: *mut std::ffi::c_void) -> Stream {
    Stream { context: context.clone(), raw: raw.cast(), owned: false }
}

/// A point in a stream's work.
pub struct Event {
    context: Arc<Context>,
    raw: sys::CUevent,
}

// SAFETY: as a context.
unsafe impl Send for Event {}

impl Event {
    /// A new one.
    pub fn new(context: &Arc<Context>) -> Result<Self> {
        let _current = context.bind()?;
        let mut raw = null_mut();
        // SAFETY: a context is current.
        unsafe { cuda!(cuEventCreate(&mut raw, 0))? };
        Ok(Self { context: context.clone(), raw })
    }

    /// Marks where the stream's work ends now.
    pub fn record(&self, stream: &Stream) -> Result<()> {
        let _current = self.context.bind()?;
        // SAFETY: event and stream live.
        unsafe { cuda!(cuEventRecord(self.raw, stream.raw)) }
    }

    /// Waits until the stream has come here.
    pub fn synchronize(&self) -> Result<()> {
        let _current = self.context.bind()?;
        // SAFETY: the event lives.
        unsafe { cuda!(cuEventSynchronize(self.raw)) }
    }

    /// Milliseconds from `start` to here; both must have been passed.
    pub fn since(&self, start: &Event) -> Result<f32> {
        let _current = self.context.bind()?;
        let mut ms = 0.0;
        // SAFETY: both events live.
        unsafe { cuda!(cuEventElapsedTime(&mut ms, start.raw, self.raw))? };
        Ok(ms)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // The driver says no by itself where this fails.
        let _current = self.context.bind();
        // SAFETY: made by us, and nobody has it any more.
        unsafe { sys::cuEventDestroy_v2(self.raw) };
    }
}

/// Work that was recorded once and is launched as one.
pub struct Graph {
    context: Arc<Context>,
    raw: sys::CUgraphExec,
}

// SAFETY: as a context.
unsafe impl Send for Graph {}

impl Graph {
    /// Gives all of its work to the stream.
    pub fn launch(&self, stream: &Stream) -> Result<()> {
        let _current = self.context.bind()?;
        // SAFETY: graph and stream live.
        unsafe { cuda!(cuGraphLaunch(self.raw, stream.raw)) }
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // The driver says no by itself where this fails.
        let _current = self.context.bind();
        // SAFETY: made by us, and nobody has it any more.
        unsafe { sys::cuGraphExecDestroy(self.raw) };
    }
}
