//! Matching by the IoU of anchors, or of boxes that were anchors, with the faces.

use super::grid::{nearest, visit_reachable, AnchorGrid, AnchorGroup, Reach};
use super::proposals::Proposals;
use super::recipe::{MatchingRecipe, SecondPass};
use crate::detect::BBox;

/// Label of an anchor that learns background.
pub const BACKGROUND: i32 = -1;
/// Label of an anchor that learns nothing.
pub const IGNORED: i32 = -2;
/// An anchor with this share of its area inside an ignored face is ignored. Ours: an ignored box
/// often marks a whole crowd, where small anchors have next to no IoU with it.
pub const IGNORE_COVER: f32 = 0.5;

/// A face of the annotation, in pixels of the network's input.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FaceBox {
    /// The face.
    pub bbox: BBox,
    /// Neither face nor background: too small, marked invalid, or a crowd. No anchor is matched with it.
    pub ignore: bool,
}

/// Labels of all anchors of a picture.
#[derive(Clone, Debug, PartialEq)]
pub struct Matches {
    /// [`BACKGROUND`], [`IGNORED`], or the index of the face.
    pub label: Vec<i32>,
    /// IoU of a matched anchor with its face, of any other with the face that it overlaps most (ignored
    /// faces left out), 0 where that lies below the matching's lower threshold.
    pub iou: Vec<f32>,
}

impl Matches {
    /// The face that anchor `i` is matched with.
    pub fn face(&self, i: usize) -> Option<usize> {
        usize::try_from(self.label[i]).ok()
    }

    /// Matched anchors of each of `faces` faces.
    pub fn per_face(&self, faces: usize) -> Vec<usize> {
        let mut count = vec![0; faces];
        self.label.iter().filter_map(|&l| usize::try_from(l).ok()).for_each(|f| count[f] += 1);
        count
    }

    /// Ignores every anchor of `grid` that crosses the border of `inside`, the picture without its
    /// padding (HR, appendix B, "Border cases"; the labels must be of that grid).
    pub fn ignore_crossing(&mut self, grid: &AnchorGrid, inside: &BBox) {
        let anchors = grid.groups.iter().flat_map(AnchorGroup::boxes);
        for (label, a) in self.label.iter_mut().zip(anchors) {
            if a.x1 < inside.x1 || a.y1 < inside.y1 || a.x2 > inside.x2 || a.y2 > inside.y2 {
                *label = IGNORED;
            }
        }
    }
}

/// Labels every anchor of the grid. Ties go to the face that comes first.
///
/// Ignored faces: an anchor that has [`IGNORE_COVER`] of its area in one, or an IoU of at least the
/// lower threshold with one, is ignored instead of background. An anchor matched with a face stays so
/// unless it has a higher IoU, at least the lower threshold, with an ignored face. An empty face matches nothing.
pub fn match_anchors(grid: &AnchorGrid, faces: &[FaceBox], recipe: &MatchingRecipe) -> Matches {
    assign(grid, faces, recipe)
}

/// [`match_anchors`] for boxes anywhere: RefineFace's anchors moved by its first step, its FSM's and
/// Grouped Fast R-CNN's proposals. A box that is empty or not finite is background.
pub fn match_boxes(boxes: &[BBox], faces: &[FaceBox], recipe: &MatchingRecipe) -> Matches {
    assign(&Proposals::new(boxes), faces, recipe)
}

/// Boxes that are matched, and how to find those near a face.
pub(super) trait Layout {
    /// Boxes in all.
    fn count(&self) -> usize;
    /// Calls `visit(index, box)` for a superset of the boxes that reach `bbox`, each once.
    fn visit(&self, bbox: &BBox, reach: Reach, visit: &mut dyn FnMut(usize, BBox));
    /// The box of the highest IoU with `bbox`, where that is above 0, and the IoU.
    fn best(&self, bbox: &BBox) -> Option<(usize, f32)>;
}

impl Layout for AnchorGrid {
    fn count(&self) -> usize {
        self.len
    }

    fn visit(&self, bbox: &BBox, reach: Reach, visit: &mut dyn FnMut(usize, BBox)) {
        self.groups.iter().for_each(|g| visit_reachable(g, bbox, reach, &mut *visit));
    }

    fn best(&self, bbox: &BBox) -> Option<(usize, f32)> {
        let mut best: Option<(usize, f32)> = None;
        for (i, anchor) in self.groups.iter().filter_map(|g| nearest(g, bbox)) {
            let v = anchor.iou(bbox);
            if v > best.map_or(0.0, |b| b.1) {
                best = Some((i, v));
            }
        }
        best
    }
}

fn assign(layout: &impl Layout, faces: &[FaceBox], recipe: &MatchingRecipe) -> Matches {
    let [low, high] = recipe.thresholds();
    let mut iou = vec![0f32; layout.count()];
    let mut best = vec![BACKGROUND; layout.count()];
    let mut unmatched = vec![true; faces.len()];
    for (j, face) in faces.iter().enumerate().filter(|(_, f)| !f.ignore) {
        layout.visit(&face.bbox, Reach::Iou(low), &mut |i, anchor| {
            let v = anchor.iou(&face.bbox);
            if v >= low && v > iou[i] {
                (iou[i], best[i]) = (v, j as i32);
            }
        });
    }
    // Eq. 1 of Group Sampling; `best` keeps the argmax of the anchors between the thresholds.
    let mut label = best.clone();
    for (l, &v) in label.iter_mut().zip(&iou) {
        if v >= high {
            unmatched[*l as usize] = false;
        } else if *l != BACKGROUND {
            *l = IGNORED;
        }
    }
    match *recipe {
        MatchingRecipe::TwoPassScan { second_pass: SecondPass::All, .. } => {
            for (l, &j) in label.iter_mut().zip(&best) {
                if *l == IGNORED && unmatched[j as usize] {
                    *l = j;
                }
            }
        }
        MatchingRecipe::TwoPassScan { second_pass: SecondPass::Best, .. } => {
            let mut first: Vec<Option<usize>> = vec![None; faces.len()];
            for (i, &j) in best.iter().enumerate() {
                if label[i] == IGNORED && unmatched[j as usize] {
                    let f = &mut first[j as usize];
                    if f.is_none_or(|k| iou[i] > iou[k]) {
                        *f = Some(i);
                    }
                }
            }
            first.into_iter().flatten().for_each(|i| label[i] = best[i]);
        }
        MatchingRecipe::Thresholds { force_best: true, .. } => {
            force_best(layout, faces, &unmatched, &mut label, &mut iou);
        }
        MatchingRecipe::Thresholds { .. } | MatchingRecipe::FirstStep { .. } => {}
    }
    for face in faces.iter().filter(|f| f.ignore) {
        let mut visit = |i: usize, anchor: BBox| {
            let v = anchor.iou(&face.bbox);
            if label[i] == BACKGROUND && (v >= low || anchor.share_in(&face.bbox) >= IGNORE_COVER)
                || label[i] >= 0 && v >= low && v > iou[i]
            {
                label[i] = IGNORED;
            }
        };
        layout.visit(&face.bbox, Reach::Cover(IGNORE_COVER), &mut visit);
        layout.visit(&face.bbox, Reach::Iou(low), &mut visit);
    }
    Matches { label, iou }
}

/// Gives each unmatched face its best anchor, unless that is matched.
fn force_best(
    layout: &impl Layout,
    faces: &[FaceBox],
    unmatched: &[bool],
    label: &mut [i32],
    iou: &mut [f32],
) {
    let mut claims: Vec<(usize, f32, usize)> = Vec::new();
    for (j, face) in faces.iter().enumerate().filter(|(j, f)| unmatched[*j] && !f.ignore) {
        let free = layout.best(&face.bbox).filter(|(i, _)| label[*i] < 0);
        claims.extend(free.map(|(i, v)| (i, v, j)));
    }
    // Highest IoU first at each anchor; the sort is stable, so ties go to the first face.
    claims.sort_by(|a, b| a.0.cmp(&b.0).then(b.1.total_cmp(&a.1)));
    claims.dedup_by_key(|c| c.0);
    for (i, v, j) in claims {
        (label[i], iou[i]) = (j as i32, v);
    }
}

#[cfg(test)]
mod tests {
    use super::super::support::{boxes, near, random_faces, random_grid};
    use super::*;
    use crate::graph::init::Rng;

    fn face(x1: f32, y1: f32, x2: f32, y2: f32) -> FaceBox {
        FaceBox { bbox: BBox::new(x1, y1, x2, y2), ignore: false }
    }

    /// 4 x 4 cells, stride 8, anchors 8 x 8 that tile 32 x 32 pixels.
    fn tiles() -> AnchorGrid {
        let mut grid = AnchorGrid::new();
        grid.push(8, 8.0, 8.0, 4, 4);
        grid
    }

    fn two_pass(lambda1: f32, lambda2: f32, second_pass: SecondPass) -> MatchingRecipe {
        MatchingRecipe::TwoPassScan { lambda1, lambda2, second_pass }
    }

    #[test]
    fn two_pass_scan_matches_a_case_worked_by_hand() {
        // Face 0 is anchor 5 exactly. Face 1 spans anchors 10 and 11, IoU 1/2 with each: ignored in the
        // first pass, its own in the second. Face 2 overlaps anchor 4 by 1/4: nothing.
        let faces = [face(8.0, 8.0, 16.0, 16.0), face(16.0, 16.0, 32.0, 24.0), face(0.0, 8.0, 4.0, 12.0)];
        let m = match_anchors(&tiles(), &faces, &two_pass(0.6, 0.4, SecondPass::All));
        let mut expected = vec![BACKGROUND; 16];
        (expected[5], expected[10], expected[11]) = (0, 1, 1);
        assert_eq!(m.label, expected);
        assert_eq!((m.iou[5], m.iou[10], m.iou[4]), (1.0, 0.5, 0.0));
        assert_eq!(m.per_face(3), [1, 2, 0]);
        let m = match_anchors(&tiles(), &faces, &two_pass(0.6, 0.4, SecondPass::Best));
        (expected[10], expected[11]) = (1, IGNORED);
        assert_eq!(m.label, expected);
        // A face with an anchor from the first pass gets none from the second: the anchors between the
        // thresholds stay ignored. 10 x 8 on anchor 5: IoU 0.8; the next one shares 2 of 8 columns.
        let m = match_anchors(&tiles(), &[face(8.0, 8.0, 18.0, 16.0)], &two_pass(0.7, 0.1, SecondPass::All));
        assert_eq!((m.label[5], m.label[6]), (0, IGNORED));
    }

    #[test]
    fn thresholds_match_a_case_worked_by_hand() {
        let rule = |force_best| MatchingRecipe::Thresholds { negative: 0.4, positive: 0.5, force_best };
        // Face 0 reaches 0.8 on anchor 5 and 0.125 on 6; face 1 has at most 1/4, on anchor 15.
        let faces = [face(8.0, 8.0, 18.0, 16.0), face(26.0, 26.0, 30.0, 30.0)];
        let m = match_anchors(&tiles(), &faces, &rule(false));
        assert_eq!((m.label[5], m.label[6], m.label[15]), (0, BACKGROUND, BACKGROUND));
        let m = match_anchors(&tiles(), &faces, &rule(true));
        assert_eq!((m.label[15], m.iou[15]), (1, 0.25));
        // IoU 9/20 lies between.
        let m = match_anchors(&tiles(), &[face(8.0, 8.0, 11.6, 16.0)], &rule(false));
        assert_eq!(m.label[5], IGNORED);
        let m = match_anchors(
            &tiles(),
            &[face(8.0, 8.0, 11.6, 16.0)],
            &MatchingRecipe::FirstStep { positive: 0.46 },
        );
        assert_eq!(m.label[5], BACKGROUND, "HAMBox has no ignore zone");
        let m = match_anchors(
            &tiles(),
            &[face(8.0, 8.0, 11.6, 16.0)],
            &MatchingRecipe::FirstStep { positive: 0.35 },
        );
        assert_eq!(m.label[5], 0);
    }

    #[test]
    fn two_faces_never_share_an_anchor_even_by_force() {
        let rule = MatchingRecipe::Thresholds { negative: 0.4, positive: 0.5, force_best: true };
        // Both small faces have anchor 5 as their best; the larger has the higher IoU.
        let faces = [face(9.0, 9.0, 12.0, 12.0), face(10.0, 10.0, 15.0, 15.0)];
        let m = match_anchors(&tiles(), &faces, &rule);
        assert_eq!((m.label[5], m.per_face(2)), (1, vec![0, 1]));
    }

    #[test]
    fn anchors_on_ignored_faces_are_no_background() {
        let rule = MatchingRecipe::FirstStep { positive: 0.35 };
        let crowd = FaceBox { bbox: BBox::new(0.0, 0.0, 32.0, 12.0), ignore: true };
        let faces = [crowd, face(8.0, 8.0, 16.0, 16.0)];
        let m = match_anchors(&tiles(), &faces, &rule);
        // Row 0 lies inside, row 1 by half, rows 2 and 3 outside; face 1 keeps its anchor.
        assert!((0..4).all(|i| m.label[i] == IGNORED) && m.label[4] == IGNORED);
        assert_eq!((m.label[5], m.label[8]), (1, BACKGROUND));
        let same = FaceBox { bbox: BBox::new(8.0, 8.0, 16.0, 16.0), ignore: true };
        let m = match_anchors(&tiles(), &[face(8.0, 8.0, 16.0, 14.0), same], &rule);
        assert_eq!(m.label[5], IGNORED, "it overlaps the ignored face more");
    }

    /// The definitions, over all pairs.
    fn brute_force(anchors: &[BBox], faces: &[FaceBox], recipe: &MatchingRecipe) -> Matches {
        let [low, high] = recipe.thresholds();
        let best: Vec<(usize, f32)> = anchors
            .iter()
            .map(|a| {
                let mut best = (usize::MAX, 0.0);
                for (j, f) in faces.iter().enumerate().filter(|(_, f)| !f.ignore) {
                    let v = a.iou(&f.bbox);
                    if v > best.1 {
                        best = (j, v);
                    }
                }
                best
            })
            .collect();
        let matched_first: Vec<bool> =
            (0..faces.len()).map(|j| best.iter().any(|b| b.0 == j && b.1 >= high)).collect();
        let mut label: Vec<i32> = best
            .iter()
            .map(|&(j, v)| match *recipe {
                _ if v >= high => j as i32,
                _ if v < low => BACKGROUND,
                MatchingRecipe::TwoPassScan { .. } if !matched_first[j] => j as i32,
                _ => IGNORED,
            })
            .collect();
        if let MatchingRecipe::TwoPassScan { second_pass: SecondPass::Best, .. } = recipe {
            for j in (0..faces.len()).filter(|j| !matched_first[*j]) {
                let mine: Vec<usize> = (0..label.len()).filter(|i| label[*i] == j as i32).collect();
                let most = mine.iter().fold(0f32, |m, &i| m.max(best[i].1));
                let first = mine.iter().copied().find(|&i| best[i].1 == most);
                mine.iter().filter(|&&i| Some(i) != first).for_each(|&i| label[i] = IGNORED);
            }
        }
        for (i, a) in anchors.iter().enumerate() {
            for f in faces.iter().filter(|f| f.ignore) {
                let v = a.iou(&f.bbox);
                let near = v >= low || a.share_in(&f.bbox) >= IGNORE_COVER;
                if label[i] == BACKGROUND && near || label[i] >= 0 && v >= low && v > best[i].1 {
                    label[i] = IGNORED;
                }
            }
        }
        let iou = best.iter().map(|b| if b.1 >= low { b.1 } else { 0.0 }).collect();
        Matches { label, iou }
    }

    #[test]
    fn the_pruned_scan_equals_the_double_loop_over_random_layouts() {
        let mut rng = Rng::new(31);
        let (mut matched, mut ignored) = (0, 0);
        for round in 0..150 {
            let grid = random_grid(&mut rng);
            let faces = random_faces(&grid, &mut rng, 0.15);
            let low = rng.range(0.02, 0.6);
            let high = rng.range(low, 0.9);
            for recipe in [
                two_pass(high, low, SecondPass::All),
                two_pass(high, low, SecondPass::Best),
                MatchingRecipe::Thresholds { negative: low, positive: high, force_best: false },
                MatchingRecipe::FirstStep { positive: low },
            ] {
                let got = match_anchors(&grid, &faces, &recipe);
                let expected = brute_force(&boxes(&grid), &faces, &recipe);
                assert!(got == expected, "round {round}, {recipe:?}, {faces:?}, {:?}", grid.groups);
                matched += got.label.iter().filter(|l| **l >= 0).count();
                ignored += got.label.iter().filter(|l| **l == IGNORED).count();
            }
        }
        assert!(matched > 10_000 && ignored > 10_000, "{matched} matched, {ignored} ignored");
    }

    #[test]
    fn boxes_anywhere_match_as_the_double_loop_does() {
        let mut rng = Rng::new(33);
        let mut matched = 0;
        for round in 0..150 {
            let faces = random_faces(&random_grid(&mut rng), &mut rng, 0.15);
            let low = rng.range(0.02, 0.6);
            let high = rng.range(low, 0.9);
            let proposals: Vec<BBox> = (0..rng.below(400))
                .map(|_| match rng.below(4) {
                    // As far as a box of that IoU can be: the face widened to one side alone.
                    2 if !faces.is_empty() => {
                        let f = faces[rng.below(faces.len())].bbox;
                        let wide = f.width() / rng.range(low, 1.1 * low);
                        let x1 = if rng.below(2) == 0 { f.x1 } else { f.x2 - wide };
                        BBox { x1, x2: x1 + wide, ..f }
                    }
                    0 if !faces.is_empty() => near(&faces[rng.below(faces.len())].bbox, 0.3, &mut rng),
                    1 => BBox::from_xywh(rng.range(-50.0, 300.0), rng.range(-50.0, 300.0), 30.0, 20.0),
                    _ => {
                        let side = 2f32.powf(rng.range(-1.0, 8.0));
                        BBox::from_xywh(rng.range(-50.0, 300.0), rng.range(-50.0, 300.0), side, side)
                    }
                })
                .collect();
            for recipe in [
                two_pass(high, low, SecondPass::All),
                MatchingRecipe::Thresholds { negative: low, positive: high, force_best: false },
            ] {
                let got = match_boxes(&proposals, &faces, &recipe);
                assert!(
                    got == brute_force(&proposals, &faces, &recipe),
                    "round {round}, {recipe:?}, {faces:?}"
                );
                matched += got.label.iter().filter(|l| **l >= 0).count();
            }
            let force = MatchingRecipe::Thresholds { negative: low, positive: high, force_best: true };
            let forced = match_boxes(&proposals, &faces, &force);
            for i in (0..proposals.len()).filter(|i| forced.label[*i] >= 0 && forced.iou[*i] < low) {
                let face = faces[forced.face(i).expect("it is matched")].bbox;
                let most = proposals.iter().fold(0f32, |m, b| m.max(b.iou(&face)));
                assert_eq!(forced.iou[i], most);
            }
        }
        assert!(matched > 5000, "{matched}");
        let broken = [BBox::new(f32::NAN, 0.0, f32::INFINITY, 8.0), BBox::new(9.0, 9.0, 3.0, 3.0)];
        let m = match_boxes(&broken, &[face(0.0, 0.0, 8.0, 8.0)], &MatchingRecipe::default());
        assert_eq!(m.label, [BACKGROUND; 2]);
    }

    #[test]
    fn anchors_that_cross_the_picture_are_ignored() {
        let mut m = match_anchors(&tiles(), &[face(8.0, 8.0, 16.0, 16.0)], &MatchingRecipe::default());
        m.ignore_crossing(&tiles(), &BBox::new(0.0, 0.0, 24.0, 31.0));
        let ignored: Vec<usize> = (0..16).filter(|i| m.label[*i] == IGNORED).collect();
        assert_eq!(ignored, [3, 7, 11, 12, 13, 14, 15]);
        assert_eq!(m.label[5], 0);
    }

    #[test]
    fn the_forced_anchor_has_the_highest_iou_of_all() {
        let mut rng = Rng::new(32);
        let mut forced = 0;
        for _ in 0..100 {
            let grid = random_grid(&mut rng);
            let faces = random_faces(&grid, &mut rng, 0.0);
            let rule = |force_best| MatchingRecipe::Thresholds { negative: 0.4, positive: 0.7, force_best };
            let (without, with) =
                (match_anchors(&grid, &faces, &rule(false)), match_anchors(&grid, &faces, &rule(true)));
            let anchors = boxes(&grid);
            for i in (0..grid.len).filter(|i| with.label[*i] != without.label[*i]) {
                let j = with.face(i).expect("forcing only adds positives");
                assert_eq!(without.per_face(faces.len())[j], 0);
                let most = anchors.iter().fold(0f32, |m, a| m.max(a.iou(&faces[j].bbox)));
                assert!(with.iou[i] >= most * (1.0 - 1e-4), "{} {most}", with.iou[i]);
                assert!(with.per_face(faces.len())[j] == 1);
                forced += 1;
            }
        }
        assert!(forced > 100, "{forced}");
    }

    #[test]
    fn empty_and_broken_boxes_match_nothing() {
        let nan = f32::NAN;
        let faces = [
            face(3.0, 3.0, 3.0, 9.0),
            face(9.0, 9.0, 3.0, 3.0),
            face(nan, 0.0, 8.0, 8.0),
            face(0.0, 0.0, f32::INFINITY, 8.0),
        ];
        for recipe in [
            MatchingRecipe::default(),
            MatchingRecipe::Thresholds { negative: 0.4, positive: 0.5, force_best: true },
        ] {
            let m = match_anchors(&tiles(), &faces, &recipe);
            assert!(m.label.iter().all(|l| *l == BACKGROUND), "{recipe:?} {:?}", m.label);
        }
        assert_eq!(match_anchors(&AnchorGrid::new(), &faces, &MatchingRecipe::default()).label.len(), 0);
    }
}
