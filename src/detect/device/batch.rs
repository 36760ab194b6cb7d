//! Pictures of one size searched together: one launch of each step for all of them.

use super::prepare::{held_bytes, Prepared};
use super::second::Second;
use super::{limit, OnDevice, Source, KEPT_SIZES};
use crate::detect::face::Face;
use crate::detect::model::Model;
use crate::detect::options::Options;
use crate::error::{Error, Result};
use crate::pixels::Size;

/// Most pictures that are searched together. A larger batch is several, each of a power of two, so that few recordings do for all.
const MOST_TOGETHER: usize = 8;

impl OnDevice {
    /// Finds the faces of pictures of any sizes and gives them to `each` in their order, with the picture's number. Neighbours of one
    /// size are searched together, as many as the memory cap allows. One that fails does not keep the others from being searched.
    pub fn detect_batch(
        &mut self,
        model: &Model,
        options: &Options,
        images: &[Source<'_>],
        faces: &mut Vec<Face>,
        each: &mut dyn FnMut(usize, Result<&[Face]>),
    ) {
        let mut at = 0;
        while at < images.len() {
            let size = images[at].upright_size();
            let equal = images[at..].iter().take_while(|image| image.upright_size() == size).count();
            let together = self.together(model, options, &images[at..at + equal]);
            let group = &images[at..at + together];
            if together == 1 || !self.search(model, options, group, at, faces, each) {
                for (i, image) in (at..).zip(group) {
                    let found = self.detect(model, options, *image, faces);
                    each(i, found.map(|_| &faces[..]));
                }
            }
            at += together;
        }
    }

    /// Searches pictures of one size together, the first of which has number `at`. False, and nothing given to `each`, where that failed:
    /// which of them is to blame shows when they are searched one by one.
    fn search(
        &mut self,
        model: &Model,
        options: &Options,
        images: &[Source<'_>],
        at: usize,
        faces: &mut Vec<Face>,
        each: &mut dyn FnMut(usize, Result<&[Face]>),
    ) -> bool {
        let done = self.begin(model, options, images, None).and_then(|()| self.done.synchronize());
        if done.is_ok() {
            for i in 0..images.len() {
                let found = self.collect(model, options, i, faces);
                each(at + i, found.map(|()| &faces[..]));
            }
        }
        self.pending.clear();
        if let Err(Error::LimitExceeded(_)) = done {
            // No memory for so many, though the cap allows them.
            let size = images[0].upright_size();
            self.together.iter_mut().filter(|known| known.0 == size).for_each(|known| known.1 /= 2);
        }
        done.is_ok()
    }

    /// How many of these pictures of one size are searched together.
    fn together(&mut self, model: &Model, options: &Options, images: &[Source<'_>]) -> usize {
        let wanted = images.len().min(MOST_TOGETHER);
        if wanted < 2 || self.second.is_some() {
            return 1;
        }
        let size = images[0].upright_size();
        let known = self.together.iter().find(|known| known.0 == size).map(|known| known.1);
        let most = known.unwrap_or_else(|| {
            let most = self.most_together(model, options, size);
            if self.together.len() == KEPT_SIZES {
                self.together.remove(0);
            }
            self.together.push((size, most));
            most
        });
        1 << wanted.min(most).max(1).ilog2()
    }

    /// Most pictures of this size that fit the memory cap together; 1 where not even one does, which then fails with its error.
    fn most_together(&self, model: &Model, options: &Options, size: Size) -> usize {
        let second = self.second.as_ref().map_or(0, Second::bytes);
        let held = |images: usize| {
            let passes = self.fit(model, options, size)?.passes;
            let prepared = Prepared::new(&self.network, model, options, (size, images), passes)?;
            Ok::<_, Error>((held_bytes(limit(model, options), &prepared) + second) as u64)
        };
        let mut most = MOST_TOGETHER;
        while most > 1 && !held(most).is_ok_and(|bytes| bytes <= options.memory_cap) {
            most /= 2;
        }
        most
    }
}
