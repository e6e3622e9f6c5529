// The second moments that refinement and shifted targets are tried on, and what the factor adds to them.
#pragma once

#include <cmath>
#include <random>

#include "gptq/factor.h"
#include "matrices.h"

namespace mrgptq::testing {

enum class Kind { random, scaled, nearly_singular, integers, dead };
inline constexpr Kind kinds[] = {Kind::random, Kind::scaled, Kind::nearly_singular, Kind::integers, Kind::dead};

inline Matrix<double> second_moment(Kind kind, Index cols) {
    Matrix<double> h = random_second_moment(cols);
    std::mt19937_64 generator(5);
    if (kind == Kind::nearly_singular) {  // of a quarter as many tokens as columns
        const Matrix<float> x = random_matrix(cols / 4, cols);
        for (Index i = 0; i < cols; ++i)
            for (Index j = 0; j < cols; ++j) {
                h(i, j) = 0;
                for (Index t = 0; t < cols / 4; ++t) h(i, j) += static_cast<double>(x(t, i)) * x(t, j);
            }
    }
    for (Index i = 0; i < cols; ++i)
        for (Index j = 0; j <= i; ++j) {
            if (kind == Kind::scaled) h(i, j) = std::ldexp(h(i, j), static_cast<int>(-(i % 12) - (j % 12)));  // diagonals over seven decades
            if (kind == Kind::integers) h(i, j) = i == j ? 2.0 * static_cast<double>(cols) : static_cast<double>(generator() % 8 == 0);
            if (kind == Kind::dead && (i % 3 == 0 || j % 3 == 0)) h(i, j) = 0;
            h(j, i) = h(i, j);
        }
    return h;
}

inline double damping_of(Kind kind) { return kind == Kind::nearly_singular ? 1e-6 : kind == Kind::integers ? 0.0 : 0.01; }

inline Matrix<float> weights(Kind kind, Index rows, Index cols) {
    Matrix<float> w = random_matrix(rows, cols, 3);
    if (kind == Kind::integers)
        for (Index r = 0; r < rows; ++r)
            for (Index c = 0; c < cols; ++c) w(r, c) = static_cast<float>((7 * r + 5 * c) % 25 - 12) / 2;
    return w;
}

// R = H + λI, dead columns cut out, as factor.h defines it.
inline Matrix<double> damped(const Matrix<double>& h, const Factor& factor) {
    const Index n = factor.cols();
    Matrix<double> r = h;
    for (Index i = 0; i < n; ++i)
        for (Index j = 0; j < n; ++j) r(i, j) = h(i, i) == 0 || h(j, j) == 0 ? (i == j ? factor.dead_weight() : 0) : h(i, j) + (i == j ? factor.lambda() : 0);
    return r;
}

}  // namespace mrgptq::testing
