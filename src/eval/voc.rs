//! PASCAL VOC precision and recall, as AFW, PASCAL Face and MAFA are scored.
//!
//! Detections of the whole set, by falling score, go to the face they overlap most (VOC
//! development kit: sides count the last pixel, IoU 0.5 is a match). On an ignored face they leave
//! the count; on a face found before they are false.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;

use super::curve::{all_point_ap, curve_points, interpolated_ap, PrCurve};
use super::lines::{read_text, Lines};
use super::overlap::iou_inclusive;
use super::Progress;
use crate::detect::{BBox, Detection};
use crate::Result;

/// IoU from which a detection finds a face.
pub const MATCH_IOU: f64 = 0.5;

/// An annotated face.
#[derive(Clone, Debug, PartialEq)]
pub struct Truth {
    /// Name of its picture.
    pub image: String,
    /// Box in pixels.
    pub bbox: BBox,
    /// Neither wanted nor wrong to find.
    pub ignored: bool,
}

/// A detection and its picture.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    /// Name of its picture.
    pub image: String,
    /// Box and score.
    pub detection: Detection,
}

/// The curve and both areas.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct VocReport {
    /// Mean precision at recall 0, 0.1 .. 1 (VOC 2007).
    pub ap_11_point: f64,
    /// Area under the envelope (VOC 2010 and later).
    pub ap_all_point: f64,
    /// A point a detection that counts; its `ap` is `ap_all_point`.
    pub curve: PrCurve,
}

/// Scores detections. Those in pictures without a face are false.
pub fn evaluate(truth: &[Truth], found: &[Found], progress: Progress) -> VocReport {
    let mut by_image: BTreeMap<&str, Vec<(&Truth, bool)>> = BTreeMap::new();
    for t in truth {
        by_image.entry(&t.image).or_default().push((t, false));
    }
    let faces = truth.iter().filter(|t| !t.ignored).count();
    let mut order: Vec<&Found> = found.iter().collect();
    order.sort_by(|a, b| b.detection.score.total_cmp(&a.detection.score));
    let mut ranked = Vec::new();
    for (done, f) in order.iter().enumerate() {
        let mut best: Option<(f64, &mut (&Truth, bool))> = None;
        for candidate in by_image.get_mut(f.image.as_str()).into_iter().flatten() {
            let iou = iou_inclusive(&candidate.0.bbox, &f.detection.bbox);
            if iou >= MATCH_IOU && best.as_ref().is_none_or(|(most, _)| iou > *most) {
                best = Some((iou, candidate));
            }
        }
        let score = f.detection.score as f64;
        match best {
            Some((_, (face, _))) if face.ignored => {}
            Some((_, (_, taken))) => ranked.push((score, !std::mem::replace(taken, true))),
            None => ranked.push((score, false)),
        }
        progress(done + 1, order.len());
    }
    let points = curve_points(ranked.into_iter(), faces);
    let (ap_11_point, ap_all_point) = (interpolated_ap(&points, 11), all_point_ap(&points));
    VocReport { ap_11_point, ap_all_point, curve: PrCurve { ap: ap_all_point, faces, points } }
}

/// What MAFA's test annotation calls the type of a face (Ge et al., CVPR 2017).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum MafaType {
    /// 1: occluded by a mask of any kind.
    Masked,
    /// 2: without a mask.
    Unmasked,
    /// 3: too small, blurred or covered to be asked for.
    Invalid,
}

/// A face with its MAFA type. Sets without types use [`MafaType::Unmasked`], and
/// [`MafaType::Invalid`] for what they ignore.
#[derive(Clone, Debug, PartialEq)]
pub struct TypedFace {
    /// Name of its picture.
    pub image: String,
    /// Box in pixels.
    pub bbox: BBox,
    /// Its type.
    pub kind: MafaType,
}

/// Which faces of MAFA count; all others are ignored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum MafaSubset {
    /// Every annotated face, the invalid ones too.
    Whole,
    /// Masked faces.
    Masked,
    /// Masked and unmasked faces, without the invalid ones.
    Unignored,
}

impl MafaSubset {
    /// In the order of the published tables.
    pub const EACH: [MafaSubset; 3] = [MafaSubset::Whole, MafaSubset::Masked, MafaSubset::Unignored];

    /// The faces, marked ignored where this subset does not count them. [`MafaSubset::Unignored`]
    /// also serves AFW and PASCAL Face.
    pub fn select(self, faces: &[TypedFace]) -> Vec<Truth> {
        let ignored = |kind| match self {
            MafaSubset::Whole => false,
            MafaSubset::Masked => kind != MafaType::Masked,
            MafaSubset::Unignored => kind == MafaType::Invalid,
        };
        let truth = |f: &TypedFace| Truth { image: f.image.clone(), bbox: f.bbox, ignored: ignored(f.kind) };
        faces.iter().map(truth).collect()
    }
}

/// Reads faces, one a line: `image left top right bottom [type]`, type 1 masked, 2 unmasked (taken
/// where it is missing), 3 invalid. Names have no blanks; a name ending in `.gz` is decompressed.
pub fn read_faces(path: &Path) -> Result<Vec<TypedFace>> {
    let text = read_text(path)?;
    let mut lines = Lines::new(path, &text);
    let mut faces = Vec::new();
    while let Some(line) = lines.next() {
        let (image, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        let (corners, kind) = match lines.numbers(rest)?[..] {
            [x1, y1, x2, y2] => ([x1, y1, x2, y2], 2.0),
            [x1, y1, x2, y2, kind] => ([x1, y1, x2, y2], kind),
            ref other => {
                let n = other.len();
                return Err(lines.error(format_args!(
                    "expected `image left top right bottom [type]`, found {n} numbers after the name"
                )));
            }
        };
        let kind = [(1.0, MafaType::Masked), (2.0, MafaType::Unmasked), (3.0, MafaType::Invalid)]
            .into_iter()
            .find(|(number, _)| *number == kind)
            .ok_or_else(|| {
                lines.error(format_args!("type {kind} is not 1 (masked), 2 (unmasked) or 3 (invalid)"))
            })?
            .1;
        faces.push(TypedFace { image: image.into(), bbox: corner_box(&lines, corners)?, kind });
    }
    Ok(faces)
}

/// Reads detections in the VOC result format, one a line: `image score left top right bottom`.
pub fn read_detections(path: &Path) -> Result<Vec<Found>> {
    let text = read_text(path)?;
    let mut lines = Lines::new(path, &text);
    let mut found = Vec::new();
    while let Some(line) = lines.next() {
        let (image, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        let [score, corners @ ..] = lines.fields::<5>(rest, "score left top right bottom, after the name")?;
        let detection = Detection { bbox: corner_box(&lines, corners)?, score: score as f32 };
        found.push(Found { image: image.into(), detection });
    }
    Ok(found)
}

fn corner_box(lines: &Lines, [x1, y1, x2, y2]: [f64; 4]) -> Result<BBox> {
    if x2 < x1 || y2 < y1 {
        return Err(lines.error(format_args!("box {x1} {y1} {x2} {y2} has a negative size")));
    }
    Ok(BBox::new(x1 as f32, y1 as f32, x2 as f32, y2 as f32))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;
    use proptest::prelude::*;

    fn truth(image: &str, x: f32, ignored: bool) -> Truth {
        Truth { image: image.into(), bbox: BBox::new(x, 0.0, x + 9.0, 9.0), ignored }
    }

    fn found(image: &str, x: f32, score: f32) -> Found {
        let bbox = BBox::new(x, 0.0, x + 9.0, 9.0);
        Found { image: image.into(), detection: Detection { bbox, score } }
    }

    fn run(t: &[Truth], f: &[Found]) -> VocReport {
        evaluate(t, f, &mut |_, _| {})
    }

    #[test]
    fn duplicates_are_false_and_ignored_faces_absorb() {
        let t = [truth("a", 0.0, false), truth("a", 50.0, true), truth("b", 0.0, false)];
        let f = [
            found("b", 1.0, 0.2),  // right, last
            found("a", 0.0, 0.9),  // right
            found("a", 50.0, 0.8), // on the ignored face
            found("a", 51.0, 0.7), // again
            found("a", 1.0, 0.6),  // duplicate
            found("c", 0.0, 0.5),  // picture without faces
        ];
        let report = run(&t, &f);
        let points: Vec<(f64, f64)> = report.curve.points.iter().map(|p| (p.recall, p.precision)).collect();
        assert_eq!(points, [(0.5, 1.0), (0.5, 0.5), (0.5, 1.0 / 3.0), (1.0, 0.5)]);
        assert!((report.ap_all_point - 0.75).abs() < 1e-12);
        // Levels 0 to 0.5 see 1, the five others 0.5.
        assert!((report.ap_11_point - (6.0 + 2.5) / 11.0).abs() < 1e-12);
        assert_eq!(report.curve.faces, 2);
    }

    #[test]
    fn mafa_subsets_count_their_faces() {
        let face = |kind| TypedFace { image: "a".into(), bbox: BBox::default(), kind };
        let faces = [face(MafaType::Masked), face(MafaType::Unmasked), face(MafaType::Invalid)];
        let ignored =
            MafaSubset::EACH.map(|s| s.select(&faces).iter().map(|t| t.ignored).collect::<Vec<_>>());
        assert_eq!(ignored, [[false, false, false], [false, true, true], [false, false, true]]);
    }

    #[test]
    fn lists_are_read_and_malformed_ones_name_the_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("l.txt");
        let write = |text: &str| std::fs::write(&path, text).unwrap();
        write("a 1 2 3 4\nb 1 2 3 4 3\n");
        let faces = read_faces(&path).unwrap();
        assert_eq!(faces[0].bbox, BBox::new(1.0, 2.0, 3.0, 4.0));
        assert_eq!((faces[0].kind, faces[1].kind), (MafaType::Unmasked, MafaType::Invalid));
        write("a 0.5 1 2 3 4\n");
        let f = read_detections(&path).unwrap();
        assert_eq!((f[0].detection.score, f[0].detection.bbox.y2), (0.5, 4.0));

        for bad in ["a 1 2 3\n", "a\n", "a 1 2 3 4 5\n", "a 1 2 0 4\n", "a 1 2 x 4\n", "a 1 2 nan 4\n"] {
            write(bad);
            let error = read_faces(&path).unwrap_err();
            assert!(
                matches!(error, Error::InvalidData(_)) && error.to_string().contains("l.txt:1"),
                "{bad:?}"
            );
        }
        for bad in ["a 0.5 1 2 3\n", "a NaN 1 2 3 4\n", "a 0.5 1 2 0 4\n"] {
            write(bad);
            assert!(read_detections(&path).unwrap_err().to_string().contains("l.txt:1"), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn areas_stay_within_unit_and_a_perfect_hit_never_lowers_recall(
            t in proptest::collection::vec((0u8..3, 0u8..60, any::<bool>()), 1..12),
            f in proptest::collection::vec((0u8..4, 0u8..60, 0u8..10), 0..20),
            pick: usize,
        ) {
            let t: Vec<Truth> = t.iter().map(|&(i, x, ig)| truth(&i.to_string(), x as f32, ig)).collect();
            let mut f: Vec<Found> =
                f.iter().map(|&(i, x, s)| found(&i.to_string(), x as f32, s as f32)).collect();
            let before = run(&t, &f);
            for ap in [before.ap_11_point, before.ap_all_point] {
                prop_assert!((0.0..=1.0 + 1e-9).contains(&ap));
            }
            let face = &t[pick % t.len()];
            f.push(Found { image: face.image.clone(), detection: Detection { bbox: face.bbox, score: 0.0 } });
            let recall = |r: &VocReport| r.curve.points.last().map_or(0.0, |p| p.recall);
            prop_assert!(recall(&run(&t, &f)) >= recall(&before));
        }
    }
}
