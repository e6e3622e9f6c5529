// The absmax scales and the steps of as many groups as a vector has lanes. The definitions are group_scale() and group_step(); tests hold these to their bytes.
#pragma once

#include <type_traits>

#include "codecs/scale_rule.h"
#include "simd/e4m3.h"
#include "simd/vector.h"

namespace mrgptq {

// group_step() of every lane's stored byte.
template <class Format>
MRGPTQ_INLINE simd::Floats group_steps(simd::Words bytes, float tensor_scale) noexcept {
    using namespace simd;
    if constexpr (std::is_same_v<Format, Nvfp4>) {
        return decode_e4m3(bytes) / tensor_scale;
    } else {
        // 2^-127 lies below float32's normal range; 255 is NaN.
        const Words power = select(bytes == 0u, splat(0x00400000u), bytes << 23);
        return floats(select(bytes == 255u, splat(0x7FC00000u), power)) / tensor_scale;
    }
}

// 1 / 2^(byte - 127) by its bits: a division would stop at the subnormal 2^-127 that a group of zeros has. For bytes up to 253, which are all that the rules give.
MRGPTQ_INLINE simd::Floats e8m0_reciprocals(simd::Words bytes) noexcept { return simd::floats((254u - bytes) << 23); }

// An MX rule on the bits of a float32 magnitude: add `bump`, keep the exponent, subtract `drop`, hold the byte in 0 ... highest. Numbers below the normal range have byte 0 by every rule.
struct MxBits {
    std::uint32_t bump, drop, highest;
};

constexpr MxBits mx_bits(MxRule rule) noexcept {
    switch (rule) {
        case MxRule::floor: return {0, 2, 252};
        case MxRule::ceil: return {0x3FFFFF, 2, 252};   // carries where the mantissa is above 1.5
        case MxRule::even: return {0x200000, 2, 252};   // carries from 1.75 on
        case MxRule::four_thirds: break;
    }
    return {0, 0, 253};
}

// NVFP4's stored bytes of steps that map the largest magnitude to 6.
MRGPTQ_INLINE simd::Words nvfp4_scales(simd::Floats sixth, float tensor_scale) noexcept {
    using namespace simd;
    const Words bytes = encode_e4m3(sixth * tensor_scale);
    return select(bytes == 0u, splat(0x20u), bytes);
}

// The stored absmax bytes of groups whose largest magnitudes have these bits; of what is not finite, some byte.
template <class Format>
MRGPTQ_INLINE simd::Words absmax_scales(simd::Words amax, const ScaleRule& rule, float tensor_scale) noexcept {
    using namespace simd;
    if constexpr (std::is_same_v<Format, Nvfp4>) {
        Words sixth = bits(floats(amax) / e2m1::largest);
        if (rule.bfloat16_sixth) sixth = (sixth + 0x7FFFu + (sixth >> 16 & 1u)) & 0xFFFF0000u;
        return nvfp4_scales(floats(sixth), tensor_scale);
    } else {
        const auto [bump, drop, highest] = mx_bits(rule.mx);
        const Words exponent = (amax + bump) >> 23;
        return min(max(exponent, splat(drop)) - drop, splat(highest));
    }
}

}  // namespace mrgptq
