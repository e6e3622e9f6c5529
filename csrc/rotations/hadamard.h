// Block-diagonal Hadamard rotations: every block of k = 2^n columns is multiplied by the k x k Sylvester matrix divided by sqrt(k), which is symmetric and its own inverse.
//
// Butterflies of width 1, 2, 4, ... make k log2(k) additions of a block; reference.py adds in the same order, so both give the same bytes.
#pragma once

#include "base/matrix_view.h"

namespace mrgptq {

// out = x T for finite x. `out` may be `x`; it may not overlap it otherwise. Throws where a sum overflows float32: the values are then within a factor k of its largest number.
void rotate_columns(MatrixView<const float> x, Index block_size, MatrixView<float> out, int threads);

// h = Tᵀ h T in place. Both factors sqrt(1/k) are applied as one 1/k, a power of two and so exact: the rotated identity is the identity.
void rotate_both(MatrixView<double> h, Index block_size, int threads);

// The same for a symmetric h, made exactly symmetric.
void rotate_hessian(MatrixView<double> h, Index block_size, int threads);

}  // namespace mrgptq
