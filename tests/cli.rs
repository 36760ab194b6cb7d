//! The program as a user runs it: pictures in, boxes and drawings out, and what it says when
//! something is wrong.
#![cfg(feature = "cli")]

mod common;

use farface::detect::config::DetectorConfig;
use farface::detect::{detector::Detector, Model, ModelConfig, Precision};
use farface::graph::Weights;
use farface::shape::Shape;
use image::codecs::png::PngEncoder;
use image::{DynamicImage, ExtendedColorType, ImageEncoder, ImageFormat, Rgb, RgbImage};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A folder with `m.safetensors` and pictures.
struct Bench(tempfile::TempDir);

impl Bench {
    fn new() -> Self {
        let bench = Self(tempfile::tempdir().unwrap());
        common::model::weights(1).save(bench.path("m.safetensors")).unwrap();
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Saves a picture, in the format of its name, and returns its pixels.
    fn picture(&self, name: &str, width: u32, height: u32) -> RgbImage {
        let pixels = textured(width, height);
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        pixels.save(path).unwrap();
        pixels
    }

    /// Runs the program in the folder.
    fn run(&self, args: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_farface"));
        command.current_dir(self.0.path()).args(args).env_remove("FARFACE_ISA").output().unwrap()
    }

    /// Standard output of a run that must succeed and say nothing else.
    fn ok(&self, args: &[&str]) -> String {
        let output = self.run(args);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success() && stderr.is_empty(), "{args:?}: {stderr}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// The one error line of a run that must fail with exit code 1.
    fn error(&self, args: &[&str]) -> String {
        let output = self.run(args);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{args:?}: {stderr}");
        assert!(stderr.starts_with("error: ") && stderr.lines().count() == 1, "{args:?}: {stderr}");
        stderr.trim_end().to_string()
    }

    /// JSON of one picture's detection.
    fn json(&self, args: &[&str]) -> Value {
        let text = self.ok(&[&["detect", "-m", "m.safetensors", "--json", "--threads", "1"], args].concat());
        assert_eq!(text.lines().count(), 1, "{text}");
        serde_json::from_str(&text).unwrap()
    }

    /// Names in a subfolder, sorted.
    fn list(&self, dir: &str) -> Vec<String> {
        let entries = std::fs::read_dir(self.path(dir)).unwrap();
        let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

/// Blobs and grain, on which the random model finds something.
fn textured(width: u32, height: u32) -> RgbImage {
    RgbImage::from_fn(width, height, |x, y| {
        let wave = (x as f32 / 7.0).sin() * (y as f32 / 5.0).cos();
        let grain = (x.wrapping_mul(2_654_435_761) ^ y.wrapping_mul(40_503)) >> 27;
        let v = |shift: f32| (128.0 + 90.0 * wave + shift + grain as f32).clamp(0.0, 255.0) as u8;
        Rgb([v(0.0), v(-20.0), v(15.0)])
    })
}

fn boxes(json: &Value) -> Vec<[f64; 4]> {
    let number = |face: &Value, key: &str| face[key].as_f64().unwrap();
    let faces = json["faces"].as_array().unwrap().iter();
    faces.map(|f| ["x", "y", "width", "height"].map(|key| number(f, key))).collect()
}

#[test]
fn every_format_of_a_picture_gives_the_same_faces() {
    let bench = Bench::new();
    let mut results = Vec::new();
    for name in ["a.png", "a.bmp", "a.webp"] {
        bench.picture(name, 160, 120);
        let json = bench.json(&[name]);
        assert_eq!(
            (&json["file"], &json["width"], &json["height"]),
            (&name.into(), &160.into(), &120.into())
        );
        assert!(!boxes(&json).is_empty());
        results.push(json["faces"].clone());
    }
    assert_eq!(results[0], results[1]);
    assert_eq!(results[0], results[2]);
    // Lossy: only that it is read.
    bench.picture("a.jpg", 160, 120);
    assert!(!boxes(&bench.json(&["a.jpg"])).is_empty());
    // The content tells the format, not the name.
    std::fs::rename(bench.path("a.bmp"), bench.path("b.jpg")).unwrap();
    assert_eq!(bench.json(&["b.jpg"])["faces"], results[0]);
    // Alpha and grey.
    let rgba = DynamicImage::ImageRgb8(textured(160, 120)).to_rgba8();
    rgba.save(bench.path("rgba.png")).unwrap();
    assert_eq!(bench.json(&["rgba.png"])["faces"], results[0]);
    let grey = DynamicImage::ImageRgb8(textured(160, 120)).to_luma8();
    grey.save(bench.path("grey.png")).unwrap();
    DynamicImage::ImageLuma8(grey).to_rgb8().save(bench.path("grey-rgb.png")).unwrap();
    assert_eq!(bench.json(&["grey.png"])["faces"], bench.json(&["grey-rgb.png"])["faces"]);
}

#[test]
fn boxes_and_drawings_are_upright_whatever_the_exif_orientation() {
    let bench = Bench::new();
    let upright = bench.picture("upright.png", 160, 96);
    let expected = boxes(&bench.json(&["upright.png"]));
    let stored = [
        (3u8, image::imageops::rotate180(&upright)),
        (6, image::imageops::rotate270(&upright)),
        (8, image::imageops::rotate90(&upright)),
        (2, image::imageops::flip_horizontal(&upright)),
        (5, image::imageops::flip_horizontal(&image::imageops::rotate90(&upright))),
    ];
    for (orientation, pixels) in stored {
        // TIFF header, one entry: tag 0x0112, short, one value.
        let mut exif = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0".to_vec();
        exif.extend([orientation, 0, 0, 0, 0, 0, 0, 0]);
        let mut file = Vec::new();
        let mut encoder = PngEncoder::new(&mut file);
        encoder.set_exif_metadata(exif).unwrap();
        let (w, h) = pixels.dimensions();
        encoder.write_image(&pixels, w, h, ExtendedColorType::Rgb8).unwrap();
        std::fs::write(bench.path("turned.png"), file).unwrap();
        let json = bench.json(&["turned.png", "-o", "out"]);
        assert_eq!((json["width"].as_u64(), json["height"].as_u64()), (Some(160), Some(96)), "{orientation}");
        let found = boxes(&json);
        assert_eq!(found.len(), expected.len(), "orientation {orientation}");
        for (a, b) in found.iter().flatten().zip(expected.iter().flatten()) {
            assert!((a - b).abs() < 1e-2, "orientation {orientation}: {a} {b}");
        }
        let drawn = image::open(bench.path("out/turned.faces.png")).unwrap();
        assert_eq!((drawn.width(), drawn.height()), (160, 96));
    }
}

#[test]
fn the_drawing_differs_from_the_picture_at_the_borders_of_the_boxes_only() {
    let bench = Bench::new();
    let picture = bench.picture("a.png", 320, 240);
    let json = bench.json(&["a.png", "-o", "out/new", "--max-faces", "1", "--max-face", "20"]);
    let [x, y, w, h] = boxes(&json)[0];
    let drawn = image::open(bench.path("out/new/a.faces.png")).unwrap().to_rgb8();
    assert_eq!(drawn.dimensions(), picture.dimensions());
    let (x1, y1) = (x.floor() as i64, y.floor() as i64);
    let (x2, y2) = ((x + w).ceil() as i64, (y + h).ceil() as i64);
    let mut on_frame = 0;
    for (px, py, pixel) in drawn.enumerate_pixels() {
        let (px, py) = (px as i64, py as i64);
        let inside = (x1..x2).contains(&px) && (y1..y2).contains(&py);
        let frame = !inside && (x1 - 1..=x2).contains(&px) && (y1 - 1..=y2).contains(&py);
        let same = pixel == picture.get_pixel(px as u32, py as u32);
        assert_eq!(same, !frame, "pixel {px} {py} of the box {x1} {y1} {x2} {y2}");
        on_frame += usize::from(frame);
    }
    assert!(on_frame > 8);
    assert_eq!(bench.list("out/new"), ["a.faces.png"]);
}

#[test]
fn output_formats_hold_the_same_boxes() {
    let bench = Bench::new();
    bench.picture("0--Parade/a,b.png", 160, 120);
    let file = "0--Parade/a,b.png";
    let expected = boxes(&bench.json(&[file]));
    let base = ["detect", "-m", "m.safetensors", "--threads", "1", file];

    let text = bench.ok(&base);
    assert!(text.starts_with(&format!("{file}: 160x120, {} faces\n", expected.len())), "{text}");
    assert_eq!(text.lines().count(), 1 + expected.len());

    let csv = bench.ok(&[&base[..], &["--csv"]].concat());
    let mut lines = csv.lines();
    assert!(lines.next().unwrap().starts_with("file,x,y,width,height,score,left_eye_x,"));
    for (line, expected) in lines.by_ref().zip(&expected) {
        let numbers = line.strip_prefix("\"0--Parade/a,b.png\",").unwrap();
        let numbers: Vec<f64> = numbers.split(',').map(|n| n.parse().unwrap()).collect();
        assert_eq!(numbers.len(), 15);
        assert_eq!(numbers[..4], expected[..]);
    }

    let printed = bench.ok(&[&base[..], &["--wider", "-o", "results"]].concat());
    assert_eq!(printed, "");
    assert_eq!(bench.list("results/0--Parade"), ["a,b.txt"]);
    let wider = std::fs::read_to_string(bench.path("results/0--Parade/a,b.txt")).unwrap();
    let mut lines = wider.lines();
    assert_eq!(lines.next(), Some("a,b"));
    assert_eq!(lines.next(), Some(expected.len().to_string().as_str()));
    for (line, expected) in lines.by_ref().zip(&expected) {
        let numbers: Vec<f64> = line.split(' ').map(|n| n.parse().unwrap()).collect();
        assert_eq!(numbers[..4], expected[..]);
    }
}

#[test]
fn pictures_of_one_name_do_not_overwrite_each_other() {
    let bench = Bench::new();
    bench.picture("x/a.png", 64, 48);
    bench.picture("y/a.png", 80, 48);
    bench.ok(&["detect", "-m", "m.safetensors", "x/a.png", "y/a.png", "-o", "out"]);
    assert_eq!(bench.list("out"), ["a-2.faces.png", "a.faces.png"]);
    assert_eq!(image::image_dimensions(bench.path("out/a-2.faces.png")).unwrap(), (80, 48));
    let wider = ["detect", "-m", "m.safetensors", "x/a.png", "x/../x/a.png", "--wider", "-o", "out"];
    assert!(bench.error(&wider).contains("second picture"));
}

/// A PNG that says it has this size.
fn png_announcing(width: u32, height: u32) -> Vec<u8> {
    let mut file = Vec::new();
    textured(8, 8).write_to(&mut std::io::Cursor::new(&mut file), ImageFormat::Png).unwrap();
    file[16..20].copy_from_slice(&width.to_be_bytes());
    file[20..24].copy_from_slice(&height.to_be_bytes());
    let mut crc = flate2::Crc::new();
    crc.update(&file[12..29]);
    file[29..33].copy_from_slice(&crc.sum().to_be_bytes());
    file
}

/// A BMP header without pixels.
fn bmp_announcing(width: i32, height: i32) -> Vec<u8> {
    let mut file = b"BM".to_vec();
    file.extend([54u32, 0, 54, 40].iter().flat_map(|v| v.to_le_bytes()));
    file.extend([width, height].iter().flat_map(|v| v.to_le_bytes()));
    file.extend([1u16, 24].iter().flat_map(|v| v.to_le_bytes()));
    file.extend([0u8; 24]);
    file
}

#[test]
fn a_bad_picture_is_named_with_its_reason_and_nothing_is_written() {
    let bench = Bench::new();
    let encoded = |format| {
        let mut file = std::io::Cursor::new(Vec::new());
        textured(160, 120).write_to(&mut file, format).unwrap();
        file.into_inner()
    };
    let half = |format| {
        let file: Vec<u8> = encoded(format);
        file[..file.len() / 2].to_vec()
    };
    let mut damaged = encoded(ImageFormat::Png);
    let middle = damaged.len() / 2;
    damaged[middle..middle + 40].fill(0x55);
    for (name, content, reason) in [
        ("empty.jpg", vec![], "the file is empty"),
        (
            "text.png",
            b"this is a text file, not a picture".to_vec(),
            "not a picture (PNG, JPEG, WebP or BMP)",
        ),
        ("anim.gif", b"GIF89a\x01\0\x01\0\0\0\0;".to_vec(), "PNG, JPEG, WebP or BMP"),
        ("short.png", half(ImageFormat::Png), "truncated"),
        ("short.jpg", half(ImageFormat::Jpeg), "truncated"),
        ("short.webp", half(ImageFormat::WebP), ""),
        ("short.bmp", half(ImageFormat::Bmp), "truncated"),
        ("damaged.png", damaged, "damaged"),
        ("zero.png", png_announcing(0, 8), ""),
        ("zero.bmp", bmp_announcing(0, 8), ""),
        ("huge.png", png_announcing(60_000, 60_000), "60000x60000 px is more than"),
        ("huger.png", png_announcing(0x7fff_ffff, 0x7fff_ffff), ""),
        ("huge.bmp", bmp_announcing(60_000, 30_000), "60000x30000 px is more than"),
    ] {
        std::fs::write(bench.path(name), content).unwrap();
        let error = bench.error(&["detect", "-m", "m.safetensors", "-o", "out", name]);
        assert!(error.contains(name) && error.contains(reason), "{name}: {error}");
        assert_eq!(bench.list("out"), Vec::<String>::new(), "{name}");
    }
    let missing = bench.error(&["detect", "-m", "m.safetensors", "none.png"]);
    assert!(missing.contains("none.png: No such file"), "{missing}");
    let folder = bench.error(&["detect", "-m", "m.safetensors", "out"]);
    assert!(folder.contains("out: this is a folder"), "{folder}");
}

#[test]
fn the_other_pictures_are_done_after_a_bad_one() {
    let bench = Bench::new();
    bench.picture("a.png", 64, 48);
    bench.picture("c.png", 64, 48);
    std::fs::write(bench.path("b.png"), "nothing").unwrap();
    let output = bench.run(&["detect", "-m", "m.safetensors", "-o", "out", "a.png", "b.png", "c.png"]);
    assert_eq!(output.status.code(), Some(1));
    let (stdout, stderr) =
        (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert!(stdout.contains("a.png: 64x48") && stdout.contains("c.png: 64x48"), "{stdout}");
    assert!(
        stderr.contains("error: b.png: not a picture") && stderr.contains("1 of 3 pictures failed"),
        "{stderr}"
    );
    assert_eq!(bench.list("out"), ["a.faces.png", "c.faces.png"]);
}

#[test]
fn an_output_folder_that_cannot_be_made_is_an_error() {
    let bench = Bench::new();
    bench.picture("a.png", 64, 48);
    let error = bench.error(&["detect", "-m", "m.safetensors", "a.png", "-o", "a.png/out"]);
    assert!(error.contains("a.png/out"), "{error}");
}

#[test]
fn a_bad_model_is_named_with_its_reason() {
    let bench = Bench::new();
    bench.picture("a.png", 64, 48);
    let good = common::model::weights(1);
    let error = |name: &str| bench.error(&["detect", "a.png", "-m", name]);
    let (class, head) = ("ClassHead.1.conv1x1.bias", "ssh1.conv3X3.0.weight");

    let mut weights = good.clone();
    weights.tensors.remove(class);
    weights.save(bench.path("lacks.safetensors")).unwrap();
    let text = error("lacks.safetensors");
    assert!(
        text.contains("lacks.safetensors") && text.contains(&format!("tensor {class} is missing")),
        "{text}"
    );

    let mut weights = good.clone();
    weights.tensors.get_mut(head).unwrap().shape.swap(0, 1);
    weights.save(bench.path("shape.safetensors")).unwrap();
    let text = error("shape.safetensors");
    assert!(
        text.contains("shape.safetensors") && text.contains(&format!("tensor {head} has shape")),
        "{text}"
    );

    let mut weights = good.clone();
    weights.tensors.get_mut(head).unwrap().data[7] = f32::NAN;
    weights.save(bench.path("nan.safetensors")).unwrap();
    let text = error("nan.safetensors");
    assert!(text.contains(&format!("nan.safetensors: tensor {head}: value 7 is NaN")), "{text}");

    let mut weights = good.clone();
    for json in weights.metadata.values_mut() {
        *json = json.replace("\"format_version\":1", "\"format_version\":99");
    }
    weights.save(bench.path("new.safetensors")).unwrap();
    assert!(error("new.safetensors").contains("format version 99"));

    let bytes = std::fs::read(bench.path("m.safetensors")).unwrap();
    std::fs::write(bench.path("short.safetensors"), &bytes[..bytes.len() / 2]).unwrap();
    let text = error("short.safetensors");
    assert!(text.contains("short.safetensors: not a complete safetensors file"), "{text}");
    assert!(error("none.safetensors").contains("none.safetensors: No such file"));
    if cfg!(not(feature = "default-model")) {
        assert!(bench.error(&["detect", "a.png"]).contains("--model"));
    }
}

#[test]
fn wrong_usage_is_exit_code_2_and_wrong_values_are_named() {
    let bench = Bench::new();
    bench.picture("a.png", 64, 48);
    for args in [
        &["detect"][..],
        &["detect", "a.png", "--json", "--csv"],
        &["detect", "a.png", "--wider"],
        &["detect", "a.png", "--pyramid", "1:2"],
        &["detect", "a.png", "--scales", "0.5,0"],
        &["detect", "a.png", "--scales", "1", "--pyramid", "1"],
        &["detect", "a.png", "--suppression", "hard"],
        &["detect", "a.png", "--threshold", "high"],
        &["bench", "--size", "640"],
        &["eval", "wider", "--gt", "x"],
        &["no-such-command"],
    ] {
        assert_eq!(bench.run(args).status.code(), Some(2), "{args:?}");
    }
    let base = ["detect", "-m", "m.safetensors", "a.png"];
    for (option, value, what) in [
        ("--threshold", "1.5", "score_threshold"),
        ("--nms", "-1", "nms_iou"),
        ("--suppression", "voting:2", "voting IoU"),
        ("--suppression", "soft-gaussian:0", "sigma"),
        ("--min-face", "-3", "min_face_px"),
        ("--threads", "1000", "threads"),
    ] {
        let error = bench.error(&[&base[..], &[&format!("{option}={value}")]].concat());
        assert!(error.contains(what), "{error}");
    }
    for help in [&["--help"][..], &["detect", "--help"], &["eval", "wider", "--help"], &["bench", "--help"]] {
        assert!(bench.ok(help).contains("Usage: farface"), "{help:?}");
    }
}

#[test]
fn settings_reach_the_detector() {
    let bench = Bench::new();
    bench.picture("a.png", 320, 240);
    let count = |args: &[&str]| boxes(&bench.json(&[&["a.png"], args].concat())).len();
    let all = count(&[]);
    assert!(all > 3, "{all}");
    assert_eq!(count(&["--max-faces", "3"]), 3);
    assert_eq!(count(&["--threshold", "1"]), 0);
    assert!(count(&["--nms", "0.9"]) > all);
    let doubled = bench.json(&["a.png", "--pyramid", "2"]);
    assert_ne!(boxes(&doubled), boxes(&bench.json(&["a.png"])));
    assert_eq!(bench.json(&["a.png", "--scales", "2"]), doubled);
    assert_eq!(bench.json(&["a.png", "--scales", "1,0.5,2"]), bench.json(&["a.png", "--pyramid=-1:1:1"]));
    assert_ne!(boxes(&bench.json(&["a.png", "--flip"])), boxes(&bench.json(&["a.png"])));
    assert!(count(&["--suppression", "soft-linear"]) > all);
    assert_eq!(count(&["--suppression", "voting"]), all);
    let voted = |iou: &str| bench.json(&["a.png", "--suppression", iou]);
    assert_ne!(voted("voting"), bench.json(&["a.png"]));
    assert_eq!(voted("voting:1"), voted("greedy"), "nothing overlaps by more than 1");
    assert_ne!(voted("soft-gaussian:0.1"), voted("soft-gaussian"));
    let small = bench.json(&["a.png", "--max-face", "20"]);
    assert!(boxes(&small).iter().all(|b| b[2].max(b[3]) <= 20.0));
    // Threads and tiles change nothing.
    let whole = bench.json(&["a.png"]);
    assert_eq!(bench.json(&["a.png", "--tile", "1024"]), whole);
    let two = bench.ok(&["detect", "-m", "m.safetensors", "a.png", "--json", "--threads", "2"]);
    assert_eq!(serde_json::from_str::<Value>(&two).unwrap(), whole);
}

#[test]
fn detectors_are_listed_with_what_they_cost() {
    let bench = Bench::new();
    let args = ["detectors", "farface-nano", "hambox-r18", "--size", "96x64"];
    let text = bench.ok(&args);
    let lines: Vec<&str> = text.lines().collect();
    assert!(
        lines.len() == 3 && lines[1].starts_with("farface-nano ") && lines[2].starts_with("hambox-r18 "),
        "{text}"
    );
    let list: Value = serde_json::from_str(&bench.ok(&[&args[..], &["--json", "--time"]].concat())).unwrap();
    assert_eq!(list.as_array().unwrap().len(), 2);
    for (entry, name) in list.as_array().unwrap().iter().zip(["farface-nano", "hambox-r18"]) {
        let graph = ModelConfig::named(name).unwrap().detector.detector().graph();
        assert_eq!(entry["name"], name);
        assert_eq!(entry["parameters"], graph.param_count());
        assert_eq!(entry["multiply_adds"], graph.macs(&[Shape::new(1, 3, 64, 96)]).unwrap());
        assert!(entry["milliseconds"].as_f64().unwrap() > 0.0);
    }
    let all = bench.ok(&["detectors"]);
    assert!(all.lines().skip(1).all(|l| ModelConfig::named(l.split(' ').next().unwrap()).is_some()), "{all}");
    assert!(all.lines().count() > 30);
    assert!(bench
        .error(&["detectors", "farface-nano", "hambox-r19"])
        .contains("\"hambox-r19\" is not one of"));
}

#[test]
fn inspect_adds_up() {
    let bench = Bench::new();
    let text = bench.ok(&["inspect", "m.safetensors", "--size", "320x256"]);
    for part in ["random-1", "Layers as built", "Compiled steps", "body.stage1.0.0", "1x8x128x160"] {
        assert!(text.contains(part), "{part}");
    }
    let json: Value = serde_json::from_str(&bench.ok(&["inspect", "m.safetensors", "--json"])).unwrap();
    let sum = |list: &str, key: &str| -> u64 {
        json[list].as_array().unwrap().iter().map(|l| l[key].as_u64().unwrap()).sum()
    };
    assert_eq!(json["parameters"], 426_608);
    assert_eq!(sum("layers", "parameters"), 426_608);
    assert_eq!(json["multiply_adds"], 735_859_200);
    assert_eq!(sum("layers", "multiply_adds"), 735_859_200);
    assert_eq!(sum("steps", "multiply_adds"), 735_859_200);
    assert_eq!(json["config"]["nms_iou"], 0.4);
    assert!(bench.error(&["inspect", "none"]).contains("none: No such file"));
}

#[test]
fn bench_times_parts_and_steps() {
    let bench = Bench::new();
    let sizes = ["--size", "64x64", "--size", "96x64", "--runs", "3", "--layers"];
    let args = [&["bench", "-m", "m.safetensors"], &sizes[..]].concat();
    let text = bench.ok(&args);
    for part in
        ["64x64:", "96x64:", "detection", "network", "in bands", "depthwise, conv 1x1", "GF/s", "peak"]
    {
        assert!(text.contains(part), "{part}: {text}");
    }
    let json: Value = serde_json::from_str(&bench.ok(&[&args[..], &["--json"]].concat())).unwrap();
    assert!(json["peak_gflops"].as_f64().unwrap() > 0.1);
    let result = &json["results"][1];
    let time = |part: &str, key: &str| result["times"][part][key].as_f64().unwrap();
    assert!(time("network", "min_ms") > 0.0);
    assert!(time("detection", "median_ms") >= time("network", "min_ms"));
    assert!(time("detection", "p90_ms") >= time("detection", "min_ms"));
    assert_eq!(
        result["levels"],
        serde_json::json!([{ "scale": 1.0, "width": 96, "height": 64, "tiles": 1, "network_pixels": 96 * 64 }])
    );
    let layers = result["layers"].as_array().unwrap();
    assert!(layers.len() > 20);
    assert!(layers.iter().all(|l| l["share_of_peak"].as_f64().is_none_or(|s| s > 0.0)));
    let large =
        ["bench", "-m", "m.safetensors", "--size", "640x480", "--min-face", "80", "--flip", "--runs", "1"];
    let text = bench.ok(&large);
    assert!(text.contains("scale 0.1000: 64x48 in 1 tile, 0.006 M pixels"), "{text}");
    bench.picture("a.png", 64, 48);
    let nv12 = bench.ok(&["bench", "-m", "m.safetensors", "--size", "97x65", "--nv12", "--runs", "1"]);
    assert!(nv12.contains("97x65:"), "{nv12}");
    let picture = bench.ok(&["bench", "-m", "m.safetensors", "--image", "a.png", "--runs", "1"]);
    assert!(picture.contains("64x48:"), "{picture}");
}

#[test]
fn quantize_writes_a_model_that_runs_in_int8() {
    let bench = Bench::new();
    for i in 0..3 {
        bench.picture(&format!("pictures/deep/{i}.png"), 150 + 20 * i, 130);
    }
    std::fs::write(bench.path("pictures/notes.txt"), "no picture").unwrap();
    let base = ["quantize", "m.safetensors", "--data", "pictures", "--output", "q.safetensors"];
    let text = bench.ok(&base);
    assert!(text.contains("ranges from 3 pictures") && text.contains("noise of the outputs"), "{text}");
    assert!(text.contains("faces that f32 finds on them"), "{text}");
    let report = |args: &[&str]| -> Value {
        serde_json::from_str(&bench.ok(&[&base[..], &["--json"], args].concat())).unwrap()
    };
    // What it keeps in f32 by itself is never for the worse.
    let found = |report: &Value| report["ap_of_own_faces"].as_f64().unwrap();
    let (free, bound) = (report(&[]), report(&["--max-loss", "100"]));
    assert_eq!(bound["kept_in_f32"], serde_json::json!([]));
    assert!(found(&free) >= found(&bound), "{free} {bound}");
    let report = report(&["--keep", "fpn.output1.0", "--max-loss", "100"]);
    assert_eq!(report["kept_in_f32"], serde_json::json!(["fpn.output1.0"]));
    assert!(report["output_noise"].as_f64().unwrap() < 0.2 && report["ap_after"].is_null(), "{report}");
    assert!((0.3..=1.0).contains(&found(&report)), "{report}");

    // Its own numbers are int8 where the CPU gains by it, others on request; the file it was made of has none.
    let kernels = |args: &[&str]| bench.ok(&[&["inspect"], args].concat());
    assert!(kernels(&["q.safetensors", "--precision", "int8"]).contains("int8"));
    let own = Model::load(bench.path("q.safetensors")).unwrap().own_precision();
    assert_eq!(kernels(&["q.safetensors"]).contains("int8"), own == Precision::Int8);
    assert!(!kernels(&["q.safetensors", "--precision", "f32"]).contains("int8"));
    assert!(kernels(&["m.safetensors", "--precision", "bf16"]).contains(" bf16"));
    assert!(kernels(&["m.safetensors", "--precision", "f16"]).contains(" f16"));
    let error = bench.error(&["inspect", "m.safetensors", "--precision", "int8"]);
    assert!(error.contains("farface quantize"), "{error}");
    let detect = |model: &str, precision: &str| {
        let args = ["detect", "-m", model, "--json", "--precision", precision, "pictures/deep/1.png"];
        boxes(&serde_json::from_str(&bench.ok(&args)).unwrap())
    };
    let single = detect("q.safetensors", "f32");
    assert!(!single.is_empty());
    for (model, numbers) in [("q", "auto"), ("q", "int8"), ("q", "bf16"), ("q", "f16"), ("m", "f32")] {
        let other = detect(&format!("{model}.safetensors"), numbers);
        assert!(
            other.len().abs_diff(single.len()) <= 1 + single.len() / 3,
            "{} and {}",
            other.len(),
            single.len()
        );
    }

    // AP before and after on annotated pictures, ranges from the others.
    std::fs::write(bench.path("gt.txt"), "deep/1.png\n1\n20 20 40 40 0 0 0 0 0 0\n").unwrap();
    let report = bench.ok(&[&base[..], &["--gt", "gt.txt", "--max-loss", "100"]].concat());
    assert!(report.contains("from 2 pictures") && report.contains("before"), "{report}");

    for (args, what) in [
        (["quantize", "m.safetensors", "--data", "none", "--output", "q.safetensors"], "none"),
        (
            ["quantize", "none.safetensors", "--data", "pictures", "--output", "q.safetensors"],
            "none.safetensors",
        ),
    ] {
        let error = bench.error(&args);
        assert!(error.contains(what), "{error}");
    }
    let error = bench.error(&[&base[..], &["--keep", "nothing"]].concat());
    assert!(error.contains("nothing"), "{error}");
}

#[test]
fn convert_makes_models_of_public_weights_and_refuses_others() {
    let bench = Bench::new();
    bench.picture("a.png", 160, 120);
    let mut public = common::model::weights(1);
    public.metadata.clear();
    public.save(bench.path("public.safetensors")).unwrap();
    let args = ["convert", "public.safetensors", "out.safetensors", "--licence", "MIT", "--name", "mine"];
    bench.ok(&args);
    bench.ok(&["convert", "out.safetensors", "half.safetensors", "--f16"]);
    let inspect =
        |name: &str| -> Value { serde_json::from_str(&bench.ok(&["inspect", name, "--json"])).unwrap() };
    for name in ["out.safetensors", "half.safetensors"] {
        let config = &inspect(name)["config"];
        assert_eq!((&config["name"], &config["licence"]), (&"mine".into(), &"MIT".into()), "{name}");
    }
    let faces = |model: &str| {
        let text = bench.ok(&["detect", "a.png", "--json", "-m", model, "--threads", "1"]);
        serde_json::from_str::<Value>(&text).unwrap()["faces"].clone()
    };
    assert_eq!(faces("out.safetensors"), faces("m.safetensors"));
    assert!(!faces("half.safetensors").as_array().unwrap().is_empty());
    let size = |name: &str| std::fs::metadata(bench.path(name)).unwrap().len();
    assert!(size("half.safetensors") * 10 < size("out.safetensors") * 6);

    // Refused: unknown tensors, an incomplete network, PyTorch's own format, values beyond f16.
    let mut unknown = public.clone();
    unknown.tensors.retain(|name, _| name.starts_with("fpn"));
    unknown.save(bench.path("unknown.safetensors")).unwrap();
    let mut lacks = public.clone();
    lacks.tensors.remove("fpn.merge1.0.weight");
    lacks.save(bench.path("lacks.safetensors")).unwrap();
    std::fs::write(bench.path("torch.pth"), b"PK\x03\x04 and so on").unwrap();
    public.tensors.get_mut("fpn.merge1.0.weight").unwrap().data[0] = 1e6;
    public.save(bench.path("large.safetensors")).unwrap();
    for (name, what) in [
        ("unknown.safetensors", "no public detector"),
        ("lacks.safetensors", "fpn.merge1.0.weight is missing"),
        ("torch.pth", "PyTorch checkpoint"),
        ("large.safetensors", "too large for half precision"),
        ("none.safetensors", "No such file"),
    ] {
        let error = bench.error(&["convert", name, "new.safetensors", "--f16"]);
        assert!(error.contains(name) && error.contains(what), "{error}");
        assert!(!bench.path("new.safetensors").exists());
    }
}

#[test]
fn convert_takes_the_detector_by_name_and_writes_onnx() {
    let bench = Bench::new();
    let config = ModelConfig::farface_nano();
    let DetectorConfig::Pyramid(detector) = &config.detector else { panic!("{config:?}") };
    let mut bare = Weights::random(&detector.graph(), 1);
    // As PyTorch's DataParallel saves them.
    bare.tensors = bare.tensors.into_iter().map(|(name, t)| (format!("module.{name}"), t)).collect();
    bare.save(bench.path("bare.safetensors")).unwrap();
    let error = bench.error(&["convert", "bare.safetensors", "nano.safetensors"]);
    assert!(error.contains("no public detector") && error.contains("--detector"), "{error}");
    bench.ok(&["convert", "bare.safetensors", "nano.safetensors", "--detector", "farface-nano"]);
    let inspect: Value = serde_json::from_str(&bench.ok(&["inspect", "nano.safetensors", "--json"])).unwrap();
    assert_eq!(inspect["config"]["detector"]["kind"], "pyramid");
    assert_eq!(inspect["parameters"], detector.graph().param_count());
    let size = ["--size", "96x64", "--runs", "1"];
    assert!(bench.ok(&[&["bench", "-m", "nano.safetensors"], &size[..]].concat()).contains("96x64:"));
    let error = bench.error(&["convert", "nano.safetensors", "x.safetensors", "--detector", "farface-small"]);
    assert!(error.contains("configuration already"), "{error}");

    bench.ok(&["convert", "nano.safetensors", "--onnx", "any.onnx"]);
    let text = bench.ok(&[
        "convert",
        "nano.safetensors",
        "copy.safetensors",
        "--onnx",
        "vga.onnx",
        "--size",
        "640x480",
    ]);
    assert!(
        text.contains("vga.onnx: farface-nano") && text.contains("copy.safetensors: farface-nano"),
        "{text}"
    );
    let file = |name: &str| std::fs::read(bench.path(name)).unwrap();
    let holds = |name: &str, text: &str| file(name).windows(text.len()).any(|w| w == text.as_bytes());
    assert!(holds("any.onnx", "predict3.height") && !holds("vga.onnx", "predict3.height"));
    assert!(holds("any.onnx", "\"kind\":\"pyramid\"") && holds("vga.onnx", "body.stage1.0.0.weight"));
    assert_eq!(file("copy.safetensors"), file("nano.safetensors"));
}

#[test]
#[cfg(feature = "default-model")]
fn commands_use_the_built_in_model_where_none_is_named() {
    let bench = Bench::new();
    bench.picture("a.png", 160, 120);
    let text = bench.ok(&["detect", "a.png", "--json"]);
    assert!(serde_json::from_str::<Value>(&text).unwrap()["faces"].is_array(), "{text}");
    let inspect: Value = serde_json::from_str(&bench.ok(&["inspect", "--json"])).unwrap();
    assert_eq!((&inspect["file"], &inspect["config"]["name"]), (&Value::Null, &"farface-nano".into()));
    assert!(bench.ok(&["bench", "--size", "96x64", "--runs", "1"]).contains("96x64:"));
}

/// README's first command: rows of one face each, as examples/crowd.py sets them.
#[test]
#[cfg(feature = "default-model")]
fn both_models_find_the_faces_of_the_sample_picture() {
    let bench = Bench::new();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let picture = root.join("examples/crowd.jpg").display().to_string();
    let small = root.join("models/farface-small.safetensors").display().to_string();
    for model in [vec![], vec!["--model", &small[..]]] {
        let text = bench.ok(&[&["detect", &picture, "--json"], &model[..]].concat());
        let json: Value = serde_json::from_str(&text).unwrap();
        // Middle and height.
        let rows = |f: &Value| {
            let [y, height] = ["y", "height"].map(|key| f[key].as_f64().unwrap());
            [y + height / 2.0, height]
        };
        let faces: Vec<[f64; 2]> = json["faces"].as_array().unwrap().iter().map(rows).collect();
        let mut top = 6.0;
        for face in [8.0f64, 10.0, 13.0, 17.0, 22.0, 29.0, 38.0, 50.0, 66.0, 84.0] {
            // Of the portrait 230 pixels are shown, the face is 125 high.
            let side = (230.0 * face / 125.0).round();
            let step = side + (side / 10.0).floor().max(2.0);
            let composed = ((1280.0 - side - (1280.0 % step / 2.0).floor()) / step).floor() as usize + 1;
            let found: Vec<f64> =
                faces.iter().filter(|[y, _]| (top..top + step).contains(y)).map(|f| f[1]).collect();
            if face >= 22.0 {
                assert_eq!(found.len(), composed, "{model:?}: faces of {face} px");
                assert!(
                    found.iter().all(|h| (0.6..1.2).contains(&(h / face))),
                    "{model:?}, {face} px: {found:?}"
                );
            } else if face >= 13.0 {
                assert!(2 * found.len() > composed, "{model:?}: {} of {composed} of {face} px", found.len());
            }
            top += step;
        }
        assert!(faces.len() > 170, "{model:?}: {} faces", faces.len());
    }
}

/// Parts of the first line that starts with `name`.
fn row<'a>(text: &'a str, name: &str) -> Vec<&'a str> {
    let line = text.lines().find(|l| l.trim_start().starts_with(name));
    line.unwrap_or_else(|| panic!("no {name}: {text}")).split_whitespace().collect()
}

#[test]
fn eval_wider_scores_result_files_and_models() {
    let bench = Bench::new();
    for name in ["0--A/a.png", "0--A/b.jpg", "1--B/c.webp"] {
        bench.picture(&format!("images/{name}"), 160, 120);
    }
    let face = "20 20 30 40 0 0 0 0 0 0\n";
    let gt = format!("0--A/a.jpg\n1\n{face}0--A/b.jpg\n1\n{face}1--B/c.jpg\n0\n");
    std::fs::write(bench.path("gt.txt"), &gt).unwrap();
    std::fs::write(bench.path("list.txt"), format!("0--A/a.jpg\n1\n{face}")).unwrap();
    std::fs::create_dir_all(bench.path("results/0--A")).unwrap();
    std::fs::write(bench.path("results/0--A/a.txt"), "a\n1\n20 20 30 40 0.9\n").unwrap();
    let base = ["eval", "wider", "--gt", "gt.txt", "--results", "results"];

    // One of two faces found, nothing else.
    let text = bench.ok(&[&base[..], &["--plot", "pr.svg", "--coco", "--diagnose", "all"]].concat());
    assert!(text.starts_with("WIDER FACE, 3 pictures"), "{text}");
    assert_eq!(row(&text, "all")[..5], ["all", "AP", "0.5000", "2", "faces"]);
    assert!(text.contains("COCO mAP 0.50") && text.contains("Diagnosis of all, 2 faces"), "{text}");
    assert!(std::fs::read_to_string(bench.path("pr.svg")).unwrap().contains("AP 0.500"));
    let listed = bench.ok(&[&base[..], &["--list", "list.txt", "--json"]].concat());
    let json: Value = serde_json::from_str(&listed).unwrap();
    assert_eq!((&json["images"], &json["subsets"][0]["ap"]), (&1.into(), &1.0.into()));

    // What a model finds is the same read back from its files.
    let run = ["eval", "wider", "--gt", "gt.txt", "-m", "m.safetensors", "--images", "images", "--json"];
    let direct = bench.ok(&[&run[..], &["--threads", "2", "--save-results", "saved"]].concat());
    assert_eq!(
        (bench.list("saved"), bench.list("saved/0--A")),
        (vec!["0--A".into(), "1--B".into()], vec!["a.txt".to_string(), "b.txt".into()])
    );
    assert_eq!(bench.ok(&["eval", "wider", "--gt", "gt.txt", "--results", "saved", "--json"]), direct);

    std::fs::remove_file(bench.path("images/0--A/b.jpg")).unwrap();
    let error = bench.error(&run);
    assert!(error.contains("b.jpg: no such picture"), "{error}");
    std::fs::write(bench.path("images/0--A/b.jpg"), "no picture").unwrap();
    let error = bench.error(&run);
    assert!(error.contains("b.jpg: not a picture"), "{error}");
    let error = bench.error(&["eval", "wider", "--gt", "none.txt", "--results", "results"]);
    assert!(error.contains("none.txt: No such file"), "{error}");
}

#[test]
fn eval_fddb_and_voc_score_result_files_and_models() {
    let bench = Bench::new();
    bench.picture("images/2002/a.jpg", 160, 120);
    std::fs::create_dir_all(bench.path("folds")).unwrap();
    for fold in 1..=10 {
        let text = if fold == 1 { "2002/a\n1\n30 20 1.5707963 80 60 1\n" } else { "" };
        std::fs::write(bench.path(&format!("folds/FDDB-fold-{fold:02}-ellipseList.txt")), text).unwrap();
    }
    std::fs::write(bench.path("found.txt"), "2002/a\n1\n30 20 1.5707963 80 60 0.9\n").unwrap();
    let text = bench.ok(&["eval", "fddb", "--gt", "folds", "--results", "found.txt", "--plot", "roc.svg"]);
    assert_eq!(row(&text, "100"), ["100", "1.0000", "1.0000"]);
    assert!(bench.path("roc.svg").exists());
    let run = ["eval", "fddb", "--gt", "folds", "-m", "m.safetensors", "--images", "images"];
    let direct = bench.ok(&[&run[..], &["--save-results", "saved.txt"]].concat());
    let again = ["eval", "fddb", "--gt", "folds", "--results", "saved.txt", "--images", "images"];
    assert_eq!(bench.ok(&again), direct);

    std::fs::write(bench.path("voc.txt"), "2002/a 10 10 40 50\n2002/a 60 10 90 50 1\n").unwrap();
    std::fs::write(bench.path("voc-found.txt"), "2002/a 0.9 10 10 40 50\n").unwrap();
    let text = bench.ok(&["eval", "voc", "--gt", "voc.txt", "--results", "voc-found.txt", "--mafa"]);
    assert_eq!(row(&text, "whole")[..3], ["whole", "AP", "0.5000"]);
    assert_eq!(row(&text, "masked")[..3], ["masked", "AP", "0.0000"]);
    let run = ["eval", "voc", "--gt", "voc.txt", "-m", "m.safetensors", "--images", "images", "--json"];
    let direct = bench.ok(&[&run[..], &["--save-results", "saved-voc.txt"]].concat());
    assert_eq!(bench.ok(&["eval", "voc", "--gt", "voc.txt", "--results", "saved-voc.txt", "--json"]), direct);
}

#[test]
fn plot_draws_the_logs_of_trainings() {
    let bench = Bench::new();
    let log = |dir: &str, steps: u64, tail: &str| {
        let mut text =
            r#"{"kind":"start","version":"0.1.0","step":0,"steps":4000,"pictures":2391}"#.to_string();
        for i in 1..=steps {
            let (step, epoch, loss) = (50 * i, i as f64 / 3.0, 2.0 / i as f64);
            text += &format!(
                "\n{{\"kind\":\"step\",\"step\":{step},\"epoch\":{epoch},\"side\":320,\"loss\":{loss},\"class\":{},\"box\":{},\
                 \"iou\":0.5,\"gradient_norm\":1.5,\"lr\":0.001}}",
                loss / 2.0,
                loss / 2.0
            );
        }
        std::fs::create_dir_all(bench.path(dir)).unwrap();
        std::fs::write(bench.path(dir).join("log.jsonl"), text + tail).unwrap();
    };
    let dev = |epoch: u64, ap: f64| {
        format!(
            "\n{{\"kind\":\"dev\",\"step\":1,\"epoch\":{epoch},\"easy\":{ap},\"medium\":0.5,\"hard\":null,\"all\":0.4,\
             \"mean\":{ap},\"best\":true,\"seconds\":1.0}}"
        )
    };
    // The last line is cut, as that of a run that is going on may be.
    let tail = format!("{}{}{}\n{{\"kind\":\"st", dev(1, 0.71), dev(2, 0.8125), dev(3, 0.75));
    log("runs/first", 200, &tail);
    log("runs/second", 3, "");
    assert_eq!(bench.ok(&["plot", "runs/first"]), "runs/first/plot.svg\n");
    let svg = std::fs::read_to_string(bench.path("runs/first/plot.svg")).unwrap();
    for text in
        ["first: step 10,000 of 4,000", "Losses", "total", "class", "box", "Learning rate", "Easy  0.8125"]
    {
        assert!(svg.contains(text), "{text}");
    }
    let texts = ["mean 0.8125", "All  0.4000", "Mean IoU", "Gradient norm", "epochs of 2,391"];
    assert!(texts.iter().all(|t| svg.contains(t)) && !svg.contains("Hard") && !svg.contains("NaN"));
    assert_eq!(bench.ok(&["plot", "runs/first", "runs/second", "--out", "both.svg"]), "both.svg\n");
    let svg = std::fs::read_to_string(bench.path("both.svg")).unwrap();
    for text in [
        "first, second",
        "first total",
        "first box",
        "second total",
        "first  Easy 0.812  Medium 0.500  All 0.400",
    ] {
        assert!(svg.contains(text), "{text}");
    }

    let error = bench.error(&["plot", "runs/none"]);
    assert!(error.contains("no log of a training: runs/none/log.jsonl: No such file"), "{error}");
    for empty in ["", "\n", "{\"kind\":\"start\",\"steps\":10,\"pictures\":3}\n", "{\"kin"] {
        std::fs::write(bench.path("empty.jsonl"), empty).unwrap();
        let error = bench.error(&["plot", "empty.jsonl"]);
        assert!(error.contains("empty.jsonl: nothing to draw yet"), "{error}");
    }
    log("runs/broken", 3, "\n{\"kind\":\"st\n{\"kind\":\"end\",\"step\":3}");
    let error = bench.error(&["plot", "runs/broken"]);
    assert!(error.contains("log.jsonl, line 5: not of a training's log"), "{error}");
    let error = bench.error(&["plot", "runs/first", "--out", "a.png"]);
    assert!(error.contains("a.png: the drawing is SVG"), "{error}");
}

#[test]
fn a_published_detector_finds_as_many_faces_as_published() {
    let Some(shared) = common::shared() else { return };
    let bench = Bench::new();
    let fixture = shared.join("fixtures/retinaface-mobile025");
    let model = fixture.join("weights.safetensors");
    for (name, count) in [
        ("9_Press_Conference_Press_Conference_9_165", 14),
        ("20_Family_Group_Family_Group_20_914", 84),
        ("47_Matador_Bullfighter_matadorbullfighting_47_731", 1276),
    ] {
        let picture = fixture.join(format!("golden/{name}.png"));
        let text = |p: &Path| p.to_str().unwrap().to_string();
        let out =
            bench.ok(&["detect", "-m", &text(&model), &text(&picture), "--threshold", "0.02", "--json"]);
        let json: Value = serde_json::from_str(&out).unwrap();
        assert_eq!(boxes(&json).len(), count, "{name}");
    }
}
