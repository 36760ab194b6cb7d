//! How each tensor of a network is stored: f32, bf16, f16, or whole numbers of eight bits.
//!
//! Inputs and outputs of the network are f32. Between them a tensor is stored in the numbers asked for where the step that makes
//! it can write them and a step that reads it can take them; the others read a copy. Convolutions, sums and copies write any format
//! whatever they read; depthwise convolutions, pooling and interpolation write what they read.

use super::build::NodeId;
use super::fuse::{root, Draft, DraftStep, ValueId, Work};
use crate::cpu::arena::{Format, Storage};
use crate::cpu::simple::WIDENED;
use crate::layers::{Activation, Layer};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// The numbers that a network is computed in.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Numbers {
    /// Single precision.
    #[default]
    F32,
    /// Tensors and the weights of dense convolutions in bf16, sums in f32.
    Bf16,
    /// Tensors and the weights of dense convolutions in f16. Where the CPU multiplies f16, sums of a short run of products are
    /// f16 too and the sums of those are f32; elsewhere all sums are f32. What is beyond 65504 becomes that.
    F16,
    /// Tensors in u8 and weights in i8 where their ranges are known, sums in i32; the rest in f32. Some 3x3 convolutions of tensors
    /// in u8 are computed in f32 where that is faster (by Winograd's algorithm, on AVX2 or AVX-512 without VNNI).
    Int8(Ranges),
}

/// What the tensors of a network hold, found on pictures.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Ranges {
    /// Least and greatest value that shall be told apart, by the layer whose output it is (`name#2` where it is the second of
    /// that name).
    pub values: BTreeMap<String, [f32; 2]>,
    /// Layers that are computed in f32 all the same.
    pub keep: BTreeSet<String>,
}

impl Ranges {
    /// The format for a tensor.
    fn format(&self, layer: &str) -> Option<Format> {
        let [low, high] = *self.values.get(layer)?;
        // Zero is told exactly: it is what lies around a map, and what a ReLU leaves.
        let (low, high) = (low.min(0.0), high.max(0.0));
        let scale = (high - low) / f32::from(u8::MAX);
        // Of a file, which may say anything: no ratio of two scales may be infinite.
        if !(1e-15..1e15).contains(&scale) {
            return None;
        }
        Some(Format { storage: Storage::U8, scale, zero: (-low / scale).round() as u8 })
    }
}

/// How a step deals with formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Deals {
    /// Reads and writes any, its first input in words of four bytes.
    Dense { channels: usize },
    /// Reads and writes any.
    Any,
    /// Writes what it reads; the scale of u8 may change.
    Scales,
    /// Writes what it reads.
    Same,
    /// Reads f32 and writes f32.
    Single,
    /// Reads f32 and writes any.
    Kept,
}

impl Deals {
    fn of(draft: &Draft, step: &DraftStep, numbers: &Numbers) -> Self {
        let kept = match numbers {
            Numbers::Int8(ranges) => {
                let named = |node: NodeId| ranges.keep.contains(&draft.graph.nodes[node.0].name);
                match &step.work {
                    Work::Siblings(chains) => chains.iter().any(|c| named(c.start)),
                    _ => named(step.node),
                }
            }
            _ => false,
        };
        match Self::of_work(draft, &step.work) {
            Self::Dense { .. } if kept => Self::Kept,
            _ if kept => Self::Single,
            deals => deals,
        }
    }

    fn of_work(draft: &Draft, work: &Work) -> Self {
        match work {
            Work::Copy => Self::Any,
            Work::Widen => Self::Single,
            Work::Plain(Layer::Add(_) | Layer::Crop(_), _)
            | Work::Plain(Layer::Activation(Activation::Relu | Activation::LeakyRelu(_)), _) => Self::Any,
            Work::Plain(Layer::MaxPool(_) | Layer::Upsample(_), _) => Self::Same,
            Work::Plain(..) => Self::Single,
            Work::Siblings(chains) => Self::of_start(draft, chains[0].start),
            Work::Chain(chain) => Self::of_start(draft, chain.start),
        }
    }

    fn of_start(draft: &Draft, start: NodeId) -> Self {
        match draft.graph.nodes[start.0].layer() {
            Some(Layer::Conv2d(c)) if c.is_depthwise() => Self::Scales,
            Some(Layer::Conv2d(c)) if c.groups == 1 => Self::Dense { channels: c.in_channels },
            Some(Layer::BatchNorm(_)) => Self::Scales,
            // In groups, or fully connected: rare.
            Some(Layer::Conv2d(_) | Layer::Linear(_)) => Self::Kept,
            _ => Self::Single,
        }
    }

    /// Whether input `k` may be stored so.
    fn reads(self, k: usize, storage: Storage) -> bool {
        match self {
            _ if storage == Storage::F32 => true,
            Self::Dense { channels } => k > 0 || channels.is_multiple_of(size_of::<f32>() / storage.bytes()),
            Self::Any | Self::Scales | Self::Same => true,
            Self::Single | Self::Kept => false,
        }
    }
}

/// A first convolution of fewer multiply-adds a pixel of the picture stays in f32 where bf16 is multiplied on tiles: making the
/// copy that it would read takes as long as a hundred or so.
const WORTH_WIDENING: usize = 1000;

/// The format of every value of `draft`; adds the copies that this takes. `tiles`: bf16 is multiplied on AMX tiles.
pub(crate) fn assign(draft: &mut Draft, numbers: &Numbers, tiles: bool) -> Vec<Format> {
    if *numbers == Numbers::F32 {
        return vec![Format::F32; draft.values.len()];
    }
    let names = draft.names();
    let steps = std::mem::take(&mut draft.steps);
    let mut a = Assignment::new(draft, numbers, tiles, names, &steps);
    steps.into_iter().for_each(|step| a.place(step));
    let Assignment { steps, formats, .. } = a;
    let format = |i: usize| formats.get(&root(&draft.values, ValueId(i)).0).copied().unwrap_or(Format::F32);
    let all = (0..draft.values.len()).map(format).collect();
    draft.steps = steps;
    all
}

struct Assignment<'a> {
    draft: &'a mut Draft,
    numbers: &'a Numbers,
    /// Of the values that the draft had.
    names: Vec<String>,
    /// Of values that are no part of another: the format, once it is decided.
    formats: HashMap<ValueId, Format>,
    /// Those that some step would read if they were stored in the numbers asked for, and no output is in.
    welcome: BTreeSet<usize>,
    /// Those that others are part of.
    joined: BTreeSet<usize>,
    /// Copies in f32.
    singles: HashMap<ValueId, ValueId>,
    /// Wider copies of inputs.
    wide: HashMap<ValueId, ValueId>,
    /// bf16 is multiplied on AMX tiles.
    tiles: bool,
    steps: Vec<DraftStep>,
}

impl<'a> Assignment<'a> {
    fn new(
        draft: &'a mut Draft,
        numbers: &'a Numbers,
        tiles: bool,
        names: Vec<String>,
        steps: &[DraftStep],
    ) -> Self {
        let root = |v: ValueId| root(&draft.values, v).0;
        let storage = match numbers {
            Numbers::F32 => Storage::F32,
            Numbers::Bf16 => Storage::Bf16,
            Numbers::F16 => Storage::F16,
            Numbers::Int8(_) => Storage::U8,
        };
        let mut welcome = BTreeSet::new();
        for step in steps.iter().rev() {
            let deals = Deals::of(draft, step, numbers);
            // What writes what it reads should not read what nobody wants it to write.
            if matches!(deals, Deals::Scales | Deals::Same) && !welcome.contains(&root(step.output).0) {
                continue;
            }
            let read = step.inputs.iter().enumerate().filter(|&(k, _)| deals.reads(k, storage));
            welcome.extend(read.map(|(_, &v)| root(v).0));
        }
        let ends = draft.inputs.iter().chain(&draft.outputs);
        ends.clone().for_each(|&v| {
            welcome.remove(&root(v).0);
        });
        let joined = draft.values.iter().filter_map(|v| v.parent).map(|(parent, _)| root(parent).0).collect();
        let formats = draft.inputs.iter().map(|&v| (v, Format::F32)).collect();
        Self {
            numbers,
            names,
            formats,
            welcome,
            joined,
            singles: HashMap::new(),
            wide: HashMap::new(),
            tiles,
            steps: Vec::new(),
            draft,
        }
    }

    fn root(&self, value: ValueId) -> ValueId {
        root(&self.draft.values, value).0
    }

    /// The format of a value that was written before.
    fn format(&self, value: ValueId) -> Format {
        self.formats[&self.root(value)]
    }

    /// The numbers asked for, for what this value holds.
    fn low(&self, value: ValueId) -> Option<Format> {
        match self.numbers {
            Numbers::F32 => None,
            Numbers::Bf16 => Some(Format::BF16),
            Numbers::F16 => Some(Format::F16),
            Numbers::Int8(ranges) => self.names.get(value.0).and_then(|name| ranges.format(name)),
        }
    }

    /// The format that a value, or what it is part of, should have.
    fn wanted(&self, value: ValueId) -> Format {
        let root = self.root(value);
        let decided = self.formats.get(&root).copied();
        let low = || self.low(root).filter(|_| self.welcome.contains(&root.0));
        decided.or_else(low).unwrap_or(Format::F32)
    }

    /// Takes a step over, between the copies that it needs.
    fn place(&mut self, mut step: DraftStep) {
        let deals = Deals::of(self.draft, &step, self.numbers);
        for (k, input) in step.inputs.iter_mut().enumerate() {
            if !deals.reads(k, self.format(*input).storage) {
                *input = self.single(*input);
            }
        }
        if self.widens(&step, deals) {
            step.inputs[0] = self.widened(step.inputs[0]);
        }
        let (output, wanted) = (step.output, self.wanted(step.output));
        let written = match (deals, self.format(step.inputs[0])) {
            (Deals::Dense { .. } | Deals::Any | Deals::Kept, _) => wanted,
            (Deals::Single, _) => Format::F32,
            (Deals::Same, read) => read,
            (Deals::Scales, Format { storage: Storage::U8, .. }) => {
                let own = if wanted.storage == Storage::U8 { Some(wanted) } else { self.low(output) };
                own.unwrap_or_else(|| {
                    // What it writes is not known well enough.
                    step.inputs[0] = self.single(step.inputs[0]);
                    Format::F32
                })
            }
            (Deals::Scales, read) => read,
        };
        let root = self.root(output);
        let free = root == output && !self.joined.contains(&root.0) && !self.draft.outputs.contains(&output);
        if written == wanted || free {
            self.formats.insert(root, written);
            self.steps.push(step);
            return;
        }
        self.formats.insert(root, wanted);
        let between = self.draft.value(self.draft.values[output.0].node);
        self.formats.insert(between, written);
        let node = step.node;
        self.steps.push(DraftStep { output: between, ..step });
        self.steps.push(DraftStep { work: Work::Copy, inputs: vec![between], output, node });
    }

    /// Whether a step, a large convolution of few channels of the network's input, should read them in bf16.
    fn widens(&self, step: &DraftStep, deals: Deals) -> bool {
        let (Work::Chain(chain), Deals::Dense { .. }) = (&step.work, deals) else { return false };
        let Some(Layer::Conv2d(c)) = self.draft.graph.nodes[chain.start.0].layer() else { return false };
        let macs = c.out_channels * c.in_channels * c.kernel[0] * c.kernel[1] / (c.stride[0] * c.stride[1]);
        self.tiles
            // Not less exact than asked for.
            && *self.numbers != Numbers::F16
            && c.in_channels <= WIDENED
            && c.dilation == [1, 1]
            && macs >= WORTH_WIDENING
            && self.draft.inputs.contains(&step.inputs[0])
    }

    /// The copy of an input in bf16, with [`WIDENED`] channels.
    fn widened(&mut self, value: ValueId) -> ValueId {
        if let Some(&copy) = self.wide.get(&value) {
            return copy;
        }
        let node = self.draft.values[value.0].node;
        let copy = self.draft.value(node);
        self.draft.values[copy.0].channels = Some(WIDENED);
        self.formats.insert(copy, Format::BF16);
        self.wide.insert(value, copy);
        self.steps.push(DraftStep { work: Work::Widen, inputs: vec![value], output: copy, node });
        copy
    }

    /// The copy of a value in f32.
    fn single(&mut self, value: ValueId) -> ValueId {
        if let Some(&copy) = self.singles.get(&value) {
            return copy;
        }
        let node = self.draft.values[value.0].node;
        let copy = self.draft.value(node);
        self.formats.insert(copy, Format::F32);
        self.singles.insert(value, copy);
        self.steps.push(DraftStep { work: Work::Copy, inputs: vec![value], output: copy, node });
        copy
    }
}
