//! How far the outputs of a network see, which is how far tiles of a picture must overlap.

use super::build::{Graph, Node};
use crate::layers::{Interpolation, Layer, UpsampleTo};

/// What an output cell of a network may depend on. Cell `i` of a map of stride `s` is counted from
/// pixel `i * s` of the network's input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reach {
    /// Pixels to either side of that pixel: rows, columns. An upper bound; `usize::MAX` where an
    /// output sees the whole picture (global pooling, RoIAlign).
    pub pixels: [usize; 2],
    /// Largest stride of any map: tiles aligned to it see the same cells as the whole picture.
    pub stride: [usize; 2],
}

/// One axis of a map, in input pixels: cell `i` sees from `i * stride - before` to
/// `i * stride + after`. Either may be negative, where padding is less than half a window.
#[derive(Clone, Copy)]
struct Axis {
    stride: f32,
    before: f32,
    after: f32,
}

impl Axis {
    const INPUT: Self = Self { stride: 1.0, before: 0.0, after: 0.0 };
    const EVERYTHING: Self = Self { stride: 1.0, before: f32::INFINITY, after: f32::INFINITY };

    /// What two maps of one size see together.
    fn join(self, other: Self) -> Self {
        Self {
            stride: self.stride.max(other.stride),
            before: self.before.max(other.before),
            after: self.after.max(other.after),
        }
    }

    /// A map of stride `stride` whose cell `i` reads the cells of this map that lie `before` and
    /// `after` (in cells of this map) around pixel `i * stride`.
    fn read(self, stride: f32, before: f32, after: f32) -> Self {
        Self { stride, before: self.before + before * self.stride, after: self.after + after * self.stride }
    }

    /// Cell `i` reads cells `i * stride - pad` to `i * stride - pad + window - 1`.
    fn window(self, window: usize, stride: usize, pad: usize) -> Self {
        let pad = pad as f32;
        self.read(self.stride * stride as f32, pad, (window as f32 - 1.0) - pad)
    }

    /// Cell `i` of a map of stride `stride` reads where interpolation finds it.
    fn interpolate(self, mode: Interpolation, stride: f32, to_size: bool) -> Self {
        let cells = stride / self.stride; // of this map, from one cell of the new map to the next
        let (before, after) = match mode {
            // floor(i * cells)
            Interpolation::Nearest => ((1.0 - cells).max(0.0), 0.0),
            // The cells around (i + 0.5) * cells - 0.5.
            Interpolation::Bilinear => (1.5 - 0.5 * cells, 0.5 + 0.5 * cells),
        };
        // A size that no stride divides moves the last cells by what was rounded off (7 or 6 cells
        // to 13: by half a cell).
        let moved = if to_size { (1.0 - cells).max(0.0) } else { 0.0 };
        self.read(stride, before + moved, after + moved)
    }
}

impl Graph {
    /// Whether a map is enlarged bilinearly to the size of another: where it lies on it then depends on both sizes.
    pub fn interpolates(&self) -> bool {
        self.nodes.iter().any(|node| match node.layer() {
            Some(Layer::Upsample(u)) => u.mode == Interpolation::Bilinear && u.to == UpsampleTo::SizeOfSecond,
            _ => false,
        })
    }

    /// How far an output value sees, over all outputs, and the largest stride, per axis (rows,
    /// columns). Maps that are joined, or interpolated to the size of another, are taken to lie over
    /// one another, as they do in every pyramid of "same"-padded convolutions.
    pub fn receptive_field(&self) -> Reach {
        let mut field: Vec<[Axis; 2]> = Vec::with_capacity(self.nodes.len());
        for node in &self.nodes {
            let axes = [0, 1].map(|axis| see(node, axis, |input| field[node.inputs[input].0][axis]));
            field.push(axes);
        }
        Reach {
            pixels: [0, 1].map(|axis| {
                let outputs = self.outputs.iter().map(|(_, id)| field[id.0][axis]);
                outputs.map(|f| f.before.max(f.after)).fold(0.0, f32::max).ceil() as usize
            }),
            stride: [0, 1].map(|axis| field.iter().map(|f| f[axis].stride).fold(1.0, f32::max) as usize),
        }
    }
}

/// One axis of a node's output, from those of its inputs.
fn see(node: &Node, axis: usize, input: impl Fn(usize) -> Axis) -> Axis {
    let all = (0..node.value_inputs().len()).map(&input).reduce(Axis::join).unwrap_or(Axis::INPUT);
    match node.layer() {
        Some(Layer::Conv2d(c)) => all.window(c.window()[axis], c.stride[axis], c.padding[axis]),
        Some(Layer::MaxPool(p)) => all.window(p.kernel[axis], p.stride[axis], p.padding[axis]),
        Some(Layer::ConvTranspose2d(c)) => {
            // Cell i takes the inputs (i + pad - k) / stride that are whole, k in 0..kernel.
            let (kernel, stride, pad) = (c.kernel[axis], c.stride[axis] as f32, c.padding[axis] as f32);
            all.read(all.stride / stride, (kernel as f32 - 1.0 - pad) / stride, pad / stride)
        }
        Some(Layer::Upsample(u)) => match u.to {
            UpsampleTo::Factor(by) => all.interpolate(u.mode, all.stride / by[axis] as f32, false),
            UpsampleTo::SizeOfSecond => all.interpolate(u.mode, input(1).stride, true),
        },
        Some(Layer::Crop(c)) => {
            let corner = [c.top, c.left][axis] as f32;
            all.read(all.stride, -corner, corner)
        }
        Some(Layer::GlobalAvgPool(_) | Layer::RoiAlign(_)) => Axis::EVERYTHING,
        Some(Layer::Linear(_)) => Axis::EVERYTHING,
        Some(Layer::BatchNorm(_) | Layer::Activation(_) | Layer::Add(_) | Layer::Concat(_)) | None => all,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::{run_reference, Builder, NodeId, Weights};
    use crate::layers::{Activation, Conv2d, ConvTranspose2d, MaxPool};
    use crate::shape::{Shape, Tensor};

    /// The farthest that any output cell's change lies from the pixel that was changed, per axis, by
    /// trying pixels. Weights are made positive and inputs distinct, so that nothing cancels.
    fn probe(graph: &Graph, [h, w]: [usize; 2], strides: &[[f32; 2]]) -> [f32; 2] {
        let mut weights = Weights::random(graph, 1);
        weights.tensors.values_mut().flat_map(|t| &mut t.data).for_each(|v| *v = v.abs() + 0.01);
        let shape = Shape::new(1, 1, h, w);
        let image: Vec<f64> = (0..shape.len()).map(|i| 1.0 + (i * 7919 % 1009) as f64 / 1009.0).collect();
        let run = |data: Vec<f64>| run_reference(graph, &weights, &[Tensor::from_vec(shape, data)]).unwrap();
        let before = run(image.clone());
        let mut farthest = [0.0f32; 2];
        // The columns of one row, then the rows of one column.
        let pixels = (0..w).map(|x| (h / 2, x)).chain((0..h).map(|y| (y, w / 2)));
        for (y, x) in pixels {
            // Both ways, since a maximum may hide a change of either sign.
            for change in [-8.0, 8.0] {
                let mut changed = image.clone();
                changed[shape.at(0, 0, y, x)] += change;
                for (i, (new, old)) in run(changed).iter().zip(&before).enumerate() {
                    let s = new.shape;
                    let differ = (0..s.len()).filter(|&at| new.data[at] != old.data[at]);
                    for at in differ.map(|at| at / s.c) {
                        let cell = [at / s.w % s.h, at % s.w];
                        for (axis, pixel) in [y, x].into_iter().enumerate() {
                            let distance = (cell[axis] as f32 * strides[i][axis] - pixel as f32).abs();
                            farthest[axis] = farthest[axis].max(distance);
                        }
                    }
                }
            }
        }
        farthest
    }

    /// Builds a network of one input channel whose output has this stride, and holds its reach
    /// between what is seen and twice that (or a stride more, where little is seen).
    fn holds(
        what: &str,
        stride: [usize; 2],
        size: [usize; 2],
        layers: impl FnOnce(&mut Builder, NodeId) -> NodeId,
    ) {
        let mut b = Builder::new();
        let x = b.input("x", 1);
        let y = layers(&mut b, x);
        b.output("y", y);
        let graph = b.finish();
        let seen = probe(&graph, size, &[stride.map(|s| s as f32)]);
        let reach = graph.receptive_field();
        for axis in 0..2 {
            let claimed = reach.pixels[axis] as f32;
            assert!(claimed >= seen[axis], "{what}: claims {reach:?}, sees {seen:?}");
            let most = (2.0 * seen[axis]).max(seen[axis] + reach.stride[axis] as f32);
            assert!(claimed <= most, "{what}: claims {reach:?}, sees only {seen:?}");
            assert!(reach.stride[axis] >= stride[axis], "{what}: {reach:?}");
        }
    }

    fn conv(b: &mut Builder, x: NodeId, conv: Conv2d) -> NodeId {
        let name = format!("conv{}", x.0);
        b.conv(&name, x, conv)
    }

    #[test]
    fn reach_bounds_what_windows_see() {
        holds("3x3", [1, 1], [9, 11], |b, x| conv(b, x, Conv2d::new(1, 2, 3)));
        holds("1x5, dilated", [1, 1], [9, 23], |b, x| {
            let y = conv(b, x, Conv2d::rect(1, 2, 1, 5));
            conv(b, y, Conv2d::rect(2, 1, 1, 3).dilation(3))
        });
        holds("without padding", [1, 1], [11, 11], |b, x| {
            let y = conv(b, x, Conv2d::new(1, 1, 3).padding([0; 4]));
            conv(b, y, Conv2d::new(1, 1, 3).padding([0; 4]))
        });
        holds("padding on one side", [1, 1], [11, 11], |b, x| {
            conv(b, x, Conv2d::new(1, 1, 5).padding([4, 0, 0, 4]))
        });
        holds("stem and pool", [8, 8], [70, 64], |b, x| {
            let y = conv(b, x, Conv2d::new(1, 2, 7).stride(2));
            let y = b.max_pool(y, MaxPool::new(3, 2, 1));
            conv(b, y, Conv2d::new(2, 1, 3).stride(2))
        });
        holds("2x2 pools", [4, 4], [24, 20], |b, x| {
            let y = b.max_pool(x, MaxPool::new(2, 2, 0));
            let y = b.activation(y, Activation::Sigmoid);
            b.max_pool(y, MaxPool::new(2, 2, 0))
        });
        holds("pixel-wise", [1, 1], [5, 5], |b, x| {
            let y = b.batchnorm("bn", x, 1);
            let y = b.add(y, x);
            let y = b.concat(&[x, y]);
            b.relu(y)
        });
    }

    #[test]
    fn reach_bounds_what_interpolation_sees() {
        for mode in [Interpolation::Nearest, Interpolation::Bilinear] {
            holds("by a factor", [1, 1], [32, 28], |b, x| {
                let y = conv(b, x, Conv2d::new(1, 1, 3).stride(4));
                b.upsample(y, mode, 4)
            });
            // Odd sizes: 37 -> 19 -> 10 cells and back.
            for size in [[37, 41], [32, 24], [17, 35], [23, 30], [39, 29]] {
                holds("pyramid", [2, 2], size, |b, x| {
                    let fine = conv(b, x, Conv2d::new(1, 1, 3).stride(2));
                    let coarse = conv(b, fine, Conv2d::new(1, 1, 3).stride(2));
                    let coarser = conv(b, coarse, Conv2d::new(1, 1, 3).stride(2));
                    let up = b.upsample_to(coarser, mode, coarse);
                    let sum = b.add(up, coarse);
                    let up = b.upsample_to(sum, mode, fine);
                    let sum = b.add(up, fine);
                    conv(b, sum, Conv2d::new(1, 1, 3))
                });
                // Pooling that leaves the last row off: 37 -> 18 -> 9.
                holds("pooled pyramid", [1, 1], size, |b, x| {
                    let half = b.max_pool(x, MaxPool::new(2, 2, 0));
                    let quarter = b.max_pool(half, MaxPool::new(2, 2, 0));
                    let up = b.upsample_to(quarter, mode, half);
                    let sum = b.add(up, half);
                    b.upsample_to(sum, mode, x)
                });
            }
        }
        let up = ConvTranspose2d {
            in_channels: 1,
            out_channels: 1,
            kernel: [4; 2],
            stride: [2; 2],
            padding: [1; 4],
            groups: 1,
            bias: false,
        };
        holds("transposed, cropped", [1, 1], [24, 28], |b, x| {
            let y = conv(b, x, Conv2d::new(1, 1, 3).stride(2));
            let y = b.conv_transpose("up", y, ConvTranspose2d { padding: [0; 4], ..up });
            b.crop(y, x, 1, 1)
        });
        holds("transposed", [1, 1], [24, 28], |b, x| {
            let y = conv(b, x, Conv2d::new(1, 1, 3).stride(2));
            b.conv_transpose("up", y, up)
        });
    }

    #[test]
    fn global_pooling_sees_everything() {
        let mut b = Builder::new();
        let x = b.input("x", 1);
        let y = b.global_avg_pool(x);
        b.output("y", y);
        assert_eq!(b.finish().receptive_field().pixels, [usize::MAX; 2]);
    }
}
