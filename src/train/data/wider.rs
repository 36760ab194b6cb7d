//! WIDER FACE, text or `.mat`.

use std::path::Path;

use super::{Annotated, Listed};
use crate::eval::wider::GroundTruth;
use crate::Result;

/// Faces labelled invalid are ignored.
pub(super) fn read(list: &Path, images: &Path) -> Result<Vec<Listed>> {
    let mat = list.extension().is_some_and(|e| e.eq_ignore_ascii_case("mat"));
    let truth = if mat { GroundTruth::from_mat_boxes(list)? } else { GroundTruth::from_text(list)? };
    let listed = truth.images.into_iter().map(|image| Listed {
        path: images.join(&image.path),
        faces: image.faces.iter().map(|f| Annotated { bbox: f.bbox, ignore: f.attributes.invalid }).collect(),
        name: image.path,
        normalised: false,
    });
    Ok(listed.collect())
}
