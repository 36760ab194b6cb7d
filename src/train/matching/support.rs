//! Random layouts for the tests that compare with all pairs.

use super::{AnchorGrid, FaceBox};
use crate::detect::BBox;
use crate::graph::init::Rng;

/// The anchors' corners.
pub fn boxes(grid: &AnchorGrid) -> Vec<BBox> {
    (0..grid.len).map(|i| grid.anchor(i).bbox()).collect()
}

/// One to four groups of up to 40 x 40 cells or strips of 2,000, square or not, sparse or dense.
pub fn random_grid(rng: &mut Rng) -> AnchorGrid {
    let mut grid = AnchorGrid::new();
    for _ in 0..1 + rng.below(4) {
        let stride = [1, 4, 7, 8, 16][rng.below(5)];
        let width = stride as f32 * 2f32.powf(rng.range(-1.0, 4.5));
        let height = if rng.below(2) == 0 { width } else { width * rng.range(0.4, 2.5) };
        // A strip now and then, for coordinates where f32 is coarse.
        let (rows, cols) = if rng.below(8) == 0 { (1, 2000) } else { (rng.below(40), 1 + rng.below(40)) };
        grid.push(stride, width, height, rows, cols);
    }
    grid
}

/// Up to 24 faces: of any size, on an anchor exactly, near one, equal to another, partly outside.
pub fn random_faces(grid: &AnchorGrid, rng: &mut Rng, ignored: f32) -> Vec<FaceBox> {
    let mut faces: Vec<FaceBox> = Vec::new();
    for _ in 0..rng.below(25) {
        let around = if grid.is_empty() {
            BBox::new(0.0, 0.0, 9.0, 9.0)
        } else {
            grid.anchor(rng.below(grid.len)).bbox()
        };
        let bbox = match rng.below(5) {
            0 => around,
            1 if !faces.is_empty() => faces[rng.below(faces.len())].bbox,
            2 => BBox::from_xywh(
                rng.range(-50.0, 300.0),
                rng.range(-50.0, 300.0),
                2f32.powf(rng.range(0.0, 8.0)),
                2f32.powf(rng.range(0.0, 8.0)),
            ),
            _ => near(&around, 0.4, rng),
        };
        faces.push(FaceBox { bbox, ignore: rng.uniform() < ignored });
    }
    faces
}

/// The box with its corners moved by up to `by` of its sides.
pub fn near(b: &BBox, by: f32, rng: &mut Rng) -> BBox {
    let (w, h) = (b.width() * by, b.height() * by);
    BBox::new(
        b.x1 + rng.range(-w, w),
        b.y1 + rng.range(-h, h),
        b.x2 + rng.range(-w, w),
        b.y2 + rng.range(-h, h),
    )
}
