// Square matrices that ought to equal their transposes.
#pragma once

#include "base/matrix_view.h"

namespace mrgptq {

struct Symmetry {
    Index nonfinite = -1;           // row-major position of the first NaN or infinity; where there is one, nothing else is meant
    double largest = 0;             // max |h|
    double apart = 0;               // max |h - hᵀ|, at (row, col) with row <= col; the first such in row-major order
    Index row = 0, col = 0;
};
Symmetry measure_symmetry(MatrixView<const double> h, int threads);

// h = (h + hᵀ) / 2 in place.
void make_symmetric(MatrixView<double> h, int threads);

// The upper triangle becomes the transposed lower one.
void mirror_lower(MatrixView<double> h, int threads);

}  // namespace mrgptq
