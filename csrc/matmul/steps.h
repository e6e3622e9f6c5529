// Half of the float32 step that each stored scale stands for, of as many rows as a vector has lanes.
#pragma once

#include <array>
#include <bit>
#include <cstdint>
#include <type_traits>

#include "base/buffer.h"
#include "codecs/codec.h"
#include "codecs/scale_rule.h"
#include "formats/block_format.h"
#include "simd/vector.h"

namespace mrgptq {

// Eight bytes on, E4M3's step has an exponent one higher and E8M0's one eight higher, and nothing else has changed, unless there is a sign or a step is zero, subnormal or no number. So eight steps are a
// table that fits a vector and gives nearly all of them, for any divisor; the others are looked up one by one.
template <class Format>
class HalfSteps {
public:
    explicit HalfSteps(float tensor_scale) noexcept {
        for (std::size_t byte = 0; byte < of_.size(); ++byte) of_[byte] = 0.5f * group_step<Format>(static_cast<std::uint8_t>(byte), tensor_scale);
        constexpr int begin = std::is_same_v<Format, Mxfp4> ? 120 : 56;  // amid those that the table gives
        for (std::size_t i = 0; i < eight_.size(); ++i) eight_[i] = bits(begin + static_cast<int>(i) % 8) - exponent_part(begin);
        int first = begin, last = begin - 1;
        while (first > 0 && given(first - 1)) --first;
        while (last < 255 && given(last + 1)) ++last;
        first_ = static_cast<std::uint32_t>(first);
        count_ = static_cast<std::uint32_t>(last - first + 1);
    }

    // Bytes are words of up to 255.
    MRGPTQ_INLINE simd::Floats of(simd::Words bytes) const noexcept {
        if (!has_table || simd::any_at_least(bytes - first_, count_)) [[unlikely]] return looked_up(bytes);
        return simd::floats(simd::one_of_eight(bytes, simd::load(eight_.data())) + ((bytes & 0xF8u) << exponent_shift));
    }

private:
    static constexpr bool has_table = simd::lanes >= 8;
    static constexpr int exponent_shift = std::is_same_v<Format, Mxfp4> ? 23 : 20;

    static constexpr std::uint32_t exponent_part(int byte) noexcept { return (static_cast<std::uint32_t>(byte) & 0xF8u) << exponent_shift; }
    std::uint32_t bits(int byte) const noexcept { return std::bit_cast<std::uint32_t>(of_[static_cast<std::size_t>(byte)]); }
    bool given(int byte) const noexcept { return bits(byte) == eight_[static_cast<std::size_t>(byte % 8)] + exponent_part(byte); }

    simd::Floats looked_up(simd::Words bytes) const noexcept {
        alignas(cache_line) float steps[simd::lanes];
        for (int i = 0; i < simd::lanes; ++i) steps[i] = of_[bytes[i]];
        return simd::load(steps);
    }

    std::array<float, 256> of_;
    alignas(cache_line) std::array<std::uint32_t, simd::lanes < 8 ? 8 : simd::lanes> eight_;
    std::uint32_t first_, count_;
};

}  // namespace mrgptq
