//! What a detection is, to the user.

use super::boxes::{BBox, Detection};
use crate::pixels::Placement;

/// Ellipse around a face, for models with the regressor (HR, Eq. 2-6).
#[derive(Clone, Copy, Debug, PartialEq, Default)]
pub struct Ellipse {
    /// Centre, pixels.
    pub center: [f32; 2],
    /// Half-axes: major, minor, pixels.
    pub half_axes: [f32; 2],
    /// Direction of the major axis in radians from the x axis, towards positive y.
    pub angle: f32,
}

/// A face. Coordinates are pixels of the picture as given (before its orientation); a box may
/// reach past the border where the face does.
#[derive(Clone, Copy, Debug, PartialEq, Default)]
pub struct Face {
    /// Box.
    pub bbox: BBox,
    /// Probability, 0 to 1.
    pub score: f32,
    /// Eyes, nose, corners of the mouth, the picture's left one first in the upright picture; for
    /// models that have them.
    pub landmarks: Option<[[f32; 2]; 5]>,
    /// Ellipse, for models that have it.
    pub ellipse: Option<Ellipse>,
}

impl Face {
    /// Longer side of the box, pixels: the size that `min_face_px` and `max_face_px` speak of.
    pub fn size(&self) -> f32 {
        self.bbox.width().max(self.bbox.height())
    }

    /// Whether this face is of a size asked for, between `min` and `max` (0 = no limit) pixels, and a
    /// face at all: weights can be anything, and so can what they make of a picture.
    pub(crate) fn is_wanted(&self, (min, max): (f32, f32)) -> bool {
        let b = self.bbox;
        let finite = |values: &[f32]| values.iter().all(|v| v.is_finite());
        let sane = finite(&[b.x1, b.y1, b.width(), b.height()])
            && b.width() > 0.0
            && b.height() > 0.0
            && self.landmarks.is_none_or(|points| finite(points.as_flattened()))
            && self
                .ellipse
                .is_none_or(|e| finite(&[e.center[0], e.center[1], e.half_axes[0], e.half_axes[1], e.angle]));
        let size = self.size();
        sane && size >= min && (max == 0.0 || size <= max)
    }

    /// This face in pixels of the picture as stored.
    pub(crate) fn stored(&self, placement: &Placement) -> Self {
        let b = self.bbox;
        let [x, y, w, h] = placement.stored_box([b.x1, b.y1, b.width(), b.height()]);
        // Untouched corners where nothing turns, so that no rounding creeps in.
        let plain = !placement.transposed() && !placement.flip_x() && !placement.flip_y();
        let (dx, dy) = (placement.roi().x as f32, placement.roi().y as f32);
        let bbox = if plain {
            BBox::new(b.x1 + dx, b.y1 + dy, b.x2 + dx, b.y2 + dy)
        } else {
            BBox::from_xywh(x, y, w, h)
        };
        Self {
            bbox,
            score: self.score,
            landmarks: self.landmarks.map(|points| points.map(|p| placement.stored_point(p))),
            ellipse: self.ellipse.map(|e| {
                let [dx, dy] = placement.stored_direction([e.angle.cos(), e.angle.sin()]);
                Ellipse { center: placement.stored_point(e.center), angle: dy.atan2(dx), ..e }
            }),
        }
    }

    /// Its box and score.
    pub(crate) fn detection(&self) -> Detection {
        Detection { bbox: self.bbox, score: self.score }
    }

    /// This face where a picture `width` wide is mirrored, left and right exchanged.
    pub(crate) fn mirrored(mut self, width: f32) -> Self {
        let b = self.bbox;
        self.bbox = BBox::new(width - b.x2, b.y1, width - b.x1, b.y2);
        if let Some(points) = &mut self.landmarks {
            points.iter_mut().for_each(|p| p[0] = width - p[0]);
            // The left eye is now the right one, and so is the corner of the mouth.
            points.swap(0, 1);
            points.swap(3, 4);
        }
        if let Some(e) = &mut self.ellipse {
            e.center[0] = width - e.center[0];
            e.angle = e.angle.sin().atan2(-e.angle.cos());
        }
        self
    }

    /// This face with every coordinate scaled by `factor` after moving by `offset`.
    pub(crate) fn placed(mut self, offset: [f32; 2], factor: [f32; 2]) -> Self {
        let x = |v: f32| (v + offset[0]) * factor[0];
        let y = |v: f32| (v + offset[1]) * factor[1];
        let b = self.bbox;
        self.bbox = BBox::new(x(b.x1), y(b.y1), x(b.x2), y(b.y2));
        if let Some(points) = &mut self.landmarks {
            points.iter_mut().for_each(|p| *p = [x(p[0]), y(p[1])]);
        }
        if let Some(e) = &mut self.ellipse {
            e.center = [x(e.center[0]), y(e.center[1])];
            let mean = (factor[0] * factor[1]).sqrt();
            e.half_axes = e.half_axes.map(|a| a * mean);
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mirrored_face_exchanges_left_and_right_and_comes_back() {
        let face = Face {
            bbox: BBox::new(10.0, 20.0, 40.0, 60.0),
            score: 0.5,
            landmarks: Some([[16.0, 32.0], [32.0, 33.0], [25.0, 40.0], [18.0, 50.0], [31.0, 51.0]]),
            ellipse: Some(Ellipse { center: [24.0, 41.0], half_axes: [20.0, 15.0], angle: 0.25 }),
        };
        let mirrored = face.mirrored(100.0);
        assert_eq!(mirrored.bbox, BBox::new(60.0, 20.0, 90.0, 60.0));
        let points = [[68.0, 33.0], [84.0, 32.0], [75.0, 40.0], [69.0, 51.0], [82.0, 50.0]];
        assert_eq!(mirrored.landmarks, Some(points));
        let e = mirrored.ellipse.unwrap();
        assert_eq!((e.center, e.half_axes), ([76.0, 41.0], [20.0, 15.0]));
        assert!((e.angle - (std::f32::consts::PI - 0.25)).abs() < 1e-6);
        let back = mirrored.mirrored(100.0);
        assert_eq!((back.bbox, back.landmarks), (face.bbox, face.landmarks));
        assert!((back.ellipse.unwrap().angle - 0.25).abs() < 1e-6);
    }
}
