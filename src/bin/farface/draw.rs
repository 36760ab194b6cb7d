//! Boxes, landmarks and scores drawn on a picture.

use farface::detect::{BBox, Face};
use image::{Rgb, RgbImage};

type Colour = [f32; 3];

/// Of a sure face.
const SURE: Colour = [0.0, 230.0, 118.0];
/// Of a face with score 0.
const UNSURE: Colour = [255.0, 145.0, 0.0];
const DARK: Colour = [0.0, 0.0, 0.0];
const EYE: Colour = [64.0, 196.0, 255.0];
const NOSE: Colour = [255.0, 255.0, 255.0];
const MOUTH: Colour = [255.0, 82.0, 150.0];

/// Faces smaller than this (pixels) get a bare line of one pixel, so that they stay visible.
const TINY: f32 = 24.0;
/// On faces smaller than this, landmarks would hide the face.
const ROOM_FOR_LANDMARKS: f32 = 36.0;

/// Draws the faces, the surest on top. Coordinates are pixels of `picture`.
pub fn faces(picture: &mut RgbImage, faces: &[Face], labels: bool) {
    let mut order: Vec<&Face> = faces.iter().collect();
    order.sort_by(|a, b| a.score.total_cmp(&b.score));
    let mut canvas = Canvas(picture);
    for face in order {
        let colour = std::array::from_fn(|i| UNSURE[i] + (SURE[i] - UNSURE[i]) * face.score.clamp(0.0, 1.0));
        let thickness = thickness(&canvas, face.size());
        canvas.frame(&face.bbox, thickness, face.size() >= TINY, colour);
        if face.size() >= ROOM_FOR_LANDMARKS {
            for (i, &point) in face.landmarks.iter().flatten().enumerate() {
                let colour = [EYE, EYE, NOSE, MOUTH, MOUTH][i];
                canvas.dot(point, (face.size() / 40.0).clamp(1.0, 6.0), colour);
            }
        }
        if labels {
            let scale = if face.size() >= TINY { (2 + (thickness - 1) / 2).min(6) } else { 1 };
            canvas.label(face, thickness, scale, colour);
        }
    }
}

/// Line width of a face's frame: grows with the face, and with the picture, which is shown smaller.
fn thickness(canvas: &Canvas, size: f32) -> i64 {
    let longest = canvas.0.width().max(canvas.0.height()) as f32;
    let most = (longest / 350.0).max(1.0);
    (size / 28.0).min(most).round().clamp(1.0, 24.0) as i64
}

struct Canvas<'a>(&'a mut RgbImage);

impl Canvas<'_> {
    /// Mixes `colour` into a pixel; points outside are passed over.
    fn blend(&mut self, x: i64, y: i64, colour: Colour, alpha: f32) {
        if x < 0 || y < 0 || x >= i64::from(self.0.width()) || y >= i64::from(self.0.height()) {
            return;
        }
        let Rgb(pixel) = self.0.get_pixel_mut(x as u32, y as u32);
        for (value, c) in pixel.iter_mut().zip(colour) {
            *value = (f32::from(*value) * (1.0 - alpha) + c * alpha).round() as u8;
        }
    }

    /// Columns x1..x2, rows y1..y2, cut to the picture first.
    fn fill(&mut self, [x1, y1, x2, y2]: [i64; 4], colour: Colour, alpha: f32) {
        let (w, h) = (i64::from(self.0.width()), i64::from(self.0.height()));
        for y in y1.clamp(0, h)..y2.clamp(0, h) {
            for x in x1.clamp(0, w)..x2.clamp(0, w) {
                self.blend(x, y, colour, alpha);
            }
        }
    }

    /// Frame of `t` pixels between two rectangles, the inner one given.
    fn ring(&mut self, [x1, y1, x2, y2]: [i64; 4], t: i64, colour: Colour, alpha: f32) {
        self.fill([x1 - t, y1 - t, x2 + t, y1], colour, alpha);
        self.fill([x1 - t, y2, x2 + t, y2 + t], colour, alpha);
        self.fill([x1 - t, y1, x1, y2], colour, alpha);
        self.fill([x2, y1, x2 + t, y2], colour, alpha);
    }

    /// Frame around the pixels that a box touches, with dark edges where `outlined`.
    fn frame(&mut self, b: &BBox, thickness: i64, outlined: bool, colour: Colour) {
        let inner = pixels(b);
        if outlined {
            let [x1, y1, x2, y2] = inner;
            self.ring([x1 - thickness, y1 - thickness, x2 + thickness, y2 + thickness], 1, DARK, 0.45);
            if x2 - x1 > 2 && y2 - y1 > 2 {
                self.ring([x1 + 1, y1 + 1, x2 - 1, y2 - 1], 1, DARK, 0.25);
            }
        }
        self.ring(inner, thickness, colour, 1.0);
    }

    /// Smooth disc with a dark rim.
    fn dot(&mut self, [cx, cy]: [f32; 2], radius: f32, colour: Colour) {
        let reach = radius as i64 + 2;
        let (mx, my) = (cx.floor() as i64, cy.floor() as i64);
        for y in my.saturating_sub(reach)..=my.saturating_add(reach) {
            for x in mx.saturating_sub(reach)..=mx.saturating_add(reach) {
                let distance = (x as f32 + 0.5 - cx).hypot(y as f32 + 0.5 - cy);
                let cover = |r: f32| (r + 0.5 - distance).clamp(0.0, 1.0);
                self.blend(x, y, DARK, 0.5 * cover(radius + 1.0));
                self.blend(x, y, colour, cover(radius));
            }
        }
    }

    /// The score in percent on a tab above the box, or inside where there is no room above.
    fn label(&mut self, face: &Face, thickness: i64, scale: i64, colour: Colour) {
        let text = format!("{:.0}", (face.score * 100.0).floor());
        let (w, h) = ((4 * text.len() as i64 + 1) * scale, 7 * scale);
        let [x1, y1, ..] = pixels(&face.bbox);
        let left = (x1 - thickness).clamp(0, (i64::from(self.0.width()) - w).max(0));
        let above = y1 - thickness - h;
        let top = if above >= 0 { above } else { y1.max(0) };
        self.fill([left, top, left + w, top + h], colour, 0.9);
        for (i, digit) in text.bytes().enumerate() {
            let rows = DIGITS[usize::from(digit.saturating_sub(b'0')).min(9)];
            for (row, bits) in (0..).zip(rows) {
                for column in (0..3).filter(|c| bits >> (2 - c) & 1 == 1) {
                    let x = left + (4 * i as i64 + 1 + column) * scale;
                    let y = top + (1 + row) * scale;
                    self.fill([x, y, x + scale, y + scale], DARK, 1.0);
                }
            }
        }
    }
}

/// The pixels that a box touches: x1, y1, x2, y2, ends excluded. Conversions saturate.
fn pixels(b: &BBox) -> [i64; 4] {
    /// Far outside of any picture, and far from overflow.
    const FAR: f32 = 1e9;
    let at = |v: f32| v.clamp(-FAR, FAR) as i64;
    [at(b.x1.floor()), at(b.y1.floor()), at(b.x2.ceil()), at(b.y2.ceil())]
}

/// Digits of 3 x 5 pixels, a row a number, the leftmost pixel in bit 2.
const DIGITS: [[u8; 5]; 10] = [
    [7, 5, 5, 5, 7],
    [2, 6, 2, 2, 7],
    [7, 1, 7, 4, 7],
    [7, 1, 3, 1, 7],
    [5, 5, 7, 1, 1],
    [7, 4, 7, 1, 7],
    [7, 4, 7, 5, 7],
    [7, 1, 1, 2, 2],
    [7, 5, 7, 5, 7],
    [7, 5, 7, 1, 7],
];

#[cfg(test)]
mod tests {
    use super::*;

    fn face(x1: f32, y1: f32, x2: f32, y2: f32) -> Face {
        Face { bbox: BBox::new(x1, y1, x2, y2), score: 1.0, landmarks: None, ellipse: None }
    }

    #[test]
    fn a_tiny_face_gets_a_one_pixel_line_around_it_and_stays_untouched() {
        let mut picture = RgbImage::new(40, 30);
        faces(&mut picture, &[face(10.0, 10.0, 18.0, 16.0)], false);
        let green = Rgb(SURE.map(|v| v as u8));
        for (x, y, pixel) in picture.enumerate_pixels() {
            let inside = (10..18).contains(&x) && (10..16).contains(&y);
            let around = (9..19).contains(&x) && (9..17).contains(&y);
            let expected = if around && !inside { green } else { Rgb([0; 3]) };
            assert_eq!(*pixel, expected, "{x} {y}");
        }
    }

    #[test]
    fn what_lies_outside_is_cut_off() {
        let mut picture = RgbImage::new(64, 64);
        let mut wild = face(-1e30, f32::NEG_INFINITY, f32::INFINITY, f32::NAN);
        wild.landmarks = Some([[f32::INFINITY, -1e30], [f32::NAN; 2], [-5.0, 2.0], [63.5, 63.5], [1e30; 2]]);
        faces(&mut picture, &[wild, face(-20.0, 10.0, 90.0, 50.0)], true);
        assert_eq!(*picture.get_pixel(32, 9), Rgb(SURE.map(|v| v as u8)));
        assert_eq!(*picture.get_pixel(32, 30), Rgb([0; 3]));
    }
}
