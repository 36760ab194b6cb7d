//! The transforms of Winograd's convolution F(4x4, 3x3) (Lavin and Gray 2016, section 4.3): a tile of 4x4 outputs is
//! `A^T ((G g G^T) * (B^T d B)) A` of its 6x6 inputs `d` and the 3x3 kernel `g`, where `*` is a product for each of the 36
//! positions, summed over the input channels: 36 multiplications where the plain sum takes 144.

use super::epilogue::Rule;
use super::Vector;
use crate::cpu::arena::Storage;

/// Rows and columns of a tile of outputs.
pub(crate) const TILE: usize = 4;
/// Rows and columns of its inputs.
pub(crate) const PATCH: usize = TILE + 2;
/// Positions.
pub(crate) const POSITIONS: usize = PATCH * PATCH;

/// G, by which a kernel is transformed.
pub(crate) const G: [[f64; 3]; PATCH] = [
    [0.25, 0.0, 0.0],
    [-1.0 / 6.0, -1.0 / 6.0, -1.0 / 6.0],
    [-1.0 / 6.0, 1.0 / 6.0, -1.0 / 6.0],
    [1.0 / 24.0, 1.0 / 12.0, 1.0 / 6.0],
    [1.0 / 24.0, -1.0 / 12.0, 1.0 / 6.0],
    [0.0, 0.0, 1.0],
];

/// One tile's inputs.
pub(crate) struct InputArgs<'a> {
    /// How they are stored.
    pub storage: Storage,
    /// Its pixels, row by row.
    pub pixels: &'a [*const u8; POSITIONS],
    /// Transformed: position p at `p * stride`.
    pub output: *mut f32,
    pub stride: usize,
    pub channels: usize,
}

/// `B^T d B` of all channels.
///
/// # Safety
/// Every pixel has `channels` values, and every position of the output room for them.
#[inline(always)]
pub(crate) unsafe fn input<V: Vector>(a: &InputArgs) {
    let mut c = 0;
    while c < a.channels {
        let lanes = (a.channels - c).min(V::LANES);
        // SAFETY: the caller's contract, for channels c .. c + lanes.
        unsafe {
            let mut half = [[V::splat(0.0); PATCH]; PATCH];
            for column in 0..PATCH {
                let mut d = [V::splat(0.0); PATCH];
                for (row, d) in d.iter_mut().enumerate() {
                    let p = a.pixels[row * PATCH + column].add(c * a.storage.bytes());
                    *d = V::load_as(a.storage, p, lanes);
                }
                half[column] = transform_input(d);
            }
            for row in 0..PATCH {
                let mut d = [V::splat(0.0); PATCH];
                for (column, d) in d.iter_mut().enumerate() {
                    *d = half[column][row];
                }
                let d = transform_input(d);
                for (column, d) in d.into_iter().enumerate() {
                    d.store_upto(a.output.add((row * PATCH + column) * a.stride + c), lanes);
                }
            }
        }
        c += V::LANES;
    }
}

/// `B^T d` of one column.
#[inline(always)]
unsafe fn transform_input<V: Vector>(d: [V; PATCH]) -> [V; PATCH] {
    // SAFETY: register arithmetic only; the caller is compiled for V's ISA.
    unsafe {
        let (two, minus_one) = (V::splat(2.0), V::splat(-1.0));
        let (minus_four, minus_five, four) = (V::splat(-4.0), V::splat(-5.0), V::splat(4.0));
        let p = d[4].mul_add(d[2], minus_four);
        let q = d[3].mul_add(d[1], minus_four);
        let r = d[4].mul_add(d[2], minus_one);
        let s = d[3].mul_add(d[1], minus_one).mul(two);
        [
            d[4].mul_add(d[2], minus_five).mul_add(d[0], four),
            p.add(q),
            p.mul_add(q, minus_one),
            r.add(s),
            r.mul_add(s, minus_one),
            d[5].mul_add(d[3], minus_five).mul_add(d[1], four),
        ]
    }
}

/// One tile's outputs.
pub(crate) struct OutputArgs {
    /// Sums of products: position p at `p * stride`.
    pub products: *const f32,
    pub stride: usize,
    /// One a channel.
    pub bias: *const f32,
    /// First pixel; rows and columns of them that exist. Strides are bytes.
    pub output: *mut u8,
    pub out_row: usize,
    pub out_pixel: usize,
    pub size: [usize; 2],
    pub channels: usize,
    pub rule: Rule,
    /// The residual's pixels, row by row; anything where there is none.
    pub add: [*const u8; TILE * TILE],
}

/// `A^T m A` of all channels, bias, residual and activation.
///
/// # Safety
/// Every position of the products, the bias, every pixel that exists and the residual's have `channels` values.
#[inline(always)]
pub(crate) unsafe fn output<V: Vector>(a: &OutputArgs) {
    let mut c = 0;
    while c < a.channels {
        let lanes = (a.channels - c).min(V::LANES);
        // SAFETY: the caller's contract, for channels c .. c + lanes.
        unsafe {
            let bias = V::load_upto(a.bias.add(c), lanes);
            let mut half = [[V::splat(0.0); TILE]; PATCH];
            for column in 0..PATCH {
                let mut m = [V::splat(0.0); PATCH];
                for (row, m) in m.iter_mut().enumerate() {
                    *m = V::load_upto(a.products.add((row * PATCH + column) * a.stride + c), lanes);
                }
                half[column] = transform_output(m);
            }
            for row in 0..a.size[0] {
                let mut m = [V::splat(0.0); PATCH];
                for (column, m) in m.iter_mut().enumerate() {
                    *m = half[column][row];
                }
                let m = transform_output(m);
                let to = a.output.add(row * a.out_row + c * a.rule.output.bytes());
                for column in 0..a.size[1] {
                    let add = a.add[row * TILE + column].wrapping_add(c * a.rule.add.bytes());
                    a.rule.finish(m[column].add(bias), add, to.add(column * a.out_pixel), lanes);
                }
            }
        }
        c += V::LANES;
    }
}

/// `A^T m` of one column.
#[inline(always)]
unsafe fn transform_output<V: Vector>(m: [V; PATCH]) -> [V; TILE] {
    // SAFETY: register arithmetic only; the caller is compiled for V's ISA.
    unsafe {
        let minus_one = V::splat(-1.0);
        let (sum12, diff12) = (m[1].add(m[2]), m[1].mul_add(m[2], minus_one));
        let (sum34, diff34) = (m[3].add(m[4]), m[3].mul_add(m[4], minus_one));
        [
            m[0].add(sum12).add(sum34),
            diff12.mul_add(diff34, V::splat(2.0)),
            sum12.mul_add(sum34, V::splat(4.0)),
            diff12.mul_add(diff34, V::splat(8.0)).add(m[5]),
        ]
    }
}
