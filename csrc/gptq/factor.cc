#include "gptq/factor.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <string>

#include "base/check.h"

namespace mrgptq {

Order order_named(std::string_view name) {
    if (name == "natural") return Order::natural;
    check(name == "activation", "unknown order \"" + std::string(name) + "\"; known: natural, activation");
    return Order::activation;
}

Factor::Factor(MatrixView<const double> h, Order order, double damping) : order_(static_cast<std::size_t>(h.cols)), damping_(damping) {
    check(h.rows == h.cols, "hessian has shape (" + std::to_string(h.rows) + ", " + std::to_string(h.cols) + "); it must be square");
    check(damping >= 0, "damping is " + std::to_string(damping) + "; it must be 0 or more");
    const Index n = h.cols;
    std::iota(order_.begin(), order_.end(), Index{0});
    if (order == Order::activation) {
        // Stable, so that equal diagonals keep their order on every machine.
        std::stable_sort(order_.begin(), order_.end(), [&](Index a, Index b) { return h.row(a)[a] > h.row(b)[b]; });
    }

    double trace = 0;
    for (Index c = 0; c < n; ++c) {
        const double d = h.row(c)[c];
        dead_columns_ += d == 0;
        trace += d;
    }
    const double mean = dead_columns_ < n ? trace / static_cast<double>(n - dead_columns_) : 0;

    for (;; damping_ = damping_ == 0 ? 0.01 : damping_ * 10) {
        unit_.resize(n, n);
        for (Index p = 0; p < n; ++p) {
            const Index cp = column(p);
            const bool dead = h.row(cp)[cp] == 0;
            for (Index k = p; k < n; ++k) {
                const Index ck = column(k);
                unit_(k, p) = dead || h.row(ck)[ck] == 0 ? 0 : h.row(cp)[ck];
            }
            // A dead column stands alone behind a pivot of one.
            unit_(p, p) = dead ? 1 : unit_(p, p) + damping_ * mean;
        }
        const Eigen::VectorXd diagonal = unit_.diagonal();
        Eigen::LLT<Eigen::Ref<Columns<double>>> llt(unit_);
        pivots_ = unit_.diagonal().array().square();
        // A pivot that has lost all its digits to cancellation is noise, whatever its sign, and dividing by it would make the feedback noise too.
        const double lost = static_cast<double>(n) * std::numeric_limits<double>::epsilon();
        usable_ = llt.info() == Eigen::Success && (pivots_.array() > lost * diagonal.array()).all();
        const double next = damping_ == 0 ? 0.01 : damping_ * 10;
        // 1 + 1e-9: ten times 0.1 counts as 1.
        if (usable_ || next > 1 + 1e-9) break;
    }
    if (!usable_) return;
    for (Index p = 0; p < n; ++p) {
        unit_.col(p).tail(n - p) /= unit_(p, p);
        unit_.col(p).head(p).setZero();
    }
}

}  // namespace mrgptq
