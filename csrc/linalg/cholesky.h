// A = L Lᵀ by panels of columns: each is factorised, then its share is taken off what lies to its right, tile by tile and thread by thread. The lower triangle is read and written, the
// upper one left alone. An element's arithmetic follows from its place, so the bytes do not depend on the number of threads.
//
// Real is what the products are made of: a panel's 128 are summed in it and added in float64. float needs half the time. It errs by float32's rounding of |L| |L|ᵀ, as a second moment does whose
// products are float32 themselves, and by nothing else; L's elements must be of a size that float32 squares.
#pragma once

#include "base/matrix_view.h"

namespace mrgptq {

// `columns` holds A column-major, (n, n), column c at columns + c * stride. False where a pivot is not a positive number; the triangle is then partly overwritten.
template <class Real>
bool factorize(double* columns, Index n, Index stride, int threads);

}  // namespace mrgptq
