// Convolution as implicit matrix multiplication over channels-last maps, with what follows it: bias, residual sum, activation.
//
// Rows of the product are output pixels, columns output channels, its depth is taps x channels. Nothing is gathered beforehand: a
// thread computes where a pixel's window lies and copies sixteen bytes of it at a time; what lies outside the map is zeros.
#include "common.cuh"

enum Residual { RESIDUAL_NONE, RESIDUAL_BEFORE, RESIDUAL_AFTER };

struct ConvArgs {
    Map input, output;
    // Added to every value, before or behind the activation; of another size, it is enlarged to its nearest pixels.
    Map add;
    // [output channel][tap][channel], channels of a group padded to `channels`, in the input's type; f32 bias.
    const void *weights;
    const float *bias;
    int kernel[2], stride[2], dilation[2], pad[2]; // pad: top, left
    int channels;                                  // of a tap, padded
    int groups;
    int residual;
    float slope;
    // Where there are more parts than one, blocks (x, part) sum that part of the depth to `parts`, [part][pixel][channel].
    int split;
    float *parts;
};

struct Pixel {
    int n, y, x;
    bool inside;
};

DEVICE Pixel output_pixel(const ConvArgs &a, int index)
{
    int area = a.output.h * a.output.w;
    Pixel p;
    p.n = index / area;
    int rest = index - p.n * area;
    p.y = rest / a.output.w;
    p.x = rest - p.y * a.output.w;
    p.inside = p.n < a.output.n;
    return p;
}

// Where the residual of an output pixel begins.
DEVICE i64 residual_at(const ConvArgs &a, const Pixel &p)
{
    bool same = a.add.h == a.output.h && a.add.w == a.output.w;
    int y = same ? p.y : nearest_source(p.y, a.add.h, a.output.h);
    int x = same ? p.x : nearest_source(p.x, a.add.w, a.output.w);
    return at(a.add, p.n, y, x);
}

// Writes the sum of channel `c` of a pixel; channels behind the last are the tail's zeros, or none at all.
DEVICE void finish(const ConvArgs &a, i64 to, i64 add, int c, float sum)
{
    if (c >= a.output.c) {
        if (c < a.output.c + a.output.tail)
            store(a.output, to + c, 0.0f);
        return;
    }
    float v = sum + a.bias[c];
    if (a.residual == RESIDUAL_BEFORE)
        v += load(a.add, add + c);
    v = activate(v, a.slope);
    if (a.residual == RESIDUAL_AFTER)
        v += load(a.add, add + c);
    store(a.output, to + c, v);
}

// What a tile's sums of a pixel become: values of the output, or a part of the depth's.
struct Target {
    bool inside;
    i64 to, add;
    float *part;
};

DEVICE Target target_of(const ConvArgs &a, int index)
{
    Pixel p = output_pixel(a, index);
    Target t = {p.inside, 0, 0, nullptr};
    if (!p.inside)
        return t;
    if (a.split > 1) {
        int pixels = a.output.n * a.output.h * a.output.w;
        t.part = a.parts + ((i64)blockIdx.y * pixels + index) * a.output.c;
    } else {
        t.to = at(a.output, p.n, p.y, p.x);
        t.add = a.residual == RESIDUAL_NONE ? 0 : residual_at(a, p);
    }
    return t;
}

DEVICE void give(const ConvArgs &a, const Target &t, int c, float sum)
{
    if (a.split <= 1)
        finish(a, t.to, t.add, c, sum);
    else if (c < a.output.c)
        t.part[c] = sum;
}

// Where vectors of a row of 64 bytes lie: in an order in which eight rows of one column lie in different banks.
DEVICE int vector_at(int row, int column) { return row * 4 + (column ^ (row / 2 & 3)); }

// Gives `multiply` the depth of a tile of BM pixels x BN channels in chunks of four vectors a pixel or channel (as vector_at says),
// three of them under way; of a split depth this block's part. Pixels of the input lie at multiples of sixteen bytes.
template <class T, int BM, int BN, int THREADS, class Multiply>
DEVICE void for_chunks(const ConvArgs &a, int first_pixel, int first_channel, Multiply multiply)
{
    const int STAGES = 3, LANES = 16 / (int)sizeof(T);
    const int ROWS = THREADS / 4; // rows of a chunk that all threads copy at once, four vectors each
    const int A_COPIES = BM / ROWS, B_COPIES = (BN + ROWS - 1) / ROWS;
    const int STAGE = (BM + BN) * 4; // vectors
    Vec16 *stages = (Vec16 *)shared_bytes();
    int thread = (int)threadIdx.x, column = thread % 4, row = thread / 4;

    // The windows' first pixels of the rows that this thread copies.
    const T *input = (const T *)a.input.data;
    i64 window[A_COPIES];
    int window_y[A_COPIES], window_x[A_COPIES];
#pragma unroll
    for (int i = 0; i < A_COPIES; i++) {
        Pixel p = output_pixel(a, first_pixel + row + i * ROWS);
        // So far outside that no tap comes back in.
        window_y[i] = p.inside ? p.y * a.stride[0] - a.pad[0] : -(1 << 29);
        window_x[i] = p.x * a.stride[1] - a.pad[1];
        window[i] = p.inside ? at(a.input, p.n, window_y[i], window_x[i]) : 0;
    }
    int vectors = a.channels / LANES; // of a tap
    int depth = a.kernel[0] * a.kernel[1] * vectors;
    int chunks = (depth + 3) / 4;
    // A depth has less than 2^28 chunks, and there are at most sixteen parts.
    int part = a.split > 1 ? (int)blockIdx.y : 0, parts = a.split > 1 ? a.split : 1;
    int begin = (int)((u32)chunks * (u32)part / (u32)parts), end = (int)((u32)chunks * (u32)(part + 1) / (u32)parts);
    // The tap and the vector of it that this thread copies next.
    int place = begin * 4 + column, vector = column, tap_y = 0, tap_x = 0;
    // A window without taps has no depth.
    if (depth > 0) {
        vector = place % vectors;
        tap_y = place / vectors / a.kernel[1];
        tap_x = place / vectors % a.kernel[1];
    }

    auto copy = [&](int stage) {
        Vec16 *left = stages + stage * STAGE, *right = left + BM * 4;
        i64 tap = tap_y * a.dilation[0] * a.input.row + tap_x * a.dilation[1] * a.input.pixel + vector * LANES;
#pragma unroll
        for (int i = 0; i < A_COPIES; i++) {
            int y = window_y[i] + tap_y * a.dilation[0], x = window_x[i] + tap_x * a.dilation[1];
            bool inside = tap_y < a.kernel[0] && y >= 0 && y < a.input.h && x >= 0 && x < a.input.w;
            copy_async(left + vector_at(row + i * ROWS, column), inside ? input + window[i] + tap : input, inside);
        }
        const T *weights = (const T *)a.weights;
#pragma unroll
        for (int i = 0; i < B_COPIES; i++) {
            int r = row + i * ROWS, channel = first_channel + r;
            bool inside = channel < a.output.c && place < depth;
            if (r < BN)
                copy_async(right + vector_at(r, column),
                           inside ? weights + ((i64)channel * depth + place) * LANES : weights, inside);
        }
        place += 4;
        vector += 4;
        while (vector >= vectors) {
            vector -= vectors;
            if (++tap_x == a.kernel[1]) {
                tap_x = 0;
                tap_y++;
            }
        }
    };

    for (int s = 0; s < STAGES - 1; s++) {
        if (begin + s < end)
            copy(s);
        copy_commit();
    }
    int stage = 0;
    for (int chunk = begin; chunk < end; chunk++) {
        copy_wait<STAGES - 2>();
        __syncthreads();
        // Into the stage that was read before the barrier.
        if (chunk + STAGES - 1 < end)
            copy(stage == 0 ? STAGES - 1 : stage - 1);
        copy_commit();
        const Vec16 *left = stages + stage * STAGE;
        multiply(left, left + BM * 4);
        stage = stage + 1 == STAGES ? 0 : stage + 1;
    }
}

// Tiles of BM pixels x BN channels on tensor cores, each warp WM x WN of it. A matrix of 8 x 8 values of two bytes is one of 8 x 4 f32,
// of which a lane gets the one that the product wants of it, so that TF32 is read as the others are.
template <class T, int BM, int BN, int WM, int WN> DEVICE void conv_tiles(const ConvArgs &a)
{
    const int THREADS = (BM / WM) * (BN / WN) * 32;
    int columns = (a.output.c + a.output.tail + BN - 1) / BN;
    int first_pixel = (int)(blockIdx.x / columns) * BM, first_channel = (int)(blockIdx.x % columns) * BN;
    int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    float sums[WM / 16][WN / 8][4] = {};
    int warp_row = warp / (BN / WN) * WM, warp_column = warp % (BN / WN) * WN;
    for_chunks<T, BM, BN, THREADS>(a, first_pixel, first_channel, [&](const Vec16 *left, const Vec16 *right) {
#pragma unroll
        for (int k = 0; k < 2; k++) {
            u32 b[WN / 8][2];
#pragma unroll
            for (int j = 0; j < WN / 16; j++) {
                int r = warp_column + j * 16 + lane / 16 * 8 + lane % 8;
                u32 four[4];
                load_matrices(four, right + vector_at(r, k * 2 + lane / 8 % 2));
                round_factors(four, T());
                b[j * 2][0] = four[0];
                b[j * 2][1] = four[1];
                b[j * 2 + 1][0] = four[2];
                b[j * 2 + 1][1] = four[3];
            }
#pragma unroll
            for (int i = 0; i < WM / 16; i++) {
                u32 four[4];
                load_matrices(four, left + vector_at(warp_row + i * 16 + lane % 16, k * 2 + lane / 16));
                round_factors(four, T());
#pragma unroll
                for (int j = 0; j < WN / 8; j++)
                    multiply(sums[i][j], four, b[j][0], b[j][1], T());
            }
        }
    });

    // A thread has two neighbouring channels of a pixel, and of the one eight rows below.
#pragma unroll
    for (int i = 0; i < WM / 16; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            Target t = target_of(a, first_pixel + warp_row + i * 16 + half * 8 + lane / 4);
            if (!t.inside)
                continue;
#pragma unroll
            for (int j = 0; j < WN / 8; j++) {
                int c = first_channel + warp_column + j * 8 + lane % 4 * 2;
                give(a, t, c, sums[i][j][half * 2]);
                give(a, t, c + 1, sums[i][j][half * 2 + 1]);
            }
        }
}

// 512 threads a multiprocessor, 128 registers each; before 8.0 what is copied goes through registers and more are wanted.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define TILES_TOGETHER(threads) (512 / (threads))
#else
#define TILES_TOGETHER(threads) 1
#endif
#define CONV_TILES(type, bm, bn, wm, wn)                                                                         \
    KERNEL_FOR(conv_##type##_##bm##x##bn, ConvArgs, (bm / wm) * (bn / wn) * 32,                                  \
               TILES_TOGETHER((bm / wm) * (bn / wn) * 32))                                                       \
    {                                                                                                            \
        conv_tiles<type, bm, bn, wm, wn>(a);                                                                     \
    }

CONV_TILES(f16, 128, 128, 64, 32)
CONV_TILES(f16, 128, 64, 64, 32)
CONV_TILES(f16, 64, 64, 32, 32)
CONV_TILES(f16, 128, 32, 32, 32)
CONV_TILES(f16, 128, 16, 32, 16)
CONV_TILES(bf16, 128, 128, 64, 32)
CONV_TILES(bf16, 128, 64, 64, 32)
CONV_TILES(bf16, 64, 64, 32, 32)
CONV_TILES(bf16, 128, 32, 32, 32)
CONV_TILES(bf16, 128, 16, 32, 16)
CONV_TILES(tf32, 128, 128, 64, 32)
CONV_TILES(tf32, 128, 64, 64, 32)
CONV_TILES(tf32, 64, 64, 32, 32)
CONV_TILES(tf32, 128, 32, 32, 32)
CONV_TILES(tf32, 128, 16, 32, 16)

// Tiles of 16 * TM pixels x 16 * TN channels in f32, without tensor cores. A thread has TM x TN sums, of every sixteenth pixel and
// channel, so that the threads of a warp read neighbouring rows, and write neighbouring channels.
template <int TM, int TN> DEVICE void conv_single(const ConvArgs &a)
{
    const int BM = 16 * TM, BN = 16 * TN;
    int columns = (a.output.c + a.output.tail + BN - 1) / BN;
    int first_pixel = (int)(blockIdx.x / columns) * BM, first_channel = (int)(blockIdx.x % columns) * BN;
    int down = (int)threadIdx.x / 16, over = (int)threadIdx.x % 16;
    float sums[TM][TN] = {};
    for_chunks<float, BM, BN, 256>(a, first_pixel, first_channel, [&](const Vec16 *left, const Vec16 *right) {
        // Unrolled, what is read ahead takes more registers than there are.
#pragma unroll 1
        for (int v = 0; v < 4; v++) {
            Vec16 b[TN];
#pragma unroll
            for (int j = 0; j < TN; j++)
                b[j] = right[vector_at(over + j * 16, v)];
#pragma unroll
            for (int i = 0; i < TM; i++) {
                Vec16 four = left[vector_at(down + i * 16, v)];
#pragma unroll
                for (int k = 0; k < 4; k++)
#pragma unroll
                    for (int j = 0; j < TN; j++)
                        sums[i][j] += __uint_as_float(four.words[k]) * __uint_as_float(b[j].words[k]);
            }
        }
    });
#pragma unroll
    for (int i = 0; i < TM; i++) {
        Target t = target_of(a, first_pixel + down + i * 16);
        if (!t.inside)
            continue;
#pragma unroll
        for (int j = 0; j < TN; j++)
            give(a, t, first_channel + over + j * 16, sums[i][j]);
    }
}

// Two blocks a multiprocessor, as above, but for the largest, whose sums alone are 64 registers.
KERNEL(conv_f32_128x128, ConvArgs, 256) { conv_single<8, 8>(a); }
KERNEL_FOR(conv_f32_128x64, ConvArgs, 256, TILES_TOGETHER(256)) { conv_single<8, 4>(a); }
KERNEL_FOR(conv_f32_64x64, ConvArgs, 256, TILES_TOGETHER(256)) { conv_single<4, 4>(a); }
KERNEL_FOR(conv_f32_128x32, ConvArgs, 256, TILES_TOGETHER(256)) { conv_single<8, 2>(a); }
KERNEL_FOR(conv_f32_128x16, ConvArgs, 256, TILES_TOGETHER(256)) { conv_single<8, 1>(a); }

// Adds the parts of a split depth in their order, and finishes: a thread a value of the output.
KERNEL(conv_sum, ConvArgs, 256)
{
    Place p = place_of(a.output);
    if (!p.inside)
        return;
    int area = a.output.h * a.output.w, pixels = a.output.n * area;
    Pixel q = {p.n, p.y, p.x, true};
    float sum = 0.0f;
    if (p.c < a.output.c) {
        const float *part = a.parts + (i64)(p.n * area + p.y * a.output.w + p.x) * a.output.c + p.c;
        for (int i = 0; i < a.split; i++)
            sum += part[(i64)i * pixels * a.output.c];
    }
    finish(a, at(a.output, p.n, p.y, p.x), a.residual == RESIDUAL_NONE ? 0 : residual_at(a, q), p.c, sum);
}

// Any convolution, in f32: groups, maps at any address. Tiles of 64 pixels x 64 channels, a thread 4 x 4 of them.
template <class T> DEVICE void conv_any(const ConvArgs &a)
{
    const int SIDE = 64, DEPTH = 16, PITCH = SIDE + 4;
    float *left = (float *)shared_bytes(), *right = left + DEPTH * PITCH;
    int each = a.output.c / a.groups, of_input = a.input.c / a.groups; // channels of a group
    int columns = (each + a.output.tail + SIDE - 1) / SIDE;
    int group = (int)blockIdx.y, first_channel = (int)(blockIdx.x % columns) * SIDE;
    int first_pixel = (int)(blockIdx.x / columns) * SIDE;
    int thread = (int)threadIdx.x;

    // A thread copies four pixels or channels at one depth.
    int copied = thread / 4, quarter = thread % 4 * 4;
    Pixel p = output_pixel(a, first_pixel + copied);
    int window_y = p.y * a.stride[0] - a.pad[0], window_x = p.x * a.stride[1] - a.pad[1];
    int taps = a.kernel[0] * a.kernel[1], depth = taps * a.channels;
    const T *weights = (const T *)a.weights;

    float sums[4][4] = {};
    int my_pixel = thread / 16 * 4, my_channel = thread % 16 * 4;
    for (int k = 0; k < depth; k += DEPTH) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int at_depth = k + quarter + i;
            int tap = at_depth / a.channels, c = at_depth - tap * a.channels;
            int y = window_y + tap / a.kernel[1] * a.dilation[0], x = window_x + tap % a.kernel[1] * a.dilation[1];
            bool real = tap < taps && c < of_input;
            bool inside = real && p.inside && y >= 0 && y < a.input.h && x >= 0 && x < a.input.w;
            left[(quarter + i) * PITCH + copied] =
                inside ? load(a.input, at(a.input, p.n, y, x) + group * of_input + c) : 0.0f;
            int channel = first_channel + copied;
            right[(quarter + i) * PITCH + copied] =
                real && channel < each ? to_float(weights[(i64)(group * each + channel) * depth + at_depth]) : 0.0f;
        }
        __syncthreads();
        add_products<DEPTH, PITCH>(sums, left + my_pixel, right + my_channel);
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        Pixel q = output_pixel(a, first_pixel + my_pixel + i);
        if (!q.inside)
            continue;
        i64 to = at(a.output, q.n, q.y, q.x);
        i64 add = a.residual == RESIDUAL_NONE ? 0 : residual_at(a, q);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int channel = first_channel + my_channel + j;
            // The tail is behind the last group.
            if (channel < each || group + 1 == a.groups)
                finish(a, to, add, group * each + channel, sums[i][j]);
        }
    }
}

KERNEL(conv_f32, ConvArgs, 256) { conv_any<float>(a); }
KERNEL(conv_f16, ConvArgs, 256) { conv_any<f16>(a); }
KERNEL(conv_bf16, ConvArgs, 256) { conv_any<bf16>(a); }

struct DepthwiseArgs {
    Map input, output;
    // [tap][channel] and [channel], f32.
    const float *weights;
    const float *bias;
    int kernel[2], stride[2], dilation[2], pad[2];
    float slope;
};

// A thread computes eight channels of a pixel (with the tail all pixels are whole such groups, or it goes value by value).
template <class T> DEVICE void depthwise(const DepthwiseArgs &a)
{
    u32 groups = (u32)(a.output.c + a.output.tail + 7) / 8, index = blockIdx.x * blockDim.x + threadIdx.x;
    int first = (int)(index % groups) * 8;
    u32 pixel = index / groups, area = (u32)(a.output.h * a.output.w);
    int n = (int)(pixel / area), rest = (int)(pixel % area), y = rest / a.output.w, x = rest % a.output.w;
    if (n >= a.output.n)
        return;
    int channels = min(8, a.output.c - first);
    float sums[8];
#pragma unroll
    for (int c = 0; c < 8; c++)
        sums[c] = c < channels ? a.bias[first + c] : 0.0f;
    bool whole = channels == 8 && sizeof(T) == 2 && (u64)a.input.data % 16 == 0 && a.input.pixel % 8 == 0 &&
                 a.input.row % 8 == 0 && a.input.image % 8 == 0;
    for (int ky = 0; ky < a.kernel[0]; ky++) {
        int from_y = y * a.stride[0] - a.pad[0] + ky * a.dilation[0];
        if (from_y < 0 || from_y >= a.input.h)
            continue;
        for (int kx = 0; kx < a.kernel[1]; kx++) {
            int from_x = x * a.stride[1] - a.pad[1] + kx * a.dilation[1];
            if (from_x < 0 || from_x >= a.input.w)
                continue;
            const T *in = pixel_of<T>(a.input, n, from_y, from_x) + first;
            const float *w = a.weights + (i64)(ky * a.kernel[1] + kx) * a.output.c + first;
            if (whole) {
                union {
                    Vec16 vector;
                    T values[16 / sizeof(T)];
                } v;
                v.vector = *(const Vec16 *)in;
#pragma unroll
                for (int c = 0; c < 8; c++)
                    sums[c] += to_float(v.values[c % (16 / sizeof(T))]) * w[c];
            } else {
#pragma unroll
                for (int c = 0; c < 8; c++)
                    if (c < channels)
                        sums[c] += to_float(in[c]) * w[c];
            }
        }
    }
    i64 to = at(a.output, n, y, x) + first;
#pragma unroll
    for (int c = 0; c < 8; c++)
        if (first + c < a.output.c + a.output.tail)
            store(a.output, to + c, c < channels ? activate(sums[c], a.slope) : 0.0f);
}

KERNEL(depthwise_f32, DepthwiseArgs, 256) { depthwise<float>(a); }
KERNEL(depthwise_f16, DepthwiseArgs, 256) { depthwise<f16>(a); }
KERNEL(depthwise_bf16, DepthwiseArgs, 256) { depthwise<bf16>(a); }
