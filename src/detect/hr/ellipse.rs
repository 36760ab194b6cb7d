//! From a box to an ellipse (HR, appendix B, "Bounding ellipse regression"): a linear regression from what the network says at
//! the detection, fitted afterwards on pictures that are annotated with ellipses.

use crate::detect::{BBox, Ellipse};
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::f32::consts::FRAC_PI_2;

/// How the angle is expressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AngleForm {
    /// sin 2 theta and cos 2 theta: the same for both directions of an axis, and smooth everywhere.
    DoubleAngle,
    /// cot theta (Eq. 6), which has no bound near 0: for faces that stand upright.
    Cotangent,
}

/// What the regression sees of a detection: the outputs of the cell for its template, themselves linear in the features that
/// the boxes are regressed from, and which template it was.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EllipseFeatures {
    /// Index of the template.
    pub template: usize,
    /// tx, ty, tw, th.
    pub offsets: [f32; 4],
    /// Before the sigmoid.
    pub logit: f32,
}

/// Values regressed from: four offsets and the logit.
const INPUTS: usize = 5;
/// Offsets beyond this are taken as this, which keeps an ellipse near its box whatever the network says.
const MOST: f32 = 4.0;

impl EllipseFeatures {
    fn values(&self) -> [f32; INPUTS] {
        let [x, y, w, h] = self.offsets;
        [x, y, w, h, self.logit].map(|v| v.clamp(-MOST, MOST))
    }
}

/// Eq. 2 to 6 as linear functions of [`EllipseFeatures`]: value = bias(template) + weight . features. The values are t_xc, t_yc,
/// t_ra, t_rb and the angle's one (cot theta) or two (sin 2 theta, cos 2 theta).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EllipseRegressor {
    /// Of the last values.
    pub angle: AngleForm,
    /// For each value the weights of tx, ty, tw, th and the logit.
    pub weights: Vec<[f32; INPUTS]>,
    /// For each template, a constant a value.
    pub biases: Vec<Vec<f32>>,
}

impl AngleForm {
    /// Values of Eq. 2 to 6.
    pub fn values(self) -> usize {
        match self {
            AngleForm::DoubleAngle => 6,
            AngleForm::Cotangent => 5,
        }
    }

    #[cfg(any(test, feature = "train"))]
    fn encode(self, angle: f32) -> Vec<f32> {
        match self {
            AngleForm::DoubleAngle => vec![(2.0 * angle).sin(), (2.0 * angle).cos()],
            AngleForm::Cotangent => vec![1.0 / angle.tan()],
        }
    }

    fn decode(self, t: &[f32]) -> f32 {
        match self {
            AngleForm::DoubleAngle => t[0].atan2(t[1]) / 2.0,
            // In (0, pi), as cot is.
            AngleForm::Cotangent => 1f32.atan2(t[0]),
        }
    }
}

impl EllipseRegressor {
    pub(super) fn check(&self, templates: usize) -> Result<()> {
        let values = self.angle.values();
        let sizes = self.weights.len() == values
            && self.biases.len() == templates
            && self.biases.iter().all(|b| b.len() == values);
        let finite =
            self.weights.as_flattened().iter().chain(self.biases.iter().flatten()).all(|v| v.is_finite());
        if sizes && finite {
            return Ok(());
        }
        Err(Error::InvalidModel(format!(
            "detector hr: ellipse wants {values} rows of weights and as many finite biases for each of {templates} templates"
        )))
    }

    /// The ellipse of a detection. Allocates nothing.
    pub fn ellipse(&self, bbox: &BBox, features: &EllipseFeatures) -> Ellipse {
        let inputs = features.values();
        let mut t = [0.0; 6];
        for ((t, w), b) in t.iter_mut().zip(&self.weights).zip(&self.biases[features.template]) {
            *t = b + w.iter().zip(&inputs).map(|(w, v)| w * v).sum::<f32>();
        }
        decode_ellipse(&t[..self.angle.values()], bbox, self.angle)
    }
}

/// t of Eq. 2 to 6 for an ellipse and the box that was found for it.
#[cfg(any(test, feature = "train"))]
fn encode_ellipse(ellipse: &Ellipse, bbox: &BBox, angle: AngleForm) -> Vec<f32> {
    let [cx, cy] = [(bbox.x1 + bbox.x2) / 2.0, (bbox.y1 + bbox.y2) / 2.0];
    let (w, h) = (bbox.width(), bbox.height());
    let mut t = vec![
        (ellipse.center[0] - cx) / w,            // Eq. 2
        (ellipse.center[1] - cy) / h,            // Eq. 3
        (ellipse.half_axes[0] / (h / 2.0)).ln(), // Eq. 4
        (ellipse.half_axes[1] / (w / 2.0)).ln(), // Eq. 5
    ];
    t.extend(angle.encode(ellipse.angle)); // Eq. 6
    t
}

/// The ellipse that t of Eq. 2 to 6 means on a box.
fn decode_ellipse(t: &[f32], bbox: &BBox, form: AngleForm) -> Ellipse {
    let (w, h) = (bbox.width(), bbox.height());
    let center = [(bbox.x1 + bbox.x2) / 2.0 + t[0] * w, (bbox.y1 + bbox.y2) / 2.0 + t[1] * h];
    let (a, b, angle) = (h / 2.0 * t[2].exp(), w / 2.0 * t[3].exp(), form.decode(&t[4..]));
    if a >= b {
        Ellipse { center, half_axes: [a, b], angle }
    } else {
        // The major axis comes first.
        Ellipse { center, half_axes: [b, a], angle: angle + FRAC_PI_2 }
    }
}

/// A detection and the ellipse that it should be.
#[cfg(feature = "train")]
#[derive(Clone, Copy, Debug)]
pub struct EllipseSample {
    /// What the network said.
    pub features: EllipseFeatures,
    /// The box found.
    pub bbox: BBox,
    /// The annotation.
    pub ellipse: Ellipse,
}

#[cfg(feature = "train")]
impl EllipseRegressor {
    /// The weights and biases of the least sum of squared errors plus `ridge` (above 0) times the squared weights; the biases'
    /// share of it holds each to the mean of all templates, so that a template without samples has that mean.
    pub fn fit(samples: &[EllipseSample], templates: usize, angle: AngleForm, ridge: f64) -> Result<Self> {
        if samples.is_empty() {
            return Err(Error::InvalidData("no detection meets an annotated ellipse".into()));
        }
        // Unknowns of a value: the inputs' weights, the common bias, each template's departure from it.
        let n = INPUTS + 1 + templates;
        let row = |s: &EllipseSample| {
            let mut row = [(0, 0.0); INPUTS + 2];
            for (i, v) in s.features.values().into_iter().enumerate() {
                row[i] = (i, f64::from(v));
            }
            row[INPUTS] = (INPUTS, 1.0);
            row[INPUTS + 1] = (INPUTS + 1 + s.features.template, 1.0);
            row
        };
        let values = angle.values();
        let (mut normal, mut right) = (vec![vec![0.0; n]; n], vec![vec![0.0; values]; n]);
        for s in samples {
            let (row, t) = (row(s), encode_ellipse(&s.ellipse, &s.bbox, angle));
            for &(i, a) in &row {
                row.iter().for_each(|&(j, b)| normal[i][j] += a * b);
                right[i].iter_mut().zip(&t).for_each(|(r, &t)| *r += a * f64::from(t));
            }
        }
        for (i, line) in normal.iter_mut().enumerate() {
            // The common bias is free, but for what makes the system regular.
            line[i] += if i == INPUTS { 1e-9 } else { ridge };
        }
        let solution = solve(normal, right)
            .ok_or_else(|| Error::InvalidData("the ellipses do not determine a regression".into()))?;
        let of = |i: usize, value: usize| solution[i][value] as f32;
        let weights = (0..values).map(|v| std::array::from_fn(|i| of(i, v))).collect();
        let bias = |k: usize| (0..values).map(|v| of(INPUTS, v) + of(INPUTS + 1 + k, v)).collect();
        let fitted = Self { angle, weights, biases: (0..templates).map(bias).collect() };
        fitted.check(templates).map_err(|_| {
            Error::InvalidData(
                "the ellipses' values are not finite: cot has none at 0, take the double angle".into(),
            )
        })?;
        Ok(fitted)
    }
}

/// The rows x of `a x = b` for a symmetric positive definite `a`, by Cholesky's factors; None where it is not.
#[cfg(feature = "train")]
fn solve(mut a: Vec<Vec<f64>>, mut b: Vec<Vec<f64>>) -> Option<Vec<Vec<f64>>> {
    let n = a.len();
    for j in 0..n {
        for k in 0..j {
            let l = a[j][k];
            for i in j..n {
                a[i][j] -= a[i][k] * l;
            }
        }
        let pivot = a[j][j];
        if !(pivot > 0.0 && pivot.is_finite()) {
            return None;
        }
        let root = pivot.sqrt();
        (j..n).for_each(|i| a[i][j] /= root);
    }
    let values = b[0].len();
    for v in 0..values {
        for i in 0..n {
            let known: f64 = (0..i).map(|k| a[i][k] * b[k][v]).sum();
            b[i][v] = (b[i][v] - known) / a[i][i];
        }
        for i in (0..n).rev() {
            let known: f64 = (i + 1..n).map(|k| a[k][i] * b[k][v]).sum();
            b[i][v] = (b[i][v] - known) / a[i][i];
        }
    }
    Some(b)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::f32::consts::PI;

    #[test]
    fn ellipses_survive_their_code() {
        let bbox = BBox::new(10.0, 20.0, 50.0, 80.0);
        for form in [AngleForm::DoubleAngle, AngleForm::Cotangent] {
            for angle in [0.3, 1.2, PI / 2.0, 2.0, 3.0] {
                let e = Ellipse { center: [33.0, 48.0], half_axes: [35.0, 22.0], angle };
                let back = decode_ellipse(&encode_ellipse(&e, &bbox, form), &bbox, form);
                let turn = (back.angle - angle).rem_euclid(PI);
                assert!(turn.min(PI - turn) < 1e-4, "{form:?}: {angle}, {}", back.angle);
                let numbers = |e: &Ellipse| [e.center[0], e.center[1], e.half_axes[0], e.half_axes[1]];
                for (a, b) in numbers(&back).iter().zip(numbers(&e)) {
                    assert!((a - b).abs() < 1e-3, "{back:?}, {e:?}");
                }
            }
        }
        // By hand, Eq. 2 to 6: an ellipse inscribed in the box, upright.
        let inscribed = Ellipse { center: [30.0, 50.0], half_axes: [30.0, 20.0], angle: PI / 2.0 };
        let t = encode_ellipse(&inscribed, &bbox, AngleForm::Cotangent);
        assert!(t.iter().all(|v| v.abs() < 1e-6), "{t:?}");
        let t = encode_ellipse(&Ellipse { angle: PI / 4.0, ..inscribed }, &bbox, AngleForm::Cotangent);
        assert!((t[4] - 1.0).abs() < 1e-6);
    }

    #[cfg(feature = "train")]
    #[test]
    fn a_linear_relation_is_found_again() {
        use crate::graph::init::Rng;
        let mut rng = Rng::new(3);
        let truth = EllipseRegressor {
            angle: AngleForm::DoubleAngle,
            weights: (0..6).map(|_| std::array::from_fn(|_| 0.05 * rng.normal())).collect(),
            biases: (0..3).map(|k| vec![0.02 * k as f32, 0.1, 0.05, -0.1, 0.0, -1.0]).collect(),
        };
        let sample = |i: usize, rng: &mut Rng| {
            let offsets = std::array::from_fn(|_| rng.normal());
            let features = EllipseFeatures { template: i % 2, offsets, logit: rng.normal() };
            let bbox = BBox::from_xywh(100.0 * rng.uniform(), 50.0, 15.0 + 10.0 * rng.uniform(), 60.0);
            EllipseSample { features, bbox, ellipse: truth.ellipse(&bbox, &features) }
        };
        let samples: Vec<EllipseSample> = (0..400).map(|i| sample(i, &mut rng)).collect();
        let fitted = EllipseRegressor::fit(&samples, 3, AngleForm::DoubleAngle, 1e-3).unwrap();
        fitted.check(3).unwrap();
        for i in 0..50 {
            let s = sample(i, &mut rng);
            let e = fitted.ellipse(&s.bbox, &s.features);
            // The angle's two values are found up to their common length.
            let off = [e.center[0] - s.ellipse.center[0], e.half_axes[0] - s.ellipse.half_axes[0]];
            assert!(off.iter().all(|d| d.abs() < 0.5), "{e:?}, {:?}", s.ellipse);
        }
        // A template without samples takes the mean of the others.
        let mean = (fitted.biases[0][0] + fitted.biases[1][0]) / 2.0;
        assert!((fitted.biases[2][0] - mean).abs() < 0.01, "{:?}", fitted.biases);
        assert!(EllipseRegressor::fit(&[], 3, AngleForm::DoubleAngle, 1e-3).is_err());
        // cot 0 is not finite; the double angle bears it.
        let mut lying = samples.clone();
        lying[7].ellipse.angle = 0.0;
        assert!(EllipseRegressor::fit(&lying, 3, AngleForm::Cotangent, 1e-3).is_err());
        assert!(EllipseRegressor::fit(&lying, 3, AngleForm::DoubleAngle, 1e-3).is_ok());
    }
}
