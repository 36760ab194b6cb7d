//! The emulated driver: built with the machine's C++ compiler, opened before the library looks for one.

use farface::gpu::ops::Device;
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use std::hash::{Hash, Hasher};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, OnceLock};

/// How the emulator is built where FARFACE_TEST_SANITIZE is set.
const SANITIZE: [&str; 2] = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"];

/// What the tests run on.
pub enum Driver {
    /// The machine's.
    Own,
    /// That of `emulator/`.
    Emulated(Emulator),
}

/// Functions of the emulated driver beside CUDA's.
#[cfg_attr(not(feature = "train"), allow(dead_code))] // what several ranks ask for
pub struct Emulator {
    driver: Library,
    nccl: Library,
    folder: PathBuf,
}

#[cfg_attr(not(feature = "train"), allow(dead_code))] // as above
impl Emulator {
    /// Makes the call of this number, counted from 1, fail; 0 for none.
    pub fn fail_at(&self, n: i64) {
        // SAFETY: the function of driver.cpp, with its type.
        unsafe { self.driver.get::<unsafe extern "C" fn(i64)>(b"farface_emulator_fail_at").unwrap()(n) }
    }

    /// Calls since `fail_at`.
    pub fn calls(&self) -> i64 {
        // SAFETY: as above.
        unsafe { self.driver.get::<unsafe extern "C" fn() -> i64>(b"farface_emulator_calls").unwrap()() }
    }

    /// As [`Self::fail_at`], of this thread's calls alone.
    pub fn fail_here(&self, n: i64) {
        // SAFETY: as above.
        unsafe { self.driver.get::<unsafe extern "C" fn(i64)>(b"farface_emulator_fail_here").unwrap()(n) }
    }

    /// This thread's calls since `fail_here`.
    pub fn calls_here(&self) -> i64 {
        // SAFETY: as above.
        unsafe { self.driver.get::<unsafe extern "C" fn() -> i64>(b"farface_emulator_calls_here").unwrap()() }
    }

    /// How often a kernel was launched.
    pub fn launches(&self, kernel: &std::ffi::CStr) -> i64 {
        type Launches = unsafe extern "C" fn(*const std::ffi::c_char) -> i64;
        // SAFETY: as above; a name that ends with a zero.
        unsafe { self.driver.get::<Launches>(b"farface_emulator_launches").unwrap()(kernel.as_ptr()) }
    }

    /// What was made and not given back.
    pub fn live(&self) -> i64 {
        // SAFETY: as above.
        unsafe { self.driver.get::<unsafe extern "C" fn() -> i64>(b"farface_emulator_live").unwrap()() }
    }

    /// Whether kernels do nothing and memory is zeros.
    pub fn idle(&self, on: bool) {
        // SAFETY: as above.
        unsafe { self.driver.get::<unsafe extern "C" fn(i32)>(b"farface_emulator_idle").unwrap()(on.into()) }
    }

    /// Whether work is done as late as may be, rather than at once.
    pub fn late(&self, on: bool) {
        // SAFETY: as above.
        unsafe { self.driver.get::<unsafe extern "C" fn(i32)>(b"farface_emulator_late").unwrap()(on.into()) }
    }

    /// Where cuDNN refuses what it could compute: 1 when it is asked for the workspace, 2 when it is given the work, 0 nowhere.
    pub fn refuse(&self, at: i32) {
        // SAFETY: as above.
        unsafe { self.driver.get::<unsafe extern "C" fn(i32)>(b"farface_emulator_refuse").unwrap()(at) }
    }

    /// Makes the call of NCCL of this number, counted from 1, fail; 0 for none.
    pub fn nccl_fail_at(&self, n: i64) {
        // SAFETY: the function of nccl.cpp, with its type.
        unsafe { self.nccl.get::<unsafe extern "C" fn(i64)>(b"farface_emulated_nccl_fail_at").unwrap()(n) }
    }

    /// Calls of NCCL since `nccl_fail_at`.
    pub fn nccl_calls(&self) -> i64 {
        // SAFETY: as above.
        unsafe { self.nccl.get::<unsafe extern "C" fn() -> i64>(b"farface_emulated_nccl_calls").unwrap()() }
    }

    /// Where its libraries are, for other processes.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The device's compute capability, as 90 for 9.0.
    pub fn capability(&self, number: i32) {
        // SAFETY: as above.
        unsafe {
            self.driver.get::<unsafe extern "C" fn(i32)>(b"farface_emulator_capability").unwrap()(number)
        }
    }

    /// The architecture of the PTX that was loaded last, as 90 for 9.0; 0 before.
    #[cfg(feature = "cuda-embedded")]
    pub fn loaded(&self) -> i32 {
        // SAFETY: as above.
        unsafe { self.driver.get::<unsafe extern "C" fn() -> i32>(b"farface_emulator_loaded").unwrap()() }
    }

    /// The names of all kernels of `cuda/`.
    #[cfg(feature = "cuda-embedded")]
    pub fn kernels(&self) -> Vec<&'static str> {
        type Kernel = unsafe extern "C" fn(i32) -> *const std::ffi::c_char;
        // SAFETY: as above.
        let kernel = unsafe { self.driver.get::<Kernel>(b"farface_emulator_kernel").unwrap() };
        // SAFETY: a name that lives as long as the driver, which stays open, or none behind the last.
        let name = |n| unsafe {
            let name = kernel(n);
            (!name.is_null()).then(|| std::ffi::CStr::from_ptr(name).to_str().unwrap())
        };
        (0..).map_while(name).collect()
    }

    /// The order in which the threads of a block run.
    pub fn backwards(&self, on: bool) {
        // SAFETY: as above.
        unsafe {
            self.driver.get::<unsafe extern "C" fn(i32)>(b"farface_emulator_backwards").unwrap()(on.into())
        }
    }
}

/// Tells a process that it is to find neither cuDNN nor cuBLASLt.
pub const WITHOUT_LIBRARIES: &str = "FARFACE_TEST_WITHOUT_LIBRARIES";

/// What the tests run on; None (said on standard error) where there is neither a device nor a C++ compiler.
pub fn driver() -> Option<&'static Driver> {
    static DRIVER: OnceLock<Option<Driver>> = OnceLock::new();
    let driver = DRIVER.get_or_init(|| {
        if std::env::var("FARFACE_TEST_CUDA").as_deref() == Ok("device") {
            return Some(Driver::Own);
        }
        // Nothing of the emulator's is kept for a real device.
        std::env::set_var("FARFACE_CUDA_CACHE", "off");
        // Our kernels, unless a test asks for others: an emulated measurement says nothing.
        if std::env::var_os("FARFACE_CUDA_CONV").is_none() {
            std::env::set_var("FARFACE_CUDA_CONV", "own");
        }
        let folder = build()?;
        let open = |name: &str| {
            // SAFETY: libraries of ours, whose initialisers list the kernels.
            unsafe { Library::open(Some(folder.join(name)), RTLD_NOW | RTLD_GLOBAL) }
                .unwrap_or_else(|e| panic!("{name}: {e}"))
        };
        // Whoever asks for these names now gets these. Where kernels are embedded nobody is to ask for a compiler.
        if cfg!(not(feature = "cuda-embedded")) {
            std::mem::forget(open("libnvrtc.so.12"));
        }
        let driver = open("libcuda.so.1");
        // They find the driver's functions among what is open.
        for (name, _) in LIBRARIES {
            if std::env::var_os(WITHOUT_LIBRARIES).is_none() {
                std::mem::forget(open(name));
            }
        }
        Some(Driver::Emulated(Emulator { driver, nccl: open("libnccl.so.2"), folder }))
    });
    if driver.is_none() {
        // Not by eprintln, which the test runner keeps to itself where a test passes.
        let _ = writeln!(std::io::stderr(), "skipped: no C++ compiler (c++) for the emulated CUDA driver");
    }
    driver.as_ref()
}

/// The device that the tests run on.
pub fn device() -> Option<Arc<Device>> {
    driver()?;
    Some(Device::new(0).expect("a driver and a device"))
}

/// NVIDIA's libraries beside the driver and the compiler, and their sources.
const LIBRARIES: [(&str, &str); 2] = [("libcudnn.so.9", "cudnn.cpp"), ("libcublasLt.so.13", "cublaslt.cpp")];

/// Builds the libraries, where their sources have changed; None where there is no compiler.
fn build() -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let emulator = root.join("tests/cuda/emulator");
    let mut kernels: Vec<PathBuf> = std::fs::read_dir(root.join("cuda"))
        .expect("cuda/")
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "cu"))
        .collect();
    kernels.sort();
    let sanitize = std::env::var_os("FARFACE_TEST_SANITIZE").is_some();
    let mut hash = std::hash::DefaultHasher::new();
    sanitize.hash(&mut hash);
    let parts =
        ["driver.cpp", "fibers.cpp", "fibers.hpp", "library.hpp", "nccl.cpp", "nvrtc.cpp", "shim.hpp"];
    let parts = parts.map(|f| emulator.join(f));
    let libraries = LIBRARIES.map(|(name, source)| (name, emulator.join(source)));
    let headers = ["cuda/common.cuh", "cuda/suppress.cuh"].map(|f| root.join(f));
    for file in kernels.iter().chain(&parts).chain(libraries.iter().map(|(_, f)| f)).chain(&headers) {
        std::fs::read(file).unwrap_or_else(|e| panic!("{}: {e}", file.display())).hash(&mut hash);
    }
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("cuda-emulator-{:016x}", hash.finish()));
    if folder.join("done").exists() {
        return Some(folder);
    }
    Command::new("c++").arg("--version").output().ok()?;
    std::fs::create_dir_all(&folder).unwrap();
    let compile = |name: &str, sources: &[&Path], more: &[&str]| {
        // Another process may do the same: whoever is last puts the same file there.
        let part = folder.join(format!("{name}.{}.part", std::process::id()));
        let mut c = Command::new("c++");
        c.args(["-std=c++17", "-O2", "-g", "-Wall", "-Wno-unused-function", "-shared", "-fPIC"]);
        // What a kernel asks to be rounded on its own is: __fmul_rn and its like are plain operators there.
        c.arg("-ffp-contract=off").arg("-o").arg(&part);
        c.arg(format!("-Wl,-soname,{name}")).args(more).args(["-x", "c++"]).args(sources);
        let out = c.output().expect("c++ runs");
        assert!(out.status.success(), "{name}: {}", String::from_utf8_lossy(&out.stderr));
        std::fs::rename(part, folder.join(name)).unwrap();
    };
    compile("libnvrtc.so.12", &[&emulator.join("nvrtc.cpp")], &[]);
    compile("libnccl.so.2", &[&emulator.join("nccl.cpp")], if sanitize { &SANITIZE } else { &[] });
    let shim = emulator.join("shim.hpp");
    let mut more = vec![
        "-include",
        shim.to_str().expect("a path of UTF-8"),
        "-Wno-unused-variable",
        "-Wno-unknown-pragmas",
    ];
    if sanitize {
        more.extend(SANITIZE);
    }
    let mut sources: Vec<&Path> = kernels.iter().map(PathBuf::as_path).collect();
    sources.extend(parts[..2].iter().map(PathBuf::as_path));
    compile("libcuda.so.1", &sources, &more);
    let checked: &[&str] =
        if sanitize { &["-fsanitize=address,undefined", "-fno-sanitize-recover=all"] } else { &[] };
    for (name, source) in &libraries {
        compile(name, &[source], checked);
    }
    std::fs::write(folder.join("done"), "").unwrap();
    Some(folder)
}
