//! PASCAL VOC folders.

use std::path::Path;

use roxmltree::{Document, Node};

use super::{files_below, Annotated, Listed};
use crate::detect::BBox;
use crate::eval::lines::read_text;
use crate::{Error, Result};

/// Corners are pixels counted from 1, the last one included (VOC development kit, section
/// "Annotation"); so a box from pixel 1 to pixel 10 becomes 0 to 10.
pub(super) fn read(annotations: &Path, images: &Path, classes: Option<&[String]>) -> Result<Vec<Listed>> {
    let mut listed = Vec::new();
    for file in files_below(annotations, &|e| e.eq_ignore_ascii_case("xml"))? {
        let text = read_text(&file)?;
        let one = parse(&text, &file, images, classes)
            .map_err(|what| Error::InvalidData(format!("{}: {what}", file.display())))?;
        listed.push(one);
    }
    Ok(listed)
}

fn parse(
    text: &str,
    file: &Path,
    images: &Path,
    classes: Option<&[String]>,
) -> std::result::Result<Listed, String> {
    let document = Document::parse(text).map_err(|e| e.to_string())?;
    let root = document.root_element();
    if !root.has_tag_name("annotation") {
        return Err(format!("the root is <{}>, expected <annotation>", root.tag_name().name()));
    }
    let name = match child(root, "filename").and_then(|n| n.text()) {
        Some(name) if !name.trim().is_empty() => name.trim().to_string(),
        // Some tools leave it out; the XML is then named as its picture.
        _ => file.file_stem().unwrap_or_default().to_string_lossy().into_owned() + ".jpg",
    };
    let mut faces = Vec::new();
    for object in root.children().filter(|n| n.has_tag_name("object")) {
        let label = child(object, "name").and_then(|n| n.text()).unwrap_or("").trim();
        if classes.is_some_and(|wanted| !wanted.iter().any(|c| c == label)) {
            continue;
        }
        let bounds = child(object, "bndbox").ok_or("an <object> has no <bndbox>")?;
        let number = |tag: &str| -> std::result::Result<f32, String> {
            let text = child(bounds, tag).and_then(|n| n.text()).unwrap_or("").trim();
            match text.parse::<f32>() {
                Ok(value) if value.is_finite() => Ok(value),
                _ => Err(format!("<{tag}> of a <bndbox> is {text:?}, expected a number")),
            }
        };
        let bbox = BBox::new(number("xmin")? - 1.0, number("ymin")? - 1.0, number("xmax")?, number("ymax")?);
        let ignore = child(object, "difficult").and_then(|n| n.text()).is_some_and(|t| t.trim() == "1");
        faces.push(Annotated { bbox, ignore });
    }
    Ok(Listed { path: images.join(&name), name, faces, normalised: false })
}

fn child<'a, 'i>(node: Node<'a, 'i>, tag: &str) -> Option<Node<'a, 'i>> {
    node.children().find(|n| n.has_tag_name(tag))
}
