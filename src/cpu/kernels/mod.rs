//! The kernels proper: each written once over [`Vector`], compiled once an ISA, and collected in a
//! table of function pointers. A table can only be had for an ISA that [`Isa::supported`] lists, so
//! holding one is proof that this CPU runs it.

#![allow(clippy::missing_safety_doc)] // the contract of every kernel is its argument struct's

#[cfg(feature = "train")]
pub(crate) mod backward;
pub(crate) mod conv;
pub(crate) mod depthwise;
pub(crate) mod epilogue;
pub(crate) mod resample;
pub(crate) mod simple;
mod vector;
pub(crate) mod winograd;

#[cfg(target_arch = "x86_64")]
pub(crate) mod amx;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
pub(crate) mod generic;
#[cfg(target_arch = "aarch64")]
pub(crate) mod neon;

use super::arena::Storage;
use super::isa::Isa;
use conv::ConvArgs;
use depthwise::DepthwiseArgs;
use half::f16;
use simple::{PoolArgs, ResizeArgs, RowArgs};
pub(crate) use vector::Vector;
use winograd::{InputArgs, OutputArgs};

/// Numbers for [`Storage`], for what is known to the compiler.
pub(crate) mod stored {
    use crate::cpu::arena::Storage;

    pub(crate) const F32: usize = 0;
    pub(crate) const BF16: usize = 1;
    pub(crate) const F16: usize = 2;
    pub(crate) const U8: usize = 3;
    /// By their numbers.
    pub(crate) const STORAGE: [Storage; 4] = [Storage::F32, Storage::Bf16, Storage::F16, Storage::U8];

    /// Calls a function that is compiled for each number with that of a storage.
    macro_rules! by_storage {
        ($storage:expr, $function:ident::<$vector:ty>($($argument:expr),+)) => {
            match $storage {
                Storage::F32 => $function::<$vector, { $crate::cpu::kernels::stored::F32 }>($($argument),+),
                Storage::Bf16 => $function::<$vector, { $crate::cpu::kernels::stored::BF16 }>($($argument),+),
                Storage::F16 => $function::<$vector, { $crate::cpu::kernels::stored::F16 }>($($argument),+),
                Storage::U8 => $function::<$vector, { $crate::cpu::kernels::stored::U8 }>($($argument),+),
            }
        };
    }
    pub(crate) use by_storage;
}

/// The bf16 nearest to `v`, ties to even, by integer rounding: infinities stay, and the NaNs that arithmetic makes
/// stay NaN.
#[inline(always)]
pub(crate) fn bf16_bits(v: f32) -> u16 {
    let bits = v.to_bits();
    (bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16) as u16
}

/// Largest f16.
pub(crate) const F16_MOST: f32 = 65504.0;

/// The f16 nearest to `v`, ties to even; of what is beyond the largest, infinities included, that one.
#[inline(always)]
pub(crate) fn f16_bits(v: f32) -> u16 {
    f16::from_f32(v.clamp(-F16_MOST, F16_MOST)).to_bits()
}

/// Computes rows x output-channel panels.
pub(crate) type ConvRun = unsafe fn(&ConvArgs, rows: std::ops::Range<usize>, panels: std::ops::Range<usize>);

/// A convolution of one kind of input.
#[derive(Clone, Copy)]
pub(crate) struct ConvKernel {
    /// Output channels of a register: weights are packed in panels of one or two of them.
    pub lanes: usize,
    /// What it takes off every u8 of the input.
    pub offset: i32,
    /// Whether it adds the products of two neighbouring u8 in 16 bits: weights must be packed so that the sum fits.
    pub pairs: bool,
    /// Whether it multiplies on AMX tiles.
    pub tiles: bool,
    pub run: ConvRun,
}

impl ConvKernel {
    /// The convolution of values that are stored so, by windows of runs of `run` words. Having an [`Isa`] value is having checked
    /// the CPU for it; what goes beyond that is asked for here.
    pub fn of(isa: Isa, input: Storage, run: usize) -> Self {
        #[cfg(target_arch = "x86_64")]
        if let Some(kernel) = (isa == Isa::Amx).then(|| amx::kernel(input, run)).flatten() {
            return kernel;
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = run;
        let kernels = Kernels::of(isa);
        match input {
            Storage::F32 => {
                Self { lanes: kernels.lanes, offset: 0, pairs: false, tiles: false, run: kernels.conv }
            }
            #[cfg(target_arch = "x86_64")]
            Storage::Bf16 if isa.multiplies_bf16() => avx512::bf16::KERNEL,
            #[cfg(target_arch = "x86_64")]
            Storage::F16 if isa.multiplies_f16() => avx512::f16::KERNEL,
            #[cfg(target_arch = "aarch64")]
            Storage::F16 if isa.multiplies_f16() => neon::f16::KERNEL,
            #[cfg(target_arch = "x86_64")]
            Storage::U8 if isa >= Isa::Avx512 && is_x86_feature_detected!("avx512vnni") => avx512::u8::KERNEL,
            #[cfg(target_arch = "x86_64")]
            Storage::U8 if isa == Isa::Avx2 && is_x86_feature_detected!("avxvnni") => avx2::u8::KERNEL,
            #[cfg(target_arch = "aarch64")]
            Storage::U8 if isa == Isa::Neon && std::arch::is_aarch64_feature_detected!("dotprod") => {
                neon::u8::KERNEL
            }
            Storage::Bf16 => kernels.conv_bf16,
            Storage::F16 => kernels.conv_f16,
            Storage::U8 => kernels.conv_u8,
        }
    }
}

#[cfg(test)]
impl ConvKernel {
    /// The best ones of large and of small windows, and the one that needs nothing beyond the ISA.
    pub fn all(isa: Isa, input: Storage) -> [Self; 3] {
        let kernels = Kernels::of(isa);
        let plain = match input {
            Storage::F32 | Storage::Bf16 => kernels.conv_bf16,
            Storage::F16 => kernels.conv_f16,
            Storage::U8 => kernels.conv_u8,
        };
        [Self::of(isa, input, 16), Self::of(isa, input, 1), plain]
    }
}

/// The kernels of one ISA.
pub(crate) struct Kernels {
    /// Lanes of its registers: weights are packed in panels of one or two of them.
    pub lanes: usize,
    /// Convolution of f32.
    pub conv: ConvRun,
    /// Convolution of bf16, f16 and u8, where the CPU has no better one.
    conv_bf16: ConvKernel,
    conv_f16: ConvKernel,
    conv_u8: ConvKernel,
    /// Depthwise convolution of f32, bf16, f16 and u8, rows.
    depthwise: [unsafe fn(&DepthwiseArgs, rows: std::ops::Range<usize>); 4],
    /// Max pooling, rows.
    pub max_pool: unsafe fn(&PoolArgs, rows: std::ops::Range<usize>),
    /// Interpolation, rows.
    pub resize: unsafe fn(&ResizeArgs, rows: std::ops::Range<usize>),
    /// Row-wise add / copy with activation.
    pub rows: unsafe fn(&RowArgs, rows: std::ops::Range<usize>),
    /// 1 / (1 + e^-x) of so many values.
    pub sigmoid: unsafe fn(*const f32, *mut f32, usize),
    /// Rows of pixels.
    pub resample: resample::ResampleKernels,
    /// Winograd's transform of a tile's inputs, and of its sums of products.
    pub winograd_input: unsafe fn(&InputArgs),
    pub winograd_output: unsafe fn(&OutputArgs),
    /// Sums of outer products.
    #[cfg(feature = "train")]
    pub outer: unsafe fn(&backward::OuterArgs),
    /// Weight gradient of a depthwise convolution.
    #[cfg(feature = "train")]
    pub depthwise_weight: unsafe fn(&backward::DepthwiseWeightArgs),
    /// Data gradient of a depthwise convolution, rows.
    #[cfg(feature = "train")]
    pub depthwise_data: unsafe fn(&backward::DepthwiseDataArgs, rows: std::ops::Range<usize>),
}

impl Kernels {
    /// Depthwise convolution of values that are stored so.
    pub fn depthwise(&self, storage: Storage) -> unsafe fn(&DepthwiseArgs, rows: std::ops::Range<usize>) {
        self.depthwise[match storage {
            Storage::F32 => stored::F32,
            Storage::Bf16 => stored::BF16,
            Storage::F16 => stored::F16,
            Storage::U8 => stored::U8,
        }]
    }

    /// The table for `isa`. Having an [`Isa`] value is having checked the CPU for it.
    pub fn of(isa: Isa) -> &'static Kernels {
        match isa {
            Isa::Generic => &generic::KERNELS,
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => &neon::KERNELS,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => &avx2::KERNELS,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 | Isa::Amx => &avx512::KERNELS,
        }
    }
}

/// Compiles the convolution of one [`conv::Product`] for one ISA, as a module. `wide` and `narrow` list the tile heights (pixels)
/// for panels of two registers and of one; the first is the tallest that the register file holds, or the fastest where that is lower; `tall` of one is taller.
macro_rules! conv_kernel {
    ($module:ident, $product:ty, [$(#[$attr:meta])?], wide: [$($wide:literal)+], narrow: [$($narrow:literal)+]
        $(, tall: $tall:literal)?) => {
        pub(in $crate::cpu::kernels) mod $module {
            use super::*;
            use $crate::cpu::kernels::{conv, epilogue, Vector};

            $(#[$attr])?
            unsafe fn tile_wide<const MR: usize>(t: &conv::Tile) {
                // SAFETY: the caller keeps the contract of the function called.
                unsafe { conv::tile::<$product, MR, 2>(t) }
            }

            $(#[$attr])?
            unsafe fn tile_narrow<const MR: usize>(t: &conv::Tile) {
                // SAFETY: the caller keeps the contract of the function called.
                unsafe { conv::tile::<$product, MR, 1>(t) }
            }

            pub(super) struct Tiles;
            impl conv::Tiles for Tiles {
                const WIDE: usize = { let all = [$($wide),+]; all[0] };
                const NARROW: usize = { let all = [$($narrow),+]; all[0] };
                const TALL: usize = 0 $(+ $tall)?;
                const LANES: usize = <<$product as conv::Product>::Values as Vector>::LANES;
                const STORE: epilogue::StoreRun = store_sums;
                #[inline(always)]
                unsafe fn run(pixels: usize, wide: bool, t: &conv::Tile) {
                    // SAFETY: the caller keeps the contract of the function called.
                    unsafe {
                        match (wide, pixels) {
                            $((true, $wide) => tile_wide::<$wide>(t),)+
                            $((false, $narrow) => tile_narrow::<$narrow>(t),)+
                            $((false, $tall) => tile_narrow::<$tall>(t),)?
                            _ => unreachable!("tile heights are dense"),
                        }
                    }
                }
            }

            $(#[$attr])?
            unsafe fn run(a: &conv::ConvArgs, rows: std::ops::Range<usize>, panels: std::ops::Range<usize>) {
                // SAFETY: the caller keeps the contract of the function called.
                unsafe { conv::block::<Tiles>(a, rows, panels) }
            }

            pub(in $crate::cpu::kernels) static KERNEL: $crate::cpu::kernels::ConvKernel =
                $crate::cpu::kernels::ConvKernel {
                    lanes: <Tiles as conv::Tiles>::LANES,
                    offset: <$product as conv::Product>::OFFSET,
                    pairs: <$product as conv::Product>::PAIRS,
                    tiles: false,
                    run,
                };
        }
    };
}
pub(crate) use conv_kernel;

/// Compiles the other bodies for one ISA and makes its table; the convolution of f32 is module `single`.
macro_rules! isa_kernels {
    ($vector:ty, [$(#[$attr:meta])?], wide: [$($wide:literal)+], narrow: [$($narrow:literal)+]) => {
        #[cfg(feature = "train")]
        use single::Tiles;

        $(#[$attr])?
        unsafe fn depthwise<const T: usize>(
            a: &$crate::cpu::kernels::depthwise::DepthwiseArgs,
            rows: std::ops::Range<usize>,
        ) {
            // SAFETY: the caller keeps the contract of the function called.
            unsafe { $crate::cpu::kernels::depthwise::rows::<$vector, T>(a, rows) }
        }

        /// For the convolutions of every kind of number.
        $(#[$attr])?
        unsafe fn store_sums(
            t: &$crate::cpu::kernels::epilogue::Destination,
            values: *const f32,
            pixels: usize,
            registers: usize,
        ) {
            // SAFETY: the caller keeps the contract of the function called.
            unsafe { $crate::cpu::kernels::epilogue::store::<$vector>(t, values, pixels, registers) }
        }

        $(#[$attr])?
        unsafe fn max_pool(a: &$crate::cpu::kernels::simple::PoolArgs, rows: std::ops::Range<usize>) {
            // SAFETY: the caller keeps the contract of the function called.
            unsafe { $crate::cpu::kernels::simple::max_pool::<$vector>(a, rows) }
        }

        $(#[$attr])?
        unsafe fn resize(a: &$crate::cpu::kernels::simple::ResizeArgs, rows: std::ops::Range<usize>) {
            // SAFETY: the caller keeps the contract of the function called.
            unsafe { $crate::cpu::kernels::simple::resize::<$vector>(a, rows) }
        }

        $(#[$attr])?
        unsafe fn add_or_copy(a: &$crate::cpu::kernels::simple::RowArgs, rows: std::ops::Range<usize>) {
            // SAFETY: the caller keeps the contract of the function called.
            unsafe { $crate::cpu::kernels::simple::add_or_copy::<$vector>(a, rows) }
        }

        $(#[$attr])?
        unsafe fn sigmoid(from: *const f32, to: *mut f32, n: usize) {
            // SAFETY: the caller keeps the contract of the function called.
            unsafe { $crate::cpu::kernels::simple::sigmoid::<$vector>(from, to, n) }
        }

        $(#[$attr])?
        unsafe fn weigh<T: $crate::cpu::kernels::resample::Sample>(sum: &mut [f32], row: &[T], weight: f32) {
            $crate::cpu::kernels::resample::weigh(sum, row, weight);
        }

        $(#[$attr])?
        unsafe fn weigh_pair<T: $crate::cpu::kernels::resample::Sample>(
            sum: &mut [f32],
            a: &[T],
            b: &[T],
            weights: [f32; 2],
            first: bool,
        ) {
            $crate::cpu::kernels::resample::weigh_pair(sum, a, b, weights, first);
        }

        $(#[$attr])?
        unsafe fn normalize<T: $crate::cpu::kernels::resample::Sample>(
            src: &[T],
            dst: &mut [f32],
            constants: &$crate::cpu::kernels::resample::Constants,
        ) {
            // SAFETY: the caller keeps the contract of the function called.
            unsafe { $crate::cpu::kernels::resample::normalize::<$vector, T>(src, dst, constants) }
        }

        $(#[$attr])?
        unsafe fn columns(a: &$crate::cpu::kernels::resample::ColumnsArgs) {
            // SAFETY: the caller keeps the contract of the function called.
            unsafe { $crate::cpu::kernels::resample::columns::<$vector>(a) }
        }

        $(#[$attr])?
        unsafe fn winograd_input(a: &$crate::cpu::kernels::winograd::InputArgs) {
            // SAFETY: the caller keeps the contract of the function called.
            unsafe { $crate::cpu::kernels::winograd::input::<$vector>(a) }
        }

        $(#[$attr])?
        unsafe fn winograd_output(a: &$crate::cpu::kernels::winograd::OutputArgs) {
            // SAFETY: the caller keeps the contract of the function called.
            unsafe { $crate::cpu::kernels::winograd::output::<$vector>(a) }
        }

        pub(super) static KERNELS: $crate::cpu::kernels::Kernels = $crate::cpu::kernels::Kernels {
            lanes: <$vector as $crate::cpu::kernels::Vector>::LANES,
            conv: single::KERNEL.run,
            conv_bf16: bf16_plain::KERNEL,
            conv_f16: f16_plain::KERNEL,
            conv_u8: u8_plain::KERNEL,
            depthwise: {
                use $crate::cpu::kernels::stored::{BF16, F16, F32, U8};
                [depthwise::<F32>, depthwise::<BF16>, depthwise::<F16>, depthwise::<U8>]
            },
            max_pool,
            resize,
            rows: add_or_copy,
            sigmoid,
            resample: {
                use $crate::cpu::kernels::resample::{ResampleKernels, RowKernels};
                ResampleKernels {
                    bytes: RowKernels { weigh: weigh::<u8>, weigh_pair: weigh_pair::<u8>, normalize: normalize::<u8> },
                    floats: RowKernels { weigh: weigh::<f32>, weigh_pair: weigh_pair::<f32>, normalize: normalize::<f32> },
                    columns,
                }
            },
            winograd_input,
            winograd_output,
            #[cfg(feature = "train")]
            outer: training::outer,
            #[cfg(feature = "train")]
            depthwise_weight: training::depthwise_weight,
            #[cfg(feature = "train")]
            depthwise_data: training::depthwise_data,
        };

        #[cfg(feature = "train")]
        mod training {
            use super::*;
            use $crate::cpu::kernels::backward;

            $(#[$attr])?
            unsafe fn outer_wide<const MR: usize>(t: &backward::OuterTile) {
                // SAFETY: the caller keeps the contract of the function called.
                unsafe { backward::outer_tile::<$vector, MR, 2>(t) }
            }

            $(#[$attr])?
            unsafe fn outer_narrow<const MR: usize>(t: &backward::OuterTile) {
                // SAFETY: the caller keeps the contract of the function called.
                unsafe { backward::outer_tile::<$vector, MR, 1>(t) }
            }

            impl backward::OuterTiles for Tiles {
                const WIDE: usize = <Tiles as $crate::cpu::kernels::conv::Tiles>::WIDE;
                const NARROW: usize = <Tiles as $crate::cpu::kernels::conv::Tiles>::NARROW;
                const LANES: usize = <$vector as $crate::cpu::kernels::Vector>::LANES;
                #[inline(always)]
                unsafe fn run(inputs: usize, wide: bool, t: &backward::OuterTile) {
                    // SAFETY: the caller keeps the contract of the function called.
                    unsafe {
                        match (wide, inputs) {
                            $((true, $wide) => outer_wide::<$wide>(t),)+
                            $((false, $narrow) => outer_narrow::<$narrow>(t),)+
                            _ => unreachable!("tile heights are dense"),
                        }
                    }
                }
            }

            $(#[$attr])?
            pub(super) unsafe fn outer(a: &backward::OuterArgs) {
                // SAFETY: the caller keeps the contract of the function called.
                unsafe { backward::outer::<Tiles>(a) }
            }

            $(#[$attr])?
            pub(super) unsafe fn depthwise_weight(a: &backward::DepthwiseWeightArgs) {
                // SAFETY: the caller keeps the contract of the function called.
                unsafe { backward::depthwise_weight::<$vector>(a) }
            }

            $(#[$attr])?
            pub(super) unsafe fn depthwise_data(a: &backward::DepthwiseDataArgs, rows: std::ops::Range<usize>) {
                // SAFETY: the caller keeps the contract of the function called.
                unsafe { backward::depthwise_data::<$vector>(a, rows) }
            }
        }
    };
}
pub(crate) use isa_kernels;
