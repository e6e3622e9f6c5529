// Scales whose range is float32's own, relative to the largest of their row: matmul/integer.h says why.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "formats/e8m0.h"
#include "simd/vector.h"

namespace mrgptq {

// The power of two at or below a row's largest scale becomes 2^45, and what is less than 2^-63 counts as zero.
inline constexpr int largest_power = 45, least_power = -63;
inline constexpr double least_scale = 0x1p-63;

// What the scales of a row are relative to, given the largest one's exponent.
inline double power_of_row(int exponent) noexcept { return std::ldexp(1.0, exponent - largest_power); }

// The E8M0 byte's scale where `largest` is its row's.
constexpr float relative_scale(std::uint8_t byte, std::uint8_t largest) noexcept {
    if (byte == 255) return std::numeric_limits<float>::quiet_NaN();
    const int power = largest_power - (largest - byte);
    return power < least_power ? 0.0f : std::bit_cast<float>(static_cast<std::uint32_t>(e8m0::bias + power) << 23);
}

// The same of every lane.
MRGPTQ_INLINE simd::Floats relative_scales(simd::Words bytes, simd::Words largest) noexcept {
    using namespace simd;
    constexpr std::uint32_t exponent = e8m0::bias + largest_power, furthest = largest_power - least_power;
    const Words below = largest - bytes;
    return floats(select(bytes == 255u, splat(0x7FC00000u), select(below > furthest, Words{}, (exponent - below) << 23)));
}

static_assert(relative_scale(200, 200) == 0x1p45f && relative_scale(92, 200) == least_scale && relative_scale(91, 200) == 0);

}  // namespace mrgptq
