//! YOLO folders.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::{files_below, Annotated, Listed, WarningKind, Warnings};
use crate::detect::BBox;
use crate::eval::lines::{read_text, Lines};
use crate::picture::EXTENSIONS;
use crate::Result;

/// Boxes stay in shares of the picture's size, which is not known yet. Label files without a
/// picture are warned of.
pub(super) fn read(
    images: &Path,
    labels: &Path,
    classes: Option<&[u32]>,
    warnings: &Warnings,
) -> Result<Vec<Listed>> {
    let pictures = files_below(images, &|e| EXTENSIONS.iter().any(|known| e.eq_ignore_ascii_case(known)))?;
    let mut unused: BTreeSet<PathBuf> =
        files_below(labels, &|e| e.eq_ignore_ascii_case("txt"))?.into_iter().collect();
    let mut listed = Vec::new();
    for path in pictures {
        // files_below() gives paths below its folder.
        let name = path.strip_prefix(images).unwrap_or(&path).to_path_buf();
        let label = labels.join(&name).with_extension("txt");
        let faces = if unused.remove(&label) { read_labels(&label, classes)? } else { Vec::new() };
        listed.push(Listed { path, name: name.display().to_string(), faces, normalised: true });
    }
    for label in unused.iter().filter(|l| l.file_name().is_some_and(|n| n != "classes.txt")) {
        warnings.add(WarningKind::UnusedLabels, &label.display().to_string());
    }
    Ok(listed)
}

fn read_labels(path: &Path, classes: Option<&[u32]>) -> Result<Vec<Annotated>> {
    let text = read_text(path)?;
    let mut lines = Lines::new(path, &text);
    let mut faces = Vec::new();
    while let Some(line) = lines.next() {
        let [class, cx, cy, w, h] = lines.fields::<5>(line, "class cx cy w h")?;
        if class < 0.0 || class.fract() != 0.0 {
            return Err(lines.error(format_args!("class {class} is not a whole number from 0")));
        }
        if classes.is_none_or(|wanted| wanted.iter().any(|&c| f64::from(c) == class)) {
            let bbox = BBox::new(
                (cx - w / 2.0) as f32,
                (cy - h / 2.0) as f32,
                (cx + w / 2.0) as f32,
                (cy + h / 2.0) as f32,
            );
            faces.push(Annotated { bbox, ignore: false });
        }
    }
    Ok(faces)
}
