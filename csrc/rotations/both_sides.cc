// Rotations of both sides of a square matrix, in double.
#include <algorithm>
#include <string>
#include <vector>

#include "base/check.h"
#include "base/parallel.h"
#include "linalg/squares.h"
#include "linalg/symmetric.h"
#include "rotations/hadamard.h"
#include "simd/butterflies.h"

namespace mrgptq {
namespace {

constexpr Index row_grain = 8;
constexpr Index smallest_tile = 32, largest_tile = 128;  // rows and columns of a Hessian that are rotated in one go: four of the smallest tiles fit the first cache, four of the largest the second
constexpr Index strip = 64;  // columns a piece of the second pass takes: 512 bytes of each row

void check_both_sides(MatrixView<const double> h, Index block_size) {
    check(h.rows == h.cols, "hessian has shape (" + std::to_string(h.rows) + ", " + std::to_string(h.cols) + "); it must be square");
    check_rotation(block_size, h.cols);
}

// Columns by blocks of `block_size` of their rows.
void butterflies_down(MatrixView<double> x, Index block_size) noexcept {
    for (Index block = 0; block < x.rows; block += block_size)
        for (Index half = 1; half < block_size; half *= 2)
            for (Index start = block; start < block + block_size; start += 2 * half)
                for (Index i = start; i < start + half; ++i) {
                    double *upper = x.row(i), *lower = x.row(i + half);
                    for (Index c = 0; c < x.cols; ++c) {
                        const double a = upper[c], b = lower[c];
                        upper[c] = a + b;
                        lower[c] = a - b;
                    }
                }
}

// A tile of a symmetric matrix, rotated together with its mirror image: what rotate_both makes of that is this tile, its columns rotated before its rows. Columns are added vector by vector; for
// its rows the tile is turned.
class TurnedTile {
public:
    TurnedTile(Index tile, Index block_size) : tile_(tile), block_size_(block_size), values_(static_cast<std::size_t>(4 * tile * tile)) {}

    // The tile at (row, col) of h, on or above the diagonal, and the one at (col, row): both become the mean of the two.
    void rotate(MatrixView<double> h, Index row, Index col) noexcept {
        const Index rows = std::min(tile_, h.rows - row), cols = std::min(tile_, h.cols - col);
        const auto columns_first = buffer(0), rows_first = buffer(1), rows_last = buffer(2), columns_last = buffer(3);
        for (Index r = 0; r < rows; ++r) {
            std::copy_n(h.row(row + r) + col, cols, columns_first.row(r));
            prefetch_next(h, row, col, r);
        }
        turn(columns_first, rows_first);
        butterflies_down(columns_first, block_size_);
        butterflies_down(rows_first, block_size_);
        turn(columns_first, rows_last);
        turn(rows_first, columns_last);
        butterflies_down(rows_last, block_size_);
        butterflies_down(columns_last, block_size_);
        const double factor = 1.0 / static_cast<double>(block_size_);
        for (Index r = 0; r < rows; r += side)
            for (Index c = 0; c < cols; c += side) {
                const Index here = std::min(side, rows - r), there = std::min(side, cols - c);
                Square mean = load_square(columns_last.row(r) + c, tile_);
                const Square mirrored = turned(load_square(rows_last.row(c) + r, tile_));
                for (std::size_t i = 0; i < side; ++i) mean[i] = 0.5 * (mean[i] * factor + mirrored[i] * factor);
                store_square(mean, h.row(row + r) + col + c, h.row_stride, here, there);
                store_square(turned(mean), h.row(col + c) + row + r, h.row_stride, there, here);
            }
    }

private:
    MatrixView<double> buffer(Index number) noexcept { return {values_.data() + number * tile_ * tile_, tile_, tile_, tile_}; }

    static void turn(MatrixView<double> from, MatrixView<double> to) noexcept {
        for (Index r = 0; r < from.rows; r += side)
            for (Index c = 0; c < from.cols; c += side) store_square(turned(load_square(from.row(r) + c, from.row_stride)), to.row(c) + r, to.row_stride);
    }

    // Sends for row r of the next tile and for its mirror image's.
    void prefetch_next(MatrixView<double> h, Index row, Index col, Index r) const noexcept {
        constexpr Index line = 64 / sizeof(double);
        if (col + 2 * tile_ > h.cols) return;
        for (Index c = 0; c < tile_; c += line) {
            __builtin_prefetch(h.row(row + r) + col + tile_ + c, 1);
            __builtin_prefetch(h.row(col + tile_ + r) + row + c, 1);
        }
    }

    Index tile_, block_size_;
    std::vector<double> values_;  // four tiles, row by row
};

}  // namespace

void rotate_both(MatrixView<double> h, Index block_size, int threads) {
    check_both_sides(h, block_size);
    parallel_for_ranges(h.rows, row_grain, threads, [&](Index begin, Index end) {
        for (Index r = begin; r < end; ++r)
            for (Index c = 0; c < h.cols; c += block_size) simd::butterflies(h.row(r) + c, block_size);
    });
    const double factor = 1.0 / static_cast<double>(block_size);
    parallel_for_ranges(h.cols, strip, threads, [&](Index begin, Index end) {
        butterflies_down({h.data + begin, h.rows, end - begin, h.row_stride}, block_size);
        for (Index r = 0; r < h.rows; ++r)
            for (Index c = begin; c < end; ++c) h.row(r)[c] *= factor;
    });
}

void rotate_hessian(MatrixView<double> h, Index block_size, int threads) {
    check_both_sides(h, block_size);
    if (block_size > largest_tile) {
        rotate_both(h, block_size, threads);
        make_symmetric(h, h, threads);
        return;
    }
    const Index tile = std::max(block_size, smallest_tile), tiles = (h.cols + tile - 1) / tile;
    parallel_for(tiles, threads, [&](Index stripe) {
        TurnedTile turned(tile, block_size);
        for (Index across = stripe; across < tiles; ++across) turned.rotate(h, stripe * tile, across * tile);
    });
}

}  // namespace mrgptq
