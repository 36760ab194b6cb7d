//! Pictures decoded to RGB.

use crate::picture;
use crate::{Error, Result};
use std::path::{Path, PathBuf};

/// A decoded, upright picture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    /// Pixels a row.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// height x width x 3, RGB.
    pub pixels: Vec<u8>,
}

impl Picture {
    /// Decodes a file and turns it upright (EXIF). Alpha is dropped, grey becomes RGB.
    pub fn open(path: &Path) -> Result<Self> {
        let (mut image, orientation) = picture::read(path)?;
        image.apply_orientation(orientation);
        let (width, height) = (image.width() as usize, image.height() as usize);
        Ok(Self { width, height, pixels: image.into_rgb8().into_raw() })
    }
}

/// The picture file that an annotation means; an error that names it where there is none under any extension.
pub fn find_picture(path: &Path) -> Result<PathBuf> {
    picture::find(path).ok_or_else(|| {
        Error::InvalidData(format!("{}: no such picture ({})", path.display(), picture::FORMATS))
    })
}
