//! Gradients written to maps.

use super::pass::{add_to, Act};
use super::wide::{fold, groups, repeated};
use super::{dispatch, for_blocks, for_registers, holds, Pass, Source};
use crate::cpu::dense::Element;
use crate::cpu::kernels::Vector;
use crate::cpu::Isa;

struct Deposit<'a, T> {
    from: &'a [f32],
    stride: usize,
    channels: usize,
    pixels: usize,
    to: &'a mut [T],
    add: bool,
}

impl<T: Element> Pass for Deposit<'_, T> {
    const BF16: bool = T::BF16;
    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        // SAFETY: lengths were checked by `deposit`.
        unsafe {
            for_blocks!(V, self.channels, self.pixels, |at, n, first, pixels| {
                let mut from = self.from.as_ptr().add(first * self.stride + at);
                let mut to = self.to.as_mut_ptr().add(first * self.channels + at);
                for _ in 0..pixels {
                    let mut v = V::load_upto(from, n);
                    if self.add {
                        v = v.add(T::load::<V>(to, n));
                    }
                    T::store(v, to, n);
                    (from, to) = (from.wrapping_add(self.stride), to.wrapping_add(self.channels));
                }
            });
        }
    }
}

/// `to = from` or, where `add`, `to += from`: `stride` values a pixel of `from`, `channels` of them taken.
pub fn deposit<T: Element>(isa: Isa, from: &[f32], stride: usize, channels: usize, to: &mut [T], add: bool) {
    let pixels = to.len() / channels.max(1);
    assert!(stride >= channels && holds(from.len(), pixels, stride), "lengths of a gradient");
    let (k, done) = groups(isa, channels, stride, pixels);
    if done > 0 {
        let (stride, channels, pixels) = (k * channels, k * channels, done / k);
        // SAFETY: the lengths were checked; k pixels of `channels` values are one of k times as many.
        unsafe { dispatch(isa, Deposit { from, stride, channels, pixels, to, add }) };
    }
    if done < pixels {
        let (from, to, pixels) = (&from[done * stride..], &mut to[done * channels..], pixels - done);
        // SAFETY: the lengths were checked.
        unsafe { dispatch(isa, Deposit { from, stride, channels, pixels, to, add }) };
    }
}

struct DepositWhole<'a, T> {
    from: &'a [f32],
    stride: usize,
    map: Source<'a, T>,
    pixels: usize,
    to: &'a mut [T],
    add: bool,
    sums: &'a mut [f32],
}

impl<T: Element> Pass for DepositWhole<'_, T> {
    const BF16: bool = T::BF16;
    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        let (z, channels) = (self.map.z, self.map.channels());
        // SAFETY: lengths were checked by `deposit_whole`.
        unsafe {
            for_blocks!(V, channels, self.pixels, |at, n, first, pixels| {
                let act = Act::<V>::of(&self.map, at, n);
                let start = first * channels + at;
                let (mut z, mut to) = (z.as_ptr().add(start), self.to.as_mut_ptr().add(start));
                let mut from = self.from.as_ptr().add(first * self.stride + at);
                let (mut sum, mut product) = (V::splat(0.0), V::splat(0.0));
                for _ in 0..pixels {
                    let mut d = V::load_upto(from, n);
                    if self.add {
                        d = d.add(T::load::<V>(to, n));
                    }
                    T::store(d, to, n);
                    let v = T::load::<V>(z, n);
                    let g = act.back(v, d);
                    (sum, product) = (sum.add(g), product.mul_add(g, v));
                    (from, z) = (from.wrapping_add(self.stride), z.wrapping_add(channels));
                    to = to.wrapping_add(channels);
                }
                let sums = self.sums.as_mut_ptr().add(at);
                add_to(sum, sums, n);
                add_to(product, sums.add(channels), n);
            });
        }
    }
}

/// [`deposit`] of the last part of `map`'s gradient, and [`gradient_sums`](super::gradient_sums) of what it is then, before
/// it is rounded to be stored.
pub fn deposit_whole<T: Element>(
    isa: Isa,
    from: &[f32],
    stride: usize,
    map: Source<'_, T>,
    to: &mut [T],
    add: bool,
    sums: &mut [f32],
) {
    let (pixels, c) = (map.checked(), map.channels());
    assert!(
        stride >= c && holds(from.len(), pixels, stride) && to.len() == map.z.len() && sums.len() == 2 * c,
        "lengths of a gradient"
    );
    let (k, done) = groups(isa, c, stride, pixels);
    if done > 0 {
        let (scale, shift) = (repeated(map.scale, k), repeated(map.shift, k));
        let map = Source { scale: &scale[..k * c], shift: &shift[..k * c], ..map };
        let to = &mut *to;
        // SAFETY: the lengths were checked; k pixels of c values are one of k * c.
        fold(k, sums, |sums| unsafe {
            dispatch(isa, DepositWhole { from, stride: k * c, map, pixels: done / k, to, add, sums })
        });
    }
    if done < pixels {
        let (from, map, to) = (&from[done * stride..], map.pixels(done..pixels), &mut to[done * c..]);
        let pixels = pixels - done;
        // SAFETY: the lengths were checked.
        unsafe { dispatch(isa, DepositWhole { from, stride, map, pixels, to, add, sums }) };
    }
}

struct AddTo<'a, T> {
    from: &'a [T],
    to: &'a mut [f32],
}

impl<T: Element> Pass for AddTo<'_, T> {
    const BF16: bool = T::BF16;
    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        // SAFETY: lengths were checked by `add`.
        unsafe {
            for_registers!(V, self.to.len(), |at, n| {
                let v = T::load::<V>(self.from.as_ptr().add(at), n);
                add_to(v, self.to.as_mut_ptr().add(at), n);
            });
        }
    }
}

/// `to += from`.
pub fn add<T: Element>(isa: Isa, from: &[T], to: &mut [f32]) {
    assert_eq!(from.len(), to.len(), "sums of two lengths");
    // SAFETY: the lengths were checked.
    unsafe { dispatch(isa, AddTo { from, to }) };
}
