//! Picture files, as the program and the trainer read them. What goes wrong is told without the file's name, which the
//! caller knows.

use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageError, ImageFormat, ImageReader, Limits};
use std::io::{BufRead, BufReader, Cursor, Seek};
use std::path::{Path, PathBuf};

/// Most pixels of a picture: small files can announce far more than memory holds.
const MAX_PIXELS: u64 = 500_000_000;
/// Most bytes that a decoder may allocate.
const MAX_BYTES: u64 = 2 << 30;
/// What the decoders read.
pub const FORMATS: &str = "PNG, JPEG, WebP or BMP";
/// Their files' extensions, tried where a picture is not found under its own name.
pub const EXTENSIONS: [&str; 5] = ["jpg", "jpeg", "png", "webp", "bmp"];

/// Decodes a file; returns the picture as stored and how to turn it upright (EXIF). Fails on truncated JPEG files, too,
/// whose missing part the decoder would fill with grey.
pub fn read(path: &Path) -> Result<(DynamicImage, Orientation), String> {
    if path.is_dir() {
        return Err("this is a folder, not a picture".into());
    }
    let bytes = std::fs::read(path).map_err(|e| e.to_string())?;
    if bytes.is_empty() {
        return Err("the file is empty".into());
    }
    let (mut decoder, format) = decoder(Cursor::new(&bytes))?;
    // Where it cannot be read, the picture is taken as it is stored.
    let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    let image = DynamicImage::from_decoder(decoder).map_err(describe)?;
    if format == ImageFormat::Jpeg && !jpeg_is_complete(&bytes) {
        return Err("the JPEG file is truncated".into());
    }
    Ok((image, orientation))
}

/// Width and height of the upright picture, from its header.
pub fn upright_size(path: &Path) -> Result<(u32, u32), String> {
    let file = std::fs::File::open(path).map_err(|e| e.to_string())?;
    let (mut decoder, _) = decoder(BufReader::new(file))?;
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

/// The picture file that an annotation means: `path` itself, or the same name with one of the [`EXTENSIONS`] behind it or in
/// place of its own (data sets get re-encoded).
pub fn find(path: &Path) -> Result<PathBuf, String> {
    if path.is_file() {
        return Ok(path.to_path_buf());
    }
    // Names from lists often have no extension, and may hold dots.
    let appended = EXTENSIONS.iter().map(|e| {
        let mut name = path.as_os_str().to_owned();
        name.push(".");
        name.push(e);
        PathBuf::from(name)
    });
    let replaced = EXTENSIONS.iter().map(|e| path.with_extension(e));
    appended.chain(replaced).find(|p| p.is_file()).ok_or_else(|| format!("no such picture ({FORMATS})"))
}

fn decoder<'a>(data: impl BufRead + Seek + 'a) -> Result<(impl ImageDecoder + 'a, ImageFormat), String> {
    let mut reader = ImageReader::new(data).with_guessed_format().map_err(|e| e.to_string())?;
    let format = reader.format().ok_or_else(|| format!("not a picture ({FORMATS})"))?;
    let mut limits = Limits::no_limits();
    limits.max_alloc = Some(MAX_BYTES);
    reader.limits(limits);
    let decoder = reader.into_decoder().map_err(describe)?;
    let (w, h) = decoder.dimensions();
    let pixels = u64::from(w) * u64::from(h);
    if pixels == 0 {
        return Err(format!("the picture has no pixels ({w}x{h})"));
    }
    if pixels > MAX_PIXELS || decoder.total_bytes() > MAX_BYTES {
        return Err(format!(
            "{w}x{h} px is more than is decoded (at most {} megapixels)",
            MAX_PIXELS / 1_000_000
        ));
    }
    Ok((decoder, format))
}

fn describe(error: ImageError) -> String {
    match error {
        ImageError::Unsupported(e) => format!("{e}; read are {FORMATS}"),
        ImageError::Limits(e) => format!("the picture is too large to decode ({e})"),
        ImageError::IoError(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => {
            "the picture is truncated".into()
        }
        e => format!("the picture is damaged ({e})"),
    }
}

/// Whether the scans of a JPEG file reach their end marker; the decoder fills up what is missing with grey.
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
