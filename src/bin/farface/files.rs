//! Writing files whole or not at all.

use anyhow::{Context, Result};
use std::path::Path;

/// Writes `bytes` to `path`: a temporary file beside it, then a rename.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().with_context(|| format!("{}: not a file name", path.display()))?);
    name.push(format!(".{}.tmp", std::process::id()));
    let temporary = path.with_file_name(name);
    std::fs::write(&temporary, bytes).and_then(|()| std::fs::rename(&temporary, path)).map_err(|e| {
        // The error at hand says more than a failing removal would.
        let _ = std::fs::remove_file(&temporary);
        farface::Error::io(path, e).into()
    })
}

/// Makes `dir` and the folders above it.
pub fn make_dir(dir: &Path) -> Result<()> {
    Ok(std::fs::create_dir_all(dir).map_err(|e| farface::Error::io(dir, e))?)
}
