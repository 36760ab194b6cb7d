//! From a picture and its faces to a square training example.
//!
//! One square window of the picture is chosen (`crop`), drawn once straight from the source with
//! flip and colour in the same pass (`resample`, `photometric`), now and then turned (`turn`) and
//! degraded (`noise`), and some of its faces are partly covered (`cover`).

mod cover;
mod crop;
mod noise;
mod photometric;
mod recipe;
mod resample;
mod turn;

#[cfg(test)]
mod tests;

use crate::detect::BBox;
use crate::graph::init::Rng;
use crate::train::data::{Annotated, Picture};
use crate::Result;

pub use crop::Window;
pub use recipe::{
    Augment, Blur, Cover, DataAnchorSampling, Expand, Jpeg, LowResolution, Photometric, RandomSquare,
    ScaleJitter, Turn,
};

use photometric::Colour;
use resample::{Drawing, Resampler};
use turn::Rotation;

/// A training example.
#[derive(Clone, Debug, PartialEq)]
pub struct Example {
    /// Pixels a row, and rows.
    pub side: usize,
    /// side x side x 3, RGB.
    pub pixels: Vec<u8>,
    /// Faces in pixels of the crop.
    pub faces: Vec<Annotated>,
    /// What the picture fills of the crop.
    pub inside: BBox,
}

/// What a drawn example shows.
#[derive(Clone, Debug, PartialEq)]
pub struct Shown {
    /// Faces in pixels of the crop.
    pub faces: Vec<Annotated>,
    /// What the picture fills of the crop; of a turned picture the upright box around it.
    pub inside: BBox,
}

/// Memory that augmentation uses again and again; one a thread.
#[derive(Debug, Default)]
pub struct Scratch {
    resampler: Resampler,
    small: Vec<u8>,
    straight: Vec<u8>,
    blur: noise::BlurScratch,
}

impl Augment {
    /// One random example with sides of `side` pixels. The recipe must be [valid](Augment::check).
    /// Fails only where JPEG coding does.
    pub fn example(
        &self,
        picture: &Picture,
        faces: &[Annotated],
        side: usize,
        rng: &mut Rng,
        scratch: &mut Scratch,
    ) -> Result<Example> {
        let mut pixels = vec![0; side * side * 3];
        let Shown { faces, inside } = self.draw(picture, faces, side, rng, scratch, &mut pixels)?;
        Ok(Example { side, pixels, faces, inside })
    }

    /// As [`Augment::example`], into `pixels` of side x side x 3.
    pub fn draw(
        &self,
        picture: &Picture,
        faces: &[Annotated],
        side: usize,
        rng: &mut Rng,
        scratch: &mut Scratch,
        pixels: &mut [u8],
    ) -> Result<Shown> {
        let size = [picture.width as f32, picture.height as f32];
        let window = self.window(size, faces, side as f32, rng);
        let flip = rng.uniform() < self.flip;
        let colour = self.colour(rng);
        let whole = Drawing { window, flip, colour, fill: self.fill };
        let source = (picture.width, picture.height, &picture.pixels[..]);
        let Scratch { resampler, small, straight, blur } = scratch;

        let few = (rng.uniform() < self.low_resolution.probability).then(|| {
            let [least, most] = self.low_resolution.factor;
            rng.range(least, most)
        });
        let mut draw = |drawing: &Drawing, side: usize, pixels: &mut [u8]| {
            let Some(factor) = few else { return resampler.draw(source, drawing, side, pixels) };
            let few = ((side as f32 / factor).round() as usize).max(1);
            small.resize(few * few * 3, 0);
            resampler.draw(source, drawing, few, small);
            let window = Window { x: 0.0, y: 0.0, size: few as f32 };
            let enlarged = Drawing { window, flip: false, colour: Colour::IDENTITY, fill: self.fill };
            resampler.draw((few, few, small), &enlarged, side, pixels);
        };
        let turned = rng.uniform() < self.turn.probability;
        let rotation = if turned {
            let most = self.turn.degrees.to_radians();
            Rotation::new(rng.range(-most, most))
        } else {
            Rotation::NONE
        };
        if turned {
            // Wide enough for the corners.
            let wide = (side as f32 * rotation.reach()).ceil() as usize + 2;
            straight.resize(wide * wide * 3, 0);
            let window = window.scaled(wide as f32 / side as f32);
            draw(&Drawing { window, ..whole }, wide, straight);
            rotation.draw(straight, wide, side, pixels);
        } else {
            draw(&whole, side, pixels);
        }
        let moved = |b: &BBox| box_in(&window, b, side as f32, flip, rotation);
        let boxes: Vec<BBox> = faces.iter().map(|face| moved(&face.bbox)).collect();
        let inside = moved(&BBox::new(0.0, 0.0, size[0], size[1])).within(&frame(side as f32));
        let kept = self.kept(faces, &boxes, side as f32);
        if self.cover.probability > 0.0 {
            self.cover.draw(&kept, &boxes, side, rng, pixels);
        }
        if rng.uniform() < self.blur.probability {
            let sigma = rng.range(self.blur.sigma[0], self.blur.sigma[1]);
            noise::blur(pixels, side, sigma, blur);
        }
        if rng.uniform() < self.jpeg.probability {
            let [worst, best] = self.jpeg.quality;
            let quality = worst + rng.below(usize::from(best - worst) + 1) as u8;
            noise::jpeg(pixels, side, quality)?;
        }
        Ok(Shown { faces: kept, inside })
    }

    /// The faces whose centre lies in the crop, clipped to it, from their whole boxes in its pixels. Those clipped to less
    /// than `min_visible` of their area, and those whose longer side falls below `min_face_px`, are ignored.
    fn kept(&self, faces: &[Annotated], boxes: &[BBox], side: f32) -> Vec<Annotated> {
        let mut kept = Vec::new();
        for (face, b) in faces.iter().zip(boxes) {
            let inside = |from: f32, to: f32| (0.0..side).contains(&((from + to) / 2.0));
            if !(inside(b.x1, b.x2) && inside(b.y1, b.y2)) {
                continue;
            }
            let clipped = b.within(&frame(side));
            let visible = clipped.area() / b.area();
            let too_small = clipped.width().max(clipped.height()) < self.min_face_px;
            // A face of no size after rounding cannot be learnt from or ignored.
            if clipped.area() > 0.0 {
                let ignore = face.ignore || too_small || visible < self.min_visible;
                kept.push(Annotated { bbox: clipped, ignore });
            }
        }
        kept
    }
}

/// The crop.
fn frame(side: f32) -> BBox {
    BBox::new(0.0, 0.0, side, side)
}

/// A whole box of the picture in pixels of the crop.
fn box_in(window: &Window, b: &BBox, side: f32, flip: bool, rotation: Rotation) -> BBox {
    let scale = side / window.size;
    let [x1, x2] = [b.x1, b.x2].map(|x| (x - window.x) * scale);
    let [y1, y2] = [b.y1, b.y2].map(|y| (y - window.y) * scale);
    let [x1, x2] = if flip { [side - x2, side - x1] } else { [x1, x2] };
    rotation.turned(BBox::new(x1, y1, x2, y2), side)
}
