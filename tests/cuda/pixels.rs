//! Pictures on a device into network input: bit for bit what the CPU writes, and nothing read or written beside it.
//!
//! Planes lie in allocations of exactly their bytes, so that AddressSanitizer sees what is read before or behind them.

use crate::emulator::{device, driver, Driver};
use crate::pictures::*;
use farface::gpu::driver::Stream;
use farface::gpu::map::{DeviceView, Element};
use farface::gpu::memory::DeviceBuffer;
use farface::gpu::ops::Device;
use farface::gpu::pixels::{self as gpu, InputNorm, InputOp, InputWindow, Taps};
use farface::pixels::device::{copied_picture, input_window, stored_picture};
use farface::pixels::*;
use farface::shape::Shape;
use proptest::prelude::*;
use std::sync::Arc;

/// What the arena and everything beside the output hold.
const GUARD: u8 = 0x7b;

const ELEMENTS: [Element; 3] = [Element::F32, Element::F16, Element::Bf16];

/// The device with its kernels and a stream.
struct Bench {
    device: Arc<Device>,
    stream: Stream,
    op: InputOp,
}

impl Bench {
    fn new() -> Option<Self> {
        let device = device()?;
        let stream = Stream::new(device.context()).unwrap();
        let op = InputOp::new(&device).unwrap();
        Some(Self { device, stream, op })
    }

    /// Each plane in memory of its own, and the picture of them.
    fn copy(&self, picture: &Picture) -> (Vec<DeviceBuffer>, gpu::Picture) {
        let copies: Vec<_> =
            picture.planes.iter().map(|(data, ..)| DeviceBuffer::of(&self.stream, data).unwrap()).collect();
        let first =
            |(copy, (_, _, skip)): (&DeviceBuffer, &(Vec<u8>, isize, usize))| copy.address() + *skip as u64;
        let addresses: Vec<u64> = copies.iter().zip(&picture.planes).map(first).collect();
        let held = copied_picture(&picture.view(), &addresses).unwrap();
        (copies, held)
    }

    /// The arena's bytes after a launch that found it full of [`GUARD`].
    fn run(
        &self,
        picture: &DeviceBuffer,
        window: &InputWindow,
        norm: &Normalization,
        output: &DeviceView,
        bytes: usize,
    ) -> Vec<u8> {
        let arena = DeviceBuffer::new(self.device.context(), bytes).unwrap();
        arena.fill(&self.stream, 0..bytes, GUARD).unwrap();
        // SAFETY: pictures and windows outlive this call, which waits; the output lies in the arena.
        unsafe {
            let norm = InputNorm::from(norm);
            self.op
                .launch(&self.stream, (picture.address(), 0), window, &norm, arena.address(), output)
                .unwrap();
        }
        arena.values(&self.stream, 0, bytes).unwrap()
    }
}

/// What the CPU writes: three values a pixel.
fn filled(view: &ImageView<'_>, level: Size, window: Rect, norm: &Normalization) -> Vec<f32> {
    let mut out = vec![f32::NAN; window.width * window.height * 3];
    let mut dst = DstRows::packed(&mut out, window.width);
    fill(view, level, window, 0..window.height, norm, &mut dst, &mut Scratch::default()).unwrap();
    out
}

/// An arena of [`GUARD`] in which these pixels lie as `output` says.
fn laid_out(values: &[f32], output: &DeviceView, bytes: usize) -> Vec<u8> {
    let mut arena = vec![GUARD; bytes];
    for (i, pixel) in values.chunks_exact(3).enumerate() {
        let tail = std::iter::repeat_n(0.0, output.tail);
        let encoded = output.element.encode(pixel.iter().copied().chain(tail));
        let at = output.offset + i * output.pixel * output.element.bytes();
        arena[at..at + encoded.len()].copy_from_slice(&encoded);
    }
    arena
}

/// An output of a window, between guards: a map of its own, one that begins anywhere, or channels within a wider map.
fn output_of(element: Element, window: Rect, place: u8) -> (DeviceView, usize) {
    let shape = Shape { n: 1, c: 3, h: window.height, w: window.width };
    let view = match place {
        0 => DeviceView::new(element, shape, 256),
        1 => DeviceView::new(element, shape, 256 + element.bytes()),
        _ => DeviceView::new(element, Shape { c: 11, ..shape }, 256).channels(4, 3),
    };
    let bytes = view.offset + view.bytes().unwrap() + 256;
    (view, bytes)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn a_window_on_the_device_is_the_cpus_bit_for_bit(
        mut picture in picture(), level in level(), norm in norm(), wild in any::<bool>(),
        corner in [0.0..1.2f64, 0.0..1.2f64], size in [window_side(), window_side()],
        element in 0..ELEMENTS.len(), place in 0u8..3,
    ) {
        let Some(bench) = Bench::new() else { return Ok(()) };
        if wild && picture.format == PixelFormat::RgbPlanarF32 {
            // Floats of any bits: huge ones, negative ones, NaN.
            for (i, byte) in picture.planes.iter_mut().flat_map(|(data, ..)| data).enumerate() {
                *byte ^= (i as u32).wrapping_mul(2654435761).to_be_bytes()[0];
            }
        }
        let view = picture.view();
        let level = level_of(view.upright_size(), level);
        let at = [0, 1].map(|i| (corner[i] * [level.width, level.height][i] as f64) as usize);
        let window = Rect::new(at[0], at[1], size[0], size[1]);
        let (output, bytes) = output_of(ELEMENTS[element], window, place);
        let want = laid_out(&filled(&view, level, window, &norm), &output, bytes);

        let (_planes, held) = bench.copy(&picture);
        prop_assert_eq!(held.upright_size(), [view.upright_size().width, view.upright_size().height]);
        let held = DeviceBuffer::of(&bench.stream, &[held]).unwrap();
        let taken = input_window(&bench.device, view.upright_size(), level, window).unwrap();
        let got = bench.run(&held, &taken, &norm, &output, bytes);
        let first = got.iter().zip(&want).position(|(a, b)| a != b);
        prop_assert!(first.is_none(), "byte {first:?} of {output:?}, window {window:?} of {level:?}");
        if let Some(Driver::Emulated(emulator)) = driver() {
            emulator.backwards(true);
            let again = bench.run(&held, &taken, &norm, &output, bytes);
            emulator.backwards(false);
            prop_assert!(got == again, "other bits in another order of threads");
        }
    }
}

/// A picture that is `upright` once turned, in the middle of a larger one.
fn picture_of(upright: Size, format: PixelFormat, orientation: Orientation, seed: u32) -> Picture {
    let Size { width, height } = upright;
    let (w, h) = if orientation.swaps_sides() { (height, width) } else { (width, height) };
    let around = seed as usize % 4;
    let size = Size::new(w + 2 * around + 1, h + around);
    let planes = (0..format.planes()).map(|p| {
        let stride = format.row_bytes(p, size.width).unwrap() + seed as usize % 3 * 4;
        let bytes = stride * format.rows(p, size.height);
        let data = (0..bytes as u32).map(|i| ((i ^ seed).wrapping_mul(2654435761) >> 24) as u8).collect();
        (data, if (seed as usize + p).is_multiple_of(2) { stride as isize } else { -(stride as isize) }, 0)
    });
    Picture {
        size,
        format,
        planes: planes.collect(),
        matrix: if seed % 5 < 2 { ColorMatrix::Bt601 } else { ColorMatrix::Bt709 },
        range: if seed % 7 < 3 { ColorRange::Full } else { ColorRange::Limited },
        orientation,
        roi: Rect::new(around, around, w, h),
    }
}

#[test]
fn a_captured_graph_goes_on_with_the_next_picture() {
    let Some(bench) = Bench::new() else { return };
    let Bench { device, stream, op } = &bench;
    let upright = Size::new(37, 23);
    let norm =
        Normalization { order: ChannelOrder::Bgr, mean: [104.0, 117.0, 123.0], scale: [0.017, 1.0, 0.5] };
    let scaled = InputNorm::from(&norm);
    for level in [upright, Size::new(61, 23), Size::new(25, 14), Size::new(12, 5)] {
        let window = Rect::new(level.width / 3, level.height / 4, 24, 18);
        let (output, bytes) = output_of(Element::F16, window, 0);
        let taken = input_window(device, upright, level, window).unwrap();
        let slot = DeviceBuffer::new(device.context(), size_of::<gpu::Picture>()).unwrap();
        let arena = DeviceBuffer::new(device.context(), bytes).unwrap();
        let graph = stream
            .capture(|| {
                // SAFETY: all of these outlive the graph, and the slot holds a picture before it is launched.
                unsafe { op.launch(stream, (slot.address(), 0), &taken, &scaled, arena.address(), &output) }
            })
            .unwrap();
        let launch = |picture: &Picture| {
            let (planes, held) = bench.copy(picture);
            slot.set(stream, 0, &[held]).unwrap();
            arena.fill(stream, 0..bytes, GUARD).unwrap();
            graph.launch(stream).unwrap();
            let got = arena.values::<u8>(stream, 0, bytes).unwrap();
            drop(planes);
            got
        };
        for (i, format) in FORMATS.into_iter().enumerate() {
            for (j, orientation) in Orientation::ALL.into_iter().enumerate() {
                let picture = picture_of(upright, format, orientation, (8 * i + j) as u32);
                let want = laid_out(&filled(&picture.view(), level, window, &norm), &output, bytes);
                assert!(launch(&picture) == want, "{format:?} {orientation:?} at {level:?}");
            }
        }
        // A picture of another size is not read: its pixels are zeros.
        let other = picture_of(Size::new(23, 37), PixelFormat::Rgb8, Orientation::UPRIGHT, 0);
        assert!(launch(&other) == laid_out(&[0.0; 24 * 18 * 3], &output, bytes), "{level:?}");
    }
}

#[test]
fn the_longest_rows_and_columns_lose_no_pixel() {
    let Some(bench) = Bench::new() else { return };
    const LONG: usize = 1 << 24;
    let norm = Normalization { order: ChannelOrder::Rgb, mean: [1.0, 2.0, 3.0], scale: [0.5; 3] };
    for (format, orientation) in [(PixelFormat::Rgba8, 1), (PixelFormat::Nv12, 6), (PixelFormat::Yuyv, 3)] {
        let planes = (0..format.planes()).map(|p| {
            let row = format.row_bytes(p, LONG).unwrap();
            let data = (0..row as u32).map(|i| (i.wrapping_mul(2654435761) >> 24) as u8).collect();
            (data, row as isize, 0)
        });
        let picture = Picture {
            size: Size::new(LONG, 1),
            format,
            planes: planes.collect(),
            matrix: ColorMatrix::Bt709,
            range: ColorRange::Limited,
            orientation: Orientation::from_exif(orientation).unwrap(),
            roi: Rect::new(1, 0, LONG - 1, 1),
        };
        let view = picture.view();
        let upright = view.upright_size();
        let (_planes, held) = bench.copy(&picture);
        let held = DeviceBuffer::of(&bench.stream, &[held]).unwrap();
        for long in [LONG - 1, LONG - 2, LONG / 2, 5_000_001] {
            let along_x = upright.height == 1;
            let level = if along_x { Size::new(long, 1) } else { Size::new(1, long) };
            let window =
                if along_x { Rect::new(long - 16, 0, 18, 1) } else { Rect::new(0, long - 16, 1, 18) };
            let (output, bytes) = output_of(Element::F32, window, 0);
            let want = laid_out(&filled(&view, level, window, &norm), &output, bytes);
            let taken = input_window(&bench.device, upright, level, window).unwrap();
            assert!(bench.run(&held, &taken, &norm, &output, bytes) == want, "{format:?} to {long} px");
        }
    }
}

#[test]
fn wrong_pictures_taps_and_outputs_are_named() {
    let size = Size::new(8, 6);
    let place = Placement::new(Rect::whole(size), Orientation::UPRIGHT);
    let colors = (ColorMatrix::Bt601, ColorRange::Full);
    let refused = |size, format, planes: &[(u64, isize)], place: &Placement| {
        stored_picture(size, format, planes, colors, place).map_or_else(|e| e.to_string(), |_| "made".into())
    };
    assert_eq!(refused(size, PixelFormat::Nv12, &[(256, 8), (512, -8)], &place), "made");
    assert!(refused(size, PixelFormat::Nv12, &[(256, 8)], &place).contains("needs 2 plane(s), 1 given"));
    assert!(refused(size, PixelFormat::Nv12, &[(256, 8), (0, 8)], &place).contains("plane 1 has no address"));
    assert!(refused(size, PixelFormat::Rgb8, &[(256, -23)], &place).contains("stride -23"));
    assert!(refused(Size::new(0, 6), PixelFormat::Gray8, &[(256, 8)], &place).contains("0x6"));
    let beside = Placement::new(Rect::new(usize::MAX, 0, 2, 6), Orientation::UPRIGHT);
    assert!(refused(size, PixelFormat::Gray8, &[(256, 8)], &beside).contains("is not inside the picture"));

    let Some(bench) = Bench::new() else { return };
    let tap = |first, len| [Taps { first, len, head: 1.0, body: 0.0, tail: 0.0 }];
    for (columns, rows) in [
        (tap(7, 2), tap(0, 1)),
        (tap(0, 1), tap(6, 1)),
        (tap(0, 0), tap(0, 1)),
        (tap(u32::MAX, 1), tap(0, 1)),
    ] {
        assert!(InputWindow::new(&bench.device, [8, 6], &columns, &rows).is_err(), "{columns:?} {rows:?}");
    }
    assert!(input_window(&bench.device, size, Size::new(8, 0), Rect::whole(size)).is_err());
    assert!(input_window(&bench.device, size, size, Rect::new(usize::MAX, 0, 8, 6)).is_err());
    assert_eq!(input_window(&bench.device, size, size, Rect::new(2, 1, 9, 9)).unwrap().bytes(), 0);
    assert_eq!(
        input_window(&bench.device, size, Size::new(4, 6), Rect::whole(size)).unwrap().bytes(),
        10 * 20
    );

    let window = input_window(&bench.device, size, size, Rect::whole(size)).unwrap();
    let norm = InputNorm { blue_first: false, mean: [0.0; 3], scale: [1.0; 3] };
    let shape = Shape { n: 1, c: 3, h: 6, w: 8 };
    let wrong = [
        Shape { n: 1 << 16, ..shape },
        Shape { c: 4, ..shape },
        Shape { h: 5, ..shape },
        Shape { w: 7, ..shape },
    ];
    for shape in wrong {
        let output = DeviceView::new(Element::F16, shape, 0);
        // SAFETY: nothing is launched.
        let launched = unsafe { bench.op.launch(&bench.stream, (0, 0), &window, &norm, 0, &output) };
        assert!(launched.is_err(), "{shape}");
    }
}
