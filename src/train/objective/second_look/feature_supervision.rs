//! RefineFace's feature supervision module (Zhang et al. 2019, section 3.4): whether a box holds a face is asked again of the
//! features that lie in it, so that the backbone learns to tell.

use super::{suppressed, Look, Looks, Proposal};
use crate::detect::BBox;
use crate::error::{Error, Result};
use crate::shape::Tensor;
use crate::train::data::Annotated;
use crate::train::losses::{ClassLoss, Focal, LossRecipe};
use crate::train::matching::{match_boxes, reference_scale, FaceBox, MatchingRecipe, IGNORED};
use crate::train::objective::pictures::{face_boxes, parallel, Whole};
use crate::train::objective::TwoStep;
use serde::{Deserialize, Serialize};

/// Settings of the module.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct FeatureSupervisionRecipe {
    /// Overlap of two detections above which the weaker is not looked at; default 0.7.
    pub nms: f32,
    /// Boxes of a picture that are looked at, its faces among them; default 512.
    pub proposals: usize,
    /// Which of them are faces and which background; default thresholds 0.4 and 0.7.
    pub matching: MatchingRecipe,
    /// Of its loss beside those of the two steps; default 1.
    pub weight: f32,
}

impl Default for FeatureSupervisionRecipe {
    fn default() -> Self {
        let matching = MatchingRecipe::Thresholds { negative: 0.4, positive: 0.7, force_best: false };
        Self { nms: 0.7, proposals: 512, matching, weight: 1.0 }
    }
}

impl FeatureSupervisionRecipe {
    /// Errors where a setting is outside its range.
    pub fn check(&self) -> Result<()> {
        let sane = (0.0..=1.0).contains(&self.nms) && self.weight > 0.0 && self.weight.is_finite();
        if !(sane && self.proposals > 0) {
            return Err(Error::InvalidArgument(
                "feature-supervision: nms must be from 0 to 1, proposals at least 1, weight above 0".into(),
            ));
        }
        self.matching.check()
    }
}

/// The module: chooses among the second step's detections and judges by the focal loss, divided by the batch's positives. There is
/// no margin.
#[derive(Clone, Debug)]
pub struct FeatureSupervision {
    /// The detector whose detections these are. Every level has an input of boxes.
    pub detector: TwoStep,
    /// How.
    pub recipe: FeatureSupervisionRecipe,
    /// Of the loss.
    pub focal: Focal,
}

impl FeatureSupervision {
    /// Detections that enter the suppression: as many as at inference (section 3.6).
    pub(in crate::train) const BEFORE_NMS: usize = 5000;

    pub(super) fn loss(&self) -> LossRecipe {
        let Focal { alpha, gamma } = self.focal;
        LossRecipe { classification: ClassLoss::Focal { alpha, gamma }, margin: 0.0, ..self.detector.loss }
    }

    pub(super) fn choose(
        &self,
        outputs: &[Tensor],
        faces: &[Vec<Annotated>],
        threads: usize,
        whole: Whole<'_>,
    ) -> Result<Looks> {
        let chosen = parallel(faces.len(), threads, |n| {
            self.of_picture(self.detector.found(outputs, n), &face_boxes(&faces[n]))
        });
        let positives = chosen.iter().flatten().filter(|(_, face)| face.is_some()).count();
        let [positives, ..] = whole.counts([positives, 0, 0])?;
        let class_weight = self.recipe.weight / positives.max(1) as f32;
        let mut inputs = vec![Vec::new(); self.detector.levels.len()];
        for (image, chosen) in chosen.into_iter().enumerate() {
            for (Proposal { bbox, level, .. }, face) in chosen {
                inputs[level].push(Look { image, bbox, face, class_weight, box_weight: 0.0 });
            }
        }
        Ok(Looks::new(inputs))
    }

    /// Faces first, then detections as suppression leaves them: those that are matched with a face, and background. A face comes
    /// from the level of the anchor that is nearest in size.
    pub(super) fn of_picture(
        &self,
        found: Vec<Proposal>,
        faces: &[FaceBox],
    ) -> Vec<(Proposal, Option<BBox>)> {
        let FeatureSupervisionRecipe { nms, proposals, .. } = self.recipe;
        let mut chosen: Vec<Proposal> = faces.iter().filter(|f| !f.ignore).map(|f| self.face(f)).collect();
        let room = proposals.saturating_sub(chosen.len());
        chosen.extend(suppressed(found, Self::BEFORE_NMS, nms, room));
        chosen.truncate(proposals);
        let boxes: Vec<BBox> = chosen.iter().map(|p| p.bbox).collect();
        let matches = match_boxes(&boxes, faces, &self.recipe.matching);
        let learns = |(i, p): (usize, Proposal)| {
            (matches.label[i] != IGNORED).then(|| (p, matches.face(i).map(|f| faces[f].bbox)))
        };
        chosen.into_iter().enumerate().filter_map(learns).collect()
    }

    fn face(&self, face: &FaceBox) -> Proposal {
        Proposal { bbox: face.bbox, score: f32::INFINITY, level: self.level_of(&face.bbox) }
    }

    /// The level that a face comes from.
    pub(in crate::train) fn level_of(&self, face: &BBox) -> usize {
        let sides = |(level, sizes): (usize, &Vec<[f32; 2]>)| {
            sizes.iter().map(move |[w, h]| (level, (w * h).sqrt())).collect::<Vec<_>>()
        };
        let levels = self.detector.levels.iter().map(|(level, _)| &level.anchors).enumerate();
        let (level_of, scales): (Vec<usize>, Vec<f32>) = levels.flat_map(sides).unzip();
        level_of[reference_scale(face.width(), face.height(), &scales)]
    }
}
