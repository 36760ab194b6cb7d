//! Finds faces in a binary PPM picture (P6) and prints a line for each: x y width height score.
//!
//!     cargo run --release --example detect -- model.safetensors picture.ppm

use farface::detect::{Model, Session};
use farface::pixels::{ImageView, PixelFormat};
use std::error::Error;

/// Width, height and RGB pixels of a P6 file with 8 bits a channel.
fn read_ppm(path: &str) -> Result<(usize, usize, Vec<u8>), Box<dyn Error>> {
    let mut bytes = std::fs::read(path).map_err(|e| format!("{path}: {e}"))?;
    let bad = || format!("{path}: not a complete P6 picture with 8 bits a channel");
    let (mut fields, mut at) = (Vec::new(), 0);
    while fields.len() < 4 {
        let rest = bytes.get(at..).filter(|r| !r.is_empty()).ok_or_else(bad)?;
        let ends = |b: &u8| b.is_ascii_whitespace();
        match rest[0] {
            b'#' => at += rest.iter().position(|&b| b == b'\n').ok_or_else(bad)?,
            b if b.is_ascii_whitespace() => at += 1,
            _ => {
                let length = rest.iter().position(ends).ok_or_else(bad)?;
                fields.push(std::str::from_utf8(&rest[..length])?.to_string());
                at += length;
            }
        }
    }
    if fields[0] != "P6" || fields[3] != "255" {
        return Err(bad().into());
    }
    let (width, height): (usize, usize) = (fields[1].parse()?, fields[2].parse()?);
    bytes.drain(..at + 1); // one space stands before the pixels
    Ok((width, height, bytes))
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, model, picture] = &arguments[..] else {
        return Err("usage: detect model.safetensors picture.ppm".into());
    };
    let (width, height, rgb) = read_ppm(picture)?;
    let view = ImageView::packed(width, height, PixelFormat::Rgb8, &rgb)?;
    let mut session = Session::new(&Model::load(model)?)?;
    for face in session.detect(&view)? {
        let b = face.bbox;
        println!("{:.2} {:.2} {:.2} {:.2} {:.4}", b.x1, b.y1, b.width(), b.height(), face.score);
    }
    Ok(())
}
