#include "gptq/factor.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>
#include <utility>

#include "base/check.h"
#include "base/parallel.h"
#include "linalg/cholesky.h"
#include "linalg/symmetric.h"

namespace mrgptq {

namespace {

double raised(double damping) noexcept { return damping == 0 ? 0.01 : damping * 10; }

// The greatest power of two whose square is no greater than a positive number; 1 for another.
double power_below_root(double x) noexcept { return x > 0 ? std::ldexp(1.0, std::ilogb(x) >> 1) : 1; }

// Least share of its diagonal at which a pivot is left to float32 products. Their chains, rounded factors and all, err by at most 131 * 2^-24 of |L| |L|ᵀ, whose element (i, j) is at most the root
// of R[i,i] R[j,j]: so this pivot is known to an eighth at worst, and in general, errors being of either sign, to a hundredth. A Hessian whose products are float32 itself is not known better.
constexpr double blurred = 8 * 131 * 0x1p-24;

constexpr Index grain = 16;  // columns that a thread works off at a time

Buffer<double> copy_of(MatrixView<const double> h) {
    const Index stride = Factor::row_stride(h.cols);
    Buffer<double> copy(stride * h.rows);
    for (Index r = 0; r < h.rows; ++r) std::copy_n(h.row(r), h.cols, copy.data() + r * stride);
    return copy;
}

}  // namespace

Order order_named(std::string_view name) {
    if (name == "natural") return Order::natural;
    if (name == "activation") return Order::activation;
    check(name == "group", "unknown order \"" + std::string(name) + "\"; known: natural, activation, group");
    return Order::group;
}

Precision precision_named(std::string_view name) {
    if (name == "float32") return Precision::float32;
    check(name == "float64", "unknown precision \"" + std::string(name) + "\"; known: float32, float64");
    return Precision::float64;
}

Factor::Factor(MatrixView<const double> h, Order order, double damping, Index group_size, Precision precision, int threads) : Factor(copy_of(h), {nullptr, h.rows, h.cols, row_stride(h.cols)}, order, damping, group_size, precision, threads) {}

Factor::Factor(Buffer<double> own, MatrixView<double> h, Order order, double damping, Index group_size, Precision precision, int threads)
    : order_(static_cast<std::size_t>(h.cols)), damping_(damping), kind_(order), own_(std::move(own)), room_(h), undamped_(h.cols), diagonal_(h.cols) {
    check(h.rows == h.cols, "hessian has shape (" + std::to_string(h.rows) + ", " + std::to_string(h.cols) + "); it must be square");
    check(damping >= 0, "damping is " + std::to_string(damping) + "; it must be 0 or more");
    const Index cols = h.cols;
    check(group_size > 0 && cols % group_size == 0, "hessian has " + std::to_string(cols) + " columns; groups of " + std::to_string(group_size) + " do not divide them");
    if (own_.data() != nullptr) room_.data = own_.data();
    double trace = 0;
    for (Index c = 0; c < cols; ++c) {
        const double d = room_.row(c)[c];
        dead_columns_ += d == 0;
        trace += d;
    }
    const double mean = dead_columns_ < cols ? trace / static_cast<double>(cols - dead_columns_) : 0;
    if (mean > 0) dead_weight_ = std::max(damping, 0.01) * mean;
    set_order(group_size);
    sort_columns(threads);

    for (bool again = false;; damping_ = raised(damping_)) {
        lambda_ = damping_ * mean;
        for (Index p = 0; p < cols; ++p) diagonal_[p] = undamped_[p] == 0 ? dead_weight_ : undamped_[p] + lambda_;
        const auto factorized = [&]<class Real>(Real, double least_pivot) {
            // What an attempt has left above the diagonal is H once more, which is kept below.
            if (std::exchange(again, true)) mirror_lower(room_, 1, room_, threads);
            return factorize_columns<Real>(least_pivot, threads);
        };
        usable_ = (precision == Precision::float32 && factorized(float{}, blurred)) || factorized(double{}, static_cast<double>(cols) * std::numeric_limits<double>::epsilon());
        // 1 + 1e-9: ten times 0.1 counts as 1.
        if (usable_ || raised(damping_) > 1 + 1e-9) break;
    }
}

void Factor::set_order(Index group_size) {
    const Index n = cols();
    std::iota(order_.begin(), order_.end(), Index{0});
    std::vector<double> diagonal;
    for (Index c = 0; c < n; ++c) diagonal.push_back(room_.row(c)[c]);
    // Stable, so that equal diagonals keep their order on every machine.
    const auto descending = [](auto begin, auto end, const std::vector<double>& by) {
        std::stable_sort(begin, end, [&](Index a, Index b) { return by[static_cast<std::size_t>(a)] > by[static_cast<std::size_t>(b)]; });
    };
    if (kind_ == Order::activation) descending(order_.begin(), order_.end(), diagonal);
    if (kind_ == Order::group) {
        std::vector<double> sums(static_cast<std::size_t>(n / group_size), 0.0);
        for (Index c = 0; c < n; ++c) sums[static_cast<std::size_t>(c / group_size)] += diagonal[static_cast<std::size_t>(c)];
        std::vector<Index> groups(sums.size());
        std::iota(groups.begin(), groups.end(), Index{0});
        descending(groups.begin(), groups.end(), sums);
        auto place = order_.begin();
        for (const Index g : groups) {
            std::iota(place, place + group_size, g * group_size);
            descending(place, place + group_size, diagonal);
            place += group_size;
        }
    }
    columns_.assign(order_.rbegin(), order_.rend());
}

// Rows and columns of H to their positions, where they lie; what is dead, zero.
void Factor::sort_columns(int threads) {
    constexpr Index piece = 256;  // columns that travel together from row to row
    const Index n = cols();
    const MatrixView<double> h = room_;
    parallel_for_ranges(n, grain, threads, [&](Index first, Index last) {
        std::vector<double> sorted(static_cast<std::size_t>(n));
        for (Index r = first; r < last; ++r) {
            for (Index p = 0; p < n; ++p) sorted[static_cast<std::size_t>(p)] = h.row(r)[column(p)];
            std::copy(sorted.begin(), sorted.end(), h.row(r));
        }
    });
    std::vector<Index> firsts;  // of the cycles in which rows change places
    std::vector<bool> seen(static_cast<std::size_t>(n));
    for (Index start = 0; start < n; ++start) {
        if (seen[static_cast<std::size_t>(start)] || column(start) == start) continue;
        firsts.push_back(start);
        for (Index p = start; !seen[static_cast<std::size_t>(p)]; p = column(p)) seen[static_cast<std::size_t>(p)] = true;
    }
    parallel_for_ranges(n, piece, threads, [&](Index begin, Index end) {
        std::array<double, piece> first;
        for (const Index start : firsts) {
            std::copy(h.row(start) + begin, h.row(start) + end, first.data());
            Index p = start;
            for (; column(p) != start; p = column(p)) std::copy(h.row(column(p)) + begin, h.row(column(p)) + end, h.row(p) + begin);
            std::copy_n(first.data(), end - begin, h.row(p) + begin);
        }
    });
    for (Index p = 0; p < n; ++p) undamped_[p] = h.row(p)[p];
    for (Index p = 0; p < n && dead_columns_ > 0; ++p)
        if (undamped_[p] == 0)
            for (Index k = 0; k < n; ++k) h.row(p)[k] = h.row(k)[p] = 0;
}

// The triangle that is to be the factor brought to a diagonal from one to four and factorised. False where a pivot is not above `least_pivot` of the diagonal it is left of.
template <class Real>
bool Factor::factorize_columns(double least_pivot, int threads) {
    const Index n = cols();
    Eigen::Map<Columns<double>, Eigen::Unaligned, Eigen::OuterStride<>> unit(room_.data, n, n, Eigen::OuterStride<>(room_.row_stride));
    const Eigen::ArrayXd roots = diagonal_.unaryExpr([](double d) { return power_below_root(d); }).array(), inverses = roots.inverse();
    parallel_for_ranges(n, grain, threads, [&](Index first, Index last) {
        for (Index p = first; p < last; ++p) {
            unit(p, p) = diagonal_[p];
            unit.col(p).tail(n - p).array() *= inverses.tail(n - p);
            unit.col(p).tail(n - p) *= inverses[p];
        }
    });
    const bool factorized = factorize<Real>(unit.data(), n, unit.outerStride(), threads);
    pivots_ = (unit.diagonal().array() * roots).square();
    // A pivot that has lost its digits to cancellation is noise, whatever its sign, and dividing by it would make the feedback noise too.
    if (!factorized || !(pivots_.array() > least_pivot * diagonal_.array()).all()) return false;
    parallel_for_ranges(n, grain, threads, [&](Index first, Index last) {
        for (Index p = first; p < last; ++p) unit.col(p).tail(n - p).array() = unit.col(p).tail(n - p).array() / unit(p, p) * roots.tail(n - p) * inverses[p];
    });
    return true;
}

}  // namespace mrgptq
