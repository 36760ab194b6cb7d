// A libcublasLt.so.13 of products with bias, in plain loops, strict about types, leading dimensions, alignment and workspace.

#include "library.hpp"

using library::Type;

namespace {

enum Status {
    SUCCESS = 0,
    INVALID_VALUE = 7,
    EXECUTION_FAILED = 13,
    INTERNAL_ERROR = 14,
    NOT_SUPPORTED = 15,
};

enum { R_32F = 0, R_16F = 2, R_16BF = 14, COMPUTE_32F = 68, COMPUTE_32F_FAST_TF32 = 77 };
enum { EPILOGUE_BIAS = 4, EPILOGUE_RELU_BIAS = 6 };
enum { SCHEME_COMPUTE_TYPE = 2 };

struct Desc {
    int transposed_a = 0;
    unsigned epilogue = 1;
    const void *bias = nullptr;
};
struct Layout {
    int type;
    std::uint64_t rows, columns;
    std::int64_t leading;
    bool operator==(const Layout &o) const
    {
        return type == o.type && rows == o.rows && columns == o.columns && leading == o.leading;
    }
};
struct Preference {
    std::uint64_t workspace = 0;
    unsigned schemes = 7, aligned[4] = {256, 256, 256, 256};
};
struct Algorithm {
    std::uint64_t data[8];
};
struct Found {
    Algorithm algorithm;
    std::size_t workspace;
    int state;
    float waves;
    int reserved[4];
};

const std::uint64_t MAGIC = 0x66617266616365;

#define ENTRY(needs_context)                                                                                     \
    if (farface_emulator_begin(needs_context))                                                                   \
    return INTERNAL_ERROR

template <class T> int made(T **to, T value)
{
    *to = new T(value);
    farface_emulator_made(1);
    return SUCCESS;
}
template <class T> int destroy(T *value)
{
    delete value;
    farface_emulator_made(-1);
    return SUCCESS;
}

bool is_type(int type) { return type == R_32F || type == R_16F || type == R_16BF; }
Type type_of(int type) { return type == R_32F ? Type::F32 : type == R_16F ? Type::F16 : Type::BF16; }

std::size_t extent(const Layout &l)
{
    return ((l.columns - 1) * l.leading + l.rows) * library::bytes(type_of(l.type));
}

// C and D by A transposed and B: the shapes and the types that cuBLASLt's table has for sums in f32.
int check(const Desc &d, const Layout &a, const Layout &b, const Layout &c, const Layout &out)
{
    if (!d.transposed_a || a.rows != b.rows || a.columns != out.rows || b.columns != out.columns)
        return INVALID_VALUE;
    if (c.rows != out.rows || c.columns != out.columns || c.type != out.type || a.type != b.type)
        return INVALID_VALUE;
    bool types = out.type == a.type || out.type == R_32F;
    bool epilogue = d.epilogue == EPILOGUE_BIAS || d.epilogue == EPILOGUE_RELU_BIAS;
    return types && epilogue ? SUCCESS : NOT_SUPPORTED;
}

// The second algorithm splits the depth, copies sixteen bytes at once and adds the parts up in its workspace.
std::size_t split_workspace(const Layout &out) { return out.rows * out.columns * 2 * sizeof(float); }

bool vectors(const Layout &l) { return l.leading * library::bytes(type_of(l.type)) % 16 == 0; }

} // namespace

extern "C" {

const char *cublasLtGetStatusName(int) { return "an emulated CUBLAS_STATUS"; }
int cublasLtCreate(int **handle)
{
    ENTRY(true);
    return made(handle, 0);
}
int cublasLtDestroy(int *handle) { return destroy(handle); }
int cublasLtMatmulDescCreate(Desc **desc, int compute, int scale)
{
    ENTRY(false);
    if ((compute != COMPUTE_32F && compute != COMPUTE_32F_FAST_TF32) || scale != R_32F)
        return INVALID_VALUE;
    return made(desc, Desc{});
}
int cublasLtMatmulDescDestroy(Desc *desc) { return destroy(desc); }
int cublasLtMatmulDescSetAttribute(Desc *desc, int attribute, const void *data, std::size_t size)
{
    ENTRY(false);
    if (attribute == 3 && size == 4)
        std::memcpy(&desc->transposed_a, data, size);
    else if (attribute == 7 && size == 4)
        std::memcpy(&desc->epilogue, data, size);
    else if (attribute == 8 && size == 8)
        std::memcpy(&desc->bias, data, size);
    else
        return INVALID_VALUE;
    return SUCCESS;
}
int cublasLtMatrixLayoutCreate(Layout **layout, int type, std::uint64_t rows, std::uint64_t columns,
                               std::int64_t leading)
{
    ENTRY(false);
    if (!is_type(type) || !rows || !columns || leading < (std::int64_t)rows)
        return INVALID_VALUE;
    return made(layout, Layout{type, rows, columns, leading});
}
int cublasLtMatrixLayoutDestroy(Layout *layout) { return destroy(layout); }
int cublasLtMatmulPreferenceCreate(Preference **preference)
{
    ENTRY(false);
    return made(preference, Preference{});
}
int cublasLtMatmulPreferenceDestroy(Preference *preference) { return destroy(preference); }
int cublasLtMatmulPreferenceSetAttribute(Preference *p, int attribute, const void *data, std::size_t size)
{
    ENTRY(false);
    if (attribute == 1 && size == 8)
        std::memcpy(&p->workspace, data, size);
    else if (attribute == 3 && size == 4)
        std::memcpy(&p->schemes, data, size);
    else if (attribute >= 5 && attribute <= 8 && size == 4) {
        unsigned aligned;
        std::memcpy(&aligned, data, size);
        if (aligned == 0 || (aligned & (aligned - 1)))
            return INVALID_VALUE;
        p->aligned[attribute - 5] = aligned;
    } else
        return INVALID_VALUE;
    return SUCCESS;
}
int cublasLtMatmulAlgoGetHeuristic(int *, const Desc *desc, const Layout *a, const Layout *b, const Layout *c,
                                   const Layout *d, const Preference *p, int most, Found *found, int *count)
{
    ENTRY(true);
    *count = 0;
    if (most <= 0 || !desc->bias || !library::aligned(desc->bias, 16))
        return INVALID_VALUE;
    if (int bad = check(*desc, *a, *b, *c, *d))
        return bad;
    auto add = [&](std::uint64_t which, std::size_t workspace, int state) {
        if (*count < most)
            found[(*count)++] = Found{{{MAGIC, which}}, workspace, state, 1.0f, {}};
    };
    add(0, 0, SUCCESS);
    bool wide = vectors(*a) && vectors(*b) && p->aligned[0] >= 16 && p->aligned[1] >= 16;
    std::size_t workspace = split_workspace(*d);
    if (wide && (p->schemes & SCHEME_COMPUTE_TYPE) && workspace <= p->workspace)
        add(1, workspace, SUCCESS);
    // One whose result says that it does not do.
    add(2, 0, NOT_SUPPORTED);
    return SUCCESS;
}
int cublasLtMatmul(int *, const Desc *desc, const float *alpha, const void *a, const Layout *al, const void *b,
                   const Layout *bl, const float *beta, const void *c, const Layout *cl, void *d, const Layout *dl,
                   const Algorithm *algorithm, void *workspace, std::size_t size, void *stream)
{
    ENTRY(true);
    if (int bad = check(*desc, *al, *bl, *cl, *dl))
        return bad;
    if (algorithm->data[0] != MAGIC || algorithm->data[1] > 1)
        return NOT_SUPPORTED;
    bool split = algorithm->data[1] == 1;
    if (split && (size < split_workspace(*dl) || !library::aligned(workspace, 16) || !library::aligned(a, 16) ||
                  !library::aligned(b, 16)))
        return INVALID_VALUE;
    // In place, both descriptions are the same.
    if ((c == d && !(*cl == *dl)) || a == d || b == d)
        return INVALID_VALUE;
    Type in = type_of(al->type), out = type_of(dl->type);
    if (!library::aligned(a, library::bytes(in)) || !library::aligned(b, library::bytes(in)) ||
        !library::aligned(c, library::bytes(out)) || !library::aligned(d, library::bytes(out)) ||
        !library::aligned(desc->bias, 16))
        return INVALID_VALUE;
    if (!library::inside(a, extent(*al)) || !library::inside(b, extent(*bl)) || !library::inside(c, extent(*cl)) ||
        !library::inside(d, extent(*dl)) || !library::inside(desc->bias, dl->rows * library::bytes(out)) ||
        !library::inside(workspace, size))
        return INTERNAL_ERROR;
    std::function<int()> work = [=, al = *al, bl = *bl, cl = *cl, dl = *dl, desc = *desc, alpha = *alpha, beta = *beta] {
        library::spoil(workspace, size);
        std::uint64_t depth = al.rows, half = split ? depth / 2 : depth;
        for (std::uint64_t n = 0; n < dl.columns; n++)
            for (std::uint64_t m = 0; m < dl.rows; m++) {
                float parts[2] = {0, 0};
                for (std::uint64_t k = 0; k < depth; k++)
                    parts[k >= half] += library::load(in, a, (std::int64_t)(m * al.leading + k)) *
                                        library::load(in, b, (std::int64_t)(n * bl.leading + k));
                float v = alpha * (parts[0] + parts[1]);
                if (beta != 0)
                    v += beta * library::load(out, c, (std::int64_t)(n * cl.leading + m));
                v += library::load(out, desc.bias, (std::int64_t)m);
                if (desc.epilogue == EPILOGUE_RELU_BIAS && v < 0)
                    v = 0;
                library::store(out, d, (std::int64_t)(n * dl.leading + m), v);
            }
        return 0;
    };
    return farface_emulator_run(stream, &work) ? EXECUTION_FAILED : SUCCESS;
}

} // extern "C"
