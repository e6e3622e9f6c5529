// Whatever reads a weight through a rotation answers, to the byte, as for a weight rotated before.
#include "rotations/rotated_rows.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "codecs/codec.h"
#include "gptq/eigen.h"
#include "gptq/factor.h"
#include "gptq/forms.h"
#include "gptq/shift.h"
#include "gptq/solver.h"
#include "matrices.h"
#include "refusal.h"

namespace mrgptq {
namespace {

using testing::expect_refused, testing::Layout, testing::layouts, testing::Matrix, testing::random_matrix, testing::random_second_moment, testing::thread_counts;

constexpr float nan = std::numeric_limits<float>::quiet_NaN();
constexpr Index rows = 75, cols = 96;  // two tiles of 32 rows and a rest
const bool blocking_fixed = (fix_eigen_blocking(), true);  // as the module does when it is loaded

Rotation rotation_named(const std::string& name) { return name == "hadamard" ? Rotation(Index{32}) : Rotation(random_matrix(48, 48, 9).view()); }

class Rotated : public ::testing::TestWithParam<const char*> {
protected:
    const Rotation rotation = rotation_named(GetParam());
    const Matrix<float> weight = random_matrix(rows, cols);
    const Matrix<float> before = rotated(weight);

    Matrix<float> rotated(const Matrix<float>& x) const {
        Matrix<float> out(x.view().rows, cols);
        rotate_columns(x.view(), rotation, out.view(), 1);
        return out;
    }

    // use(a weight to be rotated, threads) for every layout and number of them.
    template <class Use>
    void each(Use&& use) const {
        for (const Layout layout : layouts)
            for (const int threads : thread_counts) use(Matrix<float>(weight, layout, nan).view(), threads);
    }
};

INSTANTIATE_TEST_SUITE_P(Of, Rotated, ::testing::Values("hadamard", "dense"), [](const auto& info) { return std::string(info.param); });

TEST_P(Rotated, RowsAreThoseOfTheRotatedMatrix) {
    const RotatedRows some(weight.view(), rotation, 7, 3), own(weight.view(), Rotation{}, 7, 3);
    EXPECT_EQ(own.row(8), weight.view().row(8));
    EXPECT_EQ(own.view().rows, 3);
    for (Index r = 7; r < 10; ++r)
        for (Index c = 0; c < cols; ++c) {
            EXPECT_EQ(some.row(r)[c], before(r, c));
            EXPECT_EQ(some.view().row(r - 7)[c], before(r, c));
        }
}

TEST_P(Rotated, ScalesCodesAndSquareSums) {
    for (const auto& [format, size] : {std::pair{"nvfp4", Index{16}}, {"mxfp4", Index{32}}}) {
        const float tensor_scale = size == 16 ? 100.0f : 1.0f;
        Matrix<double> moments(cols, size);
        for (Index c = 0; c < cols; ++c)
            for (Index j = 0; j < size; ++j) moments(c, j) = c % size == j ? 1.0 + static_cast<double>(c % 5) : 0.25;
        for (const ScaleSearch search : {ScaleSearch::absmax, ScaleSearch::mse, ScaleSearch::hessian, ScaleSearch::hessian_block}) {
            const ScaleRule rule{search, MxRule::even, false};
            const Matrix<double> none(0, 0), &weights = search == ScaleSearch::absmax || search == ScaleSearch::mse ? none : moments;
            Matrix<std::uint8_t> scales(rows, cols / size), codes(rows, cols / 2);
            find_scales(format, rule, before.view(), tensor_scale, weights.view(), scales.view(), 1);
            encode(format, before.view(), scales.view(), tensor_scale, codes.view(), 1);
            const SquareSums sums = square_sums(format, before.view(), codes.view(), scales.view(), tensor_scale, 1);
            const FitSums fit = fit_sums(format, before.view(), codes.view(), scales.view(), tensor_scale, 1);
            each([&, format = format, size = size](MatrixView<const float> w, int threads) {  // named: Clang captures no structured binding before its version 16
                Matrix<std::uint8_t> s(rows, cols / size), q(rows, cols / 2);
                find_scales(format, rule, w, tensor_scale, weights.view(), s.view(), threads, rotation);
                EXPECT_EQ(s, scales);
                encode(format, w, scales.view(), tensor_scale, q.view(), threads, rotation);
                EXPECT_EQ(q, codes);
                const SquareSums same = square_sums(format, w, codes.view(), scales.view(), tensor_scale, threads, rotation);
                EXPECT_EQ(std::pair(same.error, same.energy), std::pair(sums.error, sums.energy));
                const FitSums fit_again = fit_sums(format, w, codes.view(), scales.view(), tensor_scale, threads, rotation);
                EXPECT_EQ(std::tuple(fit_again.error, fit_again.dot, fit_again.square), std::tuple(fit.error, fit.dot, fit.square));
            });
        }
    }
}

TEST_P(Rotated, SolvesAndForms) {
    const Matrix<double> h = random_second_moment(cols), a = random_second_moment(rows, 4);
    const Factor factor(h.view(), Order::group, 0.01, 16), outputs(a.view(), Order::activation, 0.05);
    for (const Factor* coupled : {static_cast<const Factor*>(nullptr), &outputs})
        for (const SolverOptions& options : {SolverOptions{Precision::float64, false, MxRule::even, 0}, SolverOptions{Precision::float32, true, MxRule::even, 2}}) {
            Matrix<std::uint8_t> given(rows, cols / 16), codes(rows, cols / 2);
            find_scales("nvfp4", ScaleRule{}, before.view(), 100, {}, given.view(), 1);
            Matrix<std::uint8_t> scales(given);
            const std::vector<double> losses = solve("nvfp4", before.view(), scales.view(), 100, factor, coupled, options, codes.view(), 1).losses;
            const PackedMatrix answer{"nvfp4", codes.view(), scales.view(), 100};
            const std::vector<double> forms = quadratic_forms<double>(before.view(), {answer}, h.view(), 1), short_forms = quadratic_forms<float>(before.view(), {answer}, h.view(), 1);
            const double form = coupled_form<float>(before.view(), answer, a.view(), h.view(), 1), energy = coupled_form<double>(before.view(), {}, a.view(), h.view(), 1);
            each([&](MatrixView<const float> w, int threads) {
                Matrix<std::uint8_t> s(given), q(rows, cols / 2);
                EXPECT_EQ(solve("nvfp4", w, s.view(), 100, factor, coupled, options, q.view(), threads, rotation).losses, losses);
                EXPECT_EQ(q, codes);
                EXPECT_EQ(s, scales);
                EXPECT_EQ(quadratic_forms<double>(w, {answer}, h.view(), threads, rotation), forms);
                EXPECT_EQ(quadratic_forms<float>(w, {answer}, h.view(), threads, rotation), short_forms);
                EXPECT_EQ(coupled_form<float>(w, answer, a.view(), h.view(), threads, rotation), form);
                EXPECT_EQ(coupled_form<double>(w, {}, a.view(), h.view(), threads, rotation), energy);
            });
        }
}

TEST_P(Rotated, FormsOfADiagonalAreTheDoubleLoop) {
    Matrix<double> d(1, cols);
    for (Index c = 0; c < cols; ++c) d(0, c) = c % 7 == 0 ? 0 : std::ldexp(1.0 + static_cast<double>(c), static_cast<int>(c % 40) - 20);
    const double form = diagonal_form(before.view(), d.view(), 1);
    long double sum = 0;
    for (Index r = 0; r < rows; ++r)
        for (Index c = 0; c < cols; ++c) sum += static_cast<long double>(d(0, c)) * before(r, c) * before(r, c);
    EXPECT_LE(std::fabs(form - static_cast<double>(sum)), static_cast<double>(rows + cols + 3) * 0x1p-53 * form);  // all terms are positive, and each meets at most as many roundings
    each([&](MatrixView<const float> w, int threads) { EXPECT_EQ(diagonal_form(w, d.view(), threads, rotation), form); });
    expect_refused("does not have the columns", [&] { diagonal_form(weight.view(), Matrix<double>(1, cols - 1).view(), 1, rotation); });
}

TEST_P(Rotated, ShiftedTargets) {
    const Matrix<double> h = random_second_moment(cols);
    Matrix<double> cross = h;
    for (Index i = 0; i < cols; ++i) cross(i, (i + 3) % cols) += 0.1;
    const Factor factor(h.view(), Order::activation, 0.01);
    for (const Matrix<float>& stream : {Matrix<float>(0, 0), random_matrix(rows, cols, 6)}) {
        const bool some = stream.view().rows > 0;
        Matrix<float> target(rows, cols);
        shift_to_inputs(before.view(), cross.view(), some ? rotated(stream).view() : stream.view(), factor, 0.5, target.view(), 1);
        each([&](MatrixView<const float> w, int threads) {
            Matrix<float> same(rows, cols);
            shift_to_inputs(w, cross.view(), stream.view(), factor, 0.5, same.view(), threads, rotation);
            EXPECT_EQ(same, target);
        });
    }
}

TEST(Rotated, RefusesBlocksThatDoNotDivideTheColumns) {
    const Rotation rotation(Index{64});
    const Matrix<float> w = random_matrix(2, cols);
    const Matrix<double> h = random_second_moment(cols), two = random_second_moment(2);
    const Factor factor(h.view(), Order::natural, 0.01);
    Matrix<std::uint8_t> scales(2, cols / 16), codes(2, cols / 2);
    Matrix<float> out(2, cols);
    const auto refuse = [](auto&& call) { expect_refused("64", call); };
    refuse([&] { find_scales("nvfp4", ScaleRule{}, w.view(), 1, {}, scales.view(), 1, rotation); });
    refuse([&] { encode("nvfp4", w.view(), scales.view(), 1, codes.view(), 1, rotation); });
    refuse([&] { square_sums("nvfp4", w.view(), codes.view(), scales.view(), 1, 1, rotation); });
    refuse([&] { solve("nvfp4", w.view(), scales.view(), 1, factor, nullptr, {}, codes.view(), 1, rotation); });
    refuse([&] { quadratic_forms<float>(w.view(), {}, h.view(), 1, rotation); });
    refuse([&] { coupled_form<float>(w.view(), {}, two.view(), h.view(), 1, rotation); });
    refuse([&] { diagonal_form(w.view(), Matrix<double>(1, cols).view(), 1, rotation); });
    refuse([&] { shift_to_inputs(w.view(), h.view(), {}, factor, 1, out.view(), 1, rotation); });
}

}  // namespace
}  // namespace mrgptq
