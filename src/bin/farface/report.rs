//! Faces as text, CSV and JSON.

use farface::detect::Face;
use farface::pixels::Size;
use serde::Serialize;
use std::io::{Result, Write};
use std::path::Path;

/// Columns of the CSV output.
const CSV_HEADER: &str = "file,x,y,width,height,score,left_eye_x,left_eye_y,right_eye_x,right_eye_y,\
nose_x,nose_y,left_mouth_x,left_mouth_y,right_mouth_x,right_mouth_y";

/// For people: the picture, then `x y width height score` a face.
pub fn text(out: &mut dyn Write, path: &Path, size: Size, faces: &[Face]) -> Result<()> {
    let noun = if faces.len() == 1 { "face" } else { "faces" };
    writeln!(out, "{}: {}x{}, {} {noun}", path.display(), size.width, size.height, faces.len())?;
    for f in faces {
        let (b, w, h) = (f.bbox, f.bbox.width(), f.bbox.height());
        writeln!(out, "  {:8.1} {:8.1} {w:8.1} {h:8.1}  {:.3}", b.x1, b.y1, f.score)?;
    }
    Ok(())
}

/// First line of the CSV output.
pub fn csv_header(out: &mut dyn Write) -> Result<()> {
    writeln!(out, "{CSV_HEADER}")
}

/// A line a face; landmarks are empty where the model has none.
pub fn csv(out: &mut dyn Write, path: &Path, faces: &[Face]) -> Result<()> {
    let name = path.display().to_string();
    let name = if name.contains(['"', ',', '\n', '\r']) {
        format!("\"{}\"", name.replace('"', "\"\""))
    } else {
        name
    };
    for f in faces {
        let (b, w, h) = (f.bbox, f.bbox.width(), f.bbox.height());
        write!(out, "{name},{},{},{w},{h},{}", b.x1, b.y1, f.score)?;
        match f.landmarks {
            Some(points) => points.iter().try_for_each(|[x, y]| write!(out, ",{x},{y}"))?,
            None => write!(out, "{}", ",".repeat(10))?,
        }
        writeln!(out)?;
    }
    Ok(())
}

/// One JSON object on one line.
pub fn json_line(out: &mut dyn Write, path: &Path, size: Size, faces: &[Face]) -> Result<()> {
    let faces = faces.iter().map(JsonFace::of).collect();
    let file = path.display().to_string();
    let picture = JsonPicture { file, width: size.width, height: size.height, faces };
    serde_json::to_writer(&mut *out, &picture)?;
    writeln!(out)
}

#[derive(Serialize)]
struct JsonPicture {
    file: String,
    width: usize,
    height: usize,
    faces: Vec<JsonFace>,
}

#[derive(Serialize)]
struct JsonFace {
    x: f32,
    y: f32,
    width: f32,
    height: f32,
    score: f32,
    #[serde(skip_serializing_if = "Option::is_none")]
    landmarks: Option<[[f32; 2]; 5]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ellipse: Option<JsonEllipse>,
}

#[derive(Serialize)]
struct JsonEllipse {
    center: [f32; 2],
    half_axes: [f32; 2],
    angle: f32,
}

impl JsonFace {
    fn of(f: &Face) -> Self {
        let b = f.bbox;
        Self {
            x: b.x1,
            y: b.y1,
            width: b.width(),
            height: b.height(),
            score: f.score,
            landmarks: f.landmarks,
            ellipse: f.ellipse.map(|e| JsonEllipse {
                center: e.center,
                half_axes: e.half_axes,
                angle: e.angle,
            }),
        }
    }
}
