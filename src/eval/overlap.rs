//! Intersection over union, as each protocol counts pixels.

use crate::detect::BBox;

/// IoU where a box covers its last row and column too: side = x2 - x1 + 1.
///
/// The convention of PASCAL VOC, which the WIDER FACE evaluator keeps though its boxes are x, y,
/// width, height: x2 = x + w there.
pub fn iou_inclusive(a: &BBox, b: &BBox) -> f64 {
    iou_with_border(a, b, 1.0)
}

/// IoU of continuous boxes: side = x2 - x1, as COCO counts. 0 where both are empty.
pub fn iou_continuous(a: &BBox, b: &BBox) -> f64 {
    iou_with_border(a, b, 0.0)
}

/// In f64: thresholds like 0.5 are met exactly by integer boxes, and f32 products of large sides
/// would decide them by rounding.
fn iou_with_border(a: &BBox, b: &BBox, border: f64) -> f64 {
    let side = |lo: f32, hi: f32| (hi as f64 - lo as f64 + border).max(0.0);
    let inter = side(a.x1.max(b.x1), a.x2.min(b.x2)) * side(a.y1.max(b.y1), a.y2.min(b.y2));
    let union = side(a.x1, a.x2) * side(a.y1, a.y2) + side(b.x1, b.x2) * side(b.y1, b.y2) - inter;
    if union > 0.0 {
        inter / union
    } else {
        0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn inclusive_boxes_have_one_pixel_more_each_way() {
        let a = BBox::from_xywh(0.0, 0.0, 9.0, 9.0); // 10 x 10 pixels
        let b = BBox::from_xywh(0.0, 5.0, 9.0, 9.0); // shares 10 x 5
        assert_eq!(iou_inclusive(&a, &b), 50.0 / 150.0);
        assert_eq!(iou_continuous(&a, &b), 36.0 / 126.0);
        // Touching edges share a pixel line only in the inclusive convention.
        let c = BBox::from_xywh(9.0, 0.0, 9.0, 9.0);
        assert_eq!(iou_inclusive(&a, &c), 10.0 / 190.0);
        assert_eq!(iou_continuous(&a, &c), 0.0);
    }

    #[test]
    fn empty_boxes_overlap_nothing() {
        let empty = BBox::from_xywh(3.0, 3.0, 0.0, 0.0);
        assert_eq!(iou_continuous(&empty, &empty), 0.0);
        assert_eq!(iou_inclusive(&empty, &empty), 1.0);
    }

    proptest! {
        #[test]
        fn iou_is_symmetric_and_within_unit(
            v in proptest::array::uniform8(0.0f32..200.0),
        ) {
            let a = BBox::from_xywh(v[0], v[1], v[2], v[3]);
            let b = BBox::from_xywh(v[4], v[5], v[6], v[7]);
            for iou in [iou_inclusive, iou_continuous] {
                prop_assert_eq!(iou(&a, &b), iou(&b, &a));
                prop_assert!((0.0..=1.0).contains(&iou(&a, &b)));
            }
            prop_assert_eq!(iou_inclusive(&a, &a), 1.0);
        }
    }
}
