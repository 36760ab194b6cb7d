//! Anchors' channels in one picture's output maps.

use super::pictures::Losses;
use crate::detect::anchors::Anchor;
use crate::detect::BBox;
use crate::train::losses::LossRecipe;
use crate::train::matching::AnchorGrid;

/// The anchors of a level, on every cell of its maps.
#[derive(Clone, Debug, PartialEq)]
pub struct Level {
    /// Pixels between cells.
    pub stride: usize,
    /// Width and height of each anchor.
    pub anchors: Vec<[f32; 2]>,
    /// Where the detector's outputs have them.
    pub layout: Layout,
}

/// A level's channels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// One output: a logit for each anchor, then four offsets for each.
    Joint,
    /// One output: a logit for each anchor, then tx of each, then ty, tw, th (HR).
    ByKind,
    /// Two outputs: a logit for each anchor, or two (background, face); four offsets for each.
    Apart {
        /// Of an anchor: 1 or 2.
        logits: usize,
    },
}

impl Layout {
    /// Outputs of a level.
    pub fn outputs(self) -> usize {
        match self {
            Layout::Joint | Layout::ByKind => 1,
            Layout::Apart { .. } => 2,
        }
    }

    /// Logits of an anchor.
    pub fn logits(self) -> usize {
        match self {
            Layout::Joint | Layout::ByKind => 1,
            Layout::Apart { logits } => logits,
        }
    }
}

impl Level {
    /// Channels of each of its outputs.
    pub(super) fn channels(&self) -> Vec<usize> {
        let n = self.anchors.len();
        match self.layout {
            Layout::Joint | Layout::ByKind => vec![5 * n],
            Layout::Apart { logits } => vec![logits * n, 4 * n],
        }
    }
}

/// Where an anchor group's channels are: of a cell's `per_cell` in an output, those from `first` on.
#[derive(Clone, Copy)]
pub(in crate::train) struct Channels {
    pub(in crate::train) output: usize,
    pub(in crate::train) per_cell: usize,
    pub(in crate::train) first: usize,
}

impl Channels {
    /// Output and place in the picture's map of the first one of a cell.
    pub(super) fn at(&self, cell: usize) -> (usize, usize) {
        (self.output, cell * self.per_cell + self.first)
    }
}

/// Where the logits and the offsets of an anchor group are.
#[derive(Clone, Copy)]
pub(in crate::train) struct GroupChannels {
    pub(in crate::train) class: Channels,
    pub(in crate::train) boxes: Channels,
    /// From an offset to the next.
    pub(in crate::train) step: usize,
}

impl GroupChannels {
    /// Those of anchor `a` of a level whose first output is `output`.
    pub(super) fn new(level: &Level, output: usize, a: usize) -> Self {
        let n = level.anchors.len();
        let of = |output, per_cell, first| Channels { output, per_cell, first };
        match level.layout {
            Layout::Joint => {
                Self { class: of(output, 5 * n, a), boxes: of(output, 5 * n, n + 4 * a), step: 1 }
            }
            Layout::ByKind => Self { class: of(output, 5 * n, a), boxes: of(output, 5 * n, n + a), step: n },
            Layout::Apart { logits } => Self {
                class: of(output, logits * n, logits * a),
                boxes: of(output + 1, 4 * n, 4 * a),
                step: 1,
            },
        }
    }
}

/// Reads and writes anchors' channels in one picture's output maps.
pub(super) struct Head<'a> {
    pub(super) grid: &'a AnchorGrid,
    /// Of every anchor group.
    pub(super) groups: &'a [GroupChannels],
}

/// An anchor's channels.
#[derive(Clone, Copy)]
pub(super) struct Place {
    /// Output and place in the picture's map of its first logit.
    pub(super) class: (usize, usize),
    pub(super) boxes: Offsets,
}

/// Where tx, ty, tw, th are: every `step`-th value of an output from `first` on.
#[derive(Clone, Copy)]
pub(super) struct Offsets {
    output: usize,
    first: usize,
    step: usize,
}

impl Offsets {
    pub(super) fn read(self, maps: &[&[f32]]) -> [f32; 4] {
        [0, 1, 2, 3].map(|k| maps[self.output][self.first + k * self.step])
    }

    fn add(self, slopes: [f32; 4], gradient: &mut [Vec<f32>]) {
        let values = gradient[self.output][self.first..].iter_mut().step_by(self.step);
        values.zip(slopes).for_each(|(to, slope)| *to += slope);
    }
}

impl From<(usize, usize)> for Offsets {
    /// One behind another from this place of this output on.
    fn from((output, first): (usize, usize)) -> Self {
        Self { output, first, step: 1 }
    }
}

impl Head<'_> {
    fn place(&self, group: usize, cell: usize) -> Place {
        let GroupChannels { class, boxes, step } = self.groups[group];
        let (output, first) = boxes.at(cell);
        Place { class: class.at(cell), boxes: Offsets { output, first, step } }
    }

    pub(super) fn at(&self, i: usize) -> Place {
        let group = self.grid.group_of(i);
        self.place(group, i - self.grid.groups[group].first)
    }

    /// Every anchor in order of the flat indices.
    pub(super) fn places(&self) -> impl Iterator<Item = Place> + '_ {
        let cells = move |g: usize| (0..self.grid.groups[g].len()).map(move |cell| self.place(g, cell));
        (0..self.grid.groups.len()).flat_map(cells)
    }

    /// Every anchor's decoded box, pixels.
    pub(super) fn decoded(&self, maps: &[&[f32]], variances: [f32; 2]) -> Vec<BBox> {
        let mut boxes = Vec::with_capacity(self.grid.len);
        for (g, group) in self.grid.groups.iter().enumerate() {
            for cell in 0..group.len() {
                let t = self.place(g, cell).boxes.read(maps);
                boxes.push(group.anchor(cell).decode(&t, variances));
            }
        }
        boxes
    }
}

/// Adds the loss of the offsets `at` on an anchor, times `share`, and its gradient.
pub(super) fn box_loss(
    loss: &LossRecipe,
    Anchor { center, size }: Anchor,
    at: Offsets,
    variances: [f32; 2],
    maps: &[&[f32]],
    face: &BBox,
    share: f32,
    gradient: &mut [Vec<f32>],
    losses: &mut Losses,
) {
    let (anchor, target) = ([center[0], center[1], size[0], size[1]], [face.x1, face.y1, face.x2, face.y2]);
    let value = loss.boxes.value(at.read(maps), anchor, variances, target);
    losses.boxes += f64::from(value.loss * share);
    losses.iou += f64::from(value.iou);
    at.add(value.gradient.map(|slope| slope * share * loss.box_weight), gradient);
}
