//! What NVIDIA's libraries compute in one call: a convolution, a bias, a second map added, ReLU.

use super::map::{DeviceView, Element};

/// Most bytes of workspace that a library is given: what NVIDIA recommends for cuBLASLt on Hopper.
pub(super) const WORKSPACE: usize = 32 << 20;

/// A map as a library sees it. Its address matters only by what it is a multiple of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Side {
    /// Type of its elements.
    pub element: Element,
    /// Images, rows, columns.
    pub size: [usize; 3],
    /// Channels with the zeros behind them.
    pub channels: usize,
    /// Elements from a pixel to the next.
    pub pixel: usize,
    /// Bytes that its first element's address is a multiple of, at most 256.
    pub align: usize,
}

impl Side {
    /// Of a view of an arena that begins at a multiple of 256.
    pub fn of(view: &DeviceView) -> Self {
        let s = view.shape;
        Self {
            element: view.element,
            size: [s.n, s.h, s.w],
            channels: s.c + view.tail,
            pixel: view.pixel,
            align: 1 << view.offset.trailing_zeros().min(8),
        }
    }

    /// Whether two views of an arena share bytes, those between their pixels with them.
    pub fn overlap(a: &DeviceView, b: &DeviceView) -> bool {
        let end = |v: &DeviceView| v.offset.saturating_add(v.bytes().unwrap_or(usize::MAX));
        a.offset < end(b) && b.offset < end(a)
    }

    /// Number of pixels.
    pub fn pixels(&self) -> usize {
        self.size.iter().product()
    }

    /// Whether another map lies as this one does: libraries take one description for both.
    pub fn is_like(&self, other: &Self) -> bool {
        Self { align: 0, ..*self } == Self { align: 0, ..*other }
    }
}

/// `output = relu(convolution of input + bias + add)`, channels last, weights `[output channel][tap][channel]`; everything of it but
/// the addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct FusedConv {
    /// Rows and columns of the window.
    pub kernel: [usize; 2],
    /// Vertical and horizontal.
    pub stride: [usize; 2],
    /// Vertical and horizontal.
    pub dilation: [usize; 2],
    /// Above and to the left.
    pub pad: [usize; 2],
    /// The input: of the weights' type, with as many channels as they have, zeros with them.
    pub input: Side,
    /// The output. Weights have rows of zeros for its tail.
    pub output: Side,
    /// What is added, of the output's size.
    pub add: Option<Side>,
    /// Whether that is (in part) the input itself.
    pub adds_input: bool,
    /// Whether negative values become 0.
    pub relu: bool,
    /// Whether factors of f32 may be rounded to TF32.
    pub tf32: bool,
}

/// Addresses of what a call reads and writes.
#[derive(Clone, Copy)]
pub(super) struct Pointers {
    /// First element of the input.
    pub input: u64,
    /// First weight.
    pub weights: u64,
    /// First bias, in the output's type.
    pub bias: u64,
    /// First element of what is added; 0 where nothing is.
    pub add: u64,
    /// First element of the output.
    pub output: u64,
    /// As many bytes as the algorithm asked for, at a multiple of 256.
    pub workspace: u64,
}
