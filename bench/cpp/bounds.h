// What the machine can do at most: memory traffic and fused multiply-adds, threaded as the core is. A C interface, so that the Python benchmarks load it beside their contenders.
#pragma once

#include <cstdint>

extern "C" {

// memcpy of count floats, a contiguous part for each thread.
void bound_copy(float* to, const float* from, std::int64_t count, int threads);

// x *= factor.
void bound_scale(float* x, std::int64_t count, float factor, int threads);

// Reads every element; the sum only keeps the compiler from leaving it out.
float bound_sum(const float* x, std::int64_t count, int threads);

// Chains of dependent fused multiply-adds in registers, enough of them to fill the pipelines of every thread; returns the floating-point operations carried out.
double bound_fma_float(std::int64_t rounds, int threads);
double bound_fma_double(std::int64_t rounds, int threads);
}
