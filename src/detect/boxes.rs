//! Boxes and their overlap.

/// Axis-aligned box with continuous corners: width = x2 - x1.
#[derive(Clone, Copy, Debug, PartialEq, Default)]
pub struct BBox {
    /// Left.
    pub x1: f32,
    /// Top.
    pub y1: f32,
    /// Right.
    pub x2: f32,
    /// Bottom.
    pub y2: f32,
}

impl BBox {
    /// From corners.
    pub const fn new(x1: f32, y1: f32, x2: f32, y2: f32) -> Self {
        Self { x1, y1, x2, y2 }
    }

    /// From corner and size.
    pub const fn from_xywh(x: f32, y: f32, w: f32, h: f32) -> Self {
        Self { x1: x, y1: y, x2: x + w, y2: y + h }
    }

    /// Width.
    pub fn width(&self) -> f32 {
        self.x2 - self.x1
    }

    /// Height.
    pub fn height(&self) -> f32 {
        self.y2 - self.y1
    }

    /// Area, 0 for an inverted box.
    pub fn area(&self) -> f32 {
        self.width().max(0.0) * self.height().max(0.0)
    }

    /// The part in `other`; inverted where there is none.
    pub fn within(&self, other: &Self) -> Self {
        Self {
            x1: self.x1.max(other.x1),
            y1: self.y1.max(other.y1),
            x2: self.x2.min(other.x2),
            y2: self.y2.min(other.y2),
        }
    }

    /// Area that two boxes share.
    fn intersection(&self, other: &Self) -> f32 {
        let w = (self.x2.min(other.x2) - self.x1.max(other.x1)).max(0.0);
        let h = (self.y2.min(other.y2) - self.y1.max(other.y1)).max(0.0);
        w * h
    }

    /// Share of this box's area that lies in the other; NaN where it has none.
    #[cfg(feature = "train")]
    pub fn share_in(&self, other: &Self) -> f32 {
        self.intersection(other) / self.area()
    }

    /// Intersection over union of two continuous boxes; 0 where either is empty.
    pub fn iou(&self, other: &Self) -> f32 {
        let inter = self.intersection(other);
        let union = self.area() + other.area() - inter;
        if union > 0.0 {
            inter / union
        } else {
            0.0
        }
    }
}

/// A scored box.
#[derive(Clone, Copy, Debug, PartialEq, Default)]
pub struct Detection {
    /// Box in pixels.
    pub bbox: BBox,
    /// Confidence, 0 to 1.
    pub score: f32,
}

/// Intersection over union as the detector's authors computed it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Convention {
    /// Width = x2 - x1.
    Continuous,
    /// Width = x2 - x1 + 1 (inclusive pixel corners), in areas and overlaps.
    PlusOne,
}

impl Convention {
    pub(super) fn extra(self) -> f32 {
        match self {
            Convention::Continuous => 0.0,
            Convention::PlusOne => 1.0,
        }
    }

    /// Areas of intersection and union.
    pub(super) fn areas(self, a: &BBox, b: &BBox) -> (f32, f32) {
        let e = self.extra();
        let w = (a.x2.min(b.x2) - a.x1.max(b.x1) + e).max(0.0);
        let h = (a.y2.min(b.y2) - a.y1.max(b.y1) + e).max(0.0);
        let area = |r: &BBox| (r.width() + e) * (r.height() + e);
        let inter = w * h;
        (inter, area(a) + area(b) - inter)
    }

    /// Whether two boxes overlap by more than `threshold`.
    pub(super) fn exceeds(self, a: &BBox, b: &BBox, threshold: f32) -> bool {
        let (inter, union) = self.areas(a, b);
        inter > threshold * union
    }
}
