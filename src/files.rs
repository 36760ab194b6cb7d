//! Writing files whole or not at all.

use crate::{Error, Result};
use std::fs::File;
use std::io::Write;
use std::path::Path;

/// Writes `bytes` to `path`: a file of our own beside it, then a rename, which is atomic and touches nobody else's file.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    replace(path, bytes, false)
}

/// As [`write_whole`], and on the disk when this returns.
pub fn write_durably(path: &Path, bytes: &[u8]) -> Result<()> {
    replace(path, bytes, true)
}

fn replace(path: &Path, bytes: &[u8], durable: bool) -> Result<()> {
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(format!(".{}.part", std::process::id()));
    let part = path.with_file_name(name);
    let write = || {
        let mut file = File::create(&part)?;
        file.write_all(bytes)?;
        if durable {
            file.sync_all()?;
        }
        drop(file);
        std::fs::rename(&part, path)?;
        // The rename itself is in the folder.
        match path.parent().filter(|p| durable && !p.as_os_str().is_empty()) {
            #[cfg(unix)]
            Some(folder) => File::open(folder)?.sync_all(),
            _ => Ok(()),
        }
    };
    write().map_err(|e| {
        // The error at hand says more than a failing removal would.
        let _ = std::fs::remove_file(&part);
        Error::io(path, e)
    })
}

/// Makes `dir` and the folders above it.
pub fn make_dir(dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir).map_err(|e| Error::io(dir, e))
}
