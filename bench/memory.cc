// The bounds that codecs and rotations are measured against, and an FFHT-style transform: plain C++ that any compiler vectorises, built by bench/memory.py for this machine.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <thread>
#include <vector>

namespace {

template <class Body>
void shared(std::ptrdiff_t count, std::ptrdiff_t unit, int threads, Body body) {
    std::vector<std::thread> team;
    const std::ptrdiff_t units = count / unit;
    for (int t = 0; t < threads; ++t)
        team.emplace_back([=] { body(units * t / threads * unit, units * (t + 1) / threads * unit, t); });
    for (auto& member : team) member.join();
}

}  // namespace

extern "C" {

float bound_read(const float* x, std::ptrdiff_t count, int threads) {
    std::vector<float> sums(static_cast<std::size_t>(threads) * 64);
    shared(count, 1024, threads, [x, out = sums.data()](std::ptrdiff_t begin, std::ptrdiff_t end, int t) {
        float lanes[64] = {};
        for (std::ptrdiff_t i = begin; i < end; i += 64)
            for (int j = 0; j < 64; ++j) lanes[j] += x[i + j];
        std::copy(lanes, lanes + 64, out + 64 * t);
    });
    float sum = 0;
    for (const float lane : sums) sum += lane;
    return sum;
}

void bound_copy(float* to, const float* from, std::ptrdiff_t count, int threads) {
    shared(count, 1024, threads, [=](std::ptrdiff_t begin, std::ptrdiff_t end, int) { std::memcpy(to + begin, from + begin, static_cast<std::size_t>(end - begin) * sizeof(float)); });
}

void bound_scale(float* x, std::ptrdiff_t count, float factor, int threads) {
    shared(count, 1024, threads, [=](std::ptrdiff_t begin, std::ptrdiff_t end, int) {
        for (std::ptrdiff_t i = begin; i < end; ++i) x[i] *= factor;
    });
}

// As FFHT does it: level by level over a block in cache, then a pass that scales.
void ffht_style(float* x, std::ptrdiff_t count, std::ptrdiff_t block, int threads) {
    shared(count, block, threads, [=](std::ptrdiff_t begin, std::ptrdiff_t end, int) {
        for (float* b = x + begin; b < x + end; b += block)
            for (std::ptrdiff_t half = 1; half < block; half *= 2)
                for (std::ptrdiff_t start = 0; start < block; start += 2 * half)
                    for (std::ptrdiff_t i = start; i < start + half; ++i) {
                        const float u = b[i], v = b[i + half];
                        b[i] = u + v;
                        b[i + half] = u - v;
                    }
        const float factor = 1.0f / std::sqrt(static_cast<float>(block));
        for (float* p = x + begin; p < x + end; ++p) *p *= factor;
    });
}
}
