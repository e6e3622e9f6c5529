#include "ffht_style.h"

#include <cmath>

#include "base/parallel.h"

extern "C" void ffht_style(float* x, std::int64_t count, std::int64_t block, int threads) {
    const std::int64_t blocks = count / block;
    mrgptq::parallel_for(threads, threads, [&](mrgptq::Index t) {
        float *const first = x + blocks * t / threads * block, *const last = x + blocks * (t + 1) / threads * block;
        for (float* b = first; b < last; b += block)
            for (std::int64_t half = 1; half < block; half *= 2)
                for (std::int64_t start = 0; start < block; start += 2 * half)
                    for (std::int64_t i = start; i < start + half; ++i) {
                        const float u = b[i], v = b[i + half];
                        b[i] = u + v;
                        b[i + half] = u - v;
                    }
        const float factor = 1.0f / std::sqrt(static_cast<float>(block));
        for (float* p = first; p < last; ++p) *p *= factor;
    });
}
