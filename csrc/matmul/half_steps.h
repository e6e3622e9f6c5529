// Half of the float32 steps that stored scales stand for, of as many rows as a vector has lanes.
#pragma once

#include <array>
#include <bit>
#include <cstdint>
#include <type_traits>

#include "base/buffer.h"
#include "codecs/codec.h"
#include "codecs/scale_rule.h"
#include "formats/block_format.h"
#include "matmul/weight.h"
#include "simd/dot.h"
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
        first_ = static_cast<std::uint8_t>(first);
        count_ = static_cast<std::uint8_t>(last - first + 1);
    }

    // Of words of four groups' scales: the first's to `to`, the others' `stride` apart.
    MRGPTQ_INLINE void of_four(simd::Words four, float* to, Index stride) const noexcept {
        using namespace simd;
        if (!has_table || any_at_least((Words)((Bytes)four - first_ >= count_), 1)) [[unlikely]] return look_up(four, to, stride);
        const Words eight = load(eight_.data());
#pragma GCC unroll 4
        for (std::uint32_t i = 0; i < scales_a_word; ++i) {
            const Words byte = four >> (8 * i), exponent = exponent_shift >= 8 * i ? four << (exponent_shift - 8 * i) : four >> (8 * i - exponent_shift);
            store(to + i * stride, floats(one_of_eight(byte, eight) + (exponent & (0xF8u << exponent_shift))));
        }
    }

private:
    static constexpr bool has_table = simd::lanes >= 8;
    static constexpr std::uint32_t exponent_shift = std::is_same_v<Format, Mxfp4> ? 23 : 20;

    static constexpr std::uint32_t exponent_part(int byte) noexcept { return (static_cast<std::uint32_t>(byte) & 0xF8u) << exponent_shift; }
    std::uint32_t bits(int byte) const noexcept { return std::bit_cast<std::uint32_t>(of_[static_cast<std::size_t>(byte)]); }
    bool given(int byte) const noexcept { return bits(byte) == eight_[static_cast<std::size_t>(byte % 8)] + exponent_part(byte); }

    void look_up(simd::Words four, float* to, Index stride) const noexcept {
        for (Index i = 0; i < scales_a_word; ++i)
            for (int lane = 0; lane < simd::lanes; ++lane) to[i * stride + lane] = of_[four[lane] >> (8 * i) & 0xFFu];
    }

    std::array<float, 256> of_;
    alignas(cache_line) std::array<std::uint32_t, simd::lanes < 8 ? 8 : simd::lanes> eight_;
    std::uint8_t first_, count_;
};

}  // namespace mrgptq
