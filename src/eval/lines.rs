//! Annotation and result files are text written by many hands: every read names file and line.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use crate::{Error, Result};

/// Largest text accepted, in bytes; the largest real one (WIDER FACE training) has 13 MB.
const TEXT_LIMIT: u64 = 1 << 30;

/// Reads a text file; one whose name ends in `.gz` is decompressed.
pub(crate) fn read_text(path: &Path) -> Result<String> {
    let file = File::open(path).map_err(|e| Error::io(path, e))?;
    let gz = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gz"));
    let mut bytes = Vec::new();
    let read = if gz {
        flate2::read::MultiGzDecoder::new(file).take(TEXT_LIMIT + 1).read_to_end(&mut bytes)
    } else {
        file.take(TEXT_LIMIT + 1).read_to_end(&mut bytes)
    };
    match read {
        Ok(n) if n as u64 > TEXT_LIMIT => {
            return Err(Error::LimitExceeded(format!("{}: more than {TEXT_LIMIT} bytes", path.display())))
        }
        Ok(_) => {}
        // A broken gzip stream is the file's fault, not the disk's.
        Err(e) if gz => {
            return Err(Error::InvalidData(format!("{}: damaged gzip stream: {e}", path.display())))
        }
        Err(e) => return Err(Error::io(path, e)),
    }
    String::from_utf8(bytes).map_err(|_| Error::InvalidData(format!("{}: not UTF-8 text", path.display())))
}

/// Walks the non-blank lines of a text, remembering where it is.
pub(crate) struct Lines<'a> {
    file: String,
    rest: std::iter::Peekable<std::iter::Enumerate<std::str::Lines<'a>>>,
    number: usize,
}

impl<'a> Lines<'a> {
    /// Over `text`, which came from `file`.
    pub(crate) fn new(file: &Path, text: &'a str) -> Self {
        Self { file: file.display().to_string(), rest: text.lines().enumerate().peekable(), number: 0 }
    }

    fn skip_blank(&mut self) {
        while self.rest.next_if(|(_, line)| line.trim().is_empty()).is_some() {}
    }

    /// Next non-blank line, trimmed.
    pub(crate) fn next(&mut self) -> Option<&'a str> {
        self.skip_blank();
        let (i, line) = self.rest.next()?;
        self.number = i + 1;
        Some(line.trim())
    }

    /// What [`Lines::next`] will give.
    pub(crate) fn peek(&mut self) -> Option<&'a str> {
        self.skip_blank();
        self.rest.peek().map(|(_, line)| line.trim())
    }

    /// Next line, or an error that says what is missing.
    pub(crate) fn require(&mut self, what: &str) -> Result<&'a str> {
        match self.next() {
            Some(line) => Ok(line),
            None => Err(Error::InvalidData(format!(
                "{}: ends after line {}, expected {what}; the file is truncated",
                self.file, self.number
            ))),
        }
    }

    /// Error at the current line.
    pub(crate) fn error(&self, what: impl std::fmt::Display) -> Error {
        Error::InvalidData(format!("{}:{}: {what}", self.file, self.number))
    }

    /// Next line as a count.
    pub(crate) fn count(&mut self, of: &str) -> Result<usize> {
        let line = self.require(of)?;
        line.parse().map_err(|_| self.error(format_args!("expected {of}, found {line:?}")))
    }

    /// The blank-separated finite numbers of a line just read.
    pub(crate) fn numbers(&self, line: &str) -> Result<Vec<f64>> {
        line.split_whitespace()
            .map(|field| match field.parse::<f64>() {
                Ok(v) if v.is_finite() && v.abs() <= f32::MAX as f64 => Ok(v),
                _ => Err(self.error(format_args!("{field:?} is not a finite number"))),
            })
            .collect()
    }

    /// The `N` numbers of a line just read; `layout` names them in the error.
    pub(crate) fn fields<const N: usize>(&self, line: &str, layout: &str) -> Result<[f64; N]> {
        let found = self.numbers(line)?;
        let n = found.len();
        <[f64; N]>::try_from(found)
            .map_err(|_| self.error(format_args!("expected {N} numbers ({layout}), found {n}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn errors_name_file_and_line() {
        let mut lines = Lines::new(Path::new("a.txt"), "name\n\n2\n1 2 x\n");
        assert_eq!(lines.next(), Some("name"));
        assert_eq!(lines.peek(), Some("2"));
        assert_eq!(lines.count("a count").unwrap(), 2);
        let line = lines.next().unwrap();
        assert_eq!(
            lines.numbers(line).unwrap_err().to_string(),
            "invalid data: a.txt:4: \"x\" is not a finite number"
        );
        let end = lines.require("a box").unwrap_err().to_string();
        assert!(end.contains("a.txt: ends after line 4, expected a box"), "{end}");
    }

    #[test]
    fn nan_infinity_and_missing_fields_are_refused() {
        let lines = Lines::new(Path::new("a"), "");
        for bad in ["NaN", "inf", "-inf", "1e300", "", "1,2"] {
            assert!(lines.fields::<1>(bad, "x").is_err(), "{bad}");
        }
        assert_eq!(lines.fields::<2>(" 1 -2.5 ", "x y").unwrap(), [1.0, -2.5]);
    }

    #[test]
    fn damaged_gzip_and_binary_text_are_invalid_data() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.txt.gz");
        let mut gz = flate2::write::GzEncoder::new(Vec::new(), Default::default());
        gz.write_all(b"some text that is long enough").unwrap();
        let whole = gz.finish().unwrap();
        std::fs::write(&path, &whole).unwrap();
        assert_eq!(read_text(&path).unwrap(), "some text that is long enough");
        std::fs::write(&path, &whole[..whole.len() / 2]).unwrap();
        assert!(matches!(read_text(&path), Err(Error::InvalidData(_))));
        let plain = dir.path().join("b.txt");
        std::fs::write(&plain, [0xff, 0xfe, 0x00]).unwrap();
        assert!(matches!(read_text(&plain), Err(Error::InvalidData(_))));
        assert!(matches!(read_text(&dir.path().join("none")), Err(Error::Io { .. })));
    }
}
