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

// Widths below `end` inside a vector, whose lanes are blocks of `end` where that is less: each lane plus or minus its partner, the product with a sign being exact.
template <int end, int width = 1>
MRGPTQ_INLINE Floats inside(Floats v) noexcept {
    if constexpr (width < end)
        return inside<end, 2 * width>(add_exact_product(v, butterfly_signs<width>(Lanes{}), exchange<width>(v)));
    else
        return v;
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

// Transforms `vectors` adjacent vectors as one block, or, with vectors 1, every `block` adjacent lanes as one.
template <int vectors, int block = lanes * vectors>
MRGPTQ_INLINE void transform(Floats (&v)[vectors]) noexcept {
    for (int i = 0; i < vectors; ++i) v[i] = detail::inside<(block < lanes ? block : lanes)>(v[i]);
    detail::across<vectors>(v);
}

}  // namespace mrgptq::simd
