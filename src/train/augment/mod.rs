//! From a picture and its faces to a square training example.
//!
//! One square window of the picture is chosen (`crop`), drawn once straight from the source with
//! flip and colour in the same pass (`resample`, `photometric`), and now and then degraded
//! (`noise`).

mod crop;
mod noise;
mod photometric;
mod recipe;
mod resample;

#[cfg(test)]
mod tests;

use crate::detect::BBox;
use crate::graph::init::Rng;
use crate::train::data::{Annotated, Picture};
use crate::Result;

pub use crop::Window;
pub use recipe::{
    Augment, Blur, DataAnchorSampling, Expand, Jpeg, LowResolution, Photometric, RandomSquare, ScaleJitter,
};

use photometric::Colour;
use resample::{Drawing, Resampler};

/// A training example.
#[derive(Clone, Debug, PartialEq)]
pub struct Example {
    /// Pixels a row, and rows.
    pub side: usize,
    /// side x side x 3, RGB.
    pub pixels: Vec<u8>,
    /// Faces in pixels of the crop.
    pub faces: Vec<Annotated>,
}

/// Memory that augmentation uses again and again; one a thread.
#[derive(Debug, Default)]
pub struct Scratch {
    resampler: Resampler,
    small: Vec<u8>,
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
        let faces = self.draw(picture, faces, side, rng, scratch, &mut pixels)?;
        Ok(Example { side, pixels, faces })
    }

    /// As [`Augment::example`], into `pixels` of side x side x 3; returns the faces.
    pub fn draw(
        &self,
        picture: &Picture,
        faces: &[Annotated],
        side: usize,
        rng: &mut Rng,
        scratch: &mut Scratch,
        pixels: &mut [u8],
    ) -> Result<Vec<Annotated>> {
        let size = [picture.width as f32, picture.height as f32];
        let window = self.window(size, faces, side as f32, rng);
        let flip = rng.uniform() < self.flip;
        let colour = self.colour(rng);
        let whole = Drawing { window, flip, colour, fill: self.fill };
        let source = (picture.width, picture.height, &picture.pixels[..]);
        let Scratch { resampler, small, blur } = scratch;

        if rng.uniform() < self.low_resolution.probability {
            let [least, most] = self.low_resolution.factor;
            let few = ((side as f32 / rng.range(least, most)).round() as usize).max(1);
            small.resize(few * few * 3, 0);
            resampler.draw(source, &whole, few, small);
            let window = Window { x: 0.0, y: 0.0, size: few as f32 };
            let enlarged = Drawing { window, flip: false, colour: Colour::IDENTITY, fill: self.fill };
            resampler.draw((few, few, small), &enlarged, side, pixels);
        } else {
            resampler.draw(source, &whole, side, pixels);
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
        Ok(self.faces_in(&window, faces, side as f32, flip))
    }

    /// The faces whose centre lies in the window, clipped to it, in pixels of the crop. Those
    /// clipped to less than `min_visible` of their area, and those whose longer side falls below
    /// `min_face_px`, are ignored.
    fn faces_in(&self, window: &Window, faces: &[Annotated], side: f32, flip: bool) -> Vec<Annotated> {
        let scale = side / window.size;
        let mut kept = Vec::new();
        for face in faces.iter().filter(|f| window.holds_centre(&f.bbox)) {
            let b = face.bbox;
            let [x1, x2] = [b.x1, b.x2].map(|x| (x - window.x) * scale);
            let [y1, y2] = [b.y1, b.y2].map(|y| (y - window.y) * scale);
            let [x1, x2] = if flip { [side - x2, side - x1] } else { [x1, x2] };
            let clipped = BBox::new(x1.max(0.0), y1.max(0.0), x2.min(side), y2.min(side));
            let visible = clipped.area() / ((x2 - x1) * (y2 - y1));
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
