//! A validated list of steps over one arena: the safe face of the kernels.
//!
//! [`Program::new`] checks that every view lies inside the arena, that shapes and halos are what
//! each step needs, and that no step's output overlaps an input. Running it is therefore safe.

use super::arena::{Arena, Format, Storage, View};
use super::cascade::{CascadeOp, CascadeTables, Stage};
use super::conv::{residual_tables, ConvOp, ConvTables, Formats};
use super::depthwise::DepthwiseOp;
use super::isa::Isa;
use super::kernels::simple::Blend;
use super::kernels::Kernels;
use super::part::{Mask, Part};
use super::simple::{self, blends, AddOp, ConvTransposeOp, PoolOp, RoiAlignOp, WidenOp};
use super::threads::{Pool, Team};
use super::winograd::WinogradOp;
use crate::error::{Error, Result};
use crate::shape::{conv_out, conv_transpose_out, Shape};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What a step computes. Independent of sizes, so that plans for several input shapes share one
/// copy of the packed weights.
pub struct Op(pub(crate) Kind);

pub(crate) enum Kind {
    Conv(Arc<ConvOp>),
    Winograd(WinogradOp),
    Depthwise(Arc<DepthwiseOp>),
    Cascade(CascadeOp),
    ConvTranspose(ConvTransposeOp),
    MaxPool(PoolOp),
    GlobalAvgPool,
    Resize {
        bilinear: bool,
    },
    /// `activation(a + b)`, or of `a` alone.
    Add(AddOp),
    /// A network's input in bf16, with channels of zeros behind its own.
    Widen(WidenOp),
    /// The part of the first input from a row and column on; the second input only gives the size.
    Crop(AddOp),
    Sigmoid,
    Softmax(usize),
    RoiAlign(RoiAlignOp),
}

/// The name of a kernel by what it reads: `name`, and of other values than f32 their name behind it.
macro_rules! named {
    ($storage:expr, $name:literal, $between:literal $(, $end:literal)?) => {
        match $storage {
            Storage::F32 => $name,
            Storage::Bf16 => concat!($name, $between, "bf16" $(, $end)?),
            Storage::F16 => concat!($name, $between, "f16" $(, $end)?),
            Storage::U8 => concat!($name, $between, "int8" $(, $end)?),
        }
    };
}

impl Op {
    /// Kernel name for listings.
    pub fn name(&self) -> &'static str {
        match &self.0 {
            Kind::Conv(c) if c.on_tiles() => match (c.window.kernel, c.formats.input.storage) {
                ([1, 1], s) => named!(s, "conv 1x1", " ", " amx"),
                ([3, 3], s) => named!(s, "conv 3x3", " ", " amx"),
                (_, s) => named!(s, "conv", " ", " amx"),
            },
            Kind::Conv(c) => match (c.window.kernel, c.formats.input.storage) {
                ([1, 1], s) => named!(s, "conv 1x1", " "),
                ([3, 3], s) => named!(s, "conv 3x3", " "),
                (_, s) => named!(s, "conv", " "),
            },
            Kind::Winograd(c) => named!(c.formats.input.storage, "winograd 3x3", " of "),
            Kind::Depthwise(d) => match (d.window.kernel, d.formats[0].storage) {
                ([3, 3], s) => named!(s, "depthwise 3x3", " of "),
                (_, s) => named!(s, "depthwise", " of "),
            },
            Kind::Cascade(c) => match (&c.stages[..], c.stages[c.stages.len() - 1].formats()[0].storage) {
                ([Stage::Depthwise(_), Stage::Conv(_)], s) => named!(s, "depthwise, conv 1x1", " "),
                (stages, s) => match stages.len() {
                    2 => named!(s, "two in bands", ", "),
                    3 => named!(s, "three in bands", ", "),
                    4 => named!(s, "four in bands", ", "),
                    _ => named!(s, "more in bands", ", "),
                },
            },
            Kind::ConvTranspose(_) => "conv transpose",
            Kind::MaxPool(_) => "max pool",
            Kind::GlobalAvgPool => "global average",
            Kind::Resize { bilinear: true } => "bilinear",
            Kind::Resize { bilinear: false } => "nearest",
            Kind::Add(_) => "add/copy",
            Kind::Widen(_) => "widen",
            Kind::Crop(_) => "crop",
            Kind::Sigmoid => "sigmoid",
            Kind::Softmax(_) => "softmax",
            Kind::RoiAlign(_) => "roi align",
        }
    }

    /// Whether it is a convolution over channels.
    pub fn is_dense(&self) -> bool {
        matches!(self.0, Kind::Conv(_) | Kind::Winograd(_))
    }

    /// Bytes of packed weights.
    pub fn bytes(&self) -> usize {
        match &self.0 {
            Kind::Conv(c) => c.bytes(),
            Kind::Winograd(c) => c.bytes(),
            Kind::Depthwise(d) => d.bytes(),
            Kind::Cascade(c) => c.bytes(),
            Kind::ConvTranspose(c) => c.bytes(),
            _ => 0,
        }
    }

    /// Halo that this op needs around its first input: top, left, bottom, right.
    pub fn halo(&self) -> [usize; 4] {
        match &self.0 {
            Kind::Conv(c) => c.window.padding,
            Kind::Depthwise(d) => d.window.padding,
            Kind::Cascade(c) => c.stages[0].halo(),
            _ => [0; 4],
        }
    }

    /// Whether it can compute some pixels of its output without the others.
    pub fn masks(&self) -> bool {
        match &self.0 {
            // Its patches look for asked pixels where the output has the input's places.
            Kind::Winograd(c) => c.padding == [1; 4],
            Kind::Conv(_)
            | Kind::Depthwise(_)
            | Kind::Resize { .. }
            | Kind::Add(_)
            | Kind::Crop(_)
            | Kind::Sigmoid
            | Kind::Softmax(_) => true,
            // Cascades could, but no network asks for part of one.
            _ => false,
        }
    }

    /// Pixels around an output pixel that it reads of its first input: to the top, left, bottom and right. None where pixels of
    /// output and input do not lie at the same places.
    pub fn reads(&self) -> Option<[usize; 4]> {
        let window = match &self.0 {
            Kind::Conv(c) => &c.window,
            Kind::Depthwise(d) => &d.window,
            // What lies farther under an asked pixel's tile is taken for zeros.
            Kind::Winograd(_) if self.masks() => return Some([1; 4]),
            Kind::Add(_) | Kind::Sigmoid | Kind::Softmax(_) => return Some([0; 4]),
            _ => return None,
        };
        let side = |axis: usize| {
            let span = window.dilation[axis] * (window.kernel[axis] - 1);
            // Padding beyond the window would move the map.
            let before = window.padding[axis];
            (window.stride[axis] == 1 && before <= span).then(|| [before, span - before])
        };
        let ([top, bottom], [left, right]) = (side(0)?, side(1)?);
        Some([top, left, bottom, right])
    }

    /// The output shape these inputs must have, where they follow from each other.
    fn check(&self, inputs: &[View], between: &[Shape], out: Shape) -> std::result::Result<(), &'static str> {
        let a = inputs.first().ok_or("no input")?;
        let s = a.shape;
        let windowed = |w: &super::conv::Window, channels: usize| {
            let [t, l, b, r] = w.padding;
            let h = conv_out(s.h, w.kernel[0], w.stride[0], w.dilation[0], t, b);
            let v = conv_out(s.w, w.kernel[1], w.stride[1], w.dilation[1], l, r);
            (Some(out.h), Some(out.w)) == (h, v)
                && out.c == channels
                && out.n == s.n
                && w.fits(a, [out.h, out.w])
        };
        let same_size = |v: &View| (v.shape.n, v.shape.c) == (out.n, out.c);
        let ok = match &self.0 {
            Kind::Conv(c) => {
                windowed(&c.window, c.out_channels)
                    && s.c == c.in_channels
                    && inputs.len() <= 2
                    && inputs.get(1).is_none_or(same_size)
            }
            Kind::Winograd(c) => {
                let [t, l, b, r] = c.padding;
                (Some(out.h), Some(out.w)) == (conv_out(s.h, 3, 1, 1, t, b), conv_out(s.w, 3, 1, 1, l, r))
                    && (s.n, s.c, out.c) == (out.n, c.in_channels, c.out_channels)
                    && inputs.len() <= 2
                    && inputs.get(1).is_none_or(same_size)
            }
            Kind::Depthwise(d) => windowed(&d.window, d.channels) && s.c == d.channels,
            Kind::Cascade(c) => {
                c.fits(a, between, out) && inputs.len() <= 2 && inputs.get(1).is_none_or(same_size)
            }
            Kind::ConvTranspose(c) => {
                let side = |i, a: usize| {
                    let crop = [c.pad[a], 0]; // the far side's crop is whatever the output leaves off
                    conv_transpose_out(i, c.kernel[a], c.stride[a], 1, crop[0], crop[1], 0)
                };
                side(s.h, 0).is_some_and(|h| out.h <= h)
                    && side(s.w, 1).is_some_and(|w| out.w <= w)
                    && (s.n, s.c, out.c) == (out.n, c.in_channels, c.out_channels)
            }
            Kind::MaxPool(p) => {
                // Every window must touch the map.
                let inside = |o: usize, a: usize, size: usize| {
                    p.pad[a] < p.kernel[a] && (o - 1) * p.stride[a] < size + p.pad[a]
                };
                inside(out.h, 0, s.h) && inside(out.w, 1, s.w) && (s.n, s.c) == (out.n, out.c)
            }
            Kind::GlobalAvgPool => out == Shape::new(s.n, s.c, 1, 1),
            Kind::Resize { .. } => (s.n, s.c) == (out.n, out.c),
            Kind::Add(AddOp { resizes, .. }) => {
                let fits = |v: &View| if *resizes { same_size(v) } else { v.shape == out };
                s == out && inputs.len() <= 2 && inputs.get(1).is_none_or(fits)
            }
            Kind::Crop(AddOp { corner, .. }) => {
                let fits = |from: usize, size: usize, all: usize| {
                    from.checked_add(size).is_some_and(|end| end <= all)
                };
                (s.n, s.c) == (out.n, out.c) && fits(corner[0], out.h, s.h) && fits(corner[1], out.w, s.w)
            }
            Kind::Widen(_) => {
                let dense = inputs.len() == 1 && a.pixel == s.c && s.c <= simple::WIDENED;
                dense && Shape { c: simple::WIDENED, ..s } == out
            }
            Kind::Sigmoid => s == out,
            Kind::Softmax(k) => s == out && *k > 0 && s.c % k == 0,
            Kind::RoiAlign(r) => {
                inputs.get(1).is_some_and(|b| b.shape == Shape::new(out.n, 5, 1, 1))
                    && (out.c, out.h, out.w) == (s.c, r.output[0], r.output[1])
            }
        };
        ok.then_some(()).ok_or("shapes or halos do not fit")
    }

    /// Whether inputs and output are stored as this op reads and writes them.
    fn stored(&self, inputs: &[View], output: &View) -> bool {
        let is = |v: &View, format: &Format| (v.storage, v.zero) == (format.storage, format.zero);
        let conv = |f: &Formats| {
            is(&inputs[0], &f.input) && inputs.get(1).is_none_or(|v| is(v, &f.add)) && is(output, &f.output)
        };
        match &self.0 {
            Kind::Conv(c) => conv(&c.formats),
            Kind::Winograd(c) => conv(&c.formats),
            Kind::Depthwise(d) => is(&inputs[0], &d.formats[0]) && is(output, &d.formats[1]),
            Kind::Cascade(c) => {
                let (first, last) = (&c.stages[0], &c.stages[c.stages.len() - 1]);
                let add = if let Stage::Conv(c) = last { c.formats.add } else { Format::F32 };
                conv(&Formats { input: first.formats()[0], add, output: last.formats()[1] })
            }
            Kind::Widen(_) => {
                (inputs[0].storage, output.storage) == (Storage::F32, Storage::Bf16)
                    && output.pixel == simple::WIDENED
            }
            Kind::Add(a) => {
                let [of_a, of_b, of_output] = &a.formats;
                is(&inputs[0], of_a) && inputs.get(1).is_none_or(|v| is(v, of_b)) && is(output, of_output)
            }
            // The second input only gives the size.
            Kind::Crop(a) => is(&inputs[0], &a.formats[0]) && is(output, &a.formats[2]),
            Kind::MaxPool(_) | Kind::Resize { .. } => {
                (inputs[0].storage, inputs[0].zero) == (output.storage, output.zero)
            }
            _ => inputs.iter().chain([output]).all(|v| v.storage == Storage::F32),
        }
    }
}

/// Tables that depend on sizes, made once a plan.
enum Tables {
    None,
    Conv(ConvTables),
    /// Rows and columns of the residual, or of a sum's second input.
    Residual([Vec<u32>; 2]),
    Resize([Vec<Blend>; 2]),
    Cascade(CascadeTables),
}

/// One op on its views.
struct Step {
    op: Arc<Op>,
    inputs: Vec<View>,
    output: View,
    tables: Tables,
    asked: Option<Masked>,
}

/// A step of which the pixels of a mask alone are computed.
#[derive(Clone, Copy)]
struct Masked {
    near: Near,
    /// Nobody before it had this gate: its mask is made first.
    opens: bool,
    /// The step before it had another mask.
    grows: bool,
}

/// Pixels of an output that are at most so far from those where a gate's map says yes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Near {
    /// Number of the gate.
    pub gate: usize,
    /// To the top, left, bottom and right, pixels.
    pub grow: [usize; 4],
}

/// A map of one image that says of which pixels later steps compute anything.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Gate {
    /// The map; must be computed before the first step that asks.
    pub map: View,
    /// Yes is said where any channel is above this.
    pub least: f32,
    /// Where the arena holds its answers, and where those grown for a step; behind all tensors.
    pub masks: [Mask; 2],
}

/// A step to be validated: the op, its inputs, its output.
pub struct StepSpec {
    /// The op.
    pub op: Arc<Op>,
    /// Inputs in the op's order.
    pub inputs: Vec<View>,
    /// Output.
    pub output: View,
    /// Sizes of what lies between the steps of a cascade.
    pub between: Vec<Shape>,
    /// The pixels of the output that are computed, where not all are.
    pub near: Option<Near>,
}

/// A validated program.
pub struct Program {
    steps: Vec<Step>,
    gates: Vec<Gate>,
    inputs: Vec<View>,
    floats: usize,
    kernels: &'static Kernels,
}

impl Program {
    /// Validates `steps` for an arena of `floats` floats; `inputs` are the views the caller fills.
    pub fn new(
        isa: Isa,
        floats: usize,
        inputs: Vec<View>,
        gates: Vec<Gate>,
        steps: Vec<StepSpec>,
    ) -> Result<Self> {
        let inside = |v: &View| {
            let [t, l, _, _] = v.halo;
            !v.shape.is_empty()
                && v.offset >= t * v.row + l * v.pixel
                && v.extent().end <= floats * size_of::<f32>()
                && v.pixel >= v.shape.c
        };
        let bad = |i: usize, what: &str| Error::Internal(format!("step {i}: {what}"));
        if !inputs.iter().all(inside) {
            return Err(bad(0, "a program input lies outside the arena"));
        }
        // Masks lie behind all tensors, a gate's two apart from each other.
        let tensors_end = steps.iter().flat_map(|s| s.inputs.iter().chain([&s.output])).chain(&inputs);
        let tensors_end = tensors_end.map(|v| v.extent().end.div_ceil(size_of::<f32>())).max().unwrap_or(0);
        for gate in &gates {
            let size = [gate.map.shape.h, gate.map.shape.w];
            let [answers, grown] = &gate.masks;
            let fits = |m: &Mask| [m.height, m.width] == size && m.offset >= tensors_end && m.end() <= floats;
            let apart = answers.end() <= grown.offset || grown.end() <= answers.offset;
            let readable = inside(&gate.map) && gate.map.storage == Storage::F32;
            if !(readable && gate.map.shape.n == 1 && fits(answers) && fits(grown) && apart) {
                return Err(bad(0, "a gate's map and masks do not fit"));
            }
        }
        let mut opened = vec![false; gates.len()];
        let mut grown = None;
        let mut checked = Vec::with_capacity(steps.len());
        for (i, s) in steps.into_iter().enumerate() {
            if !s.inputs.iter().chain([&s.output]).all(inside) {
                return Err(bad(i, "a view lies outside the arena"));
            }
            if s.inputs.iter().any(|v| v.overlaps(&s.output)) {
                return Err(bad(i, "the output overlaps an input"));
            }
            s.op.check(&s.inputs, &s.between, s.output.shape).map_err(|why| bad(i, why))?;
            if !s.op.stored(&s.inputs, &s.output) {
                return Err(bad(i, "a tensor is stored in another way"));
            }
            let (a, out) = (s.inputs[0], s.output.shape);
            let tables = match &s.op.0 {
                Kind::Conv(c) => Tables::Conv(c.prepare(&a, s.inputs.get(1), &s.output)),
                Kind::Winograd(_) | Kind::Add(_) => {
                    Tables::Residual(residual_tables(s.inputs.get(1), &s.output))
                }
                Kind::Cascade(c) => Tables::Cascade(c.prepare(&a, &s.between, s.inputs.get(1), &s.output)),
                Kind::Resize { bilinear } => {
                    Tables::Resize([blends(a.shape.h, out.h, *bilinear), blends(a.shape.w, out.w, *bilinear)])
                }
                _ => Tables::None,
            };
            let asked = match s.near {
                None => None,
                Some(near) => {
                    let same_size =
                        |g: &Gate| (out.n, out.h, out.w) == (g.map.shape.n, g.map.shape.h, g.map.shape.w);
                    if !(s.op.masks() && gates.get(near.gate).is_some_and(same_size)) {
                        return Err(bad(i, "cannot be computed in part"));
                    }
                    let opens = !std::mem::replace(&mut opened[near.gate], true);
                    let grows = grown.replace(near) != Some(near);
                    Some(Masked { near, opens, grows })
                }
            };
            checked.push(Step { op: s.op, inputs: s.inputs, output: s.output, tables, asked });
        }
        Ok(Self { steps: checked, gates, inputs, floats, kernels: Kernels::of(isa) })
    }

    /// Floats the arena must hold.
    pub fn floats(&self) -> usize {
        self.floats
    }

    /// Heap bytes of the program itself (tables and steps).
    pub fn bytes(&self) -> usize {
        let tables = |t: &Tables| match t {
            Tables::None => 0,
            Tables::Conv(c) => c.bytes(),
            Tables::Residual(t) => t.iter().map(|v| v.capacity() * size_of::<u32>()).sum(),
            Tables::Cascade(c) => c.bytes(),
            Tables::Resize(b) => b.iter().map(|v| v.capacity() * size_of::<Blend>()).sum(),
        };
        let steps = self.steps.iter().map(|s| tables(&s.tables) + s.inputs.capacity() * size_of::<View>());
        steps.sum::<usize>()
            + self.steps.capacity() * size_of::<Step>()
            + self.gates.capacity() * size_of::<Gate>()
            + self.inputs.capacity() * size_of::<View>()
    }

    /// Floats of memory that each thread of the pool needs beside the arena.
    pub fn scratch(&self) -> usize {
        let of = |s: &Step| match (&s.op.0, &s.tables) {
            (Kind::Winograd(c), _) => c.scratch(s.output.shape),
            // Whole lines, so that each thread's memory begins with one.
            (_, Tables::Cascade(t)) => t.scratch().div_ceil(size_of::<f32>()).next_multiple_of(16),
            _ => 0,
        };
        self.steps.iter().map(of).max().unwrap_or(0)
    }

    /// Number of steps.
    pub fn len(&self) -> usize {
        self.steps.len()
    }

    /// Runs all steps on all threads of the pool.
    pub fn run(&self, arena: &mut Arena, pool: &mut Pool) {
        self.run_timed(arena, pool, None);
    }

    /// As [`Program::run`]; adds every step's wall time to `times` (one a step).
    pub fn run_timed(&self, arena: &mut Arena, pool: &mut Pool, times: Option<&mut [Duration]>) {
        assert!(arena.floats().len() >= self.floats, "arena smaller than the program needs");
        let base = arena.base();
        let each = self.scratch();
        let mut own = pool.take_scratch(each);
        let scratch = own.base();
        let times = times.map(std::sync::Mutex::new);
        pool.run(&|team| {
            for view in &self.inputs {
                // SAFETY: validated views; the interior is not touched.
                unsafe { simple::zero_halo(base.get(), view, team) };
            }
            team.barrier();
            let mut clock = times.as_ref().map(|_| Instant::now());
            for (i, step) in self.steps.iter().enumerate() {
                // SAFETY: Program::new validated the step, whose output overlaps no input; threads write disjoint shares of it and of
                // its mask, and scratch memory of their own; barriers order the making of the mask, and the steps.
                unsafe {
                    let asked = step.asked.map(|asked| self.mask(&asked, base.get().cast(), team));
                    let scratch = scratch.get().add(team.index * each * size_of::<f32>());
                    step.run(self.kernels, [base.get(), scratch], asked.as_ref(), team);
                }
                team.barrier();
                if let (0, Some(times), Some(clock)) = (team.index, &times, &mut clock) {
                    let now = Instant::now();
                    times.lock().unwrap_or_else(|e| e.into_inner())[i] += now - *clock;
                    *clock = now;
                }
            }
        });
        pool.give_scratch(own);
    }
}

impl Program {
    /// Runs all steps, one after the other, all threads of the pool together in each; after every step `watch` is shown its number,
    /// its output and the arena. Masks are not for this.
    pub fn run_watched(
        &self,
        arena: &mut Arena,
        pool: &mut Pool,
        watch: &mut dyn FnMut(usize, &View, &[f32]),
    ) {
        assert!(arena.floats().len() >= self.floats, "arena smaller than the program needs");
        assert!(self.gates.is_empty(), "a program with masks");
        let each = self.scratch();
        let mut own = pool.take_scratch(each);
        let scratch = own.base();
        for (i, step) in self.steps.iter().enumerate() {
            let base = arena.base();
            pool.run(&|team| {
                // SAFETY: Program::new validated the step and the inputs; each job ends before the next begins.
                unsafe {
                    if i == 0 {
                        self.inputs.iter().for_each(|view| simple::zero_halo(base.get(), view, team));
                        team.barrier();
                    }
                    let scratch = scratch.get().add(team.index * each * size_of::<f32>());
                    step.run(self.kernels, [base.get(), scratch], None, team);
                }
            });
            watch(i, &step.output, arena.floats());
        }
        pool.give_scratch(own);
    }

    /// This thread's part of what a step is asked for; makes its mask where it is not there.
    ///
    /// # Safety
    /// As [`Step::run`], for a step of this program.
    unsafe fn mask<'a>(&'a self, asked: &Masked, base: *mut f32, team: &Team) -> Part<'a> {
        let gate = &self.gates[asked.near.gate];
        let [answers, grown] = &gate.masks;
        // SAFETY: validated: map and masks lie in the arena, apart; barriers between writing and reading.
        unsafe {
            if asked.opens {
                answers.set_above(base, &gate.map, gate.least, team);
                team.barrier();
            }
            if asked.grows {
                grown.set_grown(base, answers, asked.near.grow, team);
                team.barrier();
            }
            Part::of_mask(grown, base, team)
        }
    }
}

impl Step {
    /// This thread's share of the output, or of what is `asked` for of it.
    ///
    /// # Safety
    /// `base` is an arena of the program that validated this step, `scratch` the memory that it needs of this thread; all
    /// threads of the team call this together, and none is still in another step.
    unsafe fn run(&self, k: &Kernels, [base, scratch]: [*mut u8; 2], asked: Option<&Part>, team: &Team) {
        let (a, out) = (&self.inputs[0], &self.output);
        let b = self.inputs.get(1);
        let rows = Part::rows(out.shape.n, out.shape.h, team);
        let part = asked.unwrap_or(&rows);
        let floats = base.cast::<f32>();
        // SAFETY: the caller's contract is each callee's.
        unsafe {
            match (&self.op.0, &self.tables) {
                (Kind::Conv(c), Tables::Conv(t)) => c.run(base, t, [a, out], b, asked, team),
                (Kind::Winograd(c), Tables::Residual(t)) => {
                    c.run(base, scratch.cast(), t, [a, out], b, asked, team)
                }
                (Kind::Cascade(c), Tables::Cascade(t)) => c.run(k, base, scratch, t, [a, out], b, team),
                (Kind::Depthwise(d), _) => d.run(base, a, out, part),
                (Kind::ConvTranspose(c), _) => c.run(floats, a, out, team),
                (Kind::MaxPool(p), _) => p.run(k, base, a, out, team),
                (Kind::GlobalAvgPool, _) => simple::global_avg_pool(floats, a, out, team),
                (Kind::Resize { .. }, Tables::Resize([r, c])) => {
                    simple::resize(k, base, [r, c], a, out, part)
                }
                (Kind::Add(op), Tables::Residual([rows, columns])) => {
                    op.run(k, base, a, b, [rows, columns], out, part)
                }
                (Kind::Widen(op), _) => op.run(base, a, out, part),
                (Kind::Crop(op), _) => op.run(k, base, a, None, [&[]; 2], out, part),
                (Kind::Sigmoid, _) => simple::sigmoids(k, floats, a, out, part),
                (Kind::Softmax(n), _) => simple::per_pixel(floats, a, out, part, |p| {
                    p.chunks_exact_mut(*n).for_each(simple::softmax)
                }),
                (Kind::RoiAlign(r), _) => {
                    r.run(floats, a, b.expect("validated: RoIAlign has boxes"), out, team)
                }
                (
                    Kind::Conv(_) | Kind::Winograd(_) | Kind::Cascade(_) | Kind::Resize { .. } | Kind::Add(_),
                    _,
                ) => {
                    unreachable!("tables are made with the step")
                }
            }
            simple::zero_halo(base, out, team);
        }
    }
}
