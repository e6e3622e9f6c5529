// The quadratic forms that losses are measured by, against the loops of their definition.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "codecs/codec.h"
#include "gptq/eigen.h"
#include "gptq/factor.h"
#include "gptq/forms.h"
#include "matrices.h"
#include "refusal.h"

namespace mrgptq {
namespace {

using testing::expect_refused, testing::Layout, testing::layouts, testing::Matrix, testing::naive_quadratic_form, testing::random_matrix, testing::random_second_moment, testing::thread_counts;

constexpr double nan = std::numeric_limits<double>::quiet_NaN();
const bool blocking_fixed = (fix_eigen_blocking(), true);  // as the module does when it is loaded

// A matrix rounded, and what its codes and scales stand for.
struct Rounded {
    Matrix<std::uint8_t> codes, scales;
    Matrix<float> values;

    explicit Rounded(const Matrix<float>& w) : codes(w.view().rows, w.view().cols / 2), scales(w.view().rows, w.view().cols / 16), values(w.view().rows, w.view().cols) {
        quantize("nvfp4", ScaleRule{}, w.view(), 3.0f, codes.view(), scales.view(), 1);
        dequantize("nvfp4", codes.view(), scales.view(), 3.0f, values.view(), 1);
    }
    PackedMatrix packed() const { return {"nvfp4", codes.view(), scales.view(), 3.0f}; }

    Matrix<float> taken_from(const Matrix<float>& w) const {
        Matrix<float> e = w;
        for (Index r = 0; r < w.view().rows; ++r)
            for (Index c = 0; c < w.view().cols; ++c) e(r, c) -= values(r, c);
        return e;
    }
};

template <class Real>
double quadratic_form(MatrixView<const float> e, const SecondMoment& h, int threads) {
    return quadratic_forms<Real>(e, {}, h, threads)[0];
}

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
                Matrix<double> h2(h, layout, nan);
                for (Index i = 0; i < cols; ++i) std::fill_n(h2.view().row(i) + i + 1, cols - i - 1, nan);  // half of it is enough
                EXPECT_EQ(std::bit_cast<std::uint64_t>(quadratic_form<TypeParam>(e2.view(), SecondMoment(h2.view()), threads)), std::bit_cast<std::uint64_t>(form));
            }
    }
    EXPECT_EQ(quadratic_form<TypeParam>(Matrix<float>(0, 4).view(), SecondMoment(Matrix<double>(4, 4).view()), 2), 0.0);
    expect_refused("hessian has shape (5, 5); a matrix of 4 columns needs (4, 4)", [] { quadratic_form<TypeParam>(Matrix<float>(2, 4).view(), SecondMoment(Matrix<double>(5, 5).view()), 1); });
}

TYPED_TEST(Forms, TogetherAreThoseOfEachDifference) {
    const Index rows = 230, cols = 304;  // two tiles a band and one thread
    const Matrix<float> w = random_matrix(rows, cols);
    const Rounded q1(random_matrix(rows, cols, 6)), zero(Matrix<float>(rows, cols)), narrow(random_matrix(rows, cols - 16));
    const Matrix<double> h = random_second_moment(cols);
    const double of_w = quadratic_form<TypeParam>(w.view(), h.view(), 1);
    const std::vector<double> expected{of_w, quadratic_form<TypeParam>(q1.taken_from(w).view(), h.view(), 1), of_w};
    for (const Layout layout : layouts)
        for (const int threads : thread_counts) {
            const Matrix<float> w2(w, layout, static_cast<float>(nan));
            const Matrix<std::uint8_t> codes(q1.codes, layout, 0xEE), scales(q1.scales, layout, 0xEE);
            EXPECT_EQ(quadratic_forms<TypeParam>(w2.view(), {{"nvfp4", codes.view(), scales.view(), 3.0f}, zero.packed()}, h.view(), threads), expected);
        }
    expect_refused("differ in shape", [&] { quadratic_forms<TypeParam>(w.view(), {zero.packed(), narrow.packed()}, h.view(), 1); });
}

TYPED_TEST(Forms, ReadAFactorsSecondMomentWhereverItsColumnsStand) {
    constexpr double unit_roundoff = std::numeric_limits<TypeParam>::epsilon() / 2;
    const Index rows = 70, cols = 304;
    const Matrix<float> w = random_matrix(rows, cols);
    const Rounded q(w);
    const Matrix<float> e = q.taken_from(w);
    const Matrix<double> h = random_second_moment(cols), a = random_second_moment(rows, 4);
    const double bound = 2.0 * static_cast<double>(rows * cols + 4) * unit_roundoff * naive_quadratic_form(e, h, rows, cols, true), apart = coupled_form<TypeParam>(w.view(), q.packed(), a.view(), h.view(), 1);
    double magnitude = 0;  // tr(|A| |E| |H| |E|ᵀ)
    for (Index r = 0; r < rows; ++r)
        for (Index i = 0; i < cols; ++i) {
            double right = 0, left = 0;
            for (Index j = 0; j < cols; ++j) right += std::fabs(h(i, j) * e(r, j));
            for (Index s = 0; s < rows; ++s) left += std::fabs(a(r, s) * e(s, i));
            magnitude += left * right;
        }
    for (const Order order : {Order::natural, Order::activation, Order::group}) {
        const Factor factor(h.view(), order, 0.01, 16), outputs(a.view(), order, 0.01);
        EXPECT_LE(std::fabs(quadratic_forms<TypeParam>(w.view(), {q.packed()}, factor.second_moment(), 1)[1] - naive_quadratic_form(e, h, rows, cols)), bound);
        const double permuted = coupled_form<TypeParam>(w.view(), q.packed(), outputs.second_moment(), factor.second_moment(), 3);
        // The same terms in another order, each sum off as CoupledIsTheDoubleLoop has it.
        EXPECT_LE(std::fabs(permuted - apart), 4.0 * static_cast<double>(2 * (rows + cols)) * unit_roundoff * magnitude);
    }
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
        EXPECT_EQ(quadratic_form<TypeParam>(e2.view(), SecondMoment(h2.view()), 1), std::ldexp(quadratic_form<TypeParam>(e.view(), h.view(), 1), 2 * of_e + of_h));
        EXPECT_EQ(coupled_form<TypeParam>(e2.view(), {}, SecondMoment(a2.view()), SecondMoment(h2.view()), 1), std::ldexp(coupled_form<TypeParam>(e.view(), {}, a.view(), h.view(), 1), 2 * of_e));
    }
}

TYPED_TEST(Forms, AreFiniteWhereNothingIsNormal) {  // a factor that brought such values to 1 would be infinite
    Matrix<float> e(2, 2);
    Matrix<double> h(2, 2), a(2, 2);
    e(0, 0) = e(1, 1) = std::numeric_limits<float>::denorm_min();
    e(0, 1) = e(1, 0) = 0;
    h(0, 0) = h(1, 1) = a(0, 0) = a(1, 1) = 0x1p-1060;
    h(0, 1) = h(1, 0) = a(0, 1) = a(1, 0) = 0;
    EXPECT_EQ(quadratic_form<TypeParam>(e.view(), SecondMoment(h.view()), 1), 0.0);  // 2^-1358 is less than float64 has
    EXPECT_EQ(coupled_form<TypeParam>(e.view(), {}, SecondMoment(a.view()), SecondMoment(h.view()), 1), 0.0);
    h(0, 0) = h(1, 1) = a(0, 0) = a(1, 1) = 0x1p600;
    EXPECT_EQ(quadratic_form<TypeParam>(e.view(), SecondMoment(h.view()), 1), 0x1p303);  // twice 2^-298+600
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
    const double one = coupled_form<TypeParam>(e.view(), {}, a.view(), h.view(), 1);
    // A chain of sums over rows, columns and both again; every term meets at most that many roundings.
    EXPECT_LE(std::fabs(one - static_cast<double>(sum)), 2.0 * static_cast<double>(2 * (rows + cols)) * unit_roundoff * static_cast<double>(magnitude));
    for (const int threads : thread_counts)
        for (const Layout layout : layouts) EXPECT_EQ(coupled_form<TypeParam>(Matrix<float>(e, layout, static_cast<float>(nan)).view(), {}, SecondMoment(Matrix<double>(a, layout).view()), SecondMoment(Matrix<double>(h, layout).view()), threads), one);
    expect_refused("second moments", [&] { coupled_form<TypeParam>(e.view(), {}, h.view(), a.view(), 1); });
}

}  // namespace
}  // namespace mrgptq
