//! Sizes and rectangles in whole pixels, and the caps on them.

use crate::error::{Error, Result};

/// Longest side of a picture or pyramid level, in pixels: f32 coordinates stay exact up to it.
pub const MAX_SIDE: usize = 1 << 24;

/// Most pixels of a picture or pyramid level.
pub const MAX_PIXELS: u64 = 1 << 31;

/// Width and height in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Size {
    /// Columns.
    pub width: usize,
    /// Rows.
    pub height: usize,
}

impl Size {
    /// Size from width and height in pixels.
    pub const fn new(width: usize, height: usize) -> Self {
        Self { width, height }
    }

    /// Number of pixels. u64: sides up to [`MAX_SIDE`] cannot overflow it on any machine.
    pub const fn pixels(&self) -> u64 {
        (self.width as u64).saturating_mul(self.height as u64)
    }

    /// Error unless both sides are in 1..=[`MAX_SIDE`] and the area within [`MAX_PIXELS`]; `what`
    /// names the thing measured.
    pub(super) fn check(&self, what: &str) -> Result<()> {
        let Size { width, height } = *self;
        if width == 0 || height == 0 {
            return Err(Error::InvalidImage(format!(
                "{what} is {width}x{height} px; both sides must be at least 1"
            )));
        }
        if width > MAX_SIDE || height > MAX_SIDE || self.pixels() > MAX_PIXELS {
            return Err(Error::LimitExceeded(format!(
                "{what} is {width}x{height} px; at most {MAX_SIDE} px a side and {MAX_PIXELS} px in all"
            )));
        }
        Ok(())
    }
}

/// Axis-parallel rectangle of whole pixels: columns x..x+width, rows y..y+height.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Rect {
    /// First column.
    pub x: usize,
    /// First row.
    pub y: usize,
    /// Columns.
    pub width: usize,
    /// Rows.
    pub height: usize,
}

impl Rect {
    /// Rectangle from its top left corner and its size, in pixels.
    pub const fn new(x: usize, y: usize, width: usize, height: usize) -> Self {
        Self { x, y, width, height }
    }

    /// The rectangle that covers all of `size`.
    pub const fn whole(size: Size) -> Self {
        Self::new(0, 0, size.width, size.height)
    }

    /// Width and height.
    pub const fn size(&self) -> Size {
        Size::new(self.width, self.height)
    }

    /// True where the rectangle lies inside `size`; false also where its end overflows.
    pub fn fits(&self, size: Size) -> bool {
        let end_x = self.x.checked_add(self.width);
        let end_y = self.y.checked_add(self.height);
        end_x.is_some_and(|x| x <= size.width) && end_y.is_some_and(|y| y <= size.height)
    }
}
