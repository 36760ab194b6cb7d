//! A session's work on a CUDA device: one upload, one graph, one small download.
//!
//! What depends on a picture's size is recorded once: pixels to network input, the network, its outputs to candidates, for every level
//! and tile, then sorting and suppression. What may change from call to call (settings, how the picture lies, its pixels) is read
//! from memory that the recorded upload fills.

mod batch;
mod prepare;
mod second;
mod source;

pub use source::Source;

use super::candidates::Candidates;
use super::face::Face;
use super::heads::{cuda, Extras};
use super::model::Model;
use super::nms::{Nms, Suppression};
use super::options::{Options, Precision};
use super::passes::{costs, input_shape, passes, LevelCost};
use super::timings::Timings;
use super::Detection;
use crate::error::{Error, Result};
use crate::gpu::driver::{Context, Event, Stream};
use crate::gpu::faces::{Candidate, Header, Placement as ToUpright, Settings};
use crate::gpu::map::Arithmetic;
use crate::gpu::ops::Device;
use crate::gpu::pixels::{InputNorm, Picture};
use crate::gpu::stage::{Stage, PICTURES};
use crate::graph::{DeviceNetwork, DevicePlan};
use crate::pixels::{Placement, Size};
use bytemuck::Zeroable;
use prepare::{first_bytes, held_bytes, launch, Memory, Need, Prepared, Recorded};
use second::Second;
use std::sync::Arc;
use std::time::Instant;

/// Picture sizes whose recordings are kept.
const KEPT_SIZES: usize = 8;
/// Recordings of a size: one for each number of bytes that pictures of it take.
const MOST_RECORDINGS: usize = 8;
/// Steps of a picture beyond which they are launched one by one: a graph of so many takes longer to make than it saves.
const MOST_RECORDED: usize = 20_000;

/// A picture that was given to a stream.
#[derive(Clone, Copy)]
struct Pending {
    placement: Placement,
    /// Width of the upright picture.
    width: f32,
}

/// A session's part on a device.
pub(super) struct OnDevice {
    device: Arc<Device>,
    network: Arc<DeviceNetwork>,
    /// Where the detector looks twice.
    second: Option<Second>,
    stream: Stream,
    /// Where the stream's last detection ended.
    done: Event,
    prepared: Vec<Prepared>,
    /// How many pictures of a size are searched together, of the last sizes of which there were several.
    together: Vec<(Size, usize)>,
    memory: Option<Memory>,
    /// Of pictures whose faces are still to come.
    pending: Vec<Pending>,
    calls: u64,
    name: String,
    nms: Nms,
    /// What the detector's candidates have beside box and score.
    extras: Extras,
}

/// A device's arithmetic for a precision.
fn arithmetic(precision: Precision) -> Result<Arithmetic> {
    match precision {
        Precision::Auto | Precision::F16 => Ok(Arithmetic::F16),
        Precision::F32 => Ok(Arithmetic::F32),
        Precision::Tf32 => Ok(Arithmetic::Tf32),
        Precision::Bf16 => Ok(Arithmetic::Bf16),
        Precision::Int8 => Err(Error::Unsupported(
            "int8 is computed on the CPU alone; on a CUDA device take auto, f16, bf16, tf32 or f32".into(),
        )),
    }
}

impl OnDevice {
    /// The model's network on the device of this number.
    pub fn new(model: &Model, options: &Options, ordinal: u32) -> Result<Self> {
        let device = Device::shared(ordinal)?;
        let arithmetic = arithmetic(options.precision)?;
        let network = model.device_network(&device, arithmetic)?;
        let second = Second::new(model, &device, arithmetic)?;
        let stream = Stream::new(device.context())?;
        let done = Event::new(device.context())?;
        let extras = model.detector().heads(1.0).first().map(|head| head.extras).unwrap_or_default();
        Ok(Self {
            device,
            network,
            second,
            stream,
            done,
            prepared: Vec::new(),
            together: Vec::new(),
            memory: None,
            pending: Vec::new(),
            calls: 0,
            name: format!("cuda:{ordinal}"),
            nms: Nms::default(),
            extras,
        })
    }

    /// The device's context.
    pub fn context(&self) -> &Arc<Context> {
        self.device.context()
    }

    /// `cuda:` and the device's number.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Takes other settings over: another network where the precision is another, and new recordings where the change concerns them.
    pub fn set_options(&mut self, model: &Model, old: &Options, new: &Options) -> Result<()> {
        self.finish_pending()?;
        let arithmetic = arithmetic(new.precision)?;
        let network = model.device_network(&self.device, arithmetic)?;
        if !Arc::ptr_eq(&network, &self.network) {
            self.second = Second::new(model, &self.device, arithmetic)?;
        }
        let plan_of = |o: &Options| {
            (o.min_face_px, o.max_face_px, o.pyramid, o.tile_px, o.memory_cap, o.flip, o.max_candidates)
        };
        if !Arc::ptr_eq(&network, &self.network) || plan_of(old) != plan_of(new) {
            self.prepared.clear();
            self.together.clear();
            self.memory = None;
        }
        self.network = network;
        Ok(())
    }

    /// Prepares for pictures of this size; the first of each format is recorded when it comes.
    pub fn warmup(&mut self, model: &Model, options: &Options, size: Size) -> Result<()> {
        self.finish_pending()?;
        let index = self.prepare(model, options, (size, 1))?;
        let memory = self.memory.as_mut().ok_or_else(no_memory)?;
        // A run on nothing: kernels are brought to the device, pictures of no size are not read.
        memory.stage.describe(&settings(model, options), &[[Picture::zeroed(); PICTURES]]);
        let given = launch(model, &self.prepared[index], memory, &self.stream, Stage::head(1));
        let second = self.second.as_ref().map_or(Ok(()), |second| second.warmup(&self.stream));
        // Whatever failed: nothing is under way when this returns.
        self.stream.synchronize().and(given).and(second)
    }

    /// Bytes of device and pinned memory that the session holds once it is warmed up for this size and no other.
    pub fn workspace_bytes(&self, model: &Model, options: &Options, size: Size) -> Result<u64> {
        let prepared = self.fit(model, options, size)?;
        let second = self.second.as_ref().map_or(0, Second::bytes);
        Ok((held_bytes(limit(model, options), &prepared) + second) as u64)
    }

    /// As [`Session::levels`](super::Session::levels).
    pub fn levels(&self, model: &Model, options: &Options, size: Size) -> Result<Vec<LevelCost>> {
        Ok(costs(&self.fit(model, options, size)?.passes, options))
    }

    /// Finds the faces of a picture, best first.
    pub fn detect(
        &mut self,
        model: &Model,
        options: &Options,
        image: Source<'_>,
        faces: &mut Vec<Face>,
    ) -> Result<Timings> {
        if self.second.is_some() {
            return self.detect_in_two_stages(model, options, image, faces);
        }
        let start = Instant::now();
        self.begin(model, options, &[image], None)?;
        let input = start.elapsed();
        let waited = Instant::now();
        self.done.synchronize()?;
        let network = waited.elapsed();
        let merging = Instant::now();
        self.collect(model, options, 0, faces)?;
        self.pending.clear();
        Ok(Timings { input, network, merge: merging.elapsed(), ..Timings::default() })
    }

    /// Begins to search a picture, on the caller's stream or the session's; [`wait`](Self::wait) brings the faces.
    pub fn detect_async(
        &mut self,
        model: &Model,
        options: &Options,
        image: Source<'_>,
        stream: Option<&Stream>,
    ) -> Result<()> {
        if self.second.is_some() {
            return Err(Error::Unsupported(
                "a detector with a second stage waits for the first; search the picture synchronously".into(),
            ));
        }
        self.begin(model, options, &[image], stream)
    }

    /// Waits for the picture that was begun, where there is one. False where there is none.
    pub fn wait(&mut self, model: &Model, options: &Options, faces: &mut Vec<Face>) -> Result<bool> {
        if self.pending.is_empty() {
            return Ok(false);
        }
        let found = self.done.synchronize().and_then(|()| self.collect(model, options, 0, faces));
        self.pending.clear();
        found.map(|()| true)
    }

    /// Waits for pictures whose faces nobody fetched: their memory is used again.
    fn finish_pending(&mut self) -> Result<()> {
        if self.pending.is_empty() {
            return Ok(());
        }
        self.pending.clear();
        self.done.synchronize()
    }

    /// Gives all work of pictures of one size to a stream.
    fn begin(
        &mut self,
        model: &Model,
        options: &Options,
        images: &[Source<'_>],
        stream: Option<&Stream>,
    ) -> Result<()> {
        let (index, upload) = self.place(model, options, images, &settings(model, options))?;
        let memory = self.memory.as_mut().ok_or_else(no_memory)?;
        let prepared = &mut self.prepared[index];
        let to = stream.unwrap_or(&self.stream);
        let given =
            give(model, prepared, memory, [&self.stream, to], upload).and_then(|()| self.done.record(to));
        if let Err(e) = given {
            // Some of it may be under way, and reads what the next picture writes.
            let _ = to.synchronize();
            return Err(e);
        }
        let pending = |image: &Source<'_>| Pending {
            placement: image.placement(),
            width: image.upright_size().width as f32,
        };
        self.pending.extend(images.iter().map(pending));
        Ok(())
    }

    /// Writes pictures of one size to the staging memory. Returns the number of what is prepared for them, and the bytes to upload.
    fn place(
        &mut self,
        model: &Model,
        options: &Options,
        images: &[Source<'_>],
        settings: &Settings,
    ) -> Result<(usize, usize)> {
        self.finish_pending()?;
        let index = self.prepare(model, options, (images[0].upright_size(), images.len()))?;
        let memory = self.memory.as_mut().ok_or_else(no_memory)?;
        let pixels = images.iter().map(Source::pixel_bytes).sum();
        if pixels > memory.stage.room() {
            self.prepared.iter_mut().for_each(|p| p.recorded.clear());
            memory.stage = Stage::new(&self.device, memory.stage.images(), pixels)?;
        }
        let (addresses, upload) = memory.stage.place(images.iter().flat_map(Source::planes))?;
        let mut addresses = &addresses[..];
        let mut pictures = Vec::with_capacity(images.len());
        for image in images {
            let (own, rest) = addresses.split_at(image.planes().count());
            addresses = rest;
            pictures.push([image.picture(own)?, image.turned(true).picture(own)?]);
        }
        memory.stage.describe(settings, &pictures);
        Ok((index, upload))
    }

    /// As [`Self::in_two_stages`]; nothing is under way when this returns.
    fn detect_in_two_stages(
        &mut self,
        model: &Model,
        options: &Options,
        image: Source<'_>,
        faces: &mut Vec<Face>,
    ) -> Result<Timings> {
        let found = self.in_two_stages(model, options, image, faces);
        if found.is_err() {
            let _ = self.stream.synchronize();
        }
        found
    }

    /// Finds the faces of a picture by a detector that looks twice: what the first stage proposes in a tile the host waits for and has
    /// looked at again.
    fn in_two_stages(
        &mut self,
        model: &Model,
        options: &Options,
        image: Source<'_>,
        faces: &mut Vec<Face>,
    ) -> Result<Timings> {
        let start = Instant::now();
        let size = image.upright_size();
        let threshold = options.score_threshold;
        let proposals = Settings {
            suppress: 0,
            ..second::settings(model, threshold, &options.rule(model.config().nms_plus_one))
        };
        let (index, upload) = self.place(model, options, &[image], &proposals)?;
        let Memory { arena, stage, faces: found, .. } = self.memory.as_mut().ok_or_else(no_memory)?;
        let second = self.second.as_mut().ok_or_else(no_memory)?;
        let input = start.elapsed();
        let mut candidates = Candidates::default();
        candidates.reserve(options.max_candidates);
        let limits = (options.min_face_px, options.max_face_px);
        let norm = InputNorm::from(model.normalization());
        stage.upload(&self.stream, upload)?;
        found.read_settings_at(stage.settings_address());
        let prepared = &self.prepared[index];
        for part in &prepared.parts {
            let plan = &prepared.plans[part.plan].plan;
            let ToUpright { offset, factor, mirrored } = part.placement;
            let picture = usize::from(mirrored.is_some());
            stage.input(&self.stream, picture, &part.input, &norm, arena, &plan.inputs()[0])?;
            plan.launch(&self.stream, arena)?;
            found.begin(&self.stream, 1)?;
            found.decode(&self.stream, arena, &part.levels, &UNPLACED)?;
            found.finish(&self.stream)?;
            let (header, proposals) = found.read(&self.stream, 0)?;
            no_overflow(&header)?;
            let features = plan.outputs().last().copied().flatten();
            let features =
                features.ok_or_else(|| Error::Internal("a first stage without features".into()))?;
            second.refine(model, &self.stream, (arena, &features), &proposals, threshold, &mut |face| {
                let face = face.placed(offset, factor);
                let face = if mirrored.is_some() { face.mirrored(size.width as f32) } else { face };
                if face.score >= candidates.floor() && face.is_wanted(limits) {
                    candidates.push(face);
                }
            })?;
        }
        let network = start.elapsed() - input;
        let (sorted, rule, placement) =
            (candidates.sorted(), options.rule(model.config().nms_plus_one), image.placement());
        faces.clear();
        let detection = |i: usize| sorted[i].face.detection();
        self.nms.run(sorted.len(), detection, &rule, |i, Detection { bbox, score }| {
            faces.push(Face { bbox, score, ..sorted[i].face }.stored(&placement));
        });
        Ok(Timings { input, network, merge: start.elapsed() - input - network, ..Timings::default() })
    }

    /// Faces from what the device has found in one of the pictures that were begun.
    fn collect(
        &mut self,
        model: &Model,
        options: &Options,
        image: usize,
        faces: &mut Vec<Face>,
    ) -> Result<()> {
        let (Some(memory), Some(&pending)) = (&self.memory, self.pending.get(image)) else {
            return Err(Error::Internal("no detection was begun".into()));
        };
        let first = first_bytes(memory.faces.limit());
        let bytes = &memory.result.bytes()[image * first..][..first];
        let header: Header = bytemuck::pod_read_unaligned(&bytes[..size_of::<Header>()]);
        no_overflow(&header)?;
        let kept = header.kept as usize;
        let mut candidates: Vec<Candidate> = bytes[size_of::<Header>()..]
            .chunks_exact(size_of::<Candidate>())
            .take(kept)
            .map(bytemuck::pod_read_unaligned)
            .collect();
        if kept > candidates.len() {
            candidates = memory.faces.read(&self.stream, image)?.1;
        }
        // Of the box the device has seen to that it is one; what the host adds may still not be finite.
        let face = |c: &Candidate| cuda::face(model.detector(), self.extras, c, pending.width);
        let found = candidates.iter().map(face).filter(|f| f.is_wanted((0.0, 0.0)));
        let placement = &pending.placement;
        faces.clear();
        if options.suppression == Suppression::Greedy {
            faces.extend(found.map(|f| f.stored(placement)));
            return Ok(());
        }
        let sorted: Vec<Face> = found.collect();
        let rule = options.rule(model.config().nms_plus_one);
        self.nms.run(
            sorted.len(),
            |i| sorted[i].detection(),
            &rule,
            |i, Detection { bbox, score }| {
                faces.push(Face { bbox, score, ..sorted[i] }.stored(placement));
            },
        );
        Ok(())
    }

    /// Index of what is prepared for so many pictures of this size; prepares it where it is not.
    fn prepare(&mut self, model: &Model, options: &Options, of: (Size, usize)) -> Result<usize> {
        self.calls += 1;
        if let Some(i) = self.prepared.iter().position(|p| (p.size, p.images) == of) {
            self.prepared[i].used = self.calls;
            return Ok(i);
        }
        let (size, images) = of;
        let mut prepared = self.fit(model, options, size)?;
        if images > 1 {
            prepared = Prepared::new(&self.network, model, options, of, prepared.passes)?;
        }
        self.insert(model, options, prepared)
    }

    /// Keeps what was prepared, and sees to it that there is memory for it. Returns its index.
    fn insert(&mut self, model: &Model, options: &Options, mut prepared: Prepared) -> Result<usize> {
        prepared.used = self.calls;
        if self.prepared.len() == KEPT_SIZES {
            let oldest = (0..KEPT_SIZES).min_by_key(|&i| self.prepared[i].used).unwrap_or(0);
            self.prepared.swap_remove(oldest);
        }
        self.prepared.push(prepared);
        let (need, limit) = (Need::of(&self.prepared), limit(model, options));
        if !self.memory.as_ref().is_some_and(|m| m.suffices(&need, limit)) {
            // Recordings have the old addresses.
            self.prepared.iter_mut().for_each(|p| p.recorded.clear());
            self.memory = None;
            match Memory::new(&self.device, &need, limit) {
                Ok(memory) => self.memory = Some(memory),
                Err(e) => {
                    // Nothing is prepared without memory.
                    self.prepared.clear();
                    return Err(e);
                }
            }
        }
        Ok(self.prepared.len() - 1)
    }

    /// Levels, tiles and plans for a picture, such that the session stays within its memory cap.
    fn fit(&self, model: &Model, options: &Options, size: Size) -> Result<Prepared> {
        let cap = options.memory_cap;
        let mut budget = cap;
        // As on the CPU: what is not arena is known only once the tiles are.
        for _ in 0..8 {
            let arena = |s: Size| Ok(DevicePlan::new(&self.network, &[input_shape(s)])?.bytes() as u64);
            let passes = passes(model, &arena, options, size, budget)?;
            let prepared = Prepared::new(&self.network, model, options, (size, 1), passes)?;
            let second = self.second.as_ref().map_or(0, Second::bytes);
            let held = (held_bytes(limit(model, options), &prepared) + second) as u64;
            if held <= cap {
                return Ok(prepared);
            }
            budget = budget.saturating_sub(held - cap);
        }
        Err(Error::LimitExceeded(format!(
            "the buffers for {}x{} px do not fit the memory cap of {cap} bytes; raise the cap",
            size.width, size.height
        )))
    }
}

impl Drop for OnDevice {
    fn drop(&mut self) {
        // Work that is under way reads and writes what is about to go; a device that fails here has nothing under way.
        let _ = self.finish_pending();
    }
}

/// Gives the work of pictures to the second of two streams: one recording, made on the first where there is none yet, or step by step
/// where there are too many.
fn give(
    model: &Model,
    prepared: &mut Prepared,
    memory: &mut Memory,
    [own, to]: [&Stream; 2],
    upload: usize,
) -> Result<()> {
    if prepared.steps() > MOST_RECORDED {
        return launch(model, prepared, memory, to, upload);
    }
    if let Some(known) = prepared.recorded.iter().find(|r| r.upload == upload) {
        return known.graph.launch(to);
    }
    let graph = own.capture(|| launch(model, prepared, memory, own, upload))?;
    if prepared.recorded.len() == MOST_RECORDINGS {
        prepared.recorded.remove(0);
    }
    prepared.recorded.push(Recorded { upload, graph });
    prepared.recorded[prepared.recorded.len() - 1].graph.launch(to)
}

/// Candidates stay where the network sees them.
const UNPLACED: ToUpright = ToUpright { offset: [0.0; 2], factor: [1.0; 2], mirrored: None };

/// Most candidates that are sorted on the device: of two stages, those of the first.
fn limit(model: &Model, options: &Options) -> usize {
    model.second_stage().map_or(options.max_candidates, |second| second.stage().max_proposals)
}

fn no_memory() -> Error {
    Error::Internal("a device without memory".into())
}

fn no_overflow(header: &Header) -> Result<()> {
    match header.overflow {
        0 => Ok(()),
        n => Err(Error::Internal(format!("{n} candidates had no room on the device"))),
    }
}

/// What the kernels read of the settings.
fn settings(model: &Model, options: &Options) -> Settings {
    let sizes = [options.min_face_px, options.max_face_px];
    cuda::settings(
        options.score_threshold,
        sizes,
        options.max_candidates,
        &options.rule(model.config().nms_plus_one),
    )
}
