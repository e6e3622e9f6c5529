// What a block of a weight's rows has to make up for, given how the layer's outputs matter together.
//
// With A (rows, rows), the second moment of the loss's gradients at the outputs, the loss of errors E = W - Ŵ is tr(A E H Eᵀ), a Kronecker form whose Cholesky factor is that of A times that
// of H. So GPTQ's recursion carries over (Babai's nearest plane; YAQA, arXiv 2505.22988, rounds by the same two factors): with U the unit factor of A + λI in reversed visiting order, the rows B
// visited after the rows D aim at  W_B + M,  M = U_BB⁻ᵀ U_DBᵀ E_D,  and are otherwise rows like any other. Inside a block U_BB couples them too; that is left out, so that a block's rows can be
// solved side by side.
#pragma once

#include "base/matrix_view.h"
#include "gptq/factor.h"

namespace mrgptq {

// Rows solved together: a 32nd of them, in sixteens. Half as many take another 0 to 2 % off the loss, twice as many add 0 to 3 %.
constexpr Index row_block(Index rows) noexcept { return 16 * ((rows + 511) / 512); }

// M of the rows at positions [begin, end) of the outputs' factor, from the errors of those at [end, rows); errors (rows, cols) by position. out (end - begin, cols) is written.
template <class Real>
void owed(const Factor& outputs, Index begin, Index end, MatrixView<const float> errors, MatrixView<Real> out, int threads);

}  // namespace mrgptq
