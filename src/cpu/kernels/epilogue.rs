//! What becomes of a convolution's sums: residual, activation, and the format of the output.

use super::stored::{BF16, F16, F32, STORAGE, U8};
use super::Vector;
use crate::cpu::arena::{Format, Storage};

/// What is added to a convolution's result, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Residual {
    /// Nothing.
    None,
    /// Added before the activation (ResNet).
    BeforeActivation,
    /// Added after the activation (top-down sums).
    AfterActivation,
}

/// What becomes of a convolution's sums before they are stored, all values in units of the output's.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rule {
    /// Result = max(x, slope * x): 1 none, 0 ReLU, between leaky.
    pub slope: f32,
    pub residual: Residual,
    /// How the residual is stored; `(v - add_zero) * add_scale` is added.
    pub add: Storage,
    pub add_scale: f32,
    pub add_zero: f32,
    /// How the output is stored; of u8, what stands for zero.
    pub output: Storage,
    pub zero: f32,
}

/// What a convolution's step reads and writes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Formats {
    pub input: Format,
    /// Of the residual, where there is one.
    pub add: Format,
    pub output: Format,
}

impl Rule {
    /// The rule for sums in units of the output.
    pub fn new(slope: f32, residual: Residual, formats: &Formats) -> Self {
        let Formats { add, output, .. } = formats;
        Self {
            slope,
            residual,
            add: add.storage,
            add_scale: add.scale / output.scale,
            add_zero: add.zero.into(),
            output: output.storage,
            zero: output.zero.into(),
        }
    }

    /// The same without a residual, where there `is_none`.
    pub fn unless(self, is_none: bool) -> Self {
        Self { residual: if is_none { Residual::None } else { self.residual }, ..self }
    }

    /// Sums as they are, in f32.
    pub const PLAIN: Self = Self {
        slope: 1.0,
        residual: Residual::None,
        add: Storage::F32,
        add_scale: 1.0,
        add_zero: 0.0,
        output: Storage::F32,
        zero: 0.0,
    };

    /// Activates `v`, adds the residual at `add` where there is one, and stores the first `n <= LANES` lanes at `to`.
    ///
    /// # Safety
    /// So many values are at `add` (where there is a residual), and there is room for them at `to`.
    #[inline(always)]
    pub unsafe fn finish<V: Vector>(&self, v: V, add: *const u8, to: *mut u8, n: usize) {
        // SAFETY: the caller's contract.
        unsafe {
            let slope = V::splat(self.slope);
            let v = match self.residual {
                Residual::None => activate(v, slope),
                Residual::BeforeActivation => activate(v.add(self.residual::<V>(add, n)), slope),
                Residual::AfterActivation => activate(v, slope).add(self.residual::<V>(add, n)),
            };
            match self.output {
                Storage::U8 => v.add(V::splat(self.zero)).store_u8(to, n),
                other => v.store_as(other, to, n),
            }
        }
    }

    #[inline(always)]
    unsafe fn residual<V: Vector>(&self, add: *const u8, n: usize) -> V {
        // SAFETY: the contract of `finish`.
        unsafe {
            let v = V::load_as(self.add, add, n);
            if (self.add_scale, self.add_zero) == (1.0, 0.0) {
                return v;
            }
            v.add(V::splat(-self.add_zero)).mul(V::splat(self.add_scale))
        }
    }
}

/// Where the sums of some pixels of one row and one panel go, and by way of what.
#[derive(Clone, Copy)]
pub(crate) struct Destination<'a> {
    pub(super) output: *mut u8,
    pub(super) out_pixel: usize,
    /// Lanes that are channels.
    pub(super) channels: usize,
    pub(super) rule: &'a Rule,
    /// Row of the residual at the first channel.
    pub(super) add: *const u8,
    pub(super) add_pixel: usize,
    pub(super) add_columns: *const u32,
    pub(super) x: usize,
}

impl<'a> Destination<'a> {
    /// Goes on with the pixel that is so many to the right.
    #[inline(always)]
    pub fn advance(&mut self, pixels: usize) {
        self.output = self.output.wrapping_add(pixels * self.out_pixel);
        self.x += pixels;
    }

    /// Registers of so many lanes all of which are channels.
    #[inline(always)]
    pub fn registers(&self, lanes: usize) -> usize {
        self.channels / lanes
    }

    /// Where pixel `m` of the residual, if there is one, and of the output are.
    ///
    /// # Safety
    /// The output has that pixel.
    #[inline(always)]
    pub unsafe fn pixel(&self, m: usize) -> (*const u8, *mut u8) {
        // SAFETY: the caller's contract.
        unsafe { (residual(self, m), self.output.add(m * self.out_pixel)) }
    }

    /// Asks for the lines of some pixels and so many lanes of residual and output, ahead of their use.
    ///
    /// # Safety
    /// The output has these pixels; the caller is compiled for V's ISA.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    pub unsafe fn ask<V: Vector>(&self, pixels: std::ops::Range<usize>, lanes: usize) {
        // SAFETY: prefetches may point anywhere; residual columns as in `pixel`.
        unsafe {
            for m in pixels {
                ask::<V>(self.output.wrapping_add(m * self.out_pixel), lanes * self.rule.output.bytes());
                if self.rule.residual != Residual::None {
                    ask::<V>(residual(self, m), lanes * self.rule.add.bytes());
                }
            }
        }
    }
}

/// What becomes of a tile's values: so many pixels of so many registers.
pub(crate) type StoreRun = unsafe fn(&Destination, values: *const f32, pixels: usize, registers: usize);

/// Bytes of a cache line, on most CPUs.
pub(super) const LINE: usize = 64;

/// Asks for the lines of so many bytes from `first` on, wherever that points, ahead of their use.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(crate) unsafe fn ask<V: Vector>(first: *const u8, bytes: usize) {
    for line in (0..bytes).step_by(LINE) {
        // SAFETY: a prefetch may point anywhere; the caller is compiled for V's ISA.
        unsafe { V::prefetch(first.wrapping_add(line)) };
    }
}

/// Where the residual of pixel `m` is.
#[inline(always)]
pub(super) unsafe fn residual(t: &Destination, m: usize) -> *const u8 {
    let x = t.x + m;
    // SAFETY: the contract of `block`: a table has an entry for every column.
    let column = unsafe { t.add_columns.as_ref().map_or(x, |_| *t.add_columns.add(x) as usize) };
    t.add.wrapping_add(column * t.add_pixel)
}

/// What becomes of a tile's values, pixels of `registers` registers each: residual, activation, store.
///
/// # Safety
/// The contract of [`block`](super::conv::block), for the arguments that the target was made of; `values` are there.
#[inline(always)]
pub(crate) unsafe fn store<V: Vector>(t: &Destination, values: *const f32, pixels: usize, registers: usize) {
    // SAFETY: the same contract.
    unsafe {
        if V::REGISTERS == 0 {
            // The multiplications take so long there that what is known saves nothing.
            store_each::<V>(t, values, pixels, registers);
        } else if t.registers(V::LANES) >= registers {
            store_all::<V, true>(t, values, pixels, registers);
        } else {
            store_all::<V, false>(t, values, pixels, registers);
        }
    }
}

/// [`store`]; `FULL`: all lanes are channels.
#[inline(always)]
unsafe fn store_all<V: Vector, const FULL: bool>(
    t: &Destination,
    values: *const f32,
    pixels: usize,
    registers: usize,
) {
    let rule = t.rule;
    let scaled = (rule.add_scale, rule.add_zero) != (1.0, 0.0);
    // SAFETY: the contract of `store`.
    unsafe {
        match (rule.residual, rule.add, rule.output) {
            (Residual::None, _, Storage::F32) => {
                store_known::<V, F32, NONE, FULL>(t, values, pixels, registers)
            }
            (Residual::None, _, Storage::Bf16) => {
                store_known::<V, BF16, NONE, FULL>(t, values, pixels, registers)
            }
            (Residual::None, _, Storage::F16) => {
                store_known::<V, F16, NONE, FULL>(t, values, pixels, registers)
            }
            (Residual::None, _, Storage::U8) => {
                store_known::<V, U8, NONE, FULL>(t, values, pixels, registers)
            }
            (_, Storage::F32, Storage::F32) if FULL => {
                store_known::<V, F32, ADDED, FULL>(t, values, pixels, registers)
            }
            (_, Storage::Bf16, Storage::Bf16) if FULL && !scaled => {
                store_known::<V, BF16, ADDED, FULL>(t, values, pixels, registers)
            }
            (_, Storage::F16, Storage::F16) if FULL && !scaled => {
                store_known::<V, F16, ADDED, FULL>(t, values, pixels, registers)
            }
            (_, Storage::U8, Storage::U8) if FULL => {
                store_known::<V, U8, ADDED, FULL>(t, values, pixels, registers)
            }
            _ => store_each::<V>(t, values, pixels, registers),
        }
    }
}

/// [`store`] where nothing is known.
#[inline(always)]
unsafe fn store_each<V: Vector>(t: &Destination, values: *const f32, pixels: usize, registers: usize) {
    // SAFETY: the contract of `store`.
    unsafe {
        for m in 0..pixels {
            for r in 0..registers {
                store_register(t, V::load(values.add((m * registers + r) * V::LANES)), m, r);
            }
        }
    }
}

/// What becomes of register `r` of pixel `m`, some lanes of which may be no channels.
///
/// # Safety
/// As [`store`].
#[inline(always)]
pub(crate) unsafe fn store_register<V: Vector>(t: &Destination, v: V, m: usize, r: usize) {
    let at = r * V::LANES;
    let n = t.channels.saturating_sub(at).min(V::LANES);
    // SAFETY: the caller's contract.
    unsafe {
        let (add, out) = t.pixel(m);
        let to = out.wrapping_add(at * t.rule.output.bytes());
        t.rule.finish(v, add.wrapping_add(at * t.rule.add.bytes()), to, n);
    }
}

// Whether there is a residual, known to the compiler of [`store_known`].
const NONE: bool = false;
const ADDED: bool = true;

/// As [`store`], where the compiler knows how output and residual are stored, and whether there is one.
#[inline(always)]
unsafe fn store_known<V: Vector, const T: usize, const RESIDUAL: bool, const FULL: bool>(
    t: &Destination,
    values: *const f32,
    pixels: usize,
    registers: usize,
) {
    let storage = STORAGE[T];
    // SAFETY: the contract of `store`.
    unsafe {
        let (slope, zero) = (V::splat(t.rule.slope), V::splat(t.rule.zero));
        let (minus_zero, add_scale) = (V::splat(-t.rule.add_zero), V::splat(t.rule.add_scale));
        let after = t.rule.residual == Residual::AfterActivation;
        for m in 0..pixels {
            let (add, out) = t.pixel(m);
            for r in 0..registers {
                let n = if FULL { V::LANES } else { t.channels.saturating_sub(r * V::LANES).min(V::LANES) };
                let at = r * V::LANES * storage.bytes();
                let v = V::load(values.add((m * registers + r) * V::LANES));
                let v = if RESIDUAL {
                    let other = V::load_as(storage, add.add(at), n);
                    let other = if T == U8 { other.add(minus_zero).mul(add_scale) } else { other };
                    if after {
                        activate(v, slope).add(other)
                    } else {
                        activate(v.add(other), slope)
                    }
                } else {
                    activate(v, slope)
                };
                let v = if T == U8 { v.add(zero) } else { v };
                v.store_as(storage, out.add(at), n);
            }
        }
    }
}

/// max(slope * x, x): identity at slope 1, ReLU at 0, leaky between.
#[inline(always)]
pub(crate) unsafe fn activate<V: Vector>(x: V, slope: V) -> V {
    // SAFETY: register arithmetic only; the caller is compiled for V's ISA.
    unsafe { x.mul(slope).max(x) }
}
