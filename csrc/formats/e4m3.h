// E4M3 (the "fn" kind: finite, NaN at 0x7F and 0xFF), the 8-bit float that holds NVFP4's group scales (OCP 8-bit Floating Point v1.0).
//
//   bits s eeee mmm    value (-1)^s * 2^(e-7) * (1 + m/8), and (-1)^s * 2^-6 * m/8 where e = 0
//   largest 448 (0x7E), smallest normal 2^-6 (0x08), smallest above zero 2^-9 (0x01)
#pragma once

#include <bit>
#include <cstdint>
#include <limits>

namespace mrgptq::e4m3 {

inline constexpr float largest = 448.0f;

constexpr float decode(std::uint8_t bits) noexcept {
    const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x80) << 24;
    const std::uint32_t magnitude = bits & 0x7F;
    if (magnitude == 0x7F) return std::bit_cast<float>(sign | 0x7FC00000u);
    // 2^-9 times the integer is exact in float32; a normal number is rebased from bias 7 to bias 127 instead.
    const float value = magnitude < 8 ? static_cast<float>(magnitude) * 0x1p-9f : std::bit_cast<float>((magnitude << 20) + (120u << 23));
    return std::bit_cast<float>(std::bit_cast<std::uint32_t>(value) | sign);
}

// The bits nearest to `x`, ties to even; beyond +-448 it saturates, since a scale that became NaN would ruin its whole group. Precondition: `x` is not NaN.
constexpr std::uint8_t encode(float x) noexcept {
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
    const std::uint8_t sign = static_cast<std::uint8_t>(bits >> 24 & 0x80);
    const std::uint32_t magnitude = bits & 0x7FFFFFFFu;
    if (magnitude >= std::bit_cast<std::uint32_t>(largest)) return sign | 0x7E;
    if (magnitude < std::bit_cast<std::uint32_t>(0x1p-6f)) {
        // Adding 2^14 leaves float32 a unit of 2^-9, so the addition itself rounds to the subnormal grid, ties to even.
        const float shifted = std::bit_cast<float>(magnitude) + 0x1p14f;
        return static_cast<std::uint8_t>(sign | (std::bit_cast<std::uint32_t>(shifted) - std::bit_cast<std::uint32_t>(0x1p14f)));
    }
    // Round the 23-bit mantissa to 3 bits in the integer domain; a carry runs into the exponent, where it belongs.
    const std::uint32_t rounded = magnitude + 0x7FFFFu + (magnitude >> 20 & 1);
    return static_cast<std::uint8_t>(sign | ((rounded >> 20) - (120u << 3)));
}

static_assert(encode(448.0f) == 0x7E && encode(1e30f) == 0x7E && encode(-1.0f) == 0xB8 && encode(0x1p-10f) == 0 && encode(0x1.8p-9f) == 2);
static_assert(decode(0x7E) == 448.0f && decode(0x01) == 0x1p-9f && decode(0x08) == 0x1p-6f);

}  // namespace mrgptq::e4m3
