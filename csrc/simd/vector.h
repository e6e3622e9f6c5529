// The vector type of the level this file is compiled for: 16 floats on x86-64-v4, 8 on v3, 4 on v2 and elsewhere.
//
// Compiler vectors (GCC, Clang) with names for what they lack. Every function maps lanes to lanes by operations that IEEE 754 or integer arithmetic fixes, so a kernel written with them
// gives the same bytes at every width as long as it adds nothing across lanes. Each extension module and each test is compiled for one level: nothing here asks the processor.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__SSE4_1__)
#include <immintrin.h>
#endif

#define MRGPTQ_INLINE [[gnu::always_inline]] inline

namespace mrgptq::simd {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define MRGPTQ_AVX512 1
inline constexpr int lanes = 16;
#elif defined(__AVX2__) && defined(__FMA__)
#define MRGPTQ_AVX2 1
inline constexpr int lanes = 8;
#else
inline constexpr int lanes = 4;
#endif

typedef float Floats __attribute__((vector_size(lanes * 4)));
typedef std::uint32_t Words __attribute__((vector_size(lanes * 4)));
typedef std::int32_t Mask __attribute__((vector_size(lanes * 4)));  // what comparisons give: -1 or 0 in a lane

MRGPTQ_INLINE Floats load(const float* from) noexcept {
    Floats v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

MRGPTQ_INLINE Words load(const std::uint32_t* from) noexcept {
    Words v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

MRGPTQ_INLINE void store(float* to, Floats v) noexcept { std::memcpy(to, &v, sizeof v); }
MRGPTQ_INLINE void store(std::uint32_t* to, Words v) noexcept { std::memcpy(to, &v, sizeof v); }

// x - 0 is x for every x, -0 included; x + 0 would not be.
MRGPTQ_INLINE Floats splat(float x) noexcept { return x - Floats{}; }
MRGPTQ_INLINE Words splat(std::uint32_t x) noexcept { return x - Words{}; }

// A constant the compiler cannot see through: it stays in a register over a loop. GCC otherwise makes constants anew in every round, which costs a quarter of the encoder's time.
template <class V>
MRGPTQ_INLINE V held(V v) noexcept {
#if defined(__x86_64__)
    asm("" : "+v"(v));
#elif defined(__aarch64__)
    asm("" : "+w"(v));
#endif
    return v;
}

// Lanes to be splatted one by one: a broadcast from memory is free, but GCC, where it sees the store, takes lanes out of the register by two shuffles each.
struct LanesInMemory {
    alignas(64) float lane[lanes];

    MRGPTQ_INLINE explicit LanesInMemory(Floats v) noexcept {
        store(lane, v);
        asm("" : "+m"(lane));
    }
    MRGPTQ_INLINE Floats splatted(int i) const noexcept { return splat(lane[i]); }
};

MRGPTQ_INLINE Words bits(Floats v) noexcept { return (Words)v; }
MRGPTQ_INLINE Floats floats(Words v) noexcept { return (Floats)v; }

MRGPTQ_INLINE Words magnitude_bits(Floats v) noexcept { return bits(v) & 0x7FFFFFFFu; }
MRGPTQ_INLINE Floats abs(Floats v) noexcept { return floats(magnitude_bits(v)); }

// Magnitudes of floats order like their bits, NaN above infinity: integer maxima lose no NaN, and need no licence to reorder.
MRGPTQ_INLINE Words max(Words a, Words b) noexcept { return a > b ? a : b; }
MRGPTQ_INLINE Words min(Words a, Words b) noexcept { return a < b ? a : b; }

MRGPTQ_INLINE Words select(Mask mask, Words yes, Words no) noexcept { return mask ? yes : no; }
MRGPTQ_INLINE Floats select(Mask mask, Floats yes, Floats no) noexcept { return mask ? yes : no; }

#if defined(MRGPTQ_AVX512) || defined(MRGPTQ_AVX2)
inline constexpr bool has_fused = true;
#else
inline constexpr bool has_fused = false;
#endif

// a * b + c rounded once; only where has_fused.
MRGPTQ_INLINE Floats fused([[maybe_unused]] Floats a, [[maybe_unused]] Floats b, Floats c) noexcept {
#if defined(MRGPTQ_AVX512)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(MRGPTQ_AVX2)
    return _mm256_fmadd_ps(a, b, c);
#else
    return c;
#endif
}

// a * b + c for products that are exact (a power of two or a small whole number times c's like): then the fused form, where there is one, and the two roundings agree.
MRGPTQ_INLINE Floats add_exact_product(Floats a, Floats b, Floats c) noexcept {
    if constexpr (has_fused) return fused(a, b, c);
    return a * b + c;
}

namespace detail {

template <int distance, class V, int... lane>
MRGPTQ_INLINE V exchanged(V v, std::integer_sequence<int, lane...>) noexcept {
    return __builtin_shufflevector(v, v, (lane ^ distance)...);
}

template <int distance, class V, int... lane>
MRGPTQ_INLINE V own_halves(V a, V b, std::integer_sequence<int, lane...>) noexcept {
    return __builtin_shufflevector(a, b, ((lane & distance) ? lanes + lane : lane)...);
}

template <int distance, class V, int... lane>
MRGPTQ_INLINE V other_halves(V a, V b, std::integer_sequence<int, lane...>) noexcept {
    return __builtin_shufflevector(a, b, ((lane & distance) ? lanes + (lane ^ distance) : (lane ^ distance))...);
}

}  // namespace detail

using Lanes = std::make_integer_sequence<int, lanes>;

// Lane i of the result is lane i ^ distance of `v`.
template <int distance, class V>
MRGPTQ_INLINE V exchange(V v) noexcept {
    return detail::exchanged<distance>(v, Lanes{});
}

// Folds `lanes` vectors to one whose lane i is all of vector i's lanes combined: log2(lanes) levels of pairs, 3 operations for each vector but the first. vector(i) gives vector i,
// op(a, b) combines. For a sum, the order is fixed but depends on the width.
template <int distance = lanes / 2, class Vector, class Op>
MRGPTQ_INLINE auto fold(Vector&& vector, Op&& op, int first = 0) noexcept {
    if constexpr (distance == 0) {
        return vector(first);
    } else {
        const auto a = fold<distance / 2>(vector, op, first), b = fold<distance / 2>(vector, op, first + distance);
        return op(detail::own_halves<distance>(a, b, Lanes{}), detail::other_halves<distance>(a, b, Lanes{}));
    }
}

// One byte a lane, and back.
MRGPTQ_INLINE void store_bytes(std::uint8_t* to, Words v) noexcept {
#if defined(MRGPTQ_AVX512)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8((__m512i)v));
#else
    for (int i = 0; i < lanes; ++i) to[i] = static_cast<std::uint8_t>(v[i]);
#endif
}

MRGPTQ_INLINE Words load_bytes(const std::uint8_t* from) noexcept {
#if defined(MRGPTQ_AVX512)
    return (Words)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
    Words v;
    for (int i = 0; i < lanes; ++i) v[i] = from[i];
    return v;
#endif
}

// Of eight words, which a vector of sixteen lanes holds twice, the ones that each lane's low three bits say; only where there are as many lanes.
MRGPTQ_INLINE Words one_of_eight([[maybe_unused]] Words which, Words eight) noexcept {
#if defined(MRGPTQ_AVX512)
    return (Words)_mm512_permutexvar_epi32((__m512i)which, (__m512i)eight);
#elif defined(MRGPTQ_AVX2)
    return (Words)_mm256_permutevar8x32_epi32((__m256i)eight, (__m256i)which);
#else
    return eight;
#endif
}

MRGPTQ_INLINE std::uint32_t largest_lane(Words v) noexcept {
    v = max(v, exchange<1>(v));
    v = max(v, exchange<2>(v));
    if constexpr (lanes > 4) v = max(v, exchange<4>(v));
    if constexpr (lanes > 8) v = max(v, exchange<8>(v));
    return v[0];
}

// Is a word of any lane at least `bound`?
MRGPTQ_INLINE bool any_at_least(Words v, std::uint32_t bound) noexcept {
#if defined(MRGPTQ_AVX512)
    return _mm512_cmpge_epu32_mask((__m512i)v, _mm512_set1_epi32(static_cast<int>(bound))) != 0;
#else
    return largest_lane(v) >= bound;
#endif
}

MRGPTQ_INLINE std::uint32_t smallest_lane(Words v) noexcept { return ~largest_lane(~v); }

}  // namespace mrgptq::simd
