//! Times our network for `tests/bench/compare.py`, in a process of its own.
//!
//! Arguments: model, width, height, threads. Speaks the lines of the other workers: prints
//! `ready SECONDS [means of |output|]`, then for every number N read, N pairs `wall,cpu` in seconds; `q` ends it with
//! `hwm MEGABYTES`.

use farface::cpu::{Arena, Pool};
use farface::detect::Model;
use farface::graph::Plan;
use farface::shape::Shape;
use std::io::BufRead;
use std::time::Instant;

/// Processor seconds of this process.
fn cpu_seconds() -> f64 {
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

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [model, width, height, threads] = &args[..] else {
        return Err("usage: worker MODEL WIDTH HEIGHT THREADS".into());
    };
    let start = Instant::now();
    let model = Model::load(model)?;
    let shape = Shape::new(1, 3, height.parse()?, width.parse()?);
    let plan = Plan::new(model.network(), &[shape])?;
    let mut arena = Arena::default();
    arena.reserve(plan.floats())?;
    let mut pool = Pool::new(threads.parse()?)?;
    let input = plan.inputs()[0];
    let mut pixel = 0usize;
    for y in 0..shape.h {
        for x in 0..shape.w {
            for c in 0..3 {
                // The same picture as in compare.py: value i of the channels-last tensor.
                arena.floats_mut()[input.at(0, y, x) + c] = (pixel * 7919 % 255) as f32 - 100.0;
                pixel += 1;
            }
        }
    }
    let picture = arena.read(&input);
    plan.run(&mut arena, &mut pool);
    let means: Vec<String> = plan
        .outputs()
        .iter()
        .map(|v| {
            let values = arena.read(v).data;
            let sum: f64 = values.iter().map(|v| f64::from(v.abs())).sum();
            format!("{:.6}", sum / values.len() as f64)
        })
        .collect();
    println!("ready {:.2} [{}]", start.elapsed().as_secs_f64(), means.join(", "));
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
