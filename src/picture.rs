//! Picture files, as the program and the trainer read them. Errors name the file; [`Error::Io`] is one of reading it, which may
//! go better another time, [`Error::InvalidData`] one of what it holds.

use crate::error::{Error, Result};
use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageError, ImageFormat, ImageReader, Limits};
use std::fs::File;
use std::io::{BufRead, BufReader, Cursor, ErrorKind, Read, Seek};
use std::path::{Path, PathBuf};

/// Most pixels of a picture: small files can announce far more than memory holds.
const MAX_PIXELS: u64 = 500_000_000;
/// Most bytes of a file that are read, and that a decoder may allocate.
const MAX_BYTES: u64 = 2 << 30;
/// Bytes that tell a format.
const SIGNATURE: u64 = 64;
/// What the decoders read.
pub const FORMATS: &str = "PNG, JPEG, WebP or BMP";
/// Their files' extensions, tried where a picture is not found under its own name.
pub const EXTENSIONS: [&str; 5] = ["jpg", "jpeg", "png", "webp", "bmp"];

/// Decodes a file; returns the picture as stored and how to turn it upright (EXIF). Fails on truncated JPEG files, too,
/// whose missing part the decoder would fill with grey. What is no picture is not read beyond its first bytes.
pub fn read(path: &Path) -> Result<(DynamicImage, Orientation)> {
    if path.is_dir() {
        return Err(bad(path, "this is a folder, not a picture"));
    }
    let io = |e| Error::io(path, e);
    let (mut file, mut bytes) = (File::open(path).map_err(io)?, Vec::new());
    file.by_ref().take(SIGNATURE).read_to_end(&mut bytes).map_err(io)?;
    if bytes.is_empty() {
        return Err(bad(path, "the file is empty"));
    }
    let format = image::guess_format(&bytes).map_err(|_| no_picture(path))?;
    file.take(MAX_BYTES).read_to_end(&mut bytes).map_err(io)?;
    let mut decoder = decoder(path, Cursor::new(&bytes))?;
    // Where it cannot be read, the picture is taken as it is stored.
    let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    let image = DynamicImage::from_decoder(decoder).map_err(|e| describe(path, e))?;
    if format == ImageFormat::Jpeg && !jpeg_is_complete(&bytes) {
        return Err(bad(path, "the JPEG file is truncated"));
    }
    Ok((image, orientation))
}

/// Width and height of the upright picture, from its header.
pub fn upright_size(path: &Path) -> Result<(u32, u32)> {
    let file = File::open(path).map_err(|e| Error::io(path, e))?;
    let mut decoder = decoder(path, BufReader::new(file))?;
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

/// Whether a file has the extension of a picture.
pub fn is_picture(path: &Path) -> bool {
    let extension = path.extension().and_then(|e| e.to_str()).map(str::to_ascii_lowercase);
    extension.is_some_and(|e| EXTENSIONS.contains(&e.as_str()))
}

/// The picture file that an annotation means: `path` itself, or the same name with one of the [`EXTENSIONS`] behind it or in
/// place of its own (data sets get re-encoded). None where there is no such file.
pub fn find(path: &Path) -> Option<PathBuf> {
    if path.is_file() {
        return Some(path.to_path_buf());
    }
    // Names from lists often have no extension, and may hold dots.
    let appended = EXTENSIONS.iter().map(|e| {
        let mut name = path.as_os_str().to_owned();
        name.push(".");
        name.push(e);
        PathBuf::from(name)
    });
    let replaced = EXTENSIONS.iter().map(|e| path.with_extension(e));
    appended.chain(replaced).find(|p| p.is_file())
}

fn bad(path: &Path, what: impl std::fmt::Display) -> Error {
    Error::InvalidData(format!("{}: {what}", path.display()))
}

fn no_picture(path: &Path) -> Error {
    bad(path, format_args!("not a picture ({FORMATS})"))
}

fn decoder<'a>(path: &Path, data: impl BufRead + Seek + 'a) -> Result<impl ImageDecoder + 'a> {
    let mut reader = ImageReader::new(data).with_guessed_format().map_err(|e| Error::io(path, e))?;
    if reader.format().is_none() {
        return Err(no_picture(path));
    }
    let mut limits = Limits::no_limits();
    limits.max_alloc = Some(MAX_BYTES);
    reader.limits(limits);
    let decoder = reader.into_decoder().map_err(|e| describe(path, e))?;
    let (w, h) = decoder.dimensions();
    let pixels = u64::from(w) * u64::from(h);
    if pixels == 0 {
        return Err(bad(path, format_args!("the picture has no pixels ({w}x{h})")));
    }
    if pixels > MAX_PIXELS || decoder.total_bytes() > MAX_BYTES {
        let most = MAX_PIXELS / 1_000_000;
        return Err(bad(
            path,
            format_args!("{w}x{h} px is more than is decoded (at most {most} megapixels)"),
        ));
    }
    Ok(decoder)
}

fn describe(path: &Path, error: ImageError) -> Error {
    match error {
        ImageError::Unsupported(e) => bad(path, format_args!("{e}; read are {FORMATS}")),
        ImageError::Limits(e) => bad(path, format_args!("the picture is too large to decode ({e})")),
        ImageError::IoError(e) if e.kind() == ErrorKind::UnexpectedEof => {
            bad(path, "the picture is truncated")
        }
        // The system's own have a number; the decoders' are about the data.
        ImageError::IoError(e) if e.raw_os_error().is_some() => Error::io(path, e),
        e => bad(path, format_args!("the picture is damaged ({e})")),
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
