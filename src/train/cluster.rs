//! Templates from the faces that there are: K-medoids of box sizes under the Jaccard distance (HR, section 3.2, Eq. 1).

use crate::detect::hr::Template;
use crate::error::{Error, Result};
use crate::graph::init::Rng;

/// Rounds after which a clustering that still moves is taken as it is.
const MAX_ROUNDS: usize = 200;
/// Faces less high than this are looked for on the picture enlarged twice (section 3.2), pixels.
const SMALL_PX: f32 = 40.0;
/// Faces higher than this, on the picture at half its size.
const LARGE_PX: f32 = 140.0;

/// Eq. 1: 1 - IoU of two boxes of these widths and heights about one centre.
pub fn jaccard_distance(a: [f32; 2], b: [f32; 2]) -> f32 {
    let shared = a[0].min(b[0]) * a[1].min(b[1]);
    1.0 - shared / (a[0] * a[1] + b[0] * b[1] - shared)
}

/// The template for faces of this width and height: on the level where such faces are 40 to 140 px high, of those that
/// section 3.2 tries.
pub fn template([width, height]: [f32; 2]) -> Template {
    let scale = match height {
        h if h < SMALL_PX => 2.0,
        h if h > LARGE_PX => 0.5,
        _ => 1.0,
    };
    Template { width: width * scale, height: height * scale, scale }
}

/// A medoid and its cluster.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cluster {
    /// Width and height of the box in the middle: one of the data.
    pub medoid: [f32; 2],
    /// Boxes nearest to it.
    pub boxes: usize,
    /// Their mean Jaccard distance from it.
    pub distance: f64,
}

/// Clusters by falling height.
#[derive(Clone, Debug, PartialEq)]
pub struct Clustering {
    /// The clusters.
    pub clusters: Vec<Cluster>,
    /// Mean distance of all boxes from their medoids.
    pub distance: f64,
    /// Rounds until nothing moved.
    pub rounds: usize,
}

/// A size and how many boxes have it.
#[derive(Clone, Copy)]
struct Weighted {
    size: [f32; 2],
    count: f64,
}

/// `k` clusters of boxes' widths and heights: medoids drawn far apart (k-means++, Arthur and Vassilvitskii 2007), then every box
/// to its nearest medoid and every medoid to the middle of its boxes until nothing moves. The best of `starts`; the same for
/// the same `seed`. `progress(starts done, starts)`.
///
/// Errors: sizes that are not above 0 and finite, fewer different ones than `k`, `k` or `starts` of 0.
pub fn k_medoids(
    sizes: &[[f32; 2]],
    k: usize,
    seed: u64,
    starts: usize,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Clustering> {
    let all = distinct(sizes)?;
    if k == 0 || starts == 0 || k > all.len() {
        return Err(Error::InvalidArgument(format!(
            "{k} clusters from {starts} starts: the {} boxes have {} different sizes; both are at least 1, the clusters no more than the sizes",
            sizes.len(),
            all.len()
        )));
    }
    let mut best: Option<Clustering> = None;
    for start in 0..starts {
        progress(start, starts);
        let found = clustered(&all, k, &mut Rng::new(Rng::new(seed).bits() ^ start as u64));
        if best.as_ref().is_none_or(|b| found.distance < b.distance) {
            best = Some(found);
        }
    }
    progress(starts, starts);
    best.ok_or_else(|| Error::Internal("no clustering".into()))
}

/// The sizes that differ, in a fixed order.
fn distinct(sizes: &[[f32; 2]]) -> Result<Vec<Weighted>> {
    if let Some(bad) = sizes.iter().find(|s| !s.iter().all(|v| v.is_finite() && *v > 0.0)) {
        return Err(Error::InvalidArgument(format!(
            "a box of {} x {} has no size to cluster",
            bad[0], bad[1]
        )));
    }
    let mut sorted = sizes.to_vec();
    sorted.sort_unstable_by(|a, b| a[1].total_cmp(&b[1]).then(a[0].total_cmp(&b[0])));
    let groups = sorted.chunk_by(|a, b| a == b);
    Ok(groups.map(|same| Weighted { size: same[0], count: same.len() as f64 }).collect())
}

fn clustered(all: &[Weighted], k: usize, rng: &mut Rng) -> Clustering {
    let mut medoids = spread(all, k, rng);
    let mut members: Vec<Vec<usize>> = vec![Vec::new(); k];
    let mut rounds = 0;
    while rounds < MAX_ROUNDS {
        rounds += 1;
        let before = std::mem::replace(&mut members, nearest(all, &medoids));
        let moved: Vec<usize> = (0..k)
            .map(|c| {
                // The middle of the same boxes is the same.
                let same = rounds > 1 && members[c] == before[c];
                if same {
                    medoids[c]
                } else {
                    middle(all, &members[c], medoids[c])
                }
            })
            .collect();
        if moved == medoids {
            break;
        }
        medoids = moved;
    }
    let mut clusters: Vec<Cluster> = medoids
        .iter()
        .zip(&members)
        .map(|(&medoid, members)| {
            let boxes: f64 = members.iter().map(|&i| all[i].count).sum();
            Cluster {
                medoid: all[medoid].size,
                boxes: boxes as usize,
                // Of two sizes too close to tell apart one has all boxes.
                distance: if boxes > 0.0 { cost(all, members, medoid) / boxes } else { 0.0 },
            }
        })
        .collect();
    clusters.sort_by(|a, b| b.medoid[1].total_cmp(&a.medoid[1]).then(b.medoid[0].total_cmp(&a.medoid[0])));
    let (sum, boxes) = clusters
        .iter()
        .fold((0.0, 0.0), |(sum, boxes), c| (sum + c.distance * c.boxes as f64, boxes + c.boxes as f64));
    Clustering { clusters, distance: sum / boxes, rounds }
}

fn distance(a: &Weighted, b: &Weighted) -> f64 {
    f64::from(jaccard_distance(a.size, b.size))
}

/// First medoids: each drawn by its count and the square of its distance from those before.
fn spread(all: &[Weighted], k: usize, rng: &mut Rng) -> Vec<usize> {
    let mut medoids: Vec<usize> = Vec::with_capacity(k);
    let mut far = vec![1.0f64; all.len()];
    while medoids.len() < k {
        let weight = |i: usize| if medoids.contains(&i) { 0.0 } else { all[i].count * far[i] * far[i] };
        let total: f64 = (0..all.len()).map(weight).sum();
        let mut at = f64::from(rng.uniform()) * total;
        // Rounding may leave `at` behind the last weight.
        let mut chosen = (0..all.len()).rev().find(|i| !medoids.contains(i)).unwrap_or(0);
        for i in 0..all.len() {
            let w = weight(i);
            if w > 0.0 && at < w {
                chosen = i;
                break;
            }
            at -= w;
        }
        medoids.push(chosen);
        for (far, size) in far.iter_mut().zip(all) {
            *far = far.min(distance(size, &all[chosen]));
        }
    }
    medoids
}

/// For each medoid the sizes that are nearest to it, of equally near ones the first.
fn nearest(all: &[Weighted], medoids: &[usize]) -> Vec<Vec<usize>> {
    let mut members = vec![Vec::new(); medoids.len()];
    for (i, size) in all.iter().enumerate() {
        let far = |c: &usize| distance(size, &all[medoids[*c]]);
        let best = (0..medoids.len()).min_by(|a, b| far(a).total_cmp(&far(b))).unwrap_or(0);
        members[best].push(i);
    }
    members
}

/// Sum of the members' distances from `from`.
fn cost(all: &[Weighted], members: &[usize], from: usize) -> f64 {
    Members::new(all, members).sum(all[from].size)
}

/// The member with the least sum of distances from all, of equal ones `medoid` or else the first. Exact, but few sums are
/// computed (Newling and Fleuret 2017, "A sub-quadratic exact medoid algorithm"): since the Jaccard distance is a metric, a
/// sum S(i) bounds that of every other member, S(j) >= |S(i) - n d(i, j)|.
fn middle(all: &[Weighted], members: &[usize], medoid: usize) -> usize {
    let mut own = Members::new(all, members);
    let count: f64 = members.iter().map(|&i| all[i].count).sum();
    let (mut best, mut least) = (medoid, own.sum(all[medoid].size));
    // Sums and bounds are rounded to f32 here and there: they give way by more.
    let slack = 1e-5 * count;
    let mut bound = vec![0.0f32; members.len()];
    for m in 0..members.len() {
        if f64::from(bound[m]) - slack >= least {
            continue;
        }
        let sum = own.sum(all[members[m]].size);
        if sum < least {
            (best, least) = (members[m], sum);
        }
        let (sum, count) = (sum as f32, count as f32);
        for (bound, d) in bound.iter_mut().zip(&own.distances) {
            *bound = bound.max((sum - count * d).abs());
        }
    }
    best
}

/// The sizes of a cluster, side by side for wide registers.
struct Members {
    widths: Vec<f32>,
    heights: Vec<f32>,
    counts: Vec<f32>,
    /// From the last size whose sum was asked for.
    distances: Vec<f32>,
}

/// Partial sums.
const LANES: usize = 16;

impl Members {
    fn new(all: &[Weighted], members: &[usize]) -> Self {
        let of = |f: fn(&Weighted) -> f32| members.iter().map(|&i| f(&all[i])).collect();
        Self {
            widths: of(|w| w.size[0]),
            heights: of(|w| w.size[1]),
            counts: of(|w| w.count as f32),
            distances: vec![0.0; members.len()],
        }
    }

    /// Sum of all distances from `size`, each times its count.
    fn sum(&mut self, size: [f32; 2]) -> f64 {
        let sides = self.widths.iter().zip(&self.heights);
        for (d, (&w, &h)) in self.distances.iter_mut().zip(sides) {
            *d = jaccard_distance(size, [w, h]);
        }
        let (distances, rest) = self.distances.as_chunks::<LANES>();
        let (counts, last) = self.counts.as_chunks::<LANES>();
        let mut sums = [0.0f64; LANES];
        for (d, n) in distances.iter().zip(counts) {
            for lane in 0..LANES {
                sums[lane] += f64::from(d[lane] * n[lane]);
            }
        }
        let rest: f64 = rest.iter().zip(last).map(|(d, n)| f64::from(d * n)).sum();
        sums.iter().sum::<f64>() + rest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sizes(n: usize, seed: u64) -> Vec<[f32; 2]> {
        let mut rng = Rng::new(seed);
        let mut size = || {
            let h = (10f32.ln() + 3.0 * rng.uniform() * rng.uniform()).exp();
            [(h * (0.8 + 0.1 * rng.normal().abs())).max(1.0), h]
        };
        (0..n).map(|_| size()).collect()
    }

    #[test]
    fn the_distance_is_one_less_the_iou() {
        assert_eq!(jaccard_distance([10.0, 20.0], [10.0, 20.0]), 0.0);
        // 5 x 20 of 10 x 20 and 5 x 40.
        assert!((jaccard_distance([10.0, 20.0], [5.0, 40.0]) - (1.0 - 100.0 / 300.0)).abs() < 1e-6);
    }

    #[test]
    fn the_middle_is_that_of_all_sums() {
        for seed in 0..20 {
            let mut data = sizes(150, seed);
            data.extend_from_within(..40);
            let all = distinct(&data).unwrap();
            let members: Vec<usize> = (0..all.len()).collect();
            let found = middle(&all, &members, 7);
            let least = members.iter().map(|&i| cost(&all, &members, i)).fold(f64::INFINITY, f64::min);
            assert!(cost(&all, &members, found) <= least, "seed {seed}");
        }
    }

    #[test]
    fn separate_clusters_are_found_and_counted() {
        let mut rng = Rng::new(9);
        let centers = [[10.0f32, 12.0], [40.0, 50.0], [30.0, 90.0], [200.0, 220.0]];
        let counts = [300, 100, 50, 20];
        let mut data = Vec::new();
        for (center, count) in centers.iter().zip(counts) {
            data.extend((0..count).map(|_| center.map(|v| v * (1.0 + 0.02 * rng.normal()))));
        }
        let found = k_medoids(&data, 4, 1, 3, &mut |_, _| {}).unwrap();
        let expected = [(centers[3], 20), (centers[2], 50), (centers[1], 100), (centers[0], 300)];
        for (cluster, (center, boxes)) in found.clusters.iter().zip(expected) {
            assert_eq!(cluster.boxes, boxes);
            assert!(jaccard_distance(cluster.medoid, center) < 0.05, "{cluster:?}");
            assert!(data.contains(&cluster.medoid), "a medoid is one of the boxes");
        }
        assert_eq!(found, k_medoids(&data, 4, 1, 3, &mut |_, _| {}).unwrap());
    }

    #[test]
    fn no_single_move_of_a_box_or_medoid_is_better() {
        let data = sizes(400, 4);
        let found = k_medoids(&data, 6, 2, 1, &mut |_, _| {}).unwrap();
        let total = |medoids: &[[f32; 2]]| -> f64 {
            let near = |s: &[f32; 2]| medoids.iter().map(|m| jaccard_distance(*s, *m)).fold(1.0, f32::min);
            data.iter().map(|s| f64::from(near(s))).sum::<f64>() / data.len() as f64
        };
        let medoids: Vec<[f32; 2]> = found.clusters.iter().map(|c| c.medoid).collect();
        assert!((total(&medoids) - found.distance).abs() < 1e-5);
        for c in 0..6 {
            let own = |s: &[f32; 2]| {
                let d = |m: &[f32; 2]| jaccard_distance(*s, *m);
                medoids.iter().all(|m| d(&medoids[c]) <= d(m))
            };
            let members: Vec<[f32; 2]> = data.iter().copied().filter(own).collect();
            let sum =
                |from: [f32; 2]| members.iter().map(|&s| f64::from(jaccard_distance(s, from))).sum::<f64>();
            assert!(members.iter().all(|&m| sum(m) >= sum(medoids[c]) - 1e-6), "cluster {c}");
        }
    }

    #[test]
    fn what_cannot_be_clustered_is_refused() {
        let refused = |data: &[[f32; 2]], k, starts| k_medoids(data, k, 1, starts, &mut |_, _| {}).is_err();
        let data = [[10.0, 10.0], [10.0, 10.0], [20.0, 20.0]];
        assert!(!refused(&data, 2, 1));
        assert!(refused(&data, 3, 1) && refused(&data, 0, 1) && refused(&data, 1, 0) && refused(&[], 1, 1));
        assert!(refused(&[[0.0, 1.0]], 1, 1) && refused(&[[f32::NAN, 1.0]], 1, 1));
    }

    #[test]
    fn templates_stand_on_the_level_where_they_are_medium_sized() {
        let of = |h: f32| template([h * 0.8, h]);
        assert_eq!(of(15.0), Template { width: 24.0, height: 30.0, scale: 2.0 });
        assert_eq!(of(40.0).scale, 1.0);
        assert_eq!(of(140.0).scale, 1.0);
        assert_eq!(of(200.0), Template { width: 80.0, height: 100.0, scale: 0.5 });
    }
}
