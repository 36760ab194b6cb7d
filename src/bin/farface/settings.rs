//! Command-line settings of a session.

use farface::detect::nms::{SOFT_SIGMA, VOTING_IOU};
use farface::detect::options::MAX_THREADS;
use farface::detect::{DevicePolicy, Model, Options, Precision, Pyramid, Scales, Suppression};

/// Settings of the detection; what is not given is the model's own.
#[derive(clap::Args, Default)]
#[command(next_help_heading = "Detection settings")]
pub struct Settings {
    /// Lowest score of a face, 0 to 1
    #[arg(long, value_name = "SCORE")]
    pub threshold: Option<f32>,
    /// Of two boxes that overlap by more than this (IoU, 0 to 1) the weaker goes
    #[arg(long, value_name = "IOU")]
    nms: Option<f32>,
    /// What else becomes of boxes that overlap: `greedy` (nothing); `voting` or `voting:IOU` (a box
    /// becomes the weighted mean of those that overlap it by more than IOU, 0.5); `soft-linear`,
    /// `soft-gaussian` or `soft-gaussian:SIGMA` (they lose score instead of going; SIGMA 0.5)
    #[arg(long, value_name = "HOW", value_parser = parse_suppression)]
    suppression: Option<Suppression>,
    /// Smallest face wanted: longer side in pixels of the picture; chooses the scales searched
    #[arg(long, value_name = "PX")]
    min_face: Option<f32>,
    /// Largest face wanted: longer side in pixels of the picture; chooses the scales searched
    #[arg(long, value_name = "PX")]
    max_face: Option<f32>,
    /// Scales searched: one factor (2 = doubled), or octaves MIN:MAX:STEP (-2:1:1 = 1/4, 1/2, 1, 2)
    #[arg(long, value_name = "SCALES", value_parser = parse_pyramid, allow_hyphen_values = true)]
    pyramid: Option<Pyramid>,
    /// Scales searched, by factors: 0.25,0.5,1; at most 16
    #[arg(long, value_name = "FACTOR,...", value_parser = parse_scales, conflicts_with = "pyramid")]
    scales: Option<Pyramid>,
    /// Search the mirrored picture too
    #[arg(long)]
    flip: bool,
    /// Longest side of a tile, pixels; 0 = as large as memory allows
    #[arg(long, value_name = "PX")]
    tile: Option<usize>,
    /// Threads; 0 = one a core, which is the default but for `bench`, where it is 1
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Arithmetic of the network: `auto` (int8 of a quantized model where the CPU is faster in it, else f32), `f32`, `bf16`, `f16`, `int8`, or
    /// on a CUDA device of compute capability 8.0 or later `tf32`
    #[arg(long, value_name = "NUMBERS", value_parser = parse_precision)]
    precision: Option<Precision>,
    /// Where the network runs: `cpu` (the default), `cuda` or `cuda:N` (the device of this number), or
    /// `auto` (the best there is; the CPU, until the other has been measured)
    #[arg(long, value_name = "DEVICE", value_parser = parse_device)]
    device: Option<DevicePolicy>,
    /// Most faces in a picture, best first; 0 = no limit
    #[arg(long, value_name = "N")]
    max_faces: Option<usize>,
}

impl Settings {
    /// The model's options with these settings; `threads` where the user gave none. There, 0 has
    /// become the number of cores.
    pub fn options(&self, model: &Model, threads: usize) -> Options {
        self.on(Options::for_model(model.config()), threads)
    }

    /// As [`Settings::options`], for an evaluation.
    pub fn evaluation_options(&self, model: &Model, threads: usize) -> Options {
        self.on(Options::for_evaluation(model.config()), threads)
    }

    fn on(&self, base: Options, threads: usize) -> Options {
        Options {
            score_threshold: self.threshold.unwrap_or(base.score_threshold),
            nms_iou: self.nms.unwrap_or(base.nms_iou),
            suppression: self.suppression.unwrap_or(base.suppression),
            min_face_px: self.min_face.unwrap_or(base.min_face_px),
            max_face_px: self.max_face.unwrap_or(base.max_face_px),
            pyramid: self.pyramid.or(self.scales).unwrap_or(base.pyramid),
            flip: self.flip,
            tile_px: self.tile.unwrap_or(base.tile_px),
            threads: match self.threads.unwrap_or(threads) {
                0 => std::thread::available_parallelism().map_or(1, |n| n.get()).min(MAX_THREADS),
                n => n,
            },
            precision: self.precision.unwrap_or(base.precision),
            device: self.device.unwrap_or(base.device),
            max_faces: self.max_faces.unwrap_or(base.max_faces),
            ..base
        }
    }
}

fn parse_pyramid(text: &str) -> Result<Pyramid, String> {
    let numbers: Option<Vec<f32>> =
        text.split(':').map(|n| n.parse().ok().filter(|v: &f32| v.is_finite())).collect();
    match numbers.as_deref() {
        Some(&[scale]) if scale > 0.0 => {
            let exponent = scale.log2();
            Ok(Pyramid::Octaves { min: exponent, max: exponent, step: 1.0 })
        }
        Some(&[min, max, step]) if min <= max && step > 0.0 => Ok(Pyramid::Octaves { min, max, step }),
        _ => Err("expected a factor above 0, or MIN:MAX:STEP with MIN <= MAX and STEP above 0".into()),
    }
}

fn parse_scales(text: &str) -> Result<Pyramid, String> {
    let factors: Option<Vec<f32>> = text.split(',').map(|n| n.trim().parse().ok()).collect();
    let factors = factors.ok_or("expected factors above 0 with commas between, such as 0.25,0.5,1")?;
    Scales::new(&factors).map(Pyramid::Scales).map_err(|e| e.to_string())
}

pub fn parse_precision(text: &str) -> Result<Precision, String> {
    match text {
        "auto" => Ok(Precision::Auto),
        "f32" => Ok(Precision::F32),
        "bf16" => Ok(Precision::Bf16),
        "f16" => Ok(Precision::F16),
        "int8" => Ok(Precision::Int8),
        "tf32" => Ok(Precision::Tf32),
        _ => Err("expected auto, f32, bf16, f16, int8 or tf32".into()),
    }
}

fn parse_device(text: &str) -> Result<DevicePolicy, String> {
    match text.split_once(':') {
        None if text == "auto" => Ok(DevicePolicy::Auto),
        None if text == "cpu" => Ok(DevicePolicy::Cpu),
        None if text == "cuda" => Ok(DevicePolicy::RequireCuda(0)),
        Some(("cuda", n)) => {
            n.parse().map(DevicePolicy::RequireCuda).map_err(|_| format!("{n:?} is no number"))
        }
        _ => Err("expected cpu, cuda, cuda:N or auto".into()),
    }
}

fn parse_suppression(text: &str) -> Result<Suppression, String> {
    let (name, number) = match text.split_once(':') {
        Some((name, number)) => (name, Some(number.parse().map_err(|_| format!("{number:?} is no number"))?)),
        None => (text, None),
    };
    match (name, number) {
        ("greedy", None) => Ok(Suppression::Greedy),
        ("voting", iou) => Ok(Suppression::Voting { iou: iou.unwrap_or(VOTING_IOU) }),
        ("soft-linear", None) => Ok(Suppression::SoftLinear),
        ("soft-gaussian", sigma) => Ok(Suppression::SoftGaussian { sigma: sigma.unwrap_or(SOFT_SIGMA) }),
        _ => {
            Err("expected greedy, voting, voting:IOU, soft-linear, soft-gaussian or soft-gaussian:SIGMA"
                .into())
        }
    }
}

/// Width and height as `640x480`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PictureSize {
    pub width: usize,
    pub height: usize,
}

impl std::str::FromStr for PictureSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let side = |s: &str| s.parse().ok().filter(|&n| n > 0);
        let parse = || {
            let (width, height) = text.split_once(['x', 'X'])?;
            Some(Self { width: side(width)?, height: side(height)? })
        };
        parse().ok_or_else(|| "expected WIDTHxHEIGHT in pixels, such as 640x480".into())
    }
}

impl std::fmt::Display for PictureSize {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}x{}", self.width, self.height)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pyramids_are_a_factor_or_octaves() {
        let octaves = |min, max, step| Ok(Pyramid::Octaves { min, max, step });
        assert_eq!(parse_pyramid("2"), octaves(1.0, 1.0, 1.0));
        assert_eq!(parse_pyramid("0.5"), octaves(-1.0, -1.0, 1.0));
        assert_eq!(parse_pyramid("-2:1:0.5"), octaves(-2.0, 1.0, 0.5));
        for wrong in ["", "0", "-1", "nan", "inf", "1:2", "1:0:1", "0:1:0", "0:1:1:1", "a:b:c"] {
            assert!(parse_pyramid(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn scales_are_factors_with_commas() {
        let scales = |list: &[f32]| Ok(Pyramid::Scales(Scales::new(list).unwrap()));
        assert_eq!(parse_scales("0.5"), scales(&[0.5]));
        assert_eq!(parse_scales("0.25, 2,1"), scales(&[0.25, 2.0, 1.0]));
        let seventeen = ["1"; 17].join(",");
        for wrong in ["", "0", "1,-1", "nan", "inf", "1,,2", "1:2", &seventeen] {
            assert!(parse_scales(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn suppressions_are_names_with_or_without_a_number() {
        assert_eq!(parse_suppression("greedy"), Ok(Suppression::Greedy));
        assert_eq!(parse_suppression("voting"), Ok(Suppression::Voting { iou: 0.5 }));
        assert_eq!(parse_suppression("voting:0.75"), Ok(Suppression::Voting { iou: 0.75 }));
        assert_eq!(parse_suppression("soft-linear"), Ok(Suppression::SoftLinear));
        assert_eq!(parse_suppression("soft-gaussian:0.3"), Ok(Suppression::SoftGaussian { sigma: 0.3 }));
        for wrong in ["", "soft", "greedy:1", "soft-linear:0.5", "voting:", "voting:x"] {
            assert!(parse_suppression(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn devices_are_names_with_or_without_a_number() {
        assert_eq!(parse_device("cpu"), Ok(DevicePolicy::Cpu));
        assert_eq!(parse_device("cuda"), Ok(DevicePolicy::RequireCuda(0)));
        assert_eq!(parse_device("cuda:3"), Ok(DevicePolicy::RequireCuda(3)));
        for wrong in ["", "gpu", "cuda:", "cuda:-1", "cpu:0"] {
            assert!(parse_device(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn sizes_are_two_positive_numbers() {
        assert_eq!("640x480".parse(), Ok(PictureSize { width: 640, height: 480 }));
        for wrong in ["640", "0x480", "640x", "x", "-1x5", "1x2x3"] {
            assert!(wrong.parse::<PictureSize>().is_err(), "{wrong}");
        }
    }
}
