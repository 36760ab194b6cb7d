//! Random pictures of every format, stride, region and orientation, and levels and windows of them.

use farface::pixels::*;
use proptest::prelude::*;

pub const FORMATS: [PixelFormat; 10] = [
    PixelFormat::Gray8,
    PixelFormat::Rgb8,
    PixelFormat::Bgr8,
    PixelFormat::Rgba8,
    PixelFormat::Bgra8,
    PixelFormat::RgbPlanarF32,
    PixelFormat::Nv12,
    PixelFormat::Nv21,
    PixelFormat::I420,
    PixelFormat::Yuyv,
];

/// A random picture in its own memory.
#[derive(Clone, Debug)]
pub struct Picture {
    pub size: Size,
    pub format: PixelFormat,
    /// (bytes, stride, bytes before the first row: they shift the alignment)
    pub planes: Vec<(Vec<u8>, isize, usize)>,
    pub matrix: ColorMatrix,
    pub range: ColorRange,
    pub orientation: Orientation,
    pub roi: Rect,
}

impl Picture {
    pub fn view(&self) -> ImageView<'_> {
        let planes: Vec<_> = self.planes.iter().map(|(d, s, skip)| Plane::new(&d[*skip..], *s)).collect();
        ImageView::new(self.size.width, self.size.height, self.format, &planes)
            .and_then(|v| v.with_roi(self.roi))
            .expect("a valid picture")
            .with_color(self.matrix, self.range)
            .with_orientation(self.orientation)
    }
}

pub fn norm() -> impl Strategy<Value = Normalization> {
    let mean = [0.0..128f32, 0.0..128f32, 0.0..128f32];
    let scale = [0.003..2f32, 0.003..2f32, 0.003..2f32];
    (any::<bool>(), mean, scale).prop_map(|(bgr, mean, scale)| {
        let order = if bgr { ChannelOrder::Bgr } else { ChannelOrder::Rgb };
        Normalization { order, mean, scale }
    })
}

pub fn picture() -> impl Strategy<Value = Picture> {
    // Rows and columns are decoded and normalised in blocks of 64 px, so some pictures are longer.
    let sides = prop_oneof![6 => (1usize..24, 1usize..24), 1 => (60usize..300, 1usize..6), 1 => (1usize..6, 60usize..300)];
    let shape = (sides, 0..FORMATS.len(), 0usize..8);
    let layout = ([0usize..9, 0usize..9, 0usize..9], any::<[bool; 3]>(), [0usize..4, 0usize..4, 0usize..4]);
    let region = [0.0..1f64, 0.0..1f64, 0.0..1f64, 0.0..1f64];
    (shape, layout, region, any::<[bool; 3]>(), any::<u64>()).prop_map(
        |(((width, height), format, orientation), (padding, bottom_up, skip), region, flags, seed)| {
            let format = FORMATS[format];
            let mut state = seed;
            let mut random = move || {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                (state >> 33) as u32
            };
            let mut planes = Vec::new();
            for p in 0..format.planes() {
                let row = format.row_bytes(p, width).unwrap();
                let stride = row + padding[p];
                // Exactly as long as it must be: the last row in memory has no padding.
                let len = skip[p] + stride * (format.rows(p, height) - 1) + row;
                let mut data: Vec<u8> = (0..len).map(|_| random() as u8).collect();
                if format == PixelFormat::RgbPlanarF32 {
                    for at in (0..height).flat_map(|y| (0..width).map(move |x| skip[p] + y * stride + 4 * x))
                    {
                        let value = random() as f32 % 256.0 * (255.0 / 256.0);
                        data[at..at + 4].copy_from_slice(&value.to_ne_bytes());
                    }
                }
                planes.push((data, if bottom_up[p] { -(stride as isize) } else { stride as isize }, skip[p]));
            }
            // Squares make small offsets and nearly whole lengths the common case.
            let cut = |n: usize, a: f64, b: f64| {
                let start = (a * a * n as f64) as usize;
                (start, (1 + ((1.0 - b * b) * (n - start) as f64) as usize).min(n - start))
            };
            let ((x, w), (y, h)) = (cut(width, region[0], region[1]), cut(height, region[2], region[3]));
            Picture {
                size: Size::new(width, height),
                format,
                planes,
                matrix: if flags[0] { ColorMatrix::Bt601 } else { ColorMatrix::Bt709 },
                range: if flags[1] { ColorRange::Full } else { ColorRange::Limited },
                orientation: Orientation::ALL[orientation],
                roi: if flags[2] { Rect::new(x, y, w, h) } else { Rect::new(0, 0, width, height) },
            }
        },
    )
}

/// How a level's side follows from the picture's: kept, enlarged, shrunk a little, by half, a lot.
pub fn level() -> impl Strategy<Value = ([u8; 2], [f64; 2])> {
    ([0u8..5, 0u8..5], [0.0..1f64, 0.0..1f64])
}

pub fn level_of(upright: Size, (pick, by): ([u8; 2], [f64; 2])) -> Size {
    let side = |n: usize, pick: u8, by: f64| match pick {
        0 => n,
        1 => n + (by * 2.0 * n as f64) as usize,
        2 => n.div_ceil(2) + (by * 0.5 * n as f64) as usize,
        3 => n.div_ceil(2),
        _ => 1 + (by * 0.5 * n as f64) as usize,
    };
    Size::new(side(upright.width, pick[0], by[0]), side(upright.height, pick[1], by[1]))
}

pub fn window_side() -> impl Strategy<Value = usize> {
    prop_oneof![4 => 1usize..40, 1 => 40usize..300]
}
