// Matrices as the kernel reads them. The left factor and the product lie in *lanes*: 32 rows together, column after column, so that a column's 32 values are adjacent (the last rows of a
// matrix are filled up with zeros). The right factor lies in *strips*: kernel_cols columns together, row after row. Strips of kernel_rows columns are a left factor, transposed.
#pragma once

#include <algorithm>
#include <cstdint>

#include "base/buffer.h"
#include "linalg/kernel.h"

namespace mrgptq {

constexpr Index lanes = 32;
static_assert(lanes % kernel_rows<float> == 0 && lanes % kernel_rows<double> == 0);

// Rows of the right factor that one chain sums: with as many columns of 32 lanes it fills half of the first cache.
constexpr Index product_depth = 128;

// Sends for adjacent cache lines from far away while a chain is summed, one every few of its steps: before(k) of sum_tile. They may lie where nothing is: it is a wish, not a read.
template <Index lines>
struct SendAhead {
    static_assert(product_depth % lines == 0);
    static constexpr Index steps = product_depth / lines;  // between two of them

    std::uintptr_t from;

    explicit SendAhead(const void* from) noexcept : from(reinterpret_cast<std::uintptr_t>(from)) {}

    void operator()(Index k) const noexcept {
        if (k % steps == 0) __builtin_prefetch(reinterpret_cast<const void*>(from + static_cast<std::uintptr_t>(k / steps) * cache_line), 0, 2);
    }
};

constexpr Index strip_count(Index cols) noexcept { return (cols + kernel_cols - 1) / kernel_cols; }

// A pointer whose values are read times a factor.
struct Scaled {
    const double* data;
    double factor;
    double operator[](Index i) const noexcept { return data[i] * factor; }
    Scaled operator+(Index i) const noexcept { return {data + i, factor}; }
};

// Strips, of `across` columns, of a (depth, width) matrix whose element (k, j) is from[k * row_step + j * col_step], `from` a pointer or like one; columns up to the next whole strip become
// zero. One of the steps is 1 where it matters.
template <Index across = kernel_cols, class Real, class From>
void pack_strips(From from, Index row_step, Index col_step, Index depth, Index width, Real* strips) noexcept {
    static_assert(across % kernel_cols == 0);
    // Wide strips are filled row after row, all of them together: memory foresees how a row goes on. As many narrow ones would throw each other out of the first cache.
    const Index whole = col_step == 1 && across > kernel_cols ? width / across * across : 0;
    for (Index k = 0; k < depth && whole > 0; ++k)
        for (Index first = 0; first < whole; first += across)
            for (Index j = 0; j < across; ++j) strips[first * depth + k * across + j] = static_cast<Real>(from[k * row_step + first + j]);
    strips += whole * depth;
    for (Index first = whole; first < width; first += across, strips += depth * across) {
        const Index here = std::min(across, width - first);
        if (here < across) std::fill_n(strips, depth * across, Real(0));
        if (row_step == 1 && here % kernel_cols == 0 && depth % kernel_cols == 0) {
            for (Index square_first = 0; square_first < here; square_first += kernel_cols)
                for (Index k = 0; k < depth; k += kernel_cols) {  // squares, turned in registers
                    std::array<std::array<Real, kernel_cols>, kernel_cols> square, turned;
                    for (std::size_t j = 0; j < kernel_cols; ++j)
                        for (std::size_t i = 0; i < kernel_cols; ++i) square[j][i] = static_cast<Real>(from[k + static_cast<Index>(i) + (first + square_first + static_cast<Index>(j)) * col_step]);
                    for (std::size_t i = 0; i < kernel_cols; ++i)
                        for (std::size_t j = 0; j < kernel_cols; ++j) turned[i][j] = square[j][i];
                    for (std::size_t i = 0; i < kernel_cols; ++i) std::copy_n(turned[i].data(), kernel_cols, strips + (k + static_cast<Index>(i)) * across + square_first);
                }
        } else if (col_step == 1 && here == across) {
            for (Index k = 0; k < depth; ++k)
                for (Index j = 0; j < across; ++j) strips[k * across + j] = static_cast<Real>(from[k * row_step + first + j]);
        } else {
            for (Index k = 0; k < depth; ++k)
                for (Index j = 0; j < here; ++j) strips[k * across + j] = static_cast<Real>(from[k * row_step + (first + j) * col_step]);
        }
    }
}

}  // namespace mrgptq
