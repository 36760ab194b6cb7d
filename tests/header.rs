//! `include/farface.h` is what src/capi says, compiles everywhere, and its example runs.
//!
//! `FARFACE_BLESS=1 cargo test --test header` rewrites the header and the list of symbols.
#![cfg(unix)]

mod common;

use common::c::{self, Link, ROOT};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

fn at(path: &str) -> PathBuf {
    Path::new(ROOT).join(path)
}

/// The header: one section a file of src/capi, its module text as the banner.
fn generated() -> String {
    let config = cbindgen::Config::from_file(at("cbindgen.toml")).unwrap();
    let (head, tail) = (config.header.clone().unwrap(), config.trailer.clone().unwrap());
    let mut text = head.trim_start().to_string();
    for section in farface::capi::SECTIONS {
        let path = at(&format!("src/capi/{section}.rs"));
        let source = std::fs::read_to_string(&path).unwrap();
        let module: Vec<&str> = source.lines().map_while(|l| l.strip_prefix("//!")).collect();
        text += &format!("\n/* {} */\n/*\n", "-".repeat(92));
        module.iter().for_each(|line| text += &format!(" *{line}\n"));
        text += " */\n\n";
        let config = cbindgen::Config { header: None, trailer: None, ..config.clone() };
        let mut body = Vec::new();
        cbindgen::Builder::new().with_config(config).with_src(path).generate().unwrap().write(&mut body);
        text += &short_comments(&values_with_types(std::str::from_utf8(&body).unwrap(), &source));
    }
    text + "\n" + &tail
}

/// Constants directly behind the type that they are values of.
fn values_with_types(code: &str, source: &str) -> String {
    let mut blocks: Vec<&str> = code.trim().split("\n\n").collect();
    let constants = source.lines().filter_map(|l| l.strip_prefix("pub const ")?.split_once(": "));
    let constants: Vec<_> = constants.filter_map(|(n, r)| Some((n, r.split_once(" =")?.0))).collect();
    for (name, kind) in constants.iter().rev() {
        let find = |what: String| blocks.iter().position(|b| b.lines().any(|l| l.starts_with(&what)));
        let (Some(from), Some(to)) =
            (find(format!("#define {name} ")), find(format!("typedef uint32_t {kind};")))
        else {
            continue;
        };
        let block = blocks.remove(from);
        blocks.insert(if from < to { to } else { to + 1 }, block);
    }
    blocks.join("\n\n")
}

/// Comments of one line take one line.
fn short_comments(code: &str) -> String {
    let mut lines: Vec<String> = code.lines().map(str::to_string).collect();
    let mut i = 0;
    while i + 2 < lines.len() {
        if lines[i].trim() == "/**" && lines[i + 2].trim() == "*/" {
            let text = lines[i + 1].trim().trim_start_matches("* ").to_string();
            lines[i] = format!("{} {text} */", lines[i]);
            lines.drain(i + 1..i + 3);
        }
        i += 1;
    }
    lines.iter().map(|l| format!("{l}\n")).collect()
}

/// Compares a checked-in file with what it must be, or writes it when blessed.
fn checked_in(path: &str, wanted: &str) {
    let path = at(path);
    if std::env::var_os("FARFACE_BLESS").is_some() {
        std::fs::write(&path, wanted).unwrap();
    }
    let found = std::fs::read_to_string(&path).unwrap_or_default();
    let differs = found.lines().zip(wanted.lines()).position(|(a, b)| a != b);
    let line = differs.map_or(found.lines().count().min(wanted.lines().count()), |i| i) + 1;
    assert!(
        found == wanted,
        "{} differs from its source at line {line}; run FARFACE_BLESS=1 cargo test --test header",
        path.display()
    );
}

/// Functions that the header declares.
fn functions() -> BTreeSet<String> {
    let header = std::fs::read_to_string(at("include/farface.h")).unwrap();
    let code: Vec<&str> = header.lines().filter(|l| !l.starts_with(" *") && !l.starts_with('#')).collect();
    let words = code.iter().flat_map(|l| l.split(|c: char| !(c.is_alphanumeric() || c == '_' || c == '(')));
    words
        .filter_map(|w| Some(w.split_once('(')?.0.to_string()))
        .filter(|w| w.starts_with("farface_"))
        .collect()
}

#[test]
fn the_header_is_what_the_source_says() {
    checked_in("include/farface.h", &generated());
}

#[test]
fn the_header_compiles_as_c99_and_cxx11_without_a_warning() {
    for (header, languages) in [("farface.h", &[false, true][..]), ("farface.hpp", &[true])] {
        for &cxx in languages {
            let folder = tempfile::tempdir().unwrap();
            let source = folder.path().join("twice.c");
            let include = format!("#include <{header}>\n#include <{header}>\nint unused;\n");
            std::fs::write(&source, include).unwrap();
            let output = c::check(&source, cxx);
            assert!(output.status.success(), "{header}: {}", String::from_utf8_lossy(&output.stderr));
        }
    }
}

#[test]
fn the_headers_example_compiles_and_finds_faces() {
    let header = std::fs::read_to_string(at("include/farface.h")).unwrap();
    let lines = header.lines().map_while(|l| (!l.starts_with("#ifndef")).then_some(l));
    let example: String = lines
        .map(|l| l.strip_prefix(" * ").unwrap_or_default())
        .skip_while(|l| !l.starts_with("    #include"))
        .take_while(|l| !l.starts_with("Compile"))
        .map(|l| l.strip_prefix("    ").unwrap_or(l).to_string() + "\n")
        .collect();
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("example.c");
    std::fs::write(&source, example).unwrap();
    let program = c::build(&source, folder.path(), Link::Static);
    std::fs::rename(common::model::file(folder.path(), 1), folder.path().join("model.safetensors")).unwrap();
    let frame = folder.path().join("frame");
    std::fs::write(&frame, common::model::picture(640, 480, 1)).unwrap();
    let stdin = std::fs::File::open(&frame).unwrap();
    let mut command = Command::new(&program);
    let output = command.current_dir(&folder).stdin(stdin).output().unwrap();
    let boxes = String::from_utf8(output.stdout).unwrap();
    assert!(boxes.lines().count() > 0, "{}", String::from_utf8_lossy(&output.stderr));
    assert!(
        boxes.lines().all(|l| l.split(' ').filter_map(|v| v.parse::<f32>().ok()).count() == 5),
        "{boxes}"
    );
}

#[test]
fn versions_agree() {
    use farface::capi::version::*;
    let parts = [FARFACE_VERSION_MAJOR, FARFACE_VERSION_MINOR, FARFACE_VERSION_PATCH];
    let version = parts.map(|n| n.to_string()).join(".");
    assert_eq!(version, env!("CARGO_PKG_VERSION"));
    // SAFETY: a static text.
    let text = unsafe { std::ffi::CStr::from_ptr(farface_version()) };
    assert_eq!(text.to_str().unwrap(), version);
    assert_eq!(farface_abi_version(), FARFACE_ABI_VERSION);
}

#[test]
fn the_header_uses_fixed_widths_only() {
    let header = std::fs::read_to_string(at("include/farface.h")).unwrap();
    for line in header.lines().filter(|l| !l.trim_start().starts_with('*')) {
        let words: Vec<&str> = line.split(|c: char| !(c.is_alphanumeric() || c == '_')).collect();
        for word in ["long", "short", "int", "unsigned", "bool", "_Bool", "enum"] {
            assert!(!words.contains(&word), "{line}");
        }
    }
}

/// Symbols of the shared library's interface, or of the archive with `-g`: lines of nm.
fn nm(arguments: &[&str], library: &str) -> Vec<(char, String)> {
    let text = c::run(Command::new("nm").args(arguments).arg(c::libraries().join(library)));
    let line = |l: &str| {
        let mut words = l.split_whitespace().rev();
        let (name, kind) = (words.next()?, words.next()?);
        (kind.len() == 1).then(|| (kind.chars().next().unwrap(), name.to_string()))
    };
    text.lines().filter_map(line).collect()
}

#[cfg(target_os = "linux")]
#[test]
fn the_shared_library_exports_the_headers_functions_and_nothing_else() {
    let exported: BTreeSet<String> =
        nm(&["-D", "--defined-only"], "libfarface.so").into_iter().map(|(_, name)| name).collect();
    assert_eq!(exported, functions());
    checked_in("tests/c/symbols.txt", &exported.iter().map(|n| format!("{n}\n")).collect::<String>());
}

#[cfg(target_os = "linux")]
#[test]
fn the_archive_defines_no_strong_plain_name_outside_the_prefix() {
    // Mangled names carry the compiler's and the crate's hash; those with two underscores are the
    // compiler's own runtime, one object each, of which a linker takes the first it meets.
    // bindings/c/install.sh makes all of them local.
    for (kind, name) in nm(&["-g", "--defined-only"], "libfarface.a") {
        let strong = "TDBRC".contains(kind);
        let aside = ["_R", "_ZN", "anon.", "__", "farface_"].iter().any(|m| name.starts_with(m));
        assert!(!strong || aside, "{kind} {name}");
    }
}
