use super::*;
use proptest::prelude::*;

/// What a rule leaves: candidate, box, score.
fn run(candidates: &[Detection], rule: &Rule) -> Vec<(usize, Detection)> {
    let mut found = Vec::new();
    Nms::default().run(candidates.len(), |i| candidates[i], rule, |i, d| found.push((i, d)));
    found
}

fn greedy(iou: f32) -> Rule {
    let (suppression, convention) = (Suppression::Greedy, Convention::Continuous);
    Rule { suppression, iou, convention, floor: 0.0, limit: usize::MAX }
}

fn at(x: f32, y: f32, w: f32, h: f32, score: f32) -> Detection {
    Detection { bbox: BBox::from_xywh(x, y, w, h), score }
}

/// Intersection and union in f64.
fn areas(a: &BBox, b: &BBox, convention: Convention) -> (f64, f64) {
    let e = f64::from(convention.extra());
    let along = |from: f32, to: f32| f64::from(to) - f64::from(from) + e;
    let area = |b: &BBox| along(b.x1, b.x2) * along(b.y1, b.y2);
    let w = along(a.x1.max(b.x1), a.x2.min(b.x2)).max(0.0);
    let h = along(a.y1.max(b.y1), a.y2.min(b.y2)).max(0.0);
    (w * h, area(a) + area(b) - w * h)
}

fn overlap(a: &BBox, b: &BBox, convention: Convention, threshold: f32) -> bool {
    let (inter, union) = areas(a, b, convention);
    inter > f64::from(threshold) * union
}

/// Indices that greedy suppression keeps, all pairs compared.
fn plain(candidates: &[Detection], iou: f32, convention: Convention) -> Vec<usize> {
    let mut kept: Vec<usize> = Vec::new();
    for (i, c) in candidates.iter().enumerate() {
        if !kept.iter().any(|&k| overlap(&c.bbox, &candidates[k].bbox, convention, iou)) {
            kept.push(i);
        }
    }
    kept
}

/// Up to `n` boxes around 1 to 180 px on a grid of quarter pixels, best first. On the grid, and with thresholds of few
/// bits, f32 decides every comparison as f64 does.
fn candidates(n: usize) -> impl Strategy<Value = Vec<Detection>> {
    let one = (-50f32..400.0, -50f32..300.0, 0f32..7.5, 0.4f32..2.5, 0.01f32..1.0).prop_map(
        |(x, y, log, ratio, score)| {
            let [x, y, w, h] = [x, y, log.exp2(), log.exp2() * ratio].map(|v| (v * 4.0).round() / 4.0);
            at(x, y, w, h.max(0.25), score)
        },
    );
    prop::collection::vec(one, 0..n).prop_map(|mut all| {
        all.sort_by(|a, b| b.score.total_cmp(&a.score));
        all
    })
}

fn convention() -> impl Strategy<Value = Convention> {
    prop::sample::select(vec![Convention::Continuous, Convention::PlusOne])
}

/// Thresholds of few bits; below a tenth nothing is hashed.
fn threshold() -> impl Strategy<Value = f32> {
    prop::sample::select(vec![0.0625f32, 0.125, 0.25, 0.375, 0.5, 0.75, 0.9375])
}

proptest! {
    #[test]
    fn hashing_keeps_exactly_what_comparing_all_pairs_keeps(
        c in candidates(600), iou in threshold(), convention in convention(),
    ) {
        let found = run(&c, &Rule { convention, ..greedy(iou) });
        prop_assert_eq!(found.iter().map(|f| f.0).collect::<Vec<_>>(), plain(&c, iou, convention));
        prop_assert!(found.iter().all(|&(i, d)| d == c[i]));
    }

    #[test]
    fn a_voted_box_is_the_weighted_mean_of_all_that_overlap_it(
        c in candidates(400), iou in threshold(), voting in threshold(), convention in convention(),
    ) {
        let suppression = Suppression::Voting { iou: voting };
        let found = run(&c, &Rule { suppression, convention, ..greedy(iou) });
        let kept = plain(&c, iou, convention);
        prop_assert_eq!(found.iter().map(|f| f.0).collect::<Vec<_>>(), kept);
        for (i, got) in found {
            let voters = c.iter().filter(|v| overlap(&v.bbox, &c[i].bbox, convention, voting));
            let (mut mean, mut weight) = ([0.0f64; 4], 0.0);
            for v in voters {
                let corners = [v.bbox.x1, v.bbox.y1, v.bbox.x2, v.bbox.y2].map(f64::from);
                mean.iter_mut().zip(corners).for_each(|(m, x)| *m += f64::from(v.score) * x);
                weight += f64::from(v.score);
            }
            let corners = [got.bbox.x1, got.bbox.y1, got.bbox.x2, got.bbox.y2].map(f64::from);
            for (g, m) in corners.into_iter().zip(mean) {
                prop_assert!((g - m / weight).abs() < 1e-4, "{g}, mean {}", m / weight);
            }
            prop_assert_eq!(got.score, c[i].score);
        }
    }

    /// The paper's loop is followed, all pairs in f64: at every turn the box taken is one of the best there are, within
    /// rounding, with the score that all taken before leave it; and at the end nothing above the floor is left.
    #[test]
    fn soft_suppression_takes_the_best_that_is_left_and_decays_the_rest(
        c in candidates(300), iou in threshold(), convention in convention(),
        sigma in prop::option::of(0.1f32..1.0), floor in 0.0f32..0.5,
    ) {
        let suppression = sigma.map_or(Suppression::SoftLinear, |sigma| Suppression::SoftGaussian { sigma });
        let found = run(&c, &Rule { suppression, convention, floor, ..greedy(iou) });
        let mut left: Vec<Option<f64>> = c.iter().map(|c| Some(c.score.into())).collect();
        let best = |left: &[Option<f64>]| left.iter().flatten().copied().fold(0.0, f64::max);
        for (i, got) in found {
            prop_assert_eq!(got.bbox, c[i].bbox);
            prop_assert!(got.score <= c[i].score && got.score > floor);
            let score = left[i].take();
            prop_assert!(score.is_some_and(|s| (s - f64::from(got.score)).abs() < 1e-5), "{score:?}, got {got:?}");
            prop_assert!(f64::from(got.score) > best(&left) - 1e-5);
            for (other, score) in c.iter().zip(&mut left) {
                let (inter, union) = areas(&other.bbox, &got.bbox, convention);
                let factor = match sigma {
                    Some(sigma) => (-(inter / union).powi(2) / f64::from(sigma)).exp(),
                    None if inter > f64::from(iou) * union => 1.0 - inter / union,
                    None => 1.0,
                };
                *score = score.map(|s| s * factor);
            }
        }
        prop_assert!(best(&left) < f64::from(floor) + 1e-5);
    }
}

#[test]
fn votes_count_by_score() {
    // Both overlap the best by 9/11; the far one does not vote.
    let c = [
        at(0.0, 0.0, 10.0, 10.0, 0.8),
        at(1.0, 0.0, 10.0, 10.0, 0.4),
        at(0.0, 1.0, 10.0, 10.0, 0.4),
        at(40.0, 0.0, 10.0, 20.0, 0.3),
    ];
    let found = run(&c, &Rule { suppression: Suppression::Voting { iou: 0.5 }, ..greedy(0.4) });
    assert_eq!(found, [(0, at(0.25, 0.25, 10.0, 10.0, 0.8)), (3, c[3])]);
    // Boxes that the suppression leaves side by side vote for each other.
    let found = run(&c[..2], &Rule { suppression: Suppression::Voting { iou: 0.5 }, ..greedy(0.9) });
    let third = 1.0 / 3.0;
    assert_eq!(found, [(0, at(third, 0.0, 10.0, 10.0, 0.8)), (1, at(third, 0.0, 10.0, 10.0, 0.4))]);
}

#[test]
fn a_lone_box_votes_for_itself_bit_for_bit() {
    for (x, score) in [(0.1f32, 0.7f32), (1234.567, 0.023), (-3.3, 1.0), (1e6, f32::MIN_POSITIVE), (2.7, 0.0)]
    {
        let alone = at(x, 7.7, 33.3, 44.4, score);
        for iou in [0.0, 0.5, 1.0] {
            let rule = Rule { suppression: Suppression::Voting { iou }, ..greedy(0.5) };
            assert_eq!(run(&[alone], &rule), [(0, alone)]);
        }
    }
}

#[test]
fn soft_scores_are_those_of_the_paper() {
    // The second overlaps the first by 1/3, the third both by 0.
    let c = [at(0.0, 0.0, 10.0, 10.0, 0.9), at(5.0, 0.0, 10.0, 10.0, 0.75), at(50.0, 0.0, 10.0, 10.0, 0.625)];
    let scores =
        |rule: Rule| -> Vec<(usize, f32)> { run(&c, &rule).iter().map(|(i, d)| (*i, d.score)).collect() };
    let close = |got: Vec<(usize, f32)>, want: &[(usize, f32)]| {
        assert_eq!(got.len(), want.len(), "{got:?}, {want:?}");
        for (g, w) in got.iter().zip(want) {
            assert!(g.0 == w.0 && (g.1 - w.1).abs() < 1e-6, "{got:?}, {want:?}");
        }
    };
    let linear = Rule { suppression: Suppression::SoftLinear, ..greedy(0.25) };
    close(scores(linear), &[(0, 0.9), (2, 0.625), (1, 0.5)]);
    // Below the threshold nothing decays; below the floor nothing stays.
    close(scores(Rule { iou: 0.375, ..linear }), &[(0, 0.9), (1, 0.75), (2, 0.625)]);
    close(scores(Rule { floor: 0.55, ..linear }), &[(0, 0.9), (2, 0.625)]);
    close(scores(Rule { limit: 1, ..linear }), &[(0, 0.9)]);
    // exp(-(1/9) / 0.5) = 0.800737.
    let gaussian = Rule { suppression: Suppression::SoftGaussian { sigma: 0.5 }, ..greedy(0.9) };
    close(scores(gaussian), &[(0, 0.9), (2, 0.625), (1, 0.600_553)]);
}

#[test]
fn equal_scores_keep_their_order() {
    let c: Vec<Detection> = (0..200).map(|i| at(i as f32 * 3.5, 0.0, 10.0, 10.0, 0.5)).collect();
    for suppression in [Suppression::SoftLinear, Suppression::SoftGaussian { sigma: 0.5 }] {
        let found = run(&c, &Rule { suppression, ..greedy(0.125) });
        assert_eq!(found[0], (0, c[0]));
        // Every third box lies clear of those taken before.
        let untouched: Vec<usize> = found.iter().filter(|f| f.1.score == 0.5).map(|f| f.0).collect();
        assert_eq!(untouched, (0..200).step_by(3).collect::<Vec<_>>());
    }
}

#[test]
fn broken_boxes_neither_panic_nor_hide_others() {
    let nan = f32::NAN;
    let detection = |bbox| Detection { bbox, score: 0.5 };
    let mut c = vec![detection(BBox::new(nan, nan, nan, nan)), detection(BBox::new(5.0, 5.0, 1.0, 1.0))];
    c.extend((0..100).map(|i| at(i as f32 * 20.0, 0.0, 10.0, 10.0, 0.5)));
    c.push(detection(BBox::new(f32::NEG_INFINITY, 0.0, f32::INFINITY, 1.0)));
    for suppression in [
        Suppression::Greedy,
        Suppression::Voting { iou: 0.5 },
        Suppression::SoftLinear,
        Suppression::SoftGaussian { sigma: 0.5 },
    ] {
        assert_eq!(run(&c, &Rule { suppression, ..greedy(0.5) }).len(), c.len(), "{suppression:?}");
    }
}

#[test]
fn the_limit_keeps_the_best() {
    let c: Vec<Detection> = (0..200).map(|i| at(i as f32 * 20.0, 0.0, 10.0, 10.0, 0.5)).collect();
    for suppression in [Suppression::Greedy, Suppression::Voting { iou: 0.5 }, Suppression::SoftLinear] {
        let found = run(&c, &Rule { suppression, limit: 3, ..greedy(0.5) });
        assert_eq!(found.iter().map(|f| f.0).collect::<Vec<_>>(), [0, 1, 2]);
    }
}

#[test]
fn stated_bytes_are_those_taken() {
    for suppression in [Suppression::Greedy, Suppression::Voting { iou: 0.5 }, Suppression::SoftLinear] {
        let mut nms = Nms::default();
        nms.reserve(1000, suppression);
        let held = nms.neighbours.bytes()
            + nms.kept.capacity() * size_of::<u32>()
            + nms.pending.capacity() * size_of::<Pending>();
        assert_eq!(Nms::bytes_for(1000, suppression), held);
    }
}
