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

// out = (h + hᵀ) / 2, and what was found in h on the way. `out` may be h, of which nothing is then written that is as it should be; it may not overlap it otherwise. Without data it says that
// h is only to be looked through.
Symmetry make_symmetric(MatrixView<const double> h, MatrixView<double> out, int threads);

// Both triangles of `out` become the lower one of h over `divisor`. `out` may be h; it may not overlap it otherwise.
void mirror_lower(MatrixView<const double> h, double divisor, MatrixView<double> out, int threads);

}  // namespace mrgptq
