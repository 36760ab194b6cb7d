//! Colour distortion as one affine map.
//!
//! Brightness shifts, contrast scales, and in YIQ saturation scales and hue turns the chroma plane:
//! all are affine in RGB, so they compose to a 3 x 3 matrix and an offset, applied once, without
//! the rounding and clamping between steps that the sequence in HSV has.

use super::Augment;
use crate::graph::init::Rng;

/// `out = matrix * rgb + offset`, values 0 to 255.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Colour {
    pub(super) matrix: [[f32; 3]; 3],
    pub(super) offset: [f32; 3],
}

/// RGB to YIQ (NTSC 1953).
const TO_YIQ: [[f32; 3]; 3] = [[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]];
/// Its inverse.
const FROM_YIQ: [[f32; 3]; 3] = [[1.0, 0.9563, 0.6210], [1.0, -0.2721, -0.6474], [1.0, -1.1070, 1.7046]];

impl Colour {
    pub(super) const IDENTITY: Self =
        Self { matrix: [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], offset: [0.0; 3] };

    pub(super) fn shifted(mut self, by: f32) -> Self {
        self.offset = self.offset.map(|v| v + by);
        self
    }

    pub(super) fn scaled(self, by: f32) -> Self {
        Self { matrix: self.matrix.map(|row| row.map(|v| v * by)), offset: self.offset.map(|v| v * by) }
    }

    /// Scales the chroma by `saturation` and turns it by `degrees`.
    pub(super) fn chroma(self, saturation: f32, degrees: f32) -> Self {
        let (sin, cos) = degrees.to_radians().sin_cos();
        let (s, c) = (sin * saturation, cos * saturation);
        let mut turn = product(&product(&FROM_YIQ, &[[1.0, 0.0, 0.0], [0.0, c, -s], [0.0, s, c]]), &TO_YIQ);
        // The printed coefficients are rounded; grey must stay exactly grey.
        for row in &mut turn {
            let excess = (row.iter().sum::<f32>() - 1.0) / 3.0;
            *row = row.map(|v| v - excess);
        }
        let o = self.offset;
        Self {
            matrix: product(&turn, &self.matrix),
            offset: turn.map(|row| row[0] * o[0] + row[1] * o[1] + row[2] * o[2]),
        }
    }

    /// Applies the map to planes of values, in place.
    pub(super) fn apply(&self, [r, g, b]: [&mut [f32]; 3]) {
        if *self == Self::IDENTITY {
            return;
        }
        let ([m0, m1, m2], [o0, o1, o2]) = (self.matrix, self.offset);
        for ((r, g), b) in r.iter_mut().zip(g).zip(b) {
            let (x, y, z) = (*r, *g, *b);
            *r = m0[0] * x + m0[1] * y + m0[2] * z + o0;
            *g = m1[0] * x + m1[1] * y + m1[2] * z + o1;
            *b = m2[0] * x + m2[1] * y + m2[2] * z + o2;
        }
    }
}

fn product(a: &[[f32; 3]; 3], b: &[[f32; 3]; 3]) -> [[f32; 3]; 3] {
    std::array::from_fn(|i| std::array::from_fn(|j| (0..3).map(|k| a[i][k] * b[k][j]).sum()))
}

impl Augment {
    /// The map of the next example. Draws the same number of values whatever happens.
    pub(super) fn colour(&self, rng: &mut Rng) -> Colour {
        let p = &self.photometric;
        let mut draw = |least: f32, most: f32, nothing: f32| {
            let (happens, value) = (rng.uniform() < p.probability, rng.range(least, most));
            if happens {
                value
            } else {
                nothing
            }
        };
        let brightness = draw(-p.brightness, p.brightness, 0.0);
        let contrast = draw(p.contrast[0], p.contrast[1], 1.0);
        let mut saturation = draw(p.saturation[0], p.saturation[1], 1.0);
        let hue = draw(-p.hue, p.hue, 0.0);
        if rng.uniform() < self.grey {
            saturation = 0.0;
        }
        // SSD draws whether contrast comes before or after hue and saturation. Linear maps without
        // clamping commute with a common factor, so that draw would change nothing.
        let bright = Colour::IDENTITY.shifted(brightness).scaled(contrast);
        if saturation == 1.0 && hue == 0.0 {
            bright
        } else {
            bright.chroma(saturation, hue)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(colour: &Colour, rgb: [f32; 3]) -> [f32; 3] {
        let [mut r, mut g, mut b] = rgb.map(|v| vec![v]);
        colour.apply([&mut r, &mut g, &mut b]);
        [r[0], g[0], b[0]]
    }

    #[test]
    fn brightness_comes_before_contrast() {
        let c = Colour::IDENTITY.shifted(10.0).scaled(1.5);
        assert_eq!(map(&c, [20.0, 40.0, 60.0]), [45.0, 75.0, 105.0]);
    }

    #[test]
    fn hue_and_saturation_keep_luma_and_grey() {
        let luma = |[r, g, b]: [f32; 3]| 0.299 * r + 0.587 * g + 0.114 * b;
        for (saturation, hue) in [(0.0, 0.0), (0.5, 18.0), (1.5, -18.0), (1.0, 120.0)] {
            let c = Colour::IDENTITY.chroma(saturation, hue);
            for rgb in [[200.0, 30.0, 60.0], [10.0, 250.0, 90.0], [77.0, 77.0, 77.0]] {
                let out = map(&c, rgb);
                assert!((luma(out) - luma(rgb)).abs() < 0.3, "{rgb:?} {out:?}");
            }
            assert!(map(&c, [77.0; 3]).iter().all(|v| (v - 77.0).abs() < 1e-3));
        }
        let grey = map(&Colour::IDENTITY.chroma(0.0, 18.0), [200.0, 30.0, 60.0]);
        assert!(grey.iter().all(|v| (v - grey[0]).abs() < 0.1), "{grey:?}");
        let same = map(&Colour::IDENTITY.chroma(1.0, 0.0), [200.0, 30.0, 60.0]);
        assert!(same.iter().zip([200.0, 30.0, 60.0]).all(|(a, b)| (a - b).abs() < 0.1), "{same:?}");
    }

    #[test]
    fn the_hue_turns_red_over_green_to_blue() {
        // In YIQ's plane, a third of a turn takes red's chroma near blue's or green's.
        let plus = map(&Colour::IDENTITY.chroma(1.0, 120.0), [255.0, 0.0, 0.0]);
        let minus = map(&Colour::IDENTITY.chroma(1.0, -120.0), [255.0, 0.0, 0.0]);
        let largest = |v: [f32; 3]| (0..3).max_by(|&a, &b| v[a].total_cmp(&v[b]));
        assert_eq!((largest(plus), largest(minus)), (Some(2), Some(1)), "{plus:?} {minus:?}");
    }
}
