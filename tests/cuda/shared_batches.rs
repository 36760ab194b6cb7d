//! Batches that ranks share, judged on the device: what losses are divided by is counted over all, so that the ranks' losses and gradients
//! are together those that the host has of the whole batch.

use crate::drawing;
use crate::emulator::device;
use crate::failures::alone;
use crate::objective::{levels, random_faces, FOCAL};
use crate::ranks::{emulator, follow, train, train_alone, two};
use crate::train::{on_device, table};
use crate::trainer::{GROUP_SAMPLING, HAMBOX, HEAD, REFINEFACE, SUPERVISED, TAIL};
use farface::detect::BBox;
use farface::gpu::map::Element;
use farface::graph::init::Rng;
use farface::graph::{Builder, Graph, Weights};
use farface::layers::Conv2d;
use farface::nets::refineface::FirstStep;
use farface::shape::Shape;
use farface::train::data::Annotated;
use farface::train::losses::{ClassLoss, LossRecipe};
use farface::train::matching::{AnchorMining, MatchingRecipe};
use farface::train::network::{Engine, Frozen, Judgement};
use farface::train::objective::{
    DetectorObjective, Layout, Level, Losses, Objective, PyramidAnchors, TwoStep, Whole,
};
use farface::train::ranks::What;
use farface::train::sampler::{Miner, SamplerRecipe};
use std::ops::Range;

/// Pictures of the batch, of which each of two ranks has half.
const IMAGES: usize = 4;
const SIDE: usize = 32;

/// A detector's outputs and what is around the faces, on one map without normalisations: a part's outputs are the whole batch's.
fn network(outputs: &[usize]) -> Graph {
    let mut b = Builder::new();
    let x = b.input("image", 3);
    let x = b.conv("first", x, Conv2d::new(3, 8, 3).stride(4).bias());
    let x = b.relu(x);
    for (i, &channels) in outputs.iter().enumerate() {
        let name = format!("y{i}");
        let y = b.conv(&name, x, Conv2d::new(8, channels, 1).bias());
        b.output(&name, y);
    }
    b.finish()
}

struct Case {
    graph: Graph,
    own: DetectorObjective,
    around: PyramidAnchors,
    faces: Vec<Vec<Annotated>>,
    inside: Vec<BBox>,
    pixels: Vec<u8>,
}

impl Case {
    /// `channels` of the detector's outputs; what is around is found by one output more.
    fn new(own: DetectorObjective, channels: &[usize], around: Objective, levels: &[Level]) -> Self {
        let rng = &mut Rng::new(8);
        // Of the second rank's pictures most have fewer.
        let most = |n: usize| if n < IMAGES / 2 { 12 } else { 4 };
        let faces = (0..IMAGES).map(|n| random_faces(levels, SIDE, most(n), rng)).collect();
        let inside = (0..IMAGES).map(|_| BBox::new(0.0, 0.0, SIDE as f32, rng.range(0.6, 1.0) * SIDE as f32));
        let inside = inside.collect();
        let pixels = (0..IMAGES * SIDE * SIDE * 3).map(|_| rng.below(256) as u8).collect();
        let graph = network(&[channels, &[5 * around.levels[0].anchors.len()]].concat());
        Self { graph, own, around: PyramidAnchors::new(around, 1, 0.5), faces, inside, pixels }
    }

    /// Seeds of the pictures `part` of the batch: of the detector's draws, and of the other's.
    fn seeds(part: &Range<usize>) -> [Vec<u64>; 2] {
        [7, 700].map(|first| part.clone().map(|n| first + n as u64).collect())
    }

    /// Judges and runs back a part of the batch on the device: the losses of both judgements.
    fn on_device(&self, engine: &mut dyn Engine, part: Range<usize>) -> Vec<Losses> {
        let image = SIDE * SIDE * 3;
        let (faces, inside) = (&self.faces[part.clone()], &self.inside[part.clone()]);
        let outer = self.around.all_around(faces);
        let [seeds, more] = Self::seeds(&part);
        let own = Judgement { objective: (&self.own).into(), faces, inside, seeds, weight: 1.0 };
        let around = Judgement {
            objective: (&self.around.objective).into(),
            faces: &outer,
            inside,
            seeds: more,
            weight: self.around.weight,
        };
        let pixels = &self.pixels[part.start * image..part.end * image];
        let shape = Shape::new(part.len(), 3, SIDE, SIDE);
        let judged = engine.forward_judged(pixels, shape, &table(), &[own, around]).unwrap();
        engine.backward_judged().unwrap();
        judged.expect("judged on the device")
    }

    /// The same of the whole batch, judged by the host.
    fn on_host(&self, engine: &mut dyn Engine) -> Vec<Losses> {
        let shape = Shape::new(IMAGES, 3, SIDE, SIDE);
        let outputs = engine.forward(&self.pixels, shape, &table()).unwrap();
        let (own, around) = outputs.split_at(self.own.outputs());
        let [seeds, more] = Self::seeds(&(0..IMAGES));
        let whole = Whole::at_hand(IMAGES);
        let rng = |n: usize| Rng::new(seeds[n]);
        let (losses, mut d) = self.own.judge(own, &self.faces, &self.inside, rng, 1, whole).unwrap();
        let (others, gradients) = self.around.judge(around, &self.faces, |n| Rng::new(more[n]), 1).unwrap();
        d.extend(gradients);
        engine.backward(&d).unwrap();
        vec![losses, others]
    }
}

fn gradients(engine: &mut dyn Engine) -> Vec<f32> {
    engine.params_and_grads().unwrap().1.concat()
}

fn focal() -> ClassLoss {
    let (alpha, gamma) = FOCAL;
    ClassLoss::Focal { alpha, gamma }
}

fn loss(classification: ClassLoss) -> LossRecipe {
    LossRecipe { classification, ..LossRecipe::default() }
}

fn one_step(classification: ClassLoss, anchors: usize, sampler: Option<SamplerRecipe>) -> Objective {
    Objective {
        levels: levels(&[4], anchors, |_| Layout::Joint),
        variances: [0.1, 0.2],
        matching: MatchingRecipe::FirstStep { positive: 0.35 },
        mining: Some(AnchorMining { anchors: 3, overlap: 0.3 }),
        sampler,
        loss: loss(classification),
    }
}

fn two_steps(sampler: Option<SamplerRecipe>) -> TwoStep {
    let plain = levels(&[4, 4], 1, |_| Layout::Apart { logits: 1 });
    TwoStep {
        levels: plain.into_iter().zip([Some(FirstStep::Classes), Some(FirstStep::Boxes)]).collect(),
        first: MatchingRecipe::Thresholds { negative: 0.3, positive: 0.5, force_best: true },
        second: MatchingRecipe::Thresholds { negative: 0.4, positive: 0.5, force_best: true },
        survives: -2.0,
        mining: Some(AnchorMining { anchors: 3, overlap: 0.3 }),
        sampler,
        loss: loss(focal()),
    }
}

/// Every kind of divisor: matched and mined apart, positives of the batch, a sampler's choices; of each of two steps.
fn cases() -> Vec<Case> {
    let (alpha, gamma) = FOCAL;
    let aware = ClassLoss::RegressionAwareFocal { alpha, gamma };
    let sampler = |miner, within_picture| {
        Some(SamplerRecipe { miner, samples: 24, within_picture, ..SamplerRecipe::default() })
    };
    let random = || one_step(ClassLoss::Sigmoid {}, 1, sampler(Miner::Random {}, false));
    let of_one = |own: Objective, around: Objective| {
        let levels = own.levels.clone();
        Case::new(DetectorObjective::OneStep(own), &[10], around, &levels)
    };
    let of_two = |own: TwoStep, around: Objective| {
        let levels: Vec<Level> = own.levels.iter().map(|(level, _)| level.clone()).collect();
        Case::new(DetectorObjective::TwoStep(own), &[1, 8, 1, 4, 2, 8], around, &levels)
    };
    let apart = Some(SamplerRecipe { miner: Miner::Ohem {}, samples: 16, ..SamplerRecipe::default() });
    vec![
        of_one(one_step(aware, 2, None), random()),
        of_one(one_step(ClassLoss::QualityFocal { beta: 2.0 }, 2, None), one_step(aware, 1, None)),
        of_one(one_step(ClassLoss::Sigmoid {}, 2, sampler(Miner::Wrs {}, true)), one_step(focal(), 1, None)),
        of_two(two_steps(None), random()),
        of_two(two_steps(apart), one_step(aware, 1, None)),
    ]
}

#[test]
fn what_ranks_judge_on_the_device_is_what_the_host_judges_of_the_whole_batch() {
    let (Some(emulator), Some(device)) = (emulator(), device()) else { return };
    for (i, case) in cases().iter().enumerate() {
        let weights = Weights::random(&case.graph, 3);
        let engine = || on_device(&case.graph, &weights, &Frozen::default(), &device, Element::F32);
        let mut host = engine();
        let expected = case.on_host(&mut host);
        let expected_gradients = gradients(&mut host);
        emulator.late(i.is_multiple_of(2));
        let [(first, sums), (second, same)] = two(|ranks| {
            let mut engine = engine();
            engine.join(&ranks, 1000).unwrap();
            let losses = case.on_device(&mut engine, ranks.part(IMAGES).unwrap());
            let sums = gradients(&mut engine);
            ranks.all(What::End, &[]).unwrap();
            engine.part().unwrap();
            (losses, sums)
        });
        emulator.late(false);
        assert!(sums == same, "case {i}: ranks differ");
        assert!(
            first[0].matched != second[0].matched,
            "case {i}: parts that divide by the same show nothing"
        );
        for (e, (a, b)) in expected.iter().zip(first.into_iter().zip(second)) {
            let got = Losses::of_parts(&[a, b]);
            let counts = |l: &Losses| (l.matched, l.mined, l.faces);
            assert_eq!(counts(&got), counts(e), "case {i}");
            for (got, e) in [(got.class, e.class), (got.boxes, e.boxes), (got.iou, e.iou)] {
                assert!(e > 0.0 && (got - e).abs() <= 1e-5 * e, "case {i}: {got} for {e}");
            }
        }
        assert!(expected[0].mined > 0, "case {i}: nothing is mined");
        let largest = expected_gradients.iter().fold(0f32, |m, v| m.max(v.abs()));
        for (got, e) in sums.iter().zip(&expected_gradients) {
            assert!((got - e).abs() <= 1e-5 * largest, "case {i}: gradient {got} for {e}, largest {largest}");
        }
    }
}

/// A rank that is gone before it has counted: the other hears of it where it waits for the counts.
#[test]
fn a_rank_that_stops_before_its_counts_ends_the_other() {
    let (Some(_), Some(device)) = (emulator(), device()) else { return };
    let case = &cases()[0];
    let weights = Weights::random(&case.graph, 3);
    let errors = two(|ranks| {
        let mut engine = on_device(&case.graph, &weights, &Frozen::default(), &device, Element::F32);
        engine.join(&ranks, 1000).unwrap();
        // Both have joined; one that goes before fails the other's joining.
        ranks.all(What::GoOn, &[]).unwrap();
        (ranks.rank() == 0).then(|| {
            let outer = case.around.all_around(&case.faces[..2]);
            let judgements = |seeds: [Vec<u64>; 2]| {
                let [seeds, more] = seeds;
                let (faces, inside) = (&case.faces[..2], &case.inside[..2]);
                let of = (&case.around.objective).into();
                [
                    Judgement { objective: (&case.own).into(), faces, inside, seeds, weight: 1.0 },
                    Judgement { objective: of, faces: &outer, inside, seeds: more, weight: 0.5 },
                ]
            };
            let (shape, table) = (Shape::new(2, 3, SIDE, SIDE), table());
            let pixels = &case.pixels[..shape.len()];
            let mut error = || {
                let judged = engine.forward_judged(pixels, shape, &table, &judgements(Case::seeds(&(0..2))));
                judged.unwrap_err().to_string()
            };
            (error(), error())
        })
    });
    let (error, again) = errors[0].as_ref().unwrap();
    assert!(error.contains("rank 1") && error.contains("ended before"), "{error}");
    assert!(again.contains("ended by an earlier error"), "{again}");
}

/// The trainer's batches: pictures, seeds and outputs are numbered as one process has them.
#[test]
fn trainings_that_ranks_judge_on_the_device_are_those_of_one_process() {
    let Some(emulator) = emulator() else { return };
    if !alone("shared_batches::trainings_that_ranks_judge_on_the_device_are_those_of_one_process") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    drawing::draw(dir.path(), 4, 100, 1);
    let sampled = HAMBOX
        .replace(
            "classification = { kind = \"regression-aware-focal\" }",
            "classification = { kind = \"sigmoid\" }",
        )
        .replace("[mining]", "[sampler]\nminer = { kind = \"wrs\" }\nsamples = 64\n[mining]");
    let launches = || emulator.launches(c"anchor_losses");
    let supervised = format!("{REFINEFACE}{SUPERVISED}");
    let kinds = [
        ("hambox-baseline-r18", &sampled[..]),
        ("refineface-r18", REFINEFACE),
        ("refineface-r18", &supervised),
        ("fpn-finest-rcnn-r18", GROUP_SAMPLING),
    ];
    for (detector, own) in kinds {
        // Where no normalisation looks at the batch.
        let head = HEAD.replace("DETECTOR", detector).replace("[data]", "freeze-statistics = [\"\"]\n[data]");
        let text = format!("{head}{own}{TAIL}");
        let before = launches();
        let expected = train_alone(&text, dir.path(), 2);
        let of_one = launches() - before;
        let both = train(&text, dir.path(), 2, None);
        let of_two = launches() - before - of_one;
        assert!(of_one > 0 && of_two == 2 * of_one, "{detector}: {of_two} launches, of one process {of_one}");
        follow(&text, dir.path(), both, expected);
    }
}
