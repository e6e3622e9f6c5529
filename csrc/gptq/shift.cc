#include "gptq/shift.h"

#include <algorithm>
#include <vector>

#include "base/check.h"
#include "base/parallel.h"
#include "gptq/triangular.h"
#include "rotations/rotated_rows.h"

namespace mrgptq {

void shift_to_inputs(MatrixView<const float> weight, MatrixView<const double> cross, MatrixView<const float> stream, const Factor& factor, double strength, MatrixView<float> target, int threads,
                     const Rotation& rotation) {
    if (rotation) rotation.check_columns(weight.cols);
    constexpr Index most_tiles = 8;
    const SecondMoment h = factor.second_moment();
    const Index n = weight.cols, tiles = (weight.rows + lanes - 1) / lanes;
    check(factor.usable() && factor.cols() == n && cross.rows == n && cross.cols == n && target.rows == weight.rows && target.cols == n,
          "shift_to_inputs: weight, cross, factor and target do not have the same columns");
    check(stream.rows == 0 || (stream.rows == weight.rows && stream.cols == n), "shift_to_inputs: stream does not have the shape of weight");
    parallel_for_ranges(tiles, most_tiles, threads, [&](Index first_tile, Index last_tile) {
        const auto count = static_cast<std::size_t>(last_tile - first_tile);
        std::vector<Tile<double>> w(count, Tile<double>::Zero(lanes, n)), gap(count, Tile<double>::Zero(lanes, (n + kernel_cols - 1) / kernel_cols * kernel_cols));
        const auto each_row = [&](auto&& use) {
            for (std::size_t t = 0; t < count; ++t)
                for (Index r = 0, row = (first_tile + static_cast<Index>(t)) * lanes; r < lanes && row < weight.rows; ++r, ++row) use(t, r, row);
        };
        // Columns by the factor's position.
        each_row([&](std::size_t t, Index r, Index row) {
            const RotatedRows own(weight, rotation, row, 1);
            for (Index p = 0; p < n; ++p) w[t](r, p) = own.row(row)[factor.column(p)];
            if (stream.rows == 0) return;
            const RotatedRows missing(stream, rotation, row, 1);
            for (Index p = 0; p < n; ++p) gap[t](r, p) = h.diagonal(p) == 0 ? 0 : missing.row(row)[factor.column(p)];
        });
        // ... + W (cross - H); a dead column has nothing to make up for.
        Strips<double> strips;
        std::vector<double> difference(static_cast<std::size_t>(block * block));
        for (Index begin = 0; begin < n; begin += block) {
            const Index width = std::min(block, n - begin);
            for (Index k = 0; k < n; k += block) {
                const Index depth = std::min(block, n - k);
                for (Index i = 0; i < depth; ++i)
                    for (Index j = 0; j < width; ++j)
                        difference[static_cast<std::size_t>(i * width + j)] = h.diagonal(begin + j) == 0 ? 0 : cross.row(factor.column(k + i))[factor.column(begin + j)] - h.at(k + i, begin + j);
                strips.pack(difference.data(), width, 1, depth, width);
                strips.multiply_tiles(count, width, [&](std::size_t t) { return w[t].col(k).data(); }, [&](std::size_t t) { return gap[t].col(begin).data(); });
            }
        }
        // x R = gap with R = U D Uᵀ.
        divide_by_transposed_unit(gap, factor);
        for (auto& x : gap)
            for (Index p = 0; p < n; ++p) x.col(p) /= factor.pivots()[p];
        divide_by_unit(gap, factor);
        each_row([&](std::size_t t, Index r, Index row) {
            for (Index p = 0; p < n; ++p) target.row(row)[factor.column(p)] = static_cast<float>(w[t](r, p) + strength * gap[t](r, p));
        });
    });
}

}  // namespace mrgptq
