//! The safe face of the operations: every view is checked once, when the program is made.

use super::driver::{Event, Stream};
use super::map::DeviceView;
use super::memory::DeviceBuffer;
use super::ops::{Bench, Device, DeviceOp, Route};
use crate::error::{Error, Result};
use std::ops::Range;
use std::sync::Arc;

/// An operation on its views.
pub struct DeviceStep {
    /// The operation.
    pub op: Arc<DeviceOp>,
    /// Inputs in its order.
    pub inputs: Vec<DeviceView>,
    /// Output.
    pub output: DeviceView,
    /// Bytes of the arena that are the operation's while it runs.
    pub workspace: Range<usize>,
}

/// Operations in their order on views of one arena.
pub struct DeviceProgram {
    steps: Vec<DeviceStep>,
    /// Of every step, who computes it, where that was measured.
    routes: Vec<Option<Arc<Route>>>,
    /// Bytes of maps; the workspace begins behind them.
    maps: usize,
    bytes: usize,
}

/// What a workspace begins at a multiple of.
const ALIGN: usize = 256;

impl DeviceProgram {
    /// Checks that all views lie in an arena of `bytes` bytes, that no output overlaps an input and that workspaces are large enough and
    /// apart from both. That sizes are those of the
    /// layers is for the caller to know.
    pub(crate) fn new(bytes: usize, steps: Vec<DeviceStep>) -> Result<Self> {
        let range = |v: &DeviceView| {
            let s = v.shape;
            let pixels = s.n * s.h * s.w;
            let values = pixels.saturating_sub(1).saturating_mul(v.pixel).saturating_add(s.c + v.tail);
            v.offset..v.offset.saturating_add(values.saturating_mul(v.element.bytes()))
        };
        for (i, step) in steps.iter().enumerate() {
            let bad = |what: &str| Err(Error::Internal(format!("device step {i}: {what}")));
            let mut views = step.inputs.iter().chain([&step.output]);
            // Kernels reckon with indices of 32 bits within a map's rows and columns.
            let small = |v: &DeviceView| v.shape.n * v.shape.h * v.shape.w <= i32::MAX as usize;
            if !views.clone().all(|v| !v.shape.is_empty() && small(v)) {
                return bad("a map is empty or has too many pixels");
            }
            if step.inputs.is_empty()
                || !views.all(|v| range(v).end <= bytes && v.shape.c + v.tail <= v.pixel)
            {
                return bad("a view lies outside the arena");
            }
            // Channels of one map lie between each other: those of a concatenation are apart all the same.
            let out = range(&step.output);
            let meets = |v: &DeviceView| {
                let r = range(v);
                let beside = v.pixel == step.output.pixel
                    && v.element == step.output.element
                    && apart_in_pixel(v, &step.output);
                r.start < out.end && out.start < r.end && !beside
            };
            if step.inputs.iter().any(meets) {
                return bad("the output overlaps an input");
            }
            let room = &step.workspace;
            let wanted = step.op.workspace(&step.inputs, &step.output);
            let mut views = step.inputs.iter().chain([&step.output]).map(range);
            if wanted > 0
                && (room.len() < wanted
                    || room.end > bytes
                    || !room.start.is_multiple_of(16)
                    || views.any(|r| r.start < room.end && room.start < r.end))
            {
                return bad("its workspace is too small or not its own");
            }
        }
        let routes = steps.iter().map(|_| None).collect();
        Ok(Self { steps, routes, maps: bytes, bytes })
    }

    /// Measures who is fastest at each convolution, as the device's [`ConvLibraries`](super::ops::ConvLibraries) says, unless that is known
    /// already. The arena grows by the largest workspace. Not while a stream is recorded.
    pub(crate) fn choose(&mut self, device: &Device) -> Result<()> {
        let mut bench = Bench::new(device);
        for (step, route) in self.steps.iter().zip(&mut self.routes) {
            if let DeviceOp::Conv(op) = &*step.op {
                *route = bench.choose(op, &step.inputs, &step.output)?;
            }
        }
        let workspace = self.routes.iter().flatten().map(|r| r.workspace()).max().unwrap_or(0);
        if workspace > 0 {
            let end = self.maps.checked_next_multiple_of(ALIGN).and_then(|at| at.checked_add(workspace));
            self.bytes = end.ok_or_else(|| Error::LimitExceeded("the arena is too large".into()))?;
        }
        Ok(())
    }

    /// What computes each step: a kernel's name, or a library's and its algorithm's.
    pub fn kernels(&self) -> impl Iterator<Item = &'static str> + '_ {
        self.steps.iter().zip(&self.routes).map(|(step, route)| step.op.name_by(route.as_deref()))
    }

    /// Bytes of arena.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Number of steps.
    pub fn count(&self) -> usize {
        self.steps.len()
    }

    /// Gives all steps to the stream.
    pub fn launch(&self, stream: &Stream, arena: &DeviceBuffer) -> Result<()> {
        (0..self.steps.len()).try_for_each(|i| self.launch_step(i, stream, arena))
    }

    /// As [`DeviceProgram::launch`], waiting for each step. Returns their milliseconds.
    pub fn launch_timed(&self, stream: &Stream, arena: &DeviceBuffer) -> Result<Vec<f32>> {
        let [before, after] = [Event::new(stream.context())?, Event::new(stream.context())?];
        let timed = |i| {
            before.record(stream)?;
            self.launch_step(i, stream, arena)?;
            after.record(stream)?;
            after.synchronize()?;
            after.since(&before)
        };
        (0..self.steps.len()).map(timed).collect()
    }

    fn launch_step(&self, i: usize, stream: &Stream, arena: &DeviceBuffer) -> Result<()> {
        if arena.len() < self.bytes {
            return Err(Error::Internal("a device arena smaller than the program needs".into()));
        }
        let step = &self.steps[i];
        let route = self.routes[i].as_deref();
        // A route was measured with a workspace of its own; without one the step's is that of our kernels' rule.
        let workspace =
            if route.is_some() { self.maps.next_multiple_of(ALIGN) } else { step.workspace.start };
        // SAFETY: checked when the program was made, and the arena is as large, with the workspace of the routes.
        unsafe {
            let workspace = arena.address() + workspace as u64;
            step.op.launch_by(route, stream, arena.address(), &step.inputs, &step.output, workspace)
        }
    }
}

/// Whether two views with the same distance between pixels, of the same map, have different channels of it.
fn apart_in_pixel(a: &DeviceView, b: &DeviceView) -> bool {
    let bytes = a.element.bytes();
    let (low, high) = if a.offset <= b.offset { (a, b) } else { (b, a) };
    let distance = (high.offset - low.offset) / bytes;
    distance < low.pixel
        && low.shape.c + low.tail <= distance
        && distance + high.shape.c + high.tail <= low.pixel
}
