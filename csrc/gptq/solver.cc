#include "gptq/solver.h"

#include <algorithm>
#include <numeric>
#include <string>
#include <vector>

#include "base/check.h"
#include "base/parallel.h"
#include "codecs/packing.h"
#include "formats/block_format.h"

namespace mrgptq {
namespace {

constexpr Index lanes = 64;   // rows worked off together, one a SIMD lane; short tiles are padded with zero rows so that every row sees the same arithmetic
constexpr Index block = 128;  // columns between two GEMMs

// 64 values, one a row, for each column: a column is contiguous.
template <class Real>
using Tile = Eigen::Matrix<Real, lanes, Eigen::Dynamic, Eigen::ColMajor>;

template <class Format, class Real>
double solve_tile(MatrixView<const float> weight, MatrixView<const std::uint8_t> scales, float tensor_scale, const Factor& factor, const Columns<Real>& unit, Index first_row,
                  MatrixView<std::uint8_t> codes) {
    const Index n = weight.cols, rows = std::min(lanes, weight.rows - first_row);
    Tile<Real> error = Tile<Real>::Zero(lanes, n);  // by position: the weight until its column is visited, w - q afterwards
    Tile<float> steps = Tile<float>::Ones(lanes, scales.cols);
    for (Index r = 0; r < rows; ++r) {
        for (Index p = 0; p < n; ++p) error(r, p) = weight.row(first_row + r)[factor.column(p)];
        for (Index g = 0; g < scales.cols; ++g) steps(r, g) = group_step<Format>(scales.row(first_row + r)[g], tensor_scale);
    }
    std::vector<std::uint8_t> tile_codes(static_cast<std::size_t>(n) * lanes);  // [column][row]
    Tile<Real> feedback(lanes, block);
    double loss = 0;
    for (Index end = n; end > 0; end -= std::min(block, end)) {
        const Index begin = std::max<Index>(end - block, 0), width = end - begin;
        auto fed = feedback.leftCols(width);
        if (end < n)
            fed.noalias() = error.rightCols(n - end) * unit.block(end, begin, n - end, width);
        else
            fed.setZero();
        for (Index p = end - 1; p >= begin; --p) {
            const Index column = factor.column(p);
            const float* step = steps.col(column / Format::group_size).data();
            Real* e = error.col(p).data();
            const Real* f = feedback.col(p - begin).data();
            std::uint8_t* code = tile_codes.data() + column * lanes;
            Eigen::Array<Real, lanes, 1> residual;
            for (Index r = 0; r < lanes; ++r) {
                const Real t = e[r] + f[r];
                code[r] = e2m1::encode(t / static_cast<Real>(step[r]));
                const Real q = static_cast<Real>(step[r] * e2m1::decode(code[r]));  // the float32 value that a reader will decode
                residual[r] = t - q;
                e[r] -= q;
            }
            loss += factor.pivots()[p] * residual.template cast<double>().square().sum();
            for (Index j = begin; j < p; ++j) feedback.col(j - begin) += unit(p, j) * error.col(p);
        }
    }
    std::vector<std::uint8_t> row_codes(static_cast<std::size_t>(n));
    for (Index r = 0; r < rows; ++r) {
        for (Index c = 0; c < n; ++c) row_codes[static_cast<std::size_t>(c)] = tile_codes[static_cast<std::size_t>(c * lanes + r)];
        pack_row(row_codes.data(), n, codes.row(first_row + r));
    }
    return loss;
}

template <class Format, class Real>
double solve_rows(MatrixView<const float> weight, MatrixView<const std::uint8_t> scales, float tensor_scale, const Factor& factor, const Columns<Real>& unit, MatrixView<std::uint8_t> codes,
                  int threads) {
    const Index tiles = (weight.rows + lanes - 1) / lanes;
    std::vector<double> losses(static_cast<std::size_t>(tiles));
    parallel_for(tiles, threads, [&](Index i) { losses[static_cast<std::size_t>(i)] = solve_tile<Format, Real>(weight, scales, tensor_scale, factor, unit, i * lanes, codes); });
    return std::accumulate(losses.begin(), losses.end(), 0.0);
}

}  // namespace

Precision precision_named(std::string_view name) {
    if (name == "float32") return Precision::float32;
    check(name == "float64", "unknown precision \"" + std::string(name) + "\"; known: float32, float64");
    return Precision::float64;
}

double solve(std::string_view format, MatrixView<const float> weight, MatrixView<const std::uint8_t> scales, float tensor_scale, const Factor& factor, Precision precision,
             MatrixView<std::uint8_t> codes, int threads) {
    check(factor.cols() == weight.cols, "the factor has " + std::to_string(factor.cols()) + " columns; weight has " + std::to_string(weight.cols));
    check(factor.usable(), "the factor is not usable: the Hessian could not be factorised at any damping");
    return with_format(format, [&]<class Format>(Format) {
        check(scales.rows == weight.rows && scales.cols * Format::group_size == weight.cols, "scales do not have one entry for each group of weight");
        check(codes.rows == weight.rows && codes.cols * 2 == weight.cols, "codes do not have half a byte for each weight");
        if (precision == Precision::float64) return solve_rows<Format, double>(weight, scales, tensor_scale, factor, factor.unit(), codes, threads);
        return solve_rows<Format, float>(weight, scales, tensor_scale, factor, factor.unit().cast<float>(), codes, threads);
    });
}

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

}  // namespace mrgptq
