//! The faces of a picture, to be found by where a box is and how wide.

use super::scan::FaceBox;
use crate::detect::BBox;

/// Widths up to this power of two have an octave of their own.
const OCTAVES: usize = 14;
/// Cells along the longer side of an octave's grid, at most.
const CELLS: f64 = 128.0;

/// The faces by octave of width and place of centre, so that one look-up names every face that a box
/// can have an IoU of at least t with. An IoU in two dimensions is at most that of the boxes' shadows
/// on either axis; there, with sides b and f, it means t <= b / f <= 1 / t, and centres at most
/// (b + f) (1 - t) / (2 (1 + t)) apart.
pub(super) struct FaceIndex {
    octaves: Vec<Option<Octave>>,
}

/// A grid over the places where boxes of one octave can have their centres.
struct Octave {
    origin: [f64; 2],
    cell: f64,
    size: [usize; 2],
    /// Faces of cell k are `faces[start[k]..start[k + 1]]`.
    start: Vec<u32>,
    faces: Vec<u32>,
}

/// Octave of a width: 0 below 2 px, k in 2^k to 2^(k+1), the last beyond.
fn octave(width: f64) -> usize {
    if width < 2.0 {
        return 0;
    }
    // The exponent's bits: exact, and cheaper than a logarithm.
    ((width.to_bits() >> 52) as usize - 1023).min(OCTAVES - 1)
}

impl FaceIndex {
    /// Of `faces` for IoUs of `t` or more.
    pub fn new(faces: &[FaceBox], t: f32) -> Self {
        // f32 rounds the IoU and the corners it is of: give way by more than that.
        let t = f64::from(t) * (1.0 - 1e-3);
        let mut reaches: Vec<Vec<(u32, [f64; 4])>> = vec![Vec::new(); OCTAVES];
        for (j, face) in faces.iter().enumerate() {
            let [x1, y1, x2, y2] = [face.bbox.x1, face.bbox.y1, face.bbox.x2, face.bbox.y2].map(f64::from);
            let (w, h) = (x2 - x1, y2 - y1);
            if !(w > 0.0 && h > 0.0 && (w * h).is_finite()) {
                continue;
            }
            let edge =
                8.0 * f64::from(f32::EPSILON) * [x1, y1, x2, y2].iter().fold(0.0, |m: f64, v| m.max(v.abs()));
            let (narrow, wide) = (((w - edge) * t).max(0.0), (w + edge) / t);
            for k in octave(narrow)..=octave(wide) {
                let widest = if k == OCTAVES - 1 { wide } else { wide.min((1u64 << (k + 1)) as f64) };
                let apart = |b: f64, f: f64| (b + f + 2.0 * edge) * (1.0 - t) / (2.0 * (1.0 + t)) + edge;
                let (dx, dy) = (apart(widest, w), apart((h + edge) / t, h));
                let (cx, cy) = ((x1 + x2) / 2.0, (y1 + y2) / 2.0);
                reaches[k].push((j as u32, [cx - dx, cy - dy, cx + dx, cy + dy]));
            }
        }
        Self { octaves: reaches.iter().enumerate().map(|(k, r)| Octave::new(k, r)).collect() }
    }

    /// Every face that `b` can reach, and some others near it.
    pub fn near(&self, b: &BBox) -> &[u32] {
        let [x1, y1, x2, y2] = [b.x1, b.y1, b.x2, b.y2].map(f64::from);
        // A width of NaN is in octave 0 or the last; its centre is in no cell.
        match &self.octaves[octave(x2 - x1)] {
            Some(o) => o.at((x1 + x2) / 2.0, (y1 + y2) / 2.0),
            None => &[],
        }
    }
}

impl Octave {
    /// None without faces. `reaches`: face, and the box in which centres of this octave's boxes reach it.
    fn new(k: usize, reaches: &[(u32, [f64; 4])]) -> Option<Self> {
        let first = reaches.first()?.1;
        let bounds = reaches
            .iter()
            .fold(first, |b, (_, r)| [b[0].min(r[0]), b[1].min(r[1]), b[2].max(r[2]), b[3].max(r[3])]);
        let extent = [bounds[2] - bounds[0], bounds[3] - bounds[1]];
        let cell = ((1u64 << k) as f64 / 2.0).max(extent[0].max(extent[1]) / CELLS);
        let size = extent.map(|e| (e / cell) as usize + 1);
        let mut grid = Self {
            origin: [bounds[0], bounds[1]],
            cell,
            size,
            start: vec![0; size[0] * size[1] + 1],
            faces: Vec::new(),
        };
        // Count, sum up, fill: the faces of all cells in one list.
        let covered = |r: &[f64; 4], visit: &mut dyn FnMut(usize)| {
            let at = |v: f64, axis: usize| (((v - bounds[axis]) / cell) as usize).min(size[axis] - 1);
            for y in at(r[1], 1)..=at(r[3], 1) {
                for x in at(r[0], 0)..=at(r[2], 0) {
                    visit(y * size[0] + x);
                }
            }
        };
        reaches.iter().for_each(|(_, r)| covered(r, &mut |c| grid.start[c + 1] += 1));
        for c in 1..grid.start.len() {
            grid.start[c] += grid.start[c - 1];
        }
        grid.faces = vec![0; grid.start[grid.start.len() - 1] as usize];
        let mut next = grid.start.clone();
        for (j, r) in reaches {
            covered(r, &mut |c| {
                grid.faces[next[c] as usize] = *j;
                next[c] += 1;
            });
        }
        Some(grid)
    }

    fn at(&self, cx: f64, cy: f64) -> &[u32] {
        let (x, y) = ((cx - self.origin[0]) / self.cell, (cy - self.origin[1]) / self.cell);
        // Comparisons that NaN fails.
        if x >= 0.0 && y >= 0.0 && x < self.size[0] as f64 && y < self.size[1] as f64 {
            let c = y as usize * self.size[0] + x as usize;
            &self.faces[self.start[c] as usize..self.start[c + 1] as usize]
        } else {
            &[]
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::support::near;
    use super::super::{match_anchors, mine_high_quality_anchors, AnchorGrid, AnchorMining, MatchingRecipe};
    use super::*;
    use crate::graph::init::Rng;
    use crate::train::losses::IGNORED_OVERLAP;

    #[test]
    fn a_crowd_is_mined_without_comparing_all_pairs() {
        // 87,040 anchors, 1,000 faces.
        let mut grid = AnchorGrid::new();
        [(4, 16.0), (8, 32.0), (16, 64.0), (32, 128.0)]
            .iter()
            .for_each(|&(stride, side)| grid.push(stride, side, side, 1024 / stride, 1024 / stride));
        let mut rng = Rng::new(43);
        let faces: Vec<FaceBox> = (0..1000)
            .map(|_| {
                let (x, y) = (rng.range(0.0, 1000.0), rng.range(0.0, 1000.0));
                let side = 2f32.powf(rng.range(3.0, 5.0));
                FaceBox { bbox: BBox::from_xywh(x, y, side, side), ignore: false }
            })
            .collect();
        let decoded: Vec<BBox> = (0..grid.len)
            .map(|i| match rng.below(8) {
                0 => near(&faces[rng.below(faces.len())].bbox, 0.1, &mut rng),
                _ => near(&grid.anchor(i).decode(&[0.0; 4], [1.0; 2]), 0.1, &mut rng),
            })
            .collect();
        let start = std::time::Instant::now();
        let matches = match_anchors(&grid, &faces, &MatchingRecipe::FirstStep { positive: 0.35 });
        let matching = start.elapsed();
        let mining = AnchorMining { anchors: 40, overlap: 0.6 };
        let got = mine_high_quality_anchors(|i| decoded[i], &faces, &matches, &mining);
        println!("{} anchors: matching {matching:?}, mining {:?}", grid.len, start.elapsed() - matching);
        let index = FaceIndex::new(&faces, IGNORED_OVERLAP);
        let compared: usize = decoded.iter().map(|b| index.near(b).len()).sum();
        let close = got.overlap.iter().filter(|v| **v > 0.0).count();
        assert!(close > 10_000 && compared < 10 * close, "{compared} compared, {close} close");
        assert!(got.compensated.len() > 1000);
    }
}
