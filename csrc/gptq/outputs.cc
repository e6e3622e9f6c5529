#include "gptq/outputs.h"

#include <algorithm>
#include <vector>

#include "base/parallel.h"
#include "gptq/triangular.h"

namespace mrgptq {

template <class Real>
void owed(const Factor& outputs, Index begin, Index end, MatrixView<const float> errors, MatrixView<Real> out, int threads) {
    constexpr Index most_tiles = 8;
    const Index count = end - begin, rows = outputs.cols(), n = errors.cols, tiles = (n + lanes - 1) / lanes;
    const auto unit = outputs.unit();
    // All transposed: a tile is 32 of the weight's columns, and its columns are rows of the weight.
    parallel_for_ranges(tiles, most_tiles, threads, [&](Index first_tile, Index last_tile) {
        std::vector<Tile<double>> sums(static_cast<std::size_t>(last_tile - first_tile), Tile<double>::Zero(lanes, (count + kernel_cols - 1) / kernel_cols * kernel_cols));
        Tile<double> wide = Tile<double>::Zero(lanes, block);
        Strips<double> strips;
        for (Index left = 0; left < count; left += block) {
            const Index width = std::min(block, count - left);
            for (Index k = end; k < rows; k += block) {
                const Index depth = std::min(block, rows - k);
                strips.pack(&unit.coeffRef(k, begin + left), 1, unit.outerStride(), depth, width);
                for (Index t = first_tile; t < last_tile; ++t) {
                    const Index here = std::min(lanes, n - t * lanes);
                    for (Index r = 0; r < depth; ++r)
                        for (Index c = 0; c < here; ++c) wide(c, r) = errors.row(k + r)[t * lanes + c];
                    strips.multiply(wide.data(), 0, depth, width, sums[static_cast<std::size_t>(t - first_tile)].col(left).data());
                }
            }
        }
        divide_by_square(sums, outputs, begin, end);
        for (Index t = first_tile; t < last_tile; ++t)
            for (Index r = 0; r < count; ++r)
                for (Index c = 0; c < std::min(lanes, n - t * lanes); ++c) out.row(r)[t * lanes + c] = static_cast<Real>(sums[static_cast<std::size_t>(t - first_tile)](c, r));
    });
}

template void owed<float>(const Factor&, Index, Index, MatrixView<const float>, MatrixView<float>, int);
template void owed<double>(const Factor&, Index, Index, MatrixView<const float>, MatrixView<double>, int);

}  // namespace mrgptq
