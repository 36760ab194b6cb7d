//! Annotated pictures: readers for the usual formats, and their common clean-up.
//!
//! A reader lists pictures and boxes as the files have them; [`Dataset::load`] then finds each
//! picture, reads its size from its header, and skips what cannot be learnt from, counting it in
//! [`Warnings`]. A file that does not follow its format is an error, not a warning.

mod list;
mod picture;
mod voc;
mod warnings;
mod wider;
mod yolo;

#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::detect::BBox;
use crate::{Error, Result};

pub use picture::{find_picture, Picture};
pub use warnings::{WarningKind, Warnings};

/// One annotated face.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Annotated {
    /// Box in pixels of the upright picture (or of the crop), continuous corners.
    pub bbox: BBox,
    /// Neither a face to find nor background: annotated as invalid (WIDER FACE) or difficult (VOC),
    /// or made too small or too incomplete by augmentation.
    pub ignore: bool,
}

/// One picture and its faces.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// The file.
    pub path: PathBuf,
    /// What the annotation calls it, for messages.
    pub name: String,
    /// Faces, all inside the picture and of positive size; may be empty.
    pub faces: Vec<Annotated>,
}

/// Where samples come from. Relative paths start at the folder of the recipe.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Source {
    /// WIDER FACE: `wider_face_train_bbx_gt.txt` (also `.gz`) or `wider_face_train.mat`.
    Wider {
        /// The annotation file.
        list: PathBuf,
        /// Folder of the event folders. Pictures are found whatever their extension.
        images: PathBuf,
    },
    /// Text, a face a line: `path x y w h` in pixels; `path` alone is a picture without faces.
    List {
        /// The text file (also `.gz`).
        list: PathBuf,
        /// Folder that the paths start at; the list's own folder where absent.
        #[serde(default)]
        images: Option<PathBuf>,
    },
    /// YOLO: below `labels` one `.txt` a picture, with `class cx cy w h` a line, in shares of the
    /// picture's size. A picture without a label file has no faces.
    Yolo {
        /// Folder of pictures, searched with its subfolders.
        images: PathBuf,
        /// Folder of label files, with the same subfolders.
        labels: PathBuf,
        /// Classes that are faces; all where absent.
        #[serde(default)]
        classes: Option<Vec<u32>>,
    },
    /// PASCAL VOC: one `.xml` a picture; `difficult` objects are ignored.
    Voc {
        /// Folder of XML files.
        annotations: PathBuf,
        /// Folder of pictures.
        images: PathBuf,
        /// Object names that are faces; all where absent.
        #[serde(default)]
        classes: Option<Vec<String>>,
    },
}

/// A picture as an annotation lists it, before anyone looked at the file.
struct Listed {
    path: PathBuf,
    name: String,
    faces: Vec<Annotated>,
    /// Boxes are in shares of the picture's width and height.
    normalised: bool,
}

/// The pictures to train on, in the order of their sources.
#[derive(Clone, Debug, Default)]
pub struct Dataset {
    /// Pictures that exist and have a readable header.
    pub samples: Vec<Sample>,
    /// What was skipped. Clones share the counts; the loader adds to them.
    pub warnings: Warnings,
}

impl Dataset {
    /// Reads all sources, relative paths taken from `base`. Fails where a source's files cannot be
    /// read or parsed, or where no picture or no face is left.
    pub fn load(sources: &[Source], base: &Path) -> Result<Self> {
        let mut dataset = Self::default();
        let mut first = None;
        for source in sources {
            for listed in source.list(base, &dataset.warnings)? {
                first.get_or_insert_with(|| listed.path.clone());
                dataset.samples.extend(check(listed, &dataset.warnings)?);
            }
        }
        if dataset.samples.is_empty() {
            return Err(Error::InvalidData(format!(
                "no pictures to train on in {} source(s); check the paths{}. {}",
                sources.len(),
                first.map_or_else(String::new, |p| format!(
                    " (the first picture is looked for at {})",
                    p.display()
                )),
                dataset.warnings
            )));
        }
        if dataset.faces() == 0 {
            return Err(Error::InvalidData(format!(
                "no faces to learn in {} pictures: are labels where the recipe says, and of the classes it says? {}",
                dataset.samples.len(),
                dataset.warnings
            )));
        }
        Ok(dataset)
    }

    /// Number of faces to learn, the ignored ones left out.
    pub fn faces(&self) -> usize {
        self.samples.iter().flat_map(|s| &s.faces).filter(|f| !f.ignore).count()
    }
}

impl Source {
    fn list(&self, base: &Path, warnings: &Warnings) -> Result<Vec<Listed>> {
        match self {
            Source::Wider { list, images } => wider::read(&base.join(list), &base.join(images)),
            Source::List { list, images } => {
                let list = base.join(list);
                let images = match images {
                    Some(folder) => base.join(folder),
                    None => list.parent().unwrap_or(Path::new("")).to_path_buf(),
                };
                list::read(&list, &images)
            }
            Source::Yolo { images, labels, classes } => {
                yolo::read(&base.join(images), &base.join(labels), classes.as_deref(), warnings)
            }
            Source::Voc { annotations, images, classes } => {
                voc::read(&base.join(annotations), &base.join(images), classes.as_deref())
            }
        }
    }
}

/// The sample of a listed picture, or a warning: its file exists, its boxes are clipped to it, and
/// those without size or wholly outside are gone.
fn check(listed: Listed, warnings: &Warnings) -> Result<Option<Sample>> {
    let Listed { path, name, faces, normalised } = listed;
    let Some(path) = crate::picture::find(&path) else {
        warnings.add(WarningKind::MissingPicture, &name);
        return Ok(None);
    };
    let (width, height) = match crate::picture::upright_size(&path) {
        Ok(size) => size,
        // Another time it may be read: a training on what is left would be another one.
        Err(error @ Error::Io { .. }) => return Err(error),
        Err(_) => {
            warnings.add(WarningKind::UndecodablePicture, &name);
            return Ok(None);
        }
    };
    let (w, h) = (width as f32, height as f32);
    let mut kept = Vec::with_capacity(faces.len());
    for mut face in faces {
        let b = &mut face.bbox;
        if normalised {
            *b = BBox::new(b.x1 * w, b.y1 * h, b.x2 * w, b.y2 * h);
        }
        // Written so that NaN fails too.
        if !(b.width() > 0.0 && b.height() > 0.0) {
            warnings.add(WarningKind::EmptyBox, &name);
            continue;
        }
        *b = BBox::new(b.x1.max(0.0), b.y1.max(0.0), b.x2.min(w), b.y2.min(h));
        if !(b.width() > 0.0 && b.height() > 0.0) {
            warnings.add(WarningKind::OutsideBox, &name);
            continue;
        }
        kept.push(face);
    }
    Ok(Some(Sample { path, name, faces: kept }))
}

/// Files below `folder` whose extension `wanted` takes, sorted by path, so that the order does not
/// depend on the file system.
fn files_below(folder: &Path, wanted: &dyn Fn(&str) -> bool) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).map_err(|e| Error::io(&folder, e))? {
            let path = entry.map_err(|e| Error::io(&folder, e))?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().and_then(|e| e.to_str()).is_some_and(wanted) {
                files.push(path);
            }
        }
    }
    files.sort();
    Ok(files)
}
