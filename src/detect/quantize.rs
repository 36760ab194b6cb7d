//! Post-training quantization: on pictures it is found which values every tensor of a model's network holds, so that they can be
//! stored in eight bits, and which layers had better stay in f32.
//!
//! ```no_run
//! use farface::detect::quantize::Quantizer;
//! use farface::graph::{Clip, Weights};
//! use farface::pixels::{ImageView, PixelFormat};
//!
//! let weights = Weights::load("model.safetensors")?;
//! let mut quantizer = Quantizer::new(&weights, 2)?;
//! let rgb = vec![0u8; 640 * 480 * 3]; // a typical picture; some dozens of them
//! quantizer.add(&ImageView::packed(640, 480, PixelFormat::Rgb8, &rgb)?)?;
//! let ranges = quantizer.ranges(Clip::Mse)?;
//! println!("noise of the outputs: {:.3}", quantizer.noise(&ranges)?);
//! quantizer.quantized(&ranges)?.save("model-int8.safetensors")?;
//! # Ok::<(), farface::Error>(())
//! ```

use super::config::{ModelConfig, METADATA_KEY};
use super::input::fill_input;
use crate::cpu::{isa, Arena, Pool};
use crate::error::{Error, Result};
use crate::graph::{Calibration, Clip, Compiled, Graph, Numbers, Plan, Ranges, Weights};
use crate::pixels::{ImageView, Normalization, Rect, Scratch, Size};
use crate::shape::{Shape, Tensor};

/// Longer side that pictures are shrunk to, pixels.
const LONGEST: usize = 1024;
/// Longer side of those that the noise is measured on, and how many there are.
const PROBE_LONGEST: usize = 512;
const PROBES: usize = 8;

/// Quantizes one model.
pub struct Quantizer {
    weights: Weights,
    config: ModelConfig,
    graph: Graph,
    normalization: Normalization,
    calibration: Calibration,
    single: Compiled,
    pool: Pool,
    scratch: Vec<Scratch>,
    arena: Arena,
    /// Inputs, with what the network makes of them in f32.
    probes: Vec<(Tensor, Vec<Tensor>)>,
    pictures: usize,
}

impl Quantizer {
    /// For the model of these weights, on so many threads.
    pub fn new(weights: &Weights, threads: usize) -> Result<Self> {
        let config = ModelConfig { quantization: None, ..ModelConfig::of(weights)? };
        let graph = config.detector.detector().graph();
        let pool = Pool::new(threads)
            .map_err(|e| Error::LimitExceeded(format!("cannot start {threads} threads: {e}")))?;
        Ok(Self {
            normalization: config.input.normalization()?,
            calibration: Calibration::new(&graph, weights)?,
            single: Compiled::new(&graph, weights, isa::detected())?,
            scratch: (0..pool.threads()).map(|_| Scratch::default()).collect(),
            pool,
            arena: Arena::default(),
            weights: weights.clone(),
            config,
            graph,
            probes: Vec::new(),
            pictures: 0,
        })
    }

    /// Runs the network on a picture, shrunk where it is large, and counts what its tensors hold.
    pub fn add(&mut self, image: &ImageView<'_>) -> Result<()> {
        let size = fitted(image.upright_size(), LONGEST);
        let plan = self.calibration.plan(&[Shape::new(1, 3, size.height, size.width)])?;
        self.fill(image, size, &plan)?;
        self.calibration.watch(&plan, &mut self.arena, &mut self.pool);
        if self.probes.len() < PROBES {
            let size = fitted(image.upright_size(), PROBE_LONGEST);
            let plan = Plan::new(&self.single, &[Shape::new(1, 3, size.height, size.width)])?;
            self.fill(image, size, &plan)?;
            let input = self.arena.read(&plan.inputs()[0]);
            plan.run(&mut self.arena, &mut self.pool);
            let outputs = plan.outputs().iter().map(|v| self.arena.read(v)).collect();
            self.probes.push((input, outputs));
        }
        self.pictures += 1;
        Ok(())
    }

    fn fill(&mut self, image: &ImageView<'_>, size: Size, plan: &Plan) -> Result<()> {
        self.arena.reserve(plan.floats())?;
        let whole = Rect { x: 0, y: 0, width: size.width, height: size.height };
        let input = plan.inputs()[0];
        let to = (&mut self.arena, &input);
        fill_input(image, size, whole, &self.normalization, to, &mut self.pool, &mut self.scratch)
    }

    /// A quantizer for the same model with the ranges of its channels made more alike by what was seen; it has seen no pictures itself.
    pub fn equalized(self) -> Result<Self> {
        let weights = self.calibration.equalized(&self.graph, &self.weights)?;
        Self::new(&weights, self.pool.threads())
    }

    /// Pictures seen.
    pub fn pictures(&self) -> usize {
        self.pictures
    }

    /// Ranges by what was seen. Errors: [`Error::InvalidArgument`] without pictures.
    pub fn ranges(&self, clip: Clip) -> Result<Ranges> {
        self.calibration.ranges(clip)
    }

    /// Names of the convolutions, in their order: those that [`Ranges::keep`] may name.
    pub fn layers(&self) -> Vec<&str> {
        self.calibration.layers()
    }

    /// How far the outputs on the first pictures are from those in f32: root of the mean squared difference relative to the outputs'
    /// own, over all outputs.
    pub fn noise(&mut self, ranges: &Ranges) -> Result<f64> {
        let numbers = Numbers::Int8(ranges.clone());
        let network = Compiled::in_numbers(&self.graph, &self.weights, isa::detected(), &numbers)?;
        let (mut sum, mut count) = (0.0, 0);
        for (input, expected) in &self.probes {
            let plan = Plan::new(&network, &[input.shape])?;
            let got = plan.run_tensors(&mut self.arena, &mut self.pool, std::slice::from_ref(input))?;
            for (got, expected) in got.iter().zip(expected) {
                let square = |v: f32| f64::from(v) * f64::from(v);
                let own: f64 = expected.data.iter().map(|&v| square(v)).sum();
                let off: f64 = got.data.iter().zip(&expected.data).map(|(g, e)| square(g - e)).sum();
                sum += off / own.max(f64::MIN_POSITIVE);
                count += 1;
            }
        }
        Ok((sum / f64::from(count.max(1))).sqrt())
    }

    /// The model's weights with these ranges beside them.
    pub fn quantized(&self, ranges: &Ranges) -> Result<Weights> {
        let config = ModelConfig { quantization: Some(ranges.clone()), ..self.config.clone() };
        let mut weights = self.weights.clone();
        weights.metadata.insert(METADATA_KEY.into(), config.to_json()?);
        Ok(weights)
    }
}

/// This size, made smaller where its longer side is above `longest`.
fn fitted(size: Size, longest: usize) -> Size {
    let side = size.width.max(size.height);
    if side <= longest {
        return size;
    }
    let part = |v: usize| (v * longest).div_ceil(side).max(1);
    Size::new(part(size.width), part(size.height))
}
