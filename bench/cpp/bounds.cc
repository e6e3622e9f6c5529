// Compiled for the machine it runs on, with contraction into FMA, unlike the core: a bound is what the hardware gives, not what our promises of equal bytes leave of it.
#include "bounds.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "base/parallel.h"

namespace {

using mrgptq::Index;

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

template <class Real>
struct Vector {
    typedef Real type __attribute__((vector_size(vector_bytes), aligned(alignof(Real)), may_alias));
    static constexpr int lanes = vector_bytes / static_cast<int>(sizeof(Real));
};

// A contiguous part of [0, count) for each thread: body(part, begin, end).
template <class Body>
void parts(std::int64_t count, int threads, Body&& body) {
    const std::int64_t part = (count + threads - 1) / threads;
    mrgptq::parallel_for(threads, threads, [&](Index p) { body(p, std::min<std::int64_t>(p * part, count), std::min<std::int64_t>((p + 1) * part, count)); });
}

// 24 chains hide a latency of up to 12 cycles at two FMAs a cycle and still fit into 32 registers; with 16 registers (below AVX-512) twelve do.
template <class Real>
double fma_chains(std::int64_t rounds, int threads) {
    using V = typename Vector<Real>::type;
    constexpr int chains = vector_bytes == 64 ? 24 : 12;
    std::vector<double> kept(static_cast<std::size_t>(threads));
    mrgptq::parallel_for(threads, threads, [&](Index t) {
        V sum[chains], factor, addend;
        for (int lane = 0; lane < Vector<Real>::lanes; ++lane) factor[lane] = Real(0.5), addend[lane] = Real(t + lane);
        for (int c = 0; c < chains; ++c) sum[c] = addend * Real(c);
        for (std::int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 24
            for (int c = 0; c < chains; ++c) sum[c] = sum[c] * factor + addend;
        }
        for (int c = 0; c < chains; ++c)
            for (int lane = 0; lane < Vector<Real>::lanes; ++lane) kept[static_cast<std::size_t>(t)] += static_cast<double>(sum[c][lane]);
    });
    double total = 0;
    for (const double k : kept) total += k;
    // Always true, and no compiler knows it: the chains cannot be left out.
    return total == 0.125 ? 0 : 2.0 * chains * Vector<Real>::lanes * static_cast<double>(rounds) * threads;
}

}  // namespace

extern "C" {

void bound_copy(float* to, const float* from, std::int64_t count, int threads) {
    parts(count, threads, [&](Index, std::int64_t begin, std::int64_t end) { std::memcpy(to + begin, from + begin, static_cast<std::size_t>(end - begin) * sizeof(float)); });
}

void bound_scale(float* x, std::int64_t count, float factor, int threads) {
    parts(count, threads, [&](Index, std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i) x[i] *= factor;
    });
}

float bound_sum(const float* x, std::int64_t count, int threads) {
    using V = Vector<float>::type;
    constexpr int lanes = Vector<float>::lanes, step = 8 * lanes;
    std::vector<float> sums(static_cast<std::size_t>(threads));
    parts(count, threads, [&](Index p, std::int64_t begin, std::int64_t end) {
        V sum[8] = {};
        std::int64_t i = begin;
        for (; i + step <= end; i += step)
            for (int k = 0; k < 8; ++k) sum[k] += *reinterpret_cast<const V*>(x + i + k * lanes);
        float rest = 0;
        for (; i < end; ++i) rest += x[i];
        for (int k = 0; k < 8; ++k)
            for (int lane = 0; lane < lanes; ++lane) rest += sum[k][lane];
        sums[static_cast<std::size_t>(p)] = rest;
    });
    float total = 0;
    for (const float s : sums) total += s;
    return total;
}

double bound_fma_float(std::int64_t rounds, int threads) { return fma_chains<float>(rounds, threads); }
double bound_fma_double(std::int64_t rounds, int threads) { return fma_chains<double>(rounds, threads); }
}
