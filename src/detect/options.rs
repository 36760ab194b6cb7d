//! Settings of a session.

use super::boxes::Convention;
use super::config::{ModelConfig, Octaves};
use super::nms::{Rule, Suppression};
use crate::error::{Error, Result};
use crate::pixels::{pyramid, PyramidLimits, PyramidPolicy, Size};

/// Where the network runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum DevicePolicy {
    /// The CPU, until it has been measured which is the faster.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// CUDA device of this index where it can be had, else the CPU; the session tells which.
    PreferCuda(u32),
    /// CUDA device of this index, or an error.
    RequireCuda(u32),
}

/// Arithmetic of the network; of two stages, that of the first (the second computes in f32).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Precision {
    /// Int8 of a model that was quantized, else f32; f32 of both on x86 CPUs without AVX2, or with AVX-512 and no VNNI, where it is
    /// the faster one. On a CUDA device f16. [`Model::own_precision`](super::Model::own_precision) tells.
    #[default]
    Auto,
    /// Single precision.
    F32,
    /// Tensors and weights in bf16, sums in f32: half the memory of f32, and twice its speed and more on CPUs with AMX or AVX512-BF16.
    /// On others it is slower than f32.
    Bf16,
    /// Tensors and weights in f16, sums in f32 or, of a few products, in f16: half the memory of f32, more exact than bf16, and
    /// up to twice the speed of f32 on CPUs with FEAT_FP16 (Arm) or AVX512-FP16. On others it is slower than f32. What is beyond
    /// 65504 becomes that, so that no network overflows.
    F16,
    /// Tensors and weights in eight bits, sums of 32: for models that `farface quantize` has made. x86 CPUs with AVX2 and no dot
    /// product of eight bits round weights more coarsely, so that they find faces slightly otherwise.
    Int8,
    /// On a CUDA device of compute capability 8.0 or later alone: tensors and weights in f32, convolutions' factors rounded to TF32
    /// (the exponents of f32, the ten bits of f16), sums in f32. Faster than f32, with f16's error and without its limits.
    Tf32,
}

/// Most scales of [`Scales`].
pub const MAX_SCALES: usize = 16;

/// Factors by which a picture is resized: 1 to [`MAX_SCALES`], each finite and above 0.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scales {
    values: [f32; MAX_SCALES],
    count: usize,
}

impl Scales {
    /// These scales, in any order. Errors: [`Error::InvalidArgument`] where they are none, too many, or one is no factor.
    pub fn new(scales: &[f32]) -> Result<Self> {
        let bad = |what: String| Err(Error::InvalidArgument(what));
        if !(1..=MAX_SCALES).contains(&scales.len()) {
            return bad(format!("{} scales; a list has 1 to {MAX_SCALES}", scales.len()));
        }
        if let Some(s) = scales.iter().find(|s| !(s.is_finite() && **s > 0.0)) {
            return bad(format!("scale {s}; scales must be finite and above 0"));
        }
        let mut values = [0.0; MAX_SCALES];
        values[..scales.len()].copy_from_slice(scales);
        Ok(Self { values, count: scales.len() })
    }

    /// The scales as given.
    pub fn as_slice(&self) -> &[f32] {
        &self.values[..self.count]
    }
}

/// Which scales of the picture are searched.
#[derive(Clone, Copy, Debug, PartialEq, Default)]
pub enum Pyramid {
    /// The model's own scales, where it has some (HR); else scale 1, and with `min_face_px` or `max_face_px` the fewest and
    /// smallest levels on which the detector finds all faces between them.
    #[default]
    Auto,
    /// Scales 2^e, e from `max` down to `min` by `step`; levels that cannot hold a face between
    /// `min_face_px` and `max_face_px` are left out.
    Octaves {
        /// Smallest exponent.
        min: f32,
        /// Largest exponent; 1 doubles the picture.
        max: f32,
        /// Step, above 0.
        step: f32,
    },
    /// These scales (Group Sampling, Ming et al. 2019, section 5, trains at 0.25 n for n = 1 to 8);
    /// levels that cannot hold a face between `min_face_px` and `max_face_px` are left out.
    Scales(Scales),
}

impl From<Octaves> for Pyramid {
    fn from(Octaves { min, max, step }: Octaves) -> Self {
        Pyramid::Octaves { min, max, step }
    }
}

/// Most threads of one session.
pub const MAX_THREADS: usize = 64;
/// Memory cap that a session starts with: 1 GiB.
pub const DEFAULT_MEMORY_CAP: u64 = 1 << 30;

/// Settings of a session; changeable between calls.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// Faces with a lower score are dropped, 0 to 1.
    pub score_threshold: f32,
    /// Of two boxes that overlap by more than this (intersection over union), the weaker goes.
    pub nms_iou: f32,
    /// What else becomes of boxes that overlap.
    pub suppression: Suppression,
    /// Best candidates that reach the suppression.
    pub max_candidates: usize,
    /// Most faces returned, best first; 0 = no limit.
    pub max_faces: usize,
    /// Smallest face wanted, longer side in source pixels; 0 = no limit.
    pub min_face_px: f32,
    /// Largest face wanted, longer side in source pixels; 0 = no limit.
    pub max_face_px: f32,
    /// Scales searched.
    pub pyramid: Pyramid,
    /// Searches the mirrored picture too, which takes twice as long; all candidates meet in the suppression.
    pub flip: bool,
    /// Longest side of a tile in pixels of the level; 0 = as large as the memory cap allows.
    pub tile_px: usize,
    /// Most bytes of working memory; larger levels are cut into tiles.
    pub memory_cap: u64,
    /// Threads, the caller's included; 0 = as many as the process may use.
    pub threads: usize,
    /// Arithmetic.
    pub precision: Precision,
    /// Device.
    pub device: DevicePolicy,
}

impl Options {
    /// The model's own settings, one thread, the scales of [`Pyramid::Auto`].
    pub fn for_model(config: &ModelConfig) -> Self {
        Self {
            score_threshold: config.score_threshold,
            nms_iou: config.nms_iou,
            suppression: Suppression::Greedy,
            max_candidates: config.max_candidates,
            max_faces: 0,
            min_face_px: 0.0,
            max_face_px: 0.0,
            pyramid: Pyramid::Auto,
            flip: false,
            tile_px: 0,
            memory_cap: DEFAULT_MEMORY_CAP,
            threads: 1,
            precision: Precision::Auto,
            device: DevicePolicy::Auto,
        }
    }

    /// As [`Options::for_model`], with the thresholds and scales that the model is evaluated with.
    pub fn for_evaluation(config: &ModelConfig) -> Self {
        Self {
            score_threshold: config.eval_score_threshold,
            nms_iou: config.eval_nms_iou.unwrap_or(config.nms_iou),
            pyramid: config.eval_pyramid.map_or(Pyramid::Auto, Pyramid::from),
            ..Self::for_model(config)
        }
    }

    pub(crate) fn check(&self) -> Result<()> {
        let bad = |what: String| Err(Error::InvalidArgument(what));
        if !(0.0..=1.0).contains(&self.score_threshold) {
            return bad(format!("score_threshold {} is not in 0..1", self.score_threshold));
        }
        if !(0.0..=1.0).contains(&self.nms_iou) {
            return bad(format!("nms_iou {} is not in 0..1", self.nms_iou));
        }
        match self.suppression {
            Suppression::Voting { iou } if !(0.0..=1.0).contains(&iou) => {
                return bad(format!("voting IoU {iou} is not in 0..1"));
            }
            Suppression::SoftGaussian { sigma } if !(sigma.is_finite() && sigma > 0.0) => {
                return bad(format!("sigma {sigma} of soft-NMS must be finite and above 0"));
            }
            _ => {}
        }
        if self.max_candidates == 0 || self.max_candidates > 1_000_000 {
            return bad(format!("max_candidates {} is not in 1..1000000", self.max_candidates));
        }
        let (min, max) = (self.min_face_px, self.max_face_px);
        if !(min >= 0.0 && min.is_finite() && max >= 0.0 && max.is_finite()) || (max > 0.0 && max < min) {
            return bad(format!(
                "min_face_px {min} and max_face_px {max}: need 0 <= smallest <= largest, 0 = no limit"
            ));
        }
        if let Pyramid::Octaves { min, max, step } = self.pyramid {
            // The smallest picture there is tells whether the numbers make sense.
            let policy = PyramidPolicy::Octaves { min: min.into(), max: max.into(), step: step.into() };
            pyramid(Size::new(1, 1), &policy, &PyramidLimits::default())?;
        }
        if self.threads > MAX_THREADS {
            return bad(format!("threads {} is more than {MAX_THREADS}", self.threads));
        }
        #[cfg(not(feature = "cuda"))]
        if let DevicePolicy::RequireCuda(n) = self.device {
            return Err(Error::Unsupported(format!(
                "CUDA device {n} is required, but this build lacks the feature `cuda`; use the CPU policy"
            )));
        }
        Ok(())
    }

    /// How candidates become faces; `plus_one` where the model counts corners as pixels inclusively.
    pub(super) fn rule(&self, plus_one: bool) -> Rule {
        Rule {
            suppression: self.suppression,
            iou: self.nms_iou,
            convention: if plus_one { Convention::PlusOne } else { Convention::Continuous },
            floor: self.score_threshold,
            limit: if self.max_faces == 0 { usize::MAX } else { self.max_faces },
        }
    }

    /// Threads as they are.
    pub(crate) fn thread_count(&self) -> usize {
        match self.threads {
            0 => std::thread::available_parallelism().map_or(1, |n| n.get()).min(MAX_THREADS),
            n => n,
        }
    }
}
