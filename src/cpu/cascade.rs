//! Steps one behind the other as one: a thread computes some rows of the first into memory of its own and takes them on while they are
//! in its cache; the maps between them are never whole. Rows that the next band's windows see again stay; where a thread's share
//! begins, those above it are computed once more.

use super::arena::{Format, View};
use super::conv::{ConvOp, ConvTables};
use super::depthwise::DepthwiseOp;
use super::kernels::Kernels;
use super::simple::PoolOp;
use super::threads::{for_images, Team};
use crate::shape::{conv_out, Shape};
use std::ops::Range;
use std::sync::Arc;

/// Bytes of rows between the steps that a thread aims to hold: a share of a second-level cache.
const BAND_BYTES: usize = 96 << 10;
/// Most steps.
pub(crate) const MAX_STAGES: usize = 8;

/// A step of which some rows can be computed.
#[derive(Clone)]
pub(crate) enum Stage {
    Conv(Arc<ConvOp>),
    Depthwise(Arc<DepthwiseOp>),
    /// And how its input and output are stored.
    MaxPool(PoolOp, Format),
}

impl Stage {
    /// Kernel, stride, dilation and padding above and to the left.
    fn window(&self) -> [[usize; 2]; 4] {
        match self {
            Self::Conv(c) => c.window.sides(),
            Self::Depthwise(d) => d.window.sides(),
            Self::MaxPool(p, _) => [p.kernel, p.stride, [1, 1], p.pad],
        }
    }

    /// Pixels around its input that must be zeros: top, left, bottom, right. Pooling stays inside.
    pub fn halo(&self) -> [usize; 4] {
        match self {
            Self::Conv(c) => c.window.padding,
            Self::Depthwise(d) => d.window.padding,
            Self::MaxPool(..) => [0; 4],
        }
    }

    pub fn formats(&self) -> [Format; 2] {
        match self {
            Self::Conv(c) => [c.formats.input, c.formats.output],
            Self::Depthwise(d) => d.formats,
            Self::MaxPool(_, format) => [*format; 2],
        }
    }

    /// Whether it makes such an output of such an input.
    fn fits(&self, from: Shape, to: Shape) -> bool {
        let [kernel, stride, dilation, pad] = self.window();
        let size = [from.h, from.w];
        let channels = match self {
            Self::Conv(c) => (from.c, to.c) == (c.in_channels, c.out_channels) && c.groups == 1,
            Self::Depthwise(d) => (from.c, to.c) == (d.channels, d.channels),
            Self::MaxPool(..) => from.c == to.c,
        };
        let [_, _, bottom, right] = self.halo();
        let side = |a: usize, out: usize, after: usize| match self {
            // Every window must touch the map.
            Self::MaxPool(..) => pad[a] < kernel[a] && (out - 1) * stride[a] < size[a] + pad[a],
            _ => conv_out(size[a], kernel[a], stride[a], dilation[a], pad[a], after) == Some(out),
        };
        channels && from.n == to.n && side(0, to.h, bottom) && side(1, to.w, right)
    }

    /// Rows of an input of `height` that these rows of the output are made of; of a convolution those beyond the map too.
    fn reads(&self, rows: &Range<usize>, height: usize) -> Range<isize> {
        let [[kernel, _], [stride, _], [dilation, _], [pad, _]] = self.window();
        let first = (rows.start * stride) as isize - pad as isize;
        let last = ((rows.end - 1) * stride + dilation * (kernel - 1)) as isize - pad as isize;
        match self {
            Self::MaxPool(..) => first.max(0)..(last + 1).min(height as isize),
            _ => first..last + 1,
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Conv(c) => c.bytes(),
            Self::Depthwise(d) => d.bytes(),
            Self::MaxPool(..) => 0,
        }
    }

    fn is(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Conv(a), Self::Conv(b)) => Arc::ptr_eq(a, b),
            (Self::Depthwise(a), Self::Depthwise(b)) => Arc::ptr_eq(a, b),
            (Self::MaxPool(a, f), Self::MaxPool(b, g)) => (a, f) == (b, g),
            _ => false,
        }
    }
}

/// Two to [`MAX_STAGES`] steps, each reading what the one before it writes. The last may add a residual.
pub(crate) struct CascadeOp {
    pub stages: Vec<Stage>,
}

/// What a cascade needs beyond the views, made once a plan.
pub(crate) struct CascadeTables {
    /// Of the stages that are convolutions.
    conv: Vec<Option<ConvTables>>,
    /// What lies between stage i and the next.
    between: Vec<Between>,
    /// Rows of the output at a time.
    band: usize,
}

/// Some rows of a map.
struct Between {
    /// Size of the whole map, and how rows and pixels lie.
    view: View,
    /// Rows there is room for.
    rows: usize,
    /// First byte in the thread's memory.
    offset: usize,
}

impl CascadeTables {
    /// Bytes of memory that each thread needs.
    pub fn scratch(&self) -> usize {
        self.between.last().map_or(0, |b| b.offset + b.bytes())
    }

    /// Heap bytes held.
    pub fn bytes(&self) -> usize {
        self.conv.iter().flatten().map(ConvTables::bytes).sum::<usize>()
            + self.conv.capacity() * size_of::<Option<ConvTables>>()
            + self.between.capacity() * size_of::<Between>()
    }
}

impl Between {
    fn bytes(&self) -> usize {
        (self.rows * self.view.row * self.view.storage.bytes()).next_multiple_of(64)
    }
}

impl CascadeOp {
    /// Whether it is made of the same steps.
    pub fn is(&self, other: &Self) -> bool {
        self.stages.len() == other.stages.len() && self.stages.iter().zip(&other.stages).all(|(a, b)| a.is(b))
    }

    /// Bytes of packed weights.
    pub fn bytes(&self) -> usize {
        self.stages.iter().map(Stage::bytes).sum()
    }

    /// Whether the stages make `output` of `input` by way of these.
    pub fn fits(&self, input: &View, between: &[Shape], output: Shape) -> bool {
        let shapes: Vec<Shape> =
            [input.shape].into_iter().chain(between.iter().copied()).chain([output]).collect();
        let halo = self.stages[0].halo();
        shapes.len() == self.stages.len() + 1
            && (2..=MAX_STAGES).contains(&self.stages.len())
            && (0..4).all(|side| input.halo[side] >= halo[side])
            && self.stages.iter().zip(shapes.windows(2)).all(|(stage, s)| stage.fits(s[0], s[1]))
            && self.stages.windows(2).all(|s| s[0].formats()[1] == s[1].formats()[0])
    }

    /// Tables for these views and the shapes between the stages.
    pub fn prepare(
        &self,
        input: &View,
        between: &[Shape],
        add: Option<&View>,
        output: &View,
    ) -> CascadeTables {
        let rows_for = |band: usize| -> Vec<usize> {
            let mut rows = vec![band; between.len()];
            let mut next = band;
            for i in (0..between.len()).rev() {
                let [[kernel, _], [stride, _], [dilation, _], _] = self.stages[i + 1].window();
                next = (next - 1) * stride + dilation * (kernel - 1) + 1;
                rows[i] = next;
            }
            rows
        };
        let view = |i: usize| {
            let ([_, left, _, right], format) = (self.stages[i + 1].halo(), self.stages[i].formats()[1]);
            View::stored(format.storage, format.zero, between[i], 0, [0, left, 0, right])
        };
        let place = |band: usize| -> Vec<Between> {
            let mut offset = 0;
            let rows = rows_for(band).into_iter().enumerate();
            rows.map(|(i, rows)| {
                let b = Between { view: view(i), rows, offset };
                offset += b.bytes();
                b
            })
            .collect()
        };
        let bytes = |band: usize| place(band).iter().map(Between::bytes).sum::<usize>();
        let mut band = 1;
        while band < output.shape.h && bytes(band + 1) <= BAND_BYTES {
            band += 1;
        }
        let between = place(band);
        let last = self.stages.len() - 1;
        let source = |i: usize| if i == 0 { input } else { &between[i - 1].view };
        let target = |i: usize| if i == last { output } else { &between[i].view };
        let tables = |(i, stage): (usize, &Stage)| match stage {
            Stage::Conv(c) => Some(c.prepare(source(i), add.filter(|_| i == last), target(i))),
            _ => None,
        };
        let conv = self.stages.iter().enumerate().map(tables).collect();
        CascadeTables { conv, between, band }
    }

    /// Computes this thread's share of the output rows.
    ///
    /// # Safety
    /// As [`ConvOp::run`], for the input of the first, the residual of the last and its output; `scratch` has
    /// [`CascadeTables::scratch`] bytes that are this thread's.
    pub unsafe fn run(
        &self,
        k: &Kernels,
        base: *mut u8,
        scratch: *mut u8,
        tables: &CascadeTables,
        [input, output]: [&View; 2],
        add: Option<&View>,
        team: &Team,
    ) {
        let s = output.shape;
        let last = self.stages.len() - 1;
        for_images(team.share(s.n * s.h), s.h, |n, share: Range<usize>| {
            // Rows that each buffer holds.
            let mut have: [Range<isize>; MAX_STAGES] = std::array::from_fn(|_| 0..0);
            let mut begun = false;
            for first in share.clone().step_by(tables.band) {
                // Rows that each stage has to compute, from what the last is to.
                let mut new: [Range<usize>; MAX_STAGES] = std::array::from_fn(|_| 0..0);
                new[last] = first..(first + tables.band).min(share.end);
                for i in (0..last).rev() {
                    if new[i + 1].is_empty() {
                        continue;
                    }
                    let b = &tables.between[i];
                    let height = b.view.shape.h;
                    let need = self.stages[i + 1].reads(&new[i + 1], height);
                    let held = if begun { have[i].clone() } else { need.start..need.start };
                    // SAFETY: rows of the buffer, which is this thread's.
                    unsafe { b.keep(scratch, &held, need.start) };
                    let fresh = held.end.max(need.start)..need.end.max(held.end.max(need.start));
                    have[i] = need.start..fresh.end;
                    debug_assert!(have[i].len() <= b.rows);
                    let inside = |row: isize| row.clamp(0, height as isize) as usize;
                    new[i] = inside(fresh.start)..inside(fresh.end);
                    // SAFETY: as above.
                    unsafe { b.zero(scratch, &have[i], &fresh) };
                }
                begun = true;
                for (i, stage) in self.stages.iter().enumerate() {
                    let rows = new[i].clone();
                    if rows.is_empty() {
                        continue;
                    }
                    // SAFETY: the caller's contract; the buffers hold the rows that these are made of, and have room for these.
                    unsafe {
                        let (from, source) = match i {
                            0 => (input.byte(base, input.at(n, 0, 0)).cast_const(), input),
                            _ => (
                                tables.between[i - 1].row_zero(scratch, &have[i - 1]).cast_const(),
                                &tables.between[i - 1].view,
                            ),
                        };
                        let (to, target) = if i == last {
                            (output.byte(base, output.at(n, 0, 0)), output)
                        } else {
                            (tables.between[i].row_zero(scratch, &have[i]), &tables.between[i].view)
                        };
                        let views = [source, target];
                        match (stage, &tables.conv[i]) {
                            (Stage::Conv(c), Some(t)) => {
                                let add = add.filter(|_| i == last);
                                let added = add.map(|v| (v.byte(base, v.at(n, 0, 0)).cast_const(), v));
                                c.rows(t, [from, to.cast_const()], views, added, rows, i == 0);
                            }
                            (Stage::Depthwise(d), _) => d.rows([from, to.cast_const()], views, rows),
                            (Stage::MaxPool(p, _), _) => p.rows(k, [from, to.cast_const()], views, rows),
                            (Stage::Conv(_), None) => unreachable!("tables are made with the step"),
                        }
                    }
                }
            }
        });
    }
}

impl Between {
    fn row_bytes(&self) -> usize {
        self.view.row * self.view.storage.bytes()
    }

    /// Where the first pixel of the map's row 0 is, or would be, if the buffer begins with row `have.start`: for arithmetic alone.
    fn row_zero(&self, scratch: *mut u8, have: &Range<isize>) -> *mut u8 {
        let left = self.view.halo[1] * self.view.pixel * self.view.storage.bytes();
        let first = scratch.wrapping_add(self.offset + left);
        first.wrapping_offset(-have.start * self.row_bytes() as isize)
    }

    /// Moves the rows from `start` on that are held to the beginning.
    ///
    /// # Safety
    /// The buffer is in `scratch` and nobody else uses it; it holds these rows.
    unsafe fn keep(&self, scratch: *mut u8, held: &Range<isize>, start: isize) {
        let (skip, left) = (start - held.start, held.end - start);
        if skip <= 0 || left <= 0 {
            return;
        }
        // SAFETY: the caller's contract.
        unsafe {
            let first = scratch.add(self.offset);
            std::ptr::copy(
                first.add(skip as usize * self.row_bytes()),
                first,
                left as usize * self.row_bytes(),
            );
        }
    }

    /// Makes zeros of what of the fresh rows lies outside the map.
    ///
    /// # Safety
    /// As [`Between::keep`]; there is room for the fresh rows.
    unsafe fn zero(&self, scratch: *mut u8, have: &Range<isize>, fresh: &Range<isize>) {
        let (v, row) = (&self.view, self.row_bytes());
        let [_, left, _, right] = v.halo.map(|pixels| pixels * v.pixel * v.storage.bytes());
        for y in fresh.clone() {
            // SAFETY: the caller's contract.
            unsafe {
                let first = scratch.add(self.offset + (y - have.start) as usize * row);
                if y < 0 || y >= v.shape.h as isize {
                    std::ptr::write_bytes(first, v.zero, row);
                } else {
                    std::ptr::write_bytes(first, v.zero, left);
                    std::ptr::write_bytes(first.add(row - right), v.zero, right);
                }
            }
        }
    }
}
