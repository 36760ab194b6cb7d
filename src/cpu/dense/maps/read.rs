//! What a map's readers see, and the gradient with respect to the map itself.

use super::pass::Act;
use super::wide::{groups, repeated};
use super::{dispatch, for_blocks, for_registers, holds, Gradient, Pass, Source};
use crate::cpu::dense::Element;
use crate::cpu::kernels::Vector;
use crate::cpu::Isa;

struct Read<'a, T, O> {
    source: Source<'a, T>,
    pixels: usize,
    to: &'a mut [O],
    pixel: usize,
}

impl<T: Element, O: Element> Pass for Read<'_, T, O> {
    const BF16: bool = O::BF16;
    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        let (z, c) = (self.source.z, self.source.channels());
        // SAFETY: lengths were checked by `read`.
        unsafe {
            for_blocks!(V, c, self.pixels, |at, n, first, pixels| {
                let act = Act::<V>::of(&self.source, at, n);
                let mut from = z.as_ptr().add(first * c + at);
                let mut to = self.to.as_mut_ptr().add(first * self.pixel + at);
                for _ in 0..pixels {
                    O::store(act.seen(T::load::<V>(from, n)), to, n);
                    (from, to) = (from.wrapping_add(c), to.wrapping_add(self.pixel));
                }
            });
        }
    }
}

/// Writes what readers of `source` see to `to`, `pixel` values a pixel (those past the channels 0).
pub fn read<T: Element, O: Element>(isa: Isa, source: Source<'_, T>, to: &mut [O], pixel: usize) {
    let (pixels, c) = (source.checked(), source.channels());
    assert!(pixel >= c && holds(to.len(), pixels, pixel), "no room for what is read");
    let (k, done) = groups(isa, c, pixel, pixels);
    if done > 0 {
        let (scale, shift) = (repeated(source.scale, k), repeated(source.shift, k));
        let wide = Source { scale: &scale[..k * c], shift: &shift[..k * c], ..source };
        // SAFETY: the lengths were checked; k pixels of c values are one of k * c.
        unsafe { dispatch(isa, Read { source: wide, pixels: done / k, to, pixel: k * c }) };
    }
    if done < pixels {
        let (source, pixels) = (source.pixels(done..pixels), pixels - done);
        // SAFETY: the lengths were checked.
        unsafe { dispatch(isa, Read { source, pixels, to: &mut to[done * pixel..], pixel }) };
    }
    clear_rest(to, pixels, pixel, c);
}

/// Zeros behind the channels of every pixel.
fn clear_rest<O: Element>(to: &mut [O], pixels: usize, pixel: usize, channels: usize) {
    if pixel > channels {
        to.chunks_exact_mut(pixel).take(pixels).for_each(|p| p[channels..].fill(O::default()));
    }
}

struct PullBack<'a, T, O> {
    gradient: Gradient<'a, T>,
    pixels: usize,
    to: &'a mut [O],
    pixel: usize,
}

impl<T: Element, O: Element> Pass for PullBack<'_, T, O> {
    const BF16: bool = O::BF16;
    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        let Gradient { map, dy, a, b, c } = self.gradient;
        let channels = a.len();
        // SAFETY: lengths were checked by `pull_back`.
        unsafe {
            for_blocks!(V, channels, self.pixels, |at, n, first, pixels| {
                let act = Act::<V>::of(&map, at, n);
                let (a, b) = (V::load_upto(a.as_ptr().add(at), n), V::load_upto(b.as_ptr().add(at), n));
                let c = V::load_upto(c.as_ptr().add(at), n);
                let start = first * channels + at;
                let (mut z, mut dy) = (map.z.as_ptr().add(start), dy.as_ptr().add(start));
                let mut to = self.to.as_mut_ptr().add(first * self.pixel + at);
                for _ in 0..pixels {
                    let v = T::load::<V>(z, n);
                    let g = act.back(v, T::load::<V>(dy, n));
                    O::store(c.mul_add(b, v).mul_add(a, g), to, n);
                    (z, dy) = (z.wrapping_add(channels), dy.wrapping_add(channels));
                    to = to.wrapping_add(self.pixel);
                }
            });
        }
    }
}

/// Writes `dz` to `to`, `pixel` values a pixel (those past the channels 0).
pub fn pull_back<T: Element, O: Element>(isa: Isa, gradient: Gradient<'_, T>, to: &mut [O], pixel: usize) {
    let (pixels, c) = (gradient.checked(), gradient.channels());
    assert!(pixel >= c && holds(to.len(), pixels, pixel), "no room for the gradient");
    let (k, done) = groups(isa, c, pixel, pixels);
    if done > 0 {
        let Gradient { map, a, b, c: shift, .. } = gradient;
        let constants = [map.scale, map.shift, a, b, shift].map(|v| repeated(v, k));
        let [scale, map_shift, a, b, shift] = constants.each_ref().map(|v| &v[..k * c]);
        let map = Source { scale, shift: map_shift, ..map };
        let wide = Gradient { map, a, b, c: shift, ..gradient };
        // SAFETY: the lengths were checked; k pixels of c values are one of k * c.
        unsafe { dispatch(isa, PullBack { gradient: wide, pixels: done / k, to, pixel: k * c }) };
    }
    if done < pixels {
        let (gradient, pixels) = (gradient.pixels(done..pixels), pixels - done);
        // SAFETY: the lengths were checked.
        unsafe { dispatch(isa, PullBack { gradient, pixels, to: &mut to[done * pixel..], pixel }) };
    }
    clear_rest(to, pixels, pixel, c);
}
