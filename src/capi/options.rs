//! Options
//!
//! Fill the struct with farface_session_options_init(), change what you like, and hand it to
//! farface_session_create() or farface_session_set_options().
//!
//! Later versions add fields at the end. `struct_size` tells both sides which fields there are, so
//! that old programs run with newer libraries: only the fields that it covers wholly are read or
//! written, the others stand at the model's own settings. A program compiled with a newer header
//! runs as well, as long as the fields that this library does not know are zero.

use super::guard::{guard, input, Failure, Out};
use super::model::farface_model;
use super::status::farface_status;
use crate::detect::nms::{SOFT_SIGMA, VOTING_IOU};
use crate::detect::{DevicePolicy, Options, Precision, Pyramid, Scales, Suppression};
use crate::error::{Error, Result};
use std::mem::offset_of;

/// Which scales of the picture are searched: one of the FARFACE_PYRAMID_ values.
#[allow(non_camel_case_types)]
pub type farface_pyramid = u32;

/// The model's own scales where its file names some; else the picture as it is, and with
/// `min_face_px` or `max_face_px` the fewest and smallest levels on which all faces between them
/// are found.
pub const FARFACE_PYRAMID_AUTO: farface_pyramid = 0;
/// Levels at scales 2^e for e = `pyramid_max`, `pyramid_max - pyramid_step`, ... `pyramid_min`.
/// Levels that cannot hold a face between `min_face_px` and `max_face_px` are left out.
pub const FARFACE_PYRAMID_OCTAVES: farface_pyramid = 1;
/// Levels at the first `scale_count` of `scales`. Levels that cannot hold a face between
/// `min_face_px` and `max_face_px` are left out.
pub const FARFACE_PYRAMID_SCALES: farface_pyramid = 2;

/// What becomes of boxes that overlap: one of the FARFACE_SUPPRESSION_ values.
#[allow(non_camel_case_types)]
pub type farface_suppression = u32;

/// The best box is kept, and what overlaps it by more than `nms_iou` is dropped; then the next best.
pub const FARFACE_SUPPRESSION_GREEDY: farface_suppression = 0;
/// Greedy; then each box that is left becomes the mean of all that overlapped it by more than
/// `voting_iou`, itself included, weighted with their scores. Score, landmarks and ellipse stay its
/// own (box voting, Gidaris and Komodakis 2015).
pub const FARFACE_SUPPRESSION_VOTING: farface_suppression = 1;
/// The best box is kept, and the score of what overlaps it by more than `nms_iou` is multiplied
/// with 1 - IoU; then the next best (soft-NMS, Bodla et al. 2017). What falls below
/// `score_threshold` is dropped.
pub const FARFACE_SUPPRESSION_SOFT_LINEAR: farface_suppression = 2;
/// Soft-NMS with the factor exp(-IoU^2 / `soft_sigma`); `nms_iou` does not matter.
pub const FARFACE_SUPPRESSION_SOFT_GAUSSIAN: farface_suppression = 3;

/// Arithmetic of the network: one of the FARFACE_PRECISION_ values.
#[allow(non_camel_case_types)]
pub type farface_precision = u32;

/// Eight bits of a model that was quantized, else single precision; single precision of both on x86 CPUs without AVX2, or
/// with AVX-512 and no VNNI, where it is the faster one. On a CUDA device half precision with sums in single.
pub const FARFACE_PRECISION_AUTO: farface_precision = 0;
/// Single precision.
pub const FARFACE_PRECISION_F32: farface_precision = 1;
/// bf16, sums in single precision: half the memory, and faster on CPUs with AMX or AVX512-BF16 (slower on others).
pub const FARFACE_PRECISION_BF16: farface_precision = 2;
/// Eight bits, sums of 32; an error for a model that was not quantized. x86 CPUs with AVX2 and no dot product of eight
/// bits round weights more coarsely, so that they find faces slightly otherwise.
pub const FARFACE_PRECISION_INT8: farface_precision = 3;
/// Half precision, sums in single precision or of a few products in half: half the memory, and faster on CPUs with
/// FEAT_FP16 or AVX512-FP16 (slower on others). What is beyond 65504 becomes that.
pub const FARFACE_PRECISION_F16: farface_precision = 4;
/// Single precision, the factors of convolutions rounded to TF32 (ten bits behind the point), sums in single: on CUDA
/// devices of compute capability 8.0 or later alone, an error on others and on the CPU.
pub const FARFACE_PRECISION_TF32: farface_precision = 5;

/// Where the network may run: one of the FARFACE_DEVICE_POLICY_ values.
#[allow(non_camel_case_types)]
pub type farface_device_policy = u32;

/// The best device there is; the CPU, until CUDA has been measured. farface_session_device() tells.
pub const FARFACE_DEVICE_POLICY_AUTO: farface_device_policy = 0;
/// The CPU.
pub const FARFACE_DEVICE_POLICY_CPU: farface_device_policy = 1;
/// CUDA device `cuda_index` where it can be had, else the CPU; farface_session_device() tells.
pub const FARFACE_DEVICE_POLICY_PREFER_CUDA: farface_device_policy = 2;
/// CUDA device `cuda_index`, or FARFACE_ERROR_UNSUPPORTED.
pub const FARFACE_DEVICE_POLICY_REQUIRE_CUDA: farface_device_policy = 3;

/// Settings of a session.
#[allow(non_camel_case_types)]
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct farface_session_options {
    /// sizeof(farface_session_options) of the program; farface_session_options_init() sets it.
    pub struct_size: usize,
    /// Faces with a lower score are dropped; 0 to 1. Init: the model's.
    pub score_threshold: f32,
    /// Of two boxes that overlap by more than this (intersection over union, 0 to 1), the weaker
    /// is dropped. Init: the model's.
    pub nms_iou: f32,
    /// Best candidates that are compared with each other; 1 to 1000000. Init: the model's.
    pub max_candidates: u32,
    /// Most faces returned, best first; 0 = no limit, which is the init.
    pub max_faces: u32,
    /// Smallest face wanted, longer side in pixels of the picture; 0 = no limit, which is the init.
    /// Faces too small for the network as it is cost enlarged levels, but for models with scales of
    /// their own, whose levels are only left out.
    pub min_face_px: f32,
    /// Largest face wanted, likewise. Who wants large faces alone gets smaller levels and saves time.
    pub max_face_px: f32,
    /// Scales searched. Init: FARFACE_PYRAMID_AUTO.
    pub pyramid: farface_pyramid,
    /// Smallest exponent of FARFACE_PYRAMID_OCTAVES. Init: 0.
    pub pyramid_min: f32,
    /// Largest exponent; 1 doubles the picture. Init: 0.
    pub pyramid_max: f32,
    /// Difference of neighbouring exponents, above 0. Init: 1.
    pub pyramid_step: f32,
    /// Longest side of a tile in pixels of a level; larger levels are cut into overlapping tiles,
    /// whose faces equal those of the whole. 0 = as large as the memory cap allows: the init.
    pub tile_px: u32,
    /// Threads, the caller's included; at most 64. 0 = as many as the process may use. Init: 1.
    pub threads: u32,
    /// Most bytes of working memory of one picture; larger levels are cut into tiles. Init: 1 GiB.
    pub memory_cap: u64,
    /// Arithmetic of the network. Init: FARFACE_PRECISION_AUTO.
    pub precision: farface_precision,
    /// Device. Init: FARFACE_DEVICE_POLICY_AUTO.
    pub device_policy: farface_device_policy,
    /// Index of the CUDA device, as the CUDA runtime counts. Init: 0.
    pub cuda_index: u32,
    /// Zero.
    pub reserved: u32,
    /// What else becomes of boxes that overlap. Init: FARFACE_SUPPRESSION_GREEDY.
    pub suppression: farface_suppression,
    /// Overlap of the boxes that vote with FARFACE_SUPPRESSION_VOTING, 0 to 1. Init: 0.5.
    pub voting_iou: f32,
    /// Width of the decay of FARFACE_SUPPRESSION_SOFT_GAUSSIAN, above 0. Init: 0.5.
    pub soft_sigma: f32,
    /// 1: searches the mirrored picture too, which takes twice as long; boxes of both are then
    /// compared with each other. 0, the init: does not.
    pub flip: u32,
    /// Factors of FARFACE_PYRAMID_SCALES, in any order, each above 0. Init: 0.
    pub scales: [f32; 16],
    /// How many of `scales` there are, 1 to 16. Init: 0.
    pub scale_count: u32,
    /// Zero.
    pub reserved_too: u32,
}

// Later versions add fields behind these: no byte of padding may hide one.
const _: () = assert!(
    offset_of!(farface_session_options, reserved_too) + size_of::<u32>()
        == size_of::<farface_session_options>()
);

/// Longest struct of any later version that is looked at.
const MAX_STRUCT_SIZE: usize = 4096;

/// Calls `$do!(field)` for every field behind `struct_size`.
macro_rules! each_field {
    ($do:ident) => {
        $do!(score_threshold);
        $do!(nms_iou);
        $do!(max_candidates);
        $do!(max_faces);
        $do!(min_face_px);
        $do!(max_face_px);
        $do!(pyramid);
        $do!(pyramid_min);
        $do!(pyramid_max);
        $do!(pyramid_step);
        $do!(tile_px);
        $do!(threads);
        $do!(memory_cap);
        $do!(precision);
        $do!(device_policy);
        $do!(cuda_index);
        $do!(reserved);
        $do!(suppression);
        $do!(voting_iou);
        $do!(soft_sigma);
        $do!(flip);
        $do!(scales);
        $do!(scale_count);
        $do!(reserved_too);
    };
}

/// Fills `options` with the model's own settings, one thread and the limits stated above.
/// `struct_size` is the program's sizeof(farface_session_options); no byte behind it is written.
///
/// Threads: any.
/// Errors: FARFACE_ERROR_INVALID_ARGUMENT for NULL or an impossible size.
#[no_mangle]
pub unsafe extern "C" fn farface_session_options_init(
    options: *mut farface_session_options,
    struct_size: usize,
    model: *const farface_model,
) -> farface_status {
    guard(|| {
        // SAFETY: the caller's promise about both pointers.
        let (_, model) = unsafe { (Out::new(options, "options")?, input(model, "model")?) };
        check_size(struct_size)?;
        let values = to_c(&Options::for_model(model.model.config()));
        // SAFETY: checked pointer; the caller promises `struct_size` writable bytes.
        unsafe { write(options, struct_size, &values) };
        Ok(())
    })
}

fn check_size(size: usize) -> Result<()> {
    if (size_of::<usize>()..=MAX_STRUCT_SIZE).contains(&size) {
        return Ok(());
    }
    Err(Error::InvalidArgument(format!(
        "struct_size {size} is not the size of farface_session_options; use farface_session_options_init()"
    )))
}

/// Writes the fields that `size` covers wholly, and zeros behind the last one known here.
///
/// # Safety
/// `size` bytes from `options` on may be written; `options` is aligned.
unsafe fn write(options: *mut farface_session_options, size: usize, values: &farface_session_options) {
    // SAFETY: inside the first `size` bytes, which the caller lets be written.
    unsafe {
        options.cast::<u8>().write_bytes(0, size);
        (&raw mut (*options).struct_size).write(size);
    }
    macro_rules! put {
        ($field:ident) => {
            if offset_of!(farface_session_options, $field) + size_of_val(&values.$field) <= size {
                // SAFETY: the field lies inside the first `size` bytes.
                unsafe { (&raw mut (*options).$field).write(values.$field) };
            }
        };
    }
    each_field!(put);
}

/// The caller's options, over `base` where the caller's struct ends early.
///
/// # Safety
/// `options` is NULL, misaligned, or has as many readable bytes as its `struct_size` says.
pub(super) unsafe fn read(options: *const farface_session_options, base: &Options) -> Result<Options> {
    // SAFETY: every version's struct begins with `struct_size`.
    let size = unsafe { *input(options.cast::<usize>(), "options")? };
    // The struct's own alignment may exceed that of its first field.
    if !options.is_aligned() {
        return Err(Error::InvalidArgument("options is not aligned".into()));
    }
    check_size(size)?;
    let known = size_of::<farface_session_options>();
    for i in known..size {
        // SAFETY: the caller promises `size` readable bytes.
        if unsafe { options.cast::<u8>().add(i).read() } != 0 {
            return Err(Error::Unsupported(format!(
                "options of {size} bytes set a field at byte {i}, this library knows {known} bytes: it is older than the header"
            )));
        }
    }
    let mut values = to_c(base);
    macro_rules! get {
        ($field:ident) => {
            if offset_of!(farface_session_options, $field) + size_of_val(&values.$field) <= size {
                // SAFETY: the field lies inside the first `size` bytes, which are readable.
                values.$field = unsafe { (&raw const (*options).$field).read() };
            }
        };
    }
    each_field!(get);
    from_c(&values)
}

/// Writes the session's options into the caller's struct, as far as its `struct_size` covers.
///
/// # Safety
/// As [`read`], and the bytes may be written.
pub(super) unsafe fn write_back(out: *mut farface_session_options, options: &Options) -> Result<(), Failure> {
    // SAFETY: the caller's contract.
    unsafe {
        Out::new(out, "options")?;
        let size = (&raw const (*out).struct_size).read();
        check_size(size)?;
        write(out, size, &to_c(options));
    }
    Ok(())
}

fn from_c(o: &farface_session_options) -> Result<Options> {
    let bad = |what: String| Err(Error::InvalidArgument(what));
    if (o.reserved, o.reserved_too) != (0, 0) {
        return bad(format!(
            "reserved and reserved_too are {} and {}, they must be 0",
            o.reserved, o.reserved_too
        ));
    }
    Ok(Options {
        score_threshold: o.score_threshold,
        nms_iou: o.nms_iou,
        suppression: match o.suppression {
            FARFACE_SUPPRESSION_GREEDY => Suppression::Greedy,
            FARFACE_SUPPRESSION_VOTING => Suppression::Voting { iou: o.voting_iou },
            FARFACE_SUPPRESSION_SOFT_LINEAR => Suppression::SoftLinear,
            FARFACE_SUPPRESSION_SOFT_GAUSSIAN => Suppression::SoftGaussian { sigma: o.soft_sigma },
            other => return bad(format!("suppression {other} is no FARFACE_SUPPRESSION_ value")),
        },
        max_candidates: o.max_candidates as usize,
        max_faces: o.max_faces as usize,
        min_face_px: o.min_face_px,
        max_face_px: o.max_face_px,
        pyramid: match o.pyramid {
            FARFACE_PYRAMID_AUTO => Pyramid::Auto,
            FARFACE_PYRAMID_OCTAVES => {
                Pyramid::Octaves { min: o.pyramid_min, max: o.pyramid_max, step: o.pyramid_step }
            }
            FARFACE_PYRAMID_SCALES => {
                let scales = o.scales.get(..o.scale_count as usize);
                Pyramid::Scales(Scales::new(scales.ok_or_else(|| {
                    let most = o.scales.len();
                    Error::InvalidArgument(format!(
                        "scale_count {}; a list has 1 to {most} scales",
                        o.scale_count
                    ))
                })?)?)
            }
            other => return bad(format!("pyramid {other} is no FARFACE_PYRAMID_ value")),
        },
        flip: match o.flip {
            0 => false,
            1 => true,
            other => return bad(format!("flip {other} is neither 0 nor 1")),
        },
        tile_px: o.tile_px as usize,
        memory_cap: o.memory_cap,
        threads: o.threads as usize,
        precision: match o.precision {
            FARFACE_PRECISION_AUTO => Precision::Auto,
            FARFACE_PRECISION_F32 => Precision::F32,
            FARFACE_PRECISION_BF16 => Precision::Bf16,
            FARFACE_PRECISION_INT8 => Precision::Int8,
            FARFACE_PRECISION_F16 => Precision::F16,
            FARFACE_PRECISION_TF32 => Precision::Tf32,
            other => return bad(format!("precision {other} is no FARFACE_PRECISION_ value")),
        },
        device: match o.device_policy {
            FARFACE_DEVICE_POLICY_AUTO => DevicePolicy::Auto,
            FARFACE_DEVICE_POLICY_CPU => DevicePolicy::Cpu,
            FARFACE_DEVICE_POLICY_PREFER_CUDA => DevicePolicy::PreferCuda(o.cuda_index),
            FARFACE_DEVICE_POLICY_REQUIRE_CUDA => DevicePolicy::RequireCuda(o.cuda_index),
            other => return bad(format!("device_policy {other} is no FARFACE_DEVICE_POLICY_ value")),
        },
    })
}

/// Octaves where none are set.
const NO_OCTAVES: [f32; 3] = [0.0, 0.0, 1.0];

fn to_c(o: &Options) -> farface_session_options {
    let (mut scales, mut scale_count) = ([0.0; 16], 0);
    let (pyramid, octaves) = match o.pyramid {
        Pyramid::Auto => (FARFACE_PYRAMID_AUTO, NO_OCTAVES),
        Pyramid::Octaves { min, max, step } => (FARFACE_PYRAMID_OCTAVES, [min, max, step]),
        Pyramid::Scales(list) => {
            scale_count = list.as_slice().len();
            scales[..scale_count].copy_from_slice(list.as_slice());
            (FARFACE_PYRAMID_SCALES, NO_OCTAVES)
        }
    };
    let (suppression, voting_iou, soft_sigma) = match o.suppression {
        Suppression::Greedy => (FARFACE_SUPPRESSION_GREEDY, VOTING_IOU, SOFT_SIGMA),
        Suppression::Voting { iou } => (FARFACE_SUPPRESSION_VOTING, iou, SOFT_SIGMA),
        Suppression::SoftLinear => (FARFACE_SUPPRESSION_SOFT_LINEAR, VOTING_IOU, SOFT_SIGMA),
        Suppression::SoftGaussian { sigma } => (FARFACE_SUPPRESSION_SOFT_GAUSSIAN, VOTING_IOU, sigma),
    };
    let (device_policy, cuda_index) = match o.device {
        DevicePolicy::Auto => (FARFACE_DEVICE_POLICY_AUTO, 0),
        DevicePolicy::Cpu => (FARFACE_DEVICE_POLICY_CPU, 0),
        DevicePolicy::PreferCuda(n) => (FARFACE_DEVICE_POLICY_PREFER_CUDA, n),
        DevicePolicy::RequireCuda(n) => (FARFACE_DEVICE_POLICY_REQUIRE_CUDA, n),
    };
    let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    farface_session_options {
        struct_size: size_of::<farface_session_options>(),
        score_threshold: o.score_threshold,
        nms_iou: o.nms_iou,
        max_candidates: count(o.max_candidates),
        max_faces: count(o.max_faces),
        min_face_px: o.min_face_px,
        max_face_px: o.max_face_px,
        pyramid,
        pyramid_min: octaves[0],
        pyramid_max: octaves[1],
        pyramid_step: octaves[2],
        tile_px: count(o.tile_px),
        threads: count(o.threads),
        memory_cap: o.memory_cap,
        precision: match o.precision {
            Precision::Auto => FARFACE_PRECISION_AUTO,
            Precision::F32 => FARFACE_PRECISION_F32,
            Precision::Bf16 => FARFACE_PRECISION_BF16,
            Precision::Int8 => FARFACE_PRECISION_INT8,
            Precision::F16 => FARFACE_PRECISION_F16,
            Precision::Tf32 => FARFACE_PRECISION_TF32,
        },
        device_policy,
        cuda_index,
        reserved: 0,
        suppression,
        voting_iou,
        soft_sigma,
        flip: o.flip.into(),
        scales,
        scale_count: count(scale_count),
        reserved_too: 0,
    }
}
