#include "gptq/forms.h"

#include <algorithm>
#include <numeric>
#include <string>
#include <vector>

#include "base/check.h"
#include "base/parallel.h"
#include "gptq/tile.h"

namespace mrgptq {

double quadratic_form(MatrixView<const float> e, MatrixView<const double> h, int threads) {
    check(h.rows == e.cols && h.cols == e.cols, "hessian has shape (" + std::to_string(h.rows) + ", " + std::to_string(h.cols) + "); a matrix of " + std::to_string(e.cols) + " columns needs (" +
                                                    std::to_string(e.cols) + ", " + std::to_string(e.cols) + ")");
    constexpr Index strip = 256;
    const Index n = e.cols, tiles = (e.rows + lanes - 1) / lanes;
    const Strided<double> matrix(h.data, n, n, Eigen::OuterStride<>(h.row_stride));
    std::vector<double> sums(static_cast<std::size_t>(tiles));
    parallel_for(tiles, threads, [&](Index i) {
        const Index first_row = i * lanes, rows = std::min(lanes, e.rows - first_row);
        Tile<double> x = Tile<double>::Zero(lanes, n), product(lanes, strip);
        for (Index r = 0; r < rows; ++r)
            for (Index c = 0; c < n; ++c) x(r, c) = e.row(first_row + r)[c];
        double sum = 0;
        // H is symmetric: the strictly lower part counts twice, strip by strip, and the diagonal strip once.
        for (Index begin = 0; begin < n; begin += strip) {
            const Index width = std::min(strip, n - begin), below = n - begin - width;
            auto part = product.leftCols(width);
            part.noalias() = x.middleCols(begin, width) * matrix.block(begin, begin, width, width);
            if (below > 0) part.noalias() += 2.0 * x.rightCols(below) * matrix.block(begin + width, begin, below, width);
            sum += part.cwiseProduct(x.middleCols(begin, width)).sum();
        }
        sums[static_cast<std::size_t>(i)] = sum;
    });
    return std::accumulate(sums.begin(), sums.end(), 0.0);
}

double coupled_form(MatrixView<const float> e, MatrixView<const double> a, MatrixView<const double> h, int threads) {
    const auto square = [](MatrixView<const double> x, Index n) { return x.rows == n && x.cols == n; };
    check(square(a, e.rows) && square(h, e.cols), "coupled_form: the second moments of outputs and inputs do not have the rows and columns of the errors");
    constexpr Index panel = 256;
    const Index rows = e.rows, n = e.cols, tiles = (rows + lanes - 1) / lanes;
    // Row-major matrices, read as their transposes; both moments are symmetric.
    const Strided<double> outputs(a.data, rows, rows, Eigen::OuterStride<>(a.row_stride)), inputs(h.data, n, n, Eigen::OuterStride<>(h.row_stride));
    std::vector<double> sums(static_cast<std::size_t>(tiles));
    parallel_for(tiles, threads, [&](Index i) {
        const Index first_row = i * lanes, count = std::min(lanes, rows - first_row);
        Columns<double> mixed = Columns<double>::Zero(n, count), wide(n, panel), product(n, count);
        for (Index first = 0; first < rows; first += panel) {
            const Index here = std::min(panel, rows - first);
            for (Index r = 0; r < here; ++r)
                for (Index c = 0; c < n; ++c) wide(c, r) = static_cast<double>(e.row(first + r)[c]);
            mixed.noalias() += wide.leftCols(here) * outputs.block(first, first_row, here, count);
        }
        product.noalias() = inputs * mixed;
        double sum = 0;
        for (Index r = 0; r < count; ++r)
            for (Index c = 0; c < n; ++c) sum += product(c, r) * static_cast<double>(e.row(first_row + r)[c]);
        sums[static_cast<std::size_t>(i)] = sum;
    });
    return std::accumulate(sums.begin(), sums.end(), 0.0);
}

}  // namespace mrgptq
