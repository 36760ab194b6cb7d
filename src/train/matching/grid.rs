//! Anchors laid out in groups, and the cells of a group that a box can reach.

use crate::detect::anchors::Anchor;
use crate::detect::BBox;
use std::ops::Range;

/// Anchors of one size on the cells of one feature map.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AnchorGroup {
    /// Cell to cell, pixels.
    pub stride: usize,
    /// Anchor width, pixels.
    pub width: f32,
    /// Anchor height, pixels.
    pub height: f32,
    /// Cells down.
    pub rows: usize,
    /// Cells across.
    pub cols: usize,
    /// Flat index of the anchor on cell (0, 0); that of cell (y, x) is `first + y * cols + x`.
    pub first: usize,
}

impl AnchorGroup {
    /// Anchors of the group.
    pub fn len(&self) -> usize {
        self.rows * self.cols
    }

    /// True without any cell.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Flat indices of the group's anchors.
    pub fn range(&self) -> Range<usize> {
        self.first..self.first + self.len()
    }

    /// The anchors' corners in order of their flat indices.
    pub fn boxes(&self) -> impl Iterator<Item = BBox> + '_ {
        (0..self.rows).flat_map(move |y| (0..self.cols).map(move |x| self.at(y, x).bbox()))
    }

    /// The anchor on the `cell`-th cell in row order.
    pub fn anchor(&self, cell: usize) -> Anchor {
        self.at(cell / self.cols, cell % self.cols)
    }

    fn at(&self, y: usize, x: usize) -> Anchor {
        let at = |i: usize| (i as f32 + 0.5) * self.stride as f32;
        Anchor { center: [at(x), at(y)], size: [self.width, self.height] }
    }
}

/// All anchors of a network for one input size.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AnchorGrid {
    /// Groups in order of their flat indices.
    pub groups: Vec<AnchorGroup>,
    /// Anchors in all.
    pub len: usize,
}

impl AnchorGrid {
    /// An empty grid.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends a group behind the others: anchors `width` x `height` pixels on `rows` x `cols` cells.
    /// Panics on a stride of 0 or a size that is not above 0.
    pub fn push(&mut self, stride: usize, width: f32, height: f32, rows: usize, cols: usize) {
        assert!(stride > 0, "an anchor group's stride is above 0");
        assert!(
            width > 0.0 && height > 0.0 && (width * height).is_finite(),
            "anchor size {width} x {height}"
        );
        let group = AnchorGroup { stride, width, height, rows, cols, first: self.len };
        self.len += group.len();
        self.groups.push(group);
    }

    /// True without any anchor.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Index of the group that holds anchor `i`. Panics from `len` on.
    pub fn group_of(&self, i: usize) -> usize {
        assert!(i < self.len, "anchor {i} of {}", self.len);
        self.groups.partition_point(|g| g.first + g.len() <= i)
    }

    /// Anchor `i`, centred at ((x + 0.5) * stride, (y + 0.5) * stride).
    pub fn anchor(&self, i: usize) -> Anchor {
        let g = &self.groups[self.group_of(i)];
        g.anchor(i - g.first)
    }

    /// Flat index ranges of the groups, as the sampler takes them.
    pub fn ranges(&self) -> Vec<Range<usize>> {
        self.groups.iter().map(AnchorGroup::range).collect()
    }
}

/// What an anchor must share with a box to be visited.
#[derive(Clone, Copy)]
pub(super) enum Reach {
    /// IoU at least this (above 0).
    Iou(f32),
    /// At least this share of the anchor's area (above 0) inside the box.
    Cover(f32),
}

/// Calls `visit(flat index, anchor box)` for a superset of the group's anchors that reach `bbox`, row
/// by row; the caller tests the exact overlap. Few others are visited: the bounds follow from
///
/// IoU >= t means I >= t (A + F) / (1 + t) for the areas A, F of anchor and face; the intersection I is
/// ox * oy; along an axis two intervals of length a, f whose centres are d apart share at most
/// (a + f) / 2 - |d|, hence |d| <= (a + f) / 2 - I / oy. First oy is at most min(a_h, f_h), which
/// bounds the rows; then each row knows its own oy, which bounds its columns.
pub(super) fn visit_reachable(
    g: &AnchorGroup,
    bbox: &BBox,
    reach: Reach,
    mut visit: impl FnMut(usize, BBox),
) {
    let [aw, ah] = [f64::from(g.width), f64::from(g.height)];
    let [x1, y1, x2, y2] = [bbox.x1, bbox.y1, bbox.x2, bbox.y2].map(f64::from);
    let (fw, fh) = (x2 - x1, y2 - y1);
    if !(fw > 0.0 && fh > 0.0 && [x1, y1, x2, y2].iter().all(|v| v.is_finite())) {
        return;
    }
    let need = match reach {
        Reach::Iou(t) => f64::from(t) * (aw * ah + fw * fh) / (1.0 + f64::from(t)),
        Reach::Cover(t) => f64::from(t) * aw * ah,
    };
    // The caller's overlap is computed in f32: an edge is off by up to an ulp of the coordinates, the
    // products by a few more. Bounds give way by several times that.
    let stride = g.stride as f64;
    let extent = [x1, y1, x2, y2, g.cols as f64 * stride + aw, g.rows as f64 * stride + ah];
    let edge = 4.0 * f64::from(f32::EPSILON) * extent.iter().fold(0.0, |m: f64, v| m.max(v.abs()));
    let need = need * (1.0 - 1e-5) - edge * (aw + ah + fw + fh);
    let (widest, highest) = (aw.min(fw), ah.min(fh));
    if need > widest * highest {
        return;
    }
    // Cells whose centres lie within `far` of `center`.
    let cells = |center: f64, far: f64, count: usize| {
        let at = |v: f64| (v / stride - 0.5).clamp(0.0, count as f64);
        at(center - far).ceil() as usize..(at(center + far).floor() as usize + 1).min(count)
    };
    let far = |a: f64, f: f64, least: f64| (a + f) / 2.0 - least + edge;
    let (cx, cy) = ((x1 + x2) / 2.0, (y1 + y2) / 2.0);
    for y in cells(cy, far(ah, fh, (need / widest).max(0.0)), g.rows) {
        let dy = ((y as f64 + 0.5) * stride - cy).abs();
        let oy = highest.min((ah + fh) / 2.0 - dy + edge);
        if oy <= 0.0 {
            continue;
        }
        for x in cells(cx, far(aw, fw, (need / oy).max(0.0)), g.cols) {
            visit(g.first + y * g.cols + x, g.at(y, x).bbox());
        }
    }
}

/// The group's anchor of the highest IoU with `bbox`, among equal ones the one nearest to its centre:
/// along each axis the overlap only falls with the distance of the centres, so it is on the nearest
/// cell. None in an empty group.
pub(super) fn nearest(g: &AnchorGroup, bbox: &BBox) -> Option<(usize, BBox)> {
    if g.is_empty() {
        return None;
    }
    let cell = |low: f32, high: f32, count: usize| {
        let v = (f64::from(low) + f64::from(high)) / 2.0 / g.stride as f64;
        (v.max(0.0) as usize).min(count - 1)
    };
    let (y, x) = (cell(bbox.y1, bbox.y2, g.rows), cell(bbox.x1, bbox.x2, g.cols));
    Some((g.first + y * g.cols + x, g.at(y, x).bbox()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flat_indices_run_over_groups_rows_and_columns() {
        let mut grid = AnchorGrid::new();
        grid.push(4, 16.0, 20.0, 2, 3);
        grid.push(8, 32.0, 32.0, 0, 5);
        grid.push(8, 64.0, 64.0, 1, 2);
        assert_eq!((grid.len, grid.ranges()), (8, vec![0..6, 6..6, 6..8]));
        assert_eq!((grid.group_of(5), grid.group_of(6)), (0, 2));
        assert_eq!(grid.anchor(4), Anchor { center: [6.0, 6.0], size: [16.0, 20.0] });
        assert_eq!(grid.anchor(7), Anchor { center: [12.0, 4.0], size: [64.0, 64.0] });
        assert_eq!(grid.anchor(7).bbox(), grid.anchor(7).decode(&[0.0; 4], [1.0; 2]));
    }

    #[test]
    fn few_cells_are_visited_in_vain() {
        let mut grid = AnchorGrid::new();
        for side in [16.0, 32.0, 64.0, 128.0] {
            grid.push(4, side, side, 256, 256);
        }
        let (mut visited, mut reached) = (0, 0);
        for side in [12.0, 17.0, 30.0, 50.0, 90.0, 200.0] {
            let face = BBox::from_xywh(301.7, 222.2, side, side * 1.2);
            for g in &grid.groups {
                visit_reachable(g, &face, Reach::Iou(0.4), |_, b| {
                    visited += 1;
                    reached += usize::from(b.iou(&face) >= 0.4);
                });
            }
        }
        assert!(reached > 500 && visited < 2 * reached, "{visited} visited, {reached} reached");
    }
}
