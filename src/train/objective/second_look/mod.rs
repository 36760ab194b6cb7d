//! A second look: boxes that the outputs propose are chosen between the network's two phases, and the features under them are
//! judged. RefineFace's feature supervision module, which training alone has, and Group Sampling's Grouped Fast R-CNN.

mod fast_rcnn;
mod feature_supervision;
#[cfg(feature = "cuda")]
mod placed;
#[cfg(test)]
mod tests;

pub use fast_rcnn::{FastRcnnRecipe, GroupedFastRcnn};
pub use feature_supervision::{FeatureSupervision, FeatureSupervisionRecipe};

use super::head::box_loss;
use super::pictures::{Losses, Proposal, Whole};
use crate::detect::anchors::Anchor;
use crate::detect::boxes::Convention;
use crate::detect::group_sampling::SECOND_STAGE_VARIANCES;
use crate::detect::nms::{Nms, Rule, Suppression};
use crate::detect::{BBox, Detection};
use crate::error::{Error, Result};
use crate::graph::init::Rng;
use crate::shape::{Shape, Tensor};
use crate::train::data::Annotated;
use crate::train::losses::{LossRecipe, ScaleAwareMargin};

/// A box that is looked at.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Look {
    /// Number of its picture in the batch.
    pub image: usize,
    /// In pixels of the network's input.
    pub bbox: BBox,
    /// The face that it is matched with; none for background.
    pub face: Option<BBox>,
    /// What its classification loss is multiplied by.
    pub class_weight: f32,
    /// What the box loss of a face is multiplied by, before eta.
    pub box_weight: f32,
}

/// The boxes of a batch for each of the network's inputs of boxes. RoIAlign takes one at least: an input without any gets
/// one that counts for nothing.
#[derive(Clone, Debug, PartialEq)]
pub struct Looks(Vec<Vec<Look>>);

impl Looks {
    fn new(mut inputs: Vec<Vec<Look>>) -> Self {
        let nothing = Look {
            image: 0,
            bbox: BBox::new(0.0, 0.0, 1.0, 1.0),
            face: None,
            class_weight: 0.0,
            box_weight: 0.0,
        };
        inputs.iter_mut().filter(|looks| looks.is_empty()).for_each(|looks| looks.push(nothing));
        Self(inputs)
    }

    /// For each input of boxes, those that are looked at.
    pub fn inputs(&self) -> &[Vec<Look>] {
        &self.0
    }

    /// As the network's second phase takes them: R x 5 x 1 x 1 each, image and corners.
    pub fn boxes(&self) -> Vec<Tensor> {
        let row = |l: &Look| [l.image as f32, l.bbox.x1, l.bbox.y1, l.bbox.x2, l.bbox.y2];
        let input = |looks: &Vec<Look>| Tensor {
            shape: Shape::new(looks.len(), 5, 1, 1),
            data: looks.iter().flat_map(row).collect(),
        };
        self.0.iter().map(input).collect()
    }
}

/// Who chooses the boxes.
#[derive(Clone, Debug)]
pub enum SecondLook {
    /// RefineFace's; an output an input: one logit a box.
    FeatureSupervision(FeatureSupervision),
    /// Group Sampling's; one input, two outputs: logits and offsets of a box.
    FastRcnn(GroupedFastRcnn),
}

impl SecondLook {
    /// The boxes of a batch, or of a part of the batch `whole`, whose network puts out `outputs` (those of the detector, N x H x W x C); `rng` gives a
    /// generator for each picture. The result does not depend on the number of threads.
    pub fn choose(
        &self,
        outputs: &[Tensor],
        faces: &[Vec<Annotated>],
        rng: impl Fn(usize) -> Rng + Sync,
        threads: usize,
        whole: Whole<'_>,
    ) -> Result<Looks> {
        match self {
            SecondLook::FeatureSupervision(s) => s.choose(outputs, faces, threads, whole),
            SecondLook::FastRcnn(s) => Ok(s.choose(outputs, faces, rng, threads, whole)),
        }
    }

    /// By what it judges, and whether boxes are moved, too.
    pub(in crate::train) fn loss(&self) -> (LossRecipe, bool) {
        match self {
            SecondLook::FeatureSupervision(s) => (s.loss(), false),
            SecondLook::FastRcnn(s) => (s.loss, true),
        }
    }

    /// How many of the first phase's outputs it looks at: the detector's, which come first.
    #[cfg(feature = "cuda")]
    pub(in crate::train) fn first_outputs(&self) -> usize {
        match self {
            SecondLook::FeatureSupervision(s) => s.detector.outputs(),
            SecondLook::FastRcnn(s) => 2 * s.detector.levels().count(),
        }
    }

    /// Losses of what the second phase puts out of `looks`, and their gradients; nothing is counted.
    pub fn judge(&self, looks: &Looks, outputs: &[Tensor]) -> Result<(Losses, Vec<Tensor>)> {
        let (loss, refines) = self.loss();
        judge(&loss, refines, looks, outputs)
    }
}

/// Sum of the boxes' losses; with offsets where it `refines`, each output of logits is followed by one of offsets.
fn judge(
    loss: &LossRecipe,
    refines: bool,
    looks: &Looks,
    outputs: &[Tensor],
) -> Result<(Losses, Vec<Tensor>)> {
    let (logits, margin) = (loss.classification.logits(), ScaleAwareMargin { alpha: loss.margin });
    let each = 1 + usize::from(refines);
    let fits = |i: usize, o: &Tensor| {
        let channels = if i.is_multiple_of(each) { logits } else { 4 };
        looks.0.get(i / each).is_some_and(|l| o.shape == Shape::new(l.len(), channels, 1, 1))
    };
    if outputs.len() != each * looks.0.len() || !outputs.iter().enumerate().all(|(i, o)| fits(i, o)) {
        return Err(Error::Internal("outputs are not those of the boxes".into()));
    }
    let maps: Vec<&[f32]> = outputs.iter().map(|o| &o.data[..]).collect();
    let mut gradient: Vec<Vec<f32>> = maps.iter().map(|m| vec![0.0; m.len()]).collect();
    let mut losses = Losses::default();
    for (input, looks) in looks.0.iter().enumerate() {
        let output = each * input;
        for (i, look) in looks.iter().enumerate().filter(|(_, l)| l.class_weight != 0.0) {
            let at = logits * i..logits * (i + 1);
            let mut slopes = [0.0; 2];
            let size = look.face.map(|b| [b.width(), b.height()]);
            let value =
                loss.classification.value(&maps[output][at.clone()], size, margin, &mut slopes[..logits]);
            losses.class += f64::from(value * look.class_weight);
            let to = gradient[output][at].iter_mut();
            to.zip(slopes).for_each(|(to, slope)| *to = slope * look.class_weight);
            let Some(face) = look.face.filter(|_| refines) else { continue };
            box_loss(
                loss,
                Anchor::of(&look.bbox),
                (output + 1, 4 * i).into(),
                SECOND_STAGE_VARIANCES,
                &maps,
                &face,
                look.box_weight,
                &mut gradient,
                &mut losses,
            );
        }
    }
    // Of the boxes' quality that of the first look is told.
    losses.iou = 0.0;
    let gradients = outputs.iter().zip(gradient).map(|(o, data)| Tensor { shape: o.shape, data }).collect();
    Ok((losses, gradients))
}

/// Of the `before` best proposals at most `limit` that overlap no better one by more than `overlap`, best first; of equal ones
/// the first. Boxes that are empty or not finite and scores that are no numbers are left out.
fn suppressed(mut proposals: Vec<Proposal>, before: usize, overlap: f32, limit: usize) -> Vec<Proposal> {
    proposals.retain(|Proposal { bbox: b, score, .. }| {
        let finite = [b.x1, b.y1, b.x2, b.y2].iter().all(|v| v.is_finite());
        finite && b.width() > 0.0 && b.height() > 0.0 && !score.is_nan()
    });
    proposals.sort_by(|a, b| b.score.total_cmp(&a.score));
    proposals.truncate(before);
    let rule = Rule {
        suppression: Suppression::Greedy,
        iou: overlap,
        convention: Convention::Continuous,
        // Nothing decays.
        floor: f32::NEG_INFINITY,
        limit,
    };
    let candidate = |i: usize| Detection { bbox: proposals[i].bbox, score: proposals[i].score };
    let mut kept = Vec::new();
    Nms::default().run(proposals.len(), candidate, &rule, |i, _| kept.push(proposals[i]));
    kept
}
