//! Which anchors enter the loss, and with what weight: the miners of HR and Group Sampling, over all
//! anchors of a picture at once or group by group.

use super::losses::Focal;
use crate::error::{Error, Result};
use crate::graph::init::Rng;
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// epsilon of Group Sampling Eq. 3.
pub const WRS_EPSILON: f32 = 1e-6;

/// How anchors are chosen. In TOML: `miner = { kind = "wrs" }`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Miner {
    /// Every anchor; `samples` plays no part.
    All {},
    /// Uniformly at random (RS).
    Random {},
    /// The highest losses, of positives and of negatives apart (Shrivastava et al. 2016).
    Ohem {},
    /// Weighted random sampling (Group Sampling Eq. 3): the highest w = r^(1 / (loss + 1e-6)) with r
    /// uniform in (0, 1), of positives and of negatives apart.
    Wrs {},
    /// HR, appendix B: anchors with a loss below `min-loss` are dropped, then at most `each` positives
    /// and `each` negatives are drawn at random. Within groups (`grouped`) the counts are those of
    /// group sampling instead, from what the dropping leaves.
    Balanced {
        /// Default 128.
        #[serde(default = "each")]
        each: usize,
        /// Default 0.03.
        #[serde(default = "min_loss", rename = "min-loss")]
        min_loss: f32,
    },
    /// Random, with the class weight the reciprocal of the sum of the focal factors
    /// `alpha_t (1 - p_t)^gamma` of the chosen anchors, for use with the focal loss. Without `samples`
    /// all anchors are chosen (RetinaNet); with it, Group Sampling's combination (Section 4.3).
    Focal {
        /// Default 0.25.
        #[serde(default = "alpha")]
        alpha: f32,
        /// Default 2.
        #[serde(default = "gamma")]
        gamma: f32,
    },
}

fn each() -> usize {
    128
}
fn min_loss() -> f32 {
    0.03
}
fn alpha() -> f32 {
    Focal::default().alpha
}
fn gamma() -> f32 {
    Focal::default().gamma
}

/// The sampler's settings.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct SamplerRecipe {
    /// Default random.
    pub miner: Miner,
    /// Group sampling (Section 4.2): the choice is made in each anchor group by itself; else once over
    /// all anchors. Default true.
    pub grouped: bool,
    /// N, anchors of a choice: a group, or the picture. Default 2048. 0 means no fixed number: all
    /// positives, and `negatives-per-positive` times as many negatives (SSD's rule), at least that
    /// many; all anchors with the focal miner.
    pub samples: usize,
    /// Default 3. Where positives are short, negatives fill the N; where negatives are, positives do.
    pub negatives_per_positive: usize,
    /// Whether a choice's losses are averaged or summed up; default the mean.
    pub reduction: Reduction,
    /// Anchors that cross the border of the picture, or of the example where that ends first, do not enter the loss (HR,
    /// appendix B, "Border cases"). Default false.
    pub within_picture: bool,
}

/// What becomes of the chosen anchors' losses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reduction {
    /// Their mean, boxes over the positives (Group Sampling Eq. 2).
    #[default]
    Mean,
    /// Their sum, which HR's learning rate is for.
    Sum,
}

impl Default for SamplerRecipe {
    fn default() -> Self {
        Self {
            miner: Miner::Random {},
            grouped: true,
            samples: 2048,
            negatives_per_positive: 3,
            reduction: Reduction::Mean,
            within_picture: false,
        }
    }
}

/// The chosen anchors of a group.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GroupSample {
    /// P_s: flat indices of the chosen positives, ascending.
    pub positives: Vec<usize>,
    /// N_s: flat indices of the chosen negatives, ascending.
    pub negatives: Vec<usize>,
    /// What the classification loss of each is multiplied by: 1 / (|P_s| + |N_s|) (Group Sampling
    /// Eq. 2), or 1 for their sum; see [`Miner::Focal`] for the other.
    pub class_weight: f32,
    /// What the box loss of each positive is multiplied by, before eta: 1 / |P_s|, or 1 for the sum.
    pub box_weight: f32,
}

impl SamplerRecipe {
    /// Errors where a setting is outside its range.
    pub fn check(&self) -> Result<()> {
        let bad = |what: &str| Err(Error::InvalidArgument(format!("sampler: {what}")));
        match self.miner {
            Miner::Balanced { each: 0, .. } => bad("each must be at least 1"),
            Miner::Balanced { min_loss, .. } if min_loss.is_nan() || min_loss < 0.0 => {
                bad("min-loss must be at least 0")
            }
            Miner::Focal { alpha, gamma } if !((0.0..=1.0).contains(&alpha) && gamma >= 0.0) => {
                bad("alpha must lie in 0 to 1 and gamma be at least 0")
            }
            _ if self.negatives_per_positive == 0 => bad("negatives-per-positive must be at least 1"),
            _ => Ok(()),
        }
    }

    /// True where the miner looks at the losses.
    pub fn needs_losses(&self) -> bool {
        !matches!(self.miner, Miner::All {} | Miner::Random {})
    }

    /// Chooses from the anchors of one picture: a sample a group with `grouped`, else one in all.
    ///
    /// `label` as [`super::matching::Matches::label`] has it: at least 0 a positive, -1 a negative, any
    /// other neither. `loss`: classification loss -ln p_t of each anchor, without weights; may be empty
    /// where [`SamplerRecipe::needs_losses`] says no. `groups`: flat index ranges. Average time is
    /// linear in the anchors. Panics where the lengths do not fit.
    pub fn sample(
        &self,
        label: &[i32],
        loss: &[f32],
        groups: &[Range<usize>],
        rng: &mut Rng,
    ) -> Vec<GroupSample> {
        if self.needs_losses() {
            assert_eq!(loss.len(), label.len(), "this miner needs a loss for every anchor");
        }
        if self.grouped {
            groups.iter().map(|g| self.sample_range(label, loss, g.clone(), rng)).collect()
        } else {
            vec![self.sample_range(label, loss, 0..label.len(), rng)]
        }
    }

    fn sample_range(&self, label: &[i32], loss: &[f32], range: Range<usize>, rng: &mut Rng) -> GroupSample {
        let dropped = match self.miner {
            Miner::Balanced { min_loss, .. } => min_loss,
            _ => f32::NEG_INFINITY,
        };
        let (mut positives, mut negatives) = (Vec::new(), Vec::new());
        for i in range {
            // A loss of NaN is not below anything: it stays, and shows in the sum.
            if dropped > 0.0 && loss[i] < dropped {
                continue;
            }
            match label[i] {
                0.. => positives.push(i),
                -1 => negatives.push(i),
                _ => {}
            }
        }
        let (p, n) = self.quota(positives.len(), negatives.len());
        self.choose(&mut positives, p, loss, rng);
        self.choose(&mut negatives, n, loss, rng);
        let share = |count: usize| match self.reduction {
            Reduction::Mean => 1.0 / count.max(1) as f32,
            Reduction::Sum => 1.0,
        };
        let class_weight = match self.miner {
            Miner::Focal { alpha, gamma } => {
                let focal = Focal { alpha, gamma };
                let sum = |chosen: &[usize], face| -> f64 {
                    chosen.iter().map(|&i| f64::from(focal.factor(loss[i], face))).sum()
                };
                let total = sum(&positives, true) + sum(&negatives, false);
                // Of a group learnt to perfection nothing is left to weigh.
                (1.0 / total.max(1e-6)) as f32
            }
            _ => share(positives.len() + negatives.len()),
        };
        GroupSample { class_weight, box_weight: share(positives.len()), positives, negatives }
    }

    /// How many of `p` positives and `n` negatives are chosen.
    fn quota(&self, p: usize, n: usize) -> (usize, usize) {
        let ratio = self.negatives_per_positive;
        match self.miner {
            Miner::All {} => (p, n),
            Miner::Focal { .. } if self.samples == 0 => (p, n),
            Miner::Balanced { each, .. } if !self.grouped => (p.min(each), n.min(each)),
            _ if self.samples == 0 => (p, n.min(ratio.saturating_mul(p.max(1)))),
            _ => {
                // Section 4.2: |P| + |N| = N first, then 3 |P| = |N| as far as there are positives.
                let wanted = (self.samples / (ratio + 1)).max(1).min(p);
                let negatives = n.min(self.samples - wanted);
                (p.min(self.samples - negatives), negatives)
            }
        }
    }

    /// Keeps `count` of the anchors `from`, in ascending order.
    fn choose(&self, from: &mut Vec<usize>, count: usize, loss: &[f32], rng: &mut Rng) {
        if count >= from.len() {
            return;
        }
        match self.miner {
            Miner::Ohem {} => keep_highest(from, count, |i| loss[i]),
            // ln w = ln(r) / (loss + epsilon) orders as Eq. 3 does, and does not underflow where w is 0.
            Miner::Wrs {} => keep_highest(from, count, |i| {
                let r = (rng.bits() >> 11) as f64 + 0.5;
                ((r / (1u64 << 53) as f64).ln() / f64::from(loss[i] + WRS_EPSILON)) as f32
            }),
            _ => {
                // The first steps of a Fisher-Yates shuffle.
                for k in 0..count {
                    let other = k + rng.below(from.len() - k);
                    from.swap(k, other);
                }
                from.truncate(count);
            }
        }
        from.sort_unstable();
    }
}

/// Keeps the `count` anchors with the highest keys; of equal ones those that come first.
fn keep_highest(from: &mut Vec<usize>, count: usize, mut key: impl FnMut(usize) -> f32) {
    if count > 0 && count < from.len() {
        let mut keyed: Vec<(f32, usize)> = from.iter().map(|&i| (key(i), i)).collect();
        keyed.select_nth_unstable_by(count - 1, |a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        from.iter_mut().zip(&keyed).take(count).for_each(|(f, k)| *f = k.1);
    }
    from.truncate(count);
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINERS: [Miner; 5] = [
        Miner::Random {},
        Miner::Ohem {},
        Miner::Wrs {},
        Miner::Focal { alpha: 0.25, gamma: 2.0 },
        Miner::Balanced { each: 128, min_loss: 0.0 },
    ];

    /// Random labels (positive, negative, ignored), losses, and up to five groups.
    fn draw(rng: &mut Rng) -> (Vec<i32>, Vec<f32>, Vec<Range<usize>>) {
        let mut groups = Vec::new();
        let (mut label, mut loss) = (Vec::new(), Vec::new());
        for _ in 0..1 + rng.below(5) {
            let share = rng.uniform() * rng.uniform();
            let first = label.len();
            for _ in 0..rng.below(400) {
                let u = rng.uniform();
                label.push(if u < share {
                    rng.below(9) as i32
                } else if u < 0.9 {
                    -1
                } else {
                    -2
                });
                loss.push(rng.uniform() * rng.uniform() * 4.0);
            }
            groups.push(first..label.len());
        }
        (label, loss, groups)
    }

    #[test]
    fn every_group_has_exactly_n_anchors_one_to_three() {
        let mut rng = Rng::new(21);
        let (mut exact, mut short, mut filled) = (0, 0, 0);
        for _ in 0..400 {
            let (label, loss, groups) = draw(&mut rng);
            let n = 1 + rng.below(200);
            for miner in MINERS {
                let recipe = SamplerRecipe { miner, samples: n, ..Default::default() };
                let got = recipe.sample(&label, &loss, &groups, &mut rng);
                assert_eq!(got.len(), groups.len());
                for (s, range) in got.iter().zip(&groups) {
                    let count =
                        |f: &dyn Fn(i32) -> bool| label[range.clone()].iter().filter(|l| f(**l)).count();
                    let (p, neg) = (count(&|l| l >= 0), count(&|l| l == -1));
                    assert_eq!(
                        s.positives.len() + s.negatives.len(),
                        n.min(p + neg),
                        "{miner:?} {p} {neg} {n}"
                    );
                    let wanted = (n / 4).max(1);
                    if p >= wanted && neg >= n - wanted {
                        assert_eq!(s.positives.len(), wanted);
                        exact += 1;
                    } else if p < wanted {
                        assert_eq!(s.positives.len(), p, "all there are");
                        short += 1;
                    } else {
                        assert_eq!(s.negatives.len(), neg, "all there are, positives fill");
                        filled += 1;
                    }
                    let distinct = |v: &[usize]| v.windows(2).all(|w| w[0] < w[1]);
                    assert!(distinct(&s.positives) && distinct(&s.negatives));
                    assert!(s.positives.iter().all(|&i| range.contains(&i) && label[i] >= 0));
                    assert!(s.negatives.iter().all(|&i| range.contains(&i) && label[i] == -1));
                    assert_eq!(s.box_weight, 1.0 / s.positives.len().max(1) as f32);
                    if !matches!(miner, Miner::Focal { .. }) {
                        assert_eq!(s.class_weight, 1.0 / n.min(p + neg).max(1) as f32);
                    }
                }
            }
        }
        assert!(exact > 500 && short > 500 && filled > 100, "{exact} {short} {filled}");
    }

    #[test]
    fn ohem_takes_the_highest_losses() {
        let mut rng = Rng::new(22);
        for _ in 0..200 {
            let (label, loss, _) = draw(&mut rng);
            for samples in [0, 40] {
                let recipe =
                    SamplerRecipe { miner: Miner::Ohem {}, grouped: false, samples, ..Default::default() };
                let s = &recipe.sample(&label, &loss, &[], &mut rng)[0];
                let mut hardest: Vec<usize> = (0..label.len()).filter(|i| label[*i] == -1).collect();
                hardest.sort_by(|a, b| loss[*b].total_cmp(&loss[*a]).then(a.cmp(b)));
                hardest.truncate(s.negatives.len());
                hardest.sort_unstable();
                assert_eq!(s.negatives, hardest);
                let (p, n) = (s.positives.len(), label.iter().filter(|l| **l == -1).count());
                if samples == 0 {
                    assert_eq!(p, label.iter().filter(|l| **l >= 0).count(), "all positives");
                    assert_eq!(s.negatives.len(), n.min(3 * p.max(1)), "1:3");
                }
            }
        }
    }

    #[test]
    fn wrs_prefers_high_losses_without_dropping_low_ones() {
        // Efraimidis and Spirakis: of two items the one with weight 3 to 1 wins with probability 3/4.
        let recipe = SamplerRecipe { miner: Miner::Wrs {}, grouped: false, samples: 1, ..Default::default() };
        let mut rng = Rng::new(23);
        let mut wins = 0;
        for _ in 0..4000 {
            let s = &recipe.sample(&[-1, -1], &[3.0, 1.0], &[], &mut rng)[0];
            wins += usize::from(s.negatives == [0]);
        }
        assert!((2880..3120).contains(&wins), "{wins} of 4000");
        // Losses so low that Eq. 3 is 0 in f32 are still told apart.
        let mut wins = 0;
        for _ in 0..400 {
            let s = &recipe.sample(&[-1, -1], &[1e-3, 0.0], &[], &mut rng)[0];
            wins += usize::from(s.negatives == [0]);
        }
        assert!(wins > 390, "{wins} of 400");
    }

    #[test]
    fn balanced_drops_the_easy_and_draws_at_most_128_of_each() {
        let miner = Miner::Balanced { each: 128, min_loss: 0.03 };
        let recipe = SamplerRecipe { miner, grouped: false, ..Default::default() };
        let mut rng = Rng::new(24);
        let label: Vec<i32> = (0..2000).map(|i| if i < 300 { 0 } else { -1 }).collect();
        let loss: Vec<f32> = (0..2000).map(|i| if i % 4 == 0 { 0.5 } else { 0.02 }).collect();
        let s = &recipe.sample(&label, &loss, &[], &mut rng)[0];
        assert_eq!((s.positives.len(), s.negatives.len()), (75, 128));
        assert!(s.positives.iter().chain(&s.negatives).all(|&i| loss[i] >= 0.03));
    }

    #[test]
    fn focal_normalises_by_its_own_factors_over_all_anchors() {
        let miner = Miner::Focal { alpha: 0.5, gamma: 1.0 };
        let recipe = SamplerRecipe { miner, grouped: false, samples: 0, ..Default::default() };
        // p_t = 1/2 and 1/4: factors 0.25, 0.375.
        let s = &recipe.sample(&[0, -2, -1], &[2f32.ln(), 9.0, 4f32.ln()], &[], &mut Rng::new(1))[0];
        assert_eq!((&s.positives[..], &s.negatives[..]), (&[0][..], &[2][..]));
        assert!((s.class_weight - 1.0 / 0.625).abs() < 1e-5, "{s:?}");
    }

    #[test]
    fn random_draws_are_uniform_and_repeatable() {
        let recipe = SamplerRecipe { samples: 8, ..Default::default() };
        let label = vec![-1; 32];
        let groups = vec![0..32usize; 1];
        let mut hits = [0; 32];
        let mut rng = Rng::new(25);
        for _ in 0..4000 {
            let s = recipe.sample(&label, &[], &groups, &mut rng);
            s[0].negatives.iter().for_each(|&i| hits[i] += 1);
        }
        assert!(hits.iter().all(|h| (850..1150).contains(h)), "1000 expected of each: {hits:?}");
        let draw = |seed| recipe.sample(&label, &[], &groups, &mut Rng::new(seed));
        assert!(draw(7) == draw(7) && draw(7) != draw(8));
        let all = SamplerRecipe { miner: Miner::All {}, ..recipe }.sample(&label, &[], &groups, &mut rng);
        assert_eq!(all[0].negatives.len(), 32);
    }

    #[test]
    fn recipes_read_with_defaults_and_are_checked() {
        let parse = |t: &str| serde_json::from_str::<SamplerRecipe>(t);
        assert_eq!(parse("{}").unwrap(), SamplerRecipe::default());
        let recipe = parse(r#"{"miner": {"kind": "balanced"}, "grouped": false}"#).unwrap();
        assert_eq!(recipe.miner, Miner::Balanced { each: 128, min_loss: 0.03 });
        recipe.check().unwrap();
        assert!(parse(r#"{"miner": {"kind": "wrs", "each": 1}}"#).is_err() && parse(r#"{"n": 1}"#).is_err());
        assert!(SamplerRecipe { negatives_per_positive: 0, ..recipe }.check().is_err());
    }
}
