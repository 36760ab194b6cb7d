//! A depthwise convolution and the pointwise one behind it as one step: a thread computes some rows of the first into memory
//! of its own and takes them on while they are in its cache; the map between the two is never whole.

use super::arena::View;
use super::conv::{ConvOp, DepthwiseOp};
use super::threads::{for_images, Team};
use std::ops::Range;
use std::sync::Arc;

/// Values of rows between the two that a thread holds at a time: a share of a first- and second-level cache.
const BAND: usize = 1 << 14;

/// Both ops.
pub(crate) struct PairOp {
    pub depthwise: Arc<DepthwiseOp>,
    pub pointwise: Arc<ConvOp>,
}

impl PairOp {
    /// The pair of these two, where the second can take rows of the first as they come.
    pub fn new(depthwise: &Arc<DepthwiseOp>, pointwise: &Arc<ConvOp>) -> Option<Self> {
        let w = &pointwise.window;
        let plain = w.kernel == [1, 1] && w.stride == [1, 1] && w.padding == [0; 4] && pointwise.groups == 1;
        let fits =
            pointwise.in_channels == depthwise.channels && pointwise.formats.input == depthwise.formats[1];
        (plain && fits).then(|| Self { depthwise: depthwise.clone(), pointwise: pointwise.clone() })
    }

    /// Whether it computes the same.
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.depthwise, &other.depthwise) && Arc::ptr_eq(&self.pointwise, &other.pointwise)
    }

    /// Bytes of packed weights.
    pub fn bytes(&self) -> usize {
        self.depthwise.bytes() + self.pointwise.bytes()
    }

    /// Rows of a map so wide that are between the two at a time.
    fn band(&self, width: usize) -> usize {
        (BAND / (width * self.depthwise.channels)).max(1)
    }

    /// Floats of memory that each thread needs for an output of this width and height.
    pub fn scratch(&self, [height, width]: [usize; 2]) -> usize {
        let values = self.band(width).min(height) * width * self.depthwise.channels;
        (values * self.depthwise.formats[1].storage.bytes()).div_ceil(size_of::<f32>())
    }

    /// Computes this thread's share of the output rows.
    ///
    /// # Safety
    /// As [`ConvOp::run`], for the input of the first, the residual of the second and its output; `scratch` has
    /// [`PairOp::scratch`] floats that are this thread's.
    pub unsafe fn run(
        &self,
        base: *mut u8,
        scratch: *mut u8,
        add_at: &[Vec<u32>; 2],
        [input, output]: [&View; 2],
        add: Option<&View>,
        team: &Team,
    ) {
        let s = output.shape;
        let band = self.band(s.w);
        for_images(team.share(s.n * s.h), s.h, |n, rows: Range<usize>| {
            for first in rows.clone().step_by(band) {
                let rows = first..(first + band).min(rows.end);
                // SAFETY: the caller's contract; the band fits the scratch.
                unsafe {
                    self.depthwise.rows_into(base, input, n, rows.clone(), s.w, scratch);
                    self.pointwise.rows_from(scratch, base, add_at, add, output, n, rows);
                }
            }
        });
    }
}
