//! The two iterations that the reference loops share: every value of a map, and every tap of a
//! sliding window that lies on the map.

use crate::shape::Shape;

/// Every (n, c, y, x) of a shape, in memory order (channels fastest).
pub(crate) fn indices(s: Shape) -> impl Iterator<Item = (usize, usize, usize, usize)> {
    (0..s.len()).map(move |i| {
        let (pixel, c) = (i / s.c, i % s.c);
        let (row, x) = (pixel / s.w, pixel % s.w);
        (row / s.h, c, row % s.h, x)
    })
}

/// A kernel sliding over the rows and columns of a map.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Window {
    /// Rows and columns of the map under the window.
    pub map: [usize; 2],
    /// Kernel height and width.
    pub kernel: [usize; 2],
    /// Vertical and horizontal stride.
    pub stride: [usize; 2],
    /// Vertical and horizontal dilation.
    pub dilation: [usize; 2],
    /// Padding above and left of the map.
    pub pad: [usize; 2],
}

impl Window {
    /// The taps of window (`wy`, `wx`) that lie on the map, in scan order, as `(tap, y, x)`: `tap` is
    /// `ky * kernel width + kx`, the offset in the last two axes of a weight. Taps in the padding are
    /// left out.
    pub fn taps(self, wy: usize, wx: usize) -> impl Iterator<Item = (usize, usize, usize)> {
        (0..self.kernel[0]).filter_map(move |ky| Some((ky, self.position(0, wy, ky)?))).flat_map(
            move |(ky, y)| {
                (0..self.kernel[1])
                    .filter_map(move |kx| Some((ky * self.kernel[1] + kx, y, self.position(1, wx, kx)?)))
            },
        )
    }

    /// Map index `window * stride + k * dilation - pad` along an axis, None in the padding.
    fn position(&self, axis: usize, window: usize, k: usize) -> Option<usize> {
        let i = (window * self.stride[axis] + k * self.dilation[axis]).checked_sub(self.pad[axis])?;
        (i < self.map[axis]).then_some(i)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn indices_run_in_memory_order() {
        let s = Shape::new(2, 3, 4, 5);
        for (i, (n, c, y, x)) in indices(s).enumerate() {
            assert_eq!(s.at(n, c, y, x), i);
        }
        assert_eq!(indices(s).count(), s.len());
        assert_eq!(indices(Shape::new(1, 0, 2, 2)).count(), 0);
    }

    #[test]
    fn taps_in_the_padding_are_left_out() {
        let w = Window { map: [2, 3], kernel: [2, 2], stride: [1, 2], dilation: [1, 2], pad: [1, 1] };
        assert_eq!(w.taps(0, 0).collect::<Vec<_>>(), [(3, 0, 1)]);
        assert_eq!(w.taps(1, 1).collect::<Vec<_>>(), [(0, 0, 1), (2, 1, 1)]);
    }
}
