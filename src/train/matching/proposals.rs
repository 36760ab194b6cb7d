//! Boxes without a grid, in an order that finds those near a face.

use super::grid::Reach;
use super::scan::Layout;
use crate::detect::BBox;

/// Boxes sorted by the x of their centres. Empty boxes and such that are not finite are left out.
pub(super) struct Proposals<'a> {
    boxes: &'a [BBox],
    /// Centre and index.
    order: Vec<(f32, u32)>,
}

impl<'a> Proposals<'a> {
    pub fn new(boxes: &'a [BBox]) -> Self {
        let sane = |b: &BBox| {
            [b.x1, b.y1, b.x2, b.y2].iter().all(|v| v.is_finite()) && b.width() > 0.0 && b.height() > 0.0
        };
        let kept = boxes.iter().enumerate().filter(|(_, b)| sane(b));
        let mut order: Vec<(f32, u32)> = kept.map(|(i, b)| ((b.x1 + b.x2) / 2.0, i as u32)).collect();
        order.sort_unstable_by(|a, b| a.0.total_cmp(&b.0));
        Self { boxes, order }
    }
}

impl Layout for Proposals<'_> {
    fn count(&self) -> usize {
        self.boxes.len()
    }

    /// An IoU of t bounds the distance of the centres: along an axis the widths b, f have t <= b / f
    /// <= 1 / t, and the centres lie at most (b + f) (1 - t) / (2 (1 + t)) <= f (1 - t) / (2 t) apart.
    /// A cover bounds nothing, since the boxes may be of any size.
    fn visit(&self, bbox: &BBox, reach: Reach, visit: &mut dyn FnMut(usize, BBox)) {
        let (center, width) = ((bbox.x1 + bbox.x2) / 2.0, bbox.width());
        if !(width > 0.0 && bbox.height() > 0.0 && (center + width).is_finite()) {
            return;
        }
        let far = match reach {
            // f32 rounds the overlap and the corners: give way by more than that.
            Reach::Iou(t) => {
                let extent = bbox.x1.abs().max(bbox.x2.abs()) + width / t;
                let t = t * (1.0 - 1e-3);
                width * (1.0 - t) / (2.0 * t) + 16.0 * f32::EPSILON * extent
            }
            Reach::Cover(_) => f32::INFINITY,
        };
        let first = self.order.partition_point(|o| o.0 < center - far);
        for &(_, i) in self.order[first..].iter().take_while(|o| o.0 <= center + far) {
            visit(i as usize, self.boxes[i as usize]);
        }
    }

    fn best(&self, bbox: &BBox) -> Option<(usize, f32)> {
        let mut best: Option<(usize, f32)> = None;
        // Any overlap at all can be the best: all boxes, of equal ones the first.
        for &(_, i) in &self.order {
            let v = self.boxes[i as usize].iou(bbox);
            if best.map_or(v > 0.0, |(k, b)| v > b || v == b && (i as usize) < k) {
                best = Some((i as usize, v));
            }
        }
        best
    }
}
