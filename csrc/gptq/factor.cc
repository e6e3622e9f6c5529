#include "gptq/factor.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <string>

#include "base/check.h"
#include "base/parallel.h"
#include "linalg/cholesky.h"

namespace mrgptq {

namespace {

double raised(double damping) noexcept { return damping == 0 ? 0.01 : damping * 10; }

// The greatest power of two whose square is no greater than a positive number; 1 for another.
double power_below_root(double x) noexcept { return x > 0 ? std::ldexp(1.0, std::ilogb(x) >> 1) : 1; }

// Least share of its diagonal at which a pivot is left to float32 products. Their chains, rounded factors and all, err by at most 131 * 2^-24 of |L| |L|ᵀ, whose element (i, j) is at most the root
// of R[i,i] R[j,j]: so this pivot is known to an eighth at worst, and in general, errors being of either sign, to a hundredth. A Hessian whose products are float32 itself is not known better.
constexpr double blurred = 8 * 131 * 0x1p-24;

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

Factor::Factor(MatrixView<const double> h, Order order, double damping, Index group_size, Precision precision, int threads) : order_(static_cast<std::size_t>(h.cols)), damping_(damping), kind_(order) {
    check(h.rows == h.cols, "hessian has shape (" + std::to_string(h.rows) + ", " + std::to_string(h.cols) + "); it must be square");
    check(damping >= 0, "damping is " + std::to_string(damping) + "; it must be 0 or more");
    const Index n = h.cols;
    std::iota(order_.begin(), order_.end(), Index{0});
    check(group_size > 0 && n % group_size == 0, "hessian has " + std::to_string(n) + " columns; groups of " + std::to_string(group_size) + " do not divide them");
    // Stable, so that equal diagonals keep their order on every machine.
    const auto descending = [&](auto begin, auto end) { std::stable_sort(begin, end, [&](Index a, Index b) { return h.row(a)[a] > h.row(b)[b]; }); };
    if (order == Order::activation) descending(order_.begin(), order_.end());
    if (order == Order::group) {
        std::vector<double> sums(static_cast<std::size_t>(n / group_size), 0.0);
        for (Index c = 0; c < n; ++c) sums[static_cast<std::size_t>(c / group_size)] += h.row(c)[c];
        std::vector<Index> groups(sums.size());
        std::iota(groups.begin(), groups.end(), Index{0});
        std::stable_sort(groups.begin(), groups.end(), [&](Index a, Index b) { return sums[static_cast<std::size_t>(a)] > sums[static_cast<std::size_t>(b)]; });
        auto place = order_.begin();
        for (const Index g : groups) {
            std::iota(place, place + group_size, g * group_size);
            descending(place, place + group_size);
            place += group_size;
        }
    }

    double trace = 0;
    for (Index c = 0; c < n; ++c) {
        const double d = h.row(c)[c];
        dead_columns_ += d == 0;
        trace += d;
    }
    const double mean = dead_columns_ < n ? trace / static_cast<double>(n - dead_columns_) : 0;

    if (mean > 0) dead_weight_ = std::max(damping, 0.01) * mean;

    std::vector<Index> dead;  // positions
    for (Index p = 0; p < n; ++p)
        if (h.row(column(p))[column(p)] == 0) dead.push_back(p);
    storage_ = Buffer<double>((n + line) * n);
    diagonal_.resize(n);
    for (;; damping_ = raised(damping_)) {
        lambda_ = damping_ * mean;
        for (Index p = 0; p < n; ++p) {
            const double d = h.row(column(p))[column(p)];
            diagonal_[p] = d == 0 ? dead_weight_ : d + lambda_;
        }
        usable_ = (precision == Precision::float32 && factorize_columns<float>(h, dead, blurred, threads)) || factorize_columns<double>(h, dead, static_cast<double>(n) * std::numeric_limits<double>::epsilon(), threads);
        // 1 + 1e-9: ten times 0.1 counts as 1.
        if (usable_ || raised(damping_) > 1 + 1e-9) break;
    }
}

// R into the storage, its lower triangle brought to a diagonal from one to four and factorised there. False where a pivot is not above `least_pivot` of the diagonal it is left of.
template <class Real>
bool Factor::factorize_columns(MatrixView<const double> h, const std::vector<Index>& dead, double least_pivot, int threads) {
    constexpr Index grain = 16;  // columns that a thread works off at a time
    const Index n = cols();
    Eigen::Map<Columns<double>, Eigen::Unaligned, Eigen::OuterStride<>> unit(storage_.data(), n, n, Eigen::OuterStride<>(n + line));
    const std::vector<Index> columns(order_.rbegin(), order_.rend());  // by position
    const Eigen::ArrayXd roots = diagonal_.unaryExpr([](double d) { return power_below_root(d); }).array(), inverses = roots.inverse();
    parallel_for_ranges(n, grain, threads, [&](Index first, Index last) {
        for (Index p = first; p < last; ++p) {
            const double* row = h.row(column(p));
            auto mine = unit.col(p);
            if (row[column(p)] == 0) {  // stands alone
                mine.setZero();
            } else {
                const double* next = h.row(column(std::min(p + 1, n - 1)));  // in no order that a processor guesses
                for (Index start = 0; start < n; start += line) {
                    __builtin_prefetch(next + start);
                    for (Index k = start; k < std::min(start + line, n); ++k) mine[k] = row[columns[static_cast<std::size_t>(k)]];
                }
                for (const Index k : dead) mine[k] = 0;
            }
            mine[p] = diagonal_[p];
            mine.tail(n - p).array() *= inverses.tail(n - p);
            mine.tail(n - p) *= inverses[p];
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
