// The unnormalised Hadamard transform of 2^n adjacent floats in registers: butterflies of width 1, 2, 4, ... as the scalar definition below adds, so both give the same bytes.
#pragma once

#include <cstddef>

#include "simd/vector.h"

namespace mrgptq::simd {

// The definition, and what serves blocks wider than the registers: widths from `half` on, of k adjacent values.
template <class Real>
inline void butterflies(Real* x, std::ptrdiff_t k, std::ptrdiff_t half = 1) noexcept {
    for (; half < k; half *= 2)
        for (std::ptrdiff_t start = 0; start < k; start += 2 * half)
            for (std::ptrdiff_t i = start; i < start + half; ++i) {
                const Real a = x[i], b = x[i + half];
                x[i] = a + b;
                x[i + half] = a - b;
            }
}

// As many vectors as leave a third of the registers for what goes on between them.
#if defined(MRGPTQ_AVX512)
inline constexpr int most_block_vectors = 16;
#else
inline constexpr int most_block_vectors = 8;
#endif

namespace detail {

// +1 where the lane is a butterfly's first half, -1 where it is the second.
template <int width, int... lane>
MRGPTQ_INLINE Floats butterfly_signs(std::integer_sequence<int, lane...>) noexcept {
    return Floats{((lane & width) ? -1.0f : 1.0f)...};
}

// Widths below `end` inside each of n vectors, whose lanes are blocks of `end` where that is less: each lane plus or minus its partner, the product with a sign being exact. Width by width:
// the vectors' additions wait for each other only within a vector.
template <int end, int width = 1, int n>
MRGPTQ_INLINE void inside(Floats (&v)[n]) noexcept {
    if constexpr (width < end) {
        const Floats signs = butterfly_signs<width>(Lanes{});
        for (int i = 0; i < n; ++i) v[i] = add_exact_product(v[i], signs, exchange<width>(v[i]));
        inside<end, 2 * width>(v);
    }
}

template <int vectors, int width = 1>
MRGPTQ_INLINE void across(Floats* v) noexcept {
    if constexpr (width < vectors) {
        for (int start = 0; start < vectors; start += 2 * width)
            for (int i = start; i < start + width; ++i) {
                const Floats a = v[i], b = v[i + width];
                v[i] = a + b;
                v[i + width] = a - b;
            }
        across<vectors, 2 * width>(v);
    }
}

}  // namespace detail

// Transforms every `block` adjacent lanes of n vectors.
template <int block, int n>
MRGPTQ_INLINE void transform(Floats (&v)[n]) noexcept {
    detail::inside<(block < lanes ? block : lanes)>(v);
    if constexpr (block > lanes)
        for (int start = 0; start < n; start += block / lanes) detail::across<block / lanes>(v + start);
}

}  // namespace mrgptq::simd
