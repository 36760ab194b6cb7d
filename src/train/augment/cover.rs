//! Faces partly hidden.

use super::Cover;
use crate::detect::BBox;
use crate::graph::init::Rng;
use crate::train::data::Annotated;

/// Pieces tried before a face stays as it is.
const TRIES: usize = 8;

impl Cover {
    /// Hides random rectangles of some of `faces` in an example, side x side x 3, under pieces of it that meet none of
    /// `shown`, the boxes of all faces of which something may be seen. No face is hidden by more than the largest share, be
    /// it by the covers of its neighbours.
    pub(super) fn draw(
        &self,
        faces: &[Annotated],
        shown: &[BBox],
        side: usize,
        rng: &mut Rng,
        pixels: &mut [u8],
    ) {
        let mut hidden = vec![0.0; faces.len()];
        for face in faces.iter().filter(|f| !f.ignore) {
            if rng.uniform() >= self.probability {
                continue;
            }
            let Some([x, y, w, h]) = self.rectangle(&face.bbox, side, rng) else { continue };
            let shares: Vec<f32> = faces.iter().map(|f| f.bbox.share_in(&boxed([x, y, w, h]))).collect();
            // Rounding to pixels may hide a little more than was drawn.
            if hidden.iter().zip(&shares).any(|(was, more)| was + more > self.share[1] * 1.1) {
                continue;
            }
            let place = |rng: &mut Rng| [rng.below(side - w + 1), rng.below(side - h + 1), w, h];
            let free = |piece: &[usize; 4]| shown.iter().all(|b| b.share_in(&boxed(*piece)) == 0.0);
            let Some(piece) = (0..TRIES).map(|_| place(rng)).find(free) else { continue };
            paste(pixels, side, piece, [x, y]);
            hidden.iter_mut().zip(shares).for_each(|(was, more)| *was += more);
        }
    }

    /// Left, top, width and height of a random part of a face; None where it is less than a pixel or as large as the
    /// example.
    fn rectangle(&self, face: &BBox, side: usize, rng: &mut Rng) -> Option<[usize; 4]> {
        let share = rng.range(self.share[0], self.share[1]);
        // Between a bar across the face and one along it.
        let wide = rng.range(share, 1.0);
        let [w, h] = [face.width() * wide, face.height() * share / wide].map(|v| v.round() as usize);
        if w == 0 || h == 0 || w >= side || h >= side {
            return None;
        }
        let mut at = |from: f32, to: f32, size: usize| {
            (rng.range(from, to - size as f32).round().max(0.0) as usize).min(side - size)
        };
        Some([at(face.x1, face.x2, w), at(face.y1, face.y2, h), w, h])
    }
}

fn boxed([x, y, w, h]: [usize; 4]) -> BBox {
    let [x1, y1, x2, y2] = [x, y, x + w, y + h].map(|v| v as f32);
    BBox::new(x1, y1, x2, y2)
}

/// Copies a rectangle of an example, side x side x 3, to another place of it.
fn paste(pixels: &mut [u8], side: usize, [x, y, w, h]: [usize; 4], [to_x, to_y]: [usize; 2]) {
    let rows: Vec<u8> = (y..y + h).flat_map(|y| &pixels[(y * side + x) * 3..][..w * 3]).copied().collect();
    for (i, row) in rows.chunks_exact(w * 3).enumerate() {
        pixels[((to_y + i) * side + to_x) * 3..][..w * 3].copy_from_slice(row);
    }
}
