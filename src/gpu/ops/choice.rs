//! The fastest of those who can compute a convolution of one size: our tiles, cuDNN's algorithms, cuBLASLt's. They are measured once a
//! process, when a plan is made, on maps of the same shapes.

use super::conv::{ConvOp, ConvWindow, Joined};
use super::route::{Chosen, Described, Route};
use super::{Device, Task};
use crate::error::{Error, Result};
use crate::gpu::cublaslt::CublasLt;
use crate::gpu::cudnn::Cudnn;
use crate::gpu::driver::{Event, Stream};
use crate::gpu::fused::{FusedConv, Side, WORKSPACE};
use crate::gpu::map::{Arithmetic, DeviceView};
use crate::gpu::memory::DeviceBuffer;
use crate::gpu::probe::Library;
use std::collections::HashMap;
use std::sync::{Arc, Mutex};

/// Who computes convolutions on a device. Our tiles all give the same bits unless one splits the depth; a library's algorithms give
/// others, within the same rounding.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ConvLibraries {
    /// Whoever is fastest, by measurement: our kernels and the libraries that there are.
    #[default]
    Auto,
    /// Our kernels, by their rule; nothing is measured, and a device gives the same bits every time.
    Own,
    /// cuDNN, where it can compute them.
    Cudnn,
    /// cuBLASLt, where they are matrix products.
    CublasLt,
}

impl ConvLibraries {
    /// What `FARFACE_CUDA_CONV` says: `auto` (as where it is not set), `own`, `cudnn` or `cublaslt`.
    ///
    /// Errors: [`Error::InvalidArgument`] where it says anything else.
    pub fn from_env() -> Result<Self> {
        match std::env::var_os("FARFACE_CUDA_CONV") {
            None => Ok(Self::default()),
            Some(text) => Self::parse(&text.to_string_lossy()),
        }
    }

    fn parse(text: &str) -> Result<Self> {
        match text {
            "auto" => Ok(Self::Auto),
            "own" => Ok(Self::Own),
            "cudnn" => Ok(Self::Cudnn),
            "cublaslt" => Ok(Self::CublasLt),
            other => Err(Error::InvalidArgument(format!(
                "FARFACE_CUDA_CONV is {other:?}; it may be auto, own, cudnn or cublaslt"
            ))),
        }
    }

    /// An error unless the library is there that has to be.
    pub(super) fn require(self) -> Result<()> {
        match self {
            Self::Auto | Self::Own => Ok(()),
            Self::Cudnn => Library::Cudnn.require(),
            Self::CublasLt => Library::CublasLt.require(),
        }
    }
}

/// All that a choice depends on, but for the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Geometry {
    arithmetic: Arithmetic,
    window: ConvWindow,
    groups: usize,
    channels: usize,
    slope: u32,
    joined: Joined,
    input: Side,
    add: Option<Side>,
    adds_input: bool,
    output: Side,
}

impl Geometry {
    fn of(op: &ConvOp, inputs: &[DeviceView], output: &DeviceView) -> Self {
        Self {
            arithmetic: op.kernels.arithmetic(),
            window: op.window,
            groups: op.groups,
            channels: op.channels,
            slope: op.slope.to_bits(),
            joined: op.joined,
            input: Side::of(&inputs[0]),
            add: inputs.get(1).map(Side::of),
            adds_input: inputs.get(1).is_some_and(|add| Side::overlap(add, &inputs[0])),
            output: Side::of(output),
        }
    }
}

/// A convolution on the device of a number, with a setting.
type Key = (u32, ConvLibraries, Geometry);

/// What was chosen in this process: sessions that are opened later give the same bits, and do not measure again.
static CHOSEN: Mutex<Option<HashMap<Key, Chosen>>> = Mutex::new(None);

/// The libraries of a device, opened when first asked for, and the routes that were made with them.
pub(in crate::gpu) struct Choices {
    libraries: ConvLibraries,
    made: Mutex<Made>,
}

#[derive(Default)]
struct Made {
    /// None: not asked for yet; within: whether there is one.
    cudnn: Option<Option<Arc<Cudnn>>>,
    cublaslt: Option<Option<Arc<CublasLt>>>,
    routes: HashMap<Geometry, Arc<Route>>,
}

impl Choices {
    pub(super) fn new(libraries: ConvLibraries) -> Self {
        Self { libraries, made: Mutex::default() }
    }

    /// What was asked for.
    #[cfg(feature = "train")]
    pub(super) fn libraries(&self) -> ConvLibraries {
        self.libraries
    }

    /// cuDNN, where it is there and may compute convolutions.
    #[cfg(feature = "train")]
    pub(super) fn cudnn(&self, device: &Device) -> Result<Option<Arc<Cudnn>>> {
        let mut made = self.made.lock().unwrap_or_else(|e| e.into_inner());
        made.cudnn(device, self.libraries)
    }

    /// Whether anything but our kernels may compute a convolution.
    pub(super) fn uses_libraries(&self) -> bool {
        self.libraries != ConvLibraries::Own
    }
}

/// What a library or one of its calls gave: with [`ConvLibraries::Auto`], who fails is no candidate.
pub(super) fn unless_auto<T>(libraries: ConvLibraries, result: Result<Option<T>>) -> Result<Option<T>> {
    match result {
        Err(Error::Cuda(_) | Error::Unsupported(_)) if libraries == ConvLibraries::Auto => Ok(None),
        other => other,
    }
}

impl Made {
    fn cudnn(&mut self, device: &Device, libraries: ConvLibraries) -> Result<Option<Arc<Cudnn>>> {
        if let Some(known) = &self.cudnn {
            return Ok(known.clone());
        }
        let wanted = matches!(libraries, ConvLibraries::Auto | ConvLibraries::Cudnn);
        let open = || Cudnn::open(device.context()).map(|library| Some(Arc::new(library)));
        let library = if wanted { unless_auto(libraries, open())? } else { None };
        self.cudnn = Some(library.clone());
        Ok(library)
    }

    fn cublaslt(&mut self, device: &Device, libraries: ConvLibraries) -> Result<Option<Arc<CublasLt>>> {
        if let Some(known) = &self.cublaslt {
            return Ok(known.clone());
        }
        let wanted = matches!(libraries, ConvLibraries::Auto | ConvLibraries::CublasLt);
        let open = || CublasLt::open(device.context()).map(|library| Some(Arc::new(library)));
        let library = if wanted { unless_auto(libraries, open())? } else { None };
        self.cublaslt = Some(library.clone());
        Ok(library)
    }

    fn describe(&mut self, device: &Device, libraries: ConvLibraries, conv: &FusedConv) -> Result<Described> {
        let cudnn = match self.cudnn(device, libraries)? {
            Some(library) => unless_auto(libraries, library.describe(conv))?.map(|conv| (library, conv)),
            None => None,
        };
        let cublaslt = match self.cublaslt(device, libraries)? {
            Some(library) => {
                unless_auto(libraries, library.describe(conv))?.map(|product| (library, product))
            }
            None => None,
        };
        Ok(Described { cudnn, cublaslt })
    }
}

/// The fastest of candidates that come one by one.
pub(super) struct Fastest<T> {
    pub(super) best: Option<(T, f32)>,
}

impl<T> Fastest<T> {
    /// Whoever comes later has to take less than this part of the time: noise must not bring other bits.
    const MARGIN: f32 = 0.97;

    pub(super) fn new() -> Self {
        Self { best: None }
    }

    /// Offers one that took so many milliseconds in some runs; their median counts.
    pub(super) fn offer(&mut self, candidate: T, times: &mut [f32]) {
        times.sort_by(f32::total_cmp);
        let Some(&time) = times.get(times.len() / 2) else { return };
        if self.best.as_ref().is_none_or(|(_, best)| time < best * Self::MARGIN) {
            self.best = Some((candidate, time));
        }
    }
}

/// What candidates are measured with: a stream, events, and memory that grows with what is asked for.
pub(in crate::gpu) struct Bench<'a> {
    device: &'a Device,
    tools: Option<(Stream, [Event; 2])>,
    memory: Option<DeviceBuffer>,
}

/// Runs of a candidate that are timed, behind one that is not.
const RUNS: usize = 5;

/// Milliseconds of some runs of what `give` gives to the stream; None where it says that a library does not compute it so.
pub(super) fn times<T>(
    on: &mut T,
    stream: impl Fn(&T) -> &Stream,
    [before, after]: &[Event; 2],
    give: impl Fn(&mut T) -> Result<bool>,
) -> Result<Option<[f32; RUNS]>> {
    if !give(on)? {
        return Ok(None);
    }
    stream(on).synchronize()?;
    let mut times = [0.0; RUNS];
    for time in &mut times {
        before.record(stream(on))?;
        give(on)?;
        after.record(stream(on))?;
        after.synchronize()?;
        *time = after.since(before)?;
    }
    Ok(Some(times))
}

impl<'a> Bench<'a> {
    pub fn new(device: &'a Device) -> Self {
        Self { device, tools: None, memory: None }
    }

    /// Who computes `op` on such views. None where nobody but our kernel by its rule can.
    pub fn choose(
        &mut self,
        op: &ConvOp,
        inputs: &[DeviceView],
        output: &DeviceView,
    ) -> Result<Option<Arc<Route>>> {
        let device = self.device;
        let choices = device.choices();
        let libraries = choices.libraries;
        if libraries == ConvLibraries::Own {
            return Ok(None);
        }
        let geometry = Geometry::of(op, inputs, output);
        // Held while candidates run: two sessions do not disturb each other's measurement, nor make the same one twice.
        let mut made = choices.made.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(route) = made.routes.get(&geometry) {
            return Ok(Some(route.clone()));
        }
        let described = match op.fused(inputs, output) {
            Some(conv) => made.describe(device, libraries, &conv)?,
            None => Described::default(),
        };
        let own = match libraries {
            ConvLibraries::Auto => op.choices(inputs, output),
            _ => Vec::new(),
        };
        if own.is_empty() && described.cudnn.is_none() && described.cublaslt.is_none() {
            return Ok(None);
        }
        let trial = Trial::new(self, op, inputs, output, Arc::new(described), own)?;
        let key = (device.context().ordinal(), libraries, geometry);
        let known =
            CHOSEN.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert_default().get(&key).copied();
        let chosen = match known {
            // Once, so that its code is on the device before a recording asks for it.
            Some(known) if trial.run(known)? => known,
            _ => trial.fastest(libraries)?,
        };
        let route = Arc::new(Route { chosen, described: trial.described });
        CHOSEN.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert_default().insert(key, chosen);
        made.routes.insert(geometry, route.clone());
        Ok(Some(route))
    }

    /// Memory of so many bytes, filled with zeros, and what to measure with.
    fn ready(&mut self, bytes: usize) -> Result<(&Stream, &[Event; 2], &DeviceBuffer)> {
        let context = self.device.context();
        let tools = match self.tools.take() {
            Some(tools) => tools,
            None => (Stream::new(context)?, [Event::new(context)?, Event::new(context)?]),
        };
        let (stream, events) = self.tools.insert(tools);
        let memory = match self.memory.take().filter(|m| m.len() >= bytes) {
            Some(memory) => memory,
            None => DeviceBuffer::new(context, bytes)?,
        };
        memory.fill(stream, 0..bytes, 0)?;
        stream.synchronize()?;
        Ok((stream, events, self.memory.insert(memory)))
    }
}

/// One convolution, on views of its own.
struct Trial<'a> {
    op: &'a ConvOp,
    inputs: Vec<DeviceView>,
    output: DeviceView,
    described: Arc<Described>,
    /// Name and workspace of what our kernels offer.
    own: Vec<(&'static str, usize)>,
    stream: &'a Stream,
    events: &'a [Event; 2],
    memory: &'a DeviceBuffer,
    /// Where the workspace begins.
    workspace: usize,
}

impl<'a> Trial<'a> {
    fn new(
        bench: &'a mut Bench,
        op: &'a ConvOp,
        inputs: &[DeviceView],
        output: &DeviceView,
        described: Arc<Described>,
        own: Vec<(&'static str, usize)>,
    ) -> Result<Self> {
        let mut end = 0usize;
        let mut place = |view: &DeviceView| {
            let offset = end + view.offset % 256;
            let bytes = view.bytes().ok_or_else(|| Error::LimitExceeded("a map is too large".into()))?;
            end = (offset + bytes).next_multiple_of(256);
            Ok::<DeviceView, Error>(DeviceView { offset, ..*view })
        };
        let inputs = inputs.iter().map(&mut place).collect::<Result<Vec<_>>>()?;
        let output = place(output)?;
        let libraries = described.cudnn.is_some() || described.cublaslt.is_some();
        let rule = op.workspace(&inputs, &output);
        let most =
            own.iter().map(|way| way.1).fold(if libraries { WORKSPACE } else { 0 }, usize::max).max(rule);
        let (stream, events, memory) = bench.ready(end + most)?;
        Ok(Self { op, inputs, output, described, own, stream, events, memory, workspace: end })
    }

    /// Gives it to the stream once and waits. False where a library does not compute it so.
    fn run(&self, chosen: Chosen) -> Result<bool> {
        let given = self.give(chosen)?;
        self.stream.synchronize()?;
        Ok(given)
    }

    fn give(&self, chosen: Chosen) -> Result<bool> {
        let route = Route { chosen, described: self.described.clone() };
        let task = Task {
            stream: self.stream,
            arena: self.memory.address(),
            inputs: &self.inputs,
            output: &self.output,
            route: None,
            workspace: self.memory.address() + self.workspace as u64,
        };
        // SAFETY: the views lie one behind the other in the memory, the workspace behind them.
        unsafe { route.try_launch(self.op, &task) }
    }

    fn times(&self, chosen: Chosen) -> Result<Option<[f32; RUNS]>> {
        times(&mut &*self, |trial| trial.stream, self.events, |trial| trial.give(chosen))
    }

    /// The fastest of all candidates; our kernels by their rule where there is no other.
    fn fastest(&self, libraries: ConvLibraries) -> Result<Chosen> {
        let mut fastest = Fastest::new();
        if libraries == ConvLibraries::Auto {
            // The rule's first, then the others by number.
            let others = (0..).zip(&self.own).map(|(i, &(name, bytes))| Chosen::Own(Some(i), name, bytes));
            for own in std::iter::once(self.by_rule()).chain(others) {
                if let Some(mut times) = self.times(own)? {
                    fastest.offer(own, &mut times);
                }
            }
        }
        for candidate in self.candidates(libraries)? {
            if let Some(mut times) = unless_auto(libraries, self.times(candidate))? {
                fastest.offer(candidate, &mut times);
            }
        }
        Ok(fastest.best.map_or(self.by_rule(), |(chosen, _)| chosen))
    }

    fn by_rule(&self) -> Chosen {
        let (name, bytes) = self.op.rule(&self.inputs, &self.output);
        Chosen::Own(None, name, bytes)
    }

    /// What the libraries offer.
    fn candidates(&self, libraries: ConvLibraries) -> Result<Vec<Chosen>> {
        let mut candidates = Vec::new();
        if let Some((library, conv)) = &self.described.cudnn {
            for &algorithm in conv.algorithms() {
                let workspace = unless_auto(libraries, library.workspace(conv, algorithm))?;
                candidates.extend(workspace.map(|bytes| Chosen::Cudnn(algorithm, bytes)));
            }
        }
        if let Some((library, product)) = &self.described.cublaslt {
            let found = library.algorithms(product, self.op.bias.address()).map(Some);
            candidates.extend(unless_auto(libraries, found)?.into_iter().flatten().map(Chosen::CublasLt));
        }
        Ok(candidates)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fastest_by_its_median_is_taken_and_ties_stay_with_the_first() {
        let mut fastest = Fastest::new();
        fastest.offer("own", &mut [9.0, 1.0, 1.0]);
        assert_eq!(fastest.best, Some(("own", 1.0)));
        fastest.offer("as fast", &mut [0.98, 0.98, 0.98]);
        fastest.offer("fast once", &mut [0.1, 2.0, 2.0]);
        fastest.offer("never ran", &mut []);
        assert_eq!(fastest.best, Some(("own", 1.0)));
        fastest.offer("library", &mut [0.5, 0.9, 0.5]);
        assert_eq!(fastest.best, Some(("library", 0.5)));
    }

    #[test]
    fn a_setting_of_another_name_is_an_error_that_says_which_there_are() {
        for (text, expected) in [
            ("auto", ConvLibraries::Auto),
            ("own", ConvLibraries::Own),
            ("cudnn", ConvLibraries::Cudnn),
            ("cublaslt", ConvLibraries::CublasLt),
        ] {
            assert_eq!(ConvLibraries::parse(text).unwrap(), expected);
        }
        let error = ConvLibraries::parse("cuDNN").unwrap_err().to_string();
        assert!(error.contains("FARFACE_CUDA_CONV") && error.contains("cublaslt"), "{error}");
    }
}
