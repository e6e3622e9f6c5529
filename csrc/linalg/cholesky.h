// A = L Lᵀ by panels of columns: each is factorised, then its share is taken off what lies to its right, tile by tile and thread by thread. The lower triangle is read and written, the
// upper one left alone. An element's arithmetic follows from its place, so the bytes do not depend on the number of threads.
#pragma once

#include "base/matrix_view.h"

namespace mrgptq {

// `columns` holds A column-major, (n, n), column c at columns + c * stride. False where a pivot is not a positive number; the triangle is then partly overwritten.
bool factorize(double* columns, Index n, Index stride, int threads);

}  // namespace mrgptq
