//! Image pyramid: which scales of a picture the detector sees.

use super::rect::{Size, MAX_PIXELS, MAX_SIDE};
use crate::error::{Error, Result};

/// Most levels a pyramid may have; more is a mistaken step.
pub const MAX_LEVELS: usize = 64;

/// Two scales, or two bounds of a range, closer than this ratio are taken as equal: it absorbs the
/// rounding of `2^(k * step)` without ever joining levels that differ by a pixel at [`MAX_SIDE`].
const SAME_RATIO: f64 = 1.0 + 1e-9;

/// One level: the upright picture of W x H px resized to `size`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Level {
    /// Nominal scale, network pixels per upright pixel; above 1 enlarges.
    pub scale: f64,
    /// Level size: each side is `round(side * scale)`, half away from zero, and at least 1.
    pub size: Size,
}

impl Level {
    /// Level of `scale` over an upright picture of `source` px, or None where it would exceed
    /// [`MAX_SIDE`] or [`MAX_PIXELS`].
    fn new(source: Size, scale: f64) -> Option<Self> {
        let side = |n: usize| {
            let scaled = (n as f64 * scale).round().max(1.0);
            (scaled <= MAX_SIDE as f64).then_some(scaled as usize)
        };
        let size = Size::new(side(source.width)?, side(source.height)?);
        (size.pixels() <= MAX_PIXELS).then_some(Self { scale, size })
    }

    /// Factors `[x, y]` that turn level coordinates into upright ones. They follow the rounded size,
    /// so they may differ from each other and from `1 / scale` a little.
    pub fn to_upright(&self, source: Size) -> [f32; 2] {
        [
            (source.width as f64 / self.size.width as f64) as f32,
            (source.height as f64 / self.size.height as f64) as f32,
        ]
    }
}

/// Face sizes in pixels, both ends included.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FaceRange {
    /// Smallest, above 0.
    pub min: f64,
    /// Largest, at least `min`; may be infinite.
    pub max: f64,
}

impl FaceRange {
    fn check(&self, what: &str) -> Result<()> {
        let Self { min, max } = *self;
        if min.is_finite() && min > 0.0 && max >= min {
            return Ok(());
        }
        Err(Error::InvalidArgument(format!("{what} of {min} to {max} px; it needs 0 < smallest <= largest")))
    }
}

/// How the scales of a pyramid are chosen.
#[derive(Clone, Debug, PartialEq)]
pub enum PyramidPolicy {
    /// These scales, in this order.
    Scales(Vec<f64>),
    /// Scales `2^e` for e = `max`, `max - step`, ... down to `min` (included where a step hits it):
    /// largest level first.
    Octaves {
        /// Smallest exponent.
        min: f64,
        /// Largest exponent; 0 is the picture itself, 1 twice as large.
        max: f64,
        /// Difference of neighbouring exponents, above 0.
        step: f64,
    },
    /// The fewest and smallest levels on which every face of `faces` has a size the detector finds.
    Faces {
        /// Faces wanted, in upright (= source) pixels. `max` above the picture's longer side counts
        /// as that side.
        faces: FaceRange,
        /// Faces the detector finds, in network pixels.
        detectable: FaceRange,
    },
}

/// Sizes at which a level is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PyramidLimits {
    /// Least length of a level's shorter side, pixels.
    pub min_side: usize,
    /// Greatest length of a level's longer side, pixels; [`MAX_SIDE`] holds anyway.
    pub max_side: usize,
    /// Most pixels of a level; [`MAX_PIXELS`] holds anyway.
    pub max_pixels: u64,
}

impl Default for PyramidLimits {
    fn default() -> Self {
        Self { min_side: 1, max_side: MAX_SIDE, max_pixels: MAX_PIXELS }
    }
}

impl PyramidLimits {
    fn allow(&self, size: Size) -> bool {
        let (short, long) = (size.width.min(size.height), size.width.max(size.height));
        short >= self.min_side && long <= self.max_side && size.pixels() <= self.max_pixels
    }
}

/// Levels of a picture of upright size `source`. Levels outside `limits` are dropped, and so is a
/// level whose rounded size equals an earlier one's; the result is empty where nothing is left.
///
/// Errors: [`Error::InvalidArgument`] for scales that are not finite and positive, an empty range
/// or more than [`MAX_LEVELS`] levels.
pub fn pyramid(source: Size, policy: &PyramidPolicy, limits: &PyramidLimits) -> Result<Vec<Level>> {
    source.check("picture")?;
    let mut levels: Vec<Level> = Vec::new();
    for scale in scales(source, policy)? {
        let Some(level) = Level::new(source, scale).filter(|l| limits.allow(l.size)) else { continue };
        if levels.iter().all(|l| l.size != level.size) {
            levels.push(level);
        }
    }
    Ok(levels)
}

/// Keeps the levels that can find a face of `faces` (source pixels) with a detector that finds
/// `detectable` (network pixels): who wants large faces only does not pay for enlarged levels of a
/// fixed pyramid. A level that shares a single size with the range is kept.
pub fn keep_for_faces(levels: &mut Vec<Level>, faces: FaceRange, detectable: FaceRange) -> Result<()> {
    faces.check("faces wanted")?;
    detectable.check("faces detectable")?;
    levels.retain(|l| {
        detectable.min / l.scale <= faces.max * SAME_RATIO
            && faces.min <= detectable.max / l.scale * SAME_RATIO
    });
    Ok(())
}

fn scales(source: Size, policy: &PyramidPolicy) -> Result<Vec<f64>> {
    let too_many = |n: f64| {
        Error::InvalidArgument(format!(
            "the pyramid would have {n} levels, at most {MAX_LEVELS}; enlarge the step"
        ))
    };
    match policy {
        PyramidPolicy::Scales(scales) => {
            if scales.len() > MAX_LEVELS {
                return Err(too_many(scales.len() as f64));
            }
            match scales.iter().find(|s| !(s.is_finite() && **s > 0.0)) {
                Some(s) => {
                    Err(Error::InvalidArgument(format!("pyramid scale {s}; it must be finite and above 0")))
                }
                None => Ok(scales.clone()),
            }
        }
        &PyramidPolicy::Octaves { min, max, step } => {
            // Also refuses NaN. 64 octaves either way are beyond any picture.
            let sane = min >= -64.0 && max <= 64.0 && min <= max && step > 0.0;
            if !sane {
                return Err(Error::InvalidArgument(format!(
                    "pyramid octaves {min} to {max} step {step}; they need -64 <= min <= max <= 64 and step > 0"
                )));
            }
            let count = ((max - min) / step + SAME_RATIO).floor();
            if count > MAX_LEVELS as f64 {
                return Err(too_many(count));
            }
            Ok((0..count as usize).map(|k| (max - k as f64 * step).exp2()).collect())
        }
        PyramidPolicy::Faces { faces, detectable } => {
            faces.check("faces wanted")?;
            detectable.check("faces detectable")?;
            let longest = source.width.max(source.height) as f64;
            let largest = faces.max.min(longest).max(faces.min);
            // At scale s the level finds detectable / s. The first level must bring the smallest
            // face up to detectable.min, and each next one begins where the last one ends.
            let first = detectable.min / faces.min;
            let span = detectable.max / detectable.min;
            if detectable.max / first * SAME_RATIO >= largest {
                return Ok(vec![first]);
            }
            // A span of 1 gives infinity here, which is too many as well.
            let count = ((largest / faces.min).ln() / span.ln() - 1e-9).ceil();
            if count > MAX_LEVELS as f64 {
                return Err(too_many(count));
            }
            Ok((0..count as usize).map(|k| first * span.powi(-(k as i32))).collect())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const VGA: Size = Size::new(640, 480);

    fn sizes(policy: PyramidPolicy, limits: PyramidLimits) -> Vec<(usize, usize)> {
        let levels = pyramid(VGA, &policy, &limits).unwrap();
        levels.iter().map(|l| (l.size.width, l.size.height)).collect()
    }

    #[test]
    fn sides_round_half_away_from_zero_and_stay_at_least_1() {
        let policy = PyramidPolicy::Scales(vec![1.0, 0.5, 0.0117, 0.0001]);
        let got = sizes(policy, PyramidLimits::default());
        assert_eq!(got, [(640, 480), (320, 240), (7, 6), (1, 1)]);
        let odd =
            pyramid(Size::new(5, 3), &PyramidPolicy::Scales(vec![0.5]), &PyramidLimits::default()).unwrap();
        assert_eq!(odd[0].size, Size::new(3, 2));
        assert_eq!(odd[0].to_upright(Size::new(5, 3)), [5.0 / 3.0, 1.5]);
    }

    #[test]
    fn octaves_run_from_the_largest_down_to_the_smallest() {
        let policy = PyramidPolicy::Octaves { min: -2.0, max: 1.0, step: 1.0 };
        let all = [(1280, 960), (640, 480), (320, 240), (160, 120)];
        assert_eq!(sizes(policy.clone(), PyramidLimits::default()), all);
        let limits = PyramidLimits { min_side: 200, max_side: 1000, ..Default::default() };
        assert_eq!(sizes(policy, limits), all[1..3]);
        // 0.1 is not exact in binary: the last step still counts.
        let tenths = PyramidPolicy::Octaves { min: 0.0, max: 1.0, step: 0.1 };
        assert_eq!(sizes(tenths, PyramidLimits::default()).len(), 11);
        let limits = PyramidLimits { max_pixels: 640 * 480, ..Default::default() };
        assert_eq!(sizes(PyramidPolicy::Scales(vec![1.01, 1.0, 1.0]), limits), [(640, 480)]);
    }

    #[test]
    fn levels_that_find_no_wanted_face_are_left_out() {
        let policy = PyramidPolicy::Octaves { min: -2.0, max: 1.0, step: 1.0 };
        let mut levels = pyramid(VGA, &policy, &PyramidLimits::default()).unwrap();
        // Found at scales 2, 1, 1/2, 1/4: 5..20, 10..40, 20..80, 40..160.
        let detectable = FaceRange { min: 10.0, max: 40.0 };
        keep_for_faces(&mut levels, FaceRange { min: 30.0, max: f64::INFINITY }, detectable).unwrap();
        assert_eq!(levels.iter().map(|l| l.scale).collect::<Vec<_>>(), [1.0, 0.5, 0.25]);
        keep_for_faces(&mut levels, FaceRange { min: 85.0, max: 100.0 }, detectable).unwrap();
        assert_eq!(levels.iter().map(|l| l.scale).collect::<Vec<_>>(), [0.25]);
    }

    #[test]
    fn absurd_policies_are_refused() {
        let nan = f64::NAN;
        let range = |min, max| FaceRange { min, max };
        let bad = [
            PyramidPolicy::Scales(vec![1.0, 0.0]),
            PyramidPolicy::Scales(vec![nan]),
            PyramidPolicy::Scales(vec![f64::INFINITY]),
            PyramidPolicy::Scales(vec![1.0; MAX_LEVELS + 1]),
            PyramidPolicy::Octaves { min: 1.0, max: 0.0, step: 1.0 },
            PyramidPolicy::Octaves { min: 0.0, max: 1.0, step: 0.0 },
            PyramidPolicy::Octaves { min: nan, max: 1.0, step: 1.0 },
            PyramidPolicy::Octaves { min: -1.0, max: 1.0, step: 1e-300 },
            PyramidPolicy::Faces { faces: range(0.0, 5.0), detectable: range(8.0, 16.0) },
            PyramidPolicy::Faces { faces: range(9.0, 5.0), detectable: range(8.0, 16.0) },
            PyramidPolicy::Faces { faces: range(1.0, 500.0), detectable: range(8.0, 8.0) },
            PyramidPolicy::Faces { faces: range(1.0, nan), detectable: range(8.0, 9.0) },
        ];
        for policy in bad {
            assert!(pyramid(VGA, &policy, &PyramidLimits::default()).is_err(), "{policy:?}");
        }
    }

    proptest! {
        #[test]
        fn every_wanted_face_is_detectable_on_some_level_and_no_level_is_wasted(
            min in 4.0..200f64, ratio in 1.0..100f64, low in 4.0..40f64, span in 1.5..40f64,
        ) {
            let faces = FaceRange { min, max: min * ratio };
            let detectable = FaceRange { min: low, max: low * span };
            let source = Size::new(4000, 3000);
            let scales = scales(source, &PyramidPolicy::Faces { faces, detectable }).unwrap();
            let largest = faces.max.min(4000.0);
            for k in 0..=200 {
                let face = min * (largest / min).powf(k as f64 / 200.0);
                let found = scales.iter().any(|s| {
                    face * s >= low * (1.0 - 1e-6) && face * s <= detectable.max * (1.0 + 1e-6)
                });
                prop_assert!(found, "face of {face} px, scales {scales:?}");
            }
            // Each level but the last leaves larger faces unfound.
            for s in &scales[..scales.len() - 1] {
                prop_assert!(detectable.max / s < largest);
            }
        }

        #[test]
        fn random_policies_never_panic(a: f64, b: f64, c: f64, d: f64, w in 1usize..MAX_SIDE, h in 1usize..128) {
            let source = Size::new(w, h);
            let limits = PyramidLimits::default();
            let range = FaceRange { min: a, max: b };
            let other = FaceRange { min: c, max: d };
            for policy in [
                PyramidPolicy::Scales(vec![a, b, c, d]),
                PyramidPolicy::Octaves { min: a, max: b, step: c },
                PyramidPolicy::Faces { faces: range, detectable: other },
            ] {
                if let Ok(levels) = pyramid(source, &policy, &limits) {
                    for l in levels {
                        prop_assert!(l.size.width >= 1 && l.size.width <= MAX_SIDE && l.size.pixels() <= MAX_PIXELS);
                    }
                }
            }
        }
    }
}
