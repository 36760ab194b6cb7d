//! Tiles: windows of a pyramid level that are run through the network one by one, with results
//! equal to running the whole level.
//!
//! A convolutional network computes an output from an input window of its receptive field alone. So
//! a tile that sees `halo` more pixels on each side than it *owns* gives the same outputs there as
//! the whole level, provided that its origin keeps the phase of every stride (`align`) and that at
//! the level's border it ends where the level ends, so that the same zero padding follows.

use super::rect::{Rect, Size};
use crate::error::{Error, Result};

/// One tile, in level pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tile {
    /// What the network sees. The origin is a multiple of the alignment; the size is the tile size,
    /// cut off at the level's right and bottom border.
    pub window: Rect,
    /// Detections whose anchor or cell centre lies here are this tile's to report.
    pub owned: Rect,
}

/// One axis cut into windows; lengths and positions in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Axis {
    length: usize,
    window: usize,
    halo: usize,
    count: usize,
}

impl Axis {
    /// `halo` and `window` are multiples of the alignment.
    fn new(length: usize, window: usize, halo: usize) -> Option<Self> {
        if length <= window {
            return Some(Self { length, window, halo, count: 1 });
        }
        let step = window.checked_sub(2 * halo).filter(|&s| s > 0)?;
        Some(Self { length, window, halo, count: 1 + (length - window).div_ceil(step) })
    }

    /// (window start, window end, owned start, owned end) of window `k`.
    fn at(&self, k: usize) -> (usize, usize, usize, usize) {
        let start = if k == 0 { 0 } else { k * (self.window - 2 * self.halo) };
        let end = (start + self.window).min(self.length);
        let owned_start = if k == 0 { 0 } else { start + self.halo };
        let owned_end = if k + 1 == self.count { self.length } else { end - self.halo };
        (start, end, owned_start, owned_end)
    }
}

/// All tiles of a level, computed when asked for: it holds no memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TileGrid {
    x: Axis,
    y: Axis,
}

impl TileGrid {
    /// Cuts a level of `level` px into windows of at most `tile` px.
    ///
    /// `align` is the network's largest stride, `halo` the pixels of context an output needs on each
    /// side (half its receptive field, rounded up); both in level pixels. The halo is rounded up and
    /// the tile size down to multiples of `align`, so a window padded to whole strides never exceeds
    /// `tile`. A side of the level that fits into the tile is not cut.
    ///
    /// Errors: [`Error::InvalidArgument`] where `align` is 0, a side of the level is 0, or a side
    /// must be cut and the tile is not longer than two halos.
    pub fn new(level: Size, tile: Size, align: usize, halo: usize) -> Result<Self> {
        if align == 0 {
            return Err(Error::InvalidArgument(
                "tile alignment 0; it must be the network's stride, at least 1".into(),
            ));
        }
        level.check("level")?;
        let too_small = || {
            Error::InvalidArgument(format!(
                "tiles of {}x{} px cannot cut a level of {}x{} px: a halo of {halo} px at alignment {align} needs \
                 more than {} px a side",
                tile.width,
                tile.height,
                level.width,
                level.height,
                round_up(halo, align).unwrap_or(usize::MAX).saturating_mul(2)
            ))
        };
        let axis = |length: usize, window: usize| {
            let halo = round_up(halo, align)?;
            halo.checked_mul(2)?;
            Axis::new(length, window - window % align, halo)
        };
        let x = axis(level.width, tile.width).ok_or_else(too_small)?;
        let y = axis(level.height, tile.height).ok_or_else(too_small)?;
        Ok(Self { x, y })
    }

    /// Number of tiles, at least 1.
    #[allow(clippy::len_without_is_empty)] // never empty
    pub fn len(&self) -> usize {
        self.x.count * self.y.count
    }

    /// Tile `index` (below [`Self::len`]), counted row by row.
    pub fn get(&self, index: usize) -> Tile {
        assert!(index < self.len(), "tile {index} of {}", self.len());
        let (x0, x1, own_x0, own_x1) = self.x.at(index % self.x.count);
        let (y0, y1, own_y0, own_y1) = self.y.at(index / self.x.count);
        Tile {
            window: Rect::new(x0, y0, x1 - x0, y1 - y0),
            owned: Rect::new(own_x0, own_y0, own_x1 - own_x0, own_y1 - own_y0),
        }
    }

    /// The tiles, row by row.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Tile> + '_ {
        (0..self.len()).map(|i| self.get(i))
    }

    /// Pixels of all windows together: what the network computes, overlaps counted again.
    pub fn window_pixels(&self) -> u64 {
        let along = |axis: &Axis| {
            let overlaps = (axis.count - 1) as u64 * 2 * axis.halo as u64;
            axis.length as u64 + overlaps
        };
        along(&self.x).saturating_mul(along(&self.y))
    }
}

/// Largest tile for which `bytes(tile)` is at most `cap` and that can cut a level of `level` px with
/// the given `align` and `halo` (see [`TileGrid::new`]): multiples of `align`, no larger than the
/// level rounded up. `bytes` must not fall when a side grows; None means "overflows" and counts as
/// too much. It is called a few dozen times.
///
/// Of the tiles that cannot grow in either direction, the search compares three (the largest square
/// lengthened to the right, the same lengthened downwards, full-width strips) and takes the one whose
/// grid computes the fewest pixels. Error: [`Error::LimitExceeded`] naming the smallest tile's need.
pub fn largest_tile(
    level: Size,
    align: usize,
    halo: usize,
    cap: u64,
    bytes: impl Fn(Size) -> Option<u64>,
) -> Result<Size> {
    if align == 0 {
        return Err(Error::InvalidArgument(
            "tile alignment 0; it must be the network's stride, at least 1".into(),
        ));
    }
    level.check("level")?;
    let overflow = || Error::InvalidArgument(format!("a halo of {halo} px at alignment {align} overflows"));
    let least =
        round_up(halo, align).and_then(|h| h.checked_mul(2)?.checked_add(align)).ok_or_else(overflow)?;
    let full_w = round_up(level.width, align).ok_or_else(overflow)?;
    let full_h = round_up(level.height, align).ok_or_else(overflow)?;
    // A side shorter than the least tile is not cut, so its whole length is the least.
    let (least_w, least_h) = (least.min(full_w), least.min(full_h));

    let fits = |w: usize, h: usize| bytes(Size::new(w, h)).is_some_and(|b| b <= cap);
    if !fits(least_w, least_h) {
        let need = bytes(Size::new(least_w, least_h)).map_or("more than 2^64".into(), |b| b.to_string());
        return Err(Error::LimitExceeded(format!(
            "the smallest tile, {least_w}x{least_h} px, needs {need} bytes, the memory cap is {cap}; raise the cap"
        )));
    }
    let widest = |h: usize| grow(least_w, full_w, align, |w| fits(w, h));
    let highest = |w: usize| grow(least_h, full_h, align, |h| fits(w, h));
    let longest = full_w.max(full_h);
    let square = grow(least.min(longest), longest, align, |s| {
        fits(s.clamp(least_w, full_w), s.clamp(least_h, full_h))
    });
    let (square_w, square_h) = (square.clamp(least_w, full_w), square.clamp(least_h, full_h));

    // The second growth of each is needed where only one of the square's sides could still grow.
    let wide = widest(square_h);
    let high = highest(square_w);
    let mut best = Size::new(wide, highest(wide));
    let cost = |tile: Size| TileGrid::new(level, tile, align, halo).map_or(u64::MAX, |g| g.window_pixels());
    let strip = fits(full_w, least_h).then(|| Size::new(full_w, highest(full_w)));
    for tile in [Some(Size::new(widest(high), high)), strip].into_iter().flatten() {
        if cost(tile) < cost(best) {
            best = tile;
        }
    }
    Ok(best)
}

/// Largest length from `low`, in steps of `align` and up to `high`, that fits; `low` fits.
fn grow(low: usize, high: usize, align: usize, fits: impl Fn(usize) -> bool) -> usize {
    let (mut good, mut bad) = (0, (high - low) / align + 1);
    while bad - good > 1 {
        let middle = good + (bad - good) / 2;
        if fits(low + middle * align) {
            good = middle;
        } else {
            bad = middle;
        }
    }
    low + good * align
}

fn round_up(n: usize, align: usize) -> Option<usize> {
    n.checked_next_multiple_of(align)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_level_that_fits_is_one_tile() {
        let grid = TileGrid::new(Size::new(640, 480), Size::new(640, 480), 32, 500).unwrap();
        let whole = Rect::new(0, 0, 640, 480);
        assert_eq!(grid.iter().collect::<Vec<_>>(), [Tile { window: whole, owned: whole }]);
    }

    #[test]
    fn tiles_overlap_by_two_halos() {
        let grid = TileGrid::new(Size::new(100, 10), Size::new(70, 20), 8, 10).unwrap();
        // Tile 64 (aligned down), halo 16 (aligned up), so windows start every 32.
        let x: Vec<_> = grid.iter().map(|t| (t.window.x, t.window.width, t.owned.x, t.owned.width)).collect();
        assert_eq!(x, [(0, 64, 0, 48), (32, 64, 48, 32), (64, 36, 80, 20)]);
        assert_eq!(grid.window_pixels(), (64 + 64 + 36) * 10);
    }

    #[test]
    fn a_tile_without_room_beside_its_halos_is_refused() {
        let level = Size::new(1000, 1000);
        assert!(TileGrid::new(level, Size::new(64, 64), 32, 32).is_err());
        assert!(TileGrid::new(level, Size::new(96, 96), 32, 32).is_ok());
        assert!(TileGrid::new(level, Size::new(96, 96), 0, 32).is_err());
        assert!(TileGrid::new(level, Size::new(96, 96), 32, usize::MAX).is_err());
        assert!(TileGrid::new(level, Size::new(96, 96), usize::MAX, 1).is_err());
        assert!(largest_tile(level, 32, 32, 96 * 96 - 1, |s| Some(s.pixels())).is_err());
        assert!(largest_tile(level, 32, 32, u64::MAX, |_| None).is_err());
        assert!(largest_tile(level, 32, usize::MAX, u64::MAX, |_| Some(0)).is_err());
    }

    /// Axis lengths of a small level's rectangles, so that every pixel can be visited.
    fn case() -> impl Strategy<Value = (Size, Size, usize, usize)> {
        (1usize..90, 1usize..90, 1usize..9, 0usize..12, 0usize..30, 0usize..30).prop_map(
            |(w, h, align, halo, a, b)| {
                let least = 2 * halo.next_multiple_of(align) + align;
                (Size::new(w, h), Size::new(least + a, least + b), align, halo)
            },
        )
    }

    proptest! {
        #[test]
        fn every_pixel_is_owned_once_and_sees_its_halo((level, tile, align, halo) in case()) {
            let grid = TileGrid::new(level, tile, align, halo).unwrap();
            let mut owners = vec![0; level.width * level.height];
            let mut pixels = 0;
            for Tile { window, owned } in grid.iter() {
                prop_assert!(window.fits(level));
                prop_assert!(window.width <= tile.width && window.height <= tile.height);
                prop_assert!(window.x % align == 0 && window.y % align == 0);
                // Padding to whole strides stays within the tile.
                prop_assert!(window.width.next_multiple_of(align) <= tile.width);
                prop_assert!(window.height.next_multiple_of(align) <= tile.height);
                prop_assert!(owned.width > 0 && owned.height > 0);
                pixels += window.size().pixels();
                let (right, bottom) = (window.x + window.width, window.y + window.height);
                for y in owned.y..owned.y + owned.height {
                    for x in owned.x..owned.x + owned.width {
                        owners[y * level.width + x] += 1;
                        prop_assert!(window.x == 0 || x >= window.x + halo);
                        prop_assert!(window.y == 0 || y >= window.y + halo);
                        prop_assert!(right == level.width || x + halo < right);
                        prop_assert!(bottom == level.height || y + halo < bottom);
                    }
                }
            }
            prop_assert!(owners.iter().all(|&n| n == 1));
            prop_assert_eq!(pixels, grid.window_pixels());
        }

        #[test]
        fn the_largest_tile_fits_the_cap_and_cannot_grow(
            (level, _, align, halo) in case(), cap in 1u64..20_000, fixed in 0u64..300,
        ) {
            let bytes = |s: Size| Some(fixed + s.pixels());
            match largest_tile(level, align, halo, cap, bytes) {
                Ok(tile) => {
                    prop_assert!(bytes(tile) <= Some(cap));
                    prop_assert!(TileGrid::new(level, tile, align, halo).is_ok());
                    let wider = Size::new(tile.width + align, tile.height);
                    let higher = Size::new(tile.width, tile.height + align);
                    prop_assert!(tile.width >= level.width || bytes(wider) > Some(cap));
                    prop_assert!(tile.height >= level.height || bytes(higher) > Some(cap));
                }
                Err(_) => {
                    let least = 2 * halo.next_multiple_of(align) + align;
                    let w = least.min(level.width.next_multiple_of(align));
                    let h = least.min(level.height.next_multiple_of(align));
                    prop_assert!(bytes(Size::new(w, h)) > Some(cap));
                }
            }
        }

        #[test]
        fn a_cap_that_holds_the_level_gives_one_tile((level, _, align, halo) in case()) {
            let tile = largest_tile(level, align, halo, 1 << 40, |s| Some(s.pixels())).unwrap();
            prop_assert_eq!(TileGrid::new(level, tile, align, halo).unwrap().len(), 1);
        }
    }
}
