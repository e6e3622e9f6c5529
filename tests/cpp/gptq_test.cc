// Hessian, factor and solver over every layout and number of threads, and the cases in which a factor is hard or impossible to have.
#include <gtest/gtest.h>

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
    for (const Order order : {Order::natural, Order::activation}) {
        const Factor factor(h.view(), order, 0.01);
        ASSERT_TRUE(factor.usable());
        EXPECT_EQ(factor.damping(), 0.01);
        EXPECT_EQ(factor.dead_columns(), 0);
        double trace = 0;
        for (Index i = 0; i < n; ++i) trace += h(i, i);
        for (Index i = 0; i + 1 < n; ++i) {
            const Index now = factor.order()[static_cast<std::size_t>(i)], next = factor.order()[static_cast<std::size_t>(i + 1)];
            EXPECT_TRUE(order == Order::natural ? next == now + 1 : h(now, now) >= h(next, next));
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
            for (Index j = i + 1; j < n; ++j) EXPECT_EQ(factor.unit()(i, j), 0.0);
        }
        for (const Layout layout : layouts) {
            const Factor same(Matrix<double>(h, layout, nan).view(), order, 0.01);
            EXPECT_EQ(same.order(), factor.order());
            EXPECT_EQ(same.unit(), factor.unit());
            EXPECT_EQ(same.pivots(), factor.pivots());
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
}

TEST(FactorOfH, CutsDeadColumnsOut) {
    const Matrix<double> h = square({{4, 9, 1, 0}, {9, 0, 9, 0}, {1, 9, 2, 0}, {0, 0, 0, 0}});  // what stands beside a zero diagonal is noise
    const Factor factor(h.view(), Order::natural, 0.1);
    ASSERT_TRUE(factor.usable());
    EXPECT_EQ(factor.dead_columns(), 2);
    EXPECT_EQ(factor.damping(), 0.1);
    // Positions are reversed: columns 3, 2, 1, 0. λ = 0.1 * mean(4, 2), the live ones alone.
    EXPECT_EQ(factor.pivots()[0], 1.0);
    EXPECT_EQ(factor.pivots()[2], 1.0);
    EXPECT_NEAR(factor.pivots()[1], 2.3, 4 * 0x1p-52);
    EXPECT_NEAR(factor.pivots()[3], 4.3 - 1 / 2.3, 16 * 0x1p-52);
    for (Index i = 0; i < 4; ++i)
        for (Index j = 0; j < i; ++j) {
            if (i == 3 && j == 1)
                EXPECT_NEAR(factor.unit()(i, j), 1 / 2.3, 4 * 0x1p-53);
            else
                EXPECT_EQ(factor.unit()(i, j), 0.0);
        }
}

TEST(FactorOfH, AZeroHessianIsAllDeadColumns) {
    const Factor factor(Matrix<double>(5, 5).view(), Order::activation, 0.01);
    EXPECT_TRUE(factor.usable());
    EXPECT_EQ(factor.dead_columns(), 5);
    EXPECT_EQ(factor.damping(), 0.01);
    EXPECT_EQ(factor.unit(), Columns<double>::Identity(5, 5));
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
        expect_refused("the factor is not usable", [&] { solve("nvfp4", w.view(), scales.view(), 1, factor, Precision::float64, codes.view(), 1); });
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
    expect_refused("unknown order \"random\"; known: natural, activation", [] { order_named("random"); });
    expect_refused("unknown precision \"float16\"; known: float32, float64", [] { precision_named("float16"); });
    EXPECT_EQ(order_named("natural"), Order::natural);
    EXPECT_EQ(order_named("activation"), Order::activation);
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

    void SetUp() override { find_scales(p.format, ScaleRule{}, weight.view(), tensor_scale, scales.view(), 1); }
};

INSTANTIATE_TEST_SUITE_P(Formats, Solve,
                         ::testing::Values(Problem{"nvfp4", 16, Precision::float32}, Problem{"nvfp4", 16, Precision::float64}, Problem{"mxfp4", 32, Precision::float32},
                                           Problem{"mxfp4", 32, Precision::float64}));

TEST_P(Solve, LayoutAndThreadsDoNotReachTheBytesAndTheLossIsTheQuadraticForm) {
    Matrix<double> h = random_second_moment(cols);
    for (Index i = 0; i < cols; ++i) h(17, i) = h(i, 17) = 0;  // one dead column
    const Factor factor(h.view(), Order::activation, 0.01);
    ASSERT_TRUE(factor.usable());
    const double loss = solve(p.format, weight.view(), scales.view(), tensor_scale, factor, p.precision, codes.view(), 1);
    for (const Layout layout : layouts)
        for (const int threads : thread_counts) {
            const Matrix<float> w(weight, layout, static_cast<float>(nan));
            const Matrix<std::uint8_t> s(scales, layout, 0xFF);  // NaN in either format
            Matrix<std::uint8_t> q(rows, cols / 2, layout, 0xEE);
            const double same = solve(p.format, w.view(), s.view(), tensor_scale, factor, p.precision, q.view(), threads);
            EXPECT_EQ(q, codes);
            EXPECT_EQ(std::bit_cast<std::uint64_t>(same), std::bit_cast<std::uint64_t>(loss));
            EXPECT_TRUE(q.padding_untouched());
        }

    Matrix<float> values(rows, cols);
    dequantize(p.format, codes.view(), scales.view(), tensor_scale, values.view(), 1);
    Matrix<double> error(rows, cols), damped = h;
    for (Index r = 0; r < rows; ++r)
        for (Index c = 0; c < cols; ++c) error(r, c) = static_cast<double>(weight(r, c)) - values(r, c);
    double trace = 0;
    for (Index i = 0; i < cols; ++i) trace += h(i, i);
    for (Index i = 0; i < cols; ++i) damped(i, i) = i == 17 ? 1 : h(i, i) + 0.01 * trace / (cols - 1);
    // loss = Σ pivot (t - q)², where t - q = Σ unit * error. In arithmetic of unit roundoff u the feedback of n terms (each error and each entry of `unit` rounded as well) is off by
    // (n + 4) u Σ |unit| |error|, t by u |t| and t - q by u of itself. The factor's own residual is (2 n + 8) 2^-53 of the product of magnitudes, see above.
    const double u = p.precision == Precision::float32 ? 0x1p-24 : 0x1p-53;
    double bound = 0;
    for (Index r = 0; r < rows; ++r)
        for (Index i = 0; i < cols; ++i) {
            double residual = 0, magnitude = 0;
            for (Index k = i; k < cols; ++k) {
                residual += factor.unit()(k, i) * error(r, factor.column(k));
                magnitude += std::fabs(factor.unit()(k, i) * error(r, factor.column(k)));
            }
            const double off = u * ((cols + 4) * magnitude + 2 * (std::fabs(values(r, factor.column(i))) + std::fabs(residual)));
            bound += factor.pivots()[i] * (2 * std::fabs(residual) * off + off * off + (4 * cols + 16) * 0x1p-53 * magnitude * magnitude);
        }
    EXPECT_LE(std::fabs(loss - naive_quadratic_form(error, damped, rows, cols)), bound);
    EXPECT_LT(bound, 0.01 * loss);  // else this would prove nothing
}

TEST_P(Solve, WithoutAnyInputItRoundsPlainly) {
    const Factor factor(Matrix<double>(cols, cols).view(), Order::natural, 0.01);
    solve(p.format, weight.view(), scales.view(), tensor_scale, factor, p.precision, codes.view(), 2);
    Matrix<std::uint8_t> plain(rows, cols / 2);
    encode(p.format, weight.view(), scales.view(), tensor_scale, plain.view(), 1);
    EXPECT_EQ(codes, plain);
}

TEST_P(Solve, RefusesShapesThatDoNotFit) {
    const Factor factor(random_second_moment(cols).view(), Order::natural, 0.01), narrow(random_second_moment(32).view(), Order::natural, 0.01);
    Matrix<std::uint8_t> more_scales(rows, cols / p.group_size + 1), fewer_codes(rows - 1, cols / 2);
    const auto run = [&](const Factor& f, Matrix<std::uint8_t>& s, Matrix<std::uint8_t>& q) { solve(p.format, weight.view(), s.view(), 1, f, p.precision, q.view(), 1); };
    expect_refused("the factor has 32 columns; weight has 288", [&] { run(narrow, scales, codes); });
    expect_refused("scales do not have one entry for each group", [&] { run(factor, more_scales, codes); });
    expect_refused("codes do not have half a byte for each weight", [&] { run(factor, scales, fewer_codes); });
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
