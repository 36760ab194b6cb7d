//! Grouped Fast R-CNN (Group Sampling, Ming et al. 2019, section 4.2): what the first stage proposes is sampled in equal numbers
//! for each reference scale, and classified and moved again.

use super::{suppressed, Look, Looks, Proposal};
use crate::cpu::View;
use crate::detect::detector::{Detector, Map, Window};
use crate::detect::group_sampling::GroupSamplingConfig;
use crate::detect::BBox;
use crate::error::{Error, Result};
use crate::graph::init::Rng;
use crate::shape::{Shape, Tensor};
use crate::train::data::Annotated;
use crate::train::losses::LossRecipe;
use crate::train::matching::{match_boxes, reference_scale, FaceBox, MatchingRecipe, SecondPass};
use crate::train::objective::pictures::{face_boxes, parallel, picture_maps, Whole};
use crate::train::sampler::SamplerRecipe;
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// Score that a proposal must pass: any.
pub(super) const LEAST_SCORE: f32 = 0.0;

/// How the second stage is trained.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct FastRcnnRecipe {
    /// The best so many of a picture's boxes enter the suppression; default 12,000 (Faster R-CNN, Ren et al. 2015).
    pub before_nms: usize,
    /// Overlap of two boxes above which the weaker is no proposal; default 0.7.
    pub nms: f32,
    /// The best so many that are left are a picture's proposals, with its faces beside them; default 2,000.
    pub proposals: usize,
    /// Which of them are faces and which background; default the two-pass scan with 0.6 and 0.5 (section 5).
    pub matching: MatchingRecipe,
    /// Which of them count: default 128 of each reference scale at random, so that those of the four scales are Fast R-CNN's 512.
    pub sampler: SamplerRecipe,
}

impl Default for FastRcnnRecipe {
    fn default() -> Self {
        Self {
            before_nms: 12_000,
            nms: 0.7,
            proposals: 2000,
            matching: MatchingRecipe::TwoPassScan {
                lambda1: 0.6,
                lambda2: 0.5,
                second_pass: SecondPass::All,
            },
            sampler: SamplerRecipe { samples: 128, ..SamplerRecipe::default() },
        }
    }
}

impl FastRcnnRecipe {
    /// Errors where a setting is outside its range.
    pub fn check(&self) -> Result<()> {
        let bad = |what: &str| Err(Error::InvalidArgument(format!("second-stage: {what}")));
        if !((0.0..=1.0).contains(&self.nms) && self.before_nms > 0 && self.proposals > 0) {
            return bad("nms must be from 0 to 1, before-nms and proposals at least 1");
        }
        if self.sampler.needs_losses() {
            return bad("the sampler's miner must be random or all: what is not chosen has no loss");
        }
        if self.sampler.within_picture {
            return bad("the sampler's within-picture is for anchors; proposals lie in the picture");
        }
        self.matching.check()?;
        self.sampler.check()
    }
}

/// The second stage's objective: Eq. 2 over the groups of Eq. 4, a mean over the batch's pictures.
#[derive(Clone, Debug)]
pub struct GroupedFastRcnn {
    /// Whose first stage proposes. Its anchors' sides are the reference scales.
    pub detector: GroupSamplingConfig,
    /// How.
    pub recipe: FastRcnnRecipe,
    /// The first stage's losses, too.
    pub loss: LossRecipe,
}

impl GroupedFastRcnn {
    pub(super) fn choose(
        &self,
        outputs: &[Tensor],
        faces: &[Vec<Annotated>],
        rng: impl Fn(usize) -> Rng + Sync,
        threads: usize,
        whole: Whole<'_>,
    ) -> Looks {
        let images = faces.len();
        let chosen = parallel(images, threads, |n| {
            self.of_picture(self.proposed(outputs, n), &face_boxes(&faces[n]), &mut rng(n))
        });
        let share = 1.0 / whole.images() as f32;
        let look = |image: usize, look: Look| Look {
            image,
            class_weight: look.class_weight * share,
            box_weight: look.box_weight * share,
            ..look
        };
        let of_image = |(image, looks): (usize, Vec<Look>)| looks.into_iter().map(move |l| look(image, l));
        Looks::new(vec![chosen.into_iter().enumerate().flat_map(of_image).collect()])
    }

    /// The boxes of picture `n` as the detector itself proposes them.
    fn proposed(&self, outputs: &[Tensor], n: usize) -> Vec<Proposal> {
        let data = picture_maps(outputs, n).into_iter();
        let views = outputs.iter().map(|o| View::new(Shape { n: 1, ..o.shape }, 0, [0; 4]));
        let maps: Vec<Map<'_>> = data.zip(views).map(|(data, view)| Map::new(data, view)).collect();
        let mut proposals = Vec::new();
        self.detector.decode(&maps, &Window::whole(), LEAST_SCORE, &mut |face| {
            proposals.push(Proposal { bbox: face.bbox, score: face.score, level: 0 });
        });
        proposals
    }

    /// The samples of a picture, group by group, with the weights of Eq. 2.
    pub(super) fn of_picture(&self, proposed: Vec<Proposal>, faces: &[FaceBox], rng: &mut Rng) -> Vec<Look> {
        let FastRcnnRecipe { before_nms, nms, proposals, .. } = self.recipe;
        let kept = suppressed(proposed, before_nms, nms, proposals);
        let found = faces.iter().filter(|f| !f.ignore).map(|f| f.bbox);
        let boxes: Vec<BBox> = kept.into_iter().map(|p| p.bbox).chain(found).collect();
        let (boxes, groups) = self.grouped(&boxes);
        let matches = match_boxes(&boxes, faces, &self.recipe.matching);
        let samples = self.recipe.sampler.sample(&matches.label, &[], &groups, rng);
        let mut looks = Vec::new();
        for sample in &samples {
            looks.extend(sample.positives.iter().chain(&sample.negatives).map(|&i| Look {
                image: 0,
                bbox: boxes[i],
                face: matches.face(i).map(|f| faces[f].bbox),
                class_weight: sample.class_weight,
                box_weight: sample.box_weight,
            }));
        }
        looks
    }

    /// The boxes sorted by reference scale (Eq. 4), and where those of each are.
    fn grouped(&self, boxes: &[BBox]) -> (Vec<BBox>, Vec<Range<usize>>) {
        let scales = &self.detector.scales;
        let mut of_scale = vec![Vec::new(); scales.len()];
        for b in boxes {
            of_scale[reference_scale(b.width(), b.height(), scales)].push(*b);
        }
        let mut first = 0;
        let ranges = of_scale.iter().map(|boxes| {
            let range = first..first + boxes.len();
            first = range.end;
            range
        });
        let ranges = ranges.collect();
        (of_scale.concat(), ranges)
    }
}
