// A chunk: as many adjacent groups of a row as a vector has lanes, whose scales are found side by side, lane g being group g.
#pragma once

#include <algorithm>
#include <array>

#include "codecs/group_scales.h"
#include "simd/e2m1.h"
#include "simd/nibbles.h"

namespace mrgptq {

template <class Format>
inline constexpr Index chunk_cols = simd::lanes * Format::group_size;

// How x / step is had. All three round the same real number, as far as a code depends on it:
//   division     as written: a rounded reciprocal alone would move ties;
//   reciprocal   the step is a power of two, whose reciprocal is exact for every E8M0 byte;
//   corrected    q = x y with y = fl(1 / step), and then q + y (x - q step), each sum and product rounded once together: the correctly rounded quotient (Markstein 1990; Muller et al.,
//                Handbook of Floating-Point Arithmetic, theorem 4.8), a quarter of a division's time. Needs a fused multiply-add and nothing that over- or underflows: see moderate(). What
//                is below that, x under 2^-100, is far below a quarter of a step, where no code depends on its last bit.
enum class Quotient { division, reciprocal, corrected };

template <Quotient quotient>
MRGPTQ_INLINE simd::Floats divide(simd::Floats x, float step, float inverse) noexcept {
    if constexpr (quotient == Quotient::division) return x / step;
    const simd::Floats y = simd::splat(inverse), q = x * y;
    if constexpr (quotient == Quotient::reciprocal) return q;
    return simd::fused(simd::fused(-q, simd::splat(step), x), y, q);
}

// Bits that are at least 2^-60's and 2^60's for what corrected quotients cannot have: with steps from 2^-60 to 2^60 and magnitudes below 2^60 no quotient overflows, and where it is a quarter
// or more, x - q step, a multiple of 2^-24 ulp(x), does not underflow.
MRGPTQ_INLINE bool moderate(simd::Words amax, simd::Floats steps) noexcept {
    using namespace simd;
    constexpr std::uint32_t lowest = (127u - 60) << 23, highest = (127u + 60) << 23;
    return !any_at_least(max(max(amax, splat(lowest)) - lowest, bits(steps) - lowest), highest - lowest);  // a step below the lowest wraps to a large number
}

// Bits of the largest magnitude of each group; above all finite ones where a group holds a NaN or an infinity.
template <class Format>
MRGPTQ_INLINE simd::Words group_maxima(const float* x) noexcept {
    using namespace simd;
    constexpr int vectors = Format::group_size / lanes;
    const auto larger = [](Words a, Words b) { return max(a, b); };
    return fold(
        [&](int group) {
            const float* values = x + group * Format::group_size;
            Words largest = magnitude_bits(load(values));
            for (int i = 1; i < vectors; ++i) largest = max(largest, magnitude_bits(load(values + i * lanes)));
            return largest;
        },
        larger);
}

// What encode_columns packs best, at once.
inline constexpr Index codes_side_by_side = simd::lanes == 16 ? 128 : 16;

// `width` adjacent columns, the first of which lies in the group of the first step.
template <class Format, Quotient quotient, Index width>
MRGPTQ_INLINE void encode_columns(const simd::E2m1Rounder& to_e2m1, const float* x, const float* steps, const float* inverses, std::uint8_t* codes) noexcept {
    using namespace simd;
    constexpr int vectors = width / lanes;
    const auto group = [](int i) { return i * lanes / Format::group_size; };
    Floats quotients[vectors];
    Words found[vectors];
    for (int i = 0; i < vectors; ++i) quotients[i] = divide<quotient>(load(x + i * lanes), steps[group(i)], inverses[group(i)]);
    to_e2m1.encode(quotients, found);
    pack_nibbles(found, codes);
}

// `out` may be `x`.
template <class Format, Quotient quotient>
MRGPTQ_INLINE void round_group(const simd::E2m1Rounder& to_e2m1, const float* x, float step, float inverse, float* out) noexcept {
    using namespace simd;
    for (int i = 0; i < Format::group_size; i += lanes) store(out + i, step * decode_e2m1(to_e2m1.encode(divide<quotient>(load(x + i), step, inverse))));
}

template <class Format>
MRGPTQ_INLINE void decode_group(const std::uint8_t* codes, float step, float* out) noexcept {
    using namespace simd;
    for (int half = 0; half < Format::group_size / 16; ++half, codes += 8, out += 16) {
        const Codes sixteen = unpack_nibbles(codes);
        for (int i = 0; i < vectors_of_16; ++i) store(out + i * lanes, step * decode_e2m1(sixteen.v[i]));
    }
}

}  // namespace mrgptq
