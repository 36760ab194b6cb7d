//! Who computes convolutions of one group and their gradients: our kernels, or cuDNN where it can.
//!
//! `FARFACE_CUDA_CONV` means what it means for inference (`ops/choice.rs`): who takes less time for a call of some sizes is measured
//! once a process, on the maps of the step that first asks for it, or one of both is forced; cuBLASLt is asked for nothing here.
//! Neither of both adds in an order that chance decides, and of cuDNN's algorithms there is one for each call, so that with `own` and
//! with `cudnn` the same seed gives the same bits every time. What `auto` measures may come out otherwise in another process, and then
//! the last digits do.
//!
//! Ranks that train together each choose for themselves, and may do so: what one adds to the sums then differs within rounding, as its
//! part of the batch does anyhow, and all get the same sums. A choice asks no other rank, so that none waits for who does not come.

use super::conv::Filter;
use super::{MapIn, TrainOps, Values};
use crate::error::{Error, Result};
use crate::gpu::cudnn::{
    Algorithm, ConvGradient, Cudnn, CudnnConv, CudnnGradient, CudnnGradients, Gradient, GradientPointers,
};
use crate::gpu::driver::Event;
use crate::gpu::fused::{FusedConv, Pointers, Side};
use crate::gpu::map::{DeviceView, Element};
use crate::gpu::memory::DeviceBuffer;
use crate::gpu::ops::choice::{times, unless_auto, Fastest};
use crate::gpu::ops::ConvLibraries;
use crate::gpu::probe::Library;
use std::collections::HashMap;
use std::sync::{Arc, Mutex};

/// What is computed of a convolution.
#[derive(Clone, Copy)]
pub(super) enum Pass<'a> {
    /// max(v, slope * v), v the convolution and a bias where there is one.
    Forward { bias: Option<Values<'a>>, slope: f32 },
    /// The gradient of its input, added to what is there or not.
    Input { add: bool },
    /// The gradient of its weights, added to what is there.
    Weights,
}

/// A convolution or a gradient of one, to be computed.
#[derive(Clone, Copy)]
pub(super) struct Task<'a> {
    /// What of it.
    pub pass: Pass<'a>,
    /// The convolution, of as many channels as the maps have.
    pub filter: &'a Filter,
    /// Its input, or the gradient of that.
    pub x: MapIn<'a>,
    /// Its output, or the gradient of that.
    pub y: MapIn<'a>,
    /// Address of its weights, or of their gradient.
    pub weights: u64,
}

/// All that a choice depends on but for the device.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Geometry {
    Forward(FusedConv),
    Gradient(ConvGradient),
}

impl Geometry {
    /// Of a task; None of groups, of maps in f16 (which no training has) or with gaps, and of an activation: cuDNN's ReLU makes 0 of NaN,
    /// which a training has to see.
    fn of(task: &Task<'_>) -> Result<Option<Self>> {
        let window = task.filter.window;
        let (kernel, stride, dilation, pad) = (window.kernel, window.stride, window.dilation, window.pad);
        let (input, output) = (Side::of(&task.x.absolute()?), Side::of(&task.y.absolute()?));
        let whole = [&input, &output].iter().all(|s| s.pixel == s.channels && s.element != Element::F16);
        if task.filter.groups != 1 || !whole {
            return Ok(None);
        }
        let gradient =
            |of| Geometry::Gradient(ConvGradient { of, kernel, stride, dilation, pad, input, output });
        Ok(Some(match task.pass {
            Pass::Forward { slope, .. } if slope != 1.0 => return Ok(None),
            Pass::Forward { .. } => {
                let (add, adds_input, relu, tf32) = (None, false, false, false);
                let conv =
                    FusedConv { kernel, stride, dilation, pad, input, output, add, adds_input, relu, tf32 };
                Geometry::Forward(conv)
            }
            Pass::Input { .. } => gradient(Gradient::Input),
            Pass::Weights => gradient(Gradient::Weights),
        }))
    }

    /// Input and output.
    fn sides(&self) -> [&Side; 2] {
        match self {
            Geometry::Forward(conv) => [&conv.input, &conv.output],
            Geometry::Gradient(gradient) => [&gradient.input, &gradient.output],
        }
    }
}

/// What computes a task by cuDNN.
enum Described {
    Forward(Arc<Cudnn>, CudnnConv, Algorithm, usize),
    Gradient(Arc<CudnnGradients>, CudnnGradient),
}

/// A call of cuDNN, and for what.
struct Route {
    geometry: Geometry,
    described: Described,
}

impl Route {
    /// Bytes of workspace.
    fn workspace(&self) -> usize {
        match &self.described {
            Described::Forward(.., bytes) => *bytes,
            Described::Gradient(_, gradient) => gradient.workspace(),
        }
    }

    /// Output and input channels of the weights as cuDNN has them: those of the zeros behind the maps' channels with them.
    fn channels(&self) -> [usize; 2] {
        let [input, output] = self.geometry.sides();
        [output.channels, input.channels]
    }

    /// Whether weights or their gradient lie as cuDNN has them: f32, a single tap, nothing behind the channels, at whole vectors.
    fn has_weights_of(&self, task: &Task<'_>) -> bool {
        self.geometry.sides()[0].element == Element::F32
            && task.filter.taps() == 1
            && self.channels() == [task.filter.outputs, task.filter.inputs]
            && task.weights.is_multiple_of(16)
    }
}

/// What a training has of cuDNN, and who computes what it has met.
#[derive(Default)]
pub(super) struct Libraries {
    /// None: not asked for yet; within: whether there are calls for gradients.
    gradients: Option<Option<Arc<CudnnGradients>>>,
    /// None within: our kernels.
    routes: HashMap<Geometry, Option<Arc<Route>>>,
}

/// A task on the device of a number, with a setting.
type Key = (u32, ConvLibraries, Geometry);

/// Whether cuDNN was chosen in this process: trainings that begin later do not measure again.
static CHOSEN: Mutex<Option<HashMap<Key, bool>>> = Mutex::new(None);

impl TrainOps {
    /// Who may compute convolutions: our kernels alone where cuDNN is not there.
    pub fn convolutions(&self) -> ConvLibraries {
        match self.device.choices().libraries() {
            ConvLibraries::Auto if !Library::Cudnn.is_present() => ConvLibraries::Own,
            asked => asked,
        }
    }

    /// How many of the convolutions that were asked for, each of other sizes, cuDNN computes: forward, the gradients of inputs, and
    /// those of weights.
    pub fn convolutions_by_cudnn(&self) -> [usize; 3] {
        let mut counts = [0; 3];
        for geometry in self.libraries.routes.values().flatten().map(|route| &route.geometry) {
            counts[match geometry {
                Geometry::Forward(_) => 0,
                Geometry::Gradient(ConvGradient { of: Gradient::Input, .. }) => 1,
                Geometry::Gradient(ConvGradient { of: Gradient::Weights, .. }) => 2,
            }] += 1;
        }
        counts
    }

    /// Computes a convolution or a gradient of one.
    pub(super) fn by_the_fastest(&mut self, task: &Task<'_>) -> Result<()> {
        if let Some(route) = self.route(task)? {
            if self.by_cudnn(&route, task)? {
                return Ok(());
            }
            self.keep(route.geometry, None);
        }
        self.by_own(task)
    }

    fn by_own(&mut self, task: &Task<'_>) -> Result<()> {
        let Task { pass, filter, x, y, weights } = *task;
        match pass {
            Pass::Forward { bias, slope } => self.conv_own(filter, weights, bias, x, y, slope),
            Pass::Input { add } => self.conv_back_own(filter, weights, None, y, x, add),
            Pass::Weights => self.conv_weights_own(filter, x, y, weights),
        }
    }

    /// Gives a task to cuDNN. False where it does not compute it.
    fn by_cudnn(&mut self, route: &Route, task: &Task<'_>) -> Result<bool> {
        let (input, output) = (task.x.absolute()?.offset as u64, task.y.absolute()?.offset as u64);
        let lies_so = route.has_weights_of(task);
        let [rows, channels] = route.channels();
        let element = route.geometry.sides()[0].element;
        let workspace = route.workspace().next_multiple_of(256);
        // What is written for us to add lies behind the workspace.
        let written = match task.pass {
            Pass::Weights if !lies_so => rows * task.filter.taps() * channels * element.bytes(),
            _ => 0,
        };
        let room = self.partial.bytes(&self.device, workspace + written)?;
        let weights = match task.pass {
            _ if lies_so => task.weights,
            Pass::Weights => room + workspace as u64,
            _ => self.pack_to(task.filter, task.weights, [rows, channels], element)?,
        };
        let add = match task.pass {
            Pass::Forward { .. } => false,
            Pass::Input { add } => add,
            Pass::Weights => lies_so,
        };
        let given = match (&route.described, task.pass) {
            (Described::Forward(library, conv, algorithm, bytes), Pass::Forward { bias, .. }) => {
                let bias = self.whole_bias(bias, task.filter.outputs, rows, element)?;
                let at = Pointers { input, weights, bias, add: 0, output, workspace: room };
                // SAFETY: the maps lie in their buffers, as `absolute` has seen; the rest is as long as described.
                unsafe { library.launch(&self.stream, conv, (*algorithm, *bytes), &at)? }
            }
            (Described::Gradient(library, gradient), _) => {
                let at = GradientPointers { input, output, weights, workspace: room };
                // SAFETY: as above.
                unsafe { library.launch(&self.stream, gradient, &at, add)? }
            }
            _ => return Err(Error::Internal("a convolution by another call".into())),
        };
        if given && written > 0 {
            self.add_weights(task.filter, (weights, element, 1), channels, task.weights)?;
        }
        Ok(given)
    }

    /// Who computes a task: None for our kernels.
    fn route(&mut self, task: &Task<'_>) -> Result<Option<Arc<Route>>> {
        let libraries = self.device.choices().libraries();
        if !matches!(libraries, ConvLibraries::Auto | ConvLibraries::Cudnn) {
            return Ok(None);
        }
        let Some(geometry) = Geometry::of(task)? else { return Ok(None) };
        if let Some(known) = self.libraries.routes.get(&geometry) {
            return Ok(known.clone());
        }
        let key = self.key(geometry);
        let known =
            CHOSEN.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert_default().get(&key).copied();
        let mut route = match known {
            Some(false) => None,
            _ => self.describe(geometry)?,
        };
        if libraries == ConvLibraries::Auto && known.is_none() {
            route = match route {
                Some(route) if self.is_faster(&route, task)? => Some(route),
                _ => None,
            };
        }
        self.keep(geometry, route.clone());
        Ok(route)
    }

    fn key(&self, geometry: Geometry) -> Key {
        (self.device.context().ordinal(), self.device.choices().libraries(), geometry)
    }

    /// Remembers who computes a task.
    fn keep(&mut self, geometry: Geometry, route: Option<Arc<Route>>) {
        let key = self.key(geometry);
        CHOSEN.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert_default().insert(key, route.is_some());
        self.libraries.routes.insert(geometry, route);
    }

    /// cuDNN's way to compute a task, where it has one.
    fn describe(&mut self, geometry: Geometry) -> Result<Option<Arc<Route>>> {
        let libraries = self.device.choices().libraries();
        let Some(library) = self.device.choices().cudnn(&self.device)? else { return Ok(None) };
        let described = match geometry {
            Geometry::Forward(conv) => unless_auto(libraries, describe_forward(library, &conv))?,
            Geometry::Gradient(gradient) => match self.gradients(library)? {
                Some(library) => {
                    let described = unless_auto(libraries, library.describe(&gradient))?;
                    described.map(|described| Described::Gradient(library, described))
                }
                None => None,
            },
        };
        Ok(described.map(|described| Arc::new(Route { geometry, described })))
    }

    /// The calls for gradients, where cuDNN has them.
    fn gradients(&mut self, library: Arc<Cudnn>) -> Result<Option<Arc<CudnnGradients>>> {
        if let Some(known) = &self.libraries.gradients {
            return Ok(known.clone());
        }
        let opened = CudnnGradients::open(library).map(|opened| Some(Arc::new(opened)));
        let opened = unless_auto(self.device.choices().libraries(), opened)?;
        Ok(self.libraries.gradients.insert(opened).clone())
    }

    /// Whether cuDNN takes less time than our kernels, on the maps at hand. No where it fails, or where a map to try it on finds no
    /// memory.
    fn is_faster(&mut self, route: &Arc<Route>, task: &Task<'_>) -> Result<bool> {
        // What is written is written again; what is added to holds sums that are not to be touched.
        let offset = task.x.view.offset % 256;
        let bytes = match task.pass {
            Pass::Weights => task.filter.weights() * 4,
            Pass::Input { add: true } => offset.saturating_add(task.x.view.bytes().unwrap_or(usize::MAX)),
            _ => 0,
        };
        let context = self.device.context().clone();
        let spare = match DeviceBuffer::new(&context, bytes) {
            Err(Error::LimitExceeded(_)) => return Ok(false),
            made => made?,
        };
        let trial = match task.pass {
            Pass::Weights => Task { weights: spare.address(), ..*task },
            Pass::Input { add: true } => {
                let view = DeviceView { offset, ..task.x.view };
                Task { x: MapIn { buffer: &spare, view }, ..*task }
            }
            _ => *task,
        };
        let faster = self.takes_less(route, &trial);
        self.partial.grow_out_of(spare);
        faster
    }

    /// Whether cuDNN takes less time for this task than our kernels. No where it fails.
    fn takes_less(&mut self, route: &Arc<Route>, trial: &Task<'_>) -> Result<bool> {
        let context = self.device.context().clone();
        let events = [Event::new(&context)?, Event::new(&context)?];
        let mut fastest = Fastest::new();
        let own = times(self, |ops| &ops.stream, &events, |ops| ops.by_own(trial).map(|()| true))?;
        if let Some(mut own) = own {
            fastest.offer(false, &mut own);
        }
        let cudnn = times(self, |ops| &ops.stream, &events, |ops| ops.by_cudnn(route, trial));
        if let Some(mut cudnn) = unless_auto(ConvLibraries::Auto, cudnn)? {
            fastest.offer(true, &mut cudnn);
        }
        Ok(fastest.best.is_some_and(|(cudnn, _)| cudnn))
    }
}

/// The fused call by the algorithm that it has without an activation.
fn describe_forward(library: Arc<Cudnn>, conv: &FusedConv) -> Result<Option<Described>> {
    let Some(conv) = library.describe(conv)? else { return Ok(None) };
    let Some(&algorithm) = conv.algorithms().first() else { return Ok(None) };
    let bytes = library.workspace(&conv, algorithm)?;
    Ok(bytes.map(|bytes| Described::Forward(library, conv, algorithm, bytes)))
}
