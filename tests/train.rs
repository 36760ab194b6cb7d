//! Training as a whole: it goes on bit for bit, and says what is wrong. That it learns: tests/learn.rs.
#![cfg(feature = "train")]

#[path = "common/faces.rs"]
mod faces;

use farface::cpu::dense::bf16_supported;
use farface::detect::config::{DetectorConfig, OwnPyramid};
use farface::detect::detector::Detector;
use farface::detect::ModelConfig;
use farface::graph::{run_reference, Weights};
use farface::shape::{Shape, Tensor};
use farface::train::checkpoint::Checkpoint;
use farface::train::trainer::{Resources, StepReport, Trainer};
use std::path::Path;

/// Whatever a training can use: several sides, mining, averages, every augmentation.
const RECIPE: &str = r#"
[model]
detector = "farface-nano"
[data]
train = [{ kind = "wider", list = "faces.txt", images = "images" }]
[batch]
size = 3
sides = [{ side = 64, share = 0.5 }, { side = 96, share = 0.5 }]
[augment]
grey = 0.3
blur = { probability = 0.3 }
jpeg = { probability = 0.3 }
low-resolution = { probability = 0.3 }
turn = { probability = 0.3 }
cover = { probability = 0.3 }
scale-jitter = { weight = 1.0 }
[matching]
kind = "first-step"
[mining]
overlap = 0.5
[loss]
classification = { kind = "regression-aware-focal" }
box = { kind = "neg-ln-iou" }
[optimizer]
kind = "adamw"
[schedule]
lr = 1e-3
unit = "steps"
length = 8
shape = { kind = "cosine" }
warm-up = { length = 2 }
[ema]
decay = 0.9
"#;

/// As many threads as workers: a result depends on neither.
fn resources(workers: usize) -> Resources {
    Resources { device: None, threads: workers, workers }
}

fn trainer(text: &str, dir: &Path, workers: usize) -> Trainer {
    Trainer::new(text, dir, resources(workers)).unwrap()
}

fn steps(trainer: &mut Trainer, count: usize) -> Vec<StepReport> {
    (0..count).map(|_| trainer.step().unwrap()).collect()
}

/// A checkpoint's bytes: parameters with the running statistics, averages, the optimiser's state, the step.
fn state(trainer: &mut Trainer, dir: &Path) -> Vec<u8> {
    let path = dir.join("state.checkpoint");
    trainer.save(&path).unwrap();
    std::fs::read(path).unwrap()
}

/// The error of the recipe with one text for another.
fn refused(dir: &Path, from: &str, to: &str) -> String {
    assert!(RECIPE.contains(from), "{from}");
    let trainer = Trainer::new(&RECIPE.replace(from, to), dir, resources(1));
    trainer.err().unwrap_or_else(|| panic!("{to} was taken")).to_string()
}

#[test]
fn a_resumed_training_ends_with_the_same_bits_on_any_number_of_threads_and_workers() {
    let dir = tempfile::tempdir().unwrap();
    faces::draw(dir.path(), 7, 100, 1);
    let adamw = RECIPE.to_string();
    let sgd = RECIPE.replace("kind = \"adamw\"", "kind = \"sgd\"\nmomentum = 0.9");
    let mut texts = Vec::new();
    for recipe in [adamw, sgd] {
        texts.push(format!("{recipe}[run]\nprecision = \"f32\"\n"));
        if bf16_supported() {
            texts.push(format!("{recipe}[run]\nprecision = \"bf16\"\n"));
        }
    }
    for text in &texts {
        let mut whole = trainer(text, dir.path(), 1);
        let reports = steps(&mut whole, 8);
        let expected = state(&mut whole, dir.path());
        assert_eq!(reports.iter().map(|r| r.side).collect::<Vec<_>>(), [64, 64, 64, 64, 96, 96, 96, 96]);
        // In the middle of an epoch, at a change of the side, right before the end.
        for cut in [1, 4, 7] {
            let path = dir.path().join("cut.checkpoint");
            let mut first = trainer(text, dir.path(), 3);
            assert_eq!(steps(&mut first, cut), reports[..cut]);
            first.save(&path).unwrap();
            let mut second = trainer(text, dir.path(), 2);
            second.resume(&path).unwrap();
            assert_eq!(steps(&mut second, 8 - cut), reports[cut..]);
            assert!(state(&mut second, dir.path()) == expected, "cut after step {cut}: {text}");
        }
    }
}

/// Boxes are chosen by the outputs, and some of them by chance.
#[test]
fn trainings_that_look_at_boxes_go_on_with_the_same_bits() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes");
    for name in ["refineface-r18-tiny.toml", "fpn-finest-rcnn-r18-tiny.toml"] {
        let text = std::fs::read_to_string(folder.join(name)).unwrap();
        let text = text
            .replace("size = 10", "size = 3")
            .replace("side = 160", "side = 96")
            .replace("length = 200", "length = 6")
            .replace("length = 300", "length = 6")
            .replace("warm-up = { length = 20 }", "warm-up = { length = 2 }");
        let dir = tempfile::tempdir().unwrap();
        faces::draw(dir.path(), 5, 100, 1);
        let mut whole = trainer(&text, dir.path(), 1);
        let reports = steps(&mut whole, 6);
        let expected = state(&mut whole, dir.path());
        let path = dir.path().join("cut.checkpoint");
        let mut first = trainer(&text, dir.path(), 3);
        assert_eq!(steps(&mut first, 3), reports[..3], "{name}");
        first.save(&path).unwrap();
        let mut second = Trainer::from_checkpoint(&text, dir.path(), resources(2), &path).unwrap();
        assert_eq!(steps(&mut second, 3), reports[3..], "{name}");
        assert!(state(&mut second, dir.path()) == expected, "{name}");
    }
}

#[test]
fn another_seed_is_another_training() {
    let dir = tempfile::tempdir().unwrap();
    faces::draw(dir.path(), 4, 100, 1);
    let losses = |seed: u64| {
        let text = format!("{RECIPE}[run]\nseed = {seed}\n");
        steps(&mut trainer(&text, dir.path(), 1), 2).iter().map(|r| r.loss).collect::<Vec<_>>()
    };
    assert_eq!(losses(5), losses(5));
    assert_ne!(losses(5), losses(6));
}

#[test]
fn checkpoints_of_another_recipe_or_cut_short_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    faces::draw(dir.path(), 4, 100, 1);
    let mut one = trainer(RECIPE, dir.path(), 1);
    steps(&mut one, 1);
    let bytes = state(&mut one, dir.path());
    let path = dir.path().join("state.checkpoint");
    let other = RECIPE.replace("lr = 1e-3", "lr = 2e-3");
    let error = trainer(&other, dir.path(), 1).resume(&path).unwrap_err().to_string();
    assert!(error.contains("state.checkpoint") && error.contains("another recipe"), "{error}");
    for len in [0, 7, 1000, bytes.len() - 1] {
        std::fs::write(&path, &bytes[..len]).unwrap();
        let error = trainer(RECIPE, dir.path(), 1).resume(&path).unwrap_err().to_string();
        assert!(error.contains("state.checkpoint"), "{error}");
    }
    // A picture less, a box moved, another precision, averages that the recipe does not make.
    std::fs::write(&path, &bytes).unwrap();
    let list = dir.path().join("faces.txt");
    let text = std::fs::read_to_string(&list).unwrap();
    let last = text.trim_end().rfind("0--Drawn").unwrap();
    std::fs::write(&list, &text[..last]).unwrap();
    let error = trainer(RECIPE, dir.path(), 1).resume(&path).unwrap_err().to_string();
    assert!(error.contains("trained on 4 pictures, now there are 3"), "{error}");
    std::fs::write(&list, &text).unwrap();
    let first = text.lines().nth(2).unwrap();
    let numbers: Vec<f32> = first.split(' ').map(|v| v.parse().unwrap()).collect();
    let wider = first.replacen(&format!("{} ", numbers[2]), &format!("{} ", numbers[2] - 1.0), 1);
    std::fs::write(&list, text.replacen(first, &wider, 1)).unwrap();
    let error = trainer(RECIPE, dir.path(), 1).resume(&path).unwrap_err().to_string();
    assert!(error.contains("their names or boxes changed"), "{error}");
    std::fs::write(&list, &text).unwrap();
    let DetectorConfig::Pyramid(detector) = ModelConfig::farface_nano().detector else { unreachable!() };
    let graph = detector.graph();
    let stored = Checkpoint::load(&graph, &path).unwrap();
    let changed = dir.path().join("changed.checkpoint");
    let refused = |c: Checkpoint| {
        c.save(&graph, &changed).unwrap();
        let mut one = trainer(RECIPE, dir.path(), 1);
        let before = state(&mut one, dir.path());
        let error = one.resume(&changed).unwrap_err().to_string();
        assert!(state(&mut one, dir.path()) == before, "a refused checkpoint changed the training: {error}");
        error
    };
    let mut other = stored.clone();
    other.setting.precision = "f16".into();
    let error = refused(other);
    assert!(error.contains("trained in f16"), "{error}");
    let error = refused(Checkpoint { average: None, ..stored.clone() });
    assert!(error.contains("averages"), "{error}");
    let mut other = stored.clone();
    other.optimizer.buffers.clear();
    let error = refused(other);
    assert!(error.contains("optimizer state"), "{error}");
    std::fs::write(&path, &bytes).unwrap();
    // Another ISA is a note.
    let mut other = stored;
    other.setting.isa = "abacus".into();
    other.save(&graph, &changed).unwrap();
    let mut elsewhere = trainer(RECIPE, dir.path(), 1);
    elsewhere.resume(&changed).unwrap();
    assert!(elsewhere.notes().iter().any(|n| n.starts_with("abacus before, ")), "{:?}", elsewhere.notes());
    // A refused checkpoint leaves the training as it was.
    let before = state(&mut one, dir.path());
    let cut = dir.path().join("cut.checkpoint");
    std::fs::write(&cut, &bytes[..1000]).unwrap();
    assert!(one.resume(&cut).is_err());
    assert!(state(&mut one, dir.path()) == before);
}

#[test]
fn going_on_needs_no_start_and_a_start_says_what_it_gave() {
    let dir = tempfile::tempdir().unwrap();
    faces::draw(dir.path(), 4, 100, 1);
    let start = dir.path().join("start.safetensors");
    trainer(RECIPE, dir.path(), 1).model().unwrap().save(&start).unwrap();
    let text = RECIPE.replace("[data]", "start = \"start.safetensors\"\n[data]");
    let mut one = trainer(&text, dir.path(), 1);
    let all = one.model().unwrap().tensors.len();
    assert_eq!(one.notes(), [format!("{all} of {all} tensors from start.safetensors")]);
    let body = text.replace("[data]\ntrain", "start-only = [\"body.\"]\n[data]\ntrain");
    let mut part = trainer(&body, dir.path(), 1);
    let bodies = one.model().unwrap().tensors.keys().filter(|n| n.starts_with("body.")).count();
    assert_eq!(part.notes(), [format!("{bodies} of {all} tensors from start.safetensors")]);
    assert!(bodies > 0 && bodies < all);
    // The last of the body is the start's, the predictions are new.
    let (old, new) = (one.model().unwrap(), part.model().unwrap());
    let last = old.tensors.keys().filter(|n| n.starts_with("body.") && n.ends_with("weight")).max().unwrap();
    assert!(old.tensors[last] == new.tensors[last]);
    let logits = &new.tensors["predict3.bias"].data;
    assert!((logits[0] - (0.01f32 / 0.99).ln()).abs() < 1e-6, "{logits:?}");
    // Another file gives the rest; one that adds nothing is a mistake.
    let other = trainer(&format!("{RECIPE}[run]\nseed = 4\n"), dir.path(), 1).model().unwrap();
    other.save(dir.path().join("other.safetensors")).unwrap();
    let both = |only: &str| {
        let lines = format!("start-only = {only}\nstart-rest = \"other.safetensors\"\n[data]\ntrain");
        Trainer::new(&text.replace("[data]\ntrain", &lines), dir.path(), resources(1))
    };
    let mut joined = both("[\"body.\"]").unwrap();
    let rest = all - bodies;
    assert_eq!(
        joined.notes(),
        [
            format!("{bodies} of {all} tensors from start.safetensors"),
            format!("{rest} of {all} tensors from other.safetensors")
        ]
    );
    for (name, tensor) in &joined.model().unwrap().tensors {
        let from = if name.starts_with("body.") { &old } else { &other };
        assert!(*tensor == from.tensors[name], "{name}");
    }
    assert!(both("[]").err().unwrap().to_string().contains("model.start-rest other.safetensors"));
    let bytes = state(&mut one, dir.path());
    std::fs::remove_file(start).unwrap();
    let path = dir.path().join("state.checkpoint");
    let mut two = Trainer::from_checkpoint(&text, dir.path(), resources(1), &path).unwrap();
    assert!(state(&mut two, dir.path()) == bytes);
    assert!(Trainer::new(&text, dir.path(), resources(1))
        .err()
        .unwrap()
        .to_string()
        .contains("start.safetensors"));
}

/// A network grown around a smaller one finds what that one finds; by a share above 0 it does not, and without growing the
/// smaller one's tensors are refused.
#[test]
fn a_grown_network_begins_with_the_outputs_of_the_smaller_one() {
    let dir = tempfile::tempdir().unwrap();
    faces::draw(dir.path(), 3, 100, 1);
    let with = |lines: &str| RECIPE.replace("\"farface-nano\"", &format!("\"farface-nano\"\n{lines}"));
    let blocks = |first: usize, blocks: [&[usize]; 5]| {
        format!("backbone = {{ first = {first}, blocks = {blocks:?} }}")
    };
    let small = blocks(4, [&[8], &[16, 16], &[32], &[40], &[48]]);
    let large = blocks(6, [&[8], &[24, 20], &[32], &[40], &[56]]);
    let mut small = trainer(&with(&small), dir.path(), 1);
    // Running statistics of their own, and averages of weights that have moved.
    steps(&mut small, 3);
    let small = small.model().unwrap();
    small.save(dir.path().join("small.safetensors")).unwrap();
    let grown = |share: &str| with(&format!("{large}\nstart = \"small.safetensors\"\n{share}"));
    let outputs = |weights: &Weights| {
        let graph = ModelConfig::of(weights).unwrap().detector.detector().graph();
        let shape = Shape::new(1, 3, 96, 64);
        let values = (0..shape.len()).map(|i| (i * 7919 % 251) as f32 - 120.0).collect();
        run_reference(&graph, weights, &[Tensor::from_vec(shape, values)]).unwrap()
    };
    let furthest = |share: &str| {
        let mut large = trainer(&grown(share), dir.path(), 1);
        assert!(large.notes()[0].contains(" of them grown"), "{:?}", large.notes());
        let (small, large) = (outputs(&small), outputs(&large.model().unwrap()));
        let values = small.iter().zip(&large).flat_map(|(a, b)| a.data.iter().zip(&b.data));
        values.map(|(a, b): (&f32, &f32)| (a - b).abs()).fold(0.0, f32::max)
    };
    let (kept, moved) = (furthest("grow = 0.0"), furthest("grow = 0.5"));
    assert!(kept < 1e-4 && moved > 1e-2, "{kept} {moved}");
    let error = |text: String| Trainer::new(&text, dir.path(), resources(1)).err().unwrap().to_string();
    assert!(error(grown("")).contains("has shape"), "{}", error(grown("")));
    assert!(error(grown("grow = 1.5")).contains("model.grow"), "{}", error(grown("grow = 1.5")));
    let smaller = blocks(4, [&[4], &[16, 16], &[32], &[40], &[48]]);
    let text = with(&format!("{smaller}\nstart = \"small.safetensors\"\ngrow = 0.0"));
    assert!(error(text.clone()).contains("not larger"), "{}", error(text));
}

#[test]
fn a_width_alone_is_that_of_mobilenet_v1() {
    let dir = tempfile::tempdir().unwrap();
    faces::draw(dir.path(), 2, 100, 1);
    let text = RECIPE.replace("\"farface-nano\"", "\"farface-nano\"\nwidth = 4");
    let config = ModelConfig::of(&trainer(&text, dir.path(), 1).model().unwrap()).unwrap();
    assert!(matches!(config.detector, DetectorConfig::Pyramid(p) if p.width == 4 && p.backbone.is_none()));
}

#[test]
fn the_threshold_of_a_model_fits_its_scores_or_is_the_recipes() {
    let dir = tempfile::tempdir().unwrap();
    faces::draw(dir.path(), 4, 100, 1);
    let threshold = |text: &str| {
        let model = trainer(text, dir.path(), 1).model().unwrap();
        ModelConfig::of(&model).unwrap().score_threshold
    };
    assert_eq!(threshold(RECIPE), 0.5);
    let quality = RECIPE.replace("regression-aware-focal", "quality-focal");
    assert_eq!(threshold(&quality), ModelConfig::farface_nano().score_threshold);
    assert_eq!(threshold(&quality.replace("[data]", "score-threshold = 0.25\n[data]")), 0.25);
    let error = refused(dir.path(), "[data]", "score-threshold = 1.5\n[data]");
    assert!(error.contains("score-threshold"), "{error}");
}

#[test]
fn what_could_not_be_read_again_is_not_written() {
    let dir = tempfile::tempdir().unwrap();
    faces::draw(dir.path(), 3, 100, 1);
    // One step of this rate takes the weights beyond any number.
    let text = RECIPE
        .replace("kind = \"adamw\"", "kind = \"sgd\"")
        .replace("[data]", "learning-rate = { \"\" = 100.0 }\n[data]")
        .replace("lr = 1e-3", "lr = 1e38")
        .replace("warm-up = { length = 2 }", "");
    let mut one = trainer(&text, dir.path(), 1);
    let before = state(&mut one, dir.path());
    steps(&mut one, 1);
    let path = dir.path().join("state.checkpoint");
    let error = one.save(&path).unwrap_err().to_string();
    assert!(error.contains("no longer finite") && one.model().is_err(), "{error}");
    assert!(std::fs::read(path).unwrap() == before);
}

#[test]
fn a_training_that_diverges_stops_and_names_the_step_and_its_pictures() {
    let dir = tempfile::tempdir().unwrap();
    faces::draw(dir.path(), 3, 100, 1);
    let text = RECIPE
        .replace("kind = \"adamw\"", "kind = \"sgd\"")
        .replace("lr = 1e-3", "lr = 1e30")
        .replace("warm-up = { length = 2 }", "")
        .replace("length = 8", "length = 100");
    for precision in ["f32", "auto"] {
        let text = format!("{text}[run]\nclip = 0\nprecision = \"{precision}\"\n");
        let mut wild = trainer(&text, dir.path(), 1);
        let mut done = 0;
        let error = loop {
            match wild.step() {
                Ok(report) => {
                    assert!(report.loss.is_finite() && report.gradient_norm.is_finite());
                    done += 1;
                }
                Err(error) => break error.to_string(),
            }
            assert!(done < 100, "it never stopped");
        };
        for part in
            [&format!("step {done}:"), "finite", "0--Drawn/00.png", "0--Drawn/01.png", "0--Drawn/02.png"]
        {
            assert!(error.contains(part), "{part}: {error}");
        }
        assert_eq!(wild.step_count(), done);
    }
}

#[test]
fn what_is_wrong_with_a_recipe_is_named() {
    let dir = tempfile::tempdir().unwrap();
    faces::draw(dir.path(), 3, 100, 1);
    for (from, to, named) in [
        ("grey =", "gray =", "gray"),
        ("grey = 0.3", "grey = 1.3", "augment.grey"),
        ("decay = 0.9", "decay = 1.9", "ema: decay"),
        ("overlap = 0.5", "overlap = 0.0", "overlap"),
        ("length = 8", "length = 0", "length"),
        ("warm-up = { length = 2 }", "warm-up = { length = 20 }", "warm-up"),
        ("side = 96", "side = 97", "sides"),
        ("size = 3", "size = -3", "size"),
        ("\"adamw\"", "\"adam\"", "adam"),
        ("\"adamw\"", "\"adamw\"\nbeta1 = 1.0", "beta"),
        ("\"regression-aware-focal\"", "\"softmax\"", "softmax"),
        ("[mining]\noverlap = 0.5\n", "", "[mining]"),
        ("\"farface-nano\"", "\"farface-micro\"", "farface-micro"),
        ("\"farface-nano\"", "\"farface-nano\"\nfreeze = [\"spine\"]", "spine"),
        ("\"farface-nano\"", "\"farface-nano\"\nlearning-rate = { \"spine\" = 0.1 }", "spine"),
        ("[mining]", "[sampler]\n[mining]", "sampler"),
        ("\"farface-nano\"", "\"farface-nano\"\nstart = \"none.safetensors\"", "none.safetensors"),
        ("\"farface-nano\"", "\"farface-nano\"\ngrow = 0.5", "model.grow: there is no model.start"),
        (
            "\"farface-nano\"",
            "\"farface-nano\"\nstart-rest = \"none.safetensors\"",
            "model.start-rest: there is no model.start",
        ),
        ("list = \"faces.txt\"", "list = \"none.txt\"", "none.txt"),
    ] {
        let error = refused(dir.path(), from, to);
        assert!(error.contains(named), "{named}: {error}");
    }
    let text = format!("{RECIPE}[data.dev]\nlist = \"none.txt\"\nimages = \"images\"\n");
    let error = trainer(&text, dir.path(), 1).dev().err().unwrap().to_string();
    assert!(error.contains("none.txt"), "{error}");
    let text = format!("{RECIPE}[data.dev]\nlist = \"faces.txt\"\nimages = \"nowhere\"\n");
    let error = trainer(&text, dir.path(), 1).dev().err().unwrap().to_string();
    assert!(error.contains("nowhere"), "{error}");
    // One picture of three is gone: noted, and the others serve.
    std::fs::remove_file(dir.path().join("images/0--Drawn/01.png")).unwrap();
    let two = trainer(RECIPE, dir.path(), 1);
    assert_eq!(two.dataset().samples.len(), 2);
    let warnings = two.dataset().warnings.to_string();
    assert!(warnings.contains("0--Drawn/01"), "{warnings}");
    std::fs::remove_dir_all(dir.path().join("images")).unwrap();
    let error = Trainer::new(RECIPE, dir.path(), resources(1)).err().unwrap().to_string();
    assert!(error.contains("images/0--Drawn/00.png"), "{error}");
}

#[test]
fn what_a_detector_has_no_use_for_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    faces::draw(dir.path(), 2, 96, 3);
    let refused = |text: String| match Trainer::new(&text, dir.path(), resources(1)) {
        Ok(_) => panic!("must be refused: {text}"),
        Err(e) => e.to_string(),
    };
    let with = |table: &str| format!("{RECIPE}{table}\n");
    assert!(refused(with("[pyramid-anchors]")).starts_with("invalid argument: pyramid-anchors: farface-nano"));
    assert!(refused(with("[first-matching]\nkind = \"thresholds\"")).contains("first-matching: farface-nano"));
    assert!(refused(with("[feature-supervision]")).contains("feature-supervision: farface-nano"));
    assert!(refused(with("[feature-supervision]\nnms = 2.0")).contains("feature-supervision: nms"));
    assert!(refused(with("[second-stage]")).contains("second-stage: farface-nano"));
    assert!(refused(with("[second-stage]\nproposals = 0")).contains("second-stage: nms"));
    let one_stage = RECIPE
        .replace("farface-nano", "fpn-finest-r18")
        .replace("regression-aware-focal", "softmax")
        .replace("[mining]\noverlap = 0.5\n", "");
    assert!(refused(format!("{one_stage}[second-stage]\n")).contains("detectors with -rcnn in their name"));
    let backbone = "backbone = { first = 6, blocks = [[8], [24, 20], [32], [40], [56]] }";
    let of = |recipe: &str, lines: &str| recipe.replace("[data]\ntrain", &format!("{lines}\n[data]\ntrain"));
    assert!(refused(of(&one_stage, backbone)).contains("model.backbone: fpn-finest-r18"));
    let both = format!("{backbone}\nwidth = 8");
    assert!(refused(of(RECIPE, &both)).contains("model.backbone: farface-nano"));
    let grown = of(&one_stage, "start = \"small.safetensors\"\ngrow = 0.5");
    assert!(refused(grown).contains("model.grow: fpn-finest-r18"));
    for bad in ["count = 4", "count = 0", "weight = 0.0", "weight = 1.5"] {
        assert!(
            refused(with(&format!("[pyramid-anchors]\n{bad}"))).contains("count must be from 1 to 3"),
            "{bad}"
        );
    }
    let refineface =
        RECIPE.replace("farface-nano", "refineface-r18").replace("regression-aware-focal", "focal");
    let unmined = refineface.replace("[mining]\noverlap = 0.5\n", "");
    let softmax = unmined.replace("\"focal\"", "\"softmax\"");
    assert!(refused(softmax).contains("name classification focal or sigmoid"));
    assert!(Trainer::new(&unmined, dir.path(), resources(1)).is_ok());
    let model = |detector: &str, line: &str| {
        unmined.replace("detector = \"refineface-r18\"", &format!("detector = \"{detector}\"\n{line}"))
    };
    let table = dir.path().join("templates.csv");
    std::fs::write(&table, "row,half_width,half_height,sigma\n1,10,12,1\n").unwrap();
    let templates = "templates = \"templates.csv\"";
    assert!(refused(model("refineface-r18", templates)).contains("model.templates: refineface-r18"));
    assert!(refused(model("hr-r18", "channels = 8")).contains("model.channels: hr"));
    let mut own = Trainer::new(&model("hr-r18", templates), dir.path(), resources(1)).unwrap();
    // Sizes and scales are those of the one template, 20 x 24 px.
    let config = ModelConfig::of(&own.model().unwrap()).unwrap();
    assert_eq!(config.pyramid, Some(OwnPyramid::LargestFace { size: [20.0, 24.0] }));
    assert!((config.detectable_px[1] - 36.0).abs() < 1e-3, "{:?}", config.detectable_px);
    std::fs::write(&table, "row,half_width,half_height,sigma\n1,10,12,0.5\n").unwrap();
    assert!(refused(model("hr-r18", templates)).contains("types A and B ask no template"));
    std::fs::write(&table, "row,half_width,half_height,sigma\n1,10,0,1\n").unwrap();
    assert!(refused(model("hr-r18", templates)).contains("templates.csv: line 2"));
}
