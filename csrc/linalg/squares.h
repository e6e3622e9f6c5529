// Small squares, as many rows as a vector has lanes, that are turned in registers: a matrix and its transpose are then both read and written along their rows.
#pragma once

#include <array>
#include <utility>

#include "linalg/vector.h"

namespace mrgptq {

template <class Real>
using SquareOf = std::array<Vector<Real>, vector_size<Real>>;

constexpr Index side = vector_size<double>;
using Square = SquareOf<double>;

// rows by cols of the square are there; the others are zero when they are read, and not written.
inline Square load_square(const double* from, Index stride, Index rows = side, Index cols = side) noexcept {
    Square square{};
    if (rows == side && cols == side) {
#pragma GCC unroll 8
        for (Index i = 0; i < side; ++i) square[static_cast<std::size_t>(i)] = load(from + i * stride);
    } else {
        for (Index i = 0; i < rows; ++i)
            for (Index j = 0; j < cols; ++j) square[static_cast<std::size_t>(i)][j] = from[i * stride + j];
    }
    return square;
}

inline void store_square(const Square& square, double* to, Index stride, Index rows = side, Index cols = side) noexcept {
    if (rows == side && cols == side) {
#pragma GCC unroll 8
        for (Index i = 0; i < side; ++i) store(to + i * stride, square[static_cast<std::size_t>(i)]);
    } else {
        for (Index i = 0; i < rows; ++i)
            for (Index j = 0; j < cols; ++j) to[i * stride + j] = square[static_cast<std::size_t>(i)][j];
    }
}

// Of every two rows `distance` apart: the upper one's lanes at `distance` change places with the lower one's others.
template <int distance, class V, int... lane>
inline void exchange_rows(std::array<V, sizeof...(lane)>& square, std::integer_sequence<int, lane...> lanes_of_row) noexcept {
    constexpr int count = sizeof...(lane);
    if constexpr (distance < count) {
#pragma GCC unroll 16
        for (std::size_t i = 0; i < count; ++i)
            if (!(i & distance)) {
                const V upper = square[i], lower = square[i + distance];
                square[i] = __builtin_shufflevector(upper, lower, ((lane & distance) ? count + lane - distance : lane)...);
                square[i + distance] = __builtin_shufflevector(upper, lower, ((lane & distance) ? count + lane : lane + distance)...);
            }
        exchange_rows<2 * distance>(square, lanes_of_row);
    }
}

template <class V, std::size_t count>
inline std::array<V, count> turned(std::array<V, count> square) noexcept {
    exchange_rows<1>(square, std::make_integer_sequence<int, count>{});
    return square;
}

}  // namespace mrgptq
