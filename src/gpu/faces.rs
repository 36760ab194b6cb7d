//! From output maps to faces on a device: candidates decoded and placed, the best kept, sorted, suppressed. Knows nothing of detectors.
//!
//! A detection is [`FaceBuffers::begin`], then [`FaceBuffers::decode`] for each run of a network, then [`FaceBuffers::finish`], all in
//! one stream, directly or recorded. Then [`FaceBuffers::result`] holds a [`Header`] and behind it [`Header::kept`] candidates, best
//! first: one download of [`FaceBuffers::result_bytes`] for some hundreds of faces tells how many there are and brings them, unless
//! there are more. Several images of one network's batch are detections side by side: each launch works on all of them. Which candidates come out, and in which order, does not depend on the device's.

use super::driver::Stream;
use super::kernels::{Kernel, Source};
use super::map::{DeviceView, Element};
use super::memory::DeviceBuffer;
use super::ops::Device;
use crate::error::{Error, Result};
use bytemuck::{Pod, Zeroable};
use std::ops::Range;

/// Values of a candidate beside box and score.
pub const EXTRAS: usize = 10;
/// Threads of a block of `faces_decode`, and of those that work on what was decoded.
const DECODE_THREADS: u32 = 256;
const BLOCK: u32 = 1024;
/// Candidates that a warp of `faces_finish` ranks at once.
const RANKED: u32 = 4;
/// Levels of a launch of `faces_decode`, and anchors of all of them.
const MOST_LEVELS: usize = 8;
const MOST_ANCHORS: usize = 128;

/// `Settings` of `cuda/detect.cu`: what may change from one detection to the next without any launch changing.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
pub struct Settings {
    /// Logit that a face must pass.
    pub least: f32,
    /// Overlap (intersection over union) above which the worse of two goes.
    pub iou: f32,
    /// That overlaps add to widths and heights: 1 where corners are pixels inclusively, else 0.
    pub extra: f32,
    /// Smallest longer side, pixels.
    pub min_px: f32,
    /// Largest; 0 = no limit.
    pub max_px: f32,
    /// Best candidates that reach the suppression, at most the buffers' limit.
    pub max_candidates: u32,
    /// Most faces kept; `u32::MAX` = no limit.
    pub max_faces: u32,
    /// 0 where candidates are only sorted, all of them kept.
    pub suppress: u32,
}

/// `Header` of `cuda/detect.cu`: the first bytes of a result.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C)]
pub struct Header {
    /// Candidates above the score and of a size asked for.
    pub found: u32,
    /// The best of these, which reached the suppression.
    pub sorted: u32,
    /// Candidates behind the header.
    pub kept: u32,
    /// Candidates for which there was no room: where it is not 0, which others were found is chance.
    pub overflow: u32,
    unused: [u32; 12],
}

/// `Candidate` of `cuda/detect.cu`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C, align(16))]
pub struct Candidate {
    /// x1, y1, x2, y2, pixels of the upright picture.
    pub bbox: [f32; 4],
    /// Probability.
    pub score: f32,
    /// Rises in the order in which a CPU would have found it.
    pub order: u32,
    /// Of a level with landmarks five points x, y, placed as the box is. Of one with [`Level::features`] the anchor's index, its four
    /// offsets, its logit, the factors of [`Placement`], and 1 where it is mirrored.
    pub extras: [f32; EXTRAS],
}

// SAFETY: numbers without padding; every bit pattern is one.
unsafe impl Zeroable for Settings {}
// SAFETY: as above.
unsafe impl Pod for Settings {}
// SAFETY: as above.
unsafe impl Zeroable for Header {}
// SAFETY: as above.
unsafe impl Pod for Header {}
// SAFETY: as above: sixteen words, aligned to four of them.
unsafe impl Zeroable for Candidate {}
// SAFETY: as above.
unsafe impl Pod for Candidate {}

/// Values of an output map by anchor: those of anchor i of a cell begin at channel `first + i * anchor`, `value` channels apart.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Values {
    /// The map, of f32.
    pub view: DeviceView,
    /// Channel of the first anchor's first value.
    pub first: usize,
    /// Channels from an anchor to the next.
    pub anchor: usize,
    /// Channels from a value of an anchor to its next.
    pub value: usize,
}

/// A level of anchors on the cells of maps of one size.
#[derive(Clone, Debug, PartialEq)]
pub struct Level {
    /// One logit an anchor, or two where `pair` says so: background, face.
    pub logits: Values,
    /// As above.
    pub pair: bool,
    /// tx, ty, tw, th.
    pub boxes: Values,
    /// Logits of a first step and what they must pass.
    pub filter: Option<(Values, f32)>,
    /// Offsets of a first step that move the anchor.
    pub mover: Option<Values>,
    /// Five points x, y.
    pub landmarks: Option<Values>,
    /// Whether candidates carry what an ellipse is computed from, where there are no landmarks.
    pub features: bool,
    /// Own cells.
    pub rows: Range<usize>,
    /// As above.
    pub columns: Range<usize>,
    /// Pixels between cells.
    pub stride: f32,
    /// Centre of the first cell on either axis, pixels.
    pub center: f32,
    /// Index in the maps, and width and height in pixels, of the anchors that are asked.
    pub anchors: Vec<(usize, [f32; 2])>,
    /// Of centre and size in the box code.
    pub variances: [f32; 2],
    /// How far from its cell's centre a box may reach along an axis; it is cut there.
    pub reach: Option<f32>,
}

impl Level {
    /// Candidates that it can give.
    pub fn candidates(&self) -> usize {
        self.rows.len() * self.columns.len() * self.anchors.len()
    }
}

/// From pixels of a network's input to those of the upright picture: (v + offset) * factor, then mirrored.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Placement {
    /// x, y.
    pub offset: [f32; 2],
    /// x, y.
    pub factor: [f32; 2],
    /// Width of the picture, where the network saw it mirrored.
    pub mirrored: Option<f32>,
}

/// `Values` of `cuda/detect.cu`.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct ValuesArgs {
    data: u64,
    row: i32,
    pixel: i32,
    anchor: i32,
    value: i32,
    image: i32,
}

/// `Level` of `cuda/detect.cu`.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct LevelArgs {
    logits: ValuesArgs,
    boxes: ValuesArgs,
    filter: ValuesArgs,
    mover: ValuesArgs,
    landmarks: ValuesArgs,
    first_block: u32,
    row: i32,
    column: i32,
    columns: u32,
    cells: u32,
    first_anchor: u32,
    anchors: u32,
    order: u32,
    pair: i32,
    stride: f32,
    center: f32,
    survives: f32,
    variances: [f32; 2],
    reach: f32,
    features: i32,
}

/// `Anchor` of `cuda/detect.cu`.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct AnchorArgs {
    index: i32,
    size: [f32; 2],
}

/// `Buffers` of `cuda/detect.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct BuffersArgs {
    settings: u64,
    state: u64,
    keys: u64,
    candidates: u64,
    capacity: u32,
    limit: u32,
    step: u64,
}

/// `FacesArgs` of `cuda/detect.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct FacesArgs {
    buffers: BuffersArgs,
    header: u64,
    result: u64,
    step: u64,
}

/// `DecodeArgs` of `cuda/detect.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct DecodeArgs {
    buffers: BuffersArgs,
    offset: [f32; 2],
    factor: [f32; 2],
    mirrored: i32,
    width: f32,
    levels: u32,
    level: [LevelArgs; MOST_LEVELS],
    anchor: [AnchorArgs; MOST_ANCHORS],
}

/// Bytes of shared memory: `ReduceShared` and `FinishShared` of `cuda/detect.cu`.
const REDUCE_SHARED: u32 = 4 * (256 + 32 + 6 + 2);
const FINISH_SHARED: u32 = BLOCK * (16 + 4) + 4 * (32 + 32) + 16;

/// Bytes of the counters, and where keys begin behind them.
const STATE: usize = 256;

/// Memory of a device for the candidates of one detection at a time, of one image or several, and its kernels.
pub struct FaceBuffers {
    begin: Kernel,
    decode: Kernel,
    reduce: Kernel,
    finish: Kernel,
    settings: DeviceBuffer,
    /// Where they are read, there or elsewhere.
    settings_at: u64,
    /// Counters, keys, candidates, for each image.
    work: DeviceBuffer,
    result: DeviceBuffer,
    /// That there is room for, and that the detection at hand has.
    most_images: usize,
    images: usize,
    limit: usize,
    capacity: usize,
    /// Most blocks that work at once.
    blocks: u32,
    /// Most candidates that there may be after what was launched since the detection began.
    held: usize,
    /// Of the next candidate.
    order: u32,
}

impl FaceBuffers {
    /// For up to `images` images, and in each `limit` candidates that reach the suppression. [`FaceBuffers::decode`] may bring `most_of_a_pass` more each time,
    /// whatever the maps hold: its [`Level::candidates`]. With less room for a pass there may be too many, which
    /// [`Header::overflow`] tells.
    pub fn new(device: &Device, images: usize, limit: usize, most_of_a_pass: usize) -> Result<Self> {
        let capacity = limit.max(1).saturating_add(most_of_a_pass);
        if capacity > i32::MAX as usize {
            return Err(Error::LimitExceeded(format!("{capacity} candidates are too many for a device")));
        }
        let (limit, context) = (limit.max(1), device.context());
        let kernel = |name, shared| device.kernels().get(Source::Detect, name, shared);
        let settings = DeviceBuffer::new(context, size_of::<Settings>())?;
        Ok(Self {
            begin: kernel("faces_begin", 0)?,
            decode: kernel("faces_decode", 0)?,
            reduce: kernel("faces_reduce", REDUCE_SHARED)?,
            finish: kernel("faces_finish", FINISH_SHARED)?,
            settings_at: settings.address(),
            settings,
            work: DeviceBuffer::new(context, images * Self::work_bytes(capacity))?,
            result: DeviceBuffer::new(context, images * Self::result_bytes(limit))?,
            most_images: images,
            images: 1,
            limit,
            capacity,
            blocks: context.multiprocessors().max(1),
            held: 0,
            order: 0,
        })
    }

    /// Where candidates begin behind so many keys.
    fn candidates_at(capacity: usize) -> usize {
        STATE + (capacity * 4).next_multiple_of(256)
    }

    /// Bytes of an image's counters, keys and candidates.
    fn work_bytes(capacity: usize) -> usize {
        Self::candidates_at(capacity) + capacity * size_of::<Candidate>()
    }

    /// Bytes of a header and so many candidates: what is to be read of [`FaceBuffers::result`] for them.
    pub const fn result_bytes(candidates: usize) -> usize {
        size_of::<Header>() + candidates * size_of::<Candidate>()
    }

    /// Bytes of device memory that such buffers take.
    pub fn bytes_for(images: usize, limit: usize, most_of_a_pass: usize) -> usize {
        let work = Self::work_bytes(limit.max(1) + most_of_a_pass);
        size_of::<Settings>() + images * (work + Self::result_bytes(limit.max(1)))
    }

    /// Where one [`Settings`] must lie when a detection begins.
    pub fn settings(&self) -> &DeviceBuffer {
        &self.settings
    }

    /// Has them read at another address of the device, from the next [`FaceBuffers::begin`] on: as part of a larger upload.
    pub(crate) fn read_settings_at(&mut self, address: u64) {
        self.settings_at = address;
    }

    /// A [`Header`], then candidates, once what [`FaceBuffers::finish`] launched is done: those of image i from
    /// [`FaceBuffers::result_at`] on.
    pub fn result(&self) -> &DeviceBuffer {
        &self.result
    }

    /// Where the result of an image begins.
    pub fn result_at(&self, image: usize) -> usize {
        image * Self::result_bytes(self.limit)
    }

    /// Images that there is room for.
    pub fn most_images(&self) -> usize {
        self.most_images
    }

    /// Most candidates that there is room for.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Most candidates that reach the suppression.
    pub fn limit(&self) -> usize {
        self.limit
    }

    fn buffers(&self) -> BuffersArgs {
        let work = self.work.address();
        BuffersArgs {
            settings: self.settings_at,
            state: work,
            keys: work + STATE as u64,
            candidates: work + Self::candidates_at(self.capacity) as u64,
            capacity: self.capacity as u32,
            limit: self.limit as u32,
            step: Self::work_bytes(self.capacity) as u64,
        }
    }

    fn args(&self) -> FacesArgs {
        let header = self.result.address();
        FacesArgs {
            buffers: self.buffers(),
            header,
            result: header + size_of::<Header>() as u64,
            step: Self::result_bytes(self.limit) as u64,
        }
    }

    /// Forgets all candidates; a detection in so many images begins.
    pub fn begin(&mut self, stream: &Stream, images: usize) -> Result<()> {
        if !(1..=self.most_images).contains(&images) {
            return Err(Error::Internal(format!("{images} images, room for {}", self.most_images)));
        }
        (self.held, self.order, self.images) = (0, 0, images);
        // SAFETY: the args are the kernel's struct, and the buffers are ours.
        unsafe { self.begin.launch(stream, self.grid(1), 32, 0, &self.args()) }
    }

    /// So many blocks for each image.
    fn grid(&self, blocks: u32) -> [u32; 3] {
        [blocks, self.images as u32, 1]
    }

    /// Takes what the maps in `arena` say of every image on the own cells of these levels, which count in this order.
    pub fn decode(
        &mut self,
        stream: &Stream,
        arena: &DeviceBuffer,
        levels: &[Level],
        placement: &Placement,
    ) -> Result<()> {
        let levels: Vec<&Level> = levels.iter().filter(|l| l.candidates() > 0).collect();
        for level in &levels {
            check(level, arena, self.images)?;
        }
        let candidates: usize = levels.iter().map(|l| l.candidates()).sum();
        if self.held > self.limit && self.held + candidates > self.capacity {
            self.reduce(stream)?;
        }
        self.held = (self.held + candidates).min(self.capacity);
        let mut rest = &levels[..];
        while !rest.is_empty() {
            let mut anchors = 0;
            let fits = |l: &&&Level| {
                anchors += l.anchors.len();
                anchors <= MOST_ANCHORS
            };
            let count = rest.iter().take(MOST_LEVELS).take_while(fits).count();
            let (now, later) = rest.split_at(count);
            self.launch(stream, arena, now, placement)?;
            rest = later;
        }
        Ok(())
    }

    /// Decodes levels that fit one launch.
    fn launch(
        &mut self,
        stream: &Stream,
        arena: &DeviceBuffer,
        levels: &[&Level],
        placement: &Placement,
    ) -> Result<()> {
        let mut args = DecodeArgs {
            buffers: self.buffers(),
            offset: placement.offset,
            factor: placement.factor,
            mirrored: i32::from(placement.mirrored.is_some()),
            width: placement.mirrored.unwrap_or(0.0),
            levels: levels.len() as u32,
            level: [LevelArgs::default(); MOST_LEVELS],
            anchor: [AnchorArgs::default(); MOST_ANCHORS],
        };
        let (mut anchors, mut blocks) = (0, 0);
        for (to, level) in args.level.iter_mut().zip(levels) {
            for (to, &(index, size)) in args.anchor[anchors..].iter_mut().zip(&level.anchors) {
                *to = AnchorArgs { index: index as i32, size };
            }
            *to = level_args(level, arena.address());
            (to.first_block, to.first_anchor, to.order) = (blocks, anchors as u32, self.order);
            anchors += level.anchors.len();
            let candidates = level.candidates() as u32;
            blocks += candidates.div_ceil(DECODE_THREADS);
            self.order = self.order.checked_add(candidates).ok_or_else(|| {
                Error::LimitExceeded("a picture of more than 2^32 anchors; lower the pyramid".into())
            })?;
        }
        // SAFETY: the args are the kernel's struct, the buffers are ours, and `check` found the maps in the arena.
        unsafe { self.decode.launch(stream, self.grid(blocks), DECODE_THREADS, 0, &args) }
    }

    /// Drops all but the best, where there are more than wanted.
    fn reduce(&mut self, stream: &Stream) -> Result<()> {
        self.held = self.limit;
        // SAFETY: as in `begin`.
        unsafe { self.reduce.launch(stream, self.grid(1), BLOCK, REDUCE_SHARED, &self.args()) }
    }

    /// Sorts, suppresses, and writes the result.
    pub fn finish(&mut self, stream: &Stream) -> Result<()> {
        if self.held > self.limit {
            self.reduce(stream)?;
        }
        let most = (self.blocks / self.images as u32).max(1);
        let blocks = (self.held as u32).div_ceil(BLOCK / 32 * RANKED).clamp(1, most);
        // SAFETY: as in `begin`.
        unsafe { self.finish.launch(stream, self.grid(blocks), BLOCK, FINISH_SHARED, &self.args()) }
    }

    /// The result in an image, once the stream has come there.
    pub fn read(&self, stream: &Stream, image: usize) -> Result<(Header, Vec<Candidate>)> {
        let at = self.result_at(image);
        let header: Header = self.result.values(stream, at, 1)?[0];
        let kept = (header.kept as usize).min(self.limit);
        Ok((header, self.result.values(stream, at + size_of::<Header>(), kept)?))
    }
}

/// Errors where a map is not in the arena or has not what is read of it.
fn check(level: &Level, arena: &DeviceBuffer, images: usize) -> Result<()> {
    let has = |v: &Values, count: usize| {
        let DeviceView { element, shape, offset, pixel, .. } = v.view;
        let elements = shape.h.saturating_mul(shape.w).saturating_mul(pixel);
        let last = level.anchors.iter().map(|a| a.0).max().unwrap_or(0);
        let channel = v.first + last.saturating_mul(v.anchor) + (count - 1) * v.value;
        element == Element::F32
            && shape.n >= images
            && level.rows.end <= shape.h
            && level.columns.end <= shape.w
            && channel < shape.c
            && shape.c <= pixel
            && elements < i32::MAX as usize
            && offset.saturating_add(elements.saturating_mul(4 * images))
                <= arena.len() + (pixel - shape.c) * 4
    };
    let all = has(&level.logits, if level.pair { 2 } else { 1 })
        && has(&level.boxes, 4)
        && level.filter.is_none_or(|(v, _)| has(&v, 1))
        && level.mover.is_none_or(|v| has(&v, 4))
        && level.landmarks.is_none_or(|v| has(&v, EXTRAS));
    if all && level.anchors.len() <= MOST_ANCHORS && level.candidates() <= i32::MAX as usize {
        return Ok(());
    }
    Err(Error::Internal("a level of other maps than the network gives".into()))
}

fn level_args(level: &Level, arena: u64) -> LevelArgs {
    let values = |v: &Values| ValuesArgs {
        data: arena + (v.view.offset + 4 * v.first) as u64,
        row: (v.view.shape.w * v.view.pixel) as i32,
        pixel: v.view.pixel as i32,
        anchor: v.anchor as i32,
        value: v.value as i32,
        image: (v.view.shape.h * v.view.shape.w * v.view.pixel) as i32,
    };
    let maybe = |v: Option<Values>| v.as_ref().map_or(ValuesArgs::default(), values);
    LevelArgs {
        logits: values(&level.logits),
        boxes: values(&level.boxes),
        filter: maybe(level.filter.map(|f| f.0)),
        mover: maybe(level.mover),
        landmarks: maybe(level.landmarks),
        row: level.rows.start as i32,
        column: level.columns.start as i32,
        columns: level.columns.len() as u32,
        cells: (level.rows.len() * level.columns.len()) as u32,
        anchors: level.anchors.len() as u32,
        pair: i32::from(level.pair),
        stride: level.stride,
        center: level.center,
        survives: level.filter.map_or(0.0, |f| f.1),
        variances: level.variances,
        reach: level.reach.unwrap_or(0.0),
        features: i32::from(level.features),
        ..LevelArgs::default()
    }
}
