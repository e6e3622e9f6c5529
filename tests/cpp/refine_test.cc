// Searched scales and rounds of refinement over every layout and number of threads; what refinement knows of a group and what it may do to the loss.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "codecs/codec.h"
#include "gptq/factor.h"
#include "gptq/gradients.h"
#include "gptq/refine.h"
#include "gptq/solver.h"
#include "matrices.h"
#include "refusal.h"
#include "second_moments.h"

namespace mrgptq {
namespace {

using testing::contiguous, testing::damped, testing::damping_of, testing::expect_refused, testing::Kind, testing::kinds, testing::Layout, testing::layouts, testing::Matrix, testing::second_moment, testing::thread_counts, testing::weights;

constexpr double nan = std::numeric_limits<double>::quiet_NaN();
const bool blocking_fixed = (fix_eigen_blocking(), true);  // as the module does when it is loaded

struct Problem {
    const char* format;
    Index group_size;
    Precision precision;
};

double unit_roundoff(Precision precision) { return precision == Precision::float32 ? 0x1p-24 : 0x1p-53; }

class Refinement : public ::testing::TestWithParam<Problem> {
protected:
    static constexpr Index rows = 150, cols = 288;  // four tiles of 32 rows and a rest, three blocks of 128 columns
    const Problem p = GetParam();
    const float tensor_scale = p.group_size == 16 ? 100.0f : 1.0f;

    struct Solved {
        Matrix<std::uint8_t> scales, codes;
        std::vector<double> losses;
        Matrix<double> error;
    };

    Solved run(const Matrix<float>& w, const Factor& factor, bool search, int rounds, int threads = 1, Layout layout = contiguous, MxRule mx = MxRule::even) const {
        Matrix<std::uint8_t> first(w.view().rows, w.view().cols / p.group_size);
        if (!search) find_scales(p.format, ScaleRule{}, w.view(), tensor_scale, {}, first.view(), 1);
        Solved s{Matrix<std::uint8_t>(first, layout, 0xFF), {w.view().rows, w.view().cols / 2, layout, 0xEE}, {}, {w.view().rows, w.view().cols}};
        const Matrix<float> laid(w, layout, static_cast<float>(nan));
        s.losses = solve(p.format, laid.view(), s.scales.view(), tensor_scale, factor, nullptr, {p.precision, search, mx, rounds, true}, s.codes.view(), threads).losses;
        EXPECT_TRUE(s.scales.padding_untouched() && s.codes.padding_untouched());
        Matrix<float> values(w.view().rows, w.view().cols);
        dequantize(p.format, s.codes.view(), s.scales.view(), tensor_scale, values.view(), 1);
        for (Index r = 0; r < w.view().rows; ++r)
            for (Index c = 0; c < w.view().cols; ++c) s.error(r, c) = static_cast<double>(w(r, c)) - values(r, c);
        return s;
    }
};

INSTANTIATE_TEST_SUITE_P(Formats, Refinement,
                         ::testing::Values(Problem{"nvfp4", 16, Precision::float32}, Problem{"nvfp4", 16, Precision::float64}, Problem{"mxfp4", 32, Precision::float32},
                                           Problem{"mxfp4", 32, Precision::float64}),
                         [](const auto& info) { return std::string(info.param.format) + (info.param.precision == Precision::float32 ? "InFloat32" : "InFloat64"); });

// Σ x R y over all rows by the double loop.
long double form(const Matrix<double>& x, const Matrix<double>& r, const Matrix<double>& y) {
    long double sum = 0;
    const auto view = x.view();
    for (Index row = 0; row < view.rows; ++row)
        for (Index i = 0; i < view.cols; ++i) {
            long double inner = 0;
            for (Index j = 0; j < view.cols; ++j) inner += r(i, j) * y(row, j);
            sum += inner * x(row, i);
        }
    return sum;
}
long double form(const Matrix<double>& e, const Matrix<double>& r) { return form(e, r, e); }

template <class Of>
Matrix<double> each(const Matrix<double>& a, const Matrix<double>& b, Of&& of) {
    Matrix<double> result(a.view().rows, a.view().cols);
    for (Index i = 0; i < a.view().rows; ++i)
        for (Index j = 0; j < a.view().cols; ++j) result(i, j) = of(a(i, j), b(i, j));
    return result;
}
Matrix<double> magnitudes(const Matrix<double>& a) {
    return each(a, a, [](double x, double) { return std::fabs(x); });
}

// refine.h's bound on what rounding does to a round's fall: 4 γ Σ (|e| + |e'|) |R| hᵀ, where cols products, a sum for every group and a change of E for every round before, two group updates and a
// few operations meet a term.
long double slack_of(const Matrix<double>& before, const Matrix<double>& after, const Matrix<double>& history, const Matrix<double>& r, Index group_size, int round, double u) {
    const Index n = before.view().cols;
    const double m = static_cast<double>(n + (round - 1) * (n / group_size + 1) + 2 * group_size + 8) * u;
    return 4 * m / (1 - m) * form(each(before, after, [](double a, double b) { return std::fabs(a) + std::fabs(b); }), magnitudes(r), history);
}

TEST_P(Refinement, LayoutAndThreadsDoNotReachTheBytes) {
    const Matrix<double> h = second_moment(Kind::dead, cols);
    const Matrix<float> w = weights(Kind::dead, rows, cols);
    const Factor factor(h.view(), Order::group, 0.01, p.group_size);
    for (const bool search : {true, false}) {
        const Solved one = run(w, factor, search, 2);
        for (const Layout layout : layouts)
            for (const int threads : thread_counts) {
                const Solved other = run(w, factor, search, 2, threads, layout);
                EXPECT_EQ(other.codes, one.codes);
                EXPECT_EQ(other.scales, one.scales);
                ASSERT_EQ(other.losses.size(), one.losses.size());
                for (std::size_t k = 0; k < one.losses.size(); ++k) EXPECT_EQ(std::bit_cast<std::uint64_t>(other.losses[k]), std::bit_cast<std::uint64_t>(one.losses[k]));
            }
    }
}

TEST_P(Refinement, NoRoundRaisesTheLossAndReportedFallsAreTrue) {
    const double u = unit_roundoff(p.precision);
    const Index n = 160;  // a block of 128 and a rest
    for (const Kind kind : kinds) {
        const Matrix<double> h = second_moment(kind, n);
        const Matrix<float> w = weights(kind, 70, n);
        const Factor factor(h.view(), Order::group, damping_of(kind), p.group_size);
        ASSERT_TRUE(factor.usable());
        EXPECT_EQ(factor.damping(), damping_of(kind));
        const Matrix<double> r = damped(h, factor);
        for (const bool search : {true, false}) {
            Solved before = run(w, factor, search, 0);
            long double was = form(before.error, r);
            Matrix<double> history = magnitudes(before.error);
            EXPECT_EQ(before.losses.size(), 1u);
            for (int rounds = 1; rounds <= 4; ++rounds) {
                Solved after = run(w, factor, search, rounds);
                const long double is = form(after.error, r);
                const Matrix<double> change = each(before.error, after.error, [](double a, double b) { return std::fabs(a - b); });
                history = each(history, change, std::plus<>());
                const long double slack = slack_of(before.error, after.error, history, r, p.group_size, rounds, u);
                EXPECT_LE(is, was + slack);
                if (after.losses.size() > before.losses.size()) {
                    const double fall = after.losses[after.losses.size() - 2] - after.losses.back();
                    EXPECT_GT(fall, 0);
                    EXPECT_LE(std::fabs(static_cast<double>(was - is) - fall), slack);
                } else {
                    EXPECT_EQ(after.codes, before.codes);
                    EXPECT_EQ(after.scales, before.scales);
                }
                if (rounds == 1 && kind != Kind::integers) {  // whose diagonal outweighs the rest, so that the search may leave nothing to mend
                    EXPECT_LT(is, was);
                }
                before = std::move(after);
                was = is;
            }
        }
    }
}

TEST_P(Refinement, FeedbackBeyondFloat32IsToldByItsLossesAndNotTakenForARaise) {
    const Index n = 128;
    Matrix<double> h = second_moment(Kind::random, n);
    const auto scale = [](Index c) { return std::pow(10.0, -30.0 * static_cast<double>(c * 37 % n) / static_cast<double>(n)); };
    for (Index i = 0; i < n; ++i)
        for (Index j = 0; j < n; ++j) h(i, j) *= scale(i) * scale(j);
    const Factor factor(h.view(), Order::group, 0, p.group_size);
    ASSERT_TRUE(factor.usable());
    const Solved s = run(weights(Kind::random, 37, n), factor, true, 2);
    for (const double loss : s.losses) EXPECT_EQ(std::isfinite(loss), p.precision == Precision::float64);
}

TEST_P(Refinement, RowsAndTheirNumberDoNotMatter) {
    const Factor factor(second_moment(Kind::random, cols).view(), Order::group, 0.01, p.group_size);
    const Matrix<float> w = weights(Kind::random, rows, cols);
    const Solved whole = run(w, factor, true, 3);
    for (const Index count : {1, 63, 64, 65}) {
        Matrix<float> last(count, cols);
        for (Index r = 0; r < count; ++r) std::copy_n(w.view().row(rows - 1 - r), cols, last.view().row(r));
        const Solved part = run(last, factor, true, 3);
        for (Index r = 0; r < count; ++r) {
            EXPECT_TRUE(std::equal(part.codes.view().row(r), part.codes.view().row(r) + cols / 2, whole.codes.view().row(rows - 1 - r)));
            EXPECT_TRUE(std::equal(part.scales.view().row(r), part.scales.view().row(r) + cols / p.group_size, whole.scales.view().row(rows - 1 - r)));
        }
    }
}

TEST_P(Refinement, SearchedScalesAreWrittenAndNotRead) {
    const Factor factor(second_moment(Kind::random, 64).view(), Order::group, 0.01, p.group_size);
    const Matrix<float> w = weights(Kind::random, 9, 64);
    std::vector<Matrix<std::uint8_t>> codes, scales;
    for (const std::uint8_t before : {0, 0x7F, 0xFF}) {
        scales.emplace_back(9, 64 / p.group_size, contiguous, before);
        codes.emplace_back(9, 32);
        solve(p.format, w.view(), scales.back().view(), tensor_scale, factor, nullptr, {p.precision, true, MxRule::even, 1, true}, codes.back().view(), 1);
        EXPECT_EQ(scales.back(), scales.front());
        EXPECT_EQ(codes.back(), codes.front());
    }
}

TEST_P(Refinement, EachMxRuleSearchesAroundItsOwnAbsmax) {
    if (p.group_size == 16) {  // E4M3 needs no MX rule
        const Factor factor(second_moment(Kind::random, 64).view(), Order::group, 0.01, 16);
        const Matrix<float> w = weights(Kind::random, 9, 64);
        EXPECT_EQ(run(w, factor, true, 0, 1, contiguous, MxRule::floor).scales, run(w, factor, true, 0, 1, contiguous, MxRule::ceil).scales);
        return;
    }
    const Factor factor(second_moment(Kind::random, 32).view(), Order::group, 0.01, 32);
    const Matrix<float> w = weights(Kind::random, 70, 32);
    for (const MxRule rule : {MxRule::floor, MxRule::ceil, MxRule::even}) {
        const Solved s = run(w, factor, true, 0, 1, contiguous, rule);
        Matrix<std::uint8_t> start(70, 1);
        find_scales(p.format, ScaleRule{ScaleSearch::absmax, rule, false}, w.view(), tensor_scale, {}, start.view(), 1);
        for (Index r = 0; r < 70; ++r) EXPECT_LE(std::abs(int{s.scales(r, 0)} - int{start(r, 0)}), 2);
    }
}

TEST_P(Refinement, RefusesWhatItCannotDo) {
    const Matrix<double> h = second_moment(Kind::random, 64);
    const Factor group(h.view(), Order::group, 0.01, p.group_size), activation(h.view(), Order::activation, 0.01);
    const Matrix<float> w = weights(Kind::random, 3, 64);
    expect_refused("rounds is -1; it must be 0 or more", [&] { run(w, group, true, -1); });
    for (const auto& [search, rounds] : {std::pair{true, 0}, {false, 1}, {true, 2}})
        expect_refused("searched scales and refinement rounds need a factor in group order", [&, search = search, rounds = rounds] { run(w, activation, search, rounds); });
    EXPECT_EQ(run(w, activation, false, 0).losses.size(), 1u);
    EXPECT_EQ(run(w, group, false, 0).losses.size(), 1u);  // group order alone needs neither
}

// ---- The parts

TEST(GroupFactors, AreTheFactorsOfEachGroupsBlock) {
    const Index n = 96;
    const Matrix<double> h = second_moment(Kind::dead, n);
    for (const Index size : {16, 32}) {
        const Factor factor(h.view(), Order::group, 0.01, size);
        const Matrix<double> r = damped(h, factor);
        const GroupFactors<double> factors = group_factors<double>(factor, size);
        for (Index first = 0; first < n; first += size)
            for (Index i = 0; i < size; ++i) {
                EXPECT_EQ(factors.diagonal[first + i], r(factor.column(first + i), factor.column(first + i)));
                for (Index j = 0; j < size; ++j) {
                    const double expected = r(factor.column(first + i), factor.column(first + j));
                    EXPECT_EQ(factors.gram(i, first + j), expected);
                    if (j > i) continue;
                    double sum = 0, magnitude = 0;
                    for (Index k = 0; k <= j; ++k) {
                        const double term = factors.unit(i, first + k) * factors.pivots[first + k] * factors.unit(j, first + k);
                        sum += term;
                        magnitude += std::fabs(term);
                    }
                    // Cholesky's residual is (size + 1) u of the product of magnitudes (Higham, theorem 10.3); dividing the columns and squaring the diagonal add six u.
                    EXPECT_LE(std::fabs(sum - expected), (2.0 * static_cast<double>(size) + 8) * 0x1p-53 * magnitude);
                }
            }
    }
}

// Whole numbers, so that every sum is exact: rows of two tiles move groups at random, block after block as refinement visits them, and P of a block is E R at each visit, of its own columns too.
template <class Real>
void expect_gradients_that_follow(Index size, double share) {
    const Index n = 288, tiles = 2;
    const Matrix<double> h = second_moment(Kind::integers, n);
    const Factor factor(h.view(), Order::group, 0.0, size);
    std::mt19937_64 generator(7);
    const auto drawn = [&] { return static_cast<Real>(generator() % 9) - 4; };
    std::vector<Tile<Real>> errors(tiles, Tile<Real>(lanes, n)), sums(tiles, Tile<Real>(lanes, block));
    for (auto& error : errors) error = error.unaryExpr([&](Real) { return drawn(); });
    Gradients<Real> gradients(tiles, n, size);
    Strips<Real> strips, own;
    LeftStrips<Real> left;
    for (int round = 0; round < 3; ++round)
        for (Index end = n; end > 0; end -= std::min(block, end)) {
            const Index begin = std::max<Index>(end - block, 0), width = end - begin;
            for (std::size_t t = 0; t < tiles; ++t) {
                sums[t].setZero();
                for (Index j = 0; j < width; ++j)
                    for (Index k = 0; k < n; ++k) sums[t].col(j) += static_cast<Real>(h(factor.column(k), factor.column(begin + j))) * errors[t].col(k);
                if (round == 0) gradients.store(static_cast<Index>(t), begin, width, sums[t]);
            }
            if (round > 0) for_moment_pieces(factor, begin, end, left, own, [&](const LeftStrips<Real>& piece, Index first) { gradients.follow(piece, first, begin, width); });
            gradients.forget(begin, end);
            for (std::size_t t = 0; t < tiles; ++t) {
                Tile<Real> p(lanes, block);
                gradients.load(static_cast<Index>(t), begin, width, p);
                ASSERT_EQ(p.leftCols(width), sums[t].leftCols(width)) << round << ", " << begin << ", " << t;
                Tile<Real> changes = Tile<Real>::Zero(lanes, block);
                for (Index first = begin; first < end; first += size)
                    for (Index r = 0; r < lanes; ++r)
                        if (static_cast<double>(generator() % 1000) < 1000 * share)
                            for (Index j = 0; j < size; ++j) changes(r, first - begin + j) = drawn();
                errors[t].middleCols(begin, width) += changes.leftCols(width);
                gradients.add(static_cast<Index>(t), begin, end, changes);
            }
        }
}

TEST(Gradients, AreThoseOfTheErrorsAtEveryVisit) {
    for (const Index size : {16, 32})
        for (const double share : {0.03, 0.5, 1.0}) {
            expect_gradients_that_follow<float>(size, share);
            expect_gradients_that_follow<double>(size, share);
        }
}

TEST(DampedLoss, AndSlackAreTheDoubleLoop) {
    const Index n = 160;
    const Matrix<double> h = second_moment(Kind::dead, n);
    const Factor factor(h.view(), Order::group, 0.01, 16);
    const Matrix<double> r = damped(h, factor);
    Tile<double> before(lanes, n), after(lanes, n), history(lanes, n);
    Matrix<double> e(lanes, n), e2(lanes, n), h2(lanes, n);
    std::mt19937_64 generator(6);
    std::normal_distribution<double> normal;
    for (Index row = 0; row < lanes; ++row)
        for (Index pos = 0; pos < n; ++pos) {
            before(row, pos) = e(row, factor.column(pos)) = normal(generator);
            after(row, pos) = e2(row, factor.column(pos)) = normal(generator);
            history(row, pos) = h2(row, factor.column(pos)) = std::fabs(normal(generator));
        }
    const auto magnitude = static_cast<double>(form(magnitudes(e), magnitudes(r)));
    EXPECT_LE(std::fabs(damped_loss(before, factor) - static_cast<double>(form(e, r))), 2.0 * static_cast<double>(n + lanes + 8) * 0x1p-53 * magnitude);
    for (const int round : {1, 2, 6})
        EXPECT_NEAR(refinement_slack(before, after, history, factor, 16, round) / static_cast<double>(slack_of(e, e2, h2, r, 16, round, 0x1p-53)), 1, 1e-12);
    EXPECT_EQ(damped_loss(Tile<float>(Tile<float>::Zero(lanes, n)), factor), 0);
}

}  // namespace
}  // namespace mrgptq
