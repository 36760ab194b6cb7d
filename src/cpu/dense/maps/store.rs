//! Gradients written to maps.

use super::pass::add_to;
use super::wide::groups;
use super::{dispatch, for_blocks, for_registers, holds, Pass};
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
