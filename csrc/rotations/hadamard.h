// Block-diagonal Hadamard rotations: every block of k = 2^n columns is multiplied by the k x k Sylvester matrix divided by sqrt(k), which is symmetric and its own inverse.
//
// Butterflies of width 1, 2, 4, ... make k log2(k) additions of a block; reference.py adds in the same order, so both give the same bytes.
#pragma once

#include <cstdint>

#include "base/matrix_view.h"

namespace mrgptq {

// Refuses a block size that is no power of two from 2 on or does not divide `cols`.
void check_rotation(Index block_size, Index cols);

// A piece of a row, `cols` a multiple of the block size; `out` may be `x`. Returns the bits of the largest magnitude written: from those of infinity on where a sum overflowed or a value
// of x was not finite, since every value of a block is in each of its sums.
std::uint32_t rotate_piece(const float* x, Index cols, Index block_size, float* out) noexcept;

// The same without the largest magnitude. While blocks that fit the registers are rotated, the first quarter of the `cols` values from `next` on is asked for from memory.
void rotate_and_prefetch(const float* x, Index cols, Index block_size, float* out, const float* next) noexcept;

// h = Tᵀ h T in place. Both factors sqrt(1/k) are applied as one 1/k, a power of two and so exact: the rotated identity is the identity.
void rotate_both(MatrixView<double> h, Index block_size, int threads);

// The same for an exactly symmetric h, whose halves, which rounding leaves an ulp apart, become their mean.
void rotate_hessian(MatrixView<double> h, Index block_size, int threads);

}  // namespace mrgptq
