/*
 * farface.h - finds faces in pictures, the far and tiny ones too
 *
 * A model is loaded once; a session made from it searches pictures, one after another, and writes
 * the faces into your array. Pictures are described where they lie (RGB, grey, YUV, any stride) and
 * never copied or written. There is no global state: use as many models and sessions as you like,
 * each session from one thread at a time.
 *
 * A complete program, which searches 640 x 480 RGB pixels from the standard input:
 *
 *     #include <farface.h>
 *     #include <stdio.h>
 *
 *     static unsigned char pixels[480][640][3];
 *
 *     int main(void)
 *     {
 *         farface_model *model = NULL;
 *         farface_session *session = NULL;
 *         farface_image image = {0};
 *         farface_face faces[100];
 *         size_t count = 0, i;
 *         farface_status status;
 *
 *         if (fread(pixels, sizeof pixels, 1, stdin) != 1)
 *             return 1;
 *         image.width = 640;
 *         image.height = 480;
 *         image.format = FARFACE_FORMAT_RGB8;
 *         image.planes[0].data = pixels;
 *         image.planes[0].stride = sizeof pixels[0];
 *
 *         status = farface_model_load("model.safetensors", &model);
 *         if (status == FARFACE_OK)
 *             status = farface_session_create(model, NULL, &session);
 *         if (status == FARFACE_OK)
 *             status = farface_detect(session, &image, faces, 100, &count);
 *         if (status != FARFACE_OK)
 *             fprintf(stderr, "%s\n", farface_last_error());
 *         for (i = 0; i < count && i < 100; i++)
 *             printf("%.1f %.1f %.1f %.1f %.3f\n", faces[i].x, faces[i].y, faces[i].width,
 *                    faces[i].height, faces[i].score);
 *
 *         farface_session_destroy(session);
 *         farface_model_destroy(model);
 *         return status != FARFACE_OK;
 *     }
 *
 * Compile it with: cc program.c $(pkg-config --cflags --libs farface)
 *
 * What holds everywhere below:
 * - Pointers point to what their type says. NULL where something is needed is an error, never a
 *   crash; destroying NULL is fine.
 * - Strings are NUL-terminated. Sizes are pixels, bytes or numbers of entries, as named.
 * - Unless its comment says otherwise, a function may be called from any thread, and functions that
 *   take a session by one thread at a time for each session.
 * - Pictures and model files may come from anywhere: all sizes, offsets and products are checked
 *   before use.
 * - The environment variable FARFACE_ISA (generic, neon, avx2, avx512, amx) lowers the instruction set;
 *   nothing else of the environment is read (but the report of a bug heeds RUST_BACKTRACE).
 *
 * Sections: Version, Status and errors, Models, Options, Sessions, Pictures, Detection.
 *
 * Generated from src/capi; change it there.
 */
#ifndef FARFACE_H
#define FARFACE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* -------------------------------------------------------------------------------------------- */
/*
 * Version
 *
 * The macros tell what the program was compiled with, the functions what it runs with. Programs
 * compiled with an older header keep running as long as FARFACE_ABI_VERSION is the same; the
 * shared library's soname carries that number.
 */

/** Major version of this header. */
#define FARFACE_VERSION_MAJOR 0

/** Minor version of this header. */
#define FARFACE_VERSION_MINOR 1

/** Patch level of this header. */
#define FARFACE_VERSION_PATCH 0

/** Version of the binary interface: it changes only where a compiled program would break. */
#define FARFACE_ABI_VERSION 0

/** The library's version as text, such as "0.1.0". The text is static. */
const char *farface_version(void);

/**
 * The library's FARFACE_ABI_VERSION. A program that loads the library at run time compares it
 * with its own before any other call.
 */
uint32_t farface_abi_version(void);

/* -------------------------------------------------------------------------------------------- */
/*
 * Status and errors
 *
 * Every function that can fail returns a farface_status. The code is stable and meant for
 * programs; farface_last_error() adds a sentence for people, which names the file, the tensor or
 * the argument at fault. Where a function fails, what it should have written is not written,
 * unless its comment says otherwise; handles asked for are set to NULL.
 *
 * A bug inside the library is caught at this border, told on the standard error and returned as
 * FARFACE_ERROR_INTERNAL. A system that refuses the memory of a picture's maps is
 * FARFACE_ERROR_LIMIT_EXCEEDED; one that refuses even the small buffers beside them aborts the
 * process, as most systems do by themselves. The memory cap of a session keeps far from both.
 */

/** Result of a call: FARFACE_OK or one of the FARFACE_ERROR_ codes. Later versions may add codes. */
typedef int32_t farface_status;

/** All went well. */
#define FARFACE_OK 0

/** An argument or option is NULL or outside its range. */
#define FARFACE_ERROR_INVALID_ARGUMENT 1

/** A picture's size, format, planes, strides, rotation or region do not fit together. */
#define FARFACE_ERROR_INVALID_IMAGE 2

/** A file could not be read. */
#define FARFACE_ERROR_IO 3

/** A model file is malformed, truncated, of an unknown version, or lacks a tensor. */
#define FARFACE_ERROR_INVALID_MODEL 4

/** More pixels, memory or threads than the caps or the system allow. */
#define FARFACE_ERROR_LIMIT_EXCEEDED 5

/** This build or this machine lacks what was required. */
#define FARFACE_ERROR_UNSUPPORTED 6

/** There are more faces than the caller's array has room for. The best that fit are in it. */
#define FARFACE_ERROR_BUFFER_TOO_SMALL 7

/** Another thread is in a call with the same session. */
#define FARFACE_ERROR_BUSY 8

/** A bug in the library; please report it. The session concerned can only be destroyed. */
#define FARFACE_ERROR_INTERNAL 9

/** A CUDA device or one of its libraries failed in a call; the message names it. The session may be used again. */
#define FARFACE_ERROR_CUDA 10

/**
 * A few words for a status; "unknown status" for a number that is none. The text is static.
 *
 * Threads: any.
 */
const char *farface_status_string(farface_status status);

/**
 * Message of the last call that failed on this thread (UTF-8, at most 1023 bytes), or "" where
 * none has. A call that succeeds leaves it as it is, so look at it only after a failure.
 *
 * The text belongs to the library and is valid until this thread's next call; copy it to keep it.
 *
 * Threads: any; each has its own message.
 */
const char *farface_last_error(void);

/* -------------------------------------------------------------------------------------------- */
/*
 * Models
 *
 * A model is a network and its weights, read from one safetensors file. It is immutable: any
 * number of threads may use it, and any number of sessions share its one copy of the weights.
 * Each session holds the model by itself, so the handle may be destroyed before the sessions.
 */

/** A loaded model. */
typedef struct farface_model farface_model;

/**
 * Loads a model file. `path` is NUL-terminated: bytes as the system has them, UTF-8 on Windows.
 * No other file is touched and nothing is kept open.
 *
 * Ownership: `*model` is the caller's, for farface_model_destroy().
 * Threads: any.
 * Errors: FARFACE_ERROR_IO where the file cannot be read, FARFACE_ERROR_INVALID_MODEL with the
 * tensor or field that is wrong, FARFACE_ERROR_LIMIT_EXCEEDED for a file above 2 GiB; `*model` is
 * then NULL.
 */
farface_status farface_model_load(const char *path, farface_model **model);

/**
 * Loads a model from a model file's bytes. They are not kept: free them whenever you like.
 *
 * Ownership, threads and errors as with farface_model_load().
 */
farface_status farface_model_load_memory(const void *data, size_t size, farface_model **model);

/**
 * The model within the library: no file is read. A library built without the feature
 * `default-model`, as firmware may be, has none.
 *
 * Ownership: `*model` is the caller's, for farface_model_destroy().
 * Threads: any.
 * Errors: FARFACE_ERROR_UNSUPPORTED where the library has no model; `*model` is then NULL.
 */
farface_status farface_model_default(farface_model **model);

/**
 * Gives the model back. NULL is fine. Sessions made from it keep working.
 *
 * Threads: any, but no other call may be using the handle.
 */
void farface_model_destroy(farface_model *model);

/**
 * Name of the model, such as "retinaface-mobile025" (UTF-8); "" where the file has none.
 *
 * Ownership: the text is the model's, valid until farface_model_destroy().
 * Threads: any.
 */
farface_status farface_model_name(const farface_model *model, const char **name);

/**
 * Licence of the weights (UTF-8); "" where the file names none.
 *
 * Ownership: the text is the model's, valid until farface_model_destroy().
 * Threads: any.
 */
farface_status farface_model_licence(const farface_model *model, const char **licence);

/**
 * Data that the weights were trained on (UTF-8); "" where the file names none.
 *
 * Ownership: the text is the model's, valid until farface_model_destroy().
 * Threads: any.
 */
farface_status farface_model_training_data(const farface_model *model, const char **data);

/**
 * Sizes of face that the network finds in a picture that is not resized (for models with scales of
 * their own, in the pixels of one of these): `*smallest` and `*largest`, longer side in pixels.
 * Other sizes are found through `min_face_px` and `max_face_px` of the session's options, which
 * resize the picture.
 *
 * Threads: any.
 */
farface_status farface_model_detectable_px(const farface_model *model,
                                           float *smallest,
                                           float *largest);

/**
 * Number of trained values of the network.
 *
 * Threads: any.
 */
farface_status farface_model_parameter_count(const farface_model *model, uint64_t *count);

/* -------------------------------------------------------------------------------------------- */
/*
 * Options
 *
 * Fill the struct with farface_session_options_init(), change what you like, and hand it to
 * farface_session_create() or farface_session_set_options().
 *
 * Later versions add fields at the end. `struct_size` tells both sides which fields there are, so
 * that old programs run with newer libraries: only the fields that it covers wholly are read or
 * written, the others stand at the model's own settings. A program compiled with a newer header
 * runs as well, as long as the fields that this library does not know are zero.
 */

/** Which scales of the picture are searched: one of the FARFACE_PYRAMID_ values. */
typedef uint32_t farface_pyramid;

/**
 * The model's own scales where its file names some; else the picture as it is, and with
 * `min_face_px` or `max_face_px` the fewest and smallest levels on which all faces between them
 * are found.
 */
#define FARFACE_PYRAMID_AUTO 0

/**
 * Levels at scales 2^e for e = `pyramid_max`, `pyramid_max - pyramid_step`, ... `pyramid_min`.
 * Levels that cannot hold a face between `min_face_px` and `max_face_px` are left out.
 */
#define FARFACE_PYRAMID_OCTAVES 1

/**
 * Levels at the first `scale_count` of `scales`. Levels that cannot hold a face between
 * `min_face_px` and `max_face_px` are left out.
 */
#define FARFACE_PYRAMID_SCALES 2

/** Arithmetic of the network: one of the FARFACE_PRECISION_ values. */
typedef uint32_t farface_precision;

/**
 * Eight bits of a model that was quantized, else single precision; single precision of both on x86 CPUs without AVX2, or
 * with AVX-512 and no VNNI, where it is the faster one. On a CUDA device half precision with sums in single.
 */
#define FARFACE_PRECISION_AUTO 0

/** Single precision. */
#define FARFACE_PRECISION_F32 1

/** bf16, sums in single precision: half the memory, and faster on CPUs with AMX or AVX512-BF16 (slower on others). */
#define FARFACE_PRECISION_BF16 2

/**
 * Eight bits, sums of 32; an error for a model that was not quantized. x86 CPUs with AVX2 and no dot product of eight
 * bits round weights more coarsely, so that they find faces slightly otherwise.
 */
#define FARFACE_PRECISION_INT8 3

/**
 * Half precision, sums in single precision or of a few products in half: half the memory, and faster on CPUs with
 * FEAT_FP16 or AVX512-FP16 (slower on others). What is beyond 65504 becomes that.
 */
#define FARFACE_PRECISION_F16 4

/**
 * Single precision, the factors of convolutions rounded to TF32 (ten bits behind the point), sums in single: on CUDA
 * devices of compute capability 8.0 or later alone, an error on others and on the CPU.
 */
#define FARFACE_PRECISION_TF32 5

/** Where the network may run: one of the FARFACE_DEVICE_POLICY_ values. */
typedef uint32_t farface_device_policy;

/** The best device there is; the CPU, until CUDA has been measured. farface_session_device() tells. */
#define FARFACE_DEVICE_POLICY_AUTO 0

/** The CPU. */
#define FARFACE_DEVICE_POLICY_CPU 1

/** CUDA device `cuda_index` where it can be had, else the CPU; farface_session_device() tells. */
#define FARFACE_DEVICE_POLICY_PREFER_CUDA 2

/** CUDA device `cuda_index`, or FARFACE_ERROR_UNSUPPORTED. */
#define FARFACE_DEVICE_POLICY_REQUIRE_CUDA 3

/** What becomes of boxes that overlap: one of the FARFACE_SUPPRESSION_ values. */
typedef uint32_t farface_suppression;

/** The best box is kept, and what overlaps it by more than `nms_iou` is dropped; then the next best. */
#define FARFACE_SUPPRESSION_GREEDY 0

/**
 * Greedy; then each box that is left becomes the mean of all that overlapped it by more than
 * `voting_iou`, itself included, weighted with their scores. Score, landmarks and ellipse stay its
 * own (box voting, Gidaris and Komodakis 2015).
 */
#define FARFACE_SUPPRESSION_VOTING 1

/**
 * The best box is kept, and the score of what overlaps it by more than `nms_iou` is multiplied
 * with 1 - IoU; then the next best (soft-NMS, Bodla et al. 2017). What falls below
 * `score_threshold` is dropped.
 */
#define FARFACE_SUPPRESSION_SOFT_LINEAR 2

/** Soft-NMS with the factor exp(-IoU^2 / `soft_sigma`); `nms_iou` does not matter. */
#define FARFACE_SUPPRESSION_SOFT_GAUSSIAN 3

/** Settings of a session. */
typedef struct {
    /** sizeof(farface_session_options) of the program; farface_session_options_init() sets it. */
    size_t struct_size;
    /** Faces with a lower score are dropped; 0 to 1. Init: the model's. */
    float score_threshold;
    /**
     * Of two boxes that overlap by more than this (intersection over union, 0 to 1), the weaker
     * is dropped. Init: the model's.
     */
    float nms_iou;
    /** Best candidates that are compared with each other; 1 to 1000000. Init: the model's. */
    uint32_t max_candidates;
    /** Most faces returned, best first; 0 = no limit, which is the init. */
    uint32_t max_faces;
    /**
     * Smallest face wanted, longer side in pixels of the picture; 0 = no limit, which is the init.
     * Faces too small for the network as it is cost enlarged levels, but for models with scales of
     * their own, whose levels are only left out.
     */
    float min_face_px;
    /** Largest face wanted, likewise. Who wants large faces alone gets smaller levels and saves time. */
    float max_face_px;
    /** Scales searched. Init: FARFACE_PYRAMID_AUTO. */
    farface_pyramid pyramid;
    /** Smallest exponent of FARFACE_PYRAMID_OCTAVES. Init: 0. */
    float pyramid_min;
    /** Largest exponent; 1 doubles the picture. Init: 0. */
    float pyramid_max;
    /** Difference of neighbouring exponents, above 0. Init: 1. */
    float pyramid_step;
    /**
     * Longest side of a tile in pixels of a level; larger levels are cut into overlapping tiles,
     * whose faces equal those of the whole. 0 = as large as the memory cap allows: the init.
     */
    uint32_t tile_px;
    /** Threads, the caller's included; at most 64. 0 = as many as the process may use. Init: 1. */
    uint32_t threads;
    /** Most bytes of working memory of one picture; larger levels are cut into tiles. Init: 1 GiB. */
    uint64_t memory_cap;
    /** Arithmetic of the network. Init: FARFACE_PRECISION_AUTO. */
    farface_precision precision;
    /** Device. Init: FARFACE_DEVICE_POLICY_AUTO. */
    farface_device_policy device_policy;
    /** Index of the CUDA device, as the CUDA runtime counts. Init: 0. */
    uint32_t cuda_index;
    /** Zero. */
    uint32_t reserved;
    /** What else becomes of boxes that overlap. Init: FARFACE_SUPPRESSION_GREEDY. */
    farface_suppression suppression;
    /** Overlap of the boxes that vote with FARFACE_SUPPRESSION_VOTING, 0 to 1. Init: 0.5. */
    float voting_iou;
    /** Width of the decay of FARFACE_SUPPRESSION_SOFT_GAUSSIAN, above 0. Init: 0.5. */
    float soft_sigma;
    /**
     * 1: searches the mirrored picture too, which takes twice as long; boxes of both are then
     * compared with each other. 0, the init: does not.
     */
    uint32_t flip;
    /** Factors of FARFACE_PYRAMID_SCALES, in any order, each above 0. Init: 0. */
    float scales[16];
    /** How many of `scales` there are, 1 to 16. Init: 0. */
    uint32_t scale_count;
    /** Zero. */
    uint32_t reserved_too;
} farface_session_options;

/**
 * Fills `options` with the model's own settings, one thread and the limits stated above.
 * `struct_size` is the program's sizeof(farface_session_options); no byte behind it is written.
 *
 * Threads: any.
 * Errors: FARFACE_ERROR_INVALID_ARGUMENT for NULL or an impossible size.
 */
farface_status farface_session_options_init(farface_session_options *options,
                                            size_t struct_size,
                                            const farface_model *model);

/* -------------------------------------------------------------------------------------------- */
/*
 * Sessions
 *
 * A session is a detector at work: a model, settings, buffers and threads. One caller at a time
 * uses it, from whichever thread; a second caller gets FARFACE_ERROR_BUSY. A process may hold any
 * number of sessions. Its threads sleep between calls. They do not survive fork(): make the
 * session in the child.
 *
 * What depends on a picture's size is prepared at the first picture of that size and kept for the
 * last eight sizes. farface_session_warmup() does it ahead: detecting at a size that was warmed up
 * takes no memory from the system, and with one thread makes no system call at all.
 */

/** A detector at work. */
typedef struct farface_session farface_session;

/** Where a network runs: one of the FARFACE_DEVICE_ values. */
typedef uint32_t farface_device;

/** The CPU. */
#define FARFACE_DEVICE_CPU 1

/** A CUDA device. */
#define FARFACE_DEVICE_CUDA 2

/**
 * Makes a session. `options` may be NULL: the model's own settings on one thread.
 *
 * Ownership: `*session` is the caller's, for farface_session_destroy(). The model is held by the
 * session itself, `options` is not kept.
 * Threads: any.
 * Errors: FARFACE_ERROR_INVALID_ARGUMENT naming the option, FARFACE_ERROR_UNSUPPORTED where a
 * required device is missing, FARFACE_ERROR_LIMIT_EXCEEDED where threads cannot be started;
 * `*session` is then NULL.
 */
farface_status farface_session_create(const farface_model *model,
                                      const farface_session_options *options,
                                      farface_session **session);

/**
 * Gives the session, its memory and its threads back. NULL is fine.
 *
 * Threads: any, but no other call may be using the handle.
 */
void farface_session_destroy(farface_session *session);

/**
 * Reads the session's settings. Set `options->struct_size` to sizeof(farface_session_options)
 * before, or call farface_session_options_init().
 *
 * Errors: FARFACE_ERROR_INVALID_ARGUMENT for NULL or an impossible `struct_size`.
 */
farface_status farface_session_get_options(const farface_session *session,
                                           farface_session_options *options);

/**
 * Changes the session's settings, from the next call on. Fields behind `options->struct_size`
 * keep their values. Scores and overlaps cost nothing. Face sizes, pyramid, tiles, memory cap and
 * the numbers of candidates, faces and threads give up all that was prepared: warm up again where
 * the next call must not take memory.
 *
 * Errors: as farface_session_create(); the settings then stay as they were.
 */
farface_status farface_session_set_options(farface_session *session,
                                           const farface_session_options *options);

/**
 * Where the session's network runs: `*device` is FARFACE_DEVICE_CPU or FARFACE_DEVICE_CUDA,
 * `*index` the CUDA device's index, 0 for the CPU. Either may be NULL where it is not wanted.
 */
farface_status farface_session_device(const farface_session *session,
                                      farface_device *device,
                                      uint32_t *index);

/**
 * Prepares the session for pictures of `width` x `height` pixels, so that detecting on them takes
 * no memory. Size of the region of interest once upright: a 640 x 480 picture that is to be turned
 * by 90 degrees counts as 480 x 640.
 *
 * Errors: FARFACE_ERROR_INVALID_ARGUMENT for a size of 0, FARFACE_ERROR_LIMIT_EXCEEDED where the
 * picture or the smallest tile is too large for the caps.
 */
farface_status farface_session_warmup(farface_session *session, uint32_t width, uint32_t height);

/**
 * Bytes of memory that the session holds once warmed up for pictures of `width` x `height` pixels
 * (upright, as with farface_session_warmup()) and no other size, which is also the most it ever
 * holds on the way there. The weights, which belong to the model, and the stacks of threads are
 * not counted.
 *
 * Errors: as farface_session_warmup().
 */
farface_status farface_session_workspace_bytes(const farface_session *session,
                                               uint32_t width,
                                               uint32_t height,
                                               uint64_t *bytes);

/* -------------------------------------------------------------------------------------------- */
/*
 * Pictures
 *
 * A picture is described where it lies: nothing is copied beforehand and nothing is ever written.
 * Start from a zeroed struct (`farface_image image = {0};`), set size, format and planes; zero in
 * the other fields means upright, all of it, BT.601 limited range, in the CPU's memory.
 *
 * Formats of more than 8 bits and compressed pictures are the caller's to decode.
 */

/** How pixels lie in memory: one of the FARFACE_FORMAT_ values. */
typedef uint32_t farface_format;

/** One plane, 1 byte a pixel. */
#define FARFACE_FORMAT_GRAY8 1

/** One plane, 3 bytes a pixel: red, green, blue. */
#define FARFACE_FORMAT_RGB8 2

/** One plane, 3 bytes a pixel: blue, green, red. */
#define FARFACE_FORMAT_BGR8 3

/** One plane, 4 bytes a pixel: red, green, blue, alpha, which is ignored. */
#define FARFACE_FORMAT_RGBA8 4

/** One plane, 4 bytes a pixel: blue, green, red, alpha, which is ignored. */
#define FARFACE_FORMAT_BGRA8 5

/** Three planes (red, green, blue) of native-endian float in 0 to 255; any alignment will do. */
#define FARFACE_FORMAT_RGB_PLANAR_F32 6

/** 4:2:0. Plane 0: luma; plane 1: interleaved Cb, Cr at half size, rounded up. */
#define FARFACE_FORMAT_NV12 7

/** 4:2:0. Plane 0: luma; plane 1: interleaved Cr, Cb at half size, rounded up. */
#define FARFACE_FORMAT_NV21 8

/** 4:2:0. Planes luma, Cb, Cr; chroma at half size, rounded up. */
#define FARFACE_FORMAT_I420 9

/** 4:2:2 in one plane: Y0, Cb, Y1, Cr for every two pixels; rows of whole pairs. */
#define FARFACE_FORMAT_YUYV 10

/** Which standard a YUV picture was made with: one of the FARFACE_MATRIX_ values. */
typedef uint32_t farface_matrix;

/** ITU-R BT.601: standard definition, JPEG, most webcams. */
#define FARFACE_MATRIX_BT601 0

/** ITU-R BT.709: high definition. */
#define FARFACE_MATRIX_BT709 1

/** Which byte values a YUV picture uses: one of the FARFACE_RANGE_ values. */
typedef uint32_t farface_range;

/** Luma 16 to 235, chroma 16 to 240: video. */
#define FARFACE_RANGE_LIMITED 0

/** Both 0 to 255: JPEG. */
#define FARFACE_RANGE_FULL 1

/** Whose memory the planes are in: one of the FARFACE_MEMORY_ values. */
typedef uint32_t farface_memory;

/** The CPU's. */
#define FARFACE_MEMORY_HOST 0

/** That of the session's CUDA device; FARFACE_ERROR_UNSUPPORTED with a CPU session. */
#define FARFACE_MEMORY_CUDA 1

/** One plane of a picture. */
typedef struct {
    /** First byte of the top row. */
    const void *data;
    /**
     * Bytes from one row to the one below it, at least those of a row of pixels. Negative for
     * bottom-up pictures: the rows below the top one then lie before it in memory.
     */
    ptrdiff_t stride;
} farface_plane;

/** A rectangle of whole pixels. */
typedef struct {
    /** First column. */
    uint32_t x;
    /** First row. */
    uint32_t y;
    /** Columns. */
    uint32_t width;
    /** Rows. */
    uint32_t height;
} farface_rect;

/**
 * A picture in the caller's memory.
 *
 * Of each plane, the bytes from the first row to the last pixel of the last one must be there,
 * gaps between rows included; the last row needs no padding behind it. The caller keeps all of
 * them in place and unchanged during the call.
 */
typedef struct {
    /** Columns of the picture as stored; at most 2^24 a side and 2^31 pixels in all. */
    uint32_t width;
    /** Rows of the picture as stored. */
    uint32_t height;
    /** Pixel format. */
    farface_format format;
    /** Degrees by which the stored picture must be turned clockwise to be upright: 0, 90, 180, 270. */
    uint32_t rotation;
    /** 1: the stored picture must be mirrored left to right, before it is turned; else 0. */
    uint32_t mirrored;
    /** Colour standard of YUV formats. */
    farface_matrix matrix;
    /** Value range of YUV formats. */
    farface_range range;
    /** Memory of the planes. */
    farface_memory memory;
    /** Planes, as many as the format has; the others are not looked at. */
    farface_plane planes[3];
    /** Region of interest in stored pixels: only it is searched. All zero = the whole picture. */
    farface_rect roi;
    /** Zero. */
    uint32_t reserved[4];
} farface_image;

/* -------------------------------------------------------------------------------------------- */
/*
 * Detection
 *
 * Boxes, points and ellipses are in pixels of the picture as stored, before its rotation, whatever
 * the region of interest: origin at the top left corner, x to the right, y down, a pixel's centre
 * at .5. With the same model on the same instruction set, a picture gives the same bits at any
 * number of threads, alone or in any batch. On a CUDA device pictures of a batch are searched
 * together, and the last digits may depend on how many.
 */

/** `landmarks` of the face are set. */
#define FARFACE_FACE_LANDMARKS 1

/** `ellipse` of the face is set. */
#define FARFACE_FACE_ELLIPSE 2

/** An ellipse around a face. */
typedef struct {
    /** Centre, pixels. */
    float center_x;
    /** Centre, pixels. */
    float center_y;
    /** Longer half-axis, pixels. */
    float major;
    /** Shorter half-axis, pixels. */
    float minor;
    /** Direction of the longer axis in radians from the x axis, towards positive y. */
    float angle;
} farface_ellipse;

/** A face. The box may reach past the picture's border where the face does. */
typedef struct {
    /** Left side of the box, pixels. */
    float x;
    /** Upper side of the box, pixels. */
    float y;
    /** Width of the box, pixels. */
    float width;
    /** Height of the box, pixels. */
    float height;
    /** Probability, 0 to 1. */
    float score;
    /** FARFACE_FACE_ bits: which of the following are set. The others are zero. */
    uint32_t flags;
    /**
     * x and y of both eyes, the nose and both corners of the mouth, in pixels; the left one of the
     * upright picture first.
     */
    float landmarks[5][2];
    /** Ellipse, from models that have it. */
    farface_ellipse ellipse;
    /** Zero; room for later versions. */
    uint32_t reserved[11];
} farface_face;

/**
 * Finds the faces of a picture, best first, and writes them into the caller's `faces`, which has
 * room for `capacity` of them. `*count` is always the true number: where it exceeds `capacity`,
 * the best `capacity` are in `faces` and the result is FARFACE_ERROR_BUFFER_TOO_SMALL. `faces` may
 * be NULL where `capacity` is 0.
 *
 * Ownership: all of it stays the caller's; nothing is kept after the call.
 * Threads: one caller a session at a time.
 * Errors: FARFACE_ERROR_INVALID_IMAGE with the plane or field that is wrong,
 * FARFACE_ERROR_LIMIT_EXCEEDED for a picture too large for the caps; `*count` is then 0.
 */
farface_status farface_detect(farface_session *session,
                              const farface_image *image,
                              farface_face *faces,
                              size_t capacity,
                              size_t *count);

/**
 * Finds the faces of `image_count` pictures of any sizes and formats, as that many calls of
 * farface_detect() would. `faces` has room for `image_count * capacity` faces: those of picture i
 * begin at `faces + i * capacity`, and `counts[i]` is their true number. `statuses[i]` tells how
 * picture i went; `statuses` may be NULL.
 *
 * A picture that fails does not keep the others from being searched. The result is FARFACE_OK
 * where all went well, else the status of the first picture that did not, whose message
 * farface_last_error() has. Where the session cannot be entered at all, every status is the result.
 *
 * With a session on a CUDA device neighbours of one size are searched together, as many as its
 * memory cap allows, up to eight.
 *
 * Ownership and threads as with farface_detect().
 * Errors: those of the pictures; FARFACE_ERROR_INVALID_ARGUMENT where an array is NULL: no picture
 * is then searched and nothing written.
 */
farface_status farface_detect_batch(farface_session *session,
                                    const farface_image *images,
                                    size_t image_count,
                                    farface_face *faces,
                                    size_t capacity,
                                    size_t *counts,
                                    farface_status *statuses);

/**
 * Begins to search a picture on the caller's CUDA stream (a cudaStream_t of the session's device; NULL is CUDA's default stream) and
 * returns without waiting; farface_session_wait() brings the faces. A picture in CUDA memory and the stream must stay in place until
 * then; one in the host's memory is copied before this returns. The faces are lost where another call with the session that searches,
 * warms up or changes settings comes before farface_session_wait().
 *
 * Errors: those of farface_detect(); FARFACE_ERROR_UNSUPPORTED with a session on the CPU.
 */
farface_status farface_detect_async(farface_session *session,
                                    const farface_image *image,
                                    void *cuda_stream);

/**
 * Waits for the picture of farface_detect_async() and writes its faces as farface_detect() does.
 *
 * Errors: those of farface_detect(); FARFACE_ERROR_UNSUPPORTED with a session on the CPU.
 */
farface_status farface_session_wait(farface_session *session,
                                    farface_face *faces,
                                    size_t capacity,
                                    size_t *count);

#ifdef __cplusplus
}
#endif

#endif
