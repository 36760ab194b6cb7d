// The optimiser's step, averaged weights and the gradient's norm: the rules of src/train/optim, operation by operation, so that the
// same gradients give the bits that the CPU gets (nothing is contracted into fused multiply-adds).
#include "common.cuh"

struct SgdArgs {
    float *value, *buffer;
    const float *gradient;
    u32 count;
    float rate, momentum, decay;
    float of_buffer, of_gradient; // what each weighs in the step
};

KERNEL(sgd, SgdArgs, 256)
{
    u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= a.count)
        return;
    float p = a.value[i];
    float g = __fadd_rn(a.gradient[i], __fmul_rn(a.decay, p));
    float b = __fadd_rn(__fmul_rn(a.momentum, a.buffer[i]), g);
    a.buffer[i] = b;
    float step = __fadd_rn(__fmul_rn(a.of_gradient, g), __fmul_rn(a.of_buffer, b));
    a.value[i] = __fsub_rn(p, __fmul_rn(a.rate, step));
}

struct AdamWArgs {
    float *value, *mean, *square;
    const float *gradient;
    u32 count;
    float beta1, beta2, epsilon;
    // lr / (1 - beta1^t); 1 / sqrt(1 - beta2^t); 1 - lr * decay.
    float rate, root, shrink;
};

KERNEL(adamw, AdamWArgs, 256)
{
    u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= a.count)
        return;
    float g = a.gradient[i], m = a.mean[i];
    m = __fadd_rn(m, __fmul_rn(__fsub_rn(1.0f, a.beta1), __fsub_rn(g, m)));
    float v = __fadd_rn(__fmul_rn(a.beta2, a.square[i]), __fmul_rn(__fmul_rn(__fsub_rn(1.0f, a.beta2), g), g));
    a.mean[i] = m;
    a.square[i] = v;
    float size = __fadd_rn(__fmul_rn(__fsqrt_rn(v), a.root), a.epsilon);
    a.value[i] = __fsub_rn(__fmul_rn(a.shrink, a.value[i]), __fdiv_rn(__fmul_rn(a.rate, m), size));
}

struct AverageArgs {
    float *average;
    const float *value;
    u32 count;
    float share; // of the new values
};

KERNEL(move_average, AverageArgs, 256)
{
    u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < a.count)
        a.average[i] = __fadd_rn(a.average[i], __fmul_rn(a.share, __fsub_rn(a.value[i], a.average[i])));
}

struct ScaleArgs {
    float *values;
    u32 count;
    float factor;
};

KERNEL(scale_values, ScaleArgs, 256)
{
    u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < a.count)
        a.values[i] = __fmul_rn(a.values[i], a.factor);
}

struct SquaresArgs {
    const float *values;
    double *sums; // one a block of `squares`; [0] is the whole behind `squares_finish`
    u32 count, span;
};

// The sum over a block's threads, in its first.
DEVICE double sum_block(double value)
{
    double *sums = (double *)shared_bytes();
    sums[threadIdx.x] = value;
    __syncthreads();
    for (u32 half = 128; half > 0; half /= 2) {
        if (threadIdx.x < half)
            sums[threadIdx.x] += sums[threadIdx.x + half];
        __syncthreads();
    }
    return sums[0];
}

// Sums of squares in f64, `span` values a block: finite unless a value is not.
KERNEL(squares, SquaresArgs, 256)
{
    u32 first = blockIdx.x * a.span, end = a.count - first < a.span ? a.count : first + a.span;
    double sum = 0.0;
    for (u32 i = first + threadIdx.x; i < end; i += 256)
        sum += (double)a.values[i] * (double)a.values[i];
    sum = sum_block(sum);
    if (threadIdx.x == 0)
        a.sums[blockIdx.x] = sum;
}

// The sum of `count` blocks' sums; one block.
KERNEL(squares_finish, SquaresArgs, 256)
{
    double sum = 0.0;
    for (u32 i = threadIdx.x; i < a.count; i += 256)
        sum += a.sums[i];
    sum = sum_block(sum);
    if (threadIdx.x == 0)
        a.sums[0] = sum;
}
