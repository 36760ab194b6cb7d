//! What is asked of a batch before kernels read it.

use super::{AnchorGroup, Batch, ClassRule, Rules, Values};
use crate::error::{Error, Result};

pub(super) fn count_of(values: usize) -> Result<u32> {
    u32::try_from(values).map_err(|_| Error::LimitExceeded("a batch is too large for the device".into()))
}

/// Anchors of a picture, where arrays are as long as they must be and every group's values lie in the outputs.
pub(super) fn checked(batch: &Batch<'_>, rules: &Rules) -> Result<u32> {
    let bad = |what: &str| Err(Error::Internal(format!("an objective on a device: {what}")));
    let pictures = batch.faces.len();
    if batch.inside.is_some_and(|inside| inside.len() != pictures) {
        return bad("not a border for each picture");
    }
    if rules.sampling.is_some() && batch.seeds.len() != pictures {
        return bad("not a seed for each picture");
    }
    const LOGITS: u32 = AnchorGroup::LOGITS;
    const BOXES: u32 = AnchorGroup::BOXES;
    if batch.groups.iter().any(|g| g.parts != LOGITS | BOXES) {
        return bad("a group without logits or without boxes");
    }
    if let Some(first) = &batch.first {
        let same = |(g, of_first): (&AnchorGroup, &AnchorGroup)| {
            let cells = |g: &AnchorGroup| (g.first, g.cells, g.columns, g.stride, g.width, g.height);
            cells(g) == cells(of_first) && matches!(of_first.parts, 0 | LOGITS | BOXES)
        };
        if first.groups.len() != batch.groups.len() || !batch.groups.iter().zip(first.groups).all(same) {
            return bad("a first step of other groups");
        }
        if !matches!(rules.loss.class, ClassRule::Sigmoid | ClassRule::Focal { .. })
            || rules.variances != [1.0; 2]
            || batch.inside.is_some()
        {
            return bad("rules that are not for two steps");
        }
    }
    let first = batch.first.map_or(&[][..], |first| first.groups);
    let count = checked_groups(batch.groups, first, batch.outputs, rules.loss.class.logits(), pictures)?;
    // Counts of all parts are summed up in 32 bits.
    if u128::from(count) * batch.whole() as u128 > u128::from(u32::MAX) {
        return Err(Error::LimitExceeded("a batch of all processes has too many anchors".into()));
    }
    Ok(count)
}

/// Anchors of a picture, where groups number them in a row, and their values and those of a first step lie in the outputs.
pub(super) fn checked_groups(
    groups: &[AnchorGroup],
    first: &[AnchorGroup],
    outputs: Values<'_>,
    logits: u32,
    pictures: usize,
) -> Result<u32> {
    let bad = |what: &str| Err(Error::Internal(format!("an objective on a device: {what}")));
    outputs.address(outputs.len)?;
    let mut count = 0u64;
    for g in groups {
        if u64::from(g.first) != count {
            return bad("anchors are not numbered in a row");
        }
        count += u64::from(g.cells);
        if g.cells > 0 && (g.columns == 0 || !g.cells.is_multiple_of(g.columns)) {
            return bad("a group's cells are no rows");
        }
    }
    for g in groups.iter().chain(first) {
        if g.cells == 0 {
            continue;
        }
        let inside = |part: u32, first: i64, picture: i64, cell: u32, more: u32| {
            let pictures = i128::from(picture) * (pictures as i128 - 1).max(0);
            let cells = i128::from(cell) * i128::from(g.cells - 1);
            let last = i128::from(first) + pictures + cells + i128::from(more);
            g.parts & part == 0 || first >= 0 && picture >= 0 && last < outputs.len as i128
        };
        if !inside(AnchorGroup::LOGITS, g.logits, g.logit_picture, g.logit_cell, logits - 1)
            || !inside(AnchorGroup::BOXES, g.boxes, g.box_picture, g.box_cell, 3 * g.box_step)
        {
            return bad("a group's values lie outside the outputs");
        }
    }
    // Kernels count anchors in 31 bits, pictures along a grid's second axis.
    if count * pictures as u64 > i32::MAX as u64 || pictures > 65_535 {
        return Err(Error::LimitExceeded("a batch has too many anchors for the device".into()));
    }
    Ok(count as u32)
}
