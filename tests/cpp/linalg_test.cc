// The kernel against the chain that it claims to be, Cholesky against the definition, symmetric matrices against double loops.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <tuple>
#include <type_traits>
#include <vector>

#include "linalg/cholesky.h"
#include "linalg/lanes.h"
#include "linalg/symmetric.h"
#include "matrices.h"

namespace mrgptq {
namespace {

using testing::chained;
using testing::contiguous;
using testing::layouts;
using testing::Layout;
using testing::Matrix;
using testing::random_second_moment;
using testing::thread_counts;

constexpr double nan = std::numeric_limits<double>::quiet_NaN();

template <class Real>
std::vector<Real> normals(Index count, unsigned seed) {
    std::mt19937_64 generator(seed);
    std::normal_distribution<Real> normal;
    std::vector<Real> values(static_cast<std::size_t>(count));
    for (Real& value : values) value = normal(generator);
    return values;
}

template <class Real>
class Kernel : public ::testing::Test {};
using Reals = ::testing::Types<float, double>;
TYPED_TEST_SUITE(Kernel, Reals);

TYPED_TEST(Kernel, EveryElementIsOneChainBegunAtZeroWhateverTheStrides) {
    using Real = TypeParam;
    constexpr Index rows = kernel_rows<Real>, cols = kernel_cols;
    for (const Index depth : {0, 1, 2, 7, 16, 128, 200})
        for (const Index a_stride : {rows, Index{lanes}, rows + 5})
            for (const Index b_stride : {cols, Index{lanes}})
                for (const Index c_stride : {rows, Index{lanes} + 3}) {
                    const auto a = normals<Real>((depth + 1) * a_stride, 1), b = normals<Real>((depth + 1) * b_stride, 2), before = normals<Real>(cols * c_stride, 3);
                    auto plus = before, minus = before;
                    multiply_tile<Real, false>(depth, a.data(), a_stride, b.data(), b_stride, plus.data(), c_stride);
                    multiply_tile<Real, true>(depth, a.data(), a_stride, b.data(), b_stride, minus.data(), c_stride);
                    auto expected_plus = before, expected_minus = before;
                    for (Index j = 0; j < cols; ++j)
                        for (Index r = 0; r < rows; ++r) {
                            Real chain = 0;
                            for (Index k = 0; k < depth; ++k) chain = chained(a[static_cast<std::size_t>(k * a_stride + r)], b[static_cast<std::size_t>(k * b_stride + j)], chain);
                            expected_plus[static_cast<std::size_t>(j * c_stride + r)] += chain;
                            expected_minus[static_cast<std::size_t>(j * c_stride + r)] -= chain;
                        }
                    ASSERT_EQ(plus, expected_plus) << depth;  // what lies between columns too
                    ASSERT_EQ(minus, expected_minus) << depth;
                }
}

TYPED_TEST(Kernel, ColumnsOfTheProductMayStandAnywhere) {
    using Real = TypeParam;
    constexpr Index rows = kernel_rows<Real>, cols = kernel_cols, depth = 16, stride = rows + 3;
    const auto a = normals<Real>(depth * rows, 1), b = normals<Real>(depth * cols, 2), before = normals<Real>(2 * cols * stride, 3);
    auto scattered = before, adjacent = before;
    const auto place = [](Index j) { return (2 * cols - 1 - (5 * j) % (2 * cols)) * stride; };
    multiply_tile<Real, false>(depth, a.data(), rows, b.data(), cols, [&](Index j) { return scattered.data() + place(j); });
    std::vector<Real> columns(static_cast<std::size_t>(cols * rows));
    for (Index j = 0; j < cols; ++j) std::copy_n(before.data() + place(j), rows, columns.data() + j * rows);
    multiply_tile<Real, false>(depth, a.data(), rows, b.data(), cols, columns.data(), rows);
    for (Index j = 0; j < cols; ++j) std::copy_n(columns.data() + j * rows, rows, adjacent.data() + place(j));
    EXPECT_EQ(scattered, adjacent);
}

template <Index across, class Real>
void expect_strips() {
    const Index room = 80;
    const auto from = normals<double>(room * room, 4);
    for (const Index depth : {5, 16})
        for (const Index width : {1, 3, 4, 8, 11, 16, 30, 64, 72})
            for (const bool transposed : {false, true}) {
                const Index row_step = transposed ? room : 1, col_step = transposed ? 1 : room, padded = (width + across - 1) / across * across;
                std::vector<Real> strips(static_cast<std::size_t>(padded * depth), Real(99));
                pack_strips<across>(from.data(), row_step, col_step, depth, width, strips.data());
                for (Index j = 0; j < padded; ++j)
                    for (Index k = 0; k < depth; ++k) {
                        const Real expected = j < width ? static_cast<Real>(from[static_cast<std::size_t>(k * row_step + j * col_step)]) : Real(0);
                        ASSERT_EQ(strips[static_cast<std::size_t>(j / across * across * depth + k * across + j % across)], expected);
                    }
            }
}

TYPED_TEST(Kernel, StripsHoldEveryElementAndZerosBehindTheLast) {
    expect_strips<kernel_cols, TypeParam>();
    expect_strips<kernel_rows<TypeParam>, TypeParam>();
}

// Sizes around the panel of 128 columns, the rows that go together and the columns of the kernel; the largest has three blocks of 256 below its first panel.
// By the type of its products.
template <class Real>
class Cholesky : public ::testing::Test {};
TYPED_TEST_SUITE(Cholesky, Reals);

TYPED_TEST(Cholesky, IsTheFactorAndLeavesTheUpperTriangleAlone) {
    for (const Index n : {1, 2, 5, 31, 32, 33, 127, 128, 129, 160, 165, 290, 650}) {
        const Matrix<double> h = random_second_moment(n);
        std::vector<double> a(static_cast<std::size_t>(n * n));
        for (Index c = 0; c < n; ++c)
            for (Index r = 0; r < n; ++r) a[static_cast<std::size_t>(c * n + r)] = r >= c ? h(r, c) : -1000.0 - static_cast<double>(r);
        ASSERT_TRUE(factorize<TypeParam>(a.data(), n, n, 1)) << n;
        for (Index r = 0; r < n; ++r)
            for (Index c = 0; c <= r; ++c) {
                double sum = 0, magnitude = 0;
                for (Index k = 0; k <= c; ++k) {
                    const double term = a[static_cast<std::size_t>(k * n + r)] * a[static_cast<std::size_t>(k * n + c)];
                    sum += term;
                    magnitude += std::fabs(term);
                }
                // Higham, Accuracy and Stability of Numerical Algorithms, theorem 10.3: |A - L Lᵀ| <= γ(n + 1) |L| |L|ᵀ, whatever the order of the sums; and our own sum, in float64
                // for the sake of machines whose long double is software, errs by as much. What lies a panel or more to the left
                // is taken off by chains of 128 products of rounded factors: 131 roundings of the type's, where it is not double, at most.
                const double m = 2 * static_cast<double>(n + 1) * 0x1p-53, chain = std::is_same_v<TypeParam, float> && c >= product_depth ? 131 * 0x1p-24 : 0;
                ASSERT_LE(std::fabs(sum - h(r, c)), (m / (1 - m) + chain / (1 - chain)) * magnitude) << n << ": " << r << ", " << c;
            }
        for (Index c = 1; c < n; ++c)
            for (Index r = 0; r < c; ++r) ASSERT_EQ(a[static_cast<std::size_t>(c * n + r)], -1000.0 - static_cast<double>(r));
    }
}

TYPED_TEST(Cholesky, ThreadsAndStrideDoNotReachTheBytes) {
    const Index n = 650;
    const Matrix<double> h = random_second_moment(n);
    std::vector<double> first;
    for (const Index stride : {n, n + 7})
        for (const int threads : thread_counts) {
            std::vector<double> a(static_cast<std::size_t>(n * stride), nan);
            for (Index c = 0; c < n; ++c)
                for (Index r = c; r < n; ++r) a[static_cast<std::size_t>(c * stride + r)] = h(r, c);
            ASSERT_TRUE(factorize<TypeParam>(a.data(), n, stride, threads));
            std::vector<double> lower;
            for (Index c = 0; c < n; ++c)
                for (Index r = c; r < n; ++r) lower.push_back(a[static_cast<std::size_t>(c * stride + r)]);
            if (first.empty()) first = lower;
            ASSERT_EQ(lower, first);
        }
}

TYPED_TEST(Cholesky, SaysNoWhereverThePivotFails) {
    const Index n = 200;
    const Matrix<double> h = random_second_moment(n);
    for (const Index bad : {0, 1, 50, 127, 128, 150, 199})
        for (const double pivot : {0.0, -1.0, nan}) {
            std::vector<double> a(static_cast<std::size_t>(n * n));
            for (Index c = 0; c < n; ++c)
                for (Index r = c; r < n; ++r) a[static_cast<std::size_t>(c * n + r)] = h(r, c);
            a[static_cast<std::size_t>(bad * n + bad)] = pivot;
            EXPECT_FALSE(factorize<TypeParam>(a.data(), n, n, 2)) << bad;
        }
}

TEST(Symmetric, MeasuresWhatDoubleLoopsFind) {
    std::mt19937 generator(5);
    for (const Index n : {1, 2, 63, 64, 65, 150})
        for (const Layout layout : layouts)
            for (const int threads : thread_counts) {
                Matrix<double> h(random_second_moment(n), layout, nan);
                for (Index r = 0; r < n; ++r)
                    for (Index c = 0; c < n; ++c) h(r, c) = std::nearbyint(h(r, c));  // so that equal changes are equal differences
                for (int change = 0; change < 4; ++change) h(static_cast<Index>(generator() % n), static_cast<Index>(generator() % n)) += 0.25;  // the same difference in several places
                if (n > 1) h(n - 1, n - 1) = -1e3;
                Symmetry expected;
                for (Index r = 0; r < n; ++r)
                    for (Index c = 0; c < n; ++c) {
                        expected.largest = std::max(expected.largest, std::fabs(h(r, c)));
                        if (c >= r && std::fabs(h(r, c) - h(c, r)) > expected.apart) {
                            expected.apart = std::fabs(h(r, c) - h(c, r));
                            expected.row = r;
                            expected.col = c;
                        }
                    }
                Matrix<double> out(n, n);
                for (const MatrixView<double> target : {out.view(), MatrixView<double>{}}) {
                    const Symmetry found = make_symmetric(h.view(), target, threads);
                    ASSERT_EQ(found.nonfinite, -1);
                    ASSERT_EQ(std::make_tuple(found.largest, found.apart, found.row, found.col), std::make_tuple(expected.largest, expected.apart, expected.row, expected.col)) << n;
                }
                for (const Index place : {n * n - 1, n * n / 2, n - 1, Index{0}}) {  // the last column among them, which no mirror image comes before
                    h(place / n, place % n) = place % 2 ? nan : -std::numeric_limits<double>::infinity();
                    ASSERT_EQ(make_symmetric(h.view(), out.view(), threads).nonfinite, place);
                    Matrix<double> in_place(h, layout, nan);
                    ASSERT_EQ(make_symmetric(in_place.view(), in_place.view(), threads).nonfinite, place);  // nothing is gone before it is found
                }
            }
}

// Wherever the two lie: in the first tile, in the last, in what the end cuts, beside the diagonal, in the corners; and wherever the matrix begins in a cache line.
TEST(Symmetric, OneElementApartIsFoundAnywhere) {
    for (const Index n : {2, 9, 40, 67})
        for (const Index offset : {0, 1, 6}) {
            const Matrix<double> moment = random_second_moment(n);
            Matrix<double> room(n, n + 8, contiguous, nan), out(n, n);
            const MatrixView<double> h{room.view().data + offset, n, n, n + 8};
            for (Index r = 0; r < n; ++r) std::copy_n(moment.view().row(r), n, h.row(r));
            for (Index r = 0; r < n; ++r)
                for (Index c = 0; c < n; ++c) {
                    double& element = h.row(r)[c];
                    if (r != c) {
                        element += 1;
                        const Symmetry found = make_symmetric(h, out.view(), 1);
                        ASSERT_EQ(std::make_pair(found.row, found.col), std::make_pair(std::min(r, c), std::max(r, c)));
                        ASSERT_EQ(found.apart, std::fabs(element - moment(r, c)));
                    }
                    element = nan;
                    ASSERT_EQ(make_symmetric(h, out.view(), 1).nonfinite, r * n + c);
                    element = moment(r, c);
                }
        }
}

TEST(Symmetric, HalvesBecomeTheirMeanOrTheLowerOneBesideTheMatrixAndInPlace) {
    for (const Index n : {1, 2, 63, 64, 65, 150})
        for (const Layout layout : layouts)
            for (const int threads : thread_counts) {
                Matrix<double> h(n, n);
                const auto values = normals<double>(n * n, 6);
                for (Index r = 0; r < n; ++r)
                    for (Index c = 0; c < n; ++c) h(r, c) = values[static_cast<std::size_t>(r * n + c)];
                Matrix<double> mean(h, layout, nan), mean_beside(n, n, layout, nan), again(n, n, layout, nan), mirrored(h, layout, nan), mirrored_beside(n, n, layout, nan);
                make_symmetric(h.view(), mean_beside.view(), threads);
                make_symmetric(mean.view(), mean.view(), threads);
                make_symmetric(mean.view(), again.view(), threads);
                mirror_lower(h.view(), 3, mirrored_beside.view(), threads);
                mirror_lower(mirrored.view(), 3, mirrored.view(), threads);
                for (Index r = 0; r < n; ++r)
                    for (Index c = 0; c < n; ++c) {
                        ASSERT_EQ(mean(r, c), 0.5 * (h(r, c) + h(c, r)));
                        ASSERT_EQ(mirrored(r, c), h(std::max(r, c), std::min(r, c)) / 3);
                    }
                ASSERT_EQ(mean_beside, mean);
                ASSERT_EQ(again, mean);
                ASSERT_EQ(mirrored_beside, mirrored);
                for (const auto* matrix : {&mean, &mean_beside, &again, &mirrored, &mirrored_beside}) ASSERT_TRUE(matrix->padding_untouched());
            }
}

}  // namespace
}  // namespace mrgptq
