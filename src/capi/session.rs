//! Sessions
//!
//! A session is a detector at work: a model, settings, buffers and threads. One caller at a time
//! uses it, from whichever thread; a second caller gets FARFACE_ERROR_BUSY. A process may hold any
//! number of sessions. Its threads sleep between calls. They do not survive fork(): make the
//! session in the child.
//!
//! What depends on a picture's size is prepared at the first picture of that size and kept for the
//! last eight sizes. farface_session_warmup() does it ahead: detecting at a size that was warmed up
//! takes no memory from the system, and with one thread makes no system call at all.

use super::guard::{guard, input, Failure, Out, Result};
use super::model::farface_model;
use super::options::{self, farface_session_options};
use super::status::farface_status;
use crate::detect::{Options, Session};
use crate::error::Error;
use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicU8, Ordering};

/// A detector at work.
#[allow(non_camel_case_types)]
pub struct farface_session {
    state: AtomicU8,
    session: UnsafeCell<Session>,
}

// A session may move between threads.
const _: fn() = || {
    fn movable<T: Send>() {}
    movable::<Session>();
};

/// Nobody is in a call.
const IDLE: u8 = 0;
/// Somebody is in a call.
const BUSY: u8 = 1;
/// A call panicked.
const BROKEN: u8 = 2;

/// Where a network runs: one of the FARFACE_DEVICE_ values.
#[allow(non_camel_case_types)]
pub type farface_device = u32;

/// The CPU.
pub const FARFACE_DEVICE_CPU: farface_device = 1;
/// A CUDA device.
pub const FARFACE_DEVICE_CUDA: farface_device = 2;

/// Makes a session. `options` may be NULL: the model's own settings on one thread.
///
/// Ownership: `*session` is the caller's, for farface_session_destroy(). The model is held by the
/// session itself, `options` is not kept.
/// Threads: any.
/// Errors: FARFACE_ERROR_INVALID_ARGUMENT naming the option, FARFACE_ERROR_UNSUPPORTED where a
/// required device is missing, FARFACE_ERROR_LIMIT_EXCEEDED where threads cannot be started;
/// `*session` is then NULL.
#[no_mangle]
pub unsafe extern "C" fn farface_session_create(
    model: *const farface_model,
    options: *const farface_session_options,
    session: *mut *mut farface_session,
) -> farface_status {
    guard(|| {
        // SAFETY: the caller's promise about `session`.
        let out = unsafe { Out::new(session, "session")? };
        out.set(std::ptr::null_mut());
        // SAFETY: the caller's promise about `model`.
        let model = &unsafe { input(model, "model")? }.model;
        let own = Options::for_model(model.config());
        let options = if options.is_null() {
            own
        } else {
            // SAFETY: the caller's promise about `options`.
            unsafe { options::read(options, &own)? }
        };
        let session = UnsafeCell::new(Session::with_options(model, options)?);
        out.set(Box::into_raw(Box::new(farface_session { state: AtomicU8::new(IDLE), session })));
        Ok(())
    })
}

/// Gives the session, its memory and its threads back. NULL is fine.
///
/// Threads: any, but no other call may be using the handle.
#[no_mangle]
pub unsafe extern "C" fn farface_session_destroy(session: *mut farface_session) {
    guard(|| {
        if !session.is_null() {
            // SAFETY: the caller promises that this is a handle of this library, not yet destroyed.
            drop(unsafe { Box::from_raw(session) });
        }
        Ok(())
    });
}

/// Reads the session's settings. Set `options->struct_size` to sizeof(farface_session_options)
/// before, or call farface_session_options_init().
///
/// Errors: FARFACE_ERROR_INVALID_ARGUMENT for NULL or an impossible `struct_size`.
#[no_mangle]
pub unsafe extern "C" fn farface_session_get_options(
    session: *const farface_session,
    options: *mut farface_session_options,
) -> farface_status {
    guard(|| {
        // SAFETY: the caller's promise about both pointers.
        unsafe { enter(session, |s| options::write_back(options, s.options())) }
    })
}

/// Changes the session's settings, from the next call on. Fields behind `options->struct_size`
/// keep their values. Scores and overlaps cost nothing. Face sizes, pyramid, tiles, memory cap and
/// the numbers of candidates, faces and threads give up all that was prepared: warm up again where
/// the next call must not take memory.
///
/// Errors: as farface_session_create(); the settings then stay as they were.
#[no_mangle]
pub unsafe extern "C" fn farface_session_set_options(
    session: *mut farface_session,
    options: *const farface_session_options,
) -> farface_status {
    guard(|| {
        // SAFETY: the caller's promise about both pointers.
        unsafe {
            enter(session, |s| {
                let options = options::read(options, s.options())?;
                Ok(s.set_options(options)?)
            })
        }
    })
}

/// Where the session's network runs: `*device` is FARFACE_DEVICE_CPU or FARFACE_DEVICE_CUDA,
/// `*index` the CUDA device's index, 0 for the CPU. Either may be NULL where it is not wanted.
#[no_mangle]
pub unsafe extern "C" fn farface_session_device(
    session: *const farface_session,
    device: *mut farface_device,
    index: *mut u32,
) -> farface_status {
    guard(|| {
        // SAFETY: the caller's promise about `session`.
        let name = unsafe { enter(session, |s| Ok(s.device().to_string()))? };
        let (kind, number) = match name.split_once(':') {
            Some(("cuda", n)) => (FARFACE_DEVICE_CUDA, n.parse().ok()),
            None if name == "cpu" => (FARFACE_DEVICE_CPU, Some(0)),
            _ => (0, None),
        };
        let number = number.ok_or_else(|| Error::Internal(format!("device {name:?} has no number")))?;
        if !device.is_null() {
            // SAFETY: not NULL; the caller promises that it may be written.
            unsafe { Out::new(device, "device")? }.set(kind);
        }
        if !index.is_null() {
            // SAFETY: as above.
            unsafe { Out::new(index, "index")? }.set(number);
        }
        Ok(())
    })
}

/// Prepares the session for pictures of `width` x `height` pixels, so that detecting on them takes
/// no memory. Size of the region of interest once upright: a 640 x 480 picture that is to be turned
/// by 90 degrees counts as 480 x 640.
///
/// Errors: FARFACE_ERROR_INVALID_ARGUMENT for a size of 0, FARFACE_ERROR_LIMIT_EXCEEDED where the
/// picture or the smallest tile is too large for the caps.
#[no_mangle]
pub unsafe extern "C" fn farface_session_warmup(
    session: *mut farface_session,
    width: u32,
    height: u32,
) -> farface_status {
    guard(|| {
        // SAFETY: the caller's promise about `session`.
        unsafe { enter(session, |s| Ok(s.warmup(width as usize, height as usize)?)) }
    })
}

/// Bytes of memory that the session holds once warmed up for pictures of `width` x `height` pixels
/// (upright, as with farface_session_warmup()) and no other size, which is also the most it ever
/// holds on the way there. The weights, which belong to the model, and the stacks of threads are
/// not counted.
///
/// Errors: as farface_session_warmup().
#[no_mangle]
pub unsafe extern "C" fn farface_session_workspace_bytes(
    session: *const farface_session,
    width: u32,
    height: u32,
    bytes: *mut u64,
) -> farface_status {
    guard(|| {
        // SAFETY: the caller's promise about both pointers.
        let out = unsafe { Out::new(bytes, "bytes")? };
        // SAFETY: as above.
        out.set(unsafe { enter(session, |s| Ok(s.workspace_bytes(width as usize, height as usize)?))? });
        Ok(())
    })
}

/// Runs `body` on the session, alone. A panic leaves the session broken for good: its buffers may
/// be half filled.
///
/// # Safety
/// `session` is NULL or a handle of this library that is not destroyed meanwhile.
pub(super) unsafe fn enter<R>(
    session: *const farface_session,
    body: impl FnOnce(&mut Session) -> Result<R>,
) -> Result<R> {
    struct Leave<'a>(&'a AtomicU8, u8);
    impl Drop for Leave<'_> {
        fn drop(&mut self) {
            self.0.store(self.1, Ordering::Release);
        }
    }
    // SAFETY: the caller's contract; all access to the cell goes through the state below.
    let handle = unsafe { input(session, "session")? };
    match handle.state.compare_exchange(IDLE, BUSY, Ordering::Acquire, Ordering::Relaxed) {
        Ok(_) => {}
        Err(BROKEN) => {
            let text =
                "the session broke in an earlier call that returned FARFACE_ERROR_INTERNAL; destroy it";
            return Err(Error::Internal(text.into()).into());
        }
        Err(_) => return Err(Failure::Busy),
    }
    let mut leave = Leave(&handle.state, BROKEN);
    // SAFETY: the state is BUSY, and only this call made it so: nobody else is at the cell.
    let result = body(unsafe { &mut *handle.session.get() });
    leave.1 = IDLE;
    result
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capi::status::*;
    use crate::detect::config::DetectorConfig;
    use crate::detect::detector::Detector;
    use crate::detect::{Model, ModelConfig};
    use crate::graph::weights::{WeightTensor, Weights};

    /// A session of a network whose parameters are all 1.
    fn session() -> farface_session {
        let config = ModelConfig::retinaface_mobile025();
        let DetectorConfig::Retinaface(detector) = &config.detector else { unreachable!("built above") };
        let ones =
            |shape: &[usize]| WeightTensor { shape: shape.to_vec(), data: vec![1.0; shape.iter().product()] };
        let tensors = detector.graph().params.iter().map(|p| (p.name.clone(), ones(&p.shape))).collect();
        let metadata = [(crate::detect::config::METADATA_KEY.into(), config.to_json().unwrap())].into();
        let model = Model::from_weights(&Weights { tensors, metadata }).unwrap();
        let session = UnsafeCell::new(Session::new(&model).unwrap());
        farface_session { state: AtomicU8::new(IDLE), session }
    }

    #[test]
    fn a_panic_breaks_the_session_and_is_told_from_then_on() {
        let handle = session();
        // SAFETY: a live session here and below.
        let status = guard(|| unsafe { enter(&handle, |_| -> Result<()> { panic!("half way") }) });
        assert_eq!(status, FARFACE_ERROR_INTERNAL);
        // SAFETY: as above.
        let status = guard(|| unsafe { enter(&handle, |_| Ok(())) });
        assert_eq!(status, FARFACE_ERROR_INTERNAL);
    }

    #[test]
    fn an_error_leaves_the_session_usable_and_a_call_inside_a_call_is_refused() {
        let handle = session();
        // SAFETY: as above; the inner call is refused before it touches the session.
        let status = guard(|| unsafe {
            enter(&handle, |_| {
                assert_eq!(guard(|| enter(&handle, |_| Ok(()))), FARFACE_ERROR_BUSY);
                Err::<(), _>(Error::Unsupported("this".into()).into())
            })
        });
        assert_eq!(status, FARFACE_ERROR_UNSUPPORTED);
        // SAFETY: as above.
        assert_eq!(guard(|| unsafe { enter(&handle, |_| Ok(())) }), FARFACE_OK);
    }
}
