// Shifted targets against the normal equations, over every layout and number of threads.
#include "gptq/shift.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <utility>
#include <vector>

#include "refusal.h"
#include "second_moments.h"

namespace mrgptq {
namespace {

using testing::damped, testing::expect_refused, testing::Kind, testing::Layout, testing::layouts, testing::Matrix, testing::random_matrix, testing::second_moment, testing::thread_counts;

constexpr double nan = std::numeric_limits<double>::quiet_NaN();

TEST(ShiftToInputs, AnswersTheNormalEquationsInAnyLayout) {
    const Index rows = 70, n = 150;
    const double strength = 0.75;
    const Matrix<float> w = random_matrix(rows, n, 4), skew = random_matrix(n, n, 5), lost = random_matrix(rows, n, 6), none(0, 0);
    for (const auto& [kind, stream] : {std::pair{Kind::random, &none}, std::pair{Kind::dead, &none}, std::pair{Kind::random, &lost}, std::pair{Kind::dead, &lost}}) {
        const Matrix<double> h = second_moment(kind, n);
        Matrix<double> cross = h;
        for (Index i = 0; i < n; ++i)
            for (Index j = 0; j < n; ++j) cross(i, j) += 0.1 * skew(i, j);
        for (const Order order : {Order::group, Order::activation, Order::natural}) {
            const Factor factor(h.view(), order, 0.01, order == Order::group ? 10 : 1);
            const Matrix<double> r = damped(h, factor);
            Matrix<float> target(rows, n);
            shift_to_inputs(w.view(), cross.view(), stream->view(), factor, strength, target.view(), 1);
            double moved = 0;
            for (Index row = 0; row < rows; ++row)
                for (Index j = 0; j < n; ++j) {
                    if (h(j, j) == 0) {
                        EXPECT_EQ(target(row, j), w(row, j));
                        continue;
                    }
                    // (target - W) R = strength (W (cross - H) + stream), but for the rounding of target to float32, u |target| |R|; what float64 adds is 1e-9 of that.
                    double left = 0, right = stream == &none ? 0 : strength * lost(row, j), magnitude = std::fabs(right) * 1e-6;
                    for (Index k = 0; k < n; ++k) {
                        left += (static_cast<double>(target(row, k)) - w(row, k)) * r(k, j);
                        right += strength * w(row, k) * (cross(k, j) - h(k, j));
                        magnitude += std::fabs(target(row, k) * r(k, j)) + 1e-6 * std::fabs(w(row, k) * cross(k, j));
                    }
                    EXPECT_LE(std::fabs(left - right), 1.01 * 0x1p-24 * magnitude);
                    moved = std::max(moved, std::fabs(right) / magnitude);
                }
            EXPECT_GT(moved, 1e-3);
            for (const Layout layout : layouts)
                for (const int threads : thread_counts) {
                    const Matrix<float> w2(w, layout, static_cast<float>(nan));
                    const Matrix<double> cross2(cross, layout, nan);
                    const Matrix<float> stream2(*stream, layout, static_cast<float>(nan));
                    Matrix<float> target2(rows, n, layout, -7.0f);
                    shift_to_inputs(w2.view(), cross2.view(), stream2.view(), factor, strength, target2.view(), threads);
                    EXPECT_EQ(target2, target);
                    EXPECT_TRUE(target2.padding_untouched());
                }
        }
    }
}

TEST(ShiftToInputs, RefusesShapesThatDoNotFit) {
    const Matrix<double> h = second_moment(Kind::random, 32), narrow = second_moment(Kind::random, 16);
    const Factor factor(h.view(), Order::group, 0.01, 16), small(narrow.view(), Order::group, 0.01, 16);
    const Matrix<float> w = random_matrix(3, 32);
    Matrix<float> target(3, 32), short_target(2, 32);
    const auto shift = [&](const Matrix<double>& cross, const Factor& f, Matrix<float>& out, const Matrix<float>& stream = Matrix<float>(0, 0)) {
        shift_to_inputs(w.view(), cross.view(), stream.view(), f, 1, out.view(), 1);
    };
    for (const auto& call : std::vector<std::function<void()>>{[&] { shift(narrow, factor, target); }, [&] { shift(h, small, target); }, [&] { shift(h, factor, short_target); }})
        expect_refused("weight, cross, factor and target do not have the same columns", call);
    for (const Matrix<float>& stream : {Matrix<float>(3, 16), Matrix<float>(2, 32)}) expect_refused("stream does not have the shape of weight", [&] { shift(h, factor, target, stream); });
    shift(h, factor, target);
    EXPECT_EQ(target, w);  // the inputs are the same: nothing to answer
}

}  // namespace
}  // namespace mrgptq
