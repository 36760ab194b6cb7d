//! Times training steps of our networks for `tests/bench/train_compare.py`, in a process of its own.
//!
//! Arguments: network (`nano` or `resnet18-fpn`), precision (`f32` or `bf16`), side of the square pictures, batch,
//! threads, and a file that the weights are written to. A step is forward with the batch's statistics, the gradient of
//! the sum over the outputs of half their mean square, and backward; no update. Speaks the lines of the other workers:
//! prints `ready MACS [means of |output|, mean |gradient|]`, where MACS are the forward multiply-adds of a picture, then
//! for every number N read, N pairs `wall,cpu` in seconds; `q` ends it with `hwm MEGABYTES`.

use farface::cpu::dense::{bf16_supported, Element};
use farface::detect::config::DetectorConfig;
use farface::detect::detector::Detector;
use farface::detect::ModelConfig;
use farface::graph::init::Rng;
use farface::graph::{Builder, Graph, Weights};
use farface::layers::Interpolation;
use farface::nets::fpn::fpn;
use farface::nets::resnet::{resnet, ResNet};
use farface::shape::{Shape, Tensor};
use farface::train::network::{Frozen, Network};
use std::error::Error;
use std::io::BufRead;
use std::time::Instant;

fn network(name: &str) -> Result<Graph, Box<dyn Error>> {
    match (name, ModelConfig::farface_nano().detector) {
        ("nano", DetectorConfig::Pyramid(p)) => Ok(p.graph()),
        ("resnet18-fpn", _) => {
            let mut b = Builder::new();
            let image = b.input("image", 3);
            let features = b.scope("body", |b| resnet(b, image, &ResNet::R18));
            let channels = ResNet::R18.channels();
            let pyramid = b.scope("fpn", |b| fpn(b, features, channels, 128, Interpolation::Nearest));
            for (level, p) in (2..).zip(pyramid) {
                b.output(&format!("p{level}"), p);
            }
            Ok(b.finish())
        }
        _ => Err(format!("no network {name}: nano or resnet18-fpn").into()),
    }
}

/// One step; returns the outputs.
fn step<T: Element>(net: &mut Network<T>, pictures: &Tensor) -> Result<Vec<Tensor>, farface::Error> {
    let image = pictures.data.len() / pictures.shape.n;
    net.forward(&[pictures.shape], &|_, n, z: &mut [T]| {
        z.iter_mut().zip(&pictures.data[n * image..]).for_each(|(z, &v)| *z = T::of(v));
    })?;
    let outputs: Vec<Tensor> = (0..net.graph().outputs.len()).map(|i| net.output(i)).collect();
    let gradient = |y: &Tensor| {
        let count = y.data.len() as f32;
        Tensor::from_vec(y.shape, y.data.iter().map(|v| v / count).collect())
    };
    net.clear_gradients();
    net.backward(&outputs.iter().map(gradient).collect::<Vec<_>>())?;
    Ok(outputs)
}

fn mean_magnitude<'a>(values: impl Iterator<Item = &'a f32>) -> f64 {
    let (sum, count) = values.fold((0.0, 0u64), |(sum, n), v| (sum + f64::from(v.abs()), n + 1));
    sum / count as f64
}

fn run<T: Element>(
    graph: Graph,
    weights: &Weights,
    shape: Shape,
    threads: usize,
) -> Result<(), Box<dyn Error>> {
    let macs = graph.macs(&[Shape { n: 1, ..shape }])?;
    let mut rng = Rng::new(1);
    // A grid of eighths, which bf16 holds exactly.
    let values = (0..shape.len()).map(|_| (rng.normal() * 8.0).round() / 8.0).collect();
    let pictures = Tensor::from_vec(shape, values);
    let mut net = Network::<T>::new(graph, weights, &Frozen::default(), threads)?;
    let outputs = step(&mut net, &pictures)?;
    let mut means: Vec<f64> = outputs.iter().map(|y| mean_magnitude(y.data.iter())).collect();
    let trained = net.trainable().to_vec();
    let gradients = net.grads.iter().zip(trained).filter(|g| g.1);
    means.push(mean_magnitude(gradients.flat_map(|g| g.0)));
    let means: Vec<String> = means.iter().map(|m| format!("{m:e}")).collect();
    println!("ready {macs} [{}]", means.join(", "));
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        if line.trim() == "q" {
            break;
        }
        let mut pairs = Vec::new();
        for _ in 0..line.trim().parse::<usize>()? {
            let (wall, cpu) = (Instant::now(), cpu_seconds());
            step(&mut net, &pictures)?;
            pairs.push(format!("{:.6},{:.6}", wall.elapsed().as_secs_f64(), cpu_seconds() - cpu));
        }
        println!("{}", pairs.join(" "));
    }
    let status = std::fs::read_to_string("/proc/self/status")?;
    let hwm = status
        .lines()
        .find_map(|l| l.strip_prefix("VmHWM:")?.trim().strip_suffix("kB")?.trim().parse::<f64>().ok());
    println!("hwm {:.0}", hwm.unwrap_or(0.0) / 1024.0);
    Ok(())
}

/// Processor seconds of this process: the scheduler's own count, in nanoseconds, of every thread.
fn cpu_seconds() -> f64 {
    let schedstat = std::fs::read_dir("/proc/self/task").map(|tasks| {
        let ns = |t: std::fs::DirEntry| {
            let text = std::fs::read_to_string(t.path().join("schedstat")).unwrap_or_default();
            text.split(' ').next().and_then(|v| v.parse::<f64>().ok()).unwrap_or(0.0)
        };
        tasks.flatten().map(ns).sum::<f64>()
    });
    schedstat.unwrap_or(0.0) / 1e9
}

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [name, precision, side, batch, threads, file] = &args[..] else {
        return Err("usage: train_worker NETWORK PRECISION SIDE BATCH THREADS WEIGHTS_OUT".into());
    };
    let graph = network(name)?;
    let weights = Weights::random(&graph, 1);
    weights.save(file)?;
    let side = side.parse()?;
    let shape = Shape::new(batch.parse()?, 3, side, side);
    match precision.as_str() {
        "f32" => run::<f32>(graph, &weights, shape, threads.parse()?),
        "bf16" if bf16_supported() => run::<half::bf16>(graph, &weights, shape, threads.parse()?),
        "bf16" => Err("this processor multiplies no bf16: time f32 alone (--precisions f32)".into()),
        other => Err(format!("no precision {other}: f32 or bf16").into()),
    }
}
