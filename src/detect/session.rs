//! From a picture to faces: levels, tiles, network, candidates, suppression.
//!
//! A session owns all memory that a detection needs. What depends on a picture's size (levels,
//! tiles, plans) is prepared once and kept for the last few sizes, so that detecting at a size that was seen
//! before (or warmed up) allocates nothing.

use super::candidates::Candidates;
use super::detector::{Map, Window};
use super::face::{Ellipse, Face};
use super::model::Model;
use super::nms::{Convention, Nms};
use super::options::{Options, MAX_THREADS};
use super::passes::{input_shape, passes, Pass};
use super::second_stage::Refiner;
use super::BBox;
use crate::cpu::{Arena, Pool, View};
use crate::error::{Error, Result};
use crate::graph::Plan;
use crate::pixels::{fill, DstRows, ImageView, Placement, Rect, Scratch, Size};
use std::ops::Range;
use std::time::{Duration, Instant};

/// Picture sizes whose preparation is kept.
const KEPT_SIZES: usize = 8;
/// Most outputs of a network.
const MAX_OUTPUTS: usize = 64;

/// Wall time of the parts of one detection.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Timings {
    /// Pixels to network input.
    pub input: Duration,
    /// The network.
    pub network: Duration,
    /// Outputs to candidates.
    pub decode: Duration,
    /// Sorting, suppression, coordinates.
    pub merge: Duration,
}

/// Plans by window size.
type Plans = Vec<(Size, Plan)>;

/// What depends on the picture's upright size.
struct Prepared {
    size: Size,
    passes: Vec<Pass>,
    used: u64,
}

/// A detector at work: one caller at a time, any number of sessions a model.
pub struct Session {
    model: Model,
    options: Options,
    pool: Pool,
    arena: Arena,
    scratch: Vec<Scratch>,
    plans: Plans,
    prepared: Vec<Prepared>,
    candidates: Candidates,
    nms: Nms,
    /// Of the second stage, where the model has one.
    refiner: Option<Refiner>,
    faces: Vec<Face>,
    calls: u64,
    timings: Option<Timings>,
}

impl Session {
    /// Session with the model's own settings, on one thread.
    pub fn new(model: &Model) -> Result<Self> {
        Self::with_options(model, Options::for_model(model.config()))
    }

    /// Session with these settings.
    pub fn with_options(model: &Model, options: Options) -> Result<Self> {
        options.check()?;
        if !(1..=MAX_OUTPUTS).contains(&model.graph().outputs.len()) {
            return Err(Error::InvalidModel(format!("a network has 1 to {MAX_OUTPUTS} outputs")));
        }
        let pool = new_pool(&options)?;
        Ok(Self {
            model: model.clone(),
            options,
            pool,
            arena: Arena::default(),
            scratch: Vec::new(),
            plans: Vec::new(),
            prepared: Vec::new(),
            candidates: Candidates::default(),
            nms: Nms::default(),
            refiner: model.second_stage().map(Refiner::new).transpose()?,
            faces: Vec::new(),
            calls: 0,
            timings: None,
        })
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The settings.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// Changes the settings. What was prepared or warmed up is given up where the change concerns it.
    pub fn set_options(&mut self, options: Options) -> Result<()> {
        options.check()?;
        let threads = options.thread_count() != self.pool.threads();
        if threads {
            self.pool = new_pool(&options)?;
        }
        let buffers_of = |o: &Options| (o.max_candidates, o.max_faces);
        let plan_of = |o: &Options| (o.min_face_px, o.max_face_px, o.pyramid, o.tile_px, o.memory_cap);
        let buffers = buffers_of(&options) != buffers_of(&self.options);
        if buffers {
            self.candidates = Candidates::default();
            self.nms = Nms::default();
            self.faces = Vec::new();
        }
        // Every one of these counts against the memory cap, and so do the rows of each thread.
        if buffers || threads || plan_of(&options) != plan_of(&self.options) {
            self.prepared.clear();
            self.plans.clear();
            self.arena.clear();
            self.scratch = Vec::new();
        }
        self.options = options;
        Ok(())
    }

    /// Name of the device that the network runs on.
    pub fn device(&self) -> &'static str {
        "cpu"
    }

    /// Measures the parts of the following detections.
    pub fn measure(&mut self, on: bool) {
        self.timings = on.then(Timings::default);
    }

    /// Parts of the last detection, where measured.
    pub fn timings(&self) -> Option<Timings> {
        self.timings
    }

    /// Prepares everything for pictures of this upright size (pixels), so that detecting on them
    /// allocates nothing.
    pub fn warmup(&mut self, width: usize, height: usize) -> Result<()> {
        let index = self.prepare(checked_size(width, height)?)?;
        // One run touches all pages, so that the first picture is not slower than the next.
        let (passes, plans) = (&self.prepared[index].passes, &self.plans);
        for pass in passes {
            let plan = plan_for(plans, pass.grid.get(0).window)?;
            plan.run(&mut self.arena, &mut self.pool);
        }
        if let Some(refiner) = &mut self.refiner {
            refiner.warmup(&mut self.pool);
        }
        Ok(())
    }

    /// Bytes of memory that this session holds once it is warmed up for this upright size and no
    /// other, its threads' stacks not counted.
    pub fn workspace_bytes(&self, width: usize, height: usize) -> Result<u64> {
        let size = checked_size(width, height)?;
        let (passes, plans) = self.fit(size)?;
        Ok(self.held_bytes(size, &passes, &plans))
    }

    /// Finds faces, best first, in pixels of the picture as given.
    pub fn detect(&mut self, image: &ImageView<'_>) -> Result<&[Face]> {
        let size = image.upright_size();
        let index = self.prepare(size)?;
        self.candidates.clear();
        let mut timings = Timings::default();
        let measured = self.timings.is_some();
        let mut clock = measured.then(Instant::now);
        let mut lap = |slot: &mut Duration| {
            if let Some(start) = &mut clock {
                let now = Instant::now();
                *slot += now - *start;
                *start = now;
            }
        };
        let detector = self.model.detector();
        for pass in &self.prepared[index].passes {
            let to_upright = pass.level.to_upright(size);
            for t in 0..pass.grid.len() {
                let tile = pass.grid.get(t);
                let plan = plan_for(&self.plans, tile.window)?;
                let input = plan.inputs()[0];
                let norm = self.model.normalization();
                fill_input(
                    image,
                    pass.level.size,
                    tile.window,
                    norm,
                    (&mut self.arena, &input),
                    &mut self.pool,
                    &mut self.scratch,
                )?;
                lap(&mut timings.input);
                plan.run(&mut self.arena, &mut self.pool);
                lap(&mut timings.network);
                let floats = self.arena.floats();
                let outputs = plan.outputs();
                // On the stack: the first `outputs.len()` entries are the outputs.
                let maps: [Map; MAX_OUTPUTS] =
                    std::array::from_fn(|i| Map::new(floats, outputs[i.min(outputs.len() - 1)]));
                let window = owned(tile.window, tile.owned, pass.level.size);
                let offset = [tile.window.x as f32, tile.window.y as f32];
                let limits = (self.options.min_face_px, self.options.max_face_px);
                let candidates = &mut self.candidates;
                let maps = &maps[..outputs.len()];
                let threshold = self.options.score_threshold;
                let mut sink = |face: Face| {
                    if face.score >= candidates.floor() {
                        let face = face.placed(offset, to_upright);
                        if wanted(&face, limits) {
                            candidates.push(face);
                        }
                    }
                };
                let (Some(second), Some(refiner)) = (self.model.second_stage(), &mut self.refiner) else {
                    detector.decode(maps, &window, threshold, &mut sink);
                    lap(&mut timings.decode);
                    continue;
                };
                refiner.clear();
                let proposed = second.proposal_threshold(threshold);
                detector.decode(maps, &window, proposed, &mut |face| refiner.propose(face));
                lap(&mut timings.decode);
                refiner.refine(second, &maps[maps.len() - 1], &mut self.pool, threshold, &mut sink);
                lap(&mut timings.network);
            }
        }
        let convention =
            if self.model.config().nms_plus_one { Convention::PlusOne } else { Convention::Continuous };
        let limit = if self.options.max_faces == 0 { usize::MAX } else { self.options.max_faces };
        let sorted = self.candidates.sorted();
        let kept =
            self.nms.run(sorted.len(), |i| sorted[i].face.bbox, self.options.nms_iou, convention, limit);
        let placement = image.placement();
        self.faces.clear();
        self.faces.extend(kept.iter().map(|&i| stored(&sorted[i as usize].face, &placement)));
        lap(&mut timings.merge);
        if measured {
            self.timings = Some(timings);
        }
        Ok(&self.faces)
    }

    /// Finds faces as [`Session::detect`] and writes the best into `faces`. Returns how many there
    /// are, which may be more than there is room for.
    pub fn detect_into(&mut self, image: &ImageView<'_>, faces: &mut [Face]) -> Result<usize> {
        let found = self.detect(image)?;
        let n = found.len().min(faces.len());
        faces[..n].copy_from_slice(&found[..n]);
        Ok(found.len())
    }

    fn face_capacity(&self) -> usize {
        match self.options.max_faces {
            0 => self.options.max_candidates,
            n => n.min(self.options.max_candidates),
        }
    }

    /// Index of what is prepared for this size; prepares it where it is not.
    fn prepare(&mut self, size: Size) -> Result<usize> {
        self.calls += 1;
        if let Some(i) = self.prepared.iter().position(|p| p.size == size) {
            self.prepared[i].used = self.calls;
            return Ok(i);
        }
        let (passes, plans) = self.fit(size)?;
        self.candidates.reserve(self.options.max_candidates);
        self.nms.reserve(self.options.max_candidates);
        if self.faces.capacity() < self.face_capacity() {
            self.faces = Vec::with_capacity(self.face_capacity());
        }
        if self.prepared.is_empty() {
            self.prepared.reserve_exact(KEPT_SIZES);
        }
        if self.prepared.len() == KEPT_SIZES {
            let oldest = (0..KEPT_SIZES).min_by_key(|&i| self.prepared[i].used).unwrap_or(0);
            self.prepared.swap_remove(oldest);
            let prepared = &self.prepared;
            let in_use = |window: Size| prepared.iter().flat_map(|p| &p.passes).any(|p| p.has(window));
            self.plans.retain(|(window, _)| in_use(*window));
        }
        if self.plans.is_empty() {
            self.plans = plans;
        } else {
            for (window, plan) in plans {
                if self.plans.iter().all(|(size, _)| *size != window) {
                    self.plans.push((window, plan));
                }
            }
        }
        let floats = self.plans.iter().map(|(_, p)| p.floats()).max().unwrap_or(0);
        self.arena.reserve(floats)?;
        if self.scratch.is_empty() {
            self.scratch = (0..self.pool.threads()).map(|_| Scratch::default()).collect();
        }
        for scratch in &mut self.scratch {
            scratch_widths(size, &passes).for_each(|[u, l, w]| scratch.reserve(u, l, w));
        }
        self.prepared.push(Prepared { size, passes, used: self.calls });
        Ok(self.prepared.len() - 1)
    }

    /// Levels, tiles and plans for a picture, such that the session stays within its memory cap.
    fn fit(&self, size: Size) -> Result<(Vec<Pass>, Plans)> {
        let cap = self.options.memory_cap;
        let mut budget = cap;
        // What is not arena is known only once the tiles are: take it off and cut again. It hardly
        // changes with the tiles, so that the second or third try fits.
        for _ in 0..8 {
            let passes = passes(&self.model, &self.options, size, budget).map_err(|e| match e {
                Error::LimitExceeded(m) if budget < cap => {
                    Error::LimitExceeded(format!("{m} ({cap}, less {} for other buffers)", cap - budget))
                }
                other => other,
            })?;
            let mut plans = Plans::new();
            for window in passes.iter().flat_map(Pass::windows) {
                if plans.iter().all(|(size, _)| *size != window) {
                    plans.push((window, Plan::new(self.model.network(), &[input_shape(window)])?));
                }
            }
            let held = self.held_bytes(size, &passes, &plans);
            if held <= cap {
                return Ok((passes, plans));
            }
            budget = budget.saturating_sub(held - cap);
        }
        Err(Error::LimitExceeded(format!(
            "the buffers for {}x{} px do not fit the memory cap of {cap} bytes; raise the cap",
            size.width, size.height
        )))
    }

    /// Bytes that the session holds with these passes and plans prepared.
    fn held_bytes(&self, size: Size, passes: &Vec<Pass>, plans: &Plans) -> u64 {
        let floats = plans.iter().map(|(_, p)| p.floats()).max().unwrap_or(0);
        let rows = Scratch::bytes_for_widths(scratch_widths(size, passes));
        let held = size_of::<Self>()
            + floats.div_ceil(16) * 64
            + plans.iter().map(|(_, p)| p.bytes()).sum::<usize>()
            + plans.capacity() * size_of::<(Size, Plan)>()
            + passes.capacity() * size_of::<Pass>()
            + self.pool.threads() * (rows + size_of::<Scratch>())
            + Candidates::bytes_for(self.options.max_candidates)
            + Nms::bytes_for(self.options.max_candidates)
            + self.refiner.as_ref().map_or(0, Refiner::bytes)
            + self.face_capacity() * size_of::<Face>()
            + KEPT_SIZES * size_of::<Prepared>();
        held as u64
    }
}

fn new_pool(options: &Options) -> Result<Pool> {
    let n = options.thread_count();
    Pool::new(n).map_err(|e| Error::LimitExceeded(format!("cannot start {n} threads: {e}")))
}

fn checked_size(width: usize, height: usize) -> Result<Size> {
    if width == 0 || height == 0 {
        return Err(Error::InvalidArgument(format!("picture of {width}x{height} px")));
    }
    Ok(Size::new(width, height))
}

fn plan_for(plans: &[(Size, Plan)], window: Rect) -> Result<&Plan> {
    let size = Size::new(window.width, window.height);
    let found = plans.iter().find(|(s, _)| *s == size);
    found.map(|(_, p)| p).ok_or_else(|| Error::Internal("a tile without a plan".into()))
}

/// (upright width, level width, window width) of every pass, for the conversion's row buffers.
fn scratch_widths(size: Size, passes: &[Pass]) -> impl Iterator<Item = [usize; 3]> + '_ {
    passes.iter().flat_map(move |p| p.windows().map(move |w| [size.width, p.level.size.width, w.width]))
}

/// The tile's own cells: to infinity where the window ends at the level's border.
fn owned(window: Rect, owned: Rect, level: Size) -> Window {
    let axis = |from: usize, length: usize, start: usize, level: usize| -> Range<f32> {
        let low = if from == 0 { f32::NEG_INFINITY } else { (from - start) as f32 };
        let high = if from + length == level { f32::INFINITY } else { (from + length - start) as f32 };
        low..high
    };
    Window {
        owned_x: axis(owned.x, owned.width, window.x, level.width),
        owned_y: axis(owned.y, owned.height, window.y, level.height),
    }
}

/// Whether a face is of a size asked for, and a face at all: weights can be anything, and so can
/// what they make of a picture.
fn wanted(face: &Face, (min, max): (f32, f32)) -> bool {
    let b = face.bbox;
    let finite = |values: &[f32]| values.iter().all(|v| v.is_finite());
    let sane = finite(&[b.x1, b.y1, b.width(), b.height()])
        && b.width() > 0.0
        && b.height() > 0.0
        && face.landmarks.is_none_or(|points| finite(points.as_flattened()))
        && face
            .ellipse
            .is_none_or(|e| finite(&[e.center[0], e.center[1], e.half_axes[0], e.half_axes[1], e.angle]));
    let size = face.size();
    sane && size >= min && (max == 0.0 || size <= max)
}

/// The face in pixels of the picture as stored.
fn stored(face: &Face, placement: &Placement) -> Face {
    let b = face.bbox;
    let [x, y, w, h] = placement.stored_box([b.x1, b.y1, b.width(), b.height()]);
    // Untouched corners where nothing turns, so that no rounding creeps in.
    let plain = !placement.transposed() && !placement.flip_x() && !placement.flip_y();
    let (dx, dy) = (placement.roi().x as f32, placement.roi().y as f32);
    let bbox = if plain {
        BBox::new(b.x1 + dx, b.y1 + dy, b.x2 + dx, b.y2 + dy)
    } else {
        BBox::from_xywh(x, y, w, h)
    };
    Face {
        bbox,
        score: face.score,
        landmarks: face.landmarks.map(|points| points.map(|p| placement.stored_point(p))),
        ellipse: face.ellipse.map(|e| {
            let [dx, dy] = placement.stored_direction([e.angle.cos(), e.angle.sin()]);
            Ellipse { center: placement.stored_point(e.center), angle: dy.atan2(dx), ..e }
        }),
    }
}

/// Writes the window of the level into the network's input, rows shared between the threads.
fn fill_input(
    image: &ImageView<'_>,
    level: Size,
    window: Rect,
    norm: &crate::pixels::Normalization,
    (arena, input): (&mut Arena, &View),
    pool: &mut Pool,
    scratch: &mut [Scratch],
) -> Result<()> {
    struct Share<'a> {
        rows: Range<usize>,
        data: &'a mut [f32],
        scratch: Option<&'a mut Scratch>,
        result: Result<()>,
    }
    let threads = pool.threads();
    let height = window.height;
    let mut rest = &mut arena.floats_mut()[input.offset..];
    let mut scratches = scratch.iter_mut();
    let mut done = 0;
    // On the stack; the entries past the threads stay empty.
    let mut shares: [Share; MAX_THREADS] = std::array::from_fn(|i| {
        let end = height * (i + 1).min(threads) / threads;
        let rows = std::mem::replace(&mut done, end)..end;
        let floats = (rows.len() * input.row).min(rest.len());
        let (data, others) = std::mem::take(&mut rest).split_at_mut(floats);
        rest = others;
        Share { rows, data, scratch: scratches.next(), result: Ok(()) }
    });
    pool.run_each(&mut shares, |_, share| {
        let Some(scratch) = share.scratch.as_deref_mut() else {
            share.result = Err(Error::Internal("a thread without row buffers".into()));
            return;
        };
        let mut dst = DstRows::new(share.data, input.row, input.pixel);
        share.result = fill(image, level, window, share.rows.clone(), norm, &mut dst, scratch);
    });
    shares.into_iter().try_for_each(|share| share.result)
}
