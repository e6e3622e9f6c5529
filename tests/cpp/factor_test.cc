// Hessian and factor over every layout and number of threads, and the cases in which a factor is hard or impossible to have.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

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

// Element (i, j <= i) of L Lᵀ as the factor keeps it, and of |L| |L|ᵀ.
std::pair<double, double> product_of(const Factor& factor, Index i, Index j) {
    double sum = 0, magnitude = 0;
    for (Index k = 0; k <= j; ++k) {
        const double term = factor.unit()(i, k) * factor.pivots()[k] * factor.unit()(j, k);
        sum += term;
        magnitude += std::fabs(term);
    }
    return {sum, magnitude};
}

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
                const auto [sum, magnitude] = product_of(factor, i, j);
                const double expected = h(factor.column(i), factor.column(j)) + (i == j ? 0.01 * trace / n : 0);
                // Cholesky's residual (Higham, theorem 10.3) and our own sum: n + 1 units each of the product of magnitudes; scaling to the unit form adds a few.
                EXPECT_LE(std::fabs(sum - expected), (2 * n + 8) * 0x1p-53 * magnitude);
            }
        for (Index i = 0; i < n; ++i) {
            EXPECT_EQ(factor.unit()(i, i), 1.0);
            EXPECT_DOUBLE_EQ(factor.diagonal()[i], h(factor.column(i), factor.column(i)) + 0.01 * trace / n);
            for (Index j = i + 1; j < n; ++j) EXPECT_EQ(factor.unit()(i, j), h(factor.column(i), factor.column(j)));  // R itself
        }
        const SecondMoment kept = factor.second_moment();
        EXPECT_TRUE(kept.square_of(n));
        for (Index i = 0; i < n; ++i)
            for (Index j = 0; j < n; ++j) ASSERT_EQ(kept.at(i, j), h(kept.column(i), kept.column(j)));
        for (const Layout layout : {contiguous, Layout{8, false}, Layout{7, false}}) {  // where H lies, its rows however far apart
            Matrix<double> room(h, layout, 7);
            const Factor there = Factor::in_place(room.view(), order, 0.01, size);
            EXPECT_EQ(there.unit().data(), room.view().data);
            EXPECT_EQ(there.unit(), factor.unit());
            EXPECT_EQ(there.pivots(), factor.pivots());
            EXPECT_TRUE(room.padding_untouched());
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
    for (const auto& [place, expected] : {std::pair<Index, double>{0, 0}, {1, 2}, {2, 0}, {3, 4}}) EXPECT_EQ(factor.second_moment().diagonal(place), expected);  // neither damped nor weighed
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
    EXPECT_EQ(failed.second_moment().at(0, 1), 1.5);
    EXPECT_EQ(failed.second_moment().at(1, 1), 1.0);
}

TEST(FactorOfH, AnAttemptLeavesNothingToTheNext) {  // the third is that of the damping that works, asked for at once
    Matrix<double> h = random_second_moment(300);
    for (Index c = 100; c < 300; ++c) h(c, c) *= 0.8;  // the first columns can be factorised at any damping, the last of these not
    for (const Precision precision : {Precision::float32, Precision::float64}) {
        const Factor raised(h.view(), Order::activation, 0.01, 1, precision);
        ASSERT_TRUE(raised.usable());
        ASSERT_GT(raised.damping(), 0.05);
        const Factor at_once(h.view(), Order::activation, raised.damping(), 1, precision);
        EXPECT_EQ(raised.damping(), at_once.damping());
        EXPECT_EQ(raised.unit(), at_once.unit());
        EXPECT_EQ(raised.pivots(), at_once.pivots());
    }
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

// ---- In float32

TEST(FactorOfH, InFloat32IsThatOfAMatrixWithinItsRounding) {
    const Index n = 300;
    const Matrix<double> h = random_second_moment(n);
    for (const Order order : {Order::natural, Order::activation, Order::group}) {
        const Factor factor(h.view(), order, 0.01, 10, Precision::float32), exact(h.view(), order, 0.01, 10);
        ASSERT_TRUE(factor.usable());
        EXPECT_EQ(factor.order(), exact.order());
        EXPECT_EQ(factor.diagonal(), exact.diagonal());
        EXPECT_NE(factor.pivots(), exact.pivots());
        for (Index i = 0; i < n; ++i)
            for (Index j = 0; j <= i; ++j) {
                const auto [sum, magnitude] = product_of(factor, i, j);
                const double expected = i == j ? factor.diagonal()[i] : h(factor.column(i), factor.column(j));
                EXPECT_LE(std::fabs(sum - expected), (132 * 0x1p-24 + (2 * n + 8) * 0x1p-53) * magnitude);  // chains of 128 products of rounded factors, beside what the test above allows
                EXPECT_EQ(factor.unit()(j, i), i == j ? 1.0 : h(factor.column(i), factor.column(j)));
            }
        for (const int threads : thread_counts) {
            const Factor same(h.view(), order, 0.01, 10, Precision::float32, threads);
            EXPECT_EQ(same.unit(), factor.unit());
            EXPECT_EQ(same.pivots(), factor.pivots());
        }
    }
}

TEST(FactorOfH, PowersOfTwoOnColumnsMoveNothingButExponents) {
    const Index n = 300;
    const Matrix<double> h = random_second_moment(n);
    const auto power = [](Index c) { return static_cast<int>((97 * c) % 901) - 450; };  // products far beyond float32
    Matrix<double> scaled(n, n);
    for (Index r = 0; r < n; ++r)
        for (Index c = 0; c < n; ++c) scaled(r, c) = std::ldexp(h(r, c), power(r) + power(c));
    for (const Precision precision : {Precision::float32, Precision::float64}) {
        const Factor plain(h.view(), Order::natural, 0, 1, precision), moved(scaled.view(), Order::natural, 0, 1, precision);
        ASSERT_TRUE(plain.usable() && moved.usable());
        EXPECT_EQ(moved.damping(), 0);
        for (Index p = 0; p < n; ++p) {
            const int own = power(plain.column(p));
            EXPECT_EQ(moved.pivots()[p], std::ldexp(plain.pivots()[p], 2 * own));
            for (Index k = p; k < n; ++k) ASSERT_EQ(moved.unit()(k, p), std::ldexp(plain.unit()(k, p), power(plain.column(k)) - own));
        }
    }
}

TEST(FactorOfH, TakesFloat64WhereFloat32WouldBlurAPivot) {
    const Index n = 300;
    // Column 290 is column 3 and a little noise of its own, so the second of them to be visited has no more left than that.
    const Matrix<double> plain = random_second_moment(n);
    const auto twins = [&](double noise) {
        Matrix<double> h = plain;
        for (Index c = 0; c < n; ++c) h(290, c) = h(c, 290) = h(3, c);
        h(290, 290) = h(3, 3) * (1 + noise);
        return h;
    };
    const double known = 8 * 131 * 0x1p-24;  // of its diagonal: a pivot eight times the largest error, see above
    for (const double noise : {1e-9, 0.9 * known, 1.1 * known, 0.01}) {
        const Factor factor(twins(noise).view(), Order::natural, 0, 1, Precision::float32), exact(twins(noise).view(), Order::natural, 0);
        ASSERT_TRUE(factor.usable() && exact.usable());
        EXPECT_EQ(factor.damping(), 0);
        EXPECT_EQ(factor.pivots() == exact.pivots() && factor.unit() == exact.unit(), noise < known) << noise;
    }
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

}  // namespace
}  // namespace mrgptq
