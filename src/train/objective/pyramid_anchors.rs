//! What is around the faces, looked for while training only.

use super::{Losses, Objective, Whole};
use crate::detect::BBox;
use crate::error::Result;
use crate::graph::init::Rng;
use crate::shape::Tensor;
use crate::train::data::Annotated;

/// A pyramid anchor (PyramidBox, Tang et al. 2018; HAMBox's table 4, "PA"): outputs that find, where an anchor
/// has the size for it, what surrounds a face and is larger, its head or body. They teach the features what faces come with;
/// inference has no use for them.
#[derive(Clone, Debug)]
pub struct PyramidAnchors {
    /// Of its outputs.
    pub objective: Objective,
    /// Sides of what is looked for over those of its face, about the same centre.
    pub enlargement: f32,
    /// Of its losses among the others.
    pub weight: f32,
}

impl PyramidAnchors {
    /// The `k`-th, for what is 2^k times as large as a face, with `weight`^k; `objective` as the detector's own with the
    /// levels that it stands on.
    pub fn new(objective: Objective, k: u32, weight: f32) -> Self {
        Self { objective, enlargement: 2f32.powi(k as i32), weight: weight.powi(k as i32) }
    }

    /// As [`Objective::judge`], weighted; the counts are those of its own anchors.
    pub fn judge(
        &self,
        outputs: &[Tensor],
        faces: &[Vec<Annotated>],
        rng: impl Fn(usize) -> Rng + Sync,
        threads: usize,
    ) -> Result<(Losses, Vec<Tensor>)> {
        self.judge_part(outputs, faces, rng, threads, Whole::at_hand(faces.len()))
    }

    /// As [`Objective::judge_part`], weighted.
    pub fn judge_part(
        &self,
        outputs: &[Tensor],
        faces: &[Vec<Annotated>],
        rng: impl Fn(usize) -> Rng + Sync,
        threads: usize,
        whole: Whole<'_>,
    ) -> Result<(Losses, Vec<Tensor>)> {
        let around = self.all_around(faces);
        let (mut losses, mut gradients) =
            self.objective.judge_part(outputs, &around, &[], rng, threads, whole)?;
        losses.class *= f64::from(self.weight);
        losses.boxes *= f64::from(self.weight);
        gradients.iter_mut().flat_map(|g| &mut g.data).for_each(|v| *v *= self.weight);
        Ok((losses, gradients))
    }

    /// What is looked for of a batch's faces.
    pub fn all_around(&self, faces: &[Vec<Annotated>]) -> Vec<Vec<Annotated>> {
        faces.iter().map(|faces| faces.iter().map(|f| self.around(f)).collect()).collect()
    }

    fn around(&self, face: &Annotated) -> Annotated {
        let b = &face.bbox;
        let center = [(b.x1 + b.x2) / 2.0, (b.y1 + b.y2) / 2.0];
        let [w, h] = [b.width(), b.height()].map(|side| side * self.enlargement / 2.0);
        Annotated { bbox: BBox::new(center[0] - w, center[1] - h, center[0] + w, center[1] + h), ..*face }
    }
}
