//! HR's ellipse regression (appendix B) fitted to pictures that are annotated with ellipses, and how well it does on those held
//! back.

use super::data::Picture;
use crate::cpu::{Arena, Pool};
use crate::detect::config::DetectorConfig;
use crate::detect::detector::{Map, Window};
use crate::detect::hr::{AngleForm, EllipseRegressor, EllipseSample, HrConfig};
use crate::detect::{BBox, Ellipse, Model, Options, Precision, Pyramid};
use crate::error::{Error, Result};
use crate::eval::fddb::Region;
use crate::graph::Plan;
use crate::pixels::{
    fill, pyramid, DstRows, ImageView, PixelFormat, PyramidLimits, PyramidPolicy, Rect, Scratch, Size,
};
use crate::shape::Shape;

/// IoU with an ellipse's bounding box from which a detection is one of its face.
const FOUND_IOU: f32 = 0.5;

/// The HR settings of a model; an error for another detector.
pub fn hr_of(model: &Model) -> Result<&HrConfig> {
    match &model.config().detector {
        DetectorConfig::Hr(hr) => Ok(hr),
        _ => Err(Error::InvalidArgument(format!(
            "{} is not an HR detector: ellipses are regressed from its templates",
            model.config().name
        ))),
    }
}

/// For each ellipse the strongest detection of its face on any level that the model is evaluated on, where there is one with
/// a score above the model's threshold.
pub fn ellipse_samples(
    model: &Model,
    picture: &Picture,
    ellipses: &[Ellipse],
    threads: usize,
) -> Result<Vec<EllipseSample>> {
    let hr = hr_of(model)?;
    let options = Options::for_evaluation(model.config());
    let size = Size::new(picture.width, picture.height);
    let policy = match (options.pyramid, model.config().pyramid) {
        (Pyramid::Octaves { min, max, step }, _) => {
            PyramidPolicy::Octaves { min: min.into(), max: max.into(), step: step.into() }
        }
        (_, Some(own)) => PyramidPolicy::Scales(own.scales([size.width as f64, size.height as f64])),
        _ => PyramidPolicy::Scales(vec![1.0]),
    };
    let view = ImageView::packed(picture.width, picture.height, PixelFormat::Rgb8, &picture.pixels)?;
    let network = model.network(Precision::F32)?;
    let (mut arena, mut scratch) = (Arena::default(), Scratch::default());
    let mut pool = Pool::new(threads).map_err(|e| Error::Unsupported(format!("threads: {e}")))?;
    let mut best: Vec<Option<(f32, EllipseSample)>> = vec![None; ellipses.len()];
    for level in pyramid(size, &policy, &PyramidLimits::default())? {
        let Size { width, height } = level.size;
        let plan = Plan::new(&network, &[Shape::new(1, 3, height, width)])?;
        arena.reserve(plan.floats())?;
        let input = plan.inputs()[0];
        let mut rows = DstRows::new(&mut arena.floats_mut()[input.offset..], input.row, input.pixel);
        let whole = Rect { x: 0, y: 0, width, height };
        fill(&view, level.size, whole, 0..height, model.normalization(), &mut rows, &mut scratch)?;
        plan.run(&mut arena, &mut pool);
        let map = Map::new(arena.floats(), plan.outputs()[0]);
        let window = Window { scale: level.scale as f32, ..Window::whole() };
        let to_upright = level.to_upright(size);
        hr.candidates(&map, &window, model.config().score_threshold, &mut |face, features| {
            let face = face.placed([0.0; 2], to_upright);
            for (ellipse, best) in ellipses.iter().zip(&mut best) {
                let better = best.as_ref().is_none_or(|(score, _)| face.score > *score);
                if better && bounds(ellipse).iou(&face.bbox) >= FOUND_IOU {
                    *best =
                        Some((face.score, EllipseSample { features, bbox: face.bbox, ellipse: *ellipse }));
                }
            }
        });
    }
    Ok(best.into_iter().flatten().map(|(_, sample)| sample).collect())
}

/// Mean overlap (IoU of the areas) with the annotated ellipses.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Overlaps {
    /// Of the boxes that the ellipses are regressed from.
    pub boxes: f64,
    /// Of the regressed ellipses, each by a regression that has not seen its fold.
    pub ellipses: f64,
}

/// A regression over all `folds`, and the overlaps of each fold with what is fitted to the others. `templates` and `ridge` as
/// [`EllipseRegressor::fit`] has them.
pub fn cross_validated(
    folds: &[Vec<EllipseSample>],
    templates: usize,
    angle: AngleForm,
    ridge: f64,
) -> Result<(EllipseRegressor, Overlaps)> {
    if folds.len() < 2 {
        return Err(Error::InvalidArgument("cross-validation needs two folds or more".into()));
    }
    let all = folds.concat();
    let (mut boxes, mut ellipses) = (0.0, 0.0);
    for (held, fold) in folds.iter().enumerate() {
        let rest: Vec<EllipseSample> =
            folds.iter().enumerate().filter(|(i, _)| *i != held).flat_map(|(_, f)| f).copied().collect();
        let fitted = EllipseRegressor::fit(&rest, templates, angle, ridge)?;
        for s in fold {
            let truth = region(&s.ellipse);
            boxes += overlap(&rectangle(&s.bbox), &truth);
            ellipses += overlap(&region(&fitted.ellipse(&s.bbox, &s.features)), &truth);
        }
    }
    let count = all.len().max(1) as f64;
    let fitted = EllipseRegressor::fit(&all, templates, angle, ridge)?;
    Ok((fitted, Overlaps { boxes: boxes / count, ellipses: ellipses / count }))
}

fn region(e: &Ellipse) -> Region {
    let [major, minor] = e.half_axes.map(f64::from);
    let [cx, cy] = e.center.map(f64::from);
    Region::Ellipse { major, minor, angle: e.angle.into(), cx, cy }
}

fn rectangle(b: &BBox) -> Region {
    Region::Rectangle { x: b.x1.into(), y: b.y1.into(), w: b.width().into(), h: b.height().into() }
}

/// The box around an ellipse.
fn bounds(e: &Ellipse) -> BBox {
    let [x1, y1, x2, y2] = region(e).bounds().map(|v| v as f32);
    BBox::new(x1, y1, x2, y2)
}

/// IoU of two outlines, of their pixels as FDDB's evaluator draws them.
fn overlap(a: &Region, b: &Region) -> f64 {
    let (p, q) = (a.bounds(), b.bounds());
    let [left, top] = [0, 1].map(|i| p[i].min(q[i]).floor() - 2.0);
    let [right, bottom] = [2, 3].map(|i| p[i].max(q[i]).ceil() + 2.0);
    let sides = [right - left, bottom - top].map(|v| v.clamp(1.0, 4096.0) as u32);
    let [a, b] = [a, b].map(|r| r.moved(-left, -top).rasterise(sides[0], sides[1]));
    a.iou(&b)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::detect::hr::EllipseFeatures;
    use crate::graph::init::Rng;
    use std::f32::consts::FRAC_PI_2;

    /// Faces that lean as their tx says, in boxes around them.
    #[test]
    fn ellipses_regressed_on_held_back_folds_overlap_more_than_boxes() {
        let mut rng = Rng::new(5);
        let mut sample = || {
            let lean = 0.4 * rng.normal().clamp(-1.5, 1.5);
            let ellipse =
                Ellipse { center: [100.0, 120.0], half_axes: [60.0, 40.0], angle: FRAC_PI_2 + lean };
            let features = EllipseFeatures {
                template: rng.below(3),
                offsets: [lean, 0.1 * rng.normal(), 0.0, 0.0],
                logit: rng.normal(),
            };
            EllipseSample { features, bbox: bounds(&ellipse), ellipse }
        };
        let folds: Vec<Vec<EllipseSample>> = (0..10).map(|_| (0..12).map(|_| sample()).collect()).collect();
        for form in [AngleForm::DoubleAngle, AngleForm::Cotangent] {
            let (fitted, overlaps) = cross_validated(&folds, 3, form, 1e-2).unwrap();
            assert!(overlaps.boxes < 0.85 && overlaps.ellipses > 0.93, "{form:?}: {overlaps:?}");
            assert_eq!(fitted.biases.len(), 3);
        }
        assert!(cross_validated(&folds[..1], 3, AngleForm::DoubleAngle, 1.0).is_err());
    }

    #[test]
    fn an_outline_overlaps_itself_wholly_wherever_it_is() {
        let e = Ellipse { center: [-50.5, 20.0], half_axes: [30.0, 20.0], angle: 0.7 };
        assert_eq!(overlap(&region(&e), &region(&e)), 1.0);
        let inscribed = overlap(&region(&e), &rectangle(&BBox::new(-300.0, -300.0, 300.0, 300.0)));
        assert!(inscribed < 0.01);
    }
}
