#include "linalg/symmetric.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <tuple>
#include <vector>

#include "base/parallel.h"
#include "linalg/squares.h"

namespace mrgptq {
namespace {

typedef std::int64_t Bits __attribute__((vector_size(vector_bytes)));

// How a matrix is cut, its rows like its columns: into tiles that are worked off together with their mirror images, and tiles into squares. Squares begin where a vector, as wide as a cache line
// at most, is aligned: rows a power of two apart share so few sets of the caches that the rest of a line is gone before the next square asks for it.
class Grid {
public:
    explicit Grid(MatrixView<const double> h) noexcept : n_(h.rows), lead_(std::min(-static_cast<Index>(reinterpret_cast<std::uintptr_t>(h.data) / sizeof(double)) & (side - 1), h.rows)) {}

    Index tiles() const noexcept { return std::max<Index>((n_ - lead_ + tile - 1) / tile, 1); }

    // body(row, col, rows, cols) for the squares of a stripe of tiles on or above the diagonal, tile by tile.
    template <class Body>
    void visit_upper(Index stripe, Body&& body) const {
        for (Index across = stripe; across < tiles(); ++across)
            for (Index row = begin(stripe); row < begin(stripe + 1); row = next(row))
                for (Index col = std::max(begin(across), row); col < begin(across + 1); col = next(col)) body(row, col, next(row) - row, next(col) - col);
    }

    // Sends for the square a tile further right or further down than the one at (row, col): no processor foresees the steps between rows.
    void prefetch_right(MatrixView<const double> h, Index row, Index col) const noexcept { prefetch(h, row, col + tile); }
    void prefetch_below(MatrixView<const double> h, Index row, Index col) const noexcept { prefetch(h, row + tile, col); }

private:
    static constexpr Index tile = 32;

    Index begin(Index number) const noexcept { return number == 0 ? 0 : std::min(lead_ + number * tile, n_); }
    Index next(Index place) const noexcept { return std::min(place < lead_ ? lead_ : place + side, n_); }

    void prefetch(MatrixView<const double> h, Index row, Index col) const noexcept {
        if (row + side > n_ || col + side > n_) return;
        const double* from = h.row(row) + col;
#pragma GCC unroll 8
        for (Index i = 0; i < side; ++i) __builtin_prefetch(from + i * h.row_stride);
    }

    Index n_, lead_;
};

// Magnitudes of doubles order like their bits, those of what is not finite behind all others.
Bits magnitudes(Vector<double> v) noexcept { return (Bits)v & std::numeric_limits<std::int64_t>::max(); }

template <class V>
V larger(V a, V b) noexcept {
    return a > b ? a : b;
}

template <class V>
auto largest_lane(V v) noexcept {
    auto largest = v[0];
    for (Index lane = 1; lane < side; ++lane) largest = std::max(largest, v[lane]);
    return largest;
}

bool any_bit(Bits bits) noexcept {
    std::int64_t all = 0;
    for (Index lane = 0; lane < side; ++lane) all |= bits[lane];
    return all != 0;
}

constexpr std::int64_t largest_finite = std::bit_cast<std::int64_t>(std::numeric_limits<double>::max());

// What a stripe of tiles finds.
struct Found {
    Bits largest{};
    double apart = 0;
    Index row = 0, col = 0;
    Index nonfinite = std::numeric_limits<Index>::max();

    // A square on or above the diagonal whose elements are up to `gap` from their mirror images: looked through where it may hold the most, or as much further ahead.
    void note_gap(MatrixView<const double> h, Index first_row, Index first_col, Index rows, Index cols, double gap) noexcept {
        if (!(gap > 0 && gap >= apart)) return;
        for (Index r = first_row; r < first_row + rows; ++r)
            for (Index c = std::max(first_col, r); c < first_col + cols; ++c) {
                const double here = std::fabs(h.row(r)[c] - h.row(c)[r]);
                if (here > apart || (here == apart && std::tie(r, c) < std::tie(row, col))) std::tie(apart, row, col) = std::tie(here, r, c);
            }
    }

    void note_nonfinite(MatrixView<const double> h, Index first_row, Index first_col, Index rows, Index cols) noexcept {
        for (Index r = first_row; r < first_row + rows; ++r)
            for (Index c = first_col; c < first_col + cols; ++c)
                if (!std::isfinite(h.row(r)[c])) nonfinite = std::min(nonfinite, r * h.cols + c);
    }
};

}  // namespace

Symmetry make_symmetric(MatrixView<const double> h, MatrixView<double> out, int threads) {
    const bool beside = out.data != nullptr && out.data != h.data, write = out.data != nullptr;
    const Grid grid(h);
    std::vector<Found> found(static_cast<std::size_t>(grid.tiles()));
    parallel_for(grid.tiles(), threads, [&](Index stripe) {
        Found mine;
        grid.visit_upper(stripe, [&](Index row, Index col, Index rows, Index cols) {
            grid.prefetch_right(h, row, col);
            grid.prefetch_below(h, col, row);
            if (beside) {
                grid.prefetch_right(out, row, col);
                grid.prefetch_below(out, col, row);
            }
            const Square upper = load_square(h.row(row) + col, h.row_stride, rows, cols), lower = load_square(h.row(col) + row, h.row_stride, cols, rows), mirrored = turned(lower);
            Bits different{}, largest{};
#pragma GCC unroll 8
            for (std::size_t i = 0; i < side; ++i) {
                different |= (Bits)upper[i] ^ (Bits)mirrored[i];
                largest = larger(largest, larger(magnitudes(upper[i]), magnitudes(mirrored[i])));
            }
            mine.largest = larger(mine.largest, largest);
            if (!any_bit(different | (largest > largest_finite))) {
                if (!beside) return;
                store_square(upper, out.row(row) + col, out.row_stride, rows, cols);
                store_square(lower, out.row(col) + row, out.row_stride, cols, rows);
            } else if (largest_lane(largest) > largest_finite) {
                mine.note_nonfinite(h, row, col, rows, cols);
                mine.note_nonfinite(h, col, row, cols, rows);
            } else {
                Vector<double> gaps{};
                Square mean;
                for (std::size_t i = 0; i < side; ++i) {
                    gaps = larger(gaps, (Vector<double>)magnitudes(upper[i] - mirrored[i]));
                    mean[i] = 0.5 * (upper[i] + mirrored[i]);
                }
                mine.note_gap(h, row, col, rows, cols, largest_lane(gaps));
                if (!write) return;
                store_square(mean, out.row(row) + col, out.row_stride, rows, cols);
                store_square(turned(mean), out.row(col) + row, out.row_stride, cols, rows);
            }
        });
        found[static_cast<std::size_t>(stripe)] = mine;
    });
    Found all;
    for (const Found& mine : found) {
        all.largest = larger(all.largest, mine.largest);
        all.nonfinite = std::min(all.nonfinite, mine.nonfinite);
        if (mine.apart > all.apart) std::tie(all.apart, all.row, all.col) = std::tie(mine.apart, mine.row, mine.col);
    }
    if (largest_lane(all.largest) > largest_finite) return {.nonfinite = all.nonfinite};
    return {.largest = std::bit_cast<double>(largest_lane(all.largest)), .apart = all.apart, .row = all.row, .col = all.col};
}

void mirror_lower(MatrixView<const double> h, double divisor, MatrixView<double> out, int threads) {
    const Grid grid(h);
    parallel_for(grid.tiles(), threads, [&](Index stripe) {
        grid.visit_upper(stripe, [&](Index row, Index col, Index rows, Index cols) {
            grid.prefetch_below(h, col, row);
            grid.prefetch_right(out, row, col);
            grid.prefetch_below(out, col, row);
            Square lower = load_square(h.row(col) + row, h.row_stride, cols, rows);
            for (auto& values : lower) values /= divisor;
            Square upper = turned(lower);
            if (row == col)  // both triangles lie in one square
                for (Index i = 0; i < side; ++i)
                    for (Index j = 0; j < i; ++j) upper[static_cast<std::size_t>(i)][j] = lower[static_cast<std::size_t>(i)][j];
            else
                store_square(lower, out.row(col) + row, out.row_stride, cols, rows);
            store_square(upper, out.row(row) + col, out.row_stride, rows, cols);
        });
    });
}

}  // namespace mrgptq
