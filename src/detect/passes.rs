//! What one picture costs: its pyramid levels and how each is cut into tiles.

use super::detector::wants;
use super::model::Model;
use super::options::{Options, Pyramid};
use crate::error::{Error, Result};
use crate::graph::Want;
use crate::pixels::{
    keep_for_faces, largest_tile, pyramid, FaceRange, Level, PyramidLimits, PyramidPolicy, Size, TileGrid,
};
use crate::shape::Shape;

/// One level of a picture.
pub(super) struct Pass {
    pub level: Level,
    /// Size that the network sees, tiles together: the level's, or that with zeros to the right and below.
    pub padded: Size,
    pub grid: TileGrid,
    /// What is asked for of the network's outputs.
    pub wants: Vec<Want>,
}

impl Pass {
    /// Sizes of the windows, most of them many times.
    pub fn windows(&self) -> impl Iterator<Item = Size> + '_ {
        self.grid.iter().map(|t| t.window.size())
    }

    /// Whether windows of this size are computed, with these wants.
    pub fn has(&self, window: Size, wants: &[Want]) -> bool {
        self.wants == wants && self.windows().any(|w| w == window)
    }
}

/// What a detection does on one scale of the picture.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LevelCost {
    /// Network pixels per pixel of the picture.
    pub scale: f64,
    /// Size of the picture at this scale.
    pub size: Size,
    /// Tiles that it is cut into.
    pub tiles: usize,
    /// Pixels that the network computes: those of all tiles, their overlaps counted again, twice with `flip`.
    pub network_pixels: u64,
}

/// What each level of a picture costs.
pub(super) fn costs(passes: &[Pass], options: &Options) -> Vec<LevelCost> {
    let times = if options.flip { 2 } else { 1 };
    let cost = |p: &Pass| LevelCost {
        scale: p.level.scale,
        size: p.level.size,
        tiles: p.grid.len(),
        network_pixels: p.grid.window_pixels().saturating_mul(times),
    };
    passes.iter().map(cost).collect()
}

/// The network's input for a window.
pub(super) fn input_shape(window: Size) -> Shape {
    Shape::new(1, 3, window.height, window.width)
}

/// Bytes of arena that the network takes for a window of this size.
pub(super) type ArenaBytes<'a> = &'a dyn Fn(Size) -> Result<u64>;

/// Levels of a picture of upright size `size`, each cut so that its arena takes at most `budget` bytes.
pub(super) fn passes(
    model: &Model,
    arena: ArenaBytes<'_>,
    options: &Options,
    size: Size,
    budget: u64,
) -> Result<Vec<Pass>> {
    let levels = levels(model, options, size)?;
    let mut passes = Vec::with_capacity(levels.len());
    for level in levels {
        let padded = padded(model, level.size);
        // A little more, for sizes are rounded.
        let least = options.min_face_px * level.scale as f32 * 0.999;
        let greatest = options.max_face_px * level.scale as f32 * 1.001;
        let greatest = if greatest > 0.0 { greatest } else { f32::INFINITY };
        let wants = wants(model.detector(), [least, greatest]);
        passes.push(Pass { level, padded, grid: grid(model, arena, options, padded, budget)?, wants });
    }
    Ok(passes)
}

/// 2^exponent. Not inlined: the compiler would compute it before it is known whether there is an exponent, which memory checkers take
/// for a read of uninitialised memory.
#[inline(never)]
fn scale_of(exponent: f64) -> f64 {
    exponent.exp2()
}

fn levels(model: &Model, o: &Options, size: Size) -> Result<Vec<Level>> {
    let [min, max] = model.config().detectable_px.map(f64::from);
    let detectable = FaceRange { min, max };
    let limited = o.min_face_px > 0.0 || o.max_face_px > 0.0;
    let faces = FaceRange {
        min: if o.min_face_px > 0.0 { o.min_face_px.into() } else { min.min(o.max_face_px.into()) },
        max: if o.max_face_px > 0.0 { o.max_face_px.into() } else { f64::INFINITY },
    };
    // Levels on which even the smallest face wanted is too large are not asked for at all.
    let most = if limited { detectable.max / faces.min * (1.0 + 1e-9) } else { f64::INFINITY };
    let own = model.config().pyramid.filter(|_| o.pyramid == Pyramid::Auto);
    let (policy, largest) = match (o.pyramid, own) {
        (Pyramid::Auto, Some(own)) => {
            let mut scales = own.scales([size.width as f64, size.height as f64]);
            scales.retain(|&s| s <= most);
            let Some(&largest) = scales.first() else { return Ok(Vec::new()) };
            (PyramidPolicy::Scales(scales), largest)
        }
        (Pyramid::Auto, None) if !limited => (PyramidPolicy::Scales(vec![1.0]), 1.0),
        (Pyramid::Auto, None) => (PyramidPolicy::Faces { faces, detectable }, min / faces.min),
        (Pyramid::Octaves { min, max, step }, _) => {
            let [min, mut max, step] = [min, max, step].map(f64::from);
            while scale_of(max) > most && max >= min && step > 0.0 {
                max -= step;
            }
            if max < min && limited {
                return Ok(Vec::new());
            }
            (PyramidPolicy::Octaves { min, max, step }, scale_of(max))
        }
        (Pyramid::Scales(scales), _) => {
            let wanted = scales.as_slice().iter().map(|&s| f64::from(s));
            let mut wanted: Vec<f64> = wanted.filter(|&s| s <= most).collect();
            let Some(largest) = wanted.iter().copied().reduce(f64::max) else { return Ok(Vec::new()) };
            wanted.sort_by(|a, b| b.total_cmp(a));
            (PyramidPolicy::Scales(wanted), largest)
        }
    };
    let mut levels = pyramid(size, &policy, &PyramidLimits::default())?;
    // Levels beyond the caps are left out, largest first. Their faces would be missed unnoticed.
    if levels.first().is_none_or(|l| l.scale < largest * (1.0 - 1e-6)) {
        return Err(Error::LimitExceeded(format!(
            "{}x{} px enlarged {largest} times is beyond the caps of a level; raise min_face_px or lower the pyramid",
            size.width, size.height
        )));
    }
    let fixed = own.is_some() || o.pyramid != Pyramid::Auto;
    if fixed && limited {
        keep_for_faces(&mut levels, faces, detectable)?;
    }
    Ok(levels)
}

/// Bilinear enlargement to the size of another map is by 2 all over a map only where that has whole strides: else it
/// drifts, and a tile would not show what the whole does. Networks that have it see whole strides.
fn padded(model: &Model, level: Size) -> Size {
    if !model.interpolates() {
        return level;
    }
    let [y, x] = model.reach().stride;
    Size::new(level.width.next_multiple_of(x), level.height.next_multiple_of(y))
}

/// How a level is cut: not at all where it fits the budget and the tile size.
fn grid(
    model: &Model,
    arena: ArenaBytes<'_>,
    options: &Options,
    level: Size,
    budget: u64,
) -> Result<TileGrid> {
    let reach = model.reach();
    let align = reach.stride[0].max(reach.stride[1]);
    let halo = reach.pixels[0].max(reach.pixels[1]);
    if halo == usize::MAX {
        // An output sees the whole picture: it cannot be cut.
        let need = arena(level)?;
        if need > budget {
            return Err(Error::LimitExceeded(format!(
                "{}x{} px need {need} bytes and this network's pictures cannot be cut; raise the memory cap",
                level.width, level.height
            )));
        }
        return TileGrid::new(level, level, 1, 0);
    }
    let fits = largest_tile(level, align, halo, budget, |s| arena(s).ok())?;
    let tile = match options.tile_px {
        0 => fits,
        side => Size::new(fits.width.min(side), fits.height.min(side)),
    };
    TileGrid::new(level, tile, align, halo)
}
