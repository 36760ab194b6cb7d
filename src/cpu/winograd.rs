//! 3x3 convolutions by Winograd's F(4x4, 3x3): a thread takes some tiles at a time through their transform, 36 matrix
//! products and the transform back, in memory of its own.

use super::arena::{Arena, Storage, View};
use super::conv::{Formats, Residual};
use super::isa::Isa;
use super::kernels::conv::{panel_registers, panels, ConvArgs};
use super::kernels::epilogue::Rule;
use super::kernels::winograd::{InputArgs, OutputArgs, G, PATCH, POSITIONS, TILE};
use super::kernels::Kernels;
use super::part::Part;
use super::threads::Team;
use crate::error::Result;
use crate::shape::Shape;

/// Floats of a thread's memory to aim at: transformed tiles of both sides.
const SCRATCH: usize = 1 << 18;
/// Tiles together, at least and at most: the matrix products want whole register tiles of them.
const TOGETHER: [usize; 2] = [28, 112];

/// A dense 3x3 convolution of stride 1 with transformed weights.
pub(crate) struct WinogradOp {
    pub in_channels: usize,
    pub out_channels: usize,
    /// Top, left, bottom, right.
    pub padding: [usize; 4],
    pub formats: Formats,
    rule: Rule,
    kernels: &'static Kernels,
    /// Position after position; in each panels of `[in][panel width]`.
    weights: Arena,
    position_weights: usize,
    bias: Arena,
    /// What the products start with: zeros, one a lane of all panels.
    start: Arena,
    /// A pixel outside the map, as the input is stored.
    outside: Arena,
}

impl WinogradOp {
    /// Transforms and packs `weight` `[out, in, 3, 3]` and `bias` `[out]`.
    pub fn new(
        isa: Isa,
        padding: [usize; 4],
        [in_channels, out_channels]: [usize; 2],
        weight: &[f32],
        bias: &[f32],
        rule: (f32, Residual),
        formats: Formats,
    ) -> Result<Self> {
        let kernels = Kernels::of(isa);
        let lanes = kernels.lanes;
        assert_eq!(weight.len(), out_channels * in_channels * 9);
        assert_eq!(bias.len(), out_channels);
        let all = panels(out_channels, lanes);
        let width = |p: usize| panel_registers(out_channels, lanes, p) * lanes;
        let position_weights = in_channels * (0..all).map(width).sum::<usize>();
        // Written in place: transformed weights are the largest thing that a model holds.
        let mut weights = Arena::default();
        weights.reserve(POSITIONS * position_weights)?;
        let packed = weights.floats_mut();
        // From units of the input to those of the output.
        let Formats { input, output, .. } = &formats;
        let unit = input.scale / output.scale;
        for (at, kernel) in weight.chunks_exact(9).enumerate() {
            let (o, i) = (at / in_channels, at % in_channels);
            let panel = o / (2 * lanes);
            // All panels before this one have two registers.
            let first = panel * 2 * lanes * in_channels + i * width(panel) + o % (2 * lanes);
            for (position, value) in transform_kernel(kernel).into_iter().enumerate() {
                packed[position * position_weights + first] = value * unit;
            }
        }
        // What a window of zeros sums up to is taken off.
        let zeros = |o: usize| {
            let sum: f64 =
                weight[o * in_channels * 9..][..in_channels * 9].iter().map(|&v| f64::from(v)).sum();
            (sum * f64::from(unit) * f64::from(input.zero)) as f32
        };
        let bias: Vec<f32> = (0..out_channels).map(|o| bias[o] / output.scale - zeros(o)).collect();
        let outside = if input.storage == Storage::U8 { u32::from_ne_bytes([input.zero; 4]) } else { 0 };
        Ok(Self {
            in_channels,
            out_channels,
            padding,
            formats,
            rule: Rule::new(rule.0, rule.1, &formats),
            kernels,
            position_weights,
            weights,
            bias: Arena::from_slice(&bias),
            start: Arena::from_slice(&vec![0.0; all * 2 * lanes]),
            outside: Arena::from_slice(&vec![f32::from_bits(outside); in_channels]),
        })
    }

    /// Bytes of packed weights.
    pub fn bytes(&self) -> usize {
        [&self.weights, &self.bias, &self.start, &self.outside].map(Arena::bytes).iter().sum()
    }

    /// Tiles that a thread takes together, of an output of so many.
    fn together(&self, tiles: usize) -> usize {
        let most = SCRATCH / (POSITIONS * (self.in_channels + self.out_channels));
        (most.clamp(TOGETHER[0], TOGETHER[1]) / 14 * 14).min(tiles)
    }

    /// Floats from one position to the next, in and out: not a multiple of a page, or all would share a few cache lines.
    fn strides(&self, together: usize) -> [usize; 2] {
        [self.in_channels, self.out_channels].map(|channels| (together * channels).next_multiple_of(32) + 16)
    }

    /// Floats of memory that each thread needs for this output.
    pub fn scratch(&self, output: Shape) -> usize {
        let tiles = output.n * output.h.div_ceil(TILE) * output.w.div_ceil(TILE);
        self.strides(self.together(tiles)).iter().sum::<usize>() * POSITIONS
    }

    /// Computes this thread's share of the tiles, or of those with a pixel that is `asked` for.
    ///
    /// # Safety
    /// `base` is an arena in which the views lie, the output overlaps no input, `scratch` has [`WinogradOp::scratch`] floats
    /// that are this thread's, and all threads of the team call this together.
    pub unsafe fn run(
        &self,
        base: *mut u8,
        scratch: *mut f32,
        add_at: &[Vec<u32>; 2],
        [input, output]: [&View; 2],
        add: Option<&View>,
        asked: Option<&Part>,
        team: &Team,
    ) {
        let s = output.shape;
        let grid = [s.h.div_ceil(TILE), s.w.div_ceil(TILE)];
        let all = s.n * grid[0] * grid[1];
        let wanted = |tile: usize| asked.is_none_or(|part| part.wants_tile(tile / grid[1], tile % grid[1]));
        let count = if asked.is_none() { all } else { (0..all).filter(|&tile| wanted(tile)).count() };
        let mine = team.share(count);
        let mut own = (0..all).filter(|&tile| wanted(tile)).skip(mine.start).take(mine.len());
        let together = self.together(all);
        let [in_stride, out_stride] = self.strides(together);
        let mut tiles = [0; TOGETHER[1]];
        loop {
            let mut n = 0;
            while n < together {
                let Some(tile) = own.next() else { break };
                tiles[n] = tile;
                n += 1;
            }
            if n == 0 {
                return;
            }
            let place = |tile: usize| {
                let (image, rest) = (tile / (grid[0] * grid[1]), tile % (grid[0] * grid[1]));
                (image, rest / grid[1] * TILE, rest % grid[1] * TILE)
            };
            // SAFETY: the caller's contract; tiles lie inside the output, patches inside the input or stand for zeros.
            unsafe {
                let products = scratch.add(in_stride * POSITIONS);
                for (i, &tile) in tiles[..n].iter().enumerate() {
                    let pixels = self.patch(base, input, place(tile), asked);
                    let args = InputArgs {
                        storage: input.storage,
                        pixels: &pixels,
                        output: scratch.add(i * self.in_channels),
                        stride: in_stride,
                        channels: self.in_channels,
                    };
                    (self.kernels.winograd_input)(&args);
                }
                for position in 0..POSITIONS {
                    self.product(
                        position,
                        n,
                        scratch.add(position * in_stride),
                        products.add(position * out_stride),
                    );
                }
                for (i, &tile) in tiles[..n].iter().enumerate() {
                    let (image, y, x) = place(tile);
                    let size = [TILE.min(s.h - y), TILE.min(s.w - x)];
                    let args = OutputArgs {
                        products: products.add(i * self.out_channels),
                        stride: out_stride,
                        bias: self.bias.floats().as_ptr(),
                        output: output.byte(base, output.at(image, y, x)),
                        out_row: output.row * output.storage.bytes(),
                        out_pixel: output.pixel * output.storage.bytes(),
                        size,
                        channels: self.out_channels,
                        rule: self.rule.unless(add.is_none()),
                        add: residual(base, add, add_at, (image, y, x), size),
                    };
                    (self.kernels.winograd_output)(&args);
                }
            }
        }
    }

    /// Pixels under a tile: outside the map, and, where some of the output is asked for, beyond what was computed for that, one
    /// that stands for zero.
    ///
    /// # Safety
    /// As [`WinogradOp::run`].
    unsafe fn patch(
        &self,
        base: *mut u8,
        input: &View,
        (image, y, x): (usize, usize, usize),
        asked: Option<&Part>,
    ) -> [*const u8; POSITIONS] {
        let [top, left, ..] = self.padding;
        let mut pixels = [self.outside.floats().as_ptr().cast(); POSITIONS];
        for (i, pixel) in pixels.iter_mut().enumerate() {
            // Out of range where negative: these wrap to huge numbers.
            let row = (y + i / PATCH).wrapping_sub(top);
            let column = (x + i % PATCH).wrapping_sub(left);
            let inside = row < input.shape.h && column < input.shape.w;
            if inside && asked.is_none_or(|part| part.wants_near(row, column)) {
                // SAFETY: the pixel is inside the view.
                *pixel = unsafe { input.byte(base, input.at(image, row, column)) };
            }
        }
        pixels
    }

    /// Multiplies `n` tiles at one position by its weights.
    ///
    /// # Safety
    /// `from` and `to` have room for `n` tiles' channels.
    unsafe fn product(&self, position: usize, n: usize, from: *const f32, to: *mut f32) {
        let args = ConvArgs::product(
            (from, self.in_channels, self.in_channels),
            // SAFETY: there are so many weights for every position.
            unsafe { self.weights.floats().as_ptr().add(position * self.position_weights) },
            self.start.floats().as_ptr(),
            (to, self.out_channels, self.out_channels),
            n,
        );
        // SAFETY: the caller's contract; one row of n pixels.
        unsafe { (self.kernels.conv)(&args, 0..1, 0..panels(self.out_channels, self.kernels.lanes)) };
    }
}

/// The residual's pixels for a tile's pixels that exist.
///
/// # Safety
/// As [`WinogradOp::run`].
unsafe fn residual(
    base: *mut u8,
    add: Option<&View>,
    [rows, columns]: &[Vec<u32>; 2],
    (image, y, x): (usize, usize, usize),
    size: [usize; 2],
) -> [*const u8; TILE * TILE] {
    let mut pixels = [std::ptr::null(); TILE * TILE];
    let Some(add) = add else { return pixels };
    let from = |table: &[u32], at: usize| table.get(at).map_or(at, |&low| low as usize);
    for row in 0..size[0] {
        for column in 0..size[1] {
            let at = add.at(image, from(rows, y + row), from(columns, x + column));
            // SAFETY: the pixel is inside the view.
            pixels[row * TILE + column] = unsafe { add.byte(base, at) };
        }
    }
    pixels
}

/// `G g G^T` of one 3x3 kernel.
fn transform_kernel(g: &[f32]) -> [f32; POSITIONS] {
    let mut half = [[0.0; 3]; PATCH];
    for (half, row) in half.iter_mut().zip(G) {
        for (column, half) in half.iter_mut().enumerate() {
            *half = (0..3).map(|k| row[k] * f64::from(g[k * 3 + column])).sum();
        }
    }
    std::array::from_fn(|i| {
        let (row, column) = (half[i / PATCH], G[i % PATCH]);
        (0..3).map(|k| row[k] * column[k]).sum::<f64>() as f32
    })
}

#[cfg(test)]
mod tests {
    use super::super::arena::Format;
    use super::*;
    use crate::cpu::Pool;
    use crate::graph::init::Rng;

    /// Maps of u8, whose zeros are no zeros, give what the plain sum of their values gives, stored in f32 and in u8.
    #[test]
    fn maps_of_u8_give_the_plain_sum_of_their_values() {
        let u8 = |scale, zero| Format { storage: Storage::U8, scale, zero };
        let ([ci, co], [h, w], padding) = ([20, 27], [9, 14], [1, 2, 0, 1]);
        let out = Shape::new(1, co, h + 1 - 2, w + 2 + 1 - 2);
        let mut rng = Rng::new(1);
        let mut noise = || rng.range(-1.0, 1.0);
        let weight: Vec<f32> = (0..co * ci * 9).map(|_| 0.2 * noise()).collect();
        let bias: Vec<f32> = (0..co).map(|_| noise()).collect();
        let mut bytes = |n: usize| (0..n).map(|_| (127.5 * noise() + 127.5) as u8).collect::<Vec<_>>();
        let (pixels, added) = (bytes(h * w * ci), bytes(out.len()));
        for output in [Format::F32, u8(0.07, 90)] {
            let formats = Formats { input: u8(0.01, 131), add: u8(0.02, 7), output };
            let value = |format: &Format, q: u8| format.scale * (f32::from(q) - f32::from(format.zero));
            let at = |y: usize, x: usize, i: usize| {
                let inside = (1..=h).contains(&y) && (2..w + 2).contains(&x);
                if inside {
                    value(&formats.input, pixels[((y - 1) * w + x - 2) * ci + i])
                } else {
                    0.0
                }
            };
            let expected = |y: usize, x: usize, o: usize| {
                let mut sum = bias[o] + value(&formats.add, added[(y * out.w + x) * co + o]);
                for i in 0..ci {
                    for tap in 0..9 {
                        sum += weight[(o * ci + i) * 9 + tap] * at(y + tap / 3, x + tap % 3, i);
                    }
                }
                sum.max(0.1 * sum)
            };
            for isa in Isa::supported() {
                let rule = (0.1, Residual::BeforeActivation);
                let op = WinogradOp::new(isa, padding, [ci, co], &weight, &bias, rule, formats).unwrap();
                let input = View::stored(Storage::U8, 131, Shape::new(1, ci, h, w), 0, [0; 4]);
                // In floats.
                let behind = |bytes: usize| bytes.next_multiple_of(64) / 4;
                let add = View::stored(Storage::U8, 7, out, behind(pixels.len()), [0; 4]);
                let to = View::stored(output.storage, output.zero, out, behind(add.extent().end), [0; 4]);
                let scratch = behind(to.extent().end);
                let mut arena = Arena::default();
                arena.reserve(scratch + op.scratch(out)).unwrap();
                let memory: &mut [u8] = bytemuck::cast_slice_mut(arena.floats_mut());
                memory[..pixels.len()].copy_from_slice(&pixels);
                memory[add.offset..][..added.len()].copy_from_slice(&added);
                let base = arena.base();
                let tables = [Vec::new(), Vec::new()];
                // SAFETY: the views and the scratch memory lie in the arena, apart.
                Pool::new(1).unwrap().run(&|team| unsafe {
                    let (base, own) = (base.get(), base.get().cast::<f32>().add(scratch));
                    op.run(base, own, &tables, [&input, &to], Some(&add), None, team);
                });
                let memory: &[u8] = bytemuck::cast_slice(arena.floats());
                for (i, (y, x, o)) in (0..out.h)
                    .flat_map(|y| (0..out.w).flat_map(move |x| (0..co).map(move |o| (y, x, o))))
                    .enumerate()
                {
                    let wanted = expected(y, x, o);
                    let (got, wanted, off) = if output.storage == Storage::U8 {
                        let step = (wanted / output.scale + f32::from(output.zero)).clamp(0.0, 255.0);
                        (f32::from(memory[to.offset + i]), step, 0.51)
                    } else {
                        (arena.floats()[to.offset + i], wanted, 2e-4)
                    };
                    assert!((got - wanted).abs() <= off, "{isa:?}, {y} {x} {o}: {got}, not {wanted}");
                }
            }
        }
    }
}
