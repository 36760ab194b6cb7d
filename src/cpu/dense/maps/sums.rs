//! Statistics of maps and of their gradients.

use super::pass::{add_to, Act};
use super::wide::{fold, groups, repeated};
use super::{dispatch, for_blocks, for_registers, holds, Pass, Source};
use crate::cpu::dense::Element;
use crate::cpu::kernels::Vector;
use crate::cpu::Isa;

struct GradientSums<'a, T> {
    map: Source<'a, T>,
    dy: &'a [T],
    pixels: usize,
    sums: &'a mut [f32],
}

impl<T: Element> Pass for GradientSums<'_, T> {
    const BF16: bool = T::BF16;
    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        let (z, dy, channels) = (self.map.z, self.dy, self.map.channels());
        // SAFETY: lengths were checked by `gradient_sums`.
        unsafe {
            for_blocks!(V, channels, self.pixels, |at, n, first, pixels| {
                let act = Act::<V>::of(&self.map, at, n);
                let start = first * channels + at;
                let (mut z, mut dy) = (z.as_ptr().add(start), dy.as_ptr().add(start));
                // Two chains of sums, since an addition takes four cycles.
                let (mut sum, mut product) = (V::splat(0.0), V::splat(0.0));
                let (mut sum2, mut product2) = (sum, product);
                for _ in 0..pixels / 2 {
                    let (v, v2) = (T::load::<V>(z, n), T::load::<V>(z.wrapping_add(channels), n));
                    let (d, d2) = (T::load::<V>(dy, n), T::load::<V>(dy.wrapping_add(channels), n));
                    let (g, g2) = (act.back(v, d), act.back(v2, d2));
                    (sum, sum2) = (sum.add(g), sum2.add(g2));
                    (product, product2) = (product.mul_add(g, v), product2.mul_add(g2, v2));
                    (z, dy) = (z.wrapping_add(2 * channels), dy.wrapping_add(2 * channels));
                }
                if pixels % 2 == 1 {
                    let (v, d) = (T::load::<V>(z, n), T::load::<V>(dy, n));
                    let g = act.back(v, d);
                    (sum, product) = (sum.add(g), product.mul_add(g, v));
                }
                let (sum, product) = (sum.add(sum2), product.add(product2));
                let to = self.sums.as_mut_ptr().add(at);
                add_to(sum, to, n);
                let to = to.add(channels);
                add_to(product, to, n);
            });
        }
    }
}

/// Adds to `sums`, `[2][C]`: the sum of g (see [`super::Gradient`]) and the sum of g * z over the pixels.
pub fn gradient_sums<T: Element>(isa: Isa, map: Source<'_, T>, dy: &[T], sums: &mut [f32]) {
    let pixels = map.checked();
    assert!(
        sums.len() == 2 * map.channels() && dy.len() == map.z.len(),
        "two sums a channel, a gradient of the map's size"
    );
    let c = map.channels();
    let (k, done) = groups(isa, c, c, pixels);
    if done > 0 {
        let (scale, shift) = (repeated(map.scale, k), repeated(map.shift, k));
        let wide = Source { scale: &scale[..k * c], shift: &shift[..k * c], ..map };
        // SAFETY: the lengths were checked; k pixels of c values are one of k * c.
        fold(k, sums, |sums| unsafe {
            dispatch(isa, GradientSums { map: wide, dy, pixels: done / k, sums })
        });
    }
    if done < pixels {
        let (map, dy, pixels) = (map.pixels(done..pixels), &dy[done * c..], pixels - done);
        // SAFETY: the lengths were checked.
        unsafe { dispatch(isa, GradientSums { map, dy, pixels, sums }) };
    }
}

struct Finish<'a, T> {
    from: &'a [f32],
    stride: usize,
    bias: &'a [f32],
    pixels: usize,
    z: &'a mut [T],
    sums: &'a mut [f32],
}

impl<T: Element> Pass for Finish<'_, T> {
    const BF16: bool = T::BF16;
    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        let channels = self.bias.len();
        // SAFETY: lengths were checked by `finish`.
        unsafe {
            for_blocks!(V, channels, self.pixels, |at, n, first, pixels| {
                let bias = V::load_upto(self.bias.as_ptr().add(at), n);
                let mut from = self.from.as_ptr().add(first * self.stride + at);
                let mut z = self.z.as_mut_ptr().add(first * channels + at);
                // Two chains of sums, since an addition takes four cycles.
                let (mut sum, mut squares) = (V::splat(0.0), V::splat(0.0));
                let (mut sum2, mut squares2) = (sum, squares);
                for _ in 0..pixels / 2 {
                    let v = V::load_upto(from, n).add(bias);
                    let v2 = V::load_upto(from.wrapping_add(self.stride), n).add(bias);
                    T::store(v, z, n);
                    T::store(v2, z.wrapping_add(channels), n);
                    (sum, sum2) = (sum.add(v), sum2.add(v2));
                    (squares, squares2) = (squares.mul_add(v, v), squares2.mul_add(v2, v2));
                    (from, z) = (from.wrapping_add(2 * self.stride), z.wrapping_add(2 * channels));
                }
                if pixels % 2 == 1 {
                    let v = V::load_upto(from, n).add(bias);
                    T::store(v, z, n);
                    (sum, squares) = (sum.add(v), squares.mul_add(v, v));
                }
                let (sum, squares) = (sum.add(sum2), squares.add(squares2));
                let to = self.sums.as_mut_ptr().add(at);
                add_to(sum, to, n);
                let to = to.add(channels);
                add_to(squares, to, n);
            });
        }
    }
}

/// Stores `from + bias` (`stride` values a pixel) as `z`, and adds to `sums`, `[2][C]`, the sums of the
/// values (before they are rounded to be stored) and of their squares.
pub fn finish<T: Element>(
    isa: Isa,
    from: &[f32],
    stride: usize,
    bias: &[f32],
    z: &mut [T],
    sums: &mut [f32],
) {
    let c = bias.len();
    let pixels = z.len() / c.max(1);
    assert!(stride >= c && holds(from.len(), pixels, stride) && sums.len() == 2 * c, "lengths of a result");
    let (k, done) = groups(isa, c, stride, pixels);
    if done > 0 {
        let wide = repeated(bias, k);
        let (bias, stride, z) = (&wide[..k * c], k * c, &mut *z);
        // SAFETY: the lengths were checked; k pixels of c values are one of k * c.
        fold(k, sums, |sums| unsafe {
            dispatch(isa, Finish { from, stride, bias, pixels: done / k, z, sums })
        });
    }
    if done < pixels {
        let (from, z) = (&from[done * stride..], &mut z[done * c..]);
        // SAFETY: the lengths were checked.
        unsafe { dispatch(isa, Finish { from, stride, bias, pixels: pixels - done, z, sums }) };
    }
}

struct ColumnSums<'a, T> {
    from: &'a [T],
    stride: usize,
    pixels: usize,
    sums: &'a mut [f32],
}

impl<T: Element> Pass for ColumnSums<'_, T> {
    const BF16: bool = T::BF16;
    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        // SAFETY: lengths were checked by `column_sums`.
        unsafe {
            for_blocks!(V, self.sums.len(), self.pixels, |at, n, first, pixels| {
                let mut from = self.from.as_ptr().add(first * self.stride + at);
                let mut sum = V::splat(0.0);
                for _ in 0..pixels {
                    sum = sum.add(T::load::<V>(from, n));
                    from = from.wrapping_add(self.stride);
                }
                let to = self.sums.as_mut_ptr().add(at);
                add_to(sum, to, n);
            });
        }
    }
}

/// Adds the pixels of `from`, `stride` values each, into `sums` `[channels]`.
pub fn column_sums<T: Element>(isa: Isa, from: &[T], stride: usize, sums: &mut [f32]) {
    assert!(stride >= sums.len(), "sums of more channels than there are");
    let pixels = from.len() / stride.max(1);
    if pixels == 0 {
        return;
    }
    // SAFETY: the lengths were checked.
    unsafe { dispatch(isa, ColumnSums { from, stride, pixels, sums }) };
}
