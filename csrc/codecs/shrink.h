// fpquant_mse, FP-Quant's `--w_observer mse`: of the steps s_i = (1 - 0.8 i / 100) * amax / 6, i = 0 ... 99, unrounded, the first that leaves the least sum over the group of
// |x - round(x / s_i) s_i|^2.4. This is the definition; scale_search.cc leaves out candidates that cannot win.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>

#include "base/matrix_view.h"
#include "formats/e2m1.h"

namespace mrgptq {

inline constexpr int shrink_count = 100;

inline constexpr std::array<float, shrink_count> shrink_factors = [] {
    std::array<float, shrink_count> factors{};
    for (int i = 0; i < shrink_count; ++i) factors[static_cast<std::size_t>(i)] = static_cast<float>(1.0 - i * 0.8 / 100.0);
    return factors;
}();

// |e|^2.4 as e^2 * (fifth root of |e|)^2, in operations that IEEE 754 fixes, so that reference.py computes the same bits; a libm's pow would not.
// The root starts from dividing the exponent by five (3 % off) and takes two Halley steps, which leaves 1e-12.
inline double power_2_4(double e) noexcept {
    const double x = std::fabs(e);
    // Below 2^-200 no difference of two float32 numbers exists but zero; the clamp keeps the root of zero out of the subnormals.
    constexpr std::uint64_t smallest_exponent = std::uint64_t{1023 - 200} << 20;
    const std::uint64_t high = std::max(std::bit_cast<std::uint64_t>(x) >> 32, smallest_exponent);
    const std::uint64_t fifth = high * 0x33333333u >> 32;
    double y = std::bit_cast<double>((fifth + 0x3325D000u) << 32);
    for (int step = 0; step < 2; ++step) {
        const double y5 = (y * y) * (y * y) * y;
        y = y * (2.0 * y5 + 3.0 * x) / (3.0 * y5 + 2.0 * x);
    }
    return (x * x) * (y * y);
}

// The sum for candidate `i`, in column order.
template <Index group_size>
double shrink_loss(const float* group, float sixth, int i) noexcept {
    const double step = shrink_factors[static_cast<std::size_t>(i)] * sixth, inverse = 1.0 / step;
    std::array<double, group_size> losses;
    for (Index c = 0; c < group_size; ++c) {
        const double x = std::fabs(group[c]);
        // The reciprocal can only move an exact tie, and either side of a tie leaves the same error.
        losses[static_cast<std::size_t>(c)] = power_2_4(x - e2m1::round_magnitude(x * inverse) * step);
    }
    double sum = 0;
    for (const double loss : losses) sum += loss;
    return sum;
}

template <Index group_size>
float searched_step(const float* group, float sixth) noexcept {
    int best = 0;
    double least = shrink_loss<group_size>(group, sixth, 0);
    for (int i = 1; i < shrink_count; ++i)
        if (const double loss = shrink_loss<group_size>(group, sixth, i); loss < least) {
            least = loss;
            best = i;
        }
    return shrink_factors[static_cast<std::size_t>(best)] * sixth;
}

}  // namespace mrgptq
