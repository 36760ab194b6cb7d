//! Steps bound by memory or rare: pooling, interpolation, element-wise, softmax, transposed
//! convolution, RoIAlign, and the zeroing of halos.

use super::arena::{Arena, Format, View};
use super::isa::Isa;
pub(crate) use super::kernels::simple::WIDENED;
use super::kernels::simple::{Blend, Operand, PoolArgs, ResizeArgs, RowArgs};
use super::kernels::Kernels;
use super::part::Part;
use super::threads::{for_images, Team};
use std::ops::Range;

/// Source positions along one axis, as PyTorch computes them. Nearest: floor(dst * (in/out)) with the
/// ratio rounded to f32. Bilinear: half-pixel centres, clamped at the edges.
pub(crate) fn blends(input: usize, output: usize, bilinear: bool) -> Vec<Blend> {
    (0..output)
        .map(|dst| {
            if !bilinear {
                let low = ((dst as f32 * (input as f32 / output as f32)) as u32).min(input as u32 - 1);
                return Blend { low, high: low, t: 0.0 };
            }
            let src = ((dst as f64 + 0.5) * input as f64 / output as f64 - 0.5).max(0.0);
            let low = (src as usize).min(input - 1);
            let high = (low + 1).min(input - 1);
            Blend { low: low as u32, high: high as u32, t: (src - low as f64) as f32 }
        })
        .collect()
}

/// Max pooling geometry.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct PoolOp {
    pub kernel: [usize; 2],
    pub stride: [usize; 2],
    /// Top and left.
    pub pad: [usize; 2],
}

impl PoolOp {
    /// Computes this thread's share of the output rows.
    ///
    /// # Safety
    /// `base` is an arena in which the views lie; the output overlaps no input; all threads of the
    /// team call this together.
    pub unsafe fn run(&self, k: &Kernels, base: *mut u8, input: &View, output: &View, team: &Team) {
        for_images(team.share(output.shape.n * output.shape.h), output.shape.h, |n, rows| {
            // SAFETY: the caller's contract.
            unsafe {
                let from = input.byte(base, input.at(n, 0, 0)).cast_const();
                let to = output.byte(base, output.at(n, 0, 0)).cast_const();
                self.rows(k, [from, to], [input, output], rows);
            }
        });
    }

    /// Rows `rows` of one image. `from` and `to` are where row 0 of input and output is, or would be if it were there; the views tell
    /// how rows and pixels lie.
    ///
    /// # Safety
    /// The rows under the windows are there, and room for the output's.
    pub unsafe fn rows(
        &self,
        k: &Kernels,
        [from, to]: [*const u8; 2],
        [input, output]: [&View; 2],
        rows: Range<usize>,
    ) {
        let args = PoolArgs {
            storage: input.storage,
            input: from,
            in_row: input.row,
            in_pixel: input.pixel,
            in_size: [input.shape.h, input.shape.w],
            kernel: self.kernel,
            stride: self.stride,
            pad: self.pad,
            output: to.cast_mut(),
            out_row: output.row,
            out_pixel: output.pixel,
            width: output.shape.w,
            channels: output.shape.c,
        };
        // SAFETY: the caller's contract.
        unsafe { (k.max_pool)(&args, rows) };
    }
}

/// Interpolates to the output's size with the tables of [`blends`].
///
/// # Safety
/// As [`PoolOp::run`]; the tables index rows and columns of the input.
pub(crate) unsafe fn resize(
    k: &Kernels,
    base: *mut u8,
    [rows, columns]: [&[Blend]; 2],
    input: &View,
    output: &View,
    part: &Part,
) {
    part.each([output.shape.h, output.shape.w], |n, range, asked| {
        // SAFETY: the caller's contract.
        unsafe {
            let args = ResizeArgs {
                storage: input.storage,
                input: input.byte(base, input.at(n, 0, 0)),
                in_row: input.row,
                in_pixel: input.pixel,
                rows,
                columns: &columns[asked.clone()],
                output: output.byte(base, output.at(n, 0, asked.start)),
                out_row: output.row,
                out_pixel: output.pixel,
                channels: output.shape.c,
            };
            (k.resize)(&args, range);
        }
    });
}

/// `output = activation(a [+ b])`: a sum, a copy, a crop, between tensors that may be stored in different ways.
pub(crate) struct AddOp {
    /// Result = max(x, slope * x).
    pub slope: f32,
    /// First row and column of `a` that are read.
    pub corner: [usize; 2],
    /// `b` may be of another size: it is resized to the output's, nearest.
    pub resizes: bool,
    /// Of `a`, `b` (where there is one) and the output.
    pub formats: [Format; 3],
}

/// Copies a dense map of f32 of up to [`WIDENED`] channels to one of bf16 of so many, zeros behind its own. Having one is proof that
/// the CPU has AMX.
pub(crate) struct WidenOp(());

impl WidenOp {
    /// None where there is no AMX.
    pub fn new(isa: Isa) -> Option<Self> {
        isa.has_tiles().then_some(Self(()))
    }

    /// Computes this thread's part of the output.
    ///
    /// # Safety
    /// As [`PoolOp::run`]; the input's pixels lie one behind the other, the output's too.
    pub unsafe fn run(&self, base: *mut u8, input: &View, output: &View, part: &Part) {
        part.each([output.shape.h, output.shape.w], |n, rows, columns| {
            for y in rows {
                // SAFETY: the caller's contract; the CPU has AMX.
                unsafe {
                    let from = input.byte(base, input.at(n, y, columns.start)).cast::<f32>();
                    let to = output.byte(base, output.at(n, y, columns.start)).cast::<u16>();
                    #[cfg(target_arch = "x86_64")]
                    super::kernels::amx::widen(from, input.shape.c, to, columns.len());
                    #[cfg(not(target_arch = "x86_64"))]
                    unreachable!("without AMX there is no such op: {from:?}, {to:?}");
                }
            }
        });
    }
}

impl AddOp {
    /// Computes this thread's part of the output. Of a `b` of another size, its row for every output row and its column for every
    /// column.
    ///
    /// # Safety
    /// As [`PoolOp::run`]; the tables index rows and columns of `b`.
    pub unsafe fn run(
        &self,
        k: &Kernels,
        base: *mut u8,
        a: &View,
        b: Option<&View>,
        [b_rows, b_columns]: [&[u32]; 2],
        output: &View,
        part: &Part,
    ) {
        let [of_a, of_b, of_output] = &self.formats;
        let operand = |v: &View, format: &Format, values: *const u8| Operand {
            storage: v.storage,
            values,
            row: v.row,
            pixel: v.pixel,
            scale: format.scale / of_output.scale,
            zero: format.zero.into(),
        };
        part.each([output.shape.h, output.shape.w], |n, rows, columns| {
            // SAFETY: the caller's contract.
            unsafe {
                let from = a.at(n, self.corner[0], self.corner[1] + columns.start);
                let a = operand(a, of_a, a.byte(base, from));
                // By the table, where there is one, else as the output's.
                let (b_columns, first) = match b_columns.get(columns.clone()) {
                    Some(table) => (table, 0),
                    None => (&[][..], columns.start),
                };
                let args = RowArgs {
                    a,
                    b: match b {
                        Some(b) => operand(b, of_b, b.byte(base, b.at(n, 0, first))),
                        None => Operand { values: std::ptr::null(), ..a },
                    },
                    b_rows,
                    b_columns,
                    storage: output.storage,
                    output: output.byte(base, output.at(n, 0, columns.start)),
                    out_row: output.row,
                    out_pixel: output.pixel,
                    width: columns.len(),
                    channels: output.shape.c,
                    slope: self.slope,
                    zero: of_output.zero.into(),
                };
                (k.rows)(&args, rows);
            }
        });
    }
}

/// Applies `f` to every pixel's channels: copied to the output, then changed in place.
///
/// # Safety
/// As [`PoolOp::run`].
pub(crate) unsafe fn per_pixel(
    base: *mut f32,
    input: &View,
    output: &View,
    part: &Part,
    mut f: impl FnMut(&mut [f32]),
) {
    let c = output.shape.c;
    part.each([output.shape.h, output.shape.w], |n, rows, columns| {
        for y in rows {
            for x in columns.clone() {
                // SAFETY: the caller's contract; one pixel of each view.
                let pixel = unsafe {
                    let to = base.add(output.at(n, y, x));
                    std::ptr::copy_nonoverlapping(base.add(input.at(n, y, x)), to, c);
                    std::slice::from_raw_parts_mut(to, c)
                };
                f(pixel);
            }
        }
    });
}

/// 1 / (1 + e^-x) of every value.
///
/// # Safety
/// As [`PoolOp::run`].
pub(crate) unsafe fn sigmoids(k: &Kernels, base: *mut f32, input: &View, output: &View, part: &Part) {
    let c = output.shape.c;
    let dense = (input.pixel, output.pixel) == (c, c);
    part.each([output.shape.h, output.shape.w], |n, rows, columns| {
        for y in rows {
            // A row's values at once where they lie side by side.
            let runs = if dense { columns.start..columns.start + 1 } else { columns.clone() };
            let run = if dense { columns.len() * c } else { c };
            for x in runs {
                // SAFETY: the caller's contract; pixels of each view.
                unsafe {
                    (k.sigmoid)(base.add(input.at(n, y, x)).cast_const(), base.add(output.at(n, y, x)), run);
                }
            }
        }
    });
}

/// 1 / (1 + e^-x).
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// Softmax of one run of logits, in place.
pub(crate) fn softmax(run: &mut [f32]) {
    let max = run.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    for v in run.iter_mut() {
        *v = (*v - max).exp();
        sum += *v;
    }
    for v in run.iter_mut() {
        *v /= sum;
    }
}

/// Mean over rows and columns; images are shared between the threads.
///
/// # Safety
/// As [`PoolOp::run`]; the output is N x C x 1 x 1.
pub(crate) unsafe fn global_avg_pool(base: *mut f32, input: &View, output: &View, team: &Team) {
    let s = input.shape;
    for n in team.share(s.n) {
        // SAFETY: the caller's contract.
        unsafe {
            let sum = std::slice::from_raw_parts_mut(base.add(output.at(n, 0, 0)), s.c);
            sum.fill(0.0);
            for y in 0..s.h {
                for x in 0..s.w {
                    let pixel = std::slice::from_raw_parts(base.add(input.at(n, y, x)), s.c);
                    sum.iter_mut().zip(pixel).for_each(|(s, v)| *s += v);
                }
            }
            sum.iter_mut().for_each(|v| *v /= (s.h * s.w) as f32);
        }
    }
}

/// A transposed convolution.
pub(crate) struct ConvTransposeOp {
    pub kernel: [usize; 2],
    pub stride: [usize; 2],
    /// Taken off the output above and to the left.
    pub pad: [usize; 2],
    pub groups: usize,
    pub in_channels: usize,
    pub out_channels: usize,
    /// `[kh][kw][in][out/groups]`.
    weights: Arena,
    bias: Arena,
}

impl ConvTransposeOp {
    /// Packs `weight` `[in, out/groups, kh, kw]` and `bias` `[out]`.
    pub fn new(
        kernel: [usize; 2],
        stride: [usize; 2],
        pad: [usize; 2],
        groups: usize,
        [in_channels, out_channels]: [usize; 2],
        weight: &[f32],
        bias: &[f32],
    ) -> Self {
        let (taps, co) = (kernel[0] * kernel[1], out_channels / groups);
        assert_eq!(weight.len(), in_channels * co * taps);
        let mut packed = Vec::with_capacity(weight.len());
        for t in 0..taps {
            for i in 0..in_channels {
                packed.extend((0..co).map(|o| weight[(i * co + o) * taps + t]));
            }
        }
        let (weights, bias) = (Arena::from_slice(&packed), Arena::from_slice(bias));
        Self { kernel, stride, pad, groups, in_channels, out_channels, weights, bias }
    }

    /// Bytes of packed weights.
    pub fn bytes(&self) -> usize {
        self.weights.bytes() + self.bias.bytes()
    }

    /// Gathers this thread's share of the output rows: out(y) takes input (y + pad - ky) / stride
    /// where that is whole and inside.
    ///
    /// # Safety
    /// As [`PoolOp::run`].
    pub unsafe fn run(&self, base: *mut f32, input: &View, output: &View, team: &Team) {
        let (ci, co) = (self.in_channels / self.groups, self.out_channels / self.groups);
        let (weights, bias) = (self.weights.floats(), self.bias.floats());
        let source = |out: usize, k: usize, axis: usize, size: usize| {
            let at = (out + self.pad[axis]).checked_sub(k)?;
            (at % self.stride[axis] == 0 && at / self.stride[axis] < size).then_some(at / self.stride[axis])
        };
        for_images(team.share(output.shape.n * output.shape.h), output.shape.h, |n, rows| {
            for y in rows {
                for x in 0..output.shape.w {
                    // SAFETY: the caller's contract; one output pixel.
                    let out = unsafe {
                        std::slice::from_raw_parts_mut(base.add(output.at(n, y, x)), self.out_channels)
                    };
                    out.copy_from_slice(&bias[..self.out_channels]);
                    for ky in 0..self.kernel[0] {
                        let Some(iy) = source(y, ky, 0, input.shape.h) else { continue };
                        for kx in 0..self.kernel[1] {
                            let Some(ix) = source(x, kx, 1, input.shape.w) else { continue };
                            // SAFETY: the caller's contract; one input pixel, not the output's.
                            let pixel = unsafe {
                                std::slice::from_raw_parts(base.add(input.at(n, iy, ix)), self.in_channels)
                            };
                            let tap = (ky * self.kernel[1] + kx) * self.in_channels * co;
                            for (i, &v) in pixel.iter().enumerate() {
                                let w = &weights[tap + i * co..][..co];
                                let g = i / ci * co;
                                out[g..g + co].iter_mut().zip(w).for_each(|(o, w)| *o += v * w);
                            }
                        }
                    }
                }
            }
        });
    }
}

/// RoIAlign geometry; semantics of torchvision's `roi_align`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RoiAlignOp {
    pub output: [usize; 2],
    pub spatial_scale: f32,
    pub sampling_ratio: usize,
    pub aligned: bool,
}

/// Samples a bin may take along one axis: boxes are data, and data must not make the work unbounded.
const MAX_SAMPLES: usize = 256;

/// The bins of one box, in cells of the map.
pub(crate) struct Bins {
    /// Top left corner: y, x.
    start: [f32; 2],
    /// Height and width of a bin.
    bin: [f32; 2],
    samples: [usize; 2],
}

impl RoiAlignOp {
    /// The bins of the box with these corners, pixels.
    pub fn bins(&self, corners: [f32; 4]) -> Bins {
        let offset = if self.aligned { 0.5 } else { 0.0 };
        let [x1, y1, x2, y2] = corners.map(|v| v * self.spatial_scale - offset);
        // Without `aligned`, a box is at least one cell wide and high; with it, a box may be inside out.
        let size = [y2 - y1, x2 - x1].map(|v| if self.aligned { v } else { v.max(1.0) });
        let bin: [f32; 2] = std::array::from_fn(|a| size[a] / self.output[a] as f32);
        let samples = bin.map(|bin| match self.sampling_ratio {
            0 => (bin.ceil() as usize).min(MAX_SAMPLES),
            ratio => ratio,
        });
        Bins { start: [y1, x1], bin, samples }
    }

    /// Computes this thread's share of the boxes. A box naming an image that is not there gives zeros.
    ///
    /// # Safety
    /// As [`PoolOp::run`]; `boxes` is R x 5 x 1 x 1.
    pub unsafe fn run(&self, base: *mut f32, input: &View, boxes: &View, output: &View, team: &Team) {
        let c = input.shape.c;
        for r in team.share(boxes.shape.n) {
            // SAFETY: the caller's contract; one box.
            let b = unsafe { std::slice::from_raw_parts(base.add(boxes.at(r, 0, 0)), 5) };
            let n = b[0] as usize;
            let bins = self.bins([b[1], b[2], b[3], b[4]]);
            for py in 0..self.output[0] {
                for px in 0..self.output[1] {
                    // SAFETY: the caller's contract; one output pixel.
                    let out = unsafe { std::slice::from_raw_parts_mut(base.add(output.at(r, py, px)), c) };
                    if !(b[0] >= 0.0 && n < input.shape.n) {
                        out.fill(0.0);
                        continue;
                    }
                    // SAFETY: the cells of a mean lie on the map.
                    let pixel = |y, x| unsafe { std::slice::from_raw_parts(base.add(input.at(n, y, x)), c) };
                    bins.mean([py, px], [input.shape.h, input.shape.w], pixel, out);
                }
            }
        }
    }
}

impl Bins {
    /// Mean over the samples of bin (`py`, `px`) on a map of `h` x `w` cells, whose channels `pixel(y, x)` shows.
    pub fn mean<'a>(
        &self,
        [py, px]: [usize; 2],
        [h, w]: [usize; 2],
        pixel: impl Fn(usize, usize) -> &'a [f32],
        out: &mut [f32],
    ) {
        let Self { start: [y1, x1], bin, samples } = self;
        let count = (samples[0] * samples[1]).max(1) as f32;
        out.fill(0.0);
        for iy in 0..samples[0] {
            let y = y1 + (py as f32 + (iy as f32 + 0.5) / samples[0] as f32) * bin[0];
            for ix in 0..samples[1] {
                let x = x1 + (px as f32 + (ix as f32 + 0.5) / samples[1] as f32) * bin[1];
                for (yi, xi, weight) in corners(y, x, h, w) {
                    out.iter_mut().zip(pixel(yi, xi)).for_each(|(o, v)| *o += weight * v);
                }
            }
        }
        out.iter_mut().for_each(|v| *v /= count);
    }
}

/// The four pixels around (y, x) with their bilinear weights; all weights 0 more than a pixel outside.
fn corners(y: f32, x: f32, h: usize, w: usize) -> [(usize, usize, f32); 4] {
    let inside = y >= -1.0 && y <= h as f32 && x >= -1.0 && x <= w as f32;
    if !inside {
        return [(0, 0, 0.0); 4];
    }
    let split = |v: f32, size: usize| {
        let v = v.max(0.0);
        let low = (v as usize).min(size - 1);
        if low == size - 1 {
            (low, low, 0.0)
        } else {
            (low, low + 1, v - low as f32)
        }
    };
    let (y0, y1, ty) = split(y, h);
    let (x0, x1, tx) = split(x, w);
    [
        (y0, x0, (1.0 - ty) * (1.0 - tx)),
        (y0, x1, (1.0 - ty) * tx),
        (y1, x0, ty * (1.0 - tx)),
        (y1, x1, ty * tx),
    ]
}

/// Zeroes this thread's share of a view's halo (its own channels only, so that the writers of a
/// concatenation each zero theirs).
///
/// # Safety
/// `base` is an arena in which the view lies, and no other thread uses the halo meanwhile.
pub(crate) unsafe fn zero_halo(base: *mut u8, view: &View, team: &Team) {
    let [top, left, bottom, right] = view.halo;
    if view.halo == [0; 4] {
        return;
    }
    let s = view.shape;
    let wide = left + s.w + right;
    for_images(team.share(s.n * s.h), s.h, |n, rows| {
        // SAFETY: the caller's contract: positions in the halo of image n.
        let zero = |y: isize, x: isize, pixels: usize| unsafe {
            let at = view.at(n, 0, 0) as isize + y * view.row as isize + x * view.pixel as isize;
            let bytes = view.storage.bytes();
            let p = base.offset(at * bytes as isize);
            if view.pixel == s.c {
                std::ptr::write_bytes(p, view.zero, pixels * s.c * bytes);
            } else {
                (0..pixels).for_each(|i| {
                    std::ptr::write_bytes(p.add(i * view.pixel * bytes), view.zero, s.c * bytes)
                });
            }
        };
        let from = -(left as isize);
        if rows.start == 0 {
            (1..=top as isize).for_each(|y| zero(-y, from, wide));
        }
        for y in rows.clone() {
            zero(y as isize, from, left);
            zero(y as isize, s.w as isize, right);
        }
        if rows.end == s.h {
            (0..bottom).for_each(|y| zero((s.h + y) as isize, from, wide));
        }
    });
}
