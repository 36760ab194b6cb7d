//! C and C++ programs against the library: the examples, old binaries, silence, lifetimes.
#![cfg(unix)]

mod common;

use common::c::{self, build, run, Link, ROOT};
use common::model::picture;
use farface::detect::{Model, Session};
use farface::pixels::{ImageView, PixelFormat};
use std::path::{Path, PathBuf};
use std::process::Command;

fn source(path: &str) -> PathBuf {
    Path::new(ROOT).join(path)
}

fn write_ppm(path: &Path, width: usize, height: usize, rgb: &[u8]) {
    let header = format!("P6\n# a comment\n{width} {height}\n255\n");
    std::fs::write(path, [header.as_bytes(), rgb].concat()).unwrap();
}

/// What the examples print, by the session itself.
fn expected(model: &Path, width: usize, height: usize, rgb: &[u8]) -> String {
    let mut session = Session::new(&Model::load(model).unwrap()).unwrap();
    let view = ImageView::packed(width, height, PixelFormat::Rgb8, rgb).unwrap();
    let faces = session.detect(&view).unwrap();
    let line = |f: &farface::detect::Face| {
        let b = f.bbox;
        format!("{:.2} {:.2} {:.2} {:.2} {:.4}\n", b.x1, b.y1, b.width(), b.height(), f.score)
    };
    faces.iter().map(line).collect()
}

/// Every example prints what the session finds.
fn examples_print(model: &Path, width: usize, height: usize, rgb: &[u8]) {
    let folder = tempfile::tempdir().unwrap();
    let ppm = folder.path().join("picture.ppm");
    write_ppm(&ppm, width, height, rgb);
    let wanted = expected(model, width, height, rgb);
    assert!(wanted.lines().count() > 0, "nothing to find tests nothing");
    for example in ["examples/detect.c", "examples/detect.cpp"] {
        for link in [Link::Static, Link::Dynamic] {
            let program = build(&source(example), folder.path(), link);
            let printed = run(Command::new(program).arg(model).arg(&ppm));
            assert_eq!(printed, wanted, "{example} {link:?}");
        }
    }
    // Cargo builds the Rust example beside the tests.
    let rust = c::libraries().parent().unwrap().join("examples/detect");
    if rust.exists() {
        assert_eq!(run(Command::new(rust).arg(model).arg(&ppm)), wanted, "examples/detect.rs");
    }
}

#[test]
fn examples_find_what_a_session_finds_with_random_weights() {
    let folder = tempfile::tempdir().unwrap();
    let model = common::model::file(folder.path(), 1);
    examples_print(&model, 333, 222, &picture(333, 222, 5));
}

#[test]
fn examples_find_the_published_faces() {
    let Some(shared) = common::shared() else { return };
    let fixture = shared.join("fixtures/retinaface-mobile025");
    let golden = fixture.join("golden/20_Family_Group_Family_Group_20_914.png");
    let png = image::open(golden).unwrap().to_rgb8();
    let (width, height) = (png.width() as usize, png.height() as usize);
    examples_print(&fixture.join("weights.safetensors"), width, height, &png);
}

#[test]
fn examples_refuse_bad_files_with_a_message() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let model = common::model::file(folder.path(), 1);
    let weights = std::fs::read(&model).unwrap();
    std::fs::write(at("cut.safetensors"), &weights[..weights.len() / 2]).unwrap();
    write_ppm(&at("good.ppm"), 64, 64, &picture(64, 64, 1));
    write_ppm(&at("cut.ppm"), 64, 65, &picture(64, 64, 1));
    std::fs::write(at("empty.ppm"), "").unwrap();
    std::fs::write(at("comment.ppm"), "P6 # never ends").unwrap();
    std::fs::write(at("huge.ppm"), "P6 99999999999 3 255\n").unwrap();
    let cases = [
        (at("cut.safetensors"), at("good.ppm"), "cut.safetensors"),
        (at("none.safetensors"), at("good.ppm"), "none.safetensors"),
        (model.clone(), at("cut.ppm"), "cut.ppm"),
        (model.clone(), at("empty.ppm"), "empty.ppm"),
        (model.clone(), at("comment.ppm"), "comment.ppm"),
        (model.clone(), at("huge.ppm"), "huge.ppm"),
        (model.clone(), at("none.ppm"), "none.ppm"),
    ];
    for example in ["examples/detect.c", "examples/detect.cpp"] {
        let program = build(&source(example), folder.path(), Link::Static);
        for (model, picture, named) in &cases {
            let output = Command::new(&program).args([model, picture]).output().unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(1), "{example} {named}: {said}");
            assert!(said.contains(named), "{example} {named}: {said}");
        }
    }
}

#[test]
fn every_function_in_many_orders_from_c() {
    let folder = tempfile::tempdir().unwrap();
    let model = common::model::file(folder.path(), 2);
    for link in [Link::Static, Link::Dynamic] {
        let program = build(&source("tests/c/lifetimes.c"), folder.path(), link);
        assert_eq!(run(Command::new(program).arg(&model)), "clean\n");
    }
}

#[test]
fn the_cxx_wrapper_owns_throws_and_grows() {
    let folder = tempfile::tempdir().unwrap();
    let model = common::model::file(folder.path(), 1);
    let program = build(&source("tests/c/wrapper.cpp"), folder.path(), Link::Static);
    assert_eq!(run(Command::new(program).arg(&model)), "clean\n");
}

#[cfg(target_os = "linux")]
#[test]
fn detection_on_one_thread_makes_no_system_call() {
    let folder = tempfile::tempdir().unwrap();
    let model = common::model::file(folder.path(), 3);
    let rgb = folder.path().join("picture.rgb");
    std::fs::write(&rgb, picture(700, 300, 7)).unwrap();
    for link in [Link::Static, Link::Dynamic] {
        let program = build(&source("tests/c/silent.c"), folder.path(), link);
        for case in ["700 300 rgb 0 0", "320 240 nv12 0 0", "700 300 rgb 608 0", "640 200 nv12 608 2"] {
            let output = Command::new(&program).args([&model, &rgb]).args(case.split(' ')).output().unwrap();
            if output.status.code() == Some(77) {
                eprintln!("skipped: this kernel has no seccomp");
                return;
            }
            let said = String::from_utf8_lossy(&output.stderr);
            // A forbidden call ends the program by SIGKILL.
            assert!(output.status.success(), "{link:?}, {case}: {} {said}", output.status);
            let count: usize = String::from_utf8_lossy(&output.stdout).parse().unwrap();
            assert!(count > 0, "{link:?}, {case}: nothing found");
        }
        let loud = "320 240 rgb 0 0 loud".split(' ');
        let status = Command::new(&program).args([&model, &rgb]).args(loud).status().unwrap();
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(9), "a call went through");
    }
}

/// Writes a model and a picture for scripts that run the example, where `FARFACE_TEST_OUT` names a
/// folder: the published model and its picture of a family, or random ones without ../shared.
#[test]
fn inputs_for_scripts() {
    let temporary = tempfile::tempdir().unwrap();
    let folder =
        std::env::var_os("FARFACE_TEST_OUT").map_or_else(|| temporary.path().to_path_buf(), PathBuf::from);
    let (model, ppm) = (folder.join("model.safetensors"), folder.join("picture.ppm"));
    match common::shared() {
        Some(shared) => {
            let fixture = shared.join("fixtures/retinaface-mobile025");
            let golden = fixture.join("golden/20_Family_Group_Family_Group_20_914.png");
            let png = image::open(golden).unwrap().to_rgb8();
            write_ppm(&ppm, png.width() as usize, png.height() as usize, &png);
            std::fs::copy(fixture.join("weights.safetensors"), &model).unwrap();
        }
        None => {
            write_ppm(&ppm, 640, 480, &picture(640, 480, 1));
            std::fs::rename(common::model::file(&folder, 1), &model).unwrap();
        }
    }
    assert!(Model::load(&model).is_ok() && ppm.is_file());
}
