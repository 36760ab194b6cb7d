//! Anchor boxes on the cells of a feature map, and the code that relates a box to its anchor.

use super::boxes::BBox;
use super::detector::{logit, sigmoid, Map, Span, Window};
use super::face::Face;
use std::ops::Range;

/// An anchor by its centre and size, network pixels.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Anchor {
    /// Centre.
    pub center: [f32; 2],
    /// Width and height.
    pub size: [f32; 2],
}

impl Anchor {
    /// Square anchor on cell (y, x): centred at (cell + 0.5) * stride.
    pub fn square(y: usize, x: usize, stride: usize, side: f32) -> Self {
        Self::on_cell(y, x, stride, [side, side])
    }

    /// Anchor of width and height `size` on cell (y, x): centred at (cell + 0.5) * stride.
    pub fn on_cell(y: usize, x: usize, stride: usize, size: [f32; 2]) -> Self {
        let at = |i: usize| (i as f32 + 0.5) * stride as f32;
        Self { center: [at(x), at(y)], size }
    }

    /// The anchor that a box is.
    pub fn of(b: &BBox) -> Self {
        Self { center: [(b.x1 + b.x2) / 2.0, (b.y1 + b.y2) / 2.0], size: [b.width(), b.height()] }
    }

    /// The box that offsets `t` = tx, ty, tw, th mean on this anchor:
    /// centre + t * variance * size; size * exp(t * variance) (SSD's code; variances 1 give
    /// tx = (xc - xa) / wa, tw = ln(w / wa)).
    pub fn decode(&self, t: &[f32], variances: [f32; 2]) -> BBox {
        let [cx, cy] = self.point(&t[..2], variances[0]);
        let w = self.size[0] * (t[2] * variances[1]).exp();
        let h = self.size[1] * (t[3] * variances[1]).exp();
        BBox::new(cx - w / 2.0, cy - h / 2.0, cx + w / 2.0, cy + h / 2.0)
    }

    /// Its corners.
    pub fn bbox(&self) -> BBox {
        let [w, h] = self.size.map(|side| side / 2.0);
        BBox::new(self.center[0] - w, self.center[1] - h, self.center[0] + w, self.center[1] + h)
    }

    /// The anchor on the box that offsets `t` mean, as [`decode`](Self::decode): where a first step moves it for a second.
    pub fn moved(&self, t: &[f32], variances: [f32; 2]) -> Self {
        Self::of(&self.decode(t, variances))
    }

    /// The point that offsets `t` = tx, ty mean: centre + t * variance * size.
    pub fn point(&self, t: &[f32], variance: f32) -> [f32; 2] {
        [self.center[0] + t[0] * variance * self.size[0], self.center[1] + t[1] * variance * self.size[1]]
    }
}

/// Cells along one axis whose centres, (i + 0.5) * stride, the span owns, and which do not begin behind the picture's end.
pub fn owned_cells(span: &Span, stride: usize, cells: usize) -> Range<usize> {
    let Span { owned, end } = span;
    let cells = cells.min((end / stride as f32).ceil() as usize);
    let first = |edge: f32| {
        let i = (edge / stride as f32 - 0.5).ceil().max(0.0);
        (i as usize).min(cells)
    };
    let start = first(owned.start);
    start..first(owned.end).max(start)
}

/// The anchors that a level has on each of its cells.
pub(super) struct LevelAnchors<'a> {
    /// Pixels between cells.
    pub stride: usize,
    /// Width and height of each, pixels.
    pub sizes: &'a [[f32; 2]],
    /// Of centre and size in the box code.
    pub variances: [f32; 2],
    /// How far from its cell's centre a box may reach, along an axis; it is cut there. None: anywhere.
    pub reach: Option<f32>,
}

/// Gives `sink` what a level with maps of its own for classes and boxes finds in its owned cells, in their order. Of classes
/// it has one logit an anchor, or two: background and face, whose softmax is the sigmoid of their difference.
pub(super) fn decode_level(
    [class, boxes]: [&Map<'_>; 2],
    anchors: &LevelAnchors<'_>,
    window: &Window,
    threshold: f32,
    sink: &mut dyn FnMut(Face),
) {
    let least = logit(threshold);
    let &LevelAnchors { stride, sizes, variances, reach } = anchors;
    for y in owned_cells(&window.owned_y, stride, class.height()) {
        for x in owned_cells(&window.owned_x, stride, class.width()) {
            let cell = class.pixel(y, x);
            for (a, logits) in cell.chunks_exact(cell.len() / sizes.len()).enumerate() {
                let logit = match *logits {
                    [background, face] => face - background,
                    _ => logits[0],
                };
                // False for a NaN too.
                let face = logit > least;
                if !face {
                    continue;
                }
                let anchor = Anchor::on_cell(y, x, stride, sizes[a]);
                let mut bbox = anchor.decode(&boxes.pixel(y, x)[4 * a..], variances);
                // What is no number stays one.
                if let Some(reach) = reach.filter(|_| bbox.width().is_finite() && bbox.height().is_finite()) {
                    bbox = bbox.within(&Anchor { size: [2.0 * reach; 2], ..anchor }.bbox());
                }
                sink(Face { bbox, score: sigmoid(logit), ..Face::default() });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_offsets_give_the_anchor_back() {
        let a = Anchor::square(1, 2, 8, 16.0);
        assert_eq!(a.center, [20.0, 12.0]);
        assert_eq!(a.decode(&[0.0; 4], [0.1, 0.2]), BBox::new(12.0, 4.0, 28.0, 20.0));
        let b = a.decode(&[1.0, -1.0, 2f32.ln(), 0.0], [1.0, 1.0]);
        assert!((b.width() - 32.0).abs() < 1e-4 && (b.x1 - 20.0).abs() < 1e-4 && (b.y1 + 12.0).abs() < 1e-4);
    }

    #[test]
    fn every_cell_belongs_to_exactly_one_of_adjoining_ranges() {
        for stride in [4, 8, 32] {
            let cells = 40;
            let span = |owned| Span { owned, end: f32::INFINITY };
            let a = owned_cells(&span(f32::NEG_INFINITY..96.0), stride, cells);
            let b = owned_cells(&span(96.0..160.0), stride, cells);
            let c = owned_cells(&span(160.0..f32::INFINITY), stride, cells);
            assert_eq!((a.start, a.end, b.end, c.end), (0, b.start, c.start, cells), "stride {stride}");
            // The last cell may reach over the end, but not begin behind it.
            let cut = owned_cells(&Span { end: 97.0, ..Span::WHOLE }, stride, cells);
            assert_eq!(cut, 0..97usize.div_ceil(stride));
        }
    }
}
