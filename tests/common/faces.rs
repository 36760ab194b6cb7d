//! Drawn pictures with faces that a detector can learn in seconds.

use farface::graph::init::Rng;
use image::{Rgb, RgbImage};
use std::fmt::Write;
use std::path::Path;

/// Writes `images/0--Drawn/*.png`, `count` textured pictures of `side` x `side` pixels with one to three faces of a sixth
/// to a third of the side, and `faces.txt`, their list in WIDER FACE's format, into `dir`.
pub fn draw(dir: &Path, count: usize, side: u32, seed: u64) {
    let folder = dir.join("images/0--Drawn");
    std::fs::create_dir_all(&folder).unwrap();
    let mut rng = Rng::new(seed);
    let mut list = String::new();
    for i in 0..count {
        let mut picture = ground(side, &mut rng);
        let mut boxes: Vec<[u32; 4]> = Vec::new();
        let wanted = 1 + rng.below(3);
        for _ in 0..30 {
            let w = rng.range(side as f32 / 6.0, side as f32 / 3.0) as u32;
            let h = w * 5 / 4;
            let place = |extent: u32, rng: &mut Rng| 1 + rng.below((side - extent - 2) as usize) as u32;
            let (x, y) = (place(w, &mut rng), place(h, &mut rng));
            let apart = |b: &[u32; 4]| x + w < b[0] || b[0] + b[2] < x || y + h < b[1] || b[1] + b[3] < y;
            if boxes.len() < wanted && boxes.iter().all(apart) {
                face(&mut picture, [x, y, w, h], &mut rng);
                boxes.push([x, y, w, h]);
            }
        }
        picture.save(folder.join(format!("{i:02}.png"))).unwrap();
        writeln!(list, "0--Drawn/{i:02}.png\n{}", boxes.len()).unwrap();
        for [x, y, w, h] in boxes {
            writeln!(list, "{x} {y} {w} {h} 0 0 0 0 0 0").unwrap();
        }
    }
    std::fs::write(dir.join("faces.txt"), list).unwrap();
}

/// Waves and grain, dark to medium.
fn ground(side: u32, rng: &mut Rng) -> RgbImage {
    let [fx, fy, phase] = [rng.range(0.05, 0.4), rng.range(0.05, 0.4), rng.range(0.0, 6.0)];
    let tint = [0; 3].map(|_| rng.range(0.6, 1.0));
    RgbImage::from_fn(side, side, |x, y| {
        let wave = (x as f32 * fx + phase).sin() * (y as f32 * fy).cos();
        let grey = 80.0 + 45.0 * wave + rng.range(-18.0, 18.0);
        Rgb(tint.map(|t| (grey * t) as u8))
    })
}

/// A bright ellipse with two dark eyes and a mouth, from `x, y` of `w` x `h` pixels.
fn face(picture: &mut RgbImage, [x, y, w, h]: [u32; 4], rng: &mut Rng) {
    let skin = [rng.range(200.0, 240.0), rng.range(150.0, 190.0), rng.range(120.0, 160.0)];
    for py in y..y + h {
        for px in x..x + w {
            // From -1 to 1 over the box.
            let u = (px as f32 + 0.5 - x as f32) / w as f32 * 2.0 - 1.0;
            let v = (py as f32 + 0.5 - y as f32) / h as f32 * 2.0 - 1.0;
            let eye = (u.abs() - 0.4).powi(2) + (v + 0.2).powi(2) < 0.03;
            let mouth = u.abs() < 0.4 && (v - 0.45).abs() < 0.08;
            if u * u + v * v <= 1.0 {
                let light = if eye || mouth { 0.2 } else { 1.0 - 0.15 * u };
                picture.put_pixel(px, py, Rgb(skin.map(|s| (s * light) as u8)));
            }
        }
    }
}
