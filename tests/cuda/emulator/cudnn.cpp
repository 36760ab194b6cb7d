// A libcudnn.so.9 of the fused convolution and of a convolution's gradients alone, in plain loops: it refuses what cuDNN's documentation
// says that it refuses, and what would be slow, of another precision or of other bits every time there.

#include "library.hpp"

#include <atomic>
#include <mutex>
#include <vector>

using library::Type;

namespace {

enum Status {
    SUCCESS = 0,
    BAD_PARAM = 2000,
    BAD_PARAM_MISALIGNED_POINTER = 2003,
    BAD_PARAM_SIZE_INSUFFICIENT = 2006,
    BAD_PARAM_SHAPE_MISMATCH = 2008,
    NOT_SUPPORTED = 3000,
    NOT_SUPPORTED_LAYOUT = 3004,
    INTERNAL_ERROR = 4000,
    EXECUTION_FAILED_CUDA_DRIVER = 5001,
};

enum { IMPLICIT_GEMM = 0, IMPLICIT_PRECOMP_GEMM = 1, WINOGRAD = 6, WINOGRAD_NONFUSED = 7 };
// Of both gradients; those between are transforms.
enum { GRADIENT_0 = 0, GRADIENT_1 = 1, FILTER_GRADIENT_3 = 3 };
enum { DEFAULT_MATH = 0, TENSOR_OP_MATH = 1, FMA_MATH = 3 };
enum { RELU = 1, IDENTITY = 5 };

struct Handle {
    void *stream = nullptr;
    std::atomic<int> users{0};
};

struct Tensor {
    int type = -1, dims[4], strides[4]; // N, C, H, W
};
struct Filter {
    int type = -1, k, c, h, w;
};
struct Convolution {
    int pad[2], stride[2], dilation[2], mode = -1, compute = -1, math = DEFAULT_MATH;
};
struct Activation {
    int mode = -1, nan = -1;
};

// Counts the call: INTERNAL_ERROR where it is to fail.
#define ENTRY(needs_context)                                                                                     \
    if (farface_emulator_begin(needs_context))                                                                   \
    return INTERNAL_ERROR

// A handle must not be used by two threads at once.
struct Use {
    Handle *handle;
    bool alone;
    explicit Use(Handle *h) : handle(h), alone(h->users.fetch_add(1) == 0) {}
    ~Use() { handle->users--; }
};

Type type_of(int data) { return data == 0 ? Type::F32 : data == 2 ? Type::F16 : Type::BF16; }

bool is_type(int data) { return data == 0 || data == 2 || data == 9; }

template <class T> int create(T **made)
{
    ENTRY(false);
    *made = new T;
    farface_emulator_made(1);
    return SUCCESS;
}
template <class T> int destroy(T *made)
{
    delete made;
    farface_emulator_made(-1);
    return SUCCESS;
}

// Bytes from a tensor's first element to its last one's end.
std::size_t extent(const Tensor &t)
{
    std::size_t last = 0;
    for (int i = 0; i < 4; i++)
        last += (std::size_t)(t.dims[i] - 1) * t.strides[i];
    return (last + 1) * library::bytes(type_of(t.type));
}

// What all calls demand of a convolution's descriptors.
int check(const Tensor &x, const Filter &w, const Convolution &c, const Tensor &y)
{
    if (!is_type(x.type) || w.type != x.type || y.type != x.type || c.mode != 1 || c.compute != 0)
        return BAD_PARAM;
    if (x.dims[1] != w.c || y.dims[1] != w.k || y.dims[0] != x.dims[0])
        return BAD_PARAM_SHAPE_MISMATCH;
    const int window[2] = {w.h, w.w};
    for (int i = 0; i < 2; i++) {
        int reach = x.dims[2 + i] + 2 * c.pad[i] - (c.dilation[i] * (window[i] - 1) + 1);
        if (reach < 0 || y.dims[2 + i] != reach / c.stride[i] + 1)
            return BAD_PARAM_SHAPE_MISMATCH;
    }
    if (x.strides[1] != 1 || y.strides[1] != 1)
        return NOT_SUPPORTED_LAYOUT;
    // Tensor cores want vectors of eight channels; f32 is to stay f32, or to become TF32 where that was asked for.
    bool single = x.type == 0;
    if (!single && (c.math != TENSOR_OP_MATH || x.dims[1] % 8))
        return NOT_SUPPORTED;
    if (single && c.math != FMA_MATH && c.math != TENSOR_OP_MATH)
        return BAD_PARAM;
    return SUCCESS;
}

int check_forward(const Tensor &x, const Filter &w, const Convolution &c, const Tensor &y, int algo)
{
    if (int bad = check(x, w, c, y))
        return bad;
    switch (algo) {
    case IMPLICIT_GEMM:
    case IMPLICIT_PRECOMP_GEMM: return SUCCESS;
    case WINOGRAD:
    case WINOGRAD_NONFUSED: {
        bool fits = w.h == 3 && w.w == 3;
        for (int i = 0; i < 2; i++)
            fits = fits && c.stride[i] == 1 && c.dilation[i] == 1;
        return fits ? SUCCESS : NOT_SUPPORTED;
    }
    default: return NOT_SUPPORTED;
    }
}

std::size_t workspace_of(const Tensor &x, const Filter &w, const Tensor &y, int algo)
{
    switch (algo) {
    case IMPLICIT_PRECOMP_GEMM: return (std::size_t)y.dims[2] * y.dims[3] * 4 + 512;
    case WINOGRAD_NONFUSED: return (std::size_t)(x.dims[1] + w.k) * y.dims[2] * y.dims[3] * 16;
    default: return 0;
    }
}

// Whether a map's pixels lie one behind the other, all of their channels described: what gradients demand where the filter is NHWC.
bool packed(const Tensor &t)
{
    int c = t.dims[1], w = t.dims[3];
    return t.strides[1] == 1 && t.strides[3] == c && t.strides[2] == w * c && t.strides[0] == t.dims[2] * w * c;
}

// What both gradients demand. Filters are NHWC here (cudnnSetFilter4dDescriptor sees to it), for which the documentation lists ALGO_0
// and ALGO_1, the second of which is deterministic: nobody is to ask for another that runs.
int check_gradient(const Tensor &x, const Filter &w, const Convolution &c, const Tensor &y, int algo, bool of_filter)
{
    if (algo == GRADIENT_0 || (of_filter && algo == FILTER_GRADIENT_3))
        return BAD_PARAM;
    if (int bad = check(x, w, c, y))
        return bad;
    if (!packed(x) || !packed(y))
        return NOT_SUPPORTED_LAYOUT;
    // Gradients in f32 are to stay so.
    if (x.type == 0 && c.math != FMA_MATH)
        return BAD_PARAM;
    return algo == GRADIENT_1 ? SUCCESS : NOT_SUPPORTED;
}

std::size_t gradient_workspace(const Filter &w, bool of_filter)
{
    return of_filter ? (std::size_t)w.k * w.c * w.h * w.w * 8 + 512 : 768;
}

std::int64_t place(const Tensor &t, int n, int y, int x)
{
    return (std::int64_t)n * t.strides[0] + (std::int64_t)y * t.strides[2] + (std::int64_t)x * t.strides[3];
}

// Calls `f(n, output row and column, input row and column, tap)` for all of them that lie within both maps.
template <class F> void each_tap(const Tensor &x, const Filter &w, const Convolution &c, const Tensor &y, F f)
{
    for (int n = 0; n < y.dims[0]; n++)
        for (int oy = 0; oy < y.dims[2]; oy++)
            for (int ox = 0; ox < y.dims[3]; ox++)
                for (int ky = 0; ky < w.h; ky++)
                    for (int kx = 0; kx < w.w; kx++) {
                        int iy = oy * c.stride[0] - c.pad[0] + ky * c.dilation[0];
                        int ix = ox * c.stride[1] - c.pad[1] + kx * c.dilation[1];
                        if (iy >= 0 && iy < x.dims[2] && ix >= 0 && ix < x.dims[3])
                            f(place(y, n, oy, ox), place(x, n, iy, ix), ky * w.w + kx);
                    }
}

// alpha * sums + beta * what is there, rounded once; what is there is not read where beta is 0.
void blend(Type t, void *to, std::int64_t at, float alpha, float sum, float beta)
{
    library::store(t, to, at, beta == 0 ? alpha * sum : alpha * sum + beta * library::load(t, to, at));
}

// A gradient of x (written to dx) or of the filter (written to dw).
int gradient(Handle *handle, const float *alpha, const float *beta, const Tensor *xd, void *x, const Filter *wd, void *w,
             const Tensor *yd, const void *dy, const Convolution *cd, int algo, void *workspace, std::size_t size,
             bool of_filter)
{
    ENTRY(true);
    Use use(handle);
    if (!use.alone)
        return INTERNAL_ERROR;
    if (!alpha || !beta || !x || !w || !dy || x == dy || w == x || w == dy)
        return BAD_PARAM;
    if (int bad = check_gradient(*xd, *wd, *cd, *yd, algo, of_filter))
        return bad;
    if (farface_emulator_refuses() == 2)
        return NOT_SUPPORTED;
    Type t = type_of(xd->type);
    for (const void *p : {(const void *)x, (const void *)w, dy})
        if (!library::aligned(p, t == Type::F32 ? 4 : 16))
            return BAD_PARAM_MISALIGNED_POINTER;
    if (size < gradient_workspace(*wd, of_filter) || !library::aligned(workspace, 256))
        return BAD_PARAM_SIZE_INSUFFICIENT;
    std::size_t weights = (std::size_t)wd->k * wd->c * wd->h * wd->w;
    if (!library::inside(x, extent(*xd)) || !library::inside(dy, extent(*yd)) ||
        !library::inside(w, weights * library::bytes(t)) || !library::inside(workspace, size))
        return INTERNAL_ERROR;
    std::function<int()> work = [=, alpha = *alpha, beta = *beta, xd = *xd, wd = *wd, cd = *cd, yd = *yd] {
        library::spoil(workspace, size);
        std::vector<float> sums(of_filter ? weights : extent(xd) / library::bytes(t));
        int taps = wd.h * wd.w;
        each_tap(xd, wd, cd, yd, [&](std::int64_t from, std::int64_t to, int tap) {
            for (int k = 0; k < wd.k; k++) {
                float d = library::load(t, dy, from + k);
                std::int64_t row = ((std::int64_t)k * taps + tap) * wd.c;
                for (int c = 0; c < wd.c; c++)
                    if (of_filter)
                        sums[row + c] += d * library::load(t, x, to + c);
                    else
                        sums[to + c] += d * library::load(t, w, row + c);
            }
        });
        for (std::size_t i = 0; i < sums.size(); i++)
            blend(t, of_filter ? w : x, (std::int64_t)i, alpha, sums[i], beta);
        return 0;
    };
    return farface_emulator_run(handle->stream, &work) ? EXECUTION_FAILED_CUDA_DRIVER : SUCCESS;
}

int size_of_gradient(Handle *handle, const Tensor *x, const Filter *w, const Convolution *c, const Tensor *y, int algo,
                     bool of_filter, std::size_t *size)
{
    ENTRY(true);
    Use use(handle);
    if (!use.alone)
        return INTERNAL_ERROR;
    if (int bad = check_gradient(*x, *w, *c, *y, algo, of_filter))
        return bad;
    if (farface_emulator_refuses() == 1)
        return NOT_SUPPORTED;
    *size = gradient_workspace(*w, of_filter);
    return SUCCESS;
}

} // namespace

extern "C" {

std::size_t cudnnGetVersion() { return 91900; }
const char *cudnnGetErrorString(int) { return "an emulated CUDNN_STATUS"; }
int cudnnCreate(Handle **handle)
{
    ENTRY(true);
    *handle = new Handle;
    farface_emulator_made(1);
    return SUCCESS;
}
int cudnnDestroy(Handle *handle) { return destroy(handle); }
int cudnnSetStream(Handle *handle, void *stream)
{
    ENTRY(true);
    Use use(handle);
    handle->stream = stream;
    return use.alone ? SUCCESS : INTERNAL_ERROR;
}
int cudnnCreateTensorDescriptor(Tensor **t) { return create(t); }
int cudnnDestroyTensorDescriptor(Tensor *t) { return destroy(t); }
int cudnnSetTensorNdDescriptor(Tensor *t, int type, int count, const int *dims, const int *strides)
{
    ENTRY(false);
    if (count != 4 || !is_type(type))
        return NOT_SUPPORTED;
    t->type = type;
    for (int i = 0; i < 4; i++) {
        if (dims[i] <= 0 || strides[i] <= 0)
            return BAD_PARAM;
        t->dims[i] = dims[i];
        t->strides[i] = strides[i];
    }
    return SUCCESS;
}
int cudnnCreateFilterDescriptor(Filter **f) { return create(f); }
int cudnnDestroyFilterDescriptor(Filter *f) { return destroy(f); }
int cudnnSetFilter4dDescriptor(Filter *f, int type, int format, int k, int c, int h, int w)
{
    ENTRY(false);
    if (!is_type(type) || format != 1 || k <= 0 || c <= 0 || h <= 0 || w <= 0)
        return BAD_PARAM;
    f->type = type;
    f->k = k;
    f->c = c;
    f->h = h;
    f->w = w;
    return SUCCESS;
}
int cudnnCreateConvolutionDescriptor(Convolution **c) { return create(c); }
int cudnnDestroyConvolutionDescriptor(Convolution *c) { return destroy(c); }
int cudnnSetConvolution2dDescriptor(Convolution *c, int pad_h, int pad_w, int u, int v, int dilation_h,
                                    int dilation_w, int mode, int compute)
{
    ENTRY(false);
    if (pad_h < 0 || pad_w < 0 || u <= 0 || v <= 0 || dilation_h <= 0 || dilation_w <= 0)
        return BAD_PARAM;
    *c = Convolution{{pad_h, pad_w}, {u, v}, {dilation_h, dilation_w}, mode, compute};
    return SUCCESS;
}
int cudnnSetConvolutionMathType(Convolution *c, int math)
{
    ENTRY(false);
    c->math = math;
    return SUCCESS;
}
int cudnnCreateActivationDescriptor(Activation **a) { return create(a); }
int cudnnDestroyActivationDescriptor(Activation *a) { return destroy(a); }
int cudnnSetActivationDescriptor(Activation *a, int mode, int nan, double)
{
    ENTRY(false);
    *a = Activation{mode, nan};
    return SUCCESS;
}
int cudnnGetConvolutionForwardWorkspaceSize(Handle *handle, const Tensor *x, const Filter *w, const Convolution *c,
                                            const Tensor *y, int algo, std::size_t *size)
{
    ENTRY(true);
    Use use(handle);
    if (!use.alone)
        return INTERNAL_ERROR;
    if (int bad = check_forward(*x, *w, *c, *y, algo))
        return bad;
    if (farface_emulator_refuses() == 1)
        return NOT_SUPPORTED;
    *size = workspace_of(*x, *w, *y, algo);
    return SUCCESS;
}
int cudnnConvolutionBiasActivationForward(Handle *handle, const float *alpha1, const Tensor *xd, const void *x,
                                          const Filter *wd, const void *w, const Convolution *cd, int algo,
                                          void *workspace, std::size_t size, const float *alpha2, const Tensor *zd,
                                          const void *z, const Tensor *bd, const void *bias, const Activation *ad,
                                          const Tensor *yd, void *y)
{
    ENTRY(true);
    Use use(handle);
    if (!use.alone)
        return INTERNAL_ERROR;
    if (int bad = check_forward(*xd, *wd, *cd, *yd, algo))
        return bad;
    if (farface_emulator_refuses() == 2)
        return NOT_SUPPORTED;
    if ((ad->mode != RELU && ad->mode != IDENTITY) || ad->nan != 0)
        return BAD_PARAM;
    if (ad->mode == IDENTITY && algo != IMPLICIT_PRECOMP_GEMM)
        return NOT_SUPPORTED;
    // What is added lies as the output does; the bias is a pixel, of the output's type.
    if (std::memcmp(zd, yd, sizeof *zd) || bd->type != yd->type)
        return BAD_PARAM;
    if (bd->dims[0] != 1 || bd->dims[1] != wd->k || bd->dims[2] != 1 || bd->dims[3] != 1 || bd->strides[1] != 1)
        return BAD_PARAM;
    if (x == y || x == z)
        return BAD_PARAM;
    Type t = type_of(xd->type);
    std::size_t vector = t == Type::F32 ? 4 : 16;
    for (const void *p : {x, w, z, (const void *)y, bias})
        if (!library::aligned(p, vector))
            return BAD_PARAM_MISALIGNED_POINTER;
    if (size < workspace_of(*xd, *wd, *yd, algo) || (size && !library::aligned(workspace, 256)))
        return BAD_PARAM_SIZE_INSUFFICIENT;
    std::size_t weights = (std::size_t)wd->k * wd->c * wd->h * wd->w * library::bytes(t);
    if (!library::inside(x, extent(*xd)) || !library::inside(w, weights) || !library::inside(z, extent(*zd)) ||
        !library::inside(bias, wd->k * library::bytes(t)) || !library::inside(y, extent(*yd)) ||
        !library::inside(workspace, size))
        return INTERNAL_ERROR;
    std::function<int()> work = [=, a1 = *alpha1, a2 = *alpha2, xd = *xd, wd = *wd, cd = *cd, yd = *yd, mode = ad->mode] {
        library::spoil(workspace, size);
        for (int n = 0; n < yd.dims[0]; n++)
            for (int oy = 0; oy < yd.dims[2]; oy++)
                for (int ox = 0; ox < yd.dims[3]; ox++)
                    for (int k = 0; k < wd.k; k++) {
                        float sum = 0;
                        for (int ky = 0; ky < wd.h; ky++)
                            for (int kx = 0; kx < wd.w; kx++) {
                                int iy = oy * cd.stride[0] - cd.pad[0] + ky * cd.dilation[0];
                                int ix = ox * cd.stride[1] - cd.pad[1] + kx * cd.dilation[1];
                                if (iy < 0 || iy >= xd.dims[2] || ix < 0 || ix >= xd.dims[3])
                                    continue;
                                std::int64_t from = (std::int64_t)n * xd.strides[0] + (std::int64_t)iy * xd.strides[2] +
                                                    (std::int64_t)ix * xd.strides[3];
                                std::int64_t tap = (((std::int64_t)k * wd.h + ky) * wd.w + kx) * wd.c;
                                for (int c = 0; c < wd.c; c++)
                                    sum += library::load(t, x, from + c) * library::load(t, w, tap + c);
                            }
                        std::int64_t to = (std::int64_t)n * yd.strides[0] + (std::int64_t)oy * yd.strides[2] +
                                          (std::int64_t)ox * yd.strides[3] + k;
                        float v = a1 * sum + library::load(t, bias, k);
                        if (a2 != 0)
                            v += a2 * library::load(t, z, to);
                        if (mode == RELU && v < 0)
                            v = 0;
                        library::store(t, y, to, v);
                    }
        return 0;
    };
    return farface_emulator_run(handle->stream, &work) ? EXECUTION_FAILED_CUDA_DRIVER : SUCCESS;
}

int cudnnGetConvolutionBackwardDataWorkspaceSize(Handle *handle, const Filter *w, const Tensor *dy, const Convolution *c,
                                                 const Tensor *dx, int algo, std::size_t *size)
{
    return size_of_gradient(handle, dx, w, c, dy, algo, false, size);
}
int cudnnGetConvolutionBackwardFilterWorkspaceSize(Handle *handle, const Tensor *x, const Tensor *dy,
                                                   const Convolution *c, const Filter *dw, int algo, std::size_t *size)
{
    return size_of_gradient(handle, x, dw, c, dy, algo, true, size);
}
int cudnnConvolutionBackwardData(Handle *handle, const float *alpha, const Filter *wd, const void *w, const Tensor *yd,
                                 const void *dy, const Convolution *cd, int algo, void *workspace, std::size_t size,
                                 const float *beta, const Tensor *xd, void *dx)
{
    return gradient(handle, alpha, beta, xd, dx, wd, (void *)w, yd, dy, cd, algo, workspace, size, false);
}
int cudnnConvolutionBackwardFilter(Handle *handle, const float *alpha, const Tensor *xd, const void *x, const Tensor *yd,
                                   const void *dy, const Convolution *cd, int algo, void *workspace, std::size_t size,
                                   const float *beta, const Filter *wd, void *dw)
{
    return gradient(handle, alpha, beta, xd, (void *)x, wd, dw, yd, dy, cd, algo, workspace, size, true);
}

} // extern "C"
