//! Level-5 MAT files, as much as the WIDER FACE ground truth uses: cells, numeric and char arrays,
//! little-endian, each variable zlib-compressed or plain ("MAT-File Format", MathWorks).

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

use crate::{Error, Result};

/// Largest variable accepted once decompressed, in bytes; those of WIDER FACE are below 1 MB.
const VARIABLE_LIMIT: u64 = 64 << 20;
/// Deepest nesting of cells accepted; WIDER FACE nests twice.
const DEPTH_LIMIT: usize = 8;

// Data types of an element's tag.
const MI_INT8: u32 = 1;
const MI_UINT8: u32 = 2;
const MI_INT16: u32 = 3;
const MI_UINT16: u32 = 4;
const MI_INT32: u32 = 5;
const MI_UINT32: u32 = 6;
const MI_SINGLE: u32 = 7;
const MI_DOUBLE: u32 = 9;
const MI_MATRIX: u32 = 14;
const MI_COMPRESSED: u32 = 15;
const MI_UTF8: u32 = 16;
const MI_UTF16: u32 = 17;

// Array classes, the low byte of the array flags.
const MX_CELL: u8 = 1;
const MX_CHAR: u8 = 4;
const MX_DOUBLE: u8 = 6;
const MX_UINT64: u8 = 15;

/// One array.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Value {
    /// Cells in column-major order.
    Cell(Vec<Value>),
    /// Numbers in column-major order.
    Numeric { rows: usize, cols: usize, data: Vec<f64> },
    /// A char array.
    Text(String),
    /// An array of a class this reader skips (struct, sparse, object).
    Other,
}

impl Value {
    /// The cells, or None.
    pub(crate) fn cells(&self) -> Option<&[Value]> {
        match self {
            Self::Cell(cells) => Some(cells),
            _ => None,
        }
    }

    /// The text, or None.
    pub(crate) fn text(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            // An empty char array may be stored as an empty double.
            _ => None,
        }
    }

    /// Numbers of a matrix with `cols` columns (or an empty one), row after row; or None.
    pub(crate) fn rows(&self, cols: usize) -> Option<Vec<Vec<f64>>> {
        match self {
            Self::Numeric { data, .. } if data.is_empty() => Some(Vec::new()),
            Self::Numeric { rows, cols: c, data } if *c == cols => {
                Some((0..*rows).map(|r| (0..cols).map(|c| data[c * rows + r]).collect()).collect())
            }
            _ => None,
        }
    }
}

/// Reads every variable of a file.
pub(crate) fn read(path: &Path) -> Result<BTreeMap<String, Value>> {
    let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
    parse(&bytes).map_err(|what| Error::InvalidData(format!("{}: {what}", path.display())))
}

/// Offsets in messages count from the start of the variable, decompressed.
fn parse(bytes: &[u8]) -> std::result::Result<BTreeMap<String, Value>, String> {
    if bytes.len() < 128 {
        return Err(format!("{} bytes are no MAT file; its header alone has 128", bytes.len()));
    }
    match &bytes[124..128] {
        [_, 1, b'I', b'M'] => {}
        [1, _, b'M', b'I'] => return Err("big-endian MAT file; save it again on this machine".into()),
        _ => return Err("not a level-5 MAT file; save it with MATLAB's -v7".into()),
    }
    let mut variables = BTreeMap::new();
    let mut file = Reader { bytes, at: 128 };
    while file.at < bytes.len() {
        let (kind, payload) = file.element()?;
        let (name, value) = match kind {
            MI_COMPRESSED => {
                let mut raw = Vec::new();
                flate2::read::ZlibDecoder::new(payload)
                    .take(VARIABLE_LIMIT + 1)
                    .read_to_end(&mut raw)
                    .map_err(|e| format!("damaged zlib stream: {e}"))?;
                if raw.len() as u64 > VARIABLE_LIMIT {
                    return Err(format!("a variable has more than {VARIABLE_LIMIT} bytes"));
                }
                match (Reader { bytes: &raw, at: 0 }).element()? {
                    (MI_MATRIX, matrix) => array(matrix, 0)?,
                    (other, _) => return Err(format!("element type {other} where a matrix was expected")),
                }
            }
            MI_MATRIX => array(payload, 0)?,
            other => return Err(format!("element type {other} where a variable was expected")),
        };
        variables.insert(name, value);
    }
    Ok(variables)
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn u32(&self, at: usize) -> std::result::Result<u32, String> {
        match self.bytes.get(at..).and_then(|rest| rest.first_chunk()) {
            Some(b) => Ok(u32::from_le_bytes(*b)),
            None => Err(format!("truncated at byte {}", self.bytes.len())),
        }
    }

    /// Next element: type and payload. Payloads up to 4 bytes share the tag's 8; others are padded
    /// to 8, but for compressed ones.
    fn element(&mut self) -> std::result::Result<(u32, &'a [u8]), String> {
        let tag = self.u32(self.at)?;
        let small = tag >> 16 != 0;
        let (kind, start, len) = if small {
            (tag & 0xffff, self.at + 4, (tag >> 16) as usize)
        } else {
            (tag, self.at + 8, self.u32(self.at + 4)? as usize)
        };
        if small && len > 4 {
            return Err(format!("small element of {len} bytes at byte {}", self.at));
        }
        let payload = start.checked_add(len).and_then(|end| self.bytes.get(start..end));
        let payload =
            payload.ok_or_else(|| format!("truncated: {len} bytes announced at byte {}", self.at))?;
        let step = match kind {
            _ if small => 4,
            MI_COMPRESSED => len,
            _ => len.div_ceil(8) * 8,
        };
        // The last element of a file may lack its padding.
        self.at = (start + step).min(self.bytes.len());
        Ok((kind, payload))
    }
}

/// Name and value of a matrix element's payload.
fn array(payload: &[u8], depth: usize) -> std::result::Result<(String, Value), String> {
    if depth > DEPTH_LIMIT {
        return Err(format!("cells nested deeper than {DEPTH_LIMIT}"));
    }
    // An empty cell may be a matrix element without content.
    if payload.is_empty() {
        return Ok((String::new(), Value::Numeric { rows: 0, cols: 0, data: Vec::new() }));
    }
    let mut r = Reader { bytes: payload, at: 0 };
    let (_, flags) = r.element()?;
    let class = *flags.first().ok_or("array without flags")?;
    let (kind, dims) = r.element()?;
    let dims: Vec<usize> = numbers(kind, dims)?.into_iter().map(|d| d as usize).collect();
    let (rows, cols) = match dims[..] {
        [rows, cols] => (rows, cols),
        _ => return Err(format!("array of {} dimensions; 2 expected", dims.len())),
    };
    let len = rows.checked_mul(cols).ok_or("array size overflows")?;
    let (_, name) = r.element()?;
    let name = String::from_utf8_lossy(name).into_owned();
    let value = match class {
        MX_CELL => {
            let mut cells = Vec::new();
            for _ in 0..len {
                match r.element()? {
                    (MI_MATRIX, cell) => cells.push(array(cell, depth + 1)?.1),
                    (other, _) => return Err(format!("element type {other} inside a cell array")),
                }
            }
            Value::Cell(cells)
        }
        MX_CHAR => {
            let text = match r.element()? {
                (MI_UTF16 | MI_UINT16, raw) => String::from_utf16_lossy(
                    &raw.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect::<Vec<_>>(),
                ),
                (MI_UTF8 | MI_INT8 | MI_UINT8, raw) => String::from_utf8_lossy(raw).into_owned(),
                (other, _) => return Err(format!("char array of element type {other}")),
            };
            Value::Text(text)
        }
        MX_DOUBLE..=MX_UINT64 => {
            let (kind, raw) = r.element()?;
            let data = numbers(kind, raw)?;
            if data.len() != len {
                return Err(format!("{} values in an array of {rows}x{cols}", data.len()));
            }
            Value::Numeric { rows, cols, data }
        }
        _ => Value::Other,
    };
    Ok((name, value))
}

/// Values of a numeric element; MATLAB stores integers in the narrowest type that holds them.
fn numbers(kind: u32, raw: &[u8]) -> std::result::Result<Vec<f64>, String> {
    fn each<const N: usize>(raw: &[u8], f: fn([u8; N]) -> f64) -> Vec<f64> {
        raw.chunks_exact(N).map(|b| f(b.try_into().expect("chunk of N"))).collect()
    }
    Ok(match kind {
        MI_INT8 => each(raw, |b| i8::from_le_bytes(b) as f64),
        MI_UINT8 => each(raw, |b| u8::from_le_bytes(b) as f64),
        MI_INT16 => each(raw, |b| i16::from_le_bytes(b) as f64),
        MI_UINT16 => each(raw, |b| u16::from_le_bytes(b) as f64),
        MI_INT32 => each(raw, |b| i32::from_le_bytes(b) as f64),
        MI_UINT32 => each(raw, |b| u32::from_le_bytes(b) as f64),
        MI_SINGLE => each(raw, |b| f32::from_le_bytes(b) as f64),
        MI_DOUBLE => each(raw, f64::from_le_bytes),
        other => return Err(format!("numeric array of element type {other}")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header() -> Vec<u8> {
        let mut bytes = vec![b' '; 124];
        bytes.extend([0, 1, b'I', b'M']);
        bytes
    }

    fn element(kind: u32, payload: &[u8]) -> Vec<u8> {
        let mut out = [kind.to_le_bytes(), (payload.len() as u32).to_le_bytes()].concat();
        out.extend(payload);
        out.resize(out.len().div_ceil(8) * 8, 0);
        out
    }

    fn matrix(class: u8, rows: i32, cols: i32, name: &str, content: &[u8]) -> Vec<u8> {
        let mut out = element(MI_UINT32, &[class, 0, 0, 0, 0, 0, 0, 0]);
        out.extend(element(MI_INT32, &[rows.to_le_bytes(), cols.to_le_bytes()].concat()));
        out.extend(element(MI_INT8, name.as_bytes()));
        out.extend(content);
        element(MI_MATRIX, &out)
    }

    /// A 2x1 cell `c` of a 2x2 uint8-stored double and of "hi".
    fn sample(compressed: bool) -> Vec<u8> {
        use std::io::Write;
        let small = [(4u32 << 16 | MI_UINT8).to_le_bytes(), [1, 2, 3, 4]].concat();
        let cells =
            [matrix(MX_DOUBLE, 2, 2, "", &small), matrix(MX_CHAR, 1, 2, "", &element(MI_UTF8, b"hi"))];
        let variable = matrix(MX_CELL, 2, 1, "c", &cells.concat());
        let mut file = header();
        if compressed {
            let mut z = flate2::write::ZlibEncoder::new(Vec::new(), Default::default());
            z.write_all(&variable).unwrap();
            let z = z.finish().unwrap();
            file.extend(MI_COMPRESSED.to_le_bytes());
            file.extend((z.len() as u32).to_le_bytes());
            file.extend(z);
        } else {
            file.extend(variable);
        }
        file
    }

    #[test]
    fn cells_numbers_and_text_are_read_plain_and_compressed() {
        for compressed in [false, true] {
            let vars = parse(&sample(compressed)).unwrap();
            let cells = vars["c"].cells().unwrap();
            // Column-major: 1 3 / 2 4.
            assert_eq!(cells[0].rows(2).unwrap(), [[1.0, 3.0], [2.0, 4.0]]);
            assert_eq!(cells[0].rows(4), None);
            assert_eq!(cells[1].text(), Some("hi"));
        }
    }

    #[test]
    fn announced_sizes_are_not_trusted() {
        let huge = matrix(MX_DOUBLE, i32::MAX, i32::MAX, "x", &element(MI_UINT8, &[1]));
        assert!(parse(&[header(), huge].concat()).unwrap_err().contains("1 values"));
        let huge = matrix(MX_CELL, i32::MAX, 1, "x", &[]);
        assert!(parse(&[header(), huge].concat()).unwrap_err().contains("truncated"));
        let mut nest = matrix(MX_CELL, 0, 0, "", &[]);
        for _ in 0..20 {
            nest = matrix(MX_CELL, 1, 1, "", &nest);
        }
        assert!(parse(&[header(), nest].concat()).unwrap_err().contains("nested deeper"));
    }

    #[test]
    fn every_truncation_is_an_error_or_fewer_variables() {
        for compressed in [false, true] {
            let file = sample(compressed);
            for n in 0..file.len() {
                match parse(&file[..n]) {
                    Ok(vars) => assert!(n == 128 && vars.is_empty() || n > file.len() - 8, "{n}"),
                    Err(what) => assert!(!what.is_empty()),
                }
            }
        }
    }

    proptest! {
        #[test]
        fn damaged_files_never_panic(
            hits in proptest::collection::vec((128usize..400, any::<u8>()), 1..6), compressed: bool,
        ) {
            let mut file = sample(compressed);
            for (at, byte) in hits {
                let at = at % file.len();
                file[at] = byte;
            }
            let _ = parse(&file);
        }
    }
}
