//! Code of kernels by NVRTC, compiled when it is asked for and kept in a folder.

use super::nvrtc::Nvrtc;
use crate::error::Result;
use crate::files;
use std::hash::{Hash, Hasher};
use std::path::PathBuf;

/// What files include.
const HEADERS: &[(&str, &str)] = &[
    ("common.cuh", include_str!("../../cuda/common.cuh")),
    ("suppress.cuh", include_str!("../../cuda/suppress.cuh")),
];

/// The compiler, for one device.
pub(super) struct Code {
    capability: [u32; 2],
    compiler: Nvrtc,
    cache: Option<PathBuf>,
}

impl Code {
    /// Opens the compiler; nothing is compiled yet.
    pub fn new(capability: [u32; 2]) -> Result<Self> {
        Ok(Self { capability, compiler: Nvrtc::open()?, cache: cache_folder() })
    }

    /// What `load` makes of the code of a file, given by name and text.
    pub fn load<T>(&self, file: (&str, &str), load: impl Fn(&[u8]) -> Result<T>) -> Result<T> {
        let kept = self.kept(file)?;
        let cached =
            kept.as_ref().and_then(|path| std::fs::read(path).ok()).filter(|image| !image.is_empty());
        // What was kept and cannot be loaded (a file cut short) is compiled anew.
        if let Some(Ok(loaded)) = cached.map(|image| load(&image)) {
            return Ok(loaded);
        }
        let image = self.compile(file)?;
        let loaded = load(&image)?;
        // What cannot be kept is compiled again the next time.
        if let Some(path) = kept {
            let folder = path.parent().unwrap_or(&path);
            let _ = files::make_dir(folder).and_then(|()| files::write_whole(&path, &image));
        }
        Ok(loaded)
    }

    /// The architecture that is compiled for, and whether it is the device's own.
    fn target(&self) -> Result<(i32, bool)> {
        let [major, minor] = self.capability;
        let arch = self.compiler.arch_for([major, minor])?;
        Ok((arch, arch == (major * 10 + minor) as i32))
    }

    /// Machine code or PTX of a file.
    fn compile(&self, (name, text): (&str, &str)) -> Result<Vec<u8>> {
        let (arch, own) = self.target()?;
        self.compiler.compile(name, text, HEADERS, arch, own)
    }

    /// Where a file's code is kept, if at all: by a hash of all that it depends on.
    fn kept(&self, (name, text): (&str, &str)) -> Result<Option<PathBuf>> {
        let Some(folder) = &self.cache else { return Ok(None) };
        let (arch, own) = self.target()?;
        let mut hash = std::hash::DefaultHasher::new();
        (HEADERS, text, arch, own, self.compiler.version(), env!("CARGO_PKG_VERSION")).hash(&mut hash);
        let (stem, kind) = (name.trim_end_matches(".cu"), if own { "cubin" } else { "ptx" });
        Ok(Some(folder.join(format!("{stem}-{arch}-{:016x}.{kind}", hash.finish()))))
    }
}

/// Where compiled code is kept.
fn cache_folder() -> Option<PathBuf> {
    match std::env::var_os("FARFACE_CUDA_CACHE") {
        Some(off) if off == "off" => None,
        Some(folder) => Some(folder.into()),
        None => {
            let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache"));
            let base = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or_else(home)?;
            Some(base.join("farface"))
        }
    }
}
