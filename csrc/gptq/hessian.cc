#include "gptq/hessian.h"

#include <algorithm>
#include <memory>
#include <string>

#include "base/check.h"
#include "base/parallel.h"
#include "linalg/lanes.h"
#include "linalg/symmetric.h"

namespace mrgptq {
namespace {

constexpr Index panel_tokens = 256;
constexpr Index block = 128;  // rows and columns of the sum that a thread takes at a time
constexpr Index most_panels = 8;  // that one visit of a block adds: the sum, in float64, is read and written once for all of them
static_assert(panel_tokens % product_depth == 0 && block % lanes == 0);

Index padded(Index cols) noexcept { return (cols + lanes - 1) / lanes * lanes; }

// A panel is kept twice: as lanes for the left factor, (256, 32) for each 32 columns, and behind them as strips for the right one, (256, kernel_cols) each.
Index half_size(Index cols) noexcept { return padded(cols) * panel_tokens; }
Index panel_size(Index cols) noexcept { return 2 * half_size(cols); }

// `width` columns of some tokens, zeros for those that are not there.
template <Index width>
void copy_columns(const float* from, Index stride, Index tokens, Index here, float* to) noexcept {
    for (Index t = 0; t < tokens; ++t, from += stride, to += width) {
        if (here == width)
            for (Index c = 0; c < width; ++c) to[c] = from[c];
        else
            std::fill(std::copy_n(from, here, to), to + width, 0.0f);
    }
}

// Some tokens of x to places from `place` on, 32 columns after 32 columns: token after token would touch a page for every few values.
void copy_tokens(MatrixView<const float> x, Index first_token, Index tokens, Index place, float* panel) noexcept {
    const Index cols = x.cols;
    for (Index first = 0; first < cols; first += lanes) {
        const float* from = x.row(first_token) + first;
        copy_columns<lanes>(from, x.row_stride, tokens, std::min(lanes, cols - first), panel + first * panel_tokens + place * lanes);
        for (Index c = 0; c < lanes; c += kernel_cols)
            copy_columns<kernel_cols>(from + c, x.row_stride, tokens, std::clamp<Index>(cols - first - c, 0, kernel_cols), panel + half_size(cols) + (first + c) * panel_tokens + place * kernel_cols);
    }
}

// sum += panelᵀ panel for one panel after another on the lower triangle, block by block; tokens behind the last of a panel are zeros.
void add_products(const float* panels, Index count, MatrixView<double> sum, int threads) {
    const Index cols = sum.cols;
    const Index blocks = (cols + block - 1) / block;
    parallel_for(blocks * (blocks + 1) / 2, threads, [&](Index piece) {
        Index i = 0;
        while ((i + 1) * (i + 2) / 2 <= piece) ++i;
        const Index row0 = i * block, col0 = (piece - i * (i + 1) / 2) * block;
        const Index rows = std::min(block, cols - row0), row_end = std::min(row0 + block, padded(cols)), col_end = std::min(col0 + block, padded(cols));
        for (Index col = col0; col < col_end; col += lanes) {
            const Index width = std::min(lanes, cols - col);
            // The sum's own rows lie a whole row apart, where a power of two would throw each other out of the caches between two panels.
            alignas(64) double total[block * lanes] = {};
            for (Index r = 0; r < rows; ++r)
                for (Index c = 0; c < width; ++c) total[r * lanes + c] = sum.row(row0 + r)[col + c];
            for (Index p = 0; p < count; ++p) {
                const float *panel = panels + p * panel_size(cols), *strips = panel + half_size(cols);
                alignas(64) float product[block * lanes] = {};
                for (Index depth = 0; depth < panel_tokens; depth += product_depth)
                    for (Index lane = 0; lane < lanes; lane += kernel_rows<float>)
                        for (Index row = row0; row < row_end; row += kernel_cols)
                            multiply_tile<float, false>(product_depth, panel + col * panel_tokens + depth * lanes + lane, lanes, strips + row * panel_tokens + depth * kernel_cols, kernel_cols,
                                                        product + (row - row0) * lanes + lane, lanes);
                for (Index i = 0; i < rows * lanes; ++i) total[i] += static_cast<double>(product[i]);
            }
            for (Index r = 0; r < rows; ++r)
                for (Index c = 0; c < width; ++c) sum.row(row0 + r)[col + c] = total[r * lanes + c];
        }
    });
}

}  // namespace

Hessian::Hessian(Index cols) : cols_(cols) {
    check(cols > 0, "a Hessian needs at least one column, got " + std::to_string(cols));
    sum_.resize(static_cast<std::size_t>(cols) * cols);
    panel_.resize(static_cast<std::size_t>(panel_size(cols)));
}

void Hessian::update(MatrixView<const float> x, int threads) {
    check(x.cols == cols_, "x has " + std::to_string(x.cols) + " columns; this Hessian has " + std::to_string(cols_));
    constexpr Index grain = 32;  // tokens; from a panel's start, or inside one panel, so that no range crosses into the next
    static_assert(panel_tokens % grain == 0);
    const auto take = [&](Index from, Index count, Index place, float* panels) {
        parallel_for_ranges(count, grain, threads, [&](Index begin, Index end) {
            copy_tokens(x, from + begin, end - begin, (place + begin) % panel_tokens, panels + begin / panel_tokens * panel_size(cols_));
        });
    };
    Index done = 0;
    if (panel_tokens_ > 0) {
        done = std::min(x.rows, panel_tokens - panel_tokens_);
        take(0, done, panel_tokens_, panel_.data());
        panel_tokens_ += done;
        if (panel_tokens_ == panel_tokens) clear_panel(threads);
    }
    if (const Index whole = std::min((x.rows - done) / panel_tokens, most_panels); whole > 0) {
        const auto panels = std::make_unique_for_overwrite<float[]>(static_cast<std::size_t>(whole * panel_size(cols_)));
        for (Index count; (count = std::min((x.rows - done) / panel_tokens, whole)) > 0; done += count * panel_tokens) {
            take(done, count * panel_tokens, 0, panels.get());
            add_products(panels.get(), count, view(), threads);
        }
    }
    if (done < x.rows) {
        take(done, x.rows - done, 0, panel_.data());
        panel_tokens_ = x.rows - done;
    }
    tokens_ += x.rows;
}

// Adds the panel under way and empties it: zeros behind the last token are what a shorter panel counts on.
void Hessian::clear_panel(int threads) {
    add_products(panel_.data(), 1, view(), threads);
    std::fill(panel_.begin(), panel_.end(), 0.0f);
    panel_tokens_ = 0;
}

void Hessian::merge(const Hessian& other, int threads) {
    check(&other != this, "a Hessian cannot be merged into itself");
    check(other.cols_ == cols_, "the other Hessian has " + std::to_string(other.cols_) + " columns; this one has " + std::to_string(cols_));
    // The other's unfinished panel is added as it stands; this stream's own goes on filling, so its later panels stay where they were.
    if (other.panel_tokens_ > 0) add_products(other.panel_.data(), 1, view(), threads);
    for (std::size_t i = 0; i < sum_.size(); ++i) sum_[i] += other.sum_[i];
    tokens_ += other.tokens_;
}

void Hessian::matrix(MatrixView<double> out, int threads) const {
    check(out.rows == cols_ && out.cols == cols_, "hessian matrix: out has another shape");
    const double tokens = static_cast<double>(std::max<Index>(tokens_, 1));
    const MatrixView<const double> sum{sum_.data(), cols_, cols_, cols_};
    if (panel_tokens_ == 0) return mirror_lower(sum, tokens, out, threads);
    parallel_for_ranges(cols_, block, threads, [&](Index first, Index last) {
        for (Index r = first; r < last; ++r) std::copy_n(sum.row(r), last, out.row(r));  // whole blocks, as the products are added
    });
    // The panel under way goes to the copy: there is no third matrix.
    add_products(panel_.data(), 1, out, threads);
    mirror_lower(out, tokens, out, threads);
}

}  // namespace mrgptq
