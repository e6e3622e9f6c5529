// Sixteen 4-bit codes as lanes and as eight bytes, the even one in the low nibble.
#pragma once

#include "simd/vector.h"

namespace mrgptq::simd {

inline constexpr int vectors_of_16 = 16 / lanes;

// Sixteen lanes.
struct Codes {
    Words v[vectors_of_16];
};

// Eight bytes of sixteen codes, each 0 ... 15.
MRGPTQ_INLINE void pack_nibbles(const Codes& codes, std::uint8_t* packed) noexcept {
#if defined(MRGPTQ_AVX512)
    const __m512i pairs = (__m512i)codes.v[0];
    // A pair is a 64-bit lane whose low byte takes both codes.
    _mm_storel_epi64(reinterpret_cast<__m128i*>(packed), _mm512_cvtepi64_epi8(_mm512_or_si512(pairs, _mm512_srli_epi64(pairs, 28))));
#elif defined(__SSE4_1__)
#if defined(MRGPTQ_AVX2)
    // Packing works inside 128-bit halves: the permutation puts the quarters in order.
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)codes.v[0], (__m256i)codes.v[1]), 0b11'01'10'00);
    const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
#else
    const __m128i bytes = _mm_packus_epi16(_mm_packus_epi32((__m128i)codes.v[0], (__m128i)codes.v[1]), _mm_packus_epi32((__m128i)codes.v[2], (__m128i)codes.v[3]));
#endif
    const __m128i pairs = _mm_maddubs_epi16(bytes, _mm_set1_epi16(0x1001));  // even + 16 odd
    _mm_storel_epi64(reinterpret_cast<__m128i*>(packed), _mm_packus_epi16(pairs, pairs));
#else
    std::uint32_t lane[16];
    for (int i = 0; i < vectors_of_16; ++i) store(lane + i * lanes, codes.v[i]);
    for (int j = 0; j < 8; ++j) packed[j] = static_cast<std::uint8_t>(lane[2 * j] | lane[2 * j + 1] << 4);
#endif
}

// The same of n vectors of adjacent codes.
template <int n>
MRGPTQ_INLINE void pack_nibbles(const Words (&codes)[n], std::uint8_t* packed) noexcept {
#if defined(MRGPTQ_AVX512)
    if constexpr (n == 8) {
        // Packing works inside 128-bit quarters: each gets two bytes of every vector, and the permutation puts the vectors in order.
        __m512i pairs[2];
        for (int i = 0; i < 2; ++i) {
            const Words* four = codes + 4 * i;
            const __m512i bytes = _mm512_packus_epi16(_mm512_packus_epi32((__m512i)four[0], (__m512i)four[1]), _mm512_packus_epi32((__m512i)four[2], (__m512i)four[3]));
            pairs[i] = _mm512_maddubs_epi16(bytes, _mm512_set1_epi16(0x1001));  // even + 16 odd
        }
        const __m512i order = _mm512_set_epi16(31, 23, 15, 7, 30, 22, 14, 6, 29, 21, 13, 5, 28, 20, 12, 4, 27, 19, 11, 3, 26, 18, 10, 2, 25, 17, 9, 1, 24, 16, 8, 0);
        _mm512_storeu_si512(packed, _mm512_permutexvar_epi16(order, _mm512_packus_epi16(pairs[0], pairs[1])));
        return;
    }
#endif
    for (int i = 0; i < n; i += vectors_of_16) {
        Codes sixteen;
        for (int j = 0; j < vectors_of_16; ++j) sixteen.v[j] = codes[i + j];
        pack_nibbles(sixteen, packed + i * lanes / 2);
    }
}

// The sixteen codes of eight bytes; only the low four bits of a lane are the code.
MRGPTQ_INLINE Codes unpack_nibbles(const std::uint8_t* packed) noexcept {
#if defined(MRGPTQ_AVX512)
    const __m512i bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed)));
    return {{(Words)_mm512_or_si512(bytes, _mm512_slli_epi64(bytes, 28))}};
#elif defined(__SSE4_1__)
    const __m128i pairs = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed));
    const __m128i codes = _mm_unpacklo_epi8(pairs, _mm_srli_epi16(pairs, 4));
#if defined(MRGPTQ_AVX2)
    return {{(Words)_mm256_cvtepu8_epi32(codes), (Words)_mm256_cvtepu8_epi32(_mm_srli_si128(codes, 8))}};
#else
    return {{(Words)_mm_cvtepu8_epi32(codes), (Words)_mm_cvtepu8_epi32(_mm_srli_si128(codes, 4)), (Words)_mm_cvtepu8_epi32(_mm_srli_si128(codes, 8)),
             (Words)_mm_cvtepu8_epi32(_mm_srli_si128(codes, 12))}};
#endif
#else
    std::uint32_t lane[16];
    for (int j = 0; j < 8; ++j) {
        lane[2 * j] = packed[j];
        lane[2 * j + 1] = packed[j] >> 4;
    }
    Codes codes;
    for (int i = 0; i < vectors_of_16; ++i) codes.v[i] = load(lane + i * lanes);
    return codes;
#endif
}

}  // namespace mrgptq::simd
