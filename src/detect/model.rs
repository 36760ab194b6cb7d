//! A loaded model: configuration, network, packed weights. Immutable, shared by any number of sessions.

use super::config::{ModelConfig, METADATA_KEY};
use super::detector::Detector;
use super::options::Precision;
use super::second_stage::CompiledSecondStage;
use crate::cpu::isa;
use crate::error::{Error, Result};
#[cfg(feature = "cuda")]
use crate::gpu::{map::Arithmetic, ops::Device};
#[cfg(feature = "cuda")]
use crate::graph::DeviceNetwork;
use crate::graph::{Compiled, Graph, Numbers, Reach, Weights};
use crate::pixels::Normalization;
use std::path::Path;
#[cfg(feature = "cuda")]
use std::sync::Weak;
use std::sync::{Arc, Mutex};

/// A model; cloning shares it.
#[derive(Clone)]
pub struct Model(Arc<Inner>);

/// A device's number, the type of tensors there, and whether it is the second stage.
#[cfg(feature = "cuda")]
type Place = (u32, Arithmetic, bool);

struct Inner {
    config: ModelConfig,
    detector: Box<dyn Detector>,
    graph: Graph,
    /// The network in every kind of numbers that a session has asked for.
    networks: Mutex<Vec<(Precision, Arc<Compiled>)>>,
    /// The network on devices, while a session has it there.
    #[cfg(feature = "cuda")]
    on_devices: Mutex<Vec<(Place, Weak<DeviceNetwork>)>>,
    /// Of which other networks can be made.
    weights: Weights,
    normalization: Normalization,
    reach: Reach,
    second: Option<CompiledSecondStage>,
}

/// The model file within the library, where it was built with one.
#[cfg(feature = "default-model")]
const DEFAULT_MODEL: Option<&[u8]> = Some(include_bytes!("../../models/farface-nano.safetensors"));
#[cfg(not(feature = "default-model"))]
const DEFAULT_MODEL: Option<&[u8]> = None;

impl Model {
    /// The model within the library, `farface-nano`: no file is read.
    ///
    /// Errors: [`Error::Unsupported`] in a build without the feature `default-model`.
    pub fn default_model() -> Result<Self> {
        Self::from_bytes(DEFAULT_MODEL.ok_or_else(|| {
            Error::Unsupported(
                "no model is within this build, which lacks the feature `default-model`; load a model file"
                    .into(),
            )
        })?)
    }

    /// Loads a safetensors model file. Errors name the file and the tensor; a file above
    /// [`MAX_FILE_BYTES`](crate::graph::weights::MAX_FILE_BYTES) is refused unread.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        Self::of(Weights::load(path)?).map_err(|e| match e {
            Error::InvalidModel(m) => Error::InvalidModel(format!("{}: {m}", path.display())),
            other => other,
        })
    }

    /// Loads a model from a safetensors file in memory; `bytes` are not kept.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        Self::of(Weights::from_bytes(bytes)?)
    }

    /// Builds a model from weights already read, of which it keeps a copy.
    pub fn from_weights(weights: &Weights) -> Result<Self> {
        Self::of(weights.clone())
    }

    fn of(mut weights: Weights) -> Result<Self> {
        let config = ModelConfig::of(&weights)?;
        let detector = config.detector.detector();
        let graph = detector.graph();
        weights.check(&graph)?;
        let normalization = config.input.normalization()?;
        let mut reach = graph.receptive_field();
        let second =
            detector.second_stage().map(|stage| CompiledSecondStage::new(stage, &weights)).transpose()?;
        if let Some(second) = &second {
            reach.pixels = reach.pixels.map(|pixels| pixels.saturating_add(second.stage().reach));
        }
        // On a device the second stage is made anew, too.
        #[cfg(feature = "cuda")]
        let also = second.as_ref().map(|second| &second.stage().graph);
        #[cfg(not(feature = "cuda"))]
        let also = None;
        weights.keep_for([&graph].into_iter().chain(also));
        let networks = Mutex::default();
        let model = Self(Arc::new(Inner {
            config,
            detector,
            graph,
            networks,
            #[cfg(feature = "cuda")]
            on_devices: Mutex::default(),
            weights,
            normalization,
            reach,
            second,
        }));
        // Now, so that what a file lacks shows when it is loaded, and no session waits for it.
        model.network(Precision::Auto)?;
        Ok(model)
    }

    /// A model of `config` with random weights, the same for the same seed. It detects nothing of use; its network takes as
    /// long as a trained one's, but for what depends on what is found: proposals, and what a first step leaves the second.
    pub fn random(config: &ModelConfig, seed: u64) -> Result<Self> {
        let detector = config.detector.detector();
        let mut weights = Weights::random(&detector.graph(), seed);
        if let Some(stage) = detector.second_stage() {
            weights.tensors.extend(Weights::random(&stage.graph, seed).tensors);
        }
        weights.metadata.insert(METADATA_KEY.into(), config.to_json()?);
        Self::of(weights)
    }

    /// What the file says about the model.
    pub fn config(&self) -> &ModelConfig {
        &self.0.config
    }

    /// The network as built, before folding and fusing; of two stages the first.
    pub fn graph(&self) -> &Graph {
        &self.0.graph
    }

    /// The network of the second stage, which looks at boxes, where there is one.
    pub fn second_graph(&self) -> Option<&Graph> {
        self.0.second.as_ref().map(|second| &second.stage().graph)
    }

    /// Trained values, of both stages.
    pub fn param_count(&self) -> usize {
        self.graph().param_count() + self.second_graph().map_or(0, Graph::param_count)
    }

    pub(super) fn second_stage(&self) -> Option<&CompiledSecondStage> {
        self.0.second.as_ref()
    }

    /// What [`Precision::Auto`] stands for on this machine's CPU.
    pub fn own_precision(&self) -> Precision {
        if self.config().quantization.is_some() && isa::detected().gains_by_u8() {
            Precision::Int8
        } else {
            Precision::F32
        }
    }

    /// The network in these numbers; made when it is first asked for, then shared. Of two stages the first.
    ///
    /// Errors: [`Error::InvalidArgument`] for `Int8` where the model has not been quantized, [`Error::Unsupported`] for `Tf32`.
    pub fn network(&self, precision: Precision) -> Result<Arc<Compiled>> {
        let Inner { config, graph, weights, networks, .. } = &*self.0;
        let precision = if precision == Precision::Auto { self.own_precision() } else { precision };
        let numbers = match (precision, &config.quantization) {
            (Precision::F32 | Precision::Auto, _) => Numbers::F32,
            (Precision::Bf16, _) => Numbers::Bf16,
            (Precision::F16, _) => Numbers::F16,
            (Precision::Int8, Some(ranges)) => Numbers::Int8(ranges.clone()),
            (Precision::Tf32, _) => {
                return Err(Error::Unsupported(
                    "tf32 is computed on CUDA devices alone; on the CPU take auto, f32, bf16 or f16".into(),
                ))
            }
            (Precision::Int8, None) => {
                return Err(Error::InvalidArgument(
                    "this model has no ranges for int8; make one that has with `farface quantize`".into(),
                ))
            }
        };
        // Held while one is made: a second session waits rather than making it again.
        let mut networks = networks.lock().unwrap_or_else(|e| e.into_inner());
        if let Some((_, network)) = networks.iter().find(|(p, _)| *p == precision) {
            return Ok(network.clone());
        }
        let network = Arc::new(Compiled::in_numbers(graph, weights, isa::detected(), &numbers)?);
        networks.push((precision, network.clone()));
        Ok(network)
    }

    /// The network on a device, in this arithmetic; brought there when it is first asked for, then shared by those who hold
    /// it. Of two stages the first.
    #[cfg(feature = "cuda")]
    pub fn device_network(&self, device: &Arc<Device>, arithmetic: Arithmetic) -> Result<Arc<DeviceNetwork>> {
        self.on_device(&self.0.graph, false, device, arithmetic)
    }

    /// As [`Model::device_network`], of the second stage.
    #[cfg(feature = "cuda")]
    pub(super) fn second_device_network(
        &self,
        device: &Arc<Device>,
        arithmetic: Arithmetic,
    ) -> Result<Arc<DeviceNetwork>> {
        let graph = self.second_graph().ok_or_else(|| Error::Internal("no second stage".into()))?;
        self.on_device(graph, true, device, arithmetic)
    }

    #[cfg(feature = "cuda")]
    fn on_device(
        &self,
        graph: &Graph,
        second: bool,
        device: &Arc<Device>,
        arithmetic: Arithmetic,
    ) -> Result<Arc<DeviceNetwork>> {
        let place = (device.context().ordinal(), arithmetic, second);
        // Held while it is brought there, as in `network`.
        let mut all = self.0.on_devices.lock().unwrap_or_else(|e| e.into_inner());
        all.retain(|(_, network)| network.strong_count() > 0);
        let mut held = all.iter().filter(|(at, _)| *at == place);
        if let Some(network) = held.find_map(|(_, network)| network.upgrade()) {
            return Ok(network);
        }
        let network = Arc::new(DeviceNetwork::new(graph, &self.0.weights, device, arithmetic)?);
        all.push((place, Arc::downgrade(&network)));
        Ok(network)
    }

    pub(crate) fn detector(&self) -> &dyn Detector {
        &*self.0.detector
    }

    pub(crate) fn normalization(&self) -> &Normalization {
        &self.0.normalization
    }

    /// Whether a map is enlarged bilinearly to the size of another.
    pub(crate) fn interpolates(&self) -> bool {
        self.0.graph.interpolates()
    }

    /// Receptive field and largest stride of the network; a second stage sees as much more as its boxes reach.
    pub fn reach(&self) -> Reach {
        self.0.reach
    }
}

#[cfg(all(test, feature = "default-model"))]
mod tests {
    use super::*;
    use crate::detect::Session;
    use crate::pixels::{ImageView, PixelFormat};

    #[test]
    fn the_default_model_is_small_says_what_it_is_and_runs() {
        assert!(DEFAULT_MODEL.is_some_and(|bytes| bytes.len() < 1_000_000));
        let model = Model::default_model().unwrap();
        let config = model.config();
        assert_eq!(config.name, "farface-nano");
        assert!(!config.licence.is_empty() && !config.data.is_empty(), "licence and data must be stated");
        let grey = vec![127; 160 * 120 * 3];
        let picture = ImageView::packed(160, 120, PixelFormat::Rgb8, &grey).unwrap();
        let found = Session::new(&model).unwrap().detect(&picture).unwrap().len();
        assert!(found <= config.max_candidates);
    }
}
