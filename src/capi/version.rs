//! Version
//!
//! The macros tell what the program was compiled with, the functions what it runs with. Programs
//! compiled with an older header keep running as long as FARFACE_ABI_VERSION is the same; the
//! shared library's soname carries that number.

use std::ffi::c_char;

/// Major version of this header.
pub const FARFACE_VERSION_MAJOR: u32 = 0;
/// Minor version of this header.
pub const FARFACE_VERSION_MINOR: u32 = 1;
/// Patch level of this header.
pub const FARFACE_VERSION_PATCH: u32 = 0;
/// Version of the binary interface: it changes only where a compiled program would break.
pub const FARFACE_ABI_VERSION: u32 = 0;

/// The library's version as text, such as "0.1.0". The text is static.
#[no_mangle]
pub extern "C" fn farface_version() -> *const c_char {
    concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()
}

/// The library's FARFACE_ABI_VERSION. A program that loads the library at run time compares it
/// with its own before any other call.
#[no_mangle]
pub extern "C" fn farface_abi_version() -> u32 {
    FARFACE_ABI_VERSION
}
