//! Trainings that must learn: small sets of pictures by heart.
#![cfg(feature = "train")]

#[path = "common/faces.rs"]
mod faces;
#[path = "common/shared.rs"]
mod shared;

use farface::detect::ModelConfig;
use farface::eval::wider::{Face, GroundTruth};
use farface::graph::Weights;
use farface::train::data::find_picture;
use farface::train::trainer::{Resources, Trainer};
use std::collections::BTreeSet;
use std::path::Path;

/// Nano from random weights.
const LEARN: &str = r#"
[model]
detector = "farface-nano"
[data]
train = [{ kind = "wider", list = "faces.txt", images = "images" }]
[data.dev]
list = "faces.txt"
images = "images"
[batch]
size = 10
sides = [{ side = 160, share = 1.0 }]
[augment]
random-square = { factors = [1.0] }
data-anchor-sampling = { weight = 0.0 }
photometric = { probability = 0.0 }
blur = { probability = 0.0 }
jpeg = { probability = 0.0 }
low-resolution = { probability = 0.0 }
# As the recipes of the shipped models.
[matching]
kind = "thresholds"
negative = 0.3
positive = 0.35
force-best = true
[mining]
anchors = 4
overlap = 0.7
[loss]
classification = { kind = "quality-focal" }
box = { kind = "neg-ln-iou" }
[optimizer]
kind = "adamw"
[schedule]
lr = 4e-3
unit = "steps"
length = 300
shape = { kind = "cosine", end = 1e-5 }
warm-up = { length = 20 }
[ema]
decay = 0.98
"#;

/// [`LEARN`] for pictures that are not square: each as a whole on a square of 320 pixels.
fn learn_whole_pictures(start: &Path) -> String {
    let start = format!("\"farface-nano\"\nstart = {start:?}\nstart-prefix = \"body.\"\nwidth = 8");
    LEARN
        .replace("\"farface-nano\"", &start)
        .replace("side = 160", "side = 320")
        .replace(
            "random-square = { factors = [1.0] }",
            "random-square = { weight = 0.0 }\nexpand = { weight = 1.0, max = 1.0 }",
        )
        .replace("length = 300", "length = 400")
}

/// The first 50 pictures of WIDER FACE's training list with one to ten faces, none of them below 16 pixels once the
/// picture is made 320 pixels wide and high at most, in that size.
fn fifty_of_wider(shared: &Path, dir: &Path) {
    let folder = shared.join("data/wider");
    let truth = GroundTruth::from_text(&folder.join("wider_train_bbx_gt.txt")).unwrap();
    std::fs::create_dir_all(dir.join("images/0--Wider")).unwrap();
    let (mut list, mut count) = (String::new(), 0);
    for entry in truth.images.iter().filter(|i| (1..=10).contains(&i.faces.len())) {
        let path = find_picture(&folder.join("images").join(&entry.path)).unwrap();
        let picture = image::open(path).unwrap().to_rgb8();
        let scale = 320.0 / picture.width().max(picture.height()) as f32;
        let fine = |f: &Face| !f.attributes.invalid && f.bbox.width().min(f.bbox.height()) * scale >= 16.0;
        if scale > 1.0 || !entry.faces.iter().all(fine) {
            continue;
        }
        let [w, h] = [picture.width(), picture.height()].map(|v| (v as f32 * scale).round() as u32);
        let name = format!("0--Wider/{count:02}.png");
        let small = image::imageops::resize(&picture, w, h, image::imageops::FilterType::Triangle);
        small.save(dir.join("images").join(&name)).unwrap();
        list += &format!("{name}\n{}\n", entry.faces.len());
        for b in entry.faces.iter().map(|f| f.bbox) {
            let [x, y, w, h] = [b.x1, b.y1, b.width(), b.height()].map(|v| v * scale);
            list += &format!("{x} {y} {w} {h} 0 0 0 0 0 0\n");
        }
        count += 1;
        if count == 50 {
            break;
        }
    }
    assert_eq!(count, 50);
    std::fs::write(dir.join("faces.txt"), list).unwrap();
}

/// Trains to the end and scores what came out on the pictures it was trained on.
fn learnt(text: &str, dir: &Path) -> f64 {
    let started = std::time::Instant::now();
    let mut trainer = Trainer::new(text, dir, Resources { device: None, threads: 2, workers: 1 }).unwrap();
    while trainer.step_count() < trainer.total_steps() {
        let report = trainer.step().unwrap();
        if report.step.is_multiple_of(25) {
            println!(
                "{} loss {:.4} IoU {:.3} norm {:.2}",
                report.step, report.loss, report.losses.iou, report.gradient_norm
            );
        }
    }
    let dev = trainer.dev().unwrap().unwrap();
    let score = trainer.evaluate(&dev, &dir.join("best.safetensors"), &mut |_, _| {}).unwrap();
    println!("AP {:.4} after {:.1} s", score.all, started.elapsed().as_secs_f64());
    // The model has its detector's parameters and no others.
    let model = Weights::load(dir.join("best.safetensors")).unwrap();
    let detector = ModelConfig::of(&model).unwrap().detector.detector();
    let graphs = [Some(detector.graph()), detector.second_stage().map(|s| s.graph)];
    let expected: BTreeSet<&String> =
        graphs.iter().flatten().flat_map(|g| &g.params).map(|p| &p.name).collect();
    assert_eq!(model.tensors.keys().collect::<BTreeSet<_>>(), expected);
    score.all
}

#[test]
fn farface_nano_learns_fifty_pictures_by_heart() {
    let dir = tempfile::tempdir().unwrap();
    faces::draw(dir.path(), 50, 160, 7);
    let ap = learnt(LEARN, dir.path());
    assert!(ap > 0.97, "AP {ap}");
}

#[test]
fn the_tiny_recipes_learn_twenty_pictures_by_heart() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes");
    let mut tiny = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.file_name().is_some_and(|name| name.to_string_lossy().ends_with("-tiny.toml")) {
            let dir = tempfile::tempdir().unwrap();
            faces::draw(dir.path(), 20, 160, 11);
            let ap = learnt(&std::fs::read_to_string(&path).unwrap(), dir.path());
            assert!(ap > 0.9, "{}: AP {ap}", path.display());
            tiny += 1;
        }
    }
    assert!(tiny > 0, "no tiny recipe");
}

/// The other detectors of Group Sampling, by the same recipe.
#[test]
#[ignore = "takes minutes"]
fn the_tiny_recipe_of_group_sampling_is_good_for_every_tiling() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes/fpn-finest-r18-tiny.toml");
    let text = std::fs::read_to_string(path).unwrap();
    for name in ["rpn", "fpn", "fpn-finest-stride", "fpn-p3", "fpn-p4", "fpn-finest-dc"] {
        let dir = tempfile::tempdir().unwrap();
        faces::draw(dir.path(), 20, 160, 11);
        let ap = learnt(&text.replace("\"fpn-finest-r18\"", &format!("\"{name}-r18\"")), dir.path());
        assert!(ap > 0.9, "{name}: AP {ap}");
    }
}

#[test]
#[ignore = "takes minutes"]
fn farface_nano_learns_drawn_pictures_from_any_seed() {
    for seed in 2..5 {
        let dir = tempfile::tempdir().unwrap();
        faces::draw(dir.path(), 50, 160, 100 + seed);
        for precision in ["f32", "auto"] {
            let ap =
                learnt(&format!("{LEARN}[run]\nseed = {seed}\nprecision = \"{precision}\"\n"), dir.path());
            assert!(ap > 0.97, "seed {seed}, {precision}: AP {ap}");
        }
    }
}

#[test]
#[ignore = "takes minutes"]
fn farface_nano_learns_fifty_photographs_by_heart() {
    let Some(shared) = shared::shared() else { return };
    let dir = tempfile::tempdir().unwrap();
    fifty_of_wider(&shared, dir.path());
    let start = shared.join("fixtures/backbones/mobilenet-v1-x0.25-imagenet.safetensors");
    let ap = learnt(&learn_whole_pictures(&start), dir.path());
    assert!(ap > 0.97, "AP {ap}");
}
