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
    // utime and stime are the 14th and 15th fields; the name in parentheses may hold spaces.
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
    arena.reserve(plan.floats());
    let mut pool = Pool::new(threads.parse()?)?;
    let mut state = 1u32;
    let mut noise = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 24) as f32 - 0.5
    };
    let input = plan.inputs()[0];
    let mut fill = |arena: &mut Arena| {
        for y in 0..shape.h {
            for x in 0..shape.w {
                let at = input.at(0, y, x);
                arena.floats_mut()[at..at + 3].fill_with(|| noise() * 100.0);
            }
        }
    };
    fill(&mut arena);
    plan.run(&mut arena, &mut pool);
    println!("ready {:.2} []", start.elapsed().as_secs_f64());
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        if line.trim() == "q" {
            break;
        }
        let mut pairs = Vec::new();
        for _ in 0..line.trim().parse::<usize>()? {
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
