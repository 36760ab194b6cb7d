//! NVRTC, the run-time compiler: the nine functions that are used here. cudarc's own binding asks for file names that CUDA 13 does
//! not have.

use super::probe::Library;
use crate::error::{Error, Result};
use libloading::Symbol;
use std::ffi::{c_char, c_int, c_void, CStr, CString};

type Program = *mut c_void;
type Status = c_int;

/// The compiler, opened.
pub(super) struct Nvrtc {
    version: [i32; 2],
    archs: Vec<i32>,
}

/// A function of the library.
fn symbol<T>(name: &'static str) -> Result<Symbol<'static, T>> {
    let library = Library::Nvrtc.handle()?;
    // SAFETY: the callers give the types that NVRTC's header has; they are the same in 11, 12 and 13.
    unsafe { library.get(name.as_bytes()) }
        .map_err(|e| Error::Unsupported(format!("NVRTC lacks {name}: {e}")))
}

fn check(call: &str, status: Status) -> Result<()> {
    if status == 0 {
        return Ok(());
    }
    let text = symbol::<unsafe extern "C" fn(Status) -> *const c_char>("nvrtcGetErrorString").map(|text| {
        // SAFETY: NVRTC returns a string of its own.
        unsafe { CStr::from_ptr(text(status)) }.to_string_lossy().into_owned()
    });
    Err(Error::Cuda(format!("{call} failed: {}", text.unwrap_or_else(|_| format!("error {status}")))))
}

/// A program that destroys itself.
struct Owned(Program);

impl Drop for Owned {
    fn drop(&mut self) {
        if let Ok(destroy) = symbol::<unsafe extern "C" fn(*mut Program) -> Status>("nvrtcDestroyProgram") {
            // SAFETY: made by NVRTC, destroyed once.
            unsafe { destroy(&mut self.0) };
        }
    }
}

impl Nvrtc {
    /// Opens it. Errors: [`Error::Unsupported`] where it is not there.
    pub fn open() -> Result<Self> {
        let (mut major, mut minor, mut count) = (0, 0, 0);
        let version = symbol::<unsafe extern "C" fn(*mut c_int, *mut c_int) -> Status>("nvrtcVersion")?;
        let number = symbol::<unsafe extern "C" fn(*mut c_int) -> Status>("nvrtcGetNumSupportedArchs")?;
        let list = symbol::<unsafe extern "C" fn(*mut c_int) -> Status>("nvrtcGetSupportedArchs")?;
        // SAFETY: NVRTC writes the numbers, and as many architectures as it said.
        let archs = unsafe {
            check("nvrtcVersion", version(&mut major, &mut minor))?;
            check("nvrtcGetNumSupportedArchs", number(&mut count))?;
            let mut archs = vec![0; count.max(0) as usize];
            check("nvrtcGetSupportedArchs", list(archs.as_mut_ptr()))?;
            archs
        };
        Ok(Self { version: [major, minor], archs })
    }

    /// Major and minor version.
    pub fn version(&self) -> [i32; 2] {
        self.version
    }

    /// The newest architecture that it compiles for, at most this one, as 90 for 9.0.
    pub fn arch_for(&self, capability: [u32; 2]) -> Result<i32> {
        let own = (capability[0] * 10 + capability[1]) as i32;
        self.archs.iter().copied().filter(|&a| a <= own).max().ok_or_else(|| {
            Error::Unsupported(format!(
                "NVRTC {}.{} compiles for no device as old as compute capability {}.{}",
                self.version[0], self.version[1], capability[0], capability[1]
            ))
        })
    }

    /// Compiles `source` for an architecture: machine code where that is the device's own, else PTX, which the driver compiles.
    /// Of a failure the error has the compiler's messages.
    pub fn compile(
        &self,
        name: &str,
        source: &str,
        headers: &[(&str, &str)],
        arch: i32,
        own: bool,
    ) -> Result<Vec<u8>> {
        type Create = unsafe extern "C" fn(
            *mut Program,
            *const c_char,
            *const c_char,
            c_int,
            *const *const c_char,
            *const *const c_char,
        ) -> Status;
        type Compile = unsafe extern "C" fn(Program, c_int, *const *const c_char) -> Status;
        let text = |s: &str| CString::new(s).map_err(|_| Error::Internal(format!("{name} has a zero byte")));
        let [c_name, c_source] = [text(name)?, text(source)?];
        let texts = |of: fn(&(&str, &str)) -> String| {
            headers.iter().map(|h| text(&of(h))).collect::<Result<Vec<CString>>>()
        };
        let [names, sources] = [texts(|h| h.0.into())?, texts(|h| h.1.into())?];
        let pointers = |texts: &[CString]| texts.iter().map(|t| t.as_ptr()).collect::<Vec<_>>();
        let [names_of, sources_of] = [pointers(&names), pointers(&sources)];
        let target = if own { format!("sm_{arch}") } else { format!("compute_{arch}") };
        let options = [
            text(&format!("--gpu-architecture={target}"))?,
            text("--std=c++17")?,
            text("--extra-device-vectorization")?,
        ];
        let options: Vec<*const c_char> = options.iter().map(|o| o.as_ptr()).collect();
        let create = symbol::<Create>("nvrtcCreateProgram")?;
        let compile = symbol::<Compile>("nvrtcCompileProgram")?;
        let mut program = Owned(std::ptr::null_mut());
        // SAFETY: all strings live until the calls return; NVRTC keeps copies.
        let status = unsafe {
            let made = create(
                &mut program.0,
                c_source.as_ptr(),
                c_name.as_ptr(),
                headers.len() as c_int,
                sources_of.as_ptr(),
                names_of.as_ptr(),
            );
            check("nvrtcCreateProgram", made)?;
            compile(program.0, options.len() as c_int, options.as_ptr())
        };
        if status != 0 {
            let log = fetch(&program, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog")?;
            let log = String::from_utf8_lossy(&log);
            let log = log.trim_end_matches('\0').trim();
            return Err(Error::Cuda(format!("NVRTC does not compile {name} for {target}: {log}")));
        }
        if own {
            fetch(&program, "nvrtcGetCUBINSize", "nvrtcGetCUBIN")
        } else {
            fetch(&program, "nvrtcGetPTXSize", "nvrtcGetPTX")
        }
    }
}

/// What a program has, by the function that tells its size and the one that writes it.
fn fetch(program: &Owned, size: &'static str, get: &'static str) -> Result<Vec<u8>> {
    let mut bytes = 0;
    let size_of = symbol::<unsafe extern "C" fn(Program, *mut usize) -> Status>(size)?;
    let write = symbol::<unsafe extern "C" fn(Program, *mut c_char) -> Status>(get)?;
    // SAFETY: NVRTC writes as many bytes as it said.
    unsafe {
        check(size, size_of(program.0, &mut bytes))?;
        let mut data = vec![0u8; bytes];
        check(get, write(program.0, data.as_mut_ptr().cast()))?;
        Ok(data)
    }
}
