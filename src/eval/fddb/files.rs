//! FDDB's text files: ellipse lists, detections, published ROC curves.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use super::region::Region;
use crate::eval::curve::{RocCurve, RocPoint};
use crate::eval::lines::{read_text, Lines};
use crate::files::write_whole;
use crate::Result;

/// Largest coordinate or size accepted, in pixels. FDDB's pictures have 450; the cap bounds the
/// masks where a picture's size must be guessed from its detections.
pub(super) const COORDINATE_LIMIT: f64 = 65_536.0;

/// Annotated ellipses by picture (`2002/08/11/big/img_591`, no extension).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Annotations {
    /// Ellipses of each picture.
    pub by_image: BTreeMap<String, Vec<Region>>,
}

impl Annotations {
    /// Reads ellipse lists: name, count, then `major minor angle cx cy 1` a line.
    pub fn read(files: &[PathBuf]) -> Result<Self> {
        let mut all = Self::default();
        for file in files {
            let text = read_text(file)?;
            each_picture(file, &text, &mut |lines, name, count| {
                let mut faces = Vec::new();
                for _ in 0..count {
                    let line = lines.require("an ellipse")?;
                    let [major, minor, angle, cx, cy, _] =
                        lines.fields::<6>(line, "major minor angle cx cy 1")?;
                    faces.push(ellipse(lines, major, minor, angle, cx, cy)?);
                }
                insert_once(lines, &mut all.by_image, name, faces)
            })?;
        }
        Ok(all)
    }

    /// Reads the ten `FDDB-fold-NN-ellipseList.txt` of a folder.
    pub fn read_folds(dir: &Path) -> Result<Self> {
        let files: Vec<PathBuf> =
            (1..=10).map(|fold| dir.join(format!("FDDB-fold-{fold:02}-ellipseList.txt"))).collect();
        Self::read(&files)
    }

    /// Number of faces.
    pub fn faces(&self) -> usize {
        self.by_image.values().map(Vec::len).sum()
    }
}

/// A scored outline.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ScoredRegion {
    /// Outline in pixels.
    pub region: Region,
    /// Confidence, any scale.
    pub score: f64,
}

/// Detections by picture.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Detections {
    /// Detections of each picture.
    pub by_image: BTreeMap<String, Vec<ScoredRegion>>,
}

impl Detections {
    /// Reads detections: name, count, then a line each of `x y w h score` (rectangle) or
    /// `major minor angle cx cy score` (ellipse). A name that ends in `.gz` is decompressed.
    pub fn read(path: &Path) -> Result<Self> {
        let text = read_text(path)?;
        let mut all = Self::default();
        each_picture(path, &text, &mut |lines, name, count| {
            let mut found = Vec::new();
            for _ in 0..count {
                found.push(detection(lines)?);
            }
            insert_once(lines, &mut all.by_image, name, found)
        })?;
        Ok(all)
    }

    /// Writes what [`Detections::read`] reads.
    pub fn write(&self, path: &Path) -> Result<()> {
        let mut text = String::new();
        for (name, found) in &self.by_image {
            writeln!(text, "{name}\n{}", found.len()).expect("writing to a string");
            for ScoredRegion { region, score } in found {
                match region {
                    Region::Rectangle { x, y, w, h } => writeln!(text, "{x} {y} {w} {h} {score}"),
                    Region::Ellipse { major, minor, angle, cx, cy } => {
                        writeln!(text, "{major} {minor} {angle} {cx} {cy} {score}")
                    }
                }
                .expect("writing to a string");
            }
        }
        write_whole(path, text.as_bytes())
    }
}

/// Reads a published curve: `true-positive-rate false-positives [threshold]` a line, in any order.
pub fn read_roc(path: &Path) -> Result<RocCurve> {
    let text = read_text(path)?;
    let mut lines = Lines::new(path, &text);
    let mut points = Vec::new();
    while let Some(line) = lines.next() {
        let (rate, false_positives, threshold) = match lines.numbers(line)?[..] {
            [rate, fp] => (rate, fp, None),
            [rate, fp, threshold] => (rate, fp, Some(threshold)),
            ref other => {
                let n = other.len();
                return Err(
                    lines.error(format_args!("expected 2 or 3 numbers (rate, count, score), found {n}"))
                );
            }
        };
        if !(0.0..=1.0).contains(&rate) || false_positives < 0.0 {
            return Err(lines.error("a rate lies in 0 to 1 and a count is not negative"));
        }
        points.push(RocPoint { false_positives, true_positive_rate: rate, threshold });
    }
    points.sort_by(|a, b| {
        let key = |p: &RocPoint| (p.false_positives, p.true_positive_rate);
        key(a).partial_cmp(&key(b)).expect("finite")
    });
    Ok(RocCurve { points })
}

/// Calls `body` with each picture's name and count, the lines standing behind the count.
fn each_picture(
    file: &Path,
    text: &str,
    body: &mut dyn FnMut(&mut Lines, &str, usize) -> Result<()>,
) -> Result<()> {
    let mut lines = Lines::new(file, text);
    while let Some(name) = lines.next() {
        // Names of FDDB have no blanks; a line of numbers here means that a count was too small.
        if name.contains(char::is_whitespace) {
            return Err(lines.error(format_args!("expected a picture's name, found {name:?}")));
        }
        let count = lines.count("the number of faces")?;
        body(&mut lines, name, count)?;
    }
    Ok(())
}

fn insert_once<T>(
    lines: &Lines,
    map: &mut BTreeMap<String, Vec<T>>,
    name: &str,
    value: Vec<T>,
) -> Result<()> {
    match map.insert(name.to_string(), value) {
        None => Ok(()),
        Some(_) => Err(lines.error(format_args!("{name} is listed twice"))),
    }
}

fn detection(lines: &mut Lines) -> Result<ScoredRegion> {
    let line = lines.require("a detection")?;
    match lines.numbers(line)?[..] {
        [x, y, w, h, score] => {
            if w < 0.0 || h < 0.0 {
                return Err(lines.error(format_args!("rectangle of negative size {w} x {h}")));
            }
            within_limit(lines, &[x, y, w, h])?;
            Ok(ScoredRegion { region: Region::Rectangle { x, y, w, h }, score })
        }
        [major, minor, angle, cx, cy, score] => {
            Ok(ScoredRegion { region: ellipse(lines, major, minor, angle, cx, cy)?, score })
        }
        ref other => {
            let n = other.len();
            Err(lines.error(format_args!(
                "expected 5 numbers (rectangle, score) or 6 (ellipse, score), found {n}"
            )))
        }
    }
}

fn ellipse(lines: &Lines, major: f64, minor: f64, angle: f64, cx: f64, cy: f64) -> Result<Region> {
    if major < 0.0 || minor < 0.0 {
        return Err(lines.error(format_args!("ellipse of negative half-axis {major} or {minor}")));
    }
    within_limit(lines, &[major, minor, cx, cy])?;
    Ok(Region::Ellipse { major, minor, angle, cx, cy })
}

fn within_limit(lines: &Lines, values: &[f64]) -> Result<()> {
    match values.iter().find(|v| v.abs() > COORDINATE_LIMIT) {
        Some(v) => Err(lines.error(format_args!("{v} is beyond {COORDINATE_LIMIT} pixels"))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;

    fn file(text: &str) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d.txt");
        std::fs::write(&path, text).unwrap();
        (dir, path)
    }

    #[test]
    fn detections_of_both_shapes_survive_a_round_trip() {
        let (dir, path) = file("a/1\n2\n1 2 3 4 0.5\n10 5 1.5 20 30 0.25\nb/2\n0\n");
        let d = Detections::read(&path).unwrap();
        assert_eq!(d.by_image["a/1"][0].region, Region::Rectangle { x: 1.0, y: 2.0, w: 3.0, h: 4.0 });
        assert!(matches!(d.by_image["a/1"][1].region, Region::Ellipse { angle, .. } if angle == 1.5));
        assert_eq!(d.by_image["b/2"], []);
        let copy = dir.path().join("copy.txt");
        d.write(&copy).unwrap();
        assert_eq!(Detections::read(&copy).unwrap(), d);
    }

    #[test]
    fn malformed_detections_name_the_line() {
        for (text, what) in [
            ("a\n", "the number of faces"),
            ("a\nx\n", "d.txt:2: expected the number of faces"),
            ("a\n2\n1 2 3 4 0.5\n", "truncated"),
            ("a\n18446744073709551615\n", "truncated"),
            ("a\n1\n1 2 3 4 0.5\n1 2 3 4 0.5\n", "d.txt:4: expected a picture's name"),
            ("a\n1\n1 2 3 0.5\n", "d.txt:3: expected 5 numbers"),
            ("a\n1\n1 2 -3 4 0.5\n", "d.txt:3: rectangle of negative size"),
            ("a\n1\n-1 2 3 4 5 0.5\n", "d.txt:3: ellipse of negative half-axis"),
            ("a\n1\n1 2 3 4 nan\n", "d.txt:3: \"nan\" is not a finite number"),
            ("a\n1\n1 2 1e9 4 0.5\n", "d.txt:3: 1000000000 is beyond 65536 pixels"),
            ("a\n0\na\n0\n", "d.txt:4: a is listed twice"),
        ] {
            let (_dir, path) = file(text);
            let error = Detections::read(&path).unwrap_err();
            assert!(matches!(error, Error::InvalidData(_)), "{text:?}");
            assert!(error.to_string().contains(what), "{text:?}: {error}");
        }
        let (_dir, path) = file("a\n1\n1 2 3 4 5\n");
        assert!(Annotations::read(&[path]).unwrap_err().to_string().contains("expected 6 numbers"));
    }

    #[test]
    fn published_curves_are_sorted_by_false_positives() {
        let (_dir, path) = file("0.9 20 0.1\n0.5 3\n0.4 3\n");
        let roc = read_roc(&path).unwrap();
        let flat: Vec<(f64, f64)> =
            roc.points.iter().map(|p| (p.false_positives, p.true_positive_rate)).collect();
        assert_eq!(flat, [(3.0, 0.4), (3.0, 0.5), (20.0, 0.9)]);
        assert_eq!(roc.points[2].threshold, Some(0.1));
        for bad in ["1.5 3\n", "0.5 -3\n", "0.5\n", "0.5 1 2 3\n"] {
            let (_dir, path) = file(bad);
            assert!(read_roc(&path).unwrap_err().to_string().contains("d.txt:1"), "{bad:?}");
        }
    }
}
