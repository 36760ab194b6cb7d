//! What augmentation does, as the training recipe says it.

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Augmentation. Every example is one window, chosen by one of four methods in proportion to their
/// weights, then flipped, recoloured, turned and degraded, its faces covered, with the probabilities
/// below. Lengths are pixels, ranges `[least, most]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct Augment {
    /// Square windows in proportion to the picture; weight 1.
    pub random_square: RandomSquare,
    /// Windows in which a random face gets a random anchor's size; weight 1.
    pub data_anchor_sampling: DataAnchorSampling,
    /// Windows of the picture scaled by a random factor; weight 0.
    pub scale_jitter: ScaleJitter,
    /// Canvases larger than the picture; weight 0.
    pub expand: Expand,
    /// Probability of mirroring left and right; 0.5.
    pub flip: f32,
    /// Colour distortion.
    pub photometric: Photometric,
    /// Probability of losing all colour; 0.02.
    pub grey: f32,
    /// Gaussian blur.
    pub blur: Blur,
    /// JPEG artefacts.
    pub jpeg: Jpeg,
    /// Detail lost to a lower resolution.
    pub low_resolution: LowResolution,
    /// Heads held askew.
    pub turn: Turn,
    /// Faces partly hidden.
    pub cover: Cover,
    /// Faces whose longer side is below this in the example are ignored; 4.
    pub min_face_px: f32,
    /// Faces of whose area less than this share lies in the window are ignored; 0.5. (Those whose
    /// centre lies outside are dropped, so a quarter is the least.)
    pub min_visible: f32,
    /// RGB where the window leaves the picture; [123, 117, 104], the mean of ImageNet.
    pub fill: [u8; 3],
}

impl Default for Augment {
    fn default() -> Self {
        Self {
            random_square: RandomSquare::default(),
            data_anchor_sampling: DataAnchorSampling::default(),
            scale_jitter: ScaleJitter::default(),
            expand: Expand::default(),
            flip: 0.5,
            photometric: Photometric::default(),
            grey: 0.02,
            blur: Blur::default(),
            jpeg: Jpeg::default(),
            low_resolution: LowResolution::default(),
            turn: Turn::default(),
            cover: Cover::default(),
            min_face_px: 4.0,
            min_visible: 0.5,
            fill: [123, 117, 104],
        }
    }
}

/// A square whose side is a factor times the picture's shorter side, at random, repeated until it
/// holds the centre of a face (Deng et al., RetinaFace, CVPR 2020, section 4.2: factors 0.3 to 1).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct RandomSquare {
    /// Share of examples.
    pub weight: f32,
    /// Factors to draw from; [0.3, 0.45, 0.6, 0.8, 1.0]. Above 1 the square may leave the picture.
    pub factors: Vec<f32>,
    /// Squares tried before one is put around a random face; 20.
    pub tries: usize,
}

impl Default for RandomSquare {
    fn default() -> Self {
        Self { weight: 1.0, factors: vec![0.3, 0.45, 0.6, 0.8, 1.0], tries: 20 }
    }
}

/// Data-anchor-sampling (Tang et al., PyramidBox, ECCV 2018, section 3.3; HAMBox uses it too). Of a
/// random face of size s = sqrt(area), i is the scale nearest to s; the target is a scale of index
/// 0 to min(i + 1, last), times the jitter; the window scales the face to it and holds it whole.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct DataAnchorSampling {
    /// Share of examples.
    pub weight: f32,
    /// Anchor scales, rising; [16, 32, 64, 128, 256]. (The paper goes on to 512, for crops of 640.)
    pub scales: Vec<f32>,
    /// Factor on the scale; [0.5, 2].
    pub jitter: [f32; 2],
    /// Largest window in proportion to the picture's longer side; 2. (The paper has no such limit:
    /// a large face made tiny leaves the example almost empty.)
    pub max_window: f32,
}

impl Default for DataAnchorSampling {
    fn default() -> Self {
        Self {
            weight: 1.0,
            scales: vec![16.0, 32.0, 64.0, 128.0, 256.0],
            jitter: [0.5, 2.0],
            max_window: 2.0,
        }
    }
}

/// The whole picture is scaled by a factor; the window is a random part of it, with faces or not.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct ScaleJitter {
    /// Share of examples.
    pub weight: f32,
    /// Factor; its logarithm is uniform; [0.5, 2].
    pub range: [f32; 2],
    /// Factors to draw from instead of the range (HR: 0.5, 1, 2; Group Sampling: 0.25 n); none.
    pub factors: Vec<f32>,
}

impl Default for ScaleJitter {
    fn default() -> Self {
        Self { weight: 0.0, range: [0.5, 2.0], factors: Vec::new() }
    }
}

/// The whole picture at a random place of a canvas whose side is 1 to `max` times its longer side
/// (Liu et al., SSD, ECCV 2016, section 3.6, "zoom out").
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct Expand {
    /// Share of examples.
    pub weight: f32,
    /// Largest canvas; 4.
    pub max: f32,
}

impl Default for Expand {
    fn default() -> Self {
        Self { weight: 0.0, max: 4.0 }
    }
}

/// SSD's colour distortion (Howard 2013, as in the SSD code): brightness, then contrast, saturation
/// and hue, each with `probability`. All in one affine map: hue and saturation in YIQ, where they
/// are linear (SSD does them in HSV), and values are clamped once, at the end.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct Photometric {
    /// Of each distortion; 0.5.
    pub probability: f32,
    /// Largest shift of values 0 to 255, up or down; 32.
    pub brightness: f32,
    /// Factor on values; [0.5, 1.5].
    pub contrast: [f32; 2],
    /// Factor on the distance from grey; [0.5, 1.5].
    pub saturation: [f32; 2],
    /// Largest turn, degrees, either way; 18.
    pub hue: f32,
}

impl Default for Photometric {
    fn default() -> Self {
        let half = [0.5, 1.5];
        Self { probability: 0.5, brightness: 32.0, contrast: half, saturation: half, hue: 18.0 }
    }
}

/// Gaussian blur of the example.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct Blur {
    /// 0.05.
    pub probability: f32,
    /// Standard deviation; [0.4, 1.5], at most 5.
    pub sigma: [f32; 2],
}

impl Default for Blur {
    fn default() -> Self {
        Self { probability: 0.05, sigma: [0.4, 1.5] }
    }
}

/// The example is coded as JPEG and back.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct Jpeg {
    /// 0.05.
    pub probability: f32,
    /// Quality, 1 to 100; [30, 90].
    pub quality: [u8; 2],
}

impl Default for Jpeg {
    fn default() -> Self {
        Self { probability: 0.05, quality: [30, 90] }
    }
}

/// The example is drawn smaller by a factor and enlarged again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct LowResolution {
    /// 0.05.
    pub probability: f32,
    /// Factor, from 1; [1.3, 3].
    pub factor: [f32; 2],
}

impl Default for LowResolution {
    fn default() -> Self {
        Self { probability: 0.05, factor: [1.3, 3.0] }
    }
}

/// The example is turned about its centre. A face's box becomes that of the turned ellipse that fills the box.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct Turn {
    /// 0.
    pub probability: f32,
    /// Largest angle, either way, up to 180; 25.
    pub degrees: f32,
}

impl Default for Turn {
    fn default() -> Self {
        Self { probability: 0.0, degrees: 25.0 }
    }
}

/// A part of a face is hidden under a piece of the example that shows no face (Zhong et al., Random Erasing, AAAI 2020,
/// with a piece of the picture for the noise).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct Cover {
    /// Of each face; 0.
    pub probability: f32,
    /// Share of the box's area; [0.1, 0.4]. Covers of faces that overlap do not add up to more.
    pub share: [f32; 2],
}

impl Default for Cover {
    fn default() -> Self {
        Self { probability: 0.0, share: [0.1, 0.4] }
    }
}

impl Augment {
    /// Weights of the four methods, in the order of the fields.
    pub(super) fn weights(&self) -> [f32; 4] {
        [
            self.random_square.weight,
            self.data_anchor_sampling.weight,
            self.scale_jitter.weight,
            self.expand.weight,
        ]
    }

    /// Fails with the name of the first field that is out of range.
    pub fn check(&self) -> Result<()> {
        let need = |good: bool, what: &str| match good {
            true => Ok(()),
            false => Err(Error::InvalidArgument(format!("augment.{what}"))),
        };
        let range =
            |[least, most]: [f32; 2], low: f32, high: f32| low <= least && least <= most && most <= high;
        for (name, p) in [
            ("flip", self.flip),
            ("photometric.probability", self.photometric.probability),
            ("grey", self.grey),
            ("blur.probability", self.blur.probability),
            ("jpeg.probability", self.jpeg.probability),
            ("low-resolution.probability", self.low_resolution.probability),
            ("turn.probability", self.turn.probability),
            ("cover.probability", self.cover.probability),
            ("min-visible", self.min_visible),
        ] {
            need((0.0..=1.0).contains(&p), &format!("{name} is {p}, not from 0 to 1"))?;
        }
        let weights = self.weights();
        need(
            weights.iter().all(|w| (0.0..=1e6).contains(w)) && weights.iter().sum::<f32>() > 0.0,
            "*.weight: they must be from 0 to 1e6, and one of random-square, data-anchor-sampling, \
             scale-jitter and expand above 0",
        )?;
        let factors = &self.random_square.factors;
        need(
            !factors.is_empty() && factors.iter().all(|f| (0.01..=10.0).contains(f)),
            "random-square.factors must be one or more numbers from 0.01 to 10",
        )?;
        let das = &self.data_anchor_sampling;
        need(
            !das.scales.is_empty()
                && das.scales.iter().all(|s| (1.0..=1e4).contains(s))
                && das.scales.windows(2).all(|s| s[0] < s[1]),
            "data-anchor-sampling.scales must be rising numbers from 1 to 10000",
        )?;
        need(range(das.jitter, 0.01, 100.0), "data-anchor-sampling.jitter must be a range in 0.01 to 100")?;
        need(
            (1.0..=100.0).contains(&das.max_window),
            "data-anchor-sampling.max-window must be from 1 to 100",
        )?;
        need(
            range(self.scale_jitter.range, 0.01, 100.0),
            "scale-jitter.range must be a range in 0.01 to 100",
        )?;
        need(
            self.scale_jitter.factors.iter().all(|f| (0.01..=100.0).contains(f)),
            "scale-jitter.factors must be numbers from 0.01 to 100",
        )?;
        need((1.0..=100.0).contains(&self.expand.max), "expand.max must be from 1 to 100")?;
        let p = &self.photometric;
        need((0.0..=255.0).contains(&p.brightness), "photometric.brightness must be from 0 to 255")?;
        need(range(p.contrast, 0.0, 10.0), "photometric.contrast must be a range in 0 to 10")?;
        need(range(p.saturation, 0.0, 10.0), "photometric.saturation must be a range in 0 to 10")?;
        need((0.0..=180.0).contains(&p.hue), "photometric.hue must be from 0 to 180 degrees")?;
        need(range(self.blur.sigma, 0.05, 5.0), "blur.sigma must be a range in 0.05 to 5")?;
        let [worst, best] = self.jpeg.quality;
        need(1 <= worst && worst <= best && best <= 100, "jpeg.quality must be a range in 1 to 100")?;
        need(
            range(self.low_resolution.factor, 1.0, 100.0),
            "low-resolution.factor must be a range in 1 to 100",
        )?;
        need((0.0..=180.0).contains(&self.turn.degrees), "turn.degrees must be from 0 to 180")?;
        need(range(self.cover.share, 0.0, 1.0), "cover.share must be a range in 0 to 1")?;
        need((0.0..=1e4).contains(&self.min_face_px), "min-face-px must be from 0 to 10000")
    }
}
