//! What a picture's size decides on a device: plans, windows, levels, and the memory for them.

use crate::detect::detector::Window;
use crate::detect::model::Model;
use crate::detect::options::Options;
use crate::detect::passes::{input_shape, Pass};
use crate::error::Result;
use crate::gpu::driver::{Graph, Stream};
use crate::gpu::faces::{FaceBuffers, Level, Placement as ToUpright};
use crate::gpu::memory::{DeviceBuffer, PinnedBuffer};
use crate::gpu::ops::Device;
use crate::gpu::pixels::{InputNorm, InputWindow};
use crate::gpu::stage::Stage;
use crate::graph::{DeviceNetwork, DevicePlan, Want};
use crate::pixels::device::input_window;
use crate::pixels::Size;
use crate::shape::Shape;

/// Faces of an image that the first download brings.
const FIRST_FACES: usize = 256;
/// Bytes a pixel for which there is room from the start; planes of f32 make more when they come.
const PIXEL_BYTES: usize = 4;

/// A plan, and what it is for.
pub(super) struct Planned {
    pub window: Size,
    pub wants: Vec<Want>,
    pub plan: DevicePlan,
}

/// A tile of a level, or its mirror image.
pub(super) struct Part {
    /// Which of `Prepared::plans`.
    pub plan: usize,
    pub input: InputWindow,
    pub levels: Vec<Level>,
    pub placement: ToUpright,
}

/// A recording, and what it is for.
pub(super) struct Recorded {
    /// Bytes of the upload.
    pub upload: usize,
    pub graph: Graph,
}

/// What depends on the pictures' upright size and how many of them are searched together.
pub(super) struct Prepared {
    pub size: Size,
    pub images: usize,
    pub passes: Vec<Pass>,
    pub plans: Vec<Planned>,
    pub parts: Vec<Part>,
    pub recorded: Vec<Recorded>,
    pub used: u64,
}

/// Memory that all sizes share. Recordings have its addresses: they go before it does.
pub(super) struct Memory {
    pub arena: DeviceBuffer,
    pub stage: Stage,
    pub faces: FaceBuffers,
    pub result: PinnedBuffer,
}

impl Prepared {
    /// Plans and windows of all tiles of these passes, for so many pictures.
    pub fn new(
        network: &DeviceNetwork,
        model: &Model,
        options: &Options,
        (size, images): (Size, usize),
        passes: Vec<Pass>,
    ) -> Result<Self> {
        let (mut plans, mut parts) = (Vec::<Planned>::new(), Vec::new());
        for pass in &passes {
            let scale = pass.level.scale as f32;
            let heads = model.detector().heads(scale);
            for tile in pass.grid.iter() {
                let size_of_tile = tile.window.size();
                let known = plans.iter().position(|p| p.window == size_of_tile && p.wants == pass.wants);
                let plan = match known {
                    Some(plan) => plan,
                    None => {
                        let input = Shape { n: images, ..input_shape(size_of_tile) };
                        let mut plan = DevicePlan::for_wants(network, &[input], &pass.wants)?;
                        plan.choose(network)?;
                        plans.push(Planned { window: size_of_tile, wants: pass.wants.clone(), plan });
                        plans.len() - 1
                    }
                };
                let window = Window::of(&tile, pass.padded, pass.level.size, scale);
                let outputs = plans[plan].plan.outputs();
                for mirrored in [false, true].into_iter().take(if options.flip { 2 } else { 1 }) {
                    parts.push(Part {
                        plan,
                        input: input_window(network.device(), size, pass.level.size, tile.window)?,
                        levels: heads.iter().filter_map(|head| head.level(outputs, &window)).collect(),
                        placement: ToUpright {
                            offset: [tile.window.x as f32, tile.window.y as f32],
                            factor: pass.level.to_upright(size),
                            mirrored: mirrored.then_some(size.width as f32),
                        },
                    });
                }
            }
        }
        Ok(Self { size, images, passes, plans, parts, recorded: Vec::new(), used: 0 })
    }

    /// Steps of a picture, those around the network with them.
    pub fn steps(&self) -> usize {
        self.parts.iter().map(|p| self.plans[p.plan].plan.steps() + 2).sum()
    }
}

impl Memory {
    /// For what `need` says and so many sorted candidates.
    pub fn new(device: &Device, need: &Need, limit: usize) -> Result<Self> {
        Ok(Self {
            arena: DeviceBuffer::new(device.context(), need.arena)?,
            stage: Stage::new(device, need.images, need.pixels)?,
            faces: FaceBuffers::new(device, need.images, limit, need.candidates)?,
            result: PinnedBuffer::new(device.context(), need.images * first_bytes(limit))?,
        })
    }

    /// Whether it is enough for that.
    pub fn suffices(&self, need: &Need, limit: usize) -> bool {
        self.arena.len() >= need.arena
            && self.stage.images() >= need.images
            && self.stage.room() >= need.pixels
            && self.faces.limit() == limit
            && self.faces.capacity() >= limit + need.candidates
    }
}

/// Memory for what is prepared.
#[derive(Default)]
pub(super) struct Need {
    images: usize,
    arena: usize,
    pixels: usize,
    candidates: usize,
}

impl Need {
    pub fn of<'a>(prepared: impl IntoIterator<Item = &'a Prepared>) -> Self {
        let mut need = Self::default();
        for p in prepared {
            need.images = need.images.max(p.images);
            need.arena = p.plans.iter().map(|p| p.plan.bytes()).fold(need.arena, usize::max);
            let pixels = p.size.width * p.size.height * PIXEL_BYTES + 3 * PLANE_ROOM;
            need.pixels = need.pixels.max(p.images * pixels);
            need.candidates = p.parts.iter().map(Part::candidates).fold(need.candidates, usize::max);
        }
        need
    }

    /// Bytes, on the device and pinned together.
    fn bytes(&self, limit: usize) -> usize {
        self.arena
            + 2 * (Stage::head(self.images) + self.pixels)
            + FaceBuffers::bytes_for(self.images, limit, self.candidates)
            + self.images * first_bytes(limit)
    }
}

/// Bytes of an image's result that the first download brings.
pub(super) fn first_bytes(limit: usize) -> usize {
    FaceBuffers::result_bytes(limit.clamp(1, FIRST_FACES))
}

/// Bytes that a plane may take more for its alignment.
const PLANE_ROOM: usize = 256;

/// Bytes of device and pinned memory that a session holds with one size prepared.
pub(super) fn held_bytes(limit: usize, prepared: &Prepared) -> usize {
    let windows: usize = prepared.parts.iter().map(|p| p.input.bytes()).sum();
    Need::of([prepared]).bytes(limit) + windows
}

impl Part {
    /// Candidates that its levels can give.
    fn candidates(&self) -> usize {
        self.levels.iter().map(Level::candidates).sum()
    }
}

/// Gives all work of pictures that are searched together to a stream, or to its recording.
pub(super) fn launch(
    model: &Model,
    prepared: &Prepared,
    memory: &mut Memory,
    stream: &Stream,
    upload: usize,
) -> Result<()> {
    let Memory { arena, stage, faces, result } = memory;
    let norm = InputNorm::from(model.normalization());
    stage.upload(stream, upload)?;
    faces.read_settings_at(stage.settings_address());
    faces.begin(stream, prepared.images)?;
    for part in &prepared.parts {
        let plan = &prepared.plans[part.plan].plan;
        let picture = usize::from(part.placement.mirrored.is_some());
        stage.input(stream, picture, &part.input, &norm, arena, &plan.inputs()[0])?;
        plan.launch(stream, arena)?;
        faces.decode(stream, arena, &part.levels, &part.placement)?;
    }
    faces.finish(stream)?;
    let first = first_bytes(faces.limit());
    for image in 0..prepared.images {
        let at = faces.result_at(image);
        faces.result().read(stream, at..at + first, result, image * first)?;
    }
    Ok(())
}
