//! `farface train` as a user runs it, and as a power cut ends it.
#![cfg(all(unix, feature = "cli", feature = "train"))]

#[path = "common/faces.rs"]
mod faces;

use farface::detect::config::DetectorConfig;
use farface::detect::hr::parse_templates;
use farface::detect::ModelConfig;
use farface::graph::init::Rng;
use farface::graph::Weights;
use farface::nets::hr::Backbone;
use farface::nets::resnet::ResNet;
use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

const RECIPE: &str = r#"
[model]
detector = "farface-nano"
[data]
train = [{ kind = "wider", list = "faces.txt", images = "images" }]
[data.dev]
list = "faces.txt"
images = "images"
every-epochs = 4
[batch]
size = 2
sides = [{ side = 64, share = 1.0 }]
[matching]
kind = "first-step"
[mining]
[loss]
classification = { kind = "regression-aware-focal" }
box = { kind = "neg-ln-iou" }
[optimizer]
kind = "adamw"
[schedule]
lr = 1e-3
unit = "steps"
length = 90
[ema]
[run]
checkpoint-every = 1
log-every = 3
"#;

fn command(dir: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_farface"));
    command.current_dir(dir).args(args).env_remove("FARFACE_ISA");
    command
}

fn run(dir: &Path, args: &[&str]) -> Output {
    command(dir, args).output().unwrap()
}

fn succeeds(dir: &Path, args: &[&str]) -> String {
    let output = run(dir, args);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {stderr}");
    String::from_utf8(output.stdout).unwrap()
}

fn fails(dir: &Path, args: &[&str]) -> String {
    let output = run(dir, args);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{args:?}: {stderr}");
    assert!(stderr.starts_with("error: ") && stderr.lines().count() == 1, "{args:?}: {stderr}");
    stderr
}

/// The log's lines of a kind, without what differs from run to run.
fn lines(dir: &Path, kind: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(dir.join("log.jsonl")).unwrap();
    let all = text.lines().map(|l| serde_json::from_str::<Value>(l).unwrap_or_else(|e| panic!("{l}: {e}")));
    let mut lines: Vec<Value> = all.filter(|v| v["kind"] == kind).collect();
    for line in &mut lines {
        for key in ["seconds", "images_per_second"] {
            line.as_object_mut().unwrap().remove(key);
        }
    }
    lines
}

fn steps(dir: &Path, kind: &str) -> Vec<u64> {
    lines(dir, kind).iter().map(|l| l["step"].as_u64().unwrap()).collect()
}

fn listed(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap();
    let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_training_that_was_killed_again_and_again_ends_with_the_same_bits() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path();
    faces::draw(dir, 6, 80, 1);
    std::fs::write(dir.join("tiny.toml"), RECIPE).unwrap();
    let args = |out| ["train", "tiny.toml", "--out", out, "--threads", "2"];
    succeeds(dir, &args("whole"));
    let (whole, killed) = (dir.join("whole"), dir.join("killed"));
    let log = killed.join("log.jsonl");
    let length = || std::fs::metadata(&log).map_or(0, |m| m.len());
    let mut rng = Rng::new(std::process::id().into());
    let mut kills = 0;
    while kills < 7 {
        // Until the log has a few lines more: in the start, among the steps, in an evaluation; most of the time goes into
        // checkpoints.
        let enough = length() + 300 * rng.below(4) as u64;
        let mut child =
            command(dir, &args("killed")).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        while length() <= enough && child.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_micros(rng.below(40_000) as u64));
        child.kill().unwrap();
        child.wait().unwrap();
        if killed.join("final.safetensors").exists() {
            break;
        }
        kills += 1;
    }
    assert!(kills > 2 && killed.join("last.checkpoint").exists(), "only {kills} kills struck");
    // Killed in the middle of a write.
    let cut = format!("{}{{\"kind\":\"step\",\"st", std::fs::read_to_string(&log).unwrap());
    std::fs::write(&log, cut).unwrap();
    std::fs::write(killed.join(".last.checkpoint.1.part"), "half a check").unwrap();
    succeeds(dir, &args("killed"));

    for file in ["final.safetensors", "best.safetensors", "last.checkpoint"] {
        let bytes = |run: &Path| std::fs::read(run.join(file)).unwrap();
        assert!(bytes(&whole) == bytes(&killed), "{file} differs");
    }
    assert_eq!(steps(&killed, "step"), (1..=30).map(|i| 3 * i).collect::<Vec<u64>>());
    assert_eq!(lines(&killed, "dev"), lines(&whole, "dev"));
    assert_eq!(steps(&killed, "dev"), [12, 24, 36, 48, 60, 72, 84, 90]);
    assert_eq!(lines(&killed, "end"), lines(&whole, "end"));
    let files = ["best.safetensors", "final.safetensors", "last.checkpoint", "log.jsonl", "recipe.toml"];
    assert_eq!(listed(&killed), files);

    // Done is done: nothing is trained or logged twice.
    let bytes = std::fs::read(whole.join("final.safetensors")).unwrap();
    succeeds(dir, &args("whole"));
    assert!(std::fs::read(whole.join("final.safetensors")).unwrap() == bytes);
    assert_eq!((steps(&whole, "end"), steps(&whole, "step").len()), (vec![90], 30));
}

#[test]
fn a_training_stops_at_its_deadline_starts_anew_and_refuses_another_recipe() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path();
    faces::draw(dir, 4, 80, 2);
    std::fs::write(dir.join("tiny.toml"), RECIPE.replace("length = 90", "length = 6")).unwrap();
    let text = succeeds(dir, &["train", "tiny.toml", "--minutes", "0"]);
    assert!(text.contains("stopped at step 0"), "{text}");
    let text = succeeds(dir, &["train", "tiny.toml", "--minutes", "1e300"]);
    assert!(text.contains("steps 0 to 6") && text.contains("done: runs/tiny/final.safetensors"), "{text}");
    let first = std::fs::read(dir.join("runs/tiny/final.safetensors")).unwrap();

    std::fs::write(dir.join("tiny.toml"), RECIPE.replace("length = 90", "length = 7")).unwrap();
    let error = fails(dir, &["train", "tiny.toml"]);
    assert!(error.contains("another recipe") && error.contains("--restart"), "{error}");
    let text = succeeds(dir, &["train", "tiny.toml", "--restart"]);
    assert!(text.contains("steps 0 to 7"), "{text}");
    assert!(std::fs::read(dir.join("runs/tiny/final.safetensors")).unwrap() != first);
    assert_eq!(steps(&dir.join("runs/tiny"), "step"), [3, 6, 7]);

    let error = fails(dir, &["train", "none.toml"]);
    assert!(error.contains("none.toml: No such file"), "{error}");
    std::fs::write(dir.join("bad.toml"), RECIPE.replace("log-every", "log-evry")).unwrap();
    let error = fails(dir, &["train", "bad.toml"]);
    assert!(error.contains("bad.toml") && error.contains("log-evry"), "{error}");
}

#[test]
fn a_training_outlives_its_reader_shares_its_folder_with_none_and_keeps_models() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path();
    faces::draw(dir, 4, 80, 2);
    std::fs::write(dir.join("tiny.toml"), RECIPE).unwrap();
    let mut child =
        command(dir, &["train", "tiny.toml"]).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    // The reader leaves; the second training finds the first at work.
    drop(child.stdout.take());
    while !dir.join("runs/tiny/last.checkpoint").exists() {
        assert!(child.try_wait().unwrap().is_none(), "ended early");
        std::thread::sleep(Duration::from_millis(1));
    }
    let error = fails(dir, &["train", "tiny.toml"]);
    assert!(error.contains("another training is at work"), "{error}");
    assert!(child.wait().unwrap().success());
    let model = dir.join("runs/tiny/final.safetensors");
    let bytes = std::fs::read(&model).unwrap();

    std::fs::remove_file(dir.join("runs/tiny/last.checkpoint")).unwrap();
    let error = fails(dir, &["train", "tiny.toml"]);
    assert!(error.contains("no checkpoint to go on from") && error.contains("--restart"), "{error}");
    // A new start that fails removes nothing.
    std::fs::write(
        dir.join("tiny.toml"),
        RECIPE.replace("[data.dev]\nlist = \"faces.txt\"", "[data.dev]\nlist = \"no.txt\""),
    )
    .unwrap();
    let error = fails(dir, &["train", "tiny.toml", "--restart"]);
    assert!(error.contains("no.txt"), "{error}");
    assert!(std::fs::read(&model).unwrap() == bytes);

    std::fs::write(dir.join("tiny.toml"), RECIPE.replace("length = 90", "length = 3")).unwrap();
    succeeds(dir, &["train", "tiny.toml", "--restart"]);
    let error = fails(dir, &["convert", "runs/tiny/last.checkpoint", "x.safetensors"]);
    assert!(error.contains("checkpoint of a training") && error.contains("best.safetensors"), "{error}");
}

/// From annotations to templates, from a model to ellipses: what is read and written fits together, and what is wrong is named.
#[test]
fn templates_and_ellipses_are_made_of_annotations() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    faces::draw(dir.path(), 12, 128, 4);
    let list = std::fs::read_to_string(at("faces.txt")).unwrap();
    let faces: Vec<Vec<f64>> = list
        .lines()
        .map(|l| l.split(' ').filter_map(|v| v.parse().ok()).collect())
        .filter(|numbers: &Vec<f64>| numbers.len() == 10)
        .collect();

    let table = succeeds(dir.path(), &["cluster", "faces.txt", "-k", "3", "--out", "templates.csv"]);
    let last = table.lines().last().unwrap();
    assert!(last.starts_with(&format!("{} boxes, mean IoU", faces.len())), "{last}");
    let text = std::fs::read_to_string(at("templates.csv")).unwrap();
    let templates = parse_templates(&text).unwrap();
    let json: Value =
        serde_json::from_str(&succeeds(dir.path(), &["cluster", "faces.txt", "-k", "3", "--json"])).unwrap();
    for (t, row) in templates.iter().zip(json.as_array().unwrap()) {
        let drawn =
            |f: &&Vec<f64>| Some(f[3]) == row["height"].as_f64() && Some(f[2]) == row["width"].as_f64();
        assert!(faces.iter().any(|f| drawn(&f)), "a medoid is one of the boxes: {row}");
        let height = row["height"].as_f64().unwrap() * row["sigma"].as_f64().unwrap();
        assert!((f64::from(t.height) - height).abs() < 1e-3, "{t:?} {row}");
    }
    assert!(fails(dir.path(), &["cluster", "faces.txt", "-k", "128"]).contains("different sizes"));
    assert!(fails(dir.path(), &["cluster", "faces.txt", "--min-side", "999"]).contains("999 px"));

    // Random weights find something everywhere.
    let mut config = ModelConfig::named("hr-r18").unwrap();
    if let DetectorConfig::Hr(hr) = &mut config.detector {
        hr.backbone = Backbone::Resnet(ResNet { width: 8, ..ResNet::R18 });
        hr.templates = templates;
    }
    let mut weights = Weights::random(&config.detector.detector().graph(), 1);
    for (name, w) in weights.tensors.iter_mut().filter(|(name, _)| name.starts_with("score_")) {
        // Boxes near their templates, logits above 0.
        if name.ends_with("weight") {
            w.data.iter_mut().for_each(|v| *v *= 1e-4);
        } else {
            w.data[..3].fill(1.0);
        }
    }
    weights.metadata.insert("farface".into(), config.to_json().unwrap());
    std::fs::write(at("hr.safetensors"), weights.to_bytes().unwrap()).unwrap();
    let mut lines = list.lines();
    let mut pictures = Vec::new();
    while let (Some(name), Some(count)) = (lines.next(), lines.next()) {
        let of: Vec<&str> = lines.by_ref().take(count.parse().unwrap()).collect();
        pictures.push((name, of));
    }
    std::fs::create_dir(at("folds")).unwrap();
    for fold in 0..10 {
        let mut text = String::new();
        for (name, of) in pictures.iter().skip(fold).step_by(10) {
            text += &format!("{name}\n{}\n", of.len());
            for line in of {
                let n: Vec<f64> = line.split(' ').map(|v| v.parse().unwrap()).collect();
                let (rx, ry) = (n[2] / 2.0, n[3] / 2.0);
                text += &format!("{ry} {rx} 1.5 {} {} 1\n", n[0] + rx, n[1] + ry);
            }
        }
        std::fs::write(at(&format!("folds/FDDB-fold-{:02}-ellipseList.txt", fold + 1)), text).unwrap();
    }
    let fit = [
        "ellipse",
        "--gt",
        "folds",
        "--images",
        "images",
        "--model",
        "hr.safetensors",
        "--out",
        "e.safetensors",
    ];
    let text = succeeds(dir.path(), &fit);
    let found: usize = text.split(' ').next().unwrap().parse().unwrap();
    assert!(found > faces.len() / 2 && text.contains("mean overlap on folds held back"), "{text}");
    let overlap = |what: &str| -> f64 {
        let line = text.lines().find(|l| l.trim().starts_with(what)).unwrap();
        line.split_whitespace().last().unwrap().parse().unwrap()
    };
    assert!(overlap("ellipses") > 0.5 && overlap("boxes") > 0.3, "{text}");
    let picture = format!("images/{}", pictures[0].0);
    for (model, has) in [("hr.safetensors", false), ("e.safetensors", true)] {
        let json: Value =
            serde_json::from_str(&succeeds(dir.path(), &["detect", &picture, "--model", model, "--json"]))
                .unwrap();
        let found = json["faces"].as_array().unwrap();
        assert!(!found.is_empty());
        assert!(found.iter().all(|f| f["ellipse"].is_object() == has), "{model}: {}", found[0]);
    }
    let nano: Vec<&str> =
        fit.iter().map(|a| if *a == "hr.safetensors" { "nano.safetensors" } else { a }).collect();
    let config = ModelConfig::farface_nano();
    let mut weights = Weights::random(&config.detector.detector().graph(), 1);
    weights.metadata.insert("farface".into(), config.to_json().unwrap());
    std::fs::write(at("nano.safetensors"), weights.to_bytes().unwrap()).unwrap();
    assert!(fails(dir.path(), &nano).contains("farface-nano is not an HR detector"));
}

#[test]
fn a_device_that_is_not_there_is_named() {
    let dir = tempfile::tempdir().unwrap();
    faces::draw(dir.path(), 2, 80, 1);
    std::fs::write(dir.path().join("r.toml"), RECIPE).unwrap();
    for (device, all) in [("gpu", "cpu, cuda or cuda:N"), ("cuda:x", "cuda:N"), ("cuda:99", "99")] {
        let output = run(dir.path(), &["train", "r.toml", "--device", device]);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        // Without a driver that is what is missing.
        let missing = device == "cuda:99" && error.contains("libcuda");
        assert!(!output.status.success() && (missing || error.contains(all)), "{device}: {error}");
    }
}
