//! Models
//!
//! A model is a network and its weights, read from one safetensors file. It is immutable: any
//! number of threads may use it, and any number of sessions share its one copy of the weights.
//! Each session holds the model by itself, so the handle may be destroyed before the sessions.

use super::guard::{guard, input, Out, Result};
use super::status::farface_status;
use crate::detect::Model;
use crate::error::Error;
use std::ffi::{c_char, c_void, CStr, CString};
use std::path::Path;

/// A loaded model.
#[allow(non_camel_case_types)]
pub struct farface_model {
    pub(super) model: Model,
    name: CString,
    licence: CString,
    data: CString,
}

// Any thread may use a model at any time.
const _: fn() = || {
    fn shared<T: Send + Sync>() {}
    shared::<farface_model>();
};

impl farface_model {
    fn new(model: Model) -> Box<Self> {
        // A text from a file may hold a NUL, C's may not.
        let text = |s: &str| CString::new(s.replace('\0', " ")).unwrap_or_default();
        let c = model.config();
        let (name, licence, data) = (text(&c.name), text(&c.licence), text(&c.data));
        Box::new(Self { model, name, licence, data })
    }
}

/// Loads a model file. `path` is NUL-terminated: bytes as the system has them, UTF-8 on Windows.
/// No other file is touched and nothing is kept open.
///
/// Ownership: `*model` is the caller's, for farface_model_destroy().
/// Threads: any.
/// Errors: FARFACE_ERROR_IO where the file cannot be read, FARFACE_ERROR_INVALID_MODEL with the
/// tensor or field that is wrong, FARFACE_ERROR_LIMIT_EXCEEDED for a file above 2 GiB; `*model` is
/// then NULL.
#[no_mangle]
pub unsafe extern "C" fn farface_model_load(
    path: *const c_char,
    model: *mut *mut farface_model,
) -> farface_status {
    guard(|| {
        // SAFETY: the caller's promise about `model` and `path`.
        let (out, path) = unsafe { (handle_out(model)?, input(path, "path")?) };
        // SAFETY: not NULL; the caller promises a NUL-terminated text.
        let path = unsafe { CStr::from_ptr(path) };
        deliver(&out, Model::load(native_path(path)?)?);
        Ok(())
    })
}

/// Loads a model from a model file's bytes. They are not kept: free them whenever you like.
///
/// Ownership, threads and errors as with farface_model_load().
#[no_mangle]
pub unsafe extern "C" fn farface_model_load_memory(
    data: *const c_void,
    size: usize,
    model: *mut *mut farface_model,
) -> farface_status {
    guard(|| {
        // SAFETY: the caller's promise about `model` and `data`.
        let (out, first) = unsafe { (handle_out(model)?, input(data.cast::<u8>(), "data")?) };
        if size > isize::MAX as usize {
            return Err(Error::InvalidArgument(format!("size {size} is larger than memory")).into());
        }
        // SAFETY: not NULL, no larger than memory; the caller promises `size` readable bytes.
        let bytes = unsafe { std::slice::from_raw_parts(first, size) };
        deliver(&out, Model::from_bytes(bytes)?);
        Ok(())
    })
}

/// The model within the library: no file is read. A library built without the feature
/// `default-model`, as firmware may be, has none.
///
/// Ownership: `*model` is the caller's, for farface_model_destroy().
/// Threads: any.
/// Errors: FARFACE_ERROR_UNSUPPORTED where the library has no model; `*model` is then NULL.
#[no_mangle]
pub unsafe extern "C" fn farface_model_default(model: *mut *mut farface_model) -> farface_status {
    guard(|| {
        // SAFETY: the caller's promise about `model`.
        let out = unsafe { handle_out(model)? };
        deliver(&out, Model::default_model()?);
        Ok(())
    })
}

/// Gives the model back. NULL is fine. Sessions made from it keep working.
///
/// Threads: any, but no other call may be using the handle.
#[no_mangle]
pub unsafe extern "C" fn farface_model_destroy(model: *mut farface_model) {
    guard(|| {
        if !model.is_null() {
            // SAFETY: the caller promises that this is a handle of this library, not yet destroyed.
            drop(unsafe { Box::from_raw(model) });
        }
        Ok(())
    });
}

/// Name of the model, such as "retinaface-mobile025" (UTF-8); "" where the file has none.
///
/// Ownership: the text is the model's, valid until farface_model_destroy().
/// Threads: any.
#[no_mangle]
pub unsafe extern "C" fn farface_model_name(
    model: *const farface_model,
    name: *mut *const c_char,
) -> farface_status {
    // SAFETY: the caller's promise about both pointers.
    unsafe { text(model, name, "name", |m| &m.name) }
}

/// Licence of the weights (UTF-8); "" where the file names none.
///
/// Ownership: the text is the model's, valid until farface_model_destroy().
/// Threads: any.
#[no_mangle]
pub unsafe extern "C" fn farface_model_licence(
    model: *const farface_model,
    licence: *mut *const c_char,
) -> farface_status {
    // SAFETY: the caller's promise about both pointers.
    unsafe { text(model, licence, "licence", |m| &m.licence) }
}

/// Data that the weights were trained on (UTF-8); "" where the file names none.
///
/// Ownership: the text is the model's, valid until farface_model_destroy().
/// Threads: any.
#[no_mangle]
pub unsafe extern "C" fn farface_model_training_data(
    model: *const farface_model,
    data: *mut *const c_char,
) -> farface_status {
    // SAFETY: the caller's promise about both pointers.
    unsafe { text(model, data, "data", |m| &m.data) }
}

/// Sizes of face that the network finds in a picture that is not resized (for models with scales of
/// their own, in the pixels of one of these): `*smallest` and `*largest`, longer side in pixels.
/// Other sizes are found through `min_face_px` and `max_face_px` of the session's options, which
/// resize the picture.
///
/// Threads: any.
#[no_mangle]
pub unsafe extern "C" fn farface_model_detectable_px(
    model: *const farface_model,
    smallest: *mut f32,
    largest: *mut f32,
) -> farface_status {
    guard(|| {
        // SAFETY: the caller's promise about the three pointers.
        let (model, smallest, largest) = unsafe {
            (input(model, "model")?, Out::new(smallest, "smallest")?, Out::new(largest, "largest")?)
        };
        let [min, max] = model.model.config().detectable_px;
        smallest.set(min);
        largest.set(max);
        Ok(())
    })
}

/// Number of trained values of the network.
///
/// Threads: any.
#[no_mangle]
pub unsafe extern "C" fn farface_model_parameter_count(
    model: *const farface_model,
    count: *mut u64,
) -> farface_status {
    guard(|| {
        // SAFETY: the caller's promise about both pointers.
        let (model, count) = unsafe { (input(model, "model")?, Out::new(count, "count")?) };
        count.set(model.model.param_count() as u64);
        Ok(())
    })
}

/// The place for a new handle, NULL until there is one.
///
/// # Safety
/// As [`Out::new`].
unsafe fn handle_out(model: *mut *mut farface_model) -> Result<Out<*mut farface_model>> {
    // SAFETY: the caller's contract.
    let out = unsafe { Out::new(model, "model")? };
    out.set(std::ptr::null_mut());
    Ok(out)
}

fn deliver(out: &Out<*mut farface_model>, model: Model) {
    out.set(Box::into_raw(farface_model::new(model)));
}

/// # Safety
/// `model` and `out` are NULL or valid.
unsafe fn text(
    model: *const farface_model,
    out: *mut *const c_char,
    name: &str,
    get: impl Fn(&farface_model) -> &CString,
) -> farface_status {
    guard(|| {
        // SAFETY: the caller's contract.
        let (model, out) = unsafe { (input(model, "model")?, Out::new(out, name)?) };
        out.set(get(model).as_ptr());
        Ok(())
    })
}

#[cfg(unix)]
fn native_path(path: &CStr) -> Result<&Path> {
    use std::os::unix::ffi::OsStrExt;
    Ok(Path::new(std::ffi::OsStr::from_bytes(path.to_bytes())))
}

#[cfg(not(unix))]
fn native_path(path: &CStr) -> Result<&Path> {
    let text = path.to_str().map_err(|e| Error::InvalidArgument(format!("path is not UTF-8: {e}")))?;
    Ok(Path::new(text))
}
