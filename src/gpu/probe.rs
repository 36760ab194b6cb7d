//! Looks for the NVIDIA libraries without opening a device. cudarc panics where a library is
//! missing, so nothing may call into one that was not found here.

use crate::error::{Error, Result};

/// A library the CUDA backend uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Library {
    /// The driver, `libcuda.so.1`.
    Driver,
    /// Run-time compiler of kernels.
    Nvrtc,
    /// Matrix products.
    Cublas,
    /// Matrix products with fused epilogues.
    CublasLt,
    /// Convolutions.
    Cudnn,
}

impl Library {
    /// All of them, in the order they are needed.
    pub const ALL: [Library; 5] =
        [Library::Driver, Library::Nvrtc, Library::Cublas, Library::CublasLt, Library::Cudnn];

    /// File name and the package that brings it.
    fn names(self) -> (&'static str, &'static str) {
        match self {
            Library::Driver => ("libcuda.so.1", "the NVIDIA driver"),
            Library::Nvrtc => ("libnvrtc.so", "the CUDA toolkit or the nvidia-cuda-nvrtc wheel"),
            Library::Cublas => ("libcublas.so", "the CUDA toolkit or the nvidia-cublas wheel"),
            Library::CublasLt => ("libcublasLt.so", "the CUDA toolkit or the nvidia-cublas wheel"),
            Library::Cudnn => ("libcudnn.so", "cuDNN 9 or the nvidia-cudnn wheel"),
        }
    }

    /// Whether the dynamic loader finds it.
    pub fn is_present(self) -> bool {
        // SAFETY: the probes load a library by name and drop it again; loading runs the library's own
        // initialisers, as any program that links it does.
        unsafe {
            match self {
                Library::Driver => cudarc::driver::sys::is_culib_present(),
                Library::Nvrtc => cudarc::nvrtc::sys::is_culib_present(),
                Library::Cublas => cudarc::cublas::sys::is_culib_present(),
                Library::CublasLt => cudarc::cublaslt::sys::is_culib_present(),
                Library::Cudnn => cudarc::cudnn::sys::is_culib_present(),
            }
        }
    }

    /// An error that names the library and where it comes from, unless it is there.
    pub fn require(self) -> Result<()> {
        if self.is_present() {
            return Ok(());
        }
        let (file, source) = self.names();
        Err(Error::Unsupported(format!("{file} was not found; install {source}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_is_an_error_that_names_it() {
        for library in Library::ALL {
            match library.require() {
                Ok(()) => assert!(library.is_present()),
                Err(e) => assert!(e.to_string().contains(library.names().0), "{e}"),
            }
        }
    }
}
