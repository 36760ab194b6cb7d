//! Random networks: layers stacked into DAGs with random fan-out, compiled against raw.

use crate::support::{Parity, NETWORKS};
use farface::graph::init::Rng;
use farface::graph::{Builder, Graph, NodeId};
use farface::layers::{
    Activation, Conv2d, ConvTranspose2d, Crop, Interpolation, MaxPool, Upsample, UpsampleTo,
};
use farface::shape::Shape;

/// A network under construction: every map with its shape, newest last.
struct Generator {
    rng: Rng,
    b: Builder,
    maps: Vec<(NodeId, Shape)>,
    convs: Vec<(String, Conv2d)>,
}

impl Generator {
    fn new(seed: u64) -> Self {
        Self { rng: Rng::new(seed), b: Builder::new(), maps: Vec::new(), convs: Vec::new() }
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.rng.below(from.len())]
    }

    /// A map, one of the last few more often than not: chains form, and earlier maps fan out.
    fn map(&mut self) -> (NodeId, Shape) {
        let recent = self.maps.len().saturating_sub(3);
        let from = if self.rng.below(3) < 2 { recent } else { 0 };
        self.maps[from + self.rng.below(self.maps.len() - from)]
    }

    /// A map that `wanted` holds for.
    fn map_where(&mut self, wanted: impl Fn(Shape) -> bool) -> Option<(NodeId, Shape)> {
        let fit: Vec<_> = self.maps.iter().copied().filter(|m| wanted(m.1)).collect();
        (!fit.is_empty()).then(|| self.pick(&fit))
    }

    fn conv(&mut self, (x, s): (NodeId, Shape)) -> (NodeId, Shape) {
        // Sometimes the weights of an earlier convolution.
        let known: Vec<usize> =
            (0..self.convs.len()).filter(|&i| self.convs[i].1.in_channels == s.c).collect();
        let (name, conv) = if !known.is_empty() && self.rng.below(5) == 0 {
            let i = self.pick(&known);
            self.convs[i].clone()
        } else {
            let kernel = self.pick(&[[1, 1], [1, 1], [3, 3], [3, 3], [1, 5], [5, 1]]);
            let out = self.pick(&[1, 3, 4, 8, 12, 17, 33]);
            let mut conv = Conv2d::rect(s.c, out, kernel[0], kernel[1]);
            match self.rng.below(6) {
                0 => conv = Conv2d::depthwise(s.c, 3),
                1 => conv = conv.stride(2),
                2 => conv = conv.dilation(2),
                3 if s.c.is_multiple_of(2) && out.is_multiple_of(2) => conv = conv.groups(2),
                _ => {}
            }
            conv.bias = self.rng.below(2) == 0;
            (format!("conv{}", self.convs.len()), conv)
        };
        let shape = conv.out_shape(s).expect("same padding fits every map");
        let id = self.b.conv(&name, x, conv);
        self.convs.push((name, conv));
        (id, shape)
    }

    /// One more layer, if the chosen kind fits a map there is.
    fn layer(&mut self) -> Option<(NodeId, Shape)> {
        let (x, s) = self.map();
        let mode = self.pick(&[Interpolation::Nearest, Interpolation::Nearest, Interpolation::Bilinear]);
        Some(match self.rng.below(17) {
            0..=3 => self.conv((x, s)),
            4 | 5 => {
                let name = format!("bn{}", self.maps.len());
                (self.b.batchnorm(&name, x, s.c), s)
            }
            6..=8 => {
                let last = Activation::Softmax(s.c);
                let a = self.pick(&[
                    Activation::Relu,
                    Activation::Relu,
                    Activation::LeakyRelu(0.1),
                    Activation::Sigmoid,
                    last,
                ]);
                (self.b.activation(x, a), s)
            }
            9..=11 => {
                let (other, _) = self.map_where(|o| o == s)?;
                (self.b.add(x, other), s)
            }
            12 | 13 => {
                let mut parts = vec![(x, s)];
                for _ in 0..1 + self.rng.below(3) {
                    parts.push(self.map_where(|o| (o.h, o.w) == (s.h, s.w))?);
                }
                let c = parts.iter().map(|p| p.1.c).sum();
                let ids: Vec<NodeId> = parts.iter().map(|p| p.0).collect();
                (c <= 64).then(|| (self.b.concat(&ids), Shape { c, ..s }))?
            }
            14 => {
                let (like, size) = self.map_where(|o| (o.h, o.w) != (s.h, s.w))?;
                let to = Shape { h: size.h, w: size.w, ..s };
                let layer = Upsample { mode, to: UpsampleTo::SizeOfSecond };
                assert_eq!(layer.out_shape(&[s, size]).ok(), Some(to));
                // Mostly straight into a sum, as pyramids have it.
                let up = self.b.upsample_to(x, mode, like);
                match self.map_where(|o| o == to) {
                    Some((lateral, _)) if self.rng.below(3) > 0 => (self.b.add(lateral, up), to),
                    _ => (up, to),
                }
            }
            15 => match self.rng.below(3) {
                0 => {
                    let (like, size) = self.map_where(|o| o.h <= s.h && o.w <= s.w)?;
                    let (top, left) = (self.rng.below(s.h - size.h + 1), self.rng.below(s.w - size.w + 1));
                    let shape = Crop { top, left }.out_shape(&[s, size]).expect("corner inside");
                    (self.b.crop(x, like, top, left), shape)
                }
                1 => {
                    let pool =
                        self.pick(&[MaxPool::new(3, 2, 1), MaxPool::new(2, 1, 1), MaxPool::new(3, 1, 1)]);
                    (self.b.max_pool(x, pool), pool.out_shape(s).expect("pads to fit"))
                }
                _ => (self.b.global_avg_pool(x), Shape { h: 1, w: 1, ..s }),
            },
            _ => {
                let up = ConvTranspose2d {
                    in_channels: s.c,
                    out_channels: 4,
                    kernel: [4; 2],
                    stride: [2; 2],
                    padding: [1; 4],
                    groups: 1,
                    bias: true,
                };
                let small = s.h * s.w < 200;
                let name = format!("up{}", self.maps.len());
                small.then(|| (self.b.conv_transpose(&name, x, up), up.out_shape(s).expect("grows")))?
            }
        })
    }

    fn finish(mut self, layers: usize) -> (Graph, Vec<Shape>) {
        let shape = Shape::new(
            1 + self.rng.below(2),
            1 + self.rng.below(6),
            3 + self.rng.below(14),
            3 + self.rng.below(14),
        );
        let inputs: Vec<Shape> = (0..1 + self.rng.below(2)).map(|_| shape).collect();
        for (i, s) in inputs.iter().enumerate() {
            let id = self.b.input(&format!("input{i}"), s.c);
            self.maps.push((id, *s));
        }
        while self.maps.len() < layers {
            let new = self.layer();
            self.maps.extend(new);
        }
        // The last map and some others; what leads to none of them is dead.
        let mut outputs = vec![self.maps.len() - 1];
        outputs.extend((0..self.rng.below(4)).map(|_| self.rng.below(self.maps.len())));
        for (i, at) in outputs.into_iter().enumerate() {
            self.b.output(&format!("out{i}"), self.maps[at].0);
        }
        (self.b.finish(), inputs)
    }
}

#[test]
fn random_networks_compiled_are_random_networks_raw() {
    let mut parity = Parity::new();
    for seed in 0..NETWORKS {
        let (graph, shapes) = Generator::new(seed).finish(6 + seed as usize % 30);
        parity.check_random(&format!("random network {seed}"), &graph, &shapes, seed);
    }
    parity.report("random networks");
}
