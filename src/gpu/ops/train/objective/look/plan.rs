//! Sizes of a choice, where its arrays lie, and the kernels' structs.

use super::super::check::{checked_groups, count_of};
use super::super::{AnchorGroup, Anchors, Miner, Pieces, Places, COUNTS};
use super::{Choice, LookRules, Proposed, Score};
use crate::error::{Error, Result};

/// `ProposeArgs` of `cuda/train_look.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct ProposeArgs {
    anchors: Anchors,
    first: u64,
    turns: u64,
    values: u64,
    keys: u64,
    found: u64,
    best: u64,
    sorted: u64,
    held: u64,
    faces: u64,
    starts: u64,
    scales: u64,
    boxes: u64,
    inputs: u64,
    filled: u64,
    scale_count: u32,
    capacity: u32,
    before: u32,
    proposals: u32,
    overlap: f32,
    survives: f32,
    least: f32,
    reach: f32,
    pair: i32,
    faces_first: i32,
}

/// `WriteArgs` of `cuda/train_look.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct WriteArgs {
    boxes: u64,
    inputs: u64,
    label: u64,
    chosen: u64,
    starts: u64,
    weights: u64,
    counts: u64,
    tally: u64,
    totals: u64,
    rows: u64,
    anchors: u64,
    row_label: u64,
    row_weight: u64,
    pictures: u32,
    ranges: u32,
    capacity: u32,
    runs: u32,
    grouped: i32,
    weight: f32,
}

/// Sizes of a choice.
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    pub pictures: u32,
    /// Anchors of a picture.
    pub count: u32,
    pub before: u32,
    /// Ranges of slots, and slots of each.
    pub ranges: u32,
    pub capacity: u32,
    /// Runs of a picture's rows, and inputs.
    pub runs: u32,
    pub inputs: u32,
    pub faces: u32,
}

impl Sizes {
    pub fn new(batch: &Proposed<'_>, rules: &LookRules<'_>, count: u32) -> Result<Self> {
        let wanted = |own: &Vec<([f32; 4], bool)>| own.iter().filter(|(_, ignored)| !ignored).count();
        let most_faces = batch.faces.iter().map(wanted).max().unwrap_or(0);
        let before = rules.before.min(count as usize);
        let (ranges, runs, inputs, capacity) = match rules.choice {
            Choice::All { inputs, .. } => (1, inputs, inputs, rules.proposals.min(before + most_faces)),
            Choice::Sampled { scales, rule, .. } => {
                let runs = if rule.grouped { 2 * scales.len() } else { 2 };
                (scales.len(), runs, 1, rules.proposals.min(before) + most_faces)
            }
        };
        if ranges == 0 || inputs == 0 || batch.faces.is_empty() {
            return Err(Error::Internal("a choice of boxes without a range, an input or a picture".into()));
        }
        let capacity = capacity.max(1);
        let slots = ranges.saturating_mul(capacity).saturating_mul(batch.faces.len());
        // Kernels count slots in 31 bits, and number those of a picture twice.
        if slots > i32::MAX as usize / 2 {
            return Err(Error::LimitExceeded("a batch has too many boxes for the device".into()));
        }
        Ok(Self {
            pictures: count_of(batch.faces.len())?,
            count,
            before: count_of(before)?,
            ranges: count_of(ranges)?,
            capacity: count_of(capacity)?,
            runs: count_of(runs)?,
            inputs: count_of(inputs)?,
            faces: count_of(batch.faces.iter().map(Vec::len).sum())?,
        })
    }

    /// Of a picture.
    pub fn slots(&self) -> u32 {
        self.ranges * self.capacity
    }

    /// Most rows that there can be: one of each input, and all slots. With ranges a box is in one of them alone.
    pub fn rows(&self) -> u64 {
        u64::from(self.pictures) * u64::from(self.capacity) + u64::from(self.inputs)
    }
}

/// What was brought to the device for a choice, by address.
pub(super) struct Brought {
    pub groups: u64,
    pub first: u64,
    pub turns: u64,
    pub ranges: u64,
    pub seeds: u64,
    pub faces: u64,
    pub starts: u64,
    pub wanted: u64,
    pub wanted_starts: u64,
    pub scales: u64,
}

/// Arrays of a choice, by address. From the first to `zeros` they are zeros at first, from there to `ones` all bits are set.
pub(super) struct Parts {
    // A value a face, two, then a value a picture and run, an input.
    hit: u64,
    held: u64,
    claims: u64,
    counts: u64,
    tally: u64,
    pub totals: u64,
    // A value a slot, but for `overlap`, a value a row.
    filled: u64,
    chosen: u64,
    pub row_overlap: u64,
    pub zeros: u64,
    /// A slot's box; no number where it is empty.
    boxes: u64,
    pub row_mined: u64,
    pub ones: u64,
    // A value a candidate of every picture.
    keys: u64,
    found: u64,
    // One of each that enters the suppression; a value a picture.
    best: u64,
    sorted: u64,
    best_held: u64,
    // A value a slot; `work` three.
    inputs: u64,
    label: u64,
    best_face: u64,
    overlap: u64,
    list: u64,
    work: u64,
    // A choice of every picture.
    choices: u64,
    weights: u64,
    // A row.
    pub anchors: u64,
    pub row_label: u64,
    pub row_weight: u64,
    pub end: u64,
}

impl Parts {
    /// From an address on.
    pub fn new(base: u64, sizes: &Sizes) -> Self {
        let mut pieces = Pieces(base);
        let pictures = u64::from(sizes.pictures);
        let (faces, rows) = (u64::from(sizes.faces), sizes.rows());
        let [all, entries, slots] =
            [sizes.count, sizes.before, sizes.slots()].map(|of_picture| u64::from(of_picture) * pictures);
        let choices = u64::from(sizes.ranges) * pictures;
        let mut parts = Self {
            hit: pieces.take(faces, 4),
            held: pieces.take(faces, 4),
            claims: pieces.take(faces, 8),
            counts: pieces.take(COUNTS as u64, 4),
            tally: pieces.take(u64::from(sizes.runs) * pictures, 4),
            totals: pieces.take(u64::from(sizes.inputs), 4),
            filled: pieces.take(slots, 1),
            chosen: pieces.take(slots, 1),
            row_overlap: pieces.take(rows, 4),
            zeros: pieces.0,
            boxes: pieces.take(slots, 16),
            row_mined: pieces.take(rows, 4),
            ones: pieces.0,
            keys: pieces.take(all, 8),
            found: pieces.take(all, 32),
            best: pieces.take(entries, 8),
            sorted: pieces.take(entries, 32),
            best_held: pieces.take(pictures, 4),
            inputs: pieces.take(slots, 4),
            label: pieces.take(slots, 4),
            best_face: pieces.take(slots, 4),
            overlap: pieces.take(slots, 4),
            list: pieces.take(slots, 4),
            work: pieces.take(slots, 12),
            choices: pieces.take(choices, 16),
            weights: pieces.take(choices, 8),
            anchors: pieces.take(rows, 16),
            row_label: pieces.take(rows, 4),
            row_weight: pieces.take(rows, 8),
            end: 0,
        };
        parts.end = pieces.0;
        parts
    }
}

/// Sizes of a choice that kernels can make: arrays are as long as they must be, every group's values lie in the outputs, every candidate
/// has a place.
pub(super) fn checked(batch: &Proposed<'_>, rules: &LookRules<'_>) -> Result<Sizes> {
    let bad = |what: &str| Err(Error::Internal(format!("a second look on a device: {what}")));
    let first = batch.first.map_or(&[][..], |(groups, _)| groups);
    let logits = if rules.score == Score::Logit { 1 } else { 2 };
    let count = checked_groups(batch.groups, first, batch.outputs, logits, batch.faces.len())?;
    let sizes = Sizes::new(batch, rules, count)?;
    if batch.first.is_some() && first.len() != batch.groups.len() || batch.turns.len() != batch.groups.len() {
        return bad("not a turn or not a first step of each group");
    }
    let all = AnchorGroup::LOGITS | AnchorGroup::BOXES;
    let same = |(g, of_first): (&AnchorGroup, &AnchorGroup)| g.cells == of_first.cells;
    if batch.groups.iter().any(|g| g.parts != all) || !batch.groups.iter().zip(first).all(same) {
        return bad("a group without logits or boxes, or a first step of other groups");
    }
    let places = batch.groups.iter().zip(batch.turns).filter(|(g, _)| g.cells > 0);
    let last = |cells: u32, first: u32, step: u32| u64::from(first) + u64::from(cells - 1) * u64::from(step);
    if places
        .clone()
        .any(|(g, t)| last(g.cells, t.first, t.step) >= u64::from(count) || t.input >= sizes.inputs)
    {
        return bad("a candidate without a place or an input");
    }
    let fits = |(faces, inputs): (&Vec<_>, &Vec<u32>)| {
        faces.len() == inputs.len() && inputs.iter().all(|&input| input < sizes.inputs)
    };
    if batch.face_inputs.len() != batch.faces.len() || !batch.faces.iter().zip(batch.face_inputs).all(fits) {
        return bad("a face without an input");
    }
    if let Choice::Sampled { rule, .. } = &rules.choice {
        if !matches!(rule.miner, Miner::All | Miner::Random) || batch.seeds.len() != batch.faces.len() {
            return bad("a sampler that looks at losses, or not a seed for each picture");
        }
    }
    // Counts of all parts are summed up in 32 bits.
    let parts = batch.others.map_or(1, |others| others.parts()) as u128;
    if parts * u128::from(sizes.slots()) * u128::from(sizes.pictures) > u128::from(u32::MAX) {
        return Err(Error::LimitExceeded("a batch of all processes has too many boxes".into()));
    }
    // As RoIAlign wants them; of proposals no others are left.
    let wanted = batch.faces.iter().flatten().filter(|(_, ignored)| !ignored);
    if wanted.flat_map(|(corners, _)| corners).any(|v| !v.is_finite()) {
        return Err(Error::InvalidArgument("a face to be looked at is not finite".into()));
    }
    Ok(sizes)
}

/// What matching and sampling are told.
pub(super) fn places(sizes: &Sizes, brought: &Brought, parts: &Parts) -> Places {
    let slots = Anchors { groups: brought.ranges, moved: 0, group_count: sizes.ranges, count: sizes.slots() };
    Places {
        anchors: slots,
        first_anchors: slots,
        pictures: sizes.pictures,
        faces: brought.faces,
        face_count: sizes.faces,
        starts: brought.starts,
        seeds: brought.seeds,
        seen: parts.filled,
        boxes: parts.boxes,
        label: parts.label,
        mined: parts.best_face,
        overlap: parts.overlap,
        list: parts.list,
        work: parts.work,
        chosen: parts.chosen,
        hit: parts.hit,
        held: parts.held,
        claims: parts.claims,
        counts: parts.counts,
        choices: parts.choices,
        weights: parts.weights,
        ..Places::default()
    }
}

/// What the kernels are told that propose.
pub(super) fn propose_args(
    sizes: &Sizes,
    brought: &Brought,
    parts: &Parts,
    batch: &Proposed<'_>,
    rules: &LookRules<'_>,
) -> Result<ProposeArgs> {
    let sampled = matches!(rules.choice, Choice::Sampled { .. });
    let (pair, least) = match rules.score {
        Score::Logit => (false, f32::NEG_INFINITY),
        Score::Pair { least } => (true, least),
    };
    let (first, survives) = batch.first.map_or((0, 0.0), |(_, survives)| (brought.first, survives));
    Ok(ProposeArgs {
        anchors: Anchors {
            groups: brought.groups,
            moved: 0,
            group_count: count_of(batch.groups.len())?,
            count: sizes.count,
        },
        first,
        turns: brought.turns,
        values: batch.outputs.address(batch.outputs.len)?,
        keys: parts.keys,
        found: parts.found,
        best: parts.best,
        sorted: parts.sorted,
        held: parts.best_held,
        faces: brought.wanted,
        starts: brought.wanted_starts,
        scales: brought.scales,
        boxes: parts.boxes,
        inputs: parts.inputs,
        filled: parts.filled,
        scale_count: if sampled { sizes.ranges } else { 0 },
        capacity: sizes.capacity,
        before: sizes.before,
        proposals: rules.proposals.min(u32::MAX as usize) as u32,
        overlap: rules.overlap,
        survives,
        least,
        reach: rules.reach.unwrap_or(0.0),
        pair: pair.into(),
        faces_first: (!sampled).into(),
    })
}

/// What the kernels are told that write `rows`.
pub(super) fn write_args(
    sizes: &Sizes,
    brought: &Brought,
    parts: &Parts,
    choice: &Choice<'_>,
    rows: u64,
) -> WriteArgs {
    let (sampled, grouped, weight) = match *choice {
        Choice::All { weight, .. } => (false, false, weight),
        Choice::Sampled { rule, share, .. } => (true, rule.grouped, share),
    };
    WriteArgs {
        boxes: parts.boxes,
        inputs: parts.inputs,
        label: parts.label,
        chosen: if sampled { parts.chosen } else { 0 },
        starts: brought.starts,
        weights: parts.weights,
        counts: parts.counts,
        tally: parts.tally,
        totals: parts.totals,
        rows,
        anchors: parts.anchors,
        row_label: parts.row_label,
        row_weight: parts.row_weight,
        pictures: sizes.pictures,
        ranges: sizes.ranges,
        capacity: sizes.capacity,
        runs: sizes.runs,
        grouped: grouped.into(),
        weight,
    }
}
