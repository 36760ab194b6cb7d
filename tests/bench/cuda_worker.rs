//! Times our network on a CUDA device for `tests/bench/cuda_compare.py`, in a process of its own.
//!
//! `cuda_worker NETWORK WIDTH HEIGHT BATCH f16|bf16|tf32|f32` speaks the lines of the other worker: prints `ready SECONDS [prints of the
//! outputs]`, then for every number N read the milliseconds of N runs by the device's own clock; `q` ends it. `--layers` before them
//! prints every step's time instead. `cuda_worker --describe STEM NETWORK` writes the network as `STEM.json` and `STEM.safetensors`.
//!
//! `cuda_worker --train NETWORK WIDTH HEIGHT BATCH bf16|f32` times steps of a training in the same way, by the wall clock: pixels up,
//! forward with the batch's statistics, outputs down, the gradient of the sum over the outputs of half their mean square up (that of
//! the first step, every time), backward, and SGD with momentum and a clipped norm, which comes down. Its prints are of the outputs,
//! then the mean magnitude of all gradients.

mod networks;

use farface::gpu::driver::{Event, Stream};
use farface::gpu::map::Arithmetic;
use farface::gpu::memory::DeviceBuffer;
use farface::gpu::ops::Device;
use farface::graph::{DeviceNetwork, DevicePlan, Graph};
use farface::layers::{Activation, Interpolation, Layer, UpsampleTo};
use farface::shape::{Shape, Tensor};
use serde_json::{json, Value};
use std::io::BufRead;
use std::time::Instant;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// What `cuda_compare.py` computes of both engines' outputs: the mean of |x|, and a sum of x over waves of several lengths, by values in
/// the order N, C, H, W.
fn prints(output: &Tensor) -> [f64; 2] {
    let s = output.shape;
    let (mut sum, mut waves, mut i) = (0.0, 0.0, 0);
    for n in 0..s.n {
        for c in 0..s.c {
            for y in 0..s.h {
                for x in 0..s.w {
                    let v = f64::from(output.at(n, c, y, x));
                    sum += v.abs();
                    waves += v * (f64::from(i) * 0.37).cos();
                    i += 1;
                }
            }
        }
    }
    [sum, waves].map(|v| v / output.data.len() as f64)
}

/// The same pictures as in cuda_compare.py: value i of the channels-last tensor.
fn pictures(shape: Shape) -> Tensor {
    Tensor::from_vec(shape, (0..shape.len()).map(|i| ((i * 7919 % 255) as f32 - 100.0) / 128.0).collect())
}

/// A layer as `cuda_compare.py` builds it.
fn describe(layer: &Layer) -> Value {
    match layer {
        Layer::Conv2d(c) => json!({"kernel": c.kernel, "stride": c.stride, "dilation": c.dilation,
            "padding": c.padding, "groups": c.groups}),
        Layer::ConvTranspose2d(c) => {
            json!({"kernel": c.kernel, "stride": c.stride, "padding": c.padding, "groups": c.groups})
        }
        Layer::BatchNorm(b) => json!({"eps": b.eps}),
        Layer::Activation(a) => match a {
            Activation::Relu => json!({"slope": 0.0}),
            Activation::LeakyRelu(slope) => json!({"slope": slope}),
            Activation::Sigmoid => json!({"sigmoid": true}),
            Activation::Softmax(group) => json!({"softmax": group}),
        },
        Layer::MaxPool(p) => json!({"kernel": p.kernel, "stride": p.stride, "padding": p.padding}),
        Layer::Upsample(u) => {
            let mode = if u.mode == Interpolation::Bilinear { "bilinear" } else { "nearest" };
            match u.to {
                UpsampleTo::Factor(factor) => json!({"mode": mode, "factor": factor}),
                UpsampleTo::SizeOfSecond => json!({"mode": mode}),
            }
        }
        Layer::Crop(c) => json!({"top": c.top, "left": c.left}),
        _ => json!({}),
    }
}

fn description(graph: &Graph) -> Value {
    let node = |n: &farface::graph::build::Node| {
        let inputs: Vec<usize> = n.inputs.iter().map(|i| i.0).collect();
        let params: Vec<&str> = n.params.iter().map(|p| graph.params[p.0].name.as_str()).collect();
        let (kind, layer) = n.layer().map_or(("input", json!({})), |l| (l.kind(), describe(l)));
        json!({"kind": kind, "inputs": inputs, "params": params, "layer": layer})
    };
    let outputs: Vec<usize> = graph.outputs.iter().map(|(_, id)| id.0).collect();
    json!({"nodes": graph.nodes.iter().map(node).collect::<Vec<_>>(), "outputs": outputs})
}

/// Steps of a training on the device.
#[cfg(feature = "train")]
mod training {
    use super::{networks, prints, times, Result};
    use farface::gpu::map::Element;
    use farface::gpu::ops::Device;
    use farface::shape::{Shape, Tensor};
    use farface::train::device::DeviceEngine;
    use farface::train::network::{Engine, Frozen, InputTable, Update, Updated};
    use farface::train::optim::{Optimizer, OptimizerRecipe, ParamOptions};
    use std::time::Instant;

    /// As the pictures of cuda_compare.py: value v of a pixel is (v - 100) / 128.
    fn table() -> InputTable {
        let value = || (0..256).map(|v| (v as f32 - 100.0) / 128.0).collect();
        InputTable { channel: [0, 1, 2], value: [value(), value(), value()] }
    }

    pub fn run(name: &str, shape: Shape, precision: &str) -> Result<()> {
        let element = match precision {
            "bf16" => Element::Bf16,
            "f32" => Element::F32,
            other => return Err(format!("{other}: expected bf16 or f32").into()),
        };
        let start = Instant::now();
        let (graph, weights) = networks::network(name)?;
        let mut engine =
            DeviceEngine::new(graph, &weights, &Frozen::default(), &Device::new(0)?, element, 1)?;
        let params: Vec<ParamOptions> =
            engine.graph().params.iter().map(|p| ParamOptions::new(p.name.clone(), p.len())).collect();
        let trained = engine.trainable().to_vec();
        let params = params
            .into_iter()
            .zip(&trained)
            .map(|(p, &trained)| ParamOptions { frozen: !trained, ..p })
            .collect();
        let sgd = OptimizerRecipe::Sgd { momentum: 0.9, weight_decay: 0.0, nesterov: false };
        let mut optimizer = Optimizer::new(sgd, params)?;
        let (pixels, table): (Vec<u8>, _) =
            ((0..shape.len()).map(|i| (i * 7919 % 255) as u8).collect(), table());
        let outputs = engine.forward(&pixels, shape, &table)?;
        let gradient = |y: &Tensor| {
            let count = y.data.len() as f32;
            Tensor::from_vec(y.shape, y.data.iter().map(|v| v / count).collect())
        };
        let gradients: Vec<Tensor> = outputs.iter().map(gradient).collect();
        engine.backward(&gradients)?;
        let grads = engine.params_and_grads()?.1;
        let all = grads.iter().zip(&trained).filter(|(_, &trained)| trained).flat_map(|(g, _)| g.iter());
        let (sum, count) = all.fold((0.0, 0u64), |(sum, n), v| (sum + f64::from(v.abs()), n + 1));
        let mut told: Vec<f64> = outputs.iter().flat_map(prints).collect();
        told.push(sum / count as f64);
        let told: Vec<String> = told.iter().map(|p| format!("{p:e}")).collect();
        let mut step = || -> Result<f64> {
            let began = Instant::now();
            engine.forward(&pixels, shape, &table)?;
            engine.backward(&gradients)?;
            // A rate at which nothing runs away in thousands of steps.
            let update = Update { optimizer: &mut optimizer, average: None, clip: 10.0, lr: 1e-6 };
            match engine.update(update)? {
                Updated::Done { .. } => Ok(began.elapsed().as_secs_f64() * 1e3),
                Updated::NotFinite { param } => {
                    Err(format!("the gradient of parameter {param} is not finite").into())
                }
            }
        };
        // The first ones choose kernels and make room.
        (0..3).try_for_each(|_| step().map(|_| ()))?;
        println!("ready {:.2} [{}]", start.elapsed().as_secs_f64(), told.join(", "));
        times(step)
    }
}

/// Answers every number N read with N times in milliseconds, until `q`.
fn times(mut run: impl FnMut() -> Result<f64>) -> Result<()> {
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        if line.trim() == "q" {
            break;
        }
        let count = line.trim().parse::<usize>()?;
        let all = (0..count).map(|_| run().map(|ms| format!("{ms:.6}"))).collect::<Result<Vec<_>>>()?;
        println!("{}", all.join(" "));
    }
    Ok(())
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    #[cfg(feature = "train")]
    if let [flag, name, width, height, batch, precision] = &args[..] {
        if flag == "--train" {
            let shape = Shape::new(batch.parse()?, 3, height.parse()?, width.parse()?);
            return training::run(name, shape, precision);
        }
    }
    if let [flag, stem, name] = &args[..] {
        if flag == "--describe" {
            let (graph, weights) = networks::network(name)?;
            std::fs::write(format!("{stem}.json"), serde_json::to_vec(&description(&graph))?)?;
            weights.save(format!("{stem}.safetensors"))?;
            return Ok(());
        }
    }
    let layers = args.first().is_some_and(|a| a == "--layers");
    let [name, width, height, batch, arithmetic] = &args[usize::from(layers)..] else {
        let usage =
            "usage: cuda_worker [--layers] NETWORK WIDTH HEIGHT BATCH f16|bf16|tf32|f32 | --train NETWORK WIDTH HEIGHT BATCH bf16|f32 | --describe STEM NETWORK";
        return Err(usage.into());
    };
    let arithmetic = match arithmetic.as_str() {
        "f16" => Arithmetic::F16,
        "bf16" => Arithmetic::Bf16,
        "tf32" => Arithmetic::Tf32,
        "f32" => Arithmetic::F32,
        other => return Err(format!("{other}: expected f16, bf16, tf32 or f32").into()),
    };
    let start = Instant::now();
    let shape = Shape::new(batch.parse()?, 3, height.parse()?, width.parse()?);
    let (graph, weights) = networks::network(name)?;
    let device = Device::new(0)?;
    let stream = Stream::new(device.context())?;
    let network = DeviceNetwork::new(&graph, &weights, &device, arithmetic)?;
    let mut plan = DevicePlan::new(&network, &[shape])?;
    plan.choose(&network)?;
    let arena = DeviceBuffer::new(device.context(), plan.bytes())?;
    let outputs = plan.run_tensors(&stream, &arena, &[pictures(shape)])?;
    let prints: Vec<String> = outputs.iter().flat_map(prints).map(|p| format!("{p:e}")).collect();
    if layers {
        return print_layers(&network, &plan, &stream, &arena);
    }
    let recorded = stream.capture(|| plan.launch(&stream, &arena))?;
    println!("ready {:.2} [{}]", start.elapsed().as_secs_f64(), prints.join(", "));
    let [before, after] = [Event::new(device.context())?, Event::new(device.context())?];
    times(|| {
        before.record(&stream)?;
        recorded.launch(&stream)?;
        after.record(&stream)?;
        after.synchronize()?;
        Ok(after.since(&before)?.into())
    })
}

/// Median of 30 times of every step, launched one by one.
fn print_layers(
    network: &DeviceNetwork,
    plan: &DevicePlan,
    stream: &Stream,
    arena: &DeviceBuffer,
) -> Result<()> {
    let runs: Vec<Vec<f32>> =
        (0..30).map(|_| plan.launch_timed(stream, arena)).collect::<std::result::Result<_, _>>()?;
    let mut total = 0.0;
    for (i, ((layer, _), kernel)) in network.listing().zip(plan.kernels()).enumerate() {
        let mut times: Vec<f32> = runs.iter().map(|run| run[i]).collect();
        times.sort_by(f32::total_cmp);
        total += times[times.len() / 2];
        println!("{layer:28} {kernel:28} {:9.4} ms", times[times.len() / 2]);
    }
    println!("total {total:.4} ms");
    Ok(())
}
