//! Pictures into network input: every format, stride, orientation, region and scale against a naive
//! f64 reference; windows and row splits bit for bit; malformed views refused; no allocation.

#[path = "common/pictures.rs"]
mod pictures;

use farface::pixels::*;
use pictures::*;
use proptest::prelude::*;
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// What the formats and orientations mean, written out.
impl Picture {
    fn byte(&self, plane: usize, y: usize, at: usize) -> u8 {
        let (data, stride, skip) = &self.planes[plane];
        let rows = match (self.format, plane) {
            (PixelFormat::Nv12 | PixelFormat::Nv21 | PixelFormat::I420, 1..) => self.size.height.div_ceil(2),
            _ => self.size.height,
        };
        let row_0 = if *stride < 0 { (rows - 1) as isize * -stride } else { 0 };
        data[*skip + (row_0 + y as isize * stride) as usize + at]
    }

    /// Red, green, blue of a stored pixel, written out from the format's definition.
    fn stored_rgb(&self, x: usize, y: usize) -> [f64; 3] {
        let b = |plane, y, at| f64::from(self.byte(plane, y, at));
        let (cx, cy) = (x / 2, y / 2);
        match self.format {
            PixelFormat::Gray8 => [b(0, y, x); 3],
            PixelFormat::Rgb8 => [b(0, y, 3 * x), b(0, y, 3 * x + 1), b(0, y, 3 * x + 2)],
            PixelFormat::Bgr8 => [b(0, y, 3 * x + 2), b(0, y, 3 * x + 1), b(0, y, 3 * x)],
            PixelFormat::Rgba8 => [b(0, y, 4 * x), b(0, y, 4 * x + 1), b(0, y, 4 * x + 2)],
            PixelFormat::Bgra8 => [b(0, y, 4 * x + 2), b(0, y, 4 * x + 1), b(0, y, 4 * x)],
            PixelFormat::RgbPlanarF32 => [0, 1, 2].map(|p| {
                let bytes = [0, 1, 2, 3].map(|i| self.byte(p, y, 4 * x + i));
                f64::from(f32::from_ne_bytes(bytes))
            }),
            PixelFormat::Nv12 => self.yuv(b(0, y, x), b(1, cy, 2 * cx), b(1, cy, 2 * cx + 1)),
            PixelFormat::Nv21 => self.yuv(b(0, y, x), b(1, cy, 2 * cx + 1), b(1, cy, 2 * cx)),
            PixelFormat::I420 => self.yuv(b(0, y, x), b(1, cy, cx), b(2, cy, cx)),
            PixelFormat::Yuyv => self.yuv(b(0, y, 2 * x), b(0, y, 4 * cx + 1), b(0, y, 4 * cx + 3)),
        }
    }

    /// The standards' printed matrices.
    fn yuv(&self, y: f64, cb: f64, cr: f64) -> [f64; 3] {
        let (y, cb, cr) = match self.range {
            ColorRange::Limited => ((y - 16.0) / 219.0, (cb - 128.0) / 224.0, (cr - 128.0) / 224.0),
            ColorRange::Full => (y / 255.0, (cb - 128.0) / 255.0, (cr - 128.0) / 255.0),
        };
        let rgb = match self.matrix {
            ColorMatrix::Bt601 => [y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb],
            ColorMatrix::Bt709 => [y + 1.5748 * cr, y - 0.187324 * cb - 0.468124 * cr, y + 1.8556 * cb],
        };
        rgb.map(|v| (v * 255.0).clamp(0.0, 255.0))
    }

    /// The upright region, built by really mirroring and turning rows of pixels.
    fn upright(&self) -> Vec<Vec<[f64; 3]>> {
        let r = self.roi;
        let row = |y| (r.x..r.x + r.width).map(|x| self.stored_rgb(x, y)).collect::<Vec<_>>();
        let mut picture: Vec<_> = (r.y..r.y + r.height).map(row).collect();
        if self.orientation.mirrored {
            picture.iter_mut().for_each(|row| row.reverse());
        }
        let turns = match self.orientation.rotation {
            Rotation::Deg0 => 0,
            Rotation::Deg90 => 1,
            Rotation::Deg180 => 2,
            Rotation::Deg270 => 3,
        };
        for _ in 0..turns {
            let (h, w) = (picture.len(), picture[0].len());
            picture = (0..w).map(|x| (0..h).rev().map(|y| picture[y][x]).collect()).collect();
        }
        picture
    }
}

/// Weight of each of `from` pixels in pixel `i` of `to`, by the definition.
fn weights(from: usize, to: usize, i: usize) -> Vec<f64> {
    let ratio = from as f64 / to as f64;
    let mut w = vec![0.0; from];
    if from > 2 * to {
        let (begin, end) = (i as f64 * ratio, (i + 1) as f64 * ratio);
        for (k, w) in w.iter_mut().enumerate() {
            *w = ((k as f64 + 1.0).min(end) - (k as f64).max(begin)).max(0.0) / ratio;
        }
    } else {
        let x = (i as f64 + 0.5) * ratio - 0.5;
        let clamped = |k: f64| k.clamp(0.0, (from - 1) as f64) as usize;
        w[clamped(x.floor())] += 1.0 - (x - x.floor());
        w[clamped(x.floor() + 1.0)] += x - x.floor();
    }
    w
}

/// Level pixels (row, column) of the reference, red green blue.
fn reference(picture: &Picture, level: Size) -> Vec<Vec<[f64; 3]>> {
    let upright = picture.upright();
    let (h, w) = (upright.len(), upright[0].len());
    let along_x: Vec<_> = (0..level.width).map(|i| weights(w, level.width, i)).collect();
    (0..level.height)
        .map(|j| {
            let along_y = weights(h, level.height, j);
            let mut combined = vec![[0.0; 3]; w];
            for (row, wy) in upright.iter().zip(along_y) {
                for (c, p) in combined.iter_mut().zip(row) {
                    (0..3).for_each(|i| c[i] += wy * p[i]);
                }
            }
            let pixel =
                |wx: &Vec<f64>| [0, 1, 2].map(|i| combined.iter().zip(wx).map(|(p, w)| w * p[i]).sum());
            along_x.iter().map(pixel).collect()
        })
        .collect()
}

/// The whole level, packed.
fn whole(view: &ImageView<'_>, level: Size, norm: &Normalization) -> Vec<f32> {
    let mut out = vec![f32::NAN; level.width * level.height * 3];
    let mut dst = DstRows::packed(&mut out, level.width);
    fill(view, level, Rect::whole(level), 0..level.height, norm, &mut dst, &mut Scratch::default()).unwrap();
    out
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn every_format_stride_region_orientation_and_scale_equals_the_reference(
        picture in picture(), level in level(), norm in norm(),
    ) {
        let view = picture.view();
        let upright = view.upright_size();
        prop_assert_eq!(upright, Size::new(picture.upright()[0].len(), picture.upright().len()));
        let level = level_of(upright, level);
        let got = whole(&view, level, &norm);
        let want = reference(&picture, level);
        for y in 0..level.height {
            for x in 0..level.width {
                for c in 0..3 {
                    let from = if norm.order == ChannelOrder::Rgb { c } else { 2 - c };
                    let want = (want[y][x][from] - f64::from(norm.mean[c])) * f64::from(norm.scale[c]);
                    let got = f64::from(got[(y * level.width + x) * 3 + c]);
                    // The printed matrices have six digits: a few 1e-4 of a grey level.
                    let off = (got - want).abs() / f64::from(norm.scale[c]);
                    prop_assert!(off < 1e-3, "({x}, {y}) channel {c}: {got}, reference {want}");
                }
            }
        }
    }

    #[test]
    fn scale_1_puts_bytes_through_the_formula_exactly(
        picture in picture().prop_filter("byte formats", |p| p.format.planes() == 1 && p.format != PixelFormat::Yuyv),
        norm in norm(),
    ) {
        let view = picture.view();
        let got = whole(&view, view.upright_size(), &norm);
        for (i, p) in picture.upright().into_iter().flatten().enumerate() {
            let p = if norm.order == ChannelOrder::Rgb { p } else { [p[2], p[1], p[0]] };
            for c in 0..3 {
                prop_assert_eq!(got[3 * i + c], (p[c] as f32 - norm.mean[c]) * norm.scale[c]);
            }
        }
    }

    #[test]
    fn a_window_is_cut_from_the_level_bit_for_bit_and_zero_beyond(
        picture in picture(), level in level(), norm in norm(),
        corner in [0.0..1.2f64, 0.0..1.2f64], size in [window_side(), window_side()],
        pixel_stride in 3usize..6, gap in 0usize..5, split in 0.0..1f64,
    ) {
        let view = picture.view();
        let level = level_of(view.upright_size(), level);
        let all = whole(&view, level, &norm);
        let [width, height] = size;
        let x0 = (corner[0] * level.width as f64) as usize;
        let y0 = (corner[1] * level.height as f64) as usize;
        let window = Rect::new(x0, y0, width, height);

        // Two threads' worth of rows, each with its own scratch, in a destination with gaps.
        const GAP: f32 = -12345.5;
        let row_stride = pixel_stride * width + gap;
        let mut out = vec![GAP; row_stride * height];
        let cut = (split * height as f64) as usize;
        let (top, bottom) = out.split_at_mut(cut * row_stride);
        let mut scratch = Scratch::for_width(view.upright_size().width, level.width, width);
        let promised = Scratch::bytes_for_width(view.upright_size().width, level.width, width);
        prop_assert_eq!(scratch.bytes(), promised);
        let mut top = DstRows::new(top, row_stride, pixel_stride);
        let mut bottom = DstRows::new(bottom, row_stride, pixel_stride);
        fill(&view, level, window, cut..height, &norm, &mut bottom, &mut scratch).unwrap();
        fill(&view, level, window, 0..cut, &norm, &mut top, &mut Scratch::default()).unwrap();
        prop_assert_eq!(scratch.bytes(), promised, "the scratch grew");

        for (at, got) in out.iter().enumerate() {
            let (y, in_row) = (at / row_stride, at % row_stride);
            let (x, c) = (in_row / pixel_stride, in_row % pixel_stride);
            let want = if x >= width || c >= 3 {
                GAP
            } else if x0 + x < level.width && y0 + y < level.height {
                all[((y0 + y) * level.width + x0 + x) * 3 + c]
            } else {
                0.0
            };
            prop_assert_eq!(got.to_bits(), want.to_bits(), "({}, {}) channel {}", x, y, c);
        }
    }

    #[test]
    fn tiles_show_the_level_they_were_cut_from(
        picture in picture(), level in level(), norm in norm(), tile in 6usize..20,
    ) {
        let view = picture.view();
        let level = level_of(view.upright_size(), level);
        let all = whole(&view, level, &norm);
        let mut rebuilt = vec![f32::NAN; all.len()];
        let mut scratch = Scratch::default();
        for Tile { window, owned } in TileGrid::new(level, Size::new(tile, tile), 2, 2).unwrap().iter() {
            let mut input = vec![f32::NAN; window.width * window.height * 3];
            let mut dst = DstRows::packed(&mut input, window.width);
            fill(&view, level, window, 0..window.height, &norm, &mut dst, &mut scratch).unwrap();
            for y in owned.y..owned.y + owned.height {
                let from = ((y - window.y) * window.width + owned.x - window.x) * 3;
                let to = (y * level.width + owned.x) * 3;
                rebuilt[to..to + owned.width * 3].copy_from_slice(&input[from..from + owned.width * 3]);
            }
        }
        prop_assert!(rebuilt.iter().zip(&all).all(|(a, b)| a.to_bits() == b.to_bits()));
    }

    #[test]
    fn a_box_found_upright_lands_on_its_stored_pixels(picture in picture()) {
        let place = picture.view().placement();
        for (y, row) in picture.upright().iter().enumerate() {
            for (x, pixel) in row.iter().enumerate() {
                let [sx, sy, w, h] = place.stored_box([x as f32, y as f32, 1.0, 1.0]);
                prop_assert_eq!([w, h], [1.0, 1.0]);
                prop_assert_eq!(picture.stored_rgb(sx as usize, sy as usize), *pixel);
            }
        }
    }

    #[test]
    fn random_fields_are_refused_or_readable_but_never_panic(
        width in side(), height in side(), format in 0..FORMATS.len(),
        planes in prop::collection::vec((0usize..5000, stride()), 0..4),
        roi in [side(), side(), side(), side()],
        level in [0usize..60, 0usize..60], window in (side(), side(), 0usize..9, 0usize..9),
        rows in [0usize..12, 0usize..12], dst in (0usize..600, side(), side()),
        orientation in 0usize..8,
    ) {
        let data: Vec<u8> = (0..5000).map(|i| i as u8).collect();
        let planes: Vec<_> = planes.iter().map(|&(len, stride)| Plane::new(&data[..len], stride)).collect();
        let format = FORMATS[format];
        let packed = ImageView::packed(width, height, format, &data);
        for view in [packed, ImageView::new(width, height, format, &planes)].into_iter().flatten() {
            for plane in 0..view.planes().len() {
                for y in 0..format.rows(plane, height) {
                    prop_assert_eq!(Some(view.row(plane, y).len()), format.row_bytes(plane, width));
                }
            }
            let view = view.with_roi(Rect::new(roi[0], roi[1], roi[2], roi[3])).unwrap_or(view);
            let view = view.with_orientation(Orientation::ALL[orientation]);
            let window = Rect::new(window.0, window.1, window.2, window.3);
            let mut out = vec![0.0; dst.0];
            let mut dst = DstRows::new(&mut out, dst.1, dst.2);
            let norm = Normalization { order: ChannelOrder::Rgb, mean: [0.0; 3], scale: [1.0; 3] };
            let level = Size::new(level[0], level[1]);
            let _ = fill(&view, level, window, rows[0]..rows[1], &norm, &mut dst, &mut Scratch::default());
        }
    }
}

/// Sides that are mostly small, sometimes absurd.
fn side() -> impl Strategy<Value = usize> {
    prop_oneof![20 => 0usize..40, 1 => Just(usize::MAX), 1 => Just(1 << 24), 1 => Just(usize::MAX / 4 + 1)]
}

fn stride() -> impl Strategy<Value = isize> {
    prop_oneof![20 => -170isize..170, 1 => Just(isize::MIN), 1 => Just(isize::MAX), 1 => Just(isize::MAX / 7)]
}

thread_local! {
    /// Allocations of this thread: tests run side by side.
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: every call is handed to the system's allocator unchanged; counting touches no heap.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // A thread that is ending has no counter any more.
        let _ = ALLOCATIONS.try_with(|n| n.set(n.get() + 1));
        // SAFETY: the caller's promise, passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise, passed on.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn filling_with_a_reserved_scratch_does_not_allocate() {
    let norm = Normalization { order: ChannelOrder::Bgr, mean: [104.0, 117.0, 123.0], scale: [1.0; 3] };
    let data = vec![77u8; 64 * 48 * 12];
    let mut out = vec![0.0; 130 * 130 * 3];
    for format in FORMATS {
        for orientation in Orientation::ALL {
            let view = ImageView::packed(64, 48, format, &data).unwrap().with_orientation(orientation);
            let upright = view.upright_size();
            for level in [upright, Size::new(128, 96), Size::new(50, 40), Size::new(11, 9)] {
                let mut scratch = Scratch::for_width(upright.width, level.width, level.width);
                let mut dst = DstRows::packed(&mut out, level.width);
                let before = ALLOCATIONS.get();
                fill(&view, level, Rect::whole(level), 0..level.height, &norm, &mut dst, &mut scratch)
                    .unwrap();
                assert_eq!(ALLOCATIONS.get(), before, "{format:?} {orientation:?} {level:?}");
            }
        }
    }
    let before = ALLOCATIONS.get();
    drop(std::hint::black_box(vec![1u8; 10]));
    assert_eq!(ALLOCATIONS.get(), before + 1, "the counter counts");
}

#[test]
fn wrong_destinations_rows_and_levels_are_named() {
    let data = [0u8; 64];
    let view = ImageView::packed(8, 8, PixelFormat::Gray8, &data).unwrap();
    let norm = Normalization { order: ChannelOrder::Rgb, mean: [0.0; 3], scale: [1.0; 3] };
    let message = |level: Size, window: Rect, rows, floats: usize, row_stride, pixel_stride| {
        let mut out = vec![0.0; floats];
        let mut dst = DstRows::new(&mut out, row_stride, pixel_stride);
        let result = fill(&view, level, window, rows, &norm, &mut dst, &mut Scratch::default());
        result.map_or_else(|e| e.to_string(), |()| "ok".into())
    };
    let (level, window) = (Size::new(8, 8), Rect::new(0, 0, 8, 8));
    assert_eq!(message(level, window, 0..8, 192, 24, 3), "ok");
    assert_eq!(message(level, window, 8..8, 0, 0, 0), "ok");
    // The last row ends with its last pixel.
    assert_eq!(message(level, window, 6..8, 32 + 31, 32, 4), "ok");
    assert!(message(level, window, 0..8, 191, 24, 3).contains("192 needed, room for 191"));
    assert!(message(level, window, 0..9, 900, 24, 3).contains("0..9"));
    assert!(message(level, window, 0..8, 900, 23, 3).contains("row stride 23"));
    assert!(message(level, window, 0..8, 900, 24, 2).contains("pixel stride 2"));
    assert!(message(level, window, 0..8, 900, usize::MAX, 3).contains("overflow"));
    assert!(message(Size::new(0, 8), window, 0..8, 900, 24, 3).contains("level is 0x8"));
    assert!(message(level, Rect::new(usize::MAX, 0, 8, 8), 0..8, 900, 24, 3).contains("overflows"));
}

#[test]
fn a_flat_picture_stays_flat_at_every_scale() {
    let data = vec![200u8; 100 * 75 * 3];
    let view = ImageView::packed(100, 75, PixelFormat::Rgb8, &data).unwrap();
    let norm = Normalization { order: ChannelOrder::Rgb, mean: [0.0; 3], scale: [1.0; 3] };
    for level in [Size::new(333, 211), Size::new(61, 50), Size::new(13, 7), Size::new(1, 1)] {
        let got = whole(&view, level, &norm);
        assert!(got.iter().all(|v| (v - 200.0).abs() < 1e-3), "{level:?}");
    }
}

/// `cargo test --release --test pixels -- --ignored --nocapture` prints times.
#[test]
#[ignore = "a benchmark"]
fn conversion_times() {
    use PixelFormat::{Bgr8, Gray8, Nv12, Rgb8, RgbPlanarF32, Rgba8, Yuyv, I420};
    let data: Vec<u8> = (0..1920 * 1080 * 4).map(|i: u32| (i.wrapping_mul(2654435761) >> 24) as u8).collect();
    let (vga, hd) = (Size::new(640, 480), Size::new(1920, 1080));
    let (upright, turned) = (Orientation::UPRIGHT, Orientation::from_exif(6).unwrap());
    let mut cases: Vec<_> =
        [Rgb8, Bgr8, Rgba8, Gray8, RgbPlanarF32, Nv12, I420, Yuyv].map(|f| (f, vga, vga, upright)).into();
    cases.extend([
        (Rgb8, vga, Size::new(480, 640), turned),
        (Nv12, vga, Size::new(480, 640), turned),
        (Rgb8, vga, Size::new(960, 720), upright),
        (Rgb8, vga, Size::new(1280, 960), upright),
        (Rgb8, vga, Size::new(256, 192), upright),
        (Rgb8, hd, Size::new(640, 360), upright),
        (Nv12, hd, Size::new(640, 360), upright),
        (Rgb8, hd, Size::new(1280, 720), upright),
        (Rgb8, hd, Size::new(1080, 1920), turned),
    ]);
    for (format, size, level, orientation) in cases {
        let view =
            ImageView::packed(size.width, size.height, format, &data).unwrap().with_orientation(orientation);
        let norm = Normalization { order: ChannelOrder::Bgr, mean: [104.0, 117.0, 123.0], scale: [1.0; 3] };
        let mut out = vec![0.0; level.width * level.height * 3];
        let mut scratch = Scratch::for_width(view.upright_size().width, level.width, level.width);
        let mut best = f64::INFINITY;
        for _ in 0..60 {
            let mut dst = DstRows::packed(std::hint::black_box(&mut out), level.width);
            let start = std::time::Instant::now();
            fill(&view, level, Rect::whole(level), 0..level.height, &norm, &mut dst, &mut scratch).unwrap();
            best = best.min(start.elapsed().as_secs_f64());
        }
        println!(
            "{format:?} {}x{} -> {}x{}, EXIF {}: {:.3} ms",
            size.width,
            size.height,
            level.width,
            level.height,
            orientation.exif(),
            best * 1e3
        );
    }
}
