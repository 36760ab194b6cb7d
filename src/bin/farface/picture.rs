//! Picture files.

use anyhow::{anyhow, bail, Context, Result};
use farface::detect::{BBox, Ellipse, Face};
use farface::pixels::{ImageView, Orientation, PixelFormat, Placement};
use image::{DynamicImage, ImageDecoder, ImageError, ImageReader, Limits, RgbImage};
use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};

/// Most pixels of a picture: small files can announce far more than memory holds.
const MAX_PIXELS: u64 = 500_000_000;
/// Most bytes that a decoder may allocate.
const MAX_BYTES: u64 = 2 << 30;
/// What the decoders read.
const FORMATS: &str = "PNG, JPEG, WebP or BMP";

/// A decoded picture as stored in its file, and how to turn it upright (EXIF).
pub struct Picture {
    /// Luma8, Rgb8 or Rgba8.
    image: DynamicImage,
    orientation: image::metadata::Orientation,
}

impl Picture {
    /// Reads a picture; the error names the file.
    pub fn open(path: &Path) -> Result<Self> {
        Self::read(path).with_context(|| path.display().to_string())
    }

    fn read(path: &Path) -> Result<Self> {
        let file = File::open(path)?;
        let about = file.metadata()?;
        if about.is_dir() {
            bail!("this is a folder, not a picture");
        }
        if about.is_file() && about.len() == 0 {
            bail!("the file is empty");
        }
        let mut reader = ImageReader::new(BufReader::new(file)).with_guessed_format()?;
        let Some(format) = reader.format() else { bail!("not a picture ({FORMATS})") };
        let mut limits = Limits::no_limits();
        limits.max_alloc = Some(MAX_BYTES);
        reader.limits(limits);
        let mut decoder = reader.into_decoder().map_err(describe)?;
        let (w, h) = decoder.dimensions();
        let pixels = u64::from(w) * u64::from(h);
        if pixels == 0 {
            bail!("the picture has no pixels ({w}x{h})");
        }
        if pixels > MAX_PIXELS || decoder.total_bytes() > MAX_BYTES {
            bail!(
                "{w}x{h} px is more than this program decodes (at most {} megapixels)",
                MAX_PIXELS / 1_000_000
            );
        }
        // Where it cannot be read, the picture is taken as it is stored.
        let orientation = decoder.orientation().unwrap_or(image::metadata::Orientation::NoTransforms);
        let image = match DynamicImage::from_decoder(decoder).map_err(describe)? {
            kept @ (DynamicImage::ImageLuma8(_)
            | DynamicImage::ImageRgb8(_)
            | DynamicImage::ImageRgba8(_)) => kept,
            other => DynamicImage::ImageRgb8(other.into_rgb8()),
        };
        if format == image::ImageFormat::Jpeg && !jpeg_is_complete(&std::fs::read(path)?) {
            bail!("the JPEG file is truncated");
        }
        Ok(Self { image, orientation })
    }

    /// The stored pixels with their orientation, as the detector takes them.
    pub fn view(&self) -> Result<ImageView<'_>> {
        let (format, bytes) = match &self.image {
            DynamicImage::ImageLuma8(i) => (PixelFormat::Gray8, i.as_raw()),
            DynamicImage::ImageRgb8(i) => (PixelFormat::Rgb8, i.as_raw()),
            DynamicImage::ImageRgba8(i) => (PixelFormat::Rgba8, i.as_raw()),
            _ => unreachable!("read() converts every other kind"),
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

/// Width and height of the upright picture, without decoding it.
pub fn upright_size(path: &Path) -> Result<(u32, u32)> {
    let size = || -> Result<(u32, u32)> {
        let mut decoder = ImageReader::open(path)?.with_guessed_format()?.into_decoder().map_err(describe)?;
        let (w, h) = decoder.dimensions();
        let exif = decoder.orientation().map_or(1, |o| o.to_exif());
        Ok(if Orientation::from_exif(exif.into())?.swaps_sides() { (h, w) } else { (w, h) })
    };
    size().with_context(|| path.display().to_string())
}

fn describe(error: ImageError) -> anyhow::Error {
    match error {
        ImageError::Unsupported(e) => anyhow!("{e}; this program reads {FORMATS}"),
        ImageError::Limits(e) => anyhow!("the picture is too large to decode ({e})"),
        ImageError::IoError(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => {
            anyhow!("the picture is truncated")
        }
        e => anyhow!("the picture is damaged ({e})"),
    }
}

/// Whether the scans of a JPEG file reach their end marker; the decoder fills up what is missing
/// with grey.
fn jpeg_is_complete(file: &[u8]) -> bool {
    /// Start of the first scan. A thumbnail, which has markers of its own, lies before it.
    const SCAN: u8 = 0xDA;
    let mut at = 2;
    while let Some(&[0xFF, marker, high, low]) = file.get(at..at + 4) {
        if marker == SCAN {
            // Within a scan, 0xFF bytes of data are followed by 0.
            return file[at..].windows(2).any(|w| w == [0xFF, 0xD9]);
        }
        // Any number of 0xFF may fill the space before a marker.
        at += if marker == 0xFF { 1 } else { 2 + usize::from(u16::from_be_bytes([high, low])) };
    }
    false
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

/// The picture file that an annotation means: `path` itself, or the same name with another of the
/// extensions read here (data sets get re-encoded).
pub fn find(path: &Path) -> Result<PathBuf> {
    if path.is_file() {
        return Ok(path.to_path_buf());
    }
    let others = ["jpg", "jpeg", "png", "webp", "bmp"].map(|e| path.with_extension(e));
    // Names from lists often have no extension, and may hold dots.
    let appended = ["jpg", "jpeg", "png", "webp", "bmp"].map(|e| {
        let mut name = path.as_os_str().to_owned();
        name.push(".");
        name.push(e);
        PathBuf::from(name)
    });
    let found = appended.into_iter().chain(others).find(|p| p.is_file());
    found.with_context(|| format!("{}: no such picture ({FORMATS})", path.display()))
}

#[cfg(test)]
mod tests {
    use super::jpeg_is_complete;

    #[test]
    fn the_end_marker_counts_only_behind_the_first_scan() {
        let mut file = vec![0xFF, 0xD8];
        file.extend([0xFF, 0xE1, 0, 8, 0xFF, 0xD8, 9, 9, 0xFF, 0xD9]); // a thumbnail with its own end
        file.extend([0xFF, 0xFF, 0xFF, 0xDA, 0, 4, 1, 2, 7, 0xFF, 0x00, 7]); // filled up, then a scan
        assert!(!jpeg_is_complete(&file));
        file.extend([0xFF, 0xD9, 1, 2, 3]);
        assert!(jpeg_is_complete(&file));
        for n in 0..file.len() - 3 {
            assert!(!jpeg_is_complete(&file[..n]), "{n}");
        }
    }
}
