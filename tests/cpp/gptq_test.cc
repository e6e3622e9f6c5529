// Hessian, factor and solver over every layout and number of threads, and the cases in which a factor is hard or impossible to have.
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
#include "gptq/hessian.h"
#include "gptq/solver.h"
#include "matrices.h"
#include "refusal.h"

namespace mrgptq {
namespace {

using testing::contiguous, testing::expect_refused, testing::Layout, testing::layouts, testing::Matrix, testing::random_matrix, testing::random_second_moment, testing::thread_counts;

constexpr double nan = std::numeric_limits<double>::quiet_NaN();
const bool blocking_fixed = (fix_eigen_blocking(), true);  // as the module does when it is loaded

Matrix<double> square(std::vector<std::vector<double>> entries) {
    Matrix<double> h(static_cast<Index>(entries.size()), static_cast<Index>(entries.size()));
    for (std::size_t r = 0; r < entries.size(); ++r)
        for (std::size_t c = 0; c < entries.size(); ++c) h(static_cast<Index>(r), static_cast<Index>(c)) = entries[r][c];
    return h;
}

// The double loop of the definition; with `magnitudes` the sum of the terms' magnitudes.
template <class Real>
long double naive_quadratic_form(const Matrix<Real>& e, const Matrix<double>& h, Index rows, Index cols, bool magnitudes = false) {
    long double sum = 0;
    for (Index r = 0; r < rows; ++r)
        for (Index i = 0; i < cols; ++i)
            for (Index j = 0; j < cols; ++j) {
                const long double term = static_cast<long double>(e(r, i)) * h(i, j) * e(r, j);
                sum += magnitudes ? std::fabs(term) : term;
            }
    return sum;
}

bool same_bits(const std::vector<double>& a, const std::vector<double>& b) {
    return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin(), [](double x, double y) { return std::bit_cast<std::uint64_t>(x) == std::bit_cast<std::uint64_t>(y); });
}

// ---- Hessian

TEST(HessianSum, BatchesLayoutAndThreadsDoNotReachTheBytes) {
    const Index tokens = 600, cols = 200;  // three panels of 256 tokens, two tiles of 128 columns
    const Matrix<float> x = random_matrix(tokens, cols);
    Matrix<double> expected(cols, cols);
    Hessian whole(cols);
    whole.update(x.view(), 1);
    whole.matrix(expected.view(), 1);
    EXPECT_EQ(whole.tokens(), tokens);
    EXPECT_EQ(whole.cols(), cols);
    for (Index i = 0; i < cols; i += 7)
        for (Index j = 0; j < cols; j += 3) {
            double sum = 0, magnitude = 0;
            for (Index t = 0; t < tokens; ++t) {
                sum += static_cast<double>(x(t, i)) * x(t, j);
                magnitude += std::fabs(static_cast<double>(x(t, i)) * x(t, j));
            }
            // A panel sums 256 float32 products in float32: 256 units of 2^-24 of the sum of magnitudes.
            EXPECT_LE(std::fabs(expected(i, j) - sum / tokens), 256 * 0x1p-24 * magnitude / tokens);
            EXPECT_EQ(expected(i, j), expected(j, i));
        }
    for (const Layout layout : layouts)
        for (const int threads : thread_counts)
            for (const Index batch : {1, 100, 256, 600}) {
                const Matrix<float> y(x, layout, std::numeric_limits<float>::quiet_NaN());
                Hessian h(cols);
                for (Index t = 0; t < tokens; t += batch) {
                    const auto v = y.view();
                    h.update({v.row(t), std::min(batch, tokens - t), cols, v.row_stride}, threads);
                }
                Matrix<double> out(cols, cols, layout, nan);
                h.matrix(out.view(), threads);
                EXPECT_EQ(out, expected);
                EXPECT_TRUE(out.padding_untouched());
            }
}

TEST(HessianSum, MergesForAnyNumberOfThreads) {
    const Index cols = 130;
    const Matrix<float> x = random_matrix(300, cols, 1), y = random_matrix(77, cols, 2);
    std::vector<Matrix<double>> results;
    for (const int threads : thread_counts) {
        Hessian a(cols), b(cols);
        a.update(x.view(), threads);
        b.update(y.view(), threads);
        a.merge(b, threads);
        EXPECT_EQ(a.tokens(), 377);
        EXPECT_EQ(b.tokens(), 77);
        results.emplace_back(cols, cols);
        a.matrix(results.back().view(), threads);
        EXPECT_EQ(results.back(), results.front());
    }
    for (Index i = 0; i < cols; i += 11)
        for (Index j = 0; j < cols; ++j) {
            double sum = 0, magnitude = 0;
            for (const auto* stream : {&x, &y})
                for (Index t = 0; t < (stream == &x ? 300 : 77); ++t) {
                    sum += static_cast<double>((*stream)(t, i)) * (*stream)(t, j);
                    magnitude += std::fabs(static_cast<double>((*stream)(t, i)) * (*stream)(t, j));
                }
            EXPECT_LE(std::fabs(results.front()(i, j) - sum / 377), 256 * 0x1p-24 * magnitude / 377);
        }
    Hessian narrow(3), one(3), empty(3);
    Matrix<double> zero(3, 3, contiguous, 5.0);
    empty.matrix(zero.view(), 1);
    EXPECT_EQ(zero, Matrix<double>(3, 3));
    expect_refused("a Hessian needs at least one column, got 0", [] { Hessian none(0); });
    expect_refused("a Hessian cannot be merged into itself", [&] { one.merge(one, 1); });
    expect_refused("the other Hessian has 130 columns; this one has 3", [&] { one.merge(Hessian(cols), 1); });
    expect_refused("x has 130 columns; this Hessian has 3", [&] { narrow.update(x.view(), 1); });
}

// ---- Factor

TEST(FactorOfH, IsTheCholeskyFactorInReversedOrder) {
    const Index n = 150;
    const Matrix<double> h = random_second_moment(n);
    constexpr Index size = 10;
    for (const Order order : {Order::natural, Order::activation, Order::group}) {
        const Factor factor(h.view(), order, 0.01, size);
        ASSERT_TRUE(factor.usable());
        EXPECT_EQ(factor.kind(), order);
        EXPECT_EQ(factor.damping(), 0.01);
        EXPECT_EQ(factor.dead_columns(), 0);
        double trace = 0;
        for (Index i = 0; i < n; ++i) trace += h(i, i);
        EXPECT_DOUBLE_EQ(factor.lambda(), 0.01 * trace / n);
        EXPECT_DOUBLE_EQ(factor.dead_weight(), 0.01 * trace / n);
        const auto group_sum = [&](Index group) {
            double sum = 0;
            for (Index c = group * size; c < (group + 1) * size; ++c) sum += h(c, c);
            return sum;
        };
        std::vector<bool> seen(static_cast<std::size_t>(n));
        for (const Index c : factor.order()) seen[static_cast<std::size_t>(c)] = true;
        EXPECT_EQ(std::count(seen.begin(), seen.end(), true), n);
        for (Index i = 0; i + 1 < n; ++i) {
            const Index now = factor.order()[static_cast<std::size_t>(i)], next = factor.order()[static_cast<std::size_t>(i + 1)];
            const bool group_ends = (i + 1) % size == 0;
            EXPECT_TRUE(order == Order::natural      ? next == now + 1
                        : order == Order::activation ? h(now, now) >= h(next, next)
                        : group_ends                 ? now / size != next / size && group_sum(now / size) >= group_sum(next / size)
                                                     : now / size == next / size && h(now, now) >= h(next, next));
        }
        for (Index i = 0; i < n; ++i)
            for (Index j = 0; j <= i; ++j) {
                double sum = 0, magnitude = 0;
                for (Index k = 0; k <= j; ++k) {
                    const double term = factor.unit()(i, k) * factor.pivots()[k] * factor.unit()(j, k);
                    sum += term;
                    magnitude += std::fabs(term);
                }
                const double expected = h(factor.column(i), factor.column(j)) + (i == j ? 0.01 * trace / n : 0);
                // Cholesky's residual (Higham, theorem 10.3) and our own sum: n + 1 units each of the product of magnitudes; scaling to the unit form adds a few.
                EXPECT_LE(std::fabs(sum - expected), (2 * n + 8) * 0x1p-53 * magnitude);
            }
        for (Index i = 0; i < n; ++i) {
            EXPECT_EQ(factor.unit()(i, i), 1.0);
            EXPECT_DOUBLE_EQ(factor.diagonal()[i], h(factor.column(i), factor.column(i)) + 0.01 * trace / n);
            for (Index j = i + 1; j < n; ++j) EXPECT_EQ(factor.unit()(i, j), h(factor.column(i), factor.column(j)));  // R itself
        }
        for (const Layout layout : layouts) {
            const Factor same(Matrix<double>(h, layout, nan).view(), order, 0.01, size);
            EXPECT_EQ(same.order(), factor.order());
            EXPECT_EQ(same.unit(), factor.unit());
            EXPECT_EQ(same.pivots(), factor.pivots());
            EXPECT_EQ(same.diagonal(), factor.diagonal());
        }
    }
}

TEST(FactorOfH, EqualDiagonalsKeepTheirOrder) {
    Matrix<double> h(40, 40);
    for (Index i = 0; i < 40; ++i) h(i, i) = i % 3 == 1 ? 2 : 1;
    const Factor factor(h.view(), Order::activation, 0.01);
    for (Index i = 0; i + 1 < 40; ++i) {
        const Index now = factor.order()[static_cast<std::size_t>(i)], next = factor.order()[static_cast<std::size_t>(i + 1)];
        EXPECT_TRUE(h(now, now) > h(next, next) || (h(now, now) == h(next, next) && now < next));
    }
    const Matrix<double> level = square({{1, 0, 0, 0, 0, 0}, {0, 2, 0, 0, 0, 0}, {0, 0, 2, 0, 0, 0}, {0, 0, 0, 2, 0, 0}, {0, 0, 0, 0, 2, 0}, {0, 0, 0, 0, 0, 1}});  // groups of 3, 4 and 3
    EXPECT_EQ(Factor(level.view(), Order::group, 0.01, 2).order(), (std::vector<Index>{2, 3, 1, 0, 4, 5}));
    EXPECT_EQ(Factor(level.view(), Order::group, 0.01, 1).order(), Factor(level.view(), Order::activation, 0.01).order());
    EXPECT_EQ(Factor(level.view(), Order::group, 0.01, 6).order(), (std::vector<Index>{1, 2, 3, 4, 0, 5}));
}

TEST(FactorOfH, CutsDeadColumnsOut) {
    const Matrix<double> h = square({{4, 9, 1, 0}, {9, 0, 9, 0}, {1, 9, 2, 0}, {0, 0, 0, 0}});  // what stands beside a zero diagonal is noise
    const Factor factor(h.view(), Order::natural, 0.1);
    ASSERT_TRUE(factor.usable());
    EXPECT_EQ(factor.dead_columns(), 2);
    EXPECT_EQ(factor.damping(), 0.1);
    // Positions are reversed: columns 3, 2, 1, 0. λ = 0.1 * mean(4, 2), the live ones alone, and what a dead column weighs; its pivot is the square of its root, three roundings.
    EXPECT_DOUBLE_EQ(factor.lambda(), 0.3);
    EXPECT_DOUBLE_EQ(factor.dead_weight(), 0.3);
    for (const Index dead : {0, 2}) {
        EXPECT_EQ(factor.diagonal()[dead], factor.dead_weight());
        EXPECT_NEAR(factor.pivots()[dead], 0.3, 4 * 0x1p-54);
    }
    EXPECT_DOUBLE_EQ(factor.diagonal()[1], 2.3);
    EXPECT_DOUBLE_EQ(factor.diagonal()[3], 4.3);
    EXPECT_NEAR(factor.pivots()[1], 2.3, 4 * 0x1p-52);
    EXPECT_NEAR(factor.pivots()[3], 4.3 - 1 / 2.3, 16 * 0x1p-52);
    for (Index i = 0; i < 4; ++i)
        for (Index j = 0; j < i; ++j) {
            if (i == 3 && j == 1)
                EXPECT_NEAR(factor.unit()(i, j), 1 / 2.3, 4 * 0x1p-53);
            else
                EXPECT_EQ(factor.unit()(i, j), 0.0);
            EXPECT_EQ(factor.unit()(j, i), i == 3 && j == 1 ? 1.0 : 0.0);  // R, where the noise is gone too
        }
}

TEST(FactorOfH, ADeadColumnWeighsTheDampingAskedButAHundredthAtLeast) {
    // Two live columns whose mean is 3 and one dead; singular enough for b to call for more damping than was asked.
    const auto factor = [](double b, double asked) { return Factor(square({{2, b, 0}, {b, 4, 0}, {0, 0, 0}}).view(), Order::natural, asked); };
    for (const double asked : {0.0, 0.001, 0.01, 0.02, 0.5, 2.0}) {
        EXPECT_EQ(factor(1, asked).damping(), asked);
        EXPECT_DOUBLE_EQ(factor(1, asked).dead_weight(), 3 * std::max(asked, 0.01));
        EXPECT_DOUBLE_EQ(factor(1, asked).lambda(), 3 * asked);
    }
    const Factor raised = factor(3, 0.02);  // det = 8 - 9 + 6 λ + λ², λ = 3 damping: 0.02 and no less than 0.06 is needed
    EXPECT_TRUE(raised.usable());
    EXPECT_DOUBLE_EQ(raised.damping(), 0.2);
    EXPECT_DOUBLE_EQ(raised.lambda(), 0.6);
    EXPECT_DOUBLE_EQ(raised.dead_weight(), 0.06);  // the one asked: how dear a dead weight is does not depend on how hard the live ones were to factorise
    EXPECT_EQ(raised.diagonal()[0], raised.dead_weight());
}

TEST(FactorOfH, AZeroHessianIsAllDeadColumns) {
    const Factor factor(Matrix<double>(5, 5).view(), Order::activation, 0.01);
    EXPECT_TRUE(factor.usable());
    EXPECT_EQ(factor.dead_columns(), 5);
    EXPECT_EQ(factor.damping(), 0.01);
    EXPECT_EQ(factor.unit(), Columns<double>::Identity(5, 5));
    EXPECT_EQ(factor.pivots(), Eigen::VectorXd::Ones(5));
    EXPECT_EQ(factor.diagonal(), Eigen::VectorXd::Ones(5));
    EXPECT_EQ(factor.lambda(), 0);
    EXPECT_EQ(factor.dead_weight(), 1);
}

TEST(FactorOfH, RaisesTheDampingTenfoldUpToOne) {
    const auto off_diagonal = [](double b) { return square({{1, b}, {b, 1}}); };  // eigenvalues 1 - b and 1 + b
    const auto damping = [&](double b, double asked) {
        const Factor factor(off_diagonal(b).view(), Order::natural, asked);
        EXPECT_TRUE(factor.usable());
        return factor.damping();
    };
    EXPECT_EQ(damping(0.5, 0), 0);
    EXPECT_EQ(damping(1.0, 0), 0.01);  // singular
    EXPECT_EQ(damping(1.0, 0.003), 0.003);
    EXPECT_EQ(damping(1.005, 0), 0.01);
    EXPECT_DOUBLE_EQ(damping(1.05, 0.01), 0.1);
    EXPECT_DOUBLE_EQ(damping(1.5, 0.01), 1);
    const Factor failed(off_diagonal(1.5).view(), Order::natural, 0.003);  // 0.003, 0.03, 0.3; the next would be 3
    EXPECT_FALSE(failed.usable());
    EXPECT_DOUBLE_EQ(failed.damping(), 0.3);
}

TEST(FactorOfH, GivesUpBeyondOne) {
    const Matrix<double> h = square({{1, 3}, {3, 1}});
    for (const double asked : {0.0, 0.01, 0.1, 1.0}) {
        const Factor factor(h.view(), Order::natural, asked);
        EXPECT_FALSE(factor.usable());
        EXPECT_DOUBLE_EQ(factor.damping(), 1.0);
        Matrix<float> w = random_matrix(2, 2);
        Matrix<std::uint8_t> scales(2, 1), codes(2, 1);
        expect_refused("the factor is not usable", [&] { solve("nvfp4", w.view(), scales.view(), 1, factor, nullptr, {}, codes.view(), 1); });
    }
    EXPECT_EQ(Factor(h.view(), Order::natural, 5).damping(), 5);  // what was asked beyond 1 is tried, and nothing more
    EXPECT_TRUE(Factor(h.view(), Order::natural, 5).usable());
}

TEST(FactorOfH, ADiagonalNegativeByRoundingIsMendedByDamping) {
    const Factor mended(square({{1, 0}, {0, -1e-17}}).view(), Order::activation, 0.01);
    EXPECT_TRUE(mended.usable());
    EXPECT_EQ(mended.damping(), 0.01);
    EXPECT_EQ(mended.dead_columns(), 0);
    const Factor raised(square({{1, 0}, {0, -1e-17}}).view(), Order::activation, 0);
    EXPECT_TRUE(raised.usable());
    EXPECT_EQ(raised.damping(), 0.01);
    EXPECT_FALSE(Factor(square({{1, 0}, {0, -1}}).view(), Order::activation, 0.01).usable());  // no rounding makes that
}

TEST(FactorOfH, APivotOfNoiseCountsAsFailure) {
    // Two equal columns but for rounding: the second pivot is what is left of 1 - 1.
    const double almost = 1 + 0x1p-52;
    const Factor factor(square({{almost, 1}, {1, 1}}).view(), Order::natural, 0);
    EXPECT_TRUE(factor.usable());
    EXPECT_EQ(factor.damping(), 0.01);
}

TEST(FactorOfH, Refuses) {
    const Matrix<double> h = random_second_moment(4);
    expect_refused("hessian has shape (4, 3); it must be square", [] { Factor(Matrix<double>(4, 3).view(), Order::natural, 0); });
    expect_refused("damping is -0.01", [&] { Factor(h.view(), Order::natural, -0.01); });
    expect_refused("it must be 0 or more", [&] { Factor(h.view(), Order::natural, nan); });
    expect_refused("unknown order \"random\"; known: natural, activation, group", [] { order_named("random"); });
    expect_refused("hessian has 4 columns; groups of 3 do not divide them", [&] { Factor(h.view(), Order::group, 0.01, 3); });
    expect_refused("groups of 0 do not divide them", [&] { Factor(h.view(), Order::group, 0.01, 0); });
    expect_refused("unknown precision \"float16\"; known: float32, float64", [] { precision_named("float16"); });
    EXPECT_EQ(order_named("natural"), Order::natural);
    EXPECT_EQ(order_named("activation"), Order::activation);
    EXPECT_EQ(order_named("group"), Order::group);
    EXPECT_EQ(precision_named("float32"), Precision::float32);
    EXPECT_EQ(precision_named("float64"), Precision::float64);
}

// ---- solve

struct Problem {
    const char* format;
    Index group_size;
    Precision precision;
};

class Solve : public ::testing::TestWithParam<Problem> {
protected:
    static constexpr Index rows = 150, cols = 288;  // three tiles of 64 rows, three blocks of 128 columns
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
            const SolverOptions options{p.precision, search, MxRule::even, rounds};
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
        // The losses are those of the codes and scales given back. A round's fall is a sum of d · (2 P + d R) over groups, d being the change of a group's errors e: P = e R of n products, two
        // group updates of it and a few operations, each of relative error u, m of them in all; |d| and the errors on the way are below |e| + |e'|, and P counts twice.
        const Matrix<double> r = damped(h);
        const double u = p.precision == Precision::float32 ? 0x1p-24 : 0x1p-53, m = static_cast<double>(cols + 2 * p.group_size + 8) * u;
        double bound = loss_bound(factor, errors[0]);
        EXPECT_LE(std::fabs(losses[0] - naive_quadratic_form(errors[0], r, rows, cols)), bound);
        for (std::size_t k = 1; k < losses.size(); ++k) {
            Matrix<double> both(rows, cols), magnitudes(cols, cols);
            for (Index row = 0; row < rows; ++row)
                for (Index c = 0; c < cols; ++c) both(row, c) = std::fabs(errors[k - 1](row, c)) + std::fabs(errors[k](row, c));
            for (Index i = 0; i < cols; ++i)
                for (Index j = 0; j < cols; ++j) magnitudes(i, j) = std::fabs(r(i, j));
            bound += 4 * m / (1 - m) * static_cast<double>(naive_quadratic_form(both, magnitudes, rows, cols));
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
    const SolverResult many = solve(p.format, weight.view(), refined.view(), tensor_scale, factor, nullptr, {p.precision, true, MxRule::even, 5}, again.view(), 2);
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

// ---- shift_to_inputs

TEST(ShiftToInputs, SolvesForTheTargetWhateverTheLayoutAndTheThreads) {
    const Index rows = 70, cols = 96;
    const Matrix<float> weight = random_matrix(rows, cols);
    Matrix<double> h = random_second_moment(cols), cross = random_second_moment(cols, 9);
    for (Index i = 0; i < cols; ++i) h(17, i) = h(i, 17) = 0;
    for (Index i = 0; i < cols; ++i) cross(3, i) *= 1.5;  // no symmetric matrix
    const double strength = 0.75;
    for (const Order order : {Order::natural, Order::activation, Order::group}) {
        const Factor factor(h.view(), order, 0.01, 16);
        ASSERT_TRUE(factor.usable());
        Matrix<float> target(rows, cols);
        shift_to_inputs(weight.view(), cross.view(), h.view(), factor, strength, target.view(), 1);
        for (Index r = 0; r < rows; ++r) {
            EXPECT_EQ(target(r, 17), weight(r, 17));
            for (Index c = 0; c < cols; ++c) {
                if (c == 17) continue;
                // (target - w)(H + λI) = strength * w (cross - H). The target is rounded to float32; float64's part, of some thousand operations on numbers that the factor lets grow by no more
                // than its condition (101 at a damping of 0.01, times what the diagonals differ by), stays below that rounding too.
                double residual = 0, magnitude = 0;
                for (Index k = 0; k < cols; ++k) {
                    const double damped = k == 17 ? 0.0 : h(k, c) + (k == c ? factor.lambda() : 0.0);
                    residual += (static_cast<double>(target(r, k)) - weight(r, k)) * damped - strength * weight(r, k) * (cross(k, c) - h(k, c));
                    magnitude += std::fabs(target(r, k) * damped) + 0x1p-24 * std::fabs(weight(r, k)) * (std::fabs(cross(k, c)) + std::fabs(h(k, c)));
                }
                EXPECT_LE(std::fabs(residual), 2 * 0x1p-24 * magnitude);
            }
        }
        for (const Layout layout : layouts)
            for (const int threads : thread_counts) {
                Matrix<float> same(rows, cols, layout, static_cast<float>(nan));
                shift_to_inputs(Matrix<float>(weight, layout, static_cast<float>(nan)).view(), Matrix<double>(cross, layout, nan).view(), Matrix<double>(h, layout, nan).view(), factor, strength, same.view(), threads);
                EXPECT_EQ(same, target);
                EXPECT_TRUE(same.padding_untouched());
            }
        Matrix<float> still(rows, cols);
        shift_to_inputs(weight.view(), cross.view(), h.view(), factor, 0, still.view(), 1);
        EXPECT_EQ(still, weight);
        shift_to_inputs(weight.view(), h.view(), h.view(), factor, 1, still.view(), 1);  // the inputs it was made for: nothing to make up
        EXPECT_EQ(still, weight);
        expect_refused("do not have the same columns", [&] { shift_to_inputs(weight.view(), Matrix<double>(cols, cols - 1).view(), h.view(), factor, 1, still.view(), 1); });
        expect_refused("do not have the same columns", [&] { shift_to_inputs(weight.view(), cross.view(), h.view(), factor, 1, Matrix<float>(rows - 1, cols).view(), 1); });
    }
}

// ---- quadratic_form

TEST(QuadraticForm, IsTheDoubleLoop) {
    for (const auto& [rows, cols] : {std::pair<Index, Index>{1, 1}, {3, 7}, {64, 256}, {70, 300}}) {  // tiles of 64 rows, strips of 256 columns
        const Matrix<float> e = random_matrix(rows, cols);
        const Matrix<double> h = random_second_moment(cols);
        const double form = quadratic_form(e.view(), h.view(), 1);
        // Sums of rows * cols² terms of two products, in whatever order: at most cols + tiles + a few roundings on the way of each.
        EXPECT_LE(std::fabs(form - naive_quadratic_form(e, h, rows, cols)), 2.0 * static_cast<double>(rows * cols + 4) * 0x1p-53 * naive_quadratic_form(e, h, rows, cols, true));
        for (const Layout layout : layouts)
            for (const int threads : thread_counts) {
                const Matrix<float> e2(e, layout, static_cast<float>(nan));
                const Matrix<double> h2(h, layout, nan);
                EXPECT_EQ(std::bit_cast<std::uint64_t>(quadratic_form(e2.view(), h2.view(), threads)), std::bit_cast<std::uint64_t>(form));
            }
    }
    EXPECT_EQ(quadratic_form(Matrix<float>(0, 4).view(), Matrix<double>(4, 4).view(), 2), 0.0);
    expect_refused("hessian has shape (5, 5); a matrix of 4 columns needs (4, 4)", [] { quadratic_form(Matrix<float>(2, 4).view(), Matrix<double>(5, 5).view(), 1); });
}

}  // namespace
}  // namespace mrgptq
