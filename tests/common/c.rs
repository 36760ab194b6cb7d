//! Building C and C++ programs against the library that cargo has built beside this test.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// The repository.
pub const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// System libraries that the static archive needs on Linux; bindings/c states the same list.
pub const NATIVE_LIBS: [&str; 3] = ["-lpthread", "-ldl", "-lm"];

/// What no program of ours may trigger.
pub const WARNINGS: [&str; 4] = ["-Wall", "-Wextra", "-pedantic", "-Werror"];

/// How the program finds the library.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Link {
    Static,
    Dynamic,
}

/// Folder with libfarface.a and libfarface.so: that of the running test.
pub fn libraries() -> PathBuf {
    std::env::current_exe().unwrap().parent().unwrap().to_path_buf()
}

fn compiler(cxx: bool) -> Command {
    let (variable, name) = if cxx { ("CXX", "c++") } else { ("CC", "cc") };
    let mut command = Command::new(std::env::var(variable).unwrap_or_else(|_| name.into()));
    command.args(if cxx { ["-std=c++11"] } else { ["-std=c99"] }).args(WARNINGS);
    if !cxx {
        command.arg("-Wstrict-prototypes");
    }
    command.arg(format!("-I{ROOT}/include"));
    command
}

/// A command that compiles `source` (C, or C++ by its ending) without linking.
pub fn check(source: &Path, as_cxx: bool) -> Output {
    let language = if as_cxx { "c++" } else { "c" };
    compiler(as_cxx).args(["-x", language, "-fsyntax-only"]).arg(source).output().expect("a C compiler")
}

/// Builds `source` into `folder` and returns the program. Panics with the compiler's words.
pub fn build(source: &Path, folder: &Path, link: Link) -> PathBuf {
    let cxx = source.extension().is_some_and(|e| e == "cpp");
    let stem = source.file_stem().unwrap().to_str().unwrap();
    let program = folder.join(format!("{stem}-{link:?}-{}", if cxx { "cpp" } else { "c" }));
    let mut command = compiler(cxx);
    command.args(["-O1", "-g", "-o"]).arg(&program).arg(source);
    match link {
        Link::Static => command.arg(libraries().join("libfarface.a")),
        Link::Dynamic => {
            // The program asks for the soname, which a build folder lacks.
            let soname = folder.join("libfarface.so.0");
            if !soname.exists() {
                std::os::unix::fs::symlink(libraries().join("libfarface.so"), &soname).unwrap();
            }
            command.arg(soname).arg(format!("-Wl,-rpath,{}", folder.display()))
        }
    };
    let output = command.args(NATIVE_LIBS).output().expect("a C compiler");
    assert!(output.status.success(), "{}: {}", source.display(), String::from_utf8_lossy(&output.stderr));
    program
}

/// Runs a program; its standard output. Panics where it fails.
pub fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}: {}\n{out}\n{err}", output.status);
    out.into_owned()
}
