#include "gptq/outputs.h"

#include <algorithm>

#include "base/parallel.h"

namespace mrgptq {

template <class Real>
void owed(const Factor& outputs, Index begin, Index end, MatrixView<const float> errors, MatrixView<Real> out, int threads) {
    constexpr Index strip = 64, panel = 256;  // columns that one thread takes, rows widened to float64 at a time
    const Index count = end - begin, rows = outputs.cols(), n = errors.cols;
    const Columns<double>& unit = outputs.unit();
    const auto own = unit.block(begin, begin, count, count).template triangularView<Eigen::UnitLower>();
    parallel_for_ranges(n, strip, threads, [&](Index left, Index right) {
        const Index width = right - left;
        Columns<double> sum = Columns<double>::Zero(width, count), wide(width, panel);  // transposed: a row of errors is a column
        for (Index first = end; first < rows; first += panel) {
            const Index here = std::min(panel, rows - first);
            for (Index r = 0; r < here; ++r)
                for (Index c = 0; c < width; ++c) wide(c, r) = static_cast<double>(errors.row(first + r)[left + c]);
            sum.noalias() += wide.leftCols(here) * unit.block(first, begin, here, count);
        }
        own.template solveInPlace<Eigen::OnTheRight>(sum);
        for (Index r = 0; r < count; ++r)
            for (Index c = 0; c < width; ++c) out.row(r)[left + c] = static_cast<Real>(sum(c, r));
    });
}

template void owed<float>(const Factor&, Index, Index, MatrixView<const float>, MatrixView<float>, int);
template void owed<double>(const Factor&, Index, Index, MatrixView<const float>, MatrixView<double>, int);

}  // namespace mrgptq
