#include "gptq/triangular.h"

#include <algorithm>

namespace mrgptq {
namespace {

using Tiles = std::vector<Tile<double>>;

// Columns [begin, begin + width) of x, by a square of `width` <= block in strips: element (k, j), k > j, is what solved column k takes off column j.
void solve_backwards(Tiles& x, const Strips<double>& square, Index begin, Index width) {
    for (auto& tile : x)
        for (Index k = width - 1; k > 0; --k)
            for (Index j = 0; j < k; ++j) tile.col(begin + j) -= square.at(k, j) * tile.col(begin + k);
}

void solve_forwards(Tiles& x, const Strips<double>& square, Index begin, Index width) {
    for (auto& tile : x)
        for (Index k = 0; k < width; ++k)
            for (Index j = k + 1; j < width; ++j) tile.col(begin + j) -= square.at(k, j) * tile.col(begin + k);
}

// Columns [begin, begin + width) less the products of what is solved with the packed strips: `sums` is room for them.
template <class Pack>
void subtract_products(Tiles& x, Tiles& sums, Strips<double>& strips, Index begin, Index width, Index from, Index to, Pack&& pack) {
    if (from >= to) return;
    for (auto& sum : sums) sum.setZero();
    for (Index k = from; k < to; k += block) {
        const Index depth = std::min(block, to - k);
        pack(k, depth);
        strips.multiply_tiles(x.size(), width, [&](std::size_t t) { return x[t].col(k).data(); }, [&](std::size_t t) { return sums[t].data(); });
    }
    for (std::size_t t = 0; t < x.size(); ++t) x[t].middleCols(begin, width) -= sums[t].leftCols(width);
}

}  // namespace

void divide_by_square(Tiles& x, const Factor& factor, Index first, Index last) {
    const auto unit = factor.unit();
    Tiles sums(x.size(), Tile<double>(lanes, block));
    Strips<double> strips;
    for (Index end = last; end > first; end -= std::min(block, end - first)) {
        const Index begin = std::max(end - block, first), width = end - begin;
        subtract_products(x, sums, strips, begin - first, width, end - first, last - first, [&](Index k, Index depth) { strips.pack(&unit.coeffRef(first + k, begin), 1, unit.outerStride(), depth, width); });
        strips.pack(&unit.coeffRef(begin, begin), 1, unit.outerStride(), width, width);
        solve_backwards(x, strips, begin - first, width);
    }
}

void divide_by_unit(Tiles& x, const Factor& factor) { divide_by_square(x, factor, 0, factor.cols()); }

void divide_by_transposed_unit(Tiles& x, const Factor& factor) {
    const auto unit = factor.unit();
    const Index n = unit.cols();
    Tiles sums(x.size(), Tile<double>(lanes, block));
    Strips<double> strips;
    for (Index begin = 0; begin < n; begin += block) {
        const Index width = std::min(block, n - begin);
        subtract_products(x, sums, strips, begin, width, 0, begin, [&](Index k, Index depth) { strips.pack(&unit.coeffRef(begin, k), unit.outerStride(), 1, depth, width); });
        strips.pack(&unit.coeffRef(begin, begin), unit.outerStride(), 1, width, width);
        solve_forwards(x, strips, begin, width);
    }
}

}  // namespace mrgptq
