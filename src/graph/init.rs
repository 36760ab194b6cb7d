//! Parameters before training, from a seed: the same values on every platform.

use super::build::{Graph, Param, ParamRole};
#[cfg(feature = "train")]
use super::weights::WeightTensor;
use super::weights::Weights;

/// Pseudo-random numbers: SplitMix64 (Steele, Lea and Flood 2014). Only integer arithmetic and
/// exactly rounded float operations, hence the same sequence everywhere; not for secrets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rng(u64);

impl Rng {
    /// Generator for a seed; any seed is good.
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in `0..n`; `n` > 0. (The bias of the multiply method is below n / 2^64.)
    pub fn below(&mut self, n: usize) -> usize {
        assert!(n > 0, "no number lies below 0");
        ((u128::from(self.bits()) * n as u128) >> 64) as usize
    }

    /// Uniform in 0 <= v < 1, on a grid of 2^-24.
    pub fn uniform(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 24) as f32
    }

    /// Uniform in `low <= v < high` (up to rounding).
    pub fn range(&mut self, low: f32, high: f32) -> f32 {
        low + (high - low) * self.uniform()
    }

    /// Approximately normal with mean 0 and variance 1: the sum of twelve uniforms, less 6. Tails end
    /// at 6; unlike Box-Muller it needs no logarithm, which platforms round differently.
    pub fn normal(&mut self) -> f32 {
        (0..12).map(|_| self.uniform()).sum::<f32>() - 6.0
    }
}

impl Weights {
    /// Values for every parameter of `graph`, for tests and benchmarks: He-scaled normal weights
    /// (He et al. 2015, equation 10: variance 2 / fan-in), small biases, and batch normalisations as
    /// a trained network has them, no statistic trivial. A parameter's values depend on its name and
    /// the seed alone.
    pub fn random(graph: &Graph, seed: u64) -> Self {
        let mut weights = Self::default();
        for p in &graph.params {
            let mut rng = Rng::new(seed ^ hash(&p.name));
            let data = (0..p.len()).map(|_| random_value(p, &mut rng)).collect();
            weights.insert(&p.name, &p.shape, data);
        }
        weights
    }

    /// These weights with the parameters of `graph` that they lack as a new network starts: He-scaled normal weights (He et al.
    /// 2015, equation 10), zero biases, neutral normalisations.
    #[cfg(feature = "train")]
    pub fn completed(&self, graph: &Graph, seed: u64) -> Self {
        let random = Self::random(graph, seed);
        let mut all = Self { metadata: self.metadata.clone(), ..Self::default() };
        for p in &graph.params {
            let data = match (self.tensors.get(&p.name), p.role) {
                (Some(t), _) if t.shape == p.shape => t.data.clone(),
                (_, ParamRole::Weight { .. }) => random.tensors[&p.name].data.clone(),
                (_, ParamRole::NormScale | ParamRole::NormVariance) => vec![1.0; p.len()],
                (_, ParamRole::Bias | ParamRole::NormShift | ParamRole::NormMean) => vec![0.0; p.len()],
            };
            all.insert(&p.name, &p.shape, data);
        }
        all
    }
}

#[cfg(feature = "train")]
impl WeightTensor {
    /// These values (`[outputs, inputs, ...]`) with those of `smaller` as the first ones along every dimension; the outputs
    /// that `smaller` has see the inputs that it lacks by `share` of these values. Grown so in all its layers by a share of
    /// 0, a network has the outputs of the smaller one beside new ones (after Chen et al. 2016, Net2Net). None where
    /// `smaller` is larger along some dimension, or has others.
    pub(crate) fn grown_from(mut self, smaller: &Self, share: f32) -> Option<Self> {
        let fits = self.shape.len() == smaller.shape.len()
            && self.shape.iter().zip(&smaller.shape).all(|(large, small)| small <= large);
        if !fits {
            return None;
        }
        // The outputs that `smaller` has come first.
        let known = self.data.len() / self.shape[0] * smaller.shape[0];
        self.data[..known].iter_mut().for_each(|v| *v *= share);
        for (i, &value) in smaller.data.iter().enumerate() {
            // Where the element is here, from the last dimension on.
            let (mut rest, mut at, mut step) = (i, 0, 1);
            for (&large, &small) in self.shape.iter().zip(&smaller.shape).rev() {
                at += rest % small * step;
                rest /= small;
                step *= large;
            }
            self.data[at] = value;
        }
        Some(self)
    }
}

fn random_value(p: &Param, rng: &mut Rng) -> f32 {
    match p.role {
        ParamRole::Weight { fan_in } => rng.normal() * (2.0 / fan_in.max(1) as f32).sqrt(),
        ParamRole::Bias | ParamRole::NormShift | ParamRole::NormMean => 0.1 * rng.normal(),
        ParamRole::NormScale | ParamRole::NormVariance => rng.range(0.5, 1.5),
    }
}

/// FNV-1a of nothing.
pub(crate) const FNV_OFFSET: u64 = 0xcbf2_9ce4_8422_2325;

/// FNV-1a of `bytes` behind what has the hash `before`.
pub(crate) fn fnv1a(before: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(before, |h, &b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3))
}

fn hash(name: &str) -> u64 {
    fnv1a(FNV_OFFSET, name.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::Builder;
    use crate::layers::Conv2d;

    #[test]
    fn the_sequence_is_splitmix64() {
        // The first values of the published reference implementation for seed 1234567.
        let mut rng = Rng::new(1234567);
        assert_eq!([rng.bits(), rng.bits()], [6457827717110365317, 3203168211198807973]);
    }

    #[test]
    fn normal_values_have_unit_variance() {
        let mut rng = Rng::new(7);
        let values: Vec<f64> = (0..20_000).map(|_| rng.normal().into()).collect();
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / values.len() as f64;
        assert!(mean.abs() < 0.03 && (variance - 1.0).abs() < 0.03, "mean {mean}, variance {variance}");
        assert!((0..1000).all(|_| rng.below(3) < 3 && (0.0..1.0).contains(&rng.uniform())));
    }

    #[cfg(feature = "train")]
    #[test]
    fn a_tensor_grows_around_a_smaller_one() {
        let tensor = |shape: &[usize], from: f32| WeightTensor {
            shape: shape.to_vec(),
            data: (0..shape.iter().product::<usize>()).map(|i| from + i as f32).collect(),
        };
        let large = tensor(&[3, 3, 2], 100.0);
        let grown = large.clone().grown_from(&tensor(&[2, 1, 2], 1.0), 0.0).unwrap();
        let old = [1.0, 2.0, 0.0, 0.0, 0.0, 0.0, 3.0, 4.0, 0.0, 0.0, 0.0, 0.0];
        assert_eq!(grown.data[..12], old);
        assert_eq!(grown.data[12..], tensor(&[6], 112.0).data, "new outputs see all");
        for other in [&[4, 3, 2][..], &[3, 3], &[1, 1, 3]] {
            assert!(large.clone().grown_from(&tensor(other, 0.0), 0.0).is_none(), "{other:?}");
        }
    }

    #[test]
    fn values_depend_on_name_and_seed_alone() {
        let net = |names: &[&str]| {
            let mut b = Builder::new();
            let x = b.input("x", 8);
            names.iter().for_each(|n| {
                let y = b.conv(n, x, Conv2d::new(8, 8, 3));
                b.output(n, y);
            });
            b.finish()
        };
        let both = Weights::random(&net(&["a", "b"]), 1);
        let one = Weights::random(&net(&["b"]), 1);
        assert_eq!(both.tensors["b.weight"], one.tensors["b.weight"]);
        assert_ne!(both.tensors["a.weight"], both.tensors["b.weight"]);
        assert_ne!(one, Weights::random(&net(&["b"]), 2));
    }
}
