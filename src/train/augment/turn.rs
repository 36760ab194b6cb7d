//! Examples turned about their centre.

use crate::detect::BBox;

/// A turn by an angle, clockwise as a picture is seen (y points down).
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Rotation {
    cos: f32,
    sin: f32,
}

impl Rotation {
    pub(super) const NONE: Self = Self { cos: 1.0, sin: 0.0 };

    /// `angle` in radians.
    pub(super) fn new(angle: f32) -> Self {
        Self { cos: angle.cos(), sin: angle.sin() }
    }

    /// Side of the upright square about a turned one of side 1.
    pub(super) fn reach(self) -> f32 {
        self.cos.abs() + self.sin.abs()
    }

    /// The middle of `from`, wide x wide x 3 bytes, turned into side x side x 3; bilinear. `wide` is at least
    /// [`Rotation::reach`] times `side`, and 2 more.
    pub(super) fn draw(self, from: &[u8], wide: usize, side: usize, to: &mut [u8]) {
        assert!(wide as f32 >= side as f32 * self.reach() + 2.0, "corners of a turned example");
        // Fractions of 1/256; places relative to the first pixel's centre.
        const ONE: f32 = 65536.0;
        let middle = (wide as f32 - 1.0) / 2.0;
        let step = [(self.cos * ONE) as i64, (-self.sin * ONE) as i64];
        for (y, row) in to.chunks_exact_mut(side * 3).enumerate() {
            let (dx, dy) = ((1.0 - side as f32) / 2.0, y as f32 - (side as f32 - 1.0) / 2.0);
            // The source of a pixel: turned back.
            let mut u = ((middle + self.cos * dx + self.sin * dy) * ONE) as i64;
            let mut v = ((middle - self.sin * dx + self.cos * dy) * ONE) as i64;
            for pixel in row.chunks_exact_mut(3) {
                let (column, line) = ((u >> 16) as usize, (v >> 16) as usize);
                let (fx, fy) = ((u >> 8 & 255) as u32, (v >> 8 & 255) as u32);
                let top = &from[(line * wide + column) * 3..][..6];
                let bottom = &from[((line + 1) * wide + column) * 3..][..6];
                for c in 0..3 {
                    let mix = |row: &[u8]| u32::from(row[c]) * (256 - fx) + u32::from(row[c + 3]) * fx;
                    pixel[c] = ((mix(top) * (256 - fy) + mix(bottom) * fy + 32768) >> 16) as u8;
                }
                u += step[0];
                v += step[1];
            }
        }
    }

    /// The box of the turned ellipse that fills `b`; the turn is about the middle of a square of `side`.
    pub(super) fn turned(self, b: BBox, side: f32) -> BBox {
        if self == Self::NONE {
            return b;
        }
        let (dx, dy) = ((b.x1 + b.x2 - side) / 2.0, (b.y1 + b.y2 - side) / 2.0);
        let cx = side / 2.0 + self.cos * dx - self.sin * dy;
        let cy = side / 2.0 + self.sin * dx + self.cos * dy;
        let (a, b) = (b.width() / 2.0, b.height() / 2.0);
        let w = (a * self.cos).hypot(b * self.sin);
        let h = (a * self.sin).hypot(b * self.cos);
        BBox::new(cx - w, cy - h, cx + w, cy + h)
    }
}
