// The CUDA language on a CPU, as far as the kernels of cuda/ use it. Included before each of them.
//
// The threads of a block are fibers of one thread: each runs until it waits at a barrier or for its warp, so that what is written
// between two barriers is seen in one order alone; blocks run side by side on the processor's threads. Shared memory is filled with
// NaN before each block and is exactly as large as asked for, so that AddressSanitizer sees what lies outside.
#pragma once
#define FARFACE_EMULATED 1

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __shared__ static ON_THREAD

namespace emulator {

struct Index {
    unsigned x, y, z;
};

// A lane's part in what its warp does together.
struct Slot {
    const void *pointer;
    std::uint32_t words[8];
    float floats[4];
};

// Of a thread of the processor, found without a call, in what the loader keeps for libraries that are opened late.
#define ON_THREAD __thread __attribute__((tls_model("initial-exec")))
extern ON_THREAD Index thread_index, block_index, block_size, grid_size;
extern ON_THREAD unsigned char *shared_memory;

// Waits for all threads of the block that still run.
void barrier();
// The slots of this thread's warp after each of its threads has given its own.
const Slot *together(const Slot &mine);
// Of this thread.
unsigned lane();

using Body = void (*)(const void *args);
struct Register {
    Register(const char *name, std::size_t bytes, Body body);
};

float half_to_float(std::uint16_t bits);
std::uint16_t float_to_half(float v);

} // namespace emulator

#define threadIdx emulator::thread_index
#define blockIdx emulator::block_index
#define blockDim emulator::block_size
#define gridDim emulator::grid_size

#define KERNEL(name, Args, threads) KERNEL_FOR(name, Args, threads, 1)
#define KERNEL_FOR(name, Args, threads, blocks)                                                                              \
    static void name##_body(const Args &a);                                                                      \
    static emulator::Register name##_registered(#name, sizeof(Args),                                             \
                                                [](const void *p) { name##_body(*(const Args *)p); });           \
    static void name##_body(const Args &a)

inline void __syncthreads() { emulator::barrier(); }
inline void __syncwarp() { emulator::together({}); }

inline float __uint_as_float(unsigned v)
{
    float f;
    std::memcpy(&f, &v, 4);
    return f;
}
inline unsigned __float_as_uint(float v)
{
    unsigned u;
    std::memcpy(&u, &v, 4);
    return u;
}
inline int __float_as_int(float v) { return (int)__float_as_uint(v); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fsqrt_rn(float v) { return std::sqrt(v); }
inline float __expf(float v) { return std::exp(v); }
inline std::uint64_t __umul64hi(std::uint64_t a, std::uint64_t b)
{
    return (std::uint64_t)((unsigned __int128)a * b >> 64);
}
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(unsigned v) { return __builtin_ffs((int)v); }
inline int __clz(unsigned v) { return v ? __builtin_clz(v) : 32; }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
template <class T> inline T __ldg(const T *p) { return *p; }

template <class T> inline T atomicAdd(T *p, T v) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }
template <class T> inline T atomicOr(T *p, T v) { return __atomic_fetch_or(p, v, __ATOMIC_SEQ_CST); }
template <class T> inline T atomicExch(T *p, T v) { return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST); }
// Puts in place of the value what `better` makes of it and `v`.
template <class T, class F> inline T replace(T *p, T v, F better)
{
    T old = __atomic_load_n(p, __ATOMIC_SEQ_CST);
    while (!__atomic_compare_exchange_n(p, &old, better(old, v), false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
    }
    return old;
}
template <class T> inline T atomicMax(T *p, T v)
{
    return replace(p, v, [](T a, T b) { return a > b ? a : b; });
}
template <class T> inline T atomicMin(T *p, T v)
{
    return replace(p, v, [](T a, T b) { return a < b ? a : b; });
}
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

inline unsigned __ballot_sync(unsigned, bool v)
{
    emulator::Slot mine{};
    mine.words[0] = v;
    const emulator::Slot *all = emulator::together(mine);
    unsigned votes = 0;
    for (int i = 0; i < 32; i++)
        votes |= all[i].words[0] << i;
    return votes;
}
inline bool __any_sync(unsigned mask, bool v) { return __ballot_sync(mask, v) != 0; }
inline bool __all_sync(unsigned mask, bool v) { return __ballot_sync(mask, v) == 0xffffffffu; }
template <class T> inline T __shfl_sync(unsigned, T v, int from)
{
    static_assert(sizeof(T) <= 8, "of one register or two");
    emulator::Slot mine{};
    std::memcpy(mine.words, &v, sizeof(T));
    const emulator::Slot *all = emulator::together(mine);
    T other;
    std::memcpy(&other, all[from & 31].words, sizeof(T));
    return other;
}
template <class T> inline T __shfl_xor_sync(unsigned mask, T v, int bits)
{
    return __shfl_sync(mask, v, (int)emulator::lane() ^ bits);
}
template <class T> inline T __shfl_down_sync(unsigned mask, T v, unsigned by)
{
    unsigned from = emulator::lane() + by;
    return __shfl_sync(mask, v, (int)(from < 32 ? from : emulator::lane()));
}
template <class T> inline T __shfl_up_sync(unsigned mask, T v, unsigned by)
{
    unsigned lane = emulator::lane();
    return __shfl_sync(mask, v, (int)(lane >= by ? lane - by : lane));
}

#include "../../../cuda/common.cuh"

DEVICE float to_float(f16 v) { return emulator::half_to_float(v.bits); }
DEVICE u16 f16_bits(float v) { return emulator::float_to_half(v); }

DEVICE void copy_async(void *shared, const void *global, bool inside)
{
    if (inside)
        std::memcpy(shared, global, 16);
    else
        std::memset(shared, 0, 16);
}
DEVICE void copy_commit() {}
template <int N> DEVICE void copy_wait() {}

DEVICE void load_matrices(u32 r[4], const void *row)
{
    emulator::Slot mine{};
    mine.pointer = row;
    const emulator::Slot *all = emulator::together(mine);
    unsigned lane = emulator::lane();
    for (int i = 0; i < 4; i++)
        std::memcpy(&r[i], (const char *)all[i * 8 + lane / 4].pointer + lane % 4 * 4, 4);
}

DEVICE void load_transposed(u32 r[4], const void *row)
{
    emulator::Slot mine{};
    mine.pointer = row;
    const emulator::Slot *all = emulator::together(mine);
    unsigned lane = emulator::lane();
    for (int i = 0; i < 4; i++)
        for (unsigned k = 0; k < 2; k++)
            std::memcpy((char *)&r[i] + k * 2, (const char *)all[i * 8 + lane % 4 * 2 + k].pointer + lane / 4 * 2, 2);
}

template <class T> DEVICE void multiply(float c[4], const u32 a[4], u32 b0, u32 b1, T)
{
    emulator::Slot mine{};
    std::memcpy(mine.words, a, 16);
    mine.words[4] = b0;
    mine.words[5] = b1;
    const emulator::Slot *all = emulator::together(mine);
    auto value = [](u32 word, int high) {
        T v;
        v.bits = (u16)(high ? word >> 16 : word);
        return to_float(v);
    };
    unsigned group = emulator::lane() / 4, pair = emulator::lane() % 4;
    for (unsigned i = 0; i < 4; i++) {
        unsigned row = i / 2, column = pair * 2 + i % 2;
        float sum = 0.0f;
        for (unsigned k = 0; k < 16; k++) {
            const emulator::Slot &left = all[group * 4 + k % 8 / 2], &right = all[column * 4 + k % 8 / 2];
            sum += value(left.words[row + k / 8 * 2], k % 2) * value(right.words[4 + k / 8], k % 2);
        }
        c[i] += sum;
    }
}

DEVICE u32 tf32_bits(float v)
{
    u32 bits = __float_as_uint(v);
    // A NaN stays one where rounding would carry it away.
    return v != v ? 0x7fc00000 : (bits + 0x1000) & ~0x1fffu;
}

DEVICE void multiply(float c[4], const u32 a[4], u32 b0, u32 b1, tf32)
{
    emulator::Slot mine{};
    std::memcpy(mine.words, a, 16);
    mine.words[4] = b0;
    mine.words[5] = b1;
    const emulator::Slot *all = emulator::together(mine);
    // Of factors that nobody has rounded the product is undefined.
    auto value = [](u32 word) { return word & 0x1fff ? NAN : __uint_as_float(word); };
    unsigned group = emulator::lane() / 4, pair = emulator::lane() % 4;
    for (unsigned i = 0; i < 4; i++) {
        unsigned row = i / 2, column = pair * 2 + i % 2;
        float sum = 0.0f;
        for (unsigned k = 0; k < 8; k++) {
            const emulator::Slot &left = all[group * 4 + k % 4], &right = all[column * 4 + k % 4];
            sum += value(left.words[row + k / 4 * 2]) * value(right.words[4 + k / 4]);
        }
        c[i] += sum;
    }
}

DEVICE u8 *shared_bytes() { return emulator::shared_memory; }
