//! Plain text, a face a line.

use std::collections::HashMap;
use std::path::Path;

use super::{Annotated, Listed};
use crate::detect::BBox;
use crate::eval::lines::{read_text, Lines};
use crate::Result;

/// Pictures in the order of their first line. Paths may have blanks, since the numbers are taken
/// from the line's end; a path alone may not end in a blank and a number.
pub(super) fn read(list: &Path, images: &Path) -> Result<Vec<Listed>> {
    let text = read_text(list)?;
    let mut lines = Lines::new(list, &text);
    let mut listed: Vec<Listed> = Vec::new();
    let mut known: HashMap<String, usize> = HashMap::new();
    while let Some(line) = lines.next() {
        let (path, numbers) = split(line);
        let bbox = match numbers {
            "" => None,
            numbers => {
                let [x, y, w, h] = lines.fields::<4>(numbers, "x y w h, after the picture's path")?;
                Some(BBox::from_xywh(x as f32, y as f32, w as f32, h as f32))
            }
        };
        let at = *known.entry(path.into()).or_insert_with(|| {
            let name = path.to_string();
            listed.push(Listed { path: images.join(path), name, faces: Vec::new(), normalised: false });
            listed.len() - 1
        });
        listed[at].faces.extend(bbox.map(|bbox| Annotated { bbox, ignore: false }));
    }
    Ok(listed)
}

/// Path and the numbers behind it, at most four.
fn split(line: &str) -> (&str, &str) {
    let mut path = line;
    for _ in 0..4 {
        match path.rsplit_once(char::is_whitespace) {
            Some((head, field)) if field.parse::<f64>().is_ok() => path = head.trim_end(),
            _ => break,
        }
    }
    (path, line[path.len()..].trim())
}
