//! Names the shared library: its soname (install name on Apple systems) carries the ABI version. With the feature `cuda-embedded` it
//! also compiles the CUDA kernels to PTX, which the library includes.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let target = |key: &str| std::env::var(format!("CARGO_CFG_TARGET_{key}")).unwrap_or_default();
    let (os, vendor, env) = (target("OS"), target("VENDOR"), target("ENV"));
    if vendor == "apple" {
        println!("cargo:rustc-cdylib-link-arg=-Wl,-install_name,@rpath/libfarface.0.dylib");
    } else if os != "windows" && os != "none" && !target("FAMILY").contains("wasm") && env != "msvc" {
        println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libfarface.so.0");
    }
    #[cfg(feature = "cuda-embedded")]
    if let Err(error) = embedded::compile_all() {
        // Cargo shows it where the script fails.
        eprintln!("feature cuda-embedded: {error}");
        std::process::exit(1);
    }
}

// The library's own search for NVRTC and its way of calling it, so that what is embedded is what it would compile at run time.
#[cfg(feature = "cuda-embedded")]
extern crate nvrtc_loader as libloading;
#[cfg(feature = "cuda-embedded")]
#[allow(dead_code)] // what only the library calls
#[path = "src/gpu/nvrtc.rs"]
mod nvrtc;
#[cfg(feature = "cuda-embedded")]
#[allow(dead_code, unused_imports, unused_macros)] // as above
#[path = "src/gpu/probe.rs"]
mod probe;

/// What they know of the library's errors.
#[cfg(feature = "cuda-embedded")]
mod error {
    pub type Result<T> = std::result::Result<T, Error>;

    #[derive(Debug)]
    pub enum Error {
        Unsupported(String),
        Cuda(String),
        Internal(String),
    }

    impl std::fmt::Display for Error {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            let (Error::Unsupported(text) | Error::Cuda(text) | Error::Internal(text)) = self;
            f.write_str(text)
        }
    }

    impl std::error::Error for Error {}
}

#[cfg(feature = "cuda-embedded")]
mod embedded {
    use crate::nvrtc::Nvrtc;
    use std::path::PathBuf;
    use std::{fs, thread};

    type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

    /// Those between which kernels and machine code differ most, as 90 for 9.0. Devices between two take the older one's PTX.
    const ARCHITECTURES: [u32; 4] = [70, 75, 80, 90];

    /// Writes PTX of every file for every architecture that this NVRTC knows to OUT_DIR, and `embedded.rs`, which lists it for
    /// src/gpu/embedded.rs.
    pub fn compile_all() -> Result<()> {
        println!("cargo:rerun-if-changed=cuda");
        // Another NVRTC by choice. A script that has failed runs again by itself.
        for name in ["FARFACE_CUDA_PATH", "CUDA_HOME", "CUDA_PATH"] {
            println!("cargo:rerun-if-env-changed={name}");
        }
        let nvrtc = Nvrtc::open().map_err(|e| {
            format!("kernels are compiled when this is built: {e}, or name the folder that it is in in FARFACE_CUDA_PATH")
        })?;
        let [major, minor] = nvrtc.version();
        let knows = |&arch: &u32| nvrtc.arch_for([arch / 10, arch % 10]).is_ok_and(|a| a == arch as i32);
        let (known, unknown): (Vec<u32>, Vec<u32>) = ARCHITECTURES.iter().partition(|arch| knows(arch));
        if !unknown.is_empty() {
            println!(
                "cargo:warning=NVRTC {major}.{minor} does not compile for {unknown:?}; an older one does"
            );
        }
        // A thread an architecture: nearly all the time goes to one file.
        let lists = thread::scope(|s| {
            let nvrtc = &nvrtc;
            let threads: Vec<_> =
                known.into_iter().map(|arch| s.spawn(move || compile_for(arch, nvrtc))).collect();
            threads.into_iter().map(|t| t.join().expect("no panic")).collect::<Result<String>>()
        })?;
        let list = format!("Embedded {{ nvrtc: [{major}, {minor}], files: &[\n{lists}] }}\n");
        Ok(fs::write(PathBuf::from(std::env::var("OUT_DIR")?).join("embedded.rs"), list)?)
    }

    /// A line of the list for every file.
    fn compile_for(arch: u32, nvrtc: &Nvrtc) -> Result<String> {
        let out = PathBuf::from(std::env::var("OUT_DIR")?);
        let mut files: Vec<PathBuf> = fs::read_dir("cuda")?.flatten().map(|entry| entry.path()).collect();
        files.sort();
        let is = |kind: &'static str| move |file: &&PathBuf| file.extension().is_some_and(|e| e == kind);
        let header = |file: &PathBuf| {
            let name = file.file_name().and_then(|n| n.to_str()).ok_or("a file name of other than UTF-8")?;
            Ok((name.to_string(), fs::read_to_string(file)?))
        };
        let headers = files.iter().filter(is("cuh")).map(header).collect::<Result<Vec<_>>>()?;
        let headers: Vec<(&str, &str)> = headers.iter().map(|(name, text)| (&name[..], &text[..])).collect();
        let mut list = String::new();
        for file in files.iter().filter(is("cu")) {
            let name = file.file_name().and_then(|n| n.to_str()).ok_or("a file name of other than UTF-8")?;
            // Kernels of a training: src/gpu/kernels.rs asks for them with the feature `train` alone.
            if name.starts_with("train_") && cfg!(not(feature = "train")) {
                continue;
            }
            let source = fs::read_to_string(file)?;
            let ptx = nvrtc.compile(name, &source, &headers, arch as i32, false)?;
            // The driver is given no length: cuModuleLoadData reads up to the zero, which nvrtcGetPTX writes.
            if ptx.last() != Some(&0) {
                return Err(format!("NVRTC gives PTX of {name} without a zero behind it").into());
            }
            let path = out.join(format!("{name}.{arch}.ptx"));
            fs::write(&path, ptx)?;
            list += &format!("Ptx {{ file: {name:?}, arch: {arch}, text: include_bytes!({path:?}) }},\n");
        }
        Ok(list)
    }
}
