// E2M1 a vector at a time. The definition is formats/e2m1.h; tests/cpp/simd_test.cc holds these to its bytes.
#pragma once

#include "simd/vector.h"

namespace mrgptq::simd {

// Rounds to the grid of E2M1; make one before a loop, so that its constants stay in registers.
//
// The grid's step at a magnitude t <= 6 is 2^(e-1) with e = floor(log2 t) held in 0 ... 2. Adding the anchor 2^(22 + e), whose unit in the last place that step is, rounds t to nearest even;
// the anchor may be any even number of units larger, and with 2 e more of them the sum's last bits are the code, because each power of two below t has two codes.
class E2m1Rounder {
public:
    // Codes 0 ... 15 of the values nearest to x, ties to even, saturated, one zero: e2m1::encode. A NaN gets some code.
    MRGPTQ_INLINE Words encode(Floats x) const noexcept {
        const Floats t = at_most_six(x);
        return with_sign(bits(t + code_anchor(t)), x);
    }

    // The same for n vectors side by side: what is done to one is a chain of operations that wait for each other.
    template <int n>
    MRGPTQ_INLINE void encode(const Floats (&x)[n], Words (&codes)[n]) const noexcept {
        Floats t[n];
        for (int i = 0; i < n; ++i) t[i] = at_most_six(x[i]);
        for (int i = 0; i < n; ++i) t[i] += code_anchor(t[i]);
        for (int i = 0; i < n; ++i) codes[i] = with_sign(bits(t[i]), x[i]);
    }

    // The value that a magnitude is rounded to: e2m1::round_magnitude.
    MRGPTQ_INLINE Floats round_magnitude(Floats magnitude) const noexcept {
        const Floats t = at_most_six(magnitude);
        const Floats anchor = floats(max(bits(t) & exponent_mask_, one_) + value_anchor_);
        return (t + anchor) - anchor;
    }

private:
    // The anchor and its 2 e units. Vectors of eight lanes and more look it up by the whole part of t.
    MRGPTQ_INLINE Floats code_anchor(Floats t) const noexcept {
#if defined(MRGPTQ_AVX512)
        return _mm512_permutexvar_ps(_mm512_cvttps_epi32(t), code_anchors_);
#elif defined(MRGPTQ_AVX2)
        return _mm256_permutevar8x32_ps(code_anchors_, _mm256_cvttps_epi32(t));
#else
        const Words exponent = max(bits(t) & exponent_mask_, one_);
        return floats(exponent + (exponent >> 22) + code_anchor_);
#endif
    }

    // The code whose low three bits are the last of `sum` and whose fourth is the sign of x; one zero.
    MRGPTQ_INLINE Words with_sign(Words sum, Floats x) const noexcept {
        const Words sign_and_more = bits(x) >> 28;  // four bits, the first is the sign
#if defined(MRGPTQ_AVX512)
        // Bits 0 to 2 from the sum, the others from the second; all zero where the code is.
        return (Words)_mm512_maskz_ternarylogic_epi32(_mm512_test_epi32_mask((__m512i)sum, (__m512i)seven_), (__m512i)sum, (__m512i)sign_and_more, (__m512i)seven_, 0xE4);
#else
        const Words code = sum & seven_;
        return select(code != 0, code | (sign_and_more & 8u), code);
#endif
    }

    template <int... whole>
    MRGPTQ_INLINE static Floats code_anchors(std::integer_sequence<int, whole...>) noexcept {
        return floats(Words{(whole < 2 ? 149u << 23 : whole < 4 ? (150u << 23) + 2 : (151u << 23) + 4)...});
    }

    MRGPTQ_INLINE Floats at_most_six(Floats x) const noexcept {
#if defined(MRGPTQ_AVX512)
        return _mm512_range_ps(x, six_, 0b1010);  // the smaller magnitude, without a sign
#else
        return floats(min(magnitude_bits(x), bits(six_)));
#endif
    }

    Floats six_ = held(splat(6.0f));
    Words exponent_mask_ = held(splat(0x7F800000u)), one_ = held(splat(127u << 23)), seven_ = held(splat(7u));
    Words value_anchor_ = held(splat(22u << 23));
#if defined(MRGPTQ_AVX512) || defined(MRGPTQ_AVX2)
    Floats code_anchors_ = held(code_anchors(Lanes{}));  // by the whole part of a magnitude
#else
    Words code_anchor_ = held(splat((22u << 23) - 2 * 127u));
#endif
};

// Values of codes, of which the low four bits count: e2m1::decode. Or `times` as much.
template <int times = 1>
MRGPTQ_INLINE Floats decode_e2m1(Words code) noexcept {
    constexpr float t = times;
#if defined(MRGPTQ_AVX512)
    return _mm512_permutexvar_ps((__m512i)code, _mm512_setr_ps(0.0f, 0.5f * t, t, 1.5f * t, 2 * t, 3 * t, 4 * t, 6 * t, -0.0f, -0.5f * t, -t, -1.5f * t, -2 * t, -3 * t, -4 * t, -6 * t));
#else
    const Words sign = code << 28 & 0x80000000u;
#if defined(MRGPTQ_AVX2)
    const Floats magnitude = _mm256_permutevar8x32_ps(_mm256_setr_ps(0.0f, 0.5f * t, t, 1.5f * t, 2 * t, 3 * t, 4 * t, 6 * t), (__m256i)code);
#else
    // Exponent and mantissa of a code from 2 on are a float32's, shifted and rebased from 1 to 127; 0 and 1 are halves: what a float32 of [1, 2) has above one.
    const Words low = code & 7u;
    const Floats magnitude = t * select(low < 2u, floats((low << 22) + (127u << 23)) - 1.0f, floats((low << 22) + (126u << 23)));
#endif
    return floats(bits(magnitude) | sign);
#endif
}

// Twice the values of the codes in bits 16 to 19. The upper half of a float32 is all that they need, so halves are looked up where they belong, which spares the shift.
MRGPTQ_INLINE Floats decode_upper_doubled(Words code) noexcept {
#if defined(MRGPTQ_AVX512)
    constexpr __mmask32 upper = 0xAAAAAAAAu;
    const __m512i halves = _mm512_broadcast_i64x4(
        _mm256_setr_epi16(0x0000, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40C0, 0x4100, 0x4140, -0x8000, -0x4080, -0x4000, -0x3FC0, -0x3F80, -0x3F40, -0x3F00, -0x3EC0));
    return (Floats)_mm512_maskz_permutexvar_epi16(upper, (__m512i)code, halves);
#else
    return decode_e2m1<2>(code >> 16);
#endif
}

}  // namespace mrgptq::simd
