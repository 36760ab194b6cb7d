// What happens to maps between convolutions: pooling, interpolation, sums, copies, crops, sigmoid, softmax, transposed convolution,
// RoIAlign. The definitions are the plain loops of src/layers.
#include "common.cuh"

struct PoolArgs {
    Map input, output;
    int kernel[2], stride[2], pad[2];
};

// Maximum over a window; what lies outside the map does not count. A NaN stays one.
KERNEL(max_pool, PoolArgs, 256)
{
    Place p = place_of(a.output);
    if (!p.inside)
        return;
    float most = p.c < a.output.c ? __uint_as_float(0xff800000u) : 0.0f;
    if (p.c < a.output.c)
        for (int ky = 0; ky < a.kernel[0]; ky++)
            for (int kx = 0; kx < a.kernel[1]; kx++) {
                int y = p.y * a.stride[0] - a.pad[0] + ky, x = p.x * a.stride[1] - a.pad[1] + kx;
                if (y < 0 || y >= a.input.h || x < 0 || x >= a.input.w)
                    continue;
                float v = load(a.input, at(a.input, p.n, y, x) + p.c);
                most = v > most || v != v ? v : most;
            }
    store(a.output, at(a.output, p), most);
}

struct MapArgs {
    Map input, output;
};

// Mean over rows and columns; a block a channel of an image.
KERNEL(global_average, MapArgs, 256)
{
    int channels = a.output.c + a.output.tail;
    int n = (int)blockIdx.x / channels, c = (int)blockIdx.x % channels;
    float *sums = (float *)shared_bytes();
    float sum = 0.0f;
    if (c < a.output.c)
        for (int i = (int)threadIdx.x; i < a.input.h * a.input.w; i += (int)blockDim.x)
            sum += load(a.input, at(a.input, n, i / a.input.w, i % a.input.w) + c);
    sums[threadIdx.x] = sum;
    __syncthreads();
    for (int half = (int)blockDim.x / 2; half > 0; half /= 2) {
        if ((int)threadIdx.x < half)
            sums[threadIdx.x] += sums[threadIdx.x + half];
        __syncthreads();
    }
    if (threadIdx.x == 0)
        store(a.output, at(a.output, n, 0, 0) + c, sums[0] / (float)(a.input.h * a.input.w));
}

// To the size of the output, by the nearest pixels.
KERNEL(resize_nearest, MapArgs, 256)
{
    Place p = place_of(a.output);
    if (!p.inside)
        return;
    float v = 0.0f;
    if (p.c < a.output.c) {
        int y = nearest_source(p.y, a.input.h, a.output.h), x = nearest_source(p.x, a.input.w, a.output.w);
        v = load(a.input, at(a.input, p.n, y, x) + p.c);
    }
    store(a.output, at(a.output, p), v);
}

// To the size of the output, between pixels.
KERNEL(resize_bilinear, MapArgs, 256)
{
    Place p = place_of(a.output);
    if (!p.inside)
        return;
    float v = 0.0f;
    if (p.c < a.output.c) {
        int top, bottom, left, right;
        float down, over;
        bilinear_source(p.y, a.input.h, a.output.h, &top, &bottom, &down);
        bilinear_source(p.x, a.input.w, a.output.w, &left, &right, &over);
        float upper = (1.0f - over) * load(a.input, at(a.input, p.n, top, left) + p.c) +
                      over * load(a.input, at(a.input, p.n, top, right) + p.c);
        float lower = (1.0f - over) * load(a.input, at(a.input, p.n, bottom, left) + p.c) +
                      over * load(a.input, at(a.input, p.n, bottom, right) + p.c);
        v = (1.0f - down) * upper + down * lower;
    }
    store(a.output, at(a.output, p), v);
}

struct AddArgs {
    Map left, right, output;
    int both;   // whether `right` is added
    int top;    // of `left`, the pixel that becomes the output's first
    int column;
    float slope;
};

// Activated sum of two maps, or of one alone: copies and crops too, from any type to any.
KERNEL(add, AddArgs, 256)
{
    Place p = place_of(a.output);
    if (!p.inside)
        return;
    float v = 0.0f;
    if (p.c < a.output.c) {
        v = load(a.left, at(a.left, p.n, p.y + a.top, p.x + a.column) + p.c);
        if (a.both)
            v += load(a.right, at(a.right, p.n, p.y, p.x) + p.c);
        v = activate(v, a.slope);
    }
    store(a.output, at(a.output, p), v);
}

KERNEL(sigmoid, MapArgs, 256)
{
    Place p = place_of(a.output);
    if (!p.inside)
        return;
    float v = p.c < a.output.c ? load(a.input, at(a.input, p.n, p.y, p.x) + p.c) : 0.0f;
    store(a.output, at(a.output, p), p.c < a.output.c ? 1.0f / (1.0f + expf(-v)) : 0.0f);
}

struct SoftmaxArgs {
    Map input, output;
    int group;
};

// Softmax over each group of neighbouring channels; a thread a group of a pixel.
KERNEL(softmax, SoftmaxArgs, 256)
{
    u32 groups = (u32)(a.output.c / a.group), index = blockIdx.x * blockDim.x + threadIdx.x;
    int first = (int)(index % groups) * a.group;
    index /= groups;
    int x = (int)(index % (u32)a.output.w);
    index /= (u32)a.output.w;
    int y = (int)(index % (u32)a.output.h), n = (int)(index / (u32)a.output.h);
    if (n >= a.output.n)
        return;
    i64 from = at(a.input, n, y, x) + first, to = at(a.output, n, y, x) + first;
    float most = load(a.input, from), sum = 0.0f;
    for (int i = 1; i < a.group; i++)
        most = fmaxf(most, load(a.input, from + i));
    for (int i = 0; i < a.group; i++)
        sum += expf(load(a.input, from + i) - most);
    for (int i = 0; i < a.group; i++)
        store(a.output, to + i, expf(load(a.input, from + i) - most) / sum);
    if (first + a.group == a.output.c)
        for (int i = 0; i < a.output.tail; i++)
            store(a.output, to + a.group + i, 0.0f);
}

struct ConvTransposeArgs {
    Map input, output;
    const float *weights; // [input channel][output channel of the group][tap]
    const float *bias;
    int kernel[2], stride[2], pad[2]; // pad: top, left
    int groups;
};

KERNEL(conv_transpose, ConvTransposeArgs, 256)
{
    Place p = place_of(a.output);
    if (!p.inside)
        return;
    float v = 0.0f;
    if (p.c < a.output.c) {
        int each = a.output.c / a.groups, of_input = a.input.c / a.groups, group = p.c / each;
        v = a.bias[p.c];
        int taps = a.kernel[0] * a.kernel[1], first = group * of_input;
        const float *weights = a.weights + ((i64)first * each + p.c - group * each) * taps;
        for (int tap = 0; tap < taps; tap++) {
            int ky = tap / a.kernel[1];
            int y = p.y + a.pad[0] - ky, x = p.x + a.pad[1] - (tap - ky * a.kernel[1]);
            if (y < 0 || x < 0 || y % a.stride[0] != 0 || x % a.stride[1] != 0)
                continue;
            y /= a.stride[0];
            x /= a.stride[1];
            if (y >= a.input.h || x >= a.input.w)
                continue;
            i64 from = at(a.input, p.n, y, x) + first;
            for (int i = 0; i < of_input; i++)
                v += load(a.input, from + i) * weights[(i64)i * each * taps + tap];
        }
    }
    store(a.output, at(a.output, p), v);
}

struct RoiAlignArgs {
    Map input, boxes, output; // a box: image, x1, y1, x2, y2, pixels
    float spatial_scale;
    int samples; // a bin along each axis; 0: as many as it has cells, rounded up
    int aligned;
};

// Mean of the bilinear samples of a bin (torchvision's `roi_align`); zeros for a box of no image.
KERNEL(roi_align, RoiAlignArgs, 256)
{
    Place p = place_of(a.output);
    if (!p.inside)
        return;
    i64 box = at(a.boxes, p.n, 0, 0);
    float image = load(a.boxes, box), offset = a.aligned ? 0.5f : 0.0f;
    float x1 = load(a.boxes, box + 1) * a.spatial_scale - offset, y1 = load(a.boxes, box + 2) * a.spatial_scale - offset;
    float width = load(a.boxes, box + 3) * a.spatial_scale - offset - x1;
    float height = load(a.boxes, box + 4) * a.spatial_scale - offset - y1;
    if (!a.aligned) {
        width = fmaxf(width, 1.0f);
        height = fmaxf(height, 1.0f);
    }
    float bin_h = height / (float)a.output.h, bin_w = width / (float)a.output.w;
    int rows = a.samples ? a.samples : max(0, (int)fminf(ceilf(bin_h), (float)MOST_SAMPLES));
    int columns = a.samples ? a.samples : max(0, (int)fminf(ceilf(bin_w), (float)MOST_SAMPLES));
    float sum = 0.0f;
    if (p.c < a.output.c && image >= 0.0f && image < (float)a.input.n)
        for (int i = 0; i < rows; i++) {
            float y = y1 + ((float)p.y + ((float)i + 0.5f) / (float)rows) * bin_h;
            for (int j = 0; j < columns; j++) {
                float x = x1 + ((float)p.x + ((float)j + 0.5f) / (float)columns) * bin_w;
                // False for a NaN too.
                bool inside = y >= -1.0f && y <= (float)a.input.h && x >= -1.0f && x <= (float)a.input.w;
                if (!inside)
                    continue;
                int top, bottom, left, right;
                float down, over;
                split(y, a.input.h, &top, &bottom, &down);
                split(x, a.input.w, &left, &right, &over);
                int n = (int)image;
                sum += (1.0f - down) * (1.0f - over) * load(a.input, at(a.input, n, top, left) + p.c);
                sum += (1.0f - down) * over * load(a.input, at(a.input, n, top, right) + p.c);
                sum += down * (1.0f - over) * load(a.input, at(a.input, n, bottom, left) + p.c);
                sum += down * over * load(a.input, at(a.input, n, bottom, right) + p.c);
            }
        }
    store(a.output, at(a.output, p), sum / (float)max(rows * columns, 1));
}
