// Products of bytes, four to a lane, added up in whole numbers: exact, so that every level has the same sums, whatever its instructions add first.
//
// What multiplies bytes on x86-64 wants one factor without a sign. So a code of E2M1 is had *lifted*: twice its value, a whole number from -12 to 12, and 12 more. Sums of products with lifted codes
// begin at -12 times the other factors' sum, and so end as the sums of products with twice the values.
#pragma once

#include "simd/vector.h"

namespace mrgptq::simd {

inline constexpr int lift = 12;

typedef std::uint8_t Bytes __attribute__((vector_size(lanes * 4)));

// Of four codes a lane, bytes from 0 to 15.
MRGPTQ_INLINE Words lifted(Words codes) noexcept {
#if defined(__SSSE3__)
    const __m128i table = _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0);
#if defined(MRGPTQ_AVX512)
    return (Words)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), (__m512i)codes);
#elif defined(MRGPTQ_AVX2)
    return (Words)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), (__m256i)codes);
#else
    return (Words)_mm_shuffle_epi8(table, (__m128i)codes);
#endif
#else
    const Bytes code = (Bytes)codes, low = code & 7;
    const Bytes doubled = low - (Bytes)(low > 4) - (Bytes)(low > 5) - 3 * (Bytes)(low > 6);  // what holds is -1
    return (Words)(code > 7 ? lift - doubled : lift + doubled);
#endif
}

// Twice the values of four codes a lane, bytes with a sign.
MRGPTQ_INLINE Words doubled(Words codes) noexcept { return (Words)((Bytes)lifted(codes) - lift); }

// Without an instruction for all four products a lane has two sums of 16 bits, of its first two and its last two bytes. Bytes from -127 to 127 make pairs of at most 2 * 24 * 127 = 6096, and sums of
// 32 columns' products, sixteen to a half, end within 16 * 12 * 127 = 24384: what overflows on the way comes back.
#if defined(__SSSE3__) && !(defined(MRGPTQ_AVX512) && defined(__AVX512VNNI__))
inline constexpr bool sums_in_halves = true;
#else
inline constexpr bool sums_in_halves = false;
#endif

// What a lane's sums begin at, given what the other factors that meet its first two and its last two bytes add up to.
constexpr std::uint32_t beginning_of_sums(int first, int last) noexcept {
    if constexpr (sums_in_halves) return static_cast<std::uint16_t>(-lift * first) | static_cast<std::uint32_t>(static_cast<std::uint16_t>(-lift * last)) << 16;
    return static_cast<std::uint32_t>(-lift * (first + last));
}

// Adds each lane's four products; the other factors are bytes from -127 to 127.
MRGPTQ_INLINE Words add_products(Words sums, Words lifted_codes, Words others) noexcept {
#if defined(MRGPTQ_AVX512) && defined(__AVX512VNNI__)
    return (Words)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)lifted_codes, (__m512i)others);
#elif defined(MRGPTQ_AVX512)
    return (Words)_mm512_add_epi16((__m512i)sums, _mm512_maddubs_epi16((__m512i)lifted_codes, (__m512i)others));
#elif defined(MRGPTQ_AVX2)
    return (Words)_mm256_add_epi16((__m256i)sums, _mm256_maddubs_epi16((__m256i)lifted_codes, (__m256i)others));
#elif defined(__SSSE3__)
    return (Words)_mm_add_epi16((__m128i)sums, _mm_maddubs_epi16((__m128i)lifted_codes, (__m128i)others));
#else
    for (std::uint32_t byte = 0; byte < 32; byte += 8) sums += (lifted_codes >> byte & 0xFFu) * (Words)((Mask)(others << (24 - byte)) >> 24);
    return sums;
#endif
}

// The lanes' sums as numbers.
MRGPTQ_INLINE Floats finished_sums(Words sums) noexcept {
#if defined(__SSSE3__) && defined(MRGPTQ_AVX512) && !defined(__AVX512VNNI__)
    sums = (Words)_mm512_madd_epi16((__m512i)sums, _mm512_set1_epi16(1));
#elif defined(MRGPTQ_AVX2)
    sums = (Words)_mm256_madd_epi16((__m256i)sums, _mm256_set1_epi16(1));
#elif defined(__SSSE3__) && !defined(MRGPTQ_AVX512)
    sums = (Words)_mm_madd_epi16((__m128i)sums, _mm_set1_epi16(1));
#endif
    return __builtin_convertvector((Mask)sums, Floats);
}

}  // namespace mrgptq::simd
