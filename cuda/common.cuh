// What every kernel file begins with: types of two bytes, vectors of sixteen, and the way a kernel is declared.
//
// Kernels take one struct by value, whose fields stand in src/gpu in the same order. They include no header of the CUDA toolkit, so that
// NVRTC alone compiles them; tests compile the same files as C++, where FARFACE_EMULATED is defined (tests/cuda/emulator).
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

struct f16 {
    u16 bits;
};
struct bf16 {
    u16 bits;
};
// An f32 that is multiplied with ten bits behind the point.
struct tf32 {
    u32 bits;
};

// Sixteen bytes, loaded and stored at once.
struct __align__(16) Vec16 {
    u32 words[4];
};

#define DEVICE static __device__ __forceinline__

#ifndef FARFACE_EMULATED

// A kernel of this name that takes `Args a`, for blocks of `threads` threads, of which at least `blocks` shall fit a multiprocessor.
#define KERNEL_FOR(name, Args, threads, blocks) \
    extern "C" __global__ void __launch_bounds__(threads, blocks) name(const __grid_constant__ Args a)
#define KERNEL(name, Args, threads) KERNEL_FOR(name, Args, threads, 1)

DEVICE float to_float(f16 v)
{
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v.bits));
    return f;
}
DEVICE u16 f16_bits(float v)
{
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(v));
    return bits;
}

// Sixteen bytes from global to shared memory, to be waited for; zeros where `inside` is false.
DEVICE void copy_async(void *shared, const void *global, bool inside)
{
#if __CUDA_ARCH__ >= 800
    u32 to = (u32)__cvta_generic_to_shared(shared);
    int bytes = inside ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
#else
    Vec16 zeros = {{0, 0, 0, 0}};
    *(Vec16 *)shared = inside ? *(const Vec16 *)global : zeros;
#endif
}
// Ends a group of copies.
DEVICE void copy_commit()
{
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until at most `N` groups of copies are under way.
template <int N> DEVICE void copy_wait()
{
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// Four 8x8 matrices of 16-bit values; lane i gives the address of row i % 8 of matrix i / 8.
DEVICE void load_matrices(u32 r[4], const void *row)
{
#if __CUDA_ARCH__ >= 750
    u32 from = (u32)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from)
                 : "memory");
#else
    __trap(); // no kernel that comes here is launched on such a device
#endif
}

// As load_matrices, each of them transposed.
DEVICE void load_transposed(u32 r[4], const void *row)
{
#if __CUDA_ARCH__ >= 750
    u32 from = (u32)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from)
                 : "memory");
#else
    __trap(); // as above
#endif
}

// c += a * b on tensor cores: 16x16 by 16x8.
DEVICE void multiply(float c[4], const u32 a[4], u32 b0, u32 b1, f16)
{
#if __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#elif __CUDA_ARCH__ >= 750
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(b0));
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}
DEVICE void multiply(float c[4], const u32 a[4], u32 b0, u32 b1, bf16)
{
#if __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// As above, 16x8 by 8x8, of factors that round_factors has rounded.
DEVICE void multiply(float c[4], const u32 a[4], u32 b0, u32 b1, tf32)
{
#if __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// To the nearest TF32 value, ties away from zero: what a product of others gives is undefined.
DEVICE u32 tf32_bits(float v)
{
#if __CUDA_ARCH__ >= 800
    u32 bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(v));
    return bits;
#else
    return __float_as_uint(v); // as load_matrices
#endif
}

// The block's dynamic shared memory.
DEVICE u8 *shared_bytes()
{
    extern __shared__ __align__(128) u8 farface_shared[];
    return farface_shared;
}

#else

DEVICE float to_float(f16 v);
DEVICE u16 f16_bits(float v);
DEVICE u32 tf32_bits(float v);

#endif

// Makes factors what `multiply` takes: f32 are rounded, halves are that already.
template <class T> DEVICE void round_factors(u32[4], T) {}
DEVICE void round_factors(u32 four[4], tf32)
{
#pragma unroll
    for (int i = 0; i < 4; i++)
        four[i] = tf32_bits(__uint_as_float(four[i]));
}

DEVICE float to_float(float v) { return v; }
DEVICE float to_float(bf16 v) { return __uint_as_float((u32)v.bits << 16); }

// To the nearest value of a type, ties to even; f16 ends at its largest number rather than at infinity, NaN stays NaN.
DEVICE void set(float &to, float v) { to = v; }
DEVICE void set(f16 &to, float v)
{
    float most = 65504.0f;
    to.bits = f16_bits(v > most ? most : v < -most ? -most : v);
}
DEVICE void set(bf16 &to, float v)
{
    u32 bits = __float_as_uint(v);
    // A NaN stays one where its low half would round it away.
    to.bits = v != v ? (u16)(bits >> 16 | 0x40) : (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// max(v, slope * v), slope 0 to 1: ReLU, leaky ReLU or nothing.
DEVICE float activate(float v, float slope)
{
    float scaled = v * slope;
    return v > scaled ? v : scaled;
}

// Adds to a thread's sums of 4 x 4 what DEPTH rows of left and right values give, which lie PITCH apart.
template <int DEPTH, int PITCH> DEVICE void add_products(float sums[4][4], const float *left, const float *right)
{
#pragma unroll
    for (int d = 0; d < DEPTH; d++)
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < 4; j++)
                sums[i][j] += left[d * PITCH + i] * right[d * PITCH + j];
}

// A map of images in channels-last order; strides are elements. Behind the channels of a pixel are `tail` more that hold zeros.
struct Map {
    void *data;
    i64 image, row, pixel;
    int n, h, w, c;
    // What its elements are: 0 f32, 1 f16, 2 bf16.
    int type;
    int tail;
};

template <class T> DEVICE T *pixel_of(const Map &m, int n, int y, int x)
{
    return (T *)m.data + n * m.image + y * m.row + x * m.pixel;
}

// Whatever the type.
DEVICE float load(const Map &m, i64 at)
{
    switch (m.type) {
    case 1: return to_float(((const f16 *)m.data)[at]);
    case 2: return to_float(((const bf16 *)m.data)[at]);
    default: return ((const float *)m.data)[at];
    }
}
DEVICE void store(const Map &m, i64 at, float v)
{
    switch (m.type) {
    case 1: set(((f16 *)m.data)[at], v); break;
    case 2: set(((bf16 *)m.data)[at], v); break;
    default: ((float *)m.data)[at] = v;
    }
}
// Eight neighbouring values of a map, the first `count` of them; the others become zeros.
DEVICE void load_eight(const Map &m, i64 at, int count, float v[8])
{
    const u16 *halves = (const u16 *)m.data + at;
    if (m.type != 0 && count >= 8 && (u64)halves % 16 == 0) {
        Vec16 vector = *(const Vec16 *)halves;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            u16 bits = (u16)(vector.words[i / 2] >> i % 2 * 16);
            f16 half = {bits};
            bf16 brain = {bits};
            v[i] = m.type == 1 ? to_float(half) : to_float(brain);
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; i++)
        v[i] = i < count ? load(m, at + i) : 0.0f;
}
// The first `count` of eight values to a map.
DEVICE void store_eight(const Map &m, i64 at, int count, const float v[8])
{
    u16 *halves = (u16 *)m.data + at;
    if (m.type != 0 && count >= 8 && (u64)halves % 16 == 0) {
        Vec16 vector;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            f16 half;
            bf16 brain;
            set(half, v[i]);
            set(brain, v[i]);
            u32 bits = m.type == 1 ? half.bits : brain.bits;
            vector.words[i / 2] = i % 2 ? vector.words[i / 2] | bits << 16 : bits;
        }
        *(Vec16 *)halves = vector;
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (i < count)
            store(m, at + i, v[i]);
}
DEVICE i64 at(const Map &m, int n, int y, int x) { return n * m.image + y * m.row + x * m.pixel; }

// Source index of `dst` on an axis that goes from `from` to `to` values: PyTorch's `nearest` (layers/upsample).
DEVICE int nearest_source(int dst, int from, int to)
{
    float scale = __fdiv_rn((float)from, (float)to);
    int source = (int)__fmul_rn((float)dst, scale);
    return source < from - 1 ? source : from - 1;
}

struct Place {
    int n, y, x, c;
    bool inside;
};

// The output value of this thread, the tail counted with the channels.
DEVICE Place place_of(const Map &output)
{
    // A map has less than 2^31 values.
    u32 channels = (u32)(output.c + output.tail), index = blockIdx.x * blockDim.x + threadIdx.x;
    Place p;
    p.c = (int)(index % channels);
    index /= channels;
    p.x = (int)(index % (u32)output.w);
    index /= (u32)output.w;
    p.y = (int)(index % (u32)output.h);
    p.n = (int)(index / (u32)output.h);
    p.inside = p.n < output.n;
    return p;
}

DEVICE i64 at(const Map &m, const Place &p) { return at(m, p.n, p.y, p.x) + p.c; }

// Sources of `dst` on an axis, and the weight of the second: PyTorch's `bilinear`, align_corners=False (layers/upsample).
DEVICE void bilinear_source(int dst, int from, int to, int *low, int *high, float *weight)
{
    float scale = __fdiv_rn((float)from, (float)to);
    float position = __fsub_rn(__fmul_rn(__fadd_rn((float)dst, 0.5f), scale), 0.5f);
    position = position < 0.0f ? 0.0f : position;
    int source = (int)position;
    *low = source < from - 1 ? source : from - 1;
    *high = *low + 1 < from - 1 ? *low + 1 : from - 1;
    *weight = position - (float)*low;
}

// Most samples of a bin along an axis: boxes are data, and data must not make the work unbounded.
const int MOST_SAMPLES = 256;

// The two cells around `v` on an axis of `cells`, and the weight of the second.
DEVICE void split(float v, int cells, int *low, int *high, float *weight)
{
    v = fmaxf(v, 0.0f);
    *low = v < (float)(cells - 1) ? (int)v : cells - 1;
    *high = *low == cells - 1 ? *low : *low + 1;
    *weight = *low == cells - 1 ? 0.0f : v - (float)*low;
}

DEVICE bool is_number(float v) { return (__float_as_uint(v) & 0x7f800000) != 0x7f800000; }

// As a u32 that rises with the float (f32::total_cmp).
DEVICE u32 ascending(float v)
{
    u32 bits = __float_as_uint(v);
    return bits & 0x80000000 ? ~bits : bits | 0x80000000;
}

// Of a training's objective: a box by its corners.
struct Rect {
    float x1, y1, x2, y2;
};

// Bits of `Face::flags`.
const u32 FACE_IGNORED = 1; // neither face nor background
const u32 FACE_WHOLE = 2;   // its corners are numbers and in order: others overlap nothing

// A face of the annotation, in pixels of the network's input.
struct Face {
    Rect box;
    u32 flags;
    u32 picture;
};

// Labels of anchors that learn no face: background, or nothing.
const int BACKGROUND = -1, IGNORED = -2;

// What the losses of an anchor are multiplied by.
struct Weight {
    float logit, box;
};

// Bits of `AnchorGroup::parts`.
const u32 HAS_LOGITS = 1, HAS_BOXES = 2;

// Anchors of one size on the cells of a map, and where the outputs have what the network says of them.
struct AnchorGroup {
    u32 first; // of its anchors among a picture's
    u32 cells, columns;
    float stride, width, height;
    // From a cell to the next; from an offset to the next.
    u32 logit_cell, box_cell, box_step;
    u32 parts; // which of both there are
    // The first value of the first picture's first cell, and from a picture to the next.
    i64 logits, logit_picture, boxes, box_picture;
};

// Centre and size of an anchor, pixels.
struct AnchorBox {
    float x, y, w, h;
};

// All anchors of a picture, in order of their numbers; every picture of a batch has them.
struct Anchors {
    const AnchorGroup *groups;
    const AnchorBox *moved; // of every picture, where a first step moved them; none: they lie on their cells
    u32 group_count;
    u32 count;
};

// The last group that does not begin behind anchor `i`; groups without cells begin where the next one does.
DEVICE u32 group_of(const Anchors &a, u32 i)
{
    u32 low = 0, high = a.group_count - 1;
    while (low < high) {
        u32 middle = (low + high + 1) / 2;
        if (a.groups[middle].first <= i)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

DEVICE AnchorBox anchor_on(const AnchorGroup &g, u32 cell)
{
    u32 y = cell / g.columns, x = cell - y * g.columns;
    AnchorBox p = {__fmul_rn((float)x + 0.5f, g.stride), __fmul_rn((float)y + 0.5f, g.stride), g.width, g.height};
    return p;
}

// Anchor `i` of picture `n`, which is one of the group's.
DEVICE AnchorBox anchor_of(const Anchors &a, const AnchorGroup &g, u32 n, u32 i)
{
    return a.moved ? a.moved[(i64)n * a.count + i] : anchor_on(g, i - g.first);
}

DEVICE Rect corners(float x, float y, float half_w, float half_h)
{
    Rect r = {__fsub_rn(x, half_w), __fsub_rn(y, half_h), __fadd_rn(x, half_w), __fadd_rn(y, half_h)};
    return r;
}
DEVICE Rect corners(const AnchorBox &p) { return corners(p.x, p.y, p.w * 0.5f, p.h * 0.5f); }

// Areas and IoU as `BBox` has them, operation by operation: thresholds decide by their last bit.
DEVICE float rect_area(const Rect &r)
{
    return __fmul_rn(fmaxf(__fsub_rn(r.x2, r.x1), 0.0f), fmaxf(__fsub_rn(r.y2, r.y1), 0.0f));
}
DEVICE float rect_shared(const Rect &a, const Rect &b)
{
    float w = fmaxf(__fsub_rn(fminf(a.x2, b.x2), fmaxf(a.x1, b.x1)), 0.0f);
    float h = fmaxf(__fsub_rn(fminf(a.y2, b.y2), fmaxf(a.y1, b.y1)), 0.0f);
    return __fmul_rn(w, h);
}
DEVICE float rect_iou(const Rect &a, const Rect &b)
{
    float shared = rect_shared(a, b);
    float all = __fsub_rn(__fadd_rn(rect_area(a), rect_area(b)), shared);
    return all > 0.0f ? __fdiv_rn(shared, all) : 0.0f;
}

DEVICE bool is_number(const Rect &r) { return is_number(r.x1) && is_number(r.y1) && is_number(r.x2) && is_number(r.y2); }
// Whether a box is none: without an area, or no number.
DEVICE bool is_empty(const Rect &r) { return !is_number(r) || !(r.x2 - r.x1 > 0.0f) || !(r.y2 - r.y1 > 0.0f); }

// The offsets of the anchor on a cell of picture `n`.
DEVICE void offsets_on(const float *values, const AnchorGroup &g, u32 n, u32 cell, float t[4])
{
    const float *from = values + g.boxes + n * g.box_picture + (i64)cell * g.box_cell;
#pragma unroll
    for (int k = 0; k < 4; k++)
        t[k] = from[k * g.box_step];
}

// The box that offsets mean on an anchor (`Anchor::decode`).
DEVICE Rect decode_on(const AnchorBox &p, const float t[4], float center, float size)
{
    float x = __fadd_rn(p.x, __fmul_rn(__fmul_rn(t[0], center), p.w));
    float y = __fadd_rn(p.y, __fmul_rn(__fmul_rn(t[1], center), p.h));
    float w = __fmul_rn(p.w, expf(__fmul_rn(t[2], size))), h = __fmul_rn(p.h, expf(__fmul_rn(t[3], size)));
    return corners(x, y, w * 0.5f, h * 0.5f);
}

// The anchor on a cell as the offsets of a first step move it (`Anchor::moved`), by way of the corners as there.
DEVICE AnchorBox moved_on(const float *values, const AnchorGroup &g, u32 n, u32 cell)
{
    float t[4];
    offsets_on(values, g, n, cell, t);
    Rect r = decode_on(anchor_on(g, cell), t, 1.0f, 1.0f);
    AnchorBox p = {__fmul_rn(__fadd_rn(r.x1, r.x2), 0.5f), __fmul_rn(__fadd_rn(r.y1, r.y2), 0.5f), __fsub_rn(r.x2, r.x1), __fsub_rn(r.y2, r.y1)};
    return p;
}

// Whether a first step leaves the anchor on a cell to the second: its logit, if it has one, passes. False for a NaN too.
DEVICE bool passes_on(const float *values, const AnchorGroup &g, u32 n, u32 cell, float survives)
{
    return !(g.parts & HAS_LOGITS) || values[g.logits + n * g.logit_picture + (i64)cell * g.logit_cell] > survives;
}

// An IoU above 0 and a number, so that a higher key is a higher IoU or, of equal ones, the lower number. Never 0.
DEVICE u64 key_of(float iou, u32 number) { return (u64)__float_as_uint(iou) << 32 | (u32)~number; }
DEVICE u32 number_of(u64 key) { return ~(u32)key; }
DEVICE float iou_of(u64 key) { return __uint_as_float((u32)(key >> 32)); }
