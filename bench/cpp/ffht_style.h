// A peer of the block Hadamard rotation, in plain C++ that any compiler vectorises.
#pragma once

#include <cstdint>

extern "C" {

// The rotation of every block of x as FFHT does it: level by level over a block in cache, then a pass over each thread's part that scales.
void ffht_style(float* x, std::int64_t count, std::int64_t block, int threads);
}
