#include "gptq/forms.h"

#include <algorithm>
#include <numeric>
#include <string>
#include <vector>

#include "base/check.h"
#include "base/parallel.h"
#include "gptq/rows.h"
#include "gptq/tile.h"

namespace mrgptq {
namespace {

constexpr Index most_tiles = 8;  // that one thread works off together: what is packed for one serves all

// Rows [first_row, ...) of a matrix as tiles of 32, widened.
std::vector<Tile<double>> widened(MatrixView<const float> e, Index first_tile, Index count) {
    std::vector<Tile<double>> tiles(static_cast<std::size_t>(count), Tile<double>::Zero(lanes, e.cols));
    for (Index t = 0; t < count; ++t) rows_to_lanes(e, (first_tile + t) * lanes, tiles[static_cast<std::size_t>(t)].data(), [](Index c) { return c; });
    return tiles;
}

// Room for a block of columns of a product, up to the next whole strip.
Tile<double> columns_of_product() { return Tile<double>(lanes, block); }

double dot(const Tile<double>& sums, const Tile<double>& x, Index begin, Index width) { return sums.leftCols(width).cwiseProduct(x.middleCols(begin, width)).sum(); }

// Sums of sum_of_band(first_tile, count, sums), which fills in one number for each tile, over all tiles of `rows` rows.
template <class SumOfBand>
double sum_of_tiles(Index rows, int threads, SumOfBand&& sum_of_band) {
    const Index tiles = (rows + lanes - 1) / lanes;
    std::vector<double> sums(static_cast<std::size_t>(tiles), 0.0);
    parallel_for_ranges(tiles, most_tiles, threads, [&](Index first, Index last) { sum_of_band(first, last - first, sums.data() + first); });
    return std::accumulate(sums.begin(), sums.end(), 0.0);
}

}  // namespace

double quadratic_form(MatrixView<const float> e, MatrixView<const double> h, int threads) {
    check(h.rows == e.cols && h.cols == e.cols, "hessian has shape (" + std::to_string(h.rows) + ", " + std::to_string(h.cols) + "); a matrix of " + std::to_string(e.cols) + " columns needs (" +
                                                    std::to_string(e.cols) + ", " + std::to_string(e.cols) + ")");
    const Index n = e.cols;
    return sum_of_tiles(e.rows, threads, [&](Index first_tile, Index count, double* sums) {
        const std::vector<Tile<double>> x = widened(e, first_tile, count);
        Strips<double> strips;
        std::vector<Tile<double>> products(x.size(), columns_of_product());
        // H is symmetric: what lies below the diagonal square of a block of columns counts twice.
        for (Index begin = 0; begin < n; begin += block) {
            const Index width = std::min(block, n - begin);
            for (auto& product : products) product.setZero();
            for (Index k = begin + width; k < n; k += block) {
                const Index depth = std::min(block, n - k);
                strips.pack(h.row(k) + begin, h.row_stride, 1, depth, width);
                for (std::size_t t = 0; t < x.size(); ++t) strips.multiply(x[t].col(k).data(), 0, depth, width, products[t].data());
            }
            strips.pack(h.row(begin) + begin, h.row_stride, 1, width, width);
            for (std::size_t t = 0; t < x.size(); ++t) {
                products[t] *= 2;
                strips.multiply(x[t].col(begin).data(), 0, width, width, products[t].data());
                sums[t] += dot(products[t], x[t], begin, width);
            }
        }
    });
}

double coupled_form(MatrixView<const float> e, MatrixView<const double> a, MatrixView<const double> h, int threads) {
    const auto square = [](MatrixView<const double> x, Index n) { return x.rows == n && x.cols == n; };
    check(square(a, e.rows) && square(h, e.cols), "coupled_form: the second moments of outputs and inputs do not have the rows and columns of the errors");
    const Index rows = e.rows, n = e.cols;
    return sum_of_tiles(rows, threads, [&](Index first_tile, Index count, double* sums) {
        const std::vector<Tile<double>> x = widened(e, first_tile, count);
        std::vector<Tile<double>> mixed(x.size(), Tile<double>::Zero(lanes, (n + kernel_cols - 1) / kernel_cols * kernel_cols));  // A E
        Strips<double> strips;
        Tile<double> weights(lanes, block);  // of A, symmetric: its rows are its columns
        for (Index k = 0; k < rows; k += block) {
            const Index depth = std::min(block, rows - k);
            for (Index begin = 0; begin < n; begin += block) {
                const Index width = std::min(block, n - begin);
                strips.pack(e.row(k) + begin, e.row_stride, 1, depth, width);
                for (std::size_t t = 0; t < x.size(); ++t) {
                    const Index first_row = (first_tile + static_cast<Index>(t)) * lanes, here = std::min(lanes, rows - first_row);
                    weights.setZero();
                    for (Index r = 0; r < depth; ++r) std::copy_n(a.row(k + r) + first_row, here, weights.col(r).data());
                    strips.multiply(weights.data(), 0, depth, width, mixed[t].col(begin).data());
                }
            }
        }
        std::vector<Tile<double>> products(x.size(), columns_of_product());
        for (Index begin = 0; begin < n; begin += block) {
            const Index width = std::min(block, n - begin);
            for (auto& product : products) product.setZero();
            for (Index k = 0; k < n; k += block) {
                const Index depth = std::min(block, n - k);
                strips.pack(h.row(k) + begin, h.row_stride, 1, depth, width);
                for (std::size_t t = 0; t < x.size(); ++t) strips.multiply(mixed[t].col(k).data(), 0, depth, width, products[t].data());
            }
            for (std::size_t t = 0; t < x.size(); ++t) sums[t] += dot(products[t], x[t], begin, width);
        }
    });
}

}  // namespace mrgptq
