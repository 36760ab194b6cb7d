//! Rows of interleaved pixels of three values: summed with weights, resampled along the row, normalised. No product is fused
//! into a sum, so that every instruction set gives the same bits.
//!
//! Loops over slices are plain ones: compiled for an ISA, they run on its registers.

use super::Vector;

/// Values of a row of pixels: bytes as stored, or floats already decoded.
pub(crate) trait Sample: Copy + 'static {
    fn value(self) -> f32;
    /// A register of them.
    ///
    /// # Safety
    /// As [`Vector`]'s loads.
    unsafe fn load<V: Vector>(p: *const Self) -> V;
    /// The kernels for rows of these.
    fn rows(table: &ResampleKernels) -> &RowKernels<Self>;
}

impl Sample for u8 {
    #[inline(always)]
    fn value(self) -> f32 {
        f32::from(self)
    }
    #[inline(always)]
    unsafe fn load<V: Vector>(p: *const Self) -> V {
        // SAFETY: the same contract.
        unsafe { V::load_u8(p, V::LANES) }
    }
    fn rows(table: &ResampleKernels) -> &RowKernels<Self> {
        &table.bytes
    }
}

impl Sample for f32 {
    #[inline(always)]
    fn value(self) -> f32 {
        self
    }
    #[inline(always)]
    unsafe fn load<V: Vector>(p: *const Self) -> V {
        // SAFETY: the same contract.
        unsafe { V::load(p) }
    }
    fn rows(table: &ResampleKernels) -> &RowKernels<Self> {
        &table.floats
    }
}

type WeighPair<T> = unsafe fn(&mut [f32], &[T], &[T], [f32; 2], bool);

/// What one ISA does to rows of one kind of value.
pub(crate) struct RowKernels<T: 'static> {
    /// [`weigh`].
    pub weigh: unsafe fn(&mut [f32], &[T], f32),
    /// [`weigh_pair`].
    pub weigh_pair: WeighPair<T>,
    /// [`normalize`].
    pub normalize: unsafe fn(&[T], &mut [f32], &Constants),
}

/// The kernels of one ISA. Calling one wants a CPU that runs it.
pub(crate) struct ResampleKernels {
    pub bytes: RowKernels<u8>,
    pub floats: RowKernels<f32>,
    /// [`columns`], of three values a pixel.
    pub columns: unsafe fn(&ColumnsArgs),
}

/// Values that are normalised together: whole pixels and whole vectors of any width, and too many for
/// the compiler to unroll the loop over them, which it then fails to vectorise.
const PERIOD: usize = 192;

/// `(value - mean) * scale` of the three values of a pixel, in the network's order.
pub(crate) struct Constants {
    pub mean: [f32; 3],
    pub scale: [f32; 3],
    /// Pixels come in the other order than the network's: the first and the third value are exchanged.
    pub swap: bool,
    /// Means with their signs changed, and scales, of whole pixels as they come, one after another.
    stored: [[f32; PERIOD]; 2],
}

impl Constants {
    pub fn new(mean: [f32; 3], scale: [f32; 3], swap: bool) -> Self {
        let repeated = |v: [f32; 3]| std::array::from_fn(|i| v[if swap { 2 - i % 3 } else { i % 3 }]);
        Self { mean, scale, swap, stored: [repeated(mean.map(|m| -m)), repeated(scale)] }
    }
}

/// `sum = weight * row`.
#[inline(always)]
pub(crate) fn weigh<T: Sample>(sum: &mut [f32], row: &[T], weight: f32) {
    for (s, v) in sum.iter_mut().zip(row) {
        *s = weight * v.value();
    }
}

/// `sum += wa * a + wb * b`, or `=` for the first rows. Slices of their own, which the compiler takes for apart from each other.
#[inline(always)]
pub(crate) fn weigh_pair<T: Sample>(sum: &mut [f32], a: &[T], b: &[T], [wa, wb]: [f32; 2], first: bool) {
    let rows = sum.iter_mut().zip(a.iter().zip(b));
    if first {
        for (s, (a, b)) in rows {
            *s = wa * a.value() + wb * b.value();
        }
    } else {
        for (s, (a, b)) in rows {
            *s += wa * a.value() + wb * b.value();
        }
    }
}

/// Normalises the pixels of `src` into `dst`, which is at least as long.
///
/// # Safety
/// The caller is compiled for `V`'s ISA.
#[inline(always)]
pub(crate) unsafe fn normalize<V: Vector, T: Sample>(src: &[T], dst: &mut [f32], c: &Constants) {
    let dst = &mut dst[..src.len()];
    // Every value with its own constants where it stands, then the ends of the pixels exchanged.
    // SAFETY: the caller's contract.
    unsafe { scale_values::<V, T>(src, dst, &c.stored) };
    if c.swap {
        // Four pixels at a time, which the compiler shuffles in registers.
        let (blocks, rest) = dst.as_chunks_mut::<12>();
        for p in blocks {
            *p = [p[2], p[1], p[0], p[5], p[4], p[3], p[8], p[7], p[6], p[11], p[10], p[9]];
        }
        for p in rest.as_chunks_mut::<3>().0 {
            p.swap(0, 2);
        }
    }
}

/// `dst = (src + shift) * scale`, the constants repeated over pixels.
#[inline(always)]
unsafe fn scale_values<V: Vector, T: Sample>(
    src: &[T],
    dst: &mut [f32],
    [shift, scale]: &[[f32; PERIOD]; 2],
) {
    let mut done = 0;
    if V::LANES > 4 {
        // Three registers are whole pixels.
        let step = 3 * V::LANES;
        // SAFETY: the caller is compiled for the ISA; whole steps lie in both slices, three registers in the constants.
        unsafe {
            while done + step <= src.len() {
                let mut at = 0;
                while at < step {
                    let v = T::load::<V>(src.as_ptr().add(done + at)).add(V::load(shift.as_ptr().add(at)));
                    v.mul(V::load(scale.as_ptr().add(at))).store(dst.as_mut_ptr().add(done + at));
                    at += V::LANES;
                }
                done += step;
            }
        }
    }
    let src = src[done..].chunks(PERIOD);
    for (dst, src) in dst[done..].chunks_mut(PERIOD).zip(src) {
        for ((o, v), (shift, scale)) in dst.iter_mut().zip(src).zip(shift.iter().zip(scale)) {
            *o = (v.value() + shift) * scale;
        }
    }
}

/// Pixel i: `head[i]` times the pixel at `first[i]` plus `tail[i]` times the one at `last[i]`, normalised.
pub(crate) struct ColumnsArgs<'a> {
    /// One value more than the pixels that are looked at.
    pub row: *const f32,
    /// Places in `row`: three times the pixels' numbers.
    pub first: *const u32,
    pub last: *const u32,
    pub head: *const f32,
    pub tail: *const f32,
    pub columns: usize,
    /// Three values a column.
    pub out: *mut f32,
    pub constants: &'a Constants,
}

/// All of `a`, a register's pixels at a time: each is four lanes, of which the fourth is the next pixel's or the spare value.
///
/// # Safety
/// The pointers of `a` hold what it says, its places lie in `row`; nobody else touches `out`.
#[inline(always)]
pub(crate) unsafe fn columns<V: Vector>(a: &ColumnsArgs) {
    let quad = |values: &[f32; 3], sign: f32| -> [f32; 16] {
        std::array::from_fn(|i| if i % 4 < 3 { sign * values[i % 4] } else { 0.0 })
    };
    let (mean, scale) = (quad(&a.constants.mean, -1.0), quad(&a.constants.scale, 1.0));
    // SAFETY: the caller's contract. A register written at a pixel reaches beyond the pixels it holds, but not beyond `out`.
    unsafe {
        let (mean, scale) = (V::load(mean.as_ptr()), V::load(scale.as_ptr()));
        let mut i = 0;
        while 3 * (a.columns - i) >= V::LANES {
            let head = V::load_pixels(a.row, a.first.add(i)).mul(V::spread(a.head.add(i)));
            let tail = V::load_pixels(a.row, a.last.add(i)).mul(V::spread(a.tail.add(i)));
            let mut v = head.add(tail);
            if a.constants.swap {
                v = v.swap_ends();
            }
            v.add(mean).mul(scale).pack_pixels().store(a.out.add(3 * i));
            i += V::LANES / 4;
        }
        while i < a.columns {
            for c in 0..3 {
                let from = if a.constants.swap { 2 - c } else { c };
                let x = *a.row.add(*a.first.add(i) as usize + from);
                let z = *a.row.add(*a.last.add(i) as usize + from);
                let v = *a.head.add(i) * x + *a.tail.add(i) * z;
                *a.out.add(3 * i + c) = (v - a.constants.mean[c]) * a.constants.scale[c];
            }
            i += 1;
        }
    }
}
