//! One block of memory a session, and the views of tensors in it.

use super::pages;
use crate::error::{Error, Result};
use crate::shape::{Shape, Tensor};
use std::ops::Range;

/// How a tensor's values are stored. Arithmetic is in f32, but for sums of products of u8, which are whole numbers, and, where the CPU has
/// it, of a few products of f16.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Storage {
    /// Single precision.
    #[default]
    F32,
    /// The upper half of single precision.
    Bf16,
    /// Half precision; what is beyond its range is stored as the largest that it has, 65504.
    F16,
    /// Whole numbers q from 0 to 255, which stand for `scale * (q - zero)`.
    U8,
}

impl Storage {
    /// Bytes of a value.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
            Self::U8 => 1,
        }
    }
}

/// How a tensor's values are stored and what they stand for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Format {
    pub storage: Storage,
    /// Of u8; 1 and 0 of other values.
    pub scale: f32,
    pub zero: u8,
}

impl Format {
    pub const F32: Self = Self { storage: Storage::F32, scale: 1.0, zero: 0 };
    pub const BF16: Self = Self { storage: Storage::Bf16, scale: 1.0, zero: 0 };
    pub const F16: Self = Self { storage: Storage::F16, scale: 1.0, zero: 0 };
}

/// A tensor inside the arena: channels-last, with a border of zeros (halo) around every image so
/// that convolutions need no edge cases, and a pixel stride that may exceed the channels so that
/// the inputs of a concatenation can be written in place. Offset and strides count values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct View {
    /// Size, halo not counted.
    pub shape: Shape,
    /// Start of the first pixel of the first image, inside the halo.
    pub offset: usize,
    /// Values from one pixel to the next; at least `shape.c`.
    pub pixel: usize,
    /// Values from one row to the next.
    pub row: usize,
    /// Values from one image to the next.
    pub image: usize,
    /// Halo in pixels: top, left, bottom, right.
    pub halo: [usize; 4],
    /// How its values are stored.
    pub storage: Storage,
    /// The u8 that stands for zero, as the halo has it; 0 of other values.
    pub zero: u8,
}

impl View {
    /// Densely packed view of f32 at float `base` (a multiple of 16 keeps rows of 16 channels aligned).
    pub fn new(shape: Shape, base: usize, halo: [usize; 4]) -> Self {
        Self::stored(Storage::F32, 0, shape, base, halo)
    }

    /// As [`View::new`], its values stored so and `zero` standing for zero.
    pub fn stored(storage: Storage, zero: u8, shape: Shape, base: usize, halo: [usize; 4]) -> Self {
        let [t, l, b, r] = halo;
        let row = (shape.w + l + r) * shape.c;
        let image = (shape.h + t + b) * row;
        let base = base * (size_of::<f32>() / storage.bytes());
        Self { shape, offset: base + t * row + l * shape.c, pixel: shape.c, row, image, halo, storage, zero }
    }

    /// Values that a dense view of this size takes, or None on overflow.
    pub fn footprint(shape: Shape, halo: [usize; 4]) -> Option<usize> {
        let [t, l, b, r] = halo;
        let row = shape.w.checked_add(l)?.checked_add(r)?.checked_mul(shape.c)?;
        let rows = shape.h.checked_add(t)?.checked_add(b)?;
        rows.checked_mul(row)?.checked_mul(shape.n)
    }

    /// Channels `first .. first + count` of this view.
    pub fn channels(&self, first: usize, count: usize) -> Self {
        assert!(first + count <= self.shape.c, "channel slice outside the tensor");
        Self { shape: Shape { c: count, ..self.shape }, offset: self.offset + first, ..*self }
    }

    /// Index of (n, y, x, channel 0).
    #[inline]
    pub fn at(&self, n: usize, y: usize, x: usize) -> usize {
        self.offset + n * self.image + y * self.row + x * self.pixel
    }

    /// First value of the view, halo counted.
    fn begin(&self) -> usize {
        self.offset - self.halo[0] * self.row - self.halo[1] * self.pixel
    }

    /// Its bytes in the arena, from the first to the last, halo counted.
    pub fn extent(&self) -> Range<usize> {
        let s = self.shape;
        let end = self.at(s.n - 1, s.h - 1 + self.halo[2], s.w - 1 + self.halo[3]) + s.c;
        self.begin() * self.storage.bytes()..end * self.storage.bytes()
    }

    /// The byte of the arena where value `at` is.
    ///
    /// # Safety
    /// `base` is an arena in which that value lies.
    #[inline(always)]
    pub(crate) unsafe fn byte(&self, base: *mut u8, at: usize) -> *mut u8 {
        // SAFETY: the caller's contract.
        unsafe { base.add(at * self.storage.bytes()) }
    }

    /// Whether the two views share any byte. Views of different channels of one buffer interleave
    /// without sharing; everything else is compared by extent.
    pub fn overlaps(&self, other: &View) -> bool {
        let (mine, others) = (self.extent(), other.extent());
        if mine.end <= others.start || others.end <= mine.start {
            return false;
        }
        let same_grid = (self.pixel, self.row, self.image, self.storage)
            == (other.pixel, other.row, other.image, other.storage);
        if same_grid && self.row.is_multiple_of(self.pixel) && self.image.is_multiple_of(self.pixel) {
            // Every value of a view lies in its channels' residue classes modulo the pixel stride:
            // disjoint arcs on that circle cannot share a value.
            let arc = (other.begin() + self.pixel - self.begin() % self.pixel) % self.pixel;
            return !(arc >= self.shape.c && arc + other.shape.c <= self.pixel);
        }
        true
    }
}

/// A cache line of floats: the arena's unit, so that it is aligned without unsafe code.
#[derive(Clone, Copy, Default, bytemuck::Zeroable, bytemuck::Pod)]
#[repr(C, align(64))]
struct Line([f32; 16]);

/// The memory that a plan runs in, 64-byte aligned, grown only when told to.
#[derive(Default)]
pub struct Arena {
    lines: Vec<Line>,
}

impl Arena {
    /// Aligned copy of `values`, zero-filled to whole lines (packed weights).
    pub fn from_slice(values: &[f32]) -> Self {
        let mut arena = Self { lines: pages::buffer(values.len().div_ceil(16)) };
        arena.floats_mut()[..values.len()].copy_from_slice(values);
        arena
    }

    /// Grows to at least `floats`; never shrinks. An error where the system refuses the memory.
    pub fn reserve(&mut self, floats: usize) -> Result<()> {
        let lines = floats.div_ceil(16);
        if lines > self.lines.len() {
            // A larger plan needs none of the old contents: free first, so that the peak is the new size.
            self.lines = Vec::new();
            let no_memory =
                |_| Error::LimitExceeded(format!("the system has no {} bytes of memory to give", lines * 64));
            self.lines.try_reserve_exact(lines).map_err(no_memory)?;
            pages::large(&mut self.lines);
            self.lines.resize(lines, Line([0.0; 16]));
        }
        Ok(())
    }

    /// Frees everything.
    pub fn clear(&mut self) {
        self.lines = Vec::new();
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.lines.len() * 64
    }

    /// All values.
    pub fn floats(&self) -> &[f32] {
        bytemuck::cast_slice(&self.lines)
    }

    /// Writes a tensor where `view`, of f32, stands; panics where the shapes differ or the view lies outside.
    pub fn write(&mut self, view: &View, tensor: &Tensor) {
        assert_eq!((view.shape, view.storage), (tensor.shape, Storage::F32), "tensor does not fit the view");
        let s = view.shape;
        let floats = self.floats_mut();
        for (i, pixel) in tensor.data.chunks_exact(s.c.max(1)).enumerate() {
            let at = view.at(i / (s.h * s.w), i / s.w % s.h, i % s.w);
            floats[at..at + s.c].copy_from_slice(pixel);
        }
    }

    /// A dense copy of what stands in `view`, of f32; panics where the view lies outside.
    pub fn read(&self, view: &View) -> Tensor {
        assert_eq!(view.storage, Storage::F32, "a view of f32 is read");
        let mut tensor = Tensor::zeros(view.shape);
        let s = view.shape;
        for (i, pixel) in tensor.data.chunks_exact_mut(s.c.max(1)).enumerate() {
            let at = view.at(i / (s.h * s.w), i / s.w % s.h, i % s.w);
            pixel.copy_from_slice(&self.floats()[at..at + s.c]);
        }
        tensor
    }

    /// All values, writable.
    pub fn floats_mut(&mut self) -> &mut [f32] {
        bytemuck::cast_slice_mut(&mut self.lines)
    }

    /// Its first byte, for all threads of a run.
    pub(crate) fn base(&mut self) -> Base {
        Base(self.floats_mut().as_mut_ptr().cast())
    }
}

/// First byte of an arena that the threads of one run share.
pub(crate) struct Base(*mut u8);

// SAFETY: a pointer alone; who writes through it says why no two threads meet.
unsafe impl Sync for Base {}

impl Base {
    /// The byte.
    pub fn get(&self) -> *mut u8 {
        self.0
    }
}
