#include "gptq/hessian.h"

#include <algorithm>
#include <string>

#include "base/buffer.h"
#include "base/check.h"
#include "base/parallel.h"
#include "linalg/lanes.h"
#include "linalg/symmetric.h"

namespace mrgptq {
namespace {

constexpr Index panel_tokens = 2 * product_depth;
constexpr Index block = 128;  // rows and columns of the sum that a thread takes at a time
constexpr Index most_panels = 16;  // that one visit of a block adds: the sum, in float64, is read and written once for all of them
static_assert(block % lanes == 0);

// Lanes of a panel: (256, 32) for each 32 columns.
Index padded(Index cols) noexcept { return (cols + lanes - 1) / lanes * lanes; }
Index panel_size(Index cols) noexcept { return padded(cols) * panel_tokens; }

// Some tokens of x to places from `place` on, 32 columns after 32 columns: token after token would touch a page for every few values.
void copy_tokens(MatrixView<const float> x, Index first_token, Index tokens, Index place, float* panel) noexcept {
    constexpr Index ahead = 4;  // tokens: memory does not foresee the steps between them
    for (Index first = 0; first < x.cols; first += lanes) {
        const Index here = std::min(lanes, x.cols - first);
        const float* from = x.row(first_token) + first;
        float* to = panel + first * panel_tokens + place * lanes;
        for (Index t = 0; t < tokens; ++t, from += x.row_stride, to += lanes) {
            __builtin_prefetch(from + ahead * x.row_stride);
            __builtin_prefetch(from + ahead * x.row_stride + lanes / 2);
            if (here == lanes)
                for (Index c = 0; c < lanes; ++c) to[c] = from[c];
            else
                std::fill(std::copy_n(from, here, to), to + lanes, 0.0f);
        }
    }
}

// A tile of the sum is kernel_cols of its rows by kernel_rows of its columns, and so many cache lines. The next panel's share of a block is as many lines for each of the tiles' halves.
constexpr Index tile_lines = kernel_cols * kernel_rows<float> * Index{sizeof(double)} / Index{cache_line};
constexpr Index floats_a_line = cache_line / sizeof(float), doubles_a_line = cache_line / sizeof(double), lines_a_row = kernel_rows<float> / doubles_a_line;
static_assert(2 * block * panel_tokens == 2 * (block / kernel_cols) * (block / kernel_rows<float>) * tile_lines * floats_a_line && lines_a_row * doubles_a_line == kernel_rows<float>);

// Products of the first half of a panel's tokens. `columns` and `rows` are lanes of the panel, `next` is this tile's share of the next one.
void begin_tile(const float* columns, const float* rows, const float* next, float* product) noexcept {
    sum_tile(product_depth, columns, lanes, rows, lanes, SendAhead<tile_lines>(next), [&](Index j, Vector<float> low, Vector<float> high) {
        store(product + j * lanes, low);
        store(product + j * lanes + vector_size<float>, high);
    });
}

// to = from + (product + the products of the other half).
void end_tile(const float* columns, const float* rows, const float* next, const float* product, MatrixView<const double> from, MatrixView<double> to) noexcept {
    const SendAhead<tile_lines> ahead(next);
    const auto send = [&](Index k) {
        ahead(k);
        const Index line = k / ahead.steps;
        if (k % ahead.steps == 0) __builtin_prefetch(from.row(line / lines_a_row) + line % lines_a_row * doubles_a_line, 1);
    };
    const auto add = [&](Index j, Index lane, Vector<float> sum) {
        for (const Vector<double>& half : widened(load(product + j * lanes + lane) + sum)) {
            store<double>(to.row(j) + lane, load(from.row(j) + lane) + half);
            lane += vector_size<double>;
        }
    };
    sum_tile(product_depth, columns, lanes, rows, lanes, send, [&](Index j, Vector<float> low, Vector<float> high) {
        add(j, 0, low);
        add(j, vector_size<float>, high);
    });
}

// The block of the sum at (row0, col0), on or below the diagonal, through all panels.
void add_block(const float* panels, Index count, MatrixView<double> sum, Index row0, Index col0) {
    const Index cols = sum.cols, height = std::min(block, padded(cols) - row0), width = std::min(block, padded(cols) - col0);
    // Between the first panel and the last the block's sums lie together: a whole row apart, where a power of two, they would throw each other out of the caches. A block that the matrix's end
    // cuts lies there from the beginning to the end.
    const Buffer<double> room(block * block);
    const MatrixView<double> total{room.data(), block, block, block}, own{sum.row(row0) + col0, block, block, sum.row_stride};
    const Index own_rows = std::min(block, cols - row0), own_cols = std::min(block, cols - col0);
    const bool cut = own_rows < block || own_cols < block;
    if (cut) {
        std::fill_n(room.data(), block * block, 0.0);
        for (Index r = 0; r < own_rows; ++r) std::copy_n(own.row(r), own_cols, total.row(r));
    }
    alignas(cache_line) float product[block * lanes];
    for (Index p = 0; p < count; ++p) {
        const float *panel = panels + p * panel_size(cols), *next = p + 1 < count ? panel + panel_size(cols) : panel;
        const MatrixView<double> from = p == 0 && !cut ? own : total, to = p + 1 == count && !cut ? own : total;
        Index tiles = 0;  // done
        const auto next_share = [&] {
            constexpr Index half = block * panel_tokens;
            const Index place = tiles++ * tile_lines * floats_a_line;
            return place < half ? next + col0 * panel_tokens + place : next + row0 * panel_tokens + place - half;
        };
        for (Index col = 0; col < width; col += lanes) {
            const Index first = row0 == col0 ? col : 0;  // tiles above the diagonal are left out
            const auto visit = [&](Index tokens, auto&& tile) {
                for (Index lane = 0; lane < lanes; lane += kernel_rows<float>)
                    for (Index row = first; row < height; row += kernel_cols) {
                        const Index place = row0 + row;
                        tile(panel + (col0 + col) * panel_tokens + tokens * lanes + lane, panel + place / lanes * lanes * panel_tokens + tokens * lanes + place % lanes, row, lane);
                    }
            };
            visit(0, [&](const float* columns, const float* rows, Index row, Index lane) { begin_tile(columns, rows, next_share(), product + row * lanes + lane); });
            visit(product_depth, [&](const float* columns, const float* rows, Index row, Index lane) {
                const auto at = [&](MatrixView<double> sums) { return MatrixView<double>{sums.row(row) + col + lane, kernel_cols, kernel_rows<float>, sums.row_stride}; };
                end_tile(columns, rows, next_share(), product + row * lanes + lane, at(from), at(to));
            });
        }
    }
    if (cut)
        for (Index r = 0; r < own_rows; ++r) std::copy_n(total.row(r), own_cols, own.row(r));
}

// sum += panelᵀ panel for one panel after another on the lower triangle, block by block; tokens behind the last of a panel are zeros.
void add_products(const float* panels, Index count, MatrixView<double> sum, int threads) {
    const Index blocks = (sum.cols + block - 1) / block;
    parallel_for(blocks * (blocks + 1) / 2, threads, [&](Index piece) {
        Index i = 0;
        while ((i + 1) * (i + 2) / 2 <= piece) ++i;
        add_block(panels, count, sum, i * block, (piece - i * (i + 1) / 2) * block);
    });
}

}  // namespace

Hessian::Hessian(Index cols) : cols_(cols) {
    check(cols > 0, "a Hessian needs at least one column, got " + std::to_string(cols));
    panel_ = Buffer<float>(panel_size(cols));
    empty_panel();
}

void Hessian::make_room() { sum_.resize(static_cast<std::size_t>(cols_) * static_cast<std::size_t>(cols_)); }

void Hessian::update(MatrixView<const float> x, int threads) {
    check(x.cols == cols_, "x has " + std::to_string(x.cols) + " columns; this Hessian has " + std::to_string(cols_));
    constexpr Index grain = 32;  // tokens; from a panel's start, or inside one panel, so that no range crosses into the next
    static_assert(panel_tokens % grain == 0);
    const std::lock_guard lock(mutex_);
    const Index to_fill = panel_tokens_ > 0 ? std::min(x.rows, panel_tokens - panel_tokens_) : 0, whole = std::min((x.rows - to_fill) / panel_tokens, most_panels);
    // Where memory does not suffice, nothing has been added yet.
    make_room();
    const Buffer<float> panels(whole * panel_size(cols_));
    const auto take = [&](Index from, Index count, Index place, float* to) {
        parallel_for_ranges(count, grain, threads, [&](Index begin, Index end) {
            copy_tokens(x, from + begin, end - begin, (place + begin) % panel_tokens, to + begin / panel_tokens * panel_size(cols_));
        });
    };
    if (to_fill > 0) {
        take(0, to_fill, panel_tokens_, panel_.data());
        panel_tokens_ += to_fill;
        if (panel_tokens_ == panel_tokens) {
            add_products(panel_.data(), 1, view(), threads);
            empty_panel();
        }
    }
    Index done = to_fill;
    for (Index count; (count = std::min((x.rows - done) / panel_tokens, whole)) > 0; done += count * panel_tokens) {
        take(done, count * panel_tokens, 0, panels.data());
        add_products(panels.data(), count, view(), threads);
    }
    if (done < x.rows) {
        take(done, x.rows - done, 0, panel_.data());
        panel_tokens_ = x.rows - done;
    }
    tokens_ += x.rows;
}

// Zeros behind the last token are what a shorter panel counts on.
void Hessian::empty_panel() noexcept {
    std::fill_n(panel_.data(), panel_size(cols_), 0.0f);
    panel_tokens_ = 0;
}

void Hessian::merge(const Hessian& other, int threads) {
    check(&other != this, "a Hessian cannot be merged into itself");
    const std::scoped_lock lock(mutex_, other.mutex_);
    check(other.cols_ == cols_, "the other Hessian has " + std::to_string(other.cols_) + " columns; this one has " + std::to_string(cols_));
    make_room();
    // The other's unfinished panel is added as it stands; this stream's own goes on filling, so its later panels stay where they were.
    if (other.panel_tokens_ > 0) add_products(other.panel_.data(), 1, view(), threads);
    if (!other.sum_.empty())
        parallel_for_ranges(cols_, block, threads, [&](Index first, Index last) {
            for (Index r = first; r < last; ++r)
                for (Index i = r * cols_; i < r * cols_ + last; ++i) sum_[static_cast<std::size_t>(i)] += other.sum_[static_cast<std::size_t>(i)];
        });
    tokens_ += other.tokens();
}

void Hessian::state(MatrixView<double> sum, MatrixView<float> open) const {
    const std::lock_guard lock(mutex_);
    check(sum.rows == 1 && sum.cols == cols_ * (cols_ + 1) / 2 && open.cols == cols_ && open.rows == panel_tokens_, "hessian state: the sum or the open panel has another shape");
    std::fill_n(sum.data, sum.cols, 0.0);
    for (Index r = 0; r < cols_ && !sum_.empty(); ++r) std::copy_n(sum_.data() + r * cols_, r + 1, sum.data + r * (r + 1) / 2);
    for (Index t = 0; t < open.rows; ++t)
        for (Index c = 0; c < cols_; ++c) open.row(t)[c] = panel_.data()[c / lanes * lanes * panel_tokens + t * lanes + c % lanes];
}

Hessian::Hessian(MatrixView<const double> sum, MatrixView<const float> open, Index tokens) : Hessian(open.cols) {
    check(sum.rows == 1 && sum.cols == cols_ * (cols_ + 1) / 2, "a sum of " + std::to_string(sum.cols) + " numbers is not the lower triangle of " + std::to_string(cols_) + " columns");
    check(open.rows < panel_tokens && open.rows <= tokens, "an open panel of " + std::to_string(open.rows) + " tokens does not fit " + std::to_string(tokens) + " in all");
    update(open, 1);
    if (tokens > open.rows) make_room();
    for (Index r = 0; r < cols_ && tokens > open.rows; ++r) std::copy_n(sum.data + r * (r + 1) / 2, r + 1, sum_.data() + r * cols_);
    tokens_ = tokens;
}

void Hessian::matrix(MatrixView<double> out, int threads) const {
    check(out.rows == cols_ && out.cols == cols_, "hessian matrix: out has another shape");
    const std::lock_guard lock(mutex_);
    const double divisor = static_cast<double>(std::max<Index>(tokens(), 1));
    const MatrixView<const double> sum{sum_.data(), cols_, cols_, cols_};
    if (!sum_.empty() && panel_tokens_ == 0) return mirror_lower(sum, divisor, out, threads);
    parallel_for_ranges(cols_, block, threads, [&](Index first, Index last) {
        for (Index r = first; r < last; ++r)  // whole blocks, as the products are added
            if (sum_.empty())
                std::fill_n(out.row(r), last, 0.0);
            else
                std::copy_n(sum.row(r), last, out.row(r));
    });
    // The panel under way goes to the copy: there is no third matrix.
    if (panel_tokens_ > 0) add_products(panel_.data(), 1, out, threads);
    mirror_lower(out, divisor, out, threads);
}

}  // namespace mrgptq
