//! NVIDIA's libraries: which of them there are, and where.
//!
//! Each is looked for where the dynamic loader looks, then in the folders that `FARFACE_CUDA_PATH` lists (as `PATH` does), then in
//! those of the toolkits that `CUDA_HOME` and `CUDA_PATH` name and of `/usr/local/cuda`, then in pip's `nvidia` packages of the active
//! Python environment. What was found stays open: cudarc, which asks for libraries by name and panics where one is missing, then gets
//! the same ones.

use crate::error::{Error, Result};
use libloading::Library as Handle;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// A library of NVIDIA's: the first two are what the backend needs (the second not with the feature `cuda-embedded`), the others what it
/// may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Library {
    /// The driver.
    Driver,
    /// Run-time compiler of kernels.
    Nvrtc,
    /// Matrix products with fused epilogues.
    CublasLt,
    /// Convolutions.
    Cudnn,
    /// Sums over several devices' processes.
    Nccl,
}

impl Library {
    /// All of them, in the order they are needed.
    pub const ALL: [Library; 5] =
        [Library::Driver, Library::Nvrtc, Library::CublasLt, Library::Cudnn, Library::Nccl];

    /// File names, newest first.
    fn names(self) -> &'static [&'static str] {
        match self {
            Library::Driver => &["libcuda.so.1", "libcuda.so"],
            Library::Nvrtc => &["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so.11.2", "libnvrtc.so"],
            Library::CublasLt => {
                &["libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so.11", "libcublasLt.so"]
            }
            Library::Cudnn => &["libcudnn.so.9", "libcudnn.so"],
            Library::Nccl => &["libnccl.so.2", "libnccl.so"],
        }
    }

    /// The package that brings it.
    fn source(self) -> &'static str {
        match self {
            Library::Driver => "the NVIDIA driver",
            Library::Nvrtc => "the CUDA toolkit or pip's nvidia-cuda-nvrtc",
            Library::CublasLt => "the CUDA toolkit or pip's nvidia-cublas",
            Library::Cudnn => "cuDNN 9 or pip's nvidia-cudnn",
            Library::Nccl => "NCCL 2 (libnccl2) or pip's nvidia-nccl",
        }
    }

    /// Whether it is there.
    pub fn is_present(self) -> bool {
        self.open().is_some()
    }

    /// An error that names the library and where it comes from, unless it is there.
    pub fn require(self) -> Result<()> {
        self.handle().map(|_| ())
    }

    /// The open library.
    pub(super) fn handle(self) -> Result<&'static Handle> {
        self.open().ok_or_else(|| {
            let names = self.names();
            Error::Unsupported(format!("{} was not found; install {}", names[0], self.source()))
        })
    }

    /// A function of the library, of the type that its header gives it.
    ///
    /// # Safety
    /// `T` is that type, as a pointer to a function.
    pub(super) unsafe fn function<T: Copy>(self, name: &str) -> Result<T> {
        // SAFETY: the caller's contract; what was opened stays open, so that the pointer may outlive the symbol.
        let found = unsafe { self.handle()?.get::<T>(name.as_bytes()) };
        found
            .map(|symbol| *symbol)
            .map_err(|e| Error::Unsupported(format!("{} lacks {name}: {e}", self.names()[0])))
    }

    fn open(self) -> Option<&'static Handle> {
        static OPEN: [OnceLock<Option<Handle>>; Library::ALL.len()] =
            [const { OnceLock::new() }; Library::ALL.len()];
        OPEN[self as usize].get_or_init(|| self.find()).as_ref()
    }

    fn find(self) -> Option<Handle> {
        // The driver comes with the system, never with a toolkit, whose libcuda is a stub.
        let folders = if self == Library::Driver { Vec::new() } else { folders() };
        let by_name = self.names().iter().map(PathBuf::from);
        let in_folders = folders.iter().flat_map(|f| self.names().iter().map(move |n| f.join(n)));
        let found = by_name.chain(in_folders).find_map(|path| Some((load(&path)?, path)));
        found.map(|(library, path)| {
            if self == Library::Nvrtc {
                load_builtins(&path);
            }
            library
        })
    }
}

/// Opens what NVRTC asks for by name when it first compiles: that of CUDA 13 does not look beside itself.
fn load_builtins(nvrtc: &Path) {
    let is_one = |path: &PathBuf| path.to_string_lossy().contains("libnvrtc-builtins.so");
    for path in nvrtc.parent().map(entries).unwrap_or_default().into_iter().filter(is_one) {
        // Stays open, as NVRTC does.
        std::mem::forget(load(&path));
    }
}

/// Opens a library such that others that ask for its name get it.
fn load(path: &Path) -> Option<Handle> {
    // SAFETY: loading runs the library's own initialisers, as any program that links it does.
    #[cfg(unix)]
    let opened = unsafe {
        use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
        Library::open(Some(path), RTLD_NOW | RTLD_GLOBAL).map(Handle::from)
    };
    #[cfg(not(unix))]
    // SAFETY: as above.
    let opened = unsafe { Handle::new(path) };
    opened.ok()
}

/// Folders of toolkits and pip packages.
fn folders() -> Vec<PathBuf> {
    let listed = std::env::var_os("FARFACE_CUDA_PATH").unwrap_or_default();
    let mut folders: Vec<PathBuf> = std::env::split_paths(&listed).filter(|p| p.is_absolute()).collect();
    let named = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(std::env::var_os).map(PathBuf::from);
    let toolkits = named.chain([PathBuf::from("/usr/local/cuda")]);
    folders.extend(toolkits.flat_map(|root| [root.join("lib64"), root.join("lib")]));
    let environments = ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(std::env::var_os);
    for environment in environments {
        for python in entries(&Path::new(&environment).join("lib")) {
            let packages = entries(&python.join("site-packages/nvidia"));
            folders.extend(packages.into_iter().map(|package| package.join("lib")));
        }
    }
    folders
}

/// What lies in a folder, in the order of its names; nothing where it cannot be read.
fn entries(folder: &Path) -> Vec<PathBuf> {
    let found = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> = found.map(|entry| entry.path()).collect();
    paths.sort();
    paths
}

/// A struct of the functions that are called of a library, all found before any is called: cudarc, whose types are used, asks for each
/// when it is first called, under names that newer libraries do not have, and panics where it finds none. What they return is a
/// number here, since a newer library may return one that no enumeration of an older header has.
macro_rules! functions {
    ($(#[$doc:meta])* $name:ident of $library:expr; $($function:ident($($argument:ty),* $(,)?) -> $result:ty;)*) => {
        $(#[$doc])*
        #[allow(non_snake_case)] // NVIDIA's names
        struct $name {
            $($function: unsafe extern "C" fn($($argument),*) -> $result,)*
        }

        impl $name {
            fn open() -> Result<Self> {
                // SAFETY: the types are those of the library's header.
                unsafe { Ok(Self { $($function: $library.function(stringify!($function))?,)* }) }
            }
        }
    };
}
pub(super) use functions;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_is_an_error_that_names_it() {
        for library in Library::ALL {
            match library.require() {
                Ok(()) => assert!(library.is_present()),
                Err(e) => assert!(e.to_string().contains(library.names()[0]), "{e}"),
            }
        }
    }
}
