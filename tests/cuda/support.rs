//! The face that the parity tests of the CPU have, on a device: what they check there is checked here of the same networks.

use crate::emulator::{device, driver, Driver};
use farface::gpu::driver::Stream;
use farface::gpu::map::Arithmetic;
use farface::gpu::memory::DeviceBuffer;
use farface::gpu::ops::Device;
use farface::graph::init::Rng;
use farface::graph::{run_reference, DeviceNetwork, DevicePlan, Graph, Weights};
use farface::shape::{Shape, Tensor};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Arithmetics under test with the largest error allowed. Of f32 relative to the output's largest magnitude, as on the CPU; of the
/// others the root of the mean squared difference, relative to that of the expected values: each tensor on the way is rounded to 2^-11
/// (f16) or 2^-8 (bf16). TF32 has f16's rounding, of what is multiplied alone.
const ARITHMETICS: [(Arithmetic, f64); 4] =
    [(Arithmetic::F32, 1e-4), (Arithmetic::Tf32, 1e-2), (Arithmetic::F16, 1e-2), (Arithmetic::Bf16, 8e-2)];

/// Random networks.
pub const NETWORKS: u64 = 30;

/// Random runs of steps that a CPU computes in bands.
pub const BANDS: usize = 4;

/// An emulated multiply-add takes some nanoseconds, and there are six runs of each: cases are cut to this many.
pub const MACS: usize = 180_000;

/// A file of the repository: of the one that this was built in or, on another machine (tests/gpu.sh), of the one that it runs in.
pub fn repository(name: &str) -> PathBuf {
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
    if built.exists() {
        built
    } else {
        name.into()
    }
}

/// Tensor of normal values.
pub fn random_tensor(shape: Shape, rng: &mut Rng) -> Tensor {
    Tensor::from_vec(shape, (0..shape.len()).map(|_| rng.normal()).collect())
}

/// How far `got` is off, as [`ARITHMETICS`] says.
fn error(arithmetic: Arithmetic, got: &Tensor, expected: &Tensor) -> f64 {
    if got.shape != expected.shape || got.data.iter().chain(&expected.data).any(|v| !v.is_finite()) {
        return f64::INFINITY;
    }
    let pairs = || got.data.iter().zip(&expected.data).map(|(&g, &e)| (f64::from(g), f64::from(e)));
    if arithmetic == Arithmetic::F32 {
        let largest = pairs().fold(1e-30f64, |m, (_, e)| m.max(e.abs()));
        pairs().fold(0.0f64, |m, (g, e)| m.max((g - e).abs())) / largest
    } else {
        let squares: f64 = pairs().map(|(_, e)| e * e).sum();
        (pairs().map(|(g, e)| (g - e) * (g - e)).sum::<f64>() / squares.max(1e-30)).sqrt()
    }
}

/// Runs networks on the device and remembers the largest error of every type.
pub struct Parity {
    device: Option<(Arc<Device>, Stream)>,
    worst: [f64; ARITHMETICS.len()],
    /// Steps of all networks, and those that a library of NVIDIA's computes.
    steps: [usize; 2],
    networks: usize,
}

impl Parity {
    pub fn new() -> Self {
        let device = device().map(|d| {
            let stream = Stream::new(d.context()).unwrap();
            (d, stream)
        });
        Self { device, worst: [0.0; ARITHMETICS.len()], steps: [0; 2], networks: 0 }
    }

    /// Holds the network to `expected` in f32 and other types in turn: within its error, bit for bit the same whatever the arena held before, whatever
    /// the order of threads, and launched as a graph; nothing written past the plan's bytes.
    pub fn check(
        &mut self,
        what: &str,
        graph: &Graph,
        weights: &Weights,
        inputs: &[Tensor],
        expected: &[Tensor],
    ) {
        let Some((device, stream)) = &self.device else { return };
        let shapes: Vec<Shape> = inputs.iter().map(|x| x.shape).collect();
        self.networks += 1;
        // Of the suite by a library, which is the same again, a fourth.
        if self.networks % 4 != 1 && std::env::var("FARFACE_CUDA_CONV").is_ok_and(|by| by != "own") {
            return;
        }
        for ((arithmetic, most), worst) in ARITHMETICS.into_iter().zip(&mut self.worst) {
            // f16 and bf16 are the same kernels, and TF32 is f32's maps in their tiles: f32 takes every network, these take turns.
            let takes = match arithmetic {
                Arithmetic::F32 => true,
                Arithmetic::Tf32 => self.networks % 3 == 1,
                Arithmetic::F16 => self.networks.is_multiple_of(2),
                Arithmetic::Bf16 => !self.networks.is_multiple_of(2),
            };
            if !takes {
                continue;
            }
            let context = || format!("{what} in {arithmetic:?}");
            let network = DeviceNetwork::new(graph, weights, device, arithmetic)
                .unwrap_or_else(|e| panic!("{}: {e}", context()));
            let planned = DevicePlan::new(&network, &shapes).and_then(|mut plan| {
                plan.choose(&network)?;
                Ok(plan)
            });
            let plan = planned.unwrap_or_else(|e| panic!("{}: {e}", context()));
            let by_library = plan.kernels().filter(|k| k.starts_with("cudnn") || k.starts_with("cublasLt"));
            self.steps[0] += plan.steps();
            self.steps[1] += by_library.count();
            let arena = DeviceBuffer::new(device.context(), plan.bytes() + 256).unwrap();
            let run = |fill: u8| {
                arena.fill(stream, 0..arena.len(), fill).unwrap();
                let got =
                    plan.run_tensors(stream, &arena, inputs).unwrap_or_else(|e| panic!("{}: {e}", context()));
                let behind = arena.values::<u8>(stream, plan.bytes(), 256).unwrap();
                assert!(behind.iter().all(|&b| b == fill), "{}: wrote past the plan's bytes", context());
                got
            };
            let bits = |all: &[Tensor]| {
                all.iter().flat_map(|t| t.data.iter().map(|v| v.to_bits())).collect::<Vec<u32>>()
            };
            // All ones are a NaN in every type; 0x7b7b is 61,280 in f16, 1.3e36 in the others.
            let got = run(0xff);
            for (i, (g, e)) in got.iter().zip(expected).enumerate() {
                let error = error(arithmetic, g, e);
                *worst = worst.max(error);
                assert!(error <= most, "{}: output {i} {} is off by {error:e}", context(), e.shape);
            }
            if let Some(Driver::Emulated(emulator)) = driver() {
                emulator.backwards(true);
                let again = run(0x7b);
                emulator.backwards(false);
                assert!(bits(&got) == bits(&again), "{}: other bits with other memory or order", context());
            }
            if !self.networks.is_multiple_of(3) {
                continue;
            }
            let recorded = stream.capture(|| plan.launch(stream, &arena)).unwrap();
            arena.fill(stream, 0..arena.len(), 0xff).unwrap();
            let by_graph = plan.run_by(stream, &arena, inputs, || recorded.launch(stream)).unwrap();
            assert!(bits(&got) == bits(&by_graph), "{}: other bits by a recording", context());
        }
    }

    /// As [`Parity::check`], with random weights and inputs, against the reference.
    pub fn check_random(&mut self, what: &str, graph: &Graph, shapes: &[Shape], seed: u64) {
        let weights = Weights::random(graph, seed);
        let mut rng = Rng::new(seed);
        let inputs: Vec<Tensor> = shapes.iter().map(|&s| random_tensor(s, &mut rng)).collect();
        let expected = run_reference(graph, &weights, &inputs).unwrap_or_else(|e| panic!("{what}: {e}"));
        self.check(what, graph, &weights, &inputs, &expected);
    }

    /// Prints the largest error of every type, and how much libraries have computed.
    pub fn report(&self, what: &str) {
        println!("{what}: {} of {} steps by libraries", self.steps[1], self.steps[0]);
        for ((arithmetic, _), worst) in ARITHMETICS.iter().zip(self.worst) {
            println!("{what}: {arithmetic:?}: largest error {worst:.1e}");
        }
    }
}
