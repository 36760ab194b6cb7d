//! HAMBox's online high-quality anchor mining (Section 3.2): after the forward pass, faces with few
//! anchors get those whose decoded boxes found them.

use super::face_index::FaceIndex;
use super::scan::{FaceBox, Matches, BACKGROUND, IGNORED};
use crate::detect::BBox;
use crate::error::{Error, Result};
use crate::train::losses::{AnchorRole, IGNORED_OVERLAP};
use serde::{Deserialize, Serialize};

/// Settings of the mining.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct AnchorMining {
    /// K: a face with fewer matched anchors is filled up to this many.
    pub anchors: usize,
    /// T: least IoU of a mined anchor's decoded box with the face.
    pub overlap: f32,
}

impl Default for AnchorMining {
    /// K = 3 and T = 0.8 (HAMBox Section 4.1).
    fn default() -> Self {
        Self { anchors: 3, overlap: 0.8 }
    }
}

impl AnchorMining {
    /// Errors unless 0 < T <= 1.
    pub fn check(&self) -> Result<()> {
        if self.overlap > 0.0 && self.overlap <= 1.0 {
            return Ok(());
        }
        Err(Error::InvalidArgument(format!(
            "anchor mining: overlap must be above 0, up to 1, got {}",
            self.overlap
        )))
    }
}

/// An anchor mined for a face.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MinedAnchor {
    /// Flat index of the anchor.
    pub anchor: usize,
    /// Index of the face.
    pub face: usize,
    /// F_i: IoU of its decoded box with the face.
    pub overlap: f32,
}

/// What the mining found.
#[derive(Clone, Debug, PartialEq)]
pub struct Mined {
    /// The compensated anchors (the set psi of Eq. 1), in order of their flat indices, each once.
    pub compensated: Vec<MinedAnchor>,
    /// F_i of every anchor: best IoU of its decoded box with any face, the ignored ones among them (a
    /// box that finds one is no background); 0 where it lies below both T and 0.5.
    pub overlap: Vec<f32>,
}

impl Mined {
    /// What anchor `i` is in HAMBox Eq. 1 and 2.
    pub fn role(&self, matches: &Matches, i: usize) -> AnchorRole {
        if let Some(face) = matches.face(i) {
            return AnchorRole::Matched { face };
        }
        if matches.label[i] == IGNORED {
            return AnchorRole::Ignored;
        }
        match self.compensated.binary_search_by_key(&i, |m| m.anchor) {
            Ok(k) => AnchorRole::Compensated {
                face: self.compensated[k].face,
                overlap: self.compensated[k].overlap,
            },
            Err(_) => AnchorRole::Background { overlap: self.overlap[i] },
        }
    }

    /// Writes the finds into the labels, for a sampler: compensated anchors get their face (and their
    /// decoded box's IoU with it), background anchors whose decoded box overlaps a face by
    /// [`IGNORED_OVERLAP`] or more are ignored. [`Mined::role`] wants the matches as they were before.
    pub fn relabel(&self, matches: &mut Matches) {
        for (l, &f) in matches.label.iter_mut().zip(&self.overlap) {
            if *l == BACKGROUND && f >= IGNORED_OVERLAP {
                *l = IGNORED;
            }
        }
        for m in &self.compensated {
            (matches.label[m.anchor], matches.iou[m.anchor]) = (m.face as i32, m.overlap);
        }
    }
}

/// Mines anchors for the faces that have M < K of them in `matches`: background anchors whose decoded
/// box (`decoded(i)`, input pixels) has an IoU of at least T with the face, best first, at most K - M.
/// An anchor serves one face only; faces choose in their order, as in Algorithm 1 (which omits the test
/// against T: Section 3.2 has it), equal IoUs in order of the anchors. Ignored faces get none; a decoded
/// box that is not finite overlaps nothing.
///
/// One look-up an anchor in an index of the faces (`FaceIndex`): the work is that of the anchors
/// plus that of the pairs that are close, not of all pairs.
pub fn mine_high_quality_anchors(
    decoded: impl Fn(usize) -> BBox,
    faces: &[FaceBox],
    matches: &Matches,
    mining: &AnchorMining,
) -> Mined {
    let anchors = matches.label.len();
    let mut room: Vec<usize> = matches.per_face(faces.len());
    for (r, face) in room.iter_mut().zip(faces) {
        *r = if face.ignore { 0 } else { mining.anchors.saturating_sub(*r) };
    }
    let floor = mining.overlap.min(IGNORED_OVERLAP);
    let index = FaceIndex::new(faces, floor);
    let mut overlap = vec![0f32; anchors];
    let mut found: Vec<MinedAnchor> = Vec::new();
    for (i, best) in overlap.iter_mut().enumerate() {
        let b = decoded(i);
        for &j in index.near(&b) {
            let face = j as usize;
            let v = b.iou(&faces[face].bbox);
            if v >= floor && v > *best {
                *best = v;
            }
            if v >= mining.overlap && room[face] > 0 && matches.label[i] == BACKGROUND {
                found.push(MinedAnchor { anchor: i, face, overlap: v });
            }
        }
    }
    found.sort_unstable_by(|a, b| {
        a.face.cmp(&b.face).then(b.overlap.total_cmp(&a.overlap)).then(a.anchor.cmp(&b.anchor))
    });
    let mut taken = vec![false; anchors];
    found.retain(|m| {
        let take = room[m.face] > 0 && !taken[m.anchor];
        if take {
            room[m.face] -= 1;
            taken[m.anchor] = true;
        }
        take
    });
    found.sort_unstable_by_key(|m| m.anchor);
    Mined { compensated: found, overlap }
}

#[cfg(test)]
mod tests {
    use super::super::support::{near, random_faces, random_grid};
    use super::super::{match_anchors, MatchingRecipe};
    use super::*;
    use crate::graph::init::Rng;

    fn face(x: f32, y: f32, side: f32, ignore: bool) -> FaceBox {
        FaceBox { bbox: BBox::from_xywh(x, y, side, side), ignore }
    }

    fn mined(list: &[(usize, usize)], got: &Mined) -> bool {
        got.compensated.iter().map(|m| (m.anchor, m.face)).eq(list.iter().copied())
    }

    #[test]
    fn mining_matches_a_case_worked_by_hand() {
        // Shifting a 10 px box by d pixels: IoU (10 - d) / (10 + d).
        let at = |x: f32| BBox::from_xywh(x, 0.0, 10.0, 10.0);
        let faces = [face(0.0, 0.0, 10.0, false), face(1.0, 0.0, 10.0, false), face(90.0, 0.0, 10.0, true)];
        let decoded = [
            at(0.0),  // 0: matched with face 0 already
            at(0.5),  // 1: 0.905 with both faces
            at(1.0),  // 2: 0.818 with face 0, 1 with face 1
            at(2.0),  // 3: 0.667, 0.818
            at(3.0),  // 4: 0.538, 0.667
            at(90.0), // 5: on the ignored face
            at(50.0), // 6: on nothing
            at(0.25), // 7: ignored by the matching
        ];
        let mut label = vec![BACKGROUND; 8];
        (label[0], label[7]) = (0, IGNORED);
        let matches = Matches { label, iou: vec![0.0; 8] };
        let got = mine_high_quality_anchors(|i| decoded[i], &faces, &matches, &AnchorMining::default());
        // Face 0 (M = 1) takes two: 1 and 2. Face 1 (M = 0) would have 2, 1, 3, and is left with 3.
        assert!(mined(&[(1, 0), (2, 0), (3, 1)], &got), "{got:?}");
        assert!((got.compensated[1].overlap - 9.0 / 11.0).abs() < 1e-6);
        // F_i is of the best face; below 0.5 it reads as 0.
        assert!((got.overlap[2] - 1.0).abs() < 1e-6 && (got.overlap[4] - 8.0 / 12.0).abs() < 1e-6);
        assert_eq!((got.overlap[5], got.overlap[6]), (1.0, 0.0));
        assert_eq!(got.role(&matches, 0), AnchorRole::Matched { face: 0 });
        assert_eq!(got.role(&matches, 7), AnchorRole::Ignored);
        assert!(matches!(got.role(&matches, 3), AnchorRole::Compensated { face: 1, .. }));
        assert_eq!(got.role(&matches, 5), AnchorRole::Background { overlap: 1.0 });
        let mut labels = matches.clone();
        got.relabel(&mut labels);
        assert_eq!(labels.label, [0, 0, 0, 1, IGNORED, IGNORED, BACKGROUND, IGNORED]);
        assert_eq!(labels.iou[1], got.compensated[0].overlap);
        // A face that has K anchors or more gets none.
        let one = AnchorMining { anchors: 1, overlap: 0.8 };
        let got = mine_high_quality_anchors(|i| decoded[i], &faces, &matches, &one);
        assert!(mined(&[(2, 1)], &got), "{got:?}");
    }

    fn overlap_of(b: &BBox, face: &FaceBox) -> f32 {
        if [b.x1, b.y1, b.x2, b.y2].iter().all(|v| v.is_finite()) {
            b.iou(&face.bbox)
        } else {
            0.0
        }
    }

    /// Section 3.2 over all pairs.
    fn brute_force(decoded: &[BBox], faces: &[FaceBox], matches: &Matches, mining: &AnchorMining) -> Mined {
        let floor = mining.overlap.min(IGNORED_OVERLAP);
        let overlap = decoded
            .iter()
            .map(|b| faces.iter().map(|f| overlap_of(b, f)).fold(0f32, f32::max))
            .map(|v| if v >= floor { v } else { 0.0 })
            .collect();
        let mut compensated: Vec<MinedAnchor> = Vec::new();
        let mut free: Vec<bool> = matches.label.iter().map(|l| *l == BACKGROUND).collect();
        for (j, f) in faces.iter().enumerate().filter(|(_, f)| !f.ignore) {
            for _ in matches.per_face(faces.len())[j]..mining.anchors {
                let mut best: Option<(usize, f32)> = None;
                for i in (0..decoded.len()).filter(|i| free[*i]) {
                    let v = overlap_of(&decoded[i], f);
                    if v >= mining.overlap && best.is_none_or(|b| v > b.1) {
                        best = Some((i, v));
                    }
                }
                let Some((anchor, overlap)) = best else { break };
                free[anchor] = false;
                compensated.push(MinedAnchor { anchor, face: j, overlap });
            }
        }
        compensated.sort_by_key(|m| m.anchor);
        Mined { compensated, overlap }
    }

    #[test]
    fn the_indexed_mining_equals_the_double_loop_and_an_anchor_serves_one_face() {
        let mut rng = Rng::new(41);
        let (mut total, mut high) = (0, 0);
        for round in 0..300 {
            let grid = random_grid(&mut rng);
            let faces = random_faces(&grid, &mut rng, 0.1);
            let matches =
                match_anchors(&grid, &faces, &MatchingRecipe::FirstStep { positive: rng.range(0.3, 0.9) });
            let decoded: Vec<BBox> = (0..grid.len)
                .map(|i| match rng.below(4) {
                    0 => grid.anchor(i).decode(&[0.0; 4], [1.0; 2]),
                    1 if rng.below(20) == 0 => BBox::new(f32::NAN, 0.0, f32::INFINITY, 3.0),
                    _ if faces.is_empty() => BBox::default(),
                    _ => near(&faces[rng.below(faces.len())].bbox, rng.range(0.0, 0.3), &mut rng),
                })
                .collect();
            let mining = AnchorMining { anchors: rng.below(12), overlap: rng.range(0.05, 0.95) };
            let got = mine_high_quality_anchors(|i| decoded[i], &faces, &matches, &mining);
            assert!(
                got == brute_force(&decoded, &faces, &matches, &mining),
                "round {round}, {mining:?} {faces:?}"
            );
            assert!(got.compensated.windows(2).all(|w| w[0].anchor < w[1].anchor), "each anchor once");
            let mut per_face = matches.per_face(faces.len());
            for m in &got.compensated {
                assert!(matches.label[m.anchor] == BACKGROUND && !faces[m.face].ignore);
                per_face[m.face] += 1;
                assert!(per_face[m.face] <= mining.anchors);
            }
            total += got.compensated.len();
            high += got.overlap.iter().filter(|v| **v > 0.0).count();
        }
        assert!(total > 2000 && high > 50_000, "{total} mined, {high} overlaps");
    }
}
