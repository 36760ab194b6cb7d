// Gradients of convolutions with respect to their weights, of depthwise ones with respect to their input too, and the weights brought
// into the orders that convolutions read them in. (The gradient with respect to a convolution's input is a convolution itself, or one
// a phase of its stride: src/gpu/ops/train/conv.rs.)
//
// A weight's gradient is a sum over all output pixels. They are cut into ranges, each with sums of its own; a second kernel adds those up
// in their order. Nothing is added by atomics, so that the same batch gives the same bits.
#include "common.cuh"

struct PackArgs {
    const float *from; // [output channel][input channel of its group][tap]
    void *to;          // [row][tap][channel], channels of a group padded to `channels` by zeros
    int rows, channels;
    int type;              // of `to`, as Map has it
    int outputs, inputs;   // output channels; input channels of a group
    int groups;
    int kernel[2];
    // Rows are output channels; or, turned round, input channels, and taps run backwards.
    int turned;
    int first[2], step[2], count[2]; // which taps of each axis
};

KERNEL(pack_weights, PackArgs, 256)
{
    u32 index = blockIdx.x * blockDim.x + threadIdx.x;
    u32 taps = (u32)(a.count[0] * a.count[1]), total = (u32)a.rows * taps * (u32)a.channels;
    if (index >= total)
        return;
    int c = (int)(index % (u32)a.channels);
    u32 rest = index / (u32)a.channels;
    int tap = (int)(rest % taps), row = (int)(rest / taps);
    int ty = tap / a.count[1], tx = tap % a.count[1];
    if (a.turned) {
        ty = a.count[0] - 1 - ty;
        tx = a.count[1] - 1 - tx;
    }
    int ky = a.first[0] + a.step[0] * ty, kx = a.first[1] + a.step[1] * tx;
    int each = a.outputs / a.groups; // output channels of a group
    // Rows behind the last are a library's, whose maps have whole vectors of channels.
    bool real = a.turned ? c < each : c < a.inputs && row < a.outputs;
    float v = 0.0f;
    if (real) {
        int output = a.turned ? row / a.inputs * each + c : row, input = a.turned ? row % a.inputs : c;
        v = a.from[(((i64)output * a.inputs + input) * a.kernel[0] + ky) * a.kernel[1] + kx];
    }
    switch (a.type) {
    case 1: set(((f16 *)a.to)[index], v); break;
    case 2: set(((bf16 *)a.to)[index], v); break;
    default: ((float *)a.to)[index] = v;
    }
}

struct WeightArgs {
    Map input, gradient; // of the output
    float *partial;      // [range][output channel][tap][channel]
    int kernel[2], stride[2], dilation[2], pad[2];
    int channels; // of a tap, padded
    int groups;
    int span; // output pixels of a range
};

struct Window {
    int n, y, x;
};

// The first pixel of an output pixel's window, which may lie outside.
DEVICE Window window_of(const WeightArgs &a, int pixel)
{
    int area = a.gradient.h * a.gradient.w;
    Window w;
    w.n = pixel / area;
    int rest = pixel - w.n * area, y = rest / a.gradient.w, x = rest - y * a.gradient.w;
    w.y = y * a.stride[0] - a.pad[0];
    w.x = x * a.stride[1] - a.pad[1];
    return w;
}

// Any convolution, in f32. A block has 64 output channels x 64 columns (a tap's channel each) of a range, a thread 4 x 4 of them.
KERNEL(conv_weights_any, WeightArgs, 256)
{
    const int SIDE = 64, DEPTH = 16, PITCH = SIDE + 4;
    float *left = (float *)shared_bytes(), *right = left + DEPTH * PITCH;
    int each = a.gradient.c / a.groups, of_input = a.input.c / a.groups;
    int taps = a.kernel[0] * a.kernel[1], depth = taps * a.channels;
    int columns = (depth + SIDE - 1) / SIDE;
    int group = (int)blockIdx.y;
    int first_column = (int)(blockIdx.x % columns) * SIDE, first_channel = (int)(blockIdx.x / columns) * SIDE;
    int pixels = a.gradient.n * a.gradient.h * a.gradient.w;
    int first = (int)blockIdx.z * a.span, end = min(first + a.span, pixels);
    int thread = (int)threadIdx.x;

    // A thread copies one channel and one column, of every fourth pixel.
    int copied = thread % SIDE, quarter = thread / SIDE;
    int tap = (first_column + copied) / a.channels, c = (first_column + copied) % a.channels;
    int down = tap / a.kernel[1] * a.dilation[0], over = tap % a.kernel[1] * a.dilation[1];
    bool real_column = tap < taps && c < of_input, real_channel = first_channel + copied < each;

    float sums[4][4] = {};
    int my_channel = thread / 16 * 4, my_column = thread % 16 * 4;
    for (int k = first; k < end; k += DEPTH) {
#pragma unroll
        for (int i = 0; i < DEPTH / 4; i++) {
            int row = quarter + i * 4, pixel = k + row;
            float l = 0.0f, r = 0.0f;
            if (pixel < end) {
                if (real_channel)
                    l = load(a.gradient, pixel * a.gradient.pixel + group * each + first_channel + copied);
                Window w = window_of(a, pixel);
                int y = w.y + down, x = w.x + over;
                if (real_column && y >= 0 && y < a.input.h && x >= 0 && x < a.input.w)
                    r = load(a.input, at(a.input, w.n, y, x) + group * of_input + c);
            }
            left[row * PITCH + copied] = l;
            right[row * PITCH + copied] = r;
        }
        __syncthreads();
        add_products<DEPTH, PITCH>(sums, left + my_channel, right + my_column);
        __syncthreads();
    }
    float *to = a.partial + (i64)blockIdx.z * a.gradient.c * depth;
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int channel = first_channel + my_channel + i, column = first_column + my_column + j;
            if (channel < each && column < depth)
                to[(i64)(group * each + channel) * depth + column] = sums[i][j];
        }
}

// On tensor cores: a block has BM output channels x BN columns of a range, a warp WM x WN of them, 32 pixels at a time, STAGES of such
// chunks under way. Pixels of both maps lie at multiples of sixteen bytes; columns are vectors of eight channels of a tap. Pixels are the
// depth of the product, and neither operand has them side by side: both are transposed on their way from shared memory.
template <class T, int BM, int BN, int WM, int WN> DEVICE void conv_weights_tiles(const WeightArgs &a)
{
    const int STAGES = 3, DEPTH = 32, THREADS = (BM / WM) * (BN / WN) * 32;
    const int LEFT = BM / 8, RIGHT = BN / 8; // vectors of a pixel
    const int L_COPIES = DEPTH * LEFT / THREADS, R_COPIES = DEPTH * RIGHT / THREADS;
    const int STAGE = DEPTH * (LEFT + RIGHT);
    Vec16 *stages = (Vec16 *)shared_bytes();

    int vectors = a.channels / 8, taps = a.kernel[0] * a.kernel[1], depth = taps * a.channels;
    int columns = (depth + BN - 1) / BN;
    int first_column = (int)(blockIdx.x % columns) * BN, first_channel = (int)(blockIdx.x / columns) * BM;
    int pixels = a.gradient.n * a.gradient.h * a.gradient.w;
    int first = (int)blockIdx.z * a.span, end = min(first + a.span, pixels);
    int thread = (int)threadIdx.x, lane = thread % 32, warp = thread / 32;

    // Eight pixels of one column lie in different banks.
    auto place_of = [](int row, int column, int width) {
        return width >= 8 ? row * width + (column ^ (row & 7)) : row * width + (column ^ (row / 2 & (width - 1)));
    };
    // The vector of a pixel that this thread copies: of the gradient, and of the windows.
    int left_column = thread % LEFT, left_row = thread / LEFT;
    bool left_real = first_channel + left_column * 8 < a.gradient.c;
    int right_column = thread % RIGHT, right_row = thread / RIGHT;
    int vector = first_column / 8 + right_column, tap = vector / vectors;
    bool right_real = tap < taps;
    int down = tap / a.kernel[1] * a.dilation[0], over = tap % a.kernel[1] * a.dilation[1];
    const T *gradient = (const T *)a.gradient.data + first_channel + left_column * 8;
    const T *input = (const T *)a.input.data + vector % vectors * 8;

    auto copy = [&](int stage, int k) {
        Vec16 *left = stages + stage * STAGE, *right = left + DEPTH * LEFT;
#pragma unroll
        for (int i = 0; i < L_COPIES; i++) {
            int row = left_row + i * (THREADS / LEFT), pixel = k + row;
            bool inside = left_real && pixel < end;
            copy_async(left + place_of(row, left_column, LEFT),
                       inside ? (const void *)(gradient + pixel * a.gradient.pixel) : a.gradient.data, inside);
        }
#pragma unroll
        for (int i = 0; i < R_COPIES; i++) {
            int row = right_row + i * (THREADS / RIGHT), pixel = k + row;
            Window w = window_of(a, pixel < end ? pixel : first);
            int y = w.y + down, x = w.x + over;
            bool inside = right_real && pixel < end && y >= 0 && y < a.input.h && x >= 0 && x < a.input.w;
            copy_async(right + place_of(row, right_column, RIGHT),
                       inside ? (const void *)(input + at(a.input, w.n, y, x)) : a.input.data, inside);
        }
    };

    float sums[WM / 16][WN / 8][4] = {};
    int warp_row = warp / (BN / WN) * WM, warp_column = warp % (BN / WN) * WN;
    int chunks = (end - first + DEPTH - 1) / DEPTH;
    for (int s = 0; s < STAGES - 1; s++) {
        if (s < chunks)
            copy(s, first + s * DEPTH);
        copy_commit();
    }
    for (int chunk = 0; chunk < chunks; chunk++) {
        copy_wait<STAGES - 2>();
        __syncthreads();
        if (chunk + STAGES - 1 < chunks)
            copy((chunk + STAGES - 1) % STAGES, first + (chunk + STAGES - 1) * DEPTH);
        copy_commit();
        const Vec16 *left = stages + chunk % STAGES * STAGE, *right = left + DEPTH * LEFT;
#pragma unroll
        for (int k = 0; k < DEPTH / 16; k++) {
            u32 b[WN / 8][2];
#pragma unroll
            for (int j = 0; j < WN / 16; j++) {
                u32 four[4];
                int row = k * 16 + lane / 8 % 2 * 8 + lane % 8;
                load_transposed(four, right + place_of(row, (warp_column + j * 16) / 8 + lane / 16, RIGHT));
                b[j * 2][0] = four[0];
                b[j * 2][1] = four[1];
                b[j * 2 + 1][0] = four[2];
                b[j * 2 + 1][1] = four[3];
            }
#pragma unroll
            for (int i = 0; i < WM / 16; i++) {
                u32 four[4];
                int row = k * 16 + lane / 16 * 8 + lane % 8;
                load_transposed(four, left + place_of(row, (warp_row + i * 16) / 8 + lane / 8 % 2, LEFT));
#pragma unroll
                for (int j = 0; j < WN / 8; j++)
                    multiply(sums[i][j], four, b[j][0], b[j][1], T());
            }
        }
    }

    float *to = a.partial + (i64)blockIdx.z * a.gradient.c * depth;
#pragma unroll
    for (int i = 0; i < WM / 16; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int channel = first_channel + warp_row + i * 16 + half * 8 + lane / 4;
            if (channel >= a.gradient.c)
                continue;
#pragma unroll
            for (int j = 0; j < WN / 8; j++) {
                int column = first_column + warp_column + j * 8 + lane % 4 * 2;
                // Depth is a multiple of eight: both columns or none.
                if (column < depth) {
                    to[(i64)channel * depth + column] = sums[i][j][half * 2];
                    to[(i64)channel * depth + column + 1] = sums[i][j][half * 2 + 1];
                }
            }
        }
}

KERNEL(conv_weights_bf16_128x128, WeightArgs, 256) { conv_weights_tiles<bf16, 128, 128, 64, 32>(a); }
KERNEL(conv_weights_bf16_64x64, WeightArgs, 128) { conv_weights_tiles<bf16, 64, 64, 32, 32>(a); }
KERNEL(conv_weights_bf16_32x64, WeightArgs, 64) { conv_weights_tiles<bf16, 32, 64, 32, 32>(a); }

struct WeightSumArgs {
    const void *partial; // [range][output channel][tap][channel]
    float *d_weights;    // [output channel][input channel][tap], added to
    int type;            // of `partial`, as Map has it
    int ranges, outputs, taps, channels;
    int inputs; // channels that there are
};

KERNEL(conv_weights_finish, WeightSumArgs, 256)
{
    u32 index = blockIdx.x * blockDim.x + threadIdx.x;
    i64 depth = (i64)a.taps * a.channels, range = a.outputs * depth;
    int c = (int)(index % (u32)a.channels);
    u32 rest = index / (u32)a.channels;
    int tap = (int)(rest % (u32)a.taps), output = (int)(rest / (u32)a.taps);
    if (output >= a.outputs || c >= a.inputs)
        return;
    i64 from = output * depth + (i64)tap * a.channels + c;
    float sum = 0.0f;
    for (int r = 0; r < a.ranges; r++, from += range)
        sum += a.type == 2 ? to_float(((const bf16 *)a.partial)[from]) : ((const float *)a.partial)[from];
    a.d_weights[((i64)output * a.inputs + c) * a.taps + tap] += sum;
}

// Sums of a depthwise convolution's weight gradients over ranges of output pixels: a block has `lanes` channels at one tap of a range, its
// threads 256 / lanes pixels at a time. As [range][channel][tap].
struct DepthwiseWeightArgs {
    WeightArgs a;
    int lanes;
};

KERNEL(depthwise_weights, DepthwiseWeightArgs, 256)
{
    const WeightArgs &w = a.a;
    int c = (int)blockIdx.y * a.lanes + (int)threadIdx.x % a.lanes, row = (int)threadIdx.x / a.lanes;
    int rows = 256 / a.lanes, pixels = w.gradient.n * w.gradient.h * w.gradient.w;
    int first = (int)blockIdx.x * w.span, end = min(first + w.span, pixels);
    int tap = (int)blockIdx.z, taps = w.kernel[0] * w.kernel[1];
    int down = tap / w.kernel[1] * w.dilation[0], over = tap % w.kernel[1] * w.dilation[1];
    float sum = 0.0f;
    if (c < w.gradient.c)
        for (int p = first + row; p < end; p += rows) {
            Window at_input = window_of(w, p);
            int y = at_input.y + down, x = at_input.x + over;
            if (y >= 0 && y < w.input.h && x >= 0 && x < w.input.w)
                sum += load(w.gradient, p * w.gradient.pixel + c) * load(w.input, at(w.input, at_input.n, y, x) + c);
        }
    float *sums = (float *)shared_bytes();
    sums[threadIdx.x] = sum;
    __syncthreads();
    for (int half = rows / 2; half > 0; half /= 2) {
        if (row < half)
            sums[threadIdx.x] += sums[(int)threadIdx.x + half * a.lanes];
        __syncthreads();
    }
    if (row == 0 && c < w.gradient.c)
        w.partial[((i64)blockIdx.x * w.gradient.c + c) * taps + tap] = sums[threadIdx.x];
}

struct DepthwiseDataArgs {
    Map gradient, input;  // of the output; of the input, which is written
    const float *weights; // [tap][channel]
    int kernel[2], stride[2], dilation[2], pad[2];
    int add; // to what is there
};

// Gradient of a depthwise convolution's input: every output pixel whose window has a pixel, by the weight it has it with. A thread
// computes eight channels of a pixel.
KERNEL(depthwise_data, DepthwiseDataArgs, 256)
{
    u32 groups = (u32)(a.input.c + a.input.tail + 7) / 8, index = blockIdx.x * blockDim.x + threadIdx.x;
    int first = (int)(index % groups) * 8;
    u32 pixel = index / groups, area = (u32)(a.input.h * a.input.w);
    int n = (int)(pixel / area), rest = (int)(pixel % area), y = rest / a.input.w, x = rest % a.input.w;
    if (n >= a.input.n)
        return;
    int count = min(8, a.input.c + a.input.tail - first), channels = min(8, a.input.c - first);
    i64 to = at(a.input, n, y, x) + first;
    float sums[8] = {};
    if (a.add)
        load_eight(a.input, to, count, sums);
    for (int ky = 0; ky < a.kernel[0]; ky++) {
        int out_y = y + a.pad[0] - ky * a.dilation[0];
        if (out_y < 0 || out_y % a.stride[0] != 0 || out_y / a.stride[0] >= a.gradient.h)
            continue;
        for (int kx = 0; kx < a.kernel[1]; kx++) {
            int out_x = x + a.pad[1] - kx * a.dilation[1];
            if (out_x < 0 || out_x % a.stride[1] != 0 || out_x / a.stride[1] >= a.gradient.w)
                continue;
            float d[8];
            load_eight(a.gradient, at(a.gradient, n, out_y / a.stride[0], out_x / a.stride[1]) + first, channels, d);
            const float *w = a.weights + (i64)(ky * a.kernel[1] + kx) * a.input.c + first;
#pragma unroll
            for (int i = 0; i < 8; i++)
                if (i < channels)
                    sums[i] += d[i] * w[i];
        }
    }
    store_eight(a.input, to, count, sums);
}
