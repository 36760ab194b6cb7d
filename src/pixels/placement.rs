//! Orientation of a stored picture, and the way back from upright coordinates to stored ones.

use super::rect::Rect;
use crate::error::{Error, Result};

/// Clockwise rotation by quarter turns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Rotation {
    /// None.
    #[default]
    Deg0,
    /// A quarter turn clockwise: the left column becomes the top row.
    Deg90,
    /// Half a turn.
    Deg180,
    /// A quarter turn counter-clockwise: the right column becomes the top row.
    Deg270,
}

impl Rotation {
    /// Rotation by `degrees` clockwise, which must be 0, 90, 180 or 270.
    pub fn from_degrees(degrees: u32) -> Result<Self> {
        match degrees {
            0 => Ok(Self::Deg0),
            90 => Ok(Self::Deg90),
            180 => Ok(Self::Deg180),
            270 => Ok(Self::Deg270),
            _ => Err(Error::InvalidImage(format!("rotation of {degrees} degrees; use 0, 90, 180 or 270"))),
        }
    }
}

/// What must be done to the stored picture to make it upright: first mirror it left to right where
/// `mirrored` is set, then rotate it clockwise by `rotation`.
///
/// EXIF tag 0x0112 says the same with one number, whose names tell where the stored row 0 and
/// column 0 lie in the upright picture:
///
/// | EXIF | row 0, column 0 | mirrored | rotation |
/// |------|-----------------|----------|----------|
/// | 1    | top, left       | no       | 0        |
/// | 2    | top, right      | yes      | 0        |
/// | 3    | bottom, right   | no       | 180      |
/// | 4    | bottom, left    | yes      | 180      |
/// | 5    | left, top       | yes      | 270      |
/// | 6    | right, top      | no       | 90       |
/// | 7    | right, bottom   | yes      | 90       |
/// | 8    | left, bottom    | no       | 270      |
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct Orientation {
    /// Mirrored left to right, before the rotation.
    pub mirrored: bool,
    /// Clockwise rotation, after the mirroring.
    pub rotation: Rotation,
}

impl Orientation {
    /// The stored picture is upright already.
    pub const UPRIGHT: Self = Self { mirrored: false, rotation: Rotation::Deg0 };

    /// All eight, in the order of EXIF 1 to 8.
    pub const ALL: [Self; 8] = {
        use Rotation::{Deg0, Deg180, Deg270, Deg90};
        [
            Self { mirrored: false, rotation: Deg0 },
            Self { mirrored: true, rotation: Deg0 },
            Self { mirrored: false, rotation: Deg180 },
            Self { mirrored: true, rotation: Deg180 },
            Self { mirrored: true, rotation: Deg270 },
            Self { mirrored: false, rotation: Deg90 },
            Self { mirrored: true, rotation: Deg90 },
            Self { mirrored: false, rotation: Deg270 },
        ]
    };

    /// Orientation of EXIF tag 0x0112, 1 to 8.
    pub fn from_exif(value: u16) -> Result<Self> {
        let index = usize::from(value).wrapping_sub(1);
        Self::ALL
            .get(index)
            .copied()
            .ok_or_else(|| Error::InvalidImage(format!("EXIF orientation {value}; it must be 1 to 8")))
    }

    /// The EXIF number, 1 to 8.
    pub fn exif(self) -> u16 {
        let index = Self::ALL.iter().position(|&o| o == self).expect("ALL holds every orientation");
        index as u16 + 1
    }

    /// The upright picture in a mirror, left and right exchanged.
    pub fn mirror(self) -> Self {
        // Turning after mirroring is mirroring after turning the other way.
        let rotation = match self.rotation {
            Rotation::Deg90 => Rotation::Deg270,
            Rotation::Deg270 => Rotation::Deg90,
            other => other,
        };
        Self { mirrored: !self.mirrored, rotation }
    }

    /// True where the upright picture is as wide as the stored one is high.
    pub fn swaps_sides(self) -> bool {
        matches!(self.rotation, Rotation::Deg90 | Rotation::Deg270)
    }
}

/// Maps coordinates of the upright region of interest to those of the stored, whole picture, and
/// back. Points are continuous (a pixel's centre is at +0.5), all units are pixels.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Placement {
    roi: Rect,
    /// Stored x runs along upright y.
    transposed: bool,
    /// Stored x counts from the region's right edge.
    flip_x: bool,
    /// Stored y counts from the region's bottom edge.
    flip_y: bool,
}

impl Placement {
    /// Placement of region `roi` (stored pixels) shown under `orientation`.
    pub fn new(roi: Rect, orientation: Orientation) -> Self {
        let m = orientation.mirrored;
        let (transposed, flip_x, flip_y) = match orientation.rotation {
            Rotation::Deg0 => (false, m, false),
            Rotation::Deg90 => (true, m, true),
            Rotation::Deg180 => (false, !m, true),
            Rotation::Deg270 => (true, !m, false),
        };
        Self { roi, transposed, flip_x, flip_y }
    }

    /// The region of interest in stored pixels.
    pub fn roi(&self) -> Rect {
        self.roi
    }

    /// True where an upright row is a stored column.
    pub fn transposed(&self) -> bool {
        self.transposed
    }

    /// True where stored x runs against the upright axis it lies along.
    pub fn flip_x(&self) -> bool {
        self.flip_x
    }

    /// True where stored y runs against the upright axis it lies along.
    pub fn flip_y(&self) -> bool {
        self.flip_y
    }

    /// Stored point `[x, y]` of an upright point.
    pub fn stored_point(&self, upright: [f32; 2]) -> [f32; 2] {
        let [x, y] = if self.transposed { [upright[1], upright[0]] } else { upright };
        let x = if self.flip_x { self.roi.width as f32 - x } else { x };
        let y = if self.flip_y { self.roi.height as f32 - y } else { y };
        [self.roi.x as f32 + x, self.roi.y as f32 + y]
    }

    /// Upright point `[x, y]` of a stored point: the inverse of [`Self::stored_point`].
    pub fn upright_point(&self, stored: [f32; 2]) -> [f32; 2] {
        let x = stored[0] - self.roi.x as f32;
        let y = stored[1] - self.roi.y as f32;
        let x = if self.flip_x { self.roi.width as f32 - x } else { x };
        let y = if self.flip_y { self.roi.height as f32 - y } else { y };
        if self.transposed {
            [y, x]
        } else {
            [x, y]
        }
    }

    /// Stored box `[x, y, width, height]` (top left corner, size) of an upright box.
    pub fn stored_box(&self, upright: [f32; 4]) -> [f32; 4] {
        let [x, y, w, h] = upright;
        // The corner that becomes the top left one follows from the flips.
        let (far_x, far_y) =
            if self.transposed { (self.flip_y, self.flip_x) } else { (self.flip_x, self.flip_y) };
        let corner = [if far_x { x + w } else { x }, if far_y { y + h } else { y }];
        let [sx, sy] = self.stored_point(corner);
        if self.transposed {
            [sx, sy, h, w]
        } else {
            [sx, sy, w, h]
        }
    }

    /// Stored direction `[dx, dy]` of an upright direction, for the axes of ellipses.
    pub fn stored_direction(&self, upright: [f32; 2]) -> [f32; 2] {
        let [dx, dy] = if self.transposed { [upright[1], upright[0]] } else { upright };
        [if self.flip_x { -dx } else { dx }, if self.flip_y { -dy } else { dy }]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The definition, step by step on pixels: mirror, then rotate clockwise. (h rows of w) -> rows.
    fn upright(mut picture: Vec<Vec<(usize, usize)>>, o: Orientation) -> Vec<Vec<(usize, usize)>> {
        if o.mirrored {
            picture.iter_mut().for_each(|row| row.reverse());
        }
        let turns = match o.rotation {
            Rotation::Deg0 => 0,
            Rotation::Deg90 => 1,
            Rotation::Deg180 => 2,
            Rotation::Deg270 => 3,
        };
        for _ in 0..turns {
            let (h, w) = (picture.len(), picture[0].len());
            // Clockwise: the new row x is the old column x read from the bottom up.
            picture = (0..w).map(|x| (0..h).rev().map(|y| picture[y][x]).collect()).collect();
        }
        picture
    }

    #[test]
    fn placement_undoes_all_eight_orientations() {
        let roi = Rect::new(3, 5, 4, 2);
        let stored: Vec<Vec<_>> = (0..2).map(|y| (0..4).map(|x| (3 + x, 5 + y)).collect()).collect();
        for o in Orientation::ALL {
            let place = Placement::new(roi, o);
            let picture = upright(stored.clone(), o);
            assert_eq!(o.swaps_sides(), picture.len() == 4, "{o:?}");
            for (y, row) in picture.iter().enumerate() {
                for (x, &(sx, sy)) in row.iter().enumerate() {
                    let centre = [x as f32 + 0.5, y as f32 + 0.5];
                    let [px, py] = place.stored_point(centre);
                    assert_eq!([px, py], [sx as f32 + 0.5, sy as f32 + 0.5], "{o:?}");
                    assert_eq!(place.upright_point([px, py]), centre, "{o:?}");
                    let pixel = place.stored_box([x as f32, y as f32, 1.0, 1.0]);
                    assert_eq!(pixel, [sx as f32, sy as f32, 1.0, 1.0], "{o:?}");
                }
            }
            let whole = [0.0, 0.0, picture[0].len() as f32, picture.len() as f32];
            assert_eq!(place.stored_box(whole), [3.0, 5.0, 4.0, 2.0], "{o:?}");
            let (a, b) = (place.stored_point([1.0, 1.0]), place.stored_point([1.5, 1.25]));
            assert_eq!(place.stored_direction([0.5, 0.25]), [b[0] - a[0], b[1] - a[1]], "{o:?}");
        }
    }

    #[test]
    fn a_mirror_exchanges_left_and_right_of_the_upright_picture() {
        let stored: Vec<Vec<_>> = (0..2).map(|y| (0..3).map(|x| (x, y)).collect()).collect();
        for o in Orientation::ALL {
            let mut mirrored = upright(stored.clone(), o);
            mirrored.iter_mut().for_each(|row| row.reverse());
            assert_eq!(upright(stored.clone(), o.mirror()), mirrored, "{o:?}");
            assert_eq!(o.mirror().mirror(), o);
        }
    }

    #[test]
    fn exif_numbers_say_where_row_0_and_column_0_lie() {
        // (side of the upright picture that stored row 0 is on, side that stored column 0 is on)
        let sides = ["top left", "top right", "bottom right", "bottom left"];
        let swapped = ["left top", "right top", "right bottom", "left bottom"];
        let stored: Vec<Vec<_>> = (0..3).map(|y| (0..3).map(|x| (x, y)).collect()).collect();
        for (i, name) in sides.iter().chain(&swapped).enumerate() {
            let o = Orientation::from_exif(i as u16 + 1).unwrap();
            assert_eq!(o.exif(), i as u16 + 1);
            let p = upright(stored.clone(), o);
            let side = |f: &dyn Fn((usize, usize)) -> bool| match () {
                _ if p[0].iter().all(|&q| f(q)) => "top",
                _ if p[2].iter().all(|&q| f(q)) => "bottom",
                _ if p.iter().all(|row| f(row[0])) => "left",
                _ => "right",
            };
            assert_eq!(*name, format!("{} {}", side(&|q| q.1 == 0), side(&|q| q.0 == 0)));
        }
        assert!(Orientation::from_exif(0).is_err() && Orientation::from_exif(9).is_err());
        assert!(Rotation::from_degrees(45).is_err());
    }
}
