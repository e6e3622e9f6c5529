// E8M0, the power of two that scales an MXFP4 group (OCP Microscaling Formats v1.0, section 5.4.1).
//
//   byte b means 2^(b-127) for b = 0 ... 254; 255 is NaN and is never written: the readers we tried take it for infinity or 2^128. There is no zero.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

namespace mrgptq::e8m0 {

inline constexpr int bias = 127;

constexpr float decode(std::uint8_t bits) noexcept {
    if (bits == 255) return std::bit_cast<float>(0x7FC00000u);
    // 2^-127 lies below float32's normal range: its one mantissa bit is written out.
    return std::bit_cast<float>(bits == 0 ? 0x00400000u : static_cast<std::uint32_t>(bits) << 23);
}

// The byte of 2^exponent, clamped to what the format holds.
constexpr std::uint8_t from_exponent(int exponent) noexcept { return static_cast<std::uint8_t>(std::clamp(exponent, -bias, 127) + bias); }

// The byte of the power of two at or below `x` > 0: of a power of two, its own. Infinity, whose ilogb is INT_MAX, gets the largest.
inline std::uint8_t encode(float x) noexcept { return from_exponent(std::ilogb(x)); }

static_assert(decode(127) == 1.0f && decode(0) == 0x1p-127f && decode(254) == 0x1p127f && from_exponent(-200) == 0 && from_exponent(200) == 254);

}  // namespace mrgptq::e8m0
