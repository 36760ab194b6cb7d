//! WIDER FACE annotations: the evaluator's `.mat` files and the plain-text lists.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::Serialize;

use super::Subset;
use crate::detect::BBox;
use crate::eval::lines::{read_text, Lines};
use crate::eval::mat::{self, Value};
use crate::{Error, Result};

/// Labels of a face, as the WIDER FACE readme numbers them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Attributes {
    /// 0 clear, 1 normal blur, 2 heavy blur.
    pub blur: u8,
    /// 0 typical, 1 exaggerated expression.
    pub expression: u8,
    /// 0 normal, 1 extreme illumination.
    pub illumination: u8,
    /// The annotators found the face too poor to learn from.
    pub invalid: bool,
    /// 0 none, 1 partial, 2 heavy occlusion.
    pub occlusion: u8,
    /// 0 typical, 1 atypical pose.
    pub pose: u8,
}

/// One annotated face.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Face {
    /// Box in pixels, x2 = x + width. The official validation list has one box of width -2 and some
    /// of size 0; they are kept, since they count in [`Subset::All`]; no real detection finds them.
    pub bbox: BBox,
    /// Labels.
    pub attributes: Attributes,
    /// Counts in Easy.
    pub easy: bool,
    /// Counts in Medium.
    pub medium: bool,
    /// Counts in Hard.
    pub hard: bool,
}

impl Face {
    /// True where the face counts in `subset`; the others are ignored, neither wanted nor wrong.
    pub fn counts_in(&self, subset: Subset) -> bool {
        match subset {
            Subset::Easy => self.easy,
            Subset::Medium => self.medium,
            Subset::Hard => self.hard,
            Subset::All => true,
        }
    }
}

/// One picture.
#[derive(Clone, Debug, PartialEq)]
pub struct Image {
    /// Event folder, as `0--Parade`.
    pub event: String,
    /// File name without its extension.
    pub stem: String,
    /// Path below the folder of pictures: as the text list spells it; `<event>/<stem>.jpg` from
    /// the `.mat` files, which name no extension.
    pub path: String,
    /// Every annotated face.
    pub faces: Vec<Face>,
}

impl Image {
    /// `<event>/<stem>`, which names a picture whatever its file format.
    pub fn key(&self) -> String {
        format!("{}/{}", self.event, self.stem)
    }
}

/// Annotated pictures in the order of their source.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GroundTruth {
    /// The pictures, each key once.
    pub images: Vec<Image>,
    /// True where the faces know their difficulty; the text lists do not tell it, so that only
    /// [`Subset::All`] can be scored on them.
    pub graded: bool,
}

impl GroundTruth {
    /// Reads `wider_face_val.mat` and `wider_{easy,medium,hard}_val.mat` in `dir`, the evaluator's
    /// ground truth.
    pub fn from_mat(dir: &Path) -> Result<Self> {
        let mut gt = Self::from_mat_boxes(&dir.join("wider_face_val.mat"))?;
        for subset in [Subset::Easy, Subset::Medium, Subset::Hard] {
            gt.grade(subset, &dir.join(format!("wider_{}_val.mat", subset.name())))?;
        }
        gt.graded = true;
        Ok(gt)
    }

    /// Reads `wider_face_train.mat` or `wider_face_val.mat`: boxes and labels, no difficulties.
    pub fn from_mat_boxes(path: &Path) -> Result<Self> {
        let boxes = mat::read(path)?;
        let fail = |what: String| Error::InvalidData(format!("{}: {what}", path.display()));
        let events = cells(&boxes, "event_list").map_err(fail)?;
        let files = nested(&boxes, "file_list").map_err(fail)?;
        let faces = nested(&boxes, "face_bbx_list").map_err(fail)?;
        let mut labels = Vec::new();
        for name in ["blur", "expression", "illumination", "invalid", "occlusion", "pose"] {
            labels.push(nested(&boxes, &format!("{name}_label_list")).map_err(fail)?);
        }
        let lists = [&files, &faces].into_iter().chain(&labels);
        for list in lists {
            if list.len() != events.len() || list.iter().zip(&files).any(|(l, f)| l.len() != f.len()) {
                return Err(fail("its lists differ in their numbers of events or pictures".into()));
            }
        }

        let mut images = Vec::new();
        for (e, event) in events.iter().enumerate() {
            let event = event.text().ok_or_else(|| fail(format!("event {} has no name", e + 1)))?;
            for (i, file) in files[e].iter().enumerate() {
                let stem =
                    file.text().ok_or_else(|| fail(format!("{event}: picture {} has no name", i + 1)))?;
                let labels: Vec<&Value> = labels.iter().map(|list| &list[e][i]).collect();
                let faces = faces_of(&faces[e][i], &labels)
                    .map_err(|what| fail(format!("{event}/{stem}: {what}")))?;
                let path = format!("{event}/{stem}.jpg");
                images.push(Image { event: event.into(), stem: stem.into(), path, faces });
            }
        }
        let gt = Self { images, graded: false };
        gt.check_unique(&path.display().to_string())?;
        Ok(gt)
    }

    /// Marks the faces that `gt_list` of a difficulty file counts (1-based indices).
    fn grade(&mut self, subset: Subset, path: &Path) -> Result<()> {
        let vars = mat::read(path)?;
        let fail = |what: String| Error::InvalidData(format!("{}: {what}", path.display()));
        let events = nested(&vars, "gt_list").map_err(fail)?;
        if events.iter().map(|e| e.len()).sum::<usize>() != self.images.len() {
            return Err(fail(format!("gt_list does not have {} pictures", self.images.len())));
        }
        for (counted, image) in events.into_iter().flatten().zip(&mut self.images) {
            let indices = match counted {
                Value::Numeric { data, .. } => data,
                _ => return Err(fail(format!("{}: gt_list is not numeric", image.key()))),
            };
            for &index in indices {
                let n = image.faces.len();
                if index.fract() != 0.0 || index < 1.0 || index > n as f64 {
                    return Err(fail(format!("{}: no face {index} among {n}", image.key())));
                }
                let face = &mut image.faces[index as usize - 1];
                match subset {
                    Subset::Easy => face.easy = true,
                    Subset::Medium => face.medium = true,
                    Subset::Hard => face.hard = true,
                    Subset::All => {}
                }
            }
        }
        Ok(())
    }

    /// Reads a WIDER text list (`wider_face_val_bbx_gt.txt` and the like, also as `.gz`): path,
    /// count, then `x y w h blur expression illumination invalid occlusion pose` a line. After a
    /// count of 0 one line of zeros may follow, as the official training list has it.
    pub fn from_text(path: &Path) -> Result<Self> {
        let text = read_text(path)?;
        let gt = Self::parse_text(path, &text)?;
        gt.check_unique(&path.display().to_string())?;
        Ok(gt)
    }

    fn parse_text(path: &Path, text: &str) -> Result<Self> {
        let mut lines = Lines::new(path, text);
        let mut images = Vec::new();
        while let Some(name) = lines.next() {
            let (event, stem) = split_path(name)
                .ok_or_else(|| lines.error(format_args!("expected `event/picture.jpg`, found {name:?}")))?;
            let (event, stem) = (event.to_string(), stem.to_string());
            let count = lines.count("the number of faces")?;
            let mut faces = Vec::new();
            for _ in 0..count {
                faces.push(parse_face(&mut lines)?);
            }
            let is_zeros = |line: &str| line.split_whitespace().all(|field| field == "0");
            if count == 0 && lines.peek().is_some_and(is_zeros) {
                lines.next();
            }
            images.push(Image { event, stem, path: name.into(), faces });
        }
        Ok(Self { images, graded: false })
    }

    fn check_unique(&self, source: &str) -> Result<()> {
        let mut seen = BTreeSet::new();
        match self.images.iter().map(Image::key).find(|key| !seen.insert(key.clone())) {
            Some(key) => Err(Error::InvalidData(format!("{source}: {key} is listed twice"))),
            None => Ok(()),
        }
    }

    /// The pictures that `list` names, in its order and with its paths (so that other file formats
    /// are found), with the faces and difficulties known here. A picture matches by event and stem.
    pub fn restricted_to(&self, list: &GroundTruth) -> Result<Self> {
        let known: BTreeMap<String, &Image> = self.images.iter().map(|i| (i.key(), i)).collect();
        let mut images = Vec::new();
        for wanted in &list.images {
            let image = known.get(&wanted.key()).ok_or_else(|| {
                Error::InvalidData(format!("{}: listed, but not in the ground truth", wanted.path))
            })?;
            images.push(Image { path: wanted.path.clone(), ..(*image).clone() });
        }
        Ok(Self { images, graded: self.graded })
    }

    /// Number of faces that count in `subset`.
    pub fn faces_in(&self, subset: Subset) -> usize {
        self.images.iter().flat_map(|i| &i.faces).filter(|f| f.counts_in(subset)).count()
    }
}

/// Event and stem of `event/picture.jpg`. Neither may leave its folder, since result files are
/// written below paths made of them.
fn split_path(path: &str) -> Option<(&str, &str)> {
    let (event, file) = path.rsplit_once('/')?;
    let stem = file.rsplit_once('.').map_or(file, |(stem, _)| stem);
    (super::results::is_plain_name(event) && super::results::is_plain_name(stem)).then_some((event, stem))
}

fn parse_face(lines: &mut Lines) -> Result<Face> {
    const LAYOUT: &str = "x y w h blur expression illumination invalid occlusion pose";
    let line = lines.require("a face")?;
    let [x, y, w, h, labels @ ..] = lines.fields::<10>(line, LAYOUT)?;
    face([x, y, w, h], labels).map_err(|what| lines.error(what))
}

fn face([x, y, w, h]: [f64; 4], labels: [f64; 6]) -> std::result::Result<Face, String> {
    if ![x, y, w, h].iter().all(|v| (*v as f32).is_finite()) {
        return Err(format!("box {x} {y} {w} {h} is not finite"));
    }
    let names = ["blur", "expression", "illumination", "invalid", "occlusion", "pose"];
    let most = [2, 1, 1, 1, 2, 1];
    for ((value, name), most) in labels.into_iter().zip(names).zip(most) {
        if !(0..=most).any(|label| value == label as f64) {
            return Err(format!("{name} is {value}, not 0 to {most}"));
        }
    }
    let [blur, expression, illumination, invalid, occlusion, pose] = labels.map(|v| v as u8);
    let attributes = Attributes { blur, expression, illumination, invalid: invalid == 1, occlusion, pose };
    let bbox = BBox::from_xywh(x as f32, y as f32, w as f32, h as f32);
    Ok(Face { bbox, attributes, easy: false, medium: false, hard: false })
}

fn faces_of(boxes: &Value, labels: &[&Value]) -> std::result::Result<Vec<Face>, String> {
    let boxes = boxes.rows(4).ok_or("its boxes are not rows of 4 numbers")?;
    let mut columns = Vec::new();
    for label in labels {
        match label {
            Value::Numeric { data, .. } if data.len() == boxes.len() => columns.push(data),
            _ => return Err(format!("its labels are not one number for each of {} boxes", boxes.len())),
        }
    }
    boxes
        .iter()
        .enumerate()
        .map(|(i, b)| {
            let mut values = [0.0; 6];
            for (value, column) in values.iter_mut().zip(&columns) {
                *value = column[i];
            }
            face([b[0], b[1], b[2], b[3]], values)
        })
        .collect()
}

fn cells<'a>(vars: &'a BTreeMap<String, Value>, name: &str) -> std::result::Result<&'a [Value], String> {
    vars.get(name).and_then(Value::cells).ok_or_else(|| format!("no cell array {name}"))
}

/// A cell array of an event each, of a cell array of a picture each.
fn nested<'a>(
    vars: &'a BTreeMap<String, Value>,
    name: &str,
) -> std::result::Result<Vec<&'a [Value]>, String> {
    let events = cells(vars, name)?;
    events.iter().map(|e| e.cells().ok_or_else(|| format!("{name} is not nested by event"))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<GroundTruth> {
        GroundTruth::parse_text(Path::new("gt.txt"), text)
    }

    #[test]
    fn text_lists_are_read_with_attributes_and_empty_pictures() {
        let gt = parse(
            "0--Parade/a.jpg\n2\n1 2 3 4 2 1 0 1 2 1 \n5 6 7 8 0 0 1 0 1 0\n\
             1--Handshaking/b.webp\n0\n0 0 0 0 0 0 0 0 0 0\n\
             1--Handshaking/c.d.jpg\n0\n2--X/e.jpg\n1\n0 0 9 9 0 0 0 0 0 0\n",
        )
        .unwrap();
        let keys: Vec<String> = gt.images.iter().map(Image::key).collect();
        assert_eq!(keys, ["0--Parade/a", "1--Handshaking/b", "1--Handshaking/c.d", "2--X/e"]);
        assert_eq!(gt.images.iter().map(|i| i.faces.len()).collect::<Vec<_>>(), [2, 0, 0, 1]);
        assert_eq!(gt.images[0].faces[0].bbox, BBox::new(1.0, 2.0, 4.0, 6.0));
        let labels =
            Attributes { blur: 2, expression: 1, illumination: 0, invalid: true, occlusion: 2, pose: 1 };
        assert_eq!(gt.images[0].faces[0].attributes, labels);
        assert_eq!(gt.faces_in(Subset::All), 3);
        assert_eq!(gt.faces_in(Subset::Hard), 0);
    }

    #[test]
    fn malformed_lists_name_the_line() {
        let face = "1 2 3 4 0 0 0 0 0 0\n";
        for (text, line, what) in [
            (format!("e/a.jpg\n2\n{face}"), "line 3", "truncated"),
            (format!("e/a.jpg\n2\n{face}e/b.jpg\n1\n{face}"), "gt.txt:4", "not a finite number"),
            (format!("e/a.jpg\n1\n{face}{face}"), "gt.txt:4", "expected `event/picture.jpg`"),
            ("e/a.jpg\n".into(), "line 1", "number of faces"),
            ("e/a.jpg\n-1\n".into(), "gt.txt:2", "number of faces"),
            ("e/a.jpg\n99999999999999999999999\n".into(), "gt.txt:2", "number of faces"),
            ("e/a.jpg\n18446744073709551615\n".into(), "line 2", "truncated"),
            ("e/a.jpg\n1\n1 2 3 4 0 0 0 0 0\n".into(), "gt.txt:3", "expected 10 numbers"),
            ("e/a.jpg\n1\n1 2 nan 4 0 0 0 0 0 0\n".into(), "gt.txt:3", "not a finite number"),
            ("e/a.jpg\n1\n1 2 3 4 3 0 0 0 0 0\n".into(), "gt.txt:3", "blur is 3"),
            ("../a.jpg\n0\n".into(), "gt.txt:1", "expected `event/picture.jpg`"),
            ("a.jpg\n0\n".into(), "gt.txt:1", "expected `event/picture.jpg`"),
        ] {
            let error = parse(&text).unwrap_err().to_string();
            assert!(error.contains(line) && error.contains(what), "{text:?}: {error}");
        }
    }

    #[test]
    fn inverted_boxes_of_the_official_list_are_kept() {
        let gt = parse("e/a.jpg\n1\n1026 474 -2 23 2 0 0 0 2 0\n").unwrap();
        assert_eq!(gt.faces_in(Subset::All), 1);
        assert_eq!(gt.images[0].faces[0].bbox.area(), 0.0);
    }

    #[test]
    fn restriction_matches_by_stem_and_takes_the_lists_path() {
        let full = parse("e/a.jpg\n1\n1 2 3 4 0 0 0 0 0 0\ne/b.jpg\n0\n").unwrap();
        let part = full.restricted_to(&parse("e/a.webp\n0\n").unwrap()).unwrap();
        assert_eq!(part.images.len(), 1);
        assert_eq!((part.images[0].path.as_str(), part.images[0].faces.len()), ("e/a.webp", 1));
        let error = full.restricted_to(&parse("e/z.webp\n0\n").unwrap()).unwrap_err().to_string();
        assert!(error.contains("e/z.webp"), "{error}");
    }

    #[test]
    fn a_picture_listed_twice_is_refused() {
        let twice = parse("e/a.jpg\n0\ne/a.webp\n0\n").unwrap();
        assert!(twice.check_unique("gt.txt").unwrap_err().to_string().contains("e/a is listed twice"));
    }
}
