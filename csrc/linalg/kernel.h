// The product that everything else is made of: a register tile of C, two vectors of rows by a few columns, summed over the depth.
//
// An element of C is one chain of fused multiply-adds over k, begun at zero and added to C at its end. Lanes lie along the rows and never along k, so the bytes depend on where the chains are
// cut, which the callers fix, and on nothing else: not on the tile an element falls into, the number of threads or the vector's width.
#pragma once

#include <array>

#include "linalg/vector.h"

namespace mrgptq {

template <class Real>
inline constexpr Index kernel_rows = 2 * vector_size<Real>;
inline constexpr Index kernel_cols = vector_bytes == 64 ? 8 : 4;  // as many pairs of accumulators as leave registers for the rest

// Σ_k a[k * a_stride + r] * b[k * b_stride + j]  for r < kernel_rows, j < cols, handed over column by column: after(j, the first half of its rows, the second). Fewer columns than
// kernel_cols are for where there are no more. before(k) comes before each step: the place to send for what is needed later.
template <class Real, Index cols = kernel_cols, class Before, class After>
[[gnu::always_inline]] inline void sum_tile(Index depth, const Real* a, Index a_stride, const Real* b, Index b_stride, Before&& before, After&& after) noexcept {
    std::array<Vector<Real>, cols> low{}, high{};
    for (Index k = 0; k < depth; ++k, a += a_stride, b += b_stride) {
        before(k);
        const Vector<Real> a0 = load(a), a1 = load(a + vector_size<Real>);
#pragma GCC unroll 8
        for (std::size_t j = 0; j < cols; ++j) {
            const Vector<Real> bj = splat(b[j]);
            low[j] = fused(a0, bj, low[j]);
            high[j] = fused(a1, bj, high[j]);
        }
    }
#pragma GCC unroll 8
    for (std::size_t j = 0; j < cols; ++j) after(static_cast<Index>(j), low[j], high[j]);
}

// column_at(j)[r] += or -= Σ_k a[k * a_stride + r] * b[k * b_stride + j]: columns of C that may stand anywhere.
template <class Real, bool subtract, Index cols = kernel_cols, class Column, class Before>
inline void multiply_tile(Index depth, const Real* a, Index a_stride, const Real* b, Index b_stride, const Column& column_at, Before&& before) noexcept {
    constexpr Index w = vector_size<Real>;
    for (Index j = 0; j < cols; ++j) {  // needed at the end: on its way meanwhile
        __builtin_prefetch(column_at(j), 1);
        __builtin_prefetch(column_at(j) + kernel_rows<Real> - 1, 1);
    }
    sum_tile<Real, cols>(depth, a, a_stride, b, b_stride, before, [&](Index j, Vector<Real> low, Vector<Real> high) {
        Real* column = column_at(j);
        store<Real>(column, subtract ? load(column) - low : load(column) + low);
        store<Real>(column + w, subtract ? load(column + w) - high : load(column + w) + high);
    });
}

// The same where nothing is sent for.
template <class Real, bool subtract, class Column>
inline void multiply_tile(Index depth, const Real* a, Index a_stride, const Real* b, Index b_stride, const Column& column_at) noexcept {
    multiply_tile<Real, subtract>(depth, a, a_stride, b, b_stride, column_at, [](Index) {});
}

// The same where c_stride lies between columns.
template <class Real, bool subtract>
inline void multiply_tile(Index depth, const Real* a, Index a_stride, const Real* b, Index b_stride, Real* c, Index c_stride) noexcept {
    multiply_tile<Real, subtract>(depth, a, a_stride, b, b_stride, [=](Index j) { return c + j * c_stride; });
}

}  // namespace mrgptq
