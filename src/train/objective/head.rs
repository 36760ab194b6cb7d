//! Anchors' channels in one picture's output maps.

use super::{Layout, Level};
use crate::detect::BBox;
use crate::train::matching::AnchorGrid;

/// Where an anchor group's channels are: of a cell's `per_cell` in an output, those from `first` on.
#[derive(Clone, Copy)]
pub(super) struct Channels {
    pub(super) output: usize,
    pub(super) per_cell: usize,
    pub(super) first: usize,
}

impl Channels {
    /// Output and place in the picture's map of the first one of a cell.
    pub(super) fn at(&self, cell: usize) -> (usize, usize) {
        (self.output, cell * self.per_cell + self.first)
    }
}

/// Where the logits and the offsets of an anchor group are.
#[derive(Clone, Copy)]
pub(super) struct GroupChannels {
    class: Channels,
    boxes: Channels,
}

impl GroupChannels {
    /// Those of anchor `a` of a level whose first output is `output`.
    pub(super) fn new(level: &Level, output: usize, a: usize) -> Self {
        let n = level.anchors.len();
        let of = |output, per_cell, first| Channels { output, per_cell, first };
        match level.layout {
            Layout::Joint => Self { class: of(output, 5 * n, a), boxes: of(output, 5 * n, n + 4 * a) },
            Layout::Apart { logits } => {
                Self { class: of(output, logits * n, logits * a), boxes: of(output + 1, 4 * n, 4 * a) }
            }
        }
    }
}

/// Reads and writes anchors' channels in one picture's output maps.
pub(super) struct Head<'a> {
    pub(super) grid: &'a AnchorGrid,
    /// Of every anchor group.
    pub(super) groups: &'a [GroupChannels],
}

/// An anchor's channels: output and place in the picture's map of its first logit and of its first offset.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub(super) class: (usize, usize),
    pub(super) boxes: (usize, usize),
}

impl Place {
    pub(super) fn offsets(&self, maps: &[&[f32]]) -> [f32; 4] {
        let (output, at) = self.boxes;
        let t = &maps[output][at..at + 4];
        [t[0], t[1], t[2], t[3]]
    }
}

impl Head<'_> {
    fn place(&self, group: usize, cell: usize) -> Place {
        let GroupChannels { class, boxes } = self.groups[group];
        Place { class: class.at(cell), boxes: boxes.at(cell) }
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
                let t = self.place(g, cell).offsets(maps);
                boxes.push(group.anchor(cell).decode(&t, variances));
            }
        }
        boxes
    }
}
