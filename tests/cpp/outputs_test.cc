// Coupled rows: what a block owes against the triangular system written out, the coupled solve against blocks solved by hand.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "codecs/codec.h"
#include "gptq/outputs.h"
#include "gptq/solver.h"
#include "matrices.h"
#include "refusal.h"

namespace mrgptq {
namespace {

using testing::contiguous, testing::expect_refused, testing::Layout, testing::layouts, testing::Matrix, testing::random_matrix, testing::random_second_moment, testing::thread_counts;

constexpr float nan = std::numeric_limits<float>::quiet_NaN();
const bool blocking_fixed = (fix_eigen_blocking(), true);  // as the module does when it is loaded

TEST(RowBlock, IsAThirtySecondInSixteens) {
    EXPECT_EQ(row_block(1), 16);
    EXPECT_EQ(row_block(512), 16);
    EXPECT_EQ(row_block(513), 32);
    EXPECT_EQ(row_block(28672), 896);
    for (Index rows = 1; rows < 3000; ++rows) EXPECT_LE((rows + row_block(rows) - 1) / row_block(rows), 32);
}

TEST(Owed, SolvesTheTriangularSystemOfTheFactor) {
    const Index rows = 300, cols = 150, begin = 9, end = 26;  // two panels of rows, three strips of columns, the last one short
    const Factor outputs(random_second_moment(rows).view(), Order::activation, 0.05);
    ASSERT_TRUE(outputs.usable());
    Matrix<float> errors(rows, cols, contiguous, nan);
    const Matrix<float> some = random_matrix(rows, cols, 5);
    for (Index r = end; r < rows; ++r)
        for (Index c = 0; c < cols; ++c) errors(r, c) = some(r, c);  // those before `end` are not known yet, and NaN
    Matrix<double> expected(end - begin, cols), magnitude(end - begin, cols);
    // U_BBᵀ M = U_DBᵀ E_D from the last row up: row i of U_BBᵀ has ones at i and U(k, i) at the k above it.
    for (Index i = end - begin - 1; i >= 0; --i)
        for (Index c = 0; c < cols; ++c) {
            long double sum = 0;
            for (Index k = end; k < rows; ++k) {
                sum += static_cast<long double>(outputs.unit()(k, begin + i)) * errors(k, c);
                magnitude(i, c) += std::fabs(outputs.unit()(k, begin + i) * errors(k, c));
            }
            for (Index k = i + 1; k < end - begin; ++k) {
                sum -= static_cast<long double>(outputs.unit()(begin + k, begin + i)) * expected(k, c);
                magnitude(i, c) += std::fabs(outputs.unit()(begin + k, begin + i)) * magnitude(k, c);
            }
            expected(i, c) = static_cast<double>(sum);
        }
    Matrix<double> one(end - begin, cols);
    owed<double>(outputs, begin, end, errors.view(), one.view(), 1);
    for (Index i = 0; i < end - begin; ++i)
        // Sums of at most `rows` products, and a substitution through at most as many rows, each rounded relative to its terms' magnitudes.
        for (Index c = 0; c < cols; ++c) EXPECT_LE(std::fabs(one(i, c) - expected(i, c)), 4 * rows * 0x1p-53 * magnitude(i, c)) << i << ' ' << c;
    for (const int threads : thread_counts)
        for (const Layout layout : layouts) {
            const Matrix<float> laid(errors, layout, nan);
            Matrix<double> out(end - begin, cols, layout, 7);
            owed<double>(outputs, begin, end, laid.view(), out.view(), threads);
            EXPECT_EQ(Matrix<double>(out, contiguous), one);
            EXPECT_TRUE(out.padding_untouched());
            Matrix<float> narrow(end - begin, cols);
            owed<float>(outputs, begin, end, laid.view(), narrow.view(), threads);
            for (Index c = 0; c < cols; ++c) EXPECT_EQ(narrow(3, c), static_cast<float>(one(3, c)));
        }
}

struct Problem {
    const char* format;
    Index group_size;
    Precision precision;
};

class Coupled : public ::testing::TestWithParam<Problem> {
protected:
    const Problem p = GetParam();
    const Index rows = 53, cols = 160;  // blocks of 16, 16, 16 and 5 rows; two blocks of columns
    const Matrix<float> weight = random_matrix(rows, cols);
    const Factor factor{random_second_moment(cols).view(), Order::group, 0.01, p.group_size};
    const Factor outputs{random_second_moment(rows, 8).view(), Order::activation, 0.05};
    const SolverOptions options{p.precision, true, MxRule::even, 2, true};
    const float tensor_scale = p.group_size == 16 ? 50.0f : 1.0f;
};

INSTANTIATE_TEST_SUITE_P(Formats, Coupled,
                         ::testing::Values(Problem{"nvfp4", 16, Precision::float32}, Problem{"nvfp4", 16, Precision::float64}, Problem{"mxfp4", 32, Precision::float32},
                                           Problem{"mxfp4", 32, Precision::float64}),
                         [](const auto& info) { return std::string(info.param.format) + (info.param.precision == Precision::float32 ? "InFloat32" : "InFloat64"); });

TEST_P(Coupled, BlocksAreSolvedOneAfterAnotherTowardsWhatTheyOwe) {
    Matrix<std::uint8_t> scales(rows, cols / p.group_size), codes(rows, cols / 2);
    const SolverResult result = solve(p.format, weight.view(), scales.view(), tensor_scale, factor, &outputs, options, codes.view(), 1);
    ASSERT_EQ(result.losses.size(), 3u);
    EXPECT_LE(result.losses[2], result.losses[1]);
    Matrix<float> values(rows, cols), errors(rows, cols, contiguous, nan);
    dequantize(p.format, codes.view(), scales.view(), tensor_scale, values.view(), 1);
    std::vector<double> losses(3);
    Index blocks = 0, apart = 0;
    for (Index end = rows; end > 0; end = std::max<Index>(end - 16, 0), ++blocks) {
        const Index begin = std::max<Index>(end - 16, 0);
        Matrix<double> m(end - begin, cols);
        owed<double>(outputs, begin, end, errors.view(), m.view(), 1);
        Matrix<float> target(end - begin, cols);
        for (Index i = 0; i < end - begin; ++i)
            for (Index c = 0; c < cols; ++c) {
                const Index row = outputs.column(begin + i);
                target(i, c) = static_cast<float>(m(i, c) + weight(row, c));  // float64 in the solver: what lies beside a tie may part
                errors(begin + i, c) = weight(row, c) - values(row, c);
            }
        Matrix<std::uint8_t> own_scales(end - begin, cols / p.group_size), own_codes(end - begin, cols / 2);
        const SolverResult own = solve(p.format, target.view(), own_scales.view(), tensor_scale, factor, nullptr, options, own_codes.view(), 1);
        for (std::size_t k = 0; k < 3; ++k) losses[k] += own.losses[std::min(k, own.losses.size() - 1)];
        for (Index i = 0; i < end - begin; ++i) {
            const Index row = outputs.column(begin + i);
            apart += !std::equal(own_codes.view().row(i), own_codes.view().row(i) + cols / 2, codes.view().row(row)) ||
                     !std::equal(own_scales.view().row(i), own_scales.view().row(i) + cols / p.group_size, scales.view().row(row));
        }
    }
    EXPECT_EQ(blocks, 4);
    EXPECT_LE(apart, 2);
    // A row that parts at a tie changes its loss little, and there are few.
    for (std::size_t k = 0; k < 3; ++k) EXPECT_NEAR(losses[k], result.losses[k], 1e-2 * losses[k]);
}

TEST_P(Coupled, LayoutAndThreadsDoNotReachTheBytes) {
    Matrix<std::uint8_t> scales(rows, cols / p.group_size), codes(rows, cols / 2);
    const SolverResult one = solve(p.format, weight.view(), scales.view(), tensor_scale, factor, &outputs, options, codes.view(), 1);
    for (const int threads : thread_counts)
        for (const Layout layout : layouts) {
            const Matrix<float> w(weight, layout, nan);
            Matrix<std::uint8_t> s(rows, cols / p.group_size, layout, 0xFF), q(rows, cols / 2, layout, 0xEE);
            const SolverResult same = solve(p.format, w.view(), s.view(), tensor_scale, factor, &outputs, options, q.view(), threads);
            EXPECT_EQ(Matrix<std::uint8_t>(q, contiguous), codes);
            EXPECT_EQ(Matrix<std::uint8_t>(s, contiguous), scales);
            EXPECT_EQ(same.losses, one.losses);
            EXPECT_TRUE(q.padding_untouched() && s.padding_untouched());
        }
}

TEST_P(Coupled, AFactorOfAnotherSizeOrNoneIsRefused) {
    Matrix<std::uint8_t> scales(rows, cols / p.group_size), codes(rows, cols / 2);
    const auto run = [&](const Factor& other) { solve(p.format, weight.view(), scales.view(), tensor_scale, factor, &other, options, codes.view(), 1); };
    expect_refused("weight has 53 rows", [&] { run(factor); });
    Matrix<double> indefinite(rows, rows);
    for (Index i = 0; i < rows; ++i) indefinite(i, i) = 1, indefinite(i, rows - 1 - i) = i == rows - 1 - i ? 1 : 100;
    expect_refused("not usable", [&] { run(Factor(indefinite.view(), Order::activation, 0.05)); });
}

}  // namespace
}  // namespace mrgptq
