//! Times our network for `tests/bench/compare.py`, in a process of its own.
//!
//! `bench_worker NETWORK WIDTH HEIGHT THREADS NUMBERS` speaks the lines of the other workers: prints
//! `ready SECONDS [prints of the outputs]`, then for every number N read, N pairs `wall,cpu` in seconds; `q` ends it with
//! `hwm MEGABYTES`. `--layers` before them prints every step's time instead. `bench_worker --onnx FILE NETWORK WIDTH HEIGHT` writes the network for them.

mod networks;

use farface::cpu::{isa, Arena, Pool};
use farface::graph::onnx::to_onnx;
use farface::graph::{Calibration, Clip, Compiled, Numbers, Plan};
use farface::shape::{Shape, Tensor};
use std::io::BufRead;
use std::time::{Duration, Instant};

/// Processor seconds of this process.
fn cpu_seconds() -> f64 {
    // Brings the count of this thread up to date.
    std::thread::yield_now();
    // The scheduler's own count, in nanoseconds, of every thread.
    let schedstat = std::fs::read_dir("/proc/self/task").map(|tasks| {
        let ns = |t: std::fs::DirEntry| {
            let text = std::fs::read_to_string(t.path().join("schedstat")).unwrap_or_default();
            text.split(' ').next().and_then(|v| v.parse::<f64>().ok()).unwrap_or(0.0)
        };
        tasks.flatten().map(ns).sum::<f64>()
    });
    schedstat.unwrap_or(0.0) / 1e9
}

/// What `compare.py` computes of every engine's outputs: the mean of |x|, and a sum of x over waves of several lengths,
/// by values in the order N, C, H, W.
fn prints(output: &Tensor) -> [f64; 2] {
    let s = output.shape;
    let (mut sum, mut waves) = (0.0, 0.0);
    let mut i = 0;
    for c in 0..s.c {
        for y in 0..s.h {
            for x in 0..s.w {
                let v = f64::from(output.data[(y * s.w + x) * s.c + c]);
                sum += v.abs();
                waves += v * (f64::from(i) * 0.37).cos();
                i += 1;
            }
        }
    }
    [sum, waves].map(|v| v / output.data.len() as f64)
}

/// The same picture as in compare.py: value i of the channels-last tensor.
fn picture(shape: Shape) -> Tensor {
    Tensor::from_vec(shape, (0..shape.len()).map(|i| (i * 7919 % 255) as f32 - 100.0).collect())
}

/// Least of 50 times of every step.
fn print_layers(
    network: &Compiled,
    plan: &Plan,
    shape: Shape,
    arena: &mut Arena,
    pool: &mut Pool,
) -> Result<(), Box<dyn std::error::Error>> {
    let mut least = vec![Duration::MAX; plan.steps()];
    for _ in 0..50 {
        let mut times = vec![Duration::ZERO; plan.steps()];
        // The arena reuses the input's memory.
        arena.write(&plan.inputs()[0], &picture(shape));
        plan.run_timed(arena, pool, &mut times);
        least.iter_mut().zip(times).for_each(|(least, time)| *least = time.min(*least));
    }
    for (step, time) in Plan::describe(network, &[shape])?.iter().zip(&least) {
        let seconds = time.as_secs_f64();
        let rate = 2e-9 * step.macs as f64 / seconds;
        println!(
            "{:24} {:26} {:14} {:8.4} ms {rate:6.0} GF/s",
            step.name,
            step.kernel,
            step.output,
            seconds * 1e3
        );
    }
    println!("total {:.4} ms", least.iter().sum::<Duration>().as_secs_f64() * 1e3);
    Ok(())
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let [flag, file, name, width, height] = &args[..] {
        if flag == "--onnx" {
            let (graph, weights) = networks::network(name)?;
            let size = [height.parse()?, width.parse()?];
            std::fs::write(file, to_onnx(&graph, &weights, Some(size))?)?;
            println!("{} {}", graph.macs(&[Shape::new(1, 3, size[0], size[1])])?, graph.param_count());
            return Ok(());
        }
    }
    let layers = args.first().is_some_and(|a| a == "--layers");
    let [name, width, height, threads, numbers] = &args[usize::from(layers)..] else {
        let usage =
            "usage: worker NETWORK WIDTH HEIGHT THREADS f32|bf16|f16|int8 | --onnx FILE NETWORK WIDTH HEIGHT";
        return Err(usage.into());
    };
    let start = Instant::now();
    let shape = Shape::new(1, 3, height.parse()?, width.parse()?);
    let (network, outputs) = {
        let (graph, weights) = networks::network(name)?;
        let numbers = match numbers.as_str() {
            "f32" => Numbers::F32,
            "bf16" => Numbers::Bf16,
            "f16" => Numbers::F16,
            "int8" => {
                let mut calibration = Calibration::new(&graph, &weights)?;
                calibration.watch_tensors(&mut Pool::new(1)?, &[picture(shape)])?;
                Numbers::Int8(calibration.ranges(Clip::Extremes)?)
            }
            other => return Err(format!("{other}: expected f32, bf16, f16 or int8").into()),
        };
        (Compiled::in_numbers(&graph, &weights, isa::detected(), &numbers)?, graph.outputs.len())
    };
    let plan = Plan::new(&network, &[shape])?;
    let mut arena = Arena::default();
    arena.reserve(plan.floats())?;
    let mut pool = Pool::new(threads.parse()?)?;
    let input = plan.inputs()[0];
    let picture = picture(shape);
    arena.write(&input, &picture);
    plan.run(&mut arena, &mut pool);
    let prints = plan.outputs()[..outputs].iter().flat_map(|v| prints(&arena.read(v)));
    let prints: Vec<String> = prints.map(|p| format!("{p:e}")).collect();
    if layers {
        return print_layers(&network, &plan, shape, &mut arena, &mut pool);
    }
    println!("ready {:.2} [{}]", start.elapsed().as_secs_f64(), prints.join(", "));
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        if line.trim() == "q" {
            break;
        }
        let mut pairs = Vec::new();
        for _ in 0..line.trim().parse::<usize>()? {
            // The arena reuses the input's memory: lay the picture in it again, outside the clock.
            arena.write(&input, &picture);
            let (wall, cpu) = (Instant::now(), cpu_seconds());
            plan.run(&mut arena, &mut pool);
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
