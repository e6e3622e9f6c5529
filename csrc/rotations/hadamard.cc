#include "rotations/hadamard.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <string>

#include "base/check.h"
#include "base/parallel.h"
#include "linalg/symmetric.h"

namespace mrgptq {
namespace {

constexpr Index row_grain = 8;
constexpr Index strip = 64;  // columns a piece of the second pass takes: 512 bytes of each row

void check_block(Index block_size, Index cols) {
    check(block_size >= 2 && std::has_single_bit(static_cast<std::size_t>(block_size)), "rotation block size is " + std::to_string(block_size) + "; it must be a power of two from 2 on");
    check(cols % block_size == 0, "the matrix has " + std::to_string(cols) + " columns; a rotation of block size " + std::to_string(block_size) + " needs a multiple of it");
}

// The unnormalised transform of k adjacent values.
template <class Real>
void butterflies(Real* x, Index k) noexcept {
    for (Index half = 1; half < k; half *= 2)
        for (Index start = 0; start < k; start += 2 * half)
            for (Index i = start; i < start + half; ++i) {
                const Real a = x[i], b = x[i + half];
                x[i] = a + b;
                x[i + half] = a - b;
            }
}

}  // namespace

void rotate_columns(MatrixView<const float> x, Index block_size, MatrixView<float> out, int threads) {
    check_block(block_size, x.cols);
    check(out.rows == x.rows && out.cols == x.cols, "rotation: out has another shape than x");
    const float factor = static_cast<float>(1.0 / std::sqrt(static_cast<double>(block_size)));
    parallel_for_ranges(x.rows, row_grain, threads, [&](Index begin, Index end) {
        for (Index r = begin; r < end; ++r) {
            float* row = out.row(r);
            if (row != x.row(r)) std::copy_n(x.row(r), x.cols, row);
            for (Index c = 0; c < x.cols; c += block_size) butterflies(row + c, block_size);
            std::uint32_t worst = 0;
            for (Index c = 0; c < x.cols; ++c) {
                row[c] *= factor;
                worst = std::max(worst, std::bit_cast<std::uint32_t>(row[c]) & 0x7F800000u);
            }
            if (worst == 0x7F800000u) check(false, "row " + std::to_string(r) + " overflows float32 when it is rotated by blocks of " + std::to_string(block_size));
        }
    });
}

void rotate_both(MatrixView<double> h, Index block_size, int threads) {
    check(h.rows == h.cols, "hessian has shape (" + std::to_string(h.rows) + ", " + std::to_string(h.cols) + "); it must be square");
    check_block(block_size, h.cols);
    parallel_for_ranges(h.rows, row_grain, threads, [&](Index begin, Index end) {
        for (Index r = begin; r < end; ++r)
            for (Index c = 0; c < h.cols; c += block_size) butterflies(h.row(r) + c, block_size);
    });
    const double factor = 1.0 / static_cast<double>(block_size);
    parallel_for_ranges(h.cols, strip, threads, [&](Index begin, Index end) {
        for (Index block = 0; block < h.rows; block += block_size)
            for (Index half = 1; half < block_size; half *= 2)
                for (Index start = block; start < block + block_size; start += 2 * half)
                    for (Index i = start; i < start + half; ++i)
                        for (Index c = begin; c < end; ++c) {
                            const double a = h.row(i)[c], b = h.row(i + half)[c];
                            h.row(i)[c] = a + b;
                            h.row(i + half)[c] = a - b;
                        }
        for (Index r = 0; r < h.rows; ++r)
            for (Index c = begin; c < end; ++c) h.row(r)[c] *= factor;
    });
}

void rotate_hessian(MatrixView<double> h, Index block_size, int threads) {
    rotate_both(h, block_size, threads);
    // Rounding leaves the halves an ulp apart; their mean makes them one matrix again, whichever triangle is read.
    make_symmetric(h, threads);
}

}  // namespace mrgptq
