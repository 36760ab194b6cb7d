//! RoIAlign (He et al., Mask R-CNN): bilinear samples averaged in each bin of a box.

use crate::error::{Error, Result};
use crate::shape::Shape;

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
            _ => Err(Error::InvalidModel(format!("roi_align needs features and Rx5x1x1 boxes, got {inputs:?}"))),
        }
    }
}
