// The quadratic forms that reports measure errors by, in float64, summed in an order that no number of threads changes.
#pragma once

#include "base/matrix_view.h"

namespace mrgptq {

// tr(E H Eᵀ) for E (rows, cols) float32 and a symmetric H (cols, cols).
double quadratic_form(MatrixView<const float> e, MatrixView<const double> h, int threads);

// tr(A E H Eᵀ), A (rows, rows) symmetric too.
double coupled_form(MatrixView<const float> e, MatrixView<const double> a, MatrixView<const double> h, int threads);

}  // namespace mrgptq
