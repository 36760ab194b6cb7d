//! Pictures as the detector takes them.

use anyhow::{anyhow, Result};
use farface::detect::{BBox, Ellipse, Face};
use farface::picture;
use farface::pixels::{ImageView, Orientation, PixelFormat, Placement};
use image::{DynamicImage, RgbImage};
use std::path::{Path, PathBuf};

/// A decoded picture as stored in its file, and how to turn it upright (EXIF).
pub struct Picture {
    /// Luma8, Rgb8 or Rgba8.
    image: DynamicImage,
    orientation: image::metadata::Orientation,
}

impl Picture {
    /// Reads a picture; the error names the file.
    pub fn open(path: &Path) -> Result<Self> {
        let (image, orientation) = picture::read(path).map_err(|e| match e {
            // It names the file and what is wrong with it.
            farface::Error::InvalidData(what) => anyhow!(what),
            e => e.into(),
        })?;
        let image = match image {
            kept @ (DynamicImage::ImageLuma8(_)
            | DynamicImage::ImageRgb8(_)
            | DynamicImage::ImageRgba8(_)) => kept,
            other => DynamicImage::ImageRgb8(other.into_rgb8()),
        };
        Ok(Self { image, orientation })
    }

    /// The stored pixels with their orientation, as the detector takes them.
    pub fn view(&self) -> Result<ImageView<'_>> {
        let (format, bytes) = match &self.image {
            DynamicImage::ImageLuma8(i) => (PixelFormat::Gray8, i.as_raw()),
            DynamicImage::ImageRgb8(i) => (PixelFormat::Rgb8, i.as_raw()),
            DynamicImage::ImageRgba8(i) => (PixelFormat::Rgba8, i.as_raw()),
            _ => unreachable!("open() converts every other kind"),
        };
        let (w, h) = (self.image.width() as usize, self.image.height() as usize);
        let orientation = Orientation::from_exif(self.orientation.to_exif().into())?;
        Ok(ImageView::packed(w, h, format, bytes)?.with_orientation(orientation))
    }

    /// The picture as a viewer shows it.
    pub fn into_upright(mut self) -> RgbImage {
        self.image.apply_orientation(self.orientation);
        self.image.into_rgb8()
    }
}

/// The picture file that an annotation means.
pub fn find(path: &Path) -> Result<PathBuf> {
    picture::find(path).ok_or_else(|| anyhow!("{}: no such picture ({})", path.display(), picture::FORMATS))
}

/// The face in pixels of the upright picture, which the program reports and draws in.
pub fn upright_face(face: &Face, placement: &Placement) -> Face {
    let b = face.bbox;
    let ([ax, ay], [bx, by]) = (placement.upright_point([b.x1, b.y1]), placement.upright_point([b.x2, b.y2]));
    Face {
        bbox: BBox::new(ax.min(bx), ay.min(by), ax.max(bx), ay.max(by)),
        score: face.score,
        landmarks: face.landmarks.map(|points| points.map(|p| placement.upright_point(p))),
        ellipse: face.ellipse.map(|e| {
            let [ox, oy] = placement.upright_point([0.0, 0.0]);
            let [dx, dy] = placement.upright_point([e.angle.cos(), e.angle.sin()]);
            let angle = (dy - oy).atan2(dx - ox);
            Ellipse { center: placement.upright_point(e.center), half_axes: e.half_axes, angle }
        }),
    }
}
