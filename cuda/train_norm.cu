// Batch normalisation and activation of a training, forward and backward, and sums over a map's pixels (bias gradients).
//
// Sums over pixels are taken in two steps: blocks of pixels first, in f32, whose sums a second kernel adds up in f64. Which pixels a
// block has depends on sizes alone, and every sum is taken in one order, so that the same batch gives the same bits.
#include "common.cuh"

// Blocks have 256 threads: `lanes` neighbouring channels of 256 / lanes pixels at a time.
const int SUM_THREADS = 256;

// The part of a map that a thread of a sum goes over.
struct Share {
    int c, row, rows, first, end;
};

DEVICE Share share_of(const Map &m, int lanes, int span)
{
    Share s;
    s.c = (int)blockIdx.y * lanes + (int)threadIdx.x % lanes;
    s.row = (int)threadIdx.x / lanes;
    s.rows = SUM_THREADS / lanes;
    s.first = (int)blockIdx.x * span;
    s.end = min(s.first + span, m.n * m.h * m.w);
    return s;
}

// Sums of two values a thread over the rows of a block, in `sums[thread]` and `sums[256 + thread]` of the first row's threads.
DEVICE void sum_rows(float *sums, const Share &s, int lanes, float one, float two)
{
    int thread = (int)threadIdx.x;
    sums[thread] = one;
    sums[SUM_THREADS + thread] = two;
    __syncthreads();
    for (int half = s.rows / 2; half > 0; half /= 2) {
        if (s.row < half) {
            sums[thread] += sums[thread + half * lanes];
            sums[SUM_THREADS + thread] += sums[SUM_THREADS + thread + half * lanes];
        }
        __syncthreads();
    }
}

struct SumArgs {
    // What readers of `map` see is act(scale * z + shift); `gradient` is with respect to that. Maps of their own or channels of one: the
    // pixels are one row.
    Map map, gradient;
    // [4][C]: mean, 1 / standard deviation, scale, shift.
    const float *terms;
    // [2][blocks][C].
    float *partial;
    int lanes, span;
    float slope;
};

// Mean, and sum of squared differences from it, of every channel of a block's pixels. The differences are taken from the block's first
// value before they are squared, so that a large mean does not swallow a small variance.
KERNEL(norm_statistics, SumArgs, 256)
{
    Share s = share_of(a.map, a.lanes, a.span);
    bool inside = s.c < a.map.c;
    float pivot = 0.0f, sum = 0.0f, squares = 0.0f;
    if (inside) {
        pivot = load(a.map, s.first * a.map.pixel + s.c);
        for (int p = s.first + s.row; p < s.end; p += s.rows) {
            float d = load(a.map, p * a.map.pixel + s.c) - pivot;
            sum += d;
            squares += d * d;
        }
    }
    float *sums = (float *)shared_bytes();
    sum_rows(sums, s, a.lanes, sum, squares);
    if (s.row == 0 && inside) {
        sum = sums[threadIdx.x];
        squares = sums[SUM_THREADS + threadIdx.x];
        float mean = sum / (float)(s.end - s.first);
        a.partial[(i64)blockIdx.x * a.map.c + s.c] = pivot + mean;
        a.partial[((i64)gridDim.x + blockIdx.x) * a.map.c + s.c] = fmaxf(squares - sum * mean, 0.0f);
    }
}

// The gradient before the activation.
DEVICE float before_activation(float seen, float d, float slope) { return seen > 0.0f ? d : d * slope; }

// Of a normalised map the sums of g and of g * (z - mean) / std over a block's pixels, where g is the gradient before the activation.
KERNEL(norm_gradient_sums, SumArgs, 256)
{
    Share s = share_of(a.map, a.lanes, a.span);
    int channels = a.map.c;
    bool inside = s.c < channels;
    float sum = 0.0f, product = 0.0f;
    if (inside) {
        float mean = a.terms[s.c], inv_std = a.terms[channels + s.c];
        float scale = a.terms[2 * channels + s.c], shift = a.terms[3 * channels + s.c];
        for (int p = s.first + s.row; p < s.end; p += s.rows) {
            float z = load(a.map, p * a.map.pixel + s.c);
            float g = before_activation(scale * z + shift, load(a.gradient, p * a.gradient.pixel + s.c), a.slope);
            sum += g;
            product += g * ((z - mean) * inv_std);
        }
    }
    float *sums = (float *)shared_bytes();
    sum_rows(sums, s, a.lanes, sum, product);
    if (s.row == 0 && inside) {
        a.partial[(i64)blockIdx.x * channels + s.c] = sums[threadIdx.x];
        a.partial[((i64)gridDim.x + blockIdx.x) * channels + s.c] = sums[SUM_THREADS + threadIdx.x];
    }
}

// Sums of a gradient over a block's pixels.
KERNEL(bias_sums, SumArgs, 256)
{
    Share s = share_of(a.gradient, a.lanes, a.span);
    float sum = 0.0f;
    if (s.c < a.gradient.c)
        for (int p = s.first + s.row; p < s.end; p += s.rows)
            sum += load(a.gradient, p * a.gradient.pixel + s.c);
    float *sums = (float *)shared_bytes();
    sum_rows(sums, s, a.lanes, sum, 0.0f);
    if (s.row == 0 && s.c < a.gradient.c)
        a.partial[(i64)blockIdx.x * a.gradient.c + s.c] = sums[threadIdx.x];
}

const int FINISH_THREADS = 128;

// The sum over a block's threads, in all of them.
DEVICE double sum_threads(double *sums, double value)
{
    int thread = (int)threadIdx.x;
    sums[thread] = value;
    __syncthreads();
    for (int half = FINISH_THREADS / 2; half > 0; half /= 2) {
        if (thread < half)
            sums[thread] += sums[thread + half];
        __syncthreads();
    }
    double sum = sums[0];
    __syncthreads();
    return sum;
}

struct NormArgs {
    double eps, momentum;
    // [2][blocks][C] of norm_statistics.
    const float *partial;
    const float *scale, *shift; // learnt
    float *mean, *variance;     // running
    float *terms;               // [4][C], as SumArgs has them
    int blocks, span, pixels, channels;
    int frozen; // whether the running statistics stand still and are used
};

// What readers of a normalised map apply, and the running statistics moved towards the batch's (the variance unbiased there). A block a
// channel.
KERNEL(norm_finish, NormArgs, 128)
{
    double *sums = (double *)shared_bytes();
    int c = (int)blockIdx.x;
    double mean = a.mean[c], variance = a.variance[c];
    if (!a.frozen) {
        auto count = [&](int block) { return (double)min(a.span, a.pixels - block * a.span); };
        double sum = 0.0;
        for (int b = (int)threadIdx.x; b < a.blocks; b += FINISH_THREADS)
            sum += count(b) * a.partial[(i64)b * a.channels + c];
        mean = sum_threads(sums, sum) / a.pixels;
        double squares = 0.0;
        for (int b = (int)threadIdx.x; b < a.blocks; b += FINISH_THREADS) {
            double d = a.partial[(i64)b * a.channels + c] - mean;
            squares += a.partial[((i64)a.blocks + b) * a.channels + c] + count(b) * d * d;
        }
        variance = sum_threads(sums, squares) / a.pixels;
    }
    if (threadIdx.x != 0)
        return;
    if (!a.frozen) {
        double unbiased = variance * a.pixels / (a.pixels - 1.0);
        a.mean[c] = (float)((1.0 - a.momentum) * a.mean[c] + a.momentum * mean);
        a.variance[c] = (float)((1.0 - a.momentum) * a.variance[c] + a.momentum * unbiased);
    }
    double inv_std = 1.0 / sqrt(variance + a.eps), scale = a.scale[c] * inv_std;
    a.terms[c] = (float)mean;
    a.terms[a.channels + c] = (float)inv_std;
    a.terms[2 * a.channels + c] = (float)scale;
    a.terms[3 * a.channels + c] = (float)(a.shift[c] - mean * scale);
}

struct NormGradientArgs {
    // [2][blocks][C] of norm_gradient_sums.
    const float *partial;
    const float *terms;
    const float *scale;          // learnt
    float *d_scale, *d_shift;    // added to
    float *factors;              // [3][C], as PullArgs has them
    int blocks, pixels, channels;
    int frozen;
};

// Gradients of scale and shift, and what is needed to pull the map's own back. A block a channel.
KERNEL(norm_gradient_finish, NormGradientArgs, 128)
{
    double *sums = (double *)shared_bytes();
    int c = (int)blockIdx.x;
    double sum = 0.0, product = 0.0;
    for (int b = (int)threadIdx.x; b < a.blocks; b += FINISH_THREADS) {
        sum += a.partial[(i64)b * a.channels + c];
        product += a.partial[((i64)a.blocks + b) * a.channels + c];
    }
    sum = sum_threads(sums, sum);
    product = sum_threads(sums, product);
    if (threadIdx.x != 0)
        return;
    a.d_scale[c] += (float)product;
    a.d_shift[c] += (float)sum;
    a.factors[c] = a.scale[c] * a.terms[a.channels + c];
    a.factors[a.channels + c] = a.frozen ? 0.0f : (float)(sum / a.pixels);
    a.factors[2 * a.channels + c] = a.frozen ? 0.0f : (float)(product / a.pixels);
}

struct BiasArgs {
    const float *partial; // [blocks][C] of bias_sums
    float *d_bias;        // added to
    int blocks, channels;
};

KERNEL(bias_finish, BiasArgs, 128)
{
    double *sums = (double *)shared_bytes();
    int c = (int)blockIdx.x;
    double sum = 0.0;
    for (int b = (int)threadIdx.x; b < a.blocks; b += FINISH_THREADS)
        sum += a.partial[(i64)b * a.channels + c];
    sum = sum_threads(sums, sum);
    if (threadIdx.x == 0)
        a.d_bias[c] += (float)sum;
}

// Eight channels of a pixel that a thread works on; false where it has none. `count` with the tail.
DEVICE bool eight_of(const Map &m, int *pixel, int *first, int *count)
{
    u32 groups = (u32)(m.c + m.tail + 7) / 8, index = blockIdx.x * blockDim.x + threadIdx.x;
    *first = (int)(index % groups) * 8;
    *pixel = (int)(index / groups);
    *count = min(8, m.c + m.tail - *first);
    return *pixel < m.n * m.h * m.w;
}

struct ApplyArgs {
    Map input, output;  // may be one
    const float *terms; // as SumArgs has them; none where there is no normalisation
    float slope;
};

// act(scale * z + shift).
KERNEL(norm_apply, ApplyArgs, 256)
{
    int pixel, first, count;
    if (!eight_of(a.output, &pixel, &first, &count))
        return;
    float v[8];
    load_eight(a.input, pixel * a.input.pixel + first, min(count, a.input.c + a.input.tail - first), v);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        int c = first + i, channels = a.output.c;
        if (a.terms && c < channels)
            v[i] = a.terms[2 * channels + c] * v[i] + a.terms[3 * channels + c];
        v[i] = c < channels ? activate(v[i], a.slope) : 0.0f;
    }
    store_eight(a.output, pixel * a.output.pixel + first, count, v);
}

struct PullArgs {
    // The map as its operation left it, or, where there is no normalisation, as its readers see it; its gradient, which is changed.
    Map map, gradient;
    const float *terms;
    // [3][C]: scale / std, mean of g, mean of g * (z - mean) / std. None where there is no normalisation.
    const float *factors;
    float slope;
};

// Pulls the gradient that readers left back through activation and normalisation (Ioffe and Szegedy 2015, section 3).
KERNEL(pull_back, PullArgs, 256)
{
    int pixel, first, count;
    if (!eight_of(a.gradient, &pixel, &first, &count))
        return;
    float z[8], d[8];
    i64 place = pixel * a.gradient.pixel + first;
    load_eight(a.map, pixel * a.map.pixel + first, min(count, a.map.c + a.map.tail - first), z);
    load_eight(a.gradient, place, count, d);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        int c = first + i, channels = a.gradient.c;
        if (c >= channels) {
            d[i] = 0.0f;
        } else if (a.factors) {
            float seen = a.terms[2 * channels + c] * z[i] + a.terms[3 * channels + c];
            float unit = (z[i] - a.terms[c]) * a.terms[channels + c];
            float g = before_activation(seen, d[i], a.slope);
            d[i] = a.factors[c] * (g - a.factors[channels + c] - unit * a.factors[2 * channels + c]);
        } else {
            d[i] = before_activation(z[i], d[i], a.slope);
        }
    }
    store_eight(a.gradient, place, count, d);
}
