//! From maps to faces: what the device finds against `Detector::decode` and `Nms` on the same maps.

use crate::emulator::{device, driver, Driver};
use farface::cpu::View;
use farface::detect::boxes::{Convention, Detection};
use farface::detect::config::DetectorConfig;
use farface::detect::detector::{Detector, Map, Span, Window};
use farface::detect::heads::{cuda, Extras};
use farface::detect::hr::{AngleForm, EllipseRegressor};
use farface::detect::nms::{Nms, Rule, Suppression};
use farface::detect::pyramid::PyramidConfig;
use farface::detect::{BBox, Face, ModelConfig};
use farface::gpu::driver::Stream;
use farface::gpu::faces::{Candidate, FaceBuffers, Header, Level, Placement, Settings};
use farface::gpu::map::{DeviceView, Element};
use farface::gpu::memory::DeviceBuffer;
use farface::gpu::ops::Device;
use farface::graph::init::Rng;
use farface::shape::Shape;
use std::cmp::Ordering;
use std::sync::Arc;

/// A run of a network: what it gave, what of it counts, and where that lies.
struct Pass {
    outputs: Vec<(Shape, Vec<f32>)>,
    window: Window,
    placement: Placement,
}

/// What is asked for.
#[derive(Clone, Copy)]
struct Wanted {
    threshold: f32,
    px: [f32; 2],
    max_candidates: usize,
    rule: Rule,
}

/// Width of the upright picture.
const WIDTH: f32 = 240.0;

const GREEDY: Rule = Rule {
    suppression: Suppression::Greedy,
    iou: 0.4,
    convention: Convention::Continuous,
    floor: 0.0,
    limit: usize::MAX,
};

impl Wanted {
    fn settings(&self) -> Settings {
        cuda::settings(self.threshold, self.px, self.max_candidates, &self.rule)
    }

    /// The same, to be sorted alone.
    fn sorted(&self) -> Settings {
        Settings { suppress: 0, ..self.settings() }
    }
}

/// (v + offset) * factor, mirrored where the run was.
fn placed(face: Face, p: &Placement) -> Face {
    let x = |v: f32| (v + p.offset[0]) * p.factor[0];
    let y = |v: f32| (v + p.offset[1]) * p.factor[1];
    let b = face.bbox;
    let mut f = face;
    f.bbox = BBox::new(x(b.x1), y(b.y1), x(b.x2), y(b.y2));
    f.landmarks = face.landmarks.map(|points| points.map(|[px, py]| [x(px), y(py)]));
    if let Some(e) = &mut f.ellipse {
        e.center = [x(e.center[0]), y(e.center[1])];
        e.half_axes = e.half_axes.map(|a| a * (p.factor[0] * p.factor[1]).sqrt());
    }
    if let Some(width) = p.mirrored {
        f.bbox = BBox { x1: width - f.bbox.x2, x2: width - f.bbox.x1, ..f.bbox };
        f.landmarks = f.landmarks.map(|p| [1, 0, 2, 4, 3].map(|i| [width - p[i][0], p[i][1]]));
        if let Some(e) = &mut f.ellipse {
            e.center[0] = width - e.center[0];
            e.angle = e.angle.sin().atan2(-e.angle.cos());
        }
    }
    f
}

fn is_wanted(f: &Face, [min, max]: [f32; 2]) -> bool {
    let (w, h) = (f.bbox.width(), f.bbox.height());
    let numbers = [f.bbox.x1, f.bbox.y1, w, h];
    let points = f.landmarks.unwrap_or_default();
    let finite = numbers.iter().chain(points.as_flattened()).all(|v| v.is_finite());
    finite && w > 0.0 && h > 0.0 && w.max(h) >= min && (max == 0.0 || w.max(h) <= max)
}

/// Best first: by score, then by place; the rest is for a stable sort.
fn rank(a: &Detection, b: &Detection) -> Ordering {
    let place = |d: &Detection| [d.bbox.y1, d.bbox.x1, d.bbox.y2, d.bbox.x2];
    let places = place(a).into_iter().zip(place(b)).map(|(a, b)| a.total_cmp(&b));
    b.score.total_cmp(&a.score).then_with(|| places.fold(Ordering::Equal, Ordering::then))
}

/// All candidates of a CPU, in the order in which they are found.
fn candidates(detector: &dyn Detector, passes: &[Pass], wanted: &Wanted) -> Vec<Face> {
    let mut all = Vec::new();
    for pass in passes {
        let maps: Vec<Map<'_>> =
            pass.outputs.iter().map(|(shape, data)| Map::new(data, View::new(*shape, 0, [0; 4]))).collect();
        detector.decode(&maps, &pass.window, wanted.threshold, &mut |face| {
            let face = placed(face, &pass.placement);
            if is_wanted(&face, wanted.px) {
                all.push(face);
            }
        });
    }
    all
}

fn detection(c: &Candidate) -> Detection {
    let [x1, y1, x2, y2] = c.bbox;
    Detection { bbox: BBox::new(x1, y1, x2, y2), score: c.score }
}

struct Bench {
    device: Arc<Device>,
    stream: Stream,
}

impl Bench {
    fn new() -> Option<Self> {
        let device = device()?;
        let stream = Stream::new(device.context()).unwrap();
        Some(Self { device, stream })
    }

    /// The maps in a device's memory, and where.
    fn upload(&self, pass: &Pass) -> (DeviceBuffer, Vec<Option<DeviceView>>) {
        let (mut bytes, mut views) = (0, Vec::new());
        for (shape, _) in &pass.outputs {
            views.push(DeviceView::new(Element::F32, *shape, bytes));
            bytes = (bytes + 4 * shape.len()).next_multiple_of(256);
        }
        let arena = DeviceBuffer::new(self.device.context(), bytes).unwrap();
        for (view, (_, data)) in views.iter().zip(&pass.outputs) {
            arena.set(&self.stream, view.offset, data).unwrap();
        }
        (arena, views.into_iter().map(Some).collect())
    }

    /// The passes' maps on the device, and the levels that they have.
    fn levels(&self, detector: &dyn Detector, passes: &[Pass]) -> Vec<(DeviceBuffer, Vec<Level>)> {
        let levels = |pass: &Pass| {
            let (arena, views) = self.upload(pass);
            let heads = detector.heads(pass.window.scale);
            (arena, heads.iter().filter_map(|head| head.level(&views, &pass.window)).collect())
        };
        passes.iter().map(levels).collect()
    }

    fn run(
        &self,
        buffers: &mut FaceBuffers,
        levels: &[(DeviceBuffer, Vec<Level>)],
        passes: &[Pass],
        settings: &Settings,
    ) -> (Header, Vec<Candidate>) {
        buffers.settings().set(&self.stream, 0, &[*settings]).unwrap();
        self.launch(buffers, levels, passes);
        buffers.read(&self.stream, 0).unwrap()
    }

    fn launch(&self, buffers: &mut FaceBuffers, levels: &[(DeviceBuffer, Vec<Level>)], passes: &[Pass]) {
        buffers.begin(&self.stream, 1).unwrap();
        for ((arena, levels), pass) in levels.iter().zip(passes) {
            buffers.decode(&self.stream, arena, levels, &pass.placement).unwrap();
        }
        buffers.finish(&self.stream).unwrap();
    }

    /// Holds the device to the CPU: the candidates, sorted; then what suppression leaves of them. How many there were of each.
    fn check(
        &self,
        what: &str,
        detector: &dyn Detector,
        passes: &[Pass],
        wanted: &Wanted,
        limit: usize,
    ) -> [usize; 3] {
        let levels = self.levels(detector, passes);
        let most = levels.iter().map(|(_, l)| l.iter().map(Level::candidates).sum()).max().unwrap_or(0);
        let mut buffers = FaceBuffers::new(&self.device, 1, limit, most).unwrap();
        let expected = candidates(detector, passes, wanted);

        let (header, sorted) = self.run(&mut buffers, &levels, passes, &wanted.sorted());
        let count = expected.len().min(wanted.max_candidates);
        let counts = [header.found, header.sorted, header.kept, header.overflow].map(|n| n as usize);
        assert_eq!(counts, [expected.len(), count, count, 0], "{what}: found, sorted, kept, overflow");
        let before =
            |a: &Candidate, b: &Candidate| rank(&detection(a), &detection(b)).then(a.order.cmp(&b.order));
        assert!(sorted.is_sorted_by(|a, b| before(a, b) == Ordering::Less), "{what}: not sorted");
        let of = |f: &Face| Detection { bbox: f.bbox, score: f.score };
        let (mut mine, mut theirs) = (expected.clone(), sorted.clone());
        if matches!(driver(), Some(Driver::Emulated(_))) {
            // The same arithmetic to the last bit: the same order.
            mine.sort_by(|a, b| rank(&of(a), &of(b)));
            mine.truncate(count);
        } else {
            // e^x differs in the last place, and so may what is better: in the order in which they are found, where none was dropped.
            theirs.sort_by_key(|c| c.order);
        }
        if mine.len() == theirs.len() {
            let extras = detector.heads(1.0)[0].extras;
            for (i, (m, c)) in mine.iter().zip(&theirs).enumerate() {
                near(m, &cuda::face(detector, extras, c, WIDTH), extras)
                    .unwrap_or_else(|e| panic!("{what}: candidate {i}: {e}"));
            }
        }

        // Overlaps are exact: of the same candidates the same stay.
        let mut stay = Vec::new();
        Nms::default().run(
            sorted.len(),
            |i| detection(&sorted[i]),
            &wanted.rule,
            |i, _| stay.push(sorted[i]),
        );
        let (header, kept) = self.run(&mut buffers, &levels, passes, &wanted.settings());
        assert_eq!([header.found, header.sorted].map(|n| n as usize), [expected.len(), count], "{what}");
        assert!(bits(&kept) == bits(&stay), "{what}: {} stay, expected {}", kept.len(), stay.len());
        // Of the many thousands one order is enough.
        let small = |_: &&Driver| count <= 10_000;
        if let Some(Driver::Emulated(emulator)) = driver().filter(small) {
            emulator.backwards(true);
            let again = self.run(&mut buffers, &levels, passes, &wanted.settings());
            emulator.backwards(false);
            assert!(again.0 == header && bits(&again.1) == bits(&kept), "{what}: other bits in other order");
        }
        [expected.len(), count, kept.len()]
    }
}

fn bits(all: &[Candidate]) -> Vec<u8> {
    bytemuck::cast_slice(all).to_vec()
}

/// Whether two faces agree to what e^x differs by.
fn near(expected: &Face, got: &Face, extras: Extras) -> Result<(), String> {
    let numbers = |f: &Face| {
        let mut all = vec![f.bbox.x1, f.bbox.y1, f.bbox.x2, f.bbox.y2];
        all.extend(f.landmarks.iter().flatten().flatten());
        if let Some(e) = f.ellipse {
            // An angle by its double: axes have no direction.
            let turn = [(2.0 * e.angle).cos(), (2.0 * e.angle).sin()].map(|v| v * e.half_axes[0]);
            all.extend(e.center.into_iter().chain(e.half_axes).chain(turn));
        }
        all
    };
    let (e, g) = (numbers(expected), numbers(got));
    let largest = e.iter().fold(1.0f32, |most, v| most.max(v.abs()));
    let tolerance = if extras == Extras::Ellipse { 1e-3 } else { 1e-4 };
    let close = e.len() == g.len() && e.iter().zip(&g).all(|(e, g)| (e - g).abs() <= tolerance * largest);
    if close && (expected.score - got.score).abs() < 1e-5 {
        return Ok(());
    }
    Err(format!("{got:?}, expected {expected:?}"))
}

/// Runs of a detector on inputs of 96 x 160: a part of a level and a whole one, and the whole again as a mirrored one. `value` makes
/// the maps from output, channel and a random number.
fn passes(
    detector: &dyn Detector,
    seed: u64,
    mut value: impl FnMut(usize, usize, &mut Rng) -> f32,
) -> Vec<Pass> {
    let graph = detector.graph();
    let shapes = graph.shapes(&[Shape::new(1, 3, 96, 160)]).unwrap();
    let mut rng = Rng::new(seed);
    let part = Window {
        scale: 1.9,
        owned_x: Span { owned: 32.0..96.0, end: 140.0 },
        owned_y: Span { owned: f32::NEG_INFINITY..64.0, end: 90.0 },
    };
    let (small, large) = ([1.5, 1.498], [0.53, 0.5]);
    [
        (part, Placement { offset: [32.0, 64.0], factor: large, mirrored: None }),
        (Window::whole(), Placement { offset: [0.0; 2], factor: small, mirrored: None }),
        (Window::whole(), Placement { offset: [0.0; 2], factor: small, mirrored: Some(WIDTH) }),
    ]
    .map(|(window, placement)| {
        let outputs = graph.outputs.iter().enumerate().map(|(o, (_, id))| {
            let shape = shapes[id.0];
            (shape, (0..shape.len()).map(|i| value(o, i % shape.c, &mut rng)).collect())
        });
        Pass { outputs: outputs.collect(), window, placement }
    })
    .into()
}

fn named(name: &str) -> DetectorConfig {
    ModelConfig::named(name).unwrap_or_else(|| panic!("{name}")).detector
}

/// Every detector, those with an ellipse or a cut too.
fn detectors() -> Vec<(&'static str, Box<dyn Detector>)> {
    let names = [
        "retinaface-mobile025",
        "farface-nano",
        "fpn-r18",
        "fpn-finest-dc-r18",
        "fpn-finest-rcnn-r18",
        "hambox-r18",
        "refineface-r18",
        "refineface-baseline-r18",
        "farface-crowd-r18",
        "hr-r50",
        "hr-full-r50",
    ];
    let mut all: Vec<(&str, Box<dyn Detector>)> = names.map(|n| (n, named(n).detector())).into();
    if let DetectorConfig::Hr(mut hr) = named("hr-r50") {
        let mut rng = Rng::new(7);
        let mut row = || std::array::from_fn(|_| 0.1 * rng.normal());
        hr.ellipse = Some(EllipseRegressor {
            angle: AngleForm::DoubleAngle,
            weights: (0..6).map(|_| row()).collect(),
            // One half-axis much longer than the other: where they are nearly equal, rounding decides which is the first.
            biases: hr.templates.iter().map(|_| vec![0.01, 0.02, 0.5, -0.9, 0.3, 1.0]).collect(),
        });
        hr.cell_center = -1.5;
        all.push(("hr-r50 with ellipses", Box::new(hr)));
    }
    all
}

#[test]
fn every_detectors_maps_give_the_faces_that_they_give_on_a_cpu() {
    let Some(bench) = Bench::new() else { return };
    for (name, detector) in detectors() {
        let detector = &*detector;
        let wild = passes(detector, 1, |_, channel, rng| match rng.below(200) {
            0 => f32::NAN,
            1 => f32::INFINITY,
            2 => f32::NEG_INFINITY,
            3 => 300.0 - channel as f32,
            _ => rng.normal() * 0.7,
        });
        let all = Wanted { threshold: 0.55, px: [0.0; 2], max_candidates: 5000, rule: GREEDY };
        let [found, ..] = bench.check(name, detector, &wild, &all, 5000);
        assert!(found > 100, "{name}: {found}");
        let inclusive = Rule { convention: Convention::PlusOne, iou: 0.2, limit: 25, ..GREEDY };
        let few = Wanted { px: [10.0, 90.0], max_candidates: 77, rule: inclusive, ..all };
        let counts = bench.check(name, detector, &wild, &few, 100);
        assert!(counts[0] > 77 && counts[1] == 77 && counts[2] <= 25, "{name}: {counts:?}");
        let none = Wanted { px: [5000.0, 6000.0], ..all };
        assert_eq!(bench.check(name, detector, &wild, &none, 100), [0; 3], "{name}");
    }
}

#[test]
fn equal_scores_are_told_apart_by_place_and_then_by_order() {
    let Some(bench) = Bench::new() else { return };
    for name in ["farface-nano", "retinaface-mobile025", "hr-r50"] {
        let detector = named(name).detector();
        let detector = &*detector;
        // All logits equal; background's are lower. Offsets of a few values, then none.
        for kinds in [4usize, 1] {
            let mut even = passes(detector, 2, |_, channel, rng| match rng.below(kinds) {
                0 => 0.25 * (channel % 2) as f32,
                k => 0.25 * (channel % 2) as f32 + 0.1 * k as f32,
            });
            // The same maps twice: every candidate has a twin that is told apart by its order alone.
            even[2] = Pass { outputs: even[1].outputs.clone(), ..pass_like(&even[1]) };
            let all = Wanted { threshold: 0.5, px: [0.0; 2], max_candidates: 900, rule: GREEDY };
            let counts = bench.check(name, detector, &even, &all, 1000);
            assert!(counts[0] > 900, "{name}: {counts:?}");
            let odd = Wanted { max_candidates: 333, ..all };
            bench.check(name, detector, &even, &odd, 333);
            bench.check(name, detector, &even, &Wanted { max_candidates: 1, ..all }, 1);
        }
    }
}

#[test]
fn equal_scores_of_one_corner_are_told_apart_by_the_other() {
    let Some(bench) = Bench::new() else { return };
    // Four anchors a cell, each moved so that its box begins where the smallest does, the smallest last.
    let sizes = vec![[16.0, 16.0], [16.0, 8.0], [8.0, 16.0], [8.0, 8.0]];
    let anchors = vec![vec![], sizes.clone(), sizes.clone(), sizes.clone(), sizes.clone()];
    let detector = PyramidConfig { anchors, variances: [1.0; 2], ..PyramidConfig::nano() };
    let mut even = passes(&detector, 4, |output, channel, _| match channel.checked_sub(4) {
        None => [1.0, -20.0][output.min(1)],
        // 16 px are moved by a quarter, 8 by nothing: both begin 4 px before their cell's centre.
        Some(c) if c % 4 < 2 && sizes[c / 4][c % 4] == 16.0 => 0.25,
        Some(_) => 0.0,
    });
    even.truncate(2);
    let all = Wanted { threshold: 0.5, px: [0.0; 2], max_candidates: 2000, rule: GREEDY };
    let [found, ..] = bench.check("corners", &detector, &even, &all, 2000);
    assert!(found > 1000, "{found}");
    for most in [1, 2, 3, 601] {
        bench.check("corners", &detector, &even, &Wanted { max_candidates: most, ..all }, 700);
    }
}

fn pass_like(pass: &Pass) -> Pass {
    Pass { outputs: Vec::new(), window: pass.window.clone(), placement: pass.placement }
}

#[test]
fn one_face_stays_where_all_boxes_are_the_same_and_all_where_none_overlap() {
    let Some(bench) = Bench::new() else { return };
    let detector = named("hambox-r18").detector();
    let detector = &*detector;
    // Every offset puts the box of stride 4 at one place; other levels have no face.
    let (h, w) = (24, 40);
    let side = 16.0 * 0.68;
    let mut one = passes(detector, 3, |o, _, rng| if o == 0 { rng.uniform() } else { -20.0 });
    one.truncate(2);
    one.remove(0);
    for (i, t) in one[0].outputs[1].1.chunks_exact_mut(4).enumerate() {
        let [y, x] = [i / w, i % w].map(|c| c as f32);
        t.copy_from_slice(&[(20.0 - x) * 4.0 / side, (12.0 - y) * 4.0 / side, 0.0, 0.0]);
    }
    let wanted = Wanted { threshold: 0.5, px: [0.0; 2], max_candidates: 5000, rule: GREEDY };
    assert_eq!(bench.check("one place", detector, &one, &wanted, 5000), [h * w, h * w, 1]);
    // Boxes of e^-2 of the anchor, 1.5 px, on cells 4 px apart.
    one[0].outputs[1].1.chunks_exact_mut(4).for_each(|t| t.copy_from_slice(&[0.0, 0.0, -2.0, -2.0]));
    assert_eq!(bench.check("apart", detector, &one, &wanted, 5000), [h * w; 3]);
    let most = Wanted { rule: Rule { limit: 100, ..GREEDY }, ..wanted };
    assert_eq!(bench.check("the best of them", detector, &one, &most, 5000), [h * w, h * w, 100]);
    let nothing = Wanted { rule: Rule { limit: 0, ..GREEDY }, ..wanted };
    assert_eq!(bench.check("none of them", detector, &one, &nothing, 5000), [h * w, h * w, 0]);
    let everything = Wanted { rule: Rule { iou: 0.0, ..GREEDY }, ..wanted };
    assert_eq!(bench.check("touching", detector, &one, &everything, 5000), [h * w; 3]);
}

/// A detector's finest level alone on maps of this size.
fn crowd(h: usize, w: usize, mut logit: impl FnMut(&mut Rng) -> f32) -> (Box<dyn Detector>, Vec<Pass>) {
    let detector = named("hambox-r18").detector();
    let mut rng = Rng::new(11);
    let shapes = detector.graph().shapes(&[Shape::new(1, 3, 4 * h, 4 * w)]).unwrap();
    let graph = detector.graph();
    let outputs = graph.outputs.iter().enumerate().map(|(o, (_, id))| {
        let shape = shapes[id.0];
        let value = |_| match o {
            0 => logit(&mut rng),
            1 => 0.4 * rng.normal(),
            _ => -20.0,
        };
        (shape, (0..shape.len()).map(value).collect())
    });
    let outputs = outputs.collect();
    let placement = Placement { offset: [0.0; 2], factor: [1.0; 2], mirrored: None };
    (detector, vec![Pass { outputs, window: Window::whole(), placement }])
}

/// Cells of a side of the large cases: sanitizers are slow.
fn side() -> usize {
    if std::env::var_os("FARFACE_TEST_SANITIZE").is_some() {
        64
    } else {
        224
    }
}

#[test]
fn fifty_thousand_candidates_are_sorted_and_suppressed() {
    let Some(bench) = Bench::new() else { return };
    let side = side();
    let (detector, passes) = crowd(side, side, |rng| 3.0 * rng.uniform() + 0.01);
    // Of an overlap so small that thousands stay, not tens of thousands.
    let rule = Rule { iou: 0.1, ..GREEDY };
    let wanted = Wanted { threshold: 0.5, px: [0.0; 2], max_candidates: 50_000, rule };
    let counts = bench.check("a crowd", &*detector, &passes, &wanted, 50_000);
    assert_eq!(counts[..2], [side * side, (side * side).min(50_000)]);
    assert!(counts[2] > side * side / 40, "{counts:?}");
    println!("of {counts:?} candidates found, sorted, kept");
}

#[test]
fn the_best_of_many_equal_scores_are_those_of_the_first_places() {
    let Some(bench) = Bench::new() else { return };
    let side = side();
    let (detector, mut passes) = crowd(side, side, |_| 1.0);
    let wanted = Wanted { threshold: 0.5, px: [0.0; 2], max_candidates: 3000, rule: GREEDY };
    let counts = bench.check("equal scores", &*detector, &passes, &wanted, 5000);
    assert_eq!(counts[..2], [side * side, 3000]);
    // Equal boxes in all but their place too.
    passes[0].outputs[1].1.fill(0.0);
    bench.check("equal scores and sizes", &*detector, &passes, &wanted, 3000);
}

#[test]
fn candidates_without_room_are_counted_and_the_rest_is_whole() {
    let Some(bench) = Bench::new() else { return };
    let (detector, passes) = crowd(40, 40, |rng| 3.0 * rng.uniform() + 0.01);
    let levels = bench.levels(&*detector, &passes);
    let mut buffers = FaceBuffers::new(&bench.device, 1, 100, 500).unwrap();
    let wanted = Wanted { threshold: 0.5, px: [0.0; 2], max_candidates: 100, rule: GREEDY };
    let (header, sorted) = bench.run(&mut buffers, &levels, &passes, &wanted.sorted());
    assert_eq!([header.found, header.sorted, header.kept, header.overflow], [1600, 100, 100, 1000]);
    assert!(sorted.is_sorted_by(|a, b| rank(&detection(a), &detection(b)) != Ordering::Greater));
    // More is asked for than there is room: as much as there is.
    let greedy = Wanted { max_candidates: 5000, ..wanted }.sorted();
    let (header, _) = bench.run(&mut buffers, &levels, &passes, &greedy);
    assert_eq!([header.found, header.sorted, header.kept, header.overflow], [1600, 100, 100, 1000]);
    // No trace of it is left.
    let none = Wanted { threshold: 1.0, ..wanted }.sorted();
    let (header, _) = bench.run(&mut buffers, &levels, &passes, &none);
    assert_eq!(header, Header::default());
}

#[test]
fn images_side_by_side_are_each_as_if_alone() {
    let Some(bench) = Bench::new() else { return };
    let detector = named("farface-nano").detector();
    let alone: Vec<Vec<Pass>> =
        (5..8).map(|seed| passes(&*detector, seed, |_, _, rng| rng.normal())).collect();
    let wanted = Wanted { threshold: 0.5, px: [0.0; 2], max_candidates: 60, rule: GREEDY };
    let levels = bench.levels(&*detector, &alone[0]);
    let most = levels.iter().map(|(_, l)| l.iter().map(Level::candidates).sum()).max().unwrap();
    // Room for fewer than there are: the best stay in each.
    let mut one = FaceBuffers::new(&bench.device, 1, 60, most).unwrap();
    let expected: Vec<_> = alone
        .iter()
        .map(|p| bench.run(&mut one, &bench.levels(&*detector, p), p, &wanted.settings()))
        .collect();

    let mut side = FaceBuffers::new(&bench.device, 4, 60, most).unwrap();
    side.settings().set(&bench.stream, 0, &[wanted.settings()]).unwrap();
    side.begin(&bench.stream, alone.len()).unwrap();
    for (i, pass) in alone[0].iter().enumerate() {
        let together = |o: usize| {
            let shape = Shape { n: alone.len(), ..pass.outputs[o].0 };
            (shape, alone.iter().flat_map(|passes| passes[i].outputs[o].1.clone()).collect())
        };
        let outputs = (0..pass.outputs.len()).map(together).collect();
        let (arena, levels) =
            bench.levels(&*detector, &[Pass { outputs, ..pass_like(pass) }]).pop().expect("a pass");
        side.decode(&bench.stream, &arena, &levels, &pass.placement).unwrap();
        bench.stream.synchronize().unwrap();
    }
    side.finish(&bench.stream).unwrap();
    for (i, (header, kept)) in expected.iter().enumerate() {
        let got = side.read(&bench.stream, i).unwrap();
        assert!(header.found > 60 && header.kept > 5, "{header:?}");
        assert!(got.0 == *header && bits(&got.1) == bits(kept), "image {i}: {:?}, alone {header:?}", got.0);
    }
    assert!(side.begin(&bench.stream, 5).is_err(), "five images in room for four");
}

#[test]
fn recorded_launches_follow_the_settings() {
    let Some(bench) = Bench::new() else { return };
    let detector = named("farface-nano").detector();
    let detector = &*detector;
    let maps = passes(detector, 5, |_, _, rng| rng.normal());
    let levels = bench.levels(detector, &maps);
    let most = levels.iter().map(|(_, l)| l.iter().map(Level::candidates).sum()).max().unwrap();
    let mut buffers = FaceBuffers::new(&bench.device, 1, 2000, most).unwrap();
    let recorded = bench.stream.capture(|| {
        bench.launch(&mut buffers, &levels, &maps);
        Ok(())
    });
    let recorded = recorded.unwrap();
    let base = Wanted { threshold: 0.5, px: [0.0; 2], max_candidates: 2000, rule: GREEDY };
    let others = [
        base,
        Wanted { threshold: 0.8, ..base },
        Wanted { px: [12.0, 40.0], ..base },
        Wanted { max_candidates: 50, ..base },
        Wanted { rule: Rule { iou: 0.7, limit: 9, ..GREEDY }, ..base },
    ];
    let mut counts = Vec::new();
    for wanted in others {
        buffers.settings().set(&bench.stream, 0, &[wanted.settings()]).unwrap();
        recorded.launch(&bench.stream).unwrap();
        let by_graph = buffers.read(&bench.stream, 0).unwrap();
        let direct = bench.run(&mut buffers, &levels, &maps, &wanted.settings());
        assert!(by_graph.0 == direct.0 && bits(&by_graph.1) == bits(&direct.1));
        counts.push([direct.0.found, direct.0.sorted, direct.0.kept]);
    }
    assert!(counts[1..].iter().all(|c| *c != counts[0]) && counts[4][2] == 9, "{counts:?}");
    // What is read of the result's bytes is what the struct says.
    let bytes = buffers.result().values::<u8>(&bench.stream, 0, FaceBuffers::result_bytes(9)).unwrap();
    assert_eq!(bytes[8..12], 9u32.to_le_bytes());
}

#[test]
fn levels_that_do_not_fit_their_maps_are_refused() {
    let Some(bench) = Bench::new() else { return };
    let (detector, passes) = crowd(8, 8, |rng| rng.normal());
    let levels = bench.levels(&*detector, &passes);
    let (arena, fine) = (&levels[0].0, &levels[0].1[0]);
    let mut buffers = FaceBuffers::new(&bench.device, 1, 10, 64).unwrap();
    let breaks: [fn(&mut Level); 6] = [
        |l| l.rows.end = 9,
        |l| l.columns.end = 9,
        |l| l.pair = true,
        |l| l.boxes.first = 1,
        |l| l.anchors[0].0 = 1,
        |l| l.boxes.view.offset = 1 << 30,
    ];
    let mut decode = |level: &Level| {
        buffers.decode(&bench.stream, arena, std::slice::from_ref(level), &passes[0].placement)
    };
    decode(fine).unwrap();
    for (i, change) in breaks.iter().enumerate() {
        let mut level = fine.clone();
        change(&mut level);
        assert!(decode(&level).is_err(), "case {i}");
    }
}

#[test]
fn a_level_of_outputs_that_were_not_computed_is_left_out() {
    let view = |c: usize| Some(DeviceView::new(Element::F32, Shape::new(1, c, 3, 5), 0));
    let detector = named("refineface-r18").detector();
    let heads = detector.heads(1.0);
    // Three filters, three movers, then a pair a level.
    let all: Vec<Option<DeviceView>> =
        [2, 2, 2, 8, 8, 8].into_iter().chain([2, 8].repeat(6)).map(view).collect();
    let levels = |outputs: &[Option<DeviceView>]| -> Vec<bool> {
        heads.iter().map(|head| head.level(outputs, &Window::whole()).is_some()).collect()
    };
    assert_eq!(levels(&all), [true; 6]);
    for (missing, level) in [(1, 1), (4, 4), (6, 0), (17, 5)] {
        let mut some = all.clone();
        some[missing] = None;
        let expected: Vec<bool> = (0..6).map(|l| l != level).collect();
        assert_eq!(levels(&some), expected, "without output {missing}");
    }
}
