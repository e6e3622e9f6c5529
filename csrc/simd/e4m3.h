// E4M3 a vector at a time; what is encoded has no sign, as scales have none. The definition is formats/e4m3.h; tests/cpp/simd_test.cc holds these to its bytes.
#pragma once

#include "simd/vector.h"

namespace mrgptq::simd {

// Bits of the values nearest to x >= 0, ties to even; from 448 on, and for NaN, 0x7E.
MRGPTQ_INLINE Words encode_e4m3(Floats x) noexcept {
    constexpr std::uint32_t smallest_normal = (127u - 6) << 23, shift_bits = (127u + 14) << 23, largest = 0x43E00000u;
    const Words magnitude = min(bits(x), splat(largest));
    // Adding 2^14 leaves float32 a unit of 2^-9, the subnormal grid; above it the 23-bit mantissa is rounded to 3 bits, a carry running into the exponent.
    const Words subnormal = bits(floats(magnitude) + floats(splat(shift_bits))) - shift_bits;
    const Words normal = ((magnitude + 0x7FFFFu + (magnitude >> 20 & 1u)) >> 20) - (120u << 3);
    return select(magnitude < smallest_normal, subnormal, normal);
}

// Values of all bits, signs and NaN included: foreign files may hold them.
MRGPTQ_INLINE Floats decode_e4m3(Words bits_of) noexcept {
    const Words magnitude = bits_of & 0x7Fu;
    // A subnormal's mantissa counts 2^-9: the eighths that a float32 of [2^-6, 2^-5) has above 2^-6.
    const Floats subnormal = floats((magnitude << 20) + (121u << 23)) - 0x1p-6f;
    const Words value = select(magnitude < 8u, bits(subnormal), (magnitude << 20) + (120u << 23));
    return floats(select(magnitude == 0x7Fu, splat(0x7FC00000u), value) | (bits_of & 0x80u) << 24);
}

}  // namespace mrgptq::simd
