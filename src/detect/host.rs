//! A session's work on the CPU: levels, tiles, plans, and the memory that they share.
//!
//! What depends on a picture's size is prepared once and kept for the last few sizes, so that detecting at a size that was seen
//! before (or warmed up) allocates nothing.

use super::candidates::Candidates;
use super::detector::{Map, Window};
use super::face::Face;
use super::input::{fill_input, scratch_widths};
use super::model::Model;
use super::nms::Nms;
use super::options::Options;
use super::passes::{costs, input_shape, passes, LevelCost, Pass};
use super::second_stage::Refiner;
use super::timings::Timings;
use super::Detection;
use crate::cpu::{Arena, Pool};
use crate::error::{Error, Result};
use crate::graph::{Compiled, Plan, Want};
use crate::pixels::{ImageView, Rect, Scratch, Size};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Picture sizes whose preparation is kept.
const KEPT_SIZES: usize = 8;
/// Most outputs of a network.
pub(super) const MAX_OUTPUTS: usize = 64;
/// Most bytes of the session around this.
pub(super) const SESSION_BYTES: usize = 1 << 10;

/// A plan, and what it is for.
struct Planned {
    window: Size,
    wants: Vec<Want>,
    plan: Plan,
}

type Plans = Vec<Planned>;

/// What depends on the picture's upright size.
struct Prepared {
    size: Size,
    passes: Vec<Pass>,
    used: u64,
}

/// A session's part on the CPU.
pub(super) struct OnHost {
    network: Arc<Compiled>,
    pool: Pool,
    arena: Arena,
    scratch: Vec<Scratch>,
    plans: Plans,
    prepared: Vec<Prepared>,
    candidates: Candidates,
    nms: Nms,
    /// Of the second stage, where the model has one.
    refiner: Option<Refiner>,
    calls: u64,
}

impl OnHost {
    /// The model's network on as many threads as the settings say.
    pub fn new(model: &Model, options: &Options) -> Result<Self> {
        let pool = new_pool(options)?;
        Ok(Self {
            network: model.network(options.precision)?,
            pool,
            arena: Arena::default(),
            scratch: Vec::new(),
            plans: Vec::new(),
            prepared: Vec::new(),
            candidates: Candidates::default(),
            nms: Nms::default(),
            refiner: model.second_stage().map(Refiner::new).transpose()?,
            calls: 0,
        })
    }

    /// Takes other settings over; what was prepared is given up where the change concerns it. `faces` are the session's.
    pub fn set_options(
        &mut self,
        model: &Model,
        old: &Options,
        new: &Options,
        faces: &mut Vec<Face>,
    ) -> Result<()> {
        // First what can fail, so that the session stays as it was.
        let network = model.network(new.precision)?;
        let threads = new.thread_count() != self.pool.threads();
        if threads {
            self.pool = new_pool(new)?;
        }
        let buffers_of = |o: &Options| (o.max_candidates, o.max_faces, o.suppression.is_soft());
        let plan_of = |o: &Options| (o.min_face_px, o.max_face_px, o.pyramid, o.tile_px, o.memory_cap);
        let buffers = buffers_of(new) != buffers_of(old);
        if buffers {
            self.candidates = Candidates::default();
            self.nms = Nms::default();
            *faces = Vec::new();
        }
        let other_network = !Arc::ptr_eq(&network, &self.network);
        self.network = network;
        // Every one of these counts against the memory cap, and so do the rows of each thread.
        if buffers || threads || other_network || plan_of(new) != plan_of(old) {
            self.prepared.clear();
            self.plans.clear();
            self.arena.clear();
            self.pool.clear_scratch();
            self.scratch = Vec::new();
        }
        Ok(())
    }

    /// As [`Session::warmup`](super::Session::warmup).
    pub fn warmup(
        &mut self,
        model: &Model,
        options: &Options,
        size: Size,
        faces: &mut Vec<Face>,
    ) -> Result<()> {
        let index = self.prepare(model, options, size, faces)?;
        // One run touches all pages, so that the first picture is not slower than the next.
        let (passes, plans) = (&self.prepared[index].passes, &self.plans);
        for pass in passes {
            let plan = plan_for(plans, pass, pass.grid.get(0).window)?;
            plan.run(&mut self.arena, &mut self.pool);
        }
        if let Some(refiner) = &mut self.refiner {
            refiner.warmup(&mut self.pool);
        }
        Ok(())
    }

    /// As [`Session::workspace_bytes`](super::Session::workspace_bytes).
    pub fn workspace_bytes(&self, model: &Model, options: &Options, size: Size) -> Result<u64> {
        let (passes, plans) = self.fit(model, options, size)?;
        Ok(self.held_bytes(options, size, &passes, &plans))
    }

    /// As [`Session::levels`](super::Session::levels).
    pub fn levels(&self, model: &Model, options: &Options, size: Size) -> Result<Vec<LevelCost>> {
        Ok(costs(&self.fit(model, options, size)?.0, options))
    }

    /// Finds the faces of a picture, best first. Times are taken where they are `measured`.
    pub fn detect(
        &mut self,
        model: &Model,
        options: &Options,
        image: &ImageView<'_>,
        measured: bool,
        faces: &mut Vec<Face>,
    ) -> Result<Timings> {
        let size = image.upright_size();
        let index = self.prepare(model, options, size, faces)?;
        self.candidates.clear();
        let mut timings = Timings::default();
        let mut clock = measured.then(Instant::now);
        let mut lap = |slot: &mut Duration| {
            if let Some(start) = &mut clock {
                let now = Instant::now();
                *slot += now - *start;
                *start = now;
            }
        };
        let detector = model.detector();
        let views = [(*image, false), (image.with_orientation(image.orientation().mirror()), true)];
        let views = &views[..if options.flip { 2 } else { 1 }];
        for pass in &self.prepared[index].passes {
            let to_upright = pass.level.to_upright(size);
            for (tile, (view, mirrored)) in pass.grid.iter().flat_map(|t| views.iter().map(move |v| (t, v))) {
                let plan = plan_for(&self.plans, pass, tile.window)?;
                let input = plan.inputs()[0];
                let norm = model.normalization();
                fill_input(
                    view,
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
                let scale = pass.level.scale as f32;
                let window = Window::of(&tile, pass.padded, pass.level.size, scale);
                let offset = [tile.window.x as f32, tile.window.y as f32];
                let limits = (options.min_face_px, options.max_face_px);
                let candidates = &mut self.candidates;
                let maps = &maps[..outputs.len()];
                let threshold = options.score_threshold;
                let mut sink = |face: Face| {
                    if face.score >= candidates.floor() {
                        let face = face.placed(offset, to_upright);
                        let face = if *mirrored { face.mirrored(size.width as f32) } else { face };
                        if face.is_wanted(limits) {
                            candidates.push(face);
                        }
                    }
                };
                let (Some(second), Some(refiner)) = (model.second_stage(), &mut self.refiner) else {
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
        let (sorted, rule) = (self.candidates.sorted(), options.rule(model.config().nms_plus_one));
        let placement = image.placement();
        faces.clear();
        let candidate = |i: usize| sorted[i].face.detection();
        self.nms.run(sorted.len(), candidate, &rule, |i, Detection { bbox, score }| {
            faces.push(Face { bbox, score, ..sorted[i].face }.stored(&placement));
        });
        lap(&mut timings.merge);
        Ok(timings)
    }

    /// Index of what is prepared for this size; prepares it where it is not.
    fn prepare(
        &mut self,
        model: &Model,
        options: &Options,
        size: Size,
        faces: &mut Vec<Face>,
    ) -> Result<usize> {
        self.calls += 1;
        if let Some(i) = self.prepared.iter().position(|p| p.size == size) {
            self.prepared[i].used = self.calls;
            return Ok(i);
        }
        let (passes, plans) = self.fit(model, options, size)?;
        self.candidates.reserve(options.max_candidates);
        self.nms.reserve(options.max_candidates, options.suppression);
        if faces.capacity() < face_capacity(options) {
            *faces = Vec::with_capacity(face_capacity(options));
        }
        if self.prepared.is_empty() {
            self.prepared.reserve_exact(KEPT_SIZES);
        }
        if self.prepared.len() == KEPT_SIZES {
            let oldest = (0..KEPT_SIZES).min_by_key(|&i| self.prepared[i].used).unwrap_or(0);
            self.prepared.swap_remove(oldest);
            let prepared = &self.prepared;
            let in_use = |p: &Planned| {
                prepared.iter().flat_map(|p| &p.passes).any(|pass| pass.has(p.window, &p.wants))
            };
            self.plans.retain(in_use);
        }
        if self.plans.is_empty() {
            self.plans = plans;
        } else {
            for new in plans {
                if self.plans.iter().all(|p| !p.is_for(new.window, &new.wants)) {
                    self.plans.push(new);
                }
            }
        }
        let floats = self.plans.iter().map(|p| p.plan.floats()).max().unwrap_or(0);
        self.arena.reserve(floats)?;
        self.pool.reserve_scratch(self.thread_floats(&self.plans))?;
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
    fn fit(&self, model: &Model, options: &Options, size: Size) -> Result<(Vec<Pass>, Plans)> {
        let cap = options.memory_cap;
        let mut budget = cap;
        // What is not arena is known only once the tiles are: take it off and cut again. It hardly
        // changes with the tiles, so that the second or third try fits.
        for _ in 0..8 {
            let arena = |s: Size| Ok(Plan::arena_bytes(&self.network, &[input_shape(s)])? as u64);
            let passes = passes(model, &arena, options, size, budget).map_err(|e| match e {
                Error::LimitExceeded(m) if budget < cap => {
                    Error::LimitExceeded(format!("{m} ({cap}, less {} for other buffers)", cap - budget))
                }
                other => other,
            })?;
            let mut plans = Plans::new();
            for (pass, window) in passes.iter().flat_map(|p| p.windows().map(move |w| (p, w))) {
                if plans.iter().all(|p| !p.is_for(window, &pass.wants)) {
                    let plan = Plan::for_wants(&self.network, &[input_shape(window)], &pass.wants)?;
                    plans.push(Planned { window, wants: pass.wants.clone(), plan });
                }
            }
            let held = self.held_bytes(options, size, &passes, &plans);
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

    /// Floats that each thread of the pool needs for these plans and the second stage's.
    fn thread_floats(&self, plans: &Plans) -> usize {
        let refiner = self.refiner.as_ref().map_or(0, Refiner::scratch);
        plans.iter().map(|p| p.plan.scratch()).fold(refiner, usize::max)
    }

    /// Bytes that the session holds with these passes and plans prepared.
    fn held_bytes(&self, options: &Options, size: Size, passes: &Vec<Pass>, plans: &Plans) -> u64 {
        let floats = plans.iter().map(|p| p.plan.floats()).max().unwrap_or(0);
        let wants = passes.iter().map(|p| &p.wants).chain(plans.iter().map(|p| &p.wants));
        let rows = Scratch::bytes_for_widths(scratch_widths(size, passes));
        let held = SESSION_BYTES
            + size_of::<Self>()
            + floats.div_ceil(16) * 64
            + plans.iter().map(|p| p.plan.bytes()).sum::<usize>()
            + plans.capacity() * size_of::<Planned>()
            + wants.map(|w| w.capacity() * size_of::<Want>()).sum::<usize>()
            + passes.capacity() * size_of::<Pass>()
            + self.pool.threads() * (rows + size_of::<Scratch>())
            + (self.pool.threads() * self.thread_floats(plans)).div_ceil(16) * 64
            + Candidates::bytes_for(options.max_candidates)
            + Nms::bytes_for(options.max_candidates, options.suppression)
            + self.refiner.as_ref().map_or(0, Refiner::bytes)
            + face_capacity(options) * size_of::<Face>()
            + KEPT_SIZES * size_of::<Prepared>();
        held as u64
    }
}

/// Most faces that there may be.
fn face_capacity(options: &Options) -> usize {
    match options.max_faces {
        0 => options.max_candidates,
        n => n.min(options.max_candidates),
    }
}

fn new_pool(options: &Options) -> Result<Pool> {
    let n = options.thread_count();
    Pool::new(n).map_err(|e| Error::LimitExceeded(format!("cannot start {n} threads: {e}")))
}

impl Planned {
    fn is_for(&self, window: Size, wants: &[Want]) -> bool {
        self.window == window && self.wants == wants
    }
}

fn plan_for<'a>(plans: &'a Plans, pass: &Pass, window: Rect) -> Result<&'a Plan> {
    let found = plans.iter().find(|p| p.is_for(window.size(), &pass.wants));
    found.map(|p| &p.plan).ok_or_else(|| Error::Internal("a tile without a plan".into()))
}
