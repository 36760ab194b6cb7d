//! Evaluation on pictures held back, by the protocol that the finished model is judged by.

use super::data::{find_picture, Picture};
use super::recipe::DevRecipe;
use crate::detect::{Detection, Model, Options, Session};
use crate::error::{Error, Result};
use crate::eval::wider::{Evaluator, GroundTruth, Predictions};
use crate::pixels::{ImageView, PixelFormat};
use std::path::Path;

/// The dev pictures, decoded once.
pub struct Dev {
    truth: GroundTruth,
    pictures: Vec<Picture>,
}

/// Average precision on the dev pictures; those of the subsets where their ground truth is at hand.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct DevScore {
    /// Easy.
    pub easy: Option<f64>,
    /// Medium.
    pub medium: Option<f64>,
    /// Hard.
    pub hard: Option<f64>,
    /// Every face.
    pub all: f64,
}

impl DevScore {
    /// What the best weights are chosen by: the mean of what there is.
    pub fn mean(&self) -> f64 {
        let parts: Vec<f64> =
            [self.easy, self.medium, self.hard, Some(self.all)].into_iter().flatten().collect();
        parts.iter().sum::<f64>() / parts.len() as f64
    }
}

impl Dev {
    /// Reads ground truth and pictures; relative paths start at `base`.
    pub fn load(recipe: &DevRecipe, base: &Path) -> Result<Self> {
        let listed = GroundTruth::from_text(&base.join(&recipe.list))?;
        let truth = match &recipe.ground_truth {
            Some(folder) => GroundTruth::from_mat(&base.join(folder))?.restricted_to(&listed)?,
            None => listed,
        };
        if !truth.images.iter().any(|image| !image.faces.is_empty()) {
            return Err(Error::InvalidData(format!("{}: no faces to find", recipe.list.display())));
        }
        let folder = base.join(&recipe.images);
        let pictures = truth
            .images
            .iter()
            .map(|image| Picture::open(&find_picture(&folder.join(&image.path))?))
            .collect::<Result<_>>()?;
        Ok(Self { truth, pictures })
    }

    /// Pictures.
    pub fn len(&self) -> usize {
        self.pictures.len()
    }

    /// True without pictures.
    pub fn is_empty(&self) -> bool {
        self.pictures.is_empty()
    }

    /// Scores `model` on the scales that it is evaluated on, the pictures' own where it names none, on `threads` threads. `progress(done, total)`.
    pub fn score(
        &self,
        model: &Model,
        threads: usize,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<DevScore> {
        let options = Options { threads, ..Options::for_evaluation(model.config()) };
        let mut session = Session::with_options(model, options)?;
        let mut predictions = Predictions::new();
        for (i, (image, picture)) in self.truth.images.iter().zip(&self.pictures).enumerate() {
            progress(i, self.pictures.len());
            let view = ImageView::packed(picture.width, picture.height, PixelFormat::Rgb8, &picture.pixels)?;
            let faces = session.detect(&view)?;
            let found = faces.iter().map(|f| Detection { bbox: f.bbox, score: f.score }).collect();
            predictions.insert(&image.event, &image.stem, found);
        }
        let report = Evaluator::new(&self.truth, &predictions, &mut |_, _| {}).report()?;
        let ap = |curve: &Option<crate::eval::PrCurve>| curve.as_ref().map(|c| c.ap);
        let score = DevScore {
            easy: ap(&report.easy),
            medium: ap(&report.medium),
            hard: ap(&report.hard),
            all: report.all.ap,
        };
        if score.mean().is_finite() {
            Ok(score)
        } else {
            Err(Error::InvalidData("the dev list has no faces to find".into()))
        }
    }
}
