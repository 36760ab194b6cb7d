//! What all parity tests share: running a network both ways and comparing.

use farface::cpu::{Arena, Isa, Pool};
use farface::graph::init::Rng;
use farface::graph::{run_reference, Compiled, Graph, Plan, Weights};
use farface::shape::{Shape, Tensor};

/// Largest difference allowed, relative to the output's largest magnitude. The engine and the
/// reference add the same products in a different order, with and without fused multiply-add and with
/// batch normalisation folded into the weights: each rounds at 6e-8 a step, a few thousand steps
/// deep, so 1e-4 leaves a factor of ten or more; a misplaced tap or channel is off by 1e-1 and more.
pub const TOLERANCE: f32 = 1e-4;

/// Random networks. Under emulation, tens of times as slow, a few: the graphs are the same there, and every kernel has tests of its own.
pub const NETWORKS: u64 = if cfg!(emulated) { 12 } else { 150 };

/// Random runs of steps in bands.
pub const BANDS: usize = 40;

/// A reference multiply-add takes some nanoseconds: cases are cut to this many.
pub const MACS: usize = if cfg!(emulated) { 1_500_000 } else { 3_000_000 };

/// Thread counts under test; the results must not depend on them.
const THREADS: [usize; 3] = [1, 2, 3];

/// What the arena is filled with before a run. A value that is read before it is written shows: NaN
/// spreads through sums, the large values win a maximum (where a NaN may lose).
const FILLS: [f32; 3] = [f32::NAN, 3e37, -3e37];

/// Tensor of normal values.
pub fn random_tensor(shape: Shape, rng: &mut Rng) -> Tensor {
    Tensor::from_vec(shape, (0..shape.len()).map(|_| rng.normal()).collect())
}

/// Largest difference relative to the largest magnitude of `expected`. Infinite where either holds
/// a NaN or the shapes differ.
pub fn error(got: &Tensor, expected: &Tensor) -> f32 {
    if got.shape != expected.shape || got.data.iter().chain(&expected.data).any(|v| !v.is_finite()) {
        return f32::INFINITY;
    }
    let largest = expected.data.iter().fold(f32::MIN_POSITIVE, |m, v| m.max(v.abs()));
    let difference = got.data.iter().zip(&expected.data).fold(0.0, |m: f32, (g, e)| m.max((g - e).abs()));
    difference / largest
}

/// Runs compiled plans and remembers the largest error an instruction set.
pub struct Parity {
    pools: Vec<Pool>,
    arena: Arena,
    worst: Vec<(Isa, f32)>,
}

impl Parity {
    pub fn new() -> Self {
        Self {
            pools: THREADS.iter().map(|&n| Pool::new(n).expect("threads start")).collect(),
            arena: Arena::default(),
            worst: Isa::supported().into_iter().map(|isa| (isa, 0.0)).collect(),
        }
    }

    /// Holds the compiled network to `expected` on every instruction set: within [`TOLERANCE`], bit
    /// for bit the same on every number of threads and whatever the arena held before, and nothing
    /// written past the plan's floats.
    pub fn check(
        &mut self,
        what: &str,
        graph: &Graph,
        weights: &Weights,
        inputs: &[Tensor],
        expected: &[Tensor],
    ) {
        let shapes: Vec<Shape> = inputs.iter().map(|x| x.shape).collect();
        for (isa, worst) in &mut self.worst {
            let context = || format!("{what} on {}", isa.name());
            let network =
                Compiled::new(graph, weights, *isa).unwrap_or_else(|e| panic!("{}: {e}", context()));
            let plan = Plan::new(&network, &shapes).unwrap_or_else(|e| panic!("{}: {e}", context()));
            self.arena.reserve(plan.floats() + 64).unwrap();
            let mut first: Option<Vec<Tensor>> = None;
            for (pool, fill) in self.pools.iter_mut().zip(FILLS) {
                self.arena.floats_mut().fill(fill);
                let got = plan.run_tensors(&mut self.arena, pool, inputs).expect("shapes as planned");
                assert_eq!(got.len(), expected.len(), "{}", context());
                let tail = &self.arena.floats()[plan.floats()..];
                let intact = tail.iter().all(|v| v.to_bits() == fill.to_bits());
                assert!(intact, "{}: wrote past the plan's floats", context());
                for (i, (g, e)) in got.iter().zip(expected).enumerate() {
                    let error = error(g, e);
                    *worst = worst.max(error);
                    assert!(
                        error <= TOLERANCE,
                        "{}, {} threads, fill {fill:e}: output {i} {} is off by {error:e}",
                        context(),
                        pool.threads(),
                        e.shape
                    );
                }
                let bits = |all: &[Tensor]| -> Vec<u32> {
                    all.iter().flat_map(|t| t.data.iter().map(|v| v.to_bits())).collect()
                };
                match &first {
                    None => first = Some(got),
                    Some(first) => assert!(
                        bits(first) == bits(&got),
                        "{}: {} threads give other bits than one",
                        context(),
                        pool.threads()
                    ),
                }
            }
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

    /// Prints the largest error of every instruction set.
    pub fn report(&self, what: &str) {
        for (isa, worst) in &self.worst {
            println!("{what}: {}: largest relative error {worst:.1e}", isa.name());
        }
    }
}
