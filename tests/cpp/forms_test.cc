// The quadratic forms that losses are measured by, against the loops of their definition.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "gptq/eigen.h"
#include "gptq/forms.h"
#include "matrices.h"
#include "refusal.h"

namespace mrgptq {
namespace {

using testing::expect_refused, testing::Layout, testing::layouts, testing::Matrix, testing::naive_quadratic_form, testing::random_matrix, testing::random_second_moment, testing::thread_counts;

constexpr double nan = std::numeric_limits<double>::quiet_NaN();
const bool blocking_fixed = (fix_eigen_blocking(), true);  // as the module does when it is loaded

template <class Real>
class Forms : public ::testing::Test {};
using Reals = ::testing::Types<float, double>;
TYPED_TEST_SUITE(Forms, Reals);

TYPED_TEST(Forms, QuadraticIsTheDoubleLoop) {
    constexpr double unit_roundoff = std::numeric_limits<TypeParam>::epsilon() / 2;
    for (const auto& [rows, cols] : {std::pair<Index, Index>{1, 1}, {3, 7}, {64, 256}, {70, 300}}) {  // tiles of 32 rows, strips of 256 columns
        const Matrix<float> e = random_matrix(rows, cols);
        const Matrix<double> h = random_second_moment(cols);
        const double form = quadratic_form<TypeParam>(e.view(), h.view(), 1);
        // Sums of rows * cols² terms of two products, in whatever order: at most cols + tiles + a few roundings on the way of each.
        EXPECT_LE(std::fabs(form - naive_quadratic_form(e, h, rows, cols)), 2.0 * static_cast<double>(rows * cols + 4) * unit_roundoff * naive_quadratic_form(e, h, rows, cols, true));
        for (const Layout layout : layouts)
            for (const int threads : thread_counts) {
                const Matrix<float> e2(e, layout, static_cast<float>(nan));
                const Matrix<double> h2(h, layout, nan);
                EXPECT_EQ(std::bit_cast<std::uint64_t>(quadratic_form<TypeParam>(e2.view(), h2.view(), threads)), std::bit_cast<std::uint64_t>(form));
            }
    }
    EXPECT_EQ(quadratic_form<TypeParam>(Matrix<float>(0, 4).view(), Matrix<double>(4, 4).view(), 2), 0.0);
    expect_refused("hessian has shape (5, 5); a matrix of 4 columns needs (4, 4)", [] { quadratic_form<TypeParam>(Matrix<float>(2, 4).view(), Matrix<double>(5, 5).view(), 1); });
}

TYPED_TEST(Forms, TogetherAreThoseOfEachDifference) {
    const Index rows = 230, cols = 300;  // two tiles a band and one thread
    const Matrix<float> w = random_matrix(rows, cols), q1 = random_matrix(rows, cols, 6), q2(rows, cols), narrow(rows, cols - 1);
    const Matrix<double> h = random_second_moment(cols);
    Matrix<float> e(rows, cols);
    for (Index r = 0; r < rows; ++r)
        for (Index c = 0; c < cols; ++c) e(r, c) = w(r, c) - q1(r, c);
    const double of_w = quadratic_form<TypeParam>(w.view(), h.view(), 1);
    const std::vector<double> expected{of_w, quadratic_form<TypeParam>(e.view(), h.view(), 1), of_w};
    for (const Layout layout : layouts)
        for (const int threads : thread_counts) {
            const Matrix<float> w2(w, layout, static_cast<float>(nan)), q3(q1, layout, static_cast<float>(nan));
            EXPECT_EQ(quadratic_forms<TypeParam>(w2.view(), {q3.view(), q2.view()}, h.view(), threads), expected);
        }
    expect_refused("differ in shape", [&] { quadratic_forms<TypeParam>(w.view(), {q2.view(), narrow.view()}, h.view(), 1); });
}

TYPED_TEST(Forms, KnowNoRange) {  // what float32 could not hold, were it not brought to size first
    const Matrix<float> e = random_matrix(40, 20);
    const Matrix<double> h = random_second_moment(20), a = random_second_moment(40, 3);
    for (const auto& [of_e, of_h] : {std::pair{-100, 100}, {60, 300}, {-60, -300}}) {
        Matrix<float> e2 = e;
        Matrix<double> h2 = h, a2 = a;
        for (Index r = 0; r < 40; ++r)
            for (Index c = 0; c < 20; ++c) e2(r, c) = std::ldexp(e(r, c), of_e);
        for (Index r = 0; r < 20; ++r)
            for (Index c = 0; c < 20; ++c) h2(r, c) = std::ldexp(h(r, c), of_h);
        for (Index r = 0; r < 40; ++r)
            for (Index c = 0; c < 40; ++c) a2(r, c) = std::ldexp(a(r, c), -of_h);
        EXPECT_EQ(quadratic_form<TypeParam>(e2.view(), h2.view(), 1), std::ldexp(quadratic_form<TypeParam>(e.view(), h.view(), 1), 2 * of_e + of_h));
        EXPECT_EQ(coupled_form<TypeParam>(e2.view(), a2.view(), h2.view(), 1), std::ldexp(coupled_form<TypeParam>(e.view(), a.view(), h.view(), 1), 2 * of_e));
    }
}

TYPED_TEST(Forms, AreFiniteWhereNothingIsNormal) {  // a factor that brought such values to 1 would be infinite
    Matrix<float> e(2, 2);
    Matrix<double> h(2, 2), a(2, 2);
    e(0, 0) = e(1, 1) = std::numeric_limits<float>::denorm_min();
    e(0, 1) = e(1, 0) = 0;
    h(0, 0) = h(1, 1) = a(0, 0) = a(1, 1) = 0x1p-1060;
    h(0, 1) = h(1, 0) = a(0, 1) = a(1, 0) = 0;
    EXPECT_EQ(quadratic_form<TypeParam>(e.view(), h.view(), 1), 0.0);  // 2^-1358 is less than float64 has
    EXPECT_EQ(coupled_form<TypeParam>(e.view(), a.view(), h.view(), 1), 0.0);
    h(0, 0) = h(1, 1) = a(0, 0) = a(1, 1) = 0x1p600;
    EXPECT_EQ(quadratic_form<TypeParam>(e.view(), h.view(), 1), 0x1p303);  // twice 2^-298+600
}

TYPED_TEST(Forms, CoupledIsTheDoubleLoop) {
    constexpr double unit_roundoff = std::numeric_limits<TypeParam>::epsilon() / 2;
    const Index rows = 270, cols = 11;  // two panels of rows
    const Matrix<float> e = random_matrix(rows, cols);
    const Matrix<double> a = random_second_moment(rows, 4), h = random_second_moment(cols, 5);
    long double sum = 0, magnitude = 0;
    for (Index r = 0; r < rows; ++r)
        for (Index s = 0; s < rows; ++s)
            for (Index i = 0; i < cols; ++i)
                for (Index j = 0; j < cols; ++j) {
                    const long double term = static_cast<long double>(a(r, s)) * e(s, i) * h(i, j) * e(r, j);
                    sum += term;
                    magnitude += std::fabs(term);
                }
    const double one = coupled_form<TypeParam>(e.view(), a.view(), h.view(), 1);
    // A chain of sums over rows, columns and both again; every term meets at most that many roundings.
    EXPECT_LE(std::fabs(one - static_cast<double>(sum)), 2.0 * static_cast<double>(2 * (rows + cols)) * unit_roundoff * static_cast<double>(magnitude));
    for (const int threads : thread_counts)
        for (const Layout layout : layouts) EXPECT_EQ(coupled_form<TypeParam>(Matrix<float>(e, layout, static_cast<float>(nan)).view(), Matrix<double>(a, layout).view(), Matrix<double>(h, layout).view(), threads), one);
    expect_refused("second moments", [&] { coupled_form<TypeParam>(e.view(), h.view(), a.view(), 1); });
}

}  // namespace
}  // namespace mrgptq
