//! Where the window lies.

use super::Augment;
use crate::detect::BBox;
use crate::graph::init::Rng;
use crate::train::data::Annotated;

/// A square of the picture, in its pixels; it may leave the picture.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Window {
    /// Left.
    pub x: f32,
    /// Top.
    pub y: f32,
    /// Side.
    pub size: f32,
}

impl Window {
    /// The window about the same centre with a side `factor` times as long.
    pub(super) fn scaled(&self, factor: f32) -> Self {
        let more = self.size * (factor - 1.0) / 2.0;
        Self { x: self.x - more, y: self.y - more, size: self.size * factor }
    }

    pub(super) fn holds_centre(&self, b: &BBox) -> bool {
        let [cx, cy] = centre(b);
        (self.x..self.x + self.size).contains(&cx) && (self.y..self.y + self.size).contains(&cy)
    }
}

fn centre(b: &BBox) -> [f32; 2] {
    [(b.x1 + b.x2) / 2.0, (b.y1 + b.y2) / 2.0]
}

/// A random start of a window of `size` along an axis of `extent`: inside where it fits, else so
/// that it covers the whole axis.
fn place(extent: f32, size: f32, rng: &mut Rng) -> f32 {
    rng.range(0.0, extent - size)
}

/// As [`place`], of the starts that leave `from..to` inside the window (`to - from <= size`).
fn place_around(extent: f32, size: f32, [from, to]: [f32; 2], rng: &mut Rng) -> f32 {
    let slack = extent - size;
    rng.range((to - size).max(slack.min(0.0)).min(from), from.min(slack.max(0.0)).max(to - size))
}

impl Augment {
    /// The window of the next example; `size` is the picture's width and height, `side` the
    /// example's.
    pub(super) fn window(&self, size: [f32; 2], faces: &[Annotated], side: f32, rng: &mut Rng) -> Window {
        let weights = self.weights();
        let mut at = rng.uniform() * weights.iter().sum::<f32>();
        // Rounding may leave `at` behind the last weight.
        let mut method = weights.iter().rposition(|&w| w > 0.0).unwrap_or(0);
        for (i, weight) in weights.into_iter().enumerate() {
            if at < weight {
                method = i;
                break;
            }
            at -= weight;
        }
        let wanted = faces.iter().filter(|f| !f.ignore).count();
        match method {
            1 if wanted > 0 => self.anchor_window(size, pick(faces, wanted, rng), side, rng),
            2 => {
                let factors = &self.scale_jitter.factors;
                let factor = if factors.is_empty() {
                    let [least, most] = self.scale_jitter.range.map(f32::ln);
                    rng.range(least, most).exp()
                } else {
                    factors[rng.below(factors.len())]
                };
                placed(size, side / factor, rng)
            }
            3 => placed(size, size[0].max(size[1]) * rng.range(1.0, self.expand.max), rng),
            _ => self.square_window(size, faces, wanted, rng),
        }
    }

    fn square_window(&self, size: [f32; 2], faces: &[Annotated], wanted: usize, rng: &mut Rng) -> Window {
        let factors = &self.random_square.factors;
        let shorter = size[0].min(size[1]);
        for _ in 0..self.random_square.tries {
            let window = placed(size, shorter * factors[rng.below(factors.len())], rng);
            if wanted == 0 || faces.iter().any(|f| !f.ignore && window.holds_centre(&f.bbox)) {
                return window;
            }
        }
        let side = shorter * factors[rng.below(factors.len())];
        if wanted == 0 {
            return placed(size, side, rng);
        }
        // Holds the middle half of the face, so that rounding cannot lose its centre.
        let b = pick(faces, wanted, rng);
        let [cx, cy] = centre(&b);
        let (w, h) = ((b.width() / 4.0).min(side / 4.0), (b.height() / 4.0).min(side / 4.0));
        let x = place_around(size[0], side, [cx - w, cx + w], rng);
        let y = place_around(size[1], side, [cy - h, cy + h], rng);
        Window { x, y, size: side }
    }

    /// PyramidBox section 3.3.
    fn anchor_window(&self, size: [f32; 2], face: BBox, side: f32, rng: &mut Rng) -> Window {
        let das = &self.data_anchor_sampling;
        let face_size = face.area().sqrt();
        let distance = |i: &usize| (das.scales[*i] - face_size).abs();
        let nearest = (0..das.scales.len()).min_by(|a, b| distance(a).total_cmp(&distance(b))).unwrap_or(0);
        let target = rng.below((nearest + 1).min(das.scales.len() - 1) + 1);
        let target = das.scales[target] * rng.range(das.jitter[0], das.jitter[1]);
        let longest = face.width().max(face.height());
        let window = (side * face_size / target)
            .min(size[0].max(size[1]) * das.max_window)
            // The face lies inside, with room for rounding.
            .max(longest * 1.001);
        let x = place_around(size[0], window, [face.x1, face.x2], rng);
        let y = place_around(size[1], window, [face.y1, face.y2], rng);
        Window { x, y, size: window }
    }
}

fn placed([w, h]: [f32; 2], size: f32, rng: &mut Rng) -> Window {
    Window { x: place(w, size, rng), y: place(h, size, rng), size }
}

/// A random one of the `wanted` faces that are not ignored.
fn pick(faces: &[Annotated], wanted: usize, rng: &mut Rng) -> BBox {
    let chosen = rng.below(wanted);
    let mut kept = faces.iter().filter(|f| !f.ignore);
    kept.nth(chosen).map_or(BBox::default(), |f| f.bbox)
}
