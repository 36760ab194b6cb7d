//! RoIAlign (He et al., Mask R-CNN): bilinear samples averaged in each bin of a box.

pub(crate) mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;

#[cfg(feature = "train")]
use super::expect_shape;
use super::window::indices;
use super::Real;
use crate::error::{Error, Result};
use crate::shape::{Shape, Tensor};

/// Parameters. First input: feature map N x C x H x W. Second input: R boxes as R x 5 x 1 x 1, each
/// `image index, x1, y1, x2, y2` in input pixels. Output R x C x out_h x out_w.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RoiAlign {
    /// Bins, vertically and horizontally.
    pub output: [usize; 2],
    /// Feature cells a pixel (1 / stride).
    pub spatial_scale: f32,
    /// Samples a bin along each axis; 0 = ceil(box side / bins), as torchvision.
    pub sampling_ratio: usize,
    /// Shift boxes by half a cell (torchvision's `aligned=True`).
    pub aligned: bool,
}

impl RoiAlign {
    /// Output shape.
    pub fn out_shape(&self, inputs: &[Shape]) -> Result<Shape> {
        match inputs {
            [x, rois] if (rois.c, rois.h, rois.w) == (5, 1, 1) => {
                Ok(Shape::new(rois.n, x.c, self.output[0], self.output[1]))
            }
            _ => Err(Error::InvalidModel(format!(
                "roi_align needs features and Rx5x1x1 boxes, got {inputs:?}"
            ))),
        }
    }

    /// The mean of the bilinear samples in every bin of every box (torchvision's `roi_align`).
    ///
    /// `x` N x C x H x W; `rois` R x 5 x 1 x 1. Returns R x C x out_h x out_w.
    pub fn forward<T: Real>(&self, x: &Tensor<T>, rois: &Tensor<T>) -> Result<Tensor<T>> {
        let out = self.check(x.shape, rois)?;
        let mut y = Tensor::zeros(out);
        for (r, c, py, px) in indices(out) {
            let grid = self.grid(&rois.data[r * 5..][..5]);
            for corner in grid.corners(py, px, x.shape) {
                *y.at_mut(r, c, py, px) += corner.weight * x.at(grid.image, c, corner.y, corner.x);
            }
        }
        Ok(y)
    }

    /// Gradient of [`RoiAlign::forward`] with respect to the features, added to `dx`; the boxes have
    /// none, as in torchvision.
    ///
    /// `rois` R x 5 x 1 x 1; `dy` R x C x out_h x out_w; `dx` N x C x H x W.
    #[cfg(feature = "train")]
    pub fn backward<T: Real>(&self, rois: &Tensor<T>, dy: &Tensor<T>, dx: &mut Tensor<T>) -> Result<()> {
        expect_shape("roi_align dy", dy.shape, self.check(dx.shape, rois)?)?;
        for (r, c, py, px) in indices(dy.shape) {
            let grid = self.grid(&rois.data[r * 5..][..5]);
            for corner in grid.corners(py, px, dx.shape) {
                *dx.at_mut(grid.image, c, corner.y, corner.x) += corner.weight * dy.at(r, c, py, px);
            }
        }
        Ok(())
    }

    /// Output shape, where every box is finite and names an image of the batch.
    pub(crate) fn check<T: Real>(&self, x: Shape, rois: &Tensor<T>) -> Result<Shape> {
        let out = self.out_shape(&[x, rois.shape])?;
        for roi in rois.data.chunks_exact(5) {
            let image = roi[0].to_f64();
            let finite = roi.iter().all(|v| v.to_f64().is_finite());
            if !finite || image < 0.0 || image >= x.n as f64 || image.fract() != 0.0 {
                return Err(Error::InvalidArgument(format!(
                    "roi_align box {roi:?} must be finite and name one of {} images",
                    x.n
                )));
            }
        }
        Ok(out)
    }

    /// Where the bins of a box `[image, x1, y1, x2, y2]` lie on the feature map.
    pub(crate) fn grid<T: Real>(&self, roi: &[T]) -> Grid<T> {
        let scale = T::of(self.spatial_scale.into());
        let offset = T::of(if self.aligned { 0.5 } else { 0.0 });
        let [x1, y1, x2, y2] = [1, 2, 3, 4].map(|i| roi[i] * scale - offset);
        // Without `aligned`, a box is at least one cell wide and high.
        let at_least_one = |v: T| if !self.aligned && v < T::of(1.0) { T::of(1.0) } else { v };
        let side = [at_least_one(y2 - y1), at_least_one(x2 - x1)];
        let bin = [0, 1].map(|a| side[a] / T::of(self.output[a] as f64));
        let samples = match self.sampling_ratio {
            0 => bin.map(|b| b.to_f64().ceil() as usize), // none in a box turned inside out
            fixed => [fixed; 2],
        };
        Grid { image: roi[0].to_f64() as usize, start: [y1, x1], bin, samples }
    }
}

/// The bins of one box, in feature cells; vertical before horizontal.
pub(crate) struct Grid<T> {
    pub image: usize,
    start: [T; 2],
    bin: [T; 2],
    samples: [usize; 2],
}

/// A feature cell that takes part in a bin's mean.
pub(crate) struct Corner<T> {
    pub y: usize,
    pub x: usize,
    pub weight: T,
}

impl<T: Real> Grid<T> {
    /// The cells under bin (`py`, `px`): four for every sample on the map, each with its bilinear
    /// weight over the number of samples. A sample outside the map counts as zero.
    pub fn corners(&self, py: usize, px: usize, map: Shape) -> impl Iterator<Item = Corner<T>> + use<'_, T> {
        let [rows, cols] = self.samples;
        let share = T::of(1.0) / T::of((rows * cols) as f64);
        (0..rows).filter_map(move |i| self.sample(0, py, i, map.h)).flat_map(move |(ys, wy)| {
            (0..cols).filter_map(move |j| self.sample(1, px, j, map.w)).flat_map(move |(xs, wx)| {
                [(0, 0), (0, 1), (1, 0), (1, 1)].map(|(a, b)| Corner {
                    y: ys[a],
                    x: xs[b],
                    weight: wy[a] * wx[b] * share,
                })
            })
        })
    }

    /// The two cells around sample `i` of bin `p` along an axis of `len` cells, and their weights.
    /// None beyond one cell outside the map; nearer, the border's value counts.
    fn sample(&self, axis: usize, p: usize, i: usize, len: usize) -> Option<([usize; 2], [T; 2])> {
        let (bin, samples) = (self.bin[axis], T::of(self.samples[axis] as f64));
        let v = self.start[axis] + T::of(p as f64) * bin + (T::of(i as f64) + T::of(0.5)) * bin / samples;
        if len == 0 || v < T::of(-1.0) || v > T::of(len as f64) {
            return None;
        }
        let v = if v < T::default() { T::default() } else { v };
        let low = v.to_f64() as usize;
        if low >= len - 1 {
            return Some(([len - 1; 2], [T::of(1.0), T::default()]));
        }
        let fraction = v - T::of(low as f64);
        Some(([low, low + 1], [T::of(1.0) - fraction, fraction]))
    }
}
