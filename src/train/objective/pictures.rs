//! A batch's outputs, picture by picture.

use crate::detect::BBox;
use crate::error::{Error, Result};
use crate::shape::{Shape, Tensor};
use crate::train::data::Annotated;
use crate::train::matching::FaceBox;

/// The batch of which the pictures at hand are all or, where several processes train together, a part. Losses are shares of it.
#[derive(Clone, Copy)]
pub struct Whole<'a> {
    /// Its pictures.
    images: usize,
    /// Makes counts of the pictures at hand those of the batch; the pictures at hand are all without one.
    sum: Option<Sum<'a>>,
}

/// Adds up counts over all parts of a batch. Every part asks for the same ones in the same order.
pub type Sum<'a> = &'a (dyn Fn([usize; 3]) -> Result<[usize; 3]> + Sync);

impl<'a> Whole<'a> {
    /// A batch of so many pictures, all of them at hand.
    pub fn at_hand(images: usize) -> Self {
        Self { images, sum: None }
    }

    /// A batch of so many pictures, of which others have some.
    pub fn shared(images: usize, sum: Sum<'a>) -> Self {
        Self { images, sum: Some(sum) }
    }

    pub(super) fn images(&self) -> usize {
        self.images
    }

    pub(super) fn counts(&self, own: [usize; 3]) -> Result<[usize; 3]> {
        self.sum.map_or(Ok(own), |sum| sum(own))
    }
}

/// Losses of a batch, and how many anchors they come from.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Losses {
    /// Classification; in a training with that of pyramid anchors.
    pub class: f64,
    /// Boxes, before their weight; likewise.
    pub boxes: f64,
    /// Anchors matched, of those that entered the loss.
    pub matched: usize,
    /// Anchors mined, likewise.
    pub mined: usize,
    /// Faces to find.
    pub faces: usize,
    /// Mean IoU of the positives' decoded boxes with their faces.
    pub iou: f64,
}

impl Losses {
    /// Of a batch from those of its parts.
    pub fn of_parts(parts: &[Self]) -> Self {
        let mut total = Self::default();
        for part in parts {
            // The sum that its mean is of.
            let iou = part.iou * (part.matched + part.mined) as f64;
            total.add(&Self { iou, ..*part });
        }
        total.iou /= (total.matched + total.mined).max(1) as f64;
        total
    }

    pub(super) fn add(&mut self, other: &Self) {
        self.class += other.class;
        self.boxes += other.boxes;
        self.matched += other.matched;
        self.mined += other.mined;
        self.faces += other.faces;
        self.iou += other.iou;
    }
}

/// A box that a picture's outputs mean.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Proposal {
    pub(super) bbox: BBox,
    /// Anything that rises with the face's probability.
    pub(super) score: f32,
    /// Number of the level that it comes from.
    pub(super) level: usize,
}

/// A picture's faces as the matching takes them.
pub(super) fn face_boxes(faces: &[Annotated]) -> Vec<FaceBox> {
    faces.iter().map(|f| FaceBox { bbox: f.bbox, ignore: f.ignore }).collect()
}

/// The shapes of a batch's outputs, which must have these channels.
pub(super) fn check_outputs(outputs: &[Tensor], channels: &[usize], images: usize) -> Result<Vec<Shape>> {
    let shapes: Vec<Shape> = outputs.iter().map(|o| o.shape).collect();
    check_shapes(&shapes, channels, images).map(|()| shapes)
}

/// Errors unless a batch's outputs have these channels.
pub(super) fn check_shapes(shapes: &[Shape], channels: &[usize], images: usize) -> Result<()> {
    let fits = shapes.iter().zip(channels).all(|(s, &c)| s.c == c && s.n == images);
    if shapes.len() != channels.len() || !fits {
        return Err(Error::Internal("outputs are not the objective's levels".into()));
    }
    Ok(())
}

/// Picture `n`'s part of every output.
pub(super) fn picture_maps(outputs: &[Tensor], n: usize) -> Vec<&[f32]> {
    let part = |o: &Tensor| {
        let values = o.data.len() / o.shape.n;
        n * values..(n + 1) * values
    };
    outputs.iter().map(|o| &o.data[part(o)]).collect()
}

/// A batch's losses and gradients from its pictures'.
pub(super) fn gathered(shapes: &[Shape], judged: Vec<(Losses, Vec<Vec<f32>>)>) -> (Losses, Vec<Tensor>) {
    let mut total = Losses::default();
    let mut gradients: Vec<Tensor> =
        shapes.iter().map(|&s| Tensor { shape: s, data: Vec::with_capacity(s.len()) }).collect();
    for (losses, maps) in judged {
        total.add(&losses);
        for (to, from) in gradients.iter_mut().zip(maps) {
            to.data.extend(from);
        }
    }
    total.iou /= (total.matched + total.mined).max(1) as f64;
    (total, gradients)
}

pub(super) fn wanted(faces: &[FaceBox]) -> usize {
    faces.iter().filter(|f| !f.ignore).count()
}

/// `f` of every picture, in order.
pub(super) fn parallel<R: Send>(images: usize, threads: usize, f: impl Fn(usize) -> R + Sync) -> Vec<R> {
    let threads = threads.clamp(1, images.max(1));
    if threads == 1 {
        return (0..images).map(f).collect();
    }
    let part = |t: usize| (images * t / threads..images * (t + 1) / threads).map(&f).collect::<Vec<R>>();
    std::thread::scope(|scope| {
        let part = &part;
        let others: Vec<_> = (1..threads).map(|t| scope.spawn(move || part(t))).collect();
        let mut all = part(0);
        for other in others {
            all.extend(other.join().unwrap_or_else(|p| std::panic::resume_unwind(p)));
        }
        all
    })
}
