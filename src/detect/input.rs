//! From a picture to the network's input, rows shared between the threads.

use super::options::MAX_THREADS;
use super::passes::Pass;
use crate::cpu::{Arena, Pool, View};
use crate::error::{Error, Result};
use crate::pixels::{fill, DstRows, ImageView, Normalization, Rect, Scratch, Size};
use std::ops::Range;

/// (upright width, level width, window width) of every pass, for the conversion's row buffers.
pub(super) fn scratch_widths(size: Size, passes: &[Pass]) -> impl Iterator<Item = [usize; 3]> + '_ {
    passes.iter().flat_map(move |p| p.windows().map(move |w| [size.width, p.level.size.width, w.width]))
}

/// Writes the window of the level into the network's input.
pub(super) fn fill_input(
    image: &ImageView<'_>,
    level: Size,
    window: Rect,
    norm: &Normalization,
    (arena, input): (&mut Arena, &View),
    pool: &mut Pool,
    scratch: &mut [Scratch],
) -> Result<()> {
    struct Share<'a> {
        rows: Range<usize>,
        data: &'a mut [f32],
        scratch: Option<&'a mut Scratch>,
        result: Result<()>,
    }
    let threads = pool.threads();
    let height = window.height;
    let mut rest = &mut arena.floats_mut()[input.offset..];
    let mut scratches = scratch.iter_mut();
    let mut done = 0;
    // On the stack; the entries past the threads stay empty.
    let mut shares: [Share; MAX_THREADS] = std::array::from_fn(|i| {
        let end = height * (i + 1).min(threads) / threads;
        let rows = std::mem::replace(&mut done, end)..end;
        let floats = (rows.len() * input.row).min(rest.len());
        let (data, others) = std::mem::take(&mut rest).split_at_mut(floats);
        rest = others;
        Share { rows, data, scratch: scratches.next(), result: Ok(()) }
    });
    pool.run_each(&mut shares, |_, share| {
        let Some(scratch) = share.scratch.as_deref_mut() else {
            share.result = Err(Error::Internal("a thread without row buffers".into()));
            return;
        };
        let mut dst = DstRows::new(share.data, input.row, input.pixel);
        share.result = fill(image, level, window, share.rows.clone(), norm, &mut dst, scratch);
    });
    shares.into_iter().try_for_each(|share| share.result)
}
