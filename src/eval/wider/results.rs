//! WIDER FACE result folders: a folder an event, a text file a picture.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::Subset;
use crate::detect::{BBox, Detection};
use crate::eval::curve::{PrCurve, PrPoint};
use crate::eval::lines::{read_text, Lines};
use crate::eval::Progress;
use crate::files::write_whole;
use crate::{Error, Result};

/// Detections of many pictures, by event and stem.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Predictions {
    by_image: BTreeMap<(String, String), Vec<Detection>>,
}

impl Predictions {
    /// None yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the detections of a picture, in pixels of the original.
    pub fn insert(&mut self, event: &str, stem: &str, detections: Vec<Detection>) {
        self.by_image.insert((event.into(), stem.into()), detections);
    }

    /// The detections of a picture; empty where there are none.
    pub fn get(&self, event: &str, stem: &str) -> &[Detection] {
        self.by_image.get(&(event.to_string(), stem.to_string())).map_or(&[], Vec::as_slice)
    }

    /// Number of pictures.
    pub fn len(&self) -> usize {
        self.by_image.len()
    }

    /// True where there are no pictures.
    pub fn is_empty(&self) -> bool {
        self.by_image.is_empty()
    }

    /// Reads `<dir>/<event>/<stem>.txt`: name, count, then `x y w h score` a line. The file's own
    /// name tells the picture, since detectors disagree on what they write in the first line.
    pub fn read(dir: &Path, progress: Progress) -> Result<Self> {
        let mut files = Vec::new();
        for event in sorted_entries(dir)?.into_iter().filter(|p| p.is_dir()) {
            let texts = sorted_entries(&event)?.into_iter();
            files.extend(texts.filter(|p| p.extension().is_some_and(|e| e == "txt")));
        }
        if files.is_empty() {
            let dir = dir.display();
            return Err(Error::InvalidData(format!("{dir}: no result files `<event>/<picture>.txt`")));
        }
        let mut all = Self::new();
        for (done, file) in files.iter().enumerate() {
            let (Some(event), Some(stem)) = (name(file.parent()), file.file_stem().and_then(|s| s.to_str()))
            else {
                return Err(Error::InvalidData(format!("{}: name is not UTF-8", file.display())));
            };
            all.insert(event, stem, parse(file, &read_text(file)?)?);
            progress(done + 1, files.len());
        }
        Ok(all)
    }

    /// Writes what [`Predictions::read`] reads, best score first. Folders are made as needed.
    pub fn write(&self, dir: &Path, progress: Progress) -> Result<()> {
        for (done, ((event, stem), detections)) in self.by_image.iter().enumerate() {
            if !is_plain_name(event) || !is_plain_name(stem) {
                let message = format!("{event}/{stem} cannot name a result file");
                return Err(Error::InvalidArgument(message));
            }
            let folder = dir.join(event);
            fs::create_dir_all(&folder).map_err(|e| Error::io(&folder, e))?;
            let mut sorted: Vec<&Detection> = detections.iter().collect();
            sorted.sort_by(|a, b| b.score.total_cmp(&a.score));
            let mut text = format!("{stem}\n{}\n", sorted.len());
            for d in sorted {
                let BBox { x1, y1, .. } = d.bbox;
                let (w, h) = (d.bbox.width(), d.bbox.height());
                writeln!(text, "{x1} {y1} {w} {h} {}", d.score).expect("writing to a string");
            }
            let file = folder.join(format!("{stem}.txt"));
            write_whole(&file, text.as_bytes())?;
            progress(done + 1, self.len());
        }
        Ok(())
    }
}

/// True where `name` stays in its folder on every system.
pub(super) fn is_plain_name(name: &str) -> bool {
    !matches!(name, "" | "." | "..") && !name.contains(['/', '\\', ':', '\0'])
}

fn name(path: Option<&Path>) -> Option<&str> {
    path?.file_name()?.to_str()
}

fn sorted_entries(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(dir).map_err(|e| Error::io(dir, e))? {
        paths.push(entry.map_err(|e| Error::io(dir, e))?.path());
    }
    paths.sort();
    Ok(paths)
}

fn parse(file: &Path, text: &str) -> Result<Vec<Detection>> {
    let mut lines = Lines::new(file, text);
    lines.require("the picture's name")?;
    let count = lines.count("the number of detections")?;
    let mut detections = Vec::new();
    while let Some(line) = lines.next() {
        let [x, y, w, h, score] = lines.fields::<5>(line, "x y w h score")?;
        if w < 0.0 || h < 0.0 {
            return Err(lines.error(format_args!("box of negative size {w} x {h}")));
        }
        let bbox = BBox::from_xywh(x as f32, y as f32, w as f32, h as f32);
        detections.push(Detection { bbox, score: score as f32 });
    }
    if detections.len() != count {
        let found = detections.len();
        return Err(lines.error(format_args!("{count} detections announced, {found} found")));
    }
    Ok(detections)
}

/// A curve of the collection that [`read_published_curves`] reads.
#[derive(Deserialize)]
struct Published {
    ap: f64,
    recall: Vec<f64>,
    precision: Vec<f64>,
}

/// Reads published curves to plot beside one's own: JSON `{method: {easy|medium|hard: {ap, recall,
/// precision}}}`. Methods that lack the subset are left out; the others come in order of name.
pub fn read_published_curves(path: &Path, subset: Subset) -> Result<Vec<(String, PrCurve)>> {
    let invalid = |what: String| Error::InvalidData(format!("{}: {what}", path.display()));
    let methods: BTreeMap<String, BTreeMap<String, Published>> =
        serde_json::from_str(&read_text(path)?).map_err(|e| invalid(e.to_string()))?;
    let mut curves = Vec::new();
    for (method, mut subsets) in methods {
        let Some(curve) = subsets.remove(subset.name()) else { continue };
        if curve.recall.len() != curve.precision.len() {
            return Err(invalid(format!("{method}: recall and precision differ in length")));
        }
        let values = curve.recall.iter().zip(&curve.precision);
        let points =
            values.map(|(&recall, &precision)| PrPoint { threshold: None, recall, precision }).collect();
        curves.push((method, PrCurve { ap: curve.ap, faces: 0, points }));
    }
    Ok(curves)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn detection(x: f32, w: f32, score: f32) -> Detection {
        Detection { bbox: BBox::from_xywh(x, 2.0, w, 10.25), score }
    }

    #[test]
    fn written_results_read_back_best_first() {
        let dir = tempfile::tempdir().unwrap();
        let mut p = Predictions::new();
        p.insert("0--Parade", "a.b", vec![detection(1.0, 4.5, 0.25), detection(3.0, 8.0, 0.75)]);
        p.insert("1--X", "empty", vec![]);
        let mut calls = Vec::new();
        p.write(dir.path(), &mut |done, total| calls.push((done, total))).unwrap();
        assert_eq!(calls, [(1, 2), (2, 2)]);
        let back = Predictions::read(dir.path(), &mut |_, _| {}).unwrap();
        assert_eq!(back.len(), 2);
        assert_eq!(back.get("0--Parade", "a.b"), [detection(3.0, 8.0, 0.75), detection(1.0, 4.5, 0.25)]);
        assert_eq!(back.get("1--X", "empty"), []);
        assert_eq!(back.get("1--X", "unknown"), []);
    }

    #[test]
    fn names_that_leave_the_folder_are_not_written() {
        let dir = tempfile::tempdir().unwrap();
        for (event, stem) in [("..", "a"), ("e", "../a"), ("/tmp", "a"), ("", "a")] {
            let mut p = Predictions::new();
            p.insert(event, stem, vec![]);
            assert!(matches!(p.write(dir.path(), &mut |_, _| {}), Err(Error::InvalidArgument(_))));
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn malformed_results_name_the_line() {
        for (text, what) in [
            ("", "picture's name"),
            ("a\n", "number of detections"),
            ("a\ntwo\n", "r.txt:2: expected the number of detections"),
            ("a\n2\n1 2 3 4 0.5\n", "r.txt:3: 2 detections announced, 1 found"),
            ("a\n18446744073709551615\n1 2 3 4 0.5\n", "announced, 1 found"),
            ("a\n0\n1 2 3 4 0.5\n", "0 detections announced, 1 found"),
            ("a\n1\n1 2 3 4\n", "r.txt:3: expected 5 numbers"),
            ("a\n1\n1 2 3 4 NaN\n", "r.txt:3: \"NaN\" is not a finite number"),
            ("a\n1\n1 2 3 -4 0.5\n", "r.txt:3: box of negative size"),
        ] {
            let error = parse(Path::new("r.txt"), text).unwrap_err();
            assert!(matches!(error, Error::InvalidData(_)), "{text:?}");
            assert!(error.to_string().contains(what), "{text:?}: {error}");
        }
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(Predictions::read(dir.path(), &mut |_, _| {}), Err(Error::InvalidData(_))));
    }

    #[test]
    fn published_curves_keep_their_ap() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.json");
        fs::write(&path, r#"{"B": {"easy": {"ap": 0.5, "recall": [0.1], "precision": [1]}}, "A": {}}"#)
            .unwrap();
        let curves = read_published_curves(&path, Subset::Easy).unwrap();
        assert_eq!((curves.len(), curves[0].0.as_str(), curves[0].1.ap), (1, "B", 0.5));
        assert_eq!(read_published_curves(&path, Subset::Hard).unwrap(), []);
        fs::write(&path, r#"{"B": {"easy": {"ap": 0.5, "recall": [], "precision": [1]}}}"#).unwrap();
        assert!(read_published_curves(&path, Subset::Easy).is_err());
    }
}
