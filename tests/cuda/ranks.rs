//! Several processes that train together: threads of this one, each with an engine and a communicator of its own, and processes of the
//! program. What they add up is exact, what they train is what one process alone trains, and nobody waits for who is gone.

use crate::drawing;
use crate::emulator::{device, driver, Driver, Emulator};
use crate::failures::alone;
use crate::plain_step::mixed;
use crate::train::{on_device, table, Batch};
use crate::trainer::RECIPE;
use farface::error::Result;
use farface::gpu::map::Element;
use farface::graph::build::ParamRole;
use farface::graph::init::Rng;
use farface::graph::Weights;
use farface::shape::Shape;
use farface::train::network::{Engine, Frozen};
use farface::train::ranks::{Launch, Ranks, What};
use farface::train::trainer::{Resources, StepReport, Trainer};
use std::net::TcpListener;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Threads as ranks share the emulated device; of NCCL's they would each need their own.
pub fn emulator() -> Option<&'static Emulator> {
    match driver() {
        Some(Driver::Emulated(emulator)) => Some(emulator),
        _ => None,
    }
}

/// A port that nobody has at the moment.
fn free_port() -> u16 {
    TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port()
}

/// `f` of two ranks, each in a thread; who is done first lets go of its connections.
pub fn two<R: Send>(f: impl Fn(Arc<Ranks>) -> R + Sync) -> [R; 2] {
    let port = free_port();
    let meet = |rank| {
        let launch = Launch {
            launcher: "torchrun",
            rank,
            world: 2,
            local_rank: rank,
            local_world: 2,
            address: "127.0.0.1".into(),
            port,
        };
        f(Arc::new(Ranks::meet(&launch, Duration::from_secs(60)).unwrap()))
    };
    // Who does not find rank 0 yet asks again after 100 ms.
    let later = || {
        std::thread::sleep(Duration::from_millis(2));
        meet(1)
    };
    std::thread::scope(|scope| {
        let other = scope.spawn(later);
        [meet(0), other.join().unwrap()]
    })
}

type Values = Vec<Vec<f32>>;

fn bits(values: &Values) -> Vec<Vec<u32>> {
    values.iter().map(|v| v.iter().map(|v| v.to_bits()).collect()).collect()
}

#[test]
fn gradients_are_the_sums_of_the_ranks_and_running_statistics_their_means() {
    let (Some(emulator), Some(device)) = (emulator(), device()) else { return };
    let graph = mixed(&mut Rng::new(5));
    let weights = Weights::random(&graph, 3);
    let shape = Shape::new(2, 3, 40, 40);
    let batch = |rank: usize| Batch::random(&graph, shape, &[], &mut Rng::new(70 + rank as u64));
    let stands = |name: &str| ["pw1", "dw1_bn"].iter().any(|w| name.starts_with(w));
    let still = Frozen { parameters: vec!["pw1".into()], statistics: vec!["dw1_bn".into()] };
    let step = |engine: &mut dyn Engine, rank: usize| -> (Values, Values) {
        let batch = batch(rank);
        engine.forward(&batch.pixels, shape, &table()).unwrap();
        engine.backward(&batch.d_outputs).unwrap();
        let (params, grads) = engine.params_and_grads().unwrap();
        (params.to_vec(), grads.to_vec())
    };
    let alone =
        [0, 1].map(|rank| step(&mut on_device(&graph, &weights, &still, &device, Element::F32), rank));
    let both = |of: fn(&(Values, Values)) -> &Values, f: fn(f32, f32) -> f32| -> Values {
        let [a, b] = [of(&alone[0]), of(&alone[1])];
        a.iter().zip(b).map(|(a, b)| a.iter().zip(b).map(|(&a, &b)| f(a, b)).collect()).collect()
    };
    let sums = both(|s| &s.1, |a, b| a + b);
    let means = both(|s| &s.0, |a, b| (a + b) * 0.5);
    // One sum, a sum for nearly each parameter, and some.
    for bucket in [1 << 20, 1, 1000] {
        for late in [false, true] {
            emulator.late(late);
            let got = two(|ranks| {
                let mut engine = on_device(&graph, &weights, &still, &device, Element::F32);
                engine.join(&ranks, bucket).unwrap();
                let first = step(&mut engine, ranks.rank());
                ranks.all(What::End, &[]).unwrap();
                engine.part().unwrap();
                first
            });
            emulator.late(false);
            for (rank, (params, grads)) in got.iter().enumerate() {
                assert!(bits(grads) == bits(&sums), "bucket {bucket}, late {late}, rank {rank}: gradients");
                for (i, p) in graph.params.iter().enumerate() {
                    let statistic = matches!(p.role, ParamRole::NormMean | ParamRole::NormVariance);
                    let expected = if statistic && !stands(&p.name) { &means[i] } else { &alone[0].0[i] };
                    let name = &p.name;
                    assert!(params[i] == *expected, "bucket {bucket}, late {late}, rank {rank}: {name}");
                }
            }
        }
    }
}

/// The trainer's recipe for two ranks, with these lines about the model.
pub fn recipe(model: &str) -> String {
    let text = RECIPE
        .replace("channels = 12\n", &format!("channels = 12\n{model}"))
        .replace("size = 3", "size = 4")
        .replace("length = 10", "length = 6");
    format!("{text}precision = \"f32\"\ncheckpoint-every = 2\n")
}

pub fn resources() -> Resources {
    Resources { device: Some(0), threads: 1, workers: 1 }
}

/// Reports of steps, and the state after them as a checkpoint has it.
pub type Trained = (Vec<StepReport>, Vec<u8>);

/// `count` steps of two ranks, from a checkpoint where one is named.
pub fn train(text: &str, dir: &Path, count: usize, from: Option<&Path>) -> [Trained; 2] {
    two(|ranks| {
        let rank = ranks.rank();
        let from = from.filter(|_| rank == 0);
        let mut trainer = Trainer::of_rank(text, dir, resources(), ranks, from).unwrap();
        let reports = (0..count).map(|_| trainer.step().unwrap()).collect();
        let path = dir.join(format!("rank{rank}.checkpoint"));
        trainer.save(&path).unwrap();
        trainer.part().unwrap();
        (reports, std::fs::read(path).unwrap())
    })
}

/// Parameters of a checkpoint, by their names.
fn params(bytes: &[u8]) -> Vec<(String, Vec<f32>)> {
    let tensors = Weights::from_bytes(bytes).unwrap().tensors;
    let mut params: Vec<_> =
        tensors.into_iter().filter(|(n, _)| n.starts_with("param/")).map(|(n, t)| (n, t.data)).collect();
    params.sort_by(|a, b| a.0.cmp(&b.0));
    params
}

/// `count` steps of one process.
pub fn train_alone(text: &str, dir: &Path, count: usize) -> Trained {
    let mut trainer = Trainer::new(text, dir, resources()).unwrap();
    let reports = (0..count).map(|_| trainer.step().unwrap()).collect();
    let path = dir.join("alone.checkpoint");
    trainer.save(&path).unwrap();
    (reports, std::fs::read(path).unwrap())
}

/// Holds steps of two ranks to those of one process, where order of summation is all that differs; the first rank's.
pub fn follow(
    text: &str,
    dir: &Path,
    [(reports, first), (others, second)]: [Trained; 2],
    (expected, alone): Trained,
) -> Trained {
    assert!(reports == others && first == second, "ranks differ");
    let mut worst = [0.0f64; 3];
    for (got, e) in reports.iter().zip(&expected) {
        let losses = [
            (got.losses.class, e.losses.class),
            (got.losses.boxes, e.losses.boxes),
            (got.losses.iou, e.losses.iou),
        ];
        for (got, e) in losses {
            worst[0] = worst[0].max((got - e).abs() / e.abs());
        }
        worst[1] = worst[1].max((got.gradient_norm - e.gradient_norm).abs() / e.gradient_norm);
        let counts = |r: &StepReport| (r.step, r.side, r.losses.matched, r.losses.mined, r.losses.faces);
        assert_eq!(counts(got), counts(e));
    }
    let moved = |from: &[(String, Vec<f32>)], to: &[(String, Vec<f32>)]| {
        let pairs = from.iter().zip(to).flat_map(|(a, b)| a.1.iter().zip(&b.1));
        pairs.map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>().sqrt()
    };
    let (start, end) = (params(&train_alone(text, dir, 0).1), params(&alone));
    // Of the way that the parameters went.
    worst[2] = moved(&params(&first), &end) / moved(&start, &end);
    println!("losses, norms and parameters off by {worst:?}");
    assert!(worst[0] < 1e-5 && worst[1] < 1e-4 && worst[2] < 1e-4, "{worst:?}");
    assert!(expected.iter().all(|r| r.losses.matched > 0), "something is matched");
    (reports, first)
}

#[test]
fn two_ranks_train_what_one_process_trains() {
    let Some(emulator) = emulator() else { return };
    let dir = tempfile::tempdir().unwrap();
    drawing::draw(dir.path(), 7, 100, 1);
    // Where no normalisation looks at the batch.
    let text = recipe("freeze-statistics = [\"\"]\n");
    let both = train(&text, dir.path(), 6, None);
    let (reports, first) = follow(&text, dir.path(), both, train_alone(&text, dir.path(), 6));

    // The same bits in another order of threads and of work, and stopped and gone on with.
    emulator.late(true);
    emulator.backwards(true);
    let cut = train(&text, dir.path(), 3, None);
    assert!(cut[0].0 == reports[..3]);
    let checkpoint = dir.path().join("cut.checkpoint");
    std::fs::write(&checkpoint, &cut[0].1).unwrap();
    let [(rest, first_again), (_, second_again)] = train(&text, dir.path(), 3, Some(&checkpoint));
    emulator.late(false);
    emulator.backwards(false);
    assert!(rest == reports[3..] && first_again == first && second_again == first, "gone on with");
}

#[test]
fn ranks_whose_normalisations_move_keep_the_same_parameters() {
    if emulator().is_none() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    drawing::draw(dir.path(), 7, 100, 1);
    let text = recipe("");
    let [(reports, first), (_, second)] = train(&text, dir.path(), 4, None);
    assert!(first == second, "ranks differ");
    let mut alone = Trainer::new(&text, dir.path(), resources()).unwrap();
    let expected = alone.step().unwrap();
    // Other statistics, the same samples: near, not equal.
    let off = (reports[0].loss - expected.loss).abs() / expected.loss;
    println!("the first loss differs by {off:.1e}");
    assert!(off < 0.2 && reports[0].losses.faces == expected.losses.faces);
}

#[test]
fn a_rank_that_stops_ends_the_others() {
    if emulator().is_none() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    drawing::draw(dir.path(), 4, 100, 1);
    let text = recipe("");
    for stops in [0, 1] {
        let errors = two(|ranks| {
            let rank = ranks.rank();
            let mut trainer = Trainer::of_rank(&text, dir.path(), resources(), ranks, None).unwrap();
            trainer.step().unwrap();
            (rank != stops).then(|| trainer.step().unwrap_err().to_string())
        });
        let error = errors[1 - stops].as_ref().unwrap();
        assert!(error.contains(&format!("rank {stops}")) && error.contains("ended before"), "{error}");
    }
    // In the middle of a step, where only the sum of gradients tells.
    let Some(device) = device() else { return };
    let graph = mixed(&mut Rng::new(5));
    let weights = Weights::random(&graph, 3);
    let batch = Batch::random(&graph, Shape::new(2, 3, 40, 40), &[], &mut Rng::new(7));
    let errors = two(|ranks| {
        let rank = ranks.rank();
        let mut engine = on_device(&graph, &weights, &Frozen::default(), &device, Element::F32);
        engine.join(&ranks, 1000).unwrap();
        engine.forward(&batch.pixels, batch.shape, &table()).unwrap();
        (rank == 0).then(|| {
            engine.backward(&batch.d_outputs).unwrap();
            let error = engine.params_and_grads().unwrap_err().to_string();
            let again = engine.backward(&batch.d_outputs).unwrap_err().to_string();
            (error, again)
        })
    });
    let (error, again) = errors[0].as_ref().unwrap();
    assert!(error.contains("rank 1") && again.contains("ended by an earlier error"), "{error}; {again}");
}

#[test]
fn a_batch_that_ranks_cannot_share_is_refused() {
    if emulator().is_none() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    drawing::draw(dir.path(), 4, 100, 1);
    let text = recipe("").replace("size = 4", "size = 5");
    for error in two(|ranks| Trainer::of_rank(&text, dir.path(), resources(), ranks, None).err().unwrap()) {
        assert!(error.to_string().contains("batch.size 5 is no multiple of the 2"), "{error}");
    }
    let on_cpu = Resources { device: None, ..resources() };
    for error in two(|r| Trainer::of_rank(&recipe(""), dir.path(), on_cpu.clone(), r, None).err().unwrap()) {
        assert!(error.to_string().contains("on the CPU"), "{error}");
    }
}

#[test]
fn every_call_of_nccl_that_fails_is_an_error_of_both_ranks_and_nothing_is_kept() {
    let Some(emulator) = emulator() else { return };
    if !alone("ranks::every_call_of_nccl_that_fails_is_an_error_of_both_ranks_and_nothing_is_kept") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    drawing::draw(dir.path(), 4, 100, 1);
    let text = recipe("");
    // What kernels compute does not matter here.
    emulator.idle(true);
    let run = || -> [Result<()>; 2] {
        two(|ranks| {
            let mut trainer = Trainer::of_rank(&text, dir.path(), resources(), ranks, None)?;
            trainer.step()?;
            trainer.step()?;
            trainer.part()
        })
    };
    run().into_iter().for_each(|r| r.unwrap());
    emulator.nccl_fail_at(0);
    let held = emulator.live();
    run().into_iter().for_each(|r| r.unwrap());
    let calls = emulator.nccl_calls();
    assert!(calls > 15, "{calls} calls");
    let mut named = 0;
    for n in 1..=calls {
        emulator.nccl_fail_at(n);
        let results = run();
        let errors: Vec<String> =
            results.iter().filter_map(|r| r.as_ref().err()).map(|e| e.to_string()).collect();
        // Who leaves last fails alone; how often a wait looks is chance, so that a late call may not come.
        assert!(!errors.is_empty() || emulator.nccl_calls() < n, "call {n} of {calls} fails unnoticed");
        for error in &errors {
            let own = error.contains("emulated NCCL error: emulated detail");
            assert!(own || error.contains("ended before"), "call {n}: {error}");
            named += usize::from(own);
        }
        emulator.nccl_fail_at(0);
        // A thread that waits in vain to join holds the context until it gives up.
        let began = Instant::now();
        while emulator.live() != held {
            assert!(began.elapsed() < Duration::from_secs(60), "call {n} of {calls}: something is kept");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    println!("{calls} calls of NCCL, {named} errors that name theirs");
    assert!(named as i64 >= calls - 4);
}

#[cfg(feature = "cli")]
mod program {
    //! The program, as a launcher starts it.

    use super::*;
    use std::process::{Child, Command, Output, Stdio};

    /// The program as rank `rank` of two, with the emulated libraries of `libraries`.
    fn start(dir: &Path, libraries: &Path, port: u16, rank: u32, more: &[&str]) -> Child {
        let mut command = Command::new(env!("CARGO_BIN_EXE_farface"));
        command.arg("train").arg(dir.join("recipe.toml")).arg("--out").arg(dir.join("run")).args(more);
        command.env("TMPDIR", dir).env("LD_LIBRARY_PATH", libraries).env("FARFACE_CUDA_CACHE", "off");
        let [rank, port] = [rank.to_string(), port.to_string()];
        for (name, value) in [
            ("RANK", rank.as_str()),
            ("WORLD_SIZE", "2"),
            ("LOCAL_RANK", &rank),
            ("LOCAL_WORLD_SIZE", "2"),
            ("MASTER_ADDR", "127.0.0.1"),
            ("MASTER_PORT", &port),
        ] {
            command.env(name, value);
        }
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    fn text(bytes: &[u8]) -> String {
        String::from_utf8_lossy(bytes).into_owned()
    }

    fn both(dir: &Path, libraries: &Path, more: &[&str]) -> [Output; 2] {
        let port = free_port();
        let all = [0, 1].map(|rank| start(dir, libraries, port, rank, more));
        all.map(|child| child.wait_with_output().unwrap())
    }

    #[test]
    fn two_processes_train_together_and_rank_0_alone_writes() {
        let Some(emulator) = emulator() else { return };
        let dir = tempfile::tempdir().unwrap();
        drawing::draw(dir.path(), 7, 100, 1);
        std::fs::write(dir.path().join("recipe.toml"), recipe("")).unwrap();
        let cuda = ["--device", "cuda", "--workers", "1"];
        // Nothing is trained yet, by the clock of rank 0; the same command goes on.
        let [first, second] = both(dir.path(), emulator.folder(), &[&cuda[..], &["--minutes", "0"]].concat());
        assert!(
            first.status.success() && second.status.success(),
            "{}{}",
            text(&first.stderr),
            text(&second.stderr)
        );
        assert!(text(&first.stdout).contains("stopped at step 0"), "{}", text(&first.stdout));
        let [first, second] = both(dir.path(), emulator.folder(), &cuda);
        assert!(
            first.status.success() && second.status.success(),
            "{}{}",
            text(&first.stderr),
            text(&second.stderr)
        );
        let told = text(&first.stdout);
        assert!(told.contains("one of 2 processes") && told.contains("done: "), "{told}");
        assert_eq!((text(&second.stdout), text(&second.stderr)), (String::new(), String::new()));
        let run = dir.path().join("run");
        assert!(run.join("final.safetensors").exists());
        // As two threads do.
        let [(_, threads), _] = train(&recipe(""), dir.path(), 6, None);
        assert!(std::fs::read(run.join("last.checkpoint")).unwrap() == threads, "other bits than threads");
    }

    #[test]
    fn a_process_that_is_killed_ends_the_other() {
        let Some(emulator) = emulator() else { return };
        let dir = tempfile::tempdir().unwrap();
        drawing::draw(dir.path(), 7, 100, 1);
        let long = recipe("")
            .replace("length = 6", "length = 100000")
            .replace("checkpoint-every = 2", "log-every = 1");
        std::fs::write(dir.path().join("recipe.toml"), long).unwrap();
        let port = free_port();
        let [first, mut second] =
            [0, 1].map(|rank| start(dir.path(), emulator.folder(), port, rank, &["--device", "cuda"]));
        let log = dir.path().join("run/log.jsonl");
        let began = Instant::now();
        // The start, and two steps.
        while std::fs::read_to_string(&log).map_or(0, |log| log.lines().count()) < 3 {
            assert!(began.elapsed() < Duration::from_secs(120), "no step in two minutes");
            std::thread::sleep(Duration::from_millis(50));
        }
        second.kill().unwrap();
        second.wait().unwrap();
        let first = first.wait_with_output().unwrap();
        let error = text(&first.stderr);
        assert!(
            !first.status.success() && error.contains("rank 1") && error.contains("ended before"),
            "{error}"
        );
    }

    #[test]
    fn what_several_processes_cannot_do_is_named() {
        let Some(emulator) = emulator() else { return };
        let dir = tempfile::tempdir().unwrap();
        drawing::draw(dir.path(), 4, 100, 1);
        std::fs::write(dir.path().join("recipe.toml"), recipe("")).unwrap();
        let without = dir.path().join("without");
        std::fs::create_dir(&without).unwrap();
        for name in ["libcuda.so.1", "libnvrtc.so.12"] {
            std::os::unix::fs::symlink(emulator.folder().join(name), without.join(name)).unwrap();
        }
        let failure = |libraries: &Path, more: &[&str]| {
            let child = start(dir.path(), libraries, free_port(), 0, more);
            let out = child.wait_with_output().unwrap();
            assert!(!out.status.success());
            text(&out.stderr)
        };
        let error = failure(emulator.folder(), &[]);
        assert!(
            error.contains("torchrun has started 2 processes") && error.contains("--device cuda"),
            "{error}"
        );
        let error = failure(emulator.folder(), &["--device", "cuda:0"]);
        assert!(error.contains("CUDA device 0"), "{error}");
        let error = failure(&without, &["--device", "cuda"]);
        assert!(error.contains("libnccl.so.2"), "{error}");
    }
}
