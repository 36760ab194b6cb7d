//! Grouped Fast R-CNN's proposals by their places in the outputs, as a device decodes them.

use super::fast_rcnn::LEAST_SCORE;
use super::GroupedFastRcnn;
use crate::detect::detector::logit;
use crate::error::Result;
use crate::shape::Shape;
use crate::train::matching::AnchorGrid;
use crate::train::objective::head::{GroupChannels, Layout, Level};
use crate::train::objective::pictures::check_shapes;

impl GroupedFastRcnn {
    /// Anchors that propose, and where the first stage's outputs for so many pictures, which must be those of its levels, have them.
    pub(in crate::train) fn placed(
        &self,
        outputs: &[Shape],
        images: usize,
    ) -> Result<(AnchorGrid, Vec<GroupChannels>)> {
        let level = |(stride, scales): (usize, &[f32])| Level {
            stride,
            anchors: scales.iter().map(|&s| [s, s]).collect(),
            layout: Layout::Apart { logits: 2 },
        };
        let levels: Vec<Level> = self.detector.levels().map(level).collect();
        let channels: Vec<usize> = levels.iter().flat_map(Level::channels).collect();
        check_shapes(outputs, &channels, images)?;
        let (mut grid, mut groups) = (AnchorGrid::new(), Vec::new());
        for (level, output) in levels.iter().zip((0..).step_by(2)) {
            for (a, [w, h]) in level.anchors.iter().enumerate() {
                grid.push(level.stride, *w, *h, outputs[output].h, outputs[output].w);
                groups.push(GroupChannels::new(level, output, a));
            }
        }
        Ok((grid, groups))
    }

    /// Logit that a proposal must pass.
    pub(in crate::train) fn least_logit() -> f32 {
        logit(LEAST_SCORE)
    }
}
