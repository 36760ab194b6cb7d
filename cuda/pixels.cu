// Pictures to network input in one pass: decoded, oriented, resized and normalised.
//
// Bit for bit what src/pixels writes on the CPU: the same weights, made there, and the same order of operations, none of them fused.
// Upright rows are combined first, then columns.
#include "common.cuh"

// How the pixels of a picture lie; `swapped` of the picture says which of two orders.
enum Layout {
    GRAY,    // a byte a pixel
    PACKED3, // three bytes: red, green, blue
    PACKED4, // and one more
    PLANAR,  // three planes of floats
    NV,      // luma; Cb and Cr side by side at half the size
    I420,    // luma; Cb; Cr
    YUYV,    // Y0, Cb, Y1, Cr
};

struct Plane {
    const u8 *row_0;
    i64 stride; // bytes, negative where row 0 is the last one in memory
};

// A picture in the device's memory: what may change from one launch of a graph to the next.
struct Picture {
    Plane planes[3];
    // Upright pixel (u, v) is stored pixel `origin + u * right + v * down`; (x, y) each.
    int origin[2], right[2], down[2];
    int size[2]; // upright: width, height
    int layout;
    int swapped; // blue before red, Cr before Cb
    int aligned; // what belongs together (four bytes, a float, a pair of chroma) can be read at once
    float luma_offset, luma_gain;
    float red, green[2], blue; // gained per Cr; per Cb and per Cr; per Cb
    int unused;
};

// Upright pixels behind a level pixel along an axis: `first` to `first + len`, weighted with `head`, `body` (each between), `tail`.
struct Taps {
    u32 first, len;
    float head, body, tail;
};

struct PixelsArgs {
    const Picture *picture; // of the output's first image
    const Taps *columns, *rows; // of the output's pixels from the first on
    int inside[2];              // columns and rows that lie in the level; beyond them are zeros
    int source[2];              // size that the picture must have
    int corner[2];              // where nothing is resized: upright column and row of the output's first pixel
    int reversed;               // blue is written first
    float mean[3], scale[3];    // in the order of writing
    int wide;                   // a pixel with its tail is written as sixteen bytes at once
    int step;                   // bytes from an image's picture to the next one's
    Map output;
};

// Of the image that the block writes.
DEVICE const Picture &picture_of(const PixelsArgs &a)
{
    return *(const Picture *)((const u8 *)a.picture + (i64)blockIdx.z * a.step);
}

// Red, green, blue 0 to 255; blue first where the picture is swapped and packed.
struct Color {
    float v[3];
};

// NaN becomes 0.
DEVICE float clamped(float v)
{
    v = v > 0.0f ? v : 0.0f;
    return v < 255.0f ? v : 255.0f;
}

DEVICE const u8 *row_of(const Plane &p, int y) { return p.row_0 + y * p.stride; }

// Four bytes, the first one lowest.
DEVICE u32 four(const u8 *from, bool aligned)
{
    if (aligned)
        return *(const u32 *)from;
    return (u32)from[0] | (u32)from[1] << 8 | (u32)from[2] << 16 | (u32)from[3] << 24;
}

// Chroma is replicated: pixels that share a sample take it as it is.
DEVICE Color rgb_of(const Picture &p, u32 luma, u32 cb, u32 cr)
{
    float y = __fmul_rn(__fsub_rn((float)luma, p.luma_offset), p.luma_gain);
    float u = __fsub_rn((float)cb, 128.0f), v = __fsub_rn((float)cr, 128.0f);
    Color c;
    c.v[0] = clamped(__fadd_rn(y, __fmul_rn(p.red, v)));
    c.v[1] = clamped(__fadd_rn(y, __fadd_rn(__fmul_rn(p.green[0], u), __fmul_rn(p.green[1], v))));
    c.v[2] = clamped(__fadd_rn(y, __fmul_rn(p.blue, u)));
    return c;
}

// The pixel at column `u`, row `v` of the upright picture. Nothing is read that belongs to no pixel of it.
template <int LAYOUT> DEVICE Color color_at(const Picture &p, int u, int v)
{
    int x = p.origin[0] + u * p.right[0] + v * p.down[0], y = p.origin[1] + u * p.right[1] + v * p.down[1];
    const u8 *row = row_of(p.planes[0], y);
    Color c;
    if (LAYOUT == GRAY) {
        c.v[0] = c.v[1] = c.v[2] = (float)row[x];
    } else if (LAYOUT == PACKED3) {
        for (int i = 0; i < 3; i++)
            c.v[i] = (float)row[3 * x + i];
    } else if (LAYOUT == PACKED4) {
        u32 word = four(row + 4 * x, p.aligned);
        for (int i = 0; i < 3; i++)
            c.v[i] = (float)(word >> 8 * i & 255);
    } else if (LAYOUT == PLANAR) {
        for (int i = 0; i < 3; i++)
            c.v[i] = clamped(__uint_as_float(four(row_of(p.planes[i], y) + 4 * x, p.aligned)));
    } else {
        u32 luma, first, second;
        if (LAYOUT == YUYV) {
            u32 word = four(row + 4 * (x / 2), p.aligned);
            luma = word >> 16 * (x & 1) & 255;
            first = word >> 8 & 255;
            second = word >> 24;
        } else if (LAYOUT == NV) {
            const u8 *pair = row_of(p.planes[1], y / 2) + (x & ~1);
            u32 both = p.aligned ? *(const u16 *)pair : (u32)pair[0] | (u32)pair[1] << 8;
            luma = row[x];
            first = p.swapped ? both >> 8 : both & 255;
            second = p.swapped ? both & 255 : both >> 8;
        } else {
            luma = row[x];
            first = row_of(p.planes[1], y / 2)[x / 2];
            second = row_of(p.planes[2], y / 2)[x / 2];
        }
        c = rgb_of(p, luma, first, second);
    }
    return c;
}

DEVICE float weight(const Taps &t, u32 nth) { return nth == 0 ? t.head : nth + 1 == t.len ? t.tail : t.body; }

// sum + (a * wa + b * wb)
DEVICE void add_pair(Color &sum, const Color &a, float wa, const Color &b, float wb)
{
    for (int i = 0; i < 3; i++)
        sum.v[i] = __fadd_rn(sum.v[i], __fadd_rn(__fmul_rn(wa, a.v[i]), __fmul_rn(wb, b.v[i])));
}

DEVICE void scale(Color &to, const Color &c, float w)
{
    for (int i = 0; i < 3; i++)
        to.v[i] = __fmul_rn(w, c.v[i]);
}

// Two columns at a time, which lie side by side in memory or in its rows, each summed over the rows: by pairs, an odd one first.
// Sums begin at 0, to which no sum of colours loses anything.
template <int LAYOUT> DEVICE Color resampled(const Picture &p, const Taps &columns, const Taps &rows)
{
    Color color = {{0.0f, 0.0f, 0.0f}};
    for (u32 j = 0; j < columns.len; j += 2) {
        bool two = j + 1 < columns.len;
        int u = (int)(columns.first + j), next = u + two;
        Color left = {{0.0f, 0.0f, 0.0f}}, right = left;
        u32 k = rows.len & 1;
        if (k) {
            scale(left, color_at<LAYOUT>(p, u, (int)rows.first), rows.head);
            scale(right, color_at<LAYOUT>(p, next, (int)rows.first), rows.head);
        }
        for (; k < rows.len; k += 2) {
            int v = (int)(rows.first + k);
            float above = weight(rows, k), below = weight(rows, k + 1);
            add_pair(left, color_at<LAYOUT>(p, u, v), above, color_at<LAYOUT>(p, u, v + 1), below);
            add_pair(right, color_at<LAYOUT>(p, next, v), above, color_at<LAYOUT>(p, next, v + 1), below);
        }
        float first = weight(columns, j), second = two ? weight(columns, j + 1) : 0.0f;
        for (int i = 0; i < 3; i++)
            color.v[i] = __fadd_rn(__fadd_rn(color.v[i], __fmul_rn(first, left.v[i])), __fmul_rn(second, right.v[i]));
    }
    return color;
}

template <int LAYOUT, bool RESIZED> DEVICE Color color_of(const PixelsArgs &a, int x, int y)
{
    const Picture p = picture_of(a);
    if (!RESIZED)
        return color_at<LAYOUT>(p, a.corner[0] + x, a.corner[1] + y);
    const Taps columns = a.columns[x], rows = a.rows[y];
    return resampled<LAYOUT>(p, columns, rows);
}

// One pixel, its channels in the order of writing.
template <bool RESIZED> DEVICE void write_pixel(const PixelsArgs &a, int x, int y)
{
    float values[3] = {0.0f, 0.0f, 0.0f};
    // Zeros for a picture of another size, whose pixels the taps do not know.
    const Picture &picture = picture_of(a);
    bool known = picture.size[0] == a.source[0] && picture.size[1] == a.source[1];
    if (known && x < a.inside[0] && y < a.inside[1]) {
        int layout = picture.layout;
        Color c;
        switch (layout) {
        case GRAY: c = color_of<GRAY, RESIZED>(a, x, y); break;
        case PACKED3: c = color_of<PACKED3, RESIZED>(a, x, y); break;
        case PACKED4: c = color_of<PACKED4, RESIZED>(a, x, y); break;
        case PLANAR: c = color_of<PLANAR, RESIZED>(a, x, y); break;
        case NV: c = color_of<NV, RESIZED>(a, x, y); break;
        case I420: c = color_of<I420, RESIZED>(a, x, y); break;
        default: c = color_of<YUYV, RESIZED>(a, x, y); break;
        }
        bool blue_first = (layout == PACKED3 || layout == PACKED4) && picture.swapped;
        bool turn = blue_first != (a.reversed != 0);
        float ordered[3] = {turn ? c.v[2] : c.v[0], c.v[1], turn ? c.v[0] : c.v[2]};
        for (int i = 0; i < 3; i++)
            values[i] = __fmul_rn(__fsub_rn(ordered[i], a.mean[i]), a.scale[i]);
    }
    i64 to = at(a.output, (int)blockIdx.z, y, x);
    if (a.wide) {
        u32 bits[3];
        for (int i = 0; i < 3; i++) {
            f16 half;
            bf16 upper;
            set(half, values[i]);
            set(upper, values[i]);
            bits[i] = a.output.type == 1 ? half.bits : upper.bits;
        }
        Vec16 pixel = {{bits[0] | bits[1] << 16, bits[2], 0, 0}};
        *(Vec16 *)((u16 *)a.output.data + to) = pixel;
        return;
    }
    for (int i = 0; i < 3; i++)
        store(a.output, to + i, values[i]);
    for (int i = 0; i < a.output.tail; i++)
        store(a.output, to + 3 + i, 0.0f);
}

// A thread a pixel of the window, a block 16 x 16 of them, of one of the images; the threads of a warp go along the rows of the stored picture, wherever
// those lie.
template <bool RESIZED> DEVICE void write_block(const PixelsArgs &a)
{
    int along = (int)threadIdx.x & 15, across = (int)threadIdx.x >> 4;
    bool transposed = picture_of(a).right[0] == 0;
    int x = (int)blockIdx.x * 16 + (transposed ? across : along), y = (int)blockIdx.y * 16 + (transposed ? along : across);
    if (x < a.output.w && y < a.output.h)
        write_pixel<RESIZED>(a, x, y);
}

// Every pixel as it is.
KERNEL(pixels_same, PixelsArgs, 256) { write_block<false>(a); }

// Each from the pixels that its taps name.
KERNEL_FOR(pixels_resized, PixelsArgs, 256, 3) { write_block<true>(a); }
