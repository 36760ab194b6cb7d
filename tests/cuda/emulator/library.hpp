// What the emulated libraries ask of the emulated driver: the same count of calls and of what lives, the same memory and streams.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

namespace emulator {
float half_to_float(std::uint16_t bits);
std::uint16_t float_to_half(float v);
} // namespace emulator

extern "C" {
// Counts a call; not 0 where it is to fail, or where it needs a context and none is current.
int farface_emulator_begin(int needs_context);
// Counts what was made (1) or given back (-1).
void farface_emulator_made(int count);
// Whether so many bytes lie within one allocation.
int farface_emulator_inside(unsigned long long address, std::size_t bytes);
// Where a library is to refuse what it could compute: 1 when it is asked for the workspace, 2 when it is given the work.
int farface_emulator_refuses();
// Does the work, or records it where the stream is recorded. A driver's result.
int farface_emulator_run(void *stream, const std::function<int()> *work);
}

namespace library {

enum class Type { F32, F16, BF16 };

inline std::size_t bytes(Type t) { return t == Type::F32 ? 4 : 2; }

inline float load(Type t, const void *data, std::int64_t i)
{
    if (t == Type::F32)
        return ((const float *)data)[i];
    std::uint16_t bits = ((const std::uint16_t *)data)[i];
    if (t == Type::F16)
        return emulator::half_to_float(bits);
    std::uint32_t wide = (std::uint32_t)bits << 16;
    float v;
    std::memcpy(&v, &wide, 4);
    return v;
}

inline void store(Type t, void *data, std::int64_t i, float v)
{
    if (t == Type::F32) {
        ((float *)data)[i] = v;
        return;
    }
    if (t == Type::F16) {
        ((std::uint16_t *)data)[i] = emulator::float_to_half(v);
        return;
    }
    std::uint32_t bits;
    std::memcpy(&bits, &v, 4);
    // To the nearest, ties to even; NaN stays one.
    bits = v != v ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1);
    ((std::uint16_t *)data)[i] = (std::uint16_t)(bits >> 16);
}

inline bool inside(const void *p, std::size_t size)
{
    return size == 0 || (p && farface_emulator_inside((unsigned long long)p, size));
}

inline bool aligned(const void *p, std::size_t to) { return (std::uintptr_t)p % to == 0; }

// What a call may leave in its workspace.
inline void spoil(void *workspace, std::size_t size)
{
    if (size)
        std::memset(workspace, 0xff, size);
}

} // namespace library
