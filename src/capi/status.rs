//! Status and errors
//!
//! Every function that can fail returns a farface_status. The code is stable and meant for
//! programs; farface_last_error() adds a sentence for people, which names the file, the tensor or
//! the argument at fault. Where a function fails, what it should have written is not written,
//! unless its comment says otherwise; handles asked for are set to NULL.
//!
//! A bug inside the library is caught at this border, told on the standard error and returned as
//! FARFACE_ERROR_INTERNAL. A system that refuses the memory of a picture's maps is
//! FARFACE_ERROR_LIMIT_EXCEEDED; one that refuses even the small buffers beside them aborts the
//! process, as most systems do by themselves. The memory cap of a session keeps far from both.

use super::guard;
use std::ffi::c_char;

/// Result of a call: FARFACE_OK or one of the FARFACE_ERROR_ codes. Later versions may add codes.
#[allow(non_camel_case_types)]
pub type farface_status = i32;

/// All went well.
pub const FARFACE_OK: farface_status = 0;
/// An argument or option is NULL or outside its range.
pub const FARFACE_ERROR_INVALID_ARGUMENT: farface_status = 1;
/// A picture's size, format, planes, strides, rotation or region do not fit together.
pub const FARFACE_ERROR_INVALID_IMAGE: farface_status = 2;
/// A file could not be read.
pub const FARFACE_ERROR_IO: farface_status = 3;
/// A model file is malformed, truncated, of an unknown version, or lacks a tensor.
pub const FARFACE_ERROR_INVALID_MODEL: farface_status = 4;
/// More pixels, memory or threads than the caps or the system allow.
pub const FARFACE_ERROR_LIMIT_EXCEEDED: farface_status = 5;
/// This build or this machine lacks what was required.
pub const FARFACE_ERROR_UNSUPPORTED: farface_status = 6;
/// There are more faces than the caller's array has room for. The best that fit are in it.
pub const FARFACE_ERROR_BUFFER_TOO_SMALL: farface_status = 7;
/// Another thread is in a call with the same session.
pub const FARFACE_ERROR_BUSY: farface_status = 8;
/// A bug in the library; please report it. The session concerned can only be destroyed.
pub const FARFACE_ERROR_INTERNAL: farface_status = 9;

/// A CUDA device or one of its libraries failed in a call; the message names it. The session may be used again.
pub const FARFACE_ERROR_CUDA: farface_status = 10;

/// A few words for a status; "unknown status" for a number that is none. The text is static.
///
/// Threads: any.
#[no_mangle]
pub extern "C" fn farface_status_string(status: farface_status) -> *const c_char {
    let text = match status {
        FARFACE_OK => c"ok",
        FARFACE_ERROR_INVALID_ARGUMENT => c"invalid argument",
        FARFACE_ERROR_INVALID_IMAGE => c"invalid image",
        FARFACE_ERROR_IO => c"input/output error",
        FARFACE_ERROR_INVALID_MODEL => c"invalid model",
        FARFACE_ERROR_LIMIT_EXCEEDED => c"limit exceeded",
        FARFACE_ERROR_UNSUPPORTED => c"unsupported",
        FARFACE_ERROR_BUFFER_TOO_SMALL => c"buffer too small",
        FARFACE_ERROR_BUSY => c"session busy",
        FARFACE_ERROR_INTERNAL => c"internal error",
        FARFACE_ERROR_CUDA => c"CUDA error",
        _ => c"unknown status",
    };
    text.as_ptr()
}

/// Message of the last call that failed on this thread (UTF-8, at most 1023 bytes), or "" where
/// none has. A call that succeeds leaves it as it is, so look at it only after a failure.
///
/// The text belongs to the library and is valid until this thread's next call; copy it to keep it.
///
/// Threads: any; each has its own message.
#[no_mangle]
pub extern "C" fn farface_last_error() -> *const c_char {
    guard::last_message()
}
