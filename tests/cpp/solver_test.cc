// The solver over every layout and number of threads.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "codecs/codec.h"
#include "gptq/factor.h"
#include "gptq/solver.h"
#include "matrices.h"
#include "refusal.h"

namespace mrgptq {
namespace {

using testing::expect_refused, testing::Layout, testing::layouts, testing::Matrix, testing::naive_quadratic_form, testing::random_matrix, testing::random_second_moment, testing::thread_counts;

constexpr double nan = std::numeric_limits<double>::quiet_NaN();
const bool blocking_fixed = (fix_eigen_blocking(), true);  // as the module does when it is loaded

bool same_bits(const std::vector<double>& a, const std::vector<double>& b) {
    return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin(), [](double x, double y) { return std::bit_cast<std::uint64_t>(x) == std::bit_cast<std::uint64_t>(y); });
}

// ---- solve

struct Problem {
    const char* format;
    Index group_size;
    Precision precision;
};

class Solve : public ::testing::TestWithParam<Problem> {
protected:
    static constexpr Index rows = 150, cols = 288;  // four tiles of 32 rows and a rest, three blocks of 128 columns
    const Problem p = GetParam();
    const Matrix<float> weight = random_matrix(rows, cols);
    const float tensor_scale = p.group_size == 16 ? 100.0f : 1.0f;
    Matrix<std::uint8_t> scales{rows, cols / p.group_size}, codes{rows, cols / 2};

    const SolverOptions plain{.precision = p.precision};

    void SetUp() override { find_scales(p.format, ScaleRule{}, weight.view(), tensor_scale, MatrixView<const double>{nullptr, 0, 0, 0}, scales.view(), 1); }

    // W - Ŵ in float64, by column of the weight.
    Matrix<double> error_of(const Matrix<std::uint8_t>& q, const Matrix<std::uint8_t>& s) const {
        Matrix<float> values(rows, cols);
        dequantize(p.format, q.view(), s.view(), tensor_scale, values.view(), 1);
        Matrix<double> error(rows, cols);
        for (Index r = 0; r < rows; ++r)
            for (Index c = 0; c < cols; ++c) error(r, c) = static_cast<double>(weight(r, c)) - values(r, c);
        return error;
    }

    // H + λI by the definition, λ being 0.01 of the live diagonal's mean and the weight of a dead column likewise.
    static Matrix<double> damped(const Matrix<double>& h) {
        double trace = 0;
        Index live = 0;
        for (Index i = 0; i < cols; ++i) trace += h(i, i), live += h(i, i) != 0;
        Matrix<double> r = h;
        for (Index i = 0; i < cols; ++i) r(i, i) = h(i, i) + 0.01 * trace / static_cast<double>(live);
        return r;
    }

    // How far the solver's Σ pivot (t - q)², where t - q = Σ unit * error, may lie from the quadratic form. In arithmetic of unit roundoff u the feedback of n terms (each error and each
    // entry of `unit` rounded as well) is off by (n + 4) u Σ |unit| |error|, t by u |t| and t - q by u of itself. Where scales are searched the squares are summed in that arithmetic
    // over the group, the pivots rounded to it: group_size + 4 more. The factor's own residual is (2 n + 8) 2^-53 of the product of magnitudes, see above.
    double loss_bound(const Factor& factor, const Matrix<double>& error) const {
        const double u = p.precision == Precision::float32 ? 0x1p-24 : 0x1p-53;
        double bound = 0;
        for (Index r = 0; r < rows; ++r)
            for (Index i = 0; i < cols; ++i) {
                double residual = 0, magnitude = 0;
                for (Index k = i; k < cols; ++k) {
                    const double unit = k == i ? 1 : factor.unit()(k, i);
                    residual += unit * error(r, factor.column(k));
                    magnitude += std::fabs(unit * error(r, factor.column(k)));
                }
                const double value = weight(r, factor.column(i)) - error(r, factor.column(i));
                const double off = u * ((cols + 4) * magnitude + 2 * (std::fabs(value) + std::fabs(residual)));
                bound += factor.pivots()[i] * (2 * std::fabs(residual) * off + off * off + static_cast<double>(p.group_size + 4) * u * residual * residual + (4 * cols + 16) * 0x1p-53 * magnitude * magnitude);
            }
        return bound;
    }
};

INSTANTIATE_TEST_SUITE_P(Formats, Solve,
                         ::testing::Values(Problem{"nvfp4", 16, Precision::float32}, Problem{"nvfp4", 16, Precision::float64}, Problem{"mxfp4", 32, Precision::float32},
                                           Problem{"mxfp4", 32, Precision::float64}),
                         [](const auto& info) { return std::string(info.param.format) + (info.param.precision == Precision::float32 ? "InFloat32" : "InFloat64"); });

TEST_P(Solve, LayoutAndThreadsDoNotReachTheBytesAndTheLossIsTheQuadraticForm) {
    Matrix<double> h = random_second_moment(cols);
    for (Index i = 0; i < cols; ++i) h(17, i) = h(i, 17) = 0;  // one dead column
    const Factor factor(h.view(), Order::activation, 0.01);
    ASSERT_TRUE(factor.usable());
    const Matrix<std::uint8_t> given = scales;
    const SolverResult result = solve(p.format, weight.view(), scales.view(), tensor_scale, factor, nullptr, plain, codes.view(), 1);
    EXPECT_EQ(scales, given);
    ASSERT_EQ(result.losses.size(), 1u);
    for (const Layout layout : layouts)
        for (const int threads : thread_counts) {
            const Matrix<float> w(weight, layout, static_cast<float>(nan));
            Matrix<std::uint8_t> s(scales, layout, 0xFF);  // NaN in either format
            Matrix<std::uint8_t> q(rows, cols / 2, layout, 0xEE);
            const SolverResult same = solve(p.format, w.view(), s.view(), tensor_scale, factor, nullptr, plain, q.view(), threads);
            EXPECT_EQ(q, codes);
            EXPECT_EQ(s, given);
            EXPECT_TRUE(same_bits(same.losses, result.losses));
            EXPECT_TRUE(q.padding_untouched() && s.padding_untouched());
        }
    const Matrix<double> error = error_of(codes, scales);
    const double bound = loss_bound(factor, error);
    EXPECT_LE(std::fabs(result.losses[0] - naive_quadratic_form(error, damped(h), rows, cols)), bound);
    EXPECT_LT(bound, 0.01 * result.losses[0]);  // else this would prove nothing
}

TEST_P(Solve, SearchedScalesAndRefinementAnswerAlikeWhateverTheLayoutAndTheThreads) {
    Matrix<double> h = random_second_moment(cols);
    for (Index i = 0; i < cols; ++i) h(17, i) = h(i, 17) = 0;
    const Factor factor(h.view(), Order::group, 0.01, p.group_size);
    ASSERT_TRUE(factor.usable());
    const double given_loss = solve(p.format, weight.view(), Matrix<std::uint8_t>(scales).view(), tensor_scale, factor, nullptr, plain, codes.view(), 1).losses[0];
    for (const bool search : {false, true}) {
        std::vector<Matrix<double>> errors;
        std::vector<double> losses;
        for (int rounds = 0; rounds <= 3; ++rounds) {
            const SolverOptions options{p.precision, search, MxRule::even, rounds, true};
            Matrix<std::uint8_t> best(scales), q(rows, cols / 2);
            const SolverResult result = solve(p.format, weight.view(), best.view(), tensor_scale, factor, nullptr, options, q.view(), 1);
            ASSERT_EQ(result.losses.size(), static_cast<std::size_t>(rounds) + 1);  // on a matrix like this every round finds something
            EXPECT_TRUE(same_bits(losses, {result.losses.begin(), result.losses.end() - 1}));  // a further round changes nothing about those before it
            losses = result.losses;
            errors.push_back(error_of(q, best));
            for (const Layout layout : layouts)
                for (const int threads : {1, 3}) {
                    const Matrix<float> w(weight, layout, static_cast<float>(nan));
                    Matrix<std::uint8_t> s(scales, layout, 0xFF), c(rows, cols / 2, layout, 0xEE);
                    if (search) std::fill_n(s.view().row(5), cols / p.group_size, std::uint8_t{0xFF});  // what stands there before a search is not read
                    const SolverResult same = solve(p.format, w.view(), s.view(), tensor_scale, factor, nullptr, options, c.view(), threads);
                    EXPECT_EQ(s, best);
                    EXPECT_EQ(c, q);
                    EXPECT_TRUE(same_bits(same.losses, losses));
                    EXPECT_TRUE(s.padding_untouched() && c.padding_untouched());
                }
        }
        // The losses are those of the codes and scales given back. A round's fall is a sum of d · (2 P + d R) over groups, d being the change of a group's errors e: P = e R of n products, in each
        // later round a sum for every group and a change of e itself, two group updates and a few operations, each of relative error u, m of them in all; |d| is below |e| + |e'|, what P was
        // made of adds up to the history, and P counts twice.
        const Matrix<double> r = damped(h);
        const double u = p.precision == Precision::float32 ? 0x1p-24 : 0x1p-53;
        double bound = loss_bound(factor, errors[0]);
        EXPECT_LE(std::fabs(losses[0] - naive_quadratic_form(errors[0], r, rows, cols)), bound);
        Matrix<double> history(rows, cols), magnitudes(cols, cols);
        for (Index row = 0; row < rows; ++row)
            for (Index c = 0; c < cols; ++c) history(row, c) = std::fabs(errors[0](row, c));
        for (Index i = 0; i < cols; ++i)
            for (Index j = 0; j < cols; ++j) magnitudes(i, j) = std::fabs(r(i, j));
        for (std::size_t k = 1; k < losses.size(); ++k) {
            const double m = static_cast<double>(cols + static_cast<Index>(k - 1) * (cols / p.group_size + 1) + 2 * p.group_size + 8) * u;
            for (Index row = 0; row < rows; ++row)
                for (Index c = 0; c < cols; ++c) history(row, c) += std::fabs(errors[k](row, c) - errors[k - 1](row, c));
            for (Index row = 0; row < rows; ++row)
                for (Index i = 0; i < cols; ++i) {
                    double meets = 0;
                    for (Index j = 0; j < cols; ++j) meets += magnitudes(i, j) * history(row, j);
                    bound += 4 * m / (1 - m) * (std::fabs(errors[k - 1](row, i)) + std::fabs(errors[k](row, i))) * meets;
                }
            EXPECT_LE(std::fabs(losses[k] - naive_quadratic_form(errors[k], r, rows, cols)), bound);
            EXPECT_LT(losses[k], losses[k - 1]);
        }
        EXPECT_LT(bound, (p.precision == Precision::float32 ? 0.2 : 1e-9) * losses.back());  // else this would prove nothing; in float32 no more can be proved of sums that cancel
        EXPECT_TRUE(search ? losses[0] < given_loss : losses[0] == given_loss);  // what the search is for: absmax is among its candidates, and others win
    }
}

TEST_P(Solve, RoundsEndWhereNothingMovesAnyMore) {
    // Without correlations the nearest values under the best of all scales tried cannot be mended, group by group.
    Matrix<double> h(cols, cols);
    for (Index i = 0; i < cols; ++i) h(i, i) = 1;
    const Factor factor(h.view(), Order::group, 0.01, p.group_size);
    Matrix<std::uint8_t> refined(rows, cols / p.group_size), again(rows, cols / 2);
    const SolverResult one = solve(p.format, weight.view(), scales.view(), tensor_scale, factor, nullptr, {p.precision, true, MxRule::even, 0}, codes.view(), 1);
    const SolverResult many = solve(p.format, weight.view(), refined.view(), tensor_scale, factor, nullptr, {p.precision, true, MxRule::even, 5, true}, again.view(), 2);
    EXPECT_TRUE(same_bits(many.losses, one.losses));
    EXPECT_EQ(refined, scales);
    EXPECT_EQ(again, codes);
}

TEST_P(Solve, WithoutAnyInputItRoundsPlainly) {
    const Factor factor(Matrix<double>(cols, cols).view(), Order::natural, 0.01);
    solve(p.format, weight.view(), scales.view(), tensor_scale, factor, nullptr, plain, codes.view(), 2);
    Matrix<std::uint8_t> rounded(rows, cols / 2);
    encode(p.format, weight.view(), scales.view(), tensor_scale, rounded.view(), 1);
    EXPECT_EQ(codes, rounded);
}

TEST_P(Solve, RefusesShapesThatDoNotFit) {
    const Factor factor(random_second_moment(cols).view(), Order::natural, 0.01), narrow(random_second_moment(32).view(), Order::natural, 0.01);
    Matrix<std::uint8_t> more_scales(rows, cols / p.group_size + 1), fewer_codes(rows - 1, cols / 2);
    const auto run = [&](const Factor& f, Matrix<std::uint8_t>& s, Matrix<std::uint8_t>& q) { solve(p.format, weight.view(), s.view(), 1, f, nullptr, plain, q.view(), 1); };
    expect_refused("the factor has 32 columns; weight has 288", [&] { run(narrow, scales, codes); });
    expect_refused("scales do not have one entry for each group", [&] { run(factor, more_scales, codes); });
    expect_refused("codes do not have half a byte for each weight", [&] { run(factor, scales, fewer_codes); });
}

TEST_P(Solve, SearchAndRoundsNeedAFactorInGroupOrder) {
    const Matrix<double> h = random_second_moment(cols);
    const auto run = [&](Order order, const SolverOptions& options) { solve(p.format, weight.view(), scales.view(), tensor_scale, Factor(h.view(), order, 0.01, p.group_size), nullptr, options, codes.view(), 1); };
    for (const Order order : {Order::natural, Order::activation})
        for (const SolverOptions& options : {SolverOptions{p.precision, true, MxRule::even, 0}, SolverOptions{p.precision, false, MxRule::even, 1}})
            expect_refused("searched scales and refinement rounds need a factor in group order", [&] { run(order, options); });
    expect_refused("rounds is -1; it must be 0 or more", [&] { run(Order::group, {p.precision, false, MxRule::even, -1}); });
}

}  // namespace
}  // namespace mrgptq
