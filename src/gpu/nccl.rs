//! NCCL, sums over the GPUs of several processes: the functions that are used here, bound as NVRTC's are, since cudarc's own binding
//! panics where a library lacks one of all that a version has.
//!
//! A communicator's work is in a stream's order, and it ends only when every rank has given the same. A rank that is gone would let the
//! others wait for ever: whoever waits here looks at NCCL's own errors and asks `alive`, too, and ends the communicator where either
//! tells of one.

use super::driver::{Context, Stream};
use super::memory::DeviceBuffer;
use super::probe::Library;
use crate::error::{Error, Result};
use libloading::Symbol;
use std::ffi::{c_char, c_int, c_void, CStr};
use std::ops::Range;
use std::ptr::null_mut;
use std::sync::mpsc::{channel, RecvTimeoutError};
use std::sync::Arc;
use std::thread::Builder;
use std::time::{Duration, Instant};

type Status = c_int;
type Raw = *mut c_void;

/// Bytes of an identity (NCCL_UNIQUE_ID_BYTES).
pub const ID_BYTES: usize = 128;

/// What the ranks of a communicator have in common: made by one of them, given to all.
pub type Id = [u8; ID_BYTES];

#[repr(C)]
#[derive(Clone, Copy)]
struct RawId([u8; ID_BYTES]);

/// Oldest version that has the mean among its operations, as ncclGetVersion counts.
const OLDEST: c_int = 21_000;
/// ncclSuccess.
const SUCCESS: Status = 0;
/// ncclUint32, ncclFloat32.
const UINT32: c_int = 3;
const FLOAT32: c_int = 7;
/// ncclSum, ncclAvg.
const SUM: c_int = 0;
const AVG: c_int = 4;
/// How often somebody who waits asks whether the others are there.
const LOOK: Duration = Duration::from_millis(20);
/// A wait's first part, which does not sleep: most are short.
const SPIN: Duration = Duration::from_millis(1);
/// How long an abort may take, which is a matter of all ranks of a machine: one that was killed does not take part.
const ABORT: Duration = Duration::from_secs(10);

/// What becomes of the ranks' values, of four bytes each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduce {
    /// Their sum, of f32.
    Sum,
    /// Their mean, of f32.
    Mean,
    /// Their sum, of u32.
    Counts,
}

impl Reduce {
    /// As NCCL names it: ncclDataType_t, ncclRedOp_t.
    fn names(self) -> (c_int, c_int) {
        match self {
            Reduce::Sum => (FLOAT32, SUM),
            Reduce::Mean => (FLOAT32, AVG),
            Reduce::Counts => (UINT32, SUM),
        }
    }
}

/// A function of the library.
fn symbol<T>(name: &'static str) -> Result<Symbol<'static, T>> {
    let library = Library::Nccl.handle()?;
    // SAFETY: the callers give the types that NCCL's header has, the same in all versions of 2.
    unsafe { library.get(name.as_bytes()) }.map_err(|e| Error::Unsupported(format!("NCCL lacks {name}: {e}")))
}

/// An error that names the call, unless it succeeded. `raw`: the communicator, or null.
fn check(call: &str, status: Status, raw: Raw) -> Result<()> {
    if status == SUCCESS {
        return Ok(());
    }
    // SAFETY: NCCL returns strings of its own, or null.
    let text = |text: *const c_char| unsafe {
        (!text.is_null()).then(|| CStr::from_ptr(text).to_string_lossy().into_owned())
    };
    let meaning = symbol::<unsafe extern "C" fn(Status) -> *const c_char>("ncclGetErrorString")
        .ok()
        // SAFETY: a function of one number.
        .and_then(|get| text(unsafe { get(status) }))
        .unwrap_or_else(|| format!("error {status}"));
    // Versions before 2.13 have no more to say.
    let last = symbol::<unsafe extern "C" fn(Raw) -> *const c_char>("ncclGetLastError")
        .ok()
        // SAFETY: a communicator that lives, or null.
        .and_then(|get| text(unsafe { get(raw) }))
        .filter(|last| !last.trim().is_empty());
    let last = last.map(|last| format!(": {}", last.trim())).unwrap_or_default();
    Err(Error::Cuda(format!("{call} failed: {meaning}{last}")))
}

/// Major, minor and patch version. Errors where the library is not there or too old.
pub fn version() -> Result<[i32; 3]> {
    let mut code = 0;
    let get = symbol::<unsafe extern "C" fn(*mut c_int) -> Status>("ncclGetVersion")?;
    // SAFETY: NCCL writes one number.
    check("ncclGetVersion", unsafe { get(&mut code) }, null_mut())?;
    // Before 2.9 as 2804, since then as 20900.
    let base = if code < 10_000 { 1000 } else { 10_000 };
    let version = [code / base, code % base / 100, code % 100];
    if code < OLDEST {
        let [major, minor, patch] = version;
        return Err(Error::Unsupported(format!("NCCL {major}.{minor}.{patch}: 2.10 or later is needed")));
    }
    Ok(version)
}

/// The identity of a new communicator.
pub fn new_id() -> Result<Id> {
    version()?;
    let mut id = RawId([0; ID_BYTES]);
    let make = symbol::<unsafe extern "C" fn(*mut RawId) -> Status>("ncclGetUniqueId")?;
    // SAFETY: NCCL writes as many bytes as the type has.
    check("ncclGetUniqueId", unsafe { make(&mut id) }, null_mut())?;
    Ok(id.0)
}

/// One rank's part in a communicator.
pub struct Communicator {
    context: Arc<Context>,
    /// Null once it has ended.
    raw: Raw,
}

// SAFETY: a communicator may be used from any thread, by one at a time.
unsafe impl Send for Communicator {}

impl Communicator {
    /// Joins as `rank` of `world`; returns when all have joined, with an error as soon as `alive` has one.
    pub fn join(
        context: &Arc<Context>,
        id: &Id,
        world: u32,
        rank: u32,
        alive: &dyn Fn() -> Result<()>,
    ) -> Result<Self> {
        version()?;
        let (context, id) = (context.clone(), RawId(*id));
        let (send, receive) = channel();
        // NCCL waits here for all ranks, whether they live or not: in a thread of its own, so that this one can look.
        let joining = move || {
            // What nobody waits for any more is dropped, which aborts it.
            let _ = send.send(Self::join_blocking(context, id, world as c_int, rank as c_int));
        };
        let spawned = Builder::new().name("farface-nccl".into()).spawn(joining);
        spawned.map_err(|e| Error::io("a thread for NCCL could not be started", e))?;
        loop {
            match receive.recv_timeout(LOOK) {
                Ok(joined) => return joined,
                Err(RecvTimeoutError::Timeout) => alive()?,
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(Error::Internal("the thread that joins a communicator panicked".into()))
                }
            }
        }
    }

    fn join_blocking(context: Arc<Context>, id: RawId, world: c_int, rank: c_int) -> Result<Self> {
        let join =
            symbol::<unsafe extern "C" fn(*mut Raw, c_int, RawId, c_int) -> Status>("ncclCommInitRank")?;
        let mut raw = null_mut();
        let joined = {
            // The current context's device is the rank's.
            let _current = context.bind()?;
            // SAFETY: NCCL writes one handle.
            check("ncclCommInitRank", unsafe { join(&mut raw, world, id, rank) }, null_mut())
        };
        joined.map(|()| Self { context, raw })
    }

    fn raw(&self) -> Result<Raw> {
        if self.raw.is_null() {
            return Err(Error::Cuda("NCCL: the communicator was ended by an earlier error".into()));
        }
        Ok(self.raw)
    }

    /// Gives every rank, in place, what `reduce` makes of the ranks' values at the bytes `ranges` of `buffer`, in the stream's order.
    /// Every rank asks for the same in the same order, of several streams too; what they get is the same bits.
    pub fn all_reduce(
        &self,
        stream: &Stream,
        reduce: Reduce,
        buffer: &DeviceBuffer,
        ranges: &[Range<usize>],
    ) -> Result<()> {
        type Group = unsafe extern "C" fn() -> Status;
        type AllReduce = unsafe extern "C" fn(u64, u64, usize, c_int, c_int, Raw, *mut c_void) -> Status;
        let raw = self.raw()?;
        let inside = |r: &Range<usize>| r.start <= r.end && r.end <= buffer.len();
        if !ranges.iter().all(|r| inside(r) && r.start.is_multiple_of(4) && r.len().is_multiple_of(4)) {
            return Err(Error::Internal(format!("{ranges:?} of a buffer of {} to be reduced", buffer.len())));
        }
        let (start, end) = (symbol::<Group>("ncclGroupStart")?, symbol::<Group>("ncclGroupEnd")?);
        let each = symbol::<AllReduce>("ncclAllReduce")?;
        let (number, operation) = reduce.names();
        let _current = self.context.bind()?;
        // SAFETY: the communicator lives; a group that was begun is ended whatever happened in between.
        check("ncclGroupStart", unsafe { start() }, raw)?;
        let given = ranges.iter().filter(|r| !r.is_empty()).try_for_each(|r| {
            let (at, count) = (buffer.address() + r.start as u64, r.len() / 4);
            // SAFETY: the bytes were checked above to be in the buffer, which whoever gives this keeps until the stream has done it.
            let status = unsafe { each(at, at, count, number, operation, raw, stream.raw().cast()) };
            check("ncclAllReduce", status, raw)
        });
        // SAFETY: begun above.
        let ended = check("ncclGroupEnd", unsafe { end() }, raw);
        given.and(ended)
    }

    /// Waits until the stream has done all that it has. Where NCCL tells of an error, or `alive` does, the communicator is ended and this
    /// returns that error.
    pub fn wait(&mut self, stream: &Stream, alive: &dyn Fn() -> Result<()>) -> Result<()> {
        let done = self.watch(stream, alive);
        if done.is_err() {
            self.abort();
        }
        done
    }

    /// As [`Self::wait`], where the caller ends the communicator after an error.
    pub fn watch(&self, stream: &Stream, alive: &dyn Fn() -> Result<()>) -> Result<()> {
        let began = Instant::now();
        let mut looked = began;
        while !stream.is_idle()? {
            if looked.elapsed() >= LOOK {
                self.fault()?;
                alive()?;
                looked = Instant::now();
            }
            if began.elapsed() < SPIN {
                std::thread::yield_now();
            } else {
                std::thread::sleep(Duration::from_micros(50));
            }
        }
        self.fault()
    }

    /// The error that work on the device has met, if any.
    fn fault(&self) -> Result<()> {
        let raw = self.raw()?;
        let get = symbol::<unsafe extern "C" fn(Raw, *mut Status) -> Status>("ncclCommGetAsyncError")?;
        let mut status = SUCCESS;
        // SAFETY: the communicator lives; NCCL writes one number.
        check("ncclCommGetAsyncError", unsafe { get(raw, &mut status) }, raw)?;
        check("a sum over the ranks", status, raw)
    }

    /// Leaves in peace: every rank calls it, when nothing is left to be done.
    pub fn leave(&mut self) -> Result<()> {
        let raw = self.raw()?;
        let destroy = symbol::<unsafe extern "C" fn(Raw) -> Status>("ncclCommDestroy")?;
        let _current = self.context.bind()?;
        self.raw = null_mut();
        // SAFETY: the communicator lives and nobody has it any more.
        check("ncclCommDestroy", unsafe { destroy(raw) }, null_mut())
    }

    /// Ends it and what it still does on the device, whatever the other ranks do; nothing where it has ended.
    pub fn abort(&mut self) {
        struct Owned(Raw);
        // SAFETY: as a communicator.
        unsafe impl Send for Owned {}
        if self.raw.is_null() {
            return;
        }
        let (owned, context) = (Owned(std::mem::replace(&mut self.raw, null_mut())), self.context.clone());
        let (send, receive) = channel();
        let ending = move || {
            let Owned(raw) = { owned };
            if let Ok(abort) = symbol::<unsafe extern "C" fn(Raw) -> Status>("ncclCommAbort") {
                let _current = context.bind();
                // SAFETY: the communicator lives and nobody else has it any more. A failure leaves nothing to be done.
                unsafe { abort(raw) };
            }
            let _ = send.send(());
        };
        if Builder::new().name("farface-nccl-abort".into()).spawn(ending).is_ok() {
            let _ = receive.recv_timeout(ABORT);
        }
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        self.abort();
    }
}
