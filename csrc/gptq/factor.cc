#include "gptq/factor.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>
#include <string>

#include "base/check.h"
#include "base/parallel.h"
#include "linalg/cholesky.h"

namespace mrgptq {

Order order_named(std::string_view name) {
    if (name == "natural") return Order::natural;
    if (name == "activation") return Order::activation;
    check(name == "group", "unknown order \"" + std::string(name) + "\"; known: natural, activation, group");
    return Order::group;
}

Factor::Factor(MatrixView<const double> h, Order order, double damping, Index group_size, int threads) : order_(static_cast<std::size_t>(h.cols)), damping_(damping), kind_(order) {
    check(h.rows == h.cols, "hessian has shape (" + std::to_string(h.rows) + ", " + std::to_string(h.cols) + "); it must be square");
    check(damping >= 0, "damping is " + std::to_string(damping) + "; it must be 0 or more");
    constexpr Index grain = 16;  // columns of the factor that a thread fills at a time
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

    const std::vector<Index> columns(order_.rbegin(), order_.rend());  // by position
    std::vector<Index> dead;  // positions
    for (Index p = 0; p < n; ++p)
        if (h.row(column(p))[column(p)] == 0) dead.push_back(p);
    storage_ = Buffer<double>((n + line) * n);
    Eigen::Map<Columns<double>, Eigen::Unaligned, Eigen::OuterStride<>> unit(storage_.data(), n, n, Eigen::OuterStride<>(n + line));
    for (;; damping_ = damping_ == 0 ? 0.01 : damping_ * 10) {
        parallel_for_ranges(n, grain, threads, [&](Index first, Index last) {
            for (Index p = first; p < last; ++p) {
                const double* row = h.row(column(p));
                double* mine = unit.col(p).data();
                if (row[column(p)] == 0) {  // stands alone
                    std::fill_n(mine, n, 0.0);
                    mine[p] = dead_weight_;
                    continue;
                }
                const double* next = h.row(column(std::min(p + 1, n - 1)));  // in no order that a processor guesses
                for (Index start = 0; start < n; start += line) {
                    __builtin_prefetch(next + start);
                    for (Index k = start; k < std::min(start + line, n); ++k) mine[k] = row[columns[static_cast<std::size_t>(k)]];
                }
                for (const Index k : dead) mine[k] = 0;
                mine[p] += damping_ * mean;
            }
        });
        diagonal_ = unit.diagonal();
        lambda_ = damping_ * mean;
        const bool factorized = factorize(unit.data(), n, unit.outerStride(), threads);
        pivots_ = unit.diagonal().array().square();
        // A pivot that has lost all its digits to cancellation is noise, whatever its sign, and dividing by it would make the feedback noise too.
        const double lost = static_cast<double>(n) * std::numeric_limits<double>::epsilon();
        usable_ = factorized && (pivots_.array() > lost * diagonal_.array()).all();
        const double next = damping_ == 0 ? 0.01 : damping_ * 10;
        // 1 + 1e-9: ten times 0.1 counts as 1.
        if (usable_ || next > 1 + 1e-9) break;
    }
    if (!usable_) return;
    parallel_for_ranges(n, grain, threads, [&](Index first, Index last) {
        for (Index p = first; p < last; ++p) unit.col(p).tail(n - p) /= unit(p, p);
    });
}

}  // namespace mrgptq
