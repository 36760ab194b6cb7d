//! What is asked for of a network's outputs, and what that asks of its steps: a step that no wanted output needs is left out,
//! one that only wanted pixels need computes what is near them.

use super::compile::Compiled;
use super::fuse::ValueId;
use crate::cpu::program::Near;
use crate::error::{Error, Result};
use crate::shape::Shape;

/// What is asked for of one output.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Want {
    /// All of it.
    #[default]
    All,
    /// Nothing; it has no pixels then.
    Nothing,
    /// The pixels where any channel of another output of the same size is above `least`. The others hold anything.
    Where {
        /// Number of the other output.
        output: usize,
        /// The least value that does not count.
        least: f32,
    },
}

/// What is asked for of a tensor or step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Need {
    Nothing,
    Near(Near),
    All,
}

impl Need {
    /// What satisfies both.
    fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::Nothing, need) | (need, Self::Nothing) => need,
            (Self::Near(a), Self::Near(b)) if a.gate == b.gate => {
                Self::Near(Near { grow: std::array::from_fn(|side| a.grow[side].max(b.grow[side])), ..a })
            }
            _ => Self::All,
        }
    }
}

/// What each step of a network is asked for.
pub(crate) struct Demand {
    pub steps: Vec<Need>,
    /// The values that tell where, and the least that does not count.
    pub gates: Vec<(ValueId, f32)>,
}

impl Demand {
    /// For these shapes of the network's nodes; outputs beyond `wants` are wanted whole.
    pub fn new(network: &Compiled, shapes: &[Shape], wants: &[Want]) -> Result<Self> {
        let shape = |v: ValueId| network.values[v.0].shape(shapes);
        let same_map = |a: ValueId, b: ValueId| {
            let (a, b) = (shape(a), shape(b));
            (a.n, a.h, a.w) == (1, b.h, b.w) && b.n == 1
        };
        let mut needs = vec![Need::Nothing; network.values.len()];
        let mut gates: Vec<(ValueId, f32)> = Vec::new();
        let ask = |needs: &mut Vec<Need>, value: ValueId, need: Need| {
            let root = network.root(value).0 .0;
            needs[root] = needs[root].and(need);
        };
        for (i, &value) in network.outputs.iter().enumerate() {
            let need = match wants.get(i).copied().unwrap_or_default() {
                Want::All => Need::All,
                Want::Nothing => Need::Nothing,
                Want::Where { output, least } => {
                    let map = network.outputs.get(output).filter(|&&map| map != value);
                    let map = *map.ok_or_else(|| {
                        Error::InvalidArgument(format!("output {i} is asked for by output {output}"))
                    })?;
                    // Whoever asks, the map that tells is computed whole.
                    ask(&mut needs, map, Need::All);
                    if same_map(map, value) {
                        let gate = gates.iter().position(|&g| g == (map, least)).unwrap_or(gates.len());
                        if gate == gates.len() {
                            gates.push((map, least));
                        }
                        Need::Near(Near { gate, grow: [0; 4] })
                    } else {
                        Need::All
                    }
                }
            };
            ask(&mut needs, value, need);
        }
        // The last step that writes a gate's map: only later ones know what it says.
        let written = |map: ValueId| {
            let root = network.root(map).0;
            network.steps.iter().rposition(|s| network.root(s.output).0 == root).unwrap_or(usize::MAX)
        };
        let known: Vec<usize> = gates.iter().map(|&(map, _)| written(map)).collect();
        let mut steps = vec![Need::Nothing; network.steps.len()];
        for (i, step) in network.steps.iter().enumerate().rev() {
            let possible = |near: &Near| {
                step.op.masks() && known[near.gate] < i && same_map(gates[near.gate].0, step.output)
            };
            let need = match needs[network.root(step.output).0 .0] {
                Need::Near(near) if !possible(&near) => Need::All,
                need => need,
            };
            steps[i] = need;
            for (k, &input) in step.inputs.iter().enumerate() {
                let reads = if k == 0 { step.op.reads() } else { Some([0; 4]) };
                let of_input = match (need, reads) {
                    (Need::Nothing, _) => Need::Nothing,
                    (Need::Near(near), Some(reads)) if same_map(step.output, input) => {
                        let grow = std::array::from_fn(|side| near.grow[side] + reads[side]);
                        Need::Near(Near { grow, ..near })
                    }
                    _ => Need::All,
                };
                ask(&mut needs, input, of_input);
            }
        }
        Ok(Self { steps, gates })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::{Arena, Isa, Pool};
    use crate::graph::{Builder, Graph, NodeId, Plan, Weights};
    use crate::layers::{Conv2d, Interpolation};
    use crate::shape::Tensor;

    /// Same values but for roundings: Winograd's tiles have zeros where nothing was computed.
    fn close(a: &[f32], b: &[f32]) -> bool {
        a.iter().zip(b).all(|(a, b)| (a - b).abs() <= 1e-5 * a.abs().max(1.0))
    }

    /// A pyramid of two levels of which the first is asked twice: outputs `first`, `class`, `box` on the fine level and `far`
    /// on the coarse one. Heads have branches of several windows, joined; the fine level takes the coarse one enlarged.
    fn asked_twice(mode: Interpolation) -> Graph {
        let mut b = Builder::new();
        let image = b.input("image", 3);
        let conv = |b: &mut Builder, name: &str, x: NodeId, c: Conv2d| {
            let y = b.conv(name, x, c.bias());
            b.relu(y)
        };
        let fine = conv(&mut b, "fine", image, Conv2d::new(3, 8, 3).stride(2));
        let coarse = conv(&mut b, "coarse", fine, Conv2d::new(8, 12, 3).stride(2));
        let first = b.conv("first", fine, Conv2d::new(8, 2, 1).bias());
        b.output("first", first);
        let lateral = b.conv("lateral", fine, Conv2d::new(8, 12, 1));
        let up = b.upsample_to(coarse, mode, lateral);
        let merged = b.add(lateral, up);
        let depthwise = conv(&mut b, "depthwise", merged, Conv2d::depthwise(12, 3));
        for (name, channels) in [("class", 2), ("box", 8)] {
            let x = conv(&mut b, &format!("{name}.widen"), depthwise, Conv2d::new(12, 16, 3));
            // By Winograd's algorithm, the second time with windows that look to the top left.
            let x = conv(&mut b, &format!("{name}.again"), x, Conv2d::new(16, 16, 3));
            let aside = Conv2d { padding: [2, 2, 0, 0], ..Conv2d::new(16, 16, 3) };
            let x = conv(&mut b, &format!("{name}.aside"), x, aside);
            let wide = conv(&mut b, &format!("{name}.wide"), x, Conv2d::rect(16, 6, 1, 5));
            let high = conv(&mut b, &format!("{name}.high"), x, Conv2d::rect(16, 5, 5, 1));
            let far = conv(&mut b, &format!("{name}.far"), x, Conv2d::new(16, 5, 3).dilation(2));
            let all = b.concat(&[wide, high, far, x]);
            let y = b.conv(&format!("{name}.predict"), all, Conv2d::new(32, channels, 1).bias());
            b.output(name, y);
        }
        let far = b.conv("far", coarse, Conv2d::new(12, 4, 3));
        b.output("far", far);
        b.finish()
    }

    /// Noise from -1 to 1, of this seed.
    fn noise(shape: Shape, seed: u64) -> Tensor {
        let value = |i: u64| {
            let mixed = (i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15 ^ seed << 17);
            ((mixed ^ mixed >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        Tensor::from_vec(shape, (0..shape.len() as u64).map(value).collect())
    }

    fn outputs(network: &Compiled, picture: &Tensor, wants: &[Want], threads: usize) -> (Vec<Tensor>, usize) {
        let plan = Plan::for_wants(network, &[picture.shape], wants).unwrap();
        let mut arena = Arena::default();
        arena.reserve(plan.floats()).unwrap();
        // What is not computed must not be read either.
        arena.floats_mut().fill(f32::NAN);
        let mut pool = Pool::new(threads).unwrap();
        (plan.run_tensors(&mut arena, &mut pool, std::slice::from_ref(picture)).unwrap(), plan.steps())
    }

    #[test]
    fn the_wanted_pixels_are_those_of_the_whole_map() {
        for mode in [Interpolation::Nearest, Interpolation::Bilinear] {
            let graph = asked_twice(mode);
            for isa in Isa::supported() {
                let network = Compiled::new(&graph, &Weights::random(&graph, 3), isa).unwrap();
                for (size, seed) in [([70, 150], 1), ([33, 41], 2), ([8, 300], 3)] {
                    let picture = noise(Shape::new(1, 3, size[0], size[1]), seed);
                    let (whole, steps) = outputs(&network, &picture, &[], 1);
                    let mut firsts = whole[0].data.clone();
                    firsts.sort_by(f32::total_cmp);
                    for (share, threads) in [(0.0, 1), (0.004, 1), (0.02, 3), (0.3, 2), (1.0, 1)] {
                        let n = ((1.0 - share) * (firsts.len() - 1) as f64) as usize;
                        let least = if share == 1.0 { f32::NEG_INFINITY } else { firsts[n] };
                        let near = Want::Where { output: 0, least };
                        let (found, same) = outputs(&network, &picture, &[Want::All, near, near], threads);
                        assert_eq!(same, steps);
                        assert_eq!((&found[0], &found[3]), (&whole[0], &whole[3]));
                        let cells = whole[0].data.chunks_exact(2).enumerate();
                        let wanted = cells.filter(|(_, c)| c.iter().any(|&v| v > least)).map(|(i, _)| i);
                        let wanted: Vec<usize> = wanted.collect();
                        assert!(wanted.len() as f64 >= share * 0.5 * (firsts.len() / 2) as f64);
                        for (found, whole) in found[1..3].iter().zip(&whole[1..3]) {
                            let c = whole.shape.c;
                            for &i in &wanted {
                                let [a, b] = [found, whole].map(|t| &t.data[i * c..][..c]);
                                assert!(close(a, b), "{isa:?} {i}: {a:?} {b:?}");
                            }
                            // And the others were left out: something else stands there.
                            let pairs = found.data.chunks_exact(c).zip(whole.data.chunks_exact(c));
                            let computed = pairs.filter(|(a, b)| close(a, b)).count();
                            let all = whole.data.len() / c;
                            assert!(share > 0.1 || computed < all / 2, "{computed} of {all} at {share}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn what_only_unwanted_outputs_need_is_not_computed() {
        let graph = asked_twice(Interpolation::Bilinear);
        let network = Compiled::new(&graph, &Weights::random(&graph, 3), Isa::Generic).unwrap();
        let picture = noise(Shape::new(1, 3, 40, 60), 5);
        let (whole, _) = outputs(&network, &picture, &[], 2);
        // Not wanted itself, but asked by the others.
        let near = Want::Where { output: 0, least: 0.0 };
        let (found, _) = outputs(&network, &picture, &[Want::Nothing, near, near], 2);
        let (same, _) = outputs(&network, &picture, &[Want::All, near, near], 2);
        assert!(found[0].data.is_empty());
        for (found, same) in found[1..].iter().zip(&same[1..]) {
            let cells = |t: &Tensor| -> Vec<Vec<f32>> {
                let c = t.shape.c;
                let asked = same.shape != whole[3].shape;
                let all = t.data.chunks_exact(c).zip(whole[0].data.chunks_exact(2));
                let picked = all.filter(|(_, first)| !asked || first.iter().any(|&v| v > 0.0));
                picked.map(|(cell, _)| cell.to_vec()).collect()
            };
            assert_eq!(cells(found), cells(same));
        }
        let (found, steps) = outputs(&network, &picture, &[Want::Nothing, Want::Nothing, Want::Nothing], 2);
        assert_eq!(found[3], whole[3]);
        assert!(found[..3].iter().all(|t| t.data.is_empty()));
        assert_eq!(steps, 3, "fine, coarse, far");
        let (found, _) = outputs(&network, &picture, &[Want::All, Want::Nothing], 1);
        assert_eq!((&found[0], &found[2..]), (&whole[0], &whole[2..]));
        assert!(found[1].data.is_empty());
    }

    #[test]
    fn an_output_cannot_ask_for_itself_or_for_none() {
        let graph = asked_twice(Interpolation::Nearest);
        let network = Compiled::new(&graph, &Weights::random(&graph, 3), Isa::Generic).unwrap();
        let shape = [Shape::new(1, 3, 32, 32)];
        for output in [1, 9] {
            let wants = [Want::All, Want::Where { output, least: 0.0 }];
            assert!(Plan::for_wants(&network, &shape, &wants).is_err(), "{output}");
        }
        // A map of another size tells nothing: everything is computed.
        let near = Want::Where { output: 3, least: f32::INFINITY };
        let picture = noise(shape[0], 1);
        let (found, _) = outputs(&network, &picture, &[Want::All, near], 1);
        assert_eq!(found, outputs(&network, &picture, &[], 1).0);
    }
}
