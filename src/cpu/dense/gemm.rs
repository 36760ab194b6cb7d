//! Matrices packed for the products, and the products in f32.

use super::maps::holds;
use super::Element;
use crate::cpu::kernels::backward::OuterArgs;
use crate::cpu::kernels::conv::{panel_registers, panels, ConvArgs};
use crate::cpu::kernels::Kernels;
use crate::cpu::Isa;

/// Channels of a row of results: padded to whole tiles of 16.
pub fn channel_stride(channels: usize) -> usize {
    channels.next_multiple_of(16)
}

/// Values between rows of an operand: whole pairs (bf16 comes in pairs), and, where more than a tile's 32, a
/// multiple of 32 unless an even part of at least 16 divides them. The padding is zero.
pub fn operand_stride(values: usize) -> usize {
    let even = values.next_multiple_of(2);
    let divides = (8..=16).any(|half| even.is_multiple_of(2 * half));
    if even <= 32 || divides {
        even
    } else {
        even.next_multiple_of(32)
    }
}

/// A `depth` x `channels` matrix in the order its product reads it.
pub struct Packed<T> {
    /// Lanes of the registers it was packed for.
    lanes: usize,
    pub(super) depth: usize,
    pub(super) channels: usize,
    /// Panels of channels; in each `[depth / group][panel width][group]`: groups of 1 for f32, pairs for bf16.
    pub(super) values: Vec<T>,
    /// Channels of a panel, as a power of two, and of the last one.
    panel_bits: u32,
    last_width: usize,
    /// Depth with its padding.
    rows: usize,
    /// Values of consecutive depth that stand together, as a power of two.
    group_bits: u32,
    /// Zeros, one a lane (the f32 kernel adds a bias).
    zeros: Vec<f32>,
}

impl<T: Element> Packed<T> {
    /// Zeros.
    pub fn new(isa: Isa, depth: usize, channels: usize) -> Self {
        assert!(depth > 0 && channels > 0, "a product of nothing");
        let lanes = Kernels::of(isa).lanes;
        let (panel, last_width, rows, group_bits) = if T::BF16 {
            (16, 16, operand_stride(depth), 1)
        } else {
            let last = panels(channels, lanes) - 1;
            (2 * lanes, panel_registers(channels, lanes, last) * lanes, depth, 0)
        };
        let before = (channels.div_ceil(panel) - 1) * panel;
        Self {
            lanes,
            depth,
            channels,
            values: vec![T::default(); (before + last_width) * rows],
            panel_bits: panel.trailing_zeros(),
            last_width,
            rows,
            group_bits,
            zeros: if T::BF16 { Vec::new() } else { vec![0.0; channels.next_multiple_of(panel)] },
        }
    }

    /// Sets value (k, n).
    #[inline(always)]
    pub fn set(&mut self, k: usize, n: usize, v: f32) {
        let panel = n >> self.panel_bits;
        let first = panel << self.panel_bits;
        let width = if (panel + 1) << self.panel_bits >= self.channels {
            self.last_width
        } else {
            1 << self.panel_bits
        };
        let at = (((k >> self.group_bits) * width + n - first) << self.group_bits)
            + (k & ((1 << self.group_bits) - 1));
        self.values[first * self.rows + at] = T::of(v);
    }
}

/// Operands of a product of [pairs](super::pairs) and its result, `c[y][n] = sum over k of a[y][k] * b[k][n]`, or added to what `c` holds.
#[cfg(target_arch = "x86_64")]
pub(super) struct Matrices {
    /// `rows` x `a_row`, of which `depth` are read; rows in blocks of 16.
    pub a: *const half::bf16,
    pub a_row: usize,
    /// Blocks of 16 columns, in each `[depth / 2][16][2]`.
    pub b: *const half::bf16,
    /// Even.
    pub depth: usize,
    /// `rows` x `columns`.
    pub c: *mut f32,
    /// A multiple of 16.
    pub rows: usize,
    /// A multiple of 16.
    pub columns: usize,
    pub add: bool,
}

/// [`Element::product`] on the tiles of the inference kernels: a convolution of one row, one tap.
pub(super) fn product_f32(
    isa: Isa,
    a: &[f32],
    a_pixel: usize,
    pixels: usize,
    b: &Packed<f32>,
    c: &mut [f32],
) {
    let stride = channel_stride(b.channels);
    let kernels = Kernels::of(isa);
    assert_eq!(b.lanes, kernels.lanes, "weights packed for another instruction set");
    if pixels == 0 {
        return;
    }
    assert!(a_pixel >= b.depth && holds(a.len() + a_pixel - b.depth, pixels, a_pixel), "operand too short");
    assert!(c.len() >= pixels * stride, "result too short");
    let args = ConvArgs::product(
        (a.as_ptr(), a_pixel, b.depth),
        b.values.as_ptr(),
        b.zeros.as_ptr(),
        (c.as_mut_ptr(), stride, b.channels),
        pixels,
    );
    // SAFETY: the lengths were checked; weights and zeros were packed for these lanes.
    unsafe { (kernels.conv)(&args, 0..1, 0..panels(b.channels, kernels.lanes)) }
}

/// [`Element::outer`] in f32.
pub(super) fn outer_f32(
    isa: Isa,
    (a, a_pixel, inputs): (&[f32], usize, usize),
    (d, d_pixel, channels): (&[f32], usize, usize),
    pixels: usize,
    sums: &mut [f32],
) {
    if pixels == 0 {
        return;
    }
    let sums_row = channel_stride(channels);
    assert!(a_pixel >= inputs && holds(a.len() + a_pixel - inputs, pixels, a_pixel), "operand too short");
    assert!(
        d_pixel >= channels && holds(d.len() + d_pixel - channels, pixels, d_pixel),
        "gradient too short"
    );
    assert!(sums.len() >= inputs * sums_row, "sums too short");
    let args = OuterArgs {
        a: a.as_ptr(),
        a_pixel,
        inputs,
        d: d.as_ptr(),
        d_pixel,
        channels,
        pixels,
        sums: sums.as_mut_ptr(),
        sums_row,
    };
    // SAFETY: the lengths were checked.
    unsafe { (Kernels::of(isa).outer)(&args) }
}
