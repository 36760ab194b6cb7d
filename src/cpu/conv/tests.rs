use super::super::arena::Format;
use super::*;
use crate::cpu::Pool;
use crate::graph::init::Rng;
use crate::shape::Shape;

/// What a kernel makes of a picture of noise, or of the largest values that there are by the weights of [`extremes`].
fn run(
    kernel: ConvKernel,
    formats: Formats,
    [ci, co]: [usize; 2],
    side: usize,
    extreme: Option<(f32, usize)>,
) -> Vec<f32> {
    let window = Window { kernel: [side; 2], stride: [1; 2], dilation: [1; 2], padding: [side / 2; 4] };
    let mut rng = Rng::new(1);
    let mut noise = || rng.range(-1.0, 1.0);
    let area = side * side;
    let weight: Vec<f32> = match extreme {
        Some(of) => (0..co * ci * area).map(|i| extremes(of, i / area % ci, i % area)).collect(),
        None => (0..co * ci * area).map(|_| noise()).collect(),
    };
    let bias: Vec<f32> = (0..co).map(|_| noise()).collect();
    let op = ConvOp::with_kernel(kernel, window, 1, [ci, co], &weight, &bias, (0.1, Residual::None), formats);
    let Format { storage, zero, .. } = formats.input;
    let input = View::stored(storage, zero, Shape::new(1, ci, 9, 31), 0, [side / 2; 4]);
    let first = input.extent().end.div_ceil(64) * 16;
    let output = View::new(Shape::new(1, co, 9, 31), first, [0; 4]);
    let mut arena = Arena::default();
    arena.reserve(output.extent().end.div_ceil(4)).unwrap();
    let bytes: &mut [u8] = bytemuck::cast_slice_mut(arena.floats_mut());
    bytes.fill(zero);
    for y in 0..9 {
        for i in 0..31 * ci {
            let (at, v) = (input.at(0, y, 0) + i, if extreme.is_some() { 1.0 } else { noise() });
            match storage {
                Storage::Bf16 => bytes[2 * at..][..2].copy_from_slice(&bf16_bits(v).to_ne_bytes()),
                Storage::F16 => bytes[2 * at..][..2].copy_from_slice(&f16_bits(v).to_ne_bytes()),
                _ => bytes[at] = (v * 127.0 + 128.0) as u8,
            }
        }
    }
    let tables = op.prepare(&input, None, &output);
    let base = arena.base();
    // SAFETY: both views lie in the arena, apart, and the input's halo stands for zeros.
    Pool::new(1).unwrap().run(&|team| unsafe {
        op.run(base.get(), &tables, [&input, &output], None, None, team);
    });
    arena.read(&output).data
}

/// The weight of input channel `i` at a tap. `which` 0: the value of four channels at 0 and 1 at even taps, at 2 and 3 at odd ones; 1: the
/// other way round; 2: at all; else 0.
fn extremes((value, which): (f32, usize), i: usize, tap: usize) -> f32 {
    if which == 2 || (i / 2 + tap) % 2 == which {
        value
    } else {
        0.0
    }
}

/// A CPU takes the best kernel that it has; the others, for CPUs without, must give the same, but for the rounding of sums of
/// f16. Those that add pairs of u8 in 16 bits give what any gives by weights that are packed for it.
#[test]
fn every_kernel_of_bf16_f16_and_u8_gives_the_same() {
    let u8 = Format { storage: Storage::U8, scale: 0.01, zero: 131 };
    for (input, limit) in [(Format::BF16, 2e-6), (Format::F16, 2e-3), (u8, 0.0)] {
        let formats = Formats { input, add: Format::F32, output: Format::F32 };
        let kernels: Vec<_> = Isa::supported()
            .into_iter()
            .flat_map(|isa| ConvKernel::all(isa, input.storage).map(|kernel| (isa, kernel)))
            .collect();
        let whole = input.storage == Storage::U8;
        let as_pairs = |&(isa, kernel)| (isa, ConvKernel { pairs: true, ..kernel });
        let without = |(_, kernel): &&(Isa, ConvKernel)| whole && !kernel.pairs;
        let for_pairs: Vec<_> = kernels.iter().filter(without).map(as_pairs).collect();
        let extreme = [1.0, -1.0].into_iter().flat_map(|v| (0..3).map(move |which| Some((v, which))));
        let weights: Vec<_> = [None].into_iter().chain(extreme.filter(|_| whole)).collect();
        for (channels, side) in [([4, 5], 1), ([8, 33], 3), ([36, 64], 3), ([64, 17], 1), ([132, 40], 1)] {
            for &weight in &weights {
                let mut first: [Option<Vec<f32>>; 2] = [None, None];
                for &(isa, kernel) in kernels.iter().chain(&for_pairs) {
                    let got = run(kernel, formats, channels, side, weight);
                    let expected = first[usize::from(kernel.pairs)].get_or_insert_with(|| got.clone());
                    let largest = expected.iter().fold(0.0f32, |m, v| m.max(v.abs()));
                    let off = got.iter().zip(expected.iter()).fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
                    // Whole sums are the same; the last step to f32 is fused or not.
                    let limit = limit * largest + f32::EPSILON * 4.0 * largest;
                    assert!(
                        largest > 0.1 && off <= limit,
                        "{isa:?}, {:?}, pairs {}, {channels:?}, weights {weight:?}: {off} of {largest}",
                        input.storage,
                        kernel.pairs
                    );
                }
            }
        }
    }
}

#[test]
fn the_largest_pair_is_of_neighbouring_channels_at_one_tap() {
    let weight = [0.1, 0.6, 0.3, 0.7, -0.9, 0.5, -0.2, 0.0];
    assert_eq!(largest_pair(&weight, 2), 0.6 + 0.7);
    assert_eq!(largest_pair(&weight.map(|v| -v), 2), 0.6 + 0.7);
    assert_eq!(largest_pair(&[0.5, -0.5, 0.25, -1.0], 1), 1.0);
}
