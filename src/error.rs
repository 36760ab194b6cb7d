//! One error type for the crate: a kind that maps to a stable C status, and a message that names
//! the file, tensor, layer or argument at fault and says what to do.

use std::path::Path;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong. Every variant's text names the thing at fault.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An argument is outside its range; the text names it.
    #[error("invalid argument: {0}")]
    InvalidArgument(String),
    /// A picture's view is inconsistent: size, stride, plane or format.
    #[error("invalid image: {0}")]
    InvalidImage(String),
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// The operating system's reason.
        source: std::io::Error,
    },
    /// A model file is malformed, truncated, of an unknown version, or lacks a tensor.
    #[error("invalid model: {0}")]
    InvalidModel(String),
    /// Asked for more memory or pixels than the caps allow.
    #[error("limit exceeded: {0}")]
    LimitExceeded(String),
    /// The machine or this build lacks what was required (ISA, CUDA library, feature).
    #[error("unsupported: {0}")]
    Unsupported(String),
    /// A CUDA device or library failed; the text names the call.
    #[error("CUDA: {0}")]
    Cuda(String),
    /// The caller's buffer is too small.
    #[error("buffer too small: {needed} needed, room for {capacity}")]
    BufferTooSmall {
        /// Entries needed.
        needed: usize,
        /// Entries there was room for.
        capacity: usize,
    },
    /// A data or annotation file does not follow its format.
    #[error("invalid data: {0}")]
    InvalidData(String),
    /// A bug in this library; please report it.
    #[error("internal error: {0}")]
    Internal(String),
}

impl Error {
    /// Wraps an I/O error with the path it happened on.
    pub fn io(path: impl AsRef<Path>, source: std::io::Error) -> Self {
        Self::Io { path: path.as_ref().display().to_string(), source }
    }
}
