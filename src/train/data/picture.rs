//! Picture files, decoded to RGB.

use std::io::{BufRead, BufReader, Cursor, Seek};
use std::path::{Path, PathBuf};

use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits};

use crate::{Error, Result};

/// Most pixels of a picture: small files can announce far more than memory holds.
const MAX_PIXELS: u64 = 100_000_000;
/// Most bytes that a decoder may allocate.
const MAX_BYTES: u64 = 1 << 30;
/// What is read, and tried where a picture is not found under its own name.
pub(super) const EXTENSIONS: [&str; 5] = ["webp", "jpg", "jpeg", "png", "bmp"];

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
    /// Decodes a file and turns it upright (EXIF). Alpha is dropped, grey becomes RGB. Fails on
    /// truncated JPEG files, too, whose missing part the decoder would fill with grey.
    pub fn open(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
        let bad = |what: String| Error::InvalidData(format!("{}: {what}", path.display()));
        let (mut decoder, format) = decoder(Cursor::new(&bytes)).map_err(bad)?;
        if format == ImageFormat::Jpeg && !jpeg_is_complete(&bytes) {
            return Err(bad("the JPEG file is truncated".into()));
        }
        // Where it cannot be read, the picture is taken as it is stored.
        let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
        let mut image = DynamicImage::from_decoder(decoder).map_err(|e| bad(e.to_string()))?;
        image.apply_orientation(orientation);
        let (width, height) = (image.width() as usize, image.height() as usize);
        Ok(Self { width, height, pixels: image.into_rgb8().into_raw() })
    }
}

/// Width and height of the upright picture, from its header.
pub(super) fn upright_size(path: &Path) -> Result<(u32, u32)> {
    let file = std::fs::File::open(path).map_err(|e| Error::io(path, e))?;
    let (mut decoder, _) = decoder(BufReader::new(file))
        .map_err(|what| Error::InvalidData(format!("{}: {what}", path.display())))?;
    let (w, h) = decoder.dimensions();
    let turned = matches!(
        decoder.orientation(),
        Ok(Orientation::Rotate90
            | Orientation::Rotate270
            | Orientation::Rotate90FlipH
            | Orientation::Rotate270FlipH)
    );
    Ok(if turned { (h, w) } else { (w, h) })
}

fn decoder<'a>(
    data: impl BufRead + Seek + 'a,
) -> std::result::Result<(impl ImageDecoder + 'a, ImageFormat), String> {
    let mut reader = ImageReader::new(data).with_guessed_format().map_err(|e| e.to_string())?;
    let format = reader.format().ok_or("not a PNG, JPEG, WebP or BMP picture")?;
    let mut limits = Limits::no_limits();
    limits.max_alloc = Some(MAX_BYTES);
    reader.limits(limits);
    let decoder = reader.into_decoder().map_err(|e| e.to_string())?;
    let (w, h) = decoder.dimensions();
    let pixels = u64::from(w) * u64::from(h);
    if pixels == 0 || pixels > MAX_PIXELS || decoder.total_bytes() > MAX_BYTES {
        return Err(format!("{w}x{h} px is outside what is decoded (1 to {MAX_PIXELS} pixels)"));
    }
    Ok((decoder, format))
}

/// Whether an end marker follows the start of the last scan. Thumbnails lie before it, and within a
/// scan 0xFF bytes of data are followed by 0.
fn jpeg_is_complete(file: &[u8]) -> bool {
    let last = |marker: u8| file.windows(2).rposition(|w| w == [0xFF, marker]);
    matches!((last(0xDA), last(0xD9)), (Some(scan), Some(end)) if end > scan)
}

/// The picture file that an annotation means; an error that names it where there is none under any extension.
pub fn find_picture(path: &Path) -> Result<PathBuf> {
    find(path).ok_or_else(|| {
        Error::io(
            path,
            std::io::Error::new(std::io::ErrorKind::NotFound, "no such picture, under any extension"),
        )
    })
}

/// The picture file that an annotation means: `path` itself, or the same name with another of the
/// extensions read here (data sets get re-encoded).
pub(super) fn find(path: &Path) -> Option<PathBuf> {
    if path.is_file() {
        return Some(path.to_path_buf());
    }
    EXTENSIONS.iter().map(|e| path.with_extension(e)).find(|p| p.is_file())
}
