//! The border: panics caught, messages remembered, pointers checked.

use super::status::*;
use crate::error::{Error, Result as LibraryResult};
use std::any::Any;
use std::cell::RefCell;
use std::fmt::{self, Write};
use std::panic::{catch_unwind, AssertUnwindSafe};

/// Why an entry failed.
#[derive(Debug)]
pub(super) enum Failure {
    /// The library refused.
    Error(Error),
    /// The session is in another call.
    Busy,
}

impl From<Error> for Failure {
    fn from(e: Error) -> Self {
        Failure::Error(e)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Error(e) => e.fmt(f),
            Failure::Busy => f.write_str(
                "session busy: another thread is in a call with this session; one caller at a time",
            ),
        }
    }
}

impl Failure {
    /// The stable code.
    pub fn status(&self) -> farface_status {
        let Failure::Error(e) = self else { return FARFACE_ERROR_BUSY };
        match e {
            Error::InvalidArgument(_) => FARFACE_ERROR_INVALID_ARGUMENT,
            Error::InvalidImage(_) => FARFACE_ERROR_INVALID_IMAGE,
            Error::Io { .. } => FARFACE_ERROR_IO,
            Error::InvalidModel(_) | Error::InvalidData(_) => FARFACE_ERROR_INVALID_MODEL,
            Error::LimitExceeded(_) => FARFACE_ERROR_LIMIT_EXCEEDED,
            Error::Unsupported(_) => FARFACE_ERROR_UNSUPPORTED,
            Error::BufferTooSmall { .. } => FARFACE_ERROR_BUFFER_TOO_SMALL,
            Error::Internal(_) => FARFACE_ERROR_INTERNAL,
            Error::Cuda(_) => FARFACE_ERROR_CUDA,
        }
    }
}

/// Result of an entry's body.
pub(super) type Result<T, E = Failure> = std::result::Result<T, E>;

/// Runs the body of an entry: errors and panics become a status, their text the thread's message.
pub(super) fn guard(body: impl FnOnce() -> Result<()>) -> farface_status {
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => FARFACE_OK,
        Ok(Err(failure)) => {
            remember(format_args!("{failure}"));
            failure.status()
        }
        Err(panic) => {
            let text = panic_text(&*panic);
            remember(format_args!("internal error: {text}; please report it"));
            // Dropping a payload may run anything, a second panic included.
            std::mem::forget(panic);
            FARFACE_ERROR_INTERNAL
        }
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("a panic without a message")
}

/// Bytes of the longest message kept, its NUL included; longer ones are cut.
const MESSAGE_BYTES: usize = 1024;

/// A NUL-terminated text of fixed room, so that a failing call allocates nothing.
struct Message {
    bytes: [u8; MESSAGE_BYTES],
    length: usize,
}

impl Write for Message {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for c in text.chars() {
            let c = if c == '\0' { ' ' } else { c };
            if self.length + c.len_utf8() >= MESSAGE_BYTES {
                return Err(fmt::Error); // full: the rest is cut
            }
            c.encode_utf8(&mut self.bytes[self.length..]);
            self.length += c.len_utf8();
        }
        Ok(())
    }
}

thread_local! {
    // No destructor, no lazy part: touching it neither allocates nor registers anything.
    static MESSAGE: RefCell<Message> = const { RefCell::new(Message { bytes: [0; MESSAGE_BYTES], length: 0 }) };
}

/// Makes `text` this thread's message.
pub(super) fn remember(text: fmt::Arguments<'_>) {
    MESSAGE.with_borrow_mut(|m| {
        m.length = 0;
        // An error means that the message was cut.
        let _ = m.write_fmt(text);
        m.bytes[m.length] = 0;
    });
}

/// This thread's message, NUL-terminated; it stays in place as long as the thread lives.
pub(super) fn last_message() -> *const std::ffi::c_char {
    MESSAGE.with(|m| m.as_ptr().cast::<Message>()).cast_const().cast()
}

fn bad_pointer<T>(p: *const T, name: &str) -> Option<Error> {
    if p.is_null() {
        Some(Error::InvalidArgument(format!("{name} is NULL")))
    } else if !p.is_aligned() {
        Some(Error::InvalidArgument(format!("{name} is not aligned to {} bytes", align_of::<T>())))
    } else {
        None
    }
}

/// What `p` points to.
///
/// # Safety
/// `p` is NULL, misaligned, or points to a valid T that nobody writes during `'a`.
pub(super) unsafe fn input<'a, T>(p: *const T, name: &str) -> LibraryResult<&'a T> {
    match bad_pointer(p, name) {
        Some(e) => Err(e),
        // SAFETY: neither NULL nor misaligned; the rest is the caller's contract.
        None => Ok(unsafe { &*p }),
    }
}

/// A place that the caller wants a result in; it may be uninitialised.
pub(super) struct Out<T>(*mut T);

impl<T> Out<T> {
    /// Checks the pointer.
    ///
    /// # Safety
    /// `p` is NULL, misaligned, or may be written for the life of the result.
    pub unsafe fn new(p: *mut T, name: &str) -> LibraryResult<Self> {
        match bad_pointer(p, name) {
            Some(e) => Err(e),
            None => Ok(Self(p)),
        }
    }

    /// Writes the result.
    pub fn set(&self, value: T) {
        // SAFETY: `new` checked the pointer, its caller promised that it may be written.
        unsafe { self.0.write(value) }
    }
}

/// An array of `count` entries that the caller wants results in; it may be uninitialised.
pub(super) struct OutSlice<T> {
    first: *mut T,
    count: usize,
}

impl<T> OutSlice<T> {
    /// Checks the pointer; NULL is fine for no entries.
    ///
    /// # Safety
    /// `first` is NULL, misaligned, or `count` entries from it on may be written for the life of
    /// the result.
    pub unsafe fn new(first: *mut T, count: usize, name: &str) -> LibraryResult<Self> {
        if count == 0 {
            return Ok(Self { first, count });
        }
        if let Some(e) = bad_pointer(first, name) {
            return Err(e);
        }
        if count > isize::MAX as usize / size_of::<T>() {
            return Err(Error::InvalidArgument(format!(
                "{name} cannot have {count} entries: memory ends before"
            )));
        }
        Ok(Self { first, count })
    }

    /// Entries.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Writes entry `i`, which must be below [`Self::len`].
    pub fn set(&self, i: usize, value: T) {
        self.entry(i).set(value);
    }

    /// Entry `i`, which must be below [`Self::len`], by itself.
    pub fn entry(&self, i: usize) -> Out<T> {
        assert!(i < self.count, "entry {i} of {}", self.count);
        // SAFETY: `new` checked the array, i is inside.
        Out(unsafe { self.first.add(i) })
    }

    /// Entries `from .. from + count`, which must be inside.
    pub fn part(&self, from: usize, count: usize) -> Self {
        assert!(from <= self.count && count <= self.count - from, "part outside the array");
        if count == 0 {
            return Self { first: self.first, count };
        }
        // SAFETY: `new` checked the array, the part is inside.
        Self { first: unsafe { self.first.add(from) }, count }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::CStr;

    fn message() -> String {
        // SAFETY: the thread's own message, NUL-terminated.
        unsafe { CStr::from_ptr(last_message()) }.to_str().unwrap().to_string()
    }

    #[test]
    fn a_panic_becomes_a_status_and_a_message() {
        assert_eq!(guard(|| panic!("cell {} is lost", 7)), FARFACE_ERROR_INTERNAL);
        assert_eq!(message(), "internal error: cell 7 is lost; please report it");
        assert_eq!(guard(|| std::panic::panic_any(5u8)), FARFACE_ERROR_INTERNAL);
        assert!(message().contains("a panic without a message"));
    }

    #[test]
    fn a_panic_while_dropping_the_panic_stays_inside() {
        struct Bomb;
        impl Drop for Bomb {
            fn drop(&mut self) {
                panic!("in drop");
            }
        }
        assert_eq!(guard(|| std::panic::panic_any(Bomb)), FARFACE_ERROR_INTERNAL);
    }

    #[test]
    fn messages_are_cut_at_a_whole_character_and_hold_no_nul() {
        let long = "a\0ü".repeat(MESSAGE_BYTES);
        assert_eq!(guard(|| Err(Error::InvalidModel(long).into())), FARFACE_ERROR_INVALID_MODEL);
        let kept = message();
        assert!(kept.len() < MESSAGE_BYTES && kept.len() >= MESSAGE_BYTES - 4, "{}", kept.len());
        assert!(kept.starts_with("invalid model: a üa ü"));
        assert_eq!(guard(|| Ok(())), FARFACE_OK);
        assert_eq!(message(), kept, "success keeps the message");
    }

    #[test]
    fn threads_have_their_own_messages() {
        guard(|| Err(Failure::Busy));
        let mine = message();
        std::thread::spawn(|| assert_eq!(message(), "")).join().unwrap();
        assert_eq!(message(), mine);
    }

    #[test]
    fn pointers_are_checked_before_use() {
        // SAFETY: NULL and misaligned pointers are refused unread.
        unsafe {
            let odd = std::ptr::without_provenance_mut::<u64>(9);
            assert!(input(std::ptr::null::<u64>(), "x").unwrap_err().to_string().contains("x is NULL"));
            assert!(input(odd, "x").unwrap_err().to_string().contains("aligned"));
            assert!(Out::new(odd, "x").is_err());
            assert!(OutSlice::new(std::ptr::null_mut::<u64>(), 1, "x").is_err());
            assert!(OutSlice::new(std::ptr::null_mut::<u64>(), 0, "x").is_ok());
            assert!(OutSlice::new(std::ptr::without_provenance_mut::<u64>(8), usize::MAX / 8, "x").is_err());
        }
    }
}
