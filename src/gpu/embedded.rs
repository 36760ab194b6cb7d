//! Code of kernels that was compiled to PTX when the library was built (feature `cuda-embedded`): the driver does the rest, and NVRTC
//! is not looked for.

use crate::error::{Error, Result};

/// A file's PTX for an architecture, as 90 for 9.0, and a zero behind it.
struct Ptx {
    file: &'static str,
    arch: u32,
    text: &'static [u8],
}

/// Every file for every architecture, and the version of the NVRTC that has compiled them.
struct Embedded {
    nvrtc: [u32; 2],
    files: &'static [Ptx],
}

/// Written by build.rs.
const EMBEDDED: Embedded = include!(concat!(env!("OUT_DIR"), "/embedded.rs"));

/// The code for one device.
pub(super) struct Code {
    capability: [u32; 2],
}

impl Code {
    /// Errors: [`Error::Unsupported`] where there is nothing for a device as old.
    pub fn new(capability: [u32; 2]) -> Result<Self> {
        let code = Self { capability };
        if EMBEDDED.files.iter().any(|ptx| code.fits(ptx)) {
            return Ok(code);
        }
        let ([major, minor], [by_major, by_minor]) = (capability, EMBEDDED.nvrtc);
        Err(Error::Unsupported(format!(
            "NVRTC {by_major}.{by_minor} has compiled this build's kernels, for no device as old as compute capability {major}.{minor}: \
             build it with an older one, or without the feature cuda-embedded"
        )))
    }

    /// What `load` makes of a file's code: the newest that the device can take. The driver compiles it, and keeps what it has made in a
    /// cache of its own.
    pub fn load<T>(&self, (name, _): (&str, &str), load: impl Fn(&[u8]) -> Result<T>) -> Result<T> {
        let fitting = EMBEDDED.files.iter().filter(|ptx| ptx.file == name && self.fits(ptx));
        let ptx = fitting
            .max_by_key(|ptx| ptx.arch)
            .ok_or_else(|| Error::Internal(format!("{name} is not embedded")))?;
        load(ptx.text).map_err(|e| match e {
            Error::Cuda(text) => {
                let [major, minor] = EMBEDDED.nvrtc;
                Error::Cuda(format!(
                    "{} as PTX for compute_{}, which takes a driver for CUDA {major}.{minor} or later: {text}",
                    ptx.file, ptx.arch
                ))
            }
            other => other,
        })
    }

    fn fits(&self, ptx: &Ptx) -> bool {
        let [major, minor] = self.capability;
        ptx.arch <= major * 10 + minor
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_too_old_for_what_is_embedded_is_an_error_that_says_so() {
        let error = Code::new([3, 0]).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(error.contains("3.0") && error.contains("cuda-embedded"), "{error}");
        assert!(Code::new([12, 0]).is_ok());
    }
}
