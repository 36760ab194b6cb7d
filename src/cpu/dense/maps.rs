//! Element-wise passes over channels-last maps: normalisation and activation where a map is read, gradients
//! pulled back through them, statistics.

use super::{per_isa, Element};

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
/// `dz = a[c] * g + b[c] * z + c[c]`, where g = dy * act'(scale[c] * z + shift[c]). With a batch normalisation
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

    /// Whether readers see what is stored.
    pub fn is_plain(&self) -> bool {
        self.slope == 1.0 && self.scale.iter().all(|&s| s == 1.0) && self.shift.iter().all(|&s| s == 0.0)
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
}

#[inline(always)]
fn activate(v: f32, slope: f32) -> f32 {
    let low = slope * v;
    if v > low {
        v
    } else {
        low
    }
}

/// The derivative of [`activate`]; at 0 the slope's side, as the plain layers have it.
#[inline(always)]
fn activate_slope(v: f32, slope: f32) -> f32 {
    if v > 0.0 {
        1.0
    } else {
        slope
    }
}

per_isa! {
    /// Writes what readers of `source` see to `to`, `pixel` values a pixel (those past the channels 0).
    pub fn read<T: Element, O: Element>(source: Source<'_, T>, to: &mut [O], pixel: usize) {
        let c = source.channels();
        let Source { scale, shift, slope, .. } = source;
        for (z, to) in source.z.chunks_exact(c).zip(to.chunks_exact_mut(pixel)) {
            let (to, rest) = to.split_at_mut(c);
            for i in 0..c {
                to[i] = O::of(activate(scale[i] * z[i].f32() + shift[i], slope));
            }
            rest.fill(O::default());
        }
    }
}

per_isa! {
    /// Writes `dz` to `to`, `pixel` values a pixel (those past the channels 0).
    pub fn pull_back<T: Element, O: Element>(gradient: Gradient<'_, T>, to: &mut [O], pixel: usize) {
        let n = gradient.channels();
        let Gradient { map: Source { z, scale, shift, slope }, dy, a, b, c } = gradient;
        for ((z, dy), to) in z.chunks_exact(n).zip(dy.chunks_exact(n)).zip(to.chunks_exact_mut(pixel)) {
            let (to, rest) = to.split_at_mut(n);
            for i in 0..n {
                let z = z[i].f32();
                let g = dy[i].f32() * activate_slope(scale[i] * z + shift[i], slope);
                to[i] = O::of(a[i] * g + b[i] * z + c[i]);
            }
            rest.fill(O::default());
        }
    }
}

per_isa! {
    /// Adds to `sums`, `[2][C]`: the sum of g and the sum of g * z over the pixels.
    pub fn gradient_sums<T: Element>(gradient: Gradient<'_, T>, sums: &mut [f32]) {
        let n = gradient.channels();
        let Gradient { map: Source { z, scale, shift, slope }, dy, .. } = gradient;
        let (sum_g, sum_gz) = sums.split_at_mut(n);
        for (z, dy) in z.chunks_exact(n).zip(dy.chunks_exact(n)) {
            for i in 0..n {
                let z = z[i].f32();
                let g = dy[i].f32() * activate_slope(scale[i] * z + shift[i], slope);
                sum_g[i] += g;
                sum_gz[i] += g * z;
            }
        }
    }
}

per_isa! {
    /// Stores `from + bias` (`stride` values a pixel) as `z`, and adds to `sums`, `[2][C]`, the sums of the
    /// stored values and of their squares.
    pub fn finish<T: Element>(from: &[f32], stride: usize, bias: &[f32], z: &mut [T], sums: &mut [f32]) {
        let n = bias.len();
        let (sum, squares) = sums.split_at_mut(n);
        for (from, z) in from.chunks(stride).zip(z.chunks_exact_mut(n)) {
            for i in 0..n {
                z[i] = T::of(from[i] + bias[i]);
                let v = z[i].f32();
                sum[i] += v;
                squares[i] += v * v;
            }
        }
    }
}

per_isa! {
    /// `to = from` or, where `add`, `to += from`: `stride` values a pixel of `from`, `channels` of them taken.
    pub fn deposit<T: Element>(from: &[f32], stride: usize, channels: usize, to: &mut [T], add: bool) {
        for (from, to) in from.chunks(stride).zip(to.chunks_exact_mut(channels)) {
            for i in 0..channels {
                let before = if add { to[i].f32() } else { 0.0 };
                to[i] = T::of(from[i] + before);
            }
        }
    }
}

per_isa! {
    /// Adds the pixels of `from`, `stride` values each, into `sums` `[channels]`.
    pub fn column_sums<T: Element>(from: &[T], stride: usize, sums: &mut [f32]) {
        for from in from.chunks_exact(stride) {
            for (sum, v) in sums.iter_mut().zip(from) {
                *sum += v.f32();
            }
        }
    }
}

per_isa! {
    /// `to += from`.
    pub fn add<T: Element>(from: &[T], to: &mut [f32]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to += from.f32();
        }
    }
}
