// Products with packed weights: y = x Ŵᵀ, Ŵ being the values that codes and scales stand for.
#pragma once

#include "matmul/weight.h"

namespace mrgptq {

// x (tokens, cols), weight (rows, cols), out (tokens, rows), which may not overlap x.
//
// An element is a sum of chains in the order of the columns, 128 of them to a chain of fused multiply-adds begun at zero. So the bytes of a token's row depend neither on the tokens beside it nor
// on the number of threads; they are promised for each ISA level. What is not finite in x goes the way that IEEE 754 sends it.
void matmul(MatrixView<const float> x, const Weight& weight, MatrixView<float> out, int threads);

}  // namespace mrgptq
