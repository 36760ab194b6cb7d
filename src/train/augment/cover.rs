//! Faces partly hidden.

use super::Cover;
use crate::detect::BBox;
use crate::graph::init::Rng;
use crate::train::data::Annotated;

/// Pieces tried before a face stays as it is.
const TRIES: usize = 8;

impl Cover {
    /// Hides a random rectangle of `face` in an example, side x side x 3, under a piece of it that meets none of `faces`.
    pub(super) fn draw(
        &self,
        face: &BBox,
        faces: &[Annotated],
        side: usize,
        rng: &mut Rng,
        pixels: &mut [u8],
    ) {
        let share = rng.range(self.share[0], self.share[1]);
        // Between a bar across the face and one along it.
        let wide = rng.range(share, 1.0);
        let (w, h) = (face.width() * wide, face.height() * share / wide);
        let [w, h] = [w, h].map(|v| v.round() as usize);
        if w == 0 || h == 0 || w >= side || h >= side {
            return;
        }
        let at = |from: f32, to: f32, size: usize, rng: &mut Rng| {
            (rng.range(from, to - size as f32).round().max(0.0) as usize).min(side - size)
        };
        let (x, y) = (at(face.x1, face.x2, w, rng), at(face.y1, face.y2, h, rng));
        for _ in 0..TRIES {
            let (from_x, from_y) = (rng.below(side - w + 1), rng.below(side - h + 1));
            let [x1, y1, x2, y2] = [from_x, from_y, from_x + w, from_y + h].map(|v| v as f32);
            let piece = BBox::new(x1, y1, x2, y2);
            if faces.iter().all(|f| f.bbox.iou(&piece) == 0.0) {
                let mut row = Vec::with_capacity(w * 3);
                for i in 0..h {
                    // No face is in the piece, so the two do not meet.
                    row.clear();
                    row.extend_from_slice(&pixels[((from_y + i) * side + from_x) * 3..][..w * 3]);
                    pixels[((y + i) * side + x) * 3..][..w * 3].copy_from_slice(&row);
                }
                return;
            }
        }
    }
}
