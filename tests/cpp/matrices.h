// Matrices for the tests, which own their numbers and can lie in memory in every way that a MatrixView describes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "base/matrix_view.h"

namespace mrgptq::testing {

// How rows lie in memory: `padding` elements between them, in descending order where `flipped`.
struct Layout {
    Index padding = 0;
    bool flipped = false;
};

inline constexpr Layout contiguous{};
inline constexpr Layout layouts[] = {contiguous, {7, false}, {0, true}, {3, true}};
inline constexpr int thread_counts[] = {1, 2, 3, 8};

template <class T>
class Matrix {
public:
    // `filling` goes everywhere, the padding included: a NaN there shows a kernel that reads it.
    Matrix(Index rows, Index cols, Layout layout = contiguous, T filling = T{})
        : rows_(rows), cols_(cols), layout_(layout), filling_(filling), data_(static_cast<std::size_t>(rows * (cols + layout.padding)), filling) {}

    // The same numbers in another layout.
    Matrix(const Matrix& other, Layout layout, T filling = T{}) : Matrix(other.rows_, other.cols_, layout, filling) {
        for (Index r = 0; r < rows_; ++r) std::copy_n(other.view().row(r), cols_, view().row(r));
    }

    MatrixView<T> view() { return {data_.data() + first(), rows_, cols_, stride()}; }
    MatrixView<const T> view() const { return {data_.data() + first(), rows_, cols_, stride()}; }
    T& operator()(Index r, Index c) { return view().row(r)[c]; }
    const T& operator()(Index r, Index c) const { return view().row(r)[c]; }

    // Equal bit for bit, whatever the layouts.
    bool operator==(const Matrix& other) const {
        if (rows_ != other.rows_ || cols_ != other.cols_) return false;
        for (Index r = 0; r < rows_; ++r)
            if (std::memcmp(view().row(r), other.view().row(r), static_cast<std::size_t>(cols_) * sizeof(T)) != 0) return false;
        return true;
    }

    bool padding_untouched() const {
        const Index step = cols_ + layout_.padding;
        for (Index r = 0; r < rows_; ++r)
            for (Index c = cols_; c < step; ++c)
                if (std::memcmp(&data_[static_cast<std::size_t>(r * step + c)], &filling_, sizeof(T)) != 0) return false;
        return true;
    }

private:
    Index stride() const { return layout_.flipped ? -(cols_ + layout_.padding) : cols_ + layout_.padding; }
    Index first() const { return layout_.flipped && rows_ > 0 ? (rows_ - 1) * (cols_ + layout_.padding) : 0; }

    Index rows_, cols_;
    Layout layout_;
    T filling_;
    std::vector<T> data_;
};

// Normal numbers whose rows differ in size.
inline Matrix<float> random_matrix(Index rows, Index cols, unsigned seed = 1) {
    std::mt19937_64 generator(seed);
    std::normal_distribution<float> normal;
    Matrix<float> x(rows, cols);
    for (Index r = 0; r < rows; ++r)
        for (Index c = 0; c < cols; ++c) x(r, c) = std::ldexp(normal(generator), static_cast<int>(r % 7) - 3);
    return x;
}

// Xᵀ X / tokens of random X with twice as many tokens as columns, which differ in size: positive definite, and no two equal on the diagonal.
inline Matrix<double> random_second_moment(Index cols, unsigned seed = 2) {
    const Index tokens = 2 * cols;
    Matrix<float> x = random_matrix(tokens, cols, seed);
    Matrix<double> h(cols, cols);
    for (Index t = 0; t < tokens; ++t)
        for (Index i = 0; i < cols; ++i)
            for (Index j = 0; j < cols; ++j) h(i, j) += static_cast<double>(x(t, i)) * x(t, j) / static_cast<double>(tokens);
    return h;
}

// A step of linalg's chains, as the level that compiles this takes it.
template <class Real>
inline Real chained(Real a, Real b, Real c) {
#if defined(__FMA__) || defined(__aarch64__)
    return std::fma(a, b, c);
#else
    return a * b + c;
#endif
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

}  // namespace mrgptq::testing
