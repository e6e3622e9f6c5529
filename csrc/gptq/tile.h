// The rows that one thread works off together, one a SIMD lane, and what the solver and the refinement both know of them.
//
// Everything by column is kept by position of the factor's order (position 0 is visited last), and a column of the tile is contiguous. Short tiles are padded with zero rows, so that every
// row sees the same arithmetic whatever tile it falls into.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <vector>

#include "base/matrix_view.h"
#include "base/parallel.h"
#include "codecs/scale_rule.h"
#include "formats/block_format.h"
#include "gptq/eigen.h"
#include "linalg/lanes.h"

namespace mrgptq {

constexpr Index block = product_depth;  // columns between two products; every group size divides it

template <class T>
using Tile = Eigen::Matrix<T, lanes, Eigen::Dynamic, Eigen::ColMajor>;

// The same for the columns of one group.
template <class T, class Format>
using GroupTile = Eigen::Matrix<T, lanes, Format::group_size, Eigen::ColMajor>;

template <class T>
using Lane = Eigen::Array<T, lanes, 1>;

// Tiles that one thread takes through the columns side by side, a band: what is packed for one serves all. As few bands as their size allows, but the same number for each thread; and where
// there are rows enough for bands that are worth their packing, so many that no more than a third of the matrix is in hand, in float64 a sixth. A tile's bytes do not depend on its company.
template <class Real>
Index band_size(Index tiles, int threads) noexcept {
    constexpr Index words = sizeof(Real) / sizeof(float), most_tiles = 32 / words, enough_tiles = 8 / words;
    const Index team = threads > 0 ? threads : default_threads();
    const Index bands = std::max((tiles + most_tiles * team - 1) / (most_tiles * team), std::clamp<Index>(tiles / (enough_tiles * team), 1, 3 * words));  // of each thread
    return std::max<Index>((tiles + bands * team - 1) / (bands * team), 1);
}

template <class Real>
struct RowTile {
    Index first_row = 0, rows = 0;
    Tile<Real> error;             // the weight until a column is visited, w - q afterwards
    Tile<std::int8_t> halves;     // twice the E2M1 value of each code, -12 ... 12
    Tile<std::uint8_t> scales;    // by group of columns, left to right
    Tile<float> steps;            // likewise
};

// Numbers whose vectors each lie in one cache line.
template <class T>
using Aligned = std::vector<T, Eigen::aligned_allocator<T>>;

// A square or oblong of some matrix in strips, as a factor of products, with its elements at hand.
template <class Real, Index across = kernel_cols>
struct Strips {
    Aligned<Real> data = Aligned<Real>(static_cast<std::size_t>(block * block));
    Index depth = 0;

    // Element (k, j) is from[k * row_step + j * col_step].
    template <class From>
    void pack(From from, Index row_step, Index col_step, Index rows, Index cols) noexcept {
        depth = rows;
        pack_strips<across>(from, row_step, col_step, rows, cols, data.data());
    }
    Real at(Index k, Index j) const noexcept { return data[static_cast<std::size_t>(j / across * across * depth + k * across + j % across)]; }

    // c += a times the rows [first, first + count) of columns [0, width): a (lanes, count), c (lanes, width), columns adjacent. `next` is the a of the call behind this one.
    void multiply(const Real* a, Index first, Index count, Index width, Real* c, const Real* next = nullptr) const noexcept requires(across == kernel_cols) {
        constexpr Index values = kernel_rows<Real> * kernel_cols;  // of the next a, for each register tile of a whole block
        if (next == nullptr) next = a;
        for (Index row = 0; row < lanes; row += kernel_rows<Real>)
            for (Index strip = 0; strip < strip_count(width); ++strip, next += values) {
                const SendAhead<values * Index{sizeof(Real)} / Index{cache_line}> ahead(next);
                Real* to = c + strip * kernel_cols * lanes + row;
                multiply_tile<Real, false>(count, a + row, lanes, data.data() + strip * depth * kernel_cols + first * kernel_cols, kernel_cols, [=](Index j) { return to + j * lanes; }, ahead);
            }
    }

    // c(t) += a(t) times all rows of columns [0, width), for tile after tile. Behind the last a they will go on with the columns that lie after the first one.
    template <class A, class C>
    void multiply_tiles(std::size_t count, Index width, A&& a, C&& c) const noexcept {
        for (std::size_t t = 0; t < count; ++t) multiply(a(t), 0, depth, width, c(t), t + 1 < count ? a(t + 1) : a(0) + depth * lanes);
    }
};

// The steps of all stored scales, which many lanes look up and need not divide for, and the first and the last of the scales that a search may choose.
struct StepTable {
    std::array<float, 256> steps;
    int lowest, highest;

    float operator[](std::uint8_t scale) const noexcept { return steps[scale]; }
    std::uint8_t moved(std::uint8_t scale, int offset) const noexcept { return static_cast<std::uint8_t>(std::clamp(scale + offset, lowest, highest)); }  // moved_scale()
};
template <class Format>
StepTable step_table(float tensor_scale) noexcept {
    StepTable table{{}, moved_scale<Format>(0, 0, tensor_scale), moved_scale<Format>(255, 0, tensor_scale)};
    for (std::size_t scale = 0; scale < table.steps.size(); ++scale) table.steps[scale] = group_step<Format>(static_cast<std::uint8_t>(scale), tensor_scale);
    return table;
}

// The float32 value that a reader will decode, widened.
template <class Real>
Real value_of(float step, Real e2m1_value) noexcept {
    return static_cast<Real>(step * static_cast<float>(e2m1_value));
}

// The E2M1 value nearest to t, signed.
template <class Real>
Real round_signed(Real t) noexcept {
    return std::copysign(e2m1::round_magnitude(std::fabs(t)), t);
}

}  // namespace mrgptq
