// Block Hadamard rotations over every layout and number of threads, against the definition by a double loop.
#include "rotations/hadamard.h"
#include "rotations/rotation.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <limits>
#include <string>

#include "matrices.h"
#include "refusal.h"

namespace mrgptq {
namespace {

using testing::expect_refused, testing::Layout, testing::layouts, testing::Matrix, testing::random_matrix, testing::random_second_moment, testing::thread_counts;

constexpr float nan = std::numeric_limits<float>::quiet_NaN();

// Sylvester's matrix: -1 where the indices share an odd number of bits.
double sylvester(Index i, Index j) { return std::popcount(static_cast<std::size_t>(i & j)) % 2 ? -1.0 : 1.0; }

// rotate_columns gives `expected` for every layout, of the rotation's own matrix too, every number of threads and in place, and touches nothing else.
template <class MakeRotation>
void expect_rotated(MakeRotation&& make, const Matrix<float>& x, const Matrix<float>& expected) {
    for (const Layout in : layouts)
        for (const int threads : thread_counts) {
            const Rotation rotation = make(in);
            Matrix<float> y(x, in, nan);
            for (const Layout out : layouts) {
                Matrix<float> rotated(x.view().rows, x.view().cols, out, nan);
                EXPECT_EQ(rotate_columns(y.view(), rotation, rotated.view(), threads), -1);
                EXPECT_EQ(rotated, expected);
                EXPECT_TRUE(rotated.padding_untouched());
            }
            EXPECT_EQ(y, x);
            rotate_columns(y.view(), rotation, y.view(), threads);
            EXPECT_EQ(y, expected);
            EXPECT_TRUE(y.padding_untouched());
        }
}

class Hadamard : public ::testing::TestWithParam<Index> {
protected:
    const Index k = GetParam();
};

INSTANTIATE_TEST_SUITE_P(BlockSizes, Hadamard, ::testing::Values(2, 8, 32, 64));

TEST_P(Hadamard, RotatesEveryBlockForEveryLayoutAndNumberOfThreads) {
    const Index rows = 19, cols = 192;
    const Matrix<float> x = random_matrix(rows, cols);
    Matrix<float> expected(rows, cols);
    rotate_columns(x.view(), k, expected.view(), 1);
    for (Index r = 0; r < rows; ++r)
        for (Index block = 0; block < cols; block += k) {
            double error = 0, norm = 0;
            for (Index j = 0; j < k; ++j) {
                double sum = 0;
                for (Index i = 0; i < k; ++i) sum += x(r, block + i) * sylvester(i, j);
                error += std::pow(expected(r, block + j) - sum / std::sqrt(static_cast<double>(k)), 2);
                norm += std::pow(x(r, block + j), 2);
            }
            // log2(k) levels of butterflies, the factor and its product round by 2^-24 of the norm each.
            EXPECT_LE(std::sqrt(error), 1.01 * (std::log2(k) + 2) * 0x1p-24 * std::sqrt(norm));
        }
    expect_rotated([&](Layout) { return Rotation(k); }, x, expected);
}

TEST(AnyMatrix, MultipliesEveryBlockForEveryLayoutAndNumberOfThreads) {
    for (const Index k : {1, 3, 16, 33, 64}) {
        const Index rows = 19, cols = 17 * k;  // twice as many blocks as go side by side at most, and one
        const Matrix<float> x = random_matrix(rows, cols), block = random_matrix(k, k, 4);
        Matrix<float> expected(rows, cols);
        for (Index r = 0; r < rows; ++r)
            for (Index c = 0; c < cols; ++c) {
                float sum = 0;
                for (Index i = 0; i < k; ++i) sum += x(r, c / k * k + i) * block(i, c % k);
                expected(r, c) = sum;
            }
        EXPECT_EQ(Rotation(block.view()).block_size(), k);
        expect_rotated([&](Layout layout) { return Rotation(Matrix<float>(block, layout, nan).view()); }, x, expected);
    }
}

TEST(AnyMatrix, Refuses) {
    const Matrix<float> x = random_matrix(2, 9);
    Matrix<float> out(2, 9);
    expect_refused("rotation matrix has shape (2, 3); it must be square and not empty", [] { Rotation(Matrix<float>(2, 3).view()); });
    expect_refused("rotation matrix has shape (0, 0)", [] { Rotation(Matrix<float>(0, 0).view()); });
    expect_refused("the matrix has 9 columns; a rotation of block size 4 needs a multiple of it", [&] { rotate_columns(x.view(), Rotation(random_matrix(4, 4).view()), out.view(), 1); });
    const Matrix<float> huge(3, 3, layouts[0], 1e30f), large(2, 9, layouts[0], 1e30f);
    expect_refused("row 0 overflows float32 when it is rotated by blocks of 3", [&] { rotate_columns(large.view(), Rotation(huge.view()), out.view(), 2); });
}

TEST_P(Hadamard, RotatesAHessianForEveryLayoutAndNumberOfThreads) {
    const Index n = 192;
    const Matrix<double> h = random_second_moment(n);
    Matrix<double> expected = h;
    rotate_hessian(expected.view(), k, 1);
    for (Index r = 0; r < n; ++r)
        for (Index c = 0; c < n; ++c) {
            double sum = 0, magnitude = 0;
            for (Index i = r / k * k; i < r / k * k + k; ++i)
                for (Index j = c / k * k; j < c / k * k + k; ++j) {
                    sum += sylvester(i % k, r % k) * h(i, j) * sylvester(j % k, c % k);
                    magnitude += std::fabs(h(i, j));
                }
            // Any order of k² additions is off by k² units of the sum of magnitudes at most: twice that for the two sums compared.
            EXPECT_LE(std::fabs(expected(r, c) - sum / static_cast<double>(k)), 2.0 * static_cast<double>(k * k) * 0x1p-53 * magnitude / static_cast<double>(k));
            EXPECT_EQ(expected(r, c), expected(c, r));
        }
    for (const Layout layout : layouts)
        for (const int threads : thread_counts) {
            Matrix<double> rotated(h, layout, std::numeric_limits<double>::quiet_NaN());
            rotate_hessian(rotated.view(), k, threads);
            EXPECT_EQ(rotated, expected);
            EXPECT_TRUE(rotated.padding_untouched());
        }
}

TEST(HadamardRefuses, WhatIsNoPowerOfTwo) {
    Matrix<float> x(2, 24);
    Matrix<double> h(24, 24);
    for (const Index k : {0, 1, 3, 12, 24, -4}) {
        const std::string message = "rotation block size is " + std::to_string(k) + "; it must be a power of two from 2 on";
        expect_refused(message, [&] { rotate_columns(x.view(), k, x.view(), 1); });
        expect_refused(message, [&] { rotate_hessian(h.view(), k, 1); });
    }
    expect_refused("rotation block size is -9223372036854775808", [&] { rotate_columns(x.view(), std::numeric_limits<Index>::min(), x.view(), 1); });
}

TEST(HadamardRefuses, ShapesThatDoNotFitAndSumsThatOverflow) {
    Matrix<float> x(2, 24), fewer_rows(1, 24), huge(30, 16);
    Matrix<double> h(24, 24), tall(24, 8);
    expect_refused("the matrix has 24 columns; a rotation of block size 16 needs a multiple of it", [&] { rotate_columns(x.view(), 16, x.view(), 1); });
    expect_refused("the matrix has 24 columns; a rotation of block size 16 needs a multiple of it", [&] { rotate_hessian(h.view(), 16, 1); });
    expect_refused("out has another shape", [&] { rotate_columns(x.view(), 8, fewer_rows.view(), 1); });
    expect_refused("hessian has shape (24, 8); it must be square", [&] { rotate_hessian(tall.view(), 8, 1); });
    for (Index c = 0; c < 16; ++c) huge(21, c) = 1e38f;
    for (const int threads : thread_counts) {
        Matrix<float> out(30, 16);
        expect_refused("row 21 overflows float32", [&] { rotate_columns(huge.view(), 16, out.view(), threads); });
    }
}

}  // namespace
}  // namespace mrgptq
