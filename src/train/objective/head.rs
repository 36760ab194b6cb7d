//! Anchors' channels in one picture's output maps.

use super::Level;
use crate::detect::BBox;
use crate::train::matching::AnchorGrid;

/// Reads and writes anchors' channels in one picture's output maps.
pub(super) struct Head<'a> {
    pub(super) levels: &'a [Level],
    pub(super) grid: &'a AnchorGrid,
    /// Output and place of every anchor group.
    pub(super) groups: &'a [(usize, usize)],
}

/// An anchor's channels: its output, and the places of its logit and offsets in the picture's map.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub(super) level: usize,
    pub(super) logit: usize,
    pub(super) offsets: usize,
}

impl Place {
    pub(super) fn offsets(&self, maps: &[&[f32]]) -> [f32; 4] {
        let t = &maps[self.level][self.offsets..self.offsets + 4];
        [t[0], t[1], t[2], t[3]]
    }
}

impl Head<'_> {
    fn place(&self, group: usize, cell: usize) -> Place {
        let (level, a) = self.groups[group];
        let anchors = self.levels[level].anchors.len();
        let pixel = cell * 5 * anchors;
        Place { level, logit: pixel + a, offsets: pixel + anchors + 4 * a }
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
