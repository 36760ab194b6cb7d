// What a training does with maps beside convolutions: pixels to the network's input, sums with enlargement, pooling that remembers,
// and the gradients of pooling, interpolation, sigmoid, softmax, RoIAlign. The definitions are the plain loops of src/layers.
//
// A gradient is gathered: a thread asks for a value of the input which outputs it had a part in, so that no two threads write to one
// value and every sum has one order. Where `add` is set, it is added to what other readers of the map left.
#include "common.cuh"

struct PixelsArgs {
    const u8 *pixels;   // [image][row][column][3]
    const float *table; // [input channel][256]
    Map output;
    int channel[3]; // of a pixel, for each input channel
};

KERNEL(network_input, PixelsArgs, 256)
{
    u32 index = blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= (u32)(a.output.n * a.output.h * a.output.w))
        return;
    i64 to = index * a.output.pixel;
    for (int c = 0; c < 3 + a.output.tail; c++)
        store(a.output, to + c, c < 3 ? a.table[c * 256 + a.pixels[(i64)index * 3 + a.channel[c]]] : 0.0f);
}

struct SumMapsArgs {
    Map left, right, output;
    int both;
    float slope;
};

// Activated sum of two maps, or of one alone, each enlarged to the nearest pixels of the output's size.
KERNEL(sum_maps, SumMapsArgs, 256)
{
    Place p = place_of(a.output);
    if (!p.inside)
        return;
    auto value = [&](const Map &m) {
        int y = m.h == a.output.h ? p.y : nearest_source(p.y, m.h, a.output.h);
        int x = m.w == a.output.w ? p.x : nearest_source(p.x, m.w, a.output.w);
        return load(m, at(m, p.n, y, x) + p.c);
    };
    float v = 0.0f;
    if (p.c < a.output.c) {
        v = value(a.left);
        if (a.both)
            v += value(a.right);
        v = activate(v, a.slope);
    }
    store(a.output, at(a.output, p), v);
}

// What a gradient's kernel reads and writes: `gradient` of the output, `input` the one that is written or added to.
struct BackArgs {
    Map gradient, input;
    int add;
    int top, column; // of a crop: the input's pixel that is the output's first
};

DEVICE void leave(const BackArgs &a, const Place &p, float v)
{
    i64 to = at(a.input, p);
    store(a.input, to, p.c < a.input.c ? (a.add ? load(a.input, to) + v : v) : 0.0f);
}

// Of a map that is taken as it is, or of whose pixels some were.
KERNEL(crop_back, BackArgs, 256)
{
    Place p = place_of(a.input);
    if (!p.inside)
        return;
    int y = p.y - a.top, x = p.x - a.column;
    bool taken = p.c < a.input.c && y >= 0 && y < a.gradient.h && x >= 0 && x < a.gradient.w;
    leave(a, p, taken ? load(a.gradient, at(a.gradient, p.n, y, x) + p.c) : 0.0f);
}

// The outputs on an axis that may have `source` among theirs: of a scale `from` / `to`, those within a cell of it.
DEVICE void outputs_near(int source, int from, int to, int *first, int *last)
{
    float scale = (float)to / (float)from;
    *first = max(0, (int)(((float)source - 0.5f) * scale - 0.5f) - 2);
    *last = min(to - 1, (int)(((float)source + 1.5f) * scale - 0.5f) + 2);
}

KERNEL(nearest_back, BackArgs, 256)
{
    Place p = place_of(a.input);
    if (!p.inside)
        return;
    float sum = 0.0f;
    if (p.c < a.input.c) {
        int top, bottom, left, right;
        outputs_near(p.y, a.input.h, a.gradient.h, &top, &bottom);
        outputs_near(p.x, a.input.w, a.gradient.w, &left, &right);
        for (int y = top; y <= bottom; y++) {
            if (nearest_source(y, a.input.h, a.gradient.h) != p.y)
                continue;
            for (int x = left; x <= right; x++)
                if (nearest_source(x, a.input.w, a.gradient.w) == p.x)
                    sum += load(a.gradient, at(a.gradient, p.n, y, x) + p.c);
        }
    }
    leave(a, p, sum);
}

// The part that `source` has in output `dst` of an axis.
DEVICE float bilinear_part(int source, int dst, int from, int to)
{
    int low, high;
    float weight;
    bilinear_source(dst, from, to, &low, &high, &weight);
    return (low == source ? 1.0f - weight : 0.0f) + (high == source ? weight : 0.0f);
}

KERNEL(bilinear_back, BackArgs, 256)
{
    Place p = place_of(a.input);
    if (!p.inside)
        return;
    float sum = 0.0f;
    if (p.c < a.input.c) {
        int top, bottom, left, right;
        outputs_near(p.y, a.input.h, a.gradient.h, &top, &bottom);
        outputs_near(p.x, a.input.w, a.gradient.w, &left, &right);
        for (int y = top; y <= bottom; y++) {
            float down = bilinear_part(p.y, y, a.input.h, a.gradient.h);
            if (down == 0.0f)
                continue;
            for (int x = left; x <= right; x++) {
                float over = bilinear_part(p.x, x, a.input.w, a.gradient.w);
                if (over != 0.0f)
                    sum += down * over * load(a.gradient, at(a.gradient, p.n, y, x) + p.c);
            }
        }
    }
    leave(a, p, sum);
}

KERNEL(average_back, BackArgs, 256)
{
    Place p = place_of(a.input);
    if (!p.inside)
        return;
    float area = (float)(a.input.h * a.input.w);
    leave(a, p, p.c < a.input.c ? load(a.gradient, at(a.gradient, p.n, 0, 0) + p.c) / area : 0.0f);
}

struct PoolArgs {
    Map input, output; // backward: the gradients of both, of which the input's is written
    u8 *taps;          // [output pixel][channel]: which of a window's values is the largest
    int kernel[2], stride[2], pad[2];
    int add;
};

// Maximum over a window, and the first of a window's values that has it. A NaN wins.
KERNEL(max_pool_taps, PoolArgs, 256)
{
    Place p = place_of(a.output);
    if (!p.inside)
        return;
    float most = 0.0f;
    if (p.c < a.output.c) {
        int best = 0;
        bool any = false;
        for (int ky = 0; ky < a.kernel[0]; ky++)
            for (int kx = 0; kx < a.kernel[1]; kx++) {
                int y = p.y * a.stride[0] - a.pad[0] + ky, x = p.x * a.stride[1] - a.pad[1] + kx;
                if (y < 0 || y >= a.input.h || x < 0 || x >= a.input.w)
                    continue;
                float v = load(a.input, at(a.input, p.n, y, x) + p.c);
                if (!any || v > most || v != v) {
                    most = v;
                    best = ky * a.kernel[1] + kx;
                    any = true;
                }
            }
        a.taps[((i64)(p.n * a.output.h + p.y) * a.output.w + p.x) * a.output.c + p.c] = (u8)best;
    }
    store(a.output, at(a.output, p), most);
}

// The gradient of each window goes to the value that was the largest.
KERNEL(max_pool_back, PoolArgs, 256)
{
    Place p = place_of(a.input);
    if (!p.inside)
        return;
    i64 to = at(a.input, p);
    float sum = a.add && p.c < a.input.c ? load(a.input, to) : 0.0f;
    if (p.c < a.input.c)
        for (int ky = a.kernel[0] - 1; ky >= 0; ky--) {
            int y = p.y + a.pad[0] - ky;
            if (y < 0 || y % a.stride[0] != 0 || y / a.stride[0] >= a.output.h)
                continue;
            y /= a.stride[0];
            for (int kx = a.kernel[1] - 1; kx >= 0; kx--) {
                int x = p.x + a.pad[1] - kx;
                if (x < 0 || x % a.stride[1] != 0 || x / a.stride[1] >= a.output.w)
                    continue;
                x /= a.stride[1];
                i64 window = (i64)(p.n * a.output.h + y) * a.output.w + x;
                if (a.taps[window * a.output.c + p.c] == ky * a.kernel[1] + kx)
                    sum += load(a.output, at(a.output, p.n, y, x) + p.c);
            }
        }
    store(a.input, to, sum);
}

struct ActivationArgs {
    Map output, gradient, input; // what the forward pass gave; its gradient; the input's, which is written
    int add;
    int group; // channels of a softmax
};

KERNEL(sigmoid_back, ActivationArgs, 256)
{
    Place p = place_of(a.input);
    if (!p.inside)
        return;
    i64 to = at(a.input, p);
    float v = 0.0f;
    if (p.c < a.input.c) {
        float y = load(a.output, at(a.output, p));
        v = y * (1.0f - y) * load(a.gradient, at(a.gradient, p)) + (a.add ? load(a.input, to) : 0.0f);
    }
    store(a.input, to, v);
}

KERNEL(softmax_back, ActivationArgs, 256)
{
    Place p = place_of(a.input);
    if (!p.inside)
        return;
    i64 to = at(a.input, p);
    float v = 0.0f;
    if (p.c < a.input.c) {
        i64 y = at(a.output, p.n, p.y, p.x), d = at(a.gradient, p.n, p.y, p.x);
        int first = p.c / a.group * a.group;
        float dot = 0.0f;
        for (int j = first; j < first + a.group; j++)
            dot += load(a.output, y + j) * load(a.gradient, d + j);
        v = load(a.output, y + p.c) * (load(a.gradient, d + p.c) - dot) + (a.add ? load(a.input, to) : 0.0f);
    }
    store(a.input, to, v);
}

struct RoiBackArgs {
    Map gradient, boxes, input; // a box: image, x1, y1, x2, y2, pixels
    float spatial_scale;
    int samples; // a bin along each axis; 0: as many as it has cells, rounded up
    int aligned;
    int add;
};

// The part that cell `cell` of an axis has in a sample at `v`; 0 for a sample outside the map.
DEVICE float sample_part(float v, int cell, int cells)
{
    bool inside = v >= -1.0f && v <= (float)cells; // false for a NaN too
    if (!inside)
        return 0.0f;
    int low, high;
    float weight;
    split(v, cells, &low, &high, &weight);
    return (low == cell ? 1.0f - weight : 0.0f) + (high == cell ? weight : 0.0f);
}

// Gradient of the features that boxes were pooled from. A thread asks every box of its image which of its samples touch its pixel, for
// eight channels.
KERNEL(roi_align_back, RoiBackArgs, 256)
{
    u32 groups = (u32)(a.input.c + a.input.tail + 7) / 8, index = blockIdx.x * blockDim.x + threadIdx.x;
    int first = (int)(index % groups) * 8;
    u32 pixel = index / groups, area = (u32)(a.input.h * a.input.w);
    int n = (int)(pixel / area), rest = (int)(pixel % area), cell_y = rest / a.input.w, cell_x = rest % a.input.w;
    if (n >= a.input.n)
        return;
    int count = min(8, a.input.c + a.input.tail - first), channels = min(8, a.input.c - first);
    i64 to = at(a.input, n, cell_y, cell_x) + first;
    float sums[8] = {};
    if (a.add)
        load_eight(a.input, to, count, sums);
    float offset = a.aligned ? 0.5f : 0.0f, fy = (float)cell_y, fx = (float)cell_x;
    for (int r = 0; r < a.boxes.n; r++) {
        i64 box = at(a.boxes, r, 0, 0);
        if (load(a.boxes, box) != (float)n)
            continue;
        float x1 = load(a.boxes, box + 1) * a.spatial_scale - offset, y1 = load(a.boxes, box + 2) * a.spatial_scale - offset;
        float width = load(a.boxes, box + 3) * a.spatial_scale - offset - x1;
        float height = load(a.boxes, box + 4) * a.spatial_scale - offset - y1;
        if (!a.aligned) {
            width = fmaxf(width, 1.0f);
            height = fmaxf(height, 1.0f);
        }
        // Samples lie within the box, and reach the cells beside them.
        if (fy < fminf(y1, y1 + height) - 1.5f || fy > fmaxf(y1, y1 + height) + 1.5f || fx < fminf(x1, x1 + width) - 1.5f ||
            fx > fmaxf(x1, x1 + width) + 1.5f)
            continue;
        float bin_h = height / (float)a.gradient.h, bin_w = width / (float)a.gradient.w;
        int rows = a.samples ? a.samples : max(0, (int)fminf(ceilf(bin_h), (float)MOST_SAMPLES));
        int columns = a.samples ? a.samples : max(0, (int)fminf(ceilf(bin_w), (float)MOST_SAMPLES));
        float share = 1.0f / (float)max(rows * columns, 1);
        for (int by = 0; by < a.gradient.h; by++) {
            float down = 0.0f;
            for (int i = 0; i < rows; i++)
                down += sample_part(y1 + ((float)by + ((float)i + 0.5f) / (float)rows) * bin_h, cell_y, a.input.h);
            if (down == 0.0f)
                continue;
            for (int bx = 0; bx < a.gradient.w; bx++) {
                float over = 0.0f;
                for (int j = 0; j < columns; j++)
                    over += sample_part(x1 + ((float)bx + ((float)j + 0.5f) / (float)columns) * bin_w, cell_x, a.input.w);
                if (over == 0.0f)
                    continue;
                float d[8], weight = down * over * share;
                load_eight(a.gradient, at(a.gradient, r, by, bx) + first, channels, d);
#pragma unroll
                for (int i = 0; i < 8; i++)
                    sums[i] += weight * d[i];
            }
        }
    }
    store_eight(a.input, to, count, sums);
}
