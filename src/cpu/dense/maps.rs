//! Element-wise passes over channels-last maps: normalisation and activation where a map is read, gradients
//! pulled back through them, statistics.
//!
//! Every pass takes a register of channels at a time, over all pixels it is given, with the channels' constants and sums
//! in registers; callers give it bands that stay in cache.

use super::Element;
use crate::cpu::kernels::Vector;
use crate::cpu::Isa;

/// A stored map as its readers see it: `y = act(scale[c] * z + shift[c])`, with act(v) = max(v, slope * v).
#[derive(Clone, Copy)]
pub struct Source<'a, T> {
    /// N x H x W x C as stored.
    pub z: &'a [T],
    /// `[C]`.
    pub scale: &'a [f32],
    /// `[C]`.
    pub shift: &'a [f32],
    /// 1 none, 0 ReLU, between leaky.
    pub slope: f32,
}

/// The gradient with respect to a stored map, from the gradient `dy` that its readers left:
/// `dz = a[c] * g + b[c] * z + c[c]`, where `g = dy * act'(scale[c] * z + shift[c])`. With a batch normalisation
/// of batch statistics (Ioffe and Szegedy 2015, section 3), and M values a channel,
/// a = gamma / std, b = -gamma * dgamma / (M * std^2), c = -b * mean - gamma * dbeta / (M * std).
#[derive(Clone, Copy)]
pub struct Gradient<'a, T> {
    /// The map and what its readers apply.
    pub map: Source<'a, T>,
    /// Gradient with respect to what readers see.
    pub dy: &'a [T],
    /// `[C]`.
    pub a: &'a [f32],
    /// `[C]`.
    pub b: &'a [f32],
    /// `[C]`.
    pub c: &'a [f32],
}

impl<'a, T: Element> Source<'a, T> {
    /// Channels.
    pub fn channels(&self) -> usize {
        self.scale.len()
    }

    /// Pixels `range` of it.
    pub fn pixels(&self, range: std::ops::Range<usize>) -> Self {
        let c = self.channels();
        Self { z: &self.z[range.start * c..range.end * c], ..*self }
    }

    /// Pixels, after a check that the constants are of one length.
    fn checked(&self) -> usize {
        let c = self.channels();
        assert!(self.shift.len() == c && self.z.len().is_multiple_of(c.max(1)), "a map's constants");
        self.z.len() / c.max(1)
    }
}

impl<'a, T: Element> Gradient<'a, T> {
    /// Channels.
    pub fn channels(&self) -> usize {
        self.a.len()
    }

    /// Pixels `range` of it.
    pub fn pixels(&self, range: std::ops::Range<usize>) -> Self {
        let c = self.channels();
        let dy = &self.dy[range.start * c..range.end * c];
        Self { map: self.map.pixels(range), dy, ..*self }
    }

    fn checked(&self) -> usize {
        let c = self.channels();
        assert!(self.b.len() == c && self.c.len() == c && self.map.channels() == c, "a gradient's constants");
        assert_eq!(self.dy.len(), self.map.z.len(), "a gradient of its map's size");
        self.map.checked()
    }
}

/// Whether `len` values hold `rows` rows of `stride`, which may be beyond any size.
pub(super) fn holds(len: usize, rows: usize, stride: usize) -> bool {
    rows.checked_mul(stride).is_some_and(|n| len >= n)
}

/// One pass, over any registers.
pub(super) trait Pass {
    /// Whether it stores bf16.
    const BF16: bool;
    /// # Safety
    /// The caller is compiled for `V`'s ISA; the lengths of the pass were checked.
    unsafe fn run<V: Vector>(self);
}

/// Runs a pass on the registers of `isa`.
///
/// # Safety
/// The lengths of the pass were checked.
pub(super) unsafe fn dispatch<P: Pass>(isa: Isa, pass: P) {
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn avx2<P: Pass>(pass: P) {
        // SAFETY: compiled for this ISA.
        unsafe { pass.run::<crate::cpu::kernels::avx2::F32x8>() }
    }
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn avx512_bf16<P: Pass>(pass: P) {
        // SAFETY: compiled for this ISA.
        unsafe { pass.run::<crate::cpu::kernels::avx512::F32x16>() }
    }
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn avx512<P: Pass>(pass: P) {
        // SAFETY: compiled for this ISA.
        unsafe { pass.run::<crate::cpu::kernels::avx512::F32x16>() }
    }
    // SAFETY: an `Isa` value is proof that the CPU has it; the caller's contract.
    unsafe {
        match isa {
            Isa::Generic => pass.run::<crate::cpu::kernels::generic::F32x4>(),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => pass.run::<crate::cpu::kernels::neon::F32x4>(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => avx2(pass),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 if P::BF16 => {
                assert!(super::bf16_supported(), "maps in bf16 are for machines with AMX");
                avx512_bf16(pass)
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => avx512(pass),
        }
    }
}

/// Runs `$body` for every register of channels: `$at` the first channel, `$n` how many (a constant where all lanes).
macro_rules! for_registers {
    ($vector:ty, $channels:expr, |$at:ident, $n:ident| $body:block) => {{
        let mut $at = 0;
        while $at + <$vector>::LANES <= $channels {
            let $n = <$vector>::LANES;
            $body
            $at += <$vector>::LANES;
        }
        if $at < $channels {
            let $n = $channels - $at;
            $body
        }
    }};
}
pub(super) use for_registers;

/// max(slope * x, x).
#[inline(always)]
unsafe fn activate<V: Vector>(x: V, slope: V) -> V {
    // SAFETY: register arithmetic; the caller is compiled for V's ISA.
    unsafe { x.mul(slope).max(x) }
}

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
        let Source { z, scale, shift, slope } = self.source;
        let c = scale.len();
        // SAFETY: lengths were checked by `read`.
        unsafe {
            let slope = V::splat(slope);
            for_registers!(V, c, |at, n| {
                let (scale, shift) =
                    (V::load_upto(scale.as_ptr().add(at), n), V::load_upto(shift.as_ptr().add(at), n));
                let (mut from, mut to) = (z.as_ptr().add(at), self.to.as_mut_ptr().add(at));
                for _ in 0..self.pixels {
                    let v = shift.mul_add(scale, T::load::<V>(from, n));
                    O::store(activate(v, slope), to, n);
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
    if pixels == 0 {
        return;
    }
    // SAFETY: the lengths were checked.
    unsafe { dispatch(isa, Read { source, pixels, to, pixel }) };
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
        let Gradient { map: Source { z, scale, shift, slope }, dy, a, b, c } = self.gradient;
        let channels = a.len();
        // SAFETY: lengths were checked by `pull_back`.
        unsafe {
            let slope = V::splat(slope);
            for_registers!(V, channels, |at, n| {
                let (scale, shift) =
                    (V::load_upto(scale.as_ptr().add(at), n), V::load_upto(shift.as_ptr().add(at), n));
                let (a, b) = (V::load_upto(a.as_ptr().add(at), n), V::load_upto(b.as_ptr().add(at), n));
                let c = V::load_upto(c.as_ptr().add(at), n);
                let (mut z, mut dy) = (z.as_ptr().add(at), dy.as_ptr().add(at));
                let mut to = self.to.as_mut_ptr().add(at);
                for _ in 0..self.pixels {
                    let v = T::load::<V>(z, n);
                    let d = T::load::<V>(dy, n);
                    let g = shift.mul_add(scale, v).where_positive(d, d.mul(slope));
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
    if pixels == 0 {
        return;
    }
    // SAFETY: the lengths were checked.
    unsafe { dispatch(isa, PullBack { gradient, pixels, to, pixel }) };
    clear_rest(to, pixels, pixel, c);
}

struct GradientSums<'a, T> {
    gradient: Gradient<'a, T>,
    pixels: usize,
    sums: &'a mut [f32],
}

impl<T: Element> Pass for GradientSums<'_, T> {
    const BF16: bool = T::BF16;
    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        let Gradient { map: Source { z, scale, shift, slope }, dy, .. } = self.gradient;
        let channels = scale.len();
        // SAFETY: lengths were checked by `gradient_sums`.
        unsafe {
            let slope = V::splat(slope);
            for_registers!(V, channels, |at, n| {
                let (scale, shift) =
                    (V::load_upto(scale.as_ptr().add(at), n), V::load_upto(shift.as_ptr().add(at), n));
                let (mut z, mut dy) = (z.as_ptr().add(at), dy.as_ptr().add(at));
                // Two chains of sums, since an addition takes four cycles.
                let (mut sum, mut product) = (V::splat(0.0), V::splat(0.0));
                let (mut sum2, mut product2) = (sum, product);
                for _ in 0..self.pixels / 2 {
                    let (v, v2) = (T::load::<V>(z, n), T::load::<V>(z.wrapping_add(channels), n));
                    let (d, d2) = (T::load::<V>(dy, n), T::load::<V>(dy.wrapping_add(channels), n));
                    let g = shift.mul_add(scale, v).where_positive(d, d.mul(slope));
                    let g2 = shift.mul_add(scale, v2).where_positive(d2, d2.mul(slope));
                    (sum, sum2) = (sum.add(g), sum2.add(g2));
                    (product, product2) = (product.mul_add(g, v), product2.mul_add(g2, v2));
                    (z, dy) = (z.wrapping_add(2 * channels), dy.wrapping_add(2 * channels));
                }
                if self.pixels % 2 == 1 {
                    let (v, d) = (T::load::<V>(z, n), T::load::<V>(dy, n));
                    let g = shift.mul_add(scale, v).where_positive(d, d.mul(slope));
                    (sum, product) = (sum.add(g), product.mul_add(g, v));
                }
                let (sum, product) = (sum.add(sum2), product.add(product2));
                let to = self.sums.as_mut_ptr().add(at);
                V::load_upto(to, n).add(sum).store_upto(to, n);
                let to = to.add(channels);
                V::load_upto(to, n).add(product).store_upto(to, n);
            });
        }
    }
}

/// Adds to `sums`, `[2][C]`: the sum of g and the sum of g * z over the pixels.
pub fn gradient_sums<T: Element>(isa: Isa, gradient: Gradient<'_, T>, sums: &mut [f32]) {
    let pixels = gradient.checked();
    assert_eq!(sums.len(), 2 * gradient.channels(), "two sums a channel");
    if pixels == 0 {
        return;
    }
    // SAFETY: the lengths were checked.
    unsafe { dispatch(isa, GradientSums { gradient, pixels, sums }) };
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
            for_registers!(V, channels, |at, n| {
                let bias = V::load_upto(self.bias.as_ptr().add(at), n);
                let (mut from, mut z) = (self.from.as_ptr().add(at), self.z.as_mut_ptr().add(at));
                // Two chains of sums, since an addition takes four cycles.
                let (mut sum, mut squares) = (V::splat(0.0), V::splat(0.0));
                let (mut sum2, mut squares2) = (sum, squares);
                for _ in 0..self.pixels / 2 {
                    let v = V::load_upto(from, n).add(bias);
                    let v2 = V::load_upto(from.wrapping_add(self.stride), n).add(bias);
                    T::store(v, z, n);
                    T::store(v2, z.wrapping_add(channels), n);
                    (sum, sum2) = (sum.add(v), sum2.add(v2));
                    (squares, squares2) = (squares.mul_add(v, v), squares2.mul_add(v2, v2));
                    (from, z) = (from.wrapping_add(2 * self.stride), z.wrapping_add(2 * channels));
                }
                if self.pixels % 2 == 1 {
                    let v = V::load_upto(from, n).add(bias);
                    T::store(v, z, n);
                    (sum, squares) = (sum.add(v), squares.mul_add(v, v));
                }
                let (sum, squares) = (sum.add(sum2), squares.add(squares2));
                let to = self.sums.as_mut_ptr().add(at);
                V::load_upto(to, n).add(sum).store_upto(to, n);
                let to = to.add(channels);
                V::load_upto(to, n).add(squares).store_upto(to, n);
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
    if pixels == 0 {
        return;
    }
    // SAFETY: the lengths were checked.
    unsafe { dispatch(isa, Finish { from, stride, bias, pixels, z, sums }) };
}

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
            for_registers!(V, self.channels, |at, n| {
                let (mut from, mut to) = (self.from.as_ptr().add(at), self.to.as_mut_ptr().add(at));
                for _ in 0..self.pixels {
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
    if pixels == 0 {
        return;
    }
    // SAFETY: the lengths were checked.
    unsafe { dispatch(isa, Deposit { from, stride, channels, pixels, to, add }) };
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
            for_registers!(V, self.sums.len(), |at, n| {
                let mut from = self.from.as_ptr().add(at);
                let mut sum = V::splat(0.0);
                for _ in 0..self.pixels {
                    sum = sum.add(T::load::<V>(from, n));
                    from = from.wrapping_add(self.stride);
                }
                let to = self.sums.as_mut_ptr().add(at);
                V::load_upto(to, n).add(sum).store_upto(to, n);
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
                let to = self.to.as_mut_ptr().add(at);
                V::load_upto(to, n).add(T::load::<V>(self.from.as_ptr().add(at), n)).store_upto(to, n);
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
