// What the emulated driver sees of the kernels.
#pragma once

#include "shim.hpp"

namespace emulator {

// A kernel by its name, and the bytes of its argument.
bool find(const char *name, std::size_t *bytes, Body *body);
// The names of all, by number; none behind the last.
const char *name(int number);
// Threads of a block from the last to the first: a kernel without races gives the same.
void run_backwards(bool on);
void launch(Body kernel, const void *args, Index grid, Index block, std::size_t shared);

} // namespace emulator
