#include "gptq/hessian.h"

#include <algorithm>
#include <string>

#include "base/check.h"
#include "base/parallel.h"
#include "gptq/eigen.h"

namespace mrgptq {
namespace {

constexpr Index panel_size = 256;
constexpr Index tile = 128;

// sum += panelᵀ panel on the lower triangle, tile by tile; a tile's arithmetic does not know the others.
void add_product(MatrixView<const float> panel, double* sum, int threads) {
    const Index cols = panel.cols, tiles = (cols + tile - 1) / tile;
    parallel_for(tiles * (tiles + 1) / 2, threads, [&](Index piece) {
        Index i = 0;
        while ((i + 1) * (i + 2) / 2 <= piece) ++i;
        const Index j = piece - i * (i + 1) / 2;
        const Index i0 = i * tile, j0 = j * tile, ni = std::min(tile, cols - i0), nj = std::min(tile, cols - j0);
        const Strided<float> xi(panel.data + i0, ni, panel.rows, Eigen::OuterStride<>(panel.row_stride));
        const Strided<float> xj(panel.data + j0, nj, panel.rows, Eigen::OuterStride<>(panel.row_stride));
        Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::ColMajor, tile, tile> product(nj, ni);
        product.noalias() = xj * xi.transpose();
        for (Index r = 0; r < ni; ++r)
            for (Index c = 0; c < nj; ++c) sum[(i0 + r) * cols + j0 + c] += product(c, r);
    });
}

}  // namespace

Hessian::Hessian(Index cols) : cols_(cols) {
    check(cols > 0, "a Hessian needs at least one column, got " + std::to_string(cols));
    sum_.resize(static_cast<std::size_t>(cols) * cols);
    panel_.resize(static_cast<std::size_t>(panel_size) * cols);
}

void Hessian::update(MatrixView<const float> x, int threads) {
    check(x.cols == cols_, "x has " + std::to_string(x.cols) + " columns; this Hessian has " + std::to_string(cols_));
    // Every token is copied, even where a whole panel could be read in place: products then always read one buffer, so no alignment of the caller's can reach the bytes.
    for (Index done = 0; done < x.rows;) {
        const Index count = std::min(x.rows - done, panel_size - panel_tokens_);
        for (Index t = 0; t < count; ++t) std::copy_n(x.row(done + t), cols_, panel_.data() + (panel_tokens_ + t) * cols_);
        panel_tokens_ += count;
        done += count;
        if (panel_tokens_ == panel_size) {
            add_product({panel_.data(), panel_size, cols_, cols_}, sum_.data(), threads);
            panel_tokens_ = 0;
        }
    }
    tokens_ += x.rows;
}

void Hessian::merge(const Hessian& other, int threads) {
    check(&other != this, "a Hessian cannot be merged into itself");
    check(other.cols_ == cols_, "the other Hessian has " + std::to_string(other.cols_) + " columns; this one has " + std::to_string(cols_));
    // The other's unfinished panel is added as it stands; this stream's own goes on filling, so its later panels stay where they were.
    if (other.panel_tokens_ > 0) add_product({other.panel_.data(), other.panel_tokens_, cols_, cols_}, sum_.data(), threads);
    for (std::size_t i = 0; i < sum_.size(); ++i) sum_[i] += other.sum_[i];
    tokens_ += other.tokens_;
}

void Hessian::matrix(MatrixView<double> out, int threads) const {
    check(out.rows == cols_ && out.cols == cols_, "hessian matrix: out has another shape");
    std::vector<double> sum = sum_;
    if (panel_tokens_ > 0) add_product({panel_.data(), panel_tokens_, cols_, cols_}, sum.data(), threads);
    const double tokens = static_cast<double>(std::max<Index>(tokens_, 1));
    for (Index r = 0; r < cols_; ++r)
        for (Index c = 0; c <= r; ++c) out.row(r)[c] = out.row(c)[r] = sum[static_cast<std::size_t>(r) * cols_ + c] / tokens;
}

}  // namespace mrgptq
