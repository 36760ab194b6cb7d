//! From a picture to faces: levels, tiles, network, candidates, suppression.
//!
//! A session owns all memory that a detection needs. What depends on a picture's size (levels,
//! tiles, plans) is prepared once and kept for the last few sizes, so that detecting at a size that was seen
//! before (or warmed up) allocates nothing.

use super::candidates::Candidates;
use super::detector::{Map, Window};
#[cfg(feature = "cuda")]
use super::device::{OnDevice, Source};
use super::face::Face;
use super::input::{fill_input, scratch_widths};
use super::model::Model;
use super::nms::Nms;
#[cfg(feature = "cuda")]
use super::options::DevicePolicy;
use super::options::Options;
use super::passes::{costs, input_shape, passes, LevelCost, Pass};
use super::second_stage::Refiner;
use super::timings::Timings;
use super::Detection;
use crate::cpu::{Arena, Pool};
use crate::error::{Error, Result};
#[cfg(feature = "cuda")]
use crate::gpu::driver::{Context, Stream};
use crate::graph::{Compiled, Plan, Want};
#[cfg(feature = "cuda")]
use crate::pixels::DeviceImage;
use crate::pixels::{ImageView, Rect, Scratch, Size};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Picture sizes whose preparation is kept.
const KEPT_SIZES: usize = 8;
/// Most outputs of a network.
const MAX_OUTPUTS: usize = 64;

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

/// A detector at work: one caller at a time, any number of sessions a model.
pub struct Session {
    model: Model,
    network: Arc<Compiled>,
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
    /// What does the work where it is on a device: of the above model, options, faces and timings alone are then in use.
    #[cfg(feature = "cuda")]
    device: Option<Box<OnDevice>>,
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
        #[cfg(feature = "cuda")]
        let device = on_device(model, &options)?;
        let pool = new_pool(&options)?;
        Ok(Self {
            model: model.clone(),
            network: model.network(options.precision)?,
            #[cfg(feature = "cuda")]
            device,
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
        // First what can fail, so that the session stays as it was.
        let network = self.model.network(options.precision)?;
        let threads = options.thread_count() != self.pool.threads();
        let pool = threads.then(|| new_pool(&options)).transpose()?;
        #[cfg(feature = "cuda")]
        match &mut self.device {
            Some(device) if options.device == self.options.device => {
                device.set_options(&self.model, &self.options, &options)?;
            }
            _ => self.device = on_device(&self.model, &options)?,
        }
        if let Some(pool) = pool {
            self.pool = pool;
        }
        let buffers_of = |o: &Options| (o.max_candidates, o.max_faces, o.suppression.is_soft());
        let plan_of = |o: &Options| (o.min_face_px, o.max_face_px, o.pyramid, o.tile_px, o.memory_cap);
        let buffers = buffers_of(&options) != buffers_of(&self.options);
        if buffers {
            self.candidates = Candidates::default();
            self.nms = Nms::default();
            self.faces = Vec::new();
        }
        let other_network = !Arc::ptr_eq(&network, &self.network);
        self.network = network;
        // Every one of these counts against the memory cap, and so do the rows of each thread.
        if buffers || threads || other_network || plan_of(&options) != plan_of(&self.options) {
            self.prepared.clear();
            self.plans.clear();
            self.arena.clear();
            self.pool.clear_scratch();
            self.scratch = Vec::new();
        }
        self.options = options;
        Ok(())
    }

    /// Name of the device that the network runs on.
    pub fn device(&self) -> &str {
        #[cfg(feature = "cuda")]
        if let Some(device) = &self.device {
            return device.name();
        }
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
        let size = checked_size(width, height)?;
        #[cfg(feature = "cuda")]
        if let Some(device) = &mut self.device {
            return device.warmup(&self.model, &self.options, size);
        }
        let index = self.prepare(size)?;
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

    /// Bytes of memory that this session holds once it is warmed up for this upright size and no
    /// other, its threads' stacks not counted.
    pub fn workspace_bytes(&self, width: usize, height: usize) -> Result<u64> {
        let size = checked_size(width, height)?;
        #[cfg(feature = "cuda")]
        if let Some(device) = &self.device {
            return device.workspace_bytes(&self.model, &self.options, size);
        }
        let (passes, plans) = self.fit(size)?;
        Ok(self.held_bytes(size, &passes, &plans))
    }

    /// The scales on which a picture of this upright size is searched, and what each costs, in the order of the search;
    /// none where no level can hold a face of a size asked for.
    pub fn levels(&self, width: usize, height: usize) -> Result<Vec<LevelCost>> {
        let size = checked_size(width, height)?;
        #[cfg(feature = "cuda")]
        if let Some(device) = &self.device {
            return device.levels(&self.model, &self.options, size);
        }
        Ok(costs(&self.fit(size)?.0, &self.options))
    }

    /// Finds faces, best first, in pixels of the picture as given.
    pub fn detect(&mut self, image: &ImageView<'_>) -> Result<&[Face]> {
        #[cfg(feature = "cuda")]
        if let Some(device) = &mut self.device {
            let timings = device.detect(&self.model, &self.options, Source::Host(*image), &mut self.faces)?;
            self.timings = self.timings.map(|_| timings);
            return Ok(&self.faces);
        }
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
        let views = [(*image, false), (image.with_orientation(image.orientation().mirror()), true)];
        let views = &views[..if self.options.flip { 2 } else { 1 }];
        for pass in &self.prepared[index].passes {
            let to_upright = pass.level.to_upright(size);
            for (tile, (view, mirrored)) in pass.grid.iter().flat_map(|t| views.iter().map(move |v| (t, v))) {
                let plan = plan_for(&self.plans, pass, tile.window)?;
                let input = plan.inputs()[0];
                let norm = self.model.normalization();
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
                let limits = (self.options.min_face_px, self.options.max_face_px);
                let candidates = &mut self.candidates;
                let maps = &maps[..outputs.len()];
                let threshold = self.options.score_threshold;
                let mut sink = |face: Face| {
                    if face.score >= candidates.floor() {
                        let face = face.placed(offset, to_upright);
                        let face = if *mirrored { face.mirrored(size.width as f32) } else { face };
                        if face.is_wanted(limits) {
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
        let (sorted, rule) = (self.candidates.sorted(), self.options.rule(self.model.config().nms_plus_one));
        let placement = image.placement();
        self.faces.clear();
        let candidate = |i: usize| sorted[i].face.detection();
        self.nms.run(sorted.len(), candidate, &rule, |i, Detection { bbox, score }| {
            self.faces.push(Face { bbox, score, ..sorted[i].face }.stored(&placement));
        });
        lap(&mut timings.merge);
        if measured {
            self.timings = Some(timings);
        }
        Ok(&self.faces)
    }

    /// Finds the faces of pictures of any sizes, as that many calls of [`Session::detect`] would, and gives them to `each` with the
    /// picture's number, in order. On a CUDA device neighbours of one size are searched together.
    pub fn detect_batch(&mut self, images: &[ImageView<'_>], mut each: impl FnMut(usize, Result<&[Face]>)) {
        #[cfg(feature = "cuda")]
        if self.device.is_some() {
            let sources: Vec<Source<'_>> = images.iter().map(|image| Source::Host(*image)).collect();
            return self.detect_sources(&sources, each);
        }
        for (i, image) in images.iter().enumerate() {
            each(i, self.detect(image));
        }
    }

    /// As [`Session::detect_batch`], of pictures in the host's memory or the device's. Parts of it are not timed.
    ///
    /// Errors: [`Error::Unsupported`] for each picture, of a session on the CPU.
    #[cfg(feature = "cuda")]
    pub fn detect_sources(&mut self, images: &[Source<'_>], mut each: impl FnMut(usize, Result<&[Face]>)) {
        let Some(device) = &mut self.device else {
            return (0..images.len()).for_each(|i| each(i, Err(no_device())));
        };
        device.detect_batch(&self.model, &self.options, images, &mut self.faces, &mut each);
    }

    /// As [`Session::detect`], of a picture in the memory of the session's device.
    ///
    /// Errors: [`Error::Unsupported`] of a session on the CPU. A picture whose planes cannot be read there fails the device, for all who
    /// use it in this process.
    #[cfg(feature = "cuda")]
    pub fn detect_on_device(&mut self, image: &DeviceImage) -> Result<&[Face]> {
        let device = self.device.as_mut().ok_or_else(no_device)?;
        let timings = device.detect(&self.model, &self.options, Source::Device(*image), &mut self.faces)?;
        self.timings = self.timings.map(|_| timings);
        Ok(&self.faces)
    }

    /// Begins to search a picture on a stream (the session's own where there is none given) and returns without waiting;
    /// [`Session::wait`] brings the faces. A picture on the device must stay there until then. The faces are lost where another call
    /// with the session that searches, warms up or changes settings comes before.
    ///
    /// Errors: as [`Session::detect_on_device`].
    #[cfg(feature = "cuda")]
    pub fn detect_async(&mut self, image: Source<'_>, stream: Option<&Stream>) -> Result<()> {
        let device = self.device.as_mut().ok_or_else(no_device)?;
        device.detect_async(&self.model, &self.options, image, stream)
    }

    /// Waits for the picture of [`Session::detect_async`].
    ///
    /// Errors: [`Error::InvalidArgument`] where none was begun; else as [`Session::detect_on_device`].
    #[cfg(feature = "cuda")]
    pub fn wait(&mut self) -> Result<&[Face]> {
        let device = self.device.as_mut().ok_or_else(no_device)?;
        if !device.wait(&self.model, &self.options, &mut self.faces)? {
            return Err(Error::InvalidArgument("no picture was begun".into()));
        }
        Ok(&self.faces)
    }

    /// The context of the session's device, of which a caller's streams must be.
    #[cfg(feature = "cuda")]
    pub fn context(&self) -> Option<&Arc<Context>> {
        self.device.as_ref().map(|device| device.context())
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
        self.nms.reserve(self.options.max_candidates, self.options.suppression);
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
    fn fit(&self, size: Size) -> Result<(Vec<Pass>, Plans)> {
        let cap = self.options.memory_cap;
        let mut budget = cap;
        // What is not arena is known only once the tiles are: take it off and cut again. It hardly
        // changes with the tiles, so that the second or third try fits.
        for _ in 0..8 {
            let arena = |s: Size| Ok(Plan::arena_bytes(&self.network, &[input_shape(s)])? as u64);
            let passes = passes(&self.model, &arena, &self.options, size, budget).map_err(|e| match e {
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

    /// Floats that each thread of the pool needs for these plans and the second stage's.
    fn thread_floats(&self, plans: &Plans) -> usize {
        let refiner = self.refiner.as_ref().map_or(0, Refiner::scratch);
        plans.iter().map(|p| p.plan.scratch()).fold(refiner, usize::max)
    }

    /// Bytes that the session holds with these passes and plans prepared.
    fn held_bytes(&self, size: Size, passes: &Vec<Pass>, plans: &Plans) -> u64 {
        let floats = plans.iter().map(|p| p.plan.floats()).max().unwrap_or(0);
        let wants = passes.iter().map(|p| &p.wants).chain(plans.iter().map(|p| &p.wants));
        let rows = Scratch::bytes_for_widths(scratch_widths(size, passes));
        let held = size_of::<Self>()
            + floats.div_ceil(16) * 64
            + plans.iter().map(|p| p.plan.bytes()).sum::<usize>()
            + plans.capacity() * size_of::<Planned>()
            + wants.map(|w| w.capacity() * size_of::<Want>()).sum::<usize>()
            + passes.capacity() * size_of::<Pass>()
            + self.pool.threads() * (rows + size_of::<Scratch>())
            + (self.pool.threads() * self.thread_floats(plans)).div_ceil(16) * 64
            + Candidates::bytes_for(self.options.max_candidates)
            + Nms::bytes_for(self.options.max_candidates, self.options.suppression)
            + self.refiner.as_ref().map_or(0, Refiner::bytes)
            + self.face_capacity() * size_of::<Face>()
            + KEPT_SIZES * size_of::<Prepared>();
        held as u64
    }
}

/// The device that the policy asks for, where it is to be had.
#[cfg(feature = "cuda")]
fn on_device(model: &Model, options: &Options) -> Result<Option<Box<OnDevice>>> {
    let open = |n| OnDevice::new(model, options, n).map(Box::new);
    match options.device {
        DevicePolicy::Auto | DevicePolicy::Cpu => Ok(None),
        DevicePolicy::RequireCuda(n) => open(n).map(Some),
        // What cannot be had is no error; what fails for another reason is.
        DevicePolicy::PreferCuda(n) => match open(n) {
            Ok(device) => Ok(Some(device)),
            Err(Error::Unsupported(_)) => Ok(None),
            Err(other) => Err(other),
        },
    }
}

#[cfg(feature = "cuda")]
fn no_device() -> Error {
    let text = "this session runs on the CPU, which has no streams and reads no device's memory; copy the picture to the host";
    Error::Unsupported(text.into())
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

impl Planned {
    fn is_for(&self, window: Size, wants: &[Want]) -> bool {
        self.window == window && self.wants == wants
    }
}

fn plan_for<'a>(plans: &'a Plans, pass: &Pass, window: Rect) -> Result<&'a Plan> {
    let found = plans.iter().find(|p| p.is_for(window.size(), &pass.wants));
    found.map(|p| &p.plan).ok_or_else(|| Error::Internal("a tile without a plan".into()))
}
