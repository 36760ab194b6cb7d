//! From heads to what a device's kernels take, and from what they find to faces.

use super::{Extras, Field, Head};
use crate::detect::anchors::owned_cells;
use crate::detect::boxes::BBox;
use crate::detect::detector::{logit, Detector, Window};
use crate::detect::face::Face;
use crate::detect::nms::{Rule, Suppression};
use crate::gpu::faces::{Candidate, Level, Settings, Values};
use crate::gpu::map::DeviceView;

impl Head {
    /// The level on the cells of a run that are its own; None where an output that it needs was not computed. `outputs` are the
    /// graph's in order, None where nothing was wanted.
    pub fn level(&self, outputs: &[Option<DeviceView>], window: &Window) -> Option<Level> {
        let values = |f: Field| {
            let view = outputs.get(f.output).copied().flatten()?;
            Some(Values { view, first: f.first, anchor: f.anchor, value: f.value })
        };
        // A first step that is missing must not pass for one that there never was.
        let maybe = |field: Option<Field>| field.map_or(Some(None), |f| values(f).map(Some));
        let landmarks = match self.extras {
            Extras::Landmarks(field) => Some(field),
            Extras::None | Extras::Ellipse => None,
        };
        let logits = values(self.logits)?;
        Some(Level {
            logits,
            pair: self.pair,
            boxes: values(self.boxes)?,
            filter: maybe(self.filter.map(|f| f.0))?.zip(self.filter.map(|f| f.1)),
            mover: maybe(self.mover)?,
            landmarks: maybe(landmarks)?,
            features: self.extras == Extras::Ellipse,
            rows: owned_cells(&window.owned_y, self.stride, logits.view.shape.h),
            columns: owned_cells(&window.owned_x, self.stride, logits.view.shape.w),
            stride: self.stride as f32,
            center: self.center,
            anchors: self.anchors.clone(),
            variances: self.variances,
            reach: self.reach,
        })
    }
}

/// What a detection asks for: faces above this score, of longer sides between these pixels (0 = no limit), the best so many
/// candidates. Suppression other than greedy is the host's: all candidates come, sorted.
pub fn settings(threshold: f32, [min_px, max_px]: [f32; 2], max_candidates: usize, rule: &Rule) -> Settings {
    let most = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    Settings {
        least: logit(threshold),
        iou: rule.iou,
        extra: rule.convention.extra(),
        min_px,
        max_px,
        max_candidates: most(max_candidates),
        max_faces: most(rule.limit),
        suppress: u32::from(rule.suppression == Suppression::Greedy),
    }
}

/// The face that a candidate is, in pixels of the upright picture, which is `width` pixels wide. `extras` are those of the detector's
/// heads.
pub fn face(detector: &dyn Detector, extras: Extras, found: &Candidate, width: f32) -> Face {
    let [x1, y1, x2, y2] = found.bbox;
    let bbox = BBox::new(x1, y1, x2, y2);
    let [v @ .., _] = found.extras;
    let ellipse = || {
        let [template, tx, ty, tw, th, logit, fx, fy, mirrored] = v;
        // Where the box is does not matter to the ellipse on it: back to the network's pixels but for the offset.
        let seen = if mirrored != 0.0 { BBox { x1: width - x2, x2: width - x1, ..bbox } } else { bbox };
        let seen = BBox::new(seen.x1 / fx, seen.y1 / fy, seen.x2 / fx, seen.y2 / fy);
        let ellipse = detector.ellipse(&seen, template as usize, [tx, ty, tw, th], logit);
        let placed = Face { bbox: seen, ellipse, ..Face::default() }.placed([0.0; 2], [fx, fy]);
        if mirrored != 0.0 {
            placed.mirrored(width).ellipse
        } else {
            placed.ellipse
        }
    };
    Face {
        bbox,
        score: found.score,
        landmarks: match extras {
            Extras::Landmarks(_) => {
                Some(std::array::from_fn(|i| [found.extras[2 * i], found.extras[2 * i + 1]]))
            }
            Extras::None | Extras::Ellipse => None,
        },
        ellipse: if extras == Extras::Ellipse { ellipse() } else { None },
    }
}
