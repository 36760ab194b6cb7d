//! What a detection is, to the user.

use super::boxes::BBox;

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
