//! Bounding box voting (Gidaris and Komodakis 2015, section 5).

use super::neighbours::{Neighbours, Place};
use crate::detect::boxes::{BBox, Convention, Detection};

/// The candidates of a picture, to vote.
pub(super) struct Voters<'a, F> {
    /// Those hashed, by number; None where all are asked.
    pub hashed: Option<&'a Neighbours>,
    /// How many there are.
    pub count: usize,
    /// Each of them.
    pub candidate: F,
    /// Those vote that overlap by more than this.
    pub iou: f32,
    /// What overlap is.
    pub convention: Convention,
}

impl<F: Fn(usize) -> Detection> Voters<'_, F> {
    /// Mean box of those that overlap `b` by more than the voting IoU, each weighted with its score; `b` where none has a say.
    pub fn mean(&self, b: &BBox) -> BBox {
        let Self { count, iou, convention, .. } = *self;
        let (mut sum, mut weight) = ([0.0f64; 4], 0.0f64);
        let mut take = |c: &Detection| {
            let score = f64::from(c.score);
            let corners = [c.bbox.x1, c.bbox.y1, c.bbox.x2, c.bbox.y2];
            sum.iter_mut().zip(corners).for_each(|(s, v)| *s += score * f64::from(v));
            weight += score;
        };
        match self.hashed.zip(Place::of(b, convention)) {
            Some((hashed, place)) => {
                hashed.each(place, iou, |k, square| {
                    let c = (self.candidate)(k as usize);
                    let here = || Place::of(&c.bbox, convention).is_some_and(|p| p.square() == square);
                    if convention.exceeds(&c.bbox, b, iou) && here() {
                        take(&c);
                    }
                });
            }
            None => {
                let near = |c: &Detection| convention.exceeds(&c.bbox, b, iou);
                (0..count).map(&self.candidate).filter(near).for_each(|c| take(&c));
            }
        }
        if weight > 0.0 {
            let [x1, y1, x2, y2] = sum.map(|s| (s / weight) as f32);
            BBox::new(x1, y1, x2, y2)
        } else {
            *b
        }
    }
}
